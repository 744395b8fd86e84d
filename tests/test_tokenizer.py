"""Byte-level tokenizers: texts and back, and which tokens share bytes with a span of a text.

pytest tests/test_tokenizer.py
"""

import copy
import itertools
import unicodedata

import numpy as np
import pytest
import tokenizers
from examples import TEXTS

from common.tokenizer import Frame, Tokenizer, normal_span, train_tokenizer

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


# ---- normalizers ----------------------------------------------------------------------------------------------------
NFC, SEQUENCE = tokenizers.normalizers.NFC, tokenizers.normalizers.Sequence
NORMALIZERS = {  # as tokenizer.json of the supported families has them
    "Qwen2, Qwen3": NFC(), "Llama-3, SmolLM2": None, "NFC in a list": SEQUENCE([NFC()]), "an empty list": SEQUENCE([]),
}  # fmt: skip
ACCENTS = unicodedata.normalize("NFD", "\u00e9\u00e9\u00e9\u00e9\u00e9 ") + "wrong step"


def normalizing(normalizer) -> Tokenizer:
    """A token a byte, behind a normalizer."""
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(["x"], 258).inner.to_str())
    if normalizer is not None:
        inner.normalizer = normalizer
    return Tokenizer(inner)


def marked(tokenizer: Tokenizer, ids: list[int], on) -> str:
    return tokenizer.decode([[i for i, here in zip(ids, on) if here]])[0]


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_span_passes_the_normalizer(name):
    """The tokens of a decomposed text are those of the composed one where NFC acts, and the span stays on its words."""
    tokenizer = normalizing(NORMALIZERS[name])
    ids = tokenizer.encode(ACCENTS)
    assert len(ids) == 5 * (2 if "NFC" in name or "Qwen" in name else 3) + len(" wrong step")
    at = ACCENTS.index("wrong")
    spans = [(at, at + 5), (at - 1, at), (0, 2), (8, 10), (0, len(ACCENTS)), (len(ACCENTS) - 1, len(ACCENTS))]
    on = tokenizer.overlap(ids, ACCENTS, spans)
    e = tokenizer.decode([ids])[0][: 1 if len(ids) == 21 else 2]
    assert [marked(tokenizer, ids, row) for row in on] == ["wrong", " ", e, e, tokenizer.decode([ids])[0], "p"]
    # cut, and with an end token behind, as answers are packed
    assert marked(tokenizer, ids[:-4], tokenizer.overlap(ids[:-4], ACCENTS, spans[:1])[0]) == "wrong"
    longer = [*ids, tokenizer.eos_id]
    assert marked(tokenizer, longer, tokenizer.overlap(longer, ACCENTS, spans[:1])[0]) == "wrong"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_sampled_ids_pass_no_normalizer(name):
    """A model may write a decomposed text: no normalizer acts on it, its tokens' own bytes place the span."""
    tokenizer = normalizing(NORMALIZERS[name])
    ids = normalizing(None).encode(ACCENTS)
    (text,) = tokenizer.decode([ids])
    assert text == ACCENTS and (tokenizer.encode(text) == ids) == (name in ("Llama-3, SmolLM2", "an empty list"))
    at = text.index("wrong")
    on = tokenizer.overlap(ids, text, [(at, at + 5), (1, 2)])
    assert [marked(tokenizer, ids, row) for row in on] == ["wrong", "\u0301"]
    lone = [next(i for i, raw in enumerate(tokenizer.bytes_V) if raw == b"\xe2"), *ids]  # and bytes that are no UTF-8
    (text,) = tokenizer.decode([lone])
    on = tokenizer.overlap(lone, text, [(0, 1), (at + 1, at + 6)])
    assert text[0] == "\ufffd" and on[0].tolist() == [1] + [0] * len(ids) and marked(tokenizer, lone, on[1]) == "wrong"


def test_normal_span_against_pieces():
    """Texts of pieces that NFC composes, reorders, takes apart or leaves: a span of whole pieces becomes the span of
    what NFC makes of them."""
    taken_apart, whole = ["\u0958", "\u0344", "\u212b"], ["a", "\u00e9", " ", "\n", "\u4e2d", "\U0001f600"]
    composed = ["e\u0301", "a\u0331\u0301", "a\u0301\u0328", "\u1112\u1161\u11ab", "\u1112\u1161"]
    pieces = [*taken_apart, *whole, *composed, "q\u0307\u0323", "o\u031b\u0323"]
    rng, nfc = np.random.default_rng(0), lambda text: unicodedata.normalize("NFC", text)
    for _ in range(200):
        some = [pieces[i] for i in rng.integers(0, len(pieces), rng.integers(1, 9))]
        some = [piece for k, piece in enumerate(some) if k == 0 or not unicodedata.combining(nfc(piece)[0])]
        text, made = "".join(some), "".join(map(nfc, some))
        assert nfc(text) == made
        ends = [0, *itertools.accumulate(map(len, some))]
        new = [0, *itertools.accumulate(len(nfc(piece)) for piece in some)]
        for a in range(len(some)):
            for b in range(a + 1, len(some) + 1):
                assert normal_span(NFC(), text, (ends[a], ends[b])) == (new[a], new[b]), ascii(text)
    assert normal_span(NFC(), "e\u0301a", (1, 3)) == (0, 2)  # the docstring's
    assert normal_span(NFC(), "", (0, 0)) == (0, 0)


# ---- the frame of a prompt ------------------------------------------------------------------------------------------
def test_a_message_is_tokenized_with_the_plain_text_around_it(tokenizer):
    framed = copy.copy(tokenizer)
    framed.frame = Frame((1,), "Q: ", "\n\nA:", (0, 1))
    whole = tokenizer.encode("Q: 48/2\n\n\nA:")
    assert framed.encode_prompt("48/2\n") == [1, *whole, 0, 1]
    assert framed.encode_prompts(["", "48/2\n"]) == [[1, *tokenizer.encode("Q: \n\nA:"), 0, 1], [1, *whole, 0, 1]]


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("eats", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("around", [("", ""), ("Q:\n", "\n\nA:"), (" ", " "), ("", " \n")])
def test_prompt_overlap_follows_what_is_stripped(byte_tokenizer, strip, eats, around):
    """A token a byte: the marked tokens spell what is left of the span, and none of the frame."""
    framed, text = copy.copy(byte_tokenizer), " \n 2+2 = 5 \n"
    framed.frame = Frame((1,), *around, (0, 1), strip, eats)
    ids = framed.encode_prompt(text)
    body = around[0] + (text.strip() if strip else text) + around[1]
    body = body.lstrip() if eats[0] else body
    body = body.rstrip() if eats[1] else body
    assert ids == [1, *byte_tokenizer.encode(body), 0, 1]
    left = text.lstrip() if strip or (eats[0] and not around[0].strip()) else text
    left = left.rstrip() if strip or (eats[1] and not around[1].strip()) else left
    first = body.index(left) + 1  # behind the control token
    for span, words in (((3, 6), "2+2"), ((9, 10), "5"), ((3, 10), text[3:10]), ((0, len(text)), left)):
        on = framed.prompt_overlap(ids, text, [span])[0]
        assert marked(framed, ids, on) == words
        assert np.flatnonzero(on)[0] == first + left.index(words)


def test_training_is_deterministic(tokenizer):
    """The same texts give the same tokenizer, other texts another one."""
    assert train_tokenizer(TEXTS * 3, 330).sha256() == tokenizer.sha256()
    assert train_tokenizer(TEXTS[:1] * 3, 270).sha256() != tokenizer.sha256()
    assert tokenizer.vocab_size == 330
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_nano_tokenizer_has_no_frame(tokenizer):
    assert (tokenizer.frame, tokenizer.eos_ids) == (((), "", "", (), False, (False, False)), (tokenizer.eos_id,))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode_prompt(" a <eos>\n") == tokenizer.encode(" a <eos>\n")
