"""What runs show: every measure of every arm with its interval, the declared comparisons, the answer in words.
Used by aggregate.py; knows no file format but the family's, and no statistics but those of common/statistics."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import yaml

from common.basics import InputError, sha256
from common.results import CREDIT, Task
from common.slips import KINDS
from common.statistics import (
    ALPHA,
    MOST_SEEDS,
    Estimate,
    bootstrap,
    estimate,
    holm,
    improvement,
    mcnemar,
    seeds_to_detect,
    wilcoxon,
    with_seeds,
)

METHOD = "b5_cts"  # whose claim it is, where no family says otherwise
SCORED = ("revised", "attempt", "delta_critique", "wrong_to_right", "right_to_wrong", "format")
RATES = (*SCORED, *KINDS)  # shown in percent
MEASURES = (*RATES, "tokens", *CREDIT)
GROUPED = ("revised", "attempt")  # measured by horizon, edit distance and tag too
Absent = dict[tuple[str, str, str], str]  # {(task, arm, arm it is compared with): why there is no comparison}
FAMILY_MEASURES = ("revised", "attempt", "delta_critique", "wrong_to_right", "format")  # of which more is better


@dataclasses.dataclass(frozen=True)
class Family:
    """The comparisons that were declared, first the primary one; which are (arm, arm that it is compared with). A
    sweep's file declares tasks and seeds too: to stop at a seed that suits one would be another experiment."""

    comparisons: tuple[tuple[str, str], ...]
    measure: str = "revised"
    margin: float = 1.0  # percentage points: the smallest advantage that would matter
    source: str = "default"
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        return "Comparisons of methods" if self.source == "default" else "The declared comparisons"

    @property
    def digest(self) -> str:
        return sha256(json.dumps([self.comparisons, self.measure, self.margin]))


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure of one arm in one group of problems; numbers in the measure's own unit, None where there is none."""

    task: str
    arm: str
    measure: str
    group: str
    seeds: int
    problems: int  # those in which every seed has a value
    mean: float | None
    sd: float | None  # of the runs' means
    low: float | None
    high: float | None
    effect: Estimate | None  # against the base arm, seeds and problems paired
    difference: float | None  # the same where one seed allows no estimate

    @property
    def against(self) -> dict[str, float | None]:
        low, high = self.effect.interval if self.effect else (None, None)
        return {"difference": self.difference, "low": low, "high": high, "p": self.effect.p if self.effect else None}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison of the family on one task. Effects in points of 100 where the measure is a rate."""

    task: str
    arm: str
    base: str
    difference: float
    found: Estimate | None  # None for one seed
    p_holm: float | None
    among: int  # comparisons that Holm's method counts: all of the family on all tasks, run or not
    percentile: tuple[float, float] | None
    wilcoxon: float
    mcnemar: dict[int, float]
    improvement: dict[str, float | None]
    seeds: list[int]
    problems: int
    verdict: str
    detectable: float | None  # at ALPHA / among, so that Holm's method cannot undo it
    seeds_needed: int | None  # to detect `target`; None: more problems are needed
    target: float
    least: float | None  # what MOST_SEEDS seeds could detect


# ---- the family -----------------------------------------------------------------------------------------------------
def default_family(tasks: list[Task], base: str) -> Family:
    """Every arm against `base`; METHOD's comparison is the primary one, without it that of the last arm by name. No
    comparison for one arm alone."""
    arms = sorted({arm for task in tasks for arm in task.arms})
    arms = [arm for arm in arms if arm != base] if len(arms) > 1 else []
    first = [METHOD] if METHOD in arms else arms[-1:]
    return Family(tuple((arm, base) for arm in [*first, *(arm for arm in arms if arm not in first)]))


def read_family(path: str) -> Family:
    """The family that a file declares: a YAML or JSON object, or a sweep file with such an object in a comment line.

    # family: {primary: [b5_cts, b3_grpo_verifier], others: [[b4_grpo_critique, b3_grpo_verifier]], margin: 1.0}
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        line = re.search(r"^# family:(.*)$", text, re.MULTILINE)
        given = yaml.safe_load(line[1] if line else text)
        sweep = yaml.safe_load(text) if line else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"--family {path}: cannot be read ({' '.join(str(e).split())[:120]})") from None

    def need(ok: bool, field: str, what: str) -> None:
        if not ok:
            raise InputError(f"--family {path}: field {field!r} {what}")

    need(isinstance(given, dict) and "primary" in given, "primary", "is missing: [arm, arm it is compared with]")
    unknown = sorted(set(given) - {"primary", "others", "measure", "margin"})
    need(not unknown, ", ".join(unknown), "is unknown; there are primary, others, measure, margin")
    others = given.get("others", [])
    need(isinstance(others, list), "others", "must be a list of pairs")
    pairs = [given["primary"], *others]
    for pair in pairs:
        names = isinstance(pair, list) and len(pair) == 2 and all(isinstance(arm, str) for arm in pair)
        field = "primary" if pair is pairs[0] else "others"
        need(names and pair[0] != pair[1], field, f"has {pair}, which is no pair of two arms")
    need(len({tuple(pair) for pair in pairs}) == len(pairs), "others", "has a comparison twice")
    measure, margin = given.get("measure", "revised"), given.get("margin", 1.0)
    need(measure in FAMILY_MEASURES, "measure", f"must be one of {', '.join(FAMILY_MEASURES)}")
    need(type(margin) in (int, float) and 0 < margin < 100, "margin", "must be percentage points above 0")
    tasks, seeds = (grid_values(sweep, name) for name in ("task", "seed"))
    return Family(tuple(tuple(pair) for pair in pairs), measure, float(margin), pathlib.Path(path).name, tasks, seeds)


def grid_values(sweep: Any, name: str) -> tuple:
    """What a sweep, as read from its file, gives to a parameter; empty where it has none.

    >>> grid_values({"parameters": {"seed": {"values": [0, 1]}, "task": {"value": "gsm8k"}}}, "task")
    ('gsm8k',)
    """
    try:
        given = sweep["parameters"][name]
        return tuple(given.get("values", [*given.values()]))
    except (KeyError, TypeError, AttributeError):
        return ()


# ---- measures -------------------------------------------------------------------------------------------------------
def complete(*arrays: np.ndarray) -> np.ndarray:
    """Which problems [N] have a value in every run."""
    return np.logical_and.reduce([~np.isnan(a).any(0) for a in arrays])


def measure_row(task: Task, arm: str, base: str | None, measure: str, group: str) -> Row:
    """A measure of an arm, over its seeds and the problems of a group."""
    inside = np.ones(len(task.first.ids), bool) if group == "all" else task.first.groups[group]
    a_SN = task.scores(arm, measure, task.seeds(arm))
    a_SN = a_SN[:, complete(a_SN) & inside]
    mean = sd = low = high = effect = difference = None
    if a_SN.shape[1]:
        mean = float(a_SN.mean())
        sd = float(a_SN.mean(1).std(ddof=1)) if len(a_SN) > 1 else None
        own = estimate(a_SN)
        low, high = own.interval if own else (None, None)
    both = task.seeds(arm, base) if base in task.arms and arm != base else []
    if both:
        x_SN, y_SN = (task.scores(name, measure, both) for name in (arm, base))
        D_SN = (x_SN - y_SN)[:, complete(x_SN, y_SN) & inside]
        if D_SN.shape[1]:
            effect, difference = estimate(D_SN), float(D_SN.mean())
    return Row(task.name, arm, measure, group, *a_SN.shape, mean, sd, low, high, effect, difference)


def measure_all(tasks: list[Task], base: str | None) -> list[Row]:
    """Every measure of every arm, of all problems and, of GROUPED ones, by group."""
    return [
        measure_row(task, arm, base, measure, group)
        for task in tasks
        for arm in task.arms
        for measure in MEASURES
        for group in ("all", *(task.first.groups if measure in GROUPED else ()))
    ]


# ---- comparisons ----------------------------------------------------------------------------------------------------
def judge(found: Estimate | None, p_holm: float | None, margin: float) -> str:
    """supported: better, also after Holm. not supported: worse after Holm, or an advantage of `margin` is ruled out.
    undecided: everything else."""
    if found is None:
        return "undecided"
    if p_holm <= ALPHA:
        return "supported" if found.mean > 0 else "not supported"
    return "not supported" if found.interval[1] < margin else "undecided"


def scaled(found: Estimate | None, by: float) -> Estimate | None:
    """An estimate in another unit."""
    if found is None:
        return None
    parts, squares = (tuple(value * by**2 for value in values) for values in (found.parts, found.squares))
    return dataclasses.replace(found, mean=found.mean * by, se=found.se * by, squares=squares, parts=parts)


def not_compared(tasks: list[Task], family: Family) -> Absent:
    """The comparisons of the family that these runs do not allow."""
    lost = [name for name in family.tasks if name not in {task.name for task in tasks}]
    why: Absent = {(name, *pair): "no runs" for name in lost for pair in family.comparisons}
    for task in tasks:
        for arm, base in family.comparisons:
            lacks = [name for name in (arm, base) if name not in task.arms]
            if lacks:
                why[task.name, arm, base] = f"no runs of {' and '.join(map(repr, lacks))}"
            elif not task.seeds(arm, base):
                why[task.name, arm, base] = f"{arm} and {base} share no 'seed'"
            elif not complete(*(task.scores(a, family.measure, task.seeds(arm, base)) for a in (arm, base))).any():
                why[task.name, arm, base] = f"no problem has {family.measure!r} in {arm} and {base}"
    return why


def compare(tasks: list[Task], family: Family, allow_partial: bool = False) -> list[Comparison]:
    """The comparisons of the family on every task, Holm over all of them together: one that cannot be made, or not be
    tested for want of seeds, counts as one that shows nothing. InputError if one cannot be made, with `allow_partial`
    if none can."""
    absent, rows = not_compared(tasks, family), []
    arms = {task.name: f"there are {', '.join(task.arms)}" for task in tasks}
    if absent and (not allow_partial or len(absent) == len({*arms, *family.tasks}) * len(family.comparisons)):
        (name, *_), why = next(iter(absent.items()))
        way_out = "run what is missing" + ("" if allow_partial else ", or --allow_partial compares the rest")
        raise InputError(f"{name}: {why}; {arms.get(name, f'{family.source} declares it')}; {way_out}")
    for task in tasks:
        for arm, base in family.comparisons:
            if (task.name, arm, base) not in absent:
                seeds = task.seeds(arm, base)
                a_SN, b_SN = (task.scores(name, family.measure, seeds) for name in (arm, base))
                known = complete(a_SN, b_SN)
                rows.append((task, arm, base, seeds, a_SN[:, known], b_SN[:, known]))
    found = [scaled(estimate(a - b), 100) for *_, a, b in rows]
    p = [*(one.p if one else 1.0 for one in found), *(1.0 for _ in absent)]
    adjusted = [q if one else None for one, q in zip(found, holm(p))]
    out, among, alpha = [], len(p), ALPHA / max(1, len(p))
    for i, (task, arm, base, seeds, a_SN, b_SN) in enumerate(rows):
        D_SN, one, interval = a_SN - b_SN, found[i], bootstrap(a_SN - b_SN)
        difference = 100 * float(D_SN.mean())
        target = max(abs(difference), family.margin)
        out.append(Comparison(
            task.name, arm, base, difference, one, adjusted[i], among, interval and tuple(100 * v for v in interval),
            wilcoxon(D_SN), {seed: mcnemar(a, b) for seed, a, b in zip(seeds, a_SN, b_SN)}, improvement(a_SN, b_SN),
            seeds, D_SN.shape[1], judge(one, adjusted[i], family.margin),
            one and one.detectable_at(alpha), one and seeds_to_detect(one, target, alpha), target,
            one and with_seeds(one, MOST_SEEDS, alpha),
        ))  # fmt: skip
    return out


# ---- the sentence ---------------------------------------------------------------------------------------------------
VERBS = {"revised": "revises", "attempt": "solves at first", "delta_critique": "gains from critiques",
         "wrong_to_right": "repairs", "format": "forms well"}  # fmt: skip


def largest_effect(family: Family) -> float:
    """In points: no difference is above it."""
    return 200.0 if family.measure == "delta_critique" else 100.0


def what_would_decide(c: Comparison, family: Family) -> str:
    """How many seeds would decide an open comparison."""
    if c.found is None:
        return "one seed says nothing of runs: two seeds at least, better five"
    some = f"an effect of {c.detectable:.1f} points" if c.detectable <= largest_effect(family) else "no effect"
    could = f"{some} would be found in 80 % of repetitions"
    if c.seeds_needed is None:
        return (
            f"{could}; no number of seeds finds one of {c.target:.1f} with {c.problems:,} problems (the least is"
            f" {c.least:.1f}): more problems are needed"
        )
    return f"{could}, and about {max(c.seeds_needed, len(c.seeds) + 1)} seeds would find one of {c.target:.1f}"


def say_comparison(c: Comparison, family: Family) -> str:
    """One comparison in words."""
    more = "more" if c.difference >= 0 else "fewer"
    text = f"on {c.task} {c.arm} {VERBS[family.measure]} {abs(c.difference):.1f} points {more} than {c.base}"
    early = f" of {len(family.seeds)} declared" if {*family.seeds} - {*c.seeds} else ""  # somebody looks before the end
    size = f"{len(c.seeds)}{early} seed{'s' * (len(c.seeds) > 1 or bool(early))}, {c.problems:,} problems"
    if c.found is None:
        return f"{text} ({size}); {what_would_decide(c, family)}"
    low, high = c.found.interval
    text += f" (95 % interval {low:+.1f} to {high:+.1f}, p = {c.p_holm:.2g} after Holm over {c.among}, {size})"
    if c.verdict == "undecided":
        return f"{text}; {what_would_decide(c, family)}"
    if c.verdict == "not supported" and c.p_holm > ALPHA:
        return f"{text}; an advantage of {family.margin:g} point{'s' * (family.margin != 1)} is ruled out"
    return text


def answer(comparisons: list[Comparison], family: Family, absent: Absent) -> tuple[str, str]:
    """(verdict, answer) of the primary comparison: supported if on every task it is, not supported if on one it is not,
    else undecided. The answer is one sentence; of several tasks the first says which verdict each has, then one each
    has the numbers."""
    if not family.comparisons:
        return "undecided", "Undecided: there is one arm alone, nothing to compare it with."
    first = family.comparisons[0]
    primary = [c for c in comparisons if (c.arm, c.base) == first]
    lacks = [f"on {task} nothing: {why}" for (task, *pair), why in absent.items() if tuple(pair) == first]
    verdicts = {c.verdict for c in primary} | {"undecided" for _ in lacks}
    whole = "not supported" if "not supported" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    head = "Undecided at this power" if primary and whole == "undecided" else whole.capitalize()
    parts = [*(say_comparison(c, family) for c in primary), *lacks]
    if len(parts) < 2:
        return whole, f"{head}: {''.join(parts)}."
    by_verdict = {v: [c.task for c in primary if c.verdict == v] for v in ("supported", "not supported", "undecided")}
    by_verdict["undecided"] += [task for task, *pair in absent if tuple(pair) == first]
    listed = lambda tasks: " and ".join([", ".join(tasks[:-1]), tasks[-1]]) if tasks[1:] else tasks[0]
    which = ", ".join(f"{v} on {listed(tasks)}" for v, tasks in by_verdict.items() if tasks)
    each = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)
    return whole, f"{head}{' on every task' if len(verdicts) == 1 else f': {which}'}. {each}"


def question(family: Family) -> str:
    """What the primary comparison asks."""
    if not family.comparisons:
        return "What do these runs show?"
    arm, base = family.comparisons[0]
    what = {
        "revised": "revise more flawed attempts to right ones", "attempt": "solve more problems at first",
        "delta_critique": "gain more from critiques", "wrong_to_right": "repair more wrong attempts",
        "format": "write more well-formed answers",
    }[family.measure]  # fmt: skip
    return f"Does {arm} {what} than {base}?"


def plain(value: Any) -> Any:
    """Numbers, lists and objects for JSON: no NaN, no arrays, estimates with what follows from them."""
    if isinstance(value, Estimate):
        parts = {"interval": value.interval, "p": value.p, "detectable": value.detectable}
        return plain({**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, **parts})
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
