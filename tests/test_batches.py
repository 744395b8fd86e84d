"""Texts as arrays of fixed shape, and the order of the data.

pytest tests/test_batches.py
"""

import numpy as np
import pytest
from examples import TEXTS

from common.basics import InputError
from common.batches import data_indices, length_mask, pack_answers, pack_prompts, prompt_shape, right_pad


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
