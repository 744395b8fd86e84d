"""What the starts of a folder have come to: read back, added to, reported.

pytest tests/test_records.py
"""

import asyncio
import dataclasses
import json

import pytest
from examples import math_quad

from common.basics import InputError
from common.records import Records, check_job, spans_and_leaks
from common.replay import Problem, write_replay
from common.teaching import LEAK

PROBLEMS = {f"own/{i}": Problem(f"own/{i}", f"{i} pens?", "", "1", None) for i in range(6)}


def quad(i: int, **meta):
    return dataclasses.replace(math_quad(meta={"task_id": f"own/{i}", **meta}), x=f"{i} pens?")


def act(records, *steps):
    async def main():
        for step in steps:
            await step(records)

    asyncio.run(main())


def test_records_are_read_back(tmp_path):
    records = Records(tmp_path, PROBLEMS)
    rejected = [("own/1", "no JSON", 3), ("own/2", "x", 1), *[("own/3", why, 5) for why in (LEAK, "x", LEAK)]]
    steps = [lambda r, one=one: r.reject(*one) for one in rejected]
    act(records, lambda r: r.accept(quad(0)), *steps, lambda r: r.reject("own/4", "refused", 9, final=True))
    for again in (records, Records(tmp_path, PROBLEMS)):
        assert again.kept == {"own/0"} and again.final == {"own/2": "x", "own/3": LEAK, "own/4": "refused"}
        assert again.tries["own/1"] == ["no JSON"] and [again.done(f"own/{i}") for i in (0, 1, 2, 5)] == [1, 0, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    tries = [(row["try"], row["final"]) for row in lines if row["task_id"] == "own/3"]
    assert tries == [(1, False), (2, False), (3, True)]
    reasons = records.why_not(list(PROBLEMS.values()), None, {"own/1": "status 500"})
    assert reasons == {"x": 1, LEAK: 1, "refused": 1, "status 500": 1, "not asked to the end": 1}
    y0s = {p: ["y"] for p in PROBLEMS} | {"own/5": []}
    assert records.why_not(list(PROBLEMS.values()), y0s, {})["no wrong attempt"] == 1
    found = spans_and_leaks(records, [quad(0, span_found="exact", span_by_rule=True)])
    assert found["leaks_rejected"] == 2 / 7 and found["spans"] == {"exact": 1} and found["spans_at_the_rules_step"] == 1
    assert found["answers_rejected"] == {LEAK: 2, "no JSON": 1, "refused": 1, "x": 2}


def test_one_that_stands_there_twice_counts_once_and_another_problem_is_refused(tmp_path):
    records = Records(tmp_path, PROBLEMS)
    act(records, lambda r: r.accept(quad(0)), lambda r: r.accept(dataclasses.replace(quad(0), f="Later.")))
    assert [q.f for q in Records(tmp_path, PROBLEMS).quadruples().values()] == [quad(0).f]
    other = {"own/0": dataclasses.replace(PROBLEMS["own/0"], x="others?")}
    with pytest.raises(InputError, match="own/0 is another problem by now"):
        Records(tmp_path, other)


def test_what_a_person_said_of_a_quadruple_stays(tmp_path):
    """In the replay that was written from these records, as long as its texts are the same."""
    records = Records(tmp_path, PROBLEMS)
    act(records, lambda r: r.accept(quad(0)), lambda r: r.accept(quad(1)))
    changed = dataclasses.replace(quad(1, is_human_audited=True), f="Other.")
    write_replay(tmp_path / "train.jsonl", [quad(0, is_human_audited=True), changed])
    found = records.quadruples()
    assert [found[f"own/{i}"].meta["is_human_audited"] for i in (0, 1)] == [True, False]


def test_a_repair_is_reported(tmp_path):
    (tmp_path / "rejected.jsonl").write_text('{"task_id": "own/1", "try": 1')
    records = Records(tmp_path, PROBLEMS)
    assert len(records.repaired) == 1 and "rejected.jsonl: half a line" in records.repaired[0] and not records.tries


def test_a_job_is_written_once_and_compared(tmp_path):
    check_job(tmp_path, {"a": 1, "b": 2})
    check_job(tmp_path, {"a": 1, "b": 2})
    with pytest.raises(InputError, match="was begun with another a, b"):
        check_job(tmp_path, {"a": 2, "b": 3})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("accepted", b'{"a": 1}'), ("accepted", b'{"meta": {"task_id": "own/1"}, "x": "1 pens?"}'),
        ("accepted", b"\xff"), ("accepted", b'{"meta": 3}'),
        ("rejected", b'{"a": 1}'), ("rejected", b'{"task_id": [], "reason": 1}'),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_before_anything_is_asked(tmp_path, name, line):
    (tmp_path / f"{name}.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match=rf"{name}\.jsonl:1: "):
        Records(tmp_path, PROBLEMS)


def test_a_damaged_replay_is_named_before_anything_is_asked(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(InputError, match=r"val\.jsonl:1: "):
        Records(tmp_path, PROBLEMS)


@pytest.mark.parametrize("text", ["[1]", "{", "\udcff"])
def test_a_damaged_job_is_one_line(tmp_path, text):
    (tmp_path / "job.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"job\.json: cannot be read; restore it"):
        check_job(tmp_path, {"task": "a"})
