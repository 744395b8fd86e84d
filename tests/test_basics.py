"""Atomic writes, means, and the small things that every room uses.

pytest tests/test_basics.py
"""

import os

import pytest

from common.basics import mean, write_atomic


def test_write_atomic(tmp_path):
    """The old file stays whole until the new one is; no temporary file is left, also where writing fails."""
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half a pair: \ud800")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_mean():
    """None and NaN do not enter a mean."""
    assert mean([None, 1, 2, float("nan")]) == 1.5
    assert mean(iter([])) is None is mean([None])
