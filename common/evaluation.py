"""The same measurement for every method: first attempt, revision, credit localization, and the pre-check of the base.
Used by all trainers."""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from common.base import BASE_SEED
from common.basics import STREAM_EVAL, mean, pack_arrays, round_up, sha256, unpack_arrays
from common.batches import bucket, decode_rows, pack_prompts, right_pad
from common.credit import (
    NOTHING,
    POWERS,
    AttemptRead,
    attempt_record,
    credit_records,
    digit_tokens,
    kind_rates,
    parting,
    standard_error,
    step_starts,
    survival,
)
from common.fingerprint import sources_sha256
from common.hosts import batch_shardings, fetch, gather, kept, leads, progress, put, say
from common.model import Reading
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple, replay_report, replay_sha256
from common.rewards import format_valid, outcome_scores, score_outcomes
from common.sampling import generate, read_tokens
from common.tokenizer import Tokenizer
from common.verifier import split_steps

EVAL_ROWS, CPU_ROWS = 128, 32  # rows decoded at once; on CPUs, where 32 rows take less time each than 128
VALUES_N, VALUES_GROUP = 64, 8  # problems whose steps get values, if so many are evaluated; samples a prefix
WITH_ERROR = ("credit_excess", "flip_gain", "value_excess")  # figures of a summary with a standard error
EDIT_BUCKETS = (2, 5, 10)  # edit distance: 1-2, 3-5, 6-10, 11+


def first_problems(quads: list[Quadruple], most: int) -> list[Quadruple]:
    """The first `most` quadruples of a fixed shuffled order, as they stand in `quads`; all of them if `most` is 0. The
    order is everybody's: more problems are these and others."""
    order = np.random.default_rng((BASE_SEED, STREAM_EVAL)).permutation(len(quads))
    return [quads[i] for i in sorted(order[: most or None])]


def bar_over(total: int, desc: str):
    """A progress bar over `total` problems, gone when they are done; none without a name."""
    return tqdm(total=total, desc=desc, unit="problem", leave=False, disable=not (desc and leads()))


class Evaluator:
    """Greedy first attempts and revisions of a fixed set of quadruples, and log-probs of their flawed attempts."""

    def __init__(
        self, graphdef, tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int], mesh, dtype, most: int = 0
    ):
        """`most`: `--eval_problems`, which of `quads` are evaluated."""
        self.most, valued, quads = most, first_problems(quads, VALUES_N), first_problems(quads, most)
        # short and long together would decode to the longest: rows that end together share a batch
        self.quads = sorted(quads, key=lambda q: (len(q.y1), q.meta["task_id"]))
        math_alone = all(q.meta["domain"] == "math" for q in quads)  # a program's lines have no values of their own
        chosen = {id(q) for q in valued} if len(quads) >= VALUES_N and math_alone else ()
        self.valued = [i for i, q in enumerate(self.quads) if id(q) in chosen]
        self.tokenizer, self.shapes, self.dtype = tokenizer, shapes, jnp.dtype(dtype).name
        rows = CPU_ROWS if jax.default_backend() == "cpu" else EVAL_ROWS
        self.rows = round_up(min(rows, len(quads)), mesh.shape["data"])
        self._mesh_rows, (self.by_row, _) = mesh.shape["data"], batch_shardings(mesh)
        self.base: list[AttemptRead] | None = None  # of the flawed attempts, what the credit records compare with
        self.values: list[list[float] | None] = [None] * len(quads)  # `prefix_values` of the base
        ids = (tokenizer.eos_ids, tokenizer.pad_id)

        def rollout(params, prompt_BP, len_B, key, group, temperature, greedy):
            model, T = nnx.merge(graphdef, gather(mesh, params)), shapes["T"]
            return generate(model, prompt_BP, len_B, key, group, T, temperature, *ids, greedy=greedy, dtype=dtype)

        kind_V = digit_tokens(tokenizer)

        def read(params, prompt_BP, len_B, tokens_BT, other_BT):
            model = nnx.merge(graphdef, gather(mesh, params))
            (states,) = model([Reading(prompt_BP, len_B, [tokens_BT])], dtype, learns=False)
            return read_tokens(states.completions[0], tokens_BT, other_BT, model.head_VD(), jnp.asarray(kind_V), POWERS)

        self._rollout, self._read = jax.jit(rollout, static_argnums=(4, 5, 6)), jax.jit(read)

    def _batches(self, prompts: list[str], width: int, len_N: np.ndarray | None = None, *arrays: np.ndarray):
        """Batches of `self.rows` packed prompts, each as wide as its longest needs (few widths, up to `width`), and of
        the rows of `arrays` [N, T], of which len_N count; the last is filled up with copies of its first row. Yields
        (n real, arrays on devices)."""
        for i in range(0, len(prompts), self.rows):
            index = np.r_[i : min(i + self.rows, len(prompts))]
            padded = np.r_[index, np.full(self.rows - len(index), i)]
            some = pack_prompts(self.tokenizer, [prompts[j] for j in padded], width)
            narrow = bucket(int(some["prompt_len"].max()), width)
            short = bucket(int(len_N[padded].max()), arrays[0].shape[1]) if arrays else 0
            batch = (some["prompt"][:, :narrow], some["prompt_len"], *(a[padded, :short] for a in arrays))
            yield len(index), put(batch, self.by_row)

    def complete(
        self, params, prompts: list[str], width: int, desc: str = "", first: Callable[[float], None] | None = None
    ) -> list[dict[str, Any]]:
        """Greedy completions: {"text", "tokens", "truncated"} per prompt; a progress bar if it gets a name. `first` is
        told the seconds a row of the first batch took, its compilation left out."""
        done, how = [], (jax.random.key(0), 1, 1.0, True)
        with bar_over(len(prompts), desc) as bar:
            for n, batch in self._batches(prompts, width):
                if first and not done:
                    self._rollout.lower(params, *batch, *how).compile()
                began = time.perf_counter()
                out = fetch(self._rollout(params, *batch, *how))
                if first and not done:
                    with tqdm.external_write_mode():  # a line of its own, not behind the bar
                        first((time.perf_counter() - began) / self.rows)
                texts = decode_rows(self.tokenizer, out["tokens_MT"][:n], out["len_M"][:n])
                done += [
                    {"text": t, "tokens": int(k), "truncated": bool(c)}
                    for t, k, c in zip(texts, out["len_M"], out["truncated_M"])
                ]
                bar.update(n)
        return done

    def read_attempts(self, params, others: list[np.ndarray]) -> list[AttemptRead]:
        """What a policy says of every flawed attempt y0 after its attempt prompt, and of the tokens `others` beside its
        own (-1: the likeliest other one of its kind)."""
        ids = [self.tokenizer.encode(q.y0) for q in self.quads]
        tokens_BT, len_B = right_pad(ids, self.shapes["T_replay"], self.tokenizer.pad_id)
        other_BT, _ = right_pad([list(other_T) for other_T in others], self.shapes["T_replay"], self.tokenizer.pad_id)
        prompts, rows = [attempt_prompt(q.x) for q in self.quads], []
        with bar_over(len(ids), "log-probs") as bar:
            for n, batch in self._batches(prompts, self.shapes["P_attempt"], len_B, tokens_BT, other_BT):
                out = fetch(self._read(params, *batch))
                rows += [{key: part[i] for key, part in out.items()} for i in range(n)]
                bar.update(n)
        return [
            AttemptRead(t[:k], **{key: part[:k] for key, part in row.items()}) for t, k, row in zip(ids, len_B, rows)
        ]

    def read_base(self, params, path: pathlib.Path) -> None:
        """From here on these are the base's parameters, and records say how training has moved the policy since. What
        the base says of the attempts is kept at `path`."""
        others = []
        for q in self.quads:
            ids, y1 = self.tokenizer.encode(q.y0), self.tokenizer.encode(q.y1)
            others.append(np.full(len(ids), -1))
            t = parting(ids, y1)
            if t is not None:
                others[-1][t] = y1[t]
        fields = ("logp", "other", "other_logp", "norm")

        def make() -> str:
            reads = self.read_attempts(params, others)
            return pack_arrays([np.concatenate([getattr(read, name) for read in reads]) for name in fields], {})

        arrays, _ = unpack_arrays(kept(path, make))
        ids = [self.tokenizer.encode(q.y0)[: self.shapes["T_replay"]] for q in self.quads]
        ends = np.cumsum([*map(len, ids)])[:-1]
        logp, other, other_logp, norm = (np.split(array, ends) for array in arrays)
        self.base = [AttemptRead(*row) for row in zip(ids, logp, [o.astype(int) for o in other], other_logp, norm)]

    def prefix_values(self, params, temperature: float) -> list[list[float] | None]:
        """How often y0's first 0, 1, ... steps, continued by samples, end right: the Monte-Carlo values of VinePPO
        (https://arxiv.org/abs/2410.01679), the last that of y0 itself; of the attempts in `valued`, else None."""
        width, group, found = self.shapes["P_attempt"] + self.shapes["T_replay"], VALUES_GROUP, {}
        rows = []  # (tokens of y0 left, problem, steps before, prompt ids, prefix ids)
        for i in self.valued:
            x, y0 = self.quads[i].x, self.quads[i].y0
            ids, prompt = self.tokenizer.encode(y0), self.tokenizer.encode_prompt(attempt_prompt(x))
            for j, start in enumerate(step_starts(self.tokenizer, ids, y0)):
                rows.append((len(ids) - start, i, j, prompt, ids[:start]))
        rows.sort(key=lambda row: row[:3])  # those that end together share a batch
        size = round_up(EVAL_ROWS // group, self._mesh_rows)
        with bar_over(len(rows), "values of steps") as bar:
            for at in range(0, len(rows), size):
                some = rows[at : at + size]
                full = [*some, *[some[0]] * (size - len(some))]
                packed = right_pad([prompt + prefix for *_, prompt, prefix in full], width, self.tokenizer.pad_id)
                key = jax.random.fold_in(jax.random.key(STREAM_EVAL), at)
                out = fetch(self._rollout(params, *put(packed, self.by_row), key, group, temperature, False))
                tails = [row[:n].tolist() for row, n in zip(out["tokens_MT"], out["len_M"])][: len(some) * group]
                whole = [[*some[m // group][-1], *tail] for m, tail in enumerate(tails)]
                owners = [self.quads[some[m // group][1]] for m in range(len(tails))]
                scores = np.reshape(score_outcomes(self.tokenizer.decode(whole), owners), (-1, group)).mean(1)
                found |= {row[1:3]: float(score) for row, score in zip(some, scores)}
                bar.update(len(some))
        last = score_outcomes([q.y0 for q in self.quads], self.quads) if found else [0.0] * len(self.quads)
        of = lambda i: [value for (owner, _), value in sorted(found.items()) if owner == i]
        return [[*of(i), last[i]] if of(i) else None for i in range(len(self.quads))]

    def sample(self, params, prompts: list[str], group: int, temperature: float, key) -> list[str]:
        """`group` sampled completions of each prompt, as texts."""
        batch = pack_prompts(self.tokenizer, prompts, self.shapes["P_revise"])
        batch = put((batch["prompt"], batch["prompt_len"]), self.by_row)
        out = fetch(self._rollout(params, *batch, key, group, temperature, False))
        return decode_rows(self.tokenizer, out["tokens_MT"], out["len_M"])

    def __call__(self, params, first: Callable[[float], None] | None = None) -> list[dict[str, Any]]:
        """One record per quadruple; once the base is known also how training moved each flawed attempt. `first`: see
        `complete`."""
        prompts = [attempt_prompt(q.x) for q in self.quads]
        attempts = self.complete(params, prompts, self.shapes["P_attempt"], "attempts", first)
        prompts = [revise_prompt(q.x, q.y0, q.f) for q in self.quads]
        revisions = self.complete(params, prompts, self.shapes["P_revise"], "revisions")
        records = score_records(self.quads, attempts, revisions)
        if self.base is not None:
            now = self.read_attempts(params, [b.other for b in self.base])
            credit = credit_records(self.tokenizer, self.quads, self.base, now, self.values)
            records = [record | more for record, more in zip(records, credit)]
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
            **attempt_record(q, attempt["text"]),
        })  # fmt: skip
    return records


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
        **rates(records), "accuracy_y0": mean(r["y0"] for r in records),
        "wrong_to_right": mean(r["revised"] for r in records if r["y0"] == 0),
        "right_to_wrong": mean(1 - r["revised"] for r in records if known(r) and r["y0"]),
        "harness_errors": sum(None in (r["y0"], r["attempt"], r["revised"]) for r in records),
        "format_frac": mean(r["revised_format"] for r in records),
        "truncated_frac": mean(r["revised_truncated"] for r in records),
        "tokens_mean": mean(r["revised_tokens"] for r in records),
        "credit_auc": mean(r.get("credit_auc") for r in records),
        **{key: mean(r.get(key) for r in records) for key in ("credit_gap", *NOTHING)},
        **{f"{key}_se": standard_error(r.get(key) for r in records) for key in WITH_ERROR},
        "survival": survival(records), "attempt_kinds": kind_rates([r.get("attempt_kinds") for r in records]),
        "by_horizon": group(lambda r: r["horizon"]),
        "by_edit_distance": group(bucket),
        "by_tag": {tag: rates([r for r in records if tag in r["error_tags"]]) for tag in tags},
    }  # fmt: skip


PRECHECK_N, PRECHECK_GROUPS = 200, 96  # or --eval_problems, if that is less


def precheck_size(most: int) -> tuple[int, int]:
    """(problems, groups) of the pre-check under `--eval_problems`."""
    return min(PRECHECK_N, most or PRECHECK_N), min(PRECHECK_GROUPS, most or PRECHECK_GROUPS)


def precheck(evaluator: Evaluator, params, train, prompts: int, group: int, temperature: float) -> dict[str, float]:
    """Can a critique help this base model at all? Measured on fixed training problems before any training.

    Accuracy of y0, of the greedy revision with f and with f left out, the leak rate of f, and the share of groups whose
    sampled completions all score the same (they give no gradient), drawn `prompts` prompts at a time.
    """
    n, groups = precheck_size(evaluator.most)
    index = np.random.default_rng((BASE_SEED, STREAM_EVAL)).permutation(len(train))[:n]
    quads = [train[i] for i in index]
    key = jax.random.key(STREAM_EVAL)  # fixed, so that all seeds and methods share one report on the base
    std_n = []
    for i in progress(range(0, groups, prompts), desc="groups", unit="batch", leave=False):
        some = [quads[j % len(quads)] for j in range(i, i + prompts)]
        texts = evaluator.sample(params, [revise_prompt(q.x, q.y0, q.f) for q in some], group, temperature, key)
        scores_BG = outcome_scores(texts, some)
        std_n += [float(np.std(row[~np.isnan(row)])) if not np.isnan(row).all() else 0.0 for row in scores_BG]
    quads.sort(key=lambda q: len(q.y1))  # those that end together share a batch
    width, score = evaluator.shapes["P_revise"], lambda texts: mean(score_outcomes(texts, quads))
    revise = lambda f, desc: evaluator.complete(params, [revise_prompt(q.x, q.y0, f(q)) for q in quads], width, desc)
    with_f, without = revise(lambda q: q.f, "with f"), revise(lambda q: "", "without f")
    return {
        "n": len(quads), "accuracy_y0": score([q.y0 for q in quads]),
        "accuracy_with_f": score([c["text"] for c in with_f]),
        "accuracy_without_f": score([c["text"] for c in without]), "leak_rate": replay_report(quads)["leak_rate"],
        "groups": len(std_n), "zero_std_frac": mean(float(std == 0) for std in std_n),
    }  # fmt: skip


def print_precheck(check: dict[str, float]) -> None:
    """The base model's pre-check, and in plain words whether the critique helps it."""
    gain = check["accuracy_with_f"] - check["accuracy_without_f"]
    say(
        f"Pre-check of the base on {check['n']} training problems: y0 right {check['accuracy_y0']:.1%}; revised with f"
        f" {check['accuracy_with_f']:.1%}, without f {check['accuracy_without_f']:.1%}; answer leaked by f"
        f" {check['leak_rate']:.1%}; groups without variance {check['zero_std_frac']:.1%} of {check['groups']}."
    )
    if gain >= 0.03:
        say(f"The critique carries signal: {100 * gain:+.1f} points for this base.")
    else:
        say(
            f"WARNING: the critique carries no usable signal for this base ({100 * gain:+.1f} points; 3 are wanted):"
            " there is little to transport, whatever the method."
        )


def say_ahead(seconds: float, evaluator: Evaluator, group: int) -> None:
    """What the report on the base and the evaluation at the end will take, a row of a batch taking so many seconds."""
    n, (n_check, groups) = len(evaluator.quads), precheck_size(evaluator.most)
    prefixes = sum(len(split_steps(evaluator.quads[i].y0)) for i in evaluator.valued)
    values = f", {prefixes} beginnings of attempts with {VALUES_GROUP} samples" if prefixes else ""
    rows = 2 * n + 2 * n_check + groups * group + prefixes * VALUES_GROUP / 2  # half of an attempt stands already
    took = lambda rows: "under a minute" if rows * seconds < 60 else f"about {math.ceil(rows * seconds / 60)} minutes"
    say(
        f"First a report on the base: {n} test problems and {n_check} training problems twice each, {groups} groups of"
        f" {group} samples{values}. By the first batch that takes {took(rows)}, and the"
        f" evaluation at the end {took(2 * n)}; --eval_problems N makes both shorter."
    )


def base_report(
    directory: pathlib.Path, evaluator: Evaluator, params, train, prompts: int, group: int, temperature: float
) -> dict[str, Any]:
    """{"summary", "values", "precheck"} of the base: what there is to improve. Printed, cached beside the base under a
    key of all that the numbers depend on; from here on `evaluator` knows the base."""
    key = [prompts, group, temperature, evaluator.dtype, evaluator.shapes, evaluator.tokenizer.sha256(), evaluator.most]
    key += [replay_sha256(train), replay_sha256(evaluator.quads), sources_sha256("evaluation"), jax.default_backend()]
    name = f"{sha256(json.dumps(key, sort_keys=True))[:16]}.json"

    def make() -> str:
        summary = summarize(evaluator(params, lambda seconds: say_ahead(seconds, evaluator, group)))
        values = evaluator.prefix_values(params, temperature)
        check = precheck(evaluator, params, train, prompts, group, temperature)
        return json.dumps({"summary": summary, "values": values, "precheck": check}, indent=1)

    text = kept(directory / f"report_{name}", make)
    report = json.loads(text)  # as a later run will read it
    evaluator.values = report["values"]
    evaluator.read_base(params, directory / f"reads_{name}")
    print_precheck(report["precheck"])
    return report
