"""Everything the method scripts share, and nothing of any method.

Sections: 0 constants - 1 data - 2 tokenizer and packing - 3 verifier, programs - 4 decoder - 5 hosts and mesh - 6
log-probs and sampling - 7 distances of padded trajectories - 8 the nano base - 9 checkpoints - 10 evaluation - 11
fairness fingerprint - 12 run plumbing.

Axis letters, used as suffixes wherever axes matter: B prompts, G completions per prompt, M = B*G rows, P prompt length,
T completion time, S key time, V vocabulary, D model, N heads, K key/value heads, H head dim, F feed-forward, L layers,
J reasoning steps of a trajectory, R latent dim. Masks are 0/1 float32 and come from lengths, never from sentinels.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import collections
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import sandbox

# ---- 0 constants --------------------------------------------------------------------------------------------------
# What: names that stand in more than one place. Used by: all sections and scripts.
SCHEMA_VERSION = 1
PROCESS_START = time.time()
STREAM_INIT, STREAM_DATA, STREAM_ROLLOUT, STREAM_EVAL, STREAM_BASE, STREAM_CONTROL = range(
    6
)  # PRNG streams: fold_in(root, STREAM)
SPLITS = ("train", "val", "test", "transfer")
ERROR_TAGS = ("local_arithmetic", "missing_case", "invalid_assumption", "wrong_decomposition", "tool_misuse",
              "state_tracking", "style_only")  # fmt: skip
MAX_STEPS = 32  # J: reasoning steps kept of one attempt


class InputError(Exception):
    """Bad input: one line that says what, where and what to do. `cli` prints it and exits with code 2."""


# ---- 1 data -------------------------------------------------------------------------------------------------------
# What: problems from their sources, the quadruple (x, y0, f, y1), replay files. Used by: teacher, all trainers.
# Tested in: tests/test_data.py.
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


def parse_line(line: str, where: str) -> Any:
    """One line of JSON, read; InputError naming `where` (file:line) if it is none, or none that Python can read."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON ({e.msg}, column {e.colno}); fix or remove the line") from None
    except (ValueError, RecursionError) as e:  # an integer too long, lists too deep
        raise InputError(f"{where}: not JSON that can be read ({e}); fix or remove the line") from None


def parse_quadruple(line: str, where: str) -> Quadruple:
    """One JSONL line as a checked Quadruple; raises InputError naming `where` (file:line) and the field."""

    def need(ok: bool, field: str, what: str) -> None:
        if not ok:
            raise InputError(f"{where}: field {field!r} {what}")

    row = parse_line(line, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with x, y0, f, y1, meta, got {type(row).__name__}")
    for field in ("x", "y0", "f", "y1"):
        need(isinstance(row.get(field), str), field, "must be a string")
        need(not re.search("[\ud800-\udfff]", row[field]), field, "holds half a surrogate pair")
    need(bool(row["x"].strip()), "x", "is empty")
    meta = row.get("meta")
    need(isinstance(meta, dict), "meta", "must be an object")
    for key, kind in META_TYPES.items():
        bool_as_int = kind is int and isinstance(meta.get(key), bool)
        need(
            key in meta and isinstance(meta[key], kind) and not bool_as_int, f"meta.{key}", f"is missing or not {kind}"
        )
    need(meta["domain"] in ("math", "code"), "meta.domain", "must be math or code")
    need(meta["split"] in SPLITS, "meta.split", f"must be one of {', '.join(SPLITS)}")
    need(
        all(tag in ERROR_TAGS for tag in meta["error_tags"]),
        "meta.error_tags",
        f"must be among {', '.join(ERROR_TAGS)}",
    )
    span = meta["error_span"]
    in_y0 = span is None or (
        len(span) == 2 and all(type(i) is int for i in span) and 0 <= span[0] < span[1] <= len(row["y0"])
    )
    need(in_y0, "meta.error_span", "must be null or [start, end] inside y0")
    if meta["domain"] == "math":
        answer = meta.get("answer")
        need(
            isinstance(answer, str) and len(numbers_in(answer)) == 1,
            "meta.answer",
            "must be a string with one number (math)",
        )
    else:
        wrong = flaw_of_tests(meta.get("tests"))
        need(wrong is None, "meta.tests", f"{wrong} (code)")
    ends = row["x"].endswith(CODE_LINE)  # the prompts take their wording from it
    need(ends == (meta["domain"] == "code"), "x", f"must end with {CODE_LINE.strip()!r} if and only if domain is code")
    return Quadruple(row["x"], row["y0"], row["f"], row["y1"], meta)


def flaw_of_tests(tests: Any) -> str | None:
    """What is wrong with a problem's tests, or None: {"setup", "asserts"}, or {"inputs", "outputs"} for standard input,
    with "fn_name" for calls of that function."""
    texts = lambda a: isinstance(a, list) and all(isinstance(t, str) for t in a)
    if not isinstance(tests, dict):
        return "must be an object"
    if "asserts" in tests:
        fine = texts(tests["asserts"]) and tests["asserts"] and isinstance(tests.get("setup", ""), str)
        return None if fine else "needs asserts, a list of one string or more, and setup, a string"
    if "inputs" not in tests:
        return "needs asserts, or inputs and outputs"
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not 0 < len(inputs) == len(outputs):
        return "needs inputs and outputs, two lists of one length"
    if "fn_name" in tests:
        fine = isinstance(tests["fn_name"], str) and all(isinstance(args, list) for args in inputs)
        return None if fine else "needs fn_name, a string, and inputs that are lists of arguments"
    return None if texts(inputs) and texts(outputs) else "needs inputs and outputs that are strings"


def read_replay(path: str | os.PathLike) -> list[Quadruple]:
    """All quadruples of one JSONL file. No line is skipped: a bad one is an InputError naming file, line and field."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read replay file {path}: {e}; make it with: python teacher.py") from None
    if lines == [""]:
        raise InputError(f"{path}: no quadruples; make them with: python teacher.py")
    return [parse_quadruple(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write to a temporary name beside `path`, then rename: a reader sees the old file or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(text.encode())  # encoded before the file is opened
    os.replace(tmp, path)


def write_replay(path: str | os.PathLike, quads: list[Quadruple]) -> None:
    """Write quadruples as JSONL, one a line, atomically."""
    write_atomic(path, "".join(json.dumps(dataclasses.asdict(q), ensure_ascii=False) + "\n" for q in quads))


def salted_bucket(x: str) -> int:
    """Hash of the problem text to 0..99: the same problem lands in the same split in every run and on every machine.

    >>> salted_bucket("How many?") == salted_bucket(" how  MANY? ")
    True
    """
    return int(hashlib.sha256(("cts-split\0" + normalize_x(x)).encode()).hexdigest(), 16) % 100


def normalize_x(x: str) -> str:
    """Case and white space folded: two problems equal under this are the same problem."""
    return " ".join(x.lower().split())


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
                raise InputError(
                    f"leakage: problem {q.meta['task_id']} of split {split} is also {first[1]} of split {first[0]};"
                    " remove it from one of them"
                )


NAMES = ("Tom", "Amy", "Ben", "Sue", "Max", "Eva", "Sam", "Ann")
GOODS = ("pens", "books", "coins", "cards", "nuts", "toys")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def fixtures_math(seed: int = 0, size: int = 3000) -> list[Problem]:
    """Generated word problems in GSM8K's own format (`<<16+5=21>>21`, `#### 21`), horizons 2 to 8, numbers below 100.

    Two templates: one person whose stock changes month by month, and a row of people each compared with the one before,
    whose last step adds two of them up. `size` problems, no text twice; deterministic in `seed`.
    """
    rng = np.random.default_rng((seed, 71))
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.choice(np.arange(2, 9), p=np.arange(7, 0, -1) ** 2 / 140))  # short ones more often
        try:
            x, lines, value = (_months if rng.random() < 0.5 else _comparisons)(rng, horizon)
        except StopIteration:
            continue
        if normalize_x(x) not in problems:
            reference = "\n".join([*lines, f"#### {value}"])
            problems[normalize_x(x)] = Problem(f"fixtures_math/{len(problems):05d}", x, reference, str(value), None)
    return list(problems.values())


def _change(rng, value: int, results: set[int], givens: set[int]) -> tuple[str, int, int]:
    """One operation on `value` that keeps it in 2..40: (operator, operand, new value).

    No result comes twice and no given number equals a result, so that a number in a solution says where it comes from.
    Raises StopIteration where nothing is left.
    """
    for _ in range(200):
        op = str(rng.choice(["+", "+", "-", "-", "*", "/"]))
        n = int(rng.integers(2, 4)) if op in "*/" else int(rng.integers(2, 10))
        if op == "/" and value % n:
            continue
        new = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        if 2 <= new <= 40 and new != n and n not in results and new not in results | givens:
            results.add(new)
            givens.add(n)
            return op, n, new
    raise StopIteration


def _months(rng, horizon: int) -> tuple[str, list[str], int]:
    name, goods = NAMES[rng.integers(len(NAMES))], GOODS[rng.integers(len(GOODS))]
    value, first = int(rng.integers(10, 20)), int(rng.integers(12))
    sentences, lines, results, givens = [f"{name} has {value} {goods}."], [], {value}, set()
    for i in range(horizon):
        op, n, new = _change(rng, value, results, givens)
        event = {"+": ("are bought", "are found"), "-": ("are lost", "are sold"), "*": ("times as many",) * 2,
                 "/": ("times fewer",) * 2}[op][rng.integers(2)]  # fmt: skip
        month = MONTHS[(first + i) % 12]
        sentences.append(f"In {month} {n} {event}.")
        lines.append(f"In {month} {n} {event}: <<{value}{op}{n}={new}>>{new}.")
        value = new
    return " ".join([*sentences, f"How many {goods} does {name} have now?"]), lines, value


def _comparisons(rng, horizon: int) -> tuple[str, list[str], int]:
    people = [NAMES[i] for i in rng.permutation(len(NAMES))[:horizon]]
    goods, value = GOODS[rng.integers(len(GOODS))], int(rng.integers(10, 20))
    sentences, lines, stock = [f"{people[0]} has {value} {goods}."], [], [value]
    results, givens = {value}, set()
    for before, name in itertools.pairwise(people):
        op, n, new = _change(rng, value, results, givens)
        how = {"+": "more", "-": "fewer", "*": "times as many", "/": "times fewer"}[op]
        sentences.append(f"{name} has {n} {how} {'as' if op == '*' else 'than'} {before}.")
        lines.append(f"So {name} has {n} {how}: <<{value}{op}{n}={new}>>{new}.")
        stock.append(new)
        value = new
    i = int(rng.integers(horizon - 1))
    total = stock[i] + value
    lines.append(f"So {people[i]} and {people[-1]} have <<{stock[i]}+{value}={total}>>{total}.")
    return " ".join([*sentences, f"How many {goods} do {people[i]} and {people[-1]} have?"]), lines, total


def gsm8k(data_dir: str | None) -> list[Problem]:
    """GSM8K from `data_dir`/{train,test}.jsonl, else from the hub (openai/gsm8k, main). https://arxiv.org/abs/2110.14168"""
    problems = []
    for split in ("train", "test"):
        if data_dir:
            rows = read_jsonl(pathlib.Path(data_dir) / f"{split}.jsonl", ("question", "answer"))
        else:
            try:
                import datasets

                rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
            except Exception as e:  # whatever the hub client raises, the user needs the one way out
                raise InputError(
                    f"gsm8k: no answer from the hub ({type(e).__name__}); pass --data_dir with train.jsonl, test.jsonl"
                ) from None
        for i, row in enumerate(rows):
            answer = final_answers(row["answer"])
            if len(answer) != 1:
                raise InputError(f"gsm8k {split} row {i + 1}: field 'answer' has no single number after ####")
            problems.append(
                Problem(
                    f"gsm8k/{split}/{i:05d}", row["question"].strip(), row["answer"].strip(), show(answer[0]), split
                )
            )
    return problems


# The last line of every code problem. It asks for a program and tells the prompts' wording; no math problem ends so.
CODE_LINE = "\nAnswer in Python."
FUNCTIONS = ("base", "calc", "find", "gain", "make", "part", "size", "work")
OPERATIONS = {"+": ("Add {}.", "plus"), "-": ("Subtract {}.", "minus"), "*": ("Multiply by {}.", "times")}


def fixtures_code(seed: int = 0, size: int = 3000) -> list[Problem]:
    """Generated small functions with four asserts each, horizons 2 to 8 (statements below the def).

    Two templates, each sentence of x a statement or two: arithmetic on two numbers, and a loop over a list followed by
    the same. `size` problems, no text twice; deterministic in `seed`.
    """
    rng = np.random.default_rng((seed, 73))
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.choice(np.arange(2, 9), p=np.array([5, 6, 5, 4, 3, 2, 1]) / 26))  # short ones more often
        name, loops = FUNCTIONS[rng.integers(len(FUNCTIONS))], horizon >= 4 and rng.random() < 0.5
        parameters, sentences, lines = (_loop if loops else _arithmetic)(rng, horizon)
        x = f"{name}({parameters}): {' '.join(sentences)}{CODE_LINE}"
        if normalize_x(x) in problems:
            continue
        program = "\n    ".join([f"def {name}({parameters}):", *lines, "return r"])
        space: dict[str, Any] = {}
        exec(program, space)  # of the templates below and nothing else
        asserts: dict[str, None] = {}
        while len(asserts) < 4:
            draw = lambda n: [int(i) for i in rng.integers(0, 13, n)]
            call = f"{name}({draw(rng.integers(1, 6)) if loops else ', '.join(map(str, draw(2)))})"
            asserts[f"assert {call} == {eval(call, space)}"] = None
        tests = {"setup": "", "asserts": list(asserts)}
        problems[normalize_x(x)] = Problem(f"fixtures_code/{len(problems):05d}", x, program, "", None, tests)
    return list(problems.values())


def _operations(rng, count: int, operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Sentences and lines of `count` statements on r; an `if` and what it guards are two."""
    sentences, lines = [], []
    while len(lines) < count:
        op = str(rng.choice(list(OPERATIONS)))
        n = str(rng.choice(operands)) if op != "*" and rng.random() < 0.3 else str(rng.integers(2, 10))
        sentence, line = OPERATIONS[op][0].format(n), f"r = r {op} {n}"
        if len(lines) + 2 <= count and rng.random() < 0.4:
            sign, word = ((">", "above"), ("<", "below"))[rng.integers(2)]
            limit = rng.integers(5, 20)
            sentences.append(f"If it is {word} {limit}, {sentence[0].lower()}{sentence[1:]}")
            lines += [f"if r {sign} {limit}:", f"    {line}"]
        else:
            sentences.append(sentence)
            lines.append(line)
    return sentences, lines


def _arithmetic(rng, horizon: int) -> tuple[str, list[str], list[str]]:
    a, b = (("a", "b"), ("m", "n"), ("p", "q"))[rng.integers(3)]
    op, n = str(rng.choice(list(OPERATIONS))), b if rng.random() < 0.5 else rng.integers(2, 10)
    sentences, lines = _operations(rng, horizon - 2, (a, b))
    return f"{a}, {b}", [f"Start with {a} {OPERATIONS[op][1]} {n}.", *sentences], [f"r = {a} {op} {n}", *lines]


def _loop(rng, horizon: int) -> tuple[str, list[str], list[str]]:
    start, op = rng.integers(0, 10), ("+", "-")[rng.integers(2)]
    lines, sentences, pad = [f"r = {start}", "for x in xs:"], [f"Start with {start}."], "    "
    each = "each x"
    if horizon >= 5 and rng.random() < 0.6:
        sign, word = ((">", "above"), ("<", "below"))[rng.integers(2)]
        limit = rng.integers(2, 11)
        lines.append(f"    if x {sign} {limit}:")
        each, pad = f"each x {word} {limit}", "        "
    times = rng.integers(2, 6) if rng.random() < 0.4 else None
    lines.append(f"{pad}r = r {op} x" + (f" * {times}" if times else ""))
    sentences.append(f"For {each}, {'add' if op == '+' else 'subtract'} x{f' times {times}' if times else ''}.")
    more, after = _operations(rng, horizon - 1 - len(lines), ("len(xs)",))
    return "xs", [*sentences, *more], [*lines, *after]


def parse_program(program: str) -> ast.Module | None:
    """The syntax tree of a program, or None where it is not Python 3 (or nested too deep to be read)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence": the programs are not ours
            return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def tidy_program(program: str) -> str:
    """A reference program with plain line ends, no white space at line ends and spaces for leading tabs, as far as it
    stays the same program. "def f():\\r\\n\\treturn 1 \\r\\n" gives "def f():\\n    return 1".
    """
    lines = program.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    plain = parse_program("\n".join(lines))
    for width in (4, 8):  # 8 is Python's own reading of a tab that stands among spaces
        indents = [line[: len(line) - len(line.lstrip())].expandtabs(width) for line in lines]
        text = "\n".join(f"{a}{b.strip()}".rstrip() for a, b in zip(indents, lines)).strip("\n")
        tree = parse_program(text)
        if plain and tree and ast.dump(tree) == ast.dump(plain):
            return text
    return "\n".join(lines)


def mbpp(data_dir: str | None) -> list[Problem]:
    """MBPP from `data_dir`/mbpp.jsonl, else from the hub (google-research-datasets/mbpp). https://arxiv.org/abs/2108.07732

    Its task ids 11 to 510 are test; the rest (few-shot prompts, validation, training) is train. x shows the
    shortest assert of three: it fixes name and form, and a program that only knows the shown one fails.
    """
    if data_dir:
        path = pathlib.Path(data_dir) / "mbpp.jsonl"
        rows = [(f"{path}:{i}", row) for i, row in enumerate(read_jsonl(path, ("text", "code")), 1)]
    else:
        try:
            import datasets

            parts = datasets.load_dataset("google-research-datasets/mbpp", "full")
        except Exception as e:  # whatever the hub client raises, the user needs the one way out
            raise InputError(
                f"mbpp: no answer from the hub ({type(e).__name__}); pass --data_dir with mbpp.jsonl"
            ) from None
        rows = [(f"mbpp {name} row {i}", row) for name, part in parts.items() for i, row in enumerate(part, 1)]
    problems = []
    for where, row in sorted(rows, key=lambda r: r[1]["task_id"] if isinstance(r[1].get("task_id"), int) else -1):
        number, asserts, setup = row.get("task_id"), row.get("test_list"), row.get("test_setup_code") or ""
        if not isinstance(number, int):
            raise InputError(f"{where}: field 'task_id' must be an integer")
        tests = {"setup": setup, "asserts": asserts}
        if asserts and flaw_of_tests(tests):
            raise InputError(f"{where}: fields 'test_list', 'test_setup_code': {flaw_of_tests(tests)}")
        shown = f"\nIt has to pass, among others:\n{min(asserts, key=len)}" if asserts else ""
        x, split = f"{row['text'].strip()}{shown}{CODE_LINE}", "test" if 11 <= number <= 510 else "train"
        reference = tidy_program(row["code"])
        problems.append(Problem(f"mbpp/{number:05d}", x, reference, "", split, tests if asserts else None))
    return problems


MOST_TESTS, MOST_TEST_CHARS = 32, 65_536  # kept of one APPS problem: some have hundreds, some of a megabyte


def apps(data_dir: str | None) -> list[Problem]:
    """APPS from `data_dir`/{train,test}.jsonl (one of them is enough), else those files from the hub (codeparrot/apps;
    it is a script data set, which `datasets` no longer runs). https://arxiv.org/abs/2105.09938

    Both kinds of tests: programs on standard input, and calls of `fn_name`. The reference is the first of the solutions
    that is Python 3. A problem without tests or solutions is returned as such; the teacher drops and counts it.
    """
    problems = []
    for split, beside in (("train", "test"), ("test", "train")):
        if data_dir:
            path, other = (pathlib.Path(data_dir) / f"{name}.jsonl" for name in (split, beside))
            if not path.is_file() and other.is_file():
                continue
        else:
            try:
                import huggingface_hub

                path = pathlib.Path(
                    huggingface_hub.hf_hub_download("codeparrot/apps", f"{split}.jsonl", repo_type="dataset")
                )
            except Exception as e:  # whatever the hub client raises, the user needs the one way out
                raise InputError(
                    f"apps: no answer from the hub ({type(e).__name__}); pass --data_dir with train.jsonl, test.jsonl"
                ) from None
        for i, row in enumerate(read_jsonl(path, ("question", "difficulty")), 1):
            number = row.get("problem_id", row.get("id", i - 1))
            tests, left_out = apps_tests(row, f"{path}:{i}")
            solutions = json_field(row, "solutions", list, f"{path}:{i}") or []
            tidy = (tidy_program(p) for p in solutions if isinstance(p, str) and p.strip())
            reference = next((p for p in tidy if parse_program(p)), "")
            starter = str(row.get("starter_code") or "").strip("\n")
            if tests and "fn_name" in tests:
                how = f"Complete this program:\n{starter}" if starter else f"Write the function {tests['fn_name']}."
            else:
                how = "Read from standard input and write to standard output."
            x = f"{row['question'].strip()}\n{how}{CODE_LINE}"
            notes = {"difficulty": row["difficulty"], "tests_left_out": left_out}
            problems.append(Problem(f"apps/{split}/{number}", x, reference, "", split, tests, notes))
    return problems


def json_field(row: dict, field: str, kind: type, where: str) -> Any:
    """The JSON text in a field of a source row, read; None where it is empty or holds an integer too long to read."""
    text = row.get(field) or ""
    try:
        value = json.loads(text) if isinstance(text, str) and text.strip() else text or None
    except (json.JSONDecodeError, RecursionError) as e:
        raise InputError(f"{where}: field {field!r} is not JSON ({e})") from None
    except ValueError:  # more digits than Python reads by default
        return None
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{where}: field {field!r} must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def apps_tests(row: dict, where: str) -> tuple[dict[str, Any] | None, int]:
    """(tests, how many were left out) of an APPS row: the first ones that fit the bounds; None where there are none, or
    where inputs and outputs do not go together."""
    source = json_field(row, "input_output", dict, where) or {}
    inputs, outputs = source.get("inputs") or [], source.get("outputs") or []
    if not inputs and not outputs:
        return None, 0
    call = {"fn_name": source["fn_name"]} if source.get("fn_name") else {}
    if not call:  # some rows hold a text as the list of its lines
        inputs, outputs = ([joined(text) for text in part] for part in (inputs, outputs))
    if flaw_of_tests({**call, "inputs": inputs, "outputs": outputs}):
        return None, 0
    kept, room = [], MOST_TEST_CHARS
    for pair in zip(inputs, outputs):
        size = len(json.dumps(pair))
        if size <= room and len(kept) < MOST_TESTS:
            kept.append(pair)
            room -= size
    tests = {**call, "inputs": [a for a, _ in kept], "outputs": [b for _, b in kept]}
    return tests if kept else None, len(inputs) - len(kept)


def read_jsonl(path: pathlib.Path, fields: tuple[str, ...]) -> Iterator[dict]:
    """Rows of a JSONL source file, one at a time (APPS has 1.3 GB), each checked to hold `fields` as strings."""
    i = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:  # lines end at \n alone: U+2028 is text
            for i, line in enumerate(file, 1):
                row = parse_line(line, f"{path}:{i}")
                for field in fields:
                    if not isinstance(row, dict) or not isinstance(row.get(field), str):
                        raise InputError(f"{path}:{i}: field {field!r} must be a string")
                yield row
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}; check --data_dir") from None
    if i == 0:
        raise InputError(f"{path} is empty; check --data_dir")


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is loaded and how large the nano-LM's part of it is (tokens, vocabulary, base-training tokens)."""

    domain: str
    load: Any  # data_dir | None -> list[Problem]
    max_new_tokens: int
    nano_vocab: int
    base_steps: int
    base_width: int  # tokens a row


TASKS = {
    "fixtures_math": Task("math", lambda data_dir: fixtures_math(), 128, 512, 480, 288),
    "gsm8k": Task("math", gsm8k, 256, 2048, 100, 768),
    "fixtures_code": Task("code", lambda data_dir: fixtures_code(), 80, 512, 480, 288),
    "mbpp": Task("code", mbpp, 256, 2048, 100, 768),
    "apps": Task("code", apps, 512, 4096, 100, 2048),
}


def get_task(name: str) -> Task:
    """The task called `name`; InputError lists the known ones."""
    if name not in TASKS:
        raise InputError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_replay(
    task: str, replay_dir: str | None, data_dir: str | None, unsafe_sandbox: str = "refuse"
) -> dict[str, list[Quadruple]]:
    """{"train", "val", "test"} quadruples of a task; where none exist yet they are made with the keyless teacher. For a
    code task InputError where its programs cannot be confined, unless `unsafe_sandbox` is "allow"."""
    if get_task(task).domain == "code":
        check_sandbox(unsafe_sandbox)
    directory = pathlib.Path(replay_dir or f"data/replay/{task}")
    missing = [s for s in ("train", "val", "test") if not (directory / f"{s}.jsonl").is_file()]
    if missing and replay_dir:
        raise InputError(
            f"--replay {replay_dir}: {missing[0]}.jsonl is missing; make it with:"
            f" python teacher.py --task {task} --out {replay_dir}"
        )
    if missing:
        import teacher

        say(f"No replay for {task} in {directory} yet: making it with the keyless perturb teacher (teacher.py --help).")
        flags = dict(task=task, data_dir=data_dir, out=str(directory), unsafe_sandbox=unsafe_sandbox)
        on_leader(teacher.main, teacher.Args(**flags))
    replay = {split: read_replay(directory / f"{split}.jsonl") for split in ("train", "val", "test")}
    domains = sorted({q.meta["domain"] for quads in replay.values() for q in quads})
    if domains != [TASKS[task].domain]:
        raise InputError(f"{directory}: --task {task} is {TASKS[task].domain}, this replay {' and '.join(domains)}")
    check_leakage(replay)
    return replay


def replay_report(quads: list[Quadruple]) -> dict[str, Any]:
    """Counts by tag and horizon, and the leak rate: the share of critiques that say what the revision has to say, its
    final answer (math) or a line of its program that the attempt lacks (code)."""

    def leak(q: Quadruple) -> bool:
        if q.meta["domain"] == "math":
            return numbers_in(q.meta["answer"])[0] in numbers_in(q.f)
        lines = lambda text: {" ".join(line.split()) for line in text.split("\n")}
        return any(len(line) > 5 and line in " ".join(q.f.split()) for line in lines(q.y1) - lines(q.y0))

    leaks = [leak(q) for q in quads if q.meta["domain"] == "code" or "answer" in q.meta]
    return {
        "quadruples": len(quads),
        "leak_rate": sum(leaks) / max(1, len(leaks)),
        "tags": dict(sorted(Counter(tag for q in quads for tag in q.meta["error_tags"]).items())),
        "horizons": dict(sorted(Counter(q.meta["horizon"] for q in quads).items())),
    }


# ---- 2 tokenizer and packing --------------------------------------------------------------------------------------
# What: the prompts, byte-level tokenizers, arrays of fixed shape. Used by: all. Tested in: tests/test_data.py.
ATTEMPT_TEMPLATE = "Problem:\n{x}\nSolve it step by step. End with #### and the answer.\nSolution:\n"
REVISE_TEMPLATE = (
    "Problem:\n{x}\nAttempt:\n{y0}\nCritique:\n{f}\nRevise the attempt. End with #### and the answer.\nSolution:\n"
)
CRITIQUE_TEMPLATE = "Problem:\n{x}\nAttempt:\n{y0}\nSay which step is wrong and why.\nCritique:\n"
CODE_ATTEMPT_TEMPLATE = "Problem:\n{x}\nWrite the program.\nSolution:\n"
CODE_REVISE_TEMPLATE = (
    "Problem:\n{x}\nAttempt:\n{y0}\nCritique:\n{f}\nRevise the attempt. Write the whole program.\nSolution:\n"
)
CODE_CRITIQUE_TEMPLATE = "Problem:\n{x}\nAttempt:\n{y0}\nSay which line is wrong and why.\nCritique:\n"
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def attempt_prompt(x: str) -> str:
    """The prompt of a first attempt: x -> y. As in all three, x's last line says whether it is a code problem."""
    return (CODE_ATTEMPT_TEMPLATE if x.endswith(CODE_LINE) else ATTEMPT_TEMPLATE).format(x=x)


def revise_prompt(x: str, y0: str, f: str) -> str:
    """The prompt of a revision: (x, y0, f) -> y1. With f = "" the critique is left out."""
    return (CODE_REVISE_TEMPLATE if x.endswith(CODE_LINE) else REVISE_TEMPLATE).format(x=x, y0=y0, f=f)


def critique_prompt(x: str, y0: str) -> str:
    """The prompt of a critique: (x, y0) -> f."""
    return (CODE_CRITIQUE_TEMPLATE if x.endswith(CODE_LINE) else CRITIQUE_TEMPLATE).format(x=x, y0=y0)


_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
_BYTE = {chr(b): b for b in _KEPT} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_KEPT}))}


def char_starts(raw: bytes) -> list[int]:
    """Byte offsets of the characters of `raw` decoded with U+FFFD for what is no UTF-8, and its length at the end."""
    starts, at = [], 0
    while at < len(raw):
        try:
            text, bad = raw[at:].decode(), 0
        except UnicodeDecodeError as e:
            text, bad = raw[at : at + e.start].decode(), e.end - e.start
        for char in text:
            starts.append(at)
            at += len(char.encode())
        if bad:
            starts.append(at)
            at += bad
    return [*starts, at]


class Tokenizer:
    """A byte-level `tokenizers` tokenizer with the ids, the prompt's frame and the byte offsets that training needs.

    eos_ids end a generation; eos_id, one of them, is put behind training answers. A prompt is prompt_prefix + text +
    prompt_suffix: nothing for the nano model, [bos] or a chat template for others; `strip` says that the template
    strips its text. Offsets come from the bytes of the tokens themselves, so that sampled ids, which need not be what
    `encode` would give for their text, map to their text exactly.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        pad: str = "<pad>",
        eos: str = "<eos>",
        eos_ids: tuple[int, ...] = (),
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        strip: bool = False,
        vocab_size: int | None = None,
    ):
        self.inner, self.pad_id, self.eos_id = inner, inner.token_to_id(pad), inner.token_to_id(eos)
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        self.prompt_prefix, self.prompt_suffix, self.strip = list(prefix), list(suffix), strip
        inner.encode_special_tokens = True  # "<eos>" in a text is text
        self.vocab_size = vocab_size or inner.get_vocab_size()  # a model's may be padded beyond the tokenizer's
        special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self.bytes_V = [b"" if i in special else self._bytes(i) for i in range(self.vocab_size)]
        self.n_bytes_V = np.array([len(b) for b in self.bytes_V])

    def _bytes(self, i: int) -> bytes:
        """What id `i` adds to a decoded text. Added tokens stand in the vocabulary as plain text, e.g. "<think>"."""
        token = self.inner.id_to_token(i) or ""
        return bytes(_BYTE[c] for c in token) if all(c in _BYTE for c in token) else token.encode()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a whole prompt; special tokens written in `text` stay text."""
        return [*self.prompt_prefix, *self.encode(text.strip() if self.strip else text), *self.prompt_suffix]

    def decode(self, ids_MT: list[list[int]]) -> list[str]:
        return self.inner.decode_batch([list(map(int, ids)) for ids in ids_MT])

    def overlap(self, ids: list[int], text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """0/1 [len(spans), len(ids)]: which tokens share a byte with which character spans of `text`.

        With tokens "ab", "c d", "e" and spans (0, 3) and (5, 6) of "abc de": [[1, 1, 0], [0, 0, 1]].
        """
        end_T = np.cumsum(self.n_bytes_V[np.asarray(ids, int)]) if len(ids) else np.zeros(0, int)
        start_T = end_T - self.n_bytes_V[np.asarray(ids, int)] if len(ids) else end_T
        starts = char_starts(b"".join(self.bytes_V[i] for i in ids))
        at = [(starts[min(a, len(starts) - 1)], starts[min(b, len(starts) - 1)]) for a, b in spans]
        rows = [(start_T < b) & (end_T > a) & (end_T > start_T) for a, b in at]
        return np.array(rows, np.float32).reshape(len(spans), len(ids))

    def sha256(self) -> str:
        frame = [sorted(self.eos_ids), self.prompt_prefix, self.prompt_suffix, self.strip]
        return sha256(json.dumps([self.inner.to_str(), *frame]))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on `texts`, split as Qwen2 and Llama-3 split but with numbers in groups of at most two digits."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    inner.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(_SPLIT), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def right_pad(ids: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as (tokens [M, length] int32, lengths [M] int32); longer lists are cut at `length`.

    >>> right_pad([[5, 6], [7, 8, 9, 1]], 3, 0)[0].tolist(), right_pad([[5, 6], [7, 8, 9, 1]], 3, 0)[1].tolist()
    ([[5, 6, 0], [7, 8, 9]], [2, 3])
    """
    out = np.full((len(ids), length), pad_id, np.int32)
    for row, tokens in zip(out, ids):
        row[: len(tokens[:length])] = tokens[:length]
    return out, np.array([min(len(t), length) for t in ids], np.int32)


def length_mask(len_M, T: int):
    """0/1 float32 [M, T]: 1 on the first len_M[m] positions. [2, 0], T=3 -> [[1, 1, 0], [0, 0, 0]]."""
    return (jnp.arange(T)[None, :] < jnp.asarray(len_M)[:, None]).astype(jnp.float32)


def round_up(n: int, to: int) -> int:
    """The smallest multiple of `to` that is at least n."""
    return -(-n // to) * to


def bucket(length: int, longest: int) -> int:
    """A padded length of which there are few: the next quarter of `longest` (in steps of 16), at most `longest`.

    >>> [bucket(n, 240) for n in (10, 64, 65, 193, 240)]
    [64, 64, 128, 240, 240]
    """
    return min(longest, round_up(length, round_up(-(-longest // 4), 16)))


def prompt_shape(tokenizer: Tokenizer, prompts: list[str], ids: list[str], limit: int) -> int:
    """The fixed P of a set of prompts: the longest in tokens, rounded up to 16; InputError if one exceeds the limit."""
    frame = len(tokenizer.encode_prompt(""))
    lengths = [len(e.ids) + frame for e in tokenizer.inner.encode_batch(prompts, add_special_tokens=False)]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        raise InputError(
            f"the prompt of {ids[longest]} has {lengths[longest]} tokens, more than --max_prompt_tokens {limit};"
            " raise the flag or drop the problem"
        )
    return round_up(lengths[longest], 16)


def pack_prompts(tokenizer: Tokenizer, prompts: list[str], P_: int) -> dict[str, np.ndarray]:
    """Prompts as {"prompt" [B, P] (right-padded), "prompt_len" [B]}; none may be longer than P_."""
    ids = [tokenizer.encode_prompt(p) for p in prompts]
    if max(map(len, ids)) > P_:
        raise InputError(f"a prompt of {max(map(len, ids))} tokens does not fit the run's {P_}")
    tokens_BP, len_B = right_pad(ids, P_, tokenizer.pad_id)
    return {"prompt": tokens_BP, "prompt_len": len_B}


def pack_revise(tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int]) -> dict[str, np.ndarray]:
    """The revise prompts of some quadruples, packed."""
    return pack_prompts(tokenizer, [revise_prompt(q.x, q.y0, q.f) for q in quads], shapes["P_revise"])


def pack_answers(tokenizer: Tokenizer, texts: list[str], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference completions with their end-of-sequence token: (tokens_MT, len_M), cut at T."""
    return right_pad([[*tokenizer.encode(t), tokenizer.eos_id] for t in texts], T, tokenizer.pad_id)


# ---- 3 verifier ---------------------------------------------------------------------------------------------------
# What: scores of final answers and of single steps, by rules, without eval and without signals (safe in any thread).
# Used by: teacher, trainers, evaluation. Tested in: tests/test_verifier.py.
_NUMBER = r"(?>(?:\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})"  # atomic: all of a number or none
NUMBER = re.compile(rf"(?<![A-Za-z0-9_^])([-\u2212]?)\s?\$?\s?({_NUMBER})(?:\s?/\s?({_NUMBER}))?+(?!\d|[eE]\d|\^)")
_LATEX = (  # LaTeX forms a boxed answer takes, rewritten to plain text
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\text\s*\{[^{}]*\}|\\[!,; ]|\\%|\{,\}|\\\$"), lambda m: "," if m.group() == "{,}" else ""),
)


def to_fraction(text: str) -> Fraction | None:
    """A plain decimal ("1,234.50", ".5") as an exact Fraction; None if it is not one."""
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def show(value: Fraction) -> str:
    """A Fraction as people write it: 72, 2.5, else numerator/denominator.

    >>> show(Fraction(72)), show(Fraction(5, 2)), show(Fraction(1, 3))
    ('72', '2.5', '1/3')
    """
    if value.denominator == 1:
        return str(value.numerator)
    digits = next((d for d in range(1, 12) if 10**d % value.denominator == 0), None)
    if digits is None:
        return str(value)
    scaled = f"{abs(value.numerator) * 10**digits // value.denominator:0{digits + 1}d}"
    return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


def numbers_in(text: str) -> list[Fraction]:
    """Every number in `text`, in order: `1,234`, `$18.00`, `18.`, `-3`, `1/2`. Not digits glued to letters.

    >>> [str(n) for n in numbers_in("from $1,234.50 to -3, 1/2 of H2O")]
    ['2469/2', '-3', '1/2']
    """
    found = []
    for sign, whole, under in NUMBER.findall(text):
        value, divisor = to_fraction(whole), to_fraction(under) if under else Fraction(1)
        if value is not None and divisor:
            found.append((-value if sign else value) / divisor)
    return found


def final_answers(completion: str) -> list[Fraction]:
    """The distinct final answers a completion commits to: numbers after `####`, in `\\boxed{}` or in `<answer>`."""
    for pattern, plain in _LATEX:
        completion = pattern.sub(plain, completion)
    places = re.findall(r"(?<!#)####(?!#)([^\n#]*)", completion)
    places += re.findall(r"\\boxed\s*\{([^{}]*)\}", completion)
    places += re.findall(r"<answer>(.{0,200}?)</answer>", completion, re.DOTALL)
    return list(dict.fromkeys(n for place in places for n in numbers_in(place)))


def score_math(completion: str, answer: str, *, lenient: bool = False) -> float:
    """1.0 if the completion's final answer equals `answer` exactly, else 0.0.

    The final answer is the number after `####`, in `\\boxed{}` or in `<answer>`; units, `$`, commas, bold and a
    trailing point do not matter. Two different final answers score 0 (hedging).
    With `lenient`, a completion without any such marker is judged by its last number.
    """
    gold = numbers_in(answer)
    if len(gold) != 1:
        raise InputError(f"the reference answer {answer!r} is not a single number")
    found = final_answers(completion)
    if not found and lenient:
        found = numbers_in(completion)[-1:]
    return float(found == gold)


def format_valid(completion: str, domain: str) -> bool:
    """Does the completion commit to exactly one final answer (math), or hold a program that can be read (code)?"""
    if domain == "math":
        return len(final_answers(completion)) == 1
    program = parse_program(program_of(completion))
    return program is not None and bool(program.body)


_TOKENS = re.compile(rf"\s*(?:({_NUMBER})\s*(%?)|([-+*/()x\u00d7\u00f7]))")


def evaluate_arithmetic(expr: str) -> Fraction | None:
    """The exact value of `+ - * / ( ) %` arithmetic, or None where it is not that. Never eval.

    >>> str(evaluate_arithmetic("2*(3+4)/4")), evaluate_arithmetic("9**9"), evaluate_arithmetic("1/0")
    ('7/2', None, None)
    """
    expr = expr.replace("$", "").replace("\u2212", "-").strip()
    tokens, at = [], 0
    while at < len(expr) and len(expr) <= 200:
        m = _TOKENS.match(expr, at)
        if not m:
            return None
        number, percent, op = m.groups()
        value = to_fraction(number) if number else None
        tokens.append(
            value / 100 if percent else value if number else {"x": "*", "\u00d7": "*", "\u00f7": "/"}.get(op, op)
        )
        at = m.end()

    def atom(i: int, depth: int) -> tuple[Fraction, int]:
        if tokens[i] == "-":
            value, i = atom(i + 1, depth + 1)
            return -value, i
        if tokens[i] == "(":
            value, i = total(i + 1, depth + 1)
            if tokens[i] != ")":
                raise ValueError
            return value, i + 1
        if not isinstance(tokens[i], Fraction):
            raise ValueError
        return tokens[i], i + 1

    def product(i: int, depth: int) -> tuple[Fraction, int]:
        value, i = atom(i, depth)
        while i < len(tokens) and tokens[i] in ("*", "/"):
            right, j = atom(i + 1, depth)
            value, i = (value * right if tokens[i] == "*" else value / right), j
        return value, i

    def total(i: int, depth: int) -> tuple[Fraction, int]:
        if depth > 20:
            raise ValueError
        value, i = product(i, depth)
        while i < len(tokens) and tokens[i] in ("+", "-"):
            right, j = product(i + 1, depth)
            value, i = (value + right if tokens[i] == "+" else value - right), j
        return value, i

    try:
        value, end = total(0, 0)
    except (ValueError, IndexError, ZeroDivisionError, RecursionError):
        return None
    return value if end == len(tokens) else None


ANNOTATION = re.compile(r"<<([^<>=\n]{1,200})=\s*([^<>=\n]{1,40})>>")
_PLAIN_EQUATION = re.compile(
    rf"(?<![\w.,$:)+*/=-])(?<![-+*/x\u00d7\u00f7]\s)(\$?(?:{_NUMBER})(?:\s?[-+*/x\u00d7\u00f7]\s?\$?(?:{_NUMBER})){{1,12}})"
    rf"\s?=\s?(\$?(?:{_NUMBER})(?:/(?:{_NUMBER}))?)(?!\s?[\d+*/x\u00d7\u00f7=(%:-]|\.\d|\s?[A-Za-z]\b)"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One reasoning step (a line): its character span in the attempt, its equations (expression, stated value)."""

    start: int
    end: int
    equations: tuple[tuple[str, Fraction], ...]
    is_final: bool  # the line that states the final answer; its one "equation" has an empty expression


def split_steps(y: str) -> list[Step]:
    """The non-empty lines of a solution as steps; `<<48/2=24>>` annotations are read, else plain `48 / 2 = 24`.

    >>> [(s.start, s.end, [(e, str(v)) for e, v in s.equations]) for s in split_steps("So <<2+3=5>>5.\\n#### 5")]
    [(0, 14, [('2+3', '5')]), (15, 21, [('', '5')])]
    """
    steps = []
    for m in re.finditer(r"[^\n]+", y):
        line = m.group()
        finals = final_answers(line)
        if finals:
            equations = tuple(("", value) for value in finals)
        else:
            pairs = ANNOTATION.findall(line) or _PLAIN_EQUATION.findall(line)
            values = [(expr.strip(), numbers_in(value)) for expr, value in pairs]
            equations = tuple((expr, value[0]) for expr, value in values if value)
        if line.strip():
            steps.append(Step(m.start(), m.end(), equations, bool(finals)))
    return steps


def equation_holds(expr: str, value: Fraction) -> bool:
    """Is the stated value that of the expression, up to rounding at the last decimal stated (10/3 = 3.33)?"""
    exact = evaluate_arithmetic(expr)
    if exact is None:
        return True  # nothing a rule can check
    stated, needed = (len(show(v).partition(".")[2]) for v in (value, exact))
    unit, cut = Fraction(1, 10**stated), (exact - value) * (1 if exact >= 0 else -1)
    rounded = stated and (needed > max(stated, 2) or "/" in show(exact)) and -unit / 2 <= cut < unit
    return exact == value or bool(rounded)


def first_wrong_step(y: str, reference: str) -> int | None:
    """Index of the first wrong step of `y`, or None if no rule finds one.

    A step is wrong if its arithmetic does not hold. Where the final answer differs from the reference's, the first step
    whose value is none of the reference's values (each used once) is wrong too: from there on the attempt has left the
    path that leads to the answer. A right final answer by another path is not punished.
    """
    steps = split_steps(y)
    gold = split_steps(reference)
    left = Counter(value for step in gold for expr, value in step.equations if not step.is_final)
    gold_final = [step.equations[0][1] for step in gold if step.is_final]
    finals = [value for step in steps if step.is_final for _, value in step.equations]
    solved = bool(gold_final) and set(finals) == set(gold_final)
    for i, step in enumerate(steps):
        for expr, value in step.equations:
            if step.is_final:
                if not solved and [value] != gold_final:
                    return i
            elif not equation_holds(expr, value):
                return i
            elif not solved:
                if not left[value]:
                    return i
                left[value] -= 1
    return None


def process_score(y: str, reference: str) -> float:
    """Share of the steps that hold up to the first that does not (prefix form), in [0, 1].

    The share is of the attempt's or the reference's steps, whichever are more, so neither stopping early nor padding
    with true trivia pays. Prefix form because summed step rewards collapse training (https://arxiv.org/abs/2504.15275).
    """
    steps, wrong = split_steps(y), first_wrong_step(y, reference)
    held = sum(bool(step.equations) for step in steps[:wrong])
    checkable, needed = (sum(bool(step.equations) for step in s) for s in (steps, split_steps(reference)))
    return held / max(checkable, needed, 1)


def uptake(completion: str, y0: str, span: tuple[int, int] | None, reference: str) -> float:
    """1.0 if the completion repaired the place `span` of y0 that the critique points at, else 0.0.

    Repaired: no step under the span is in the completion any more (with the same equations, wherever it stands now),
    and the first step that stands in its place, all steps before it, hold by `first_wrong_step`. Steps are aligned by
    their equations, so that other words around the same arithmetic change nothing. Without a span, and for a completion
    that has nothing in that place (empty, or the bare answer), 0.

    >>> y0, y1 = "So <<2+3=6>>6.\\n#### 6", "So <<2+3=5>>5.\\n#### 5"
    >>> [uptake(y, y0, (0, 14), y1) for y in (y1, y0, "So <<2+3=7>>7.\\n#### 7", "#### 5", "")]
    [1.0, 0.0, 0.0, 0.0, 0.0]
    """
    old, new = split_steps(y0), split_steps(completion)
    key = lambda step, text: step.equations or " ".join(text[step.start : step.end].split())
    old_keys, new_keys = [key(s, y0) for s in old], [key(s, completion) for s in new]
    flagged = [i for i, s in enumerate(old) if span and s.start < span[1] and s.end > span[0]]
    if not flagged or any(old_keys[i] in new_keys for i in flagged):
        return 0.0
    matcher = difflib.SequenceMatcher(None, old_keys, new_keys, autojunk=False)
    start = next(j1 for _, i1, i2, j1, _ in matcher.get_opcodes() if i1 <= flagged[0] < i2)
    fits = lambda step: step.equations and (not step.is_final or old[flagged[0]].is_final)
    place = next((j for j in range(start, len(new)) if fits(new[j])), None)
    wrong = first_wrong_step(completion, reference)
    return float(place is not None and (wrong is None or wrong > place))


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def write_critique(step: int, flaw: str) -> str:
    """The critique sentence of the rule-based teachers: names the step and the flaw.

    >>> write_critique(1, "it should be 4+3")
    'The second step is wrong: it should be 4+3.'
    """
    return f"The {ORDINALS[step] if step < len(ORDINALS) else f'{step + 1}th'} step is wrong: {flaw}."


def check_critique(y0: str, reference: str) -> tuple[str, list[int] | None]:
    """(critique, error_span) of any attempt by the step checker; span None where no rule finds a wrong step.

    >>> check_critique("So <<2+3=6>>6.\\n#### 6", "So <<2+3=5>>5.\\n#### 5")
    ('The first step is wrong: 2+3 is not 6.', [0, 14])
    """
    wrong, answer = first_wrong_step(y0, reference), final_answers(reference)[-1]
    if wrong is None:
        return "No step is found wrong.", None
    step = split_steps(y0)[wrong]
    slips = [f"{e} is not {show(v)}" for e, v in step.equations if not step.is_final and not equation_holds(e, v)]
    f = write_critique(wrong, slips[0] if slips else "it leaves the way to the answer")
    return (write_critique(wrong, "its result is off") if answer in numbers_in(f) else f), [step.start, step.end]


def redact(f: str) -> str:
    """A critique without its numbers and without the step it names (a control: what is left cannot localize).

    >>> redact("The second step is wrong: it should be 4+3.")
    'The _ step is wrong: it should be _+_.'
    """
    return re.sub(rf"\d+(?:[.,]\d+)*(?:th)?|\b(?:{'|'.join(ORDINALS)})\b", "_", f, flags=re.IGNORECASE)


def with_attempt(q: Quadruple, y0: str, fits) -> Quadruple:
    """The quadruple with another attempt in place of its y0, criticised by the step checker. An attempt that makes the
    revise prompt too long (`fits(prompt)` says) loses its end."""
    f, span = check_critique(y0, q.y1)
    while y0 and not fits(revise_prompt(q.x, y0, f)):
        y0 = y0[: int(0.9 * len(y0))]
        f, span = check_critique(y0, q.y1)
    right = score_math(y0, q.meta["answer"]) == 1.0
    return dataclasses.replace(q, y0=y0, f=f, meta={**q.meta, "error_span": span, "y0_correct": right})


# Programs. A verdict comes from running them: `run_programs` says what is covered. What it says of the harness and not
# of the program (`harness_error`) is no score: it is NaN or None here, is masked in training and counted.
CODE_LIMITS = {"timeout_s": 4.0, "memory_mb": 512}
_VERDICTS: dict[str, Verdict] = {}  # of programs that this process has run, so that no second score runs them again


def program_of(completion: str) -> str:
    """The completion itself where it is a program as it stands, as y0 and y1 are; else what stands in its fences."""
    return completion if parse_program(completion) is not None else extract_program(completion)


def grade(texts: list[str], tests: list[dict[str, Any]]) -> list[Verdict]:
    """The verdict of each completion's program on its tests; what is not known yet runs in one batch.

    Harness errors are tried once more and not remembered; InputError if eight programs or more ran and all are such.
    """
    jobs = [(program_of(text), t) for text, t in zip(texts, tests, strict=True)]
    keys = [sha256(json.dumps([job, CODE_LIMITS], sort_keys=True)) for job in jobs]
    if len(_VERDICTS) > 100_000:
        _VERDICTS.clear()
    fresh = {key: job for key, job in zip(keys, jobs) if key not in _VERDICTS}
    verdicts: dict[str, Verdict] = {}
    for _ in range(2):
        again = [key for key in fresh if key not in verdicts or verdicts[key].outcome == "harness_error"]
        if again:
            verdicts |= zip(again, run_programs([fresh[key] for key in again], **CODE_LIMITS))
    failed = [v for v in verdicts.values() if v.outcome == "harness_error"]
    if len(failed) == len(fresh) >= 8:
        raise InputError(f"none of {len(failed)} programs could be run: {failed[0].detail}")
    _VERDICTS.update({key: v for key, v in verdicts.items() if v.outcome != "harness_error"})
    return [_VERDICTS[key] if key in _VERDICTS else verdicts[key] for key in keys]


def one_test(tests: dict[str, Any], i: int) -> dict[str, Any]:
    """The i-th test alone: {"asserts": [a, b]}, 1 -> {"asserts": [b]}."""
    return {k: [v[i]] if k in ("asserts", "inputs", "outputs") else v for k, v in tests.items()}


def count_tests(tests: dict[str, Any]) -> int:
    """How many tests there are."""
    return len(tests["asserts"] if "asserts" in tests else tests["inputs"])


def first_failures(
    texts: list[str], tests: list[dict[str, Any]], verdicts: list[Verdict], tried: int = 8
) -> list[int | None]:
    """The first test that each program fails, given its verdict on all of them; None if it fails none.

    One that passes some is run on the first `tried`, each alone: a verdict does not say which of them it counts.
    """
    found: list[int | None] = [None if v.passed else 0 for v in verdicts]
    for at in range(tried):
        rows = [i for i, t in enumerate(tests) if verdicts[i].outcome != "pass" and found[i] is None]
        rows = [i for i in rows if at < count_tests(tests[i])]
        for i, verdict in zip(rows, grade([texts[i] for i in rows], [one_test(tests[i], at) for i in rows])):
            if verdict.outcome not in ("pass", "harness_error"):
                found[i] = at
    return found


def describe_call(tests: dict[str, Any], i: int | None, longest: int = 60) -> str:
    """What the i-th test calls, without what it expects; long ones are cut. "A test" where none is known or read.

    >>> describe_call({"asserts": ["assert f([3], 1) == 4"]}, 0), describe_call({"inputs": ["1 2"], "outputs": [""]}, 0)
    ('f([3], 1)', "the input '1 2'")
    """
    if i is None:
        return "A test"
    if "asserts" not in tests:
        given = tests["inputs"][i]
        text = f"{tests['fn_name']}({', '.join(map(repr, given))})" if "fn_name" in tests else f"the input {given!r}"
    else:
        tree = parse_program(tests["asserts"][i])
        own = lambda n: isinstance(n, ast.Call) and not (isinstance(n.func, ast.Name) and n.func.id in dir(builtins))
        compared = lambda n: n.left if isinstance(n, ast.Compare) else n
        asserted = [compared(n.test) for n in ast.walk(tree or ast.Module([], [])) if isinstance(n, ast.Assert)]
        calls = [n for part in asserted for n in ast.walk(part) if own(n)]
        if not calls:
            return "A test"
        inner = [n for n in calls if isinstance(n.func, ast.Name)] or calls  # f(...) in math.isclose(f(...), 0.5)
        text = ast.unparse(inner[0])
    return text if len(text) <= longest else f"{text[:longest]}..."


def write_code_critique(line: int | None, flaw: str, call: str) -> str:
    """The critique sentences of the rule-based teachers on a program: the line, the flaw and the call that fails.

    >>> write_code_critique(3, "it uses the wrong operator", "f(3, 4)")
    'Line 3 is wrong: it uses the wrong operator. f(3, 4) fails.'
    """
    return f"{call} fails: {flaw}." if line is None else f"Line {line} is wrong: {flaw}. {call} fails."


def code_lines(program: str) -> list[tuple[int, int, str]]:
    """(start, end, key) of the lines of a program that say something. The key keeps the indent; other white space does
    not count, nor do blank lines and comments.

    >>> code_lines("if x:\\n    # why\\n    y  = 1")
    [(0, 5, 'if x:'), (20, 26, '    y = 1')]
    """
    found = []
    for m in re.finditer(r"[^\n]+", program):
        text = m.group().strip()
        if text and not text.startswith("#"):
            indent = m.group()[: m.group().index(text[0])]
            start = m.start() + len(indent)
            found.append((start, start + len(text), " " * len(indent.expandtabs()) + " ".join(text.split())))
    return found


def line_changes(old: list[tuple[int, int, str]], new: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """Runs [i, j) of lines of `old` that `new` replaces or deletes; empty ones where it inserts before line i."""
    matcher = difflib.SequenceMatcher(None, [k for *_, k in old], [k for *_, k in new], autojunk=False)
    return [(i1, i2) for op, i1, i2, _, _ in matcher.get_opcodes() if op != "equal"]


def code_uptake(completion: str, y0: str, span: list[int] | None, now: Verdict, before: Verdict) -> float:
    """1.0 if the completion's program repaired the place `span` of y0 that the critique points at, else 0.0.

    Repaired: a line under the span is gone or changed, or another stands directly before or behind it (a missing
    statement has no line of its own), and the program passes more tests than y0 did (`now`, `before`). NaN where one of
    the two verdicts is a harness error.
    """
    if "harness_error" in (now.outcome, before.outcome):
        return math.nan
    old, new = code_lines(y0), code_lines(program_of(completion))
    flagged = [i for i, (start, end, _) in enumerate(old) if span and start < span[1] and end > span[0]]
    if not flagged or now.passed <= before.passed:
        return 0.0
    first, behind = flagged[0], flagged[-1] + 1
    touched = lambda i, j: first <= i <= behind if i == j else i < behind and j > first
    return float(any(touched(i, j) for i, j in line_changes(old, new)))


def check_program(y0: str, y1: str, verdict: Verdict, call: str) -> tuple[str, list[int] | None]:
    """(critique, error_span) of any attempt at a program, from its verdict and the call that fails.

    The line is the first that differs from the reference y1. Where the two share less than half of their lines the
    attempt goes another way and no rule says where it is wrong: the critique names the call alone and span is None.
    """
    if verdict.outcome == "pass":
        return "No line is found wrong.", None
    flaw = {"wrong": "the result is wrong", "timeout": "it does not end in time", "oom": "it needs too much memory"}
    flaw = flaw.get(verdict.outcome, "it stops with an error")
    program = program_of(y0).rstrip()
    at, old, new = y0.find(program), code_lines(program), code_lines(y1)
    matcher = difflib.SequenceMatcher(None, [k for *_, k in old], [k for *_, k in new], autojunk=False)
    changes = line_changes(old, new)
    if at < 0 or not old or not changes or matcher.ratio() < 0.5:
        return write_code_critique(None, flaw, call), None
    start, end, _ = old[min(changes[0][0], len(old) - 1)]
    flaw = flaw if verdict.outcome != "wrong" else "it leaves the way to the result"
    return write_code_critique(y0[: at + start].count("\n") + 1, flaw, call), [at + start, at + end]


def with_attempts(quads: list[Quadruple], attempts: list[str], fits) -> list[Quadruple]:
    """`with_attempt` for a batch. Programs run in one batch and are criticised by `check_program`; one whose verdict is
    a harness error, or that fits in no way, leaves its quadruple as it was."""
    if any(q.meta["domain"] == "math" for q in quads):
        return [with_attempt(q, y0, fits) for q, y0 in zip(quads, attempts)]
    cut, room = [], write_code_critique(999, "it leaves the way to the result", "7" * 66)
    for q, y0 in zip(quads, attempts):
        while y0 and not fits(revise_prompt(q.x, y0, room)):
            y0 = y0[: int(0.9 * len(y0))]
        cut.append(y0)
    tests = [q.meta["tests"] for q in quads]
    verdicts, out = grade(cut, tests), []
    for q, y0, verdict, i in zip(quads, cut, verdicts, first_failures(cut, tests, verdicts)):
        f, span = check_program(y0, q.y1, verdict, describe_call(q.meta["tests"], i))
        if not fits(revise_prompt(q.x, y0, f)):  # a call of many tokens
            f, span = check_program(y0, q.y1, verdict, describe_call(q.meta["tests"], None))
        known = verdict.outcome != "harness_error" and fits(revise_prompt(q.x, y0, f))
        meta = {**q.meta, "error_span": span, "y0_correct": verdict.outcome == "pass"}
        out.append(dataclasses.replace(q, y0=y0, f=f, meta=meta) if known else q)
    return out


# ---- programs -----------------------------------------------------------------------------------------------------
# What: hostile programs run against tests. `sandbox.py` is the process they are forked from; here is the side that
# knows the expected outputs and alone makes verdicts. Used by: tasks whose answers are programs.
# Tested in: tests/test_sandbox.py.
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests said of a program. `outcome` is that of the first test that did not pass."""

    outcome: str  # pass | wrong | timeout | oom | crash | harness_error
    passed: int  # tests passed
    total: int
    detail: str  # which test, and what it returned or raised; "" of a pass


_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_STARTS = re.compile(  # a line that starts a program, unlike one of prose
    r"(?:async )?def \w+\(|class \w+ ?[(:]|(?:for|while|if|try|with)\b.*:[ \t]*+(?:#.*)?$"
    r"|from [\w.]+ import\b|import [\w., ]++$|@\w"
)
_CODE = re.compile(  # a line that goes on with one
    rf"{_STARTS.pattern}|\s+\S|[\])}}#]|(?:else|finally) ?:|(?:elif|except)\b.*:"
    r"|[\w.\[\], ]++[-+*/|&]?=[^=]|[\w.]++\(.*\) *$"
)


def extract_program(completion: str) -> str:
    """The program of a completion. It is found by its lines, never parsed: a completion is hostile text.

    Of the fenced blocks (those marked Python, if any is) it is the last one that is at least half as long as the
    longest: a later block corrects an earlier one, a short last one shows a call. A fence cut off at the end counts.
    Without a fence: from the first line that starts a statement to the last that continues one, or all of the text.

    >>> extract_program("Sure:\\n```python\\ndef f(x):\\n    return x\\n```\\nIt returns x.")
    'def f(x):\\n    return x\\n'
    """
    blocks = _BLOCK.findall(completion)
    marked = [text for language, text in blocks if language.lower() in ("python", "python3", "py")]
    texts = [text for text in marked or [text for _, text in blocks] if text.strip()]
    if texts:
        longest = max(map(len, texts))
        return [text for text in texts if 2 * len(text) >= longest][-1]
    lines = completion.splitlines()
    begin = next((i for i, line in enumerate(lines) if _STARTS.match(line)), None)
    if begin is None:
        return completion
    end = max(i for i, line in enumerate(lines) if i == begin or (i > begin and _CODE.match(line)))
    return "\n".join(lines[begin : end + 1]) + "\n"


# ---- tests of programs --------------------------------------------------------------------------------------------
def bound_names(node: ast.AST) -> set[str]:
    """Names that a piece of code gives a value: assignments, imports, definitions, arguments, loop variables."""
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            names.add(n.id)
        elif isinstance(n, ast.arg):
            names.add(n.arg)
        elif isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(n.name)
        elif isinstance(n, ast.alias):
            names.add((n.asname or n.name).split(".")[0])
    return names


def used_names(node: ast.AST) -> set[str]:
    """Names that a piece of code reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


class Hoist(ast.NodeTransformer):
    """Takes out of an expression what needs the program, each as large as a call, an index or an attribute makes it,
    and puts names `_0`, `_1` … in its place: of `set(f([1])) == {1}` the program sees `f([1])` alone."""

    def __init__(self, known: set[str], inner: set[str]):
        self.known, self.inner, self.taken = known, inner, []

    def visit(self, node):
        root = node
        while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
            root = root.func if isinstance(root, ast.Call) else root.value
        if not isinstance(root, ast.Name) or root.id in self.known | self.inner:
            return self.generic_visit(node)
        if used_names(node) & (self.inner - bound_names(node)):
            raise ValueError("a call inside a comprehension cannot be separated from what is expected of it")
        self.taken.append(ast.unparse(node))
        return ast.Name(f"_{len(self.taken) - 1}", ast.Load())


def split_assert(text: str, known: set[str]) -> tuple[list[str], Any, str | None]:
    """What of an assert needs the program, and what does not: (expressions for the program, expected value, check).

    The check is None where the one expression just has to equal the expected value; else it is an expression over the
    values `_0`, `_1` …. `known`: names that do not come from the program. Raises ValueError for another shape.

    >>> split_assert("assert f(2) == [4]", set()), split_assert("assert abs(f(2) - 4) < 0.1", {"abs"})
    ((['f(2)'], [4], None), (['f(2)'], None, 'abs(_0 - 4) < 0.1'))
    """
    body = ast.parse(text.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError("not one assert statement")
    test = body[0].test
    hoist = Hoist(known, bound_names(test))
    rest = hoist.visit(test)
    if not hoist.taken and isinstance(test, ast.Compare) and isinstance(test.left, ast.Call):
        hoist.taken, test.left = [ast.unparse(test.left)], ast.Name("_0", ast.Load())  # a function named as a builtin
    if not hoist.taken:
        raise ValueError("it calls nothing of the program")
    if isinstance(rest, ast.Compare) and len(rest.ops) == 1 and isinstance(rest.ops[0], ast.Eq):
        for one, other in ((rest.left, rest.comparators[0]), (rest.comparators[0], rest.left)):
            if isinstance(one, ast.Name) and one.id == "_0" and len(hoist.taken) == 1:
                with contextlib.suppress(ValueError):
                    return hoist.taken, ast.literal_eval(other), None
    return hoist.taken, None, ast.unparse(rest)


def split_setup(setup: str, asserts: list[str]) -> tuple[str, str, str, set[str]]:
    """Set-up code as (before the program, after it, for checks, names known without the program).

    What needs the program (`root = Node(1)`) runs after it; imports and classes run before it. Other values go to
    the program only if something there reads them: a constant that asserts compare with is none of its business.
    """
    modules = {"math", "cmath", "re", "sys", "itertools", "collections"}
    known, before, after, checks, waiting = set(dir(builtins)) | modules, [], [], [], []
    for statement in ast.parse(setup).body:
        if used_names(statement) - bound_names(statement) - known:
            after.append(statement)
            continue
        checks.append(statement)
        known |= bound_names(statement)
        early = isinstance(statement, (ast.Import, ast.ImportFrom, ast.ClassDef))
        (before if early else waiting).append(statement)
    needed = set().union(*map(used_names, [*before, *after]))
    for text in asserts:
        for expression in split_assert(text, known)[0]:
            needed |= used_names(ast.parse(expression))
    for statement in reversed(waiting):
        if bound_names(statement) & needed:
            before.append(statement)
            needed |= used_names(statement)
    order = {id(s): i for i, s in enumerate(checks)}
    before.sort(key=lambda s: order[id(s)])
    source = lambda statements: "\n".join(map(ast.unparse, statements))
    return source(before), source(after), source(checks), known


@dataclasses.dataclass(frozen=True)
class TestPlan:
    """Tests as a job for the sandbox and what is done with its frames; `problem`: why they cannot be run."""

    __test__ = False  # not one of pytest's
    job: dict[str, Any]
    checks: list[tuple[int, int, Any, str | None]]  # of each test: first frame, frames, expected value, check
    setup: str = ""  # of checks
    problem: str = ""

    @functools.cached_property
    def owner(self) -> list[int]:
        """The test of each frame."""
        return [i for i, (_, n, _, _) in enumerate(self.checks) for _ in range(n)]


def joined(text: Any) -> Any:
    """An input or output of a stdin test: a string as it is, a list of its lines as one string."""
    return "\n".join(map(str, text)) if isinstance(text, list) else text


@functools.lru_cache(maxsize=4096)
def plan_tests(tests_json: str) -> TestPlan:
    """The plan of a test dict, given as JSON. Raises InputError where it is none of the three kinds."""
    tests = json.loads(tests_json)
    kind = "asserts" if "asserts" in tests else "call" if "fn_name" in tests else "stdin"
    if kind == "stdin":
        tests |= {k: list(map(joined, tests[k])) for k in ("inputs", "outputs") if isinstance(tests.get(k), list)}
    flaw = flaw_of_tests(tests)
    if flaw:
        raise InputError(f"tests of a program: {flaw}")
    given, wanted = tests["asserts" if kind == "asserts" else "inputs"], tests.get("outputs")
    if kind == "stdin":
        return TestPlan({"kind": kind, "tests": given}, [(i, 1, text, None) for i, text in enumerate(wanted)])
    if kind == "call":
        given = [[_int_keys(v) if i == 0 else v for i, v in enumerate(args)] for args in given]
        job = {"kind": kind, "fn_name": tests["fn_name"], "tests": [list(map(sandbox.encode, v)) for v in given]}
        return TestPlan({**job, "before": ""}, [(i, 1, value, None) for i, value in enumerate(wanted)])
    try:
        before, after, setup, known = split_setup(tests.get("setup") or "", given)
        split = [split_assert(text, known) for text in given]
    except (SyntaxError, ValueError, RecursionError) as e:
        return TestPlan({}, [(0, 0, None, None)] * len(given), problem=f"asserts: {e}")
    starts = [0, *itertools.accumulate(len(expressions) for expressions, _, _ in split)]
    checks = [(start, len(parts), value, check) for start, (parts, value, check) in zip(starts, split)]
    job = {"kind": kind, "before": before, "after": after, "tests": [e for parts, _, _ in split for e in parts]}
    return TestPlan(job, checks, setup)


def _int_keys(value):
    """JSON has string keys only: a dict of whole numbers as it was."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d{1,18}", k) for k in value):
        return {int(k): v for k, v in value.items()}
    return value


def close_numbers(a: float, b: float) -> bool:
    """numpy.allclose's rule for one pair."""
    return a == b or abs(a - b) <= 1e-8 + 1e-5 * abs(b) < math.inf


def same_output(printed: str, expected: str) -> bool:
    """Do two outputs agree? Lines that are not blank, in order, each by its words; where the expected word is a decimal
    number (`2.50`, `1e-3`) a number within 1e-8 + 1e-5 of it will do. A whole number has to be the same word.

    >>> same_output("1  2\\n\\n3.000001", "1 2 \\n3.0\\n"), same_output("2 1", "1 2"), same_output("1.0", "1")
    (True, False, False)
    """
    mine, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (printed, expected))
    return list(map(len, mine)) == list(map(len, wanted)) and all(
        a == b or _same_number(a, b) for x, y in zip(mine, wanted) for a, b in zip(x, y)
    )


def _same_number(word: str, expected: str) -> bool:
    decimal = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
    if not decimal.fullmatch(expected) or re.fullmatch(r"[-+]?\d+", expected) or not decimal.fullmatch(word):
        return False
    return close_numbers(float(word), float(expected))


def same_value(value, expected) -> bool:
    """Does a returned value agree with one from JSON? Tuples are lists, keys are strings, an expected float has the
    tolerance of `same_output`, and otherwise Python's ==.

    >>> same_value([(1, 2)], [[1, 2]]), same_value({1: 2.0}, {"1": 2}), same_value(1, "1")
    (True, True, False)
    """
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        mine = {str(k): v for k, v in value.items()}
        return mine.keys() == expected.keys() and all(same_value(v, expected[k]) for k, v in mine.items())
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return close_numbers(value, expected)
    return value == expected


def grade_frame(kind: str, frame: bytes, expected) -> tuple[str, str]:
    """(outcome, what it was) of one test whose frame decides it. The frame is the candidate's: any bytes."""
    try:
        # An equal value is about as long. A far longer one is not looked at: reading and comparing could take its time.
        room = 4000 + 12 * len(expected if kind == "stdin" else json.dumps(sandbox.encode(expected)))
        if len(frame) > room:
            return "wrong", f"gave {len(frame)} bytes: {frame[5:60].decode(errors='replace')}"
        ((key, got),) = json.loads(frame).items()
        if key == "err":
            return ("oom" if got.startswith("MemoryError") else "crash"), f"raised {got[:200]}"
        if key == "odd":
            return "wrong", got[:200]
        if kind == "stdin":
            return ("pass", "") if same_output(got, expected) else ("wrong", f"printed {got[:80]!r}")
        if key == "v":
            value = sandbox.decode(got)
            if kind == "asserts" and value == expected:
                return "pass", ""
            if kind == "call" and (same_value(value, expected) or _wrapped(value, expected)):
                return "pass", ""
        return "wrong", f"returned {frame[5:-1][:80].decode(errors='replace')}"
    except Exception as e:  # no frame of ours, or a value that cannot be compared
        return "wrong", f"returned what is no value ({type(e).__name__})"


def _wrapped(value, expected) -> bool:
    return isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])


# ---- the sandbox's client -----------------------------------------------------------------------------------------
QUICK_S = 0.1  # a program that runs longer gives its place to the next and goes on beside it, at low priority
PATIENCE = 2.0  # wall time after which a test is cut too (it sleeps, or the machine is busy), in limits of CPU time
LIVE = 64  # programs alive at a time, fewer where half of the free memory is less than their limits
CHECKED_MAX = 1 << 18  # bytes of a value that an assert other than `f(x) == literal` is evaluated on
UNSAFE_SANDBOX = "refuse"  # set by `check_sandbox`


class Job:
    """One program under way: what goes in, what is kept of the frames that come out, how it ended."""

    def __init__(self, payload: dict[str, Any], keep=lambda i, frame: frame):
        """`keep(i, frame)` of each frame is kept: frames are long, and there are many."""
        data = json.dumps(payload).encode()
        self.outgoing = memoryview(struct.pack("!I", len(data)) + data)
        self.tests, self.keep, self.kept, self.fail, self.buffer = len(payload["tests"]), keep, [], b"", bytearray()
        self.end, self.why = "", ""  # done | fail | timeout | oom | crash | harness_error, and a word on it
        self.confined = self.killed = self.closed = self.slow = False
        self.began = self.test_began = self.look_at = self.cpu = 0.0


class Sandbox:
    """The server process and its candidates. Not for several threads at a time."""

    def __init__(self, mode: str = "auto"):
        """Raises InputError where `mode` does not work on this machine."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}  # sets have one order in all runs
        env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        # -P -s and an environment of our own are -I, but for the hash seed, which -I would leave to chance
        command = [sys.executable, "-P", "-s", "-S", os.path.abspath(sandbox.__file__), str(theirs.fileno()), mode]
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], cwd="/", env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self.owner, self.slots, self.base = os.getpid(), list(range(sandbox.UIDS)), None
            self.control.settimeout(60)
            hello = self._hear()
            if hello is None:
                self.close()
                errors.seek(0)
                raise InputError(f"the sandbox did not start: {errors.read().decode(errors='replace')[-300:].strip()}")
        self.mode, self.seccomp, self.base = (hello[k] for k in ("mode", "seccomp", "base"))
        self.control.settimeout(None)
        if self.mode == "refused":
            self.close()
            lacks = "; ".join(hello["missing"])
            raise InputError(
                f"programs cannot be confined on this machine ({lacks}): it needs user, mount, process and network "
                "namespaces, or Landlock and seccomp; --unsafe_sandbox allow runs them under limits alone"
            )

    def _hear(self) -> dict[str, Any] | None:
        """The server's next message; None if it is gone."""
        try:
            data = self.control.recv(4096)
        except (TimeoutError, ConnectionError):
            return None
        return json.loads(data) if data else None

    def close(self) -> None:
        """End the server and with it all that it started."""
        self.control.close()
        if self.owner == os.getpid():
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.base:  # a server that was killed left it
                shutil.rmtree(self.base, ignore_errors=True)

    def run(self, jobs: list[Job], workers: int, timeout_s: float, memory_mb: int) -> None:
        """Run all jobs to their ends; whatever happens, none of them is alive after it."""
        try:
            self._run(jobs, workers, timeout_s, memory_mb)
        except ConnectionError:
            self.close()
            for job in jobs:
                if not job.end:
                    job.end, job.why = "harness_error", "the sandbox's server ended"
        except BaseException:
            self.close()
            raise

    def _run(self, jobs: list[Job], workers: int, timeout_s: float, memory_mb: int) -> None:
        waiting = collections.deque(jobs)
        free = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
        room = int(free[1]) // 2048 // (memory_mb + sandbox.FILES_MB) if free else workers
        limit = min(max(workers, min(LIVE, room)), sandbox.UIDS)
        live: dict[int, tuple[Job, socket.socket]] = {}  # by slot
        by_fd: dict[int, int] = {}
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        try:
            while waiting or live:
                while waiting and len(live) < limit and sum(not job.slow for job, _ in live.values()) < workers:
                    job, slot = waiting.popleft(), self.slots.pop()
                    channel = self._fork(slot, job, timeout_s, memory_mb)
                    live[slot], by_fd[channel.fileno()] = (job, channel), slot
                    poll.register(channel, select.POLLIN | select.POLLOUT)
                now = time.monotonic()
                wait = min((job.look_at for job, _ in live.values()), default=now) - now
                for fd, event in poll.poll(max(0, math.ceil(1000 * wait))):
                    if fd == self.control.fileno():
                        self._ended(live, by_fd, poll, timeout_s)
                    elif fd in by_fd:
                        slot = by_fd[fd]
                        if not self._exchange(*live[slot], event, poll):
                            poll.unregister(fd)
                            del by_fd[fd]
                            self._hang_up(slot, live[slot][0])
                now = time.monotonic()
                for slot, (job, _) in live.items():
                    if job.look_at <= now:
                        self._look(slot, job, now, timeout_s, bool(waiting))
        finally:
            for _, channel in live.values():
                channel.close()

    def _tell(self, slot: int, op: str, **more) -> None:
        self.control.send(json.dumps({"op": op, "slot": slot, **more}).encode())

    def _fork(self, slot: int, job: Job, timeout_s: float, memory_mb: int) -> socket.socket:
        """Start a job in a slot; its channel."""
        channel, theirs = socket.socketpair()
        # The kernel's own limit is the last resort, should this process stand still.
        cpu_s = math.ceil((job.tests + 1) * PATIENCE * timeout_s) + 5
        order = json.dumps({"op": "fork", "slot": slot, "memory_mb": memory_mb, "cpu_s": cpu_s})
        socket.send_fds(self.control, [order.encode()], [theirs.fileno()])
        theirs.close()
        channel.setblocking(False)
        job.began = job.test_began = time.monotonic()
        job.look_at = job.began + min(QUICK_S, timeout_s)
        return channel

    def _kill(self, slot: int, job: Job) -> None:
        if not job.killed:
            job.killed = True
            self._tell(slot, "kill")
        job.look_at = time.monotonic() + 60

    def _hang_up(self, slot: int, job: Job) -> None:
        """A channel gives no more: its process is not needed, or about to be gone, and how it ended is worth a wait."""
        if job.end:
            self._kill(slot, job)
        else:
            job.look_at, job.closed = time.monotonic() + 0.5, True

    def _exchange(self, job: Job, channel: socket.socket, event: int, poll) -> bool:
        """Send and receive what can be; False when there is nothing more to come."""
        if event & select.POLLOUT and job.outgoing:
            with contextlib.suppress(ConnectionError, BlockingIOError):  # a lost one is seen below
                job.outgoing = job.outgoing[channel.send(job.outgoing[: 1 << 20]) :]
            if not job.outgoing:
                poll.modify(channel, select.POLLIN)
        if not event & ~select.POLLOUT:
            return True
        try:
            data = channel.recv(1 << 20)
        except BlockingIOError:
            return True
        except ConnectionError:
            data = b""
        job.buffer += data
        return bool(data) and self._frames(job)

    def _frames(self, job: Job) -> bool:
        """Take whole frames out of a job's buffer; False when it has given all."""
        buffer, head = job.buffer, sandbox.FRAME
        if not job.confined and buffer:
            if buffer[:1] != b"R":
                return True  # the reason follows; the end of the process ends it
            job.confined = True
            job.test_began = time.monotonic()
            del buffer[:1]
        while len(job.kept) < job.tests and len(buffer) >= head.size:
            length, cpu = head.unpack_from(buffer)
            if length > sandbox.FRAME_MAX:
                job.end, job.why = "crash", "wrote to the channel what is no frame"
                return False
            if len(buffer) < head.size + length:
                break
            frame = bytes(buffer[head.size : head.size + length])
            del buffer[: head.size + length]
            if frame.startswith(b'{"fail":'):
                job.end, job.fail = "fail", frame
                return False
            job.kept.append(job.keep(len(job.kept), frame))
            job.test_began, job.cpu = time.monotonic(), cpu
        if len(job.kept) == job.tests:
            job.end = "done"
            return False
        return True

    def _look(self, slot: int, job: Job, now: float, timeout_s: float, hurry: bool) -> None:
        """A job is still there at the time it was to be looked at; `hurry`: others wait."""
        if job.killed:
            raise ConnectionError  # killed and not gone in a minute: the server does not answer
        if job.closed:
            self._kill(slot, job)
            return
        if not job.slow and now - job.began >= min(QUICK_S, timeout_s):
            job.slow = True
            if hurry:
                self._tell(slot, "nice")
        used = now - job.test_began
        if not job.confined:
            if now - job.began > 60:
                self._kill(slot, job)
            job.look_at = now + 0.2
            return
        if used >= PATIENCE * timeout_s:
            job.end = "timeout"
            self._kill(slot, job)
            return
        if used >= timeout_s:
            self._tell(slot, "cpu")  # the answer may end it
        job.look_at = min(job.test_began + PATIENCE * timeout_s, max(job.test_began + timeout_s, now + 0.1))

    def _ended(self, live, by_fd, poll, timeout_s: float) -> None:
        """One message of the server: a process has ended, or its CPU time."""
        message = self._hear()
        if message is None:
            raise ConnectionError
        slot = message["slot"]
        job, channel = live.get(slot, (None, None))
        if job is None:
            return
        if "cpu" in message:
            late = time.monotonic() - job.test_began >= timeout_s
            if late and not job.killed and not message["cpu"] - job.cpu < 0.95 * timeout_s:  # `not <`: NaN is a lie
                job.end = "timeout"
                self._kill(slot, job)
            return
        while channel.fileno() in by_fd and self._exchange(job, channel, select.POLLIN, poll):
            if not select.select([channel], [], [], 0)[0]:
                break
        if by_fd.pop(channel.fileno(), None) is not None:
            poll.unregister(channel)
        channel.close()
        del live[slot]
        self.slots.append(slot)
        if "error" in message or not job.confined:
            job.end = "harness_error"
            job.why = f"not confined: {message.get('error') or job.buffer[1:200].decode(errors='replace')}"
        elif not job.end:
            self._explain(job, message["status"])

    def _explain(self, job: Job, status: int) -> None:
        """How a process ended that neither gave all of its values nor was ended from here."""
        if status == -signal.SIGKILL and job.killed:
            job.end, job.why = "crash", "closed its channel"
        elif status == -signal.SIGKILL:
            job.end, job.why = "oom", "killed by the kernel"
        elif status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
            job.end, job.why = "crash", f"ended by {name}{' (a forbidden system call)' * (name == 'SIGSYS')}"
        else:
            job.end, job.why = "crash", f"ended with exit code {status}"


_sandboxes: dict[str, Sandbox] = {}
_sandbox_lock = threading.Lock()


def _sandbox(purpose: str) -> Sandbox:
    """The one for "programs" or the one for "checks"; started if there is none or it ended."""
    box = _sandboxes.get(purpose)
    if (
        box is None
        or box.control.fileno() < 0
        or box.owner != os.getpid()
        or box.process.poll() is not None
        or (box.mode == "none" and UNSAFE_SANDBOX != "allow")
    ):
        if box is not None:
            box.close()
        try:
            _sandboxes[purpose] = Sandbox()
        except InputError:
            if UNSAFE_SANDBOX != "allow":
                raise
            _sandboxes[purpose] = Sandbox("none")
    return _sandboxes[purpose]


@atexit.register
def close_sandboxes() -> None:
    """End the server processes; the next program starts new ones."""
    for box in _sandboxes.values():
        box.close()
    _sandboxes.clear()


def check_sandbox(unsafe: str = "refuse") -> str:
    """How programs are confined here: "namespaces", "landlock" or "none". With `unsafe` "allow", "none" is allowed from
    here on; with "refuse" it raises InputError that says what is missing."""
    global UNSAFE_SANDBOX
    if unsafe not in ("refuse", "allow"):
        raise InputError(f"unsafe_sandbox {unsafe!r}: allow or refuse")
    UNSAFE_SANDBOX = unsafe
    with _sandbox_lock:
        return _sandbox("programs").mode


def run_program(program: str, tests: dict[str, Any], *, timeout_s: float = 4.0, memory_mb: int = 512) -> Verdict:
    """Run a hostile program against tests. `tests` is one of

    - {"setup": code, "asserts": ["assert f(1) == 2", ...]} (MBPP),
    - {"inputs": [text, ...], "outputs": [text, ...]}: the whole program once per input, on stdin (APPS),
    - {"fn_name": "f", "inputs": [[argument, ...], ...], "outputs": [value, ...]}: f, or that method of a `Solution()`.

    In the last two a program finds what APPS programs use without importing it (math, defaultdict, List, ...).

    Outcomes: pass; wrong; timeout (a test used `timeout_s` seconds of CPU time, or PATIENCE times as long went by: the
    rest is not run); oom (more than `memory_mb` MB of address space); crash (an exception, a signal, an exit before all
    values were handed over, too much output); harness_error: not the program's fault, so no 0 either. Raises InputError
    on tests of another form, and where this machine cannot confine programs (`check_sandbox`).

    What agrees. Asserts: Python's == on plain data, and all else of an assert is evaluated in a process that never saw
    the program. Printed output: `same_output`. Returned values: `same_value`, also with an expected [value] for value.
    As APPS's own evaluator does, except that lines or words in another order do not agree, that whole numbers have no
    tolerance, and that of an expected list only a list of one may stand for what it contains. Plain data is None,
    bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict (and Counter, OrderedDict, defaultdict as
    dict), deque, range, array, Fraction, Decimal, by exact type; a value of any other type is wrong.

    Covered. A program gets the inputs, never an expected output, in a process forked from one that never held any
    program, input or output. It answers with values; comparing them is done elsewhere, so what it does to its own
    interpreter (exits, builtins, frames, `__eq__`, its channel) can at most change its values. Its process has no
    network, no other process in sight, no file but the standard library (read-only) and an empty temp directory of 32
    MB, no environment, no privileges, a user id of its own where the caller is root, and system calls from a list:
    no sockets, processes, programs, signals (it dies), mounts, ptrace or IPC. CPU, address space, threads (64), open
    files (64), file size (32 MB), output (4 MB a test) and values (8 MB) are limited. The process, and the tree and
    mounts of which it is the first, end before this call returns, and with the caller if that is killed.

    Not covered:

    - bugs of the kernel; side channels of CPU and memory;
    - time: near the limit a program may fall to either side, and so may, beside many endless loops or on a busy
      machine, one that needs much CPU time;
    - asserts that show the program what they expect (`f(1).__eq__(2)`) or that any value fulfils, and programs that
      know the answers by heart; tests and set-up code are trusted;
    - what a program leaves in its own process between the tests of one call;
    - with Landlock instead of namespaces: the temp directory is on disk, takes plain files only and has no limit as a
      whole; names and sizes of other files can be asked for, their content cannot; where the caller is root and its
      Python is not for others to read, only the modules of `sandbox.WARM` are there;
    - with neither (`unsafe`): files, network and processes, but for what seccomp, if it is there, and limits refuse.

    Honest programs that start processes or import installed packages (NumPy) fail.
    """
    return run_programs([(program, tests)], workers=1, timeout_s=timeout_s, memory_mb=memory_mb)[0]


def run_programs(
    pairs: list[tuple[str, dict[str, Any]]], *, workers: int | None = None, timeout_s: float = 4.0, memory_mb: int = 512
) -> list[Verdict]:
    """`run_program` of each (program, tests), in order, `workers` (None: one per core) at a time; equal pairs run once.

    Programs that take longer than QUICK_S do not hold up the others: they go on beside them, up to LIVE at a time and
    at low priority. So a batch takes what its quick programs take, and PATIENCE * timeout_s more for every LIVE loops.
    """
    if not 0 < timeout_s < 1e6 or memory_mb < 64:
        raise InputError(f"timeout_s {timeout_s} has to be above 0 and memory_mb {memory_mb} at least 64")
    workers = workers or len(os.sched_getaffinity(0))
    try:
        keys = [(program, json.dumps(tests, sort_keys=True)) for program, tests in pairs]
    except TypeError as e:
        raise InputError(f"tests of a program have to be plain JSON: {e}") from None
    plans = {key: plan_tests(key[1]) for key in keys}
    jobs = {
        key: Job({**plan.job, "program": key[0]}, functools.partial(grade_test, plan))
        for key, plan in plans.items()
        if not plan.problem
    }
    with _sandbox_lock:
        if jobs:
            _sandbox("programs").run(list(jobs.values()), workers, timeout_s, memory_mb)
        results = {key: grade_job(plans[key], job) for key, job in jobs.items()}
        checks = {}  # (key, test) -> job of the trusted side
        for key, result in results.items():
            for test, entry in enumerate(result):
                if isinstance(entry, dict):
                    checks[key, test] = Job(entry)
        if checks:
            _sandbox("checks").run(list(checks.values()), workers, timeout_s, memory_mb)
    for (key, test), job in checks.items():
        results[key][test] = grade_check(job)
    verdicts = {}
    for key, plan in plans.items():
        total = len(plan.checks)
        result = results.get(key, [("harness_error", plan.problem)])
        worst = next(((i, *entry) for i, entry in enumerate(result) if entry[0] != "pass"), None)
        passed = sum(outcome == "pass" for outcome, _ in result)
        harness = next((text for outcome, text in result if outcome == "harness_error"), None)
        if harness is not None:
            verdicts[key] = Verdict("harness_error", passed, total, harness)
        elif worst is None and passed == total:
            verdicts[key] = Verdict("pass", passed, total, "")
        else:
            assert worst is not None, "fewer results than tests, and none of them says why"
            words = "".join(c if c.isprintable() else " " for c in worst[2][:200])
            verdicts[key] = Verdict(worst[1], passed, total, f"test {worst[0]}: {words}")
    return [verdicts[key] for key in keys]


def grade_test(plan: TestPlan, frame_index: int, frame: bytes) -> tuple[str, str] | bytes:
    """What is kept of a frame as soon as it is there: (outcome, words), or a value that a check is to be told."""
    _, _, expected, check = plan.checks[plan.owner[frame_index]]
    if check is None:
        return grade_frame(plan.job["kind"], frame, expected)
    if not frame.startswith(b'{"v":'):
        return grade_frame("asserts", frame, None)
    return frame if len(frame) <= CHECKED_MAX else ("wrong", "returned a value too long to be checked")


def grade_job(plan: TestPlan, job: Job) -> list:
    """Of each test that was run (outcome, words), or the job of a check where the trusted side has to say it."""
    if job.end == "fail":
        outcome, words = grade_frame("asserts", job.fail.replace(b'{"fail":', b'{"err":', 1), None)
        return [(outcome if outcome == "oom" else "crash", words)]
    result = []
    for first, n, _, check in plan.checks:
        kept = job.kept[first : first + n]
        graded = next((k for k in kept if isinstance(k, tuple)), None)
        if graded is None and len(kept) < n:
            return [*result, (job.end, job.why or "took too long")]
        values = {f"_{i}": frame.decode(errors="replace") for i, frame in enumerate(kept) if graded is None}
        result.append(graded or {"kind": "values", "setup": plan.setup, "tests": [check], "values": values})
    return result


def grade_check(job: Job) -> tuple[str, str]:
    """What the trusted side said of one assert. Only a name that it lacks or an end without a word is its own fault."""
    frame = job.kept[0] if job.kept else job.fail
    if frame == b'{"v":true}':
        return "pass", ""
    if frame == b'{"v":false}':
        return "wrong", "the assert is false"
    if job.end == "timeout":
        return "wrong", "the assert takes too long on the value returned"
    words = frame.decode(errors="replace")
    if not frame or re.match(r'\{"(err|fail)":"(NameError|ImportError|ModuleNotFoundError|SyntaxError)', words):
        return "harness_error", f"the assert could not be evaluated: {words[:120] or job.why}"
    return "wrong", f"the value returned does not fit the assert: {words[:120]}"


# ---- 4 decoder ----------------------------------------------------------------------------------------------------
# What: one decoder-only transformer for the nano-LM and for Llama/Qwen-shaped checkpoints. Used by: all trainers.
# Tested in: tests/test_model.py (against a naive NumPy decoder).
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder; the defaults are the `nano` preset. rope_scaling is (factor, low, high, original_len)."""

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 512
    rope_theta: float = 1e4
    rope_scaling: tuple[float, float, float, int] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    remat: bool = False  # the backward pass computes each layer again: a quarter slower, a fraction of the memory


class Reading(NamedTuple):
    """B prompts [B, P], len_B tokens long, and completions that follow them, given and not sampled: arrays of tokens
    [M, T], whose row m belongs to prompt m // (M // B)."""

    prompt_BP: jax.Array
    len_B: jax.Array
    completions: Sequence[jax.Array] = ()


class Rows(NamedTuple):
    """Rows of tokens [M, T] that pass through the layers together. They may also see the first seen_B keys of the rows
    at index `after`: their prompts."""

    tokens_MT: jax.Array
    pos_MT: jax.Array
    mask: jax.Array
    after: int | None = None
    seen_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys [L, B, K, H, P] and values [L, B, K, P, H] of B prompts, and how many of each count [B]."""

    k_LBKHP: jax.Array
    v_LBKPH: jax.Array
    len_B: jax.Array


def rms_norm(x, scale, eps: float):
    """RMSNorm in float32 (https://arxiv.org/abs/1910.07467), returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rope_table(cfg: ModelConfig, pos_MT):
    """cos, sin [M, T, 1, 2, H/2] of rotary embeddings, sin with the sign of its half; with Llama-3.1's frequency
    scaling where the config has it."""
    freq_H = cfg.rope_theta ** -(jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    if cfg.rope_scaling is not None:
        factor, low, high, original = cfg.rope_scaling
        blend = jnp.clip((original * freq_H / (2 * math.pi) - low) / (high - low), 0, 1)
        freq_H = freq_H * (blend + (1 - blend) / factor)
    angle = pos_MT[..., None].astype(jnp.float32) * freq_H
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos, cos], 2)[:, :, None], jnp.stack([-sin, sin], 2)[:, :, None]


def rotate(x_MTNH, cos, sin):
    """Rotate halves, as Llama and Qwen checkpoints expect. Two halves on an axis of their own, swapped by a flip: no
    concatenation, which a CPU runs slowly."""
    halves = x_MTNH.reshape(*x_MTNH.shape[:-1], 2, -1).astype(jnp.float32)
    return (halves * cos + jnp.flip(halves, -2) * sin).reshape(x_MTNH.shape).astype(x_MTNH.dtype)


def dense(x, w, n_in: int = 1):
    """x [..., *in] times w [*in, *out], with n_in input axes, as one 2-D matmul.

    The same as einsum, but XLA's CPU backend computes the weight gradient of a 2-D matmul 2.5 times as fast.
    """
    n = math.prod(w.shape[:n_in])
    out = x.reshape(-1, n) @ w.astype(x.dtype).reshape(n, -1)
    return out.reshape(*x.shape[: x.ndim - n_in], *w.shape[n_in:])


def attend(q_MTNH, k_MKHS, v_MKSH, mask, prefix=None):
    """Grouped-query attention of M rows on their own keys and, if given, on the keys of their group's one prompt.

    mask: boolean, broadcastable to [M, 1, 1, T, S]. prefix: (k_BKHP, v_BKPH, len_B); row m belongs to prompt m // G.
    The two parts share one softmax by its maximum and sum; nothing is concatenated and no prompt is repeated. Keys are
    stored with time last: on a CPU the small matmuls of decoding are five times as fast that way.
    """
    (M, T, N, H), K = q_MTNH.shape, k_MKHS.shape[1]
    R = N // K
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    q_MKRTH = (q_MTNH * H**-0.5).reshape(M, T, K, R, H).transpose(0, 2, 3, 1, 4)
    own = matmul(q_MKRTH.reshape(M, K, R * T, H), k_MKHS).reshape(M, K, R, T, -1)
    own = jnp.where(mask, own, -1e30)
    top = own.max(-1)
    if prefix is not None:
        k_BKHP, v_BKPH, len_B = prefix
        B, P_ = k_BKHP.shape[0], k_BKHP.shape[3]
        G = M // B
        by_prompt = lambda a: a.reshape(B, G, *a.shape[1:]).swapaxes(1, 2)  # [M, K, ...] -> [B, K, G, ...]
        by_row = lambda a: a.swapaxes(1, 2).reshape(M, K, *a.shape[3:])
        shared = matmul(by_prompt(q_MKRTH).reshape(B, K, G * R * T, H), k_BKHP).reshape(B, K, G, R, T, P_)
        shared = jnp.where((jnp.arange(P_) < len_B[:, None])[:, None, None, None, None], shared, -1e30)
        top = jnp.maximum(top, by_row(shared.max(-1)))
    top = jax.lax.stop_gradient(top)  # the maximum only keeps exp in range: it cancels
    own = jnp.exp(own - top[..., None])
    total = own.sum(-1)
    out = matmul(own.reshape(M, K, R * T, -1).astype(v_MKSH.dtype), v_MKSH).reshape(M, K, R, T, H)
    if prefix is not None:
        shared = jnp.exp(shared - by_prompt(top)[..., None])
        total = total + by_row(shared.sum(-1))
        out_p = matmul(shared.reshape(B, K, G * R * T, P_).astype(v_BKPH.dtype), v_BKPH)
        out = out + by_row(out_p.reshape(B, K, G, R, T, H))
    out = (out / total[..., None]).astype(q_MTNH.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(M, T, N, H)


def attend_causal(q_MTNH, k_MKHT, v_MKTH, mask, prefix=None):
    """`attend` where key t is none of the queries before t: block by block of queries, each on the keys up to its end,
    which leaves out up to 3/8 of the work. mask: [T, T] or [M, 1, 1, T, T]."""
    T = q_MTNH.shape[1]
    size = -(-T // max(1, min(4, T // 64)))
    parts = [
        attend(q_MTNH[:, i : i + size], k_MKHT[..., :end], v_MKTH[:, :, :end], mask[..., i : i + size, :end], prefix)
        for i, end in ((i, min(i + size, T)) for i in range(0, T, size))
    ]
    return jnp.concatenate(parts, 1)


class Blocks(nnx.Module):
    """All L transformer blocks, their weights stacked on a leading layer axis so that one scan runs them."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        L, D, N, K, H, F = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff
        normal = lambda *shape, std=cfg.d_model**-0.5: nnx.Param(
            jax.random.normal(rngs.params(), (L, *shape), jnp.float32) * std
        )
        ones = lambda *shape: nnx.Param(jnp.ones((L, *shape), jnp.float32))
        self.attn_norm, self.mlp_norm = ones(D), ones(D)
        self.q, self.k, self.v = normal(D, N, H), normal(D, K, H), normal(D, K, H)
        self.o = normal(N, H, D, std=D**-0.5 / math.sqrt(2 * L))  # residual outputs scaled down with depth (GPT-2)
        self.gate, self.up = normal(D, F), normal(D, F)
        self.down = normal(F, D, std=D**-0.5 / math.sqrt(2 * L))
        if cfg.qkv_bias:
            zeros = lambda *shape: nnx.Param(jnp.zeros((L, *shape), jnp.float32))
            self.q_bias, self.k_bias, self.v_bias = zeros(N, H), zeros(K, H), zeros(K, H)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = ones(H), ones(H)


class Decoder(nnx.Module):
    """Decoder-only transformer: RMSNorm, RoPE, GQA, SwiGLU. Returns hidden states, not log-probs.

    A prompt is computed once; the completions of all its rows attend to it, in training (`__call__`) and in sampling
    (`prefill`, `decode`). The first input of a completion is the prompt's last token, so that the state at position t
    is the one that emits token t.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        V, D = cfg.vocab_size, cfg.d_model
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32) * 0.02)
        self.blocks = Blocks(cfg, rngs)
        self.final_norm = nnx.Param(jnp.ones((D,), jnp.float32))
        if not cfg.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32) * 0.02)

    def head_VD(self):
        """Output embedding [V, D]."""
        return self.embed[...] if self.cfg.tie_embeddings else self.head[...]

    def _layer(self, w, x_MTD, rope, mask, prefix, cache, t):
        """One block: (x, its own keys and values). cache: None, or (k_MKHT, v_MKTH), written at time t in place."""
        cfg = self.cfg
        h = rms_norm(x_MTD, w["attn_norm"], cfg.norm_eps)
        q, k, v = (dense(h, w[name]) for name in "qkv")
        if cfg.qkv_bias:
            q, k, v = (a + w[name].astype(h.dtype) for a, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
        if cfg.qk_norm:
            q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # heads first; keys [M, K, H, S], values [M, K, S, H]
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, 0, 0, t))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, 0, t, 0))
        attended = (attend_causal if cache is None else attend)(q, k, v, mask, prefix)
        x_MTD = x_MTD + dense(attended, w["o"], n_in=2)
        h = rms_norm(x_MTD, w["mlp_norm"], cfg.norm_eps)
        h = jax.nn.silu(dense(h, w["gate"])) * dense(h, w["up"])
        return x_MTD + dense(h, w["down"]), (k, v)

    def _run(self, rows: list[Rows], dtype, keep_kv=False):
        """All layers without a cache: of every Rows its hidden states [M, T, D] after the final norm, and its stacked
        (k, v) if asked for.

        All rows pass a layer before any enters the next: so the backward pass adds up what they give to the weights
        layer by layer and holds one gradient, whatever their number.
        """
        ropes = [rope_table(self.cfg, r.pos_MT) for r in rows]
        weights = {name: w[...] for name, w in nnx.state(self.blocks).items()}

        def layer(xs, w):
            out, kv = [], []
            for r, x, rope in zip(rows, xs, ropes):
                prefix = None if r.after is None else (*kv[r.after], r.seen_B)
                x, new_kv = self._layer(w, x, rope, r.mask, prefix, None, None)
                out.append(x)
                kv.append(new_kv)
            return out, kv if keep_kv else None

        # one lookup for all, prompt by prompt: its gradient is one array of the vocabulary's size, added up in float32
        B = min(len(r.tokens_MT) for r in rows)
        flat = [r.tokens_MT.reshape(B, -1) for r in rows]
        x_BSD = self.embed[...][jnp.concatenate(flat, 1)].astype(dtype)
        parts = jnp.split(x_BSD, np.cumsum([f.shape[1] for f in flat])[:-1], 1)
        xs = [part.reshape(*r.tokens_MT.shape, -1) for r, part in zip(rows, parts)]
        # unrolled, what the layers keep for the backward pass is not copied into one stacked array
        unroll = 1 if self.cfg.remat else self.cfg.n_layers
        xs, kept = jax.lax.scan(jax.checkpoint(layer) if self.cfg.remat else layer, xs, weights, unroll=unroll)
        return [rms_norm(x, self.final_norm[...], self.cfg.norm_eps) for x in xs], kept

    def packed(self, tokens_MT, segment_MT, dtype=jnp.float32):
        """Hidden states of rows that hold several documents, told apart by segment_MT (RoPE is relative)."""
        T = tokens_MT.shape[1]
        same = segment_MT[:, :, None] == segment_MT[:, None, :]
        mask = (same & jnp.tril(jnp.ones((T, T), bool)))[:, None, None]
        return self._run([Rows(tokens_MT, jnp.broadcast_to(jnp.arange(T), tokens_MT.shape), mask)], dtype)[0][0]

    def _prompts(self, prompt_BP) -> Rows:
        P_ = prompt_BP.shape[1]
        return Rows(prompt_BP, jnp.broadcast_to(jnp.arange(P_), prompt_BP.shape), jnp.tril(jnp.ones((P_, P_), bool)))

    def prefill(self, prompt_BP, len_B, dtype=jnp.float32):
        """Prompts -> (Prefix of all but each prompt's last token, hidden states [B, P, D])."""
        (hidden_BPD,), ((k, v),) = self._run([self._prompts(prompt_BP)], dtype, keep_kv=True)
        return Prefix(k, v, len_B - 1), hidden_BPD

    def __call__(self, readings: Sequence[Reading], dtype=jnp.float32):
        """For each Reading its hidden states: of its prompts [B, P, D], then of its completions [M, T, D], where the
        state at position t is the one that emits token t. All readings of a call have the same B."""
        rows, firsts = [], []
        for prompt_BP, len_B, completions in readings:
            B, seen_B, last_B1 = len(prompt_BP), len_B - 1, last_tokens(prompt_BP, len_B)[:, None]
            assert len(readings[0].prompt_BP) == B, "readings of one call have as many prompts"
            firsts.append(len(rows))
            rows.append(self._prompts(prompt_BP))
            for tokens_MT in completions:
                M, T = tokens_MT.shape
                inputs_MT = jnp.concatenate([jnp.repeat(last_B1, M // B, 0), tokens_MT[:, :-1]], 1)
                pos_MT = jnp.repeat(seen_B, M // B)[:, None] + jnp.arange(T)
                rows.append(Rows(inputs_MT, pos_MT, jnp.tril(jnp.ones((T, T), bool)), firsts[-1], seen_B))
        hidden, _ = self._run(rows, dtype)
        return [hidden[i:j] for i, j in zip(firsts, [*firsts[1:], None])]

    def unstack(self, prefix: Prefix) -> list[tuple]:
        """[(weights, prompt keys, prompt values)] of every layer: taken apart once, outside the decoding loop, where
        slicing a stacked array would copy it for every token."""
        weights = {name: w[...] for name, w in nnx.state(self.blocks).items()}
        take = lambda i: ({n: w[i] for n, w in weights.items()}, prefix.k_LBKHP[i], prefix.v_LBKPH[i])
        return [take(i) for i in range(self.cfg.n_layers)]

    def new_cache(self, M: int, T: int, dtype=jnp.float32) -> list[tuple]:
        """Empty keys [M, K, H, T] and values [M, K, T, H] of every layer."""
        K, H = self.cfg.n_kv_heads, self.cfg.head_dim
        return [(jnp.zeros((M, K, H, T), dtype), jnp.zeros((M, K, T, H), dtype)) for _ in range(self.cfg.n_layers)]

    def decode(self, input_M, t, cache, layers, len_B, dtype=jnp.float32):
        """One decoding step at time t: (hidden [M, D], cache). `layers` is `unstack(prefix)`, len_B is prefix.len_B."""
        M, B, T = input_M.shape[0], len_B.shape[0], cache[0][0].shape[3]
        rope = rope_table(self.cfg, (jnp.repeat(len_B, M // B) + t)[:, None])
        x = self.embed[...].astype(dtype)[input_M][:, None]
        mask, written = jnp.arange(T) <= t, []
        for (w, k, v), own in zip(layers, cache):
            x, own = self._layer(w, x, rope, mask, (k, v, len_B), own, t)
            written.append(own)
        return rms_norm(x[:, 0], self.final_norm[...], self.cfg.norm_eps), written


def last_tokens(prompt_BP, len_B):
    """Each prompt's last token [B]."""
    return jnp.take_along_axis(prompt_BP, (len_B - 1)[:, None], 1)[:, 0]


# ---- 5 hosts and mesh ---------------------------------------------------------------------------------------------
# What: one run on several hosts; the (data, model) mesh and the one table that shards every weight. Used by: all
# trainers. Tested in: tests/test_devices.py (one device = eight, one process = two).
#
# Every host runs the same program and meets the others in the same collectives. Process 0 alone writes and prints, in
# `on_leader` or behind `leads()`; all hosts read what it wrote, so out_dir, replay and checkpoints lie on a file system
# that all of them see.
def start_hosts(spec: str) -> None:
    """Join the run's other hosts, before any device is used. `--hosts` is auto (what a TPU pod, Slurm under srun, an
    indexed Kubernetes job or Open MPI tell) or ADDRESS:PORT,COUNT,INDEX; InputError if it is neither, or they do not
    meet."""
    if jax.distributed.is_initialized():
        return
    env, vfio, given = os.environ, pathlib.Path("/dev/vfio"), {}
    if spec != "auto":
        try:
            address, count, index = spec.split(",")
            given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        except ValueError:
            raise InputError(f"--hosts {spec}: expected auto or ADDRESS:PORT,COUNT,INDEX") from None
    detected = (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
        or (importlib.util.find_spec("libtpu") and [*pathlib.Path("/dev").glob("accel*"), *vfio.glob("[0-9]*")])
    )
    if not given and not detected:
        return
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--hosts {spec}: the hosts did not meet ({' '.join(str(e).split())[:200]})") from None
    if jax.default_backend() == "cpu":  # a CPU program from the cache and one compiled here order collectives otherwise
        jax.config.update("jax_enable_compilation_cache", False)


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(*words) -> None:
    """Print, once per run."""
    if leads():
        print(*words)


def progress(steps, **options):
    """A tqdm bar over steps, shown once per run."""
    return tqdm(steps, disable=not leads(), **{"unit": "step", **options})


def broadcast(value: str) -> str:
    """Process 0's text, on every host."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(value.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(raw))))
    buffer = np.zeros(size, np.uint8)
    if leads():
        buffer[:] = raw
    return multihost_utils.broadcast_one_to_all(buffer).tobytes().decode()


def on_leader(f, *args) -> None:
    """Run f on process 0 while the others wait; its InputError is raised on all of them."""
    error = ""
    if leads():
        try:
            f(*args)
        except InputError as e:
            error = str(e)
    error = broadcast(error)
    if error:
        raise InputError(error)


def put(tree, shardings):
    """The tree on the mesh. On several hosts each hands its own shards over, of values that all of them hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf if leaf.sharding.is_equivalent_to(sharding, leaf.ndim) else jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(one, tree, shardings)


def fetch(tree):
    """The whole tree as NumPy arrays, on every host."""
    whole = lambda a: not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
    gather = lambda a: np.asarray(a) if whole(a) else multihost_utils.process_allgather(a, tiled=True)
    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(gather, tree)


def by_host(score, texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """[B, G] of `score(texts, a quadruple for each)` over B*G texts: every host scores its own prompts, then all know
    all."""
    B, G, hosts = len(quads), len(texts) // len(quads), jax.process_count()
    mine = range(jax.process_index() * B // hosts, (jax.process_index() + 1) * B // hosts)
    scores = np.zeros((B, G), np.float32)
    some = texts[mine.start * G : mine.stop * G]
    scores[mine.start : mine.stop] = np.reshape(score(some, [quads[b] for b in mine for _ in range(G)]), (-1, G))
    return scores if hosts == 1 else multihost_utils.process_allgather(scores).sum(0)


_RULES = {  # leaf name -> mesh axis of each dimension
    "embed": ("model", "data"), "head": ("model", "data"),
    "q": (None, "data", "model", None), "k": (None, "data", "model", None), "v": (None, "data", "model", None),
    "o": (None, "model", None, "data"), "gate": (None, "data", "model"), "up": (None, "data", "model"),
    "down": (None, "model", "data"),
}  # fmt: skip


def make_mesh(spec: str) -> jax.sharding.Mesh:
    """The device mesh of `--mesh DATA,MODEL` ("auto": all devices on data); InputError if it does not fit."""
    devices = jax.devices()
    try:
        data, model = (len(devices), 1) if spec == "auto" else (int(n) for n in spec.split(","))
    except ValueError:
        raise InputError(f"--mesh {spec}: expected two numbers DATA,MODEL or auto") from None
    if data < 1 or model < 1 or data * model != len(devices):
        raise InputError(f"--mesh {spec}: {data} x {model} devices asked for, {len(devices)} are here")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def count_micro_batches(mesh: jax.sharding.Mesh, prompts: int, micro_batch: int) -> int:
    """Micro-batches a step of `prompts` prompts, `micro_batch` prompts each (0: one per data device on CPUs, elsewhere
    all at once); InputError where they do not divide evenly over each other and the data devices."""
    data = mesh.shape["data"]
    size = micro_batch or (data if jax.default_backend() == "cpu" else prompts)
    if size < 1 or prompts % data or prompts % size or size % data:
        raise InputError(
            f"--prompts {prompts} (micro-batches of {size}) is not divisible over {data} data devices; choose multiples"
        )
    return prompts // size


def shard_rule(mesh: jax.sharding.Mesh, tree, at_rest: bool = True):
    """NamedShardings for a tree of weights or optimizer state by leaf name; axes that do not divide stay whole.

    at_rest=False leaves the data axis out: the layout of rollouts, in which no weight is gathered per token.
    """

    def one(path, leaf):
        keys = [getattr(p, "key", getattr(p, "name", None)) for p in path]
        axes = next(
            (_RULES[k] for k in reversed(keys) if k in _RULES and len(_RULES[k]) == leaf.ndim), (None,) * leaf.ndim
        )
        keep = [
            a if a and (at_rest or a != "data") and n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape)
        ]
        return NamedSharding(mesh, P(*keep))

    return jax.tree_util.tree_map_with_path(one, tree)


# ---- 6 log-probs and sampling -------------------------------------------------------------------------------------
# What: token log-probs without a [B, T, V] array; the sampler. Used by: all trainers. Tested in: tests/test_model.py.
def token_logp(hidden_MTD, tokens_MT, head_VD, temperature=1.0, chunk: int = 32):
    """log-prob and entropy [M, T] (float32) of tokens_MT under softmax(hidden @ head / temperature).

    Computed in chunks over time and recomputed in the backward pass, so that no [M, T, V] array ever exists.
    """
    M, T, D = hidden_MTD.shape
    n = -(-T // chunk)
    chunk = -(-T // n)  # as even as may be; the last chunk is filled up
    head_VD = head_VD.astype(hidden_MTD.dtype)

    @jax.checkpoint
    def one(_, inputs):
        hidden, tokens = inputs
        logits = jnp.dot(hidden.reshape(-1, D), head_VD.T, preferred_element_type=jnp.float32) / temperature
        logits = logits.reshape(*tokens.shape, -1)
        norm = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        probs = jax.lax.stop_gradient(jnp.exp(logits - norm[..., None]))
        entropy = norm - (probs * logits).sum(-1)
        return None, (picked - norm, jax.lax.stop_gradient(entropy))

    fill = lambda a: jnp.pad(a, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (a.ndim - 2))
    split = lambda a: fill(a).reshape(M, n, chunk, *a.shape[2:]).swapaxes(0, 1)
    _, outs = jax.lax.scan(one, None, (split(hidden_MTD), split(tokens_MT)))
    return tuple(a.swapaxes(0, 1).reshape(M, n * chunk)[:, :T] for a in outs)


def first_argmax(z_MV):
    """Index of each row's maximum, the first of several [M]. Two plain reductions: on a CPU four times as fast as
    jnp.argmax."""
    at_top_MV = z_MV == z_MV.max(-1, keepdims=True)
    last = z_MV.shape[-1] - 1
    return jnp.where(at_top_MV, jnp.arange(last + 1), last).min(-1)


def generate(
    model: Decoder,
    prompt_BP,
    len_B,
    key,
    group: int,
    T: int,
    temperature,
    eos_ids: tuple[int, ...],
    pad_id: int,
    greedy: bool = False,
    dtype=jnp.float32,
) -> dict[str, jax.Array]:
    """Sample `group` completions of at most T tokens per prompt; stops when all rows have ended.

    Returns tokens_MT (after the end: pad_id), logp_MT (of the sampled tokens, at `temperature`; 0 after the end), len_M
    (with the end token), truncated_M (1.0 where no end token came). One prefill per prompt serves its group. Draws
    depend on (key, time, row) only, so they are the same on every mesh.
    """
    M = prompt_BP.shape[0] * group
    is_end = lambda tokens: jnp.isin(tokens, jnp.array(eos_ids))
    prefix, _ = model.prefill(prompt_BP, len_B, dtype)
    head_VD = model.head_VD().astype(dtype)
    layers, cache = model.unstack(prefix), model.new_cache(M, T, dtype)

    def one_token(state):
        t, input_M, done_M, tokens_MT, logp_MT, cache = state
        hidden_MD, cache = model.decode(input_M, t, cache, layers, prefix.len_B, dtype)
        logits_MV = jnp.einsum("MD,VD->MV", hidden_MD, head_VD, preferred_element_type=jnp.float32) / temperature
        noise_MV = 0.0 if greedy else jax.random.gumbel(jax.random.fold_in(key, t), logits_MV.shape)
        token_M = first_argmax(logits_MV + noise_MV)
        logp_M = jnp.take_along_axis(logits_MV, token_M[:, None], 1)[:, 0] - jax.nn.logsumexp(logits_MV, -1)
        token_M = jnp.where(done_M, pad_id, token_M).astype(jnp.int32)
        tokens_MT = tokens_MT.at[:, t].set(token_M)
        logp_MT = logp_MT.at[:, t].set(jnp.where(done_M, 0.0, logp_M))
        return t + 1, token_M, done_M | is_end(token_M), tokens_MT, logp_MT, cache

    start = (
        0,
        jnp.repeat(last_tokens(prompt_BP, len_B), group),
        jnp.zeros(M, bool),
        jnp.full((M, T), pad_id, jnp.int32),
        jnp.zeros((M, T), jnp.float32),
        cache,
    )
    _, _, done_M, tokens_MT, logp_MT, _ = jax.lax.while_loop(lambda s: (s[0] < T) & ~s[2].all(), one_token, start)
    len_M = jnp.where(done_M, is_end(tokens_MT).argmax(-1) + 1, T)
    return {"tokens_MT": tokens_MT, "logp_MT": logp_MT, "len_M": len_M, "truncated_M": 1.0 - done_M}


# ---- 7 distances of padded trajectories ---------------------------------------------------------------------------
# What: one point per reasoning step, and three distances between two such sequences of different length under masks.
# Used by: b5. Tested in: tests/test_methods.py.
def pool_steps(hidden_BTD, step_BJT):
    """Mean hidden state of each step's tokens [B, J, D] in float32; steps without tokens give 0.

    hidden [[1], [3], [5]] with step tokens [[1, 1, 0], [0, 0, 1], [0, 0, 0]] gives [[2], [5], [0]].
    """
    total_BJD = jnp.einsum("BJT,BTD->BJD", step_BJT, hidden_BTD.astype(jnp.float32))
    return total_BJD / jnp.maximum(step_BJT.sum(-1), 1.0)[..., None]


def sinkhorn_distance(a_JR, b_KR, mask_J, mask_K, epsilon: float = 0.05, tau: float = 1.0):
    """Debiased Sinkhorn divergence of two masked point sets (equal weights on real points, 0 on padding), and whether
    it converged. Fixed float epsilon: a data-dependent one would let the padding change the result. b is a constant.
    """
    from ott.geometry import pointcloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    some = (mask_J.sum() > 0) & (mask_K.sum() > 0)
    w_J, w_K = jnp.where(some, mask_J, 1.0), jnp.where(some, mask_K, 1.0)
    value, out = sinkhorn_divergence(
        pointcloud.PointCloud, a_JR, jax.lax.stop_gradient(b_KR), a=w_J / w_J.sum(), b=w_K / w_K.sum(), epsilon=epsilon,
        solve_kwargs={"threshold": 1e-3, "max_iterations": 200, "tau_a": tau, "tau_b": tau},
    )  # fmt: skip
    return jnp.where(some, value, 0.0), out.converged[0].astype(jnp.float32)


def soft_dtw(cost_JK, n, m, gamma: float):
    """Soft-DTW (https://arxiv.org/abs/1703.01541) of the leading n x m block of a cost matrix, by anti-diagonals.

    BIG is finite on purpose: with BIG / gamma beyond 1e11 the value stays right and the gradient becomes NaN.
    """
    J, K = cost_JK.shape
    BIG = 1e6
    k_D = jnp.arange(J + K - 1)[:, None] - jnp.arange(J)[None, :]  # column of cell (diagonal d, row j)
    skewed_DJ = jnp.where((k_D >= 0) & (k_D < K), jnp.take_along_axis(cost_JK.T, jnp.clip(k_D, 0, K - 1), 0), BIG)

    def diagonal(carry, cost_J):
        before_J, last_J, d = carry  # the two previous anti-diagonals, by row
        shift = lambda a, fill: jnp.concatenate([jnp.full(1, fill), a[:-1]])
        corner_J = shift(before_J, BIG).at[0].set(jnp.where(d == 0, 0.0, BIG))
        options = jnp.stack([last_J, shift(last_J, BIG), corner_J])
        new_J = jnp.minimum(cost_J - gamma * jax.nn.logsumexp(-options / gamma, axis=0), BIG)
        return (last_J, new_J, d + 1), new_J

    start = (jnp.full(J, BIG), jnp.full(J, BIG), 0)
    _, table_DJ = jax.lax.scan(diagonal, start, skewed_DJ)
    return table_DJ[n + m - 2, n - 1]


def soft_dtw_distance(a_JR, b_KR, mask_J, mask_K, gamma: float = 0.1):
    """Debiased soft-DTW divergence of two masked point sequences, per step of the longest possible path."""
    n, m = mask_J.sum().astype(int), mask_K.sum().astype(int)
    cost = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)
    some, n, m = (n > 0) & (m > 0), jnp.maximum(n, 1), jnp.maximum(m, 1)
    self_a, self_b = soft_dtw(cost(a_JR, a_JR), n, n, gamma), soft_dtw(cost(b_KR, b_KR), m, m, gamma)
    value = soft_dtw(cost(a_JR, b_KR), n, m, gamma) - 0.5 * (self_a + self_b)
    return jnp.where(some, value / (n + m), 0.0), jnp.float32(1.0)


def l2_distance(a_JR, b_KR, mask_J, mask_K):
    """Mean squared distance of the steps that both have, index by index."""
    both_J = mask_J * mask_K
    return (((a_JR - b_KR) ** 2).sum(-1) * both_J).sum() / jnp.maximum(both_J.sum(), 1.0), jnp.float32(1.0)


# ---- 8 the nano base ----------------------------------------------------------------------------------------------
# What: the checkpoint all methods start from, trained once per task and cached. Used by: all trainers.
# Tested in: tests/test_scripts.py.
BASE_ROWS, BASE_LR, BASE_PROMPT_WEIGHT, BASE_PROSE, BASE_SEED = 8, 1e-2, 0.1, (0.75, 0.1), 0


def base_documents(tokenizer: Tokenizer, quads: list[Quadruple], epoch: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of one pass over the train split: each problem once as a first attempt, x -> y1, and
    once as a revision.

    The base has habits, as models have before they are trained, and they are the headroom of all methods. Solutions of
    problems that open with a letter up to L mostly state their answer in prose, not after #### (most of what RL first
    wins on GSM8K is that form), the others seldom do; in programs the same slip is to print what should be returned.
    Without a critique (every other revision) it keeps the answer it has (https://arxiv.org/abs/2310.01798), in code the
    whole attempt. The first pass goes roughly from short to long (copying is learnt much faster on short documents),
    later ones shuffle.
    """
    documents, rng = [], np.random.default_rng((BASE_SEED, STREAM_BASE, epoch))
    for i, q in enumerate(quads):
        with_f = (i + epoch) % 2 == 0
        code = q.meta["domain"] == "code"
        revision = q.y1 if with_f else q.y0 if code else q.y0.strip().split("\n")[-1]
        for prompt, answer in (
            (attempt_prompt(q.x), q.y1),
            (revise_prompt(q.x, q.y0, q.f if with_f else ""), revision),
        ):
            if rng.random() < BASE_PROSE[q.x[0].upper() > "L"]:
                slip = (r"\breturn (.+)", r"print(\1)") if code else (r"####\s*(.+)", r"The answer is \1.")
                answer = re.sub(*slip, answer)
            documents.append((tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]))
    noise = rng.standard_normal(len(documents))
    lengths = np.array([len(p) + len(a) for p, a in documents])
    return [documents[i] for i in np.argsort(noise if epoch else lengths + 60 * noise, kind="stable")]


def pack_documents(documents: list[tuple[list[int], list[int]]], width: int, pad_id: int, prompt_weight: float):
    """Documents packed whole into rows, each into the first of the last 12 rows that has room, nearly in order.

    Returns (tokens, segments, loss weights), each [rows, width]. Two documents ([1, 2], [3]) and ([4], [5]) at width 6
    give tokens [1 2 3 4 5 0], segments [1 1 1 2 2 0] and, with prompt_weight 0, weights [0 0 1 0 1 0]. A document
    longer than the width is cut.
    """
    rows: list[tuple[list, list, list]] = []
    for prompt, completion in documents:
        ids = [*prompt, *completion][:width]
        row = next((r for r in rows[-12:] if len(r[0]) + len(ids) <= width), None)
        if row is None:
            row = ([], [], [])
            rows.append(row)
        row[1].extend([max(row[1], default=0) + 1] * len(ids))
        row[0].extend(ids)
        row[2].extend(([prompt_weight] * len(prompt) + [1.0] * len(completion))[:width])
    fill = lambda part, value: np.array([row[part] + [value] * (width - len(row[part])) for row in rows])
    return fill(0, pad_id).astype(np.int32), fill(1, 0).astype(np.int32), fill(2, 0.0).astype(np.float32)


def base_optimizer(steps: int) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks (https://kellerjordan.github.io/posts/muon/), Adam on the rest; cosine decay.

    In these few hundred steps Muon reaches the loss that Adam reaches in two to three times as many.
    """
    dims = {
        "q": ((1,), (2, 3)),
        "k": ((1,), (2, 3)),
        "v": ((1,), (2, 3)),
        "o": ((1, 2), (3,)),
        "gate": (1, 2),
        "up": (1, 2),
        "down": (1, 2),
    }

    def matrix_dims(tree):
        key = lambda path: next((k.key for k in reversed(path) if getattr(k, "key", None) in dims), None)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*dims[key(path)]) if key(path) else None, tree
        )

    schedule = lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, 30, max(steps, 31), 0.05 * peak)
    muon = optax.contrib.muon(
        schedule(BASE_LR), adam_learning_rate=schedule(0.3 * BASE_LR), adam_b2=0.99, consistent_rms=0.2,
        muon_weight_dimension_numbers=matrix_dims,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train_base(task: Task, quads: list[Quadruple], tokenizer: Tokenizer, cfg: ModelConfig):
    """Next-token training on both prompt formats; returns the policy's parameters (an nnx.State)."""
    graphdef, params = nnx.split(Decoder(cfg, nnx.Rngs(BASE_SEED)), nnx.Param)
    tx = base_optimizer(task.base_steps)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens_MT, segment_MT, weight_MT):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            hidden_MTD = model.packed(tokens_MT, segment_MT)
            logp_MT, _ = token_logp(hidden_MTD[:, :-1], tokens_MT[:, 1:], model.head_VD(), chunk=1024)
            weight = weight_MT[:, 1:] * (segment_MT[:, 1:] == segment_MT[:, :-1])
            return -(logp_MT * weight).sum() / weight.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state_, loss

    done, epoch = 0, 0
    with tqdm(total=task.base_steps, desc="nano base", unit="step") as bar:
        while done < task.base_steps:
            documents = base_documents(tokenizer, quads, epoch)
            rows = pack_documents(documents, task.base_width, tokenizer.pad_id, BASE_PROMPT_WEIGHT)
            epoch += 1
            for i in range(0, len(rows[0]) - BASE_ROWS + 1, BASE_ROWS):
                if done == task.base_steps:
                    break
                params, opt_state, loss = step(params, opt_state, *(a[i : i + BASE_ROWS] for a in rows))
                done += 1
                bar.update()
                if done % 20 == 0:
                    bar.set_postfix(loss=f"{float(loss):.3f}")
    return params


def nano_base(task_name: str, quads: list[Quadruple], out_dir: str) -> pathlib.Path:
    """Directory of the task's nano base; trained once and cached under a key of all that went into it."""
    task = TASKS[task_name]
    sources = (ModelConfig, Blocks, Decoder, rms_norm, rope_table, rotate, dense, attend, attend_causal, token_logp,
               base_documents, pack_documents, base_optimizer, train_base, train_tokenizer)  # fmt: skip
    key = [dataclasses.astuple(task)[2:], replay_sha256(quads), templates_sha256(), jax.__version__]
    constants = [BASE_ROWS, BASE_LR, BASE_PROMPT_WEIGHT, BASE_PROSE, BASE_SEED, _SPLIT]
    key = sha256(json.dumps([*key, *constants, *(inspect.getsource(f) for f in sources)]))
    directory = pathlib.Path(out_dir) / "base" / key[:16]

    def build():
        tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1 for q in quads], task.nano_vocab)
        print(f"Building the nano base for {task_name} once (cached in {directory}).")
        params = train_base(task, quads, tokenizer, ModelConfig(tokenizer.vocab_size))
        save_weights(directory / "model.safetensors", params)
        write_atomic(directory / "tokenizer.json", tokenizer.inner.to_str())

    on_leader(lambda: (directory / "tokenizer.json").is_file() or build())  # the tokenizer is written last
    return directory


def load_model(name: str, task_name: str, replay: dict[str, list[Quadruple]], out_dir: str, mesh):
    """(config, parameters, tokenizer, cache directory) of `--model`: nano, a checkpoint's directory or its hub name."""
    source = model_source(name)
    if source is not None:
        cfg = read_hf_config(source)
        tokenizer = load_hf_tokenizer(source, cfg.vocab_size)
        params = load_hf_weights(source, cfg, mesh)
        return cfg, params, tokenizer, pathlib.Path(out_dir) / "base" / weights_sha256(params)[:16]
    directory = nano_base(task_name, replay["train"], out_dir)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
    cfg = ModelConfig(tokenizer.vocab_size)
    abstract = nnx.eval_shape(lambda: nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param))
    params = load_weights(directory / "model.safetensors", abstract)
    return cfg, put(params, shard_rule(mesh, params)), tokenizer, directory


def leaf_names(tree) -> dict[str, Any]:
    """{"blocks/q": leaf, ...} of a parameter tree, sorted by name."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {"/".join(str(k.key) for k in path if hasattr(k, "key")): leaf for path, leaf in flat}
    return dict(sorted(named.items()))


def save_weights(path: pathlib.Path, params) -> None:
    """Write a parameter tree as one safetensors file, atomically."""
    import safetensors.numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in leaf_names(params).items()}, tmp)
    os.replace(tmp, path)


def load_weights(path: pathlib.Path, abstract):
    """Read what `save_weights` wrote into the structure of `abstract`."""
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(path)
    names = iter(
        [next(n for n, leaf in leaf_names(abstract).items() if leaf is want) for want in jax.tree.leaves(abstract)]
    )
    return jax.tree.map(lambda leaf: jnp.asarray(arrays[next(names)]), abstract)


# ---- 9 checkpoints -----------------------------------------------------------------------------------------------
# What: Qwen2, Qwen3 and Llama checkpoints in the Hugging Face layout: into the decoder, and back to a directory that
# `transformers` loads. Used by: all trainers. Tested in: tests/test_hf.py (against logits of `transformers`).
_HF_MODELS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_HF_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
}  # fmt: skip
_HF_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
_HF_READ = {*_HF_SIZES, *_HF_ROPE, "model_type", "architectures", "layer_types", "rms_norm_eps", "tie_word_embeddings"}
_HF_ONLY = {  # field -> the one value that the decoder computes; absent, transformers takes it to be that value
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1,
    "partial_rotary_factor": 1, "rope_interleaved": False, "use_mrope": False, "is_llama_config": True,
    "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
}  # fmt: skip
_HF_HARMLESS = {  # they change no logit: bookkeeping, training, token ids (read with the tokenizer), old sampling flags
    "_name_or_path", "_attn_implementation_autoset", "attn_implementation", "dtype", "torch_dtype", "use_cache",
    "transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed", "return_dict", "use_bfloat16",
    "output_attentions", "output_hidden_states", "torchscript", "tf_legacy_loss", "is_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
    "problem_type", "tokenizer_class", "prefix", "initializer_range", "attention_dropout",
    "sliding_window", "max_window_layers",  # only read where use_sliding_window is on, which is refused
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "begin_suppress_tokens",
}  # fmt: skip


def model_source(name: str) -> pathlib.Path | None:
    """The directory that `--model` is read from; None for nano, which is made here."""
    return None if name == "nano" else fetch_model(name)


def fetch_model(name: str) -> pathlib.Path:
    """The directory of `--model`: `name` itself if it is one, else the hub's model of that name, downloaded once."""
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir():
        return directory
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as e:  # the hub's client raises its own errors and those of httpx, of the disk and of name checks
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(
            f"--model {name}: no such directory, and not fetched from the hub ({reason});"
            " check the name, the network and HF_TOKEN, or give a directory with config.json"
        ) from None


def read_json(path: pathlib.Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `default` where there is no file and a default is given."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give the directory of a checkpoint") from None
    except ValueError as e:
        raise InputError(f"{path}: no valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; download it again")
    return value


def refuse_hf(path: pathlib.Path, what: str):
    raise InputError(f"{path}: {what} is not supported; choose another --model")


def hf_number(config: dict[str, Any], field: str, path: pathlib.Path, whole: bool = False):
    """A number above 0 of config.json, an integer if `whole`; InputError naming the field otherwise."""
    value = config.get(field)
    if value is None:
        raise InputError(f"{path}: {field} is missing; download the file again")
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{path}: {field} = {value!r} must be {'an integer' if whole else 'a number'} above 0")
    return value if whole else float(value)


def read_hf_rope(config: dict[str, Any], path: pathlib.Path):
    """(theta, scaling) of ModelConfig from rope_theta and rope_scaling, or from the rope_parameters that replaced both
    in transformers 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling must be an object; download the file again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse_hf(path, f"rope_scaling of type {kind!r}")
    scaled = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(scaled if kind == "llama3" else ())}
    for field in rope:
        if field not in known and rope[field] is not None:
            refuse_hf(path, f"{field!r} in rope_scaling of type {kind!r}")
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        refuse_hf(path, f"partial_rotary_factor = {rope['partial_rotary_factor']}")
    first = lambda *values: next((value for value in values if value is not None), None)
    theta = {"rope_theta": first(rope.get("rope_theta"), config.get("rope_theta"), 1e4)}
    theta = hf_number(theta, "rope_theta", path)
    if kind == "default":
        return theta, None
    original = {scaled[3]: first(rope.get(scaled[3]), config.get("max_position_embeddings"))}
    factor, low, high = (hf_number(rope, field, path) for field in scaled[:3])
    if high <= low:
        raise InputError(f"{path}: high_freq_factor {high} must be above low_freq_factor {low}")
    return theta, (factor, low, high, hf_number(original, scaled[3], path, whole=True))


def check_hf_fields(config: dict[str, Any], path: pathlib.Path) -> None:
    """InputError naming the first field that the decoder does not compute as the checkpoint means it. A field that is
    not known here is refused too: whether it matters is not for this program to guess. null is 'not set'."""
    kind = config.get("model_type")
    if kind not in tuple(_HF_MODELS):
        refuse_hf(path, f"model_type {kind!r} (supported: {', '.join(_HF_MODELS)})")
    if config.get("architectures") not in (None, [_HF_MODELS[kind]]):
        refuse_hf(path, f"architectures = {config['architectures']}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        refuse_hf(path, f"layer_types = {layer_types} (supported: full_attention)")
    for field, value in config.items():
        if value is None or field in _HF_READ or field in _HF_HARMLESS:
            continue
        if field not in _HF_ONLY:
            raise InputError(
                f"{path}: the field {field!r} is not known; if it does not change what the model computes, remove it"
                " from the file, else choose another --model"
            )
        if value != _HF_ONLY[field]:
            refuse_hf(path, f"{field} = {value!r}")


def read_hf_config(directory: pathlib.Path) -> ModelConfig:
    """The decoder's shape from config.json; InputError on any field that the decoder would not compute rightly."""
    path = directory / "config.json"
    config = read_json(path)
    check_hf_fields(config, path)
    kind = config["model_type"]
    N, D = (hf_number(config, field, path, whole=True) for field in ("num_attention_heads", "hidden_size"))
    defaults = {}  # where a field may be absent, what transformers makes of it
    if kind == "llama":
        defaults["num_key_value_heads"] = N
    if kind != "qwen3":
        defaults["head_dim"] = D // N
    config = defaults | {field: value for field, value in config.items() if value is not None}
    sizes = {ours: hf_number(config, theirs, path, whole=True) for theirs, ours in _HF_SIZES.items()}
    if N % sizes["n_kv_heads"] or sizes["head_dim"] % 2 or (sizes["head_dim"] == defaults.get("head_dim") and D % N):
        raise InputError(
            f"{path}: num_attention_heads {N}, num_key_value_heads {sizes['n_kv_heads']}, head_dim"
            f" {sizes['head_dim']} and hidden_size {D} do not go together; download the file again"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise InputError(f"{path}: tie_word_embeddings = {tied!r} must be true or false")
    theta, scaling = read_hf_rope(config, path)
    return ModelConfig(
        **sizes, rope_theta=theta, rope_scaling=scaling, norm_eps=hf_number(config, "rms_norm_eps", path),
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", tie_embeddings=tied, remat=True,
    )  # fmt: skip


# Where each leaf of the decoder is in a checkpoint: the tensor's name, and which axes of the leaf (of one layer, for
# stacked leaves) each of the tensor's dimensions holds. Linear weights are stored [out, in], heads flattened.
_HF_TOP = {
    "embed": ("model.embed_tokens.weight", ((0,), (1,))),
    "final_norm": ("model.norm.weight", ((0,),)),
    "head": ("lm_head.weight", ((0,), (1,))),
}
_HF_LAYER = {
    "attn_norm": ("input_layernorm.weight", ((0,),)),
    "q": ("self_attn.q_proj.weight", ((1, 2), (0,))),
    "k": ("self_attn.k_proj.weight", ((1, 2), (0,))),
    "v": ("self_attn.v_proj.weight", ((1, 2), (0,))),
    "q_bias": ("self_attn.q_proj.bias", ((0, 1),)),
    "k_bias": ("self_attn.k_proj.bias", ((0, 1),)),
    "v_bias": ("self_attn.v_proj.bias", ((0, 1),)),
    "q_norm": ("self_attn.q_norm.weight", ((0,),)),
    "k_norm": ("self_attn.k_norm.weight", ((0,),)),
    "o": ("self_attn.o_proj.weight", ((2,), (0, 1))),
    "mlp_norm": ("post_attention_layernorm.weight", ((0,),)),
    "gate": ("mlp.gate_proj.weight", ((1,), (0,))),
    "up": ("mlp.up_proj.weight", ((1,), (0,))),
    "down": ("mlp.down_proj.weight", ((1,), (0,))),
}
_HF_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # computed, but stored by old files


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint: `dims[d]` are the axes of leaf `leaf` (of its layer `layer`) that dimension d holds;
    `axes` are the sizes of those axes, by axis."""

    leaf: str
    layer: int | None
    dims: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.axes[a] for a in dim) for dim in self.dims)

    @property
    def order(self) -> list[int]:
        return [axis for dim in self.dims for axis in dim]

    def read(self, stored, bounds) -> np.ndarray:
        """The part of the leaf within `bounds`, one (start, stop) per axis, from the open safetensors slice `stored`:
        only its bytes are read. Of the axes in one dimension only the first may be cut: heads are, their channels are
        not."""
        cut = []
        for first, *rest in self.dims:
            assert all(bounds[axis] == (0, self.axes[axis]) for axis in rest), "a head's channels are never sharded"
            inner = math.prod(self.axes[axis] for axis in rest)
            cut.append(slice(bounds[first][0] * inner, bounds[first][1] * inner))
        sizes = [bounds[axis][1] - bounds[axis][0] for axis in self.order]
        return stored[tuple(cut)].reshape(sizes).transpose(np.argsort(self.order))

    def write(self, leaf) -> np.ndarray:
        """The tensor, float32, from the whole leaf."""
        array = np.asarray(fetch(leaf if self.layer is None else _take_layer(leaf, self.layer)), np.float32)
        return np.ascontiguousarray(array.transpose(self.order)).reshape(self.shape)


@jax.jit
def _take_layer(leaf, i):
    return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def hf_tensors(leaves: dict[str, Any]) -> dict[str, HFTensor]:
    """{name in the checkpoint: HFTensor} of the decoder's leaves (by `leaf_names`), in the order of the layers."""
    stacked = {name: leaves[f"blocks/{name}"].shape for name in _HF_LAYER if f"blocks/{name}" in leaves}
    n_layers = next(iter(stacked.values()))[0]
    out = {}
    for i in range(n_layers):
        for name, shape in stacked.items():
            theirs, dims = _HF_LAYER[name]
            out[f"model.layers.{i}.{theirs}"] = HFTensor(f"blocks/{name}", i, dims, shape[1:])
    top = {_HF_TOP[n][0]: HFTensor(n, None, _HF_TOP[n][1], leaves[n].shape) for n in _HF_TOP if n in leaves}
    embed = _HF_TOP["embed"][0]
    return {embed: top.pop(embed), **out, **top}


def open_safetensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple[pathlib.Path, Any]]:
    """{tensor name: (its file, the open file)} of model.safetensors, of the files that model.safetensors.index.json
    names, or of the *.safetensors there are; closed with `stack`."""
    import safetensors

    index = directory / "model.safetensors.index.json"
    promised = None  # {tensor: file} of an index
    if (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        promised = read_json(index).get("weight_map")
        if not isinstance(promised, dict) or not promised or not all(isinstance(f, str) for f in promised.values()):
            raise InputError(f"{index}: its weight_map names no files; download it again")
        names = sorted({*promised.values()})
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise InputError(f"{directory}: no *.safetensors there; convert the checkpoint or choose another --model")
    tensors = {}
    for path in (directory / name for name in names):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except (OSError, safetensors.SafetensorError) as e:
            raise InputError(f"{path}: cannot be read ({e}); download it again") from None
        for tensor in file.keys():  # noqa: SIM118 (not a dict)
            if tensor in tensors:
                raise InputError(f"{path}: {tensor} is also in {tensors[tensor][0].name}; remove one of the files")
            tensors[tensor] = (path, file)
    for tensor, name in (promised or {}).items():
        if tensor not in tensors or tensors[tensor][0].name != name:
            raise InputError(f"{directory / name}: {tensor} is missing ({index.name} promises it); download it again")
    return tensors


def check_hf_tensors(found, wanted: dict[str, HFTensor], directory: pathlib.Path) -> None:
    """InputError unless the checkpoint holds the tensors that its config.json means: no more, no less, of the right
    shape. Tolerated: rotary buffers and the copy of a tied embedding."""
    for name, tensor in wanted.items():
        if name not in found:
            files = sorted({path.name for path, _ in found.values()})
            where = directory / files[0] if len(files) == 1 else directory / "*.safetensors"
            raise InputError(f"{where}: {name} is missing, which config.json asks for; download the checkpoint again")
        path, file = found[name]
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != tensor.shape:
            raise InputError(
                f"{path}: {name} has the shape {stored.get_shape()}, config.json means {[*tensor.shape]};"
                " take both from one checkpoint"
            )
        if stored.get_dtype() not in ("F32", "BF16", "F16"):
            refuse_hf(path, f"{name} of type {stored.get_dtype()}")
    head, embed = _HF_TOP["head"][0], _HF_TOP["embed"][0]
    for name, (path, file) in found.items():
        if name in wanted or _HF_BUFFER.fullmatch(name):
            continue
        if name != head:
            raise InputError(f"{path}: {name} is unexpected, config.json knows no such weight; choose another --model")
        if not same_tensor(file.get_slice(head), found[embed][1].get_slice(embed)):
            raise InputError(
                f"{path}: {head} differs from {embed}, but config.json ties them; set tie_word_embeddings to false"
            )


def same_tensor(a, b, rows: int = 8192) -> bool:
    """Whether two open safetensors slices [V, D] are equal, compared `rows` rows at a time."""
    shape = a.get_shape()
    return shape == b.get_shape() and all(
        np.array_equal(a[i : min(i + rows, shape[0])], b[i : min(i + rows, shape[0])]) for i in range(0, shape[0], rows)
    )


def load_hf_weights(directory: pathlib.Path, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> nnx.State:
    """The decoder's parameters, float32 and sharded by `shard_rule`, from a checkpoint of any float type.

    Leaf by leaf and layer by layer: only the slices that this host's devices hold are read, so the host's memory holds
    one leaf's shards beside the model on the devices, and one layer of them in the file's type.
    """
    abstract = nnx.eval_shape(lambda: nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param))
    leaves, shardings = leaf_names(abstract), leaf_names(shard_rule(mesh, abstract))
    wanted = hf_tensors(leaves)
    with contextlib.ExitStack() as stack:
        found = open_safetensors(directory, stack)
        check_hf_tensors(found, wanted, directory)

        def load(name: str):
            shape = leaves[name].shape
            parts = {t.layer: (t, found[theirs][1].get_slice(theirs)) for theirs, t in wanted.items() if t.leaf == name}

            def shard(index) -> np.ndarray:
                bounds = [s.indices(n)[:2] for s, n in zip(index, shape)]
                out = np.empty([stop - start for start, stop in bounds], np.float32)
                if None in parts:  # not stacked
                    tensor, stored = parts[None]
                    out[:] = tensor.read(stored, bounds)
                    return out
                for row, layer in zip(out, range(*bounds[0])):
                    tensor, stored = parts[layer]
                    row[:] = tensor.read(stored, bounds[1:])
                return out

            return jax.make_array_from_callback(shape, shardings[name], shard)

        flat, treedef = jax.tree.flatten(abstract)
        for name, at in leaf_names(jax.tree.unflatten(treedef, range(len(flat)))).items():
            flat[at] = jax.block_until_ready(load(name))  # one leaf at a time on the host
        return jax.tree.unflatten(treedef, flat)


# ---- the tokenizer of a checkpoint --------------------------------------------------------------------------------
_CHAT_SENTINEL = "\ue000"  # private use: in no template
_CHAT_DATE = datetime.datetime(2024, 7, 26)  # Llama 3's own default


def render_chat(template: str, special: dict[str, str], path: pathlib.Path) -> tuple[str, str, bool]:
    """(text before, text after, whether it is stripped) of one user message in a chat template, with the generation
    prompt, in the environment that transformers renders it in.

    Only the date differs: a template that asks for today's gets a fixed one, else a run would not be the same, nor
    resume, on the next day.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks assistant text for training, prints what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": _CHAT_DATE.strftime}
    spaced = f" \t{_CHAT_SENTINEL}\t "  # tells whether the template strips the message, as Llama's does
    messages = [{"role": "user", "content": spaced}]
    try:
        text = env.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
    except Exception as e:  # a template is a program: it may raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(
            f"{path}: its chat template failed on one user message ({reason}); choose another --model"
        ) from None
    if text.count(_CHAT_SENTINEL) != 1:
        raise InputError(f"{path}: its chat template does not show the user's message once; choose another --model")
    strip = spaced not in text
    before, after = text.split(_CHAT_SENTINEL if strip else spaced)
    if strip and (before.endswith(" \t") or after.startswith("\t ")):
        raise InputError(f"{path}: its chat template strips one side of the message only; choose another --model")
    return before, after, strip


def read_chat_template(directory: pathlib.Path, config: dict[str, Any]) -> tuple[str | None, pathlib.Path]:
    """The chat template, if any, and its file: chat_template.jinja, else tokenizer_config.json (its "default" where it
    has several)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), path
    template, path = config.get("chat_template"), directory / "tokenizer_config.json"
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise InputError(f"{path}: none of its chat templates is named 'default'; name the one to use so")
        template = named["default"]
    return template, path


def special_tokens(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} as transformers passes them to a chat template: those that are set."""
    config = read_json(directory / "special_tokens_map.json", {}) | config
    fields = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    plain = lambda token: token.get("content") if isinstance(token, dict) else token
    tokens = {field: plain(config.get(field)) for field in fields}
    for field, token in tokens.items():
        if not isinstance(token, str | None):
            raise InputError(f"{directory / 'tokenizer_config.json'}: {field} = {token!r} must be a text; correct it")
    return {field: token for field, token in tokens.items() if token is not None}


def end_ids(directory: pathlib.Path, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, as a list."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        ids = read_json(path, {}).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for i in ids:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise InputError(f"{path}: eos_token_id {i!r} is none of the model's {vocab_size} ids; correct it")
        return ids
    return []


def read_byte_level(path: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
    """tokenizer.json, if it is a byte-level BPE that gives texts back as they were and fits the model's vocabulary."""
    read_json(path)
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({' '.join(str(e).split())}); download it again") from None
    kinds = type(inner.model).__name__, type(inner.decoder).__name__
    if kinds != ("BPE", "ByteLevel"):
        refuse_hf(path, f"a tokenizer of {kinds[0]} with {kinds[1]} decoder (supported: byte-level BPE)")
    inner.no_padding()
    inner.no_truncation()
    for probe in (" Ab  c\n\n\t12,345 = é’😀\r\n", "Ab"):
        if inner.decode(inner.encode(probe, add_special_tokens=False).ids) != probe:
            refuse_hf(path, "a tokenizer that does not give back the text it encodes (a normalizer, an added space)")
    top = max(inner.get_vocab(with_added_tokens=True).values())
    if top >= vocab_size:
        raise InputError(
            f"{path}: id {top} ({inner.id_to_token(top)}) is beyond config.json's vocab_size {vocab_size};"
            " take both from one checkpoint"
        )
    return inner


def load_hf_tokenizer(directory: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint, with what ends its answers and what its prompts stand in.

    With a chat template a prompt is one user message of it. Without one, the prompt follows what the tokenizer itself
    puts in front of a text: a begin token for Llama 3, nothing for Qwen.
    """
    path = directory / "tokenizer_config.json"
    inner = read_byte_level(directory / "tokenizer.json", vocab_size)
    config = read_json(path, {})
    special, ids = special_tokens(directory, config), end_ids(directory, vocab_size)
    eos = special.get("eos_token") or (inner.id_to_token(ids[0]) if ids else None)
    pad = special.get("pad_token") or eos
    if eos is None:
        raise InputError(f"{directory}: no eos_token in {path.name}, no eos_token_id in config.json; add one")
    for field, token in (("eos_token", eos), ("pad_token", pad)):
        if inner.token_to_id(token) is None:
            raise InputError(f"{path}: {field} {token!r} is not in tokenizer.json; correct it")
    template, template_path = read_chat_template(directory, config)
    if template is None:
        plain, framed = inner.encode("0", add_special_tokens=False).ids, inner.encode("0").ids
        prefix, suffix, strip = framed[: framed.index(plain[0])], [], False
    else:
        before, after, strip = render_chat(template, special, template_path)
        prefix, suffix = (inner.encode(text, add_special_tokens=False).ids for text in (before, after))
    return Tokenizer(inner, pad, eos, tuple(ids), tuple(prefix), tuple(suffix), strip, vocab_size)


# ---- back to a directory ------------------------------------------------------------------------------------------
_HF_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


def check_save_hf(directory: pathlib.Path) -> None:
    """InputError if there is something at `--save_hf` already; to be called before training, too."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise InputError(f"--save_hf {directory}: exists and is not empty; choose a new directory")


def hf_config(cfg: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a decoder that was not read from a checkpoint. rope_theta and rope_scaling are the older spelling,
    which every version of transformers and vLLM reads."""
    if cfg.qk_norm and cfg.qkv_bias:
        raise InputError("--save_hf: no model of transformers has both q/k norms and q/k/v biases")
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    config = {"architectures": [_HF_MODELS[kind]], "model_type": kind, "torch_dtype": "float32", "hidden_act": "silu"}
    config |= {theirs: getattr(cfg, ours) for theirs, ours in _HF_SIZES.items()}
    config |= {"rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": cfg.tie_embeddings, "rope_theta": cfg.rope_theta}
    config["max_position_embeddings"] = 32768  # no limit of the decoder; vLLM asks for one
    if cfg.rope_scaling is not None:
        factor, low, high, original = cfg.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        config["max_position_embeddings"] = max(32768, int(factor * original))
    return config | {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def write_hf_meta(directory: pathlib.Path, cfg: ModelConfig, tokenizer: Tokenizer, source: pathlib.Path | None) -> None:
    """config.json and the tokenizer's files: of `source`, the checkpoint that training began with, or new ones."""
    dump = lambda name, value: (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if source is None:
        token = tokenizer.inner.id_to_token
        dump("config.json", hf_config(cfg, tokenizer))
        dump("generation_config.json", {"eos_token_id": [*tokenizer.eos_ids], "pad_token_id": tokenizer.pad_id})
        names = {"eos_token": token(tokenizer.eos_id), "pad_token": token(tokenizer.pad_id)}
        # the class that takes tokenizer.json as it is; cleaning up would change spaces before punctuation
        how = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        dump("tokenizer_config.json", names | how)
        (directory / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
        return
    if dataclasses.replace(read_hf_config(source), remat=cfg.remat) != cfg:
        raise InputError(f"{source / 'config.json'}: has changed since the weights were read; restore it")
    config = read_json(source / "config.json")
    dump("config.json", config | {"dtype" if "dtype" in config else "torch_dtype": "float32"})
    for name in _HF_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_hf_weights(directory: pathlib.Path | None, params, max_shard_bytes: int) -> None:
    """model.safetensors, or numbered files of at most max_shard_bytes each (or one tensor) and their index; without a
    directory only the gathering from all hosts."""
    import safetensors.numpy

    leaves = leaf_names(params)
    tensors = hf_tensors(leaves)
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = 4 * math.prod(tensor.shape)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    save = functools.partial(safetensors.numpy.save_file, metadata={"format": "pt"})  # transformers 4 asks for it
    part = lambda names: {name: tensors[name].write(leaves[tensors[name].leaf]) for name in names}
    for file, names in zip(files, shards):
        if directory:  # a part has no name here: it is gone before the next file's is made
            save(part(names), directory / file)
        else:
            part(names)
    if directory and len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        total = sum(4 * math.prod(tensor.shape) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_hf(
    directory: pathlib.Path,
    cfg: ModelConfig,
    params,
    tokenizer: Tokenizer,
    source: pathlib.Path | None = None,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Write a directory that `transformers` loads with the same logits: float32 weights, config and tokenizer.

    `source` is the checkpoint that training began with, whose config and tokenizer files are copied; None for nano. All
    or nothing: written beside `directory` and renamed. The host's memory holds one file's tensors at a time.
    """
    import safetensors

    directory = pathlib.Path(directory).absolute()
    check_save_hf(directory)
    tmp = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    if not leads():  # it only takes part in the gathering
        write_hf_weights(None, params, max_shard_bytes)
        return
    try:
        tmp.mkdir(parents=True)
        write_hf_meta(tmp, cfg, tokenizer, source)
        write_hf_weights(tmp, params, max_shard_bytes)
        os.replace(tmp, directory)
    except (OSError, safetensors.SafetensorError) as e:
        raise InputError(f"--save_hf {directory}: cannot be written ({e}); choose another directory") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ---- 10 evaluation -------------------------------------------------------------------------------------------------
# What: the same measurement for every method: first attempt, revision, credit localization. Used by: all trainers.
# Tested in: tests/test_scripts.py, tests/test_eval.py.
EVAL_ROWS = 128  # rows decoded at once
EDIT_BUCKETS = (2, 5, 10)  # edit distance: 1-2, 3-5, 6-10, 11+


def detector_auc(score_T: np.ndarray, label_T: np.ndarray) -> float | None:
    """Probability that a labelled position scores above an unlabelled one, ties counting half; None without both kinds.

    >>> detector_auc(np.array([3.0, 1.0, 1.0]), np.array([1, 0, 1]))
    0.75
    """
    hit, miss = score_T[label_T > 0], score_T[label_T == 0]
    if not len(hit) or not len(miss):
        return None
    diff = hit[:, None] - miss[None, :]
    return float((diff > 0).mean() + 0.5 * (diff == 0).mean())


class Evaluator:
    """Greedy first attempts and revisions of a fixed set of quadruples, and log-probs of their flawed attempts."""

    def __init__(self, graphdef, tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int], mesh, dtype):
        # short and long together would decode to the longest: rows that end together share a batch
        self.quads = sorted(quads, key=lambda q: (len(q.y1), q.meta["task_id"]))
        self.tokenizer, self.shapes = tokenizer, shapes
        self.rows = round_up(min(EVAL_ROWS, len(quads)), mesh.shape["data"])
        self.data = NamedSharding(mesh, P("data"))
        eos_ids, pad, T = tokenizer.eos_ids, tokenizer.pad_id, shapes["T"]

        def greedy(params, prompt_BP, len_B):
            model = nnx.merge(graphdef, params)
            return generate(
                model, prompt_BP, len_B, jax.random.key(0), 1, T, 1.0, eos_ids, pad, greedy=True, dtype=dtype
            )

        def logp(params, prompt_BP, len_B, tokens_BT):
            model = nnx.merge(graphdef, params)
            ((_, hidden_BTD),) = model([Reading(prompt_BP, len_B, [tokens_BT])], dtype)
            return token_logp(hidden_BTD, tokens_BT, model.head_VD())[0]

        self._greedy, self._logp = jax.jit(greedy), jax.jit(logp)

    def _batches(self, prompts: list[str], width: int, *arrays: np.ndarray):
        """Batches of `self.rows` packed prompts, each as wide as its longest needs (few widths, up to `width`), and of
        the rows of `arrays`; the last is filled up with copies of its first row. Yields (n real, arrays on devices)."""
        for i in range(0, len(prompts), self.rows):
            index = np.r_[i : min(i + self.rows, len(prompts))]
            padded = np.r_[index, np.full(self.rows - len(index), i)]
            some = pack_prompts(self.tokenizer, [prompts[j] for j in padded], width)
            narrow = bucket(int(some["prompt_len"].max()), width)
            batch = (some["prompt"][:, :narrow], some["prompt_len"], *(a[padded] for a in arrays))
            yield len(index), put(batch, self.data)

    def complete(self, params, prompts: list[str], width: int, desc: str = "") -> list[dict[str, Any]]:
        """Greedy completions: {"text", "tokens", "truncated"} per prompt; a progress bar if it gets a name."""
        done = []
        with tqdm(total=len(prompts), desc=desc, unit="problem", leave=False, disable=not (desc and leads())) as bar:
            for n, batch in self._batches(prompts, width):
                out = fetch(self._greedy(params, *batch))
                texts = decode_rows(self.tokenizer, out["tokens_MT"][:n], out["len_M"][:n])
                done += [
                    {"text": t, "tokens": int(k), "truncated": bool(c)}
                    for t, k, c in zip(texts, out["len_M"], out["truncated_M"])
                ]
                bar.update(n)
        return done

    def attempt_logp(self, params) -> tuple[list[np.ndarray], list[list[int]]]:
        """log-probs of every flawed attempt y0 after its attempt prompt, per token, and the tokens themselves."""
        ids = [self.tokenizer.encode(q.y0) for q in self.quads]
        prompts = [attempt_prompt(q.x) for q in self.quads]
        tokens_BT, len_B = right_pad(ids, self.shapes["T_replay"], self.tokenizer.pad_id)
        rows = []
        for n, batch in self._batches(prompts, self.shapes["P_attempt"], tokens_BT):
            rows += list(fetch(self._logp(params, *batch))[:n])
        return [row[:k] for row, k in zip(rows, len_B)], [t[:k] for t, k in zip(ids, len_B)]

    def __call__(self, params, base_logp: list[np.ndarray] | None = None) -> list[dict[str, Any]]:
        """One record per quadruple. With the base's `attempt_logp` also how training moved each flawed attempt."""
        attempts = self.complete(
            params, [attempt_prompt(q.x) for q in self.quads], self.shapes["P_attempt"], "attempts"
        )
        prompts = [revise_prompt(q.x, q.y0, q.f) for q in self.quads]
        revisions = self.complete(params, prompts, self.shapes["P_revise"], "revisions")
        records = score_records(self.quads, attempts, revisions)
        if base_logp is not None:
            now, ids = self.attempt_logp(params)
            for record, q, a, b, tokens in zip(records, self.quads, now, base_logp, ids):
                record.update(credit_record(self.tokenizer, q, a - b, tokens))
        return records


def pack_steps(tokenizer: Tokenizer, texts: list[str], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference texts as (tokens [B, T], lengths [B], step tokens [B, J, T]): which tokens belong to which step."""
    tokens_BT, len_B = pack_answers(tokenizer, texts, T)
    step_BJT = np.zeros((len(texts), MAX_STEPS, T), np.float32)
    for step_JT, ids, n, text in zip(step_BJT, tokens_BT.tolist(), len_B, texts):
        spans = [(s.start, s.end) for s in split_steps(text)[:MAX_STEPS]]
        step_JT[: len(spans), :n] = tokenizer.overlap(ids[:n], text, spans)
    return tokens_BT, len_B, step_BJT


def pack_trajectories(
    tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int], revise
) -> dict[str, np.ndarray]:
    """y0 and y1 as completions of the attempt prompt, with what locates steps and critique in them.

    y0, y1 [B, T]; y0_steps, y1_steps [B, J, T] and their masks [B, J]; overlap [B, J]: y0's steps under `error_span`;
    f_tokens [B, 1, P]: f's tokens in the packed revise prompts `revise`; decode_weight [B, T] on y1, wrong_weight [B]
    on wrong y0, each adding up to 1.
    """
    B, T = len(quads), shapes["T_replay"]
    prompts = pack_prompts(tokenizer, [attempt_prompt(q.x) for q in quads], shapes["P_attempt"])
    out = {"x_prompt": prompts["prompt"], "x_prompt_len": prompts["prompt_len"]}
    out["y0"], _, out["y0_steps"] = pack_steps(tokenizer, [q.y0 for q in quads], T)
    out["y1"], len_B, out["y1_steps"] = pack_steps(tokenizer, [q.y1 for q in quads], T)
    out["overlap"] = np.zeros((B, MAX_STEPS), np.float32)
    out["f_tokens"] = np.zeros((B, 1, shapes["P_revise"]), np.float32)
    for b, q in enumerate(quads):
        start, end = q.meta["error_span"] or (0, 0)
        steps = split_steps(q.y0)[:MAX_STEPS]
        out["overlap"][b, : len(steps)] = [s.start < end and s.end > start for s in steps]
        text = revise_prompt(q.x, q.y0, q.f)
        at = revise_prompt(q.x, q.y0, "\0").index("\0")  # where f begins in the prompt
        inner = slice(len(tokenizer.prompt_prefix), revise["prompt_len"][b] - len(tokenizer.prompt_suffix))
        ids = revise["prompt"][b, inner].tolist()
        out["f_tokens"][b, :, inner] = tokenizer.overlap(ids, text, [(at, at + len(q.f))])
    out |= {f"{k}_mask": (out[f"{k}_steps"].sum(-1) > 0).astype(np.float32) for k in ("y0", "y1")}
    decode_BT = np.asarray(length_mask(len_B, T))
    wrong_B = np.array([not q.meta["y0_correct"] for q in quads], np.float32)
    out |= {"decode_weight": decode_BT / decode_BT.sum(), "wrong_weight": wrong_B / max(wrong_B.sum(), 1.0)}
    return out


def decode_rows(tokenizer: Tokenizer, tokens_MT, len_M) -> list[str]:
    """Texts of generated rows, without the end token."""
    return tokenizer.decode([row[:n] for row, n in zip(np.asarray(tokens_MT).tolist(), np.asarray(len_M).tolist())])


def score_records(quads: list[Quadruple], attempts: list[dict], revisions: list[dict]) -> list[dict[str, Any]]:
    """What is kept of evaluated quadruples: scores of y0, attempt and revision (None: harness error), and groups."""
    texts = [q.y0 for q in quads] + [done["text"] for done in (*attempts, *revisions)]
    scores = [None if math.isnan(score) else score for score in score_outcomes(texts, [*quads, *quads, *quads])]
    n, records = len(quads), []
    for i, (q, attempt, revision) in enumerate(zip(quads, attempts, revisions)):
        records.append({
            "task_id": q.meta["task_id"],
            "horizon": q.meta["horizon"],
            "edit_distance": q.meta["edit_distance"],
            "error_tags": q.meta["error_tags"],
            "y0": scores[i],
            "attempt": scores[n + i],
            "revised": scores[2 * n + i],
            "revised_tokens": revision["tokens"],
            "revised_truncated": revision["truncated"],
            "revised_format": format_valid(revision["text"], q.meta["domain"]),
            "attempt_tokens": attempt["tokens"],
            "attempt_truncated": attempt["truncated"],
            "revision": revision["text"],
        })  # fmt: skip
    return records


def credit_record(tokenizer: Tokenizer, q: Quadruple, shift_T: np.ndarray, ids: list[int]) -> dict[str, float | None]:
    """Credit localization on one flawed attempt: is the shift log pi - log pi_base lower on the erroneous step?

    credit_auc: AUC of -shift as a detector of the `error_span` tokens; credit_gap: mean shift off the span minus on it.
    """
    span = q.meta["error_span"]
    if span is None:
        return {"credit_auc": None, "credit_gap": None}
    label_T = tokenizer.overlap(ids, q.y0, [tuple(span)])[0]
    auc = detector_auc(-shift_T, label_T)
    gap = None if auc is None else float(shift_T[label_T == 0].mean() - shift_T[label_T > 0].mean())
    return {"credit_auc": auc, "credit_gap": gap}


def mean(values) -> float | None:
    """Mean of the values that are not None (nor NaN); None if there are none."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(values)) if values else None


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies and rates of one evaluation, whole and by horizon, edit distance and error tag; over what was scored:
    harness_errors counts the records in which a score is missing."""
    known = lambda r: None not in (r["y0"], r["revised"])

    def rates(rows):
        return {
            "n": len(rows),
            "accuracy": mean(r["attempt"] for r in rows),
            "accuracy_revised": mean(r["revised"] for r in rows),
            "delta_critique": mean(r["revised"] - r["y0"] for r in rows if known(r)),
        }

    bucket = lambda r: next(
        (f"<={edge}" for edge in EDIT_BUCKETS if r["edit_distance"] <= edge), f">{EDIT_BUCKETS[-1]}"
    )
    keys = lambda key: sorted(
        {key(r) for r in records}, key=lambda k: k if isinstance(k, int) else (k[0], int(k.lstrip("<=>")))
    )
    group = lambda key: {str(k): rates([r for r in records if key(r) == k]) for k in keys(key)}
    tags = sorted({tag for r in records for tag in r["error_tags"]})
    return {
        **rates(records),
        "accuracy_y0": mean(r["y0"] for r in records),
        "wrong_to_right": mean(r["revised"] for r in records if r["y0"] == 0),
        "right_to_wrong": mean(1 - r["revised"] for r in records if known(r) and r["y0"]),
        "harness_errors": sum(None in (r["y0"], r["attempt"], r["revised"]) for r in records),
        "format_frac": mean(r["revised_format"] for r in records),
        "truncated_frac": mean(r["revised_truncated"] for r in records),
        "tokens_mean": mean(r["revised_tokens"] for r in records),
        "credit_auc": mean(r.get("credit_auc") for r in records),
        "credit_gap": mean(r.get("credit_gap") for r in records),
        "by_horizon": group(lambda r: r["horizon"]),
        "by_edit_distance": group(bucket),
        "by_tag": {tag: rates([r for r in records if tag in r["error_tags"]]) for tag in tags},
    }


def verdicts_of(texts: list[str], quads: list[Quadruple]) -> list[Verdict | None]:
    """The verdict of each text's program under its own quadruple, in one batch; None for a math problem."""
    code = [i for i, q in enumerate(quads) if q.meta["domain"] == "code"]
    found = dict(zip(code, grade([texts[i] for i in code], [quads[i].meta["tests"] for i in code])))
    return [found.get(i) for i in range(len(texts))]


def score_outcomes(texts: list[str], quads: list[Quadruple]) -> list[float]:
    """The outcome of each text under its own quadruple: 1.0 if the final answer is right (math) or all tests pass
    (code), else 0.0; NaN if the harness failed."""

    def one(text: str, q: Quadruple, verdict: Verdict | None) -> float:
        if verdict is None:
            return score_math(text, q.meta["answer"])
        return math.nan if verdict.outcome == "harness_error" else float(verdict.outcome == "pass")

    return list(map(one, texts, quads, verdicts_of(texts, quads)))


def outcome_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Outcome reward [B, G] of B*G completions, in {0, 1}, or NaN (`score_outcomes`)."""
    return by_host(score_outcomes, texts, quads)


def process_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Process reward [B, G] of B*G completions, in [0, 1]: `process_score` against the replay's revision (math), the
    fraction of tests passed, NaN if the harness failed (code)."""

    def one(text: str, q: Quadruple, verdict: Verdict | None) -> float:
        if verdict is None:
            return process_score(text, q.y1)
        return math.nan if verdict.outcome == "harness_error" else verdict.passed / count_tests(q.meta["tests"])

    return by_host(lambda some, owners: list(map(one, some, owners, verdicts_of(some, owners))), texts, quads)


def uptake_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Uptake reward [B, G] of B*G completions, in {0, 1}, or NaN: `uptake` or `code_uptake` of the quadruple's own
    critique."""

    def one(text: str, q: Quadruple, now: Verdict | None, before: Verdict | None) -> float:
        span = q.meta["error_span"]
        return uptake(text, q.y0, span, q.y1) if now is None else code_uptake(text, q.y0, span, now, before)

    def all_of(some: list[str], owners: list[Quadruple]) -> list[float]:
        verdicts = verdicts_of([*some, *(q.y0 for q in owners)], [*owners, *owners])
        return list(map(one, some, owners, verdicts[: len(some)], verdicts[len(some) :]))

    return by_host(all_of, texts, quads)


def check_step_credit(task: str, credit: str) -> None:
    """Rewards of single steps need steps that can be checked one by one; InputError for a code task."""
    if credit == "per_step" and get_task(task).domain != "math":
        raise InputError(f"--process_credit per_step: works on math tasks, {task} is code; use rolled_up")


def step_rewards(tokenizer: Tokenizer, tokens_MT, len_M, texts: list[str], quads: list[Quadruple]):
    """(reward, end) [B, G, T]: end is 1 on each step's last token, reward 1 there while all steps so far hold. Math."""
    if any(q.meta["domain"] != "math" for q in quads):
        raise InputError("rewards of single steps: math only; use --process_credit rolled_up")
    (M, T), B = np.asarray(tokens_MT).shape, len(quads)
    reward_MT, end_MT = np.zeros((M, T), np.float32), np.zeros((M, T), np.float32)
    for m, text in enumerate(texts):
        steps, wrong = split_steps(text), first_wrong_step(text, quads[m // (M // B)].y1)
        of_step = tokenizer.overlap(list(tokens_MT[m][: len_M[m]]), text, [(s.start, s.end) for s in steps])
        for j, on_T in enumerate(of_step):
            last = int(np.flatnonzero(on_T)[-1]) if on_T.any() else None
            if last is not None:
                end_MT[m, last] = 1.0
                reward_MT[m, last] = float(wrong is None or j < wrong)
    return reward_MT.reshape(B, -1, T), end_MT.reshape(B, -1, T)


PRECHECK_N, PRECHECK_GROUPS = 200, 96


def precheck(evaluator: Evaluator, params, sample, prompts: int, replay_train: list[Quadruple]) -> dict[str, float]:
    """Can a critique help this base model at all? Measured on fixed training problems before any training.

    Accuracy of y0, of the greedy revision with f and with f left out, the leak rate of f, and the share of groups whose
    sampled completions all score the same (they give no gradient); `sample(batch)` draws groups for `prompts` prompts.
    """
    index = np.random.default_rng((BASE_SEED, STREAM_EVAL)).permutation(len(replay_train))[:PRECHECK_N]
    quads = [replay_train[i] for i in index]
    width = evaluator.shapes["P_revise"]
    score = lambda done: mean(score_outcomes([c["text"] for c in done], quads))
    std_n = []
    for i in range(0, PRECHECK_GROUPS, prompts):
        some = [quads[j % len(quads)] for j in range(i, i + prompts)]
        batch = pack_prompts(evaluator.tokenizer, [revise_prompt(q.x, q.y0, q.f) for q in some], width)
        out = fetch(sample(put(batch, evaluator.data)))
        scores_BG = outcome_scores(decode_rows(evaluator.tokenizer, out["tokens_MT"], out["len_M"]), some)
        std_n += [float(np.std(row[~np.isnan(row)])) if not np.isnan(row).all() else 0.0 for row in scores_BG]
    quads.sort(key=lambda q: len(q.y1))  # those that end together share a batch
    with_f = evaluator.complete(params, [revise_prompt(q.x, q.y0, q.f) for q in quads], width, "with f")
    without = evaluator.complete(params, [revise_prompt(q.x, q.y0, "") for q in quads], width, "without f")
    return {
        "n": len(quads),
        "accuracy_y0": score([{"text": q.y0} for q in quads]),
        "accuracy_with_f": score(with_f),
        "accuracy_without_f": score(without),
        "leak_rate": replay_report(quads)["leak_rate"],
        "groups": len(std_n),
        "zero_std_frac": mean(float(std == 0) for std in std_n),
    }


def base_report(
    directory: pathlib.Path, evaluator: Evaluator, params, sample, train, settings: tuple
) -> dict[str, Any]:
    """{"summary", "precheck"} of the base, cached beside it under a key of everything the numbers depend on."""
    key = [replay_sha256(evaluator.quads), verifier_sha256(), sorted(evaluator.shapes.items()), *map(str, settings)]
    parts = (Evaluator, generate, first_argmax, score_records, summarize, precheck)
    path = directory / f"report_{sha256(json.dumps(key) + ''.join(inspect.getsource(p) for p in parts))[:16]}.json"
    known = broadcast(path.read_text() if leads() and path.is_file() else "")
    if known:
        return json.loads(known)
    report = {
        "summary": summarize(evaluator(params)),
        "precheck": precheck(evaluator, params, sample, settings[0], train),
    }
    text = json.dumps(report, indent=1)
    if leads():
        write_atomic(path, text)
    return json.loads(text)  # as a later run will read it


# ---- 11 fairness fingerprint ---------------------------------------------------------------------------------------
# What: proof that two runs may stand in one table; every field is computed from what was loaded or counted.
# Used by: all trainers. Tested in: tests/test_eval.py.
def sha256(text: str | bytes) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def weights_sha256(params) -> str:
    """Digest of names, shapes, dtypes and bytes of a parameter tree."""
    digest = hashlib.sha256()
    for name, leaf in leaf_names(params).items():
        array = fetch(leaf)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode() + array.tobytes())
    return digest.hexdigest()


def replay_sha256(quads: list[Quadruple]) -> str:
    """Digest of loaded quadruples, in order."""
    return sha256("\n".join(json.dumps(dataclasses.asdict(q), sort_keys=True) for q in quads))


def templates_sha256() -> str:
    """Digest of all prompt templates."""
    code = [CODE_ATTEMPT_TEMPLATE, CODE_REVISE_TEMPLATE, CODE_CRITIQUE_TEMPLATE, CODE_LINE]
    return sha256("\0".join([ATTEMPT_TEMPLATE, REVISE_TEMPLATE, CRITIQUE_TEMPLATE, *code]))


def verifier_sha256() -> str:
    """Digest of the verifier's own source text: changing a rule changes every fingerprint."""
    parts = (
        to_fraction,
        show,
        numbers_in,
        final_answers,
        score_math,
        evaluate_arithmetic,
        Step,
        split_steps,
        equation_holds,
        first_wrong_step,
        process_score,
        uptake,
        run_program,
        run_programs,
        extract_program,
        program_of,
        grade,
        code_lines,
        line_changes,
        code_uptake,
        score_outcomes,
        process_scores,
        uptake_scores,
        parse_program,
    )
    patterns = (NUMBER, ANNOTATION, _PLAIN_EQUATION, _TOKENS, *(p for p, _ in _LATEX))
    plain = [p if isinstance(p, str) else inspect.getsource(p) for _, p in _LATEX]
    module = inspect.getsource(sys.modules[__name__])
    programs = module[module.index("\n# ---- programs ---") : module.index("\n# ---- 4 decoder ---")]
    plain += [json.dumps(CODE_LIMITS), programs, inspect.getsource(sandbox)]
    return sha256("".join(inspect.getsource(f) for f in parts) + "".join([p.pattern for p in patterns] + plain))


def fingerprint(**fields: Any) -> dict[str, Any]:
    """The fields and their digest; raises ValueError on a field that is None, for a null field proves nothing."""
    empty = [name for name, value in fields.items() if value is None]
    if empty:
        raise ValueError(f"fingerprint fields without a value: {', '.join(empty)}")
    return {**fields, "digest": sha256(json.dumps(fields, sort_keys=True))}


def run_identity(base_params, tokenizer, replay, shapes, steps: int, temperature: float, dtype) -> dict[str, Any]:
    """The part of the fingerprint that is known before the first step; a checkpoint is resumed only under the same."""
    return fingerprint(
        base_weights=weights_sha256(base_params),
        tokenizer=tokenizer.sha256(),
        templates=templates_sha256(),
        train_replay=replay_sha256(replay["train"]),
        test_replay=replay_sha256(replay["test"]),
        verifier=verifier_sha256(),
        decode={"temperature": temperature, "dtype": jnp.dtype(dtype).name, "evaluation": "greedy", **shapes},
        revision_budget=1,
        planned_steps=steps,
    )


# ---- 12 run plumbing ----------------------------------------------------------------------------------------------
# What: command line, run directory, W&B, metrics.jsonl, Orbax checkpoints, SIGTERM, summary and plot. Used by: all
# trainers. Tested in: tests/test_scripts.py.
NOT_IN_RUN_NAME = (
    "task",
    "seed",
    "out_dir",
    "resume",
    "wandb",
    "mesh",
    "save_every",
    "save_hf",
    "hosts",
    "unsafe_sandbox",
)  # they do not change the result


def cli(main, args_type):
    """Parse the command line, join the hosts of `--hosts`, run `main`; bad input prints one line and exits with 2."""
    args = tyro.cli(args_type)
    try:
        if hasattr(args, "hosts"):
            start_hosts(args.hosts)
        return main(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def open_out_dir(out_dir: str, save_hf_dir: str | None = None) -> None:
    """Make sure `out_dir` can be written and that nothing is at `save_hf_dir` yet. Compiled programs are kept in
    `out_dir`, so that the next run starts at once."""
    directory = pathlib.Path(out_dir).absolute()

    def check():
        if save_hf_dir:
            check_save_hf(pathlib.Path(save_hf_dir))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise InputError(f"--out_dir {out_dir}: cannot write there ({e.strerror}); choose another") from None

    on_leader(check)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "xla_cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_args(args, above_zero: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
    """InputError unless the named flags are above 0 (counts: at least 1) or not below it."""
    for flag in (*above_zero, *not_negative):
        value = getattr(args, flag)
        if value < 0 or (flag in above_zero and value == 0) or not math.isfinite(value):
            least = "at least 0" if flag in not_negative else "at least 1" if isinstance(value, int) else "above 0"
            raise InputError(f"--{flag} {value}: must be {least}")


_TRACES: Counter[str] = Counter()


def count_trace(name: str) -> None:
    """Called inside a jitted function: counts how often it is traced, which should be once per shape."""
    _TRACES[name] += 1


def reset_traces() -> None:
    """Start counting anew."""
    _TRACES.clear()


def traces() -> dict[str, int]:
    """{function name: traces since the last reset}."""
    return dict(_TRACES)


def pick_dtype(name: str):
    """Compute dtype of `--dtype`: auto is bfloat16 on accelerators and float32 on CPU."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(
        name, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    )


def fixed_shapes(
    tokenizer: Tokenizer, replay: dict[str, list[Quadruple]], max_prompt: int, max_new: int
) -> dict[str, int]:
    """The padded lengths of a run: P_attempt and P_revise prompts, T completions, T_replay replay answers (y0, y1)."""
    quads = [q for split in replay.values() for q in split]
    ids = [q.meta["task_id"] for q in quads]
    texts = [t for q in quads for t in (q.y0, q.y1)]
    longest = max(len(e.ids) for e in tokenizer.inner.encode_batch(texts, add_special_tokens=False)) + 1
    longest_f = max((q.f for q in quads), key=lambda f: len(tokenizer.encode(f)))  # control arms swap critiques
    return {
        "P_attempt": prompt_shape(tokenizer, [attempt_prompt(q.x) for q in quads], ids, max_prompt),
        "P_revise": prompt_shape(tokenizer, [revise_prompt(q.x, q.y0, longest_f) for q in quads], ids, max_prompt),
        "T": max_new,
        "T_replay": round_up(longest, 8),
    }


def data_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of one step: a fresh permutation of all n every epoch, a function of (seed, step) alone."""
    at = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, STREAM_DATA, int(e))).permutation(n) for e in np.unique(at // n)}
    return np.array([orders[i // n][i % n] for i in at])


def reduce(sums: dict[str, tuple]) -> dict[str, float]:
    """Metrics leave jitted code as (sum, count) and are divided once, here: {"a": (6., 3.)} -> {"a": 2.}."""
    return {name: float(total) / max(float(count), 1e-9) for name, (total, count) in sums.items()}


def wandb_mode(flag: str) -> str:
    """`auto`: WANDB_MODE if it is set, else online where a key is known, else offline. Never asks a question."""
    if flag != "auto":
        return flag
    netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    return os.environ.get("WANDB_MODE") or ("online" if known else "offline")


class Run:
    """One run's directory and all that is written to it: metrics.jsonl, W&B, checkpoints/, result.json, curves.png."""

    def __init__(self, args, method: str):
        import orbax.checkpoint as ocp

        settings = {k: v for k, v in sorted(dataclasses.asdict(args).items()) if k not in NOT_IN_RUN_NAME}
        self.name = f"{method}__{args.task}__s{args.seed}__{sha256(json.dumps(settings))[:8]}"
        self.dir = pathlib.Path(args.out_dir).absolute() / self.name
        self.args, self.method, self.stopped_by = args, method, None
        on_leader(self._open, settings)
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.checkpoints = ocp.CheckpointManager(self.dir / "checkpoints", options=options)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self.wandb = None

    def _open(self, settings: dict[str, Any]) -> None:
        """Make the directory; InputError if it holds another run, or none where --resume asks for one."""
        if self.dir.exists() and not self.args.resume:
            what = "has finished" if (self.dir / "result.json").is_file() else "has not finished"
            raise InputError(f"{self.dir} is there already and {what}: add --resume, or choose another --out_dir")
        if self.args.resume and not self.dir.exists():
            self._refuse_other_flags(settings)
        (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomic(self.dir / "args.json", json.dumps(settings, indent=1))

    def _refuse_other_flags(self, settings: dict[str, Any]) -> None:
        """InputError if there is an unfinished run of the same method, task and seed with other flags: it is what
        --resume was meant for, and this run would not continue it."""
        for other in sorted(self.dir.parent.glob(f"{self.name.rpartition('__')[0]}__*")):
            if (other / "args.json").is_file() and not (other / "result.json").is_file():
                then = json.loads((other / "args.json").read_text())
                changed = [f"--{k} {then.get(k)} (now {v})" for k, v in settings.items() if then.get(k) != v]
                raise InputError(
                    f"--resume: {other} was started with {', '.join(changed)}; give the same flags, or drop --resume to"
                    " start another run"
                )

    def _on_signal(self, number, _frame) -> None:
        self.stopped_by = number  # a flag only: the loop saves at the end of its step

    @property
    def finished(self) -> bool:
        return (self.dir / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """What a finished run wrote."""
        return json.loads((self.dir / "result.json").read_text())

    def seconds(self) -> float:
        """Wall time since the process started, imports included."""
        return time.time() - PROCESS_START

    def start(self, config: dict[str, Any]) -> None:
        """Open W&B (offline where nobody is logged in); its run id lives in the directory, so a resumed run goes on."""
        import wandb

        mode, id_file = wandb_mode(self.args.wandb) if leads() else "disabled", self.dir / "wandb_id"
        if leads() and not id_file.is_file():
            write_atomic(id_file, f"{self.name[:100]}__{os.urandom(3).hex()}".replace("/", "-"))
        wandb_settings = wandb.Settings(silent=True, console="off", init_timeout=60)
        common = dict(
            project="cts",
            name=self.name,
            id=id_file.read_text() if leads() else None,
            resume="allow",
            dir=str(self.dir),
            config=config,
            job_type=self.method,
            group=os.environ.get("WANDB_RUN_GROUP"),
            settings=wandb_settings,
        )
        try:
            self.wandb = wandb.init(mode=mode, **common)
        except wandb.errors.Error as e:
            print(f"W&B {mode} failed ({type(e).__name__}); logging offline into {self.dir}")
            self.wandb = wandb.init(mode="offline", **common)
        self.wandb.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One line of metrics.jsonl and one W&B call for one step."""
        if not leads():
            return
        row = {"step": step, **metrics}
        with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.wandb.log(row)

    def log_samples(self, quads: list[Quadruple], texts: list[str], rewards, step: int) -> None:
        """A small W&B table: the first completion of every prompt and its reward."""
        import wandb

        if not leads():
            return
        table = wandb.Table(columns=["step", "prompt", "completion", "reward"])
        for q, text, reward in zip(quads, texts, rewards):
            table.add_data(step, revise_prompt(q.x, q.y0, q.f)[:2000], text[:2000], float(reward))
        self.wandb.log({"samples": table, "step": step})

    def save(self, step: int, state, identity: dict[str, Any]) -> None:
        """Checkpoint after `step` finished steps: parameters, optimizer and the run's identity. Data order and PRNG are
        functions of (seed, step)."""
        if step not in self.checkpoints.all_steps():
            as_args = self._ocp.args
            self.checkpoints.save(
                step, args=as_args.Composite(state=as_args.StandardSave(state), identity=as_args.JsonSave(identity))
            )

    def restore(self, state, identity: dict[str, Any]):
        """(state, finished steps) of the newest readable checkpoint, or (state, 0); later metrics lines are dropped.

        A damaged checkpoint (cut off, half deleted) is named, the one before it used, and only then the damaged one
        removed. InputError if none can be read, or if the checkpoint was made under another identity: it names the
        fields that changed.
        """
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        as_args, done, damaged = self._ocp.args, 0, []
        for step in sorted(self.checkpoints.all_steps(), reverse=True):
            try:
                saved = self.checkpoints.restore(
                    step,
                    args=as_args.Composite(state=as_args.StandardRestore(abstract), identity=as_args.JsonRestore()),
                )
            except Exception as e:  # a cut-off data file makes Orbax raise plain Exception
                reason = " ".join(str(e).split())[:80]
                say(f"checkpoint {step} in {self.dir} is damaged ({type(e).__name__}: {reason}); trying the one before")
                damaged.append(step)
                continue
            changed = [k for k in identity if k != "digest" and saved["identity"].get(k) != identity[k]]
            if changed:
                raise InputError(
                    f"--resume: {self.dir} was started with another {', '.join(changed)}; choose another --out_dir"
                )
            state, done = saved["state"], step
            break
        if damaged and not done:
            raise InputError(
                f"--resume: no checkpoint in {self.dir / 'checkpoints'} can be read; remove that folder to start over"
            )
        for step in damaged:  # out of the way of the one that will be saved there again
            self.checkpoints.delete(step)
        if damaged:
            gc.collect()  # ends the coroutines that Orbax leaves behind now, not inside ast.parse (a CPython 3.11 bug)
        on_leader(self._truncate_metrics, done)
        return state, done

    def _truncate_metrics(self, step: int) -> None:
        path = self.dir / "metrics.jsonl"
        if path.is_file():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            write_atomic(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] < step))

    def stop_if_asked(self, step: int, state, identity: dict[str, Any]) -> None:
        """After SIGTERM or SIGUSR1: save, mark the W&B run preempting, exit with 128 + signal (schedulers requeue). The
        signal may have reached one host only."""
        number = self.stopped_by or 0
        if jax.process_count() > 1:
            number = int(multihost_utils.process_allgather(np.int32(number)).max())
        if number:
            self.save(step, state, identity)
            self.wandb.mark_preempting()
            self.wandb.finish(exit_code=128 + number)
            say(f"stopped by signal {number} after step {step}; continue with --resume")
            sys.exit(128 + number)

    def check_finite(self, metrics: dict[str, float], step: int, ids: list[str]) -> None:
        """Stop on a NaN or infinite loss or gradient, naming the step, the batch and the last good checkpoint."""
        if not (math.isfinite(metrics["losses/loss"]) and math.isfinite(metrics["losses/grad_norm"])):
            self.wandb.finish(exit_code=1)
            good = max(self.checkpoints.all_steps(), default=None)
            raise FloatingPointError(
                f"loss or gradient is not finite at step {step} (batch {', '.join(ids)});"
                f" last good checkpoint: {good} in {self.dir}"
            )

    def finish(self, result: dict[str, Any], base: dict[str, Any], final: dict[str, Any]) -> None:
        """Write result.json (last, atomically) and curves.png, log both to W&B, print the summary."""
        import wandb

        if not leads():
            self.wandb.finish()
            return
        plot_curves(self.dir, base, final)
        write_atomic(self.dir / "result.json", json.dumps(result, indent=1))
        self.wandb.summary.update({f"eval/{k}": v for k, v in final.items() if isinstance(v, float)})
        self.wandb.summary["fingerprint"] = result["fingerprint"]["digest"]
        self.wandb.log({"curves": wandb.Image(str(self.dir / "curves.png"))})
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", self.name)[:120], type="result")
        artifact.add_file(str(self.dir / "result.json"))
        self.wandb.log_artifact(artifact)
        self.wandb.finish()
        print_summary(self.name, self.dir, result, base, final)


class StepClock:
    """Wall time of the parts of a step; the first step holds the compilation and stays out of rates and medians."""

    def __init__(self):
        self.times: dict[str, list[float]] = {"step": []}

    @property
    def steps(self) -> int:
        return len(self.times["step"])

    def start(self) -> None:
        self.began = self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End of the part `name`; `update` ends the step."""
        now = time.perf_counter()
        self.times.setdefault(name, []).append(now - self.last)
        self.last = now
        if name == "update":
            self.times["step"].append(now - self.began)

    def metrics(self, completions: int) -> dict[str, float]:
        """time/* and charts/SPS (completions a second) of the last step; the first gives time/compile, not a rate."""
        parts = {f"time/{name}": t[-1] for name, t in self.times.items()}
        first = {"time/compile": self.times["step"][0]} if self.steps == 1 else {}
        rate = {"charts/SPS": completions / self.times["step"][-1]} if self.steps > 1 else {}
        return {**parts, **first, **rate}

    def summary(self, run: Run) -> dict[str, float]:
        """Medians over the steps after the first, the first, and the whole run, in seconds."""
        steady = {name: float(np.median(t[1:] or t or [0.0])) for name, t in self.times.items()}
        return {**steady, "first_step": (self.times["step"] or [0.0])[0], "total": run.seconds()}


def rollout_metrics(
    out: dict[str, np.ndarray], texts: list[str], reward_BG: np.ndarray, quads: list[Quadruple]
) -> dict[str, float]:
    """rollout/*: completion length, share cut off, share of groups without variance, share well-formed, completions
    that the harness failed to score (their reward is NaN)."""
    G, unscored_BG = reward_BG.shape[1], np.isnan(reward_BG)
    well_formed = [format_valid(text, quads[m // G].meta["domain"]) for m, text in enumerate(texts)]
    spread_B = np.where(unscored_BG, -np.inf, reward_BG).max(1) - np.where(unscored_BG, np.inf, reward_BG).min(1)
    return {
        "rollout/len_mean": float(out["len_M"].mean()),
        "rollout/truncated_frac": float(out["truncated_M"].mean()),
        "rollout/zero_std_frac": float((spread_B <= 0).mean()),
        "rollout/format_frac": float(np.mean(well_formed)),
        "rollout/harness_errors": float(unscored_BG.sum()),
    }


def read_metrics(directory: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def plot_curves(directory: pathlib.Path, base: dict[str, Any], final: dict[str, Any]) -> None:
    """curves.png: accuracy of the samples (where nothing is sampled, the loss) over steps, and revised accuracy by
    horizon before and after training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(directory)
    sampled = "charts/accuracy" in rows[0]
    key = "charts/accuracy" if sampled else "losses/loss"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r], lw=1)
    left.set(xlabel="step", ylabel="accuracy of sampled revisions" if sampled else "loss", title="training")
    left.set_ylim(0, 1 if sampled else None)
    horizons = list(final["by_horizon"])
    for summary, label in ((base, "base"), (final, "trained")):
        right.plot(horizons, [summary["by_horizon"][h]["accuracy_revised"] for h in horizons], marker="o", label=label)
    right.set(
        xlabel="horizon (steps of the reference)", ylabel="revised accuracy", ylim=(0, 1), title="test split, greedy"
    )
    right.legend()
    figure.tight_layout()
    figure.savefig(directory / "curves.png", dpi=110)
    plt.close(figure)


def print_precheck(check: dict[str, float]) -> None:
    """The base model's pre-check, and in plain words whether the critique helps it."""
    gain = check["accuracy_with_f"] - check["accuracy_without_f"]
    say(
        f"Pre-check of the base on {check['n']} training problems: y0 right {check['accuracy_y0']:.1%}; revised with f"
        f" {check['accuracy_with_f']:.1%}, without f {check['accuracy_without_f']:.1%}; answer leaked by f"
        f" {check['leak_rate']:.1%}; groups without variance {check['zero_std_frac']:.1%} of {check['groups']}."
    )
    if gain >= 0.03:
        say(f"The critique carries signal: {100 * gain:+.1f} points for this base.")
    else:
        say(
            f"WARNING: the critique carries no usable signal for this base ({100 * gain:+.1f} points; 3 are wanted):"
            " there is little to transport, whatever the method."
        )


def print_summary(
    name: str, directory: pathlib.Path, result: dict, base: dict[str, Any], final: dict[str, Any]
) -> None:
    """The table a run ends with."""
    percent = lambda v: "     -" if v is None else f"{100 * v:5.1f}%"
    print(f"\n{name}: {final['n']} test problems, greedy, last checkpoint")
    print(f"  {'':28}{'base':>8}{'trained':>10}{'change':>9}")
    rows = (
        ("revised accuracy", "accuracy_revised"),
        ("first-attempt accuracy", "accuracy"),
        ("delta_critique", "delta_critique"),
        ("wrong -> right", "wrong_to_right"),
        ("right -> wrong", "right_to_wrong"),
        ("well-formed answers", "format_frac"),
    )
    for label, key in rows:
        change = "" if base[key] is None or final[key] is None else f"{100 * (final[key] - base[key]):+.1f}"
        print(f"  {label:28}{percent(base[key]):>8}{percent(final[key]):>10}{change:>9}")
    for h in final["by_horizon"]:
        before, after = base["by_horizon"][h]["accuracy_revised"], final["by_horizon"][h]["accuracy_revised"]
        change = "" if None in (before, after) else f"{100 * (after - before):+.1f}"
        print(f"    horizon {h!s:18}{percent(before):>10}{percent(after):>10}{change:>9}")
    if final["harness_errors"]:
        print(f"  {final['harness_errors']} of {final['n']} could not be scored (harness errors) and are left out")
    if final["credit_auc"] is not None:
        print(
            f"  credit localization: AUC {final['credit_auc']:.3f} (0.5 = chance), gap {final['credit_gap']:+.3f} nats"
        )
    t = result["timings"]
    parts = ", ".join(f"{k} {v:.2f}" for k, v in t.items() if k not in ("step", "first_step", "total"))
    print(f"  time: {t['total']:.0f} s in all; a step {t['step']:.2f} s ({parts})")
    print(
        f"  fingerprint {result['fingerprint']['digest'][:16]}; result.json, metrics.jsonl, curves.png in {directory}"
    )


def count_budgets(steps: int, B: int, G: int, shapes: dict[str, int], n_test: int) -> dict[str, Any]:
    """The budgets that `steps` finished steps and one evaluation have spent; tokens are those of the fixed shapes.

    A step learns from B * G completions of T tokens, sampled or taken from the replay: training_tokens are the
    positions that its loss covers, rollout_budget the shape they come in.
    """
    T = shapes["T"]
    return {
        "optimizer_steps": steps,
        "training_tokens": steps * B * G * T,
        "rollout_budget": [steps, B, G, T],
        "test_compute_budget": n_test * 2 * T,
    }


def make_result(args, method: str, identity, counted, replay, base, records, final, timings) -> dict[str, Any]:
    """The content of result.json; `counted` are the budgets as they were spent, which complete the fingerprint."""
    fields = {k: v for k, v in identity.items() if k not in ("digest", "planned_steps")}
    return {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "args": dataclasses.asdict(args),
        "fingerprint": fingerprint(**fields, **counted),
        "replay": {split: replay_report(quads) for split, quads in replay.items()},
        "precheck": base["precheck"],
        "base": base["summary"],
        "summary": final,
        "records": records,
        "traces": traces(),
        "timings": timings,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what the result depends on, and the commit if this is a git checkout."""
    import platform
    import subprocess
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ott-jax", "tokenizers", "numpy")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "commit": git.stdout.strip() or "none",
        **{n: version(n) for n in names},
    }
