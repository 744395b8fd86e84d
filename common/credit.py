"""Measures of credit, each beside what it would be without any: where on a flawed attempt training moved the policy,
how far first attempts hold, which kinds of steps fail. NumPy and SciPy only. Used by the evaluation; knows no model and
no method.

Let s_t = log pi(y0_t) - log pi_base(y0_t) be the shift of token t of a flawed attempt. Sharpening alone moves it (what
the base finds unlikely becomes unlikelier, and errors are unlikely), so it is measured from the temperature of the base
that fits the policy best, one for all attempts:

    e_t = s_t - [log pi_base^(1/T*)(y0_t) - log pi_base(y0_t)],   pi_base^k = pi_base to the power k, normalised,

where T* is that of the least squares of e over sound tokens (those of steps that the critique does not flag), each
place (step of so many steps) and kind of token (digits, others) with a mean of its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from common.basics import mean
from common.replay import Quadruple
from common.slips import KINDS, PLANTED, step_kinds
from common.tokenizer import Tokenizer
from common.verifier import first_wrong_step, split_steps

LOG_POWERS = np.round(1.1 * np.cos(np.pi * np.arange(17) / 16), 9)  # log 1/T at Chebyshev's nodes: T from 1/3 to 3
POWERS = tuple(np.exp(LOG_POWERS).tolist())  # the one in the middle is 1 exactly
RESOLUTION = 1e-2  # nats, that e is rounded to: what is left of a temperature is no order
NOTHING = dict.fromkeys((
    "credit_matched", "credit_null", "credit_excess", "credit_temperature", "flip_gain", "value_correlation",
    "value_excess",
))  # fmt: skip  # what is known of an attempt in which nothing is flagged


@dataclasses.dataclass(frozen=True)
class AttemptRead:
    """What a policy says of one flawed attempt of T tokens after its attempt prompt."""

    ids: list[int]
    logp: np.ndarray  # [T], of the attempt's tokens
    other: np.ndarray  # [T], another token beside each: the base's likeliest of its kind; where y0 and y1 part, y1's
    other_logp: np.ndarray
    norm: np.ndarray  # [T, K], log sum_v p_v^k for the POWERS k


# ---- numbers --------------------------------------------------------------------------------------------------------
def detector_auc(score_T: np.ndarray, label_T: np.ndarray) -> float | None:
    """Probability that a labelled position scores above an unlabelled one, ties counting half; None without both kinds.

    >>> detector_auc(np.array([3.0, 1.0, 1.0]), np.array([1, 0, 1]))
    0.75
    """
    hit, miss = score_T[label_T > 0], score_T[label_T == 0]
    if not len(hit) or not len(miss):
        return None
    diff = hit[:, None] - miss[None, :]
    return float((diff > 0).mean() + 0.5 * (diff == 0).mean())


def standard_error(values) -> float | None:
    """Standard error of the mean of the values that are not None; None for fewer than two."""
    values = [v for v in values if v is not None]
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


# ---- where tokens stand ---------------------------------------------------------------------------------------------
def digit_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The kind of each token [V], int32: 1 where it holds a digit, else 0."""
    return np.array([any(48 <= byte < 58 for byte in token) for token in tokenizer.bytes_V], np.int32)


def parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two token lists differ; None where one only continues the other.

    >>> parting([1, 2, 3], [1, 5, 3]), parting([1, 2], [1, 2, 3])
    (1, None)
    """
    return next((t for t, (u, v) in enumerate(zip(a, b)) if u != v), None)


def step_of_tokens(tokenizer: Tokenizer, ids: list[int], text: str) -> np.ndarray:
    """The step that each token of `text` belongs to [T], -1 for white space between steps.

    "2+3\\n#### 5" in tokens "2", "+", "3", "\\n", "####", " 5": [0, 0, 0, -1, 1, 1].
    """
    on_JT = tokenizer.overlap(ids, text, [(s.start, s.end) for s in split_steps(text)])
    return np.where(on_JT.any(0), on_JT.argmax(0), -1) if len(on_JT) else np.full(len(ids), -1)


def step_starts(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """The first token of each step: what stands before it is the prefix of the steps so far."""
    step_T = step_of_tokens(tokenizer, ids, text)
    return [int(np.flatnonzero(step_T == j)[0]) for j in np.unique(step_T[step_T >= 0])]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The step and the kind of each token of a flawed attempt [T], and which of its steps are flagged [J]."""

    step_T: np.ndarray
    kind_T: np.ndarray
    flagged_J: np.ndarray

    @property
    def sound_T(self) -> np.ndarray:
        return (self.step_T >= 0) & ~self.flagged_J[self.step_T]


def layout(tokenizer: Tokenizer, kind_V: np.ndarray, q: Quadruple, ids: list[int]) -> Layout | None:
    """The layout of q.y0; None where nothing is flagged, or nothing else is."""
    start, end = q.meta["error_span"] or (0, 0)
    flagged_J = np.array([s.start < end and s.end > start for s in split_steps(q.y0)], bool)
    if not flagged_J.any() or flagged_J.all():
        return None
    return Layout(step_of_tokens(tokenizer, ids, q.y0), kind_V[np.asarray(ids)], flagged_J)


# ---- the temperature of the base ------------------------------------------------------------------------------------
def at_power(norm_TK: np.ndarray, power: float) -> np.ndarray:
    """log sum_v p_v^power [T] from its values at POWERS: the polynomial in log power through them. 0 at power 1."""
    u, nodes = math.log(power), LOG_POWERS
    weight = [np.prod([(u - b) / (a - b) for b in nodes if b != a]) for a in nodes]
    return np.where(np.array(POWERS) == 1, 0.0, norm_TK) @ np.array(weight)  # probabilities sum to 1


def explained(base: AttemptRead, power: float) -> np.ndarray:
    """Shift [T] of a policy that is the base at temperature 1 / power."""
    return (power - 1) * base.logp - at_power(base.norm, power)


def fit_power(base: Sequence[AttemptRead], shifts: Sequence[np.ndarray], layouts: Sequence[Layout]) -> float:
    """1 / T*: the power between 1/3 and 3 whose base explains the shifts of sound tokens best, in least squares beside
    a mean for each place and kind; 1 exactly where those means explain all."""
    if not layouts:
        return 1.0
    cells = [
        np.stack([np.full(len(a.step_T), len(a.flagged_J)), a.step_T, a.kind_T])[:, a.sound_T] for a in layouts
    ]  # fmt: skip
    _, cell = np.unique(np.concatenate(cells, 1), axis=1, return_inverse=True)
    sound = lambda rows: np.concatenate([row[a.sound_T] for row, a in zip(rows, layouts)]).astype(float)
    shift, logp, norm = sound(shifts), sound([b.logp for b in base]), sound([b.norm for b in base])

    def residual(u: float) -> float:
        e = shift - (math.exp(u) - 1) * logp + at_power(norm, math.exp(u))
        means = np.bincount(cell, e) / np.bincount(cell)
        return float(((e - means[cell]) ** 2).mean())

    grid = 0.05 * np.arange(-22, 23)
    if residual(0.0) <= 1e-12:
        return 1.0
    best = grid[np.argmin([residual(u) for u in grid])]
    bounds = (max(best - 0.05, -1.1), min(best + 0.05, 1.1))
    found = scipy.optimize.minimize_scalar(residual, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return math.exp(found.x)


# ---- the flagged step as a detector finds it ------------------------------------------------------------------------
def step_wins(score_T: np.ndarray, at: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(wins, pairs) [J, J]: of the pairs of one token of step j and one of step k of the same kind, in how many j's
    scores higher (ties count half), and how many there are."""
    J = len(at.flagged_J)
    wins, pairs = np.zeros((J, J)), np.zeros((J, J))
    for kind in (0, 1):
        here = (at.step_T >= 0) & (at.kind_T == kind)
        on_TJ = np.eye(J)[at.step_T[here]]
        a, b = score_T[here][:, None], score_T[here][None, :]
        wins += on_TJ.T @ ((a > b) + 0.5 * (a == b)) @ on_TJ
        pairs += on_TJ.T @ np.ones((here.sum(),) * 2) @ on_TJ
    return wins, pairs


def spans_auc(wins_JJ: np.ndarray, pairs_JJ: np.ndarray, flagged_J: np.ndarray) -> tuple[float | None, float | None]:
    """(AUC of the flagged steps against all others, mean of the AUC of each other step against all but itself); None
    where there are no pairs."""

    def auc(label_J):
        total = pairs_JJ[label_J][:, ~label_J].sum()
        return float(wins_JJ[label_J][:, ~label_J].sum() / total) if total else None

    moved = [auc(np.arange(len(flagged_J)) == j) for j in np.flatnonzero(~flagged_J)]
    return auc(flagged_J), mean(moved)


class PlaceRates:
    """How often step j scores above step k for standing where they stand: over the pairs of steps of all attempts in
    which both are sound."""

    def __init__(self, tables: Sequence[tuple[np.ndarray, np.ndarray]], layouts: Sequence[Layout]):
        sizes = [len(a.flagged_J) for a in layouts]
        self.own = [np.stack(table) * np.outer(~a.flagged_J, ~a.flagged_J) for table, a in zip(tables, layouts)]
        self.of_size = {J: sum(own for own, size in zip(self.own, sizes) if size == J) for J in set(sizes)}
        self.of_all = np.zeros((2, max(sizes, default=0), max(sizes, default=0)))
        for own, J in zip(self.own, sizes):
            self.of_all[:, :J, :J] += own

    def without(self, i: int) -> np.ndarray:
        """[J, J]: the share of pairs that step j wins against step k in the other attempts of as many steps as attempt
        i has; where these hold no such pair in all others, else 1/2."""
        J = self.own[i].shape[1]
        same, every = self.of_size[J] - self.own[i], self.of_all[:, :J, :J] - self.own[i]
        wins, pairs = np.where(same[1] > 0.5, same, every)
        return np.where(pairs > 0.5, wins / np.maximum(pairs, 1), 0.5)


def matched(table: tuple[np.ndarray, np.ndarray], flagged_J: np.ndarray, rates_JJ: np.ndarray) -> dict[str, Any]:
    """The detector -e on one attempt (table: its `step_wins`), and its null, both at equal kinds of tokens.

    With A(j) the AUC of step j's tokens against all others of the attempt, <A> its mean over the steps that are not
    flagged (the span moved there), and A' the same with the wins between two steps at the rates of sound steps that
    stand in their places in other attempts:

        credit_matched = A(flagged),   credit_null = <A> + (A'(flagged) - <A'>),   credit_excess = their difference.

    <A> alone does not tell credit from place: what lowers early steps alike finds flagged steps, for these stand early.
    """
    wins_JJ, pairs_JJ = table
    auc, moved = spans_auc(wins_JJ, pairs_JJ, flagged_J)
    if auc is None or moved is None:
        return {"credit_matched": None, "credit_null": None, "credit_excess": None}
    placed, placed_moved = spans_auc(pairs_JJ * rates_JJ, pairs_JJ, flagged_J)
    null = moved + placed - placed_moved
    return {"credit_matched": auc, "credit_null": null, "credit_excess": auc - null}


# ---- one record -----------------------------------------------------------------------------------------------------
def credit_record(tokenizer: Tokenizer, q: Quadruple, shift_T: np.ndarray, ids: list[int]) -> dict[str, float | None]:
    """Credit localization on one flawed attempt, as it is: is the shift lower on the erroneous step?

    credit_auc: AUC of -shift as a detector of the `error_span` tokens; credit_gap: mean shift off the span minus on it.
    """
    span = q.meta["error_span"]
    if span is None:
        return {"credit_auc": None, "credit_gap": None}
    label_T = tokenizer.overlap(ids, q.y0, [tuple(span)])[0]
    auc = detector_auc(-shift_T, label_T)
    gap = None if auc is None else float(shift_T[label_T == 0].mean() - shift_T[label_T > 0].mean())
    return {"credit_auc": auc, "credit_gap": gap}


def flip_gain(q: Quadruple, kind_V, at: Layout, base: AttemptRead, now: AttemptRead, t: int, power: float):
    """How much more than elsewhere the policy has turned from y0's token to y1's where they part, at token t, in nats.

    With m = log pi(other) - log pi(y0's token) given x and the prefix of y0, the other token being y1's at token t, and
    elsewhere the base's likeliest other one of the same kind: m - m_base / T* at t, minus its mean over the sound
    tokens of the kind of y1's. (m_base / T* is m at the fitted temperature; what turns from all of y0 alike gains
    nothing.) None for a right y0, and where there is no such sound token.
    """
    sound_T = at.sound_T & (at.kind_T == kind_V[base.other[t]])
    sound_T[t] = False
    if q.meta["y0_correct"] or not sound_T.any():
        return None
    gain_T = (now.other_logp - now.logp) - power * (base.other_logp - base.logp)
    return float(gain_T[t] - gain_T[sound_T].mean())


def step_shifts(e_T: np.ndarray, step_T: np.ndarray) -> np.ndarray:
    """Mean of e over the tokens of each step that has any, in order."""
    return np.array([e_T[step_T == j].mean() for j in np.unique(step_T[step_T >= 0])]).round(9)  # equal ones stay equal


def rank_correlation(values: list[float] | None, shifts: np.ndarray, others: list[np.ndarray]) -> dict[str, Any]:
    """value_correlation: Spearman's correlation between what each step loses in value (values: of the prefixes of 0, 1,
    ... all steps) and -shifts; value_excess: that minus its mean with the shifts of other attempts of as many steps in
    place of this one's, which stand at the same places. None without values, for fewer than three steps and where all
    are alike.
    """
    found = {"value_correlation": None, "value_excess": None}
    if values is None or len(values) != len(shifts) + 1 or len(shifts) < 3 or np.ptp(drops := -np.diff(values)) == 0:
        return found
    rows = np.array([row for row in [shifts, *others] if len(row) == len(shifts)])
    centred = lambda a: (ranks := scipy.stats.rankdata(a, axis=-1)) - ranks.mean(-1, keepdims=True)
    a, b = centred(drops), centred(-rows)
    scale = np.sqrt((a**2).sum() * (b**2).sum(-1))
    rho = np.where(scale > 0, b @ a / np.maximum(scale, 1e-9), np.nan)
    if not np.isnan(rho[0]):
        null = mean(rho[1:])
        found = {"value_correlation": float(rho[0]), "value_excess": None if null is None else float(rho[0] - null)}
    return found


def credit_records(
    tokenizer: Tokenizer,
    quads: Sequence[Quadruple],
    base: Sequence[AttemptRead],
    now: Sequence[AttemptRead],
    values: Sequence[list[float] | None],
) -> list[dict[str, Any]]:
    """What every record says of credit: `now` of the same tokens and others as `base`; `values` of the prefixes of each
    attempt, None where there are none."""
    kind_V = digit_tokens(tokenizer)
    shifts = [a.logp - b.logp for a, b in zip(now, base)]
    layouts = [layout(tokenizer, kind_V, q, b.ids) for q, b in zip(quads, base)]
    known = [i for i, at in enumerate(layouts) if at is not None]
    some = lambda rows: [rows[i] for i in known]
    power = fit_power(some(base), some(shifts), some(layouts))
    e = {i: np.round((shifts[i] - explained(base[i], power)) / RESOLUTION) * RESOLUTION for i in known}
    tables = {i: step_wins(-e[i], layouts[i]) for i in known}
    shifts_J = {i: step_shifts(e[i], layouts[i].step_T) for i in known}
    places = PlaceRates([tables[i] for i in known], some(layouts))
    records = [credit_record(tokenizer, q, s, b.ids) | NOTHING for q, s, b in zip(quads, shifts, base)]
    for k, i in enumerate(known):
        at, t = layouts[i], parting(base[i].ids, tokenizer.encode(quads[i].y1))
        records[i] |= matched(tables[i], at.flagged_J, places.without(k))
        records[i] |= {
            "credit_temperature": 1 / power,
            "flip_gain": None if t is None else flip_gain(quads[i], kind_V, at, base[i], now[i], t, power),
            **rank_correlation(values[i], shifts_J[i], [row for other, row in shifts_J.items() if other != i]),
        }
    return records


# ---- first attempts -------------------------------------------------------------------------------------------------
def attempt_record(q: Quadruple, text: str) -> dict[str, Any]:
    """attempt_wrong_step: index of the first attempt's first step that does not hold (None if none is found);
    attempt_steps: how many it has; attempt_kinds: [kind, planted] of each (`step_kinds`), where slips are planted. All
    None for a program."""
    if q.meta["domain"] != "math":
        return {"attempt_wrong_step": None, "attempt_steps": None, "attempt_kinds": None}
    planted = PLANTED.get(q.meta["task_id"].partition("/")[0])
    kinds = planted and [list(step) for step in step_kinds(text, q.y1, planted)]
    wrong, steps = first_wrong_step(text, q.y1), len(split_steps(text))
    return {"attempt_wrong_step": wrong, "attempt_steps": steps, "attempt_kinds": kinds}


def survival(records: Sequence[dict[str, Any]]) -> dict[str, list[float]] | None:
    """{horizon: shares of its first attempts whose first 1, 2, ... horizon steps hold, "all": of all attempts whose
    horizon is as long}; None for programs.

    A right attempt without a wrong step holds however few steps it has; one that stops early holds to its end.
    """
    rows: dict[int, list[float]] = {}
    for r in records:
        steps, wrong = r.get("attempt_steps"), r.get("attempt_wrong_step")
        if steps is not None:
            held = wrong if wrong is not None else math.inf if r["attempt"] else steps
            rows.setdefault(r["horizon"], []).append(held)
    share = lambda held, j: float(np.mean(np.array(held) >= j))
    every = lambda j: [held for horizon in rows if horizon >= j for held in rows[horizon]]
    by = {str(h): [share(rows[h], j) for j in range(1, h + 1)] for h in sorted(rows)}
    return {"all": [share(every(j), j) for j in range(1, max(rows) + 1)], **by} if rows else None


def kind_rates(attempts: Sequence[Sequence[tuple[str, bool]] | None]) -> dict[str, Any] | None:
    """Error rates by kind of step of attempts that are lists of (kind, planted), one a step; None where there are none.

    A kind is "right" or one of KINDS. The rate of slips is over planted steps, the others' over all steps. {"steps",
    "planted", kinds..., "by_position": the same of the first steps, of the second ones, ...}.
    """
    attempts = [attempt for attempt in attempts if attempt is not None]
    if not attempts:
        return None

    def rates(steps):
        planted = [kind for kind, is_planted in steps if is_planted]
        share = lambda kind, among: mean(float(found == kind) for found in among)
        all_of = [kind for kind, _ in steps]
        return {
            "steps": len(steps), "planted": len(planted),
            **{kind: share(kind, planted if kind == "slip" else all_of) for kind in KINDS},
        }  # fmt: skip

    longest = max(map(len, attempts))
    at = lambda j: rates([attempt[j] for attempt in attempts if len(attempt) > j])
    return {**rates([s for attempt in attempts for s in attempt]), "by_position": [at(j) for j in range(longest)]}
