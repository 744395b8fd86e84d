"""Byte-level tokenizers, the nano model's own and a checkpoint's behind one interface, with the byte offsets that place
steps and spans among tokens. Used by batches, rewards, base, chat and what takes a tokenizer; knows no model."""

import bisect
import codecs
import itertools
import json
from typing import NamedTuple

import numpy as np
import tokenizers

from common.basics import sha256

_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
_BYTE = {chr(b): b for b in _KEPT} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_KEPT}))}
# Bytes that are no UTF-8 decode to half a surrogate pair, which no text has; its number says how many they are.
codecs.register_error("cts_half", lambda e: (chr(0xD800 + e.end - e.start), e.end))


def char_starts(raw: bytes) -> list[int]:
    """Byte offsets of the characters of `raw` decoded with U+FFFD for what is no UTF-8, and its length at the end."""
    text = raw.decode(errors="cts_half")
    sizes = [ord(c) - 0xD800 if "\ud800" <= c <= "\udfff" else len(c.encode()) for c in text]
    return [*itertools.accumulate(sizes, initial=0)]


class Frame(NamedTuple):
    """What a prompt stands in: ids up to the last control token before the message, plain text, [the message], plain
    text, ids from the first control token on. No message is cut off from the plain text: they are tokenized as one."""

    prefix: tuple[int, ...] = ()
    before: str = ""
    after: str = ""
    suffix: tuple[int, ...] = ()
    strip: bool = False  # the template strips the message
    eats: tuple[bool, bool] = (False, False)  # the control token on that side takes the whitespace beside it along


NO_FRAME = Frame()


def normal_span(normalizer: tokenizers.normalizers.Normalizer, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """The span of `text` in what a normalizer makes of it: of every character that comes of one in the span.

    NFC makes "e", U+0301, "a" two characters, "\u00e9a": (1, 3) becomes (0, 2).
    """
    made = tokenizers.NormalizedString(text)
    normalizer.normalize(made)
    n, size = len(made.normalized), lambda a, b: len(made.slice((a, b)).original)
    # where character k comes from: the end of the first k + 1 less its own extent; what vanished belongs to the last
    start = lambda k: len(text) if k == n else size(0, k + 1) - size(k, k + 1)
    last = bisect.bisect_right(range(n), span[0], key=start) - 1
    first = bisect.bisect_left(range(n), start(last), key=start) if last >= 0 else 0  # one may become several
    return first, bisect.bisect_left(range(n + 1), span[1], key=start)


class Tokenizer:
    """A byte-level `tokenizers` tokenizer with the ids, the prompt's frame and the byte offsets that training needs.

    eos_ids end a generation; eos_id, one of them, is put behind training answers. The frame is empty for the nano
    model, [bos] or a chat template's for others. Offsets come from the bytes of the tokens themselves, so that sampled
    ids, which need not be what `encode` would give for their text, map to their text exactly. Encoded text may have
    passed a normalizer (Qwen's, NFC): its spans pass it too.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, pad: str = "<pad>", eos: str = "<eos>", eos_ids: tuple[int, ...] = (),
        frame: Frame = NO_FRAME, vocab_size: int | None = None,
    ):  # fmt: skip
        self.inner, self.pad_id, self.eos_id = inner, inner.token_to_id(pad), inner.token_to_id(eos)
        self.eos_ids, self.frame = tuple(dict.fromkeys((self.eos_id, *eos_ids))), frame
        inner.encode_special_tokens = True  # "<eos>" in a text is text
        self.vocab_size = vocab_size or inner.get_vocab_size()  # a model's may be padded beyond the tokenizer's
        special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self.bytes_V = [b"" if i in special else self._bytes(i) for i in range(self.vocab_size)]
        self.n_bytes_V = np.array([len(b) for b in self.bytes_V])

    def _bytes(self, i: int) -> bytes:
        """What id `i` adds to a decoded text. Added tokens stand in the vocabulary as plain text, e.g. "<think>"."""
        token = self.inner.id_to_token(i) or ""
        return bytes(_BYTE[c] for c in token) if all(c in _BYTE for c in token) else token.encode()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [e.ids for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def _body(self, text: str) -> tuple[str, range, int]:
        """(what is tokenized as one text: the message with the plain text around it; the characters of `text` that are
        the message; where in the one text `text` begins, below 0 where whitespace in front is left out)."""
        frame, kept = self.frame, range(len(text))
        if frame.strip:
            kept = range(len(text) - len(text.lstrip()), len(text.rstrip()))
        body = frame.before + text[kept.start : kept.stop] + frame.after
        body = body.rstrip() if frame.eats[1] else body
        cut = body.lstrip() if frame.eats[0] else body
        return cut, kept, len(frame.before) - kept.start - (len(body) - len(cut))

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """The ids of whole prompts, as a chat template gives them; but special tokens written in a text stay text."""
        encoded = self.inner.encode_batch([self._body(text)[0] for text in texts], add_special_tokens=False)
        return [[*self.frame.prefix, *e.ids, *self.frame.suffix] for e in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode_prompts([text])[0]

    def decode(self, ids_MT: list[list[int]]) -> list[str]:
        return self.inner.decode_batch([list(map(int, ids)) for ids in ids_MT])

    def overlap(self, ids: list[int], text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """0/1 [len(spans), len(ids)]: which tokens share a byte with which character spans of `text`, which is what the
        ids decode to (sampled ones) or what was encoded (its first tokens suffice).

        With tokens "ab", "c d", "e" and spans (0, 3) and (5, 6) of "abc de": [[1, 1, 0], [0, 0, 1]].
        """
        raw = b"".join(self.bytes_V[i] for i in ids)
        if self.inner.normalizer is not None and raw.decode(errors="replace") != text:
            spans = [normal_span(self.inner.normalizer, text, span) for span in spans]
        end_T = np.cumsum(self.n_bytes_V[np.asarray(ids, int)]) if len(ids) else np.zeros(0, int)
        start_T = end_T - self.n_bytes_V[np.asarray(ids, int)] if len(ids) else end_T
        starts = char_starts(raw)
        at = [(starts[min(a, len(starts) - 1)], starts[min(b, len(starts) - 1)]) for a, b in spans]
        rows = [(start_T < b) & (end_T > a) & (end_T > start_T) for a, b in at]
        return np.array(rows, np.float32).reshape(len(spans), len(ids))

    def prompt_overlap(self, ids: list[int], text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """`overlap` for the ids of the prompt of `text`; its frame shares nothing with any span."""
        body, kept, at = self._body(text)
        inside = [(max(0, at + max(a, kept.start)), max(0, at + min(b, kept.stop))) for a, b in spans]
        out = np.zeros((len(spans), len(ids)), np.float32)
        inner = slice(len(self.frame.prefix), len(ids) - len(self.frame.suffix))
        out[:, inner] = self.overlap(ids[inner], body, inside)
        return out

    def sha256(self) -> str:
        return sha256(json.dumps([self.inner.to_str(), sorted(self.eos_ids), *self.frame]))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on `texts`, split as Qwen2 and Llama-3 split but with numbers in groups of at most two digits."""
    inner, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    split, as_bytes = pre.Split(tokenizers.Regex(_SPLIT), "isolated"), pre.ByteLevel(False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre.Sequence([split, as_bytes]), tokenizers.decoders.ByteLevel()
    alphabet, special = sorted(pre.ByteLevel.alphabet()), ["<pad>", "<eos>"]
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet))  # fmt: skip
    return Tokenizer(inner)
