"""Generated problems: deterministic, unique, of every horizon, and right.

pytest tests/test_fixtures.py
"""

import re

import numpy as np
import pytest

from common.answers import score_math
from common.basics import normalize_x
from common.fixtures import fixtures_code, fixtures_long, fixtures_math, fixtures_rare
from common.making import split_problems
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


@pytest.mark.parametrize("generate, rising", [(fixtures_long, False), (fixtures_rare, True)])
def test_fixtures_long_and_rare(generate, rising):
    """Deterministic, unique, horizons 2 to 12; operands of one digit, results of two, none twice and none given; each
    step goes on with the result before it; every reference passes the verifier."""
    problems = generate(size=1500)
    assert problems[:100] == generate(size=100) and problems[:50] != generate(seed=1, size=50)
    assert len({normalize_x(p.x) for p in problems}) == len({p.task_id for p in problems}) == 1500
    horizons = np.array([p.reference.count("\n") for p in problems])
    assert {*horizons} == {*range(2, 13)}
    assert (np.sum(horizons >= 8) > 0.5 * np.sum(horizons <= 6)) == rising  # equally often, or short ones more often
    for p in problems:
        steps = [tuple(map(int, m)) for m in re.findall(r"<<(\d+)[-+*](\d+)=(\d+)>>\3\.", p.reference)]
        given = [int(n) for n in re.findall(r"\d+", p.x)]
        values = [given[0], *(new for _, _, new in steps)]
        assert [a for a, _, _ in steps] == values[:-1] and [n for _, n, _ in steps] == given[1:]
        assert len({*values}) == len(values) == p.reference.count("\n") + 1
        assert all(2 <= n <= 9 for n in given[1:]) and all(10 <= value < 50 for value in values)
        n = len(steps) + 1
        assert grade_math(p.reference, p.answer, p.reference) == Verdict("pass", n, n)
    assert sum(p.x.startswith("A ") for p in problems) == pytest.approx(750, abs=100)  # both templates


@pytest.mark.parametrize("generate", [fixtures_long, fixtures_rare])
def test_test_problems_have_operations_that_no_other_split_has(generate):
    """In this order; there are at least 2,000 of them, and every split has every horizon."""
    by_split: dict[str, dict[int, set]] = {}
    split_of = split_problems(generate())
    assert len(split_of["test"]) >= 2000 and len(split_of["val"]) >= 800 and len(split_of["train"]) >= 7500
    for split, some in split_of.items():
        for p in some:
            found = by_split.setdefault(split, {}).setdefault(p.reference.count("\n"), set())
            found.add(tuple(re.findall(r"<<\d+([-+*]\d)=", p.reference)))
    for horizon in range(2, 13):
        train, val, test = (by_split[split][horizon] for split in ("train", "val", "test"))
        assert train and val and test and not test & (train | val)


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
