"""One cell of a sweep, as `wandb agent` starts it: the command line that launch.py would have started, under the same
guard. It runs under any Python; the script runs under the one that runs this.

    python sweeps/cell.py --arm='b5_cts --align=l2' --task=fixtures_long --seed=0 --guard=...

`--guard` is what `launch.py --wandb` has put into the sweep: for each task the shared base and the identity that its
runs must have. W&B takes a death by signal for a success; here it is a failure (exit code 128 + signal), and what stops
this stops the script.
"""

import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.basics import InputError
from common.cells import EXPECTED, HUGE_PAGES
from common.sweep import ROOT, command_words, make_cell


def read_words(words: list[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(parameters, guard by task) of a command line; `--_wandb`, which a requeued run is given, is left out."""
    values = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and equals):
            raise InputError(f"{word}: expected --parameter=value, as wandb agent writes it")
        values[name] = value
    values.pop("_wandb", None)
    guard = json.loads(values.pop("guard", "{}"))
    missing = [name for name in ("arm", "task", "seed") if name not in values]
    if missing:
        raise InputError(f"--{missing[0]} is missing; start sweeps with: python sweeps/launch.py FILE")
    return values, guard


def prepare(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """(what follows `python`, variables) of a cell."""
    values, guard = read_words(words)
    cell = make_cell(values, {})
    planned = guard.get(cell.task)
    if planned is None:
        print(
            "This sweep was registered without its fingerprints: nothing is compared before the end. Register it with:"
            " python sweeps/launch.py FILE --wandb",
            file=sys.stderr,
        )
        return command_words(cell, "", "runs"), {}
    env = {EXPECTED: planned["expected"], "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", planned["group"])}
    return command_words(cell, planned["model"], "runs"), env


def main(words: list[str]) -> int:
    """The exit code of the script."""
    try:
        command, env = prepare(words)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    end_with_us = lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: an agent may kill -9 us
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**HUGE_PAGES, **os.environ, **env},
        preexec_fn=end_with_us if sys.platform == "linux" else None,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
