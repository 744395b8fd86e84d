"""A right program made wrong: one change at a time, and the span that holds it.

pytest tests/test_mutants.py
"""

import ast

from common.mutants import FLAWS, Mutant, mutants
from common.programs import code_lines, line_changes

RICH = """import math
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
    return best"""


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
