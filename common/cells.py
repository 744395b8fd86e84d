"""A run among others: its name, and what its sweep expects it to be. Used by run and by sweeps/; needs no JAX, knows no
method."""

import dataclasses
import json
import os
from typing import Any

from common.basics import InputError, sha256

# They do not change the result.
NOT_IN_RUN_NAME = ("task", "seed", "out_dir", "resume", "wandb", "mesh", "save_every", "save_hf", "hosts",
                   "unsafe_sandbox")  # fmt: skip
EXPECTED = "CTS_EXPECTED"  # variable of a cell's environment: `expectation` of the identity that its sweep was given
# What a cell is started with (glibc): memory by pages of 2 MB; docs/performance.md says what that gains on CPUs.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run_settings(args) -> dict[str, Any]:
    """The flags that change a run's result, beside task and seed."""
    return {k: v for k, v in sorted(dataclasses.asdict(args).items()) if k not in NOT_IN_RUN_NAME}


def run_name(args, method: str) -> str:
    """The name of a run, which is that of its directory: the same command finds its own run again."""
    return f"{method}__{args.task}__s{args.seed}__{sha256(json.dumps(run_settings(args)))[:8]}"


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a fingerprint without its digest, those inside of another one by themselves.

    >>> flat({"verifier": "ab", "decode": {"T": 48}, "digest": "cd"})
    {'verifier': 'ab', 'decode.T': 48}
    """
    out = {}
    for name, value in fields.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in out.items() if name != "digest"}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the fields in which two fingerprints differ."""
    a, b = flat(a), flat(b)
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def expectation(identity: dict[str, Any]) -> str:
    """A run's identity as one word, a few digits of a digest for each field: "verifier:1a2b3c4d,decode:..."."""
    short = lambda value: sha256(json.dumps(value, sort_keys=True))[:8]
    return ",".join(f"{name}:{short(value)}" for name, value in identity.items() if name != "digest")


def check_expected(identity: dict[str, Any]) -> None:
    """InputError that names the fields in which this run is another than the one that its sweep planned: another base
    or other data, say, on another machine. Says nothing outside of a sweep."""
    planned = os.environ.get(EXPECTED)
    if not planned:
        return
    now = dict(part.split(":") for part in expectation(identity).split(","))
    then = dict(part.partition(":")[::2] for part in planned.split(","))
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        what = ", ".join(f"{name} ({json.dumps(identity.get(name))})" for name in changed)
        raise InputError(
            f"this is not the run that its sweep planned, for it has another {what}: bring base, replay and code to"
            f" what they were there; or unset {EXPECTED}, and keep the result out of the sweep's table"
        )
