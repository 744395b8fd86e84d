"""Problems and the quadruple (x, y0, f, y1), the only currency: its file format, its splits, the check that no problem
leaks between them. Used by all that makes, reads or scores quadruples; knows no model and runs nothing."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections import Counter
from typing import Any

import numpy as np

from common.basics import InputError, normalize_x, parse_line, sha256, write_atomic
from common.plans import flaw_of_tests
from common.prompts import CODE_LINE
from common.values import read_value
from common.verifier import numbers_in

SPLITS = ("train", "val", "test", "transfer")
ERROR_TAGS = ("local_arithmetic", "missing_case", "invalid_assumption", "wrong_decomposition", "tool_misuse",
              "state_tracking", "style_only")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """One source problem: question x, reference solution, final answer (math) or tests (code), its source's split.

    `reference` is "" and `tests` None where the source has none; `notes` go into the quadruple's meta.
    """

    task_id: str
    x: str
    reference: str
    answer: str
    split: str | None
    tests: dict[str, Any] | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Quadruple:
    """One replay line: problem x, flawed attempt y0, critique f, revision y1 and `meta` (README, "Replay")."""

    x: str
    y0: str
    f: str
    y1: str
    meta: dict[str, Any]


META_TYPES = {  # required meta keys and their types; further keys are kept as they are
    "task_id": str, "domain": str, "split": str, "horizon": int, "edit_distance": int, "error_tags": list,
    "error_span": (list, type(None)), "teacher": str, "y0_correct": bool, "y1_correct": bool, "is_human_audited": bool,
}  # fmt: skip


def parse_quadruple(line: str, where: str) -> Quadruple:
    """One JSONL line as a checked Quadruple; raises InputError naming `where` (file:line) and the field."""

    def need(ok: bool, field: str, what: str) -> None:
        if not ok:
            raise InputError(f"{where}: field {field!r} {what}")

    row = parse_line(line, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with x, y0, f, y1, meta, got {type(row).__name__}")
    x, y0, f, y1, meta = (row.get(field) for field in ("x", "y0", "f", "y1", "meta"))
    for field, text in {"x": x, "y0": y0, "f": f, "y1": y1}.items():
        need(isinstance(text, str), field, "must be a string")
        need(not re.search("[\ud800-\udfff]", text), field, "holds half a surrogate pair")
    need(bool(x.strip()), "x", "is empty")
    need(isinstance(meta, dict), "meta", "must be an object")
    for key, kind in META_TYPES.items():
        fits = isinstance(meta.get(key), kind) and not (kind is int and isinstance(meta[key], bool))
        need(key in meta and fits, f"meta.{key}", f"is missing or not {kind}")
    domain, span, answer = meta["domain"], meta["error_span"], meta.get("answer")
    need(domain in ("math", "code"), "meta.domain", "must be math or code")
    need(meta["split"] in SPLITS, "meta.split", f"must be one of {', '.join(SPLITS)}")
    tags_known = all(tag in ERROR_TAGS for tag in meta["error_tags"])
    need(tags_known, "meta.error_tags", f"must be among {', '.join(ERROR_TAGS)}")
    pair = span is None or (len(span) == 2 and all(type(i) is int for i in span))
    in_y0 = pair and (span is None or 0 <= span[0] < span[1] <= len(y0))
    need(in_y0, "meta.error_span", "must be null or [start, end] inside y0")
    one_number = isinstance(answer, str) and read_value(answer) is not None
    need(domain == "code" or one_number, "meta.answer", "must be a string with one number (math)")
    flaw = flaw_of_tests(meta.get("tests")) if domain == "code" else None
    need(flaw is None, "meta.tests", f"{flaw} (code)")
    ends = x.endswith(CODE_LINE)  # the prompts take their wording from it
    need(ends == (domain == "code"), "x", f"must end with {CODE_LINE.strip()!r} if and only if domain is code")
    return Quadruple(x, y0, f, y1, meta)


def read_replay(path: str | os.PathLike) -> list[Quadruple]:
    """All quadruples of one JSONL file. No line is skipped: a bad one is an InputError naming file, line and field."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read replay file {path}: {e}; make it with: python teacher.py") from None
    if lines == [""]:
        raise InputError(f"{path}: no quadruples; make them with: python teacher.py")
    return [parse_quadruple(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]


def write_replay(path: str | os.PathLike, quads: list[Quadruple]) -> None:
    """Write quadruples as JSONL, one a line, atomically."""
    write_atomic(path, "".join(json.dumps(dataclasses.asdict(q), ensure_ascii=False) + "\n" for q in quads))


def salted_bucket(x: str) -> int:
    """Hash of the problem text to 0..99: the same problem lands in the same split in every run and on every machine.

    >>> salted_bucket("How many?") == salted_bucket(" how  MANY? ")
    True
    """
    return int(hashlib.sha256(("cts-split\0" + normalize_x(x)).encode()).hexdigest(), 16) % 100


def edit_distance(a: str, b: str) -> int:
    """Word-level Levenshtein distance, one numpy row per word of `a`.

    Insertions run along the row: they are the running minimum of (cost - position), plus the position.

    >>> edit_distance("Tom has 24 pens.", "Tom has 26 red pens.")
    2
    """
    left, right = a.split(), b.split()
    codes = {word: i for i, word in enumerate(dict.fromkeys(left + right))}
    right_R, places = np.array([codes[word] for word in right], int), np.arange(len(right) + 1)
    row = places
    for i, word in enumerate(left, 1):
        costs = np.minimum(row[1:] + 1, row[:-1] + (right_R != codes[word]))
        row = np.minimum.accumulate(np.concatenate([[i], costs]) - places) + places
    return int(row[-1])


def assign_split(problem: Problem) -> str:
    """train/val/test: 70/10/20 by salted hash; a source with train and test keeps its test, val leaves its train."""
    bucket = salted_bucket(problem.x)
    if problem.split is None:
        return "train" if bucket < 70 else "val" if bucket < 80 else "test"
    return "val" if problem.split == "train" and bucket < 10 else problem.split


def check_leakage(replay: dict[str, list[Quadruple]]) -> None:
    """Raise InputError if one problem text stands in two splits."""
    seen: dict[str, tuple[str, str]] = {}
    for split, quads in replay.items():
        for q in quads:
            first = seen.setdefault(normalize_x(q.x), (split, q.meta["task_id"]))
            if first[0] != split:
                other = f"is also {first[1]} of split {first[0]}; remove it from one of them"
                raise InputError(f"leakage: problem {q.meta['task_id']} of split {split} {other}")


def leaks(q: Quadruple) -> bool:
    """Does the critique say what the revision has to say: its final answer (math), or a line of its program that the
    attempt lacks (code)?"""
    if q.meta["domain"] == "math":
        return read_value(q.meta["answer"]).number in numbers_in(q.f)
    lines = lambda text: {" ".join(line.split()) for line in text.split("\n")}
    return any(len(line) > 5 and line in " ".join(q.f.split()) for line in lines(q.y1) - lines(q.y0))


def find_test_split(task: str, wanted: str | None, given: str | None, ran_on: str | None) -> list[Quadruple]:
    """The test split whose digest is `wanted`: in the folder `given` or its part for the task, where a run had it from,
    or in the usual place; empty if it is not here. InputError if `given` has another."""
    own = [given, f"{given}/{task}"] if given else []
    for folder in [*own, ran_on, f"data/replay/{task}"]:
        path = pathlib.Path(folder or "") / "test.jsonl"
        if folder and path.is_file() and replay_sha256(quads := read_replay(path)) == wanted:
            return quads
    if given:
        raise InputError(f"--replay {given}: no test.jsonl that {task} was tested on (field 'test_replay')")
    return []


def replay_report(quads: list[Quadruple]) -> dict[str, Any]:
    """Counts by tag and horizon, and the leak rate: the share of critiques that say what the revision has to say."""
    leaky = [leaks(q) for q in quads if q.meta["domain"] == "code" or "answer" in q.meta]
    counts = lambda values: dict(sorted(Counter(values).items()))
    return {"quadruples": len(quads), "leak_rate": sum(leaky) / max(1, len(leaky)),
            "tags": counts(tag for q in quads for tag in q.meta["error_tags"]),
            "horizons": counts(q.meta["horizon"] for q in quads)}  # fmt: skip


def replay_sha256(quads: list[Quadruple]) -> str:
    """Digest of loaded quadruples, in order."""
    return sha256("\n".join(json.dumps(dataclasses.asdict(q), sort_keys=True) for q in quads))
