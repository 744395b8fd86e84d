"""The tests of a program as data: which asserts can be judged, and how each is taken apart.

pytest tests/test_plans.py
"""

import json

import pytest

from common.basics import InputError
from common.plans import (
    bound_names,
    flaw_of_tests,
    joined,
    parse_program,
    plan_tests,
    split_assert,
    split_setup,
    used_names,
)
from common.programs import Verdict, run_program, run_programs
from common.sandbox_server import encode

KNOWN = {"abs", "set", "sum", "all", "range"}


# ---- by hand --------------------------------------------------------------------------------------------------------
def test_parse_program():
    """Python 3 or None, whatever the text does to the parser."""
    assert parse_program("x = 1").body[0].value.value == 1
    assert parse_program("\ufeffx = 1") is not None  # a byte-order mark, as a file may have
    assert parse_program("s = '\\d'") is not None  # an invalid escape is a warning, and not ours
    for text in ("print 'two'", "x = '\0'", "(" * 5000, "def f(:"):
        assert parse_program(text) is None, text[:20]


@pytest.mark.parametrize(
    ("tests", "flaw"),
    [
        ({"asserts": ["assert 1"]}, None),
        ({"inputs": ["1"], "outputs": ["2"]}, None),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, None),
        ([], "must be an object"),
        ({}, "needs asserts, or inputs and outputs"),
        ({"asserts": []}, "needs asserts, a list of one string or more, and setup, a string"),
        ({"asserts": ["assert 1"], "setup": None}, "needs asserts, a list of one string or more, and setup, a string"),
        ({"inputs": ["1"], "outputs": []}, "needs inputs and outputs, two lists of one length"),
        ({"inputs": [], "outputs": []}, "needs inputs and outputs, two lists of one length"),
        ({"inputs": ["1"], "outputs": [2]}, "needs inputs and outputs that are strings"),
        (
            {"fn_name": "f", "inputs": [1], "outputs": [2]},
            "needs fn_name, a string, and inputs that are lists of arguments",
        ),
    ],
)
def test_flaw_of_tests(tests, flaw):
    assert flaw_of_tests(tests) == flaw


def test_joined():
    """A list of lines is one text; a text stays as it is."""
    assert joined(["1 2", 3]) == "1 2\n3" and joined("1\n") == "1\n"


def test_names_of_a_piece_of_code():
    code = parse_program("import os.path as p, re.x\ndef f(a, *b):\n    c = [d for d in e]\nclass G(h): pass\ni += 1")
    assert bound_names(code) == {"p", "re", "f", "a", "b", "c", "d", "G", "i"}
    assert used_names(code) == {"d", "e", "h"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("assert f(2) == [4, (1,)]", (["f(2)"], [4, (1,)], None)),
        ("assert -3 == f(2)", (["f(2)"], -3, None)),
        ("assert f(2)", (["f(2)"], None, "_0")),
        ("assert f(2) is None", (["f(2)"], None, "_0 is None")),
        ("assert f(2)[0].x(1) == 3", (["f(2)[0].x(1)"], 3, None)),
        ("assert set(f([1])) == {1}", (["f([1])"], None, "set(_0) == {1}")),
        ("assert f(1) == g(2)", (["f(1)", "g(2)"], None, "_0 == _1")),
        ("assert sum(1, 2) == 3", (["sum(1, 2)"], 3, None)),  # the program's own: there is nothing else to call
    ],
)
def test_split_assert(text, expected):
    assert split_assert(text, KNOWN) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f(1)", "not one assert"),
        ("assert f(1); assert f(2)", "not one assert"),
        ("assert 1 == 1", "it calls nothing"),
        ("assert all(f(i) == i for i in range(3))", "a call inside a comprehension"),
    ],
)
def test_split_assert_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        split_assert(text, KNOWN)


def test_split_setup():
    """The import runs first, what builds on the program after it, and the program sees GIVEN, which a call reads, but
    not WANT, which the answer is compared with."""
    setup = "import math\nWANT = [4]\nGIVEN = 2\nroot = Node(GIVEN)"
    before, after, checks, known = split_setup(setup, ["assert f(root, GIVEN) == WANT"])
    assert (before, after) == ("import math\nGIVEN = 2", "root = Node(GIVEN)")
    assert checks == "import math\nWANT = [4]\nGIVEN = 2"
    assert {"WANT", "GIVEN", "math", "len"} <= known and "root" not in known


def test_plans_of_the_three_kinds():
    """What the program's process is told, and of each test (first frame, frames, expected value, check): no expected
    value is in the job."""
    plan = plan_tests(json.dumps({"asserts": ["assert f(1) == g(2)", "assert f(3) == 77"]}))
    assert plan.job == {"kind": "asserts", "before": "", "after": "", "tests": ["f(1)", "g(2)", "f(3)"]}
    assert plan.checks == [(0, 2, None, "_0 == _1"), (2, 1, 77, None)] and plan.owner == [0, 0, 1]
    plan = plan_tests(json.dumps({"inputs": [["1", "2"], "3"], "outputs": ["77", ["7", "8"]]}))
    assert plan.job == {"kind": "stdin", "tests": ["1\n2", "3"]}
    assert plan.checks == [(0, 1, "77", None), (1, 1, "7\n8", None)]
    plan = plan_tests(json.dumps({"fn_name": "f", "inputs": [[{"1": 2}, {"1": 2}]], "outputs": [77]}))
    assert plan.job == {"kind": "call", "fn_name": "f", "before": "", "tests": [[encode({1: 2}), encode({"1": 2})]]}
    assert plan.checks == [(0, 1, 77, None)]


def test_a_plan_that_cannot_be_judged_says_why():
    plan = plan_tests(json.dumps({"asserts": ["assert f(1) == 1", "assert 1 == 1"]}))
    assert plan.problem == "asserts: it calls nothing of the program" and not plan.job and len(plan.checks) == 2
    with pytest.raises(InputError, match="tests of a program: needs asserts, or inputs and outputs"):
        plan_tests("{}")


# ---- plans that are run ---------------------------------------------------------------------------------------------
ASSERTS = [  # set-up, assert, a program that passes, one that does not
    ("", "assert f(2) == [1, (2, 3)]", "return [1, (2, 3)]", "return [1, [2, 3]]"),
    ("", "assert f(2) == {1: 3, 2: 1}", "from collections import Counter; return Counter([1, 2, 1, 1])", "return 0"),
    ("", "assert f(2) == {(1, 2), (3, 4)}", "return {(3, 4), (1, 2)}", "return [(1, 2), (3, 4)]"),
    ("", "assert 4 == f(2)", "return 4", "return 5"),
    ("", "assert f(2) == 4.0", "return 4", "return 4.1"),
    ("", "assert f(2) == (-1, 2+3j)", "return (-1, 2 + 3j)", "return (-1, 2)"),
    ("", "assert f(2) == True", "return True", "return False"),
    ("", "assert f(2)", "return [0]", "return []"),
    ("", "assert not f(2)", "return []", "return [0]"),
    ("", "assert f(2) is None", "return None", "return 0"),
    ("", "assert f(2) != 5", "return 4", "return 5"),
    ("", "assert f(2) in (3, 4)", "return 4", "return 5"),
    ("", "assert 3 < f(2) <= 4", "return 4", "return 5"),
    ("import math", "assert math.isclose(f(2), 0.3, rel_tol=1e-6)", "return 0.1 + 0.2", "return 0.31"),
    ("", "assert math.isclose(f(2), 0.3)", "return 0.1 + 0.2", "return 'x'"),
    ("", "assert abs(f(2) - 0.3) < 1e-9", "return 0.1 + 0.2", "return None"),
    ("", "assert set(f(2)) == set([1, 2])", "return [2, 1, 1]", "return [3]"),
    ("", "assert sorted(f(2)) == [1, 2]", "return (2, 1)", "return [2, 1, 1]"),
    ("", "assert len(f(2)) == 2 and f(2)[0] == 1", "return [1, 2]", "return [2, 1]"),
    ("", "assert f(2)[1] == 7", "return [1, 7]", "return 7"),
    ("", "assert f(2).upper() == 'AB'", "return 'ab'", "return 'a'"),
    ("", "assert int(f(2)) == 3", "return 3.7", "return 4"),
    ("", "assert f(2) == sys.getsizeof(())", "import sys; return sys.getsizeof(())", "return 0"),
    ("", "assert f(f(2)) == 16", "return x * x", "return x"),
    ("", "assert f([y for y in range(3)]) == 3", "return len(x)", "return x"),
    ("", "assert f(lambda y: y + 1) == 3", "return x(2)", "return 0"),
    ("", "assert f(2) == 4, 'a message'", "return 4", "return 5"),
    ("class P:\n    def __init__(s, v): s.v = v", "assert f(P(4)) == 4", "return x.v", "return x"),
    ("p = f(2)\np.append(3)", "assert p == [2, 3]", "return [x]", "return [x, x]"),
    ("import math\ndef near(a, b): return math.isclose(a, b)", "assert near(f(2), .3)", "return .1 + .2", "return 1"),
]  # fmt: skip


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize("i", range(len(ASSERTS)))
def test_shapes_of_asserts(i):
    setup, text, right, wrong = ASSERTS[i]
    tests = {"setup": setup, "asserts": [text]}
    good, bad = run_programs([(f"def f(x):\n    {body}", tests) for body in (right, wrong)])
    assert good == Verdict("pass", 1, 1, "")
    assert bad.outcome in ("wrong", "crash") and bad.passed == 0 and bad.detail.startswith("test 0: ")


@pytest.mark.usefixtures("confined")
def test_a_function_named_as_a_builtin():
    tests = {"asserts": ["assert sum(10, 15) == 6"]}
    assert run_program("def sum(a, b):\n    return 6", tests).outcome == "pass"
    assert run_program("def total(a, b):\n    return 6", tests).outcome == "crash"


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize(
    "text",
    ["assert all(f(i) == i * i for i in range(3))", "x = f(1)", "assert 1 == 1", "assert f(", "assert g(1) == h"],
)
def test_what_cannot_be_judged_is_a_harness_error(text):
    verdict = run_program("def f(x): return x * x\ndef g(x): return 1", {"asserts": [text]})
    assert verdict.outcome in ("harness_error", "crash") and verdict.passed == 0
    assert verdict.outcome == "harness_error" or text.endswith("== h")


@pytest.mark.usefixtures("confined")
def test_a_check_names_what_it_lacks():
    verdict = run_program("def f(x): return 1", {"asserts": ["assert math.nothing(f(1))"]})
    assert verdict.outcome == "wrong"
    tests = {"setup": "import no_such_module", "asserts": ["assert abs(f(1)) == 1"]}
    assert run_program("def f(x): return 1", tests).outcome == "crash"


@pytest.mark.parametrize(
    "tests",
    [{}, {"asserts": []}, {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, {"asserts": [{1}]},
     {"fn_name": "f", "inputs": [1], "outputs": [1]}],
)  # fmt: skip
def test_tests_of_no_known_form_are_refused(tests):
    with pytest.raises(InputError):
        run_program("def f(x): return x", tests)
