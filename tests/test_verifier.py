"""The step checker against values worked out by hand.

pytest tests/test_verifier.py
"""

from fractions import Fraction

import pytest
from examples import ATTEMPTS, FINAL, FIRST, SECOND, SOLUTION, THIRD

from common.answers import score_math
from common.critique import check_critique
from common.verifier import (
    equation_holds,
    evaluate_arithmetic,
    first_wrong_step,
    grade_math,
    numbers_in,
    show,
    split_steps,
    uptake,
)


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        ("2+3", 5),
        ("2-3", -1),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("20-5-3", 12),
        ("24/4/2", 3),
        ("10/4", Fraction(5, 2)),
        ("-2*-3", 6),
        ("--3", 3),
        ("2 x 3 \u00d7 4 \u00f7 8", 3),
        ("\u22124+1", -3),
        ("$1,200-$350", 850),
        (".5*4", 2),
        ("0.1+0.2", Fraction(3, 10)),
        ("50%*8", 4),
        ("200*(100-15)%", None),
        ("1/0", None),
        ("1/(2-2)", None),
        ("", None),
        ("+", None),
        ("2+", None),
        ("2 3", None),
        ("(2+3", None),
        ("2+3)", None),
        ("()", None),
        ("2(3)", None),
        ("9**9", None),
        ("9^9", None),
        ("9x*9", None),
        ("9*x9", None),
        ("9//3", None),
        ("1e9", None),
        ("abs(1)", None),
        ("(" * 30 + "1" + ")" * 30, None),
        ("-" * 150 + "1", 1),
        ("1+" * 150 + "1", None),  # longer than 200 characters
    ],
)
def test_evaluate_arithmetic(expr, value):
    """Values by hand; None for everything that is not plain arithmetic."""
    assert evaluate_arithmetic(expr) == value


def test_split_steps():
    """Non-empty lines with their spans; annotations are preferred to plain equations; the final line has its number."""
    y = "He has 48 / 2 = 24 pens.\n\n  \n5 x 3 = 15, then 1+1 = <<15+1=16>>16.\nNothing here.\n\\boxed{16}"
    steps = split_steps(y)
    assert [y[s.start : s.end] for s in steps] == [line for line in y.split("\n") if line.strip()]
    assert [s.equations for s in steps] == [(("48 / 2", 24),), (("15+1", 16),), (), (("", 16),)]
    assert [s.is_final for s in steps] == [False, False, False, True]
    assert split_steps("") == () == split_steps(" \n\n ")


@pytest.mark.parametrize(
    ("line", "equations"),
    [
        ("5 x 3 = 15 and 15 + 1 = 16.", [("5 x 3", 15), ("15 + 1", 16)]),
        ("$1,200 - $350 = $850", [("$1,200 - $350", 850)]),
        ("1 / 3 = 2/6", [("1 / 3", Fraction(1, 3))]),
        ("The total is 24.", []),
        ("2 + 3 = 5 + 1 = 6", [("5 + 1", 6)]),  # of a chain, what stands before the last sign
        ("(2 + 3) * 4 + 1 = 21", []),  # a piece of a longer expression is no equation: it would be false
        ("5 apples * 2 + 1 = 11", []),
        ("x + 3 * $1,200 + 1 = 3602", []),
        ("x = 5", []),
        ("2 + 3 = 5%", []),
        ("<<2+3=5>>5 and <<5*2=10>>10", [("2+3", 5), ("5*2", 10)]),
        ("<<2+3=five>>", []),
        ("<<2+3=5 or 6>>", []),
        ("<<10/50=20%>>20%", [("10/50", Fraction(1, 5))]),
        ("<<10/50*100=20%>>20%", [("10/50*100", 20)]),
        ("<<5/2=2 1/2>>", [("5/2", Fraction(5, 2))]),
        ("<<5/2=2\u00bd>>", [("5/2", Fraction(5, 2))]),
        ("<<3*500=$1,500.00>>", [("3*500", 1500)]),
        ("<<5*1000=5k>>", [("5*1000", 5000)]),
        ("<<2+3=5 million>>", [("2+3", 5)]),
        ("<<2*1000000=2 million>>", [("2*1000000", 2_000_000)]),
        ("<<3-5=minus 2>>", [("3-5", -2)]),
        ("<<1/3=\\frac13>>", [("1/3", Fraction(1, 3))]),
        ("5 / 2 = 2 1/2 cups", [("5 / 2", Fraction(5, 2))]),
        ("2000 * 1000 = 2 million.", [("2000 * 1000", 2_000_000)]),
        ("10 * 100 = 10^3", []),  # a piece of what is stated
        ("10 * 100 = 1e3", []),
        ("10 * 100 = 10\u00b3", []),
        ("5 / 2 = 2\u00bd", []),
        ("2 * 12 = 2 dozen", []),
        ("10 / 50 = 20 percent", []),
        ("2 + 3 = 5\u20136", []),
        ("3 * 500 = 1'500", []),
    ],
)
def test_equations_of_a_line(line, equations):
    """Which equations a line is read to state."""
    (step,) = split_steps(line)
    assert list(step.equations) == equations


@pytest.mark.parametrize(
    ("expr", "value", "holds"),
    [
        ("2+3", "5", True),
        ("2+3", "6", False),
        ("10/3", "3.33", True),
        ("10/3", "3.3", True),
        ("2/3", "0.67", True),
        ("2/3", "0.66", True),
        ("10/3", "3", False),
        ("7/2", "4", False),
        ("10/3", "3.4", False),
        ("10/3", "3.36", False),
        ("-10/3", "-3.33", True),
        ("-10/3", "3.33", False),
        ("2/6", "1/3", True),
        ("2/6", "1/4", False),
        ("1.5*3", "4.5", True),
        ("1.5*3", "4.6", False),
        ("0.125*3", "0.38", True),
        ("0.125*3", "0.36", False),
    ],
)
def test_equation_holds(expr, value, holds):
    """Exact, or rounded or cut at the last decimal stated; whole numbers are never rounded."""
    assert equation_holds(expr, numbers_in(value)[0]) is holds


def test_rounding_knows_trailing_zeros():
    """2.60 states hundredths, so it is not 2.55 rounded."""
    lines = ("It costs <<1.25+1.30=2.60>>2.60.", "Less a coupon: <<2.60-0.05=2.55>>2.55.", "#### 2.55")
    reference = "It costs <<1.25+1.30=2.55>>2.55.\n#### 2.55"
    assert first_wrong_step("\n".join(lines), reference) == 0


@pytest.mark.parametrize(("lines", "wrong"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_first_wrong_step(lines, wrong):
    """Each kind of error is found at its place; right work is not accused."""
    assert first_wrong_step("\n".join(lines), SOLUTION) == wrong


def process_score(y: str, reference: str) -> float:
    return grade_math(y, "57", reference).process


@pytest.mark.parametrize(
    ("lines", "score"),
    [
        ((FIRST, SECOND, THIRD, FINAL), 1),
        ((FIRST, SECOND, THIRD, "#### 58"), 3 / 4),
        ((FIRST, SECOND, "<<72-15=58>>58", "#### 58"), 2 / 4),
        ((FIRST, "<<48+24=74>>74", "<<74-15=59>>59", "#### 59"), 1 / 4),
        (("<<48/2=26>>26", SECOND, THIRD, "#### 60"), 0),  # what is right after the first slip does not count
        ((FIRST,), 1 / 4),  # stopping early
        ((FIRST, SECOND), 2 / 4),
        ((FINAL,), 1 / 4),
        ((FIRST, "<<1+1=2>>2", "<<2+2=4>>4", "<<4+4=8>>8"), 1 / 4),  # true trivia
        (("<<1+1=2>>2",) * 8, 0),
        ((FIRST, "<<1+1=3>>3") + ("<<1+1=2>>2",) * 8, 1 / 10),
        ((), 0),
    ],
)
def test_process_score(lines, score):
    """The share of steps that hold before the first that does not, by hand."""
    assert process_score("\n".join(lines), SOLUTION) == pytest.approx(score)


@pytest.mark.parametrize("filler", ["Let me think.", "I add 1 and 1.", "2 is 2"])
def test_prose_does_not_pay(filler):
    """Lines in which nothing can be checked earn nothing, neither alone nor before wrong work."""
    wrong = [FIRST, "He has <<48+24=74>>74.", "#### 74"]
    assert process_score("\n".join([filler] * 4), SOLUTION) == 0
    bare, padded = (
        process_score("\n".join(wrong), SOLUTION),
        process_score("\n".join([filler] * 20 + wrong), SOLUTION),
    )
    assert padded <= bare == pytest.approx(1 / 4)


def test_a_right_solution_in_other_forms_has_no_wrong_step():
    for line in ("<<10/50=20%>>20%", "<<5/2=2 1/2>>2 1/2", "5000 * 1000 = 5 million", "<<2+3=5 million>>5 million"):
        for final in ("#### 57", "####\n57", "<answer>\n57\n</answer>", "Thus \\boxed{57}"):
            assert first_wrong_step(f"{line}\n{final}", SOLUTION) is None, line
    assert first_wrong_step(f"{FIRST}\n#### 57 or so", SOLUTION) == 1  # an answer that is not read


def test_the_line_of_the_answer():
    """Wherever its marker stands; what a thinking block answers is no final line, its equations are steps."""
    y = "<think><<1+1=2>>2\n#### 2</think>\n#### Step 1\n<<2+3=5>>5\n####\n$5\n"
    steps = split_steps(y)
    assert [(y[s.start : s.end], s.equations) for s in steps if s.is_final] == [("$5", (("", 5),))]
    assert [s.equations for s in steps if s.equations and not s.is_final] == [(("1+1", 2),), (("2+3", 5),)]
    (unread,) = split_steps("#### 5 * 3 = 16")
    assert unread.is_final and unread.equations == ()


def test_hedging_in_one_line_is_not_a_held_step():
    """What the outcome score refuses, the process score does not pay in full."""
    hedge = "\n".join([FIRST, SECOND, THIRD, "#### 58 or 57"])
    assert score_math(hedge, "57") == 0
    assert process_score(hedge, SOLUTION) == pytest.approx(3 / 4)


def test_show_is_read_back():
    """`show` writes what `numbers_in` reads."""
    values = [Fraction(n, d) for n in (-7, -1, 0, 3, 100, 12345) for d in (1, 2, 3, 7, 8, 125, 4096)]
    assert [numbers_in(show(v)) for v in values] == [[v] for v in values]


HOSTILE = {
    "digits": "1" * 10_000,
    "digits and spaces": "1 " * 5_000,
    "comma groups": "1" + ",111" * 2_500,
    "comma groups, no end": "#### 1" + ",111" * 2_500 + "e5",
    "points": "1." * 5_000,
    "slashes": "1/" * 5_000,
    "minus": "-" * 10_000,
    "dollars": "$ " * 5_000,
    "equals": "=" * 10_000,
    "chain": "1=" * 5_000,
    "sums": "1+" * 5_000,
    "sums and equals": "1+1=" * 2_500,
    "open annotations": "<<" * 5_000,
    "half annotations": "<<1=" * 2_500,
    "brackets": "<<" + "(" * 199 + "=1>>",
    "markers": "####" * 2_500,
    "spaced markers": "#### " * 2_000,
    "marker and spaces": "#### " + " " * 10_000,
    "boxes": "\\boxed{" * 1_500,
    "box and spaces": "\\boxed" + " " * 10_000,
    "fractions": "\\frac{" * 1_500,
    "texts": "\\text{" * 1_500,
    "answers": "<answer>" * 1_200,
    "lines": "<<1+1=2>>\n" * 1_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_scored_in_reasonable_time(text):
    """Ten thousand characters made to trip the patterns come back with a score (a bad pattern would take for ever)."""
    assert score_math(text, "57") == 0
    assert 0 <= process_score(text, SOLUTION) < 1
    assert isinstance(check_critique(text, SOLUTION)[0], str)


# ---- uptake ---------------------------------------------------------------------------------------------------------
Y1 = "Ben has <<13*2=26>>26.\nAnn has <<26+4=30>>30.\nBoth have <<30+26=56>>56.\n#### 56"
Y0 = "Ben has <<13*2=26>>26.\nAnn has <<26+4=31>>31.\nBoth have <<31+26=57>>57.\n#### 57"
SPAN = (Y0.index("Ann"), Y0.index("Both") - 1)
DROPPED = "Ben has <<13*2=26>>26.\nBoth have <<26+26=52>>52.\n#### 52"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (Y1, 1.0),  # repaired
        (Y1.replace("Ann has", "So Ann then has"), 1.0),  # in other words
        (Y1.replace("56", "99"), 1.0),  # repaired there, wrong later
        ("\n".join(Y1.split("\n")[:2]), 1.0),  # repaired, then cut off
        (Y0, 0.0),  # untouched
        (Y0.replace("Ann has", "So Ann then has"), 0.0),  # other words around the same slip
        (Y0.replace("31", "32").replace("57", "58"), 0.0),  # changed, still wrong arithmetic
        (Y0.replace("26+4=31>>31", "26-4=22>>22").replace("31+26=57>>57", "22+26=48>>48"), 0.0),  # holds, off the way
        ("Ann has <<26+4=31>>31.\n" + Y1, 0.0),  # the slip moved to the front, beside its repair
        (Y1.replace("\n####", "\nAnn has <<26+4=31>>31.\n####"), 0.0),  # moved to the end
        (Y1.replace("13*2=26", "13*2=27"), 0.0),  # repaired, and another step before it broken
        (Y0.replace("Ann has <<26+4=31>>31.\n", ""), 0.0),  # gone, and what follows in its place is wrong
        ("Ben has <<13*2=26>>26.\n#### 56", 0.0),  # gone, and nothing in its place but the answer
        ("#### 56", 0.0),
        ("Ben has <<13*2=26>>26.", 0.0),  # cut off before the place
        ("", 0.0),
        ("Nothing is wrong here.", 0.0),
    ],
)  # fmt: skip
def test_uptake_of_a_wrong_step(completion, expected):
    assert uptake(completion, Y0, SPAN, Y1) == expected


def test_uptake_of_a_missing_step():
    """The flagged step follows the gap; putting the missing step before it changes it too."""
    span = (DROPPED.index("Both"), DROPPED.rindex("\n"))
    assert uptake(Y1, DROPPED, span, Y1) == 1.0
    assert uptake(DROPPED, DROPPED, span, Y1) == 0.0
    assert uptake(DROPPED.replace("26+26=52>>52", "26+25=51>>51"), DROPPED, span, Y1) == 0.0


def test_uptake_of_a_wrong_final_line():
    y0 = Y1.replace("#### 56", "#### 65")
    span = (y0.index("####"), len(y0))
    assert uptake(Y1, y0, span, Y1) == 1.0
    assert uptake(Y1.replace("#### 56", "#### 57"), y0, span, Y1) == 0.0


def test_uptake_needs_a_place():
    assert uptake(Y1, Y0, None, Y1) == 0.0
