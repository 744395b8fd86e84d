"""A right solution made wrong: attempts worked out by hand, and properties of many.

pytest tests/test_mistakes.py
"""

import json
import random
from fractions import Fraction

import pytest
from examples import problem_of

from common.answers import final_answers, score_math
from common.critique import ORDINALS
from common.fixtures import fixtures_math
from common.making import perturb
from common.mistakes import TAG_OF_KIND, UnfitError, attempts, choices, corrupt, numerals, text_agrees
from common.replay import Problem, Quadruple, parse_quadruple, replay_report
from common.verifier import (
    ANNOTATION,
    equation_holds,
    first_wrong_step,
    numbers_in,
    show,
    split_steps,
)

SHOP = Problem(
    "own/shop",
    "A shop sells 30 lamps at $40 each. It then pays $350 for rent and gives 1/5 of what is left to 5 clerks. "
    "The rest is shared by 4 owners. How much does each owner get?",
    "The shop takes in 30 x $40 = $<<30*40=1200>>1,200.\n"
    "After the rent $1,200 - $350 = $<<1200-350=850>>850 is left.\n"
    "The clerks get $850 / 5 = $<<850/5=170>>170.\n"
    "So $850 - $170 = $<<850-170=680>>680 remains for the owners.\n"
    "Each owner gets $680 / 4 = $<<680/4=170>>170.\n"
    "#### 170",
    "170",
    None,
)
PENS = Problem(
    "own/pens",
    "Tom has 48 red pens. He has half as many blue pens and gives away 15 pens. How many pens does he keep?",
    "Tom has 48/2 = <<48/2=24>>24 blue pens.\n"
    "He has 48+24 = <<48+24=72>>72 pens in all.\n"
    "He keeps 72-15 = <<72-15=57>>57 pens.\n"
    "#### 57",
    "57",
    None,
)


def own_problems() -> list[Problem]:
    """Forty problems in GSM8K's format with what fixtures_math lacks: arithmetic spelled out in the text, $, commas, x,
    units between operands, decimals, lines without annotation, sums of three."""
    rng, problems = random.Random(5), []
    for i in range(40):
        a, b, c, d = rng.sample(range(13, 29), 4)
        kind = i % 4
        if kind == 0:
            x = f"Ann sells {a} cakes at ${b}00 each and pays ${c}0 for flour and ${d} for sugar. What does she keep?"
            t, k = a * b * 100, c * 10 + d
            lines = [
                f"She takes in {a} x ${b}00 = $<<{a}*{b}00={t}>>{t:,}.",
                f"She pays ${c}0 + ${d} = $<<{c}0+{d}={k}>>{k}.",
                f"She keeps ${t:,} - ${k} = $<<{t}-{k}={t - k}>>{t - k:,}.",
            ]
            answer = t - k
        elif kind == 1:
            x = f"A bus drives {a} miles an hour for {b} hours, then {c} miles. A train drives {d} miles. How far?"
            t = a * b
            lines = [
                f"The bus first drives {a} miles/hour * {b} hours = <<{a}*{b}={t}>>{t} miles.",
                f"The bus drives {t} miles + {c} miles = {t + c} miles.",
                f"Together they drive {t + c} miles + {d} miles = <<{t + c}+{d}={t + c + d}>>{t + c + d} miles.",
            ]
            answer = t + c + d
        elif kind == 2:
            x = f"A pear costs ${a}.50 and a melon ${b}. Eve buys {c} of each and pays with ${d}00. What is her change?"
            each, t = Fraction(2 * a + 1, 2) + b, (Fraction(2 * a + 1, 2) + b) * c
            left = show(d * 100 - t)
            each, t = show(each), show(t)
            lines = [
                f"A pear and a melon cost ${a}.50 + ${b} = $<<{a}.5+{b}={each}>>{each}.",
                f"So she pays {c} * ${each} = $<<{c}*{each}={t}>>{t}.",
                f"Her change is ${d}00 - ${t} = $<<{d}00-{t}={left}>>{left}.",
            ]
            answer = left
        else:
            x = f"Max has {a} coins. Sue has {b} more than Max. Ben has {c} more than Sue. How many have they in all?"
            s = a + b
            t = s + c
            lines = [
                f"Sue has {a} + {b} = <<{a}+{b}={s}>>{s} coins.",
                f"Ben has {s} + {c} = <<{s}+{c}={t}>>{t} coins.",
                f"They have {a} + {s} + {t} = <<{a}+{s}+{t}={a + s + t}>>{a + s + t} coins.",
            ]
            answer = a + s + t
        problems.append(Problem(f"own/{i}", x, "\n".join([*lines, f"#### {answer}"]), str(answer), None))
    return problems


PROBLEMS = fixtures_math(size=300) + own_problems()


@pytest.fixture(scope="module")
def quads() -> list[Quadruple]:
    return [perturb(problem) for problem in PROBLEMS]


def test_every_problem_yields_a_verified_quadruple(quads):
    assert all(isinstance(q, Quadruple) for q in quads)
    for q, problem in zip(quads, PROBLEMS):
        assert (q.x, q.y1, q.meta["answer"]) == (problem.x, problem.reference, problem.answer)
        assert score_math(q.y0, problem.answer) == 0 and score_math(q.y1, problem.answer) == 1
        assert q.meta["verified"] and not q.meta["y0_correct"] and q.meta["y1_correct"]
        parse_quadruple(json.dumps({"x": q.x, "y0": q.y0, "f": q.f, "y1": q.y1, "meta": q.meta}), "here")


def test_span_and_critique_name_the_step_the_checker_calls_wrong(quads):
    for q in quads:
        wrong = first_wrong_step(q.y0, q.y1)
        step = split_steps(q.y0)[wrong]
        assert q.meta["error_span"] == [step.start, step.end]
        assert q.f.startswith(f"The {ORDINALS[wrong]} step is wrong: ")


def test_only_a_wrong_result_breaks_the_arithmetic_and_only_in_its_own_step(quads):
    """All the other steps, later ones above all, are recomputed: their annotations and their texts hold."""
    for q in quads:
        wrong = first_wrong_step(q.y0, q.y1)
        for i, line in enumerate(q.y0.split("\n")):
            slip = i == wrong and q.meta["error_tags"] == ["local_arithmetic"]
            annotations = ANNOTATION.findall(line)
            for expr, value in annotations:
                assert equation_holds(expr, Fraction(value)) != slip, q.y0
                if "= " in line:  # the text shows the result of its annotation once more
                    assert line.replace(",", "").split(">>")[1].startswith(value)
            assert all(text_agrees(line)) or slip, q.y0


def test_the_final_line_states_the_last_result(quads):
    for q in quads:
        *lines, final = q.y0.split("\n")
        if lines and "####" not in q.y0[slice(*q.meta["error_span"])]:
            assert Fraction(ANNOTATION.findall(lines[-1])[-1][1]) == final_answers(final)[0], q.y0


def test_no_critique_gives_the_answer_or_the_right_value_away(quads):
    for q in quads:
        assert Fraction(q.meta["answer"]) not in numbers_in(q.f)
    assert replay_report(quads)["leak_rate"] == 0


def test_a_flaw_that_would_name_the_right_value_is_told_without_numbers():
    """Step 2 should be 6 and is 18-6 where its operand is stale: "18-12" may be said, "6" may not."""
    gifts = problem_of(
        "18 yards of ribbon, 6 gifts, 2 yards each. Joe adds 5 yards to the rest. How much now?",
        "The gifts use 6 x 2 = <<6*2=12>>12 yards.",
        "So 18 - 12 = <<18-12=6>>6 yards are over.",
        "Now it is 6 + 5 = <<6+5=11>>11 yards.",
        "#### 11",
    )
    critiques = {f for _, _, _, f in attempts(gifts, 0)}
    assert "The second step is wrong: it should be 18-12." in critiques
    assert any(f.startswith("The first step is wrong: 6*2 is not ") for f in critiques)
    assert not any("18-12 is not 6" in f or "6*2 is not 12" in f for f in critiques)
    halved = problem_of("8 eggs and 4 eggs. Half are sold?", "All: <<8+4=12>>12.", "Sold: <<12/2=6>>6.", "#### 6")
    assert all(6 not in numbers_in(f) for _, _, _, f in attempts(halved, 0))


def test_kinds_are_mixed(quads):
    tags = replay_report(quads)["tags"]
    assert set(tags) == set(TAG_OF_KIND.values())
    assert min(tags.values()) > 0.02 * len(quads), tags


def test_deterministic_in_seed_and_problem(quads):
    again = [perturb(problem) for problem in reversed(PROBLEMS[-60:])]
    assert again == quads[:-61:-1]
    assert [perturb(problem, seed=1) for problem in PROBLEMS[-60:]] != quads[-60:]


# ---- one worked example for each kind -------------------------------------------------------------------------------
def lines_of_y0(problem: Problem, kind: str, step: int, choice: tuple) -> tuple[list[str], int, str]:
    assert choice in choices(problem, kind, step, random.Random(0))
    y0, flagged, flaw = corrupt(problem, kind, step, choice)
    return y0.split("\n"), flagged, flaw[0]


def test_wrong_result():
    lines, flagged, flaw = lines_of_y0(PENS, "wrong_result", 0, (Fraction(26),))
    assert lines == [
        "Tom has 48/2 = <<48/2=26>>26 blue pens.",
        "He has 48+26 = <<48+26=74>>74 pens in all.",
        "He keeps 74-15 = <<74-15=59>>59 pens.",
        "#### 59",
    ]
    assert (flagged, flaw) == (0, "48/2 is not 26")


def test_wrong_operator():
    lines, flagged, flaw = lines_of_y0(SHOP, "wrong_operator", 1, (0, "+"))
    assert lines == [
        "The shop takes in 30 x $40 = $<<30*40=1200>>1,200.",
        "After the rent $1,200 + $350 = $<<1200+350=1550>>1550 is left.",
        "The clerks get $1550 / 5 = $<<1550/5=310>>310.",
        "So $1550 - $310 = $<<1550-310=1240>>1240 remains for the owners.",
        "Each owner gets $1240 / 4 = $<<1240/4=310>>310.",
        "#### 310",
    ]
    assert (flagged, flaw) == (1, "it should be 1200-350")


def test_dropped_step():
    lines, flagged, flaw = lines_of_y0(PENS, "dropped_step", 1, (Fraction(24),))
    assert lines == ["Tom has 48/2 = <<48/2=24>>24 blue pens.", "He keeps 24-15 = <<24-15=9>>9 pens.", "#### 9"]
    assert (flagged, flaw) == (1, "the step 48+24 before it is missing")


def test_stale_value():
    lines, flagged, flaw = lines_of_y0(PENS, "stale_value", 2, (Fraction(72), Fraction(48)))
    assert lines == [
        "Tom has 48/2 = <<48/2=24>>24 blue pens.",
        "He has 48+24 = <<48+24=72>>72 pens in all.",
        "He keeps 48-15 = <<48-15=33>>33 pens.",
        "#### 33",
    ]
    assert (flagged, flaw) == (2, "it should be 72-15")


def test_wrong_quantity():
    lines, flagged, flaw = lines_of_y0(SHOP, "wrong_quantity", 0, (Fraction(40), Fraction(350)))
    assert lines == [
        "The shop takes in 30 x $350 = $<<30*350=10500>>10,500.",
        "After the rent $10,500 - $350 = $<<10500-350=10150>>10150 is left.",
        "The clerks get $10150 / 5 = $<<10150/5=2030>>2030.",
        "So $10150 - $2030 = $<<10150-2030=8120>>8120 remains for the owners.",
        "Each owner gets $8120 / 4 = $<<8120/4=2030>>2030.",
        "#### 2030",
    ]
    assert (flagged, flaw) == (0, "it should be 30*40")


# ---- what must not be written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("why", "problem"),
    [
        (
            "the 10 of the second step may be the 10 that x gives",
            problem_of("6 and 4 cats and 10 dogs. All?", "Cats: <<6+4=10>>10.", "All: <<10+10=20>>20.", "#### 20"),
        ),
        (
            "the word two stands for the changed 2",
            problem_of("9 eggs, 7 break, 5 more. Now?", "Left: <<9-7=2>>2.", "The two and 5: <<2+5=7>>7.", "#### 7"),
        ),
        (
            "the 2nd cannot become 4nd",
            problem_of("9 eggs, 6 break, 5 more?", "Left: <<9-6=3>>3.", "With the 3rd: <<3+5=8>>8.", "#### 8"),
        ),
        (
            "30% and 0.3 are one quantity",
            problem_of("0.5 less 0.2 of 90?", "It is <<0.5-0.2=0.3>>0.3.", "30% of 90 is <<0.3*90=27>>27.", "#### 27"),
        ),
        (
            "13 thirds are no number of pens",
            problem_of("8 and 4 pens, 3 boys. Each?", "All: <<8+4=12>>12.", "Each: <<12/3=4>>4.", "#### 4"),
        ),
    ],
)
def test_unfit(why, problem):
    value = numerals(ANNOTATION.findall(problem.reference)[0][1])[0]
    changed = value + (Fraction(1, 10) if value < 1 else 1)
    with pytest.raises(UnfitError):
        corrupt(problem, "wrong_result", 0, (changed,))


def test_a_step_that_names_its_operation_keeps_its_operator():
    problem = problem_of("6 and 4 cats. All?", "The sum is <<6+4=10>>10.", "With 5 more: <<10+5=15>>15.", "#### 15")
    with pytest.raises(UnfitError):
        corrupt(problem, "wrong_operator", 0, (0, "-"))
    plain = problem_of("6 and 4 cats. All?", "Cats: <<6+4=10>>10.", "With 5 dogs: <<10+5=15>>15.", "#### 15")
    assert corrupt(plain, "wrong_operator", 0, (0, "-"), strict=False)[0].startswith("Cats: <<6-4=2>>2.\n")
