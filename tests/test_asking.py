"""The budget, the pace, the loop: counted with providers made up here, without a server.

pytest tests/test_asking.py
"""

import asyncio
import json
import time

import pytest

from common import asking
from common.asking import Asker, Budget, GaveUp, Pace, Prices, Stop, backoff, check_caps, find_prices
from common.basics import InputError
from common.ledger import Ledger
from common.providers import Failure, Prompt, Reply, Usage

PROMPT = Prompt("s", (("user", "u"),), {})
GOOD = Reply("{}", Usage(400, 0, 0, 60), "end")  # a tenth of a cent at PRICES
PRICES = Prices(1.0, 0.5, 10.0)


class Scripted:
    """A provider that answers from a script: replies, failures, or seconds to sleep before a reply."""

    max_tokens, timeout, teacher, form, forms, limits = 100, 0.2, "openai", "plain", ("plain",), ("max_tokens",)

    def __init__(self, *script):
        self.script, self.sent, self.at_once, self.most = list(script), [], 0, 0

    async def ask(self, prompt):
        self.sent.append(time.monotonic())
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            now = self.script.pop(0) if self.script else GOOD
            if isinstance(now, float):
                await asyncio.sleep(now)
                return GOOD
            if isinstance(now, Exception):
                raise now
            await asyncio.sleep(0.005)
            return now
        finally:
            self.at_once -= 1


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "LEAST_WAIT", 0.01)


@pytest.fixture
def make(tmp_path):
    """A function that makes an Asker around a script."""

    def asker(*script, prices=PRICES, max_usd=0.0, max_requests=0, concurrency=4) -> Asker:
        budget = Budget(Ledger(tmp_path / "requests.jsonl"), prices, max_usd, max_requests)
        return Asker(Scripted(*script), budget, Pace(concurrency))

    return asker


def all_of(asker, n):
    """What n requests at once come to: replies and exceptions."""

    async def main():
        return await asyncio.gather(*(asker.ask(PROMPT) for _ in range(n)), return_exceptions=True)

    return asyncio.run(main())


# ---- prices ---------------------------------------------------------------------------------------------------------
def test_prices():
    """By hand: 1,000 fresh at 1, 400 cached at a half, 80 written at 1.25, 100 out at 10."""
    assert PRICES.usd(Usage(1000, 400, 80, 100)) == pytest.approx((1000 + 200 + 100 + 1000) / 1e6)
    assert find_prices("gpt-5-mini", (None, None, None), False) == Prices(*asking.PRICES["gpt-5-mini"])
    assert find_prices("gpt-5-mini", (None, None, None), True).output == asking.PRICES["gpt-5-mini"][2] / 2
    assert find_prices("gpt-5-mini", (9.0, None, None), False) == Prices(9.0, 9.0, asking.PRICES["gpt-5-mini"][2])
    assert find_prices("m", (None, None, 3.0), False) is None and find_prices("m", (0.0, None, 0.0), False) == (0, 0, 0)
    for args in ((None, "m", 1.0, 0), (PRICES, "m", -1.0, 0), (PRICES, "m", 0.0, -1)):
        with pytest.raises(InputError):
            check_caps(*args)


# ---- the budget -----------------------------------------------------------------------------------------------------
def test_the_worst_case_is_set_aside_and_settled_from_the_usage(make):
    asker = make(max_usd=0.01, concurrency=16)
    worst = asker.budget.worst(PROMPT, 100)
    assert worst == pytest.approx((1.25 * PROMPT.bytes() + 1000) / 1e6)
    high, settle = [], asker.budget.settle

    def watched(*args):
        high.append(asker.budget.spent + sum(asker.budget.open.values()))
        settle(*args)

    asker.budget.settle = watched
    done = all_of(asker, 30)
    answered = [r for r in done if isinstance(r, Reply)]
    assert len(answered) == asker.budget.requests and max(high) <= 0.01
    assert asker.budget.spent == pytest.approx(len(answered) * 0.001) and len(answered) == 9
    assert all(isinstance(r, Stop) and "--max_usd is reached" in r.why for r in done if not isinstance(r, Reply))


def test_requests_are_counted_over_all_starts(make, tmp_path):
    assert sum(isinstance(r, Reply) for r in all_of(make(max_requests=3), 9)) == 3
    assert make(max_requests=3).budget.requests == 3 and not make(max_requests=3).budget.room(0.0)
    assert sum(isinstance(r, Reply) for r in all_of(make(max_requests=5), 9)) == 2
    budget = make().budget
    assert budget.requests == 5 and budget.spent == pytest.approx(0.005) and budget.tokens["output"] == 300


def test_what_was_under_way_at_a_kill_counts_in_full_until_a_batch_brings_it(make):
    first = make().budget
    tickets = [first.take(0.5), first.take(0.25)]
    first.settle(tickets[1], Usage(1000, 0, 0, 0))
    again = make().budget
    assert again.requests == 2 and again.spent == pytest.approx(0.501) and again.lost == {tickets[0]: 0.5}
    again.settle(tickets[0], Usage(2000, 0, 0, 0))
    assert again.spent == pytest.approx(0.003) and not again.lost
    assert make().budget.spent == pytest.approx(0.003)


@pytest.mark.parametrize(("billed", "usd"), [(True, 1), (False, 0)])
def test_a_request_that_broke_off_counts_in_full_if_it_may_have_been_billed(make, billed, usd):
    asker = make(Failure("broken", "cut", billed=billed))
    all_of(asker, 1)
    assert asker.budget.spent == pytest.approx(usd * asker.budget.worst(PROMPT, 100) + 0.001)
    assert asker.failures == {"cut": 1} and asker.budget.requests == 2


def test_a_server_that_gives_no_usage_is_reckoned_at_the_worst(make):
    asker = make(Reply("{}", None, "end"))
    all_of(asker, 1)
    assert asker.budget.spent == pytest.approx(asker.budget.worst(PROMPT, 100))
    free = make(prices=None)
    assert all_of(free, 1) == [GOOD] and free.budget.worst(PROMPT, 100) == 0.0


@pytest.mark.parametrize("line", ['{"a": 1}', '{"id": "x", "aside": "y"}', '{"id": "x", "usd": null}'])
def test_a_damaged_line_of_the_journal_is_named(make, tmp_path, line):
    (tmp_path / "requests.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"requests\.jsonl:1: "):
        make()


# ---- the pace -------------------------------------------------------------------------------------------------------
def test_no_more_than_so_many_at_once(make):
    asker = make(concurrency=3)
    all_of(asker, 20)
    assert asker.provider.most == 3


def test_all_wait_where_the_provider_says_so(make):
    """One 429 with Retry-After: nobody sends before it is over, and fewer at once after it."""
    asker = make(Failure("busy", "status 429", 0.3), concurrency=4)
    all_of(asker, 12)
    first, *rest = asker.provider.sent
    later = [t - first for t in rest if t - first > 0.05]
    assert len(later) >= 9 and min(later) >= 0.29
    assert asker.budget.spent == pytest.approx(12 * 0.001)  # a refusal is not billed


def test_the_width_halves_and_grows_back():
    async def main():
        pace = Pace(16)
        pace.slow_down(0.0)
        pace.slow_down(0.0)  # of the same moment: one refusal
        assert pace.width == 8 and pace.refused == 1
        for _ in range(200):
            pace.answered()
        assert pace.width == 16 and pace.refused == 0

    asyncio.run(main())


def test_backoff_doubles_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(asking, "LEAST_WAIT", 0.5)
    for tries in range(1, 12):
        most = min(60.0, 0.5 * 2 ** (tries - 1))
        assert all(most / 2 <= backoff(tries) <= most for _ in range(50))


# ---- the loop -------------------------------------------------------------------------------------------------------
def test_a_body_that_drips_is_bounded_by_the_time_limit(make):
    asker = make(5.0)
    began = time.monotonic()
    assert all_of(asker, 1) == [GOOD] and time.monotonic() - began < 3
    assert asker.failures == {"no answer within 0.2 seconds": 1}


def test_a_form_that_is_not_known_is_asked_otherwise_at_once(make):
    asker = make(Failure("form", "status 400"))
    assert all_of(asker, 1) == [GOOD] and len(asker.provider.sent) == 2


def test_one_that_never_works_is_given_up_while_others_are_answered(make):
    asker = make(*[Failure("broken", "status 500")] * asking.FAILURES)

    async def main():
        hopeless = asyncio.create_task(asker.ask(PROMPT))
        await asyncio.sleep(0.001)
        asker.answers += 1  # somebody else
        with pytest.raises(GaveUp, match="no answer after 8 tries: status 500") as error:
            await hopeless
        assert not error.value.final

    asyncio.run(main())


def test_a_bad_request_is_final_when_refused_twice(make):
    bad = Failure("unfit", "status 400")
    assert all_of(make(bad), 1) == [GOOD]
    (outcome,) = all_of(make(bad, bad), 1)
    assert isinstance(outcome, GaveUp) and outcome.final and "refused by the server: status 400" in outcome.why


@pytest.mark.parametrize(("before", "why"), [(0, "the first 5 requests are refused"), (3, "5 requests in a row")])
def test_five_bad_requests_in_a_row_end_it(make, before, why):
    """Whether anything was answered before or not; those sent before the first refusal prove nothing."""
    bad = Failure("unfit", "status 400")
    asker = make(*[GOOD] * before, *[bad] * 20, concurrency=1)
    done = all_of(asker, before + 9)
    assert asker.stopped.fatal and why in asker.stopped.why and len(asker.provider.sent) < before + 11
    assert sum(isinstance(r, Reply) for r in done) == before
    slow = make(0.15, *[bad] * 20, concurrency=8)
    all_of(slow, 8)
    assert slow.stopped and "are refused" in slow.stopped.why


def test_bad_requests_among_good_ones_end_nothing(make):
    bad = Failure("unfit", "status 400")
    asker = make(*[bad, bad, GOOD, GOOD] * 10, concurrency=1)
    all_of(asker, 30)
    assert asker.stopped is None and asker.answers >= 20


def test_a_fatal_status_ends_all(make):
    asker = make(0.05, Failure("fatal", "status 401"), concurrency=2)
    done = all_of(asker, 10)
    assert done[0] == GOOD and all(isinstance(r, Stop) for r in done[1:]) and len(asker.provider.sent) == 2


def test_a_provider_that_asks_for_an_hour_is_asked_tomorrow(make):
    asker = make(Failure("busy", "status 429", 3600.0))
    (outcome,) = all_of(asker, 1)
    assert isinstance(outcome, Stop) and not outcome.fatal and "asks to wait 3600 seconds" in outcome.why


def test_silence_ends_it(make, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_PATIENCE", 0.1)
    (outcome,) = all_of(make(*[Failure("broken", "no connection")] * 500), 1)
    assert isinstance(outcome, Stop) and outcome.fatal and "no connection" in outcome.why


@pytest.mark.parametrize("wait", [None, 0.0, 0.001, 0.05])
def test_a_provider_that_is_always_busy_ends_it(make, monkeypatch, wait):
    """It is not asked without a pause meanwhile; what it asks to wait counts, up to a bound."""
    monkeypatch.setattr(asking, "PATIENCE", 0.4)
    monkeypatch.setattr(asking, "MOST_PAUSE", 0.2)
    began, asker = time.monotonic(), make(*[Failure("busy", "status 429", wait)] * 500)
    (outcome,) = all_of(asker, 1)
    assert isinstance(outcome, Stop) and outcome.fatal and "status 429" in outcome.why
    assert 0.3 < time.monotonic() - began < 3 and len(asker.provider.sent) < 70


def test_a_pause_of_nothing_is_no_pause(make):
    asker = make(*[Failure("broken", "status 503", 0.0)] * 7)
    began = time.monotonic()
    assert all_of(asker, 1) == [GOOD] and time.monotonic() - began > 0.3


def test_those_who_wait_leave_at_once_when_it_stops(make):
    """In a pause of minutes, in a backoff of minutes, and for their turn."""
    asker = make(Failure("broken", "a", 300.0), Failure("busy", "b", 300.0), concurrency=2)

    async def main():
        tasks = [asyncio.create_task(asker.ask(PROMPT)) for _ in range(6)]
        await asyncio.sleep(0.1)
        asker.stop(Stop("by hand"))
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    assert all(isinstance(r, Stop) for r in asyncio.run(main()))


def test_the_journal_says_no_word_of_a_prompt(make, tmp_path):
    all_of(make(), 2)
    for line in (tmp_path / "requests.jsonl").read_text().splitlines():
        assert set(json.loads(line)) in ({"id", "aside"}, {"id", "usd", "usage"})
