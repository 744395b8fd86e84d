"""Texts as arrays of fixed shape, the part of them that an update computes, and the order in which a run sees its data.
NumPy only. Used by the scripts, the base, the evaluation and the sampler of attempts."""

import math
from collections.abc import Iterator

import numpy as np

from common.basics import STREAM_DATA, InputError, round_up
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple
from common.tokenizer import Tokenizer
from common.verifier import split_steps

Document = tuple[list[int], list[int]]  # token ids of a prompt and of what follows it

MAX_STEPS = 32  # J: reasoning steps kept of one attempt
ATTENDED = 800  # tokens of a row at which attention takes a nano layer as long as all else
WORTH = 2 / 3  # of the longest prompts: a width above it saves too little to be compiled
WIDTH = {  # array of a batch -> which of the padded lengths its last axis has
    "prompt": "P_revise", "f_tokens": "P_revise", "y0_given": "P_revise", "attempt_prompt": "P_attempt", "tokens": "T",
    "old_logp": "T", "adv": "T", "mask": "T", "y0": "T_replay", "y1": "T_replay", "y0_steps": "T_replay",
    "y1_steps": "T_replay", "y1_tokens": "T_replay", "decode_weight": "T_replay",
}  # fmt: skip


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
    in the revise prompt; y0_given [B, J, P]: what precedes the tokens of y0's steps there, whose states emit them in an
    attempt; y1_tokens [B, T]: y1 and its end token; wrong [B]: y0 is wrong.

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
    out["y0_given"] = np.zeros((B, MAX_STEPS, shapes["P_revise"]), np.float32)
    for b, q in enumerate(quads):
        start, end = q.meta["error_span"] or (0, 0)
        steps = split_steps(q.y0)[:MAX_STEPS]
        out["flagged"][b, : len(steps)] = [s.start < end and s.end > start for s in steps]
        text = revise_prompt(q.x, q.y0, q.f)
        at, y0_at = (revise_prompt(q.x, *part).index("\0") for part in ((q.y0, "\0"), ("\0", q.f)))  # where each begins
        spans = [(at, at + len(q.f)), *((y0_at + s.start, y0_at + s.end) for s in steps)]
        ids = revise["prompt"][b, : revise["prompt_len"][b]].tolist()
        found = tokenizer.prompt_overlap(ids, text, spans)
        out["f_tokens"][b, :, : len(ids)] = found[:1]
        out["y0_given"][b, : len(steps), : len(ids) - 1] = found[1:, 1:]
    out["y1_tokens"] = length_mask(len_B, T)
    out["wrong"] = np.array([not q.meta["y0_correct"] for q in quads], np.float32)
    return out


def pack_documents(documents: list[Document], width: int, pad_id: int, prompt_weight: float, among: int = 12):
    """Documents packed whole into rows, each into the first of the last `among` rows that has room, nearly in order.

    Returns (tokens, segments, loss weights), each [rows, width]. Two documents ([1, 2], [3]) and ([4], [5]) at width 6
    give tokens [1 2 3 4 5 0], segments [1 1 1 2 2 0] and, with prompt_weight 0, weights [0 0 1 0 1 0]. A document
    longer than the width is cut.
    """
    rows: list[tuple[list, list, list]] = []
    for prompt, completion in documents:
        ids = [*prompt, *completion][:width]
        row = next((r for r in rows[-among:] if len(r[0]) + len(ids) <= width), None)
        if row is None:
            row = ([], [], [])
            rows.append(row)
        row[1].extend([max(row[1], default=0) + 1] * len(ids))
        row[0].extend(ids)
        row[2].extend(([prompt_weight] * len(prompt) + [1.0] * len(completion))[:width])
    fill = lambda part, value: np.array([row[part] + [value] * (width - len(row[part])) for row in rows])
    return fill(0, pad_id).astype(np.int32), fill(1, 0).astype(np.int32), fill(2, 0.0).astype(np.float32)


def pack_rows(examples: list[Document], width: int, rows: int, pad_id: int) -> dict[str, np.ndarray]:
    """What is given and what is learnt, several examples a row, the longest first: "tokens", "segment" (which example,
    from 1; 0 is padding) and "mask" (what is learnt), each [n, width], n a multiple of `rows`: some may be empty."""
    examples = sorted(examples, key=lambda example: -len(example[0]) - len(example[1]))
    packed = pack_documents(examples, width, pad_id, 0.0, among=len(examples))
    more = [(0, -len(packed[0]) % rows), (0, 0)]
    values = {"tokens": pad_id, "segment": 0, "mask": 0}
    return {name: np.pad(a, more, constant_values=values[name]) for name, a in zip(values, packed)}


def row_shape(examples: list[Document], batch: int, n_micro: int, multiple: int) -> tuple[int, int]:
    """(width, rows) of a micro-batch of `batch` / `n_micro` packed examples. Rows are one to four times as long as the
    longest example, whichever computes least: longer ones waste less and attend to more. There are a few more of them
    than eight steps' examples fill at most, divisible by `multiple`, so that few steps need a micro-batch more."""
    longest = round_up(max(len(given) + len(learnt) for given, learnt in examples), 16)
    steps = [[examples[i] for i in data_indices(len(examples), batch, 0, step)] for step in range(8)]
    filled = {
        times * longest: [len(pack_rows(some, times * longest, 1, 0)["tokens"]) for some in steps]
        for times in range(1, 5)
    }
    width = min(filled, key=lambda width: sum(filled[width]) * width * (1 + width / ATTENDED))
    return width, round_up(math.ceil(1.05 * max(filled[width]) / n_micro), multiple)


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
    longest = max(map(len, tokenizer.encode_batch(texts))) + 1
    longest_f = max((q.f for q in quads), key=lambda f: len(tokenizer.encode(f)))  # control arms swap critiques
    P_revise = prompt_shape(tokenizer, [revise_prompt(q.x, q.y0, longest_f) for q in quads], ids, math.inf)
    if P_revise > max_prompt:  # refused is a problem with its own critique alone
        prompt_shape(tokenizer, [revise_prompt(q.x, q.y0, q.f) for q in quads], ids, max_prompt)
    return {
        "P_attempt": prompt_shape(tokenizer, [attempt_prompt(q.x) for q in quads], ids, max_prompt),
        "P_revise": P_revise,
        "T": max_new,
        "T_replay": round_up(longest, 8),
    }


def data_indices(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of one step: a fresh permutation of all n every epoch, a function of (seed, step) alone."""
    at = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, STREAM_DATA, int(e))).permutation(n) for e in np.unique(at // n)}
    return np.array([orders[i // n][i % n] for i in at])


def update_widths(tokenizer: Tokenizer, quads: list[Quadruple], shapes: dict[str, int]) -> list[dict[str, int]]:
    """The few sets of padded lengths that an update is computed in, the run's `shapes` the last of them: such that half
    of the training problems fit the first, if completions are as long as y1, and the second all, or eleven of twelve
    where that is WORTH it. (Of 8 problems that are drawn all fit those in half of the steps.)"""
    lengths = lambda ids: np.array([*map(len, ids)])
    prompts = {"P_attempt": [attempt_prompt(q.x) for q in quads]}
    prompts["P_revise"] = [revise_prompt(q.x, q.y0, q.f) for q in quads]
    needed = {name: lengths(tokenizer.encode_prompts(texts)) for name, texts in prompts.items()}
    answers = [lengths(tokenizer.encode(getattr(q, y)) for q in quads) + 1 for y in ("y0", "y1")]
    needed |= {"T": answers[1], "T_replay": np.maximum(*answers)}
    at = lambda share: {k: min(shapes[k], round_up(int(np.quantile(n, share)), 16)) for k, n in needed.items()}
    widths = [{k: shapes[k] for k in needed}]
    if len(quads):
        few = at(11 / 12)
        widths = [at(1 / 2), few if few["P_revise"] <= WORTH * shapes["P_revise"] else at(1), *widths]
    return [width for i, width in enumerate(widths) if width not in widths[:i]]


def rollout_prompts(batch: dict[str, np.ndarray], widths: list[dict[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(prompts [B, P], their lengths [B]) of a batch for sampling: cut to the second longest P_revise of the `widths`
    where that holds them and is WORTH it.

    Widths of 240, 368 and 624 tokens: a batch whose longest prompt has 350 is cut to 368, as is one with 200.
    """
    prompt_BP, len_B = batch["prompt"], batch["prompt_len"]
    longest, *rest = sorted({width["P_revise"] for width in widths}, reverse=True)
    cut = [P for P in rest[:1] if len_B.max() <= P <= WORTH * longest]
    return prompt_BP[:, : cut[0]] if cut else prompt_BP, len_B


def live_rows(adv_BGT: np.ndarray, mask_BGT: np.ndarray, kl_coef: float) -> np.ndarray:
    """Completions [B, G] that carry a gradient: with a token that counts and, unless there is a KL, an advantage. An
    advantage of 1e-7 is the rounding of a mean of equal rewards."""
    return ((np.abs(adv_BGT) > 1e-6) * mask_BGT if kl_coef == 0 else mask_BGT).any(-1)


def micro_batches(
    batch: dict[str, np.ndarray], count: int, widths: list[dict[str, int]], live_BG: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """`batch` as at most `count` micro-batches of B / `count` prompts, of what carries gradient alone and each in the
    narrowest of the `widths` that holds it: so a step has few shapes and adds up to the same gradient.

    Prompts without a row that is live are left out, the longest go first, the last micro-batch is filled up with
    masked rows. Where the live rows of most micro-batches are at most half of a group, those half a group is computed.
    With four prompts of which two are dead, count 4: two micro-batches of one prompt.
    """
    B = len(batch["prompt"])
    size, mask = B // count, batch.get("mask")
    batch = dict(batch)
    if live_BG is not None:
        batch["mask"] = mask * live_BG[..., None]
    width_B = narrowest(batch, widths)
    live_B = np.ones(B, bool) if live_BG is None else live_BG.any(1)
    order = np.lexsort((-width_B, ~live_B))
    n = max(1, -(-int(live_B.sum()) // size))
    parts = [order[i * size : (i + 1) * size] for i in range(n)]
    halves = [] if live_BG is None else [2 * live_BG[part].sum(1).max() <= live_BG.shape[1] for part in parts]
    halve = 2 * sum(halves) > len(halves) and live_BG.shape[1] % 2 == 0
    for i, part in enumerate(parts):
        width = widths[width_B[part][live_B[part]].max(initial=0)]
        some = {name: array[part] for name, array in batch.items()}
        if halve and halves[i]:
            rows = np.argsort(~live_BG[part], axis=1, kind="stable")[:, : live_BG.shape[1] // 2, None]
            some |= {name: np.take_along_axis(some[name], rows, 1) for name in ("tokens", "old_logp", "adv", "mask")}
        some = {name: array[..., : width[WIDTH[name]]] if name in WIDTH else array for name, array in some.items()}
        for name in ("prompt", "attempt_prompt"):  # a prompt that fills up must end within what is left of it
            if name in some:
                some[f"{name}_len"] = np.minimum(some[f"{name}_len"], some[name].shape[-1])
        yield some


def narrowest(batch: dict[str, np.ndarray], widths: list[dict[str, int]]) -> np.ndarray:
    """Of each prompt of a batch the index [B] of the first width that holds its prompts and all that its masks keep."""
    fits_BW = np.ones((len(batch["prompt"]), len(widths)), bool)
    for name in ("prompt", "attempt_prompt"):
        if name in batch:
            fits_BW &= batch[f"{name}_len"][:, None] <= np.array([width[WIDTH[name]] for width in widths])
    for name in ("mask", "y0_steps", "y1_tokens"):
        if name in batch:
            used_BT = batch[name].reshape(len(fits_BW), -1, batch[name].shape[-1]).any(1)
            end_B = (used_BT * np.arange(1, used_BT.shape[1] + 1)).max(1)
            fits_BW &= end_B[:, None] <= np.array([width[WIDTH[name]] for width in widths])
    return fits_BW.argmax(1)
