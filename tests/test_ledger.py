"""Files that only grow: what is on disk when a line counts, and what is repaired after any kind of end.

pytest tests/test_ledger.py
"""

import asyncio
import json
import os

import pytest

from common import ledger
from common.basics import InputError
from common.ledger import Ledger, repair


@pytest.mark.parametrize(
    ("content", "left", "said"),
    [
        (b"", b"", None),
        (b'{"a": 1}\n', b'{"a": 1}\n', None),
        (b'{"a": 1}\n{"b"', b'{"a": 1}\n', "half a line at the end, cut off"),
        (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n', "the last line lacked its end, added"),
        (b'{"a', b"", "half a line at the end, cut off"),
        (b'{"a": 1}\n12', b'{"a": 1}\n', "half a line at the end, cut off"),  # of 123, say: no line of ours
        ('{"a": "é'.encode()[:-1], b"", "half a line at the end, cut off"),
    ],
)
def test_repair(tmp_path, content, left, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    done = repair(path)
    assert path.read_bytes() == left and (done == (said and f"{path}: {said}"))
    assert repair(path) is None


def test_repair_of_a_long_half_line(tmp_path):
    """Longer than what is read at once."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 300_000)
    assert repair(path) and path.read_bytes() == b'{"a": 1}\n'
    assert repair(tmp_path / "none") is None


def test_a_line_is_on_disk_when_it_counts_and_many_share_a_sync(tmp_path, monkeypatch):
    synced, syncs = [], []
    real = os.fsync

    def fsync(handle):
        real(handle)
        syncs.append(handle)
        synced[:] = (tmp_path / "x.jsonl").read_text().split("\n")[:-1]

    file = Ledger(tmp_path / "x.jsonl")
    monkeypatch.setattr(ledger.os, "fsync", fsync)

    async def one(i):
        await file.commit({"i": i, "text": "é\u2028"})
        assert any(json.loads(line)["i"] == i for line in synced)

    async def main():
        await asyncio.gather(*(one(i) for i in range(200)))

    asyncio.run(main())
    assert sorted(row["i"] for row in file.rows()) == list(range(200)) and len(syncs) < 20
    file.commit_now({"i": 200})
    assert json.loads(synced[-1]) == {"i": 200}
    file.note({"i": 201})
    assert [row["i"] for row in Ledger(tmp_path / "x.jsonl").rows()][-2:] == [200, 201]


def test_a_disk_that_is_full_is_said_to_all_who_wait(tmp_path, monkeypatch):
    file = Ledger(tmp_path / "x.jsonl")

    def write(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger.os, "write", write)

    async def main():
        return await asyncio.gather(*(file.commit({"i": i}) for i in range(3)), return_exceptions=True)

    for error in asyncio.run(main()):
        assert isinstance(error, InputError) and "No space left" in str(error)


@pytest.mark.parametrize("way", ["note", "commit_now", "commit"])
@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_line_that_did_not_fit_leaves_no_half(tmp_path, monkeypatch, way, broken):
    """One write took a part of it, the next one nothing; later lines stand behind whole ones."""
    path = tmp_path / "x.jsonl"
    file, write, calls = Ledger(path), os.write, []
    file.commit_now({"i": 0})

    def half(handle, data):
        calls.append(data)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(handle, data[:5] if len(calls) == 1 else data)

    def fail(handle):
        raise OSError(27, "File too large")

    def append(row):
        if way == "commit":
            asyncio.run(file.commit(row))
        else:
            getattr(file, way)(row)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, broken, half if broken == "write" else fail)
        if (way, broken) == ("note", "fsync"):  # it waits for no disk
            return append({"i": 1})
        with pytest.raises(InputError, match=r"cannot be written .*make room and start again"):
            append({"i": 1})
    assert path.read_bytes() == b'{"i": 0}\n'
    append({"i": 2})
    assert [row["i"] for row in Ledger(path).rows()] == [0, 2]


@pytest.mark.parametrize("bad", ["{", "[1]"])
def test_a_bad_line_in_the_midst_is_named(tmp_path, bad):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: "):
        list(Ledger(path).rows())
    with pytest.raises(InputError, match="cannot be written"):
        (tmp_path / "d.jsonl").mkdir()
        Ledger(tmp_path / "d.jsonl")
