"""Code tasks: sources, mutants, critiques, scoring and masks. Programs run through `run_programs` itself."""

import ast
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
import tiny

import b2_grpo
import b4_grpo_critique
import b5_cts
import teacher
from common import programs as programs_room
from common import prompts as prompts_room
from common.base import base_documents
from common.basics import InputError, normalize_x
from common.critique import describe_call, with_attempts
from common.evaluation import score_records, summarize
from common.fixtures import fixtures_code
from common.making import load_replay, perturb_programs, unfit
from common.mutants import FLAWS, Mutant, count_statements, mutants
from common.plans import flaw_of_tests, parse_program
from common.programs import Verdict, code_lines, grade, line_changes, program_of
from common.prompts import CODE_LINE, attempt_prompt, critique_prompt, revise_prompt, templates_sha256
from common.replay import ERROR_TAGS, Problem, Quadruple, parse_quadruple, replay_report, write_replay
from common.report import read_metrics
from common.rewards import format_valid, outcome_scores, process_scores, step_rewards, uptake_scores
from common.run import rollout_metrics
from common.sandbox import check_sandbox
from common.tasks import MOST_TESTS, TASKS, apps, check_step_credit, get_task, mbpp, tidy_program
from common.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = """def calc(a, b):
    r = a + 3
    if r > 10:
        r = r - b
    return r"""
ASSERTS = ["assert calc(1, 2) == 4", "assert calc(7, 2) == 10", "assert calc(9, 2) == 10", "assert calc(20, 5) == 18"]
X = f"calc(a, b): Start with a plus 3. If it is above 10, subtract b.{CODE_LINE}"
PROBLEM = Problem("own/calc", X, REFERENCE, "", None, {"setup": "", "asserts": ASSERTS}, {"difficulty": "easy"})
WRONG = REFERENCE.replace("r - b", "r + b")  # passes the first two asserts


def quad(y0: str = WRONG, span: tuple[int, int] | None = None, **meta) -> Quadruple:
    """A quadruple of PROBLEM; without `span` the flagged text is the line that WRONG gets wrong."""
    start = y0.find("r = r + b")
    span = span or ((start, start + 9) if start >= 0 else None)
    fields = {
        "task_id": "own/calc", "domain": "code", "split": "test", "horizon": 4, "edit_distance": 1,
        "error_tags": ["local_arithmetic"], "error_span": span and list(span), "teacher": "own", "y0_correct": False,
        "y1_correct": True, "is_human_audited": False, "tests": PROBLEM.tests, **meta,
    }  # fmt: skip
    return Quadruple(X, y0, "Line 4 is wrong: it uses the wrong operator. calc(9, 2) fails.", REFERENCE, fields)


@pytest.fixture(scope="session", autouse=True)
def confined():
    """Where a machine can confine nothing, no program of these tests runs."""
    try:
        check_sandbox()
    except InputError as e:
        pytest.skip(str(e))


@pytest.fixture
def broken_harness(monkeypatch):
    """A sandbox in which every program that holds the word `broken` gives a harness error."""
    run, ran = programs_room.run_programs, []

    def run_programs(jobs, **limits):
        ran.append([program for program, _ in jobs])
        verdicts = run([job for job in jobs if "broken" not in job[0]], **limits)
        good = iter(verdicts)
        return [bad(len(tests)) if "broken" in program else next(good) for program, tests in jobs]

    monkeypatch.setattr(programs_room, "run_programs", run_programs)
    monkeypatch.setattr(programs_room, "_VERDICTS", {})
    return ran


def bad(total: int) -> Verdict:
    return verdict("harness_error", 0, total)


def verdict(outcome: str, passed: int = 0, total: int = 4) -> Verdict:
    return Verdict(outcome=outcome, passed=passed, total=total, detail="no fork")


# ---- sources --------------------------------------------------------------------------------------------------------
def test_fixtures_code():
    """Deterministic, unique, horizons 2 to 8, asserts that the reference passes and that tell problems apart."""
    problems = fixtures_code(size=400)
    assert problems[:60] == fixtures_code(size=60) != fixtures_code(seed=1, size=60)
    assert len({normalize_x(p.x) for p in problems}) == len({p.task_id for p in problems}) == 400
    assert {count_statements(p.reference) for p in problems} == set(range(2, 9))
    for p in problems:
        assert p.x.endswith(CODE_LINE) and p.split is None and len(set(p.tests["asserts"])) == 4
        space: dict = {}
        exec("\n".join([p.reference, *p.tests["asserts"]]), space)
        assert p.x.startswith(f"{re.match(r'def (.+):', p.reference).group(1)}: Start with ")
    verdicts = grade([p.reference for p in problems[:20]], [p.tests for p in problems[:20]])
    assert {v.outcome for v in verdicts} == {"pass"}


MBPP_ROW = {"task_id": 601, "text": "Add two.", "code": "def add(a, b):\r\n\treturn a + b \r\n", "test_setup_code": "",
            "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "challenge_test_list": []}  # fmt: skip


def jsonl(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path.parent)


def test_mbpp_from_a_file(tmp_path):
    """Splits by task id, plain line ends and indents, one assert shown; no tests is not an error here."""
    rows = [{**MBPP_ROW, "task_id": i} for i in (601, 11, 510)] + [{**MBPP_ROW, "task_id": 3, "test_list": []}]
    problems = get_task("mbpp").load(jsonl(tmp_path / "mbpp.jsonl", rows))
    assert [(p.task_id, p.split) for p in problems] == [
        ("mbpp/00003", "train"), ("mbpp/00011", "test"), ("mbpp/00510", "test"), ("mbpp/00601", "train"),
    ]  # fmt: skip
    assert problems[0].tests is None
    assert problems[1].x == f"Add two.\nIt has to pass, among others:\nassert add(1, 2) == 3{CODE_LINE}"
    assert problems[1].reference == "def add(a, b):\n    return a + b"
    assert problems[1].tests == {"setup": "", "asserts": MBPP_ROW["test_list"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"mbpp\.jsonl:2: not JSON"),
        ({**MBPP_ROW, "code": 3}, r"mbpp\.jsonl:2: field 'code'"),
        ({**MBPP_ROW, "task_id": "x"}, r"mbpp\.jsonl:2: field 'task_id'"),
        ({**MBPP_ROW, "test_list": [3]}, r"mbpp\.jsonl:2: fields 'test_list'.*asserts"),
    ],
)
def test_mbpp_names_the_line_and_the_field(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        mbpp(jsonl(tmp_path / "mbpp.jsonl", [MBPP_ROW, row]))


STDIN = {"problem_id": 7, "difficulty": "interview", "question": "Add two numbers.", "starter_code": "",
         "solutions": json.dumps(["print 'two'", "a, b = map(int, input().split())\nprint(a + b)\n"]),
         "input_output": json.dumps({"inputs": ["1 2\n", ["3 4", "5"]], "outputs": ["3\n", "7\n"]})}  # fmt: skip
CALL = {"problem_id": 8, "difficulty": "introductory", "question": "Add.", "starter_code": "def add(a, b):\n    ",
        "solutions": '["def add(a, b):\\n  return a+b"]',
        "input_output": '{"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}'}  # fmt: skip


def test_apps_of_both_kinds(tmp_path):
    """Standard input and calls; the first solution that is Python 3; difficulty in the notes."""
    jsonl(tmp_path / "train.jsonl", [STDIN])
    stdin, call = get_task("apps").load(jsonl(tmp_path / "test.jsonl", [CALL]))
    assert (stdin.task_id, stdin.split, call.task_id, call.split) == ("apps/train/7", "train", "apps/test/8", "test")
    assert stdin.tests == {"inputs": ["1 2\n", "3 4\n5"], "outputs": ["3\n", "7\n"]}
    assert call.tests == {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
    assert stdin.reference == "a, b = map(int, input().split())\nprint(a + b)"
    assert stdin.notes == {"difficulty": "interview", "tests_left_out": 0}
    assert "standard input" in stdin.x and "def add(a, b):" in call.x
    assert stdin.x.endswith(CODE_LINE) and call.x.endswith(CODE_LINE)
    assert flaw_of_tests(stdin.tests) is None is flaw_of_tests(call.tests)
    assert [v.outcome for v in grade([stdin.reference, call.reference], [stdin.tests, call.tests])][1] == "pass"


def test_apps_rows_without_usable_tests_or_reference(tmp_path):
    """They are passed on as such, for the teacher to count."""
    sources = (
        "", "{}", '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [1], "outputs": [1]}',
        '{"fn_name": "f", "inputs": [1], "outputs": [1]}', '{"inputs": [' + "9" * 5000 + '], "outputs": [1]}',
    )  # fmt: skip
    rows = [{**STDIN, "input_output": source} for source in sources]
    rows += [{**STDIN, "solutions": source} for source in ("", "[]", '["print 1"]', None)]
    problems = apps(jsonl(tmp_path / "train.jsonl", rows))
    assert [p.tests is None for p in problems] == [True] * 7 + [False] * 4
    assert [p.reference == "" for p in problems] == [False] * 7 + [True] * 4
    reasons = [unfit(p, None) for p in problems]
    assert reasons == ["no usable tests"] * 7 + ["no reference program"] * 4


def test_apps_keeps_a_bounded_number_of_tests(tmp_path):
    """The first tests that fit; what was left out is noted; a problem all of whose tests are too long has none."""
    many = {"inputs": [f"{i}\n" for i in range(50)], "outputs": ["0\n"] * 50}
    large = {"inputs": ["9" * 70_000, "1\n"], "outputs": ["0\n"] * 2}
    only = {"inputs": ["9" * 70_000], "outputs": ["0\n"]}
    rows = [{**STDIN, "input_output": json.dumps(source)} for source in (many, large, only)]
    a, b, c = apps(jsonl(tmp_path / "train.jsonl", rows))
    assert (len(a.tests["inputs"]), a.notes["tests_left_out"]) == (MOST_TESTS, 50 - MOST_TESTS)
    assert (b.tests["inputs"], b.notes["tests_left_out"]) == (["1\n"], 1)
    assert (c.tests, c.notes["tests_left_out"]) == (None, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"train\.jsonl:2: not JSON"),
        ({**STDIN, "question": None}, r"train\.jsonl:2: field 'question'"),
        ({**STDIN, "input_output": "{"}, r"train\.jsonl:2: field 'input_output' is not JSON"),
        ({**STDIN, "input_output": "[1]"}, r"train\.jsonl:2: field 'input_output' must hold a JSON object"),
        ({**STDIN, "solutions": "{}"}, r"train\.jsonl:2: field 'solutions' must hold a JSON list"),
    ],
)
def test_apps_names_the_line_and_the_field(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        apps(jsonl(tmp_path / "train.jsonl", [STDIN, row]))


def test_sources_that_are_not_there(tmp_path):
    for load in (mbpp, apps):
        with pytest.raises(InputError, match=r"jsonl.*--data_dir"):
            load(str(tmp_path))


def test_the_hub_is_asked_without_data_dir(monkeypatch, tmp_path):
    """The raw files of APPS and the full configuration of MBPP; a hub that does not answer names the way out."""
    import datasets
    import huggingface_hub

    jsonl(tmp_path / "test.jsonl", [CALL])
    jsonl(tmp_path / "train.jsonl", [STDIN])
    asked = []
    fetch = lambda repo, name, repo_type: asked.append((repo, name, repo_type)) or str(tmp_path / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert [p.task_id for p in apps(None)] == ["apps/train/7", "apps/test/8"]
    assert asked == [("codeparrot/apps", "train.jsonl", "dataset"), ("codeparrot/apps", "test.jsonl", "dataset")]
    parts = {"train": [MBPP_ROW], "test": [{**MBPP_ROW, "task_id": 12}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or parts)
    assert [p.split for p in mbpp(None)] == ["test", "train"]
    assert asked[-1] == ("google-research-datasets/mbpp", "full")

    def fail(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in ("apps", "mbpp"):
        with pytest.raises(InputError, match=f"{name}: no answer from the hub .offline.; pass --data_dir"):
            get_task(name).load(None)


def test_tidy_program_keeps_the_program():
    assert tidy_program("def f():\r\n\treturn 1 \r\n\r\n") == "def f():\n    return 1"
    text = 's = """a \r\n\tb"""\n'  # white space inside a string is part of the program
    assert tidy_program(text) == text.replace("\r\n", "\n")
    mixed = "if x:\n\tif y:\n        \tz = 1\n"
    assert ast.dump(ast.parse(tidy_program(mixed))) == ast.dump(ast.parse(mixed))
    assert tidy_program("print 'two'") == "print 'two'"


# ---- replay and prompts ---------------------------------------------------------------------------------------------
def line_of(**changes) -> str:
    q = quad()
    return json.dumps({"x": q.x, "y0": q.y0, "f": q.f, "y1": q.y1, **changes})


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({}, "asserts, or inputs"),
        ({"asserts": []}, "asserts, a list"),
        ({"asserts": ["assert 1"], "setup": 3}, "setup, a string"),
        ({"inputs": ["1"], "outputs": []}, "one length"),
        ({"inputs": [1], "outputs": ["1"]}, "strings"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}, "lists of arguments"),
    ],
)
def test_bad_tests_of_a_replay_line_are_named(tests, message):
    with pytest.raises(InputError, match=f"here:1: field 'meta.tests' needs .*{message}"):
        parse_quadruple(line_of(meta=quad(tests=tests).meta), "here:1")


def test_the_last_line_of_x_and_the_domain_agree():
    """The prompts are worded by that line, so a replay in which they differ would be asked in the wrong words."""
    assert parse_quadruple(line_of(meta=quad().meta), "here:1") == quad()
    with pytest.raises(InputError, match=r"here:1: field 'x' must end with 'Answer in Python\.'"):
        parse_quadruple(line_of(meta=quad().meta, x="calc(a, b)"), "here:1")
    with pytest.raises(InputError, match="field 'x'"):
        parse_quadruple(line_of(meta=quad(domain="math", answer="3").meta), "here:1")


def test_prompts_are_worded_by_domain():
    q = quad()
    prompts = [attempt_prompt(q.x), revise_prompt(q.x, q.y0, q.f), critique_prompt(q.x, q.y0)]
    assert not any("####" in p for p in prompts) and all(p.startswith(f"Problem:\n{X}\n") for p in prompts)
    assert [p.rsplit("\n", 2)[1] for p in prompts] == ["Solution:", "Solution:", "Critique:"]
    assert f"\nAttempt:\n{WRONG}\nCritique:\n{q.f}\n" in prompts[1]
    assert "####" in attempt_prompt("What is 2+3?") and "####" in revise_prompt("What is 2+3?", "5", "No.")


@pytest.mark.parametrize(
    "name", ["CODE_ATTEMPT_TEMPLATE", "CODE_REVISE_TEMPLATE", "CODE_CRITIQUE_TEMPLATE", "CODE_LINE"]
)
def test_the_fingerprint_has_the_code_templates(monkeypatch, name):
    before = templates_sha256()
    monkeypatch.setattr(prompts_room, name, getattr(prompts_room, name) + " ")
    assert templates_sha256() != before


def test_replay_of_the_other_domain_is_refused(tmp_path):
    for split in ("train", "val", "test"):
        q = dataclasses.replace(quad(split=split), x=f"{split} {X}")
        write_replay(tmp_path / f"{split}.jsonl", [q])
    assert len(load_replay("fixtures_code", str(tmp_path), None)["test"]) == 1
    with pytest.raises(InputError, match="--task fixtures_math is math, this replay code"):
        load_replay("fixtures_math", str(tmp_path), None)


def test_leak_rate_of_programs():
    """A critique leaks where it writes a line that the attempt lacks and the revision has."""
    leaky = dataclasses.replace(quad(), f="Line 4 is wrong, write r  =  r - b there.")
    assert replay_report([quad(), leaky])["leak_rate"] == 0.5
    quoting = dataclasses.replace(quad(), f="Line 4 is wrong: r = r + b adds.")
    assert replay_report([quoting])["leak_rate"] == 0.0


# ---- mutants --------------------------------------------------------------------------------------------------------
RICH = '''import math
def f(xs, k):
    # caf\u00e9: bytes and characters differ
    s = "\u00e9\u4e2d"; best = 0
    for i, x in enumerate(xs):
        if x > k and not x in (3, 4):
            best = max(best, x * 2 - i)
        elif (x) <= \\
             k:
            best += 1
        else:
            best -= min(k, 2)
    while best % 7 != 0:
        best = best + 1
    return best'''


def own_mutants(program: str = RICH) -> list[Mutant]:
    return mutants(program, "key")


def test_mutants_parse_differ_and_are_of_every_kind():
    found = own_mutants()
    assert {m.kind for m in found} == set(FLAWS)
    assert len(found) > 60 and found == own_mutants() != mutants(RICH, "other key")
    assert {m.kind for m in found[: len(FLAWS)]} == set(FLAWS)  # kinds in turn
    for m in found:
        assert ast.dump(ast.parse(m.program)) != ast.dump(ast.parse(RICH))


def test_a_mutant_differs_from_the_reference_under_its_span_alone():
    """What stands before the span and behind it is the reference's, but for a statement left out beside the span and
    for a return that has moved."""
    for m in own_mutants():
        start, end = m.span
        if m.kind in ("dropped_statement", "dropped_branch"):
            assert m.program[start:end] in RICH, m
            old, new = code_lines(m.program), code_lines(RICH)
            changes = line_changes(old, new)
            flagged = [i for i, (a, b, _) in enumerate(old) if a < end and b > start]
            assert len(changes) == 1 and changes[0][0] == changes[0][1] and flagged, m
            assert flagged[0] <= changes[0][0] <= flagged[-1] + 1, m
        elif m.kind == "early_return":
            assert m.program[start:end] == "return best"
            assert m.program.split("\n")[-1] == "        return best"
        else:
            assert RICH.startswith(m.program[:start]) and RICH.endswith(m.program[end:]), m
            assert m.program[start:end] != RICH[start : len(RICH) - len(m.program[end:])]


def test_the_span_is_one_statement_or_the_head_of_one():
    heads = {"for i, x in enumerate(xs):", "while best % 7 != 0:"}
    for m in own_mutants():
        text = m.program[slice(*m.span)]
        assert text == text.strip() and not text.startswith("#"), m
        assert "\n" not in text or text.startswith("elif"), m
        assert ("\n" not in text and text.count(":") <= 1) or text in heads or text.startswith("elif"), m


def texts(kind: str, program: str) -> set[str]:
    return {m.program for m in own_mutants(program) if m.kind == kind}


def test_mutants_by_hand():
    line = "def f(a, b):\n    return {}"
    write = lambda *bodies: {line.format(body) for body in bodies}
    assert texts("comparison", line.format("(a) < b")) == write("(a) <= b", "(a) > b")
    assert texts("comparison", line.format("a not  in b")) == write("a in b")
    assert texts("operator", line.format("(a * 2) // b")) == write("(a + 2) // b", "(a * 2) / b", "(a * 2) * b")
    assert texts("off_by_one", line.format("a[0] + 3")) == write("a[1] + 3", "a[0] + 4", "a[0] + 2")
    assert texts("condition", line.format("a and b")) == write("a or b")
    assert texts("condition", line.format("not a")) == write("a")
    assert texts("condition", line.format("True")) == write("False")
    assert texts("swapped", line.format("a - b")) == write("b - a")
    assert texts("swapped", line.format("a - b * 2")) == set()
    assert texts("wrong_variable", line.format("a + g(b)")) == write("b + g(b)", "a + g(a)")
    assert texts("wrong_call", line.format("max(a, b.lower())")) == write("min(a, b.lower())", "max(a, b.upper())")
    assert texts("dropped_branch", "def f(a):\n    if a:\n        b = 1\n    else:\n        b = 2\n    return b") == {
        "def f(a):\n    return b", "def f(a):\n    if a:\n        b = 1\n    return b",
    }  # fmt: skip
    loop = "def f(a):\n    b = 0\n    for c in a:\n        b += c\n    return b"
    assert texts("early_return", loop) == {loop.replace("    return", "        return")}
    assert loop.replace("    b = 0\n", "") in texts("dropped_statement", loop)


def test_a_statement_that_no_line_of_its_own_has_is_not_dropped():
    assert not texts("dropped_statement", "def f(a):\n    b = 1; c = 2\n    return b + c")
    assert not texts("dropped_statement", 'def f(a):\n    "Says what f does."\n    return a')


# ---- quadruples -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made() -> list[Quadruple]:
    return perturb_programs([*fixtures_code(size=40), PROBLEM])


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


def test_a_problem_that_stands_in_test_too_leaves_train(tmp_path, monkeypatch):
    problems = [dataclasses.replace(PROBLEM, task_id=f"own/{s}", split=s) for s in ("train", "test")]
    monkeypatch.setitem(TASKS, "apps", dataclasses.replace(TASKS["apps"], load=lambda data_dir: problems))
    report = teacher.main(teacher.Args(task="apps", out=str(tmp_path)))
    assert (report["kept"], report["rejected"]) == (1, {"stands in test too": 1})


MBPP = pathlib.Path(os.environ.get("CTS_MBPP", "data/mbpp/mbpp.jsonl"))  # the real file, where it is


# ---- scores ---------------------------------------------------------------------------------------------------------
def fenced(program: str) -> str:
    return f"It subtracts b.\n```python\n{program}\n```"


def test_outcome_and_process_scores():
    """All tests or nothing; and the fraction of them. A program may stand in a fence."""
    some = [REFERENCE, WRONG, fenced(REFERENCE), "def calc(a, b):", "", "def calc(a, b):\n    return 10"]
    quads = [quad(), quad()]
    outcome, process = outcome_scores(some, quads), process_scores(some, quads)
    np.testing.assert_array_equal(outcome, [[1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(process, [[1, 2 / 4, 1], [0, 0, 2 / 4]])
    assert outcome.dtype == process.dtype == np.float32


NEGATED = WRONG.replace("    r = a", "    b = -b\n    r = a")
UPTAKES = {  # what the completion does: (completion, expected)
    "the reference": (REFERENCE, 1.0),
    "the reference in a fence": (fenced(REFERENCE), 1.0),
    "the attempt again": (WRONG, 0.0),
    "the attempt in other white space": (WRONG.replace("r + b", "r +  b  # better"), 0.0),
    "a comment": (WRONG.replace("    return r", "    # better\n    return r"), 0.0),
    "changed, no test more": (WRONG.replace("r + b", "r * b"), 0.0),
    "changed, one test more": (WRONG.replace("r + b", "10"), 1.0),
    "all tests, but by a change elsewhere": (NEGATED, 0.0),
    "a new line directly before it": (WRONG.replace("        r", "        b = -b\n        r"), 1.0),
    "another way": ("def calc(a, b):\n    return a + 3 - b * (a > 7)", 1.0),
    "nothing": ("", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", UPTAKES)
def test_uptake_by_hand(name):
    completion, expected = UPTAKES[name]
    assert uptake_scores([completion], [quad()]).tolist() == [[expected]]


def test_uptake_of_a_missing_statement():
    """The flagged line stays; what was missing beside it has to come back, and not elsewhere."""
    y0 = "def calc(a, b):\n    r = a + 3\n    return r"
    q = quad(y0, (y0.index("return"), len(y0)))
    elsewhere = "def calc(a, b):\n    a = a - b if a > 7 else a\n    r = a + 3\n    return r"
    assert uptake_scores([REFERENCE, y0, elsewhere], [q]).tolist() == [[1, 0, 0]]
    assert outcome_scores([elsewhere], [q]).tolist() == [[1]]


def test_uptake_without_a_span_is_nothing(made):
    assert uptake_scores([REFERENCE], [quad("def calc(a, b):\n    return a")]).tolist() == [[0.0]]
    assert uptake_scores([q.y1 for q in made], made).tolist() == [[1.0]] * len(made)
    assert uptake_scores([q.y0 for q in made], made).tolist() == [[0.0]] * len(made)


def test_programs_run_in_one_batch_and_once(broken_harness):
    """Outcome, process and uptake of one rollout: one run per different program, y0 among them."""
    some = [REFERENCE, WRONG, REFERENCE, "x = 1"]
    quads = [quad(), quad()]
    outcome_scores(some, quads)
    assert [len(ran) for ran in broken_harness] == [3]
    process_scores(some, quads)
    uptake_scores(some, quads)
    assert [len(ran) for ran in broken_harness if ran] == [3]


def test_a_program_without_a_fence_is_taken_whole():
    """Also where it does not open with a definition, as programs on standard input do."""
    tests = {"inputs": ["3\n"], "outputs": ["6\n"]}
    text = "n = int(input())\nfor _ in range(1):\n    n *= 2\nprint(n)"
    assert [v.outcome for v in grade([text, f"So:\n```\n{text}\n```"], [tests] * 2)] == ["pass"] * 2
    assert program_of(text) == text and program_of(f"Say\n```python\n{REFERENCE}\n```").strip() == REFERENCE


def test_format_is_a_program_that_can_be_read():
    for text, valid in ((REFERENCE, True), (fenced(WRONG), True), ("", False), ("def f(:", False), ("# no", False)):
        assert format_valid(text, "code") is valid, text
    assert not format_valid("(" * 5000, "code") and not format_valid("x = '\0'", "code")


# ---- harness errors -------------------------------------------------------------------------------------------------
def test_a_harness_error_is_no_score(broken_harness):
    """NaN in all three rewards, counted, tried twice and not remembered."""
    some, q = [REFERENCE, "broken = 1"], quad()
    for scores in (outcome_scores, process_scores, uptake_scores):
        values = scores(some, [q])
        assert math.isnan(values[0, 1]) and values[0, 0] == 1.0
    tries = [ran for ran in broken_harness if "broken = 1" in ran]
    assert len(tries) == 6  # two for each kind of score
    assert math.isnan(uptake_scores([REFERENCE], [quad(y0="broken = 1", span=(0, 6))])[0, 0])


def test_a_harness_that_runs_nothing_stops_the_run(broken_harness):
    with pytest.raises(InputError, match="none of 8 programs could be run: no fork"):
        outcome_scores([f"broken = {i}" for i in range(8)], [quad()])


def test_unscored_samples_are_masked():
    """As the scripts do it: out of loss and baseline; the group's other rewards are centred without it."""
    reward_BG, truncated_BG = np.array([[1.0, np.nan, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.0, 1.0]])
    valid_BG = ~np.isnan(reward_BG) * (1.0 - truncated_BG)
    adv_BG = b2_grpo.group_advantages(np.nan_to_num(reward_BG), valid_BG, "center")
    np.testing.assert_allclose(adv_BG, [[0.5, 0, -0.5, 0]])
    for script in ("b2_grpo", "b3_grpo_verifier", "b4_grpo_critique", "b5_cts"):
        text = (ROOT / f"{script}.py").read_text()
        assert "valid_BG = ~np.isnan(reward_BG) * (" in text and "np.nan_to_num(reward_BG), valid_BG" in text


def test_rollout_metrics_count_harness_errors():
    reward_BG = np.array([[1.0, np.nan, 1.0], [0.0, 1.0, np.nan], [np.nan] * 3])
    out = {"len_M": np.ones(9), "truncated_M": np.zeros(9)}
    metrics = rollout_metrics(out, [REFERENCE, *["("] * 8], reward_BG, [quad()] * 3)
    assert metrics["rollout/harness_errors"] == 5
    assert metrics["rollout/zero_std_frac"] == pytest.approx(2 / 3)
    assert metrics["rollout/format_frac"] == pytest.approx(1 / 9)


def test_evaluation_leaves_out_what_was_not_scored(broken_harness):
    done = lambda text: {"text": text, "tokens": 3, "truncated": False}
    quads = [quad(), quad(), quad("broken = 1", (0, 6))]
    attempts = [done(WRONG), done(REFERENCE), done(WRONG)]
    revisions = [done(REFERENCE), done("broken"), done(REFERENCE)]
    records = score_records(quads, attempts, revisions)
    assert [(r["y0"], r["attempt"], r["revised"]) for r in records] == [(0, 0, 1), (0, 1, None), (None, 0, 1)]
    assert [r["revised_format"] for r in records] == [True, True, True]
    summary = summarize(records)
    figures = [summary[k] for k in ("harness_errors", "accuracy_revised", "accuracy")]
    assert figures == pytest.approx([2, 1.0, 1 / 3])
    assert (summary["delta_critique"], summary["wrong_to_right"], summary["right_to_wrong"]) == (1.0, 1.0, None)
    json.dumps(summary, allow_nan=False)


def test_step_credit_is_for_math():
    check_step_credit("fixtures_code", "rolled_up")
    check_step_credit("fixtures_math", "per_step")
    with pytest.raises(InputError, match="--process_credit per_step: works on math tasks, apps is code"):
        check_step_credit("apps", "per_step")
    with pytest.raises(InputError, match="math only"):
        step_rewards(None, np.zeros((1, 4), int), np.array([4]), [REFERENCE], [quad()])


# ---- critiques of any attempt ---------------------------------------------------------------------------------------
def test_with_attempts_criticises_by_the_failing_test(broken_harness):
    """A slip, the right program, another way, a crash, a harness error: one batch for all."""
    other = "def calc(x, y):\n    total = x\n    for _ in range(4):\n        total += 1\n    return total"
    crash = REFERENCE.replace("r > 10", "q > 10")
    tries = [fenced(WRONG), REFERENCE, other, crash, "broken"]
    slip, right, way, stops, kept = with_attempts([quad()] * 5, tries, lambda prompt: True)
    assert (slip.y0, slip.meta["y0_correct"]) == (fenced(WRONG), False)
    assert slip.y0[slice(*slip.meta["error_span"])] == "r = r + b"
    assert slip.f == "Line 6 is wrong: it leaves the way to the result. calc(9, 2) fails."
    assert (right.f, right.meta["error_span"], right.meta["y0_correct"]) == ("No line is found wrong.", None, True)
    assert (way.f, way.meta["error_span"]) == ("calc(1, 2) fails: the result is wrong.", None)
    assert stops.f == "Line 3 is wrong: it stops with an error. calc(1, 2) fails."
    assert stops.y0[slice(*stops.meta["error_span"])] == "if q > 10:"
    assert kept == quad()


def test_with_attempts_cuts_what_does_not_fit():
    limit = len(revise_prompt(X, "", "")) + 170
    (q,) = with_attempts([quad()], [WRONG], lambda prompt: len(prompt) <= limit)
    assert WRONG.startswith(q.y0) and len(q.y0) < len(WRONG) and not q.meta["y0_correct"]
    assert len(revise_prompt(q.x, q.y0, q.f)) <= limit


def test_with_attempts_whose_call_is_too_long_for_the_prompt():
    """The critique without the call; and where that is too long too, the quadruple as it was."""
    plain = "Line 4 is wrong: it leaves the way to the result. A test fails."
    whole = len(revise_prompt(X, "", WRONG))
    for limit, f in ((whole + len(plain), plain), (whole + 3, quad().f)):
        (q,) = with_attempts([quad()], [WRONG], lambda prompt, n=limit: len(prompt) <= n or "7" * 66 in prompt)
        assert (q.y0, q.f) == (WRONG, f)


def test_calls_are_described_without_what_they_should_give():
    call = lambda text: describe_call({"asserts": [text]}, 0)
    assert call("assert f([1, 2], k=3) == [4]") == "f([1, 2], k=3)"
    assert call("assert set(f('a')) == set(['b'])") == "f('a')"
    assert call("assert not f(3)") == "f(3)" and call("assert math.isclose(f(2), 0.5)") == "f(2)"
    assert call("assert 1") == call("assert (") == describe_call({"asserts": []}, None) == "A test"
    assert len(call(f"assert f({[1] * 99}) == 5")) < 70
    assert describe_call({"fn_name": "f", "inputs": [[1, "a"]], "outputs": [3]}, 0) == "f(1, 'a')"
    assert describe_call({"inputs": ["1 2\n"], "outputs": ["3"]}, 0) == r"the input '1 2\n'"


# ---- the nano base --------------------------------------------------------------------------------------------------
def test_base_documents_of_programs():
    """Some print what they should return; a revision without a critique keeps the attempt."""
    q = quad()
    quads = [dataclasses.replace(q, x=f"{name}{i} {X}") for name in ("calc", "work") for i in range(60)]
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1], 400)
    documents = base_documents(tokenizer, quads, 0)
    pairs = [tuple(tokenizer.decode([p, a])) for p, a in documents]
    assert len(pairs) == 240
    for prompt, answer in pairs:
        without = "Critique:\n\n" in prompt
        program = answer.replace("print(r)", "return r")
        assert program == (WRONG if without else REFERENCE)
    printed = {n: np.mean(["print(r)" in a for p, a in pairs if f"\n{n}" in p]) for n in ("calc", "work")}
    assert 0.55 < printed["calc"] < 0.95 and printed["work"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [(b2_grpo, {}), (b4_grpo_critique, {}), (b5_cts, {"critique": "online"})],
    ids=["b2", "b4", "b5"],
)
def test_scripts_run_on_programs(tmp_path, monkeypatch, script, flags):
    """From generated problems to the result; a verdict for every completion."""
    task = dataclasses.replace(TASKS["fixtures_code"], base_steps=4, base_width=256)
    monkeypatch.setitem(TASKS, "fixtures_code", task)
    monkeypatch.setattr("common.base.ModelConfig", tiny.TinyConfig)
    monkeypatch.setattr("common.evaluation.PRECHECK_GROUPS", 8)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla_cache"))
    teacher.main(teacher.Args(task="fixtures_code", out=str(tmp_path / "replay"), limit=12))
    common = {**tiny.flags(script), "steps": 2, "max_new_tokens": 24, "out_dir": str(tmp_path), **flags}
    result = script.main(script.Args(task="fixtures_code", replay=str(tmp_path / "replay"), **common))
    assert (result["summary"]["n"], result["summary"]["harness_errors"], result["summary"]["accuracy_y0"]) == (12, 0, 0)
    assert result["replay"]["train"]["leak_rate"] == 0
    rows = read_metrics(next(tmp_path.glob(f"{script.__name__}__fixtures_code__*")))
    assert [row["rollout/harness_errors"] for row in rows] == [0, 0]
    assert all(np.isfinite(v) for row in rows for v in row.values())


@pytest.mark.skipif(not MBPP.is_file(), reason="needs MBPP's own file")
def test_mbpp_itself():
    """All 974 problems load; of the first 20 nearly all give a quadruple."""
    problems = mbpp(str(MBPP.parent))
    assert len(problems) == 974 and sum(p.split == "test" for p in problems) == 500
    assert all(parse_program(p.reference) for p in problems)
    assert sum(isinstance(q, Quadruple) for q in perturb_programs(problems[:20])) >= 17
    for problem in itertools.islice(problems, 100):
        for m in mutants(problem.reference, "key"):
            assert m.program[slice(*m.span)].strip()
