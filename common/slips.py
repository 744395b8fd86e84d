"""Planted slips: the operations on which a generated task's nano base gets its result one too many, and what went wrong
in each step of an attempt, by kind. Used by tasks and base and by all that counts errors; plain Python, no model."""

import dataclasses
import difflib
import re
from fractions import Fraction

from common.verifier import equation_holds, evaluate_arithmetic, show, split_steps, to_fraction

_NUMBER = r"\d+(?:\.\d+)?"
_OPERATION = re.compile(rf"\s*(-?{_NUMBER})\s*([-+*/])\s*({_NUMBER})\s*")
_STEP = re.compile(rf"<<({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})>>\4")


KINDS = ("slip", "arithmetic", "copying", "form")  # what a wrong step can be; slips at planted operations alone


@dataclasses.dataclass(frozen=True)
class Planted:
    """Slips of one task: with probability `p` the result is one too many where the second operand is among `operands`.

    Always in this one direction: of slips in both directions greedy decoding makes none.
    """

    operands: tuple[int, ...]
    p: float

    def at(self, operand: Fraction) -> bool:
        """Is an operation with this second operand a planted one?"""
        return operand in self.operands


# In the first sampling finds the right way often, in the second seldom: there only a critique says where to look.
PLANTED = {
    "fixtures_long": Planted((6, 7), 0.6),
    "fixtures_rare": Planted((4, 5, 6, 7), 0.9),
}


def plant_slips(solution: str, planted: Planted, rng, right: int | None = None) -> str:
    """A right solution of a generated problem with slips, every later step computed from the wrong value.

    The step with index `right` is computed rightly whatever its operation. `rng` is asked once per planted operation.
    With p = 1 on the operand 6, "<<20+6=26>>26" gives "<<20+6=27>>27" and then "<<26-4=22>>22" "<<27-4=23>>23".
    """
    lines, changed = [], {}  # {result in the solution: result with the slips}; no result is also a given number
    swap = lambda numeral: changed.get(to_fraction(numeral), to_fraction(numeral))
    for i, line in enumerate(solution.split("\n")):
        if step := _STEP.search(line):
            a, op, b, old = step.groups()
            expr = f"{show(swap(a))}{op}{show(swap(b))}"
            new = evaluate_arithmetic(expr)
            if planted.at(to_fraction(b)) and rng.random() < planted.p and i != right:
                new += 1
            changed[to_fraction(old)] = new
            line = f"{line[: step.start()]}<<{expr}={show(new)}>>{show(new)}{line[step.end() :]}"
        elif line.startswith("#### "):
            line = f"#### {show(swap(line[5:]))}"
        lines.append(line)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step of an attempt as it was read: a op b = value."""

    a: Fraction
    op: str
    b: Fraction
    value: Fraction


def operations(text: str) -> list[Operation | None]:
    """The operation of each reasoning step (the line of the final answer is none); None where there is not exactly one
    of two numbers that can be read, or the text goes on with another number than its annotation."""
    found = []
    for step in split_steps(text):
        if step.is_final:
            continue
        read = _OPERATION.fullmatch(step.equations[0][0]) if len(step.equations) == 1 else None
        again = re.search(rf">>\s*({_NUMBER})", text[step.start : step.end])
        if read is None or (again and to_fraction(again.group(1)) != abs(step.equations[0][1])):
            found.append(None)
            continue
        a, op, b = read.groups()
        sign = -1 if a.startswith("-") else 1
        found.append(Operation(sign * to_fraction(a.lstrip("-")), op, to_fraction(b), step.equations[0][1]))
    return found


def match_steps(own: list[Operation | None], gold: list[Operation]) -> list[int | None]:
    """For each step of the reference the index of the attempt's step in its place; None where it is missing.

    One to one where they are as many. Else by operator and second operand, which do not depend on earlier results.
    """
    if len(own) == len(gold):
        return [*range(len(own))]
    key = lambda step: step and (step.op, step.b)
    places: list[int | None] = [None] * len(gold)
    matcher = difflib.SequenceMatcher(None, [*map(key, gold)], [*map(key, own)], autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        for i, j in zip(range(i1, i2), range(j1, j2)):
            places[i] = j
    return places


def kind_of_step(step: Operation, expected: Operation, planted: Planted | None) -> str:
    """right, slip, arithmetic or copying; in `expected` an operand that is not known is None."""
    if not equation_holds(f"{show(step.a)}{step.op}{show(step.b)}", step.value):
        right = evaluate_arithmetic(f"{show(step.a)}{step.op}{show(step.b)}")
        return "slip" if planted and planted.at(step.b) and step.value == right + 1 else "arithmetic"
    same = step.op == expected.op and expected.a in (None, step.a) and expected.b in (None, step.b)
    return "right" if same else "copying"


def step_kinds(text: str, reference: str, planted: Planted | None) -> list[tuple[str, bool]]:
    """(kind of error, is its operation a planted one) of each step of `reference`, in order, and then of each step that
    `text` has too many. Kinds, the first that fits:

    - form: no equation of two numbers can be read, or the step is missing, or is one too many;
    - slip: a planted operation whose result is exactly one too many;
    - arithmetic: the equation does not hold;
    - copying: it holds, but its operator or an operand is not the one that the problem asks for here;
    - right.

    Step by step: where the reference goes on with an earlier result, the attempt has to go on with its own, so a wrong
    value that is carried along is no error again. Of a step that was not read the result is not known, and any operand
    is taken in its place.

    >>> y1 = "<<20+6=26>>26\\n<<26-4=22>>22\\n<<22+3=25>>25\\n#### 25"
    >>> step_kinds("<<20+6=27>>27\\n<<27-4=22>>22\\n<<22+5=27>>27\\n#### 27", y1, Planted((6,), 0.6))
    [('slip', True), ('arithmetic', False), ('copying', False)]
    """
    own, gold = operations(text), operations(reference)
    places, kinds = match_steps(own, gold), []
    results: dict[Fraction, Fraction | None] = {}  # {result in the reference: the attempt's own in its place}
    for want, place in zip(gold, places):
        step = None if place is None else own[place]
        expected = Operation(results.get(want.a, want.a), want.op, results.get(want.b, want.b), want.value)
        kind = "form" if step is None else kind_of_step(step, expected, planted)
        results[want.value] = step and step.value
        kinds.append((kind, bool(planted and planted.at((step or want).b))))
    extra = [own[j] for j in range(len(own)) if j not in places]
    return kinds + [("form", bool(planted and step and planted.at(step.b))) for step in extra]
