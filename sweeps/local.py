"""The cells of a sweep on this machine, so many at a time: started, followed, started again after a crash, stopped.
Used by launch.py; needs no JAX, so that no accelerator is held while cells run.

What runs a cell holds the lock on its claim, a file in out_dir/cells that says who it is. Launcher and run share that
lock: a run outlives a launcher that is killed, the next launcher finds the claim taken and takes the run over, and two
launchers never run one cell twice."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

from common.basics import InputError
from common.cells import EXPECTED, HUGE_PAGES, differing, expectation
from common.locks import process_start, take, write_in
from common.sweep import Cell, command_words

POLL, STATUS_TERMINAL, STATUS_FILE, IN_USE = 0.5, 5, 120, 30  # seconds between looks, states, tries of a run in use
LAST_LINES = 6  # of a failed cell's log


class Planned:
    """A cell, what is known of it before it starts, where it stands: waiting, running, finished, failed or stopped."""

    def __init__(self, cell: Cell, known: dict[str, Any], out_dir: str, sweep: str):
        """`known`: what identify.py says of it; `sweep`: its file's name."""
        self.cell, self.label, self.fingerprint = cell, cell.label, known["fingerprint"]
        self.steps, self.dtype, self.model = known["steps"], known["dtype"], known["model"]
        self.expected = expectation(known["identity"])
        self.group = f"{sweep}-{cell.task}-{self.fingerprint['digest'][:8]}"
        self.words = command_words(cell, self.model, out_dir)
        self.dir = pathlib.Path(out_dir) / known["name"]
        self.log, self.claim = (self.dir.parent / "cells" / f"{known['name']}.{kind}" for kind in ("log", "claim"))
        self.state, self.why, self.tries, self.not_before = "waiting", "", 0, 0.0
        self.process = self.held = self.orphan = None  # what runs it: our child, or (id, start time) of another's
        self.told = 0  # how often it was told to stop

    @property
    def variables(self) -> dict[str, str]:
        return {EXPECTED: self.expected, "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", self.group)}

    @property
    def line(self) -> str:
        """The whole command line, for a shell in the repository's root."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, "python", shlex.join(self.words)])

    @property
    def has_result(self) -> bool:
        return (self.dir / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        path = self.dir / "result.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise InputError(f"{path}: cut off or damaged ({e}); remove it, and its run goes on") from None

    def changed(self) -> str:
        """The fields in which its result's fingerprint is not the planned one."""
        return ", ".join(differing(self.fingerprint, self.result()["fingerprint"]))

    def steps_done(self) -> int:
        path = self.dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0


class Launcher:
    """Runs the cells of a sweep. `tries`: how often a cell is started, in all, if it crashes."""

    def __init__(self, planned: list[Planned], at_once: int, tries: int, apart: bool):
        """`apart`: each run keeps to its share of the cores; on CPUs they would else take them from each other."""
        self.planned, self.at_once, self.tries, self.stops, self.stopped_by = planned, at_once, tries, 0, 0
        self.shares = shares_of_cores(at_once) if apart else []
        self.took, self.said_at = defaultdict(list), time.monotonic()  # {script: seconds of finished runs}
        self.cold = {p.cell.task for p in planned}  # tasks of which no cell has trained yet

    def run(self) -> int:
        """Exit code: 0 if all have finished, 1 if some have not, 128 + signal if stopped."""
        for p in self.planned:
            if not self.settled(p) and p.claim.is_file():
                held = take(p.claim)
                held.close() if held else self.take_over(p)
        self.heading()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)
        while self.of("running") or (self.of("waiting") and not self.stops):
            for p in self.of("running"):
                self.tell(p)
                self.look(p)
            if not self.stops:
                self.fill()
            self.status()
            time.sleep(POLL)
        return self.summary()

    def of(self, *states: str) -> list[Planned]:
        return [p for p in self.planned if p.state in states]

    def on_signal(self, number: int, _frame) -> None:
        self.stops, self.stopped_by = self.stops + 1, number

    def tell(self, p: Planned) -> None:
        """Tell a run to save and end, if we were; the second time, end it."""
        if p.told < self.stops:
            pid, start = (p.process.pid, process_start(p.process.pid)) if p.process else p.orphan
            if start is not None and process_start(pid) == start:
                os.kill(pid, signal.SIGTERM if self.stops == 1 else signal.SIGKILL)
            self.say(p, "saves after its step and ends; a second signal ends it now" if self.stops == 1 else "killed")
            p.told = self.stops

    # ---- one cell ---------------------------------------------------------------------------------------------------
    def fill(self) -> None:
        """Start what there is room for. The first cell of a task goes alone until it trains: what the others need too,
        the report on the base and compiled programs, is then there."""
        some = [p for p in self.planned if p.cell.task in self.cold]
        self.cold -= {p.cell.task for p in some if p.has_result or p.steps_done()}
        busy = {p.cell.task for p in self.of("running")} & self.cold
        for p in self.of("waiting"):
            if len(self.of("running")) >= self.at_once:
                break
            if p.cell.task in busy or p.not_before > time.monotonic():
                continue
            self.start(p)
            if p.state in ("waiting", "running"):  # somebody else's, or ours
                busy |= {p.cell.task} & self.cold
            else:
                self.say(p, p.why or f"finished by another launcher{self.left()}")

    def start(self, p: Planned) -> None:
        """Start a cell, unless somebody else has it or it has finished."""
        held = take(p.claim)
        if held is None:
            return self.take_over(p)
        if self.settled(p):
            return held.close()
        cores = self.free_cores()
        with open(p.log, "a", encoding="utf-8") as log:
            print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {p.line}", file=log, flush=True)
            p.process = subprocess.Popen(
                [sys.executable, *p.words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=[held.fileno()], env={**HUGE_PAGES, **os.environ, **p.variables, "PYTHONUNBUFFERED": "1"},
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            )  # fmt: skip
        p.held, p.tries = held, p.tries + 1
        self.follow(p, p.process.pid)
        done = f" again after {p.began_at} of {p.steps} steps" if p.began_at else ""
        self.say(p, f"started{done}{f', try {p.tries} of {self.tries}' if p.tries > 1 else ''}")

    def free_cores(self) -> set[int]:
        """The share of the cores that the fewest running cells have; empty: all."""
        pids = [p.process.pid if p.process else p.orphan[0] for p in self.of("running")]
        taken = [os.sched_getaffinity(pid) for pid in pids if process_start(pid) is not None]
        return min(self.shares, key=lambda share: sum(share <= cores for cores in taken), default=set())

    def follow(self, p: Planned, pid: int) -> None:
        """From now on a run is ours, and its claim says so: ids with start times, for ids are used again."""
        p.state, p.began, p.began_at = "running", time.monotonic(), p.steps_done()
        who = {"launcher": [os.getpid(), process_start(os.getpid())], "run": [pid, process_start(pid)]}
        with open(p.claim, "a", encoding="utf-8") as file:
            write_in(file, json.dumps({"host": socket.gethostname(), **who}))

    def take_over(self, p: Planned) -> None:
        """A run of this machine that somebody started is ours from now on, if its launcher is gone."""
        try:
            who = json.loads(p.claim.read_text(encoding="utf-8"))
        except ValueError:  # its launcher is just writing it, or was killed before
            return
        alive = lambda pid, start: start is not None and process_start(pid) == start
        if who["host"] == socket.gethostname() and not alive(*who["launcher"]) and alive(*who["run"]):
            p.orphan = who["run"]
            self.follow(p, p.orphan[0])
            self.say(p, f"runs already, started by a launcher that is gone (process {p.orphan[0]})")

    def settled(self, p: Planned) -> bool:
        """Whether the run has a result; then the cell has finished, or failed if it is another result than planned."""
        if p.has_result:
            changed = p.changed()
            p.state, p.why = ("failed", f"its result has another {changed}") if changed else ("finished", "")
            self.took[p.cell.script].append(p.result()["timings"]["total"])
        return p.has_result

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
        last, done = last_lines(p.log), f"after {p.steps_done()} of {p.steps} steps"
        if code == 2 and last and " is in use by " in last[-1]:  # somebody runs it by hand
            p.state, p.tries, p.not_before = "waiting", p.tries - 1, time.monotonic() + IN_USE
            return
        how = f"exit code {code}" if code else "no result"
        p.why = f"{f'killed by signal {-code}' if code is not None and code < 0 else f'ended with {how}'} {done}"
        if self.stops:
            p.state = "stopped"
        else:  # 2: bad input, which no other try makes good
            p.state = "failed" if code == 2 or p.tries >= self.tries else "waiting"
        self.say(p, p.why + ("; it goes on when there is room" if p.state == "waiting" else ""))

    # ---- what is said -----------------------------------------------------------------------------------------------
    def say(self, p: Planned, what: str) -> None:
        """A line on one cell, with how far the whole is."""
        count = f"{len(self.of('finished')):>{len(str(len(self.planned)))}}/{len(self.planned)}"
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{clear}{time.strftime('%H:%M:%S')}  {count}  {p.label}: {what}", flush=True)

    def heading(self) -> None:
        n, done, tasks = len(self.planned), len(self.of("finished")), {p.cell.task: p for p in self.planned}
        print(f"{n} cells, {done} of them finished, {self.at_once} at a time; logs in {self.planned[0].log.parent}")
        for task, p in tasks.items():
            print(f"  {task}: fingerprint {p.fingerprint['digest'][:16]} in all cells", flush=True)

    def seconds_left(self) -> float | None:
        """By what finished runs took, those of the same script first; before there are any, by the running ones."""
        took = dict(self.took)
        for p in self.of("running"):
            done = p.steps_done() - p.began_at
            if p.cell.script not in took and done >= 0.2 * p.steps:
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
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if now - self.said_at < (STATUS_TERMINAL if terminal else STATUS_FILE):
            return
        self.said_at = now
        running = "; ".join(f"{p.label} {p.steps_done()}/{p.steps}" for p in self.of("running"))
        running = running or "what is left is run by others"
        text = f"          {len(self.of('finished'))}/{len(self.planned)}  {running}{self.left()}"
        if terminal:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(text, flush=True)

    def summary(self) -> int:
        failed = self.of("failed")
        print(f"\n{len(self.of('finished'))} of {len(self.planned)} cells have finished.")
        for p in failed:
            print(f"\nFAILED  {p.label}: {p.why}\n  {p.line}\n  the end of {p.log}:")
            print("".join(f"    {line}\n" for line in last_lines(p.log)), end="")
        if failed or self.of("waiting", "stopped"):
            print("\nThe same command goes on with those that have not.")
        return 128 + self.stopped_by if self.stops else 1 if failed else 0


def shares_of_cores(n: int) -> list[set[int]]:
    """The cores of this process in `n` shares that differ by one core at most; none if there are not so many."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[i * len(cores) // n : (i + 1) * len(cores) // n]) for i in range(n)] if n <= len(cores) else []


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
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
