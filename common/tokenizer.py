"""Byte-level tokenizers, the nano model's own and a checkpoint's behind one interface, with the byte offsets that place
steps and spans among tokens. Used by batches, rewards, base, chat and what takes a tokenizer; knows no model."""

import codecs
import itertools
import json

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


class Tokenizer:
    """A byte-level `tokenizers` tokenizer with the ids, the prompt's frame and the byte offsets that training needs.

    eos_ids end a generation; eos_id, one of them, is put behind training answers. A prompt is prompt_prefix + text +
    prompt_suffix: nothing for the nano model, [bos] or a chat template for others; `strip` says that the template
    strips its text. Offsets come from the bytes of the tokens themselves, so that sampled ids, which need not be what
    `encode` would give for their text, map to their text exactly.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, pad: str = "<pad>", eos: str = "<eos>", eos_ids: tuple[int, ...] = (),
        prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = (), strip: bool = False, vocab_size: int | None = None,
    ):  # fmt: skip
        self.inner, self.pad_id, self.eos_id = inner, inner.token_to_id(pad), inner.token_to_id(eos)
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        self.prompt_prefix, self.prompt_suffix, self.strip = list(prefix), list(suffix), strip
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

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a whole prompt; special tokens written in `text` stay text."""
        return [*self.prompt_prefix, *self.encode(text.strip() if self.strip else text), *self.prompt_suffix]

    def decode(self, ids_MT: list[list[int]]) -> list[str]:
        return self.inner.decode_batch([list(map(int, ids)) for ids in ids_MT])

    def overlap(self, ids: list[int], text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """0/1 [len(spans), len(ids)]: which tokens share a byte with which character spans of `text`.

        With tokens "ab", "c d", "e" and spans (0, 3) and (5, 6) of "abc de": [[1, 1, 0], [0, 0, 1]].
        """
        end_T = np.cumsum(self.n_bytes_V[np.asarray(ids, int)]) if len(ids) else np.zeros(0, int)
        start_T = end_T - self.n_bytes_V[np.asarray(ids, int)] if len(ids) else end_T
        starts = char_starts(b"".join(self.bytes_V[i] for i in ids))
        at = [(starts[min(a, len(starts) - 1)], starts[min(b, len(starts) - 1)]) for a, b in spans]
        rows = [(start_T < b) & (end_T > a) & (end_T > start_T) for a, b in at]
        return np.array(rows, np.float32).reshape(len(spans), len(ids))

    def sha256(self) -> str:
        frame = [sorted(self.eos_ids), self.prompt_prefix, self.prompt_suffix, self.strip]
        return sha256(json.dumps([self.inner.to_str(), *frame]))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on `texts`, split as Qwen2 and Llama-3 split but with numbers in groups of at most two digits."""
    inner, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    split, as_bytes = pre.Split(tokenizers.Regex(_SPLIT), "isolated"), pre.ByteLevel(False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre.Sequence([split, as_bytes]), tokenizers.decoders.ByteLevel()
    alphabet, special = sorted(pre.ByteLevel.alphabet()), ["<pad>", "<eos>"]
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet))  # fmt: skip
    return Tokenizer(inner)
