"""Records and summaries of an evaluation, and the values of steps, by hand.

pytest tests/test_evaluation.py
"""

import dataclasses
import functools
import itertools
import json
import types

import numpy as np
import pytest
from examples import QUAD, RECORDS, REFERENCE, WRONG, Y1, code_quad, math_quad, mesh
from flax import nnx

from common import evaluation
from common.batches import fixed_shapes, right_pad
from common.credit import parting
from common.evaluation import (
    Evaluator,
    first_problems,
    precheck_size,
    print_precheck,
    say_ahead,
    score_records,
    summarize,
)
from common.model import Decoder, ModelConfig
from common.prompts import attempt_prompt


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
        "attempt_wrong_step": 0, "attempt_steps": 1, "attempt_kinds": None,
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


def test_summary_of_kinds_of_steps():
    """Where records have them."""
    records = [{**r, "attempt_kinds": [["right", False], ["slip", True]]} for r in RECORDS[:2]]
    assert summarize([*records, *RECORDS[2:]])["attempt_kinds"]["slip"] == 1.0


# ---- the values of steps --------------------------------------------------------------------------------------------
@functools.cache
def small_evaluator(tokenizer, dtype="float32"):
    """Of four attempts, with a random model and its parameters; y0 "So <<2+3=6>>6.\n#### 6", three right, one wrong."""
    cfg = ModelConfig(tokenizer.vocab_size, d_model=16, n_layers=1, head_dim=8, d_ff=32)
    graphdef, params = nnx.split(Decoder(cfg, nnx.Rngs(0)), nnx.Param)
    quads = [dataclasses.replace(QUAD, x=f"What is {i}+3?") for i in range(4)]
    shapes = fixed_shapes(tokenizer, {"test": quads}, 512, 16)
    return Evaluator(graphdef, tokenizer, quads, shapes, mesh(), dtype), params


def test_too_few_problems_have_no_values(byte_tokenizer):
    evaluator, params = small_evaluator(byte_tokenizer)
    assert evaluator.valued == [] and evaluator.prefix_values(params, 1.0) == [None] * 4


def test_values_of_steps(byte_tokenizer, monkeypatch):
    """A sampler that always ends a first step right, and otherwise states the right answer in one of two samples."""
    monkeypatch.setattr(evaluation, "VALUES_N", 3)
    monkeypatch.setattr(evaluation, "VALUES_GROUP", 2)
    small_evaluator.cache_clear()
    evaluator, params = small_evaluator(byte_tokenizer)
    assert len(evaluator.valued) == 3
    seen = []

    def rollout(params, prompt_BP, len_B, key, group, temperature, greedy):
        assert (group, temperature, greedy) == (2, 0.7, False)
        tails = []
        for row, n in zip(np.asarray(prompt_BP), np.asarray(len_B)):
            text = byte_tokenizer.decode([row[:n].tolist()])[0]
            seen.append(text)
            tails += ["So 5.\n#### 5"] * 2 if text.endswith("Solution:\n") else ["#### 5", "#### 6"]
        tokens, lengths = right_pad([[*byte_tokenizer.encode(t), byte_tokenizer.eos_id] for t in tails], 16, 0)
        return {"tokens_MT": tokens, "len_M": lengths}

    monkeypatch.setattr(evaluator, "_rollout", rollout)
    values = evaluator.prefix_values(params, 0.7)
    assert [values[i] for i in evaluator.valued] == [[1.0, 0.5, 0.0]] * 3 and values.count(None) == 1
    prompts = [attempt_prompt(evaluator.quads[i].x) for i in evaluator.valued]
    assert {*seen} == {*prompts, *(prompt + "So <<2+3=6>>6.\n" for prompt in prompts)}


@pytest.mark.parametrize("times", [1, 2])
def test_the_base_read_twice_has_moved_nowhere(byte_tokenizer, tmp_path, monkeypatch, times):
    """To the bit, also where it was kept the first time; and where y0 and y1 part, y1's token stands beside y0's."""
    small_evaluator.cache_clear()
    evaluator, params = small_evaluator(byte_tokenizer)
    evaluator.read_base(params, tmp_path / "reads.json")
    if times == 2:
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "read_attempts", None)  # not asked again
            evaluator.read_base(params, tmp_path / "reads.json")
    for q, read in zip(evaluator.quads, evaluator.base):
        t = parting(read.ids, byte_tokenizer.encode(q.y1))
        assert byte_tokenizer.decode([[read.ids[t]], [read.other[t]]]) == ["6", "5"]
        assert len(read.logp) == len(read.norm) == len(q.y0)
    for r in evaluator(params):
        assert (r["credit_excess"], r["credit_gap"], r["flip_gain"], r["value_correlation"]) == (0, 0, 0, None)
        assert r["credit_temperature"] == 1


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
    say_ahead(0.5, types.SimpleNamespace(quads=[None] * 605, most=0, valued=[]), 8)
    out = capsys.readouterr().out
    assert "605 test problems and 200 training problems twice each, 96 groups of 8" in out
    assert "about 20 minutes, and the evaluation at the end about 11 minutes; --eval_problems" in out
    say_ahead(0.5, types.SimpleNamespace(quads=[None] * 16, most=16, valued=[]), 4)
    assert "about 2 minutes, and the evaluation at the end under a minute" in capsys.readouterr().out
    say_ahead(0.5, types.SimpleNamespace(quads=[QUAD] * 605, most=0, valued=range(64)), 8)  # of two steps each
    out = capsys.readouterr().out
    assert "96 groups of 8 samples, 128 beginnings of attempts with 8 samples" in out
    assert "about 25 minutes, and the evaluation at the end about 11 minutes" in out


# ---- summary --------------------------------------------------------------------------------------------------------
def test_summarize_by_hand():
    """Every figure of five records."""
    s = summarize(RECORDS)
    assert (s["n"], s["harness_errors"]) == (5, 0)
    figures = {
        "accuracy": 3 / 5, "accuracy_revised": 3 / 5, "delta_critique": 1 / 5, "accuracy_y0": 2 / 5,
        "wrong_to_right": 2 / 3, "right_to_wrong": 1 / 2, "format_frac": 4 / 5, "truncated_frac": 1 / 5,
        "tokens_mean": 20.0, "credit_auc": 0.5, "credit_gap": 0.5, "credit_excess": 0.1, "credit_excess_se": 0.15,
        "flip_gain": 1.0, "flip_gain_se": 0.5, "credit_temperature": 0.8,
    }  # fmt: skip
    assert {k: s[k] for k in figures} == pytest.approx(figures)
    rates = lambda n, accuracy, revised, delta: pytest.approx(
        {"n": n, "accuracy": accuracy, "accuracy_revised": revised, "delta_critique": delta}
    )
    assert s["by_horizon"] == {"2": rates(2, 0.5, 0.5, 0.5), "3": rates(1, 1, 1, 0), "10": rates(2, 0.5, 0.5, 0)}
    assert s["survival"] == {"all": [1.0, 0.5], "2": [1.0, 0.5]}
    assert s["value_excess"] is s["value_excess_se"] is s["attempt_kinds"] is None
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
