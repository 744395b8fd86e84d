"""Byte-level tokenizers: texts and back, and which tokens share bytes with a span of a text.

pytest tests/test_tokenizer.py
"""

import numpy as np
import pytest
from examples import TEXTS

from common.tokenizer import Tokenizer, train_tokenizer

ODD = [
    "",
    " ",
    "\n\n",
    "  two  spaces ",
    "1234567",
    "\u00e9\u4e2d\U0001f600\u200d",
    "tab\tand\r\nreturn",
    "<<1+1=2>>2 #### 2",
]


def token_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    """Bytes of each token by GPT-2's byte table, written out anew."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in keep} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in keep)}
    special = {tokenizer.pad_id, tokenizer.eos_id}
    return [b"" if i in special else bytes(table[c] for c in tokenizer.inner.id_to_token(i)) for i in ids]


def naive_overlap(pieces: list[bytes], text: str, spans) -> np.ndarray:
    """Walk over bytes: which token and which character each belongs to."""
    token_of = [t for t, piece in enumerate(pieces) for _ in piece]
    char_of = [c for c, char in enumerate(text) for _ in char.encode()]
    out = np.zeros((len(spans), len(pieces)), np.float32)
    for t, c in zip(token_of, char_of, strict=True):
        for s, (a, b) in enumerate(spans):
            out[s, t] = max(out[s, t], a <= c < b)
    return out


@pytest.mark.parametrize("text", TEXTS + ODD)
def test_round_trip_of_texts(tokenizer, text):
    """Every text comes back, alone, in a batch and with the end token behind it."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode([ids, [*ids, tokenizer.eos_id], []]) == [text, text, ""]
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)


def test_control_tokens_cannot_be_written_in_text(tokenizer):
    """A text that spells a control token is text."""
    ids = tokenizer.encode("a<eos>b<pad>")
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode([ids]) == ["a<eos>b<pad>"]


def test_numbers_are_split_into_at_most_two_digits(tokenizer):
    """No token holds more than two digits."""
    assert max(sum(c.isdigit() for c in tokenizer.inner.id_to_token(i)) for i in range(tokenizer.vocab_size)) <= 2


@pytest.mark.parametrize("text", TEXTS + ODD)
def test_overlap_against_a_walk_over_bytes(tokenizer, text):
    """Random spans, for the ids of `encode` and for ids it would never give."""
    rng = np.random.default_rng(len(text))
    ends = np.sort(rng.integers(0, len(text) + 1, (12, 2)), axis=1)
    spans = [(int(a), int(b)) for a, b in ends] + [(0, len(text)), (0, 0)]
    for ids in (tokenizer.encode(text), [i for c in text for i in tokenizer.encode(c)]):
        got = tokenizer.overlap(ids, text, spans)
        assert got.shape == (len(spans), len(ids))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, naive_overlap(token_bytes(tokenizer, ids), text, spans))


def test_overlap_worked_example(tokenizer):
    """The docstring's: tokens "ab", "c d", "e" of "abc de" - here with bytes for tokens, and no spans at all."""
    one = train_tokenizer(["x"], 258)  # only bytes
    expected = [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert one.overlap(one.encode("abc de"), "abc de", [(0, 3), (5, 6)]).tolist() == expected
    assert one.overlap(one.encode("abc"), "abc", []).shape == (0, 3)
    assert tokenizer.overlap([], "", [(0, 0)]).shape == (1, 0)


def test_overlap_gives_nothing_to_control_tokens(tokenizer):
    """A sampled <pad> in the middle and <eos> at the end share no byte with the text."""
    ids = [*tokenizer.encode("a"), tokenizer.pad_id, *tokenizer.encode("b"), tokenizer.eos_id]
    assert tokenizer.overlap(ids, "ab", [(0, 2)]).tolist() == [[1, 0, 1, 0]]


def test_overlap_after_invalid_bytes(tokenizer):
    """Sampled bytes that are no UTF-8 decode to U+FFFD, which is three bytes long; what follows must not shift."""
    lone = next(i for i in range(tokenizer.vocab_size) if token_bytes(tokenizer, [i]) == [b"\xe2"])
    ids = [lone, *tokenizer.encode("\n"), *tokenizer.encode("a"), *tokenizer.encode("b")]
    (text,) = tokenizer.decode([ids])
    assert text == "\ufffd\nab"
    assert tokenizer.overlap(ids, text, [(0, 1), (2, 3), (3, 4)]).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_training_is_deterministic(tokenizer):
    """The same texts give the same tokenizer, other texts another one."""
    assert train_tokenizer(TEXTS * 3, 330).sha256() == tokenizer.sha256()
    assert train_tokenizer(TEXTS[:1] * 3, 270).sha256() != tokenizer.sha256()
    assert tokenizer.vocab_size == 330
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_nano_tokenizer_has_no_frame(tokenizer):
    assert (tokenizer.prompt_prefix, tokenizer.prompt_suffix, tokenizer.eos_ids) == ([], [], (tokenizer.eos_id,))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode_prompt(" a <eos>\n") == tokenizer.encode(" a <eos>\n")
