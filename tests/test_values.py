"""The grammar of a value against values known by hand, against fields made from their values, and beside math-verify.

pytest tests/test_values.py
"""

import json
import math
import pathlib
import re
import runpy
from fractions import Fraction

import pytest

from common.values import read_value, value_of

GOLDEN = pathlib.Path(__file__).parent / "golden"

# What a field states.
READ = {
    "20% = 0.2": Fraction(1, 5), "\\therefore x = 18": 18, "\u2022 18": 18, "only 18": 18, "18^{th}": 18,
    "5 million": 5000000, "$5k": 5000, "10³": 1000, "10^{3}": 1000, "1.5 x 10^3": 1500, "3e-3": Fraction(3, 1000),
    "2½": Fraction(5, 2), "2\\frac{1}{2}": Fraction(5, 2), "3\\frac12": Fraction(7, 2), "9 + 9": 18,
    "\u201318": -18, "-€18": -18, "-(18)": -18, "minus 18": -18, "2 1/2": Fraction(5, 2), "\\text{18}": 18,
    "{18}": 18, "\\mathbf{18}": 18, "18\\text{ cm}^2": 18, "90^\\circ": 90, "\\frac12": Fraction(1, 2),
    "\\frac{1}{-2}": Fraction(-1, 2), "5 * 3 = 15": 15, "½": Fraction(1, 2), "1\u20442": Fraction(1, 2),
    "5 000": 5000, "5\u00a0000": 5000, "5\u202f000": 5000, "5\u2009000": 5000, "-£18": -18, "_18_": 18,
    "$-18": -18, "18 eggs per 1 day": 18, "18 USD": 18, "USD 18": 18, "1.234,56": Fraction(30864, 25),
    "1'000": 1000, "1\u2019000": 1000, "1_000": 1000, "\\dfrac{1}{2}": Fraction(1, 2),
    "\\tfrac{1}{2}": Fraction(1, 2), "\\left( 18 \\right)": 18, "\\mathrm{18}": 18, "\\$18": 18, "18\\%": 18,
    "x = 18": 18, "the answer is 18": 18, "18²": 324, "18^2": 324, "18\\,\\text{dollars}": 18, "**18**": 18,
    "`18`": 18, "(18)": 18, "[18]": 18, "18.": 18, "18,": 18, "\u221218": -18, "- 18": -18, "+18": 18,
    "$1,234.50": Fraction(2469, 2), "1 234 567": 1234567, "1.234.567": 1234567, "1,234": 1234,
    "12,34,567": 1234567, "18 - 2": 16, "20-2": 18, "2 million + 3 million": 5000000, "50% * 8": 4,
    "10/50 = 20%": 20, "10/50*100 = 20%": 20, "3 boxes x 6 eggs/box = 18 eggs": 18, "5 * $3 = $15": 15,
    "5 × 3 = 15 apples": 15, "18 = 9+9": 18, "Total = 9 + 9 = 18": 18, "The answer is: $18": 18,
    "Total cost: $18": 18, "Answer: **18**": 18, "**Answer:** 18": 18, "Janet makes $18 every day": 18,
    "The number of eggs is 18.": 18, "18%": 18, "18 percent": 18, "18 %": 18, "18 km/h": 18, "18 m/s^2": 18,
    "18 cm²": 18, "18 m2": 18, "18m": 18, "$18m": 18000000, "$5 million": 5000000, "$5M": 5000000,
    "$5bn": 5000000000, "5 and 1/2": Fraction(11, 2), "18 square feet": 18, "18 meters squared": 18,
    "18 more apples": 18, "5 times": 5, "5 times 3": 15, "5 times as many": 5, "$x = 18$": 18, "$18$": 18,
    "$$18$$": 18, "\\(18\\)": 18, "\\[18\\]": 18, "$\\frac{1}{2}$": Fraction(1, 2), "18€": 18, "18 €": 18,
    "€18": 18, "₹18": 18, "Rs. 18": 18, "US$18": 18, "A$18": 18, "18 (eggs)": 18, "(18 eggs)": 18,
    "¹\u2044₂": Fraction(1, 2), "2¹\u2044₂": Fraction(5, 2), "１８": 18, "٣": 3, "10⁻³": Fraction(1, 1000),
    "1.5 × 10^{3}": 1500, "1.5 \\times 10^{3}": 1500, "1.5x10^3": 1500, "3 x 4": 12, "3×4": 12, "18th": 18,
    "18°C": 18, "18 °": 18, '"18"': 18, "$2,500.00/month": 2500, "18-inch": 18, "007": 7, "9" * 30: int("9" * 30),
    "2^100": 2**100, "<b>18</b>": 18, "= 18": 18, "\\frac{\\frac{1}{2}}{3}": Fraction(1, 6), "\\frac{9+9}{2}": 9,
    "-\\frac{1}{2}": Fraction(-1, 2), "5k": 5000, "5K": 5000, "5kg": 5, "5 kg": 5, "5km": 5,
    "18 apples and oranges": 18, "18. That is it": 18, "5 a day": 5, "18 cafés": 18, "negative 18": -18,
    "x is 18": 18, "5 hundred": 500, "18 for each one": 18, "$18 per hour": 18, "18/day": 18, "\\boxed{18}": 18,
    "\\textbf{Answer: } 18": 18, "So the total is 18 dollars.": 18, "18;": 18, "-2 1/2": Fraction(-5, 2),
    "$2 1/2 million": 2500000, "5-million": 5000000, "5million": 5000000, "16 - 3 - 4 = 9": 9, "16 - 3 - 4": 9,
    "(9+9)*2": 36, "((18))": 18, "18 / 2 / 3": 3, "24/7": Fraction(24, 7), ".5": Fraction(1, 2), "5.": 5,
    "-.5": Fraction(-1, 2), "- $18": -18, "$ 18": 18, "-18 USD": -18, "USD -18": -18,
}  # fmt: skip
# What is not understood whole, or may be meant in more than one way.
NOT_READ = [
    "1<br>8", "18<|im_end|>19", "<p>5</p><p>000</p>", "17<answer>18",
    "±5", "not 5", "> 5", "2\\pi", "2\\sqrt{2}", "3x", "\\frac{x}{2}", "5 hours 5 minutes", "10:10", "0x12",
    "0.333...", "5 * 3 = 16", "3:4", "3-5", "3 or 4", "about 18", "approximately 18", "18 +/- 1", "18!",
    "sqrt(16)", "pi", "3e", "3 + 4i", "0b101", "0.(3)", "0.\\overline{3}", "$18 and 50 cents", "5 feet 3 inches",
    "18 or 19", "--18", "1,5", "1,2,3", "(3, 5)", "1, 234", "0,5", "3 - 5", "18\u201320", "2-1/2", "12/25/2024",
    "2024-01-05", "01/05", "2024-10-12", "1/2 million", "2 + 3 million", "10 + 5%", "1 hour = 60 minutes",
    "Answer - 18", "Answer-18", "The answer is not 18", "Not 18", "The answer isn't 18", "Wrong answer: 18",
    "at least 18", "18 or more", "18+", "18?", "18 x2", "5M", "$-5m", "5m dollars", "5 dozen", "5 and a half",
    "half of 5", "5 squared", "5 factorial", "2x = 18", "-x = 18", "x^2 = 18", "2x = 2", "18$50", "5$000",
    "18 (eighteen)", "18 [1]", "18 (step 3)", "2 3/2", "1/2 1/2", "3x4", "99**98**97", "2**3", "*18*2",
    "18 eggs or so", "18 to 20", "18 ≈ 18.2", "≈18", "~18", "\\approx 18", "\\pm 18", "5'3\"", "18...", "18\u2026",
    "18..", "18 - eggs", "1,000,00", "", "eggs", "9" * 31, "9^9^9", "2^9999", "0^0", "1/0", "5/0", "0/0", "2(3)",
    "(2)(3)", "2 3", "18 18", "5 0000", "5 100/200", "10<sup>3</sup>", "<s>18</s>", "18 eggs = 1.5 dozen", "18 =",
    "2\\frac{3}{2}", "5 k", "18% of 50", "18e", "5pm", "5 pm", "5a", "5 a", "2π", "∞", "5 hundred and twenty",
    "twenty", "5 thousandths", "2 thirds", "3 quarters", "|\u221218|", "18 every 2 weeks", "18 per 100",
    "18 \\text{ and } 19", "Step 1", "18:", "1.2.3", "1.2,3", "5\n000", "16-3-4", "((18)", "18)",
]  # fmt: skip


def number(text):
    value = read_value(text)
    return value and value.number


@pytest.mark.parametrize(("text", "value"), READ.items(), ids=map(repr, READ))
def test_what_a_text_states(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", NOT_READ, ids=map(repr, NOT_READ))
def test_what_is_not_read(text):
    assert read_value(text) is None


@pytest.mark.parametrize("text", READ, ids=map(repr, READ))
def test_a_value_with_more_beside_it_is_not_read(text):
    """Whatever form a value has: denied, one of two, bounded, a piece of a sum that is cut off."""
    for more in ("not {}", "{} or 77", "77 or {}", "more than {}", "{} +", "{} 77", "{}, 77", "{} and a half", "{}?"):
        if (text, more) == ("5 times", "{} 77"):  # a product
            continue
        assert read_value(more.format(text)) is None, more.format(text)


def test_two_readings():
    """What an equation may confirm beside the number itself."""
    assert read_value("20%") == (20, Fraction(1, 5)) == read_value("20 percent") == read_value("20\\%")
    assert read_value("5 million") == (5_000_000, 5)
    assert read_value("2 + 3 = 5 million") == (5_000_000, 5)
    assert read_value("20") == (20, None)


def test_value_of_knows_arithmetic_alone():
    numbers = [Fraction(2), Fraction(3)]
    assert value_of("n0 **n1 ", numbers) == 8 and value_of("-n0 /_(n1 )", numbers) == Fraction(-2, 3)
    for text in ("n0 //n1 ", "n0 %n1 ", "n2 ", "n0 n1", "f()", "_()", "n0 .x", "[n0]", "n0 if n1 else n0", "1", ""):
        assert value_of(text, numbers) is None


def test_the_size_of_powers_is_bounded():
    assert number("10^30") == 10**30 and number("2^-3") == Fraction(1, 8)
    for text in ("9^9^9", "10^9999", "99999999999999999999^64", "2^(1/2)", "0^-1", "1e999"):
        assert read_value(text) is None


# ---- fields made from their values ----------------------------------------------------------------------------------
ROWS = [tuple(row) for row in json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))]


def exact(text):
    return None if text is None else Fraction(text)


def test_every_made_field_states_what_it_was_made_from():
    """More than 2,000 fields of 65 forms; what they state was known before any reader saw them."""
    made = runpy.run_path(str(GOLDEN / "make_answers.py"))["fields"]()
    assert made == [(form, field, exact(value)) for form, field, value, _ in ROWS]
    assert len({field for _, field, _ in made}) == len(made) > 2000 and len({form for form, _, _ in made}) == 65
    assert [(field, number(field)) for _, field, _ in made] == [(field, value) for _, field, value in made]


def pieces(field: str) -> list[Fraction]:
    """The decimals and whole numbers in a text, whatever stands around them."""
    return [
        Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?|\.\d+", field, re.ASCII) + re.findall(r"\d+", field, re.ASCII)
    ]


def side_by_side(field: str, other: Fraction) -> bool:
    """Numbers with nothing but a space between them, added: "680 215" is 895, "16 5/6" is 21/6."""
    plain = field.replace("\\,", " ").replace("\u202f", " ").replace("\u00a0", " ")
    first, *more = [Fraction(n) for n in re.findall(r"\d+", plain.partition("/")[0])]
    under = Fraction(plain.partition("/")[2] or 1)
    return other in (sum(more, first) / under, first + sum(more) / under)


def of_dates(field: str) -> list[Fraction]:
    a, b, c = (Fraction(int(n)) for n in re.findall(r"\d+", field))
    return [a / b / c, a - b - c, Fraction(f"{a}.{b}") * Fraction(f".{c}"), Fraction(f"{a}.{b}") * c]


# Where math-verify 0.9.0 reads another value than the field states, each time one of these is why.
REASONS = {
    "it takes a number out of what says more: the last or first of several, one that is denied, bounded or "
    "multiplied, one beside a letter or an unknown sign": lambda form, field, value, other: abs(other) in pieces(field),
    "of 5.5 x 10^3 it takes what stands behind the x": lambda form, field, value, other: (
        form == "times a power of ten" and " x " in field and other == 10 ** int(field[-1])
    ),
    "20% is 20/100 to it, and compares equal to 20 too": lambda form, field, value, other: (
        form.startswith("percent") and other * 100 == value
    ),
    "it adds what stands side by side": lambda form, field, value, other: (
        form in ("thousands, space", "thousands, other", "mixed", "improper mixed", "two values")
        and side_by_side(field, other)
    ),
    "a ratio or a time is a division to it": lambda form, field, value, other: (
        form == "ratio or time" and other == Fraction(*map(int, field.split(":")))
    ),
    "a range is a difference to it": lambda form, field, value, other: (
        form == "range" and other == pieces(field)[0] - pieces(field)[1]
    ),
    "a date is arithmetic to it": lambda form, field, value, other: form == "date" and other in of_dates(field),
    "a comma before one digit is a decimal point to it; here it may also part two values": (
        lambda form, field, value, other: form == "comma decimal" and other == Fraction(field.replace(",", "."))
    ),
    "18! is a factorial to it; here it may also be joy": lambda form, field, value, other: (
        field.endswith("!") and other == math.factorial(int(field[:-1]))
    ),
}
# And where it reads nothing although a value stands there.
READS_NOTHING = ["sign", "money and sign", "one character", "emphasis", "wrapped", "brackets around"]


def test_every_difference_to_math_verify_has_its_reason():
    """And every reason has its differences."""
    rows = [(form, field, exact(value), exact(other)) for form, field, value, other in ROWS]
    differ = [row for row in rows if row[2] != row[3] and row[3] is not None]
    reasons = {row: [why for why, holds in REASONS.items() if holds(*row)] for row in differ}
    assert [row for row in differ if not reasons[row]] == []
    assert {why for found in reasons.values() for why in found} == set(REASONS)
    nothing = {form: None for form, _, value, other in rows if other is None is not value}
    assert sorted(nothing) == sorted(READS_NOTHING)


# ---- hostile text ---------------------------------------------------------------------------------------------------
UNITS = ["1", "1 ", ",111", "1.", "1/", "-", "$ ", "=", "1=", "1+1=", "{", "}", "\\frac{", "\\frac{1}{", "\\text{",
         "a ", "the ", "x = ", "* ", "1_", "(", "1(", "(1)", "1^", "^{", "½", "minus ", "5 million ", "per 1 ", "a-",
         "not ", "1 apples ", "\\", "~", "–", "%", "e5", "'", "answer is ", "1 x "]  # fmt: skip


def test_hostile_fields_end_soon():
    """300 characters is the longest field that is read at all."""
    for unit in UNITS:
        for lead in ("", "1 ", "the answer is ", "("):
            assert number((lead + unit * 300)[:300]) in (None, 0, 1), (lead, unit)  # "1 $ $ $"
            assert read_value("1 " + unit * 10_000) is None
