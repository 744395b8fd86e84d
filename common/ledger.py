"""Files that only grow: JSON lines that are on disk before anybody counts on them, read back after any kind of end.
Used by taught and batch_jobs; knows nothing of what the lines say."""

import asyncio
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from common.basics import DiskError, InputError, parse_line


def repair(path: pathlib.Path) -> str | None:
    """Make the file end with a whole line; what was done, in words, or None.

    A process that dies while it writes leaves half a line, which nobody has counted on: it is cut off. A last line that
    lacks its line end alone gets it.
    """
    if not path.is_file():
        return None
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail, at = b"", size
        while at > 0 and b"\n" not in tail:
            step = min(at, 1 << 16)
            at -= step
            file.seek(at)
            tail = file.read(step) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if not last:
            return None
        try:
            whole = isinstance(json.loads(last), dict)
        except ValueError:
            whole = False
        if whole:
            file.seek(size)
            file.write(b"\n")
        else:
            file.truncate(size - len(last))
        os.fsync(file.fileno())
    return f"{path}: the last line lacked its end, added" if whole else f"{path}: half a line at the end, cut off"


def sync_folder(folder: pathlib.Path) -> None:
    """A new file's name is on disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Ledger:
    """One append-only file of JSON lines; `repaired` says what opening it has repaired."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self.repaired = repair(path)
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            sync_folder(path.parent)
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror}); choose another --out") from None
        self.waiting: list[tuple[bytes, asyncio.Future]] = []
        self.writer: asyncio.Task | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """All lines so far, in order; InputError naming file and line at one that is none."""
        with open(self.path, "rb") as file:
            for i, line in enumerate(file, 1):
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    raise InputError(f"{self.path}:{i}: no UTF-8; fix or remove the line") from None
                row = parse_line(text, f"{self.path}:{i}")
                if not isinstance(row, dict):
                    raise InputError(f"{self.path}:{i}: expected a JSON object; remove the line")
                yield row

    def each(self, read: Callable[[dict[str, Any]], None]) -> None:
        """Hand every line on; InputError naming file and line where it lacks what `read` wants of it."""
        for i, row in enumerate(self.rows(), 1):
            try:
                read(row)
            except (KeyError, TypeError, AttributeError, ValueError):
                raise InputError(f"{self.path}:{i}: is no line of ours; fix or remove it") from None

    def note(self, row: dict[str, Any]) -> None:
        """Append a line that a kill of this process cannot take back; a power cut can."""
        self._append(line_of(row), sync=False)

    def commit_now(self, row: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns."""
        self._append(line_of(row), sync=True)

    async def commit(self, row: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns. Lines that come while the disk is busy go together: a disk
        syncs some hundred times a second, however little there is."""
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((line_of(row), done))
        if self.writer is None or self.writer.done():
            self.writer = asyncio.create_task(self._drain())
        await done

    async def _drain(self) -> None:
        while self.waiting:
            lines, self.waiting = self.waiting, []
            try:
                await asyncio.to_thread(self._append, b"".join(line for line, _ in lines), sync=True)
                failed = None
            except DiskError as e:  # whoever waits has to know
                failed = e
            for _, done in lines:
                if not done.cancelled():
                    done.set_exception(failed) if failed else done.set_result(None)

    def _append(self, data: bytes, sync: bool) -> None:
        """All of it, or nothing: half a line in the midst is none of ours. DiskError where the disk takes no more."""
        before = os.fstat(self.file).st_size
        try:
            while data:  # one call writes it all, but on a full disk
                data = data[os.write(self.file, data) :]
            if sync:
                os.fsync(self.file)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, before)
            raise DiskError.at(self.path, e) from None

    def close(self) -> None:
        os.close(self.file)


def line_of(row: dict[str, Any]) -> bytes:
    """A row as its line."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
