"""The tests of a program as data: which asserts can be judged, and how each is taken apart.

pytest tests/test_plans.py
"""

import pytest

from common.basics import InputError
from common.programs import Verdict, run_program, run_programs

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
