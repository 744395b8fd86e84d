"""The same measurement for every method: first attempt, revision, credit localization, and the pre-check of the base.
Used by all trainers."""

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from common.base import BASE_SEED
from common.basics import STREAM_EVAL, mean, round_up, sha256, write_atomic
from common.batches import bucket, decode_rows, pack_prompts, right_pad
from common.fingerprint import sources_sha256
from common.hosts import broadcast, fetch, leads, put
from common.model import Reading
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple, replay_report, replay_sha256
from common.rewards import format_valid, outcome_scores, score_outcomes
from common.sampling import generate, token_logp
from common.tokenizer import Tokenizer

# What: the same measurement for every method: first attempt, revision, credit localization. Used by: all trainers.
# Tested in: tests/test_scripts.py, tests/test_eval.py.
EVAL_ROWS = 128  # rows decoded at once
EDIT_BUCKETS = (2, 5, 10)  # edit distance: 1-2, 3-5, 6-10, 11+


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


class Evaluator:
    """Greedy first attempts and revisions of a fixed set of quadruples, and log-probs of their flawed attempts."""

    def __init__(self, graphdef, tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int], mesh, dtype):
        # short and long together would decode to the longest: rows that end together share a batch
        self.quads = sorted(quads, key=lambda q: (len(q.y1), q.meta["task_id"]))
        self.tokenizer, self.shapes = tokenizer, shapes
        self.rows = round_up(min(EVAL_ROWS, len(quads)), mesh.shape["data"])
        self.data = NamedSharding(mesh, P("data"))
        eos_ids, pad, T = tokenizer.eos_ids, tokenizer.pad_id, shapes["T"]

        def greedy(params, prompt_BP, len_B):
            model = nnx.merge(graphdef, params)
            return generate(
                model, prompt_BP, len_B, jax.random.key(0), 1, T, 1.0, eos_ids, pad, greedy=True, dtype=dtype
            )

        def logp(params, prompt_BP, len_B, tokens_BT):
            model = nnx.merge(graphdef, params)
            ((_, hidden_BTD),) = model([Reading(prompt_BP, len_B, [tokens_BT])], dtype)
            return token_logp(hidden_BTD, tokens_BT, model.head_VD())[0]

        self._greedy, self._logp = jax.jit(greedy), jax.jit(logp)

    def _batches(self, prompts: list[str], width: int, *arrays: np.ndarray):
        """Batches of `self.rows` packed prompts, each as wide as its longest needs (few widths, up to `width`), and of
        the rows of `arrays`; the last is filled up with copies of its first row. Yields (n real, arrays on devices)."""
        for i in range(0, len(prompts), self.rows):
            index = np.r_[i : min(i + self.rows, len(prompts))]
            padded = np.r_[index, np.full(self.rows - len(index), i)]
            some = pack_prompts(self.tokenizer, [prompts[j] for j in padded], width)
            narrow = bucket(int(some["prompt_len"].max()), width)
            batch = (some["prompt"][:, :narrow], some["prompt_len"], *(a[padded] for a in arrays))
            yield len(index), put(batch, self.data)

    def complete(self, params, prompts: list[str], width: int, desc: str = "") -> list[dict[str, Any]]:
        """Greedy completions: {"text", "tokens", "truncated"} per prompt; a progress bar if it gets a name."""
        done = []
        with tqdm(total=len(prompts), desc=desc, unit="problem", leave=False, disable=not (desc and leads())) as bar:
            for n, batch in self._batches(prompts, width):
                out = fetch(self._greedy(params, *batch))
                texts = decode_rows(self.tokenizer, out["tokens_MT"][:n], out["len_M"][:n])
                done += [
                    {"text": t, "tokens": int(k), "truncated": bool(c)}
                    for t, k, c in zip(texts, out["len_M"], out["truncated_M"])
                ]
                bar.update(n)
        return done

    def attempt_logp(self, params) -> tuple[list[np.ndarray], list[list[int]]]:
        """log-probs of every flawed attempt y0 after its attempt prompt, per token, and the tokens themselves."""
        ids = [self.tokenizer.encode(q.y0) for q in self.quads]
        prompts = [attempt_prompt(q.x) for q in self.quads]
        tokens_BT, len_B = right_pad(ids, self.shapes["T_replay"], self.tokenizer.pad_id)
        rows = []
        for n, batch in self._batches(prompts, self.shapes["P_attempt"], tokens_BT):
            rows += list(fetch(self._logp(params, *batch))[:n])
        return [row[:k] for row, k in zip(rows, len_B)], [t[:k] for t, k in zip(ids, len_B)]

    def __call__(self, params, base_logp: list[np.ndarray] | None = None) -> list[dict[str, Any]]:
        """One record per quadruple. With the base's `attempt_logp` also how training moved each flawed attempt."""
        attempts = self.complete(
            params, [attempt_prompt(q.x) for q in self.quads], self.shapes["P_attempt"], "attempts"
        )
        prompts = [revise_prompt(q.x, q.y0, q.f) for q in self.quads]
        revisions = self.complete(params, prompts, self.shapes["P_revise"], "revisions")
        records = score_records(self.quads, attempts, revisions)
        if base_logp is not None:
            now, ids = self.attempt_logp(params)
            for record, q, a, b, tokens in zip(records, self.quads, now, base_logp, ids):
                record.update(credit_record(self.tokenizer, q, a - b, tokens))
        return records


def score_records(quads: list[Quadruple], attempts: list[dict], revisions: list[dict]) -> list[dict[str, Any]]:
    """What is kept of evaluated quadruples: scores of y0, attempt and revision (None: harness error), and groups."""
    texts = [q.y0 for q in quads] + [done["text"] for done in (*attempts, *revisions)]
    scores = [None if math.isnan(score) else score for score in score_outcomes(texts, [*quads, *quads, *quads])]
    n, records = len(quads), []
    for i, (q, attempt, revision) in enumerate(zip(quads, attempts, revisions)):
        records.append({
            "task_id": q.meta["task_id"],
            "horizon": q.meta["horizon"],
            "edit_distance": q.meta["edit_distance"],
            "error_tags": q.meta["error_tags"],
            "y0": scores[i],
            "attempt": scores[n + i],
            "revised": scores[2 * n + i],
            "revised_tokens": revision["tokens"],
            "revised_truncated": revision["truncated"],
            "revised_format": format_valid(revision["text"], q.meta["domain"]),
            "attempt_tokens": attempt["tokens"],
            "attempt_truncated": attempt["truncated"],
            "revision": revision["text"],
        })  # fmt: skip
    return records


def credit_record(tokenizer: Tokenizer, q: Quadruple, shift_T: np.ndarray, ids: list[int]) -> dict[str, float | None]:
    """Credit localization on one flawed attempt: is the shift log pi - log pi_base lower on the erroneous step?

    credit_auc: AUC of -shift as a detector of the `error_span` tokens; credit_gap: mean shift off the span minus on it.
    """
    span = q.meta["error_span"]
    if span is None:
        return {"credit_auc": None, "credit_gap": None}
    label_T = tokenizer.overlap(ids, q.y0, [tuple(span)])[0]
    auc = detector_auc(-shift_T, label_T)
    gap = None if auc is None else float(shift_T[label_T == 0].mean() - shift_T[label_T > 0].mean())
    return {"credit_auc": auc, "credit_gap": gap}


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies and rates of one evaluation, whole and by horizon, edit distance and error tag; over what was scored:
    harness_errors counts the records in which a score is missing."""
    known = lambda r: None not in (r["y0"], r["revised"])

    def rates(rows):
        return {
            "n": len(rows),
            "accuracy": mean(r["attempt"] for r in rows),
            "accuracy_revised": mean(r["revised"] for r in rows),
            "delta_critique": mean(r["revised"] - r["y0"] for r in rows if known(r)),
        }

    bucket = lambda r: next(
        (f"<={edge}" for edge in EDIT_BUCKETS if r["edit_distance"] <= edge), f">{EDIT_BUCKETS[-1]}"
    )
    keys = lambda key: sorted(
        {key(r) for r in records}, key=lambda k: k if isinstance(k, int) else (k[0], int(k.lstrip("<=>")))
    )
    group = lambda key: {str(k): rates([r for r in records if key(r) == k]) for k in keys(key)}
    tags = sorted({tag for r in records for tag in r["error_tags"]})
    return {
        **rates(records),
        "accuracy_y0": mean(r["y0"] for r in records),
        "wrong_to_right": mean(r["revised"] for r in records if r["y0"] == 0),
        "right_to_wrong": mean(1 - r["revised"] for r in records if known(r) and r["y0"]),
        "harness_errors": sum(None in (r["y0"], r["attempt"], r["revised"]) for r in records),
        "format_frac": mean(r["revised_format"] for r in records),
        "truncated_frac": mean(r["revised_truncated"] for r in records),
        "tokens_mean": mean(r["revised_tokens"] for r in records),
        "credit_auc": mean(r.get("credit_auc") for r in records),
        "credit_gap": mean(r.get("credit_gap") for r in records),
        "by_horizon": group(lambda r: r["horizon"]),
        "by_edit_distance": group(bucket),
        "by_tag": {tag: rates([r for r in records if tag in r["error_tags"]]) for tag in tags},
    }


PRECHECK_N, PRECHECK_GROUPS = 200, 96


def precheck(evaluator: Evaluator, params, sample, prompts: int, replay_train: list[Quadruple]) -> dict[str, float]:
    """Can a critique help this base model at all? Measured on fixed training problems before any training.

    Accuracy of y0, of the greedy revision with f and with f left out, the leak rate of f, and the share of groups whose
    sampled completions all score the same (they give no gradient); `sample(batch)` draws groups for `prompts` prompts.
    """
    index = np.random.default_rng((BASE_SEED, STREAM_EVAL)).permutation(len(replay_train))[:PRECHECK_N]
    quads = [replay_train[i] for i in index]
    width = evaluator.shapes["P_revise"]
    score = lambda done: mean(score_outcomes([c["text"] for c in done], quads))
    std_n = []
    for i in range(0, PRECHECK_GROUPS, prompts):
        some = [quads[j % len(quads)] for j in range(i, i + prompts)]
        batch = pack_prompts(evaluator.tokenizer, [revise_prompt(q.x, q.y0, q.f) for q in some], width)
        out = fetch(sample(put(batch, evaluator.data)))
        scores_BG = outcome_scores(decode_rows(evaluator.tokenizer, out["tokens_MT"], out["len_M"]), some)
        std_n += [float(np.std(row[~np.isnan(row)])) if not np.isnan(row).all() else 0.0 for row in scores_BG]
    quads.sort(key=lambda q: len(q.y1))  # those that end together share a batch
    with_f = evaluator.complete(params, [revise_prompt(q.x, q.y0, q.f) for q in quads], width, "with f")
    without = evaluator.complete(params, [revise_prompt(q.x, q.y0, "") for q in quads], width, "without f")
    return {
        "n": len(quads),
        "accuracy_y0": score([{"text": q.y0} for q in quads]),
        "accuracy_with_f": score(with_f),
        "accuracy_without_f": score(without),
        "leak_rate": replay_report(quads)["leak_rate"],
        "groups": len(std_n),
        "zero_std_frac": mean(float(std == 0) for std in std_n),
    }


def base_report(
    directory: pathlib.Path, evaluator: Evaluator, params, sample, train, settings: tuple
) -> dict[str, Any]:
    """{"summary", "precheck"} of the base, cached beside it under a key of everything the numbers depend on."""
    key = [replay_sha256(evaluator.quads), sorted(evaluator.shapes.items()), *map(str, settings)]
    key += [replay_sha256(train), evaluator.tokenizer.sha256(), sources_sha256("evaluation")]
    path = directory / f"report_{sha256(json.dumps(key))[:16]}.json"
    known = broadcast(path.read_text() if leads() and path.is_file() else "")
    if known:
        return json.loads(known)
    report = {
        "summary": summarize(evaluator(params)),
        "precheck": precheck(evaluator, params, sample, settings[0], train),
    }
    text = json.dumps(report, indent=1)
    if leads():
        write_atomic(path, text)
    return json.loads(text)  # as a later run will read it
