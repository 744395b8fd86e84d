"""W&B at arm's length. Used by run, which never imports W&B; knows of a run only its directory.

A run writes its files and goes on. A process of its own follows metrics.jsonl and samples.jsonl as they grow and hands
them to W&B. What W&B raises, and however long it hangs, stays in there: that process then begins anew in the next mode
of MODES, from the same lines. So nothing waits for W&B but the very end of a run, and that not for long.

    python -m common.tracking DIRECTORY MODES FAILURES [EXIT_CODE]     (the process; `Tracker` starts it)
"""

import contextlib
import json
import math
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

from tqdm import tqdm

from common.basics import write_atomic

# What is tried, one after the other; bare is offline without any WANDB_* variable, for one of them may be the trouble.
MODES = {"online": "online offline bare", "shared": "shared offline bare", "offline": "offline bare"}
START_WAIT, CALL_WAIT, UPLOAD_WAIT = 40, 20, 20  # seconds for W&B's start, for one hand-over, for the last uploads
HURRY = 5  # seconds that W&B's start may still take once the run has ended
END_WAIT, STOP_WAIT = 60, 10  # seconds that a run waits at its end, and where a scheduler is about to kill it
TOLD = 3  # exit code of a process that has said itself what was lost


def wandb_mode(flag: str) -> str:
    """`auto`: what WANDB_MODE or WANDB_DISABLED say, else online where a key is known, else offline. Never asks."""
    if flag != "auto":
        return flag
    if os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    """Whether a netrc file names W&B: in bytes, for its encoding is anybody's."""
    try:
        path = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return path.is_file() and b"api.wandb.ai" in path.read_bytes()
    except (OSError, RuntimeError):  # not to be read, or there is no home
        return False


class Tracker:
    """A run's W&B, as the run sees it: started, looked at once a step, closed. Nothing raises, `close` alone waits."""

    def __init__(self, directory: pathlib.Path, mode: str, **about: Any):
        """`mode` as `wandb_mode` says it. `about`: name, job_type and config of the W&B run. Its id lives in the
        directory, so that a resumed run goes on; it is given the lines that come from now on."""
        self.directory, self.process, failures = directory, None, ""
        if mode == "disabled":
            return
        if mode not in MODES:
            mode, failures = "offline", f"WANDB_MODE={mode} is none of online, offline, disabled"
        size = lambda name: (directory / name).stat().st_size if (directory / name).is_file() else 0
        about |= {"sizes": {name: size(name) for name in ("metrics.jsonl", "samples.jsonl")}}
        about |= {"pid": os.getpid(), "program": sys.argv[0]}
        command = [sys.executable, "-m", "common.tracking", str(directory), MODES[mode], failures]
        try:
            if not (directory / "wandb_id").is_file():
                run_id = f"{directory.name[:100]}__{os.urandom(3).hex()}"
                write_atomic(directory / "wandb_id", run_id.replace("/", "-"))
            write_atomic(directory / "wandb" / "about.json", json.dumps(about))
            with open(directory / "wandb" / "tracking.log", "ab") as log:
                self.process = subprocess.Popen(
                    command, cwd=pathlib.Path(__file__).parents[1], bufsize=0, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                )  # fmt: skip
            os.set_blocking(self.process.stdout.fileno(), False)
        except Exception as e:  # no W&B is worth a run
            self._lost(f"not started ({reason(e)})")

    def look(self) -> None:
        """Say what W&B's process has to tell, and that it died, if it did."""
        if self.process is not None:
            self._hear(self.process.poll())

    def close(self, exit_code: int, wait: float = END_WAIT) -> None:
        """End the W&B run with the exit code of ours, above 128 for a signal; after `wait` seconds without it."""
        self.look()
        if self.process is None or self.process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):  # it has just died, and is looked at below
            self.process.stdin.write(b"%d\n" % exit_code)
        self.process.stdin.close()
        try:
            self._hear(self.process.wait(wait))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._hear(TOLD)
            self._lost(f"did not end within {wait} s")

    def _hear(self, ended: int | None) -> None:
        """Print the lines that came; `ended`: the exit code of W&B's process, None while it lives."""
        lines = (self.process.stdout.read() or b"").decode(errors="replace")
        if lines:
            tqdm.write(lines, end="")  # beside the bar, not into it
        if ended not in (None, 0, TOLD):
            self._lost(f"its process ended ({f'signal {-ended}' if ended < 0 else f'exit code {ended}'})")
        if ended is not None:
            self.process = None

    def _lost(self, why: str) -> None:
        tqdm.write(
            f"W&B: {why}; what it lacks is in {self.directory / 'metrics.jsonl'}, which has every line; W&B's own files"
            f" are in {self.directory / 'wandb'}"
        )


# ---- the process ----------------------------------------------------------------------------------------------------
def reason(e: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


class Lines:
    """The whole lines that a file has gained since they were last asked for, as JSON."""

    def __init__(self, path: pathlib.Path, size: int):
        """`size`: what the file held before, in bytes."""
        self.path, self.size = path, size

    def new(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as f:
            f.seek(self.size)
            whole = f.read().rpartition(b"\n")[0]
        self.size += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.split(b"\n") if line]


class Attempt:
    """W&B in the first of `modes`. Whatever goes wrong ends in `fail`, which replaces this process by the next one."""

    def __init__(self, directory: pathlib.Path, modes: list[str], failures: str, exit_code: str = ""):
        """`failures`: what went wrong before, for people; `exit_code`: the run's, if an attempt before has read it."""
        self.directory, self.modes, self.failures, self.exit_code = directory, modes, failures, exit_code
        self.deadline, self.started = None, False
        self.about = json.loads((directory / "wandb" / "about.json").read_text())
        self.lock, self.environment = threading.Lock(), dict(os.environ)  # W&B adds to the latter
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self, why: str) -> None:
        """Begin anew in the next mode; without one say what is lost, and end. Never returns."""
        self.lock.acquire()  # for good: the watch and the main thread may both come here
        for task in pathlib.Path("/proc/self/task").glob("*/children"):  # W&B's own processes
            for child in map(int, task.read_text().split()):
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(child, signal.SIGKILL)
        failures = "; ".join(filter(None, (self.failures, f"{self.modes[0]} failed ({why})")))
        if self.modes[1:]:
            arguments = [str(self.directory), " ".join(self.modes[1:]), failures, self.exit_code]
            command = [sys.executable, "-m", "common.tracking", *arguments]
            os.execve(sys.executable, command, self.environment)
        tell(f"{failures}: it gets nothing more of this run; metrics.jsonl in {self.directory} has every line")
        os._exit(TOLD)

    @contextlib.contextmanager
    def within(self, seconds: float, what: str):
        """Fail if the block takes longer."""
        self.what, self.deadline = f"no answer in time when {what}", time.monotonic() + seconds
        yield
        self.deadline = None

    def _watch(self) -> None:
        hurry = math.inf
        while True:
            time.sleep(0.1)
            deadline, now = self.deadline, time.monotonic()
            if not self.started and hurry == math.inf and self.ended(0):
                hurry = now + HURRY
            if deadline is not None and now > min(deadline, math.inf if self.started else hurry):
                self.fail(self.what)

    def ended(self, seconds: float) -> bool:
        """Whether the run has said its exit code, or is gone, after at most `seconds`. Reads nothing: the next attempt
        has to see it, too."""
        return bool(self.exit_code or select.select([0], [], [], seconds)[0])

    def run(self) -> None:
        """Start W&B, follow the run, end as it ended."""
        with self.within(START_WAIT, "starting"):
            run = self.start()
        self.started = True
        if self.failures:
            folder = pathlib.Path(run.settings.sync_dir)
            tell(f"{self.failures}: all of it is logged offline; `wandb sync {folder}` sends it")
        rows, samples = (Lines(self.directory / name, size) for name, size in self.about["sizes"].items())
        ended = False
        while not ended:
            ended = self.ended(0.5)  # asked before the lines are read: what the run wrote before its end is all there
            with self.within(CALL_WAIT, "logging"):
                self.hand_over(run, rows.new(), samples.new())
        self.exit_code = self.exit_code or sys.stdin.readline().strip() or "1"  # nothing: the run was killed, or raised
        exit_code = int(self.exit_code)
        with self.within(CALL_WAIT + UPLOAD_WAIT, "ending"):
            if (self.directory / "result.json").is_file():
                self.hand_over_result(run)
            if exit_code > 128:
                run.mark_preempting()
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                folder = pathlib.Path(run.settings.sync_dir)
                tell(f"not all was sent within {UPLOAD_WAIT} s of the end; `wandb sync {folder}` sends the rest")
                os._exit(TOLD)
        os._exit(0)  # W&B's handlers at exit might wait once more

    def start(self):
        """The W&B run."""
        os.environ.update(environment(self.directory, self.modes[0] == "bare"))
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=START_WAIT - 20, finish_timeout=UPLOAD_WAIT,
            finish_timeout_raises=True, x_stats_pid=self.about["pid"], program=self.about["program"],
        )  # fmt: skip
        run = wandb.init(
            project="cts", name=self.about["name"], id=(self.directory / "wandb_id").read_text(), resume="allow",
            dir=str(self.directory), config=self.about["config"], job_type=self.about["job_type"],
            group=os.environ.get("WANDB_RUN_GROUP"), mode=self.modes[0].replace("bare", "offline"), settings=settings,
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
        return run

    def hand_over(self, run, rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
        """The new rows, and the new samples as one small table a step."""
        import wandb

        for row in rows:
            run.log(row)
        for step in sorted({sample["step"] for sample in samples}):
            table = wandb.Table(columns=["step", "prompt", "completion", "reward"])
            for sample in samples:
                if sample["step"] == step:
                    table.add_data(*(sample[column] for column in table.columns))
            run.log({"samples": table, "step": step})

    def hand_over_result(self, run) -> None:
        """The summary, curves.png and result.json."""
        import wandb

        path = self.directory / "result.json"
        result = json.loads(path.read_text())
        run.summary.update({f"eval/{k}": v for k, v in result["summary"].items() if isinstance(v, int | float)})
        run.summary["fingerprint"] = result["fingerprint"]["digest"]
        run.log({"curves": wandb.Image(str(self.directory / "curves.png"))})
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", self.about["name"])[:120], type="result")
        artifact.add_file(str(path))
        run.log_artifact(artifact)


def environment(directory: pathlib.Path, bare: bool) -> dict[str, str]:
    """Variables that keep all that W&B writes inside the run's directory. Removes those that would be in the way."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        if bare or name == "WANDB_MODE":
            del os.environ[name]
    places = {"DIR": "", "CACHE_DIR": "wandb/cache", "DATA_DIR": "wandb/data", "ARTIFACT_DIR": "wandb/artifacts"}
    places |= {"CONFIG_DIR": "wandb/config"} if bare else {}  # else as it is: it is only read
    return {f"WANDB_{name}": str(directory / place) for name, place in places.items()}


def tell(line: str) -> None:
    """A line for the run to print."""
    with contextlib.suppress(BrokenPipeError):  # the run is gone
        os.write(1, f"W&B: {line}\n".encode())


def main(directory: str, modes: str, *before: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are for the run, which tells us
        signal.signal(number, signal.SIG_IGN)
    attempt = Attempt(pathlib.Path(directory), modes.split(), *before)
    try:
        attempt.run()
    except BaseException as e:
        traceback.print_exc()  # into tracking.log
        attempt.fail(reason(e))


if __name__ == "__main__":
    main(*sys.argv[1:])
