"""Critiques by rules, their redaction, and another attempt in y0's place; for math and for programs.

pytest tests/test_critique.py
"""

import dataclasses
import re

import pytest
from examples import ATTEMPTS, REFERENCE, SOLUTION, WRONG, X, code_quad, fenced

from common.critique import (
    ORDINALS,
    check_critique,
    describe_call,
    redact,
    with_attempts,
    with_critique_of,
    write_critique,
)
from common.prompts import revise_prompt
from common.replay import Quadruple


# ---- math -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "critique"),
    [
        ("local arithmetic", "The second step is wrong: 48+24 is not 74."),
        ("missing case", "The second step is wrong: it leaves the way to the answer."),
        ("wrong decomposition", "The first step is wrong: it leaves the way to the answer."),
        ("wrong final only", "The fourth step is wrong: it leaves the way to the answer."),
    ],
)
def test_check_critique(kind, critique):
    """The sentence, and the span of exactly the step it names."""
    lines, wrong = ATTEMPTS[kind]
    y0 = "\n".join(lines)
    f, (start, end) = check_critique(y0, SOLUTION)
    assert f == critique
    assert y0[start:end] == lines[wrong]


def test_check_critique_of_right_work_and_of_leaks():
    """Nothing wrong: no span. A critique that would state the final answer is put without numbers."""
    assert check_critique(SOLUTION, SOLUTION) == ("No step is found wrong.", None)
    f, span = check_critique("<<57+2=58>>58\n#### 58", SOLUTION)
    assert (f, span) == ("The first step is wrong: its result is off.", [0, 13])


def test_redact_leaves_no_number_and_no_step():
    critiques = [write_critique(i, flaw) for i in range(14) for flaw in ("1,234.50 + 7/8 is not -3", "it is 5% off")]
    for f in [*critiques, "First, 3 x 4 is 12. The second and the Third step follow.", "12"]:
        out = redact(f)
        assert not re.search(r"\d", out)
        assert not re.search(rf"\b({'|'.join(ORDINALS)})\b", out, re.IGNORECASE), out
        assert out != f and redact(out) == out
    assert redact("The step leaves out the rent.") == "The step leaves out the rent."
    assert len({redact(write_critique(i, "it is off")) for i in range(14)}) == 1  # the step is not told apart


PENS_RIGHT = "Buys <<2+3=5>>5 pens.\nGives <<5-1=4>>4 away.\n#### 4"
PENS_WRONG = "Buys <<2+3=6>>6 pens.\nGives <<6-1=5>>5 away.\n#### 5"
PENS_META = {"domain": "math", "answer": "4", "error_span": [0, 3], "y0_correct": True, "k": 1}
PENS = Quadruple("How many pens?", "old", "old f", PENS_RIGHT, PENS_META)


def with_attempt(q, y0, fits):
    return with_attempts([q], [y0], fits)[0]


def test_with_attempt():
    """Only y0, f, and what follows from them change; the span is that of the wrong line."""
    before = dataclasses.asdict(PENS)
    out = with_attempt(PENS, PENS_WRONG, lambda prompt: True)
    assert (out.x, out.y0, out.y1) == (PENS.x, PENS_WRONG, PENS_RIGHT)
    assert out.f == "The first step is wrong: 2+3 is not 6."
    assert out.meta == {**PENS_META, "error_span": [0, PENS_WRONG.index("\n")], "y0_correct": False}
    right = with_attempt(PENS, PENS_RIGHT, lambda prompt: True)
    assert right.f == "No step is found wrong." and right.meta["y0_correct"] and right.meta["error_span"] is None
    assert dataclasses.asdict(PENS) == before


def test_with_attempt_cuts_what_does_not_fit():
    limit = len(revise_prompt(PENS.x, PENS_WRONG, "The first step is wrong: 2+3 is not 6.")) - 10
    out = with_attempt(PENS, PENS_WRONG, lambda prompt: len(prompt) <= limit)
    assert 0 < len(out.y0) < len(PENS_WRONG) and PENS_WRONG.startswith(out.y0)
    assert len(revise_prompt(out.x, out.y0, out.f)) <= limit
    assert out.f == "The first step is wrong: 2+3 is not 6." and out.meta["error_span"] == [0, PENS_WRONG.index("\n")]


def test_with_attempt_ends_where_nothing_fits():
    """With no room even for an empty attempt it must not cut for ever."""
    calls = []

    def fits(prompt):
        calls.append(prompt)
        if len(calls) > 1000:
            pytest.fail("cuts for ever")
        return False

    assert with_attempt(PENS, PENS_WRONG, fits) == PENS


# ---- programs -------------------------------------------------------------------------------------------------------
def test_with_attempts_criticises_by_the_failing_test(broken_harness):
    """A slip, the right program, another way, a crash, a harness error: one batch for all."""
    other = "def calc(x, y):\n    total = x\n    for _ in range(4):\n        total += 1\n    return total"
    crash = REFERENCE.replace("r > 10", "q > 10")
    tries = [fenced(WRONG), REFERENCE, other, crash, "broken"]
    slip, right, way, stops, kept = with_attempts([code_quad()] * 5, tries, lambda prompt: True)
    assert (slip.y0, slip.meta["y0_correct"]) == (fenced(WRONG), False)
    assert slip.y0[slice(*slip.meta["error_span"])] == "r = r + b"
    assert slip.f == "Line 6 is wrong: it leaves the way to the result. calc(9, 2) fails."
    assert (right.f, right.meta["error_span"], right.meta["y0_correct"]) == ("No line is found wrong.", None, True)
    assert (way.f, way.meta["error_span"]) == ("calc(1, 2) fails: the result is wrong.", None)
    assert stops.f == "Line 3 is wrong: it stops with an error. calc(1, 2) fails."
    assert stops.y0[slice(*stops.meta["error_span"])] == "if q > 10:"
    assert kept == code_quad()


@pytest.mark.usefixtures("confined")
def test_with_attempts_cuts_what_does_not_fit():
    limit = len(revise_prompt(X, "", "")) + 170
    (q,) = with_attempts([code_quad()], [WRONG], lambda prompt: len(prompt) <= limit)
    assert WRONG.startswith(q.y0) and len(q.y0) < len(WRONG) and not q.meta["y0_correct"]
    assert len(revise_prompt(q.x, q.y0, q.f)) <= limit


@pytest.mark.usefixtures("confined")
def test_with_attempts_whose_call_is_too_long_for_the_prompt():
    """The critique without the call; and where that is too long too, the quadruple as it was."""
    plain = "Line 4 is wrong: it leaves the way to the result. A test fails."
    whole = len(revise_prompt(X, "", WRONG))
    for limit, f in ((whole + len(plain), plain), (whole + 3, code_quad().f)):
        (q,) = with_attempts([code_quad()], [WRONG], lambda prompt, n=limit: len(prompt) <= n or "7" * 66 in prompt)
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


def test_another_critique_points_at_the_step_of_its_own_number():
    """The second step of three, wherever it stands in y0; nowhere in an attempt of one step, or where it names none."""

    def quad(y0, f, span):
        return Quadruple("x", y0, f, "y1", {"error_span": span, "task_id": y0, "domain": "math"})

    other = quad("<<1+1=2>>2\n<<2+2=5>>5\n#### 5", "The second step is wrong.", [11, 21])
    long, short = quad("So <<10+10=20>>20\nand <<20+2=22>>22\n#### 22", "f", [0, 17]), quad("#### 22", "f", [0, 7])
    taken = with_critique_of(long, other)
    assert taken.f == other.f and taken.y0 == long.y0 and long.meta["error_span"] == [0, 17]
    start, end = taken.meta["error_span"]
    assert long.y0[start:end] == "and <<20+2=22>>22"
    assert with_critique_of(short, other).meta["error_span"] is None
    assert with_critique_of(long, quad(other.y0, "Something is wrong.", None)).meta["error_span"] is None
