"""Proof that two runs may stand in one table: every field is computed from what was loaded or counted. Used by all
trainers."""

import ast
import hashlib
import json
import pathlib
from typing import Any

import jax.numpy as jnp

from common.basics import parse_python, sha256
from common.hosts import fetch
from common.model import leaf_names
from common.programs import CODE_LIMITS
from common.prompts import templates_sha256
from common.replay import replay_sha256


def weights_sha256(params) -> str:
    """Digest of names, shapes, dtypes and bytes of a parameter tree."""
    digest = hashlib.sha256()
    for name, leaf in leaf_names(params).items():
        array = fetch(leaf)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode() + array.tobytes())
    return digest.hexdigest()


def sources_sha256(*rooms: str) -> str:
    """Digest of the source files of `rooms` and of every room that these import, directly or not."""
    folder, todo, texts = pathlib.Path(__file__).parent, list(rooms), {}
    while todo:
        room = todo.pop()
        if room in texts:
            continue
        texts[room] = (folder / f"{room}.py").read_text(encoding="utf-8")
        for node in ast.walk(parse_python(texts[room])):
            if isinstance(node, ast.ImportFrom) and node.module == "common":
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
                todo.append(node.module.removeprefix("common."))
    return sha256(json.dumps(sorted(texts.items())))


def program_sha256(path: str | pathlib.Path) -> str:
    """Digest of a program's lines of code: comments on lines of their own, empty lines and texts that are statements,
    as docstrings are, do not count. By lines, for a syntax tree looks different from one Python to the next."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(parse_python(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return sha256("\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#")))


def verifier_sha256() -> str:
    """Digest of the rooms that a score passes through: changing a rule changes every fingerprint."""
    return sha256(sources_sha256("rewards") + json.dumps(CODE_LIMITS))


def fingerprint(**fields: Any) -> dict[str, Any]:
    """The fields and their digest; raises ValueError on a field that is None, for a null field proves nothing."""
    empty = [name for name, value in fields.items() if value is None]
    if empty:
        raise ValueError(f"fingerprint fields without a value: {', '.join(empty)}")
    return {**fields, "digest": sha256(json.dumps(fields, sort_keys=True))}


def run_identity(args, base_params, tokenizer, replay, shapes, dtype) -> dict[str, Any]:
    """The part of the fingerprint that is known before the first step; a checkpoint is resumed only under the same."""
    return fingerprint(
        base_weights=weights_sha256(base_params), tokenizer=tokenizer.sha256(), templates=templates_sha256(),
        train_replay=replay_sha256(replay["train"]), test_replay=replay_sha256(replay["test"]),
        verifier=verifier_sha256(),
        decode={"temperature": args.temperature, "dtype": jnp.dtype(dtype).name, "evaluation": "greedy",
                "eval_problems": args.eval_problems, **shapes},
        revision_budget=1, planned_steps=args.steps,
    )  # fmt: skip


def run_fingerprint(identity: dict[str, Any], counted: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of a run, from its identity and the budgets that it has spent (before it starts: will spend)."""
    return fingerprint(**{k: v for k, v in identity.items() if k not in ("digest", "planned_steps")}, **counted)


def count_budgets(steps: int, B: int, G: int, shapes: dict[str, int], n_test: int) -> dict[str, Any]:
    """The budgets that `steps` finished steps and one evaluation have spent; tokens are those of the fixed shapes.

    A step learns from B * G completions of T tokens, sampled or taken from the replay: training_tokens are the
    positions that its loss covers, rollout_budget the shape they come in.
    """
    T = shapes["T"]
    return {
        "optimizer_steps": steps, "training_tokens": steps * B * G * T, "rollout_budget": [steps, B, G, T],
        "test_compute_budget": n_test * 2 * T,
    }  # fmt: skip
