"""From problems to replay files, by `teacher.main`: what is kept, what is counted as rejected, what the loader reads.

pytest tests/test_making.py
"""

import dataclasses
import json
import os
import re

import pytest
from examples import PROBLEM, REFERENCE, WRONG, X, code_quad, math_quad, problem_of

import teacher
from common import programs as programs_room
from common.basics import InputError
from common.fixtures import fixtures_code, fixtures_long, fixtures_math
from common.making import load_replay, perturb, perturb_programs
from common.mutants import FLAWS, count_statements
from common.replay import ERROR_TAGS, Quadruple, parse_quadruple, replay_report, write_replay
from common.slips import PLANTED, operations, step_kinds
from common.tasks import TASKS


# ---- math -----------------------------------------------------------------------------------------------------------
def run(out, **args) -> dict:
    return teacher.main(teacher.Args(**{"task": "fixtures_math", "out": str(out), **args}))


@pytest.fixture
def small_task(monkeypatch):
    """fixtures_math with 120 problems, so that a whole run takes a moment."""
    task = TASKS["fixtures_math"]
    small = dataclasses.replace(task, load=lambda data_dir: fixtures_math(size=300)[:120])
    monkeypatch.setitem(TASKS, "fixtures_math", small)


def test_where_slips_are_planted_the_flawed_attempts_are_slips():
    """The flagged step is the first of them, named by number; without a planted operation it is another mistake."""
    planted, kinds, without = PLANTED["fixtures_long"], [], 0
    for problem in fixtures_long(size=150)[:100]:
        q = perturb(problem, planted=planted)
        found = step_kinds(q.y0, problem.reference, planted)
        if not any(planted.at(step.b) for step in operations(problem.reference)):
            without += 1
            continue
        first = next((i for i, (kind, _) in enumerate(found) if kind != "right"), None)
        start, end = q.meta["error_span"]
        kinds.append({kind for kind, _ in found} <= {"right", "slip"})
        assert not kinds[-1] or q.y0[start:end] == q.y0.split("\n")[first]
        assert not q.meta["y0_correct"] and q.meta["verified"] and q == perturb(problem, planted=planted)
    assert sum(kinds) > 0.9 * len(kinds) > 40 and without > 5


def test_main_writes_what_the_loader_reads_and_limit_changes_no_quadruple(tmp_path, small_task, capsys):
    report = run(tmp_path / "all")
    replay = load_replay("fixtures_math", str(tmp_path / "all"), None)
    assert report["kept"] == report["problems"] == 120 == sum(map(len, replay.values()))
    assert json.loads((tmp_path / "all" / "report.json").read_text())["replay"]["leak_rate"] == 0
    assert "120 of 120 problems kept (100.0%)" in capsys.readouterr().out
    run(tmp_path / "few", limit=3)
    few = load_replay("fixtures_math", str(tmp_path / "few"), None)
    assert {split: quads[:3] for split, quads in replay.items()} == few
    run(tmp_path / "again")
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_rejections_are_counted_and_unverified_ones_kept_on_request(tmp_path, monkeypatch):
    wrong = problem_of("3 and 5 pens, 4 more. All?", "All: <<3+5=8>>8.", "Now: <<8+4=12>>12.", "#### 12")
    wrong = dataclasses.replace(wrong, answer="13")
    silent = problem_of("What is 5 less 1?", "It is four.", "#### 4")
    task = dataclasses.replace(TASKS["fixtures_math"], load=lambda data_dir: [wrong, silent])
    monkeypatch.setitem(TASKS, "fixtures_math", task)
    assert run(tmp_path)["rejected"] == {"no arithmetic step": 1, "reference not verified": 1}
    report = run(tmp_path, keep_unverified="yes")
    assert (report["kept"], report["unverified"], report["rejected"]) == (1, 1, {"no arithmetic step": 1})
    lines = "".join((tmp_path / f"{split}.jsonl").read_text() for split in ("train", "val", "test")).splitlines()
    meta = parse_quadruple(lines[0], "here").meta
    assert not meta["verified"] and not meta["y1_correct"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"task": "nope"}, "--task nope"),
        ({"limit": -1}, "--limit -1"),
        ({"task": "gsm8k", "data_dir": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, args, message):
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path, **args)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(tmp_path, small_task):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="--out"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_replay_of_other_problems_than_data_dir_s_is_refused(tmp_path, monkeypatch):
    """It would be read in their place."""
    answer = lambda i: f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}"
    rows = [dict(question=f"Ann has {i} pens and buys {i + 1}. How many?", answer=answer(i)) for i in range(1, 60)]
    for name, some in (("a", rows), ("b", rows[1:])):
        (tmp_path / name).mkdir()
        for split, part in (("train", some[:40]), ("test", some[40:])):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.chdir(tmp_path)
    made = load_replay("gsm8k", None, str(tmp_path / "a"))
    assert load_replay("gsm8k", None, str(tmp_path / "a")) == made == load_replay("gsm8k", None, None)
    for replay in (None, "data/replay/gsm8k"):
        with pytest.raises(InputError, match=r"^--data_dir .*/b: data/replay/gsm8k is what is read, and"):
            load_replay("gsm8k", replay, str(tmp_path / "b"))
    with pytest.raises(InputError, match="none"):
        load_replay("gsm8k", None, str(tmp_path / "none"))


def test_load_replay_names_the_missing_split(tmp_path):
    """A named replay directory without its test split is an error and makes nothing."""
    for split in ("train", "val"):
        write_replay(tmp_path / f"{split}.jsonl", [math_quad()])
    with pytest.raises(InputError, match=r"test\.jsonl is missing"):
        load_replay("fixtures_math", str(tmp_path), None)
    assert sorted(os.listdir(tmp_path)) == ["train.jsonl", "val.jsonl"]


# ---- programs -------------------------------------------------------------------------------------------------------
def test_quadruples_are_verified(made):
    """The mutant fails a test and the reference passes all, by a run of their own."""
    assert all(isinstance(q, Quadruple) for q in made)
    tests = [q.meta["tests"] for q in made]
    right = programs_room.run_programs([(q.y1, t) for q, t in zip(made, tests)], workers=2)
    assert {v.outcome for v in right} == {"pass"}
    wrong = programs_room.run_programs([(q.y0, t) for q, t in zip(made, tests)], workers=2)
    assert {v.outcome for v in wrong} <= {"wrong", "crash"}
    for q in made:
        parse_quadruple(json.dumps(dataclasses.asdict(q)), "here")
        assert (q.meta["verified"], q.meta["y0_correct"], q.meta["y1_correct"]) == (True, False, True)
        assert q.meta["horizon"] == count_statements(q.y1) and q.meta["edit_distance"] > 0
    assert made[-1].meta["difficulty"] == "easy"


def test_critique_names_the_line_and_a_call_that_fails_and_no_fix(made):
    for q in made:
        line, flaw, call = re.fullmatch(r"Line (\d+) is wrong: (.+)\. (.+) fails\.", q.f).groups()
        assert q.y0.count("\n", 0, q.meta["error_span"][0]) + 1 == int(line)
        assert (q.meta["error_tags"][0], flaw) == FLAWS[q.meta["mutation"]]
        space: dict = {}
        expected = next(a.split(" == ")[1] for a in q.meta["tests"]["asserts"] if a.startswith(f"assert {call} "))
        exec(q.y0, space)
        try:
            got = eval(call, space)
        except Exception:
            got = None
        assert str(got) != expected
    assert replay_report(made)["leak_rate"] == 0.0
    assert not any(re.search(r"\d", flaw) for _, flaw in FLAWS.values())
    assert {tag for tag, _ in FLAWS.values()} <= set(ERROR_TAGS)


def test_quadruples_depend_on_seed_and_problem_alone(made):
    some = [*fixtures_code(size=3), PROBLEM]
    assert perturb_programs(some[::-1]) == [made[-1], *made[2::-1]]
    assert perturb_programs(some, seed=1) != [*made[:3], made[-1]]


def test_what_yields_no_quadruple_is_counted_by_reason(tmp_path, monkeypatch, broken_harness):
    change = lambda i, **fields: dataclasses.replace(PROBLEM, task_id=f"own/{i}", x=f"{i} {X}", split="train", **fields)
    problems = [
        change(0), change(1, tests=None), change(2, reference=""), change(3, reference="print 'two'"),
        change(4, reference=WRONG), change(5, reference=f"{REFERENCE} # broken"),
        change(6, reference="def f():\n    return None", tests={"setup": "", "asserts": ["assert f() is None"]}),
    ]  # fmt: skip
    monkeypatch.setitem(TASKS, "apps", dataclasses.replace(TASKS["apps"], load=lambda data_dir: problems))
    report = teacher.main(teacher.Args(task="apps", out=str(tmp_path)))
    assert (report["problems"], report["kept"]) == (7, 1)
    assert report["rejected"] == {
        "harness error": 1, "no mutant fails a test": 1, "no reference program": 1, "no usable tests": 1,
        "reference fails its tests": 1, "reference is not Python 3": 1,
    }  # fmt: skip
    again = teacher.main(teacher.Args(task="apps", out=str(tmp_path), keep_unverified="yes"))
    assert (again["kept"], again["unverified"]) == (2, 1)


@pytest.mark.usefixtures("confined")
def test_a_problem_that_stands_in_test_too_leaves_train(tmp_path, monkeypatch):
    problems = [dataclasses.replace(PROBLEM, task_id=f"own/{s}", split=s) for s in ("train", "test")]
    monkeypatch.setitem(TASKS, "apps", dataclasses.replace(TASKS["apps"], load=lambda data_dir: problems))
    report = teacher.main(teacher.Args(task="apps", out=str(tmp_path)))
    assert (report["kept"], report["rejected"]) == (1, {"stands in test too": 1})


def test_replay_of_the_other_domain_is_refused(tmp_path):
    for split in ("train", "val", "test"):
        q = dataclasses.replace(code_quad(split=split), x=f"{split} {X}")
        write_replay(tmp_path / f"{split}.jsonl", [q])
    assert len(load_replay("fixtures_code", str(tmp_path), None)["test"]) == 1
    with pytest.raises(InputError, match="--task fixtures_math is math, this replay code"):
        load_replay("fixtures_math", str(tmp_path), None)
