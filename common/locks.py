"""A lock on a run's directory: one process at a time writes there. Used by run, on the host that writes."""

import fcntl
import os
import pathlib
import socket
import time
from typing import IO

from common.basics import InputError

_LOCKS: dict[pathlib.Path, IO[str]] = {}  # those of this process, which may take one that it holds once more


def lock(path: pathlib.Path) -> None:
    """Take the lock on a file; InputError that says who holds it. The kernel takes it back when this process ends,
    however it ends."""
    if path in _LOCKS:
        return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (stays open: closing it gives the lock back)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # whoever has just got it is writing its name
        file.seek(0)
        holder = file.read()
        file.close()
        raise InputError(f"{path.parent} is in use by {holder}; wait for its end, or stop it") from None
    except OSError as e:
        print(f"{path} cannot be locked ({e.strerror}): see to it that nothing else writes to this directory")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    _LOCKS[path] = file


def unlock(path: pathlib.Path) -> None:
    """Give the lock back, if this process holds it."""
    if path in _LOCKS:
        _LOCKS.pop(path).close()
