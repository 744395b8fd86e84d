"""How often the statistics of aggregate.py err, on results with a known truth; the figures of docs/statistics.md.

Two methods, the same seeds and problems. Outcomes are drawn with P(right) = sigmoid(problem + method on this problem +
effect + run), all normal; `run` is what two seeds of one method differ by. Where the effect is 0 both methods are the
same in all, so that the true difference is 0. Printed, for each number of seeds and size of runs' differences:

    type I    how often the test of aggregate.py finds a difference that is not there (nominal 5 %), and what other
              intervals do: bootstrap percentiles over seeds and problems, the same studentized, t over the seeds' means
              alone, problems alone
    power     how often it finds an effect of twice the minimum detectable one (mean over results without an effect)
    coverage  how often its interval holds that effect; n/a where accuracies leave no room for so large a one

and, at the level that the first of AMONG comparisons has under Holm's method (5 % / AMONG): type I, and the power at
the minimum detectable effect of that level, nominally 80 %.

    python benchmarks/claims.py                   (about eight minutes on 2 idle CPU cores)
    python benchmarks/claims.py --sims 300 --bootstraps 100
"""

import dataclasses
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.stats
import tyro

from common.statistics import ALPHA, draw_counts, estimate, replicates

MEAN, PROBLEMS_SD, METHOD_SD = -0.4, 3.0, 0.5  # logits: problems, and what a method has of its own on each of them
AMONG = 15  # comparisons, as sweeps/nano.yaml declares
OF_MANY, MDE_OF_MANY = f"type I of {AMONG}", f"MDE of {AMONG}"
SEEDS, RUN_SDS = (3, 4, 5, 6, 10), (0.0, 0.08, 0.16, 0.8)
REPLICATES, ROOM = 400, 0.95  # of a bootstrap; the highest accuracy that an effect may lead to


@dataclasses.dataclass(frozen=True)
class Args:
    sims: int = 4000
    """simulated results a setting"""
    bootstraps: int = 400
    """of these, how many are bootstrapped"""
    problems: int = 605
    """test problems, as fixtures_math has"""
    seed: int = 0
    """seed of the simulation"""


def draw(rng: np.random.Generator, S: int, N: int, run_sd: float, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes [S, N] of the method with the effect and of the other one."""
    problems_N = rng.normal(MEAN, PROBLEMS_SD, N)
    outcomes = []
    for shift in (effect, 0.0):
        logits_SN = problems_N + rng.normal(0, METHOD_SD, N) + shift + rng.normal(0, run_sd, (S, 1))
        outcomes.append((rng.random((S, N)) < 1 / (1 + np.exp(-logits_SN))).astype(float))
    return outcomes[0], outcomes[1]


def share_right(run_sd: float, effect: float) -> float:
    """Expected accuracy, over problems and runs."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    logits = MEAN + effect + math.sqrt(PROBLEMS_SD**2 + METHOD_SD**2 + run_sd**2) * nodes
    return float((weights / (1 + np.exp(-logits))).sum() / weights.sum())


def effect_of(points: float, run_sd: float) -> float:
    """The effect in logits whose true difference is so large (a share), by bisection."""
    low, high, none = 0.0, 20.0, share_right(run_sd, 0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_right(run_sd, middle) - none < points else (low, middle)
    return high


def studentized(D_SN: np.ndarray, seeds_RS: np.ndarray, problems_RN: np.ndarray) -> np.ndarray:
    """|mean - mean of D| / SE of the mean, of each replicate [R]; the SE is that of `estimate`, of the replicate."""
    (S, N), means_R = D_SN.shape, replicates(D_SN, seeds_RS, problems_RN)
    rows_RS, columns_RN = problems_RN @ D_SN.T / N, seeds_RS @ D_SN / S
    of_seeds = N * (seeds_RS * (rows_RS - means_R[:, None]) ** 2).sum(1)
    of_problems = S * (problems_RN * (columns_RN - means_R[:, None]) ** 2).sum(1)
    squares = ((seeds_RS @ D_SN**2) * problems_RN).sum(1) - S * N * means_R**2
    rest = np.maximum(squares - of_seeds - of_problems, 0) / ((S - 1) * (N - 1))
    a, b = of_seeds / (S - 1), of_problems / (N - 1)
    se_R = np.sqrt((rest + np.maximum(a - rest, 0) + np.maximum(b - rest, 0)) / (S * N))
    return abs(means_R - D_SN.mean()) / np.maximum(se_R, 1e-12)


def rejections(D_SN: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whether the other intervals find a difference: percentiles, studentized, t over seeds, problems alone."""
    (S, N), mean, found = D_SN.shape, abs(D_SN.mean()), estimate(D_SN)
    counts = draw_counts(rng, S, REPLICATES), draw_counts(rng, N, REPLICATES)
    low, high = np.quantile(replicates(D_SN, *counts), [ALPHA / 2, 1 - ALPHA / 2])
    t = np.quantile(studentized(D_SN, *counts), 1 - ALPHA)
    of_seeds = scipy.stats.t.ppf(1 - ALPHA / 2, S - 1) * D_SN.mean(1).std(ddof=1) / math.sqrt(S)
    of_problems = scipy.stats.norm.ppf(1 - ALPHA / 2) * D_SN.mean(0).std(ddof=1) / math.sqrt(N)
    return np.array([not low <= 0 <= high, mean > t * found.se, mean > of_seeds, mean > of_problems])


def null(rng: np.random.Generator, S: int, N: int, run_sd: float, sims: int, bootstraps: int) -> dict[str, float]:
    """Rates of false findings, the mean detectable effect, and the SD of a method's runs."""
    wrong, others, detectable, spread = [], [], [], []
    for i in range(sims):
        a_SN, b_SN = draw(rng, S, N, run_sd, 0.0)
        found = estimate(a_SN - b_SN)
        wrong.append((found.p <= ALPHA, found.p <= ALPHA / AMONG))
        detectable.append((found.detectable, found.detectable_at(ALPHA / AMONG)))
        spread.append(a_SN.mean(1).var(ddof=1))
        if i < bootstraps:
            others.append(rejections(a_SN - b_SN, rng))
    names = ("percentiles", "studentized", "t over seeds", "problems alone")
    rates = dict(zip(names, np.mean(others, axis=0))) if others else {}
    (one, among), (mde, far) = np.mean(wrong, axis=0), np.mean(detectable, axis=0)
    more = {OF_MANY: among, MDE_OF_MANY: far, "SD of runs": math.sqrt(np.mean(spread))}
    return {"type I": one, **rates, "MDE": mde, **more}


def alternative(
    rng: np.random.Generator, S: int, N: int, run_sd: float, sims: int, points: float, alpha: float = ALPHA
) -> dict[str, float]:
    """Power, at level `alpha`, and coverage where the true difference is so large (a share)."""
    effect, found, held = effect_of(points, run_sd), [], []
    for _ in range(sims):
        one = estimate(np.subtract(*draw(rng, S, N, run_sd, effect)))
        found.append(one.p <= alpha and one.mean > 0)
        held.append(one.interval[0] <= points <= one.interval[1])
    return {"power": np.mean(found), "coverage": np.mean(held)}


def main(args: Args) -> None:
    """One row a setting, in percent, as Markdown."""
    columns = ("SD of runs", "type I", "percentiles", "studentized", "t over seeds", "problems alone", "MDE", "power",
               "coverage", OF_MANY, MDE_OF_MANY, "power at it")  # fmt: skip
    print("| seeds | run, logits | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for run_sd in RUN_SDS:
        for S in SEEDS:
            rng = np.random.default_rng((args.seed, S, round(1000 * run_sd)))
            row = null(rng, S, args.problems, run_sd, args.sims, args.bootstraps)
            if share_right(run_sd, 0.0) + 2 * row["MDE"] < ROOM:
                row |= alternative(rng, S, args.problems, run_sd, args.sims, 2 * row["MDE"])
            if share_right(run_sd, 0.0) + row[MDE_OF_MANY] < ROOM:
                far = alternative(rng, S, args.problems, run_sd, args.sims, row[MDE_OF_MANY], ALPHA / AMONG)
                row["power at it"] = far["power"]
            digits = lambda name: 2 if name == OF_MANY else 1
            cells = " | ".join(f"{100 * row[name]:.{digits(name)}f}" if name in row else "n/a" for name in columns)
            print(f"| {S} | {run_sd:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
