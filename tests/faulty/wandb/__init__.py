"""A W&B that does its worst, for tests/test_tracking.py: PYTHONPATH puts it in the real one's place.

FAULT, "function what", names the function that raises `what`, or hangs; while the mode is online, or in every mode with
ALWAYS. It writes what it is given to the file LOGGED, which each attempt begins anew.
"""

import builtins
import os
import pathlib
import sys
import time

main = sys.modules["__main__"]
main.START_WAIT = main.CALL_WAIT = main.UPLOAD_WAIT = 3
mode = sys.argv[2].split()[0]
where, what = os.environ["FAULT"].split()


class Error(Exception):
    """As wandb.errors.Error, no kind of anything else."""


def fault(function: str) -> None:
    if function == where and (mode == "online" or "ALWAYS" in os.environ):
        if what == "hangs":
            time.sleep(1000)
        raise {"Error": Error}.get(what, getattr(builtins, what, None))("why")


def note(word: str) -> None:
    with open(os.environ["LOGGED"], "a") as f:
        f.write(f"{word} ")


class Thing:
    """Settings, tables, images, artifacts."""

    columns = ()

    def __init__(self, *args, **kwargs):
        pass

    def add_data(self, *row):
        pass

    def add_file(self, path):
        fault("add_file")


class Run:
    summary: dict[str, object] = {}  # noqa: RUF012

    class settings:
        sync_dir = "SYNC_DIR"

    def define_metric(self, *args, **kwargs):
        fault("define_metric")

    def log(self, row):
        fault("log")
        note(row.get("step", "other"))

    def log_artifact(self, artifact):
        fault("log_artifact")

    def mark_preempting(self):
        fault("mark_preempting")
        note("preempting")

    def finish(self, exit_code):
        fault("finish")
        note(f"exit={exit_code}")


def init(**kwargs):
    fault("init")
    return Run()


pathlib.Path(os.environ["LOGGED"]).write_text(f"{mode}: ")
Settings = Table = Image = Artifact = Thing
fault("import")
