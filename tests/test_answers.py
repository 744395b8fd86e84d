"""The answer fields of completions and their score, by hand.

pytest tests/test_answers.py
"""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from test_values import NOT_READ, READ

from common.answers import answer_fields, final_answers, has_unread, score_math
from common.basics import InputError
from common.rewards import format_valid
from common.verifier import show

# completion, score, format-valid; the reference answer is 1000
TABLE = [
    ("#### 1000", 1, True),
    ("#### 1,000", 1, True),
    ("#### $1000", 1, True),
    ("#### 1000.", 1, True),
    ("#### 1000.00", 1, True),
    ("#### **1000**", 1, True),
    ("####1000", 1, True),
    ("\\boxed{1000}", 1, True),
    ("#### 1000 dollars", 1, True),
    ("so 1000", 0, False),
    ("so 1000 (step 3)", 0, False),
    ("#### 10", 0, True),
    ("#### 100000", 0, True),
    ("#### -1000", 0, True),
    ("#### 7\n#### 1000", 0, False),
    ("She sells 500 twice, which makes 1000, and then she", 0, False),  # truncated before the marker
]


@pytest.mark.parametrize(("completion", "score", "valid"), TABLE)
def test_grader_table(completion, score, valid):
    """The grader self-test table."""
    assert score_math(completion, "1000") == score
    assert format_valid(completion, "math") is valid


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("#### 1,234", "1234", 1),
        ("#### 1234", "1,234", 1),
        ("#### $18.00", "18", 1),
        ("#### 18.", "18", 1),
        ("#### 18.01", "18", 0),
        ("#### -3", "-3", 1),
        ("#### \u22123", "-3", 1),
        ("#### -$3", "-3", 1),
        ("#### -3", "3", 0),
        ("#### -0", "0", 1),
        ("#### 1/2", "0.5", 1),
        ("#### .5", "1/2", 1),
        ("#### 0.5", "0.50", 1),
        ("#### 1/3", "0.33", 0),
        ("#### 50%", "0.5", 0),
        ("#### 18 eggs a day", "18", 1),
        ("#### 18km", "18", 1),
        ("#### __18__ eggs", "18", 1),
        ("**#### 18**", "18", 1),
        ("\\boxed{18}", "18", 1),
        ("\\boxed{}", "18", 0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("\\boxed{-\\dfrac{1}{2}}", "-0.5", 1),
        ("\\boxed{\\$1{,}234\\text{ dollars}}", "1234", 1),
        ("<answer>18</answer>", "18", 1),
        ("<answer>\n$18\n</answer>", "18", 1),
        ("<answer>17</answer>", "18", 0),
        ("<answer>18", "18", 0),
        ("\\boxed{18}\n#### 19", "18", 0),
        ("\\boxed{18}\n#### 19", "19", 0),
        ("#### 18 or 19", "18", 0),
        ("#### 18\n\\boxed{18.0} <answer>$18</answer>", "18", 1),
        ("", "18", 0),
        ("####", "18", 0),
        ("#### \n18", "18", 1),
        ("##### 18", "18", 0),
        ("### 18", "18", 0),
        ("#### eighteen", "18", 0),
        ("#### CO2", "2", 0),
        ("#### 5/0", "5", 0),
        ("#### 0/0", "0", 0),
        ("#### 99**98**97", "99", 0),
        ("#### __import__('os').getpid()", "1", 0),
        ("#### " + "9" * 30, "9" * 30, 1),
        ("#### " + "9" * 31, "9" * 31 + "0", 0),
        ("#### " + "1" * 10_000, "1", 0),
        ("#### 1" + ",111" * 3_000, "1", 0),
    ],
)
def test_score_math(completion, answer, score):
    """Ways to write a final answer that count, and ways that do not."""
    gold = answer if len(answer) <= 30 else "1"
    assert score_math(completion, gold) == score


@pytest.mark.parametrize(
    ("completion", "answer", "pieces"),
    [
        ("#### 1.5e3", "1500", ("1", "1.5", "3")),
        ("#### 1,000e3", "1000000", ("1", "1000")),
        ("#### 2^10", "1024", ("2", "10")),
        ("#### 10^3", "1000", ("10", "3")),
        ("#### 1/2^3", "0.125", ("1", "3", "0.5")),
    ],
)
def test_a_piece_of_a_number_is_not_the_answer(completion, answer, pieces):
    assert score_math(completion, answer) == 1
    assert [score_math(completion, piece) for piece in pieces] == [0] * len(pieces)


MARKED = ("#### {}", "So, in the end:\n####{}\nDone", "\\boxed{{{}}}", "<answer>{}</answer>", "####\n\n{}\n")


@pytest.mark.parametrize("marked", MARKED)
def test_every_form_counts_behind_every_marker(marked):
    """What the grammar reads scores, and what it does not is no answer, and is known to be unread."""
    for field, value in READ.items():
        y = marked.format(field)
        assert final_answers(y) == [value] and not has_unread(y), y
        assert score_math(y, show(Fraction(value))[:30]) == (len(show(Fraction(value))) <= 30), y
    for field in NOT_READ:
        if "\n" in field and "####" in marked:
            continue
        y = marked.format(field)
        assert final_answers(y) == [] and not format_valid(y, "math"), y
        assert has_unread(y) or field in ("", "Step 1"), y


# completion -> its final answers, None where a field was not read
FIELDS = {
    "#### 18 #### 18": [18],
    "#### 18\n#### 19": [18, 19],
    "#### 18 #### or 19": None,
    "#### 17 or 18\n#### 18": None,
    "#### not 5": None,
    "#### 18 ####\nThe next line has 5": [18],  # closed, as a heading may be
    "#### 18 eggs # a comment with 5": [18],
    "#### 18<|im_end|>": [18],
    # the line below
    "####\n\n**18**": [18],
    "#### Final Answer\n18": [18],
    "**#### Answer:**\n$18": [18],
    "####\n#### 18": [18],
    "#### 17\n####": None,
    # headings
    "#### Step 1\nHe has 9.\n#### 18": [18],
    "#### Step 1: 3+4=7\nThat is all": [],
    "#### Step 1: 3 eggs\n#### Step 2: 4 eggs\n\\boxed{18}": [18],
    "#### 1. Count the eggs\nso\n#### 2. Sell them\nso\n#### 18": [18],
    "#### 1. Count the eggs\nso\n#### 2. Sell them\nso \\boxed{18}": [18],
    "#### Solution\n16-3-4=9\n#### 18": [18],
    "#### 18\n\n#### Explanation\nWords": [18],
    "#### Final Answer\nJanet sells 9 eggs at 2 each, so \\boxed{18}.": [18],
    "#### Total: 17\n#### 18": [17, 18],  # it states a value
    "#### eighteen": None,
    # boxes
    "\\boxed{17} then \\boxed{18": None,
    "\\boxed{17} then \\boxed{}": None,
    "\\boxed{17} then \\boxed 18": None,
    "Put it into \\boxed{}. So \\boxed{18}": [18],
    "\\boxed{x} is 3, so \\boxed{18}": None,
    "\\boxed{\\boxed{18}}": [18],
    "\\boxed{\n18\n}": [18],
    "\\fbox{18}": [18],
    "#### \\boxed{18}": [18],
    "#### The answer is $\\boxed{18}$.": [18],
    "#### -\\boxed{18}": None,
    "9 * 2 = 18\n\\boxed{18}": [18],
    "**\\boxed{18}**": [18],
    "It is \\(\\boxed{18}\\) dollars, = $\\boxed{18}$ => \\[\\boxed{18}\\]": [18],
    "\\boxed{18}\\%, \\boxed{18}^\\circ": [18],
    # a box that is a piece of what is said
    "-\\boxed{5}": None,
    "$-\\boxed{5}$": None,
    "2*\\boxed{9}": None,
    "2\\boxed{9}": None,
    "x > \\boxed{5}": None,
    "not \\boxed{5}": None,
    "about \\boxed{5}": None,
    "\\boxed{5}00": None,
    "\\boxed{5}^2": None,
    "\\boxed{5} million": None,
    "\\boxed{5} + 3": None,
    "\\boxed{5} or 6": None,
    # answer elements
    "<answer>\n18\n</answer>": [18],
    "<answer>#### 18\n</answer>": [18],
    "#### <answer>18</answer>": [18],
    "<answer>17<answer>18</answer>": None,
    "<answer>17</answer> <answer>18": None,
    "<answer>It has 3 and 4,\nso \\boxed{18}</answer>": [18],
    "<answer></answer> is where it goes: <answer>18</answer>": [18],
    # thinking
    "<think>#### 17</think>\n#### 18": [18],
    "<think>\\boxed{17}</think><answer>18</answer>": [18],
    "<think>#### 17": [],
    "It is #### 17 </think>\n#### 18": [18],  # the prompt has opened the block
    "#### 18\n<think>\\boxed{17}</think>": [18],
    "<think>a <think>b</think> #### 17</think> #### 18": [18],
    "<THINK>#### 17</THINK>": [],
    # no fields
    "": [],
    "The answer is 18.": [],
    "##### 18\n### 18\n# 18": [],
    "1 < 2 and boxed in: 18": [],
}


@pytest.mark.parametrize(("completion", "answers"), FIELDS.items(), ids=map(repr, FIELDS))
def test_fields(completion, answers):
    assert final_answers(completion) == (answers or [])
    assert has_unread(completion) is (answers is None)
    assert format_valid(completion, "math") is (len(answers or []) == 1)


def test_fields_know_their_place():
    y = "<think>#### 1</think>\n#### $18 a day\n<answer> 18 </answer> \\boxed{18}"
    assert [y[field.start : field.end] for field in answer_fields(y)] == ["$18 a day", "18 ", "18"]


REFERENCES = [  # of GSM8K
    ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
    ("In total 25,000+40,000 = <<25000+40000=65000>>65,000\n#### 65,000", "65000"),
    ("So he is <<4-7=-3>>-3 ahead.\n#### -3", "-3"),
    ("Each costs 5/2=$<<5/2=2.5>>2.50\n#### 2.50", "2.5"),
]


@pytest.mark.parametrize(("reference", "answer"), REFERENCES)
def test_references_score(reference, answer):
    assert score_math(reference, answer) == 1 and format_valid(reference, "math")


@pytest.mark.parametrize("answer", ["", "many", "1 or 2"])
def test_score_math_refuses_a_bad_reference(answer):
    """A reference answer that is not one number is an error, not a score of 0."""
    with pytest.raises(InputError, match="not a single number"):
        score_math("#### 1", answer)


def test_works_in_a_thread():
    """No signals and no state: other threads get the same scores."""
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda row: score_math(row[0], "1000"), TABLE * 20))
    assert scores == [row[1] for row in TABLE] * 20


MARKS = ["####", "#### ", "####\n", "#### 1\n", "#### a\n", "#### Answer\n", "\\boxed{", "\\boxed", "\\boxed{1}",
         "\\boxed{x}", "\\boxed{}", "<answer>", "</answer>", "<answer>1</answer>", "<think>", "</think>",
         "<think></think>", "{", "}", "\\fbox{a ", "a\\boxed{1} or ", "#### \\boxed{1} "]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_a_long_row_of_marks_is_read_in_one_pass(mark):
    """It comes back with a score (if each mark looked at all the others, it would take for ever)."""
    assert score_math(mark * (300_000 // len(mark)), "57") == 0
