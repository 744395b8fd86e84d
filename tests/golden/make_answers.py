"""Answer fields of every form that people write, what each states, and what math-verify makes of them: answers.json,
which tests/test_values.py compares.

    pip install math-verify[antlr4_13_2]==0.9.0 sympy==1.14.0    (an environment of their own)
    python tests/golden/make_answers.py

A field is made from its value, so what it states is known without any reader: `fields()` needs the standard library
alone.
"""

import json
import pathlib
import random
from fractions import Fraction

SEED, EACH = 0, 44
MINUS, DASH, NARROW, NO_BREAK, SLASH = "\u2212", "\u2013", "\u202f", "\u00a0", "\u2044"
VULGAR = {"½": (1, 2), "¼": (1, 4), "¾": (3, 4), "⅓": (1, 3), "⅔": (2, 3), "⅛": (1, 8), "⅝": (5, 8)}
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
UNITS = ["eggs", "dollars a day", "km/h", "hours", "square feet", "more apples", "kg", "points each", "per week"]
LEADS = ["The answer is ", "the answer is: ", "x = ", "Answer: ", "So the total is ", "Total cost: ", "Therefore, ",
         "The number of eggs is ", "She makes ", "Final answer: "]  # fmt: skip


def grouped(n: int, gap: str) -> str:
    return f"{n:,}".replace(",", gap)


def proper(r: random.Random) -> tuple[int, int]:
    under = r.randint(2, 16)
    return r.randint(1, under - 1), under


def states(r: random.Random) -> dict:
    """One field of each form that states a value: form -> (field, value)."""
    n, m, big = r.randint(1, 999), r.randint(2, 99), r.randint(1_000, 9_999_999)
    (top, under), whole, places = proper(r), r.randint(1, 30), r.randint(1, 3)
    decimal = f"{r.randint(0, 999)}.{r.randint(0, 10**places - 1):0{places}d}"
    part, small = Fraction(top, under), r.choice(list(VULGAR))
    scale, size = r.choice([("thousand", 3), ("million", 6), ("billion", 9), ("hundred", 2)])
    coin, power = r.choice("$€£"), r.randint(2, 9)
    a, b, c = r.randint(2, 60), r.randint(2, 60), r.randint(2, 9)
    wrapper = r.choice(["text", "mathbf", "mathrm", "textbf", "boxed"])
    return {
        "integer": (f"{n}", n),
        "decimal": (decimal, Fraction(decimal)),
        "trailing point": (f"{n}.", n),
        "thousands, comma": (grouped(big, ","), big),
        "thousands, space": (grouped(big, r.choice([" ", NO_BREAK, NARROW])), big),
        "thousands, other": (grouped(big, r.choice(["'", "_", "{,}", "\\,"])), big),
        "European": (f"{grouped(big, '.')},{m:02d}", big + Fraction(m, 100)),
        "sign": (f"{r.choice(['-', MINUS, DASH, '- ', 'minus ', 'negative '])}{n}", -n),
        "plus": (f"+{n}", n),
        "money before": (f"{coin}{r.choice(['', ' '])}{grouped(big, ',')}.{m:02d}", big + Fraction(m, 100)),
        "money behind": (f"{n}{r.choice(['€', ' €', ' USD', ' dollars', '$'])}", n),
        "money and sign": (r.choice([f"-{coin}{n}", f"{coin}-{n}", f"{MINUS}{coin}{n}"]), -n),
        "fraction": (f"{top}{r.choice(['/', ' / ', SLASH])}{under}", part),
        "one character": (small, Fraction(*VULGAR[small])),
        "frac": (f"\\{r.choice(['frac', 'dfrac', 'tfrac'])}{{{top}}}{{{under}}}", part),
        "frac, short": (f"\\frac{r.randint(1, 9)}{c}", None),  # its value below
        "frac, sign": (r.choice([f"-\\frac{{{top}}}{{{under}}}", f"\\frac{{{top}}}{{-{under}}}"]), -part),
        "mixed": (f"{whole} {top}/{under}", whole + part),
        "mixed, one character": (f"{whole}{r.choice(['', ' '])}{small}", whole + Fraction(*VULGAR[small])),
        "mixed, frac": (f"{whole}\\frac{{{top}}}{{{under}}}", whole + part),
        "percent": (f"{n}{r.choice(['%', ' %', ' percent'])}", n),
        "percent, LaTeX": (f"{n}\\%", n),
        "scale word": (f"{m} {scale}", m * 10**size),
        "scale and money": (f"{coin}{decimal} {scale}", Fraction(decimal) * 10**size),
        "k": (f"{r.choice(['', '$'])}{m}k", m * 1000),
        "power of ten": (f"10^{{{power}}}", 10**power),
        "power, raised": (f"10{str(power).translate(RAISED)}", 10**power),
        "times a power of ten": (
            f"{decimal} {r.choice(['x', '×', chr(92) + 'times'])} 10^{power}", Fraction(decimal) * 10**power),
        "exponent": (f"{c}e{r.choice(['', '-'])}{power}", None),  # below
        "sum": (f"{a} + {b}", a + b),
        "product": (f"{a} {r.choice(['*', 'x', '×', chr(92) + 'cdot'])} {b}", a * b),
        "difference": (f"{a + b} - {b}", a),
        "brackets": (f"({a} + {b}) * {c}", (a + b) * c),
        "equation": (f"{a} {r.choice(['*', '×'])} {b} = {a * b}", a * b),
        "equation with units": (f"{a} boxes * {b} eggs = {a * b} eggs", a * b),
        "lead": (f"{r.choice(LEADS)}{n}", n),
        "unit": (f"{n} {r.choice(UNITS)}", n),
        "unit, LaTeX": (f"{n}{r.choice([chr(92) + ',', ''])}\\text{{ {r.choice(UNITS)}}}", n),
        "unit and power": (f"{n}{r.choice([' cm^2', chr(92) + 'text{ cm}^2', ' m²', ' m^3'])}", n),
        "degrees": (f"{n}{r.choice(['°', '^' + chr(92) + 'circ', '^{' + chr(92) + 'circ}'])}", n),
        "per 1": (f"{n} eggs per 1 day", n),
        "emphasis": (r.choice(["**{}**", "*{}*", "_{}_", "`{}`", '"{}"', "__{}__"]).format(n), n),
        "wrapped": (f"\\{wrapper}{{{n}}}", n),
        "brackets around": (r.choice(["({})", "[{}]", "{{{}}}", "\\left({}\\right)", "-(-{})"]).format(n), n),
        "dollars around": (r.choice(["${}$", "\\({}\\)", "$x = {}$"]).format(n), n),
    }  # fmt: skip


def silent(r: random.Random) -> dict:
    """One field of each form that states no value, or more than one: form -> field."""
    n, m, k = r.randint(2, 99), r.randint(2, 59), r.randint(2, 12)
    low, high = sorted(r.sample(range(2, 99), 2))
    top, under = proper(r)
    return {
        "two values": r.choice([f"{n} or {m}", f"{n}, {m}", f"{n} and {m}", f"{n} {m}", f"{n}; {m}", f"{n} eggs {m}"]),
        "two units": r.choice([f"{k} hours {m} minutes", f"{k} feet {m} inches", f"${n} and {m} cents"]),
        "range": r.choice([f"{low}-{high}", f"{low}{DASH}{high}", f"{low} to {high}", f"{low} - {high}"]),
        "ratio or time": f"{k}:{m:02d}",
        "date": r.choice([f"{k}/{m}/2024", f"2024-{k:02d}-{m:02d}", f"{k}.{m}.2024"]),
        "inequality": r.choice(["> {}", "< {}", "≥ {}", "≤ {}", "≠ {}", "x > {}", "\\geq {}", "\\neq {}"]).format(n),
        "plus or minus": r.choice([f"±{n}", f"\\pm {n}", f"{n} ± {k}", f"{n} +/- {k}"]),
        "denied": r.choice(["not {}", "the answer is not {}", "{} is wrong", "It isn't {}", "no {}"]).format(n),
        "bounded": r.choice(["at least {}", "{} or more", "{}+", "more than {}", "under {}", "up to {}"]).format(n),
        "about": r.choice(["about {}", "approximately {}", "≈ {}", "\\approx {}", "~{}", "{}?"]).format(n),
        "variable": r.choice(["{}x", "{}x + 1", "{}n", "\\frac{{x}}{{{}}}", "x^{}", "x/{}", "{}y^2"]).format(n),
        "root or constant": r.choice(["\\sqrt{{{}}}", "{}\\sqrt{{2}}", "{}\\pi", "{}π", "sqrt({})", "{}e"]).format(n),
        "open end": r.choice([f"0.{k % 10}{k % 10}...", f"{n}...", f"{n}…", f"0.\\overline{{{k}}}", f"{n}!"]),
        "false equation": f"{n} * {k} = {n * k + 1}",
        "two and a half": r.choice([f"{n} and a half", f"{n} dozen", f"half of {n}", f"{n} squared", f"{n} thirds"]),
        "improper mixed": f"{n} {under + top}/{under}",
        "comma decimal": f"{n},{k % 10}",
        "base": r.choice([f"0x{n}", f"0b10{k % 2}", f"{n}_{{8}}"]),
        "complex": r.choice([f"{n}i", f"{n} + {k}i"]),
        "divided by 0": r.choice([f"{n}/0", f"\\frac{{{n}}}{{0}}"]),
    }  # fmt: skip


def fields() -> list[tuple[str, str, Fraction | None]]:
    """(form, field, what it states: None for nothing) of all fields, without repetitions."""
    r, found = random.Random(SEED), {}
    for _ in range(EACH):
        for form, (field, value) in states(r).items():
            if form == "frac, short":
                value = Fraction(int(field[5]), int(field[6:])) if len(field) == 7 else None
            if form == "exponent":
                value = Fraction(field)
            if value is not None:
                found.setdefault(field, (form, Fraction(value)))
        for form, field in silent(r).items():
            found.setdefault(field, (form, None))
    return [(form, field, value) for field, (form, value) in found.items()]


def ask(field: str) -> str | None:
    """What math-verify reads, in a box or else as text: an exact number, None where it reads none."""
    import sympy
    from math_verify import parse

    for text in (f"\\boxed{{{field}}}", field):
        found = parse(text, parsing_timeout=None, raise_on_error=False)
        value = found[0] if found and not isinstance(found[0], str) else None
        if isinstance(value, sympy.Eq):
            value = value.rhs
        if isinstance(value, sympy.Expr) and value.is_number:
            value = sympy.nsimplify(value.doit(), rational=True)
            if isinstance(value, sympy.Rational) and value.is_finite:
                return str(Fraction(int(value.p), int(value.q)))
    return None


if __name__ == "__main__":
    rows = [[form, field, None if value is None else str(value), ask(field)] for form, field, value in fields()]
    path = pathlib.Path(__file__).parent / "answers.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")
    print(f"{len(rows)} fields, {sum(row[2] == row[3] for row in rows)} as math-verify has them: {path}")
