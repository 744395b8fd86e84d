"""Measures of credit on constructed policies, by hand and against plain loops.

pytest tests/test_credit.py
"""

import dataclasses
import functools
import json
import unicodedata

import numpy as np
import pytest
import scipy.stats
from examples import ATTEMPTS, META, QUAD, SOLUTION, code_quad, qwen

from common import credit
from common.credit import (
    NOTHING,
    POWERS,
    AttemptRead,
    Layout,
    PlaceRates,
    attempt_record,
    credit_record,
    credit_records,
    detector_auc,
    kind_rates,
    parting,
    rank_correlation,
    spans_auc,
    standard_error,
    step_starts,
    step_wins,
    survival,
)
from common.fixtures import fixtures_math
from common.replay import Quadruple


# ---- credit localization --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_detector_auc_against_all_pairs(seed):
    """Random scores with many ties against two loops."""
    rng = np.random.default_rng(seed)
    score, label = rng.integers(0, 6, 40).astype(float), rng.integers(0, 2, 40)
    wins = [(a > b) + 0.5 * (a == b) for a, la in zip(score, label) for b, lb in zip(score, label) if la and not lb]
    assert detector_auc(score, label) == pytest.approx(sum(wins) / len(wins))


def test_detector_auc_without_both_kinds():
    """Undefined, not 0.5."""
    assert detector_auc(np.ones(3), np.zeros(3)) is None
    assert detector_auc(np.ones(3), np.ones(3)) is None
    assert detector_auc(np.zeros(0), np.zeros(0)) is None


def test_credit_record_by_hand(byte_tokenizer):
    """Five tokens, the first two on the span."""
    q = dataclasses.replace(QUAD, y0="ab cd", meta={**META, "error_span": [0, 2]})
    shift, ids = np.array([-3.0, -1.0, 0.0, -2.0, 1.0]), byte_tokenizer.encode("ab cd")
    record = credit_record(byte_tokenizer, q, shift, ids)
    assert record["credit_auc"] == pytest.approx(5 / 6)  # of 3 and 1 against 0, 2 and -1, only 1 against 2 is lost
    assert record["credit_gap"] == pytest.approx(-1 / 3 + 2)
    nothing = {"credit_auc": None, "credit_gap": None}
    for span in (None, [0, 5]):  # nothing to find, and nothing to tell it from
        q = dataclasses.replace(q, meta={**META, "error_span": span})
        assert credit_record(byte_tokenizer, q, shift, ids) == nothing


def test_credit_record_behind_a_normalizer():
    """y0 decomposed, Qwen's NFC: the shift is down on the tokens of "wrong", and there it is looked for."""
    y0 = unicodedata.normalize("NFD", "\u00e9\u00e9\u00e9\u00e9\u00e9 ") + "wrong step"
    q = dataclasses.replace(QUAD, y0=y0, meta={**META, "error_span": [y0.index("wrong"), y0.index("wrong") + 5]})
    tokenizer = qwen()
    ids = tokenizer.encode(y0)
    spelled = b"".join(tokenizer.bytes_V[i] for i in ids).decode()
    before = np.cumsum([0, *(len(tokenizer.bytes_V[i]) for i in ids)])
    at = len(spelled[: spelled.index("wrong")].encode())
    shift = np.array([-2.0 if at <= start < at + 5 else 0.0 for start in before[:-1]])
    assert credit_record(tokenizer, q, shift, ids) == {"credit_auc": 1.0, "credit_gap": 2.0}


# ---- constructed policies -------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class World:
    """Flawed attempts, and the probabilities [T, V] that an invented base gives to what follows each prefix."""

    tokenizer: object
    quads: list[Quadruple]
    probs: list[np.ndarray]
    others: list[np.ndarray]

    def read(self, power: float = 1.0, shift=lambda at, i: 0.0, turned: float = 0.0) -> list[AttemptRead]:
        """The base at temperature 1 / power, log-probs of the attempt's tokens shifted, y1's raised where it parts."""
        reads = []
        for i, (q, p, base) in enumerate(zip(self.quads, self.probs, self.base)):
            T, t = np.arange(len(p)), parting(base.ids, self.tokenizer.encode(q.y1))
            logp = power * np.log(p) - np.log((p**power).sum(-1, keepdims=True))
            other_logp = logp[T, base.other]
            other_logp[t] += turned
            own = logp[T, base.ids] + shift(self.layouts[i], i)
            reads.append(dataclasses.replace(base, logp=own, other_logp=other_logp))
        return reads

    @functools.cached_property
    def base(self) -> list[AttemptRead]:
        reads = []
        for q, p, other in zip(self.quads, self.probs, self.others):
            ids, T = self.tokenizer.encode(q.y0), np.arange(len(p))
            norm = np.log(np.stack([(p**k).sum(-1) for k in POWERS], -1))
            logp = 1.0 * np.log(p) - np.log((p**1.0).sum(-1, keepdims=True))
            reads.append(AttemptRead(ids, logp[T, ids], other, logp[T, other], norm))
        return reads

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        kind_V = credit.digit_tokens(self.tokenizer)
        return [credit.layout(self.tokenizer, kind_V, q, self.tokenizer.encode(q.y0)) for q in self.quads]

    def records(self, now: list[AttemptRead], values=None) -> list[dict]:
        return credit_records(self.tokenizer, self.quads, self.base, now, values or [None] * len(self.quads))


@pytest.fixture(scope="module")
def world(tokenizer):
    """Generated solutions with one result off by ten, an early one more often; the base finds it and digits in general
    less likely than other tokens."""
    rng, quads = np.random.default_rng(0), []
    for problem in fixtures_math(size=160):
        lines = problem.reference.split("\n")
        j = int(rng.choice(len(lines) - 1, p=(w := 0.5 ** np.arange(len(lines) - 1)) / w.sum()))
        value = lines[j].rsplit(">>", 1)[1].rstrip(".")
        wrong = lines[j].replace(f"={value}>>{value}.", f"={int(value) + 10}>>{int(value) + 10}.")
        start = sum(len(line) + 1 for line in lines[:j])
        meta = {**META, "error_span": [start, start + len(wrong)]}
        y0 = "\n".join([*lines[:j], wrong, *lines[j + 1 :]])
        quads.append(Quadruple(problem.x, y0, "No.", problem.reference, meta))
    kind_V, probs, others = credit.digit_tokens(tokenizer), [], []
    for q in quads:
        ids, y1 = np.array(tokenizer.encode(q.y0)), tokenizer.encode(q.y1)
        t = parting(ids, y1)
        logits = rng.normal(size=(len(ids), len(kind_V)))
        logits[np.arange(len(ids)), ids] += 9 - 3 * kind_V[ids] + rng.normal(size=len(ids))
        logits[t, y1[t]] += 9
        probs.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        same = kind_V[None, :] == kind_V[ids][:, None]
        same[np.arange(len(ids)), ids] = False
        others.append(np.where(same, probs[-1], 0).argmax(-1))
        others[-1][t] = y1[t]
    return World(tokenizer, quads, probs, others)


def means(records: list[dict]) -> dict[str, float]:
    assert all(r["credit_excess"] == pytest.approx(r["credit_matched"] - r["credit_null"]) for r in records)
    json.dumps(records, allow_nan=False)
    return {key: float(np.mean([r[key] for r in records])) for key in records[0] if not key.startswith("value_")}


def test_an_untrained_policy_has_nothing_exactly(world):
    for r in world.records(world.read()):
        assert (r["credit_auc"], r["credit_gap"], r["credit_excess"], r["flip_gain"]) == (0.5, 0, 0, 0)
        assert r["credit_temperature"] == 1 and r["value_correlation"] is None


@pytest.mark.parametrize("depth", [0.05, 3.0])
def test_only_the_flagged_step_lowered(world, depth):
    """Found whole, however little it is lowered, and under noise that the digits of many steps have."""
    lowered = world.read(shift=lambda at, i: -depth * at.flagged_J[at.step_T] * (at.step_T >= 0))
    found = means(world.records(lowered))
    assert found["credit_matched"] == 1.0 and 0.5 < found["credit_excess"] <= 1.0
    noise = lambda at, i: np.random.default_rng(i).normal(size=len(at.step_T)) * depth / 3
    noisy = world.read(shift=lambda at, i: noise(at, i) - depth * at.flagged_J[at.step_T] * (at.step_T >= 0))
    assert means(world.records(noisy))["credit_excess"] > 0.4


BLIND = {
    "all digits": lambda at: -2.0 * at.kind_T,
    "all but digits": lambda at: -2.0 * (1 - at.kind_T),
    "the first two steps": lambda at: -1.0 * (at.step_T < 2),
    "the first half": lambda at: -1.0 * (at.step_T < len(at.flagged_J) / 2),
    "less and less": lambda at: -1.0 / (2 + at.step_T),
    "digits of early steps": lambda at: -3.0 * at.kind_T * (at.step_T < 2),
    "later steps": lambda at: -1.0 * (at.step_T > 1),
    "nothing": lambda at: np.zeros(len(at.step_T)),
}


@pytest.mark.parametrize("noisy", [0.0, 0.5])
@pytest.mark.parametrize("what", BLIND)
def test_what_does_not_look_at_the_flag_has_no_excess(world, what, noisy):
    """Flagged steps stand early: an early step alone finds many of them, but no more than its place does."""
    noise = lambda at, i: np.random.default_rng(i).normal(size=len(at.step_T)) * noisy
    found = means(world.records(world.read(shift=lambda at, i: BLIND[what](at) + noise(at, i))))
    assert abs(found["credit_excess"]) <= 0.03
    if what in ("the first two steps", "the first half"):
        assert found["credit_matched"] > 0.53 and found["credit_excess"] < found["credit_matched"] - 0.5


@pytest.mark.parametrize("temperature", [0.4, 0.5, 0.7, 0.83, 1.1, 1.5, 2.5])
def test_the_base_at_another_temperature_has_no_excess(world, temperature):
    """The wrong result is unlikely: sharpening alone finds it by the bare shift."""
    found = means(world.records(world.read(power=1 / temperature)))
    assert found["credit_temperature"] == pytest.approx(temperature, rel=2e-3)
    assert abs(found["credit_excess"]) <= 0.02 and abs(found["flip_gain"]) <= 0.02
    assert found["credit_gap"] * (1 - temperature) > 0


def test_sharpened_and_credited(world):
    """Both at once are told apart."""
    lower = lambda at, i: -1.0 * at.flagged_J[at.step_T] * (at.step_T >= 0)
    found = means(world.records(world.read(power=1 / 0.7, shift=lower)))
    assert found["credit_temperature"] == pytest.approx(0.7, rel=2e-3)
    assert found["credit_matched"] > 0.99


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_flip_gain_is_what_y1s_token_wins(world, power):
    gains = [r["flip_gain"] for r in world.records(world.read(power=power, turned=1.5))]
    np.testing.assert_allclose(gains, 1.5, atol=0.05)
    for shift in (lambda at, i: -2.0 * at.kind_T, lambda at, i: -2.0 + np.zeros(len(at.step_T))):  # y0 as a whole
        gains = [r["flip_gain"] for r in world.records(world.read(shift=shift))]
        np.testing.assert_allclose(gains, 0, atol=1e-9)


def test_flip_gain_by_hand(byte_tokenizer):
    """y0 "1a\\n2b", y1 "1a\\n3b": they part at token 3; of the sound tokens "1" and "a" only "1" is a digit."""
    q = Quadruple("x", "1a\n2b", "", "1a\n3b", {**META, "error_span": [3, 5]})
    ids, zeros = byte_tokenizer.encode(q.y0), np.zeros((5, len(POWERS)))
    read = lambda logp, other: AttemptRead(ids, np.array(logp), np.array(ids), np.array(other), zeros)
    base = read([-1.0, -1.0, -1.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -4.0, -2.0])
    base.other[:] = byte_tokenizer.encode("2b\n3a")
    now = read([-0.5, -1.0, -1.0, -2.0, -1.0], [-3.0, -9.0, -9.0, -2.5, -9.0])
    at = credit.layout(byte_tokenizer, credit.digit_tokens(byte_tokenizer), q, ids)
    gain = lambda q: credit.flip_gain(q, credit.digit_tokens(byte_tokenizer), at, base, now, 3, 1.0)
    # where they part: (-2.5 + 2) - (-4 + 1) = 2.5; at "1": (-3 + 0.5) - (-2 + 1) = -1.5
    assert gain(q) == pytest.approx(4.0)
    assert gain(dataclasses.replace(q, meta={**q.meta, "y0_correct": True})) is None


def test_attempts_without_a_place_to_find(byte_tokenizer):
    """Nothing flagged, all flagged, and y1 only longer: None, and the others are measured all the same."""
    texts = [("1a\n2b", None, "1a\n3b"), ("1a\n2b", [0, 5], "1a\n3b"), ("1a\n2b", [0, 2], "1a\n2b\n3c")]
    quads = [Quadruple("x", y0, "", y1, {**META, "error_span": span}) for y0, span, y1 in texts]
    ids = byte_tokenizer.encode("1a\n2b")
    read = lambda logp: AttemptRead(ids, np.array(logp), np.array(ids), np.full(5, -2.0), np.zeros((5, len(POWERS))))
    base, now = [read([-1.0] * 5)] * 3, [read([-3.0, -3.0, -1.0, -1.0, -1.0])] * 3
    records = credit_records(byte_tokenizer, quads, base, now, [None] * 3)
    assert [{k: r[k] for k in NOTHING} for r in records[:2]] == [NOTHING] * 2
    assert records[2]["credit_matched"] == 1.0 and records[2]["flip_gain"] is None
    assert records[0]["credit_auc"] is None
    assert [r["credit_matched"] for r in credit_records(byte_tokenizer, quads[:1], base[:1], now[:1], [None])] == [None]


# ---- their parts ----------------------------------------------------------------------------------------------------
def test_at_power_between_its_nodes(world):
    """Against the sum itself, far less than a tie apart."""
    (base, *_), (p, *_) = world.base, world.probs
    for temperature in (0.34, 0.45, 0.77, 0.99, 1.3, 2.9):
        exact = np.log((p ** (1 / temperature)).sum(-1))
        np.testing.assert_allclose(credit.at_power(base.norm, 1 / temperature), exact, atol=1e-3)
    assert (credit.at_power(base.norm, 1.0) == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_wins_and_spans_against_loops(seed):
    rng = np.random.default_rng(seed)
    at = Layout(rng.integers(-1, 4, 30), rng.integers(0, 2, 30), np.array([False, True, False, False]))
    score = rng.integers(0, 5, 30).astype(float)
    beats = lambda label, rest: [
        (score[a] > score[b]) + 0.5 * (score[a] == score[b])
        for a in range(30) for b in range(30)
        if at.step_T[a] in label and at.step_T[b] in rest and at.kind_T[a] == at.kind_T[b]
    ]  # fmt: skip
    wins, pairs = step_wins(score, at)
    for j in range(4):
        for k in {*range(4)} - {j}:
            assert (wins[j, k], pairs[j, k]) == (sum(beats([j], [k])), len(beats([j], [k])))
    auc, moved = spans_auc(wins, pairs, at.flagged_J)
    assert auc == pytest.approx(np.mean(beats([1], [0, 2, 3])))
    assert moved == pytest.approx(np.mean([np.mean(beats([j], {*range(4)} - {j})) for j in (0, 2, 3)]))


def test_rates_of_places_by_hand():
    """Three attempts of three steps with another flag each, one of two."""
    table = lambda J, w: (np.full((J, J), w), np.full((J, J), 4.0))
    flags = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1]]
    tables = [table(3, 1.0), table(3, 2.0), table(3, 3.0), table(2, 4.0)]
    layouts = [Layout(np.zeros(1, int), np.zeros(1, int), np.array(row, bool)) for row in flags]
    rates = PlaceRates(tables, layouts)
    first = rates.without(0)
    assert first[0, 2] == 2 / 4  # in the second attempt alone
    assert first[0, 1] == 3 / 4  # in the third alone
    assert first[1, 2] == 0.5  # nowhere but in itself
    assert rates.without(1)[0, 1] == 3 / 4
    assert rates.without(3)[0, 1] == 3 / 4  # of other lengths, where there is none of its own


def test_tokens_of_steps(byte_tokenizer):
    ids = byte_tokenizer.encode("2+3\n#### 5")
    assert credit.step_of_tokens(byte_tokenizer, ids, "2+3\n#### 5").tolist() == [0, 0, 0, -1, *[1] * 6]
    assert step_starts(byte_tokenizer, ids, "2+3\n#### 5") == [0, 4]
    assert parting([1, 2, 3], [1, 5, 3]) == 1 and parting([1, 2], [1, 2, 3]) is None


def test_standard_error():
    assert standard_error([1.0, None, 3.0]) == pytest.approx(1.0)
    assert standard_error([1.0, None]) is None


def test_rank_correlation_by_hand():
    """Drops 0.5, 0, 0.25 of three steps; the shift is lowest where the drop is largest, or the other way round."""
    values = [0.75, 0.25, 0.25, 0.0]
    of = lambda *shifts, others=(): rank_correlation(values, np.array(shifts, float), [np.array(o) for o in others])
    assert of(-3, 0, -1) == {"value_correlation": pytest.approx(1.0), "value_excess": None}
    assert of(3, 0, 1)["value_correlation"] == pytest.approx(-1.0)
    others = [[-2.0, 0.0, -1.0], [2.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [5.0, 5.0, 5.0], [1.0, 2.0]]  # 1, -1, 1; no others
    assert of(-3, 0, -1, others=others)["value_excess"] == pytest.approx(1 - 1 / 3)
    nothing = {"value_correlation": None, "value_excess": None}
    assert of(1, 1, 1) == of(1, 2) == rank_correlation(None, np.arange(3.0), []) == nothing
    assert rank_correlation([0.5] * 4, np.arange(3.0), []) == nothing


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_scipys(seed):
    rng = np.random.default_rng(seed)
    values, rows = rng.integers(0, 9, 8) / 8, rng.integers(0, 4, (5, 7)).astype(float)
    rho = [scipy.stats.spearmanr(-np.diff(values), -row).statistic for row in rows]
    found = rank_correlation(list(values), rows[0], list(rows[1:]))
    assert found["value_correlation"] == pytest.approx(rho[0])
    assert found["value_excess"] == pytest.approx(rho[0] - np.mean(rho[1:]))


def test_values_drop_at_the_flagged_step(world):
    """A policy that lowers it follows them, one that lowers early steps alike only as far as its place does."""
    values = [[*np.where(np.cumsum([0, *at.flagged_J]) > 0, 0.0, 0.75)] for at in world.layouts]
    of = lambda shift: [r["value_excess"] for r in world.records(world.read(shift=shift), values)]
    mean = lambda rows: np.mean([v for v in rows if v is not None])
    assert mean(of(lambda at, i: -1.0 * at.flagged_J[at.step_T] * (at.step_T >= 0))) > 0.6
    early = lambda at, i: -1.0 / (2 + at.step_T)
    assert abs(mean(of(early))) < 1e-9
    noisy = lambda at, i: early(at, i) + 0.3 * np.random.default_rng(i).normal(size=len(at.step_T))
    assert abs(mean(of(noisy))) < 0.1


# ---- first attempts -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ATTEMPTS)
def test_attempt_record(kind):
    lines, wrong = ATTEMPTS[kind]
    q = dataclasses.replace(QUAD, y1=SOLUTION)
    found = {"attempt_wrong_step": wrong, "attempt_steps": len(lines), "attempt_kinds": None}
    assert attempt_record(q, "\n".join(lines)) == found
    assert attempt_record(code_quad(), "pass") == dict.fromkeys(found)


def test_kinds_are_recorded_where_slips_are_planted():
    """fixtures_long plants them on 6 and 7: the first step slips, the second copies another operand than x gives."""
    q = dataclasses.replace(QUAD, y1="<<20+6=26>>26\n<<26-4=22>>22\n#### 22")
    q = dataclasses.replace(q, meta={**q.meta, "task_id": "fixtures_long/1", "answer": "22"})
    found = attempt_record(q, "<<20+6=27>>27\n<<27-5=22>>22\n#### 22")
    assert found["attempt_kinds"] == [["slip", True], ["copying", False]] and found["attempt_wrong_step"] == 0
    json.dumps(found)


def test_survival_by_hand():
    """A right one, one that fails at its second step, one that stops, one short and right; and a longer one."""
    row = lambda horizon, wrong, steps, right: {
        "horizon": horizon, "attempt_wrong_step": wrong, "attempt_steps": steps, "attempt": right
    }  # fmt: skip
    records = [row(2, None, 3, 1.0), row(2, 1, 3, 0.0), row(2, None, 1, 0.0), row(2, None, 1, 1.0), row(3, 2, 4, 0.0)]
    assert survival(records) == {"all": [1.0, 3 / 5, 0.0], "2": [1.0, 0.5], "3": [1.0, 1.0, 0.0]}
    assert survival([row(2, None, 0, 0.0)])["2"] == [0.0, 0.0]
    assert survival([row(4, None, None, 1.0)]) is None


def test_kind_rates_by_hand():
    """Two attempts of three steps and of one; not measured ones are left out."""
    lists = [[("right", True), ("slip", True), ("copying", False)], None, [["arithmetic", True]]]
    rates = kind_rates(lists)
    figures = {"steps": 4, "planted": 3, "slip": 1 / 3, "arithmetic": 1 / 4, "copying": 1 / 4, "form": 0.0}
    assert {k: rates[k] for k in figures} == pytest.approx(figures)
    first, second, third = rates["by_position"]
    assert (first["steps"], first["slip"], first["arithmetic"]) == (2, 0.0, 0.5)
    assert (second["slip"], third["slip"], third["copying"]) == (1.0, None, 1.0)
    assert kind_rates([None]) is None and kind_rates([[]])["slip"] is None
