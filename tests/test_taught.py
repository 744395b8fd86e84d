"""Runs of a teacher over an API, through both official SDKs and real HTTP, against a server that fails as servers do.

pytest tests/test_taught.py
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from teacher_server import FAULTS, Server

import teacher
from common import asking, batch_jobs, taught
from common.basics import InputError
from common.fixtures import fixtures_code, fixtures_math
from common.replay import read_replay
from common.tasks import TASKS

for package in ("anthropic", "openai"):
    pytest.importorskip(package, reason="pip install -r requirements-teacher.txt")

TEACHERS = ("anthropic", "openai")
MODELS = {"anthropic": "claude-haiku-4-5", "openai": "gpt-5-mini"}
ROOT = pathlib.Path(__file__).parents[1]
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits are short, and no key of this machine's is used."""
    monkeypatch.setattr(asking, "LEAST_WAIT", 0.02)
    monkeypatch.setattr(batch_jobs, "POLL", 0.02)
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def problems(monkeypatch):
    """A function that makes fixtures_math so many problems long."""

    def use(n: int):
        task = dataclasses.replace(TASKS["fixtures_math"], load=lambda data_dir: fixtures_math(size=2 * n + 200)[:n])
        monkeypatch.setitem(TASKS, "fixtures_math", task)

    use(40)
    return use


def args_of(server, name: str, **more) -> teacher.Args:
    url = server.url + ("/v1" if name == "openai" else "")
    return teacher.Args(**{"teacher": name, "teacher_model": MODELS[name], "base_url": url, "timeout": 5.0, **more})


def run(server, name: str, out, **more) -> dict:
    return teacher.main(args_of(server, name, out=str(out), **more))


def files(out) -> dict[str, bytes]:
    return {split: (out / f"{split}.jsonl").read_bytes() for split in SPLITS}


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- one run --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TEACHERS)
def test_a_run_writes_verified_quadruples_and_says_what_they_cost(tmp_path, problems, name, capsys):
    with Server() as server:
        report = run(server, name, tmp_path, price_in=2.0, price_cached=0.5, price_out=10.0)
    quads = [q for split in SPLITS for q in read_replay(tmp_path / f"{split}.jsonl")]
    assert report["kept"] == len(quads) == report["problems"] == report["requests"] == 40
    for q in quads:
        start, end = q.meta["error_span"]
        assert q.y0[start:end] == q.y0.split("\n")[-2] and q.meta["span_found"] == "exact"
        assert (q.meta["y0_correct"], q.meta["y1_correct"], q.meta["teacher"]) == (False, True, f"{name}/{MODELS[name]}")
        assert q.meta["y0_source"] == "teacher" and q.meta["verified"]
    tokens = report["tokens"]
    usd = (tokens["fresh"] * 2 + tokens["cached"] * 0.5 + tokens["output"] * 10) / 1e6
    assert tokens["cached"] == 8 * 40 and report["usd"] == pytest.approx(usd, abs=1e-6)
    assert report["usd_per_kept"] == pytest.approx(usd / 40) and report["spans"] == {"exact": 40}
    assert report["spans_at_the_rules_step"] == 1.0 and report["stopped"] is None
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "40 requests" in capsys.readouterr().out
    assert {h["x-stainless-retry-count"] for h in server.headers} == {"0"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", TEACHERS)
def test_every_fault_by_itself_is_overcome(tmp_path, problems, name, fault):
    """The first two requests on every problem fail this way; the replay is that of a faultless run."""
    problems(3)
    with Server() as server:
        run(server, name, tmp_path / "good")
    with Server(faults=1.0, only=(fault,)) as server:
        report = run(server, name, tmp_path / "bad", timeout=1.0)
    assert files(tmp_path / "bad") == files(tmp_path / "good")
    assert report["kept"] == 3 and server.fault_counts[fault] >= 3
    reasons = {"refusal": "refused (frontier_llm)" if name == "anthropic" else "refused (refusal)",
               "cut": "cut off at the token limit", "right": "the attempt is right", "wrong": "the revision is wrong",
               "leak": "the critique gives the answer away"}  # fmt: skip
    if fault in reasons:
        assert set(report["answers_rejected"]) == {reasons[fault]} and not report["failures"]
    elif fault not in ("text_plain", "twice", "no_json"):
        assert report["failures"] and not report["answers_rejected"]
    else:
        assert set(report["failures"]) <= {"no connection, or a broken one"}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_thousand_problems_with_faults_end_with_the_set_of_a_faultless_run(tmp_path, problems, name):
    """Every fifth request fails, in every way there is; none twice, none lost."""
    problems(1000)
    with Server() as server:
        run(server, name, tmp_path / "good", concurrency=16)
    with Server(faults=0.2) as server:
        report = run(server, name, tmp_path / "bad", concurrency=16, timeout=1.5)
    assert files(tmp_path / "bad") == files(tmp_path / "good")
    ids = [row["meta"]["task_id"] for row in rows(tmp_path / "bad" / "accepted.jsonl")]
    assert report["kept"] == len(ids) == len({*ids}) == 1000
    faults = sum(n for fault, n in server.fault_counts.items() if fault)
    assert set(server.fault_counts) == {*FAULTS, ""} and 150 < faults < 400
    assert report["requests"] == server.requests
