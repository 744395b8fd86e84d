"""The family, the rows, the comparisons, and the sentence in each of its branches.

pytest tests/test_claims.py
"""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from made_results import made_matrix, made_run

from common.basics import InputError
from common.claims import (
    Comparison,
    Family,
    answer,
    compare,
    default_family,
    judge,
    measure_all,
    measure_row,
    not_compared,
    plain,
    question,
    read_family,
    scaled,
)
from common.results import find_runs, read_runs
from common.statistics import Estimate, bootstrap, estimate, holm, mcnemar, wilcoxon

B3, B4, B5 = "b3_grpo_verifier", "b4_grpo_critique", "b5_cts"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """B5 is much better on gsm8k, and as good on apps; one seed of a control arm."""
    folder = tmp_path_factory.mktemp("runs")
    made_matrix(folder, (B3, B4, B5), ("gsm8k",), (0, 1, 2), 60, {B5: 2.5})
    made_matrix(folder, (B3, B4, B5), ("apps",), (0, 1, 2), 60)
    made_run(folder, B5, "gsm8k", 0, 60, flags={"lam_align": 0.0})
    return {task.name: task for task in read_runs(find_runs([folder]), allow_partial=True)}


# ---- the family -----------------------------------------------------------------------------------------------------
def test_the_default_family_is_every_arm_against_the_base_first_b5(tasks):
    family = default_family([*tasks.values()], B3)
    assert family.comparisons == ((B5, B3), (B4, B3), ("b5_cts lam_align=0", B3))
    assert default_family([tasks["apps"]], B5).comparisons == ((B4, B5), (B3, B5))


def test_a_family_is_read_from_a_file_or_from_a_sweep_s_comment(tmp_path):
    text = json.dumps({"primary": [B5, B3], "others": [[B4, B3]], "margin": 2})
    (tmp_path / "family.json").write_text(text)
    (tmp_path / "sweep.yaml").write_text(f"# a sweep\n# family: {text}\nprogram: sweeps/cell.py\n")
    a, b = (read_family(str(tmp_path / name)) for name in ("family.json", "sweep.yaml"))
    assert a.comparisons == b.comparisons == ((B5, B3), (B4, B3)) and a.margin == 2.0 and a.measure == "revised"
    assert a.digest == b.digest != dataclasses.replace(a, margin=1.0).digest
    assert (a.source, b.source) == ("family.json", "sweep.yaml")


def test_a_sweep_declares_its_tasks_and_seeds_too(tmp_path):
    grid = "parameters: {seed: {values: [0, 1]}, task: {value: gsm8k}}"
    (tmp_path / "sweep.yaml").write_text(f"# family: {{primary: [a, b]}}\n{grid}\n")
    assert (family := read_family(str(tmp_path / "sweep.yaml"))).seeds == (0, 1) and family.tasks == ("gsm8k",)
    (tmp_path / "family.json").write_text("{primary: [a, b]}")
    assert (family := read_family(str(tmp_path / "family.json"))).seeds == family.tasks == ()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[1]", "primary"), ("{}", "primary"), ("{primary: b5_cts}", "primary"), ("{primary: [a, a]}", "primary"),
        ("{primary: [a, b], others: [[a]]}", "others"), ("{primary: [a, b], others: [[a, b]]}", "others"),
        ("{primary: [a, b], measure: right_to_wrong}", "measure"), ("{primary: [a, b], margin: 0}", "margin"),
        ("{primary: [a, b], alpha: 0.1}", "alpha"),
    ],
)  # fmt: skip
def test_a_bad_family_is_refused_by_field(tmp_path, text, field):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"--family .*f\.yaml: field '{field}' "):
        read_family(str(tmp_path / "f.yaml"))


def test_a_family_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "f.yaml").write_text("{a: [")
    for name in ("f.yaml", "none.yaml"):
        with pytest.raises(InputError, match=r"--family .*: cannot be read"):
            read_family(str(tmp_path / name))


# ---- rows -----------------------------------------------------------------------------------------------------------
def test_a_row_is_the_mean_over_seeds_and_problems_and_its_difference(tasks):
    task = tasks["gsm8k"]
    row = measure_row(task, B5, B3, "revised", "horizon 3")
    inside = task.first.groups["horizon 3"]
    a, b = (task.scores(arm, "revised", [0, 1, 2])[:, inside] for arm in (B5, B3))
    assert (row.seeds, row.problems, row.mean) == (3, 12, a.mean())
    assert row.sd == a.mean(1).std(ddof=1)
    assert row.effect == estimate(a - b) and row.difference == (a - b).mean()
    assert (row.low, row.high) == estimate(a).interval


def test_problems_without_a_value_are_left_out_of_every_seed(tasks):
    row = measure_row(tasks["gsm8k"], B5, B3, "credit_excess", "all")
    assert row.problems == 60 - len(range(0, 60, 7))
    assert measure_row(tasks["gsm8k"], B5, B3, "value_excess", "all").mean is None


def test_one_seed_has_a_mean_and_a_difference_but_no_interval(tasks):
    row = measure_row(tasks["gsm8k"], "b5_cts lam_align=0", B3, "revised", "all")
    assert row.seeds == 1 and row.mean is not None and row.difference is not None
    assert (row.sd, row.low, row.high, row.effect) == (None,) * 4
    assert row.against["p"] is None


def test_the_base_and_every_arm_have_all_rows(tasks):
    rows = measure_all([*tasks.values()], B3)
    of = {(row.task, row.arm) for row in rows}
    assert of == {(task, arm) for task in tasks for arm in (B3, B4, B5)} | {("gsm8k", "b5_cts lam_align=0")}
    assert all(row.difference is None for row in rows if row.arm == B3)
    groups = {row.group for row in rows if row.measure == "revised"}
    assert groups >= {"all", "horizon 2", "edit 1-2", "tag missing_case"}


# ---- comparisons ----------------------------------------------------------------------------------------------------
def test_a_comparison_has_all_tests_and_holm_over_tasks_too(tasks):
    both = [tasks["gsm8k"], tasks["apps"]]
    family = Family(((B5, B3), (B4, B3)))
    found = compare(both, family)
    assert [(c.task, c.arm) for c in found] == [(t, a) for t in ("gsm8k", "apps") for a in (B5, B4)]
    assert [c.p_holm for c in found] == holm([c.found.p for c in found]) and {c.among for c in found} == {4}
    a, b = (tasks["gsm8k"].scores(arm, "revised", [0, 1, 2]) for arm in (B5, B3))
    first = found[0]
    assert first.difference == pytest.approx(100 * (a - b).mean())
    assert first.percentile == tuple(100 * v for v in bootstrap(a - b))
    assert first.wilcoxon == wilcoxon(a - b)
    assert first.mcnemar == {s: mcnemar(a[s], b[s]) for s in (0, 1, 2)}
    assert first.verdict == "supported" and first.improvement["share"] == 1.0
    assert first.detectable > first.found.detectable  # at 5 % over four rows


def test_an_arm_that_is_not_there_is_named(tasks):
    with pytest.raises(InputError, match=r"gsm8k: no runs of 'b6_mine'; there are b3_grpo_verifier, b4"):
        compare([tasks["gsm8k"]], Family((("b6_mine", B3),)))


def test_what_cannot_be_compared_counts_as_showing_nothing(tasks):
    """Beside the rest, under allow_partial: Holm's method counts it, and the primary one on another task decides alone
    no longer."""
    family = Family(((B5, B3), ("b6_mine", B3)))
    absent = not_compared([tasks["gsm8k"]], family)
    assert absent == {("gsm8k", "b6_mine", B3): "no runs of 'b6_mine'"}
    (one,) = compare([tasks["gsm8k"]], family, allow_partial=True)
    assert one.p_holm == pytest.approx(2 * one.found.p) and one.among == 2
    assert one.detectable == one.found.detectable_at(0.025)
    assert answer([one], family, absent)[0] == "supported"
    lacks = {**absent, ("apps", B5, B3): "no runs of 'b5_cts'"}
    verdict, text = answer([one], family, lacks)
    end = "after Holm over 2, 3 seeds, 60 problems). On apps nothing: no runs of 'b5_cts'."
    assert verdict == "undecided" and text.endswith(end)
    assert text.startswith("Undecided at this power: supported on gsm8k, undecided on apps. On gsm8k b5_cts revises ")
    with pytest.raises(InputError, match=r"gsm8k: no runs of 'b7'; there are b3_grpo_verifier, b4"):
        compare([tasks["gsm8k"]], Family((("b7", B3),)), allow_partial=True)


def test_one_shared_seed_has_no_p_and_counts(tmp_path):
    made_matrix(tmp_path, (B3, B5), ("apps",), (0, 1), 30)
    made_run(tmp_path, B4, "apps", 0, 30)
    tested, single = compare(read_runs(find_runs([tmp_path]), allow_partial=True), Family(((B5, B3), (B4, B3))))
    assert tested.p_holm == pytest.approx(min(1, 2 * tested.found.p)) and single.p_holm is single.found is None
    assert {tested.among, single.among} == {2}


def test_arms_without_a_common_seed_are_named(tmp_path):
    made_run(tmp_path, B3, "apps", 0, 8), made_run(tmp_path, B5, "apps", 1, 8)
    with pytest.raises(InputError, match=r"apps: b5_cts and b3_grpo_verifier share no 'seed'"):
        compare(read_runs(find_runs([tmp_path]), allow_partial=True), Family(((B5, B3),)))


def test_an_estimate_in_points_is_the_same_test():
    one = estimate(np.random.default_rng(0).normal(0.1, 1, (4, 30)))
    points = scaled(one, 100)
    assert points.p == pytest.approx(one.p, abs=1e-12) and points.detectable == pytest.approx(100 * one.detectable)
    assert sum(points.parts) == pytest.approx(points.se**2)


# ---- the sentence ---------------------------------------------------------------------------------------------------
def made(mean, se, verdict=None, p_holm=None, needed=9, task="gsm8k", seeds=5):
    """A comparison in which these numbers were found."""
    one = Estimate(mean, se, 50.0, (se**2, 0.0, 0.0), (1.0, 1.0, 1.0), seeds, 605)
    p = one.p if p_holm is None else p_holm
    return Comparison(task, B5, B3, mean, one, p, 1, (0.0, 0.0), 0.5, {}, {}, [*range(seeds)], 605,
                      verdict or judge(one, p, 1.0), 4.1, needed, max(abs(mean), 1.0), 2.5)  # fmt: skip


FAMILY = Family(((B5, B3), (B4, B3)))


@pytest.mark.parametrize(
    ("mean", "se", "p_holm", "verdict"),
    [
        (3.0, 0.5, 0.001, "supported"),
        (-3.0, 0.5, 0.001, "not supported"),  # worse
        (0.0, 0.3, 1.0, "not supported"),  # an advantage of a point is ruled out
        (0.0, 1.0, 1.0, "undecided"),
        (3.0, 1.2, 0.08, "undecided"),  # not after Holm
    ],
)
def test_verdicts(mean, se, p_holm, verdict):
    assert made(mean, se, p_holm=p_holm).verdict == verdict


def test_one_seed_is_undecided_whatever_it_shows():
    assert judge(None, None, 1.0) == "undecided"


def test_sentence_supported():
    verdict, text = answer([made(3.0, 0.5, p_holm=0.001)], FAMILY, {})
    assert verdict == "supported"
    assert text == (
        "Supported: on gsm8k b5_cts revises 3.0 points more than b3_grpo_verifier (95 % interval +2.0 to +4.0,"
        " p = 0.001 after Holm over 1, 5 seeds, 605 problems)."
    )


def test_sentence_worse():
    verdict, text = answer([made(-3.0, 0.5, p_holm=0.001)], FAMILY, {})
    assert verdict == "not supported"
    assert text.startswith("Not supported: on gsm8k b5_cts revises 3.0 points fewer than b3_grpo_verifier")
    assert "ruled out" not in text


def test_sentence_ruled_out():
    verdict, text = answer([made(0.1, 0.3)], FAMILY, {})
    assert verdict == "not supported"
    assert text.endswith("5 seeds, 605 problems); an advantage of 1 point is ruled out.")


def test_sentence_undecided_and_how_many_seeds_would_decide():
    verdict, text = answer([made(1.9, 1.5)], FAMILY, {})
    assert verdict == "undecided" and text.startswith("Undecided at this power: ")
    assert text.endswith("; an effect of 4.1 points would be found in 80 % of repetitions, and about 9 seeds would find"
                         " one of 1.9.")  # fmt: skip


def test_sentence_undecided_says_more_seeds_than_there_are():
    _, text = answer([made(1.9, 1.0, p_holm=0.3, needed=4)], FAMILY, {})
    assert "about 6 seeds would find" in text


def test_sentence_undecided_where_problems_are_too_few():
    _, text = answer([made(0.2, 1.5, needed=None)], FAMILY, {})
    least = "(the least is 2.5): more problems are needed."
    assert text.endswith(f"no number of seeds finds one of 1.0 with 605 problems {least}")


def test_an_effect_that_cannot_be_is_not_spoken_of():
    open_ = dataclasses.replace(made(1.9, 1.5), detectable=124.6)
    assert "problems); no effect would be found in 80 % of repetitions" in answer([open_], FAMILY, {})[1]
    gain = dataclasses.replace(FAMILY, measure="delta_critique")
    assert "an effect of 124.6 points would be" in answer([open_], gain, {})[1]


def test_sentence_of_one_seed():
    one = dataclasses.replace(made(1.9, 1.0, seeds=1), found=None, p_holm=None, verdict="undecided", detectable=None)
    verdict, text = answer([one], FAMILY, {})
    assert verdict == "undecided"
    assert text.endswith("(1 seed, 605 problems); one seed says nothing of runs: two seeds at least, better five.")


def test_sentence_of_several_tasks_is_the_weakest():
    good, open_ = made(3.0, 0.5, p_holm=0.001), made(1.9, 1.5, task="apps")
    bad = made(-3.0, 0.5, p_holm=0.001, task="mbpp")
    both = answer([good, dataclasses.replace(good, task="mbpp")], FAMILY, {})
    assert both[0] == "supported" and both[1].startswith("Supported on every task. On gsm8k b5_cts revises 3.0")
    three = [good, *(dataclasses.replace(good, task=task) for task in ("mbpp", "code")), open_]
    assert "power: supported on gsm8k, mbpp and code, undecided on apps. On" in answer(three, FAMILY, {})[1]
    assert answer([good, open_], FAMILY, {})[0] == "undecided"
    assert answer([good, open_, bad], FAMILY, {})[0] == "not supported"
    assert re.fullmatch(
        r"Undecided at this power: supported on gsm8k and mbpp, undecided on apps\. On gsm8k b5_cts .*\)\. On apps"
        r" b5_cts .*1\.9\. On mbpp b5_cts .*\)\.",
        answer([good, open_, dataclasses.replace(good, task="mbpp")], FAMILY, {})[1],
    )
    assert answer([good, open_, bad], FAMILY, {})[1].startswith(
        "Not supported: supported on gsm8k, not supported on mbpp, undecided on apps. On gsm8k"
    )


def test_sentence_of_nothing_to_compare():
    assert answer([], Family(()), {}) == ("undecided", "Undecided: there is one arm alone, nothing to compare it with.")
    assert question(Family(())) == "What do these runs show?"
    assert question(FAMILY) == "Does b5_cts revise more flawed attempts to right ones than b3_grpo_verifier?"


def test_the_runs_of_a_known_truth_get_the_right_sentence(tasks):
    family = Family(((B5, B3),))
    assert answer(compare([tasks["gsm8k"]], family), family, {})[0] == "supported"
    assert answer(compare([tasks["apps"]], family), family, {})[0] == "undecided"


def test_plain_is_json_without_nan(tasks):
    found = plain({"a": math.nan, "b": compare([tasks["apps"]], Family(((B5, B3),))), "c": np.float64(1.5)})
    text = json.dumps(found, allow_nan=False)
    assert found["a"] is None and found["c"] == 1.5 and '"detectable"' in text and '"interval"' in text
