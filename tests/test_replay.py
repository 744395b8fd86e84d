"""Replay files: every field of a line, splits, leakage and the report.

pytest tests/test_replay.py
"""

import dataclasses
import json
import os
import random
import re

import pytest
from examples import META, ROW, code_quad, math_line, math_quad

from common.basics import InputError
from common.prompts import CODE_LINE
from common.replay import (
    Problem,
    assign_split,
    check_leakage,
    edit_distance,
    parse_quadruple,
    read_replay,
    replay_report,
    salted_bucket,
    write_replay,
)


def without(key: str) -> str:
    return json.dumps({k: v for k, v in ROW.items() if k != key})


MALFORMED = {  # what is wrong: (line, what the message must name)
    "not JSON": ("{", "not JSON"),
    "empty line": ("", "not JSON"),
    "cut line": (math_line()[:-5], "not JSON"),
    "huge number": (math_line()[:-1] + ', "n": ' + "1" * 5000 + "}", "not JSON"),
    "list": ("[1]", "JSON object"),
    "null": ("null", "JSON object"),
    "no x": (without("x"), "'x'"),
    "no y0": (without("y0"), "'y0'"),
    "no f": (without("f"), "'f'"),
    "no y1": (without("y1"), "'y1'"),
    "no meta": (without("meta"), "'meta'"),
    "x a number": (math_line(x=3), "'x'"),
    "x blank": (math_line(x=" \n"), "'x'"),
    "f null": (math_line(f=None), "'f'"),
    "meta a list": (json.dumps({**ROW, "meta": []}), "'meta'"),
    **{f"no {key}": (math_line(meta_without=key), f"'meta.{key}'") for key in META},
    "horizon a string": (math_line({"horizon": "2"}), "'meta.horizon'"),
    "horizon a boolean": (math_line({"horizon": True}), "'meta.horizon'"),
    "edit_distance a float": (math_line({"edit_distance": 1.0}), "'meta.edit_distance'"),
    "y0_correct a number": (math_line({"y0_correct": 1}), "'meta.y0_correct'"),
    "domain unknown": (math_line({"domain": "chess"}), "'meta.domain'"),
    "split unknown": (math_line({"split": "dev"}), "'meta.split'"),
    "tag unknown": (math_line({"error_tags": ["typo"]}), "'meta.error_tags'"),
    "tags a string": (math_line({"error_tags": "style_only"}), "'meta.error_tags'"),
    "tag a list": (math_line({"error_tags": [["style_only"]]}), "'meta.error_tags'"),
    "span too short": (math_line({"error_span": [1]}), "'meta.error_span'"),
    "span too long": (math_line({"error_span": [0, 1, 2]}), "'meta.error_span'"),
    "span of floats": (math_line({"error_span": [0.0, 2.0]}), "'meta.error_span'"),
    "span empty": (math_line({"error_span": [2, 2]}), "'meta.error_span'"),
    "span negative": (math_line({"error_span": [-1, 2]}), "'meta.error_span'"),
    "span outside": (math_line({"error_span": [0, len(ROW["y0"]) + 1]}), "'meta.error_span'"),
    "answer a number": (math_line({"answer": 5}), "'meta.answer'"),
    "answer no number": (math_line({"answer": "many"}), "'meta.answer'"),
    "code without tests": (math_line({"domain": "code"}), "'meta.tests'"),
    "half a surrogate pair": (math_line(y0="2+3=6 \ud800\n#### 6"), "'y0'"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "named"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_line_names_file_line_and_field(tmp_path, line, named):
    """A bad second line of a file: the message has the path, the line number and the field."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{math_line()}\n{line}\n{math_line()}\n")
    with pytest.raises(InputError) as e:
        read_replay(path)
    assert str(e.value).startswith(f"{path}:2: ")
    assert named in str(e.value)
    assert "\n" not in str(e.value)


def test_good_lines_are_kept_whole():
    """Optional forms are accepted and unknown meta keys kept as they are."""
    extra = {"error_span": None, "error_tags": [], "note": {"a": [1, None]}, "answer": "1,234"}
    q = parse_quadruple(math_line(extra), "here:1")
    assert q.meta == {**META, **extra}
    assert (q.x, q.y0, q.f, q.y1) == (ROW["x"], ROW["y0"], ROW["f"], ROW["y1"])
    tests = {"inputs": ["1"], "outputs": ["2"]}
    code = parse_quadruple(math_line({"domain": "code", "tests": tests}, x=f"One more.{CODE_LINE}"), "here:1")
    assert code.meta["tests"] == tests
    assert parse_quadruple(math_line({"error_span": [0, len(ROW["y0"])]}), "here:1").meta["error_span"][1] == 12


def test_round_trip(tmp_path):
    """What is written is read back, line separators of Unicode and other scripts included."""
    odd = "a\u2028b\u2029c\x85d\r\ne\tf \u00e9\u4e2d\U0001f600"
    quads = [math_quad(0), math_quad(x=odd, y0=odd, f=odd, y1=odd, meta={**META, "note": odd})]
    path = tmp_path / "deep" / "train.jsonl"
    write_replay(path, quads)
    assert read_replay(path) == quads
    assert path.read_bytes().count(b"\n") == 2
    assert "\u4e2d" in path.read_text(encoding="utf-8")  # readable, not escaped
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_read_replay_refuses_no_file_empty_file_and_bytes(tmp_path):
    """Each message has the path and the way out."""
    path = tmp_path / "train.jsonl"
    for content in (None, b"", b"\n", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path)) + r".*teacher\.py"):
            read_replay(path)


def test_replay_report_by_hand():
    """Counts and the leak rate; an answer with a comma is a number too."""
    rows = [
        math_quad(f="It should be 1234.", meta={**META, "answer": "1,234", "horizon": 3}),
        math_quad(f="It is off.", meta={**META, "error_tags": []}),
        math_quad(f="The 5 is wrong.", meta={**META, "error_tags": ["local_arithmetic", "missing_case"]}),
        math_quad(f="The 15 is wrong."),
    ]
    assert replay_report(rows) == {
        "quadruples": 4, "leak_rate": 0.5, "tags": {"local_arithmetic": 3, "missing_case": 1}, "horizons": {2: 3, 3: 1},
    }  # fmt: skip


# ---- lines of programs ----------------------------------------------------------------------------------------------
def code_line(**changes) -> str:
    q = code_quad()
    return json.dumps({"x": q.x, "y0": q.y0, "f": q.f, "y1": q.y1, **changes})


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({}, "asserts, or inputs"),
        ({"asserts": []}, "asserts, a list"),
        ({"asserts": ["assert 1"], "setup": 3}, "setup, a string"),
        ({"inputs": ["1"], "outputs": []}, "one length"),
        ({"inputs": [1], "outputs": ["1"]}, "strings"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}, "lists of arguments"),
    ],
)
def test_bad_tests_of_a_replay_line_are_named(tests, message):
    with pytest.raises(InputError, match=f"here:1: field 'meta.tests' needs .*{message}"):
        parse_quadruple(code_line(meta=code_quad(tests=tests).meta), "here:1")


def test_the_last_line_of_x_and_the_domain_agree():
    """The prompts are worded by that line, so a replay in which they differ would be asked in the wrong words."""
    assert parse_quadruple(code_line(meta=code_quad().meta), "here:1") == code_quad()
    with pytest.raises(InputError, match=r"here:1: field 'x' must end with 'Answer in Python\.'"):
        parse_quadruple(code_line(meta=code_quad().meta, x="calc(a, b)"), "here:1")
    with pytest.raises(InputError, match="field 'x'"):
        parse_quadruple(code_line(meta=code_quad(domain="math", answer="3").meta), "here:1")


def test_leak_rate_of_programs():
    """A critique leaks where it writes a line that the attempt lacks and the revision has."""
    leaky = dataclasses.replace(code_quad(), f="Line 4 is wrong, write r  =  r - b there.")
    assert replay_report([code_quad(), leaky])["leak_rate"] == 0.5
    quoting = dataclasses.replace(code_quad(), f="Line 4 is wrong: r = r + b adds.")
    assert replay_report([quoting])["leak_rate"] == 0.0


# ---- splits ---------------------------------------------------------------------------------------------------------
def test_salted_hash_is_pinned():
    """The split of a problem must never change between versions: pinned values."""
    assert [salted_bucket(x) for x in ("How many?", "Tom has 3 pens.", "a", "b")] == [40, 41, 77, 68]
    assert salted_bucket("  how\nMANY? ") == 40


def problem(i: int, split: str | None) -> Problem:
    return Problem(f"own/{i}", f"Problem number {i}?", "#### 1", "1", split)


def test_splits_are_70_10_20_and_a_source_keeps_its_test():
    """Shares of 4,000 problems within four standard errors; test stays test, val is a tenth of train."""
    own = [assign_split(problem(i, None)) for i in range(4000)]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(own.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert {assign_split(problem(i, "test")) for i in range(500)} == {"test"}
    train = [assign_split(problem(i, "train")) for i in range(4000)]
    assert set(train) == {"train", "val"}
    assert abs(train.count("val") / 4000 - 0.1) < 0.02


def test_leakage_is_found_whatever_the_case_and_spaces():
    """The same text in two splits is refused and both problems are named; twice in one split is fine."""
    other = math_quad(x=" what IS  7+3?", meta={**META, "task_id": "own/other"})
    check_leakage({"train": [math_quad(1), math_quad(1)], "val": [math_quad(2)], "test": [math_quad(3)]})
    with pytest.raises(InputError, match=r"leakage: problem own/other of split test is also own/1 of split train"):
        check_leakage({"train": [math_quad(1), math_quad(7)], "val": [math_quad(2)], "test": [math_quad(3), other]})


def test_edit_distance_equals_a_naive_dynamic_program():
    def naive(a: list[str], b: list[str]) -> int:
        d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
        return d[-1][-1]

    rng = random.Random(1)
    for _ in range(200):
        a, b = ([rng.choice("uvwxyz") for _ in range(rng.randrange(9))] for _ in range(2))
        assert edit_distance(" ".join(a), " ".join(b)) == naive(a, b), (a, b)
