"""Everything the method scripts share, and nothing of any method.

Sections: 0 constants - 1 data - 2 tokenizer and packing - 3 verifier - 4 decoder - 5 mesh - 6 log-probs and sampling -
7 the nano base - 8 evaluation - 9 fairness fingerprint - 10 run plumbing (W&B, metrics, checkpoints, summary).

Axis letters, used as suffixes wherever axes matter: B prompts, G completions per prompt, M = B*G rows, P prompt length,
T completion time, S key time, V vocabulary, D model, N heads, K key/value heads, H head dim, F feed-forward, L layers,
J reasoning steps of a trajectory, R latent dim. Masks are 0/1 float32 and come from lengths, never from a sentinel token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
from collections import Counter
from fractions import Fraction
from typing import Any

# ---- 0 constants --------------------------------------------------------------------------------------------------
# What: names that stand in more than one place. Used by: all sections and scripts.
SCHEMA_VERSION = 1
STREAM_INIT, STREAM_DATA, STREAM_ROLLOUT, STREAM_EVAL, STREAM_BASE = range(5)  # PRNG streams: fold_in(root, STREAM)
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
    """One source problem: question x, reference solution, final answer, and the split its source gives it (or None)."""

    task_id: str
    x: str
    reference: str
    answer: str
    split: str | None


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

    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON ({e.msg} at column {e.colno}); fix or remove the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with x, y0, f, y1, meta, got {type(row).__name__}")
    for field in ("x", "y0", "f", "y1"):
        need(isinstance(row.get(field), str), field, "must be a string")
    need(bool(row["x"].strip()), "x", "is empty")
    meta = row.get("meta")
    need(isinstance(meta, dict), "meta", "must be an object")
    for key, kind in META_TYPES.items():
        bool_as_int = kind is int and isinstance(meta.get(key), bool)
        need(key in meta and isinstance(meta[key], kind) and not bool_as_int, f"meta.{key}", f"is missing or not {kind}")
    need(meta["domain"] in ("math", "code"), "meta.domain", "must be math or code")
    need(meta["split"] in SPLITS, "meta.split", f"must be one of {', '.join(SPLITS)}")
    need(set(meta["error_tags"]) <= set(ERROR_TAGS), "meta.error_tags", f"must be among {', '.join(ERROR_TAGS)}")
    span = meta["error_span"]
    in_y0 = span is None or (len(span) == 2 and all(type(i) is int for i in span) and 0 <= span[0] < span[1] <= len(row["y0"]))
    need(in_y0, "meta.error_span", "must be null or [start, end] inside y0")
    if meta["domain"] == "math":
        need(isinstance(meta.get("answer"), str), "meta.answer", "must be a string (math)")
    else:
        need(isinstance(meta.get("tests"), dict), "meta.tests", "must be an object (code)")
    return Quadruple(row["x"], row["y0"], row["f"], row["y1"], meta)


def read_replay(path: str | os.PathLike) -> list[Quadruple]:
    """All quadruples of one JSONL file. No line is ever skipped: a bad one raises InputError with file, line and field."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read replay file {path}: {e}; make it with: python teacher.py") from None
    quads = [parse_quadruple(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]
    if not quads:
        raise InputError(f"{path}: no quadruples; make them with: python teacher.py")
    return quads


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write to a temporary name beside `path`, then rename: a reader sees the old file or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
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
    """train/val/test: 70/10/20 by salted hash; a source that has train and test keeps its test, val leaves its train."""
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


NAMES = (("Tom", "He"), ("Amy", "She"), ("Ben", "He"), ("Sue", "She"), ("Max", "He"), ("Eva", "She"), ("Sam", "He"), ("Ann", "She"))
GOODS = ("pens", "books", "coins", "cards", "nuts", "toys")


def fixtures_math(seed: int = 0, size: int = 6000) -> list[Problem]:
    """Generated word problems in GSM8K's own format (`<<6+5=11>>11`, `#### 11`), horizons 2 to 8, numbers below 100.

    Two templates: one person whose stock changes event by event, and a row of people each compared with the one before,
    whose last step adds two of them up. `size` problems, no text twice; deterministic in `seed`.
    """
    import numpy as np

    rng = np.random.default_rng((seed, 71))
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.integers(2, 9))
        try:
            x, lines, value = (_events if rng.random() < 0.5 else _comparisons)(rng, horizon)
        except StopIteration:
            continue
        if normalize_x(x) not in problems:
            reference = "\n".join([*lines, f"#### {value}"])
            problems[normalize_x(x)] = Problem(f"fixtures_math/{len(problems):05d}", x, reference, str(value), None)
    return list(problems.values())


def _change(rng, value: int, taken: set[int]) -> tuple[str, int, int]:
    """One operation on `value` that keeps it in 2..60: (operator, operand, new value). No operand or value comes twice,
    so that a number in a solution says where it comes from; raises StopIteration where none is left."""
    for _ in range(200):
        op = str(rng.choice(["+", "+", "-", "-", "*", "/"]))
        n = int(rng.integers(2, 4)) if op in "*/" else int(rng.integers(2, 13))
        if op == "/" and value % n:
            continue
        new = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        if 2 <= new <= 60 and new != n and not {new, n} & taken:
            return op, n, new
    raise StopIteration


def _events(rng, horizon: int) -> tuple[str, list[str], int]:
    (name, he), goods = NAMES[rng.integers(len(NAMES))], GOODS[rng.integers(len(GOODS))]
    value = int(rng.integers(4, 20))
    sentences, lines, taken = [f"{name} has {value} {goods}."], [], {value}
    for _ in range(horizon):
        op, n, new = _change(rng, value, taken)
        verb = {"+": ("buys {}.", "finds {}."), "-": ("loses {}.", "sells {}."), "*": ("then has {} times as many.",) * 2,
                "/": ("then keeps one of {} equal parts.",) * 2}[op][rng.integers(2)]  # fmt: skip
        sentences.append(f"{he} {verb.format(n)}")
        lines.append(f"{name} has <<{value}{op}{n}={new}>>{new} {goods}.")
        taken |= {new, n}
        value = new
    return " ".join([*sentences, f"How many {goods} does {name} have now?"]), lines, value


def _comparisons(rng, horizon: int) -> tuple[str, list[str], int]:
    people = [NAMES[i][0] for i in rng.permutation(len(NAMES))[:horizon]]
    goods, value = GOODS[rng.integers(len(GOODS))], int(rng.integers(4, 20))
    sentences, lines, taken, stock = [f"{people[0]} has {value} {goods}."], [], {value}, [value]
    for before, name in zip(people, people[1:], strict=False):
        op, n, new = _change(rng, value, taken)
        how = {"+": "{} more than", "-": "{} fewer than", "*": "{} times as many as", "/": "one part in {} of"}[op]
        sentences.append(f"{name} has {how.format(n)} {before}.")
        lines.append(f"{name} has <<{value}{op}{n}={new}>>{new} {goods}.")
        taken |= {new, n}
        stock.append(new)
        value = new
    i = int(rng.integers(horizon - 1))
    total = stock[i] + value
    lines.append(f"They have <<{stock[i]}+{value}={total}>>{total} {goods}.")
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
                    f"gsm8k could not be loaded from the hub ({type(e).__name__}); pass --data_dir with train.jsonl and test.jsonl"
                ) from None
        for i, row in enumerate(rows):
            answer = final_answers(row["answer"])
            if len(answer) != 1:
                raise InputError(f"gsm8k {split} row {i + 1}: field 'answer' has no single number after ####")
            problems.append(Problem(f"gsm8k/{split}/{i:05d}", row["question"].strip(), row["answer"].strip(), show(answer[0]), split))
    return problems


def read_jsonl(path: pathlib.Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a JSONL source file, each checked to hold `fields` as strings."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; check --data_dir") from None
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{path}:{i}: not JSON ({e.msg})") from None
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(f"{path}:{i}: field {field!r} must be a string")
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is loaded and how large the nano-LM's part of it is (tokens, vocabulary, base-training tokens)."""

    domain: str
    load: Any  # data_dir | None -> list[Problem]
    max_new_tokens: int
    nano_vocab: int
    nano_base_steps: int


TASKS = {
    "fixtures_math": Task("math", lambda data_dir: fixtures_math(), 112, 512, 700),
    "gsm8k": Task("math", gsm8k, 320, 2048, 300),
}


def get_task(name: str) -> Task:
    """The task called `name`; InputError lists the known ones."""
    if name not in TASKS:
        raise InputError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_replay(task: str, replay_dir: str | None, data_dir: str | None) -> dict[str, list[Quadruple]]:
    """{"train", "val", "test"} quadruples of a task; where none exist yet they are made with the keyless teacher."""
    get_task(task)
    directory = pathlib.Path(replay_dir or f"data/replay/{task}")
    missing = [s for s in ("train", "val", "test") if not (directory / f"{s}.jsonl").is_file()]
    if missing and replay_dir:
        raise InputError(f"--replay {replay_dir}: {missing[0]}.jsonl is missing; make it with: python teacher.py --task {task} --out {replay_dir}")
    if missing:
        import teacher

        print(f"No replay for {task} yet: making it with the keyless perturb teacher (other teachers: python teacher.py --help).")
        teacher.main(teacher.Args(task=task, data_dir=data_dir, out=str(directory)))
    replay = {split: read_replay(directory / f"{split}.jsonl") for split in ("train", "val", "test")}
    check_leakage(replay)
    return replay


def replay_report(quads: list[Quadruple]) -> dict[str, Any]:
    """Counts by tag and horizon, and the leak rate: the share of critiques in which the final answer stands."""
    leaks = [Fraction(q.meta["answer"]) in numbers_in(q.f) for q in quads if "answer" in q.meta]
    return {
        "quadruples": len(quads),
        "leak_rate": sum(leaks) / max(1, len(leaks)),
        "tags": dict(sorted(Counter(tag for q in quads for tag in q.meta["error_tags"]).items())),
        "horizons": dict(sorted(Counter(q.meta["horizon"] for q in quads).items())),
    }


# ---- 3 verifier ---------------------------------------------------------------------------------------------------
# What: scores of final answers and of single steps, by rules, without eval and without signals (safe in any thread).
# Used by: teacher, trainers, evaluation. Tested in: tests/test_verifier.py.
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30}"
NUMBER = re.compile(rf"(?<![A-Za-z0-9_])([-\u2212]?)\s?\$?\s?({_NUMBER})(?:\s?/\s?({_NUMBER}))?(?!\d|[eE]\d|\^)")
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
    """Every number in `text`, in order: `1,234`, `$18.00`, `18.`, `-3`, `1/2`. Digits glued to letters (CO2) do not count.

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

    The final answer is the number after `####`, in `\\boxed{}` or in `<answer>`; units, `$`, commas, bold and a trailing
    point do not matter. Two different final answers score 0 (hedging). With `lenient`, a completion without any such
    marker is judged by its last number.
    """
    gold = numbers_in(answer)
    if len(gold) != 1:
        raise InputError(f"the reference answer {answer!r} is not a single number")
    found = final_answers(completion)
    if not found and lenient:
        found = numbers_in(completion)[-1:]
    return float(found == gold)


def format_valid(completion: str) -> bool:
    """Does the completion commit to exactly one final answer?"""
    return len(final_answers(completion)) == 1


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
        tokens.append(value / 100 if percent else value if number else {"x": "*", "\u00d7": "*", "\u00f7": "/"}.get(op, op))
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
    rf"(?<![\w.:)+*/=-])(\$?(?:{_NUMBER})(?:\s?[-+*/x\u00d7\u00f7]\s?\$?(?:{_NUMBER})){{1,12}})"
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

    >>> [(s.start, s.end, s.is_final, [(e, str(v)) for e, v in s.equations]) for s in split_steps("So <<2+3=5>>5.\\n#### 5")]
    [(0, 14, False, [('2+3', '5')]), (15, 21, True, [('', '5')])]
    """
    steps = []
    for m in re.finditer(r"[^\n]+", y):
        line = m.group()
        finals = final_answers(line)
        if finals:
            equations = (("", finals[-1]),)
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
    decimals = len(show(value).partition(".")[2]) if "/" not in show(value) else 0
    return exact == value or (decimals > 0 and abs(exact - value) <= Fraction(1, 10**decimals))


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
    finals = [step.equations[0][1] for step in steps if step.is_final]
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
    held = len(steps) if wrong is None else wrong
    return held / max(len(steps), len(split_steps(reference)), 1)


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def write_critique(step: int, flaw: str, answer: str) -> str:
    """The critique sentence of the rule-based teachers: names the step and the flaw, never the final answer.

    >>> write_critique(1, "the result of 4+3 is wrong", "9")
    'The second step is wrong: the result of 4+3 is wrong.'
    """
    if Fraction(answer) in numbers_in(flaw):
        flaw = re.split(r"[:;]| of ", flaw)[0] if Fraction(answer) not in numbers_in(re.split(r"[:;]| of ", flaw)[0]) else "check it again"
    ordinal = ORDINALS[step] if step < len(ORDINALS) else f"{step + 1}th"
    return f"The {ordinal} step is wrong: {flaw}."
