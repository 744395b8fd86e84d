"""Asking a provider many things at once: the one loop that sends, waits, sends again, slows down and counts the money.
Used by taught and batch_jobs; knows nothing of quadruples. The SDKs' own retries are off: one of them sleeps as long as
a server says, the other gives up, and neither counts.

`Budget` holds the cap at any concurrency: the worst case of a request is set aside before it is sent, and settled from
the usage when it is answered. A request that ended without an answer may have been billed and counts in full.
"""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections import Counter
from typing import Any, NamedTuple

from common.basics import InputError
from common.ledger import Ledger
from common.providers import Failure, Prompt, Provider, Reply, Usage

LEAST_WAIT, MOST_WAIT = 0.5, 60.0  # seconds before a request is sent again: doubled from try to try, with jitter
MOST_PAUSE = 900.0  # a provider that asks to wait longer is asked tomorrow
FAILURES = 8  # in a row of one request, while others are answered
PATIENCE, FIRST_PATIENCE = 1800.0, 60.0  # seconds without any answer; before the first one
UNFIT = 5  # requests in a row, none like another, that a server refuses as bad
BATCH_DISCOUNT = 0.5
PRICES_AS_OF = "June 2026"
PRICES = {  # US dollars per million tokens: of the prompt, read from the cache, of the answer. From public lists
    "claude-opus-4-8": (5.0, 0.5, 25.0),
    "claude-sonnet-4-6": (3.0, 0.3, 15.0),
    "claude-haiku-4-5": (1.0, 0.1, 5.0),
    "gpt-5.2": (1.75, 0.175, 14.0),
    "gpt-5-mini": (0.25, 0.025, 2.0),
}


class Stop(Exception):
    """No further request is sent; `fatal` where that is an error."""

    def __init__(self, why: str, fatal: bool = False):
        super().__init__(why)
        self.why, self.fatal = why, fatal


class GaveUp(Exception):
    """This request is given up for now: another start may ask again. `final`: another start would not help, unless all
    are refused by now; `billed`: it has cost something."""

    def __init__(self, why: str, final: bool = False, billed: bool = False):
        super().__init__(why)
        self.why, self.final, self.billed = why, final, billed


class Prices(NamedTuple):
    """US dollars per million tokens. Writing a cache costs a quarter more than reading the prompt in full."""

    prompt: float
    cached: float
    output: float

    def usd(self, usage: Usage) -> float:
        """What a request cost."""
        fresh = usage.fresh + 1.25 * usage.written
        return (fresh * self.prompt + usage.cached * self.cached + usage.output * self.output) / 1e6


def find_prices(model: str, given: tuple[float | None, float | None, float | None], batch: bool) -> Prices | None:
    """The prices given (prompt, cached, output), else those of the table; None where neither says. Halved in batches.

    >>> find_prices("m", (2.0, None, 8.0), False)
    Prices(prompt=2.0, cached=2.0, output=8.0)
    """
    known = PRICES.get(model)
    prompt, cached, output = (a if a is not None else b for a, b in zip(given, known or (None, None, None)))
    if prompt is None or output is None:
        return None
    if cached is None or (given[0] is not None and given[1] is None):
        cached = prompt
    share = BATCH_DISCOUNT if batch else 1.0
    return Prices(prompt * share, cached * share, output * share)


class Budget:
    """What may be spent and what is: all starts of one folder together, for its journal is read back.

    The journal has two lines a request: what was set aside, and what it came to. Where a kill comes between them the
    first one counts.
    """

    def __init__(self, journal: Ledger, prices: Prices | None, max_usd: float, max_requests: int):
        self.journal, self.prices = journal, prices
        self.max_usd, self.max_requests = max_usd, max_requests  # 0: without bound
        self.lost: dict[str, float] = {}
        self.open: dict[str, float] = {}  # set aside and not settled
        self.spent, self.requests, self.tokens = 0.0, 0, Counter()
        self.changed = asyncio.Event()
        journal.each(self._read)
        # under way when a former start was killed: spent, unless a batch brings the answer yet
        self.lost, self.open = self.open, {}
        self.spent += sum(self.lost.values())
        self.start = f"{time.time_ns():x}"

    def _read(self, row: dict[str, Any]) -> None:
        if "aside" in row:
            self.open[row["id"]] = float(row["aside"])
            self.requests += 1
        else:
            self._add(row["id"], float(row["usd"]), row.get("usage"))

    def worst(self, prompt: Prompt, max_tokens: int) -> float:
        """The most that a request can cost."""
        return self.prices.usd(Usage(written=prompt.bytes(), output=max_tokens)) if self.prices else 0.0

    def room(self, worst: float) -> bool:
        """Is there room for one more?"""
        in_money = not self.max_usd or self.spent + sum(self.open.values()) + worst <= self.max_usd
        return in_money and (not self.max_requests or self.requests < self.max_requests)

    def full(self) -> str:
        """Which cap is reached, and what it came to."""
        cap = "--max_requests" if 0 < self.max_requests <= self.requests else "--max_usd"
        return f"{cap} is reached: {self.requests} requests, ${self.spent:.4f}"

    async def set_aside(self, worst: float) -> str:
        """A ticket for one request; waits while only what is under way stands against it, Stop where nothing does."""
        while not self.room(worst):
            if not self.open or 0 < self.max_requests <= self.requests:
                raise Stop(self.full())
            self.changed.clear()
            await self.changed.wait()
        return self.take(worst)

    def take(self, worst: float) -> str:
        """A ticket, without a question."""
        self.requests += 1
        ticket = f"{self.start}-{self.requests}"
        self.open[ticket] = worst
        self.journal.note({"id": ticket, "aside": worst})
        return ticket

    def settle(self, ticket: str, usage: Usage | None, billed: bool = True) -> None:
        """What a request came to: from its usage; without one the worst case where it may have been billed, else 0. One
        that is settled stays so: a batch may be read twice."""
        if ticket not in self.open and ticket not in self.lost:
            return
        if usage and self.prices:
            usd = self.prices.usd(usage)
        else:
            usd = self.open.get(ticket, self.lost.get(ticket, 0.0)) if billed else 0.0
        self.journal.note({"id": ticket, "usd": usd, "usage": usage})
        self._add(ticket, usd, usage)

    def _add(self, ticket: str, usd: float, usage) -> None:
        self.spent += usd - (self.lost.pop(ticket, 0.0) if ticket not in self.open else 0.0)
        self.open.pop(ticket, None)
        if usage:
            self.tokens.update(dict(zip(Usage._fields, usage)))
        self.changed.set()


class Pace:
    """How fast a provider is asked, by all requests together: nobody sends before `until`, and at most `width` are
    under way. `width` halves when the provider wants less and grows by one with each round of answers."""

    def __init__(self, concurrency: int):
        self.most, self.width, self.under_way, self.until = concurrency, float(concurrency), 0, 0.0
        self.refused, self.halved, self.closed, self.changed = 0, 0.0, False, asyncio.Event()

    @contextlib.asynccontextmanager
    async def turn(self):
        """Wait for a turn, hold it. Once the pace is closed every turn comes at once, for nobody will send."""
        while not self.closed:
            left = self.until - time.monotonic()
            if left <= 0 and self.under_way < max(1, int(self.width)):
                break
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if left > 0 else None):
                    await self.changed.wait()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self.changed.set()

    def close(self) -> None:
        """Nobody will send any more."""
        self.closed = True
        self.changed.set()

    def answered(self) -> None:
        """A request came back well."""
        self.refused, self.width = 0, min(self.most, self.width + 1 / max(1.0, self.width))

    def slow_down(self, wait: float | None) -> None:
        """The provider wants less: the pause doubles with each refusal in a row, and is as long as it says at least."""
        now = time.monotonic()
        if now >= self.halved:  # all that were under way together are one refusal
            self.width, self.halved, self.refused = max(1.0, self.width / 2), now + 1.0, self.refused + 1
        pause = max(wait or 0, backoff(self.refused))
        self.until = max(self.until, now + pause + random.uniform(0, min(1.0, 0.1 * pause)))


def backoff(tries: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, with jitter of a half."""
    return min(MOST_WAIT, LEAST_WAIT * 2 ** max(0, tries - 1)) * random.uniform(0.5, 1.0)


@dataclasses.dataclass
class Asker:
    """`ask` for many at once."""

    provider: Provider
    budget: Budget
    pace: Pace
    failures: Counter = dataclasses.field(default_factory=Counter)  # requests that brought no answer, by what it was
    answers: int = 0
    last: float = dataclasses.field(default_factory=time.monotonic)  # when something was answered
    asked_to_wait: float = 0.0  # seconds since then, by the provider
    proven: float = 0.0  # when the last request was sent of those that were answered
    unfit: list[float] = dataclasses.field(default_factory=list)  # when requests were refused as bad, since then
    stopped: Stop | None = None
    stopping: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def stop(self, stop: Stop) -> Stop:
        """The first stop is the one that is reported."""
        self.stopped = self.stopped or stop
        self.stopping.set()
        self.pace.close()
        return self.stopped

    async def ask(self, prompt: Prompt) -> Reply:
        """The reply to a prompt, sent again as often as it takes. GaveUp where this one gets none, Stop where none
        will."""
        failed, unfit, answers = 0, 0, self.answers
        while True:
            try:
                return await self.once(prompt)
            except Failure as e:
                self.failures[e.what] += 1
                if e.kind == "fatal":
                    raise self.stop(Stop(e.what, fatal=True)) from None
                if e.kind == "unfit":
                    unfit += 1
                    self.refused(e, again=unfit > 1)
                    if unfit > 1:
                        raise GaveUp(f"refused by the server: {e.what}", final=True) from None
                if e.kind == "form":  # the next one looks different
                    continue
                failed += 1
                await self.wait(e, failed)
                if failed >= FAILURES and self.answers > answers:  # the others are answered
                    raise GaveUp(f"no answer after {failed} tries: {e.what}") from None
                patience = PATIENCE if self.answers or e.kind == "busy" else FIRST_PATIENCE
                patience += min(self.asked_to_wait, MOST_PAUSE)
                if (silent := time.monotonic() - self.last) > patience:
                    raise self.stop(Stop(f"no answer for {silent:.0f} seconds, at last: {e.what}", True)) from None

    def refused(self, e: Failure, again: bool) -> None:
        """Note that a request was refused as bad; Stop where so many others were that it is not the request."""
        self.unfit = [at for at in self.unfit if at >= self.proven] + ([] if again else [time.monotonic()])
        if len(self.unfit) >= UNFIT:
            which = f"{UNFIT} requests in a row" if self.answers else f"the first {UNFIT} requests"
            raise self.stop(Stop(f"{which} are refused: {e.what}", True)) from None

    async def wait(self, e: Failure, failed: int) -> None:
        """After a failure: the provider's own pause for all, else this request's own. However short a pause a server
        asks for, it is no shorter than the backoff."""
        if (e.wait or 0) > MOST_PAUSE:
            raise self.stop(Stop(f"{e.what}: the provider asks to wait {e.wait:.0f} seconds; start again then"))
        if e.kind == "busy":
            asked_until = time.monotonic() + (e.wait or 0)
            self.asked_to_wait += max(0.0, asked_until - max(self.pace.until, time.monotonic()))
            self.pace.slow_down(e.wait)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(e.wait or 0, backoff(failed))):
                    await self.stopping.wait()

    async def once(self, prompt: Prompt) -> Reply:
        """One request, within the budget, at its turn, bounded in time from the first byte sent to the last read."""
        async with self.pace.turn():
            if self.stopped:
                raise self.stopped
            try:
                ticket = await self.budget.set_aside(self.budget.worst(prompt, self.provider.max_tokens))
            except Stop as e:
                raise self.stop(e) from None
            if self.stopped:  # while it waited for room
                self.budget.settle(ticket, None, billed=False)
                raise self.stopped
            usage, billed, sent = None, True, time.monotonic()  # also where this task is cancelled
            try:
                async with asyncio.timeout(self.provider.timeout):
                    reply = await self.provider.ask(prompt)
                usage = reply.usage
            except TimeoutError:
                raise Failure("broken", f"no answer within {self.provider.timeout:g} seconds", billed=True) from None
            except Failure as e:
                billed = e.billed
                raise
            finally:
                self.budget.settle(ticket, usage, billed)
        self.answers, self.last, self.asked_to_wait = self.answers + 1, time.monotonic(), 0.0
        self.proven = max(self.proven, sent)
        self.pace.answered()
        return reply


def check_caps(prices: Prices | None, model: str, max_usd: float, max_requests: int) -> None:
    """InputError where a cap cannot be held."""
    for flag, value in (("max_usd", max_usd), ("max_requests", max_requests)):
        if not 0 <= value < float("inf"):
            raise InputError(f"--{flag} {value}: must be 0 (no bound) or more")
    if max_usd and prices is None:
        raise InputError(f"--max_usd {max_usd}: the price of {model} is not known; give --price_in and --price_out")


def cost(prices: Prices | None, usd: float) -> str:
    """Money as it is printed."""
    return f"${usd:.4f}" if prices else "unknown (give --price_in and --price_out)"


def describe(asker: Asker) -> dict[str, Any]:
    """What a report says of the requests of all starts; failures are this start's."""
    budget = asker.budget
    return {
        "requests": budget.requests, "tokens": dict(budget.tokens), "failures": dict(sorted(asker.failures.items())),
        "usd": round(budget.spent, 6) if budget.prices else None, "prices": budget.prices and budget.prices._asdict(),
        "without_an_end": len(budget.lost), "form": asker.provider.form,
        "stopped": asker.stopped.why if asker.stopped else None,
    }  # fmt: skip
