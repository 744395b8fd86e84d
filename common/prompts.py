"""The prompts: attempt (x -> y), revise (x, y0, f -> y1) and critique (x, y0 -> f), for math and for code. Used by all
that feeds a model; their digest is part of the fingerprint. Plain text: chat frames are the tokenizer's."""

from common.basics import sha256

# The last line of every code problem. It asks for a program and tells the prompts' wording; no math problem ends so.
CODE_LINE = "\nAnswer in Python."
ATTEMPT_TEMPLATE = "Problem:\n{x}\nSolve it step by step. End with #### and the answer.\nSolution:\n"
CODE_ATTEMPT_TEMPLATE = "Problem:\n{x}\nWrite the program.\nSolution:\n"
_GIVEN = "Problem:\n{x}\nAttempt:\n{y0}\n"
REVISE_TEMPLATE = f"{_GIVEN}Critique:\n{{f}}\nRevise the attempt. End with #### and the answer.\nSolution:\n"
CODE_REVISE_TEMPLATE = f"{_GIVEN}Critique:\n{{f}}\nRevise the attempt. Write the whole program.\nSolution:\n"
CRITIQUE_TEMPLATE = f"{_GIVEN}Say which step is wrong and why.\nCritique:\n"
CODE_CRITIQUE_TEMPLATE = f"{_GIVEN}Say which line is wrong and why.\nCritique:\n"


def attempt_prompt(x: str) -> str:
    """The prompt of a first attempt: x -> y. As in all three, x's last line says whether it is a code problem."""
    return (CODE_ATTEMPT_TEMPLATE if x.endswith(CODE_LINE) else ATTEMPT_TEMPLATE).format(x=x)


def revise_prompt(x: str, y0: str, f: str) -> str:
    """The prompt of a revision: (x, y0, f) -> y1. With f = "" the critique is left out."""
    return (CODE_REVISE_TEMPLATE if x.endswith(CODE_LINE) else REVISE_TEMPLATE).format(x=x, y0=y0, f=f)


def critique_prompt(x: str, y0: str) -> str:
    """The prompt of a critique: (x, y0) -> f."""
    return (CODE_CRITIQUE_TEMPLATE if x.endswith(CODE_LINE) else CRITIQUE_TEMPLATE).format(x=x, y0=y0)


def templates_sha256() -> str:
    """Digest of all prompt templates."""
    code = [CODE_ATTEMPT_TEMPLATE, CODE_REVISE_TEMPLATE, CODE_CRITIQUE_TEMPLATE, CODE_LINE]
    return sha256("\0".join([ATTEMPT_TEMPLATE, REVISE_TEMPLATE, CRITIQUE_TEMPLATE, *code]))
