"""Run the cells of a sweep, here or elsewhere, under one fingerprint a task.

    python sweeps/launch.py sweeps/smoke.yaml             # here; after a kill the same command goes on
    python sweeps/launch.py sweeps/smoke.yaml --print     # the command lines
    python sweeps/launch.py sweeps/smoke.yaml --slurm     # a file of them, and the sbatch command
    python sweeps/launch.py sweeps/smoke.yaml --sky       # a `sky jobs launch` for each
    python sweeps/launch.py sweeps/smoke.yaml --wandb     # register it; prints the agent's command

Before anything starts, the file is expanded to command lines, data and base of every task are made, and the fingerprint
of every cell is computed; cells of one task that differ in it are refused, field by field. Every cell is told what it
is expected to be and compares again, wherever it runs. A cell that has finished is not run again, one that crashed goes
on from its checkpoint, one that somebody else runs is left to them. docs/sweeps.md says more.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections import defaultdict
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.basics import InputError, writable, write_atomic
from common.cells import differing, flat
from common.sweep import ROOT, Cell, expand, read_sweep
from sweeps.local import Launcher, Planned

MOST_IN_ARRAY = 1000  # Slurm's usual MaxArraySize is 1001


# ---- before the first starts ----------------------------------------------------------------------------------------
def plan(cells: list[Cell], options) -> tuple[list[Planned], str]:
    """(the cells and what is known of them, the kind of device here); InputError where the cells of a task differ, or
    where one has finished as another. Ends the process where one is refused: identify.py has said why."""
    asked = [{"label": c.label, "script": c.script, "flags": c.flags} for c in cells]
    request = json.dumps({"cells": asked, "out_dir": options.out_dir, "bases": options.bases})
    command = [sys.executable, str(ROOT / "sweeps" / "identify.py")]
    done = subprocess.run(command, input=request, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    answer = json.loads(done.stdout)
    planned = [Planned(c, known, options.out_dir, options.file.stem) for c, known in zip(cells, answer["cells"])]
    refuse_mixed(planned)
    for p in planned:
        if p.has_result and p.changed():
            raise InputError(
                f"{p.dir} has finished with another {p.changed()}: it is of other code or data; choose another"
                " --out_dir, or move it away"
            )
    return planned, answer["backend"]


def refuse_mixed(planned: list[Planned]) -> None:
    """InputError that names fields, values and cells where the fingerprints of a task's cells differ."""
    tasks, flaws = defaultdict(list), []
    for p in planned:
        tasks[p.cell.task].append(p)
    show = lambda labels: ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    for task, some in tasks.items():
        names = {name for p in some[1:] for name in differing(some[0].fingerprint, p.fingerprint)}
        for name in sorted(names):
            owners = defaultdict(list)
            for p in some:
                owners[json.dumps(flat(p.fingerprint).get(name))].append(p.label)
            flaws.append(f"{task}: {name} " + "; ".join(f"is {v} in {show(labels)}" for v, labels in owners.items()))
    if flaws:
        raise InputError(f"these cells do not belong in one table. {'. '.join(flaws)}")


# ---- elsewhere ------------------------------------------------------------------------------------------------------
def say_elsewhere(planned: list[Planned], config: dict[str, Any], options) -> None:
    """The unfinished cells as commands for another machine, on standard output; what else is to be known beside it."""
    note = lambda text: print(text, file=sys.stderr)
    left = [(i, p) for i, p in enumerate(planned, 1) if not p.has_result]
    if len(left) < len(planned):
        note(f"{len(planned) - len(left)} of {len(planned)} cells have finished here and are left out")
    if not options.print and any(p.dtype == "auto" for p in planned):
        raise InputError(
            "--dtype is auto, which is float32 on CPUs and bfloat16 elsewhere, so other machines could not be held to"
            " what is computed here; add to the parameters of the sweep: dtype: {value: float32} (or bfloat16)"
        )
    if not left and not options.wandb:
        return
    bases = sorted({p.model for _, p in left} - {""})
    if options.sky and (bases or options.out_dir != "runs"):
        if options.out_dir != "runs":
            raise InputError(f"--out_dir {options.out_dir}: SkyPilot's machines send to BUCKET/runs; leave it out")
        way = "--print gives the lines, for machines that have it"
        raise InputError(f"the cells start from {bases[0]}, which SkyPilot's machines do not have; {way}")
    for folder in sorted({p.model for p in planned} - {""}):
        note(f"The cells start from {folder}: it has to be there, under this name, where they run")
    lines = "".join(f"{p.line}\n" for _, p in left)
    if options.print:
        print(lines, end="")
    elif options.slurm:
        limit, lines = f"%{options.at_once}" if options.at_once else "", lines.splitlines(keepends=True)
        for start in range(0, len(lines), MOST_IN_ARRAY):
            some, part = lines[start : start + MOST_IN_ARRAY], f"-{start // MOST_IN_ARRAY + 1}" if start else ""
            file = pathlib.Path(options.out_dir) / "cells" / f"{options.file.stem}{part}.txt"
            write_atomic(file, "".join(some))
            print(f"CELLS={shlex.quote(str(file))} sbatch --array=1-{len(some)}{limit} deploy/slurm.sbatch")
    elif options.sky:
        note("BUCKET has to be set, to gs://NAME or s3://NAME: results go there")
        for i, p in left:
            name, given = f"cts-{options.file.stem}-{i}", shlex.quote(f"COMMAND={p.line}")
            print(f'sky jobs launch -y -n {name} --env BUCKET="$BUCKET" --env {given} deploy/sky.yaml')
    else:
        register(planned, config, options)


def register(planned: list[Planned], config: dict[str, Any], options) -> None:
    """The sweep at W&B, with what the cells of each task are expected to be, which cell.py hands on to them."""
    if options.out_dir != "runs":
        raise InputError(f"--out_dir {options.out_dir}: cells that an agent starts write into runs/")
    guard = {p.cell.task: {"model": p.model, "expected": p.expected, "group": p.group} for p in planned}
    parameters = {**config["parameters"], "guard": {"value": json.dumps(guard)}}
    entity, project = config.get("entity"), config.get("project", "cts")
    import wandb

    try:
        sweep_id = wandb.sweep({**config, "parameters": parameters}, entity=entity, project=project)
    except Exception as e:  # no key, no network, no such entity: its client raises errors of several kinds
        raise InputError(f"W&B has not registered it ({' '.join(str(e).split())[:200]}); see: wandb login") from None
    print("On every machine that has this checkout, as often as it has room (PATH: for W&B every Python is `python`):")
    where = "/".join(filter(None, (entity, project, sweep_id)))
    print(f'PATH="{pathlib.Path(sys.executable).parent}:$PATH" wandb agent {where}')


# ---- the command ----------------------------------------------------------------------------------------------------
def parse(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the sweep, as those in sweeps/")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run the cells here (the default)")
    where.add_argument("--print", action="store_true", help="print the command lines, run nothing")
    where.add_argument("--slurm", action="store_true", help="write them into a file, print the sbatch command")
    where.add_argument("--sky", action="store_true", help="print a `sky jobs launch` for each")
    where.add_argument("--wandb", action="store_true", help="register the sweep, print the agent's command")
    parser.add_argument("--at_once", type=int, default=0, help="cells at a time; 0 = half the cores, 1 on accelerators")
    parser.add_argument("--tries", type=int, default=3, help="how often a cell is started, in all, if it crashes")
    parser.add_argument("--out_dir", default="runs", help="as in the scripts")
    parser.add_argument("--bases", help="folder for the bases that cells share; none = beside the runs")
    return parser.parse_args(words)


def cells_on_cpus() -> int:
    """One for every two cores, but two where there are two: beside each other they are faster than in turn."""
    cores = len(os.sched_getaffinity(0))
    return max(cores // 2, min(cores, 2))


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        if options.at_once < 0 or options.tries < 1:
            raise InputError("--at_once must be at least 0, --tries at least 1")
        if "://" in options.out_dir:
            raise InputError(f"--out_dir {options.out_dir}: must be a folder: what has finished is looked up there")
        options.file = options.file.resolve()
        os.chdir(ROOT)  # where commands and folders are what they say
        config = read_sweep(options.file)
        writable(pathlib.Path(options.out_dir) / "cells", "out_dir")
        planned, backend = plan(expand(config), options)
        if options.print or options.slurm or options.sky or options.wandb:
            say_elsewhere(planned, config, options)
            return 0
        at_once = options.at_once or (cells_on_cpus() if backend == "cpu" else 1)
        return Launcher(planned, at_once, options.tries, apart=backend == "cpu").run()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
