"""GSM8K, MBPP and APPS from their own files and from the hub, and the table of tasks.

pytest tests/test_tasks.py
"""

import ast
import itertools
import json
import os
import pathlib

import huggingface_hub
import pytest

from common.basics import InputError
from common.making import perturb_programs, unfit
from common.mutants import mutants
from common.plans import flaw_of_tests, parse_program
from common.programs import grade
from common.prompts import CODE_LINE
from common.replay import Problem, Quadruple
from common.tasks import MOST_TESTS, apps, check_step_credit, get_task, gsm8k, mbpp, tidy_program


def jsonl(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path.parent)


# ---- gsm8k ----------------------------------------------------------------------------------------------------------
def gsm8k_dir(tmp_path, train: str, test: str = '{"question": "q", "answer": "#### 1"}\n'):
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "test.jsonl").write_text(test)
    return str(tmp_path)


def test_gsm8k_from_files(tmp_path):
    """Problems of both files with their split, answers as plain numbers."""
    rows = [
        {"question": " How many?\n", "answer": "She has <<600*2=1200>>1,200.\n#### 1,200", "further": 1},
        {"question": "Half\u2028of 5?", "answer": "#### 2.50\n"},
    ]
    path = gsm8k_dir(tmp_path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert get_task("gsm8k").load(path) == [
        Problem("gsm8k/train/00000", "How many?", "She has <<600*2=1200>>1,200.\n#### 1,200", "1200", "train"),
        Problem("gsm8k/train/00001", "Half\u2028of 5?", "#### 2.50", "2.5", "train"),
        Problem("gsm8k/test/00000", "q", "#### 1", "1", "test"),
    ]


GOOD_ROW = '{"question": "q", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (GOOD_ROW + "{oops\n", r"train\.jsonl:2: not JSON"),
        (GOOD_ROW + "\n" + GOOD_ROW, r"train\.jsonl:2: not JSON"),
        ("", r"train\.jsonl is empty; check --data_dir"),
        (GOOD_ROW + '{"question": "q", "answer": ' + "1" * 5000 + "}\n", r"train\.jsonl:2: not JSON that"),
        (GOOD_ROW + "[" * 100_000 + "\n", r"train\.jsonl:2: not JSON that"),
        (GOOD_ROW.replace("\n", "\r\n") + "{}\r\n", r"train\.jsonl:2: field 'question'"),
        (GOOD_ROW + '{"question": "q"}\n', r"train\.jsonl:2: field 'answer'"),
        ('{"question": 3, "answer": "#### 1"}\n', r"train\.jsonl:1: field 'question'"),
        ("[1]\n", r"train\.jsonl:1: field 'question'"),
        (GOOD_ROW + '{"question": "q", "answer": "five"}\n', r"train row 2: field 'answer'"),
        ('{"question": "q", "answer": "#### 1 or 2"}\n', r"train row 1: field 'answer'"),
    ],
)
def test_gsm8k_errors(tmp_path, train, message):
    """Bad source files: file or split, line, field."""
    with pytest.raises(InputError, match=message):
        gsm8k(gsm8k_dir(tmp_path, train))


def test_gsm8k_missing_or_unreadable_file(tmp_path):
    """The message names the file and the flag."""
    with pytest.raises(InputError, match=r"train\.jsonl.*--data_dir"):
        gsm8k(str(tmp_path))
    (tmp_path / "a" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train\.jsonl.*--data_dir"):
        gsm8k(str(tmp_path / "a"))
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl"):
        gsm8k(str(tmp_path))


# ---- mbpp and apps --------------------------------------------------------------------------------------------------
MBPP_ROW = {"task_id": 601, "text": "Add two.", "code": "def add(a, b):\r\n\treturn a + b \r\n", "test_setup_code": "",
            "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "challenge_test_list": []}  # fmt: skip


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


@pytest.mark.usefixtures("confined")
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


MBPP = pathlib.Path(os.environ.get("CTS_MBPP", "data/mbpp/mbpp.jsonl"))  # the real file, where it is


@pytest.mark.usefixtures("confined")
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


# ---- the table ------------------------------------------------------------------------------------------------------
def test_unknown_task():
    """The flag, the name and the choices."""
    with pytest.raises(InputError, match=r"--task chess: unknown; .*fixtures_math.*gsm8k"):
        get_task("chess")


def test_step_credit_is_for_math():
    check_step_credit("fixtures_code", "rolled_up")
    check_step_credit("fixtures_math", "per_step")
    with pytest.raises(InputError, match="--process_credit per_step: works on math tasks, apps is code"):
        check_step_credit("apps", "per_step")
    check_step_credit("fixtures_math", "from_error")
    with pytest.raises(InputError, match="--process_credit from_error: works on math tasks, apps is code"):
        check_step_credit("apps", "from_error")
