"""Texts as arrays of fixed shape, and the order in which a run sees its data. NumPy only. Used by the scripts, the
evaluation and the base."""

import numpy as np

from common.basics import STREAM_DATA, InputError, round_up
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple
from common.tokenizer import Tokenizer
from common.verifier import split_steps

MAX_STEPS = 32  # J: reasoning steps kept of one attempt


def right_pad(ids: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as (tokens [M, length] int32, lengths [M] int32); longer lists are cut at `length`.

    >>> right_pad([[5, 6], [7, 8, 9, 1]], 3, 0)[0].tolist(), right_pad([[5, 6], [7, 8, 9, 1]], 3, 0)[1].tolist()
    ([[5, 6, 0], [7, 8, 9]], [2, 3])
    """
    out = np.full((len(ids), length), pad_id, np.int32)
    for row, tokens in zip(out, ids):
        row[: len(tokens[:length])] = tokens[:length]
    return out, np.array([min(len(t), length) for t in ids], np.int32)


def length_mask(len_M: np.ndarray, T: int) -> np.ndarray:
    """0/1 float32 [M, T]: 1 on the first len_M[m] positions. [2, 0], T=3 -> [[1, 1, 0], [0, 0, 0]]."""
    return (np.arange(T) < len_M[:, None]).astype(np.float32)


def bucket(length: int, longest: int) -> int:
    """A padded length of which there are few: the next quarter of `longest` (in steps of 16), at most `longest`.

    >>> [bucket(n, 240) for n in (10, 64, 65, 193, 240)]
    [64, 64, 128, 240, 240]
    """
    return min(longest, round_up(length, round_up(-(-longest // 4), 16)))


def prompt_shape(tokenizer: Tokenizer, prompts: list[str], ids: list[str], limit: int) -> int:
    """The fixed P of a set of prompts: the longest in tokens, rounded up to 16; InputError if one exceeds the limit."""
    lengths = [*map(len, tokenizer.encode_prompts(prompts))]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        raise InputError(
            f"the prompt of {ids[longest]} has {lengths[longest]} tokens, more than --max_prompt_tokens {limit};"
            " raise the flag or drop the problem"
        )
    return round_up(lengths[longest], 16)


def pack_prompts(tokenizer: Tokenizer, prompts: list[str], P: int) -> dict[str, np.ndarray]:
    """Prompts as {"prompt" [B, P] (right-padded), "prompt_len" [B]}; none may be longer than P."""
    ids = tokenizer.encode_prompts(prompts)
    if max(map(len, ids)) > P:
        raise InputError(f"a prompt of {max(map(len, ids))} tokens does not fit the run's {P}")
    tokens_BP, len_B = right_pad(ids, P, tokenizer.pad_id)
    return {"prompt": tokens_BP, "prompt_len": len_B}


def pack_revise(tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int]) -> dict[str, np.ndarray]:
    """The revise prompts of some quadruples, packed."""
    return pack_prompts(tokenizer, [revise_prompt(q.x, q.y0, q.f) for q in quads], shapes["P_revise"])


def pack_answers(tokenizer: Tokenizer, texts: list[str], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference completions with their end-of-sequence token: (tokens_MT, len_M), cut at T."""
    return right_pad([[*tokenizer.encode(t), tokenizer.eos_id] for t in texts], T, tokenizer.pad_id)


def pack_steps(tokenizer: Tokenizer, texts: list[str], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference texts as (tokens [B, T], lengths [B], step tokens [B, J, T]): which tokens belong to which step.

    "2+3\\n#### 5" in tokens "2", "+", "3", "\\n", "####", " 5" and the end token: length 7, step 0 has the tokens
    [1, 1, 1, 0, 0, 0, 0], step 1 [0, 0, 0, 0, 1, 1, 0], the steps from 2 on none.
    """
    tokens_BT, len_B = pack_answers(tokenizer, texts, T)
    steps_BJT = np.zeros((len(texts), MAX_STEPS, T), np.float32)
    for steps_JT, ids, n, text in zip(steps_BJT, tokens_BT.tolist(), len_B, texts):
        spans = [(s.start, s.end) for s in split_steps(text)[:MAX_STEPS]]
        steps_JT[: len(spans), :n] = tokenizer.overlap(ids[:n], text, spans)
    return tokens_BT, len_B, steps_BJT


def pack_trajectories(
    tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int], revise: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """y0 and y1 as completions of the attempt prompt, with what locates steps and critique in them; `revise` are the
    packed revise prompts. All masks are 0/1.

    attempt_prompt [B, P], attempt_prompt_len [B]; y0, y1 [B, T]; y0_steps, y1_steps [B, J, T]: the tokens of each step;
    y0_mask, y1_mask [B, J]: the steps there are; flagged [B, J]: y0's steps under `error_span`; f_tokens [B, 1, P]: f
    in the revise prompt; y1_tokens [B, T]: y1 and its end token; wrong [B]: y0 is wrong.

    y0 "2+3=6\\n#### 6" with error_span [0, 5] has y0_mask [1, 1, 0, ...] and flagged [1, 0, 0, ...].
    """
    B, T = len(quads), shapes["T_replay"]
    prompts = pack_prompts(tokenizer, [attempt_prompt(q.x) for q in quads], shapes["P_attempt"])
    out = {"attempt_prompt": prompts["prompt"], "attempt_prompt_len": prompts["prompt_len"]}
    out["y0"], _, out["y0_steps"] = pack_steps(tokenizer, [q.y0 for q in quads], T)
    out["y1"], len_B, out["y1_steps"] = pack_steps(tokenizer, [q.y1 for q in quads], T)
    out |= {f"{y}_mask": (out[f"{y}_steps"].sum(-1) > 0).astype(np.float32) for y in ("y0", "y1")}
    out["flagged"] = np.zeros((B, MAX_STEPS), np.float32)
    out["f_tokens"] = np.zeros((B, 1, shapes["P_revise"]), np.float32)
    for b, q in enumerate(quads):
        start, end = q.meta["error_span"] or (0, 0)
        steps = split_steps(q.y0)[:MAX_STEPS]
        out["flagged"][b, : len(steps)] = [s.start < end and s.end > start for s in steps]
        text = revise_prompt(q.x, q.y0, q.f)
        at = revise_prompt(q.x, q.y0, "\0").index("\0")  # where f begins in the prompt
        ids = revise["prompt"][b, : revise["prompt_len"][b]].tolist()
        out["f_tokens"][b, :, : len(ids)] = tokenizer.prompt_overlap(ids, text, [(at, at + len(q.f))])
    out["y1_tokens"] = length_mask(len_B, T)
    out["wrong"] = np.array([not q.meta["y0_correct"] for q in quads], np.float32)
    return out


def decode_rows(tokenizer: Tokenizer, tokens_MT, len_M) -> list[str]:
    """Texts of generated rows, without the end token."""
    return tokenizer.decode([row[:n] for row, n in zip(np.asarray(tokens_MT).tolist(), np.asarray(len_M).tolist())])


def fixed_shapes(
    tokenizer: Tokenizer, replay: dict[str, list[Quadruple]], max_prompt: int, max_new: int
) -> dict[str, int]:
    """The padded lengths of a run: P_attempt and P_revise prompts, T completions, T_replay replay answers (y0, y1)."""
    quads = [q for split in replay.values() for q in split]
    ids = [q.meta["task_id"] for q in quads]
    texts = [t for q in quads for t in (q.y0, q.y1)]
    longest = max(len(e.ids) for e in tokenizer.inner.encode_batch(texts, add_special_tokens=False)) + 1
    longest_f = max((q.f for q in quads), key=lambda f: len(tokenizer.encode(f)))  # control arms swap critiques
    return {
        "P_attempt": prompt_shape(tokenizer, [attempt_prompt(q.x) for q in quads], ids, max_prompt),
        "P_revise": prompt_shape(tokenizer, [revise_prompt(q.x, q.y0, longest_f) for q in quads], ids, max_prompt),
        "T": max_new,
        "T_replay": round_up(longest, 8),
    }


def data_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of one step: a fresh permutation of all n every epoch, a function of (seed, step) alone."""
    at = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, STREAM_DATA, int(e))).permutation(n) for e in np.unique(at // n)}
    return np.array([orders[i // n][i % n] for i in at])
