"""The providers' batch interfaces, at half price: requests go out as files, answers come back within a day. Used by
taught; knows no quadruple.

What is going to be sent is on disk before it is sent, and the batch's id after; a start that finds the first without
the second looks the batch up among the provider's own before it sends anything again. What a batch that expired has
brought is paid for, and kept; what failed goes into the next one alone.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from common import asking
from common.asking import Asker, GaveUp, Stop, backoff
from common.basics import sha256
from common.ledger import Ledger
from common.providers import NO_CREDIT, Failure, Prompt, Provider, Reply, error_in

MOST_REQUESTS, MOST_BYTES = 10_000, 90_000_000  # of one batch; the providers allow 50,000 and more, 200 MB and more
POLL = 30.0  # seconds between two looks
TRIES = 8  # of a call that fails in passing, where no batch is known yet
UNREADABLE = "a result that cannot be read"
LISTED = 100  # batches of the provider that are looked through for a lost one


class Gone(Exception):
    """The provider has a batch no more whose id it has given."""


Wait = Callable[[], Awaitable[None]]  # until the next look; Stop where the run ends first


class AnthropicBatches:
    """Message batches. They carry no note of ours, so a lost one is known by the custom ids of its results."""

    def __init__(self, provider: Provider, wait: Wait):
        self.provider, self.wait, self.calls = provider, wait, provider.client.messages.batches

    async def create(self, key: str, requests: list[tuple[str, Prompt]]) -> str:
        params = self.provider.params
        made = await self.calls.create(requests=[{"custom_id": name, "params": params(p)} for name, p in requests])
        return made.id

    async def ended(self, batch_id: str) -> bool:
        return (await self.calls.retrieve(batch_id)).processing_status == "ended"

    async def find(self, key: str) -> str | None:
        """The id of the batch under our key; waits for those that have not ended, which show nothing of themselves."""
        listed = [batch async for batch in await_page(await self.calls.list(limit=20))]
        for batch in listed:
            while batch.processing_status != "ended":
                await self.wait()
                batch = await self.calls.retrieve(batch.id)
            if batch.results_url is None:  # kept no longer
                continue
            async for row in self.results(batch.id):
                if row[0].startswith(f"{key}-"):
                    return batch.id
                break
        return None

    async def results(self, batch_id: str) -> AsyncIterator[tuple[str, Reply | GaveUp]]:
        async for line in lines_of((await self.calls.results(batch_id)).http_response.aiter_bytes()):
            yield read_line(line, self.read_row)

    def read_row(self, row: dict[str, Any]) -> Reply | GaveUp:
        result = row["result"]
        if result["type"] == "succeeded":
            return read_reply(self.provider, result.get("message"))
        error = ((result.get("error") or {}).get("error") or {}).get("type")
        return gave_up(result["type"], final=error == "invalid_request_error")


class OpenAIBatches:
    """Batches of chat completions: a file of requests in, a file of answers and one of errors out."""

    ENDED = ("completed", "failed", "expired", "cancelled")

    def __init__(self, provider: Provider, wait: Wait):
        self.provider, self.calls, self.files = provider, provider.client.batches, provider.client.files

    async def create(self, key: str, requests: list[tuple[str, Prompt]]) -> str:
        url = "/v1/chat/completions"
        line = lambda name, p: {"custom_id": name, "method": "POST", "url": url, "body": self.provider.params(p)}
        data = "".join(json.dumps(line(name, p)) + "\n" for name, p in requests).encode()
        file = await self.files.create(file=(f"{key}.jsonl", data), purpose="batch")
        made = await self.calls.create(
            input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"cts_batch": key}
        )
        return made.id

    async def ended(self, batch_id: str) -> bool:
        return (await self.calls.retrieve(batch_id)).status in self.ENDED

    async def find(self, key: str) -> str | None:
        async for batch in await_page(await self.calls.list(limit=20)):
            if (batch.metadata or {}).get("cts_batch") == key:
                return batch.id
        return None

    async def results(self, batch_id: str) -> AsyncIterator[tuple[str, Reply | GaveUp]]:
        """Of both files, whatever the batch's end: what was finished is in the first even where it expired."""
        batch = await self.calls.retrieve(batch_id)
        for file_id in (batch.output_file_id, batch.error_file_id):
            content = (await self.files.content(file_id)).content if file_id else b""
            for line in content.split(b"\n"):
                if line.strip():
                    yield read_line(line, self.read_row)

    def read_row(self, row: dict[str, Any]) -> Reply | GaveUp:
        response = row.get("response") or {}
        status = response.get("status_code")
        if status == 200:
            return read_reply(self.provider, response.get("body"))
        error = error_in(json.dumps(response.get("body")))
        code = (row.get("error") or {}).get("code") or error.get("code")
        final = status in (400, 413, 422) and bool(error) and code not in NO_CREDIT
        return gave_up(code or f"status {status}", final)


BATCHES = {"anthropic": AnthropicBatches, "openai": OpenAIBatches}


async def lines_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of what comes in pieces, ended by a line feed alone: JSON may hold every other sign that ends a line."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
    if rest.strip():
        yield rest


def read_line(line: bytes, read_row: Callable[[dict[str, Any]], Reply | GaveUp]) -> tuple[str, Reply | GaveUp]:
    """(custom id, result) of a line of results; no id where it cannot be read."""
    try:
        row = json.loads(line)
        if isinstance(name := row["custom_id"], str):
            return name, read_row(row)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    return "", gave_up(UNREADABLE, final=False)


def read_reply(provider: Provider, message: Any) -> Reply | GaveUp:
    try:
        return provider.read_checked(message)
    except Failure as e:
        return GaveUp(f"in a batch: {e.what}", billed=e.billed)


def gave_up(what: Any, final: bool) -> GaveUp:
    what = what if isinstance(what, str) and len(what) < 40 else "failed"
    return GaveUp(f"in a batch: {what}", final)


async def await_page(page: Any) -> AsyncIterator[Any]:
    """The entries of a list and of its next pages, the first LISTED."""
    n = 0
    async for entry in page:
        yield entry
        n += 1
        if n >= LISTED:
            return


def open_batches(ledger: Ledger) -> tuple[dict[str, list], dict[str, str]]:
    """What is still out: {key: [[task id, tries before, ticket], ...]} and {key: id} of all that have one."""
    intents, ids = {}, {}

    def read(row: dict[str, Any]) -> None:
        if "jobs" in row:
            intents[row["batch"]] = row["jobs"]
        elif "id" in row:
            ids[row["batch"]] = row["id"]
        else:
            intents.pop(row["batch"], None)

    ledger.each(read)
    return intents, ids


class Batches:
    """Rounds of batches, over all starts of a folder. Of the last round: has anything gone out (`went_out`), and has a
    batch come back without one answer (`barren`)?"""

    def __init__(self, asker: Asker, ledger: Ledger):
        self.asker, self.ledger, self.provider = asker, ledger, asker.provider
        self.wire = BATCHES[asker.provider.teacher](asker.provider, self.pause)
        self.went_out = self.barren = False
        self.intents, self.ids = open_batches(ledger)

    async def steady(self, call: Any, *args: Any, known: bool = False) -> Any:
        """A call of the batch interface, tried again where it fails in passing; Stop where it cannot do. Of a batch
        that is known to be there as long as single requests are; Gone where it is there no more."""
        sdk, provider, began, tries = self.provider.sdk, self.provider, time.monotonic(), 0
        while True:
            tries += 1
            try:
                return await call(*args)
            except sdk.APIStatusError as e:
                if e.status_code == 404 and known:
                    raise Gone from None
                if e.status_code == 404:
                    raise self.asker.stop(Stop("this server has no batches; leave out --batch", fatal=True)) from None
                failure = provider.failure(e, (provider.forms, provider.limits))
            except sdk.APIConnectionError:
                failure = Failure("broken", "no connection, or a broken one")
            except (ValueError, AttributeError, TypeError):  # a page in HTML, half an answer
                failure = Failure("broken", "an answer that is no batch")
            except Exception as e:
                if not type(e).__module__.startswith("http"):
                    raise
                failure = Failure("broken", "a connection that broke in the midst")  # of results; the SDK hands it on
            lost = time.monotonic() - began > asking.PATIENCE if known else tries == TRIES
            if failure.kind not in ("busy", "broken") or lost:
                raise self.asker.stop(Stop(f"batches: {failure.what}", fatal=True))
            await self.pause(max(min(failure.wait or 0, asking.MOST_PAUSE), backoff(tries)))

    async def round(self, jobs: list[tuple[str, int, Prompt]]) -> AsyncIterator[tuple[str, int, Reply | GaveUp]]:
        """What is still out from a former start, else the jobs (task id, tries before, prompt) in batches; then, as
        they end, (task id, tries before, reply or why there is none)."""
        if not self.intents:
            await self.send(jobs)
        self.went_out, self.barren = bool(self.intents), False
        for key in list(self.intents):
            answers, made = self.asker.answers, True
            async for row in self.collect(key):
                made = key in self.ids
                yield row
            self.barren |= made and self.asker.answers == answers
            self.ledger.commit_now({"batch": key})
            del self.intents[key]

    async def send(self, jobs: list[tuple[str, int, Prompt]]) -> None:
        """As many as the budget has room for, in batches of bounded size."""
        part, size, budget = [], 0, self.asker.budget
        for task_id, tried, prompt in jobs:
            worst = budget.worst(prompt, self.provider.max_tokens)
            if not budget.room(worst):
                # told once what is out is back; it may come to less
                if not part and not self.intents:
                    raise self.asker.stop(Stop(budget.full()))
                break
            if len(part) == MOST_REQUESTS or size + prompt.bytes() > MOST_BYTES:
                await self.send_one(part)
                part, size = [], 0
            part.append((task_id, tried, prompt, budget.take(worst)))
            size += prompt.bytes()
        if part:
            await self.send_one(part)

    async def send_one(self, part: list[tuple[str, int, Prompt, str]]) -> None:
        """One batch: its intent on disk, then the batch, then its id on disk. Where the call breaks off, the batch may
        be there all the same: it is looked for, not sent twice."""
        jobs = [[task_id, tried, ticket] for task_id, tried, _, ticket in part]
        key = sha256(json.dumps(jobs))[:16]
        self.ledger.commit_now({"batch": key, "jobs": jobs})
        self.intents[key] = jobs
        requests = [(f"{key}-{i}", prompt) for i, (_, _, prompt, _) in enumerate(part)]

        async def create() -> str:
            if sent and (found := await self.wire.find(key)):
                return found
            sent.append(True)
            return await self.wire.create(key, requests)

        sent: list[bool] = []
        self.know(key, await self.steady(create))

    def know(self, key: str, batch_id: str) -> None:
        self.ids[key] = batch_id
        self.ledger.commit_now({"batch": key, "id": batch_id})

    async def collect(self, key: str) -> AsyncIterator[tuple[str, int, Reply | GaveUp]]:
        """Wait for a batch, settle what each of its requests has cost, and hand it on."""
        jobs, missing = self.intents[key], None
        if key not in self.ids:
            print(f"A batch of {len(jobs)} requests was under way when a former start ended: looking for it.")
            found = await self.steady(self.wire.find, key)
            if found is None:  # it never got there
                missing = GaveUp("in a batch that was never made")
            else:
                self.know(key, found)
        left, unread = {f"{key}-{i}": job for i, job in enumerate(jobs)}, 0
        if missing is None:
            try:
                while not await self.steady(self.wire.ended, self.ids[key], known=True):
                    await self.pause()
                found = await self.steady(self.all_results, key, known=True)
            except Gone:
                print(f"A batch of {len(jobs)} requests is gone at the provider: they are asked again.")
                found, missing = [], GaveUp("in a batch that is gone", billed=True)
            taken = any(isinstance(result, Reply) for _, result in found)
            for name, result in found:
                job = left.pop(name, None)
                if job is None:  # twice, not ours, or not to be read
                    unread += not name
                    continue
                task_id, tried, ticket = job
                answered = isinstance(result, Reply)
                self.asker.answers += answered
                usage, billed = (result.usage, True) if answered else (None, result.billed)
                self.asker.budget.settle(ticket, usage, billed)
                if not answered and not taken:  # it may be the way of asking that is bad
                    result.final = False
                yield task_id, tried, result
        if unread:
            self.asker.failures[f"in a batch: {UNREADABLE}"] += unread
        for task_id, tried, ticket in left.values():
            self.asker.budget.settle(ticket, None, billed=unread > 0 or (missing is not None and missing.billed))
            yield task_id, tried, missing or GaveUp("in a batch: no result")

    async def all_results(self, key: str) -> list[tuple[str, Reply | GaveUp]]:
        """All of a batch at once: a connection that breaks in the midst has brought nothing."""
        return [row async for row in self.wire.results(self.ids[key])]

    async def pause(self, seconds: float | None = None) -> None:
        """Until the next look; Stop where the run ends first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL if seconds is None else seconds):
                await self.asker.stopping.wait()
        if self.asker.stopped:
            raise self.asker.stopped
