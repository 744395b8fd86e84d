"""Critiques by rules: the sentences of the keyless teacher, the critique of any attempt, and what control arms need: a
critique redacted, another attempt in y0's place. Used by mistakes, making and b5; knows no model."""

import builtins
import dataclasses
import json
import re
from typing import Any

from common.answers import final_answers
from common.plans import plan_tests
from common.programs import code_lines, grade, line_changes, program_of
from common.prompts import revise_prompt
from common.replay import Quadruple
from common.verifier import equation_holds, first_wrong_step, grade_math, numbers_in, show, split_steps

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
    wrong, answer = first_wrong_step(y0, reference), final_answers(reference)
    if wrong is None:
        return "No step is found wrong.", None
    step = split_steps(y0)[wrong]
    slips = [f"{e} is not {show(v)}" for e, v in step.equations if not step.is_final and not equation_holds(e, v)]
    f = write_critique(wrong, slips[0] if slips else "it leaves the way to the answer")
    leaks = set(answer) & set(numbers_in(f))
    return (write_critique(wrong, "its result is off") if leaks else f), [step.start, step.end]


def redact(f: str) -> str:
    """A critique without its numbers and without the step it names (a control: what is left cannot localize).

    >>> redact("The second step is wrong: it should be 4+3.")
    'The _ step is wrong: it should be _+_.'
    """
    return re.sub(rf"\d+(?:[.,]\d+)*(?:th)?|\b(?:{'|'.join(ORDINALS)})\b", "_", f, flags=re.IGNORECASE)


def with_critique(q: Quadruple, f: str, span: list[int] | None) -> Quadruple:
    """The quadruple under another critique, which points at another place or (None) at none."""
    return dataclasses.replace(q, f=f, meta={**q.meta, "error_span": span})


def with_critique_of(q: Quadruple, other: Quadruple) -> Quadruple:
    """The quadruple under another one's critique (a control): it points where that one points, at the step of the same
    number, or at none where y0 is too short."""
    steps = lambda q: [[s.start, s.end] for s in split_steps(q.y0)]
    start, end = other.meta["error_span"] or (0, 0)
    at = next((i for i, s in enumerate(steps(other)) if s[0] < end and s[1] > start), None)
    return with_critique(q, other.f, None if at is None or at >= len(steps(q)) else steps(q)[at])


def write_code_critique(line: int | None, flaw: str, call: str) -> str:
    """The critique sentences of the rule-based teachers on a program: the line, the flaw and the call that fails.

    >>> write_code_critique(3, "it uses the wrong operator", "f(3, 4)")
    'Line 3 is wrong: it uses the wrong operator. f(3, 4) fails.'
    """
    return f"{call} fails: {flaw}." if line is None else f"Line {line} is wrong: {flaw}. {call} fails."


def describe_call(tests: dict[str, Any], i: int | None) -> str:
    """What the i-th test calls, without what it expects; long ones are cut. "A test" where none is known or read.

    >>> describe_call({"asserts": ["assert f([3], 1) == 4"]}, 0), describe_call({"inputs": ["1 2"], "outputs": [""]}, 0)
    ('f([3], 1)', "the input '1 2'")
    """
    if i is None:
        return "A test"
    if "asserts" in tests:
        plan = plan_tests(json.dumps(tests, sort_keys=True))
        text = "" if plan.problem else plan.job["tests"][plan.checks[i][0]]
        if not text or text.partition("(")[0] in dir(builtins):  # "sum(1, 2) fails" would be said of Python's own
            return "A test"
    else:
        given = tests["inputs"][i]
        text = f"{tests['fn_name']}({', '.join(map(repr, given))})" if "fn_name" in tests else f"the input {given!r}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_program(y0: str, y1: str, outcome: str, call: str) -> tuple[str, list[int] | None]:
    """(critique, error_span) of any attempt at a program, from its outcome and the call that fails.

    The line is the first that differs from the reference y1. Where the two share less than half of their lines the
    attempt goes another way and no rule says where it is wrong: the critique names the call alone and span is None.
    """
    if outcome == "pass":
        return "No line is found wrong.", None
    flaws = {"wrong": "the result is wrong", "timeout": "it does not end in time", "oom": "it needs too much memory"}
    flaw = flaws.get(outcome, "it stops with an error")
    program = program_of(y0).rstrip()
    at, old, new = y0.find(program), code_lines(program), code_lines(y1)
    changes = line_changes(old, new)
    shared = len(old) - sum(j - i for i, j in changes)
    if at < 0 or not old or not changes or 4 * shared < len(old) + len(new):
        return write_code_critique(None, flaw, call), None
    start, end, _ = old[min(changes[0][0], len(old) - 1)]
    flaw = flaw if outcome != "wrong" else "it leaves the way to the result"
    return write_code_critique(y0[: at + start].count("\n") + 1, flaw, call), [at + start, at + end]


def criticise(texts: list[str], quads: list[Quadruple]) -> list[tuple[str, list[tuple[str, list[int] | None]]]]:
    """Of each text as an attempt at its quadruple's problem, all of one domain: its outcome and the (critique, span) to
    choose from, the fullest first. Programs run in one batch."""
    if quads[0].meta["domain"] == "math":
        outcome = lambda y, q: grade_math(y, q.meta["answer"], q.y1).outcome
        return [(outcome(y, q), [check_critique(y, q.y1)]) for y, q in zip(texts, quads)]
    found = []
    for y, q, verdict in zip(texts, quads, grade(texts, [q.meta["tests"] for q in quads])):
        calls = [describe_call(q.meta["tests"], i) for i in (verdict.failed, None)]  # the first may have many tokens
        found.append((verdict.outcome, [check_program(y, q.y1, verdict.outcome, call) for call in calls]))
    return found


def with_attempts(quads: list[Quadruple], attempts: list[str], fits) -> list[Quadruple]:
    """The quadruples with other attempts in place of their y0, criticised by rules. An attempt that makes the revise
    prompt too long (`fits(prompt)` says) loses its end. One whose verdict is a harness error, or that fits in no way,
    leaves its quadruple as it was."""
    longest = write_code_critique(999, "it leaves the way to the result", "7" * 66)  # that of a program needs a run
    expected = lambda q, y0: check_critique(y0, q.y1)[0] if q.meta["domain"] == "math" else longest
    cut, out = [], []
    for q, y0 in zip(quads, attempts):
        while y0 and not fits(revise_prompt(q.x, y0, expected(q, y0))):
            y0 = y0[: int(0.9 * len(y0))]
        cut.append(y0)
    for q, y0, (outcome, critiques) in zip(quads, cut, criticise(cut, quads)):
        f, span = next((c for c in critiques if fits(revise_prompt(q.x, y0, c[0]))), (None, None))
        meta = {**q.meta, "error_span": span, "y0_correct": outcome == "pass"}
        known = f is not None and outcome != "harness_error"
        out.append(dataclasses.replace(q, y0=y0, f=f, meta=meta) if known else q)
    return out
