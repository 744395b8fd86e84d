"""What every cell of a sweep will be, found without training: its name, its identity, its fingerprint. A process of its
own, for it loads JAX, and the launcher should hold no accelerator while cells run.

    echo '{"cells": [...], "out_dir": "runs", "bases": null}' | python sweeps/identify.py

Reads and prints JSON; everything else that is said goes to standard error. Data, base and tokenizer are loaded once a
task, made if they are not there. Exits with 2 where a command line or a replay is bad.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import types
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import tyro

import cts_common as cts
from common.base import SHIPPED, nano_base
from common.basics import writable
from common.cells import run_name
from common.fingerprint import count_budgets, run_fingerprint

# flags that identities depend on; one that is not named here cannot be read when an identity is made
BASE_FLAGS = ("task", "model", "replay", "data_dir", "unsafe_sandbox", "out_dir")
FLAGS = (*BASE_FLAGS, "steps", "temperature", "dtype", "eval_problems", "max_prompt_tokens", "max_new_tokens")


def parse_flags(label: str, script: str, flags: list[str]):
    """The `Args` of a cell's command line; InputError that names the cell where the script would refuse it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(importlib.import_module(script).Args, args=flags)
    except SystemExit:
        text = " ".join(re.sub(r"[^\x20-\x7e]+", " ", said.getvalue()).split())  # without the frame around it
        raise cts.InputError(f"{label}: {script}.py does not take {' '.join(flags)} ({text[:300]})") from None


def shared_base(task: str, quads: list[cts.Quadruple], out_dir: str, bases: str | None) -> str:
    """`--model` of all cells of a task that start from its nano base: nano if that is shipped, else its folder, which
    is made now, in `bases` or beside the runs."""
    folder = nano_base(task, quads, out_dir)
    if folder.parent == SHIPPED:
        return "nano"
    if bases is None:
        return str(folder)
    there = writable(bases, "bases") / f"{task}-{folder.name}"
    if not there.is_dir():
        half = there.with_name(f".{there.name}.{os.getpid()}")
        half.mkdir()
        for path in folder.glob("*"):
            if path.name.split(".")[0] in ("config", "model", "tokenizer", "tokenizer_config", "generation_config"):
                shutil.copy(path, half)  # the checkpoint, not what runs have cached beside it
        half.rename(there)
    return str(pathlib.Path(bases) / there.name)


@dataclasses.dataclass
class Loaded:
    """What the cells of one task and base share."""

    model: str
    replay: dict[str, list[cts.Quadruple]]
    params: Any
    tokenizer: Any


def load(args, bases: str | None) -> Loaded:
    """As a script loads it."""
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    model = shared_base(args.task, replay["train"], args.out_dir, bases) if args.model == "nano" else args.model
    _, params, tokenizer, _ = cts.load_model(model, args.task, replay, args.out_dir, cts.make_mesh("auto"))
    return Loaded(model, replay, params, tokenizer)


def identify(args, loaded: Loaded) -> tuple[dict[str, Any], dict[str, int]]:
    """(identity, shapes) of a run with these flags, as its script makes them."""
    max_new_tokens = args.max_new_tokens or cts.TASKS[args.task].max_new_tokens
    shapes = cts.fixed_shapes(loaded.tokenizer, loaded.replay, args.max_prompt_tokens, max_new_tokens)
    dtype = cts.pick_dtype(args.dtype)
    return cts.run_identity(args, loaded.params, loaded.tokenizer, loaded.replay, shapes, dtype), shapes


def identify_all(cells: list[dict[str, Any]], out_dir: str, bases: str | None) -> list[dict[str, Any]]:
    """What is known of each cell, in their order."""
    some = [parse_flags(c["label"], c["script"], [*c["flags"], f"--out_dir={out_dir}"]) for c in cells]
    for args in some:
        cts.check_args(args)
    cts.open_out_dir(some[0])
    pick = lambda args, names: types.SimpleNamespace(**{name: getattr(args, name) for name in names})
    found, at, identities = [None] * len(cells), None, {}
    for i in sorted(range(len(cells)), key=lambda i: repr(pick(some[i], FLAGS))):  # one base in memory at a time
        args, key = some[i], repr(pick(some[i], BASE_FLAGS))
        if key != at:
            loaded, at = None, key  # the old one goes before the new one comes
            loaded = load(args, bases)
        flags = pick(args, FLAGS)
        if repr(flags) not in identities:
            identities[repr(flags)] = identify(flags, loaded)
        identity, shapes = identities[repr(flags)]
        n_test = len(cts.first_problems(loaded.replay["test"], args.eval_problems))
        budgets = count_budgets(args.steps, args.prompts, args.group, shapes, n_test)
        found[i] = {
            "name": run_name(dataclasses.replace(args, model=loaded.model), cells[i]["script"]),
            "model": loaded.model if args.model != loaded.model else "", "steps": args.steps, "identity": identity,
            "fingerprint": run_fingerprint(identity, budgets), "dtype": args.dtype,
        }  # fmt: skip
    return found


def main() -> None:
    request = json.load(sys.stdin)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = identify_all(request["cells"], request["out_dir"], request["bases"])
    except cts.InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    json.dump({"cells": found, "backend": jax.default_backend()}, sys.stdout)


if __name__ == "__main__":
    main()
