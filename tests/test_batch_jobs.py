"""Batches of both providers over real HTTP: expired ones, lost ones, kills between two lines.

pytest tests/test_batch_jobs.py
"""

import asyncio
import json
import re
import types

import pytest
from teacher_server import Server
from test_taught import TEACHERS, files, problems, quick, rows, run  # noqa: F401 (fixtures)

from common import asking, batch_jobs
from common.asking import Stop
from common.basics import InputError
from common.ledger import Ledger


@pytest.mark.parametrize("name", TEACHERS)
def test_batches_bring_what_single_requests_bring_at_half_price(tmp_path, problems, name):  # noqa: F811
    with Server() as server:
        single = run(server, name, tmp_path / "single")
        server.polls = 3
        report = run(server, name, tmp_path / "batch", batch="yes")
    assert files(tmp_path / "batch") == files(tmp_path / "single") and len(server.batches) == 1
    assert report["usd"] == pytest.approx(single["usd"] / 2, abs=2e-6) and report["requests"] == 40
    lines = rows(tmp_path / "batch" / "batches.jsonl")
    assert [set(line) for line in lines] == [{"batch", "jobs"}, {"batch", "id"}, {"batch"}]
    ids = [request["custom_id"] for batch in server.batches.values() for request in batch["requests"]]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids) and len({*ids}) == 40


@pytest.mark.parametrize("name", TEACHERS)
def test_of_an_expired_batch_what_was_paid_is_kept_and_the_rest_goes_again_alone(tmp_path, problems, name):  # noqa: F811
    with Server() as server:
        run(server, name, tmp_path / "good")
    with Server() as server:
        server.expire = 0.4
        report = run(server, name, tmp_path / "batch", batch="yes")
        sizes = [len(batch["requests"]) for batch in server.batches.values()]
    assert files(tmp_path / "batch") == files(tmp_path / "good") and report["kept"] == 40
    assert sizes[0] == 40 and sizes == sorted(sizes, reverse=True) and 5 < sizes[1] < 30
    assert sum(sizes) == report["requests"] and not report["answers_rejected"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_batch_whose_creation_broke_off_is_found_and_not_sent_twice(tmp_path, problems, name):  # noqa: F811
    """The server made it and cut the connection: one that is looked up, by metadata or custom ids."""
    with Server() as server:
        server.drop_creates = 1
        report = run(server, name, tmp_path, batch="yes")
    assert report["kept"] == report["requests"] == 40 and len(server.batches) == 1


@pytest.mark.parametrize("moment", ["before it was created", "before its id was on disk", "while it ran", "half read"])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_kill_at_any_moment_of_a_batch(tmp_path, problems, monkeypatch, name, moment):  # noqa: F811
    """The next start finds it, or sends it where it was never made; nothing is paid twice."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    async def die_soon(*_):
        raise Killed

    wire, seen = batch_jobs.BATCHES[name], []
    with Server() as server:
        whole = run(server, name, tmp_path / "whole", batch="yes")
    with Server() as server, monkeypatch.context() as patch:
        if moment == "before it was created":
            patch.setattr(wire, "create", die_soon)
        elif moment == "before its id was on disk":
            patch.setattr(batch_jobs.Batches, "know", die)
        elif moment == "while it ran":
            patch.setattr(wire, "ended", die_soon)
        else:
            commit = Ledger.commit

            async def commit_ten(self, row):
                await commit(self, row)
                seen.append(row)
                if len(seen) == 10:
                    raise Killed

            patch.setattr(Ledger, "commit", commit_ten)
        with pytest.raises((Killed, BaseExceptionGroup)):
            run(server, name, tmp_path / "part", batch="yes")
        patch.undo()
        monkeypatch.setattr(batch_jobs, "POLL", 0.02)
        report = run(server, name, tmp_path / "part", batch="yes")
        assert report["kept"] == len(rows(tmp_path / "part" / "accepted.jsonl")) == 40 and len(server.batches) == 1
        assert report["usd"] == pytest.approx(whole["usd"], abs=2e-6)
        assert report["requests"] == (80 if moment == "before it was created" else 40)
        assert report["without_an_end"] == 0
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_the_cap_bounds_a_batch(tmp_path, problems):  # noqa: F811
    """What fits in is sent; what comes back makes room for more."""
    with Server() as server:
        whole = run(server, "openai", tmp_path / "whole", batch="yes", max_tokens=300)
        part = run(server, "openai", tmp_path / "part", batch="yes", max_tokens=300, max_usd=0.5 * whole["usd"])
        sizes = [len(batch["requests"]) for batch in server.batches.values()][1:]
    assert part["usd"] <= 0.5 * whole["usd"] and sum(sizes) == part["kept"] < 21 and len(sizes) > 1
    assert "--max_usd is reached" in part["stopped"]


def test_a_server_without_batches_is_said_so(tmp_path, problems, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Server, "batch_route", lambda *_: (404, {"error": {"message": "no"}}))
    with Server() as server, pytest.raises(InputError, match="this server has no batches; leave out --batch"):
        run(server, "openai", tmp_path, batch="yes")


def test_a_way_of_asking_that_the_batches_refuse_rejects_nobody(tmp_path, problems, monkeypatch):  # noqa: F811
    refused = {"type": "errored", "error": {"error": {"type": "invalid_request_error", "message": "no"}}}

    def results(self, batch, wire):
        lines = [{"custom_id": request["custom_id"], "result": refused} for request in batch["requests"]]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    with Server() as server, monkeypatch.context() as patch:
        patch.setattr(Server, "results", results)
        with pytest.raises(InputError, match="3 batches in a row came back without an answer"):
            run(server, "anthropic", tmp_path, batch="yes")
        patch.undo()
        report = run(server, "anthropic", tmp_path, batch="yes")
    assert report["kept"] == 40 and not report["answers_rejected"]


def cut(data: bytes) -> bytes:
    return data[:-30]


def without_id(data: bytes) -> bytes:
    return re.sub(rb'"custom_id"', b'"other_id"', data, count=1)


def with_number(data: bytes) -> bytes:
    return re.sub(rb'"custom_id": "[^"]+"', b'"custom_id": 7', data, count=1)


def with_blanks(data: bytes) -> bytes:
    return data.replace(b"\n", b"\n \n")


def with_other_ends(data: bytes) -> bytes:
    """Signs that end lines elsewhere, as they are."""
    return data.replace(b"does not follow", "does\u2028not\x85follow".encode())


@pytest.mark.parametrize("spoil", [cut, without_id, with_number, with_blanks, with_other_ends])
@pytest.mark.parametrize("name", TEACHERS)
def test_one_bad_line_of_results_costs_itself_alone(tmp_path, problems, monkeypatch, name, spoil):  # noqa: F811
    """It goes into the next batch; it may have been paid, and counts."""
    results, lost = Server.results, spoil in (cut, without_id, with_number)

    def spoiled(self, batch, wire):
        data = results(self, batch, wire)
        return spoil(data) if len(batch["requests"]) == 40 else data

    monkeypatch.setattr(Server, "results", spoiled)
    monkeypatch.setattr(Server, "view", viewed(Server.view))
    with Server() as server:
        report = run(server, name, tmp_path, batch="yes")
    assert report["kept"] == 40 and [len(b["requests"]) for b in server.batches.values()] == [40, 1][: 1 + lost]
    assert report["failures"] == ({"in a batch: a result that cannot be read": 1} if lost else {})


def viewed(view):
    """Results of OpenAI's form whole in one file, whatever is in their lines."""

    def both(self, batch):
        shown = view(self, batch)
        if batch.get("output") and not batch.get("whole"):
            batch["whole"] = self.files[batch["output"]] = self.results(batch, "openai")
            self.files[batch["errors"]] = b""
        return shown

    return both


def leave_one_out(server, name, out, monkeypatch) -> None:
    """A start that ends while its batch runs."""

    class Killed(BaseException):
        pass

    async def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(batch_jobs.BATCHES[name], "ended", die)
        with pytest.raises((Killed, BaseExceptionGroup)):
            run(server, name, out, batch="yes")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_batch_that_is_out_is_not_forgotten(tmp_path, problems, monkeypatch, name):  # noqa: F811
    """A start without --batch says so and asks nothing; one with a smaller --limit records all that was paid for."""
    with Server() as server:
        leave_one_out(server, name, tmp_path, monkeypatch)
        with pytest.raises(InputError, match=r"batches\.jsonl: a batch is out; add --batch yes to read it"):
            run(server, name, tmp_path)
        assert server.requests == 0
        run(server, name, tmp_path, batch="yes", limit=2)
        assert len(rows(tmp_path / "accepted.jsonl")) == 40 and len(server.batches) == 1
        assert run(server, name, tmp_path)["kept"] == 40 and server.requests == 0


@pytest.mark.parametrize("name", TEACHERS)
def test_a_batch_that_is_gone_is_sent_again(tmp_path, problems, monkeypatch, capsys, name):  # noqa: F811
    """And counts as paid."""
    with Server() as server:
        leave_one_out(server, name, tmp_path, monkeypatch)
        route = Server.batch_route

        def gone(self, method, path, *more):
            return (404, {"error": {"message": "no"}}) if "batch-0" in path else route(self, method, path, *more)

        monkeypatch.setattr(Server, "batch_route", gone)
        report = run(server, name, tmp_path, batch="yes")
    assert report["kept"] == 40 and len(server.batches) == 2 and report["requests"] == 80
    assert "A batch of 40 requests is gone at the provider" in capsys.readouterr().out
    assert sum(row.get("usage") is None for row in rows(tmp_path / "requests.jsonl") if "usd" in row) == 40


@pytest.mark.parametrize("name", TEACHERS)
def test_an_outage_while_a_batch_runs_is_waited_out(tmp_path, problems, monkeypatch, name):  # noqa: F811
    """Longer than eight tries."""
    route, down = Server.batch_route, []

    def outage(self, method, path, *more):
        if method == "GET" and "batch-0" in path and len(down) < 12:
            down.append(path)
            return 503, {"error": {"message": "down"}}
        return route(self, method, path, *more)

    monkeypatch.setattr(asking, "MOST_WAIT", 0.05)
    monkeypatch.setattr(Server, "batch_route", outage)
    with Server() as server:
        assert run(server, name, tmp_path, batch="yes")["kept"] == 40 and len(down) == 12
    monkeypatch.setattr(asking, "PATIENCE", 0.1)
    down[:] = []
    monkeypatch.setattr(Server, "batch_route", lambda self, method, *more: (
        (503, {}) if method == "GET" else route(self, method, *more)))  # fmt: skip
    with Server() as server, pytest.raises(InputError, match="batches: status 503"):
        run(server, name, tmp_path / "b", batch="yes")


def test_a_search_for_a_lost_batch_can_be_stopped():
    """It may wait for a day for batches of others."""

    class Stuck:
        id, processing_status = "other", "in_progress"

    async def main():
        asker = types.SimpleNamespace(stopped=None, stopping=asyncio.Event())
        jobs = types.SimpleNamespace(asker=asker)
        listed = types.SimpleNamespace(list=None, retrieve=None)

        async def page():
            yield Stuck

        async def give(*_, **__):
            return page()

        listed.list = give
        client = types.SimpleNamespace(messages=types.SimpleNamespace(batches=listed))
        provider = types.SimpleNamespace(client=client)
        wire = batch_jobs.AnthropicBatches(provider, lambda: batch_jobs.Batches.pause(jobs, 300.0))
        search = asyncio.create_task(wire.find("key"))
        await asyncio.sleep(0.05)
        asker.stopped = Stop("stopped by SIGTERM")
        asker.stopping.set()
        with pytest.raises(Stop, match="SIGTERM"):
            await asyncio.wait_for(search, 5)

    asyncio.run(main())


def test_large_jobs_go_in_several_batches(tmp_path, problems, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch_jobs, "MOST_REQUESTS", 15)
    with Server() as server:
        assert run(server, "anthropic", tmp_path, batch="yes")["kept"] == 40
    assert [len(batch["requests"]) for batch in server.batches.values()] == [15, 15, 10]
    assert json.loads((tmp_path / "report.json").read_text())["batch"] == "yes"
