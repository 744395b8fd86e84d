"""Locks: one process at a time writes in a run's directory, one launcher looks after a run. Used by run, on the host
that writes, and by sweeps/."""

import fcntl
import os
import pathlib
import socket
import time
from typing import IO

from common.basics import DiskError, InputError

_LOCKS: dict[pathlib.Path, IO[str]] = {}  # those of this process, which may take one that it holds once more


def take(path: pathlib.Path) -> IO[str] | None:
    """The open file that holds the lock on it; None where another process has it. Whoever inherits the open file
    (`pass_fds`) holds the lock as well: it is free when the last of them has closed it, or ended, however it ended."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (stays open: closing it gives the lock back)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as e:
        print(f"{path} cannot be locked ({e.strerror}): see to it that nothing else writes to this directory")
    return file


def write_in(file: IO[str], text: str) -> None:
    """`text` as all that stands in a lock's file."""
    file.truncate(0)
    file.write(text)
    file.flush()


def lock(path: pathlib.Path) -> None:
    """Take the lock on a file; InputError that says who holds it. The kernel takes it back when this process ends,
    however it ends."""
    if path in _LOCKS:
        return
    file = take(path)
    if file is None:
        time.sleep(0.1)  # whoever has just got it is writing its name
        holder = path.read_text(encoding="utf-8")
        raise InputError(f"{path.parent} is in use by {holder}; wait for its end, or stop it")
    try:
        write_in(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    except OSError as e:
        raise DiskError.at(path, e) from None
    _LOCKS[path] = file


def unlock(path: pathlib.Path) -> None:
    """Give the lock back, if this process holds it."""
    if path in _LOCKS:
        _LOCKS.pop(path).close()


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did: with its id that names it, for ids are used again.
    None where there is no such process (or it has ended and nobody has asked how), or no /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
