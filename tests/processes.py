"""Which processes a sandbox has alive, by /proc."""

import os
import pathlib
import time

from common import sandbox_server
from common.sandbox import Sandbox


def children(pid: int) -> list[int]:
    """All processes below one, in process-id order of the tree."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def survivors(box: Sandbox) -> list[int]:
    """Candidates alive: what is below the server, or was and has now no parent.

    Tests that run beside this one kill servers, whose candidates end a moment later: an orphan counts if it stays.
    """
    alive = children(box.process.pid)[1 if box.mode == "namespaces" else 0 :]
    lost = orphans()
    if lost:
        time.sleep(1)
    return alive + sorted(lost & orphans())


def orphans() -> set[int]:
    """Processes forked from any server that have no parent."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            orphan = path.with_name("stat").read_text().rsplit(")", 1)[1].split()[1] == "1"
            if orphan and os.path.abspath(sandbox_server.__file__).encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found
