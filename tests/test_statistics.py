"""Statistics against statsmodels and SciPy, by hand, and by simulation.

The constants are of SciPy 1.17.1 and statsmodels 0.15.0 (in an environment of their own), with A and B as below:

    statsmodels.stats.contingency_tables.mcnemar([[0, n10], [n01, 0]], exact=True).pvalue
    statsmodels.stats.multitest.multipletests([.01, .04, .03, .005, .9, .04], method="holm")[1]
    scipy.stats.wilcoxon((A - B).mean(0).round(12)).pvalue
    statsmodels.stats.anova.anova_lm(ols("y ~ C(s) + C(n)", table_of(A - B)).fit(), typ=1)["mean_sq"]
    scipy.stats.bootstrap(((A - B).mean(0),), np.mean, n_resamples=200, method="percentile", rng=default_rng(3))

pytest tests/test_statistics.py
"""

import math

import numpy as np
import pytest
import scipy.stats

from benchmarks.claims import alternative, draw, null, share_right
from common.statistics import (
    FEW_SEEDS,
    MOST_SEEDS,
    bootstrap,
    combine,
    detectable,
    draw_counts,
    estimate,
    holm,
    improvement,
    mcnemar,
    mean_squares,
    percentiles,
    replicates,
    seeds_to_detect,
    wilcoxon,
    with_seeds,
)

RNG = np.random.default_rng(7)
A = (RNG.random((4, 40)) < 0.6).astype(float)
B = (RNG.random((4, 40)) < 0.45).astype(float)
D = A - B
near = lambda value: pytest.approx(value, abs=1e-9, rel=0)


# ---- constants ------------------------------------------------------------------------------------------------------
def test_mcnemar_is_that_of_statsmodels():
    assert [mcnemar(A[s], B[s]) for s in (0, 1)] == near([0.11531829833984375, 0.10775214433670044])


def test_mcnemar_of_runs_that_never_differ_is_1():
    assert mcnemar(A[0], A[0]) == 1.0


def test_mcnemar_of_other_scores_is_the_sign_test():
    """One method keeps six right attempts right (0), the other breaks them (-1): 2 / 2^6."""
    assert mcnemar(np.zeros(6), -np.ones(6)) == near(0.03125)
    assert mcnemar(np.array([0.5, 1.0, 0.2]), np.array([0.25, 0.0, 0.2])) == near(0.5)


def test_holm_is_that_of_statsmodels():
    assert holm([0.01, 0.04, 0.03, 0.005, 0.9, 0.04]) == near([0.05, 0.12, 0.12, 0.03, 0.9, 0.12])
    assert holm([]) == []


def test_wilcoxon_is_that_of_scipy():
    assert wilcoxon(D) == near(0.005338777613148037)
    assert wilcoxon(np.zeros((3, 5))) == 1.0


def test_mean_squares_are_those_of_an_analysis_of_variance():
    assert mean_squares(D) == near((0.2562499999999999, 0.4536858974358974, 0.5297542735042735))


def test_bootstrap_over_problems_is_that_of_scipy_on_the_same_draws():
    """SciPy draws indices; one seed leaves problems alone to be drawn."""
    index = np.random.default_rng(3).integers(0, 40, (200, 40))
    counts = np.stack([np.bincount(row, minlength=40) for row in index]).astype(float)
    values = replicates(D.mean(0, keepdims=True), np.ones((200, 1)), counts)
    assert values.sum() == near(33.675)
    assert percentiles(values) == near((0.06843750000000007, 0.2625))


def test_replicates_are_means_over_drawn_seeds_and_problems():
    rng = np.random.default_rng(0)
    seeds, problems = rng.integers(0, 4, (30, 4)), rng.integers(0, 40, (30, 40))
    count = lambda index, n: np.stack([np.bincount(row, minlength=n) for row in index]).astype(float)
    slow = [D[s][:, n].mean() for s, n in zip(seeds, problems)]
    assert replicates(D, count(seeds, 4), count(problems, 40)) == near(np.array(slow))


def test_counts_are_draws_with_replacement():
    counts = draw_counts(np.random.default_rng(0), 5, 4000)
    assert (counts.sum(1) == 5).all()
    assert counts.var() == pytest.approx(5 * 0.2 * 0.8, rel=0.05)


# ---- the estimate ---------------------------------------------------------------------------------------------------
def test_runs_that_differ_much_make_it_the_t_test_over_seeds():
    """Where the seeds' spread is all there is, SE and p are those of a t-test on the runs' means."""
    shifted = np.array([0.0, 1.0, 5.0, -2.0, 3.0])[:, None] + np.zeros((5, 50))
    found = estimate(shifted)
    assert found.df == near(4.0)
    assert found.p == near(scipy.stats.ttest_1samp(shifted.mean(1), 0).pvalue)
    assert found.parts == near((found.se**2, 0.0, 0.0))


def test_runs_that_are_all_the_same_make_it_the_t_test_over_problems():
    found = estimate(np.repeat(D[:1], 6, 0))
    assert found.df == near(39.0)
    assert found.p == near(scipy.stats.ttest_1samp(D[0], 0).pvalue)
    assert found.parts[1] == near(found.se**2)


def test_parts_and_interval_add_up():
    found = estimate(D)
    assert sum(found.parts) == near(found.se**2)
    low, high = found.interval
    assert (low + high) / 2 == near(D.mean()) and (high - low) / 2 == near(found.half)
    assert (found.p < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("shape", [(1, 40), (3, 1)])
def test_one_seed_or_one_problem_has_no_estimate(shape):
    assert estimate(np.ones(shape)) is None


def test_one_seed_has_no_bootstrap():
    assert bootstrap(D[:1]) is None


def test_methods_that_do_the_same_have_no_error_and_p_1():
    found = estimate(np.zeros((3, 10)))
    assert (found.mean, found.se, found.p, found.half) == (0.0, 0.0, 1.0, 0.0)
    assert estimate(np.ones((3, 10))).p == 0.0
    assert [estimate(np.full((3, 60), value)).se for value in (0.55, 0.2, 0.97)] == [0.0] * 3  # no rounding either


def test_few_seeds_pay_for_a_mean_square_that_is_small_by_chance():
    small, rest = 0.5, 1.0
    few, many = (combine(small, rest, rest, S, 100) for S in (FEW_SEEDS - 1, FEW_SEEDS))
    assert few[1] < 30 < many[1]
    assert combine(small, rest, rest, 2, 100)[1] == pytest.approx(1.0, rel=0.05)


def test_a_bootstrap_interval_holds_the_mean_and_is_the_same_every_time():
    low, high = bootstrap(D)
    assert low < D.mean() < high
    assert bootstrap(D) == (low, high) != bootstrap(D, seed=1)


# ---- what could have been detected ----------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 15])
@pytest.mark.parametrize("df", [2, 3.6, 20, 1e6])
def test_detectable_effect_has_the_power_of_the_noncentral_t(df, alpha):
    """By another function of SciPy; the sum of the two quantiles, in use elsewhere, has 0.67 with two degrees of
    freedom and fifteen comparisons."""
    t = scipy.stats.nct(df, detectable(1.0, df, alpha))
    assert t.sf(scipy.stats.t.ppf(1 - alpha / 2, df)) == pytest.approx(0.80, abs=1e-5)


def test_mean_squares_that_are_the_same_but_for_rounding_count_as_the_same():
    assert combine(2.0, 1.0 + 1e-14, 1.0, 4, 50)[1] == pytest.approx(combine(2.0, 1.0, 1.0, 4, 50)[1])
    assert combine(1.0 + 1e-14, 3.0, 1.0, 6, 50)[1] == pytest.approx(combine(1.0, 3.0, 1.0, 6, 50)[1])


def test_more_seeds_detect_less_and_the_same_seeds_the_same():
    found = estimate(D + np.array([0.3, -0.3, 0.2, -0.2])[:, None])
    assert with_seeds(found, 4, 0.05) == pytest.approx(found.detectable, rel=1e-6)
    assert with_seeds(found, 3, 0.05) > with_seeds(found, 8, 0.05) > with_seeds(found, 100, 0.05)
    assert with_seeds(found, 8, 0.01) > with_seeds(found, 8, 0.05)


def test_seeds_to_detect_is_the_smallest_number_that_does():
    found = estimate(D + np.array([0.3, -0.3, 0.2, -0.2])[:, None])
    target = with_seeds(found, 9, 0.05)
    assert seeds_to_detect(found, target, 0.05) == 9 == seeds_to_detect(found, -target, 0.05)


def test_where_problems_are_too_few_no_number_of_seeds_is_enough():
    found = estimate(np.repeat(D[:1], 6, 0) + 0.01 * RNG.random((6, 40)))
    assert seeds_to_detect(found, 0.5 * with_seeds(found, MOST_SEEDS, 0.05), 0.05) is None


# ---- probability of improvement -------------------------------------------------------------------------------------
def test_improvement_is_that_of_mann_whitney():
    a, b = A.mean(1), B.mean(1)
    assert improvement(A, B)["share"] == near(scipy.stats.mannwhitneyu(a, b).statistic / 16)
    assert improvement(A, A)["share"] == 0.5


def test_improvement_has_an_interval_from_two_seeds_on():
    found = improvement(A, B)
    assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
    assert improvement(A + 1, B)["low"] == 1.0
    assert improvement(A[:1], B[:1])["low"] is None


# ---- a known truth, in small (benchmarks/claims.py has it in large) --------------------------------------------------
@pytest.mark.parametrize("S", [3, 5, 10])
def test_a_difference_that_is_not_there_is_rarely_found(S):
    """At most 7 %, with the error of 500 simulations on top."""
    found = null(np.random.default_rng(S), S, 300, 0.1, sims=500, bootstraps=0)
    assert 0.003 < found["type I"] < 0.07 + 2 * math.sqrt(0.07 * 0.93 / 500)


def test_twice_the_detectable_effect_is_found_and_covered():
    rng = np.random.default_rng(0)
    points = 2 * null(rng, 5, 300, 0.1, sims=200, bootstraps=0)["MDE"]
    found = alternative(rng, 5, 300, 0.1, sims=400, points=points)
    assert found["power"] > 0.9
    assert 0.93 - 0.025 < found["coverage"] < 0.97 + 0.02


def test_runs_that_differ_make_the_other_intervals_err():
    """Why they are not used: percentiles and problems alone, with three seeds that differ by 8 points."""
    found = null(np.random.default_rng(0), 3, 300, 0.8, sims=50, bootstraps=50)
    assert found["type I"] < 0.15 < found["percentiles"] < found["problems alone"]


def test_the_simulation_has_the_accuracy_that_it_says():
    a_SN, b_SN = draw(np.random.default_rng(0), 20, 4000, 0.5, 1.0)
    assert a_SN.mean() == pytest.approx(share_right(0.5, 1.0), abs=0.03)
    assert b_SN.mean() == pytest.approx(share_right(0.5, 0.0), abs=0.03)
