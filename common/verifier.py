"""Math by rules: the steps of a completion, which of them hold; and the Verdict, which programs get too. Without eval
and without signals, so safe in any thread. Used by all rooms that score, criticise or make solutions; knows nothing of
programs, models or replay files."""

import collections
import dataclasses
import difflib
import functools
import math
import re
from fractions import Fraction

from common.answers import answer_fields, final_answers, score_math
from common.values import read_value, value_of


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What rules say of a solution (`grade_math`) or tests of a program (room `programs`)."""

    outcome: str  # pass | wrong, and of programs also timeout | oom | crash | harness_error
    passed: int  # tests passed, or steps that hold
    total: int
    detail: str = ""  # of programs: which test did not pass first, and what it returned or raised
    failed: int | None = None  # the number of that test

    @property
    def reward(self) -> float:
        """1.0 for a pass, else 0.0; NaN where the harness failed: such a sample is no 0."""
        return math.nan if self.outcome == "harness_error" else float(self.outcome == "pass")

    @property
    def process(self) -> float:
        """The share that passed, in [0, 1]; NaN where the harness failed."""
        return math.nan if self.outcome == "harness_error" else self.passed / self.total


_NUMBER = r"(?>(?:\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})"  # atomic: all of a number or none
NUMBER = re.compile(rf"(?<![A-Za-z0-9_^])([-\u2212]?)\s?\$?\s?({_NUMBER})(?:\s?/\s?({_NUMBER}))?+(?!\d|[eE]\d|\^)")


@functools.lru_cache(100_000)
def to_fraction(numeral: str) -> Fraction:
    """A plain decimal ("1,234.50", ".5") as an exact Fraction."""
    return Fraction(numeral.replace(",", ""))


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
    """Every number that a prose `text` mentions, in order; not digits glued to letters. It says what a critique gives
    away; what an answer or a result states is read whole (`read_value`), never picked out.

    >>> [str(n) for n in numbers_in("from $1,234.50 to -3, 1/2 of H2O")]
    ['2469/2', '-3', '1/2']
    """
    parts = [(sign, to_fraction(whole), to_fraction(under or "1")) for sign, whole, under in NUMBER.findall(text)]
    return [(-whole if sign else whole) / under for sign, whole, under in parts if under]


_TOKENS = re.compile(rf"\s*(?:({_NUMBER})\s*(%?)|([-+*/()x\u00d7\u00f7]))")
_IN_PYTHON = {"x": "*", "\u00d7": "*", "\u00f7": "/", "(": "_("}  # a bracket is a call: then the tree keeps it


def evaluate_arithmetic(expr: str) -> Fraction | None:
    """The exact value of `+ - * / ( ) %` arithmetic, or None where it is not that.

    >>> str(evaluate_arithmetic("2*(3+4)/4")), evaluate_arithmetic("9**9"), evaluate_arithmetic("1/0")
    ('7/2', None, None)
    """
    expr, numbers = expr.replace("$", "").replace("\u2212", "-").strip(), []
    if len(expr) > 200 or _TOKENS.sub("", expr):
        return None

    def in_python(m: re.Match) -> str:
        number, percent, sign = m.groups()
        if sign:
            return _IN_PYTHON.get(sign, sign)
        numbers.append(to_fraction(number) / (100 if percent else 1))
        return f"n{len(numbers) - 1} "  # the space keeps two numbers in a row an error

    expr = _TOKENS.sub(in_python, expr)
    return None if "**" in expr else value_of(expr, numbers)


ANNOTATION = re.compile(r"<<([^<>=\n]{1,200})=\s*([^<>=\n]{1,40})>>")
_PLAIN_EQUATION = re.compile(
    rf"(?<![\w.,$:)+*/=-])(?<![-+*/x\u00d7\u00f7]\s)(\$?(?:{_NUMBER})(?:\s?[-+*/x\u00d7\u00f7]\s?\$?(?:{_NUMBER})){{1,12}})"
    rf"\s?=\s?(\$?(?:{_NUMBER})(?:/(?:{_NUMBER})|\s\d{{1,2}}/\d{{1,4}})?+(?:\s(?:hundred|thousand|million|billion)\b)?+)"
    r"(?!\s?[\d+*/x\u00d7\u00f7=(%:^\\\u2212\u2013-]|[.,'\u2019_]\d|\s?[A-Za-z]\b|[eE]\d|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u207f"
    r"\u2150-\u215f]|\s?(?:bn|dozen|per\s?cent)\b)"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One reasoning step (a line): its character span in the attempt, its equations (expression, stated value)."""

    start: int
    end: int
    equations: tuple[tuple[str, Fraction], ...]
    is_final: bool  # the line that states the final answer; its one "equation" has an empty expression


@functools.lru_cache(4096)  # of one text several scores are made, and a reference has many attempts
def split_steps(y: str) -> tuple[Step, ...]:
    """The non-empty lines of a solution as steps; `<<48/2=24>>` annotations are read, else plain `48 / 2 = 24`.

    >>> [(s.start, s.end, [(e, str(v)) for e, v in s.equations]) for s in split_steps("So <<2+3=5>>5.\\n#### 5")]
    [(0, 14, [('2+3', '5')]), (15, 21, [('', '5')])]
    """
    steps, fields = [], collections.deque(answer_fields(y))
    for m in re.finditer(r"[^\n]+", y):
        line, finals = m.group(), []
        while fields and fields[0].start <= m.end():
            finals.append(fields.popleft().number)
        pairs = [] if finals else ANNOTATION.findall(line) or _PLAIN_EQUATION.findall(line)
        stated = [(expr.strip(), stated_value(expr, text)) for expr, text in pairs]
        stated = [("", value) for value in dict.fromkeys(finals)] or stated
        equations = tuple((expr, value) for expr, value in stated if value is not None)
        if line.strip():
            steps.append(Step(m.start(), m.end(), equations, bool(finals)))
    return tuple(steps)


def equation_holds(expr: str, value: Fraction) -> bool:
    """Is the stated value that of the expression, up to rounding at the last decimal stated (10/3 = 3.33)?"""
    exact = evaluate_arithmetic(expr)
    if exact is None:
        return True  # nothing a rule can check
    stated, needed = (len(show(v).partition(".")[2]) for v in (value, exact))
    unit, cut = Fraction(1, 10**stated), (exact - value) * (1 if exact >= 0 else -1)
    rounded = stated and (needed > max(stated, 2) or "/" in show(exact)) and -unit / 2 <= cut < unit
    return exact == value or bool(rounded)


def stated_value(expr: str, text: str) -> Fraction | None:
    """The value that an equation states, None where it is not read: its other reading where only that makes it hold.

    >>> [str(stated_value(expr, "20%")) for expr in ("10/50", "10/50*100")], str(stated_value("5/2", "2 1/2"))
    (['1/5', '20'], '5/2')
    """
    read = read_value(text)
    if read is None or read.also is None or equation_holds(expr, read.number):
        return read and read.number
    return read.also if equation_holds(expr, read.also) else read.number


def first_wrong_step(y: str, reference: str) -> int | None:
    """Index of the first wrong step of `y`, or None if no rule finds one.

    A step is wrong if its arithmetic does not hold. Where the final answer differs from the reference's, the first step
    whose value is none of the reference's values (each used once) is wrong too: from there on the attempt has left the
    path that leads to the answer. A right final answer by another path is not punished.
    """
    steps, gold = split_steps(y), split_steps(reference)
    left = collections.Counter(value for step in gold for expr, value in step.equations if not step.is_final)
    gold_final = final_answers(reference)
    solved = bool(gold_final) and final_answers(y) == gold_final
    for i, step in enumerate(steps):
        if step.is_final:
            if not solved and [value for _, value in step.equations] != gold_final:  # another answer, or one not read
                return i
            continue
        for expr, value in step.equations:
            if not equation_holds(expr, value):
                return i
            elif not solved:
                if not left[value]:
                    return i
                left[value] -= 1
    return None


def grade_math(y: str, answer: str, reference: str) -> Verdict:
    """The verdict on a solution: pass if its final answer is right; passed are its steps up to the first that does not
    hold (prefix form).

    The total is that of the attempt's or the reference's steps, whichever are more, so neither stopping early nor
    padding with true trivia pays. Prefix form because summed step rewards collapse training
    (https://arxiv.org/abs/2504.15275).
    """
    steps, wrong = split_steps(y), first_wrong_step(y, reference)
    checkable = lambda steps: sum(bool(step.equations) for step in steps)
    total = max(checkable(steps), checkable(split_steps(reference)), 1)
    return Verdict("pass" if score_math(y, answer) else "wrong", checkable(steps[:wrong]), total)


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
