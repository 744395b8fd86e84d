"""Problems, quadruples, attempts and checkpoints that several test files look at."""

import functools
import json
import pathlib

import numpy as np
import pytest

from common.basics import InputError
from common.chat import load_hf_tokenizer
from common.hf_config import read_hf_config
from common.hosts import make_mesh
from common.model import leaf_names
from common.prompts import CODE_LINE
from common.replay import Problem, Quadruple, parse_quadruple
from common.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]


def floats(*rows):
    return np.array(rows, np.float32)


# ---- math: a replay line, two quadruples, a solution with its attempts ----------------------------------------------
META = {
    "task_id": "own/1", "domain": "math", "split": "train", "horizon": 2, "edit_distance": 1,
    "error_tags": ["local_arithmetic"], "error_span": [0, 5], "teacher": "own", "y0_correct": False, "y1_correct": True,
    "is_human_audited": False, "answer": "5",
}  # fmt: skip
ROW = {"x": "What is 2+3?", "y0": "2+3=6\n#### 6", "f": "2+3 is not 6.", "y1": "2+3=5\n#### 5", "meta": META}


def math_line(meta: dict | None = None, meta_without: str = "", **fields) -> str:
    """A good replay line with some fields changed."""
    full = {**META, **(meta or {})}
    return json.dumps({**ROW, "meta": {k: v for k, v in full.items() if k != meta_without}, **fields})


def math_quad(i: int = 0, **fields) -> Quadruple:
    return parse_quadruple(math_line(x=f"What is {i}+3?") if not fields else math_line(**fields), "here:1")


Y1 = "So <<2+3=5>>5.\n#### 5"
BAD = "So <<2+3=6>>6.\n#### 6"
BY_HAND = {**META, "split": "test", "horizon": 1, "edit_distance": 2, "error_span": [0, 14]}
QUAD = Quadruple("What is 2+3?", BAD, "The first step is wrong: 2+3 is not 6.", Y1, BY_HAND)
OTHER = Quadruple(
    "Then 4+3?", "<<4+3=8>>8\n#### 8", "No.", "<<4+3=7>>7\n<<7+0=7>>7\n#### 7", {**BY_HAND, "answer": "7"}
)


def record(horizon, edit, tags, y0, attempt, revised, **further) -> dict:
    base = {"horizon": horizon, "edit_distance": edit, "error_tags": tags, "y0": y0, "attempt": attempt,
            "revised": revised, "revised_format": True, "revised_truncated": False, "revised_tokens": 10}  # fmt: skip
    return {**base, **further}


RECORDS = [
    record(2, 1, ["local_arithmetic"], 0.0, 1.0, 1.0, credit_auc=0.75, credit_gap=2.0, credit_excess=0.25,
           credit_temperature=0.8, flip_gain=1.5, attempt_wrong_step=None, attempt_steps=3),
    record(2, 3, ["local_arithmetic", "missing_case"], 0.0, 0.0, 0.0, revised_format=False, revised_truncated=True,
           attempt_wrong_step=1, attempt_steps=3),
    record(10, 12, [], 1.0, 1.0, 0.0, credit_auc=None, credit_gap=None),
    record(10, 10, ["missing_case"], 0.0, 0.0, 1.0, credit_auc=0.25, credit_gap=-1.0, credit_excess=-0.05,
           credit_temperature=0.8, flip_gain=0.5),
    record(3, 2, [], 1.0, 1.0, 1.0, revised_tokens=60),
]  # fmt: skip

SOLUTION = (
    "Tom has 48/2 = <<48/2=24>>24 blue pens.\n"
    "He has <<48+24=72>>72 pens in all.\n"
    "He keeps <<72-15=57>>57 pens.\n"
    "#### 57"
)
FIRST, SECOND, THIRD, FINAL = SOLUTION.split("\n")
ATTEMPTS = {  # kind: (attempt, first wrong step)
    "local arithmetic": ((FIRST, "He has <<48+24=74>>74.", "He keeps <<74-15=59>>59.", "#### 59"), 1),
    "local arithmetic, right answer": ((FIRST, "He has <<48+24=74>>74.", THIRD, FINAL), 1),
    "plain equation": (("He has 48 / 2 = 26 blue pens.", "#### 57"), 0),
    "missing case": ((FIRST, "He keeps <<24-15=9>>9.", "#### 9"), 1),
    "invalid assumption": ((FIRST, SECOND, "He keeps <<72-10=62>>62.", "#### 62"), 2),
    "wrong decomposition": (("He has <<48*2=96>>96.", "In all <<48+96=144>>144.", "<<144-15=129>>129", "#### 129"), 0),
    "tool misuse": ((FIRST, "He has <<48-24=72>>72.", THIRD, FINAL), 1),
    "state tracking": ((FIRST, SECOND, "He keeps <<48-15=33>>33.", "#### 33"), 2),
    "value used twice": ((FIRST, "Again <<12+12=24>>24.", "#### 24"), 1),
    "wrong final only": ((FIRST, SECOND, THIRD, "#### 72"), 3),
    "two finals": ((FIRST, SECOND, THIRD, FINAL, "#### 58"), 4),
    "two finals, the right one last": ((FIRST, SECOND, THIRD, "#### 58", FINAL), 3),
    "two finals in one line": ((FIRST, SECOND, THIRD, "#### 58 or 57"), 3),
    "style only": (("Half of 48: <<48/2=24>>24!", "Sum: 48 + 24 = 72", "So <<72-15=57>>57.", "#### $57.00"), None),
    "another right path": (("<<48*3/2=72>>72 in all.", "<<70-15=55>>55.", "<<55+2=57>>57.", FINAL), None),
    "stops early": ((FIRST, SECOND), None),
    "the reference": ((FIRST, SECOND, THIRD, FINAL), None),
}


TEXTS = [
    "Tom has 48/2 = <<48/2=24>>24 pens.\n#### 24",
    "In May 12 nuts are lost. How many nuts does Eva have now?",
    "So $1,200 - $350 = $<<1200-350=850>>850 remains; na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600!",
]


def problem_of(x: str, *lines: str) -> Problem:
    return Problem("own/x", x, "\n".join(lines), lines[-1].removeprefix("#### "), None)


# ---- code: a problem with its reference, a wrong program and its quadruple ------------------------------------------
REFERENCE = """def calc(a, b):
    r = a + 3
    if r > 10:
        r = r - b
    return r"""
ASSERTS = ["assert calc(1, 2) == 4", "assert calc(7, 2) == 10", "assert calc(9, 2) == 10", "assert calc(20, 5) == 18"]
X = f"calc(a, b): Start with a plus 3. If it is above 10, subtract b.{CODE_LINE}"
PROBLEM = Problem("own/calc", X, REFERENCE, "", None, {"setup": "", "asserts": ASSERTS}, {"difficulty": "easy"})
WRONG = REFERENCE.replace("r - b", "r + b")  # passes the first two asserts


def code_quad(y0: str = WRONG, span: tuple[int, int] | None = None, **meta) -> Quadruple:
    """A quadruple of PROBLEM; without `span` the flagged text is the line that WRONG gets wrong."""
    start = y0.find("r = r + b")
    span = span or ((start, start + 9) if start >= 0 else None)
    fields = {
        "task_id": "own/calc", "domain": "code", "split": "test", "horizon": 4, "edit_distance": 1,
        "error_tags": ["local_arithmetic"], "error_span": span and list(span), "teacher": "own", "y0_correct": False,
        "y1_correct": True, "is_human_audited": False, "tests": PROBLEM.tests, **meta,
    }  # fmt: skip
    return Quadruple(X, y0, "Line 4 is wrong: it uses the wrong operator. calc(9, 2) fails.", REFERENCE, fields)


def fenced(program: str) -> str:
    return f"It subtracts b.\n```python\n{program}\n```"


# tests that ask what f(2) is
VALUE = lambda x: {"asserts": [f"assert f(2) == {x!r}"]}


def programs_of(text: str) -> dict[str, str]:
    """Programs by name, each after a line `== name`."""
    return dict(part.split("\n", 1) for part in text.lstrip("\n=").removeprefix(" ").split("\n== "))


# ---- golden checkpoints ---------------------------------------------------------------------------------------------
GOLDEN = ROOT / "tests" / "golden"
IDS = json.loads((GOLDEN / "ids.json").read_text(encoding="utf-8"))


def edit(path: pathlib.Path, drop=(), **changes) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def refused(call, *words: str) -> str:
    """The message of the InputError that `call` raises: one line that has all the words."""
    with pytest.raises(InputError) as e:
        call()
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    return load_hf_tokenizer(directory, read_hf_config(directory).vocab_size)


@functools.cache
def qwen() -> Tokenizer:
    return load_tokenizer(GOLDEN / "qwen2")


@functools.cache
def mesh():
    return make_mesh("auto")


def assert_equal_trees(a, b) -> None:
    a, b = leaf_names(a), leaf_names(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)
