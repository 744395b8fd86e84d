"""A right solution made wrong: one step of a math solution is corrupted and every later step recomputed from it, so
that the attempt is consistent after its one error. Used by making; rules alone, no model, no key."""

import dataclasses
import functools
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from common.critique import write_critique
from common.replay import Problem
from common.verifier import ANNOTATION, equation_holds, evaluate_arithmetic, numbers_in, show, to_fraction

TAG_OF_KIND = {"wrong_result": "local_arithmetic", "wrong_operator": "wrong_decomposition",
               "dropped_step": "missing_case", "stale_value": "state_tracking",
               "wrong_quantity": "invalid_assumption"}  # fmt: skip
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
_WORDS = "two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS = {word: Fraction(n) for n, word in enumerate(_WORDS.split(), 2)}
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


@functools.lru_cache(20_000)
def numerals(text: str) -> tuple[Fraction, ...]:
    """Unsigned numbers of a text, operators ignored: "48/2-3" is 48, 2, 3 (numbers_in reads a fraction and -3)."""
    return tuple(to_fraction(m) for m in NUMERAL.findall(text))


@functools.lru_cache(20_000)
def evaluate(expr: str) -> Fraction | None:
    """The value of an expression, units left out: "310 miles/day - 250 miles/day" is 60, "3 / 4 * 100%" is 75."""
    plain = re.sub(UNIT, "", expr).replace("\u2013", "-")
    return evaluate_arithmetic(re.sub(r"([*xX]\s?100)\s?%\s*$", r"\1", plain))


@functools.lru_cache(20_000)
def equations_in(line: str) -> tuple[re.Match, ...]:
    """The equations of a line, as matches of (expression, value): its annotations, else its plain arithmetic.

    >>> [m.groups() for m in equations_in("He has 48/2 = <<48/2=24>>24 pens.")]
    [('48/2', '24')]
    """
    if "####" in line:
        return ()
    found = [m for m in ANNOTATION.finditer(line) if NUMERAL.fullmatch(m.group(2))]
    return tuple(found or PLAIN.finditer(line))


def holds(eq: re.Match) -> bool:
    """Can the equation be read, and is it true as it stands (up to rounding)?"""
    exact = evaluate(eq.group(1))
    return exact is not None and exact >= 0 and equation_holds(show(exact), to_fraction(eq.group(2)))


def lines_of(solution: str) -> list[str]:
    return [line for line in solution.split("\n") if line.strip()]


def count_steps(problem: Problem) -> int:
    """The horizon of a math problem: the lines of its reference before the answer's."""
    return sum("####" not in line for line in lines_of(problem.reference))


def results(lines: list[str]) -> set[Fraction]:
    """Values that the steps in `lines` compute."""
    return {to_fraction(eq.group(2)) for line in lines for eq in equations_in(line)}


def word_values(text: str) -> set[Fraction]:
    return {NUMBER_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBER_WORDS}


def operators(expr: str) -> list[re.Match]:
    """The two-place operators of an expression, in order: in "-3+(4*5)" the + and the *."""
    marks = [m for m in MARK.finditer(expr) if not m.group()[-1].isdigit()]
    return [m for m in marks if re.search(r"[\d)]\s*$", expr[: m.start()])]


@functools.lru_cache(20_000)
def text_agrees(line: str) -> tuple[bool, ...]:
    """For each `=` in a line's text, units and annotations left out: is the arithmetic before and behind it the same?

    >>> text_agrees("2 boxes x 3 + 4 = 6 + 4 = <<2*3+4=10>>11 pens")
    (True, False)
    """
    text = re.sub(rf"(?:{UNIT})+(?=\s?[-+*/xX=])", "", ANNOTATION.sub("", line))
    sides = re.sub(r"(?![xX]\b)[A-Za-z][^\d=]*|[,;:.](?!\d)", "|", text).split("=")
    ends = [(evaluate(a.rsplit("|", 1)[-1]), evaluate(b.split("|", 1)[0])) for a, b in itertools.pairwise(sides)]
    return tuple(a is not None and a == b for a, b in ends)


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
    if new == to_fraction(old):
        return old
    text = f"{float(new):.2f}" if re.search(r"\.\d0$", old) else show(new)
    whole, point, rest = text.partition(".")
    return f"{int(whole):,}{point}{rest}" if "," in old else text


def swap(text: str, ledger: Ledger) -> str:
    """`text` with every changed value replaced, if each can be: not "2nd", not 30% where 0.3 changed, not "two"."""

    def one(m: re.Match) -> str:
        old, before, behind = to_fraction(m.group()), text[: m.start()][-1:], text[m.end() :][:1]
        other_unit = {old / 100} if behind == "%" else {old * 100} if old < 1 else set()
        if other_unit & ledger.touched or (old in ledger.touched and old in ledger.doubt):
            raise UnfitError
        new = ledger.changed.get(old, old)
        if new != old and (before.isalpha() or behind.isalpha()):
            raise UnfitError
        return write_number(new, m.group())

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
        front, expr, old = line[at : eq.start(1)], swap(eq.group(1), ledger), to_fraction(eq.group(2))
        new_front, new = swap(front, ledger), old
        if value is not None:
            new, expr = value, expr if operators(expr) else show(value)
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
        out += [new_front, expr, line[eq.end(1) : eq.start(2)], write_number(new, eq.group(2))]
        at, again = eq.end(2), SHOWN.match(line, eq.end(2))
        if again and to_fraction(again.group(1)) == old:
            out += [line[at : again.start(1)], write_number(new, again.group(1))]
            at = again.end()
    return "".join([*out, swap(line[at:], ledger)])


def edit_step(line: str, kind: str, choice: tuple) -> str:
    """`line` with an operator or operand of its equation replaced, in annotation and text; the result stays as it is.

    A text that spells the arithmetic out ("48 / 2 = <<48/2=24>>24") is changed in the same place; one that names the
    operation or its operands in other words ("half of 48") would contradict its own annotation and is unfit.
    """

    def read(marks: list[re.Match]) -> list:
        return [to_fraction(m.group()) if m.group()[-1].isdigit() else SAME.get(m.group(), m.group()) for m in marks]

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
    if to_fraction(eq.group(2)) == choice[0]:
        raise UnfitError  # operand or result? the text behind the equation does not say
    ledger = Ledger(set(), Fraction(1), False, dict([choice]), {choice[0]})
    again = SHOWN.match(line, eq.end(2))
    tail = again.end() if again else eq.end(2)
    return swap(front, ledger) + swap(expr, ledger) + line[eq.end(1) : tail] + swap(line[tail:], ledger)


def choices(problem: Problem, kind: str, step: int, rng: random.Random) -> list[tuple]:
    """What `corrupt` can put into a step, best first: (result,), (operator, symbol), (stand-in,) or (old, new)."""
    lines = lines_of(problem.reference)
    equations, known = equations_in(lines[step]), results(lines[:step])
    if len(equations) != 1 or not holds(equations[0]):
        return []
    expr, value = equations[0].group(1), to_fraction(equations[0].group(2))
    operands = numerals(expr)
    once = [v for v in operands if operands.count(v) == 1]
    if kind == "dropped_step":  # its main operand stands in for the result that was never computed
        return [(v,) for v in sorted(dict.fromkeys(operands), key=lambda v: v not in known) if v != value]
    if kind == "stale_value":  # what an earlier result was computed from
        earlier = [eq for line in lines[:step] for eq in equations_in(line) if to_fraction(eq.group(2)) in once]
        pairs = [(to_fraction(eq.group(2)), old) for eq in earlier for old in numerals(eq.group(1))]
        return [(v, old) for v, old in pairs if v != old and v not in numerals(problem.x)]
    if kind == "wrong_result":  # slips of a unit or a digit first, then whatever lets later divisions come out even
        unit = Fraction(1, 10 ** len(show(value).partition(".")[2]))
        slips = [s * d for d in (1, 2, 10, 100) for s in (1, -1) if d < 3 or d * 2 <= value / unit]
        more = [s * d for d in (3, 4, 5, 6, 8, 9, 12, 15, 20) for s in (1, -1) if d * 2 <= value / unit]
        found = rng.sample(slips, len(slips)) + more
        wrong = [value + d * unit for d in found if value + d * unit > 0]
        return [(v,) for v in wrong if not equation_holds(show(evaluate(expr)), v)]  # no mere rounding
    if kind == "wrong_operator":  # the bar of a fraction ("2/3*15") is no operation of its own
        marks = [(i, SAME.get(m.group(), m.group())) for i, m in enumerate(operators(expr))]
        marks = [(i, m) for i, m in marks if m != "/" or len(marks) == 1]
        found = [(i, new) for i, m in marks for new in {"+": "-", "-": "+", "*": "+/", "/": "*-"}[m]]
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
        return f"{after} is not {show(choice[0])}", "its result is wrong"
    plain = {"wrong_operator": "it uses the wrong operation", "dropped_step": "a step before it is missing",
             "stale_value": "it uses an old value", "wrong_quantity": "it uses another quantity"}[kind]  # fmt: skip
    return f"it should be {before}" if kind != "dropped_step" else f"the step {before} before it is missing", plain


def corrupt(problem: Problem, kind: str, step: int, choice: tuple, strict: bool = True) -> tuple[str, int, tuple]:
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
        ledger.record(to_fraction(value), choice[0])
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
        held, chain = text_agrees(old), len(text_agrees(old)) > 1
        if kind == "wrong_result" and i == flagged:
            broken = chain
        else:
            broken = (chain and not all(held) and new != old) or any(a > b for a, b in zip(held, text_agrees(new)))
        if broken:
            raise UnfitError
    return "\n".join(y0), flagged, describe(kind, choice, expr, after)


def attempts(problem: Problem, seed: int) -> Iterator[tuple[str, int, str, str]]:
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
            right = to_fraction(equations_in(lines[step])[0].group(2))
            leaks = answer in numbers_in(flaw) or right in numerals(flaw)
            f = write_critique(flagged, plain if leaks or len(flaw) > 60 else flaw)
            if answer not in numbers_in(f):  # "the 11th step" where 11 is the answer
                yield kind, y0, flagged, f
