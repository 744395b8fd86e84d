"""Texts as arrays of fixed shape, and the order of the data.

pytest tests/test_batches.py
"""

import copy
import unicodedata

import numpy as np
import pytest
import tokenizers
from examples import TEXTS

from common.basics import InputError
from common.batches import (
    MAX_STEPS,
    data_indices,
    length_mask,
    pack_answers,
    pack_prompts,
    pack_revise,
    pack_steps,
    pack_trajectories,
    prompt_shape,
    right_pad,
)  # fmt: skip
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple
from common.tokenizer import Frame, Tokenizer


def test_right_pad_and_length_mask():
    """By hand: cut, padded, empty."""
    tokens, lengths = right_pad([[5, 6], [7, 8, 9, 1], []], 3, 4)
    assert tokens.tolist() == [[5, 6, 4], [7, 8, 9], [4, 4, 4]]
    assert lengths.tolist() == [2, 3, 0]
    assert tokens.dtype == lengths.dtype == np.int32
    mask = length_mask(lengths, 4)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert mask.dtype == np.float32


def test_pack_prompts_and_answers(tokenizer):
    """Prompts stand whole at the left; one that does not fit is refused. Answers end with the end token."""
    ids = [tokenizer.encode(t) for t in TEXTS]
    width = max(map(len, ids))
    batch = pack_prompts(tokenizer, TEXTS, width)
    assert batch["prompt_len"].tolist() == [len(i) for i in ids]
    assert [row[:n].tolist() for row, n in zip(batch["prompt"], batch["prompt_len"])] == ids
    with pytest.raises(InputError, match=rf"{width} tokens does not fit .* {width - 1}"):
        pack_prompts(tokenizer, TEXTS, width - 1)
    tokens, lengths = pack_answers(tokenizer, ["", TEXTS[0]], len(ids[0]))
    assert lengths.tolist() == [1, len(ids[0])]  # the second is cut: its end token has no room
    assert tokens[0, 0] == tokenizer.eos_id
    assert tokens[1].tolist() == ids[0]


def test_prompt_shape(tokenizer):
    """A multiple of 16 that holds the longest; over the limit, the message names the problem and the flag."""
    lengths = [len(tokenizer.encode(t)) for t in TEXTS]
    names, longest = ["own/a", "own/b", "own/c"], max(lengths)
    width = prompt_shape(tokenizer, TEXTS, names, longest)
    assert width % 16 == 0
    assert longest <= width < longest + 16
    culprit = names[lengths.index(longest)]
    with pytest.raises(InputError, match=rf"{culprit} has {longest} tokens.*--max_prompt_tokens {longest - 1}"):
        prompt_shape(tokenizer, TEXTS, names, longest - 1)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 12), (64, 1)])
def test_data_indices(n, batch):
    """Every epoch is a permutation; the rows of a step depend on (seed, step) alone."""
    steps = [data_indices(n, batch, 3, step) for step in range(3 * n)]
    rows = np.concatenate(steps)
    epochs = rows[: len(rows) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(e) for e in epochs[:3]}) == 3  # fresh orders
    for step in (2 * n, 5, 0):  # asked in any order
        np.testing.assert_array_equal(data_indices(n, batch, 3, step), steps[step])
    assert any((data_indices(n, batch, 4, step) != steps[step]).any() for step in range(n))


def test_pack_steps_worked_example(byte_tokenizer):
    """The docstring's text, a token a byte: the line break belongs to no step, nor does the end token."""
    tokens, lengths, steps = pack_steps(byte_tokenizer, ["2+3\n#### 5", ""], 12)
    assert lengths.tolist() == [11, 1] and tokens[0, 10] == tokens[1, 0] == byte_tokenizer.eos_id
    assert steps.shape == (2, MAX_STEPS, 12)
    assert steps[0, 0].tolist() == [1, 1, 1] + [0] * 9
    assert steps[0, 1].tolist() == [0] * 4 + [1] * 6 + [0] * 2
    assert not steps[0, 2:].any() and not steps[1].any()


def test_pack_steps_cuts_what_is_too_long(byte_tokenizer):
    """A step loses the tokens behind T; lines behind MAX_STEPS are no steps."""
    _, lengths, steps = pack_steps(byte_tokenizer, ["2+3\n#### 5", "\n".join("7" * (MAX_STEPS + 3))], 7)
    assert lengths.tolist() == [7, 7]
    assert steps[0, 1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert steps[1, :5].sum(-1).tolist() == [1, 1, 1, 1, 0]
    _, _, steps = pack_steps(byte_tokenizer, ["\n".join("7" * (MAX_STEPS + 3))], 80)
    assert (steps[0].sum(-1) == 1).all() and steps[0].sum() == MAX_STEPS


def test_pack_trajectories_worked_example(byte_tokenizer):
    """Two problems by hand: the docstring's, with its first step flagged; one whose y0 is right and that names none."""
    quads = [
        Quadruple("x", "2+3=6\n#### 6", "No: 2+3.", "2+3=5\n#### 5", {"error_span": [0, 5], "y0_correct": False}),
        Quadruple("xy", "1+1=2\n\n1+2=3\n#### 3", "Fine.", "#### 3", {"error_span": None, "y0_correct": True}),
    ]
    shapes = {"P_attempt": 90, "P_revise": 170, "T_replay": 24}
    revise = pack_revise(byte_tokenizer, quads, shapes)
    out = pack_trajectories(byte_tokenizer, quads, shapes, revise)
    assert {name: array.shape for name, array in out.items()} == {
        "attempt_prompt": (2, 90), "attempt_prompt_len": (2,), "y0": (2, 24), "y1": (2, 24),
        "y0_steps": (2, MAX_STEPS, 24), "y1_steps": (2, MAX_STEPS, 24), "y0_mask": (2, MAX_STEPS),
        "y1_mask": (2, MAX_STEPS), "flagged": (2, MAX_STEPS), "f_tokens": (2, 1, 170), "y1_tokens": (2, 24),
        "wrong": (2,),
    }  # fmt: skip
    assert out["attempt_prompt_len"].tolist() == [len(attempt_prompt("x")), len(attempt_prompt("xy"))]
    assert out["y0_mask"][:, :4].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert out["y1_mask"][:, :4].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert out["flagged"][:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert out["wrong"].tolist() == [1, 0]
    assert out["y1_tokens"].sum(1).tolist() == [len(quads[0].y1) + 1, len(quads[1].y1) + 1]  # with the end token
    for q, prompt, f_T in zip(quads, revise["prompt"], out["f_tokens"][:, 0]):
        assert byte_tokenizer.decode([prompt[f_T > 0].tolist()]) == [q.f]


def test_a_prompts_frame_moves_the_critique(byte_tokenizer):
    """With a chat frame around the prompt, of control tokens and of plain text, f_tokens still lie on f."""
    q = Quadruple("x", "2+3=6\n#### 6", "No.", "2+3=5\n#### 5", {"error_span": [0, 5], "y0_correct": False})
    shapes = {"P_attempt": 90, "P_revise": 170, "T_replay": 24}
    framed = copy.copy(byte_tokenizer)
    frames = Frame((0, 0, 0), "", "", (0,)), Frame((0,), "user\n", "\n\nNo.", (0, 0)), Frame((), "No.", "No.", ())
    for frame in frames:
        framed.frame = frame
        revise = pack_revise(framed, [q], shapes)
        out = pack_trajectories(framed, [q], shapes, revise)
        on = out["f_tokens"][0, 0] > 0
        assert framed.decode([revise["prompt"][0][on].tolist()]) == ["No."]
        at = revise_prompt(q.x, q.y0, "\0").index("\0") + len(frame.prefix) + len(frame.before)
        assert np.flatnonzero(on).tolist() == [at, at + 1, at + 2]


@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFC()])
def test_decomposed_text_moves_no_span(byte_tokenizer, normalizer):
    """Qwen's NFC makes texts shorter: steps, f and what f points at stay on their words."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer.inner.to_str())
    if normalizer is not None:
        inner.normalizer = normalizer
    tokenizer, nfd = Tokenizer(inner), lambda text: unicodedata.normalize("NFD", text)
    y0, y1 = nfd("Zoé a 2 cafés.\n2+3=6\n#### 6"), nfd("Zoé a 2 cafés.\n2+3=5\n#### 5")
    at = y0.index("2+3=6")
    q = Quadruple(nfd("Où ?"), y0, nfd("Zoé se trompe."), y1, {"error_span": [at, at + 5], "y0_correct": False})
    shapes = {"P_attempt": 120, "P_revise": 220, "T_replay": 48}
    revise = pack_revise(tokenizer, [q], shapes)
    out = pack_trajectories(tokenizer, [q], shapes, revise)
    spelled = lambda tokens, on: unicodedata.normalize("NFD", tokenizer.decode([tokens[on > 0].tolist()])[0])
    assert spelled(revise["prompt"][0], out["f_tokens"][0, 0]) == q.f
    for name, text in (("y0", y0), ("y1", y1)):
        assert [spelled(out[name][0], on) for on in out[f"{name}_steps"][0, :3]] == text.split("\n")
    assert out["flagged"][0, :4].tolist() == [0, 1, 0, 0]
