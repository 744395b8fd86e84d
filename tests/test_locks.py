"""One process at a time in a run's directory: who holds it is said, and the kernel takes it back.

pytest tests/test_locks.py
"""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from examples import ROOT

from common.basics import InputError
from common.locks import lock, unlock

HOLDER = r"process {pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait for its end, or stop it"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/lock."""
    code = "import pathlib, sys, common.locks as l; l.lock(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_the_holder_is_named_and_the_kernel_takes_it_back(tmp_path, holder):
    (tmp_path / "lock").touch()
    who = re.escape(f"{tmp_path} is in use by ") + HOLDER.format(pid=holder.pid)
    for _ in range(2):
        with pytest.raises(InputError, match=f"^{who}$"):
            lock(tmp_path / "lock")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock(tmp_path / "lock")
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    unlock(tmp_path / "lock")


def test_it_is_the_processs_own_until_given_back(tmp_path):
    """A process that failed in a run may start it again; what it starts itself does not hold the lock."""
    path = tmp_path / "lock"
    lock(path)
    lock(path)
    with subprocess.Popen(["sleep", "60"], close_fds=True) as child, open(path) as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlock(path)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
    unlock(path)  # nothing to give back


def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path / "lock")
    lock(tmp_path / "lock")
    assert capsys.readouterr().out.count("cannot be locked (No locks available)") == 1
    unlock(tmp_path / "lock")


# ---- the real command -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_second_start_says_who_holds_the_run(command):
    """While one runs: with and without --resume; then two --resume at once, of which one goes on."""
    flags = ("--seed", "6", "--wandb", "disabled", "--steps", "400", "--save_every", "1")
    first = command(*flags)
    while "b2_grpo:" not in (line := first.stderr.readline()):  # the bar of its steps
        assert line or first.poll() is None
    (directory,) = command.out.glob("b2_grpo__fixtures_math__s6__*")
    before = sorted(path.name for path in directory.iterdir() if path.name not in ("metrics.jsonl", "samples.jsonl"))
    for more in ((), ("--resume",)):
        out, err = (second := command(*flags, *more)).communicate(timeout=300)
        assert second.returncode == 2
        *_, line = err.splitlines()
        assert re.fullmatch(re.escape(f"error: {directory} is in use by ") + HOLDER.format(pid=first.pid), line)
    after = sorted(path.name for path in directory.iterdir() if path.name not in ("metrics.jsonl", "samples.jsonl"))
    assert after == before and first.poll() is None
    first.kill()
    first.communicate()

    both = [command(*flags, "--resume") for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    (loser,) = [process for process in both if process.poll() is not None]
    (winner,) = [process for process in both if process is not loser]
    assert loser.returncode == 2 and f"is in use by process {winner.pid} on " in loser.communicate()[1]
    winner.send_signal(signal.SIGTERM)
    out, err = winner.communicate(timeout=300)
    assert winner.returncode == 128 + signal.SIGTERM, err[-2000:]
