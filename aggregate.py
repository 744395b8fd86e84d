"""From runs to a claim: tables, plots, one HTML page and the answer, or the reason why there is none.

    python aggregate.py runs                                      all runs in runs/, every method against B3
    python aggregate.py runs --base b2_grpo --out report_b2
    python aggregate.py runs --family sweeps/paper.yaml           the comparisons that the sweep declares
    python aggregate.py --wandb ENTITY/PROJECT --group GROUP      the result artifacts of W&B runs
    python aggregate.py human export runs                         blinded sheets for people, `human score` reads them

Runs that do not belong in one table are refused, with the field that tells (exit code 2); nothing is written then.
docs/statistics.md says how the numbers are made. Needs no JAX.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import shutil
import sys
import tempfile

import numpy as np
import tyro

from common.basics import DiskError, InputError, writable, write_atomic
from common.claims import (
    Family,
    answer,
    compare,
    default_family,
    measure_all,
    not_compared,
    plain,
    question,
    read_family,
)
from common.page import write_page
from common.replay import Quadruple, find_test_split
from common.results import Task, fetch_wandb, find_runs, read_runs, script_defaults
from common.tables import all_tables, as_csv, as_latex, as_markdown

PAGE_PROBLEMS = 150  # of a report: those on which methods differ most


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs, or folders that hold them, e.g. runs"""
    base: str = "b3_grpo_verifier"
    """the arm that others are compared with"""
    family: str | None = None
    """file that declares the comparisons (docs/statistics.md); of a sweep file tasks and seeds have to be there, too;
    none = every arm against --base"""
    out: str = "report"
    """folder for what is written; an earlier report there is replaced"""
    replay: str | None = None
    """folder with the test.jsonl of the task, for the page's problems; none = where the runs had it from"""
    allow_partial: bool = False
    """leave out what is missing (runs, seeds, arms of a task, scores of problems), and say so in the tables"""
    wandb: str | None = None
    """read the result artifacts of entity/project instead of folders; they hold no learning curves"""
    group: str | None = None
    """of --wandb: runs of this group alone"""


# ---- the problems of the page ---------------------------------------------------------------------------------------
def tested_problems(task: Task, given: str | None) -> list[Quadruple]:
    """The task's test split, the very one that the runs were tested on (its digest is in their fingerprint); none if it
    is not here. InputError if --replay has another."""
    wanted, ran_on = task.first.fingerprint.get("test_replay"), task.first.args.get("replay")
    return find_test_split(task.name, wanted, given, ran_on)


def page_problems(task: Task, quads: list[Quadruple], most: int) -> list[dict]:
    """The `most` problems whose outcomes differ most between arms, ordered by name, as the page takes them; without
    those that a run has no score of."""
    shares = {arm: task.scores(arm, "revised", task.seeds(arm)).mean(0) for arm in task.arms}
    at = {name: i for i, name in enumerate(task.first.ids)}
    spread = {name: float(np.ptp([s[i] for s in shares.values()])) for name, i in at.items()}  # NaN if one is
    rank = lambda q: (-spread[q.meta["task_id"]], q.meta["task_id"])
    known = [q for q in quads if not math.isnan(spread.get(q.meta["task_id"], math.nan))]
    some = sorted(known, key=rank)[:most]
    texts = {arm: next(iter(cells.values())).texts for arm, cells in task.arms.items()}
    shown = {arm: task.scores(arm, "revised", [next(iter(cells))])[0] for arm, cells in task.arms.items()}
    found = []
    for q in sorted(some, key=lambda q: q.meta["task_id"]):
        i = at[q.meta["task_id"]]
        found.append({
            "task": task.name, "task_id": q.meta["task_id"], "x": q.x, "y0": q.y0, "span": q.meta["error_span"],
            "f": q.f, "horizon": q.meta["horizon"], "outcomes": {arm: float(s[i]) for arm, s in shares.items()},
            "texts": {arm: text[i] for arm, text in texts.items()},
            "shown": {arm: float(s[i]) for arm, s in shown.items()},
        })  # fmt: skip
    return found


# ---- what is written ------------------------------------------------------------------------------------------------
def commands(task: Task) -> list[str]:
    """One line an arm: how its runs were made, with all flags that differ from the script's defaults."""
    lines = []
    for cells in task.arms.values():
        first = next(iter(cells.values()))
        defaults = script_defaults(first.method) or {}
        left_out = {"seed", "task", "out_dir", "resume", "wandb", "mesh", "hosts", "save_every", "save_hf"}
        changed = {k: v for k, v in first.args.items() if k not in left_out and defaults.get(k, v) != v}
        flags = "".join(f" --{k}={shlex.quote(str(v))}" for k, v in sorted(changed.items()))
        seeds = " ".join(map(str, cells))
        lines.append(f"for s in {seeds}; do python {first.method}.py --task={task.name} --seed=$s{flags}; done")
    return lines


def about(tasks: list[Task]) -> dict:
    """How the report came about: fingerprints, commands, versions; what differs between runs is listed."""
    cells = [cell for task in tasks for seeds in task.arms.values() for cell in seeds.values()]
    versions: dict[str, str] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell.versions):
        versions[name] = ", ".join(sorted({str(cell.versions.get(name, "?")) for cell in cells}))
    prefix = lambda task: f"{task.name}: " if len(tasks) > 1 else ""
    return {
        "fingerprint": {f"{prefix(task)}{k}": v for task in tasks for k, v in task.first.fingerprint.items()},
        "commands": [*(line for task in tasks for line in commands(task)), f"python {shlex.join(sys.argv)}"],
        "versions": versions,
    }


def write_report(folder: pathlib.Path, args: Args, tasks: list[Task], declared: Family | None) -> str:
    """Everything into a folder; the answer."""
    from common.figures import all_plots  # it takes a second to import, and refusals need none

    base = args.base if any(args.base in task.arms for task in tasks) else None
    family = declared or default_family(tasks, args.base)
    absent = not_compared(tasks, family)
    if base is None and not args.family and any(len(task.arms) > 1 for task in tasks):
        arms = sorted({arm for task in tasks for arm in task.arms})
        raise InputError(f"--base {args.base}: there is no such arm in {tasks[0].name}; there are {', '.join(arms)}")
    comparisons = compare(tasks, family, args.allow_partial)
    rows = measure_all(tasks, base)
    verdict, sentence = answer(comparisons, family, absent)
    tables = all_tables(tasks, rows, comparisons, family, base, absent)
    plots = all_plots(tasks, rows, comparisons, family)
    share = max(1, PAGE_PROBLEMS // len(tasks))
    problems, notes = [], []
    for task in tasks:
        quads = tested_problems(task, args.replay)
        found = page_problems(task, quads, share)
        problems += found
        if quads:
            seeds = {arm: next(iter(cells)) for arm, cells in task.arms.items()}
            mixed = len({*seeds.values()}) > 1
            of = [f"{arm} {seed}" for arm, seed in seeds.items()] if mixed else [str(task.first.seed)]
            shown = f"the {len(found)} problems on which methods differ most; texts: seed {', '.join(of)}"
            notes.append(f"{task.name}: {shown}.")
        else:
            notes.append(f"{task.name}: its test.jsonl is not here, so no problems are shown (--replay DIR).")
    facts = {**about(tasks), "note": " ".join(notes)}
    place = lambda cell: cell.path.name if args.wandb else str(cell.path)
    write_atomic(folder / "table.md", as_markdown(question(family), sentence, tables))
    write_atomic(folder / "table.csv", as_csv(rows))
    write_atomic(folder / "table.tex", as_latex(tables))
    (folder / "plots").mkdir()
    for caption, image in plots.items():
        (folder / "plots" / f"{'_'.join(caption.split(':')[0].lower().split()[:4])}.png").write_bytes(image)
    report = {
        "schema_version": 1, "question": question(family), "verdict": verdict, "answer": sentence,
        "family": {**plain(family), "digest": family.digest}, "comparisons": plain(comparisons),
        "cells": [{"arm": arm, "task": task.name, "seed": seed, "path": place(cell)}
                  for task in tasks for arm, seeds in task.arms.items() for seed, cell in seeds.items()],
        "missing": [{"arm": arm, "task": task.name, "seed": seed, "why": why}
                    for task in tasks for (arm, seed), why in task.missing.items()],
        "rows": plain(rows), **facts,
    }  # fmt: skip
    write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_page(folder / "report.html", question(family), sentence, tables, plots, problems, facts)
    return sentence


def replace_folder(new: pathlib.Path, target: pathlib.Path) -> None:
    """`new` becomes `target`; an earlier report there goes once the new one is in its place."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def main(args: Args) -> str:
    """Read, check, measure, write; prints the tables of methods and the answer."""
    target = pathlib.Path(args.out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / "report.json").is_file():
        raise InputError(f"--out {args.out}: is there and holds no report; choose another folder")
    if bool(args.runs) == bool(args.wandb) or (args.group and not args.wandb):
        raise InputError("give folders of runs, e.g. runs, or --wandb entity/project, with or without --group")
    declared = read_family(args.family) if args.family else None
    with tempfile.TemporaryDirectory() as space:
        folders = find_runs(args.runs) if args.runs else fetch_wandb(args.wandb, args.group, space)
        tasks = read_runs(folders, args.allow_partial, declared.seeds if declared else ())
    writable(target.parent, "out")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as space:
        new = pathlib.Path(space) / "report"
        new.mkdir()
        sentence = write_report(new, args, tasks, declared)
        replace_folder(new, target)
    print(f"{sentence}\n\nwritten to {args.out}/: report.html, table.md, table.csv, table.tex, report.json, plots/")
    return sentence


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["human"]:
            from common.human import HumanArgs, human_main

            human_main(tyro.cli(HumanArgs, args=sys.argv[2:], prog="aggregate.py human"))
        else:
            main(tyro.cli(Args))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, DiskError) else 2)
