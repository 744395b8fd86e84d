"""Scores of completions against their quadruples: outcome, process, uptake, single steps; each host scores its own
rows. NaN where the harness failed: such a sample is no 0. Used by the scripts, run and evaluation; knows no model.
Every room that a score passes through is in the fingerprint's verifier digest."""

import math

import numpy as np

from common.answers import final_answers
from common.basics import InputError
from common.hosts import by_host
from common.plans import parse_program
from common.programs import code_lines, grade, line_changes, program_of
from common.replay import Quadruple
from common.tokenizer import Tokenizer
from common.verifier import Verdict, first_wrong_step, grade_math, split_steps, uptake


def format_valid(completion: str, domain: str) -> bool:
    """Does the completion commit to exactly one final answer (math), or hold a program that can be read (code)?"""
    if domain == "math":
        return len(final_answers(completion)) == 1
    program = parse_program(program_of(completion))
    return program is not None and bool(program.body)


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


def verdicts_of(texts: list[str], quads: list[Quadruple]) -> list[Verdict]:
    """The verdict on each text under its own quadruple: by `grade_math` against the replay's revision, or by the tests,
    all programs in one batch."""
    code = [i for i, q in enumerate(quads) if q.meta["domain"] == "code"]
    found = dict(zip(code, grade([texts[i] for i in code], [quads[i].meta["tests"] for i in code])))
    pairs = enumerate(zip(texts, quads))
    return [found[i] if i in found else grade_math(text, q.meta["answer"], q.y1) for i, (text, q) in pairs]


def score_outcomes(texts: list[str], quads: list[Quadruple]) -> list[float]:
    """The outcome of each text under its own quadruple: 1.0 if the final answer is right (math) or all tests pass
    (code), else 0.0; NaN if the harness failed."""
    return [verdict.reward for verdict in verdicts_of(texts, quads)]


def outcome_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Outcome reward [B, G] of B*G completions, in {0, 1}, or NaN (`score_outcomes`)."""
    return by_host(score_outcomes, texts, quads)


def process_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Process reward [B, G] of B*G completions, in [0, 1]: the share of steps that hold (math) or of tests passed
    (code), NaN if the harness failed."""
    return by_host(lambda some, owners: [verdict.process for verdict in verdicts_of(some, owners)], texts, quads)


def uptake_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """Uptake reward [B, G] of B*G completions, in {0, 1}, or NaN: `uptake` or `code_uptake` of the quadruple's own
    critique."""

    def one(text: str, q: Quadruple, now: Verdict, before: Verdict) -> float:
        if q.meta["domain"] == "math":
            return uptake(text, q.y0, q.meta["error_span"], q.y1)
        return code_uptake(text, q.y0, q.meta["error_span"], now, before)

    def all_of(some: list[str], owners: list[Quadruple]) -> list[float]:
        verdicts = verdicts_of([*some, *(q.y0 for q in owners)], [*owners, *owners])
        return list(map(one, some, owners, verdicts[: len(some)], verdicts[len(some) :]))

    return by_host(all_of, texts, quads)


def check_math(quads: list[Quadruple], what: str) -> None:
    """InputError where a quadruple's steps cannot be checked one by one."""
    if any(q.meta["domain"] != "math" for q in quads):
        raise InputError(f"{what} of single steps: math only; use --process_credit rolled_up")


def step_rewards(tokenizer: Tokenizer, tokens_MT, len_M, texts: list[str], quads: list[Quadruple]):
    """(reward, end) [B, G, T]: end is 1 on each step's last token, reward 1 there while all steps so far hold. Math."""
    check_math(quads, "rewards")
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


def from_first_error(tokenizer: Tokenizer, tokens_MT, len_M, texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """0/1 [B, G, T]: 1 from the first token of each completion's first wrong step on; all 1 where none is found. Math.

    "2+3=5\\n#### 6" in tokens "2", "+", "3=5", "\\n", "####", " 6", where y1 is "2+3=5\\n#### 5": [0, 0, 0, 0, 1, 1].
    """
    check_math(quads, "errors")
    (M, T), B = np.asarray(tokens_MT).shape, len(quads)
    from_error_MT = np.ones((M, T), np.float32)
    for m, text in enumerate(texts):
        wrong = first_wrong_step(text, quads[m // (M // B)].y1)
        if wrong is not None:
            step = split_steps(text)[wrong]
            (on_T,) = tokenizer.overlap(list(tokens_MT[m][: len_M[m]]), text, [(step.start, step.end)])
            from_error_MT[m, : int(np.argmax(on_T > 0))] = 0.0
    return from_error_MT.reshape(B, -1, T)
