"""Run the cells of a sweep, here or elsewhere, under one fingerprint a task.

    python sweeps/launch.py sweeps/smoke.yaml                 # here, so many at a time; the same command goes on after a kill
    python sweeps/launch.py sweeps/smoke.yaml --print         # the command lines
    python sweeps/launch.py sweeps/smoke.yaml --slurm         # a file of them and the sbatch command
    python sweeps/launch.py sweeps/smoke.yaml --sky           # a `sky jobs launch` for each
    python sweeps/launch.py sweeps/smoke.yaml --wandb         # register it; prints the agent's command

Before anything starts, the file is expanded to command lines, data and base of every task are made, and the fingerprint
of every cell is computed; cells of one task that differ in one are refused, field by field. Every cell is told what it is
expected to be and compares again, wherever it runs. A cell that has finished is not run again, one that crashed goes on
from its checkpoint, at most --tries times, one that somebody else runs is left to them. docs/sweeps.md says more.
"""

import argparse
import json
import math
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.basics import InputError, writable, write_atomic
from common.cells import EXPECTED, differing, expectation, flat
from common.locks import process_start, take, write_in
from common.sweep import ROOT, Cell, command_words, expand, read_sweep

POLL, STATUS_TTY, STATUS_LOG, IN_USE_WAIT = 0.5, 5, 120, 30  # seconds between looks, states, tries of a run in use
LAST_LINES, MOST_IN_ARRAY = 6, 1000  # of a failed cell's log; Slurm's usual MaxArraySize is 1001


class Planned:
    """A cell and what is known of it before it starts; and where it stands."""

    def __init__(self, cell: Cell, known: dict[str, Any], out_dir: str, group: str):
        self.cell, self.label, self.name, self.out_dir = cell, cell.label, known["name"], pathlib.Path(out_dir)
        self.steps, self.fingerprint, self.dtype = known["steps"], known["fingerprint"], known["dtype"]
        self.expected, self.model = expectation(known["identity"]), known["model"]
        self.group = f"{group}-{cell.task}-{self.fingerprint['digest'][:8]}"
        self.words = command_words(cell, self.model, out_dir)
        self.dir = self.out_dir / self.name
        self.log, self.claim = (self.out_dir / "cells" / f"{self.name}.{kind}" for kind in ("log", "claim"))
        self.state, self.tries, self.why, self.not_before = "waiting", 0, "", 0.0
        self.process = self.held = self.orphan = None

    @property
    def variables(self) -> dict[str, str]:
        return {EXPECTED: self.expected, "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", self.group)}

    @property
    def line(self) -> str:
        """The whole command line, for a shell in the repository's root."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.variables.items()), "python", shlex.join(self.words)])

    def result(self) -> dict[str, Any] | None:
        path = self.dir / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def changed(self, result: dict[str, Any]) -> str:
        """The fields in which a result's fingerprint is not the planned one."""
        return ", ".join(differing(self.fingerprint, result["fingerprint"]))

    def steps_done(self) -> int:
        path = self.dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0


# ---- before the first starts ----------------------------------------------------------------------------------------
def plan(cells: list[Cell], options) -> tuple[list[Planned], str]:
    """(the cells with their fingerprints, the kind of device here); InputError where the cells of a task differ, or
    where one has finished as another."""
    asked = [{"label": c.label, "script": c.script, "flags": c.flags} for c in cells]
    request = json.dumps({"cells": asked, "out_dir": options.out_dir, "bases": options.bases})
    command = [sys.executable, str(ROOT / "sweeps" / "identify.py")]
    done = subprocess.run(command, input=request, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    answer = json.loads(done.stdout)
    planned = [Planned(c, known, options.out_dir, options.file.stem) for c, known in zip(cells, answer["cells"])]
    refuse_mixed(planned)
    for p in planned:
        result = p.result()
        if result and p.changed(result):
            raise InputError(
                f"{p.dir} has finished with another {p.changed(result)}: it is of other code or data; choose another"
                " --out_dir, or remove it"
            )
    return planned, answer["backend"]


def refuse_mixed(planned: list[Planned]) -> None:
    """InputError that names fields, values and cells where the fingerprints of a task's cells differ."""
    tasks = defaultdict(list)
    for p in planned:
        tasks[p.cell.task].append(p)
    flaws = []
    for task, some in tasks.items():
        names = {name for p in some[1:] for name in differing(some[0].fingerprint, p.fingerprint)}
        for name in sorted(names):
            owners = defaultdict(list)
            for p in some:
                owners[json.dumps(flat(p.fingerprint).get(name))].append(p.label)
            show = lambda labels: ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
            flaws.append(f"{task}: {name} " + "; ".join(f"is {v} in {show(labels)}" for v, labels in owners.items()))
    if flaws:
        raise InputError(f"these cells do not belong in one table. {'. '.join(flaws)}")


# ---- here -----------------------------------------------------------------------------------------------------------
class Launcher:
    """The cells of a sweep on this machine, so many at a time.

    What a cell is run by holds the lock on its claim, a file in out_dir/cells: this process and the run itself share
    it. So a run outlives a launcher that is killed, the next one finds the claim taken and takes the run over, and two
    launchers never run one cell twice.
    """

    def __init__(self, planned: list[Planned], at_once: int, tries: int):
        self.planned, self.at_once, self.tries, self.stopped_by = planned, at_once, tries, 0
        self.took, self.said_at = defaultdict(list), 0.0  # {script: seconds of finished runs}

    def of(self, *states: str) -> list[Planned]:
        return [p for p in self.planned if p.state in states]

    def say(self, p: Planned, what: str) -> None:
        """A line on one cell, with how far the whole is."""
        n, total = len(self.of("finished")), len(self.planned)
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{clear}{time.strftime('%H:%M:%S')}  {n:>{len(str(total))}}/{total}  {p.label}: {what}", flush=True)

    # -- one cell --
    def start(self, p: Planned) -> bool:
        """Start a cell, unless somebody else has it or it has finished; whether it could be looked at."""
        held = take(p.claim)
        if held is None:
            return self.take_over(p)
        if self.settled(p):
            held.close()
            return True
        done, log = p.steps_done(), open(p.log, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {p.line}", file=log, flush=True)
        p.process = subprocess.Popen(
            [sys.executable, *p.words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[held.fileno()],
            start_new_session=True, env={**os.environ, **p.variables, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        log.close()
        p.held, p.state, p.began, p.tries = held, "running", time.monotonic(), p.tries + 1
        p.began_at = done
        self.write_claim(p, p.process.pid)
        again = f", try {p.tries} of {self.tries}" if p.tries > 1 else ""
        self.say(p, f"started{f' again after {done} of {p.steps} steps' if done else ''}{again}")
        return True

    def write_claim(self, p: Planned, pid: int) -> None:
        """Who runs it, in the claim's file: ids with start times, for ids are used again."""
        who = {"launcher": [os.getpid(), process_start(os.getpid())], "run": [pid, process_start(pid)]}
        with open(p.claim, "a", encoding="utf-8") as file:
            write_in(file, json.dumps({"host": socket.gethostname(), **who}))

    def take_over(self, p: Planned) -> bool:
        """If the launcher of a run on this machine is gone, the run is ours from now on."""
        try:
            who = json.loads(p.claim.read_text(encoding="utf-8"))
        except ValueError:  # it is being written
            return False
        alive = lambda pid, start: start is not None and process_start(pid) == start
        if who["host"] != socket.gethostname() or alive(*who["launcher"]) or not alive(*who["run"]):
            return False
        p.state, p.began, p.began_at, p.orphan = "running", time.monotonic(), p.steps_done(), who["run"]
        self.write_claim(p, who["run"][0])
        self.say(p, f"is running, started by a launcher that is gone (process {who['run'][0]})")
        return True

    def settled(self, p: Planned) -> bool:
        """Whether the run has a result; then the cell has finished, or failed, if it is another result than planned."""
        result = p.result()
        if result is None:
            return False
        changed = p.changed(result)
        p.state, p.why = ("failed", f"its result has another {changed}") if changed else ("finished", "")
        self.took[p.cell.script].append(result["timings"]["total"])
        return True

    def look(self, p: Planned) -> None:
        """Whether a running cell has ended, and how."""
        code = p.process.poll() if p.process else None
        if (p.process and code is None) or (p.orphan and process_start(p.orphan[0]) == p.orphan[1]):
            return
        if p.held:
            p.held.close()
        p.process = p.held = p.orphan = None
        if self.settled(p):
            revised = p.result()["summary"].get("accuracy_revised")
            figure = "" if revised is None else f", revised accuracy {revised:.1%}"
            self.say(p, p.why or f"finished in {span(time.monotonic() - p.began)}{figure}{self.left()}")
            return
        last = last_lines(p.log)
        how = "ended" if code is None else f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == 2 and last and " is in use by " in last[-1]:
            p.state, p.tries, p.not_before = "waiting", p.tries - 1, time.monotonic() + IN_USE_WAIT
            return
        give_up = code == 2 or p.tries >= self.tries or self.stopped_by  # 2: bad input, which no other try makes good
        p.state, p.why = ("failed" if give_up else "waiting"), f"{how} after {p.steps_done()} of {p.steps} steps"
        if self.stopped_by:
            p.state = "stopped"
        self.say(p, p.why + ("" if p.state == "failed" else "; it will go on from its checkpoint"))

    # -- all of them --
    def fill(self) -> None:
        """Start what there is room for. The first cell of a task goes alone until it trains: what the others need, the
        report on the base and compiled programs, is then there for all."""
        cold = {p.cell.task for p in self.planned} - {p.cell.task for p in self.planned if p.steps_done() or p.result()}
        busy = {p.cell.task for p in self.of("running")} & cold
        for p in self.of("waiting"):
            if len(self.of("running")) >= self.at_once:
                break
            if p.cell.task in busy or p.not_before > time.monotonic():
                continue
            before = p.state
            if not self.start(p) or p.state == "running":  # somebody else's, or ours
                busy |= {p.cell.task} & cold
            elif p.state != before:
                self.say(p, p.why or f"finished by another launcher{self.left()}")

    def run(self) -> int:
        """Exit code: 0 if all have finished, 1 if some have not, 128 + signal if stopped."""
        for p in self.planned:
            self.settled(p)
        for p in self.of("waiting"):
            if p.claim.is_file() and (held := take(p.claim)) is None:
                self.take_over(p)
            elif p.claim.is_file():
                held.close()
        self.heading()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.stop)
        while self.of("running") or (self.of("waiting") and not self.stopped_by):
            for p in self.of("running"):
                self.look(p)
            if not self.stopped_by:
                self.fill()
            self.status()
            time.sleep(POLL)
        return self.summary()

    def stop(self, number: int, _frame) -> None:
        """Tell the runs to save and end; the second time, end them."""
        how = signal.SIGKILL if self.stopped_by else signal.SIGTERM
        self.stopped_by = number
        for p in self.of("running"):
            pid = p.process.pid if p.process else p.orphan[0]
            if process_start(pid) is not None:
                os.kill(pid, how)

    # -- what is said --
    def heading(self) -> None:
        tasks = {p.cell.task: p.fingerprint["digest"][:16] for p in self.planned}
        print(f"{len(self.planned)} cells, {len(self.of('finished'))} of them finished, {self.at_once} at a time; logs in"
              f" {self.planned[0].log.parent}")  # fmt: skip
        for task, digest in tasks.items():
            print(f"  {task}: fingerprint {digest}, in all of its cells", flush=True)

    def seconds_left(self) -> float | None:
        """By the time that finished runs took, those of the same script first, and by how far the running ones are."""
        took = dict(self.took)
        for p in self.of("running"):
            done = p.steps_done() - p.began_at
            if p.cell.script not in took and done >= 0.1 * p.steps:
                took[p.cell.script] = [(time.monotonic() - p.began) * (p.steps - p.began_at) / done]
        if not took:
            return None
        mean = lambda values: sum(values) / len(values)
        overall = mean([mean(values) for values in took.values()])
        one = lambda p: mean(took[p.cell.script]) if p.cell.script in took else overall
        gone = sum(min(time.monotonic() - p.began, one(p)) for p in self.of("running"))
        return (sum(map(one, self.of("waiting", "running"))) - gone) / self.at_once

    def left(self) -> str:
        seconds = self.seconds_left()
        return "" if seconds is None or not self.of("waiting", "running") else f"; about {span(seconds)} left"

    def status(self) -> None:
        """Now and then how far the running cells are; in a terminal in one line that is written over."""
        tty, now = sys.stdout.isatty(), time.monotonic()
        if now - self.said_at < (STATUS_TTY if tty else STATUS_LOG):
            return
        self.said_at = now
        running = "; ".join(f"{p.label} {p.steps_done()}/{p.steps}" for p in self.of("running"))
        text = f"          {len(self.of('finished'))}/{len(self.planned)}  {running or 'others run what is left'}{self.left()}"
        print(f"\r\x1b[K{text[: os.get_terminal_size().columns - 1]}" if tty else text, end="" if tty else "\n", flush=True)

    def summary(self) -> int:
        failed, rest = self.of("failed"), self.of("waiting", "stopped")
        print(f"\n{len(self.of('finished'))} of {len(self.planned)} cells have finished.")
        for p in failed:
            print(f"\nFAILED  {p.label}: {p.why}\n  {p.line}\n  the end of {p.log}:")
            print("".join(f"    {line}\n" for line in last_lines(p.log)), end="")
        if failed or rest:
            print("\nThe same command goes on with those that have not.")
        return 128 + self.stopped_by if self.stopped_by else 1 if failed else 0


def last_lines(path: pathlib.Path, n: int = LAST_LINES) -> list[str]:
    """The last lines of a log that say something; of a progress bar what it showed last."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-n:]


def span(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 2.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- elsewhere ------------------------------------------------------------------------------------------------------
def say_elsewhere(planned: list[Planned], options, config: dict[str, Any]) -> None:
    """The unfinished cells as commands for another machine, on standard output; what else is to be known beside it."""
    note = lambda text: print(text, file=sys.stderr)
    left = [p for p in planned if p.result() is None]
    if len(left) < len(planned):
        note(f"{len(planned) - len(left)} of {len(planned)} cells have finished here and are left out")
    if not options.print and any(p.dtype == "auto" for p in planned):
        raise InputError(
            "--dtype is auto, which is float32 on CPUs and bfloat16 elsewhere, so other machines could not be held to"
            " what is computed here: add `dtype: {value: float32}` to the parameters, or bfloat16"
        )
    for folder in sorted({p.model for p in planned} - {""}):
        note(f"All cells start from {folder}: it has to be there, under this name, where they run")
    if options.print:
        print("".join(f"{p.line}\n" for p in left), end="")
    elif options.slurm:
        file = pathlib.Path(options.out_dir) / "cells" / f"{options.file.stem}.txt"
        write_atomic(file, "".join(f"{p.line}\n" for p in left))
        if len(left) > MOST_IN_ARRAY:
            note(f"{len(left)} cells: Slurm takes {MOST_IN_ARRAY} in an array, if its MaxArraySize was not raised")
        limit = f"%{options.at_once}" if options.at_once else ""
        print(f"sbatch --array=1-{len(left)}{limit} --export=ALL,CELLS={shlex.quote(str(file))} deploy/slurm.sbatch")
    elif options.sky:
        for i, p in enumerate(planned, 1):
            if p in left:
                name = f"cts-{options.file.stem}-{i}"
                print(f"sky jobs launch -y -n {name} deploy/sky.yaml --env {shlex.quote(f'COMMAND={p.line}')}")
    else:
        register(planned, config, options)


def register(planned: list[Planned], config: dict[str, Any], options) -> None:
    """The sweep, with what each task's cells are expected to be, at W&B."""
    guard = {p.cell.task: {"model": p.model, "expected": p.expected, "group": p.group} for p in planned}
    if options.out_dir != "runs":
        raise InputError(f"--out_dir {options.out_dir}: cells that an agent starts write into runs/")
    parameters = {**config["parameters"], "guard": {"value": json.dumps(guard)}}
    project = config.get("project", "cts")
    import wandb

    try:
        sweep_id = wandb.sweep({**config, "parameters": parameters}, entity=config.get("entity"), project=project)
    except Exception as e:  # no key, no network, no such entity: W&B's clients raise errors of several kinds
        raise InputError(f"W&B has not registered it ({' '.join(str(e).split())[:200]}); see wandb login") from None
    where = "/".join(filter(None, (config.get("entity"), project, sweep_id)))
    print("On any machine that sees this checkout, as often as there is room:")  # `python` in the sweep is the agent's
    print(f'PATH="{pathlib.Path(sys.executable).parent}:$PATH" wandb agent {where}')


def parse(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the sweep, as in sweeps/")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run the cells here (the default)")
    where.add_argument("--print", action="store_true", help="print the command lines, run nothing")
    where.add_argument("--slurm", action="store_true", help="write them into a file, print the sbatch command")
    where.add_argument("--sky", action="store_true", help="print a `sky jobs launch` for each")
    where.add_argument("--wandb", action="store_true", help="register the sweep, print the agent's command")
    parser.add_argument("--at_once", type=int, default=0, help="cells at a time; 0 = half the cores, 1 on accelerators")
    parser.add_argument("--tries", type=int, default=3, help="how often a cell that crashes is started, in all")
    parser.add_argument("--out_dir", default="runs", help="as in the scripts")
    parser.add_argument("--bases", help="folder for the bases that cells share; none = beside the runs")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        if options.at_once < 0 or options.tries < 1:
            raise InputError("--at_once and --tries: must be at least 0 and 1")
        options.file = options.file.resolve()
        os.chdir(ROOT)  # commands and folders are those of a shell there
        config = read_sweep(options.file)
        writable(pathlib.Path(options.out_dir) / "cells", "out_dir")
        planned, backend = plan(expand(config), options)
        if options.print or options.slurm or options.sky or options.wandb:
            say_elsewhere(planned, options, config)
            return 0
        half = max(1, math.floor(len(os.sched_getaffinity(0)) / 2))
        return Launcher(planned, options.at_once or (half if backend == "cpu" else 1), options.tries).run()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
