"""JSON lines and files, atomic writes, digests, means and sums of metrics, the trace counter.

pytest tests/test_basics.py
"""

import ast
import gc
import os
import pathlib

import jax
import numpy as np
import pytest

from common.basics import (
    TRACES,
    DiskError,
    InputError,
    mean,
    normalize_x,
    pack_arrays,
    parse_line,
    parse_python,
    read_json,
    reduce,
    round_up,
    sha256,
    unpack_arrays,
    writable,
    write_atomic,
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": }', r"x\.jsonl:3: not JSON \(Expecting value, column 7\); fix or remove the line"),
        ("9" * 5000, r"x\.jsonl:3: not JSON that can be read .*; fix or remove the line"),
        ("[" * 100_000, r"x\.jsonl:3: not JSON that can be read .*; fix or remove the line"),
    ],
    ids=["no value", "long number", "deep list"],
)
def test_parse_line(line, message):
    """A line of JSON as it is; where it is none, or none that Python can read, the place and the way out."""
    assert parse_line('{"a": [1, "\u00e9"]}', "x.jsonl:3") == {"a": [1, "\u00e9"]}
    with pytest.raises(InputError, match=message):
        parse_line(line, "x.jsonl:3")


def test_read_json(tmp_path):
    """A default stands for a file that is not there, not for one that cannot be read."""
    path = tmp_path / "a.json"
    assert read_json(path, {}) == {}
    with pytest.raises(InputError, match=r"a\.json: cannot be read \(No such file or directory\)"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1} == read_json(path, {})
    for content, message in ((b"[1]", "expected a JSON object"), (b"{", "no valid JSON"), (b"\xff", "no valid JSON")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.json: {message}.*; download it again"):
            read_json(path, {})


def test_write_atomic(tmp_path, monkeypatch):
    """The old file stays whole until the new one is; no temporary file is left, also where writing fails."""
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half a pair: \ud800")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]

    def write_half(file, data):
        file.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
    with pytest.raises(DiskError, match=r"a\.txt: cannot be written \(No space left on device\); make room"):
        write_atomic(path, "newer")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_mean():
    """None and NaN do not enter a mean."""
    assert mean([None, 1, 2, float("nan")]) == 1.5
    assert mean(iter([])) is None is mean([None])


def test_small_things_by_hand():
    """FIPS 180-2's digest of "abc", from text and from bytes; white space and case; multiples."""
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256("abc") == sha256(b"abc") == abc
    assert normalize_x("  How\tMANY \n pens? ") == "how many pens?"
    assert [round_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_traces_are_counted_by_name():
    """A jitted function that counts itself is traced once per shape, however often it is called."""

    @jax.jit
    def double(x):
        TRACES["double"] += 1
        return 2 * x

    TRACES.clear()
    for n in (3, 3, 4, 3):
        double(np.ones(n))
    assert TRACES == {"double": 2}


def test_a_writable_folder_is_made_and_others_are_named(tmp_path):
    """Also below folders that are not there; a file in the way is one clear line, and no probe stays behind."""
    made = writable(tmp_path / "a" / "b", "out")
    assert made.is_dir() and not any(made.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--out .*file/runs: cannot write there \(Not a directory\); choose"):
        writable(tmp_path / "file" / "runs", "out")


class Parses:
    """An object in a cycle whose end parses, as the printing of a traceback does."""

    def __init__(self):
        self.me = self

    def __del__(self):
        ast.parse("a = [1, (2, {3: 4})]")


def test_a_program_is_parsed_whatever_the_collector_meets():
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            Parses()
            assert len(parse_python("x = [(1, 2), (3, [4, 5])]\n" * 20).body) == 20
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)


def test_packed_arrays_come_back_to_the_bit():
    arrays = [np.float32([[0.1, -0.0], [np.inf, 1e-40]]), np.float32(3.5), np.zeros((0, 2), np.float32)]
    back, about = unpack_arrays(pack_arrays(arrays, {"cosine": 0.5}))
    assert about == {"cosine": 0.5} and [a.shape for a in back] == [np.shape(a) for a in arrays]
    assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(back, arrays))


def test_reduce():
    """(sum, count) added up and divided once, a sum added up; an empty count gives 0; a part may lack a metric."""
    parts = [{"a": (6.0, 3.0), "b": (np.float32(1), np.int32(4)), "c": 1.5}, {"a": (2.0, 1.0), "c": np.float32(2)}]
    assert reduce(parts) == {"a": 2.0, "b": 0.25, "c": 3.5}
    assert reduce([{"a": (0.0, 0.0)}]) == {"a": 0.0}
