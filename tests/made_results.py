"""Results of runs that never ran, with a truth that is known: folders as a run leaves them, their outcomes drawn from

    P(right) = sigmoid(difficulty of the problem + effect of the method + run of the method and seed)
"""

import json
import pathlib

import numpy as np

from common.basics import sha256
from common.cells import NOT_IN_RUN_NAME
from common.replay import Quadruple, replay_sha256, write_replay
from common.results import SCHEMA_VERSION, script_defaults

METHODS = ("b0_sft", "b1_dpo", "b2_grpo", "b3_grpo_verifier", "b4_grpo_critique", "b5_cts")
TAGS = ("local_arithmetic", "missing_case", "state_tracking")
TOPICS = ("toys", "pens", "<b>eggs</b>")


def made_quads(task: str, n: int) -> list[Quadruple]:
    """n problems of 2 to 6 steps."""
    quads = []
    for i in range(n):
        x = f"Ann has {i} {TOPICS[i % 3]}. She gets 2 more. How many has she?"
        y0, y1 = f"{i}+2 = <<{i}+2={i + 3}>>{i + 3}\n#### {i + 3}", f"{i}+2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"
        meta = dict(
            task_id=f"{task}/{i:05d}", domain="math", split="test", horizon=2 + i % 5, edit_distance=1 + i % 13,
            error_tags=[TAGS[i % 3]], error_span=[0, 6], teacher="perturb", y0_correct=False, y1_correct=True,
            is_human_audited=False, answer=str(i + 2),
        )  # fmt: skip
        quads.append(Quadruple(x, y0, f"The first step is wrong: {i}+2 is not {i + 3}.", y1, meta))
    return quads


def made_fingerprint(quads: list[Quadruple], **fields) -> dict:
    """A fingerprint that all runs on these problems share; `fields` change it."""
    found = {
        "base_weights": sha256("base"), "tokenizer": sha256("tokenizer"), "test_replay": replay_sha256(quads),
        "decode": {"temperature": 0.7, "dtype": "float32", "T": 128}, "optimizer_steps": 50, "training_tokens": 409600,
        **fields,
    }  # fmt: skip
    return {**found, "digest": sha256(json.dumps(found, sort_keys=True))}


def made_run(
    folder: pathlib.Path, method: str, task: str, seed: int, n: int, effect: float = 0.0, run_sd: float = 0.1,
    flags: dict | None = None, fields: dict | None = None, change=None,
) -> pathlib.Path:  # fmt: skip
    """One finished run in folder/<its name>; `effect` and `run_sd` in logits, `change` may spoil its result."""
    quads = made_quads(task, n)
    args = {**script_defaults(method), "task": task, "seed": seed, **(flags or {})}
    args["replay"] = str(folder / f"replay_{task}")
    difficulty = np.random.default_rng(int(sha256(task)[:8], 16)).normal(0, 2, n)
    rng = np.random.default_rng([int(sha256(f"{method} {sorted((flags or {}).items())}")[:8], 16), seed])
    chance = 1 / (1 + np.exp(-(difficulty + effect + rng.normal(0, run_sd))))
    revised, attempt = rng.random(n) < chance, rng.random(n) < 0.9 * chance
    excess = rng.normal(0.05, 0.2, n)
    records = [
        {
            "task_id": q.meta["task_id"], "horizon": q.meta["horizon"], "edit_distance": q.meta["edit_distance"],
            "error_tags": q.meta["error_tags"], "y0": 0.0, "attempt": float(attempt[i]), "revised": float(revised[i]),
            "revised_tokens": 40, "revised_truncated": False, "revised_format": True, "attempt_tokens": 38,
            "attempt_truncated": False, "revision": q.y1 if revised[i] else q.y0, "attempt_wrong_step": None,
            "attempt_steps": 2, "attempt_kinds": None, "credit_auc": 0.5, "credit_gap": 0.1, "credit_matched": 0.55,
            "credit_null": 0.5, "credit_excess": excess[i] if i % 7 else None, "credit_temperature": 0.97,
            "flip_gain": 0.2, "value_correlation": None, "value_excess": None,
        }
        for i, q in enumerate(quads)
    ]  # fmt: skip
    base = {"n": n, "accuracy": 0.27, "accuracy_revised": 0.23, "delta_critique": 0.23, "wrong_to_right": 0.23,
            "right_to_wrong": None, "format_frac": 0.5, "tokens_mean": 50.0, "survival": {"all": [0.9, 0.5]},
            "by_horizon": {str(h): {"n": 1, "accuracy_revised": 0.2} for h in range(2, 7)}}  # fmt: skip
    result = {
        "schema_version": SCHEMA_VERSION, "method": method, "args": args,
        "fingerprint": made_fingerprint(quads, **(fields or {})), "base": base,
        "summary": {**base, "survival": {"all": [0.95, 0.6]}}, "records": records, "versions": {"jax": "0.10.2"},
    }  # fmt: skip
    if change:
        change(result)
    name = f"{method}__{task}__s{seed}__{sha256(json.dumps(flags or {}))[:8]}"
    (folder / name).mkdir(parents=True)
    settings = {k: v for k, v in args.items() if k not in NOT_IN_RUN_NAME}
    (folder / name / "args.json").write_text(json.dumps(settings))
    (folder / name / "result.json").write_text(json.dumps(result, indent=1))
    accuracy = lambda step: 0.3 + step / 200 + 0.1 * rng.random()
    curve = [{"step": s, "charts/accuracy": accuracy(s), "charts/tokens": 14000 * (s + 1)} for s in range(50)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    if not (folder / f"replay_{task}").is_dir():
        (folder / f"replay_{task}").mkdir()
        write_replay(folder / f"replay_{task}" / "test.jsonl", quads)
    return folder / name


def made_matrix(
    folder: pathlib.Path, methods=METHODS, tasks=("fixtures_math",), seeds=range(3), n: int = 60,
    effects: dict[str, float] | None = None, run_sd: float = 0.1,
) -> pathlib.Path:  # fmt: skip
    """Every method on every task with every seed; effects: {method: logits}."""
    for task in tasks:
        for method in methods:
            for seed in seeds:
                made_run(folder, method, task, seed, n, (effects or {}).get(method, 0.0), run_sd)
    return folder
