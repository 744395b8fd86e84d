"""Outcome, process, uptake and step rewards of math and of programs; what a harness error does to them.

pytest tests/test_rewards.py
"""

import math

import numpy as np
import pytest
from examples import BAD, OTHER, QUAD, REFERENCE, ROOT, WRONG, Y1, code_quad, fenced

import b2_grpo
from common.basics import InputError
from common.batches import pack_answers, right_pad
from common.rewards import (
    format_valid,
    from_first_error,
    outcome_scores,
    process_scores,
    step_rewards,
    uptake_scores,
)
from common.tokenizer import train_tokenizer

# ---- math -----------------------------------------------------------------------------------------------------------
GROUPS = [Y1, BAD, "#### 5", "<<4+3=7>>7\n#### 7", "#### 5", "<<4+3=7>>7\n<<7+0=7>>7\n#### 7"]


def test_outcome_and_process_scores():
    """Two prompts with three completions each: row b belongs to quadruple b."""
    outcome, process = outcome_scores(GROUPS, [QUAD, OTHER]), process_scores(GROUPS, [QUAD, OTHER])
    assert outcome.dtype == process.dtype == np.float32
    np.testing.assert_array_equal(outcome, [[1, 0, 1], [1, 0, 1]])
    np.testing.assert_allclose(process, [[1, 0, 1 / 2], [2 / 3, 0, 1]], rtol=1e-6)


def test_step_rewards_by_hand(byte_tokenizer):
    """Ends on the last byte of each line, rewards up to the first step that does not hold, nothing after the end."""
    late = "<<4+3=7>>7\n<<7+0=8>>8\n#### 7"  # the second step is wrong, the answer right
    texts, T = [Y1, BAD, late, ""], 32
    ids = [[*byte_tokenizer.encode(t), byte_tokenizer.eos_id] for t in texts]
    tokens, lengths = right_pad(ids, T, byte_tokenizer.pad_id)
    reward, end = step_rewards(byte_tokenizer, tokens, lengths, texts, [QUAD, OTHER])
    assert reward.shape == end.shape == (2, 2, T)
    positions = lambda row: np.flatnonzero(row).tolist()
    assert [positions(r) for r in end.reshape(4, T)] == [[13, 20], [13, 20], [9, 20, 27], []]
    assert [positions(r) for r in reward.reshape(4, T)] == [[13, 20], [], [9], []]
    assert set(np.unique(reward)) == set(np.unique(end)) == {0.0, 1.0}


def test_from_first_error_by_hand(byte_tokenizer):
    """From the first byte of the first wrong line to the end of the row; all of it where no line is found wrong."""
    late = "<<4+3=7>>7\n<<7+0=8>>8\n#### 7"  # its arithmetic is wrong in the second line, byte 11; the answer right
    final = "So <<2+3=5>>5.\n#### 6"  # only the answer line, byte 15
    prose = "It is five."  # not right, and nothing that a rule can check
    texts, T = [Y1, final, prose, BAD, late, ""], 32
    ids = [[*byte_tokenizer.encode(t), byte_tokenizer.eos_id] for t in texts]
    tokens, lengths = right_pad(ids, T, byte_tokenizer.pad_id)
    mask = from_first_error(byte_tokenizer, tokens, lengths, texts, [QUAD, OTHER])
    assert mask.shape == (2, 3, T) and mask.dtype == np.float32 and set(np.unique(mask)) == {0.0, 1.0}
    starts = [0, 15, 0, 0, 11, 0]
    np.testing.assert_array_equal(mask.reshape(6, T), np.arange(T) >= np.array(starts)[:, None])


def test_from_first_error_of_merged_tokens():
    """With a trained tokenizer the first is the token that holds the line's first character."""
    text = "na\u00efve: <<2+3=5>>5.\n#### 6"
    tokenizer = train_tokenizer([text, Y1, BAD] * 20, 300)
    tokens, lengths = pack_answers(tokenizer, [text], 40)
    first = int(from_first_error(tokenizer, tokens, lengths, [text], [QUAD]).argmax())
    before, upto = tokenizer.decode([tokens[0, :first].tolist(), tokens[0, : first + 1].tolist()])
    assert 0 < first < lengths[0] and len(before) <= text.index("####") < len(upto)


def test_step_rewards_of_merged_tokens():
    """With a trained tokenizer the end is the token that holds the line's last character."""
    tokenizer = train_tokenizer([Y1, BAD, "na\u00efve\n"] * 20, 300)
    text = "na\u00efve: <<2+3=5>>5.\n#### 5"
    tokens, lengths = pack_answers(tokenizer, [text], 40)
    _, end = step_rewards(tokenizer, tokens, lengths, [text], [QUAD])
    for at, prefix in zip(np.flatnonzero(end[0, 0]), ("na\u00efve: <<2+3=5>>5.", text), strict=True):
        before, upto = tokenizer.decode([tokens[0, :at].tolist(), tokens[0, : at + 1].tolist()])
        assert not before.startswith(prefix)
        assert upto.startswith(prefix)


# ---- programs -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("confined")
def test_outcome_and_process_scores_of_programs():
    """All tests or nothing; and the fraction of them. A program may stand in a fence."""
    some = [REFERENCE, WRONG, fenced(REFERENCE), "def calc(a, b):", "", "def calc(a, b):\n    return 10"]
    quads = [code_quad(), code_quad()]
    outcome, process = outcome_scores(some, quads), process_scores(some, quads)
    np.testing.assert_array_equal(outcome, [[1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(process, [[1, 2 / 4, 1], [0, 0, 2 / 4]])
    assert outcome.dtype == process.dtype == np.float32


NEGATED = WRONG.replace("    r = a", "    b = -b\n    r = a")
UPTAKES = {  # what the completion does: (completion, expected)
    "the reference": (REFERENCE, 1.0),
    "the reference in a fence": (fenced(REFERENCE), 1.0),
    "the attempt again": (WRONG, 0.0),
    "the attempt in other white space": (WRONG.replace("r + b", "r +  b  # better"), 0.0),
    "a comment": (WRONG.replace("    return r", "    # better\n    return r"), 0.0),
    "changed, no test more": (WRONG.replace("r + b", "r * b"), 0.0),
    "changed, one test more": (WRONG.replace("r + b", "10"), 1.0),
    "all tests, but by a change elsewhere": (NEGATED, 0.0),
    "a new line directly before it": (WRONG.replace("        r", "        b = -b\n        r"), 1.0),
    "another way": ("def calc(a, b):\n    return a + 3 - b * (a > 7)", 1.0),
    "nothing": ("", 0.0),
}  # fmt: skip


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize("name", UPTAKES)
def test_uptake_by_hand(name):
    completion, expected = UPTAKES[name]
    assert uptake_scores([completion], [code_quad()]).tolist() == [[expected]]


@pytest.mark.usefixtures("confined")
def test_uptake_of_a_missing_statement():
    """The flagged line stays; what was missing beside it has to come back, and not elsewhere."""
    y0 = "def calc(a, b):\n    r = a + 3\n    return r"
    q = code_quad(y0, (y0.index("return"), len(y0)))
    elsewhere = "def calc(a, b):\n    a = a - b if a > 7 else a\n    r = a + 3\n    return r"
    assert uptake_scores([REFERENCE, y0, elsewhere], [q]).tolist() == [[1, 0, 0]]
    assert outcome_scores([elsewhere], [q]).tolist() == [[1]]


def test_uptake_without_a_span_is_nothing(made):
    assert uptake_scores([REFERENCE], [code_quad("def calc(a, b):\n    return a")]).tolist() == [[0.0]]
    assert uptake_scores([q.y1 for q in made], made).tolist() == [[1.0]] * len(made)
    assert uptake_scores([q.y0 for q in made], made).tolist() == [[0.0]] * len(made)


def test_programs_run_in_one_batch_and_once(broken_harness):
    """Outcome, process and uptake of one rollout: one run per different program, y0 among them."""
    some = [REFERENCE, WRONG, REFERENCE, "x = 1"]
    quads = [code_quad(), code_quad()]
    outcome_scores(some, quads)
    assert [len(ran) for ran in broken_harness] == [3]
    process_scores(some, quads)
    uptake_scores(some, quads)
    assert [len(ran) for ran in broken_harness if ran] == [3]


def test_format_is_a_program_that_can_be_read():
    for text, valid in ((REFERENCE, True), (fenced(WRONG), True), ("", False), ("def f(:", False), ("# no", False)):
        assert format_valid(text, "code") is valid, text
    assert not format_valid("(" * 5000, "code") and not format_valid("x = '\0'", "code")


def test_step_rewards_are_for_math():
    with pytest.raises(InputError, match="math only"):
        step_rewards(None, np.zeros((1, 4), int), np.array([4]), [REFERENCE], [code_quad()])
    with pytest.raises(InputError, match="errors of single steps: math only"):
        from_first_error(None, np.zeros((1, 4), int), np.array([4]), [REFERENCE], [code_quad()])


# ---- harness errors -------------------------------------------------------------------------------------------------
def test_a_harness_error_is_no_score(broken_harness):
    """NaN in all three rewards, counted, tried twice and not remembered."""
    some, q = [REFERENCE, "broken = 1"], code_quad()
    for scores in (outcome_scores, process_scores, uptake_scores):
        values = scores(some, [q])
        assert math.isnan(values[0, 1]) and values[0, 0] == 1.0
    tries = [ran for ran in broken_harness if "broken = 1" in ran]
    assert len(tries) == 6  # two for each kind of score
    assert math.isnan(uptake_scores([REFERENCE], [code_quad(y0="broken = 1", span=(0, 6))])[0, 0])


def test_a_harness_that_runs_nothing_stops_the_run(broken_harness):
    with pytest.raises(InputError, match="none of 8 programs could be run: no fork"):
        outcome_scores([f"broken = {i}" for i in range(8)], [code_quad()])


def test_unscored_samples_are_masked():
    """As the scripts do it: out of loss and baseline; the group's other rewards are centred without it."""
    reward_BG, truncated_BG = np.array([[1.0, np.nan, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.0, 1.0]])
    valid_BG = ~np.isnan(reward_BG) * (1.0 - truncated_BG)
    adv_BG = b2_grpo.group_advantages(np.nan_to_num(reward_BG), valid_BG, "center")
    np.testing.assert_allclose(adv_BG, [[0.5, 0, -0.5, 0]])
    for script in ("b2_grpo", "b3_grpo_verifier", "b4_grpo_critique", "b5_cts"):
        text = (ROOT / f"{script}.py").read_text()
        assert "valid_BG = ~np.isnan(reward_BG) * (" in text and "np.nan_to_num(reward_BG), valid_BG" in text
