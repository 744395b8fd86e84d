"""Generated problems: deterministic, unique, of every horizon, and right.

pytest tests/test_fixtures.py
"""

import re

import pytest

from common.answers import score_math
from common.basics import normalize_x
from common.fixtures import fixtures_code, fixtures_math
from common.mutants import count_statements
from common.programs import grade
from common.prompts import CODE_LINE
from common.replay import Problem
from common.verifier import Verdict, grade_math


@pytest.fixture(scope="module")
def fixtures() -> list[Problem]:
    return fixtures_math(size=2000)


def test_fixtures_math(fixtures):
    """Deterministic, unique, horizons 2 to 8, small numbers, and every reference passes the verifier."""
    assert fixtures[:300] == fixtures_math(size=300)
    assert fixtures[:50] != fixtures_math(seed=1, size=50)
    assert len({normalize_x(p.x) for p in fixtures}) == len({p.task_id for p in fixtures}) == 2000
    assert {len(p.reference.split("\n")) - 1 for p in fixtures} == set(range(2, 9))
    assert {p.split for p in fixtures} == {None}
    for p in fixtures:
        assert max(int(n) for n in re.findall(r"\d+", p.x + p.reference)) <= 100
        assert score_math(p.reference, p.answer) == 1
        n = len(p.reference.split("\n"))
        assert grade_math(p.reference, p.answer, p.reference) == Verdict("pass", n, n)


def test_fixtures_math_arithmetic_by_python(fixtures):
    """Every annotation is true by Python's own arithmetic, and the last one is the answer."""
    for p in fixtures[:500]:
        stated = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", p.reference)
        assert len(stated) == len(p.reference.split("\n")) - 1
        for a, op, b, result, shown in stated:
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op] == int(result) == int(shown)
        assert stated[-1][3] == p.answer


@pytest.mark.usefixtures("confined")
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
