"""Statistics of a difference between two methods that were run with the same seeds on the same problems: its interval
and p-value, what it could have detected, and the classical tests beside it. NumPy and SciPy only. Used by claims and by
benchmarks/claims.py; knows no method and reads no file.

D [S, N] is how much better one method does than the other on problem n with seed s. Seeds and problems are samples:

    D_sn = effect + seed_s + problem_n + rest_sn,     Var(mean D) = var_seed / S + var_problem / N + var_rest / (S N)

The three variances come from the mean squares of the two-way table, and the decision from t = mean D / SE with
Satterthwaite's degrees of freedom. Why that and not the percentiles of a bootstrap: docs/statistics.md.
"""

import dataclasses
import math

import numpy as np
import scipy.special
import scipy.stats

ALPHA, POWER = 0.05, 0.80  # of tests, 1 - ALPHA of intervals; of the minimum detectable effect
FEW_SEEDS = 5  # with fewer, a mean square of seeds that is small by chance still costs degrees of freedom
MOST_SEEDS = 1000  # nobody runs more
ROUNDING = 1e-20  # mean squares of less are those of a constant
ABOVE = 1 + 1e-9  # times the rest: mean squares that are as large as it but for rounding are not above it
REPLICATES = 4000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and problems; in the unit of the scores."""

    mean: float
    se: float
    df: float
    parts: tuple[float, float, float]  # of se squared: what more seeds, more problems, and either of them would shrink
    squares: tuple[float, float, float]  # mean squares of seeds, problems, rest
    seeds: int
    problems: int

    @property
    def half(self) -> float:
        """Half the length of the interval."""
        return float(scipy.stats.t.ppf(1 - ALPHA / 2, self.df)) * self.se

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half, self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided; 1 where both methods did the same everywhere."""
        if self.se == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * scipy.stats.t.sf(abs(self.mean) / self.se, self.df))

    @property
    def detectable(self) -> float:
        """`detectable_at` ALPHA."""
        return self.detectable_at(ALPHA)

    def detectable_at(self, alpha: float) -> float:
        """Minimum detectable effect: a true one of this size is found in POWER of all repetitions, by this test."""
        return detectable(self.se, self.df, alpha)


def detectable(se: float, df: float, alpha: float) -> float:
    """The effect that a two-sided t-test at level `alpha` finds, on its side, with probability POWER: where there is
    one, the test's t is a noncentral one."""
    critical = scipy.stats.t.ppf(1 - alpha / 2, df)
    return float(scipy.special.nctdtrinc(df, 1 - POWER, critical)) * se


# ---- the two-way table ----------------------------------------------------------------------------------------------
def mean_squares(D_SN: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, of problems, and of the rest. Expected: N var_seed + var_rest, S var_problem + var_rest,
    var_rest.

    >>> mean_squares(np.array([[0.0, 1.0], [1.0, 4.0]]))
    (4.0, 4.0, 1.0)
    """
    (S, N), mean = D_SN.shape, D_SN.mean()
    seeds = N * ((D_SN.mean(1) - mean) ** 2).sum()
    problems = S * ((D_SN.mean(0) - mean) ** 2).sum()
    rest = max(0.0, ((D_SN - mean) ** 2).sum() - seeds - problems)
    return float(seeds / (S - 1)), float(problems / (N - 1)), float(rest / ((S - 1) * (N - 1)))


def combine(a: float, b: float, rest: float, S: int, N: int) -> tuple[float, float, tuple[float, float, float]]:
    """(se, df, parts of se squared) of the mean, from the mean squares a of seeds, b of problems and of the rest.

    S N Var = a + b - rest, with both differences at least 0: a variance that comes out negative is 0. Its mean square
    then takes no part in Satterthwaite's degrees of freedom, but for few seeds, whose mean square tells too little:
    there it takes part, and that of two seeds counts as no less than the rest.
    """
    seed, problem = max(a - rest, 0.0), max(b - rest, 0.0)
    total = seed + problem + rest
    if total == 0:
        return 0.0, float(S - 1), (0.0, 0.0, 0.0)
    kept = max(a, rest) if S == 2 else a if S < FEW_SEEDS or a > rest * ABOVE else 0.0
    spread = kept**2 / (S - 1) + (b > rest * ABOVE) * b**2 / (N - 1) + rest**2 / ((S - 1) * (N - 1))
    df = max(total**2 / spread, S - 1.0)
    return math.sqrt(total / (S * N)), df, (seed / (S * N), problem / (S * N), rest / (S * N))


def estimate(D_SN: np.ndarray) -> Estimate | None:
    """Mean of D with its error over seeds and problems; None for fewer than two seeds or two problems."""
    S, N = D_SN.shape
    if S < 2 or N < 2:
        return None
    mean = float(D_SN.mean())
    squares = tuple(0.0 if square < ROUNDING * max(1.0, mean**2) else square for square in mean_squares(D_SN))
    return Estimate(mean, *combine(*squares, S, N), squares, S, N)


def with_seeds(found: Estimate, S: int, alpha: float) -> float:
    """The minimum detectable effect at level `alpha` with S seeds on as many problems, if the variances are what was
    found."""
    a, b, rest = found.squares
    var_seed = max(a - rest, 0.0) / found.problems
    var_problem = max(b - rest, 0.0) / found.seeds
    se, df, *_ = combine(found.problems * var_seed + rest, S * var_problem + rest, rest, S, found.problems)
    return detectable(se, df, alpha)


def seeds_to_detect(found: Estimate, effect: float, alpha: float) -> int | None:
    """The smallest number of seeds with which `effect` could be detected; None if MOST_SEEDS do not do: it is problems
    that are too few."""
    enough = lambda S: with_seeds(found, S, alpha) <= abs(effect)
    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # one seed is never enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# ---- the hierarchical bootstrap -------------------------------------------------------------------------------------
def draw_counts(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """How often each of n things was drawn in each replicate [replicates, n]: n draws with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), replicates).astype(float)


def replicates(D_SN: np.ndarray, seeds_RS: np.ndarray, problems_RN: np.ndarray) -> np.ndarray:
    """Means [R] of D with seeds and problems drawn so often; both together, so that pairs stay pairs."""
    S, N = D_SN.shape
    return ((seeds_RS @ D_SN) * problems_RN).sum(1) / (S * N)


def percentiles(values_R: np.ndarray) -> tuple[float, float]:
    """The middle 1 - ALPHA of replicates."""
    low, high = np.quantile(values_R, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def bootstrap(D_SN: np.ndarray, seed: int = 0, n: int = REPLICATES) -> tuple[float, float] | None:
    """Percentile interval of the paired bootstrap over seeds and problems; None for fewer than two seeds."""
    if len(D_SN) < 2:
        return None
    rng = np.random.default_rng(seed)
    return percentiles(replicates(D_SN, draw_counts(rng, len(D_SN), n), draw_counts(rng, D_SN.shape[1], n)))


def improvement(a_SN: np.ndarray, b_SN: np.ndarray, seed: int = 0, n: int = REPLICATES) -> dict[str, float | None]:
    """Probability of improvement as in rliable (https://arxiv.org/abs/2108.13264): of all pairs of a run of a and one
    of b, the share in which a's mean is higher, ties counting half. Its interval draws the runs of a and of b apart,
    the problems for both at once; none for fewer than two seeds.

    >>> improvement(np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]]))["share"]
    1.0
    """

    def share(a, b):  # [..., S] means of runs
        ahead = a[..., :, None] - b[..., None, :]
        return ((ahead > 1e-12) + 0.5 * (abs(ahead) <= 1e-12)).mean((-1, -2))

    found = {"share": float(share(a_SN.mean(1), b_SN.mean(1))), "low": None, "high": None}
    if min(len(a_SN), len(b_SN)) > 1:
        rng, N = np.random.default_rng(seed), a_SN.shape[1]
        problems_RN = draw_counts(rng, N, n)
        a_RS, b_RS = problems_RN @ a_SN.T / N, problems_RN @ b_SN.T / N
        pick = lambda rows: np.take_along_axis(rows, rng.integers(0, rows.shape[1], rows.shape), 1)
        found["low"], found["high"] = percentiles(share(pick(a_RS), pick(b_RS)))
    return found


# ---- classical tests ------------------------------------------------------------------------------------------------
def mcnemar(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test on right and wrong answers of two runs, of other scores of the sign test on
    which is higher; 1 where they never differ.

    >>> mcnemar(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0]))
    0.25
    """
    only_a, only_b = int((a_N > b_N).sum()), int((a_N < b_N).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(scipy.stats.binomtest(min(only_a, only_b), only_a + only_b, 0.5).pvalue)


def wilcoxon(D_SN: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on the problems' means over seeds, those without a difference left
    out; 1 where there is none. It knows the problems' spread alone: a run that came out well counts as the method's."""
    means = D_SN.mean(0).round(12)
    return float(scipy.stats.wilcoxon(means).pvalue) if means.any() else 1.0


def holm(p: list[float]) -> list[float]:
    """p-values adjusted by Holm's method: at most alpha says that a test stands among all of them.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    scaled = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p, float)[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(scaled, 1.0)
    return adjusted.tolist()
