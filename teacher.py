"""Makes replay quadruples (x, y0, f, y1) from problems with reference solutions.

Teacher `perturb` needs no key and no model: y1 is the reference, y0 the reference with one corrupted step from which
every later step is recomputed, so that the attempt is consistent after its one error:

    y1  Tom has 48/2 = <<48/2=24>>24 red pens.        y0  Tom has 48/2 = <<48/2=26>>26 red pens.
        He has 48+24 = <<48+24=72>>72 pens.               He has 48+26 = <<48+26=74>>74 pens.
        #### 72                                           #### 74
    f   The first step is wrong: 48/2 is not 26.

For programs y0 is a mutant of the reference that fails a test: one node or statement of its syntax tree is changed, in
the source text. f names line and call: "Line 2 is wrong: it uses the wrong operator. f(3) fails."

    python teacher.py --task gsm8k          (about half a minute; fixtures_math about ten seconds)
    python teacher.py --task mbpp           (two to three minutes on 2 CPU cores: every program is run)
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "fixtures_math"
    """source of the problems: fixtures_math, fixtures_code, gsm8k, mbpp or apps"""
    teacher: Literal["perturb"] = "perturb"
    """who makes y0 and f; perturb = rules, no key and no network"""
    data_dir: str | None = None
    """folder with the source's own files (gsm8k, apps: train.jsonl, test.jsonl; mbpp: mbpp.jsonl); none = the hub"""
    out: str | None = None
    """folder for {train,val,test}.jsonl and report.json; none = data/replay/<task>"""
    seed: int = 0
    """which corruption each problem gets"""
    limit: int = 0
    """problems per split; 0 = all"""
    keep_unverified: Literal["no", "yes"] = "no"
    """yes = also keep quadruples that the verifier does not confirm (meta.verified says which)"""
    unsafe_sandbox: Literal["refuse", "allow"] = "refuse"
    """allow = run the programs of code tasks even where this machine can confine nothing; they are hostile"""


# ---- reading a solution ---------------------------------------------------------------------------------------------
TAG_OF_KIND = {
    "wrong_result": "local_arithmetic",
    "wrong_operator": "wrong_decomposition",
    "dropped_step": "missing_case",
    "stale_value": "state_tracking",
    "wrong_quantity": "invalid_assumption",
}
_N = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
NUMERAL = re.compile(_N)
SHOWN = re.compile(rf">>\s*\$?\s*({_N})")  # the result once more, right behind its annotation
# Marks of the text's own arithmetic; a hyphen or an x inside a word ("T-shirts", "six") is none.
MARK = re.compile(rf"{_N}|(?<![A-Za-z])(?:[-\u2212\u2013]|[xX](?![A-Za-z]))(?![A-Za-z])|[+*/=\u00d7\u00f7]")
SAME = {"x": "*", "X": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-"}
# Possessive (`++`), so that no word is split in two and a long sentence costs no backtracking.
UNIT = r"\s?/?(?![xX]\b)[A-Za-z]++(?:[/-][A-Za-z]++)*+"
_TERM = rf"\$?{_N}%?(?:{UNIT}){{0,4}}+"
# Arithmetic without annotation, units allowed: "310 miles/day - 250 miles/day = 60 miles/day".
PLAIN = re.compile(
    rf"(?<![-\w+*/.=])({_TERM}(?:\s?[-+*/xX\u00d7\u2212\u2013]\s?{_TERM}){{1,6}})\s?=\s?\$?({_N})(?!\s?[-+*/=\d])"
)
NUMBER_WORDS = dict(
    zip(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], range(2, 13))
)
NUMBER_WORDS |= {"dozen": 12, "fifteen": 15, "twenty": 20}
# A step that says its operation in words would contradict itself if only its numbers were corrupted.
OPERATION_WORDS = re.compile(
    r"\b(plus|minus|times|divid\w*|multipl\w*|add\w*|sum|subtract\w*|differen\w*|half|halves|twice|doubl\w*|tripl\w*"
    r"|thrice|third|quarter|more|less|fewer|total|remain\w*|left|percent|dozen|pair|each|per)\b|%",
    re.I,
)
# Numbers that solutions use without deriving them and without x giving them; those of the calendar where time matters.
CONSTANTS = {Fraction(n) for n in (1, 2, 100)}
OF_TIME = {Fraction(n) for n in (7, 12, 24, 30, 52, 60, 365)}
TIME_WORDS = re.compile(r"hour|minute|second|day|week|month|year|dozen|inch|feet|foot")


class UnfitError(Exception):
    """This corruption cannot be written as a consistent and natural text; the caller tries another."""


@functools.lru_cache(100_000)
def value_of(numeral: str) -> Fraction:
    return Fraction(numeral.replace(",", ""))


@functools.lru_cache(20_000)
def numerals(text: str) -> tuple[Fraction, ...]:
    """Unsigned numbers of a text, operators ignored: "48/2-3" is 48, 2, 3 (cts.numbers_in reads a fraction and -3)."""
    return tuple(value_of(m) for m in NUMERAL.findall(text))


@functools.lru_cache(20_000)
def evaluate(expr: str) -> Fraction | None:
    """The value of an expression, units left out: "310 miles/day - 250 miles/day" is 60, "3 / 4 * 100%" is 75."""
    plain = re.sub(UNIT, "", expr).replace("\u2013", "-")
    return cts.evaluate_arithmetic(re.sub(r"([*xX]\s?100)\s?%\s*$", r"\1", plain))


@functools.lru_cache(20_000)
def equations_in(line: str) -> tuple[re.Match, ...]:
    """The equations of a line, as matches of (expression, value): its annotations, else its plain arithmetic.

    >>> [m.groups() for m in equations_in("He has 48/2 = <<48/2=24>>24 pens.")]
    [('48/2', '24')]
    """
    if "####" in line:
        return ()
    found = [m for m in cts.ANNOTATION.finditer(line) if NUMERAL.fullmatch(m.group(2))]
    return tuple(found or PLAIN.finditer(line))


def holds(eq: re.Match) -> bool:
    """Can the equation be read, and is it true as it stands (up to rounding)?"""
    exact = evaluate(eq.group(1))
    return exact is not None and exact >= 0 and cts.equation_holds(cts.show(exact), value_of(eq.group(2)))


def lines_of(solution: str) -> list[str]:
    return [line for line in solution.split("\n") if line.strip()]


def results(lines: list[str]) -> set[Fraction]:
    """Values that the steps in `lines` compute."""
    return {value_of(eq.group(2)) for line in lines for eq in equations_in(line)}


def word_values(text: str) -> set[Fraction]:
    return {Fraction(NUMBER_WORDS[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBER_WORDS}


def operators(expr: str) -> list[re.Match]:
    """The two-place operators of an expression, in order: in "-3+(4*5)" the + and the *."""
    return [
        m for m in MARK.finditer(expr) if not m.group()[-1].isdigit() and re.search(r"[\d)]\s*$", expr[: m.start()])
    ]


@functools.lru_cache(20_000)
def text_agrees(line: str) -> tuple[bool, ...]:
    """For each `=` in a line's text, units and annotations left out: is the arithmetic before and behind it the same?

    >>> text_agrees("2 boxes x 3 + 4 = 6 + 4 = <<2*3+4=10>>11 pens")
    (True, False)
    """
    text = re.sub(rf"(?:{UNIT})+(?=\s?[-+*/xX=])", "", cts.ANNOTATION.sub("", line))
    sides = re.sub(r"(?![xX]\b)[A-Za-z][^\d=]*|[,;:.](?!\d)", "|", text).split("=")
    ends = [(evaluate(a.rsplit("|", 1)[-1]), evaluate(b.split("|", 1)[0])) for a, b in itertools.pairwise(sides)]
    return tuple(a is not None and a == b for a, b in ends)


# ---- writing a wrong one --------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Ledger:
    """Which computed values have changed (old -> new), and which old values it would be a guess to replace.

    A number of a later step is taken for a changed result if it equals it and nothing else explains it. In doubt are
    therefore values given in x, constants (60 minutes), and values that an unchanged step has computed too.
    """

    doubt: set[Fraction]
    largest: Fraction
    strict: bool
    changed: dict[Fraction, Fraction] = dataclasses.field(default_factory=dict)
    touched: set[Fraction] = dataclasses.field(default_factory=set)

    def record(self, old: Fraction, new: Fraction) -> None:
        """A step computes `new` where the reference has `old`; UnfitError for a value that nobody would write."""
        if new == old:
            self.doubt.add(old)
            self.changed.pop(old, None)
            return
        unnatural = self.strict and old.denominator == 1 != new.denominator
        if not 0 < new <= self.largest or 100 % new.denominator or unnatural:
            raise UnfitError
        self.changed[old] = new
        self.touched.add(old)


def write_number(new: Fraction, old: str) -> str:
    """`new` in the style of the numeral it replaces: 1250 for "1,000" is "1,250", 3 for "2.50" is "3.00"."""
    text = f"{float(new):.2f}" if re.search(r"\.\d0$", old) else cts.show(new)
    whole, point, rest = text.partition(".")
    return f"{int(whole):,}{point}{rest}" if "," in old else text


def swap(text: str, ledger: Ledger) -> str:
    """`text` with every changed value replaced, if each can be: not "2nd", not 30% where 0.3 changed, not "two"."""

    def one(m: re.Match) -> str:
        old, before, behind = value_of(m.group()), text[: m.start()][-1:], text[m.end() :][:1]
        other_unit = {old / 100} if behind == "%" else {old * 100} if old < 1 else set()
        if other_unit & ledger.touched or (old in ledger.touched and old in ledger.doubt):
            raise UnfitError
        new = ledger.changed.get(old, old)
        if new != old and (before.isalpha() or behind.isalpha()):
            raise UnfitError
        return m.group() if new == old else write_number(new, m.group())

    if word_values(text) & ledger.touched:
        raise UnfitError
    return NUMERAL.sub(one, text) if ledger.touched else text


def rewrite(line: str, ledger: Ledger, value: Fraction | None = None, redo: bool = False) -> str:
    """`line` after earlier changes: its numbers swapped, its equations evaluated anew, their results recorded.

    `value` states a result instead of computing it (wrong_result); `redo` evaluates although no number changed here.
    "He has 48+24 = <<48+24=72>>72 pens." with 24 -> 26 is "He has 48+26 = <<48+26=74>>74 pens.", then 72 -> 74.
    """
    out, at = [], 0
    for eq in equations_in(line):
        front, expr, old = line[at : eq.start(1)], swap(eq.group(1), ledger), value_of(eq.group(2))
        new_front, new = swap(front, ledger), old
        if value is not None:
            new, expr = value, expr if operators(expr) else cts.show(value)
        elif redo or expr != eq.group(1):
            new = evaluate(expr)
            if new is None or not (redo or holds(eq)):
                raise UnfitError
        elif ledger.touched and not operators(expr) and old not in ledger.doubt:
            raise UnfitError  # a value found by algebra in the text: what it depends on is not known
        if new_front != front and operators(expr) and not holds(eq):
            raise UnfitError  # the reference's own equation cannot be read: "16 x 1 1/2 = 24"
        if new != old and numerals(front).count(old) > numerals(eq.group(1)).count(old):
            raise UnfitError  # the sentence names its result before it computes it
        ledger.record(old, new)
        out += [
            new_front,
            expr,
            line[eq.end(1) : eq.start(2)],
            eq.group(2) if new == old else write_number(new, eq.group(2)),
        ]
        at, again = eq.end(2), SHOWN.match(line, eq.end(2))
        if again and value_of(again.group(1)) == old:
            out += [line[at : again.start(1)], again.group(1) if new == old else write_number(new, again.group(1))]
            at = again.end()
    return "".join([*out, swap(line[at:], ledger)])


def edit_step(line: str, kind: str, choice: tuple) -> str:
    """`line` with an operator or operand of its equation replaced, in annotation and text; the result stays as it is.

    A text that spells the arithmetic out ("48 / 2 = <<48/2=24>>24") is changed in the same place; one that names the
    operation or its operands in other words ("half of 48") would contradict its own annotation and is unfit.
    """

    def read(marks: list[re.Match]) -> list:
        return [value_of(m.group()) if m.group()[-1].isdigit() else SAME.get(m.group(), m.group()) for m in marks]

    eq, annotated = equations_in(line)[0], "<<" in line
    front, expr = line[: eq.start(1)], eq.group(1)
    terms = list(MARK.finditer(expr))
    marks = list(MARK.finditer(front))[-len(terms) - 1 :]
    spelled = annotated and read(marks) == [*read(terms), "="]
    if annotated and not spelled and (OPERATION_WORDS.search(line) or set(numerals(front)) & set(numerals(expr))):
        raise UnfitError
    if kind == "wrong_operator":
        at = operators(expr)[choice[0]].start()
        spots = {eq.start(1) + at} | {m.start() for m, term in zip(marks, terms) if spelled and term.start() == at}
        return "".join(choice[1] if i in spots else c for i, c in enumerate(line))
    if value_of(eq.group(2)) == choice[0]:
        raise UnfitError  # operand or result? the text behind the equation does not say
    ledger = Ledger(set(), Fraction(1), False, dict([choice]), {choice[0]})
    again = SHOWN.match(line, eq.end(2))
    tail = again.end() if again else eq.end(2)
    return swap(front, ledger) + swap(expr, ledger) + line[eq.end(1) : tail] + swap(line[tail:], ledger)


def choices(problem: cts.Problem, kind: str, step: int, rng: random.Random) -> list[tuple]:
    """What `corrupt` can put into a step, best first: (result,), (operator, symbol), (stand-in,) or (old, new)."""
    lines = lines_of(problem.reference)
    equations, known = equations_in(lines[step]), results(lines[:step])
    if len(equations) != 1 or not holds(equations[0]):
        return []
    expr, value = equations[0].group(1), value_of(equations[0].group(2))
    operands = numerals(expr)
    once = [v for v in operands if operands.count(v) == 1]
    if kind == "dropped_step":  # its main operand stands in for the result that was never computed
        return [(v,) for v in sorted(dict.fromkeys(operands), key=lambda v: v not in known) if v != value]
    if kind == "stale_value":  # what an earlier result was computed from
        earlier = [eq for line in lines[:step] for eq in equations_in(line) if value_of(eq.group(2)) in once]
        pairs = [(value_of(eq.group(2)), old) for eq in earlier for old in numerals(eq.group(1))]
        return [(v, old) for v, old in pairs if v != old and v not in numerals(problem.x)]
    if kind == "wrong_result":  # slips of a unit or a digit first, then whatever lets later divisions come out even
        unit = Fraction(1, 10 ** len(cts.show(value).partition(".")[2]))
        slips = [s * d for d in (1, 2, 10, 100) for s in (1, -1) if d < 3 or d * 2 <= value / unit]
        more = [s * d for d in (3, 4, 5, 6, 8, 9, 12, 15, 20) for s in (1, -1) if d * 2 <= value / unit]
        found = rng.sample(slips, len(slips)) + more
        wrong = [value + d * unit for d in found if value + d * unit > 0]
        return [(v,) for v in wrong if not cts.equation_holds(cts.show(evaluate(expr)), v)]  # no mere rounding
    if kind == "wrong_operator":  # the bar of a fraction ("2/3*15") is no operation of its own
        marks = [(i, SAME.get(m.group(), m.group())) for i, m in enumerate(operators(expr))]
        found = [
            (i, new)
            for i, m in marks
            for new in {"+": "-", "-": "+", "*": "+/", "/": "*-"}[m]
            if m != "/" or len(marks) == 1
        ]
    else:
        given = set(numerals(problem.x))
        found = [(v, new) for v in once if v in given - known for new in sorted(given - set(operands))]
    return rng.sample(found, len(found))


def describe(kind: str, choice: tuple, before: str, after: str) -> tuple[str, str]:
    """The flaw in words, and without numbers for where those would give the answer or the right value away.

    `before` and `after` are the corrupted step's expression in the reference and in y0. The critique may say what
    should have been computed, never its value.
    """
    if not operators(before):
        return ("its result is wrong",) * 2
    if kind == "wrong_result":
        return f"{after} is not {cts.show(choice[0])}", "its result is wrong"
    plain = {"wrong_operator": "it uses the wrong operation", "dropped_step": "a step before it is missing",
             "stale_value": "it uses an old value", "wrong_quantity": "it uses another quantity"}[kind]  # fmt: skip
    return f"it should be {before}" if kind != "dropped_step" else f"the step {before} before it is missing", plain


def corrupt(problem: cts.Problem, kind: str, step: int, choice: tuple, strict: bool = True) -> tuple[str, int, tuple]:
    """(y0, index of its wrong step, flaw with and without numbers) with line `step` corrupted as `choices` offers.

    With `strict` off a number of x counts as spent once an earlier step has used it, and results may be decimals.
    """
    lines = lines_of(problem.reference)
    expr, value = equations_in(lines[step])[0].groups()
    given, named = set(numerals(problem.x)) | word_values(problem.x), Counter(numerals(problem.x))
    spent = Counter(v for line in lines[: step + 1] for eq in equations_in(line) for v in numerals(eq.group(1)))
    constants = CONSTANTS | (OF_TIME if TIME_WORDS.search(problem.x + problem.reference) else set())
    explained = constants | (given if strict else {v for v in given if spent[v] < named[v]})
    largest = 10 * max(numerals(problem.x + problem.reference))
    ledger = Ledger(explained | results(lines[:step]), largest, strict)
    y0, after = lines[:step], expr
    if kind == "dropped_step":
        ledger.record(value_of(value), choice[0])
    else:
        line = lines[step] if kind == "wrong_result" else edit_step(lines[step], kind, choice)
        y0.append(rewrite(line, ledger, choice[0] if kind == "wrong_result" else None, redo=True))
        after = equations_in(y0[-1])[0].group(1) if equations_in(y0[-1]) else expr
    for line in lines[step + 1 :]:
        final = Ledger(set(), largest, False, ledger.changed, set(ledger.changed))  # the answer is always derived
        y0.append(swap(line, final) if "####" in line else rewrite(line, ledger))
    twins = list(zip(y0, lines[:step] + lines[step + 1 :] if kind == "dropped_step" else lines))
    flagged = next((i for i, (new, old) in enumerate(twins) if new != old), None)
    if flagged is None or (strict and "####" in y0[flagged]):
        raise UnfitError
    for i, (new, old) in enumerate(twins):
        held, holds_now = text_agrees(old), text_agrees(new)
        if kind == "wrong_result" and i == flagged:
            broken = len(held) > 1
        else:
            chain = len(held) > 1 and not all(held) and new != old
            broken = chain or any(a and not b for a, b in zip(held, holds_now))
        if broken:
            raise UnfitError
    return "\n".join(y0), flagged, describe(kind, choice, expr, after)


# ---- quadruples -----------------------------------------------------------------------------------------------------
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


def attempts(problem: cts.Problem, seed: int) -> Iterator[tuple[str, int, str, str]]:
    """(kind, flawed y0, index of its wrong step, critique), in an order that depends on the seed and the problem alone.

    Kinds come in a random order and steps in a random order within a kind, so that kinds are mixed over problems.
    """
    key = hashlib.sha256(f"{seed}\0{problem.task_id}".encode()).hexdigest()
    rng, lines, answer = random.Random(key), lines_of(problem.reference), Fraction(problem.answer)
    kinds = rng.sample(list(TAG_OF_KIND), len(TAG_OF_KIND))
    tries = [(kind, step) for kind in kinds for step in rng.sample(range(len(lines)), len(lines))]
    for strict, (kind, step) in itertools.product((True, False), tries):
        for choice in choices(problem, kind, step, random.Random(f"{key}{kind}{step}")):
            try:
                y0, flagged, (flaw, plain) = corrupt(problem, kind, step, choice, strict)
            except UnfitError:
                continue
            right = value_of(equations_in(lines[step])[0].group(2))
            leaks = answer in cts.numbers_in(flaw) or right in numerals(flaw)
            f = cts.write_critique(flagged, plain if leaks or len(flaw) > 60 else flaw)
            if answer not in cts.numbers_in(f):  # "the 11th step" where 11 is the answer
                yield kind, y0, flagged, f


def perturb(problem: cts.Problem, seed: int = 0, keep_unverified: bool = False) -> cts.Quadruple | str:
    """The first verified quadruple of a problem, else (if wanted) the first unverified one, else why there is none."""
    y1_correct = cts.score_math(problem.reference, problem.answer) == 1
    if not any(map(equations_in, lines_of(problem.reference))):
        return "no arithmetic step"
    chosen = None
    for kind, y0, flagged, f in attempts(problem, seed):
        y0_correct = cts.score_math(y0, problem.answer) == 1
        verified = y1_correct and not y0_correct and cts.first_wrong_step(y0, problem.reference) == flagged
        if verified or chosen is None:
            chosen = kind, y0, flagged, f, y0_correct, verified
        if verified or (keep_unverified and not y1_correct):
            break
    if chosen is None or not (chosen[-1] or keep_unverified):
        return "no verified perturbation" if y1_correct else "reference not verified"
    kind, y0, flagged, f, y0_correct, verified = chosen
    place = cts.split_steps(y0)[flagged]
    meta = {
        "task_id": problem.task_id, "domain": "math", "split": cts.assign_split(problem),
        "horizon": sum("####" not in line for line in lines_of(problem.reference)),
        "edit_distance": edit_distance(y0, problem.reference), "error_tags": [TAG_OF_KIND[kind]],
        "error_span": [place.start, place.end], "teacher": "perturb", "y0_correct": y0_correct,
        "y1_correct": y1_correct, "is_human_audited": False, "answer": problem.answer, "verified": verified,
    }  # fmt: skip
    return cts.Quadruple(problem.x, y0, f, problem.reference, meta)


# ---- programs -------------------------------------------------------------------------------------------------------
FLAWS = {  # kind of mutation: (tag, what the critique says of it; never what would be right)
    "comparison": ("invalid_assumption", "it compares in the wrong way"),
    "condition": ("invalid_assumption", "its condition or truth value is wrong"),
    "off_by_one": ("local_arithmetic", "a number in it is off by one"),
    "operator": ("local_arithmetic", "it uses the wrong operator"),
    "dropped_statement": ("missing_case", "a statement is missing here"),
    "dropped_branch": ("missing_case", "a case is missing here"),
    "wrong_variable": ("state_tracking", "it uses the wrong variable"),
    "swapped": ("wrong_decomposition", "two of its parts stand in the wrong order"),
    "early_return": ("wrong_decomposition", "it returns too early"),
    "wrong_call": ("tool_misuse", "it calls the wrong function"),
}
COMPARISONS = {"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",),
               "in": ("not in",), "not in": ("in",), "is": ("is not",), "is not": ("is",)}  # fmt: skip
OPERATORS = {"+": ("-",), "-": ("+",), "*": ("+",), "/": ("*", "//"), "//": ("/", "*"), "%": ("//",), "**": ("*",),
             "<<": (">>",), ">>": ("<<",), "&": ("|",), "|": ("&",), "^": ("|",)}  # fmt: skip
TWINS = (("min", "max"), ("any", "all"), ("upper", "lower"), ("append", "extend"), ("floor", "ceil"), ("find", "rfind"),
         ("startswith", "endswith"), ("lstrip", "rstrip"), ("sum", "len"), ("union", "intersection"),
         ("popleft", "pop"), ("isdigit", "isalpha"), ("sorted", "list"), ("islower", "isupper"))  # fmt: skip
TWIN = {a: b for pair in TWINS for a, b in (pair, pair[::-1])}
SYMBOL = re.compile(r"not\s+in\b|is\s+not\b|in\b|is\b|\*\*|//|<<|>>|[<>=!]=|[-+*/%<>&|^@]")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A program with one flaw: its kind, its text, and the character span of the statement that is wrong in it."""

    kind: str
    program: str
    span: tuple[int, int]


class Source:
    """A program's text and tree; offsets are characters of the text (the tree's columns are UTF-8 bytes)."""

    def __init__(self, program: str):
        self.text, self.tree = program, cts.parse_program(program)
        self.starts = list(itertools.accumulate((len(line) + 1 for line in program.split("\n")), initial=0))
        self.nodes = list(ast.walk(self.tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def at(self, line: int, column: int) -> int:
        start = self.starts[line - 1]
        return start + len(self.text[start : self.starts[line]].encode()[:column].decode())

    def start(self, node) -> int:
        first = node.decorator_list[0] if getattr(node, "decorator_list", None) else node
        return self.at(first.lineno, first.col_offset) - (first is not node)  # the @ stands before its decorator

    def end(self, node) -> int:
        return self.at(node.end_lineno, node.end_col_offset)

    def cut(self, node) -> str:
        return self.text[self.start(node) : self.end(node)]

    def statement(self, node) -> ast.stmt:
        """The innermost statement around a node."""
        while not isinstance(node, ast.stmt):
            node = self.parent[node]
        return node

    def head(self, statement: ast.stmt) -> tuple[int, int]:
        """The span of a statement, of a compound one (`if`, `for`, ...) that of its head."""
        start, body = self.start(statement), getattr(statement, "body", None) or getattr(statement, "cases", None)
        if not body:
            return start, self.end(statement)
        first = body[0] if isinstance(body[0], ast.stmt) else body[0].pattern
        rows = [line.split("#")[0].rstrip() for line in self.text[start : self.start(first)].split("\n")]
        return start, start + len("\n".join(rows).rstrip())

    def last(self, statement: ast.stmt) -> ast.stmt:
        """The statement that a compound one ends with, itself if it is none."""
        inside = [n for n in ast.walk(statement) if isinstance(n, ast.stmt)]
        return max(inside, key=lambda n: (n.lineno, n.col_offset))

    def symbol(self, left, right) -> tuple[int, str] | None:
        """(place, text) of the operator between two neighbouring operands; brackets and comments stand there too."""
        start, end = self.end(left), self.start(right)
        m = SYMBOL.search(re.sub(r"#[^\n]*", lambda c: " " * len(c.group()), self.text[start:end]))
        return (start + m.start(), m.group()) if m else None

    def replaced(self, kind: str, node, start: int, end: int, new: str) -> Mutant:
        """The mutant with text [start, end), inside the head of the statement around `node`, replaced."""
        a, b = self.head(self.statement(node))
        return Mutant(kind, self.text[:start] + new + self.text[end:], (a, b + len(new) - (end - start)))

    def blocks(self) -> Iterator[list[ast.stmt]]:
        """All lists of statements."""
        for node in self.nodes:
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    yield block

    def alone(self, statement: ast.stmt) -> bool:
        """Does it stand on lines of its own?"""
        before = self.text[: self.start(statement)].rpartition("\n")[2]
        return not before.strip() and not self.text[self.end(statement) :].partition("\n")[0].strip()


def expression_mutants(source: Source) -> Iterator[Mutant]:
    """Other comparisons, operators, numbers, conditions, names, orders and calls in their place."""
    for node in source.nodes:
        if isinstance(node, ast.Compare):
            for left, right in itertools.pairwise([node.left, *node.comparators]):
                found = source.symbol(left, right)
                for new in COMPARISONS.get(" ".join(found[1].split()), ()) if found else ():
                    yield source.replaced("comparison", node, found[0], found[0] + len(found[1]), new)
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            found = source.symbol(left, right)
            for new in OPERATORS.get(found[1], ()) if found else ():
                yield source.replaced("operator", node, found[0], found[0] + len(found[1]), new)
            if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add | ast.Mult):
                yield from swapped(source, node, left, right)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            start, end = source.start(node), source.end(node)
            news = [node.value + 1, max(node.value - 1, 0)] if type(node.value) is int else [not node.value]
            for new in dict.fromkeys(n for n in news if n != node.value):
                yield source.replaced("condition" if new in (True, False) and type(new) is bool else "off_by_one", node,
                                      start, end, str(new))  # fmt: skip
        elif isinstance(node, ast.BoolOp):
            start, end = source.end(node.values[0]), source.start(node.values[1])
            new = re.sub(r"\b(and|or)\b", lambda m: {"and": "or", "or": "and"}[m.group()], source.text[start:end])
            if len(node.values) == 2:
                yield source.replaced("condition", node, start, end, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield source.replaced("condition", node, source.start(node), source.start(node.operand), "")
        elif isinstance(node, ast.Call):
            end, called = source.end(node.func), getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in TWIN:
                yield source.replaced("wrong_call", node, end - len(called), end, TWIN[called])
            if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
                yield from swapped(source, node, *node.args[:2])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from other_names(source, node)


def swapped(source: Source, node, left, right) -> Iterator[Mutant]:
    """Two parts of an expression in each other's place; each needs to bind as one (a name, a number, a call, ...)."""
    a, b = source.cut(left), source.cut(right)
    whole = ast.Name | ast.Constant | ast.Call | ast.Subscript | ast.Attribute
    if a != b and isinstance(left, whole) and isinstance(right, whole):
        start, end = source.start(left), source.end(right)
        yield source.replaced("swapped", node, start, end, b + source.text[source.end(left) : source.start(right)] + a)


def other_names(source: Source, node: ast.Name) -> Iterator[Mutant]:
    """Another variable of the same function in a name's place."""
    scope = node
    while scope in source.parent and not isinstance(scope, ast.FunctionDef):
        scope = source.parent[scope]
    inside = list(ast.walk(scope))
    own = [n.arg for n in inside if isinstance(n, ast.arg)]
    own += [n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    if node.id in own and isinstance(source.parent[node], ast.expr | ast.stmt):
        for new in sorted(set(own) - {node.id}):
            yield source.replaced("wrong_variable", node, source.start(node), source.end(node), new)


def statement_mutants(source: Source) -> Iterator[Mutant]:
    """A statement or a branch left out; a return moved into the loop before it."""
    text = source.text
    line_start = lambda node: text.rfind("\n", 0, source.start(node)) + 1
    for block in source.blocks():
        for i, statement in enumerate(block):
            start, end = line_start(statement), source.end(statement)
            whole = source.alone(statement)
            end += len(text[end:].partition("\n")[0]) if whole else 0
            kind = "dropped_branch" if isinstance(statement, ast.If) else "dropped_statement"
            keep = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Return, ast.Global, ast.Nonlocal)
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if len(block) > 1 and whole and not isinstance(statement, keep) and not docstring:
                gone = text[:start] + text[end + 1 :] if end < len(text) else text[: start - 1]
                if i + 1 < len(block):  # what now stands in its place; behind the last one the statement before it
                    a, b = (x - (end + 1 - start) for x in source.head(block[i + 1]))
                else:
                    a, b = source.head(source.last(block[i - 1]))
                yield Mutant(kind, gone, (a, b))
            if isinstance(statement, ast.If) and statement.orelse and whole:
                cut = source.end(statement.body[-1])
                yield Mutant("dropped_branch", text[:cut] + text[end:], source.head(source.last(statement.body[-1])))
            after = block[i + 1] if i + 1 < len(block) else None
            if isinstance(statement, ast.For | ast.While) and isinstance(after, ast.Return) and not statement.orelse:
                body = statement.body[-1]
                pad, line = text[line_start(body) : source.start(body)], source.cut(after)
                if source.alone(body) and source.alone(after) and "\n" not in line:
                    new = text[: line_start(after)] + pad + line
                    yield Mutant("early_return", new + text[source.end(after) :], (len(new) - len(line), len(new)))


def mutants(program: str, key: str) -> list[Mutant]:
    """All mutants of a program, kinds in turn; kinds and places in an order that depends on `key` alone."""
    source, rng = Source(program), random.Random(key)
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in FLAWS}
    for mutant in itertools.chain(expression_mutants(source), statement_mutants(source)):
        tree = cts.parse_program(mutant.program)
        if tree is not None and ast.dump(tree) != ast.dump(source.tree) and mutant.span[0] < mutant.span[1]:
            by_kind[mutant.kind].append(mutant)
    kinds = [rng.sample(by_kind[kind], len(by_kind[kind])) for kind in rng.sample(list(by_kind), len(by_kind))]
    return [m for turn in itertools.zip_longest(*kinds) for m in turn if m is not None]


def count_statements(program: str) -> int:
    """The horizon of a program: its statements, without imports and the heads of functions and classes."""
    heads = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    return sum(isinstance(n, ast.stmt) and not isinstance(n, heads) for n in ast.walk(cts.parse_program(program)))


def unfit(problem: cts.Problem, verdict: cts.Verdict | None) -> str | None:
    """Why a problem yields no quadruple before any mutant is tried, or None; `verdict` is the reference's."""
    if problem.tests is None:
        return "no usable tests"
    if not problem.reference.strip():
        return "no reference program"
    if cts.parse_program(problem.reference) is None:
        return "reference is not Python 3"
    if verdict is not None and verdict.outcome != "pass":
        return "harness error" if verdict.outcome == "harness_error" else "reference fails its tests"
    return None


MOST_MUTANTS = 48  # tried on one problem


def perturb_programs(
    problems: list[cts.Problem], seed: int = 0, keep_unverified: bool = False
) -> list[cts.Quadruple | str]:
    """For each problem its first mutant that fails a test, as a quadruple, else why there is none.

    Programs run in batches over all problems: references, then of each open problem its next 1, 2, 4, ... mutants. A
    mutant that neither ends nor stays within its memory is passed over: it would cost its time limit at every scoring.
    """
    done: list[cts.Quadruple | str | None] = [unfit(p, None) for p in problems]
    todo = [i for i, reason in enumerate(done) if reason is None]
    verdicts = dict(zip(todo, cts.grade([problems[i].reference for i in todo], [problems[i].tests for i in todo])))
    for i in todo:
        reason = unfit(problems[i], verdicts[i])
        done[i] = None if keep_unverified and reason != "harness error" else reason
    keys = [hashlib.sha256(f"{seed}\0{p.task_id}".encode()).hexdigest() for p in problems]
    left = {i: mutants(problems[i].reference, keys[i])[:MOST_MUTANTS] for i in todo if done[i] is None}
    first = {i: tries[0] for i, tries in left.items() if tries}
    chosen: dict[int, tuple[Mutant, cts.Verdict]] = {}
    size = 1
    while any(left.values()):
        batch = [(i, mutant) for i, tries in left.items() for mutant in tries[:size]]
        results = cts.grade([m.program for _, m in batch], [problems[i].tests for i, _ in batch])
        for (i, mutant), verdict in zip(batch, results):
            if verdict.outcome in ("wrong", "crash"):
                chosen.setdefault(i, (mutant, verdict))
        left = {i: tries[size:] for i, tries in left.items() if i not in chosen}
        size *= 2
    if keep_unverified:
        spare = [i for i in first if i not in chosen]
        some = cts.grade([first[i].program for i in spare], [problems[i].tests for i in spare])
        chosen |= {i: (first[i], verdict) for i, verdict in zip(spare, some) if verdict.outcome != "harness_error"}
    programs, results = [m.program for m, _ in chosen.values()], [verdict for _, verdict in chosen.values()]
    failing = dict(zip(chosen, cts.first_failures(programs, [problems[i].tests for i in chosen], results)))
    for i, (mutant, verdict) in chosen.items():
        done[i] = code_quadruple(problems[i], mutant, verdict, verdicts[i], failing[i])
    return ["no mutant fails a test" if made is None else made for made in done]


def code_quadruple(
    problem: cts.Problem, mutant: Mutant, verdict: cts.Verdict, reference: cts.Verdict, failing: int | None
) -> cts.Quadruple:
    """The quadruple of a mutant, its verdict, the reference's and the number of a test that the mutant fails."""
    tag, flaw = FLAWS[mutant.kind]
    line = mutant.program.count("\n", 0, mutant.span[0]) + 1
    f = cts.write_code_critique(line, flaw, cts.describe_call(problem.tests, failing))
    y0_correct, y1_correct = verdict.outcome == "pass", reference.outcome == "pass"
    meta = {
        "task_id": problem.task_id, "domain": "code", "split": cts.assign_split(problem),
        "horizon": count_statements(problem.reference),
        "edit_distance": edit_distance(mutant.program, problem.reference),
        "error_tags": [tag], "error_span": list(mutant.span), "teacher": "perturb", "y0_correct": y0_correct,
        "y1_correct": y1_correct, "is_human_audited": False, "tests": problem.tests,
        "verified": y1_correct and verdict.outcome in ("wrong", "crash"), "mutation": mutant.kind, **problem.notes,
    }  # fmt: skip
    return cts.Quadruple(problem.x, mutant.program, f, problem.reference, meta)


def check_writable(out: pathlib.Path) -> None:
    """Find out before the work, not after it, that nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cts.InputError(f"--out {out}: cannot be made a folder ({e.strerror}); choose another") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise cts.InputError(f"--out {out}: no permission to write there; choose another")


def print_summary(report: dict[str, Any], out: pathlib.Path) -> None:
    kept, total = report["kept"], report["problems"]
    print(f"{report['task']}: {kept} of {total} problems kept ({kept / max(1, total):.1%})")
    for name, counts in {
        "rejected": report["rejected"],
        **{k: report["replay"][k] for k in ("tags", "horizons")},
    }.items():
        print(f"  {name:9s} " + (", ".join(f"{key} {n}" for key, n in counts.items()) or "none"))
    print("  splits    " + ", ".join(f"{split} {n['kept']}/{n['total']}" for split, n in report["splits"].items()))
    print(f"  leak rate {report['replay']['leak_rate']:.3f} (critiques that say what the revision has to say)")
    print(f"  written to {out}/")


BATCH = 128  # problems whose programs run together


def main(args: Args) -> dict[str, Any]:
    if args.limit < 0:
        raise cts.InputError(f"--limit {args.limit}: must be 0 (all) or more")
    task, out = cts.get_task(args.task), pathlib.Path(args.out or f"data/replay/{args.task}")
    if task.domain == "code":
        cts.check_sandbox(args.unsafe_sandbox)
    check_writable(out)
    by_split: dict[str, list[cts.Problem]] = {"train": [], "val": [], "test": []}
    source, problems = hashlib.sha256(), task.load(args.data_dir)
    rejected: Counter[str] = Counter()
    tested = {cts.normalize_x(p.x) for p in problems if cts.assign_split(p) == "test"}
    for problem in problems:
        split = cts.assign_split(problem)
        if split != "test" and cts.normalize_x(problem.x) in tested:
            rejected["stands in test too"] += 1  # a source may hold a problem twice; test keeps it
        else:
            by_split[split].append(problem)
        source.update(json.dumps([problem.x, problem.reference, *([problem.tests] if problem.tests else [])]).encode())
    by_split = {split: problems[: args.limit or None] for split, problems in by_split.items()}
    replay: dict[str, list[cts.Quadruple]] = {split: [] for split in by_split}
    todo = [(split, problem) for split, problems in by_split.items() for problem in problems]
    with tqdm(total=len(todo), desc="perturb", unit="problem") as bar:
        for i in range(0, len(todo), BATCH):
            some, keep = [problem for _, problem in todo[i : i + BATCH]], args.keep_unverified == "yes"
            if task.domain == "math":
                made = [perturb(problem, args.seed, keep) for problem in some]
            else:
                made = perturb_programs(some, args.seed, keep)
            for (split, _), one in zip(todo[i : i + BATCH], made):
                if isinstance(one, str):
                    rejected[one] += 1
                else:
                    replay[split].append(one)
            bar.update(len(some))
    cts.check_leakage(replay)
    quads = list(itertools.chain(*replay.values()))
    report = {
        "task": args.task, "teacher": args.teacher, "seed": args.seed,
        "problems": len(todo) + rejected["stands in test too"], "kept": len(quads),
        "unverified": sum(not q.meta["verified"] for q in quads), "rejected": dict(sorted((+rejected).items())),
        "splits": {s: {"kept": len(replay[s]), "total": len(problems)} for s, problems in by_split.items()},
        "replay": cts.replay_report(quads), "source_sha256": source.hexdigest(),
    }  # fmt: skip
    for split, kept in replay.items():
        cts.write_replay(out / f"{split}.jsonl", kept)
    cts.write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    print_summary(report, out)
    return report


if __name__ == "__main__":
    cts.cli(main, Args)
