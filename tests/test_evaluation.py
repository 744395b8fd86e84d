"""Records and summaries of an evaluation, and the credit that the critique's shift localizes, by hand.

pytest tests/test_evaluation.py
"""

import dataclasses
import itertools
import json
import types
import unicodedata

import numpy as np
import pytest
from examples import META, QUAD, RECORDS, REFERENCE, WRONG, Y1, code_quad, math_quad, qwen

from common.evaluation import (
    credit_record,
    detector_auc,
    first_problems,
    precheck_size,
    print_precheck,
    say_ahead,
    score_records,
    summarize,
)


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


# ---- records --------------------------------------------------------------------------------------------------------
def test_score_records():
    """Every kept figure of one evaluated quadruple."""
    attempt = {"text": "#### 4", "tokens": 6, "truncated": False}
    revision = {"text": "So 5", "tokens": 9, "truncated": True}
    (record,) = score_records([QUAD], [attempt], [revision])
    assert record == {
        "task_id": "own/1", "horizon": 1, "edit_distance": 2, "error_tags": ["local_arithmetic"], "y0": 0.0,
        "attempt": 0.0, "revised": 0.0, "revised_tokens": 9, "revised_truncated": True, "revised_format": False,
        "attempt_tokens": 6, "attempt_truncated": False, "revision": "So 5",
    }  # fmt: skip
    (good,) = score_records([QUAD], [{**attempt, "text": Y1}], [{**revision, "text": Y1}])
    assert (good["y0"], good["attempt"], good["revised"], good["revised_format"]) == (0.0, 1.0, 1.0, True)


def test_evaluation_leaves_out_what_was_not_scored(broken_harness):
    done = lambda text: {"text": text, "tokens": 3, "truncated": False}
    quads = [code_quad(), code_quad(), code_quad("broken = 1", (0, 6))]
    attempts = [done(WRONG), done(REFERENCE), done(WRONG)]
    revisions = [done(REFERENCE), done("broken"), done(REFERENCE)]
    records = score_records(quads, attempts, revisions)
    assert [(r["y0"], r["attempt"], r["revised"]) for r in records] == [(0, 0, 1), (0, 1, None), (None, 0, 1)]
    assert [r["revised_format"] for r in records] == [True, True, True]
    summary = summarize(records)
    figures = [summary[k] for k in ("harness_errors", "accuracy_revised", "accuracy")]
    assert figures == pytest.approx([2, 1.0, 1 / 3])
    assert (summary["delta_critique"], summary["wrong_to_right"], summary["right_to_wrong"]) == (1.0, 1.0, None)
    json.dumps(summary, allow_nan=False)


# ---- how many problems ----------------------------------------------------------------------------------------------
def test_first_problems():
    """Fixed, shuffled, each a part of the next; 0, and more than there are, is all, as it stands."""
    quads = [math_quad(i) for i in range(50)]
    some = {n: first_problems(quads, n) for n in (1, 8, 20, 49)}
    for few, more in itertools.pairwise(some):
        assert len(some[few]) == few and all(q in some[more] for q in some[few])
    assert some[20] == [q for q in quads if q in some[20]] != quads[:20]
    assert some[8] == first_problems(list(quads), 8)
    assert first_problems(quads, 0) == first_problems(quads, 50) == first_problems(quads, 999) == quads


@pytest.mark.parametrize(("most", "size"), [(0, (200, 96)), (32, (32, 32)), (150, (150, 96)), (1000, (200, 96))])
def test_precheck_size(most, size):
    assert precheck_size(most) == size


def test_say_ahead(capsys):
    """605 problems, nothing set: 2 * 605 + 2 * 200 + 96 * 8 rows, of which the last evaluation has 2 * 605."""
    say_ahead(0.5, types.SimpleNamespace(quads=[None] * 605, most=0), 8)
    out = capsys.readouterr().out
    assert "605 test problems and 200 training problems twice each, 96 groups of 8" in out
    assert "about 20 minutes, and the evaluation at the end about 11 minutes; --eval_problems" in out
    say_ahead(0.5, types.SimpleNamespace(quads=[None] * 16, most=16), 4)
    assert "about 2 minutes, and the evaluation at the end under a minute" in capsys.readouterr().out


# ---- summary --------------------------------------------------------------------------------------------------------
def test_summarize_by_hand():
    """Every figure of five records."""
    s = summarize(RECORDS)
    assert (s["n"], s["harness_errors"]) == (5, 0)
    figures = {
        "accuracy": 3 / 5, "accuracy_revised": 3 / 5, "delta_critique": 1 / 5, "accuracy_y0": 2 / 5,
        "wrong_to_right": 2 / 3, "right_to_wrong": 1 / 2, "format_frac": 4 / 5, "truncated_frac": 1 / 5,
        "tokens_mean": 20.0, "credit_auc": 0.5, "credit_gap": 0.5,
    }  # fmt: skip
    assert {k: s[k] for k in figures} == pytest.approx(figures)
    rates = lambda n, accuracy, revised, delta: pytest.approx(
        {"n": n, "accuracy": accuracy, "accuracy_revised": revised, "delta_critique": delta}
    )
    assert s["by_horizon"] == {"2": rates(2, 0.5, 0.5, 0.5), "3": rates(1, 1, 1, 0), "10": rates(2, 0.5, 0.5, 0)}
    assert list(s["by_horizon"]) == ["2", "3", "10"]  # as numbers, not as words
    assert s["by_edit_distance"] == {
        "<=2": rates(2, 1, 1, 0.5), "<=5": rates(1, 0, 0, 0), "<=10": rates(1, 0, 1, 1), ">10": rates(1, 1, 0, -1),
    }  # fmt: skip
    assert s["by_tag"] == {"local_arithmetic": rates(2, 0.5, 0.5, 0.5), "missing_case": rates(2, 0, 0.5, 0.5)}
    json.dumps(s, allow_nan=False)


def test_edit_buckets_stand_in_order():
    """From short to long in the written summary."""
    assert list(summarize(RECORDS)["by_edit_distance"]) == ["<=2", "<=5", "<=10", ">10"]


def test_summarize_without_right_attempts():
    """A rate over no records is None, not 0 and not NaN."""
    s = summarize(RECORDS[:2])
    assert s["right_to_wrong"] is None
    assert s["wrong_to_right"] == 0.5
    assert summarize(RECORDS[-1:])["credit_auc"] is None


@pytest.mark.parametrize(("gain", "says"), [(0.1, "carries signal: +10.0"), (0.02, "WARNING"), (-0.1, "WARNING")])
def test_print_precheck(capsys, gain, says):
    """In plain words whether the critique helps; 3 points are wanted."""
    print_precheck({"n": 8, "accuracy_y0": 0.0, "accuracy_with_f": 0.5 + gain, "accuracy_without_f": 0.5,
                        "leak_rate": 0.25, "zero_std_frac": 0.125, "groups": 8})  # fmt: skip
    out = capsys.readouterr().out
    assert says in out
    assert "answer leaked by f 25.0%" in out
    assert "without variance 12.5%" in out
