"""Replay of a model's own wrong attempts: what is judged, what is kept, what is refused; a run on a tiny base.

pytest tests/test_sampled.py
"""

import dataclasses
import json

import pytest
import tiny
from examples import problem_of

import teacher
from common import sampled
from common.basics import InputError
from common.fixtures import fixtures_math
from common.making import load_replay
from common.prompts import attempt_prompt
from common.replay import parse_quadruple
from common.sampled import CUT_OFF, NOT_FOUND, RIGHT, judge, sampled_quadruples
from common.tasks import TASKS

LINES = ("All: <<3+5=8>>8.", "Now: <<8+4=12>>12.", "#### 12")
PENS = problem_of("3 and 5 pens, 4 more. All?", *LINES)
Y1 = "\n".join(LINES)
SLIP = "All: <<3+5=8>>8.\nNow: <<8+4=13>>13.\n#### 13"
PROSE = Y1.replace("#### 12", "The answer is 12.")
STOPS = "All: <<3+5=8>>8.\nNow she counts them."


# ---- one attempt ----------------------------------------------------------------------------------------------------
def test_an_attempt_becomes_a_quadruple():
    """y0 as it was sampled, the critique and span of its first wrong step, the reference as y1."""
    q = judge(PENS, SLIP, True, True)
    assert (q.x, q.y0, q.y1) == (PENS.x, SLIP, Y1)
    assert q.f == "The second step is wrong: 8+4 is not 13."
    assert SLIP[slice(*q.meta["error_span"])] == "Now: <<8+4=13>>13."
    expected = {"teacher": "rules", "y0_source": "model", "y0_correct": False, "y1_correct": True, "verified": True,
                "horizon": 2, "edit_distance": 2, "error_tags": ["local_arithmetic"], "answer": "12"}  # fmt: skip
    assert {k: q.meta[k] for k in expected} == expected
    assert parse_quadruple(json.dumps(dataclasses.asdict(q)), "here") == q


@pytest.mark.parametrize(
    ("y0", "tag", "f"),
    [
        ("All: <<3+4=7>>7.\n#### 7", "wrong_decomposition", "The first step is wrong: it leaves the way"),
        (Y1.replace("#### 12", "#### 11"), "wrong_decomposition", "The third step is wrong: it leaves the way"),
        ("All: <<3+5=9>>9.\n#### 9", "local_arithmetic", "The first step is wrong: 3+5 is not 9."),
        ("All: <<12+5=8>>8.\n#### 8", "local_arithmetic", "The first step is wrong: its result is off."),
    ],
)
def test_the_tag_follows_the_slip_and_no_critique_leaks(y0, tag, f):
    q = judge(PENS, y0, True, True)
    assert q.meta["error_tags"] == [tag] and q.f.startswith(f) and "12" not in q.f


@pytest.mark.parametrize(
    ("y0", "ended", "reason"),
    [(SLIP, False, CUT_OFF), (Y1, True, RIGHT), *((y0, True, NOT_FOUND) for y0 in (PROSE, STOPS, ""))],
)
def test_why_an_attempt_makes_none(y0, ended, reason):
    assert judge(PENS, y0, ended, True) == reason


# ---- many ----------------------------------------------------------------------------------------------------------
def test_each_problem_is_tried_until_an_attempt_makes_a_quadruple():
    """Three rounds of batches of two, attempts by script: who is kept with which, who is not and why."""
    other = lambda x, **fields: dataclasses.replace(PENS, task_id=x, x=x, **fields)
    script = {
        "at once": [(SLIP, True)],
        "late": [(Y1, True), (PROSE, True), (SLIP, True)],
        "too good": [(Y1, True)] * 3,
        "form": [(Y1, True), (SLIP, False), (PROSE, True)],
        "long": [(Y1, True), (SLIP, False), (Y1, True)],
    }
    problems = [other(x) for x in script]
    tries = {attempt_prompt(x): iter(attempts) for x, attempts in script.items()}
    sizes = []

    def sample(prompts):
        sizes.append(len(prompts))
        return [next(tries[prompt]) for prompt in prompts]

    bad = other("bad reference", answer="13")
    by_split = {"train": [*problems[:3], bad], "test": problems[3:]}
    replay, rejected, about = sampled_quadruples(by_split, sample, 3, 2, False)
    assert {split: [q.meta["task_id"] for q in quads] for split, quads in replay.items()} == {
        "train": ["at once", "late"], "test": []
    }  # fmt: skip
    assert sizes == [2, 2, 1, 2, 2, 2, 2]
    assert rejected == {"every attempt right": 1, NOT_FOUND: 1, CUT_OFF: 1, "reference not verified": 1}
    assert about["attempts"] == {"kept": 2, RIGHT: 7, CUT_OFF: 2, NOT_FOUND: 2}
    assert all(next(rest, None) is None for rest in tries.values())
    replay, _, _ = sampled_quadruples({"train": [bad]}, lambda prompts: [(SLIP.replace("13", "9"), True)], 1, 2, True)
    assert [q.meta["verified"] for q in replay["train"]] == [False]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny base and fixtures_math with 40 problems, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny.install(monkeypatch.setattr, monkeypatch.setitem)
    task = dataclasses.replace(TASKS["fixtures_math"], load=lambda d: fixtures_math(size=300)[:40], max_new_tokens=48)
    monkeypatch.setitem(TASKS, "fixtures_math", task)
    return tmp_path


def run(**args) -> dict:
    return teacher.main(teacher.Args(**{"task": "fixtures_math", "y0": "model", "samples": 2, **args}))


def test_a_run_on_the_tiny_base(small, monkeypatch, capsys):
    """It can say nothing: here its samples get an ending by hand, by the parity of their length. Twice the same, with
    another seed another; the replay that its base is made from stays as it was."""
    make, raw = sampled.make_sampler, []
    references = {attempt_prompt(p.x): p.reference for p in TASKS["fixtures_math"].load(None)}

    def make_sampler(*args):
        sample = make(*args)

        def ended(prompts):
            raw.append(sample(prompts))
            end = lambda text, prompt: references[prompt] if len(text) % 2 else "<<1+1=3>>3\n#### 3"
            return [(end(text, prompt), True) for (text, _), prompt in zip(raw[-1], prompts)]

        return ended

    monkeypatch.setattr(sampled, "make_sampler", make_sampler)
    report = run()
    folder = small / "data" / "replay"
    before = {path.name: path.read_bytes() for path in (folder / "fixtures_math").iterdir()}
    replay = load_replay("fixtures_math", str(folder / "fixtures_math_model"), None)
    assert 0 < report["kept"] == sum(map(len, replay.values())) and all(replay.values())
    assert report["kept"] + sum(report["rejected"].values()) == report["problems"] == 40
    assert report["attempts"]["kept"] == report["kept"] and report["attempts"][RIGHT] > 0
    assert report["replay"]["leak_rate"] == 0 and (report["y0"], report["teacher"]) == ("model", "rules")
    out = capsys.readouterr().out
    (base,) = (path.name for path in (small / "runs" / "base").iterdir())
    assert f"--model runs/base/{base} trains from that very base" in out and "  attempts  kept" in out
    first, second = raw[0], raw[1]
    assert len({text for text, _ in first}) > 10  # sampled, row by row

    raw.clear()
    again = run(out="again")
    assert again == report and raw == [first, second]
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "report.json"):
        assert (small / "again" / name).read_bytes() == (folder / "fixtures_math_model" / name).read_bytes()
    raw.clear()
    run(out="other", seed=1, model=f"runs/base/{base}")
    assert raw[0] != first
    assert before == {path.name: path.read_bytes() for path in (folder / "fixtures_math").iterdir()}


def test_what_a_base_cannot_end_is_cut_off(small):
    """The tiny base as it is, which seldom ends: every attempt is counted, and so is every problem."""
    report = run(limit=3)
    assert report["problems"] == 9 and report["kept"] + sum(report["rejected"].values()) == 9
    tried = report["attempts"]
    assert tried[CUT_OFF] > 5 and report["kept"] == tried.get("kept", 0) < 5
    assert 2 * 9 - report["kept"] <= sum(tried.values()) <= 2 * 9  # one that is kept at once has no second try


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"task": "mbpp"}, "--y0 model: works on math tasks, mbpp is code; use --y0 perturb"),
        ({"task": "nope"}, "--task nope"),
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"limit": -1}, "--limit -1"),
        ({"model": "no/such"}, "--model no/such"),
        ({"out": "data/replay/fixtures_math"}, "the nano base is made from the replay in it"),
    ],
)
def test_bad_input_is_one_line_and_writes_no_replay(small, args, message):
    with pytest.raises(InputError, match=message) as error:
        teacher.main(teacher.Args(**{"task": "fixtures_math", "y0": "model", **args}))
    assert "\n" not in str(error.value)
    assert not list(small.rglob("*.jsonl"))
