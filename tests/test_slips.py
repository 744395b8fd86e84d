"""Planted slips and errors by kind of step, computed by hand.

pytest tests/test_slips.py
"""

import re

import numpy as np
import pytest

from common.fixtures import fixtures_long, fixtures_math, fixtures_rare
from common.slips import PLANTED, Planted, operations, plant_slips, step_kinds
from common.verifier import first_wrong_step

ALWAYS = Planted((6, 7), 1.0)
Y1 = """In Jan 6 are bought: <<20+6=26>>26.
In Feb 4 are lost: <<26-4=22>>22.
In Mar 2 times as many: <<22*2=44>>44.
In Apr 7 are sold: <<44-7=37>>37.
#### 37"""
SLIPPED = """In Jan 6 are bought: <<20+6=27>>27.
In Feb 4 are lost: <<27-4=23>>23.
In Mar 2 times as many: <<23*2=46>>46.
In Apr 7 are sold: <<46-7=40>>40.
#### 40"""


# ---- planting -------------------------------------------------------------------------------------------------------
def test_slips_are_one_too_many_and_carried_along():
    assert plant_slips(Y1, ALWAYS, np.random.default_rng(0)) == SLIPPED
    assert plant_slips(Y1, Planted((5, 9), 1.0), np.random.default_rng(0)) == Y1
    assert plant_slips(Y1, Planted((6, 7), 0.0), np.random.default_rng(0)) == Y1


def test_the_flagged_step_is_right_and_the_others_slip_as_before():
    """Kept right, the first step changes nothing, the last one carries the first one's slip on."""
    assert plant_slips(Y1, ALWAYS, np.random.default_rng(0), right=0) == Y1.replace(
        "44-7=37>>37", "44-7=38>>38"
    ).replace("#### 37", "#### 38")
    assert plant_slips(Y1, ALWAYS, np.random.default_rng(0), right=3) == SLIPPED.replace(
        "46-7=40>>40", "46-7=39>>39"
    ).replace("#### 40", "#### 39")
    half, draws = Planted((6, 7), 0.5), lambda right: np.random.default_rng(3)
    slips = [plant_slips(Y1, half, draws(right), right) for right in (None, 1, 2)]
    assert slips[0] == slips[1] == slips[2]  # no other draw because a step is kept right that has no slip anyway


def test_slips_come_as_often_as_p_says():
    rng, half = np.random.default_rng(0), Planted((6,), 0.6)
    share = np.mean(["20+6=27" in plant_slips(Y1, half, rng) for _ in range(2000)])
    assert abs(share - 0.6) < 0.03


@pytest.mark.parametrize("problems", [fixtures_long, fixtures_rare])
def test_planted_in_generated_problems_slips_are_all_that_is_wrong(problems):
    """Every step of a planted solution is right or a slip, the slips are at planted operations, and the answer is the
    last result."""
    planted, rng, found = PLANTED[problems.__name__], np.random.default_rng(1), []
    for p in problems(size=300):
        text = plant_slips(p.reference, planted, rng)
        assert text.split("#### ")[1] == re.findall(r">>(-?\d+)\.", text)[-1]
        kinds = step_kinds(text, p.reference, planted)
        assert [at for _, at in kinds] == [planted.at(step.b) for step in operations(p.reference)]
        assert {kind for kind, _ in kinds} <= {"right", "slip"} and all(at for kind, at in kinds if kind == "slip")
        wrong = first_wrong_step(text, p.reference)
        assert wrong == next((i for i, (kind, _) in enumerate(kinds) if kind == "slip"), None)
        found += kinds
    assert abs(np.mean([kind == "slip" for kind, at in found if at]) - planted.p) < 0.05


# ---- kinds of error -------------------------------------------------------------------------------------------------
PLAIN, HIT = ("right", False), ("right", True)


@pytest.mark.parametrize(
    "old, new, kinds",
    [
        ("", "", [HIT, PLAIN, PLAIN, HIT]),
        # at a planted operation one too many is a slip, one too few and two too many are not
        ("20+6=26>>26", "20+6=25>>25", [("arithmetic", True), ("copying", False), PLAIN, HIT]),
        ("44-7=37>>37", "44-7=38>>38", [HIT, PLAIN, PLAIN, ("slip", True)]),
        ("44-7=37>>37", "44-7=39>>39", [HIT, PLAIN, PLAIN, ("arithmetic", True)]),
        # elsewhere one too many is arithmetic; then the attempt's own result is what has to be copied
        ("22*2=44>>44", "22*2=45>>45", [HIT, PLAIN, ("arithmetic", False), ("copying", True)]),
        ("22*2=44>>44.\nIn Apr 7 are sold: <<44-7=37>>37", "22*2=45>>45.\nIn Apr 7 are sold: <<45-7=38>>38",
         [HIT, PLAIN, ("arithmetic", False), HIT]),
        # another operand, another operator, an older result
        ("26-4=22>>22", "26-3=23>>23", [HIT, ("copying", False), ("copying", False), HIT]),
        ("26-4=22>>22", "26-6=20>>20", [HIT, ("copying", True), ("copying", False), HIT]),
        ("22*2=44>>44", "22+2=24>>24", [HIT, PLAIN, ("copying", False), ("copying", True)]),
        ("44-7=37>>37", "22-7=15>>15", [HIT, PLAIN, PLAIN, ("copying", True)]),
        ("20+6=26>>26", "21+6=27>>27", [("copying", True), ("copying", False), PLAIN, HIT]),
        # not read: the next step may go on with anything
        ("<<26-4=22>>22", "22", [HIT, ("form", False), PLAIN, HIT]),
        ("26-4=22>>22", "26-4=22>>23", [HIT, ("form", False), PLAIN, HIT]),
        ("<<20+6=26>>26", "26", [("form", True), PLAIN, PLAIN, HIT]),
        # missing, too many, none at all, without its answer
        ("In Feb 4 are lost: <<26-4=22>>22.\n", "", [HIT, ("form", False), PLAIN, HIT]),
        ("#### 37", "In May 6 are sold: <<37-6=31>>31.\n#### 31", [HIT, PLAIN, PLAIN, HIT, ("form", True)]),
        (Y1, "#### 37", [("form", True), ("form", False), ("form", False), ("form", True)]),
        (Y1, "", [("form", True), ("form", False), ("form", False), ("form", True)]),
        ("\n#### 37", "", [HIT, PLAIN, PLAIN, HIT]),
    ],
)  # fmt: skip
def test_kinds_by_hand(old, new, kinds):
    assert old in Y1
    assert step_kinds(Y1.replace(old, new), Y1, ALWAYS) == kinds


def test_a_slip_that_is_carried_along_is_one_error():
    assert step_kinds(SLIPPED, Y1, ALWAYS) == [("slip", True), PLAIN, PLAIN, ("slip", True)]
    assert step_kinds(SLIPPED, Y1, None) == [("arithmetic", False), PLAIN, PLAIN, ("arithmetic", False)]


def test_a_result_below_zero_is_read():
    gold = "<<20-9=11>>11\n<<11-8=3>>3\n#### 3"
    text = "<<20-9=7>>7\n<<7-8=-1>>-1\n#### -1"
    assert step_kinds(text, gold, ALWAYS) == [("arithmetic", False), PLAIN]
    assert [step.value for step in operations("<<7-8=-1>>-1\n<<-1+5=4>>4")] == [-1, 4]


def test_references_are_right_throughout():
    """Also where the last step goes back to an earlier result, as in fixtures_math; such a one is followed as well."""
    for p in [*fixtures_math(size=200), *fixtures_long(size=100)]:
        n = p.reference.count("<<")
        assert [kind for kind, _ in step_kinds(p.reference, p.reference, None)] == ["right"] * n
    gold = "<<10+2=12>>12\n<<12*3=36>>36\n<<12+36=48>>48\n#### 48"
    text = "<<10+2=13>>13\n<<13*3=39>>39\n<<{}+39={}>>{}\n#### {}"
    kinds = [step_kinds(text.format(a, a + 39, a + 39, a + 39), gold, None)[2][0] for a in (13, 12)]
    assert kinds == ["right", "copying"]
