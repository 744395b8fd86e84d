"""Texts as arrays of fixed shape, what of them an update computes, and the order of the data.

pytest tests/test_batches.py
"""

import copy
import dataclasses
import unicodedata

import numpy as np
import pytest
import tokenizers
from examples import TEXTS, math_quad

from common.basics import InputError, round_up
from common.batches import (
    MAX_STEPS,
    data_indices,
    fixed_shapes,
    length_mask,
    live_rows,
    micro_batches,
    pack_answers,
    pack_documents,
    pack_prompts,
    pack_revise,
    pack_rows,
    pack_steps,
    pack_trajectories,
    prompt_shape,
    right_pad,
    rollout_prompts,
    row_shape,
    update_widths,
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


def test_prompts_are_refused_by_what_they_hold(tokenizer):
    """The shape leaves room for a swap of critiques; no problem is refused for a critique that is not its own."""
    short, long = math_quad(0), dataclasses.replace(math_quad(1), f="Step 1 is wrong. " * 20, y0="7")
    length = lambda q: len(tokenizer.encode_prompts([revise_prompt(q.x, q.y0, q.f)])[0])
    limit = max(length(short), length(long))
    swapped = length(dataclasses.replace(short, f=long.f))
    assert swapped > limit
    assert fixed_shapes(tokenizer, {"train": [short, long]}, limit, 8)["P_revise"] == round_up(swapped, 16)
    with pytest.raises(InputError, match=rf"has {limit} tokens, more than --max_prompt_tokens {limit - 1};"):
        fixed_shapes(tokenizer, {"train": [short, long]}, limit - 1, 8)


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


def test_pack_documents_worked_example():
    """The docstring's numbers, and a document that is cut."""
    tokens, segments, weights = pack_documents([([1, 2], [3]), ([4], [5])], 6, 0, 0.0)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4, 5, 0]],
        [[1, 1, 1, 2, 2, 0]],
        [[0, 0, 1, 0, 1, 0]],
    )
    tokens, segments, weights = pack_documents([([1, 2, 3], [4, 5])], 4, 0, 0.5)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4]],
        [[1, 1, 1, 1]],
        [[0.5, 0.5, 0.5, 1]],
    )


def test_pack_documents_keeps_every_token_once():
    """Random documents: each is one contiguous segment somewhere, with its weights; the rest is padding."""
    rng, next_id, documents = np.random.default_rng(3), 1, []
    for _ in range(200):
        n, m = (int(v) for v in rng.integers(1, 15, 2))
        documents.append((list(range(next_id, next_id + n)), list(range(next_id + n, next_id + n + m))))
        next_id += n + m
    tokens, segments, weights = pack_documents(documents, 40, 0, 0.25)
    assert tokens.shape == segments.shape == weights.shape == (len(tokens), 40)
    found = []
    for row, segment, weight in zip(tokens, segments, weights):
        assert (np.diff(np.append(segment[segment > 0], 10**6)) >= 0).all()
        for s in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == s)
            assert (np.diff(at) == 1).all()
            found.append((row[at].tolist(), weight[at].tolist()))
        assert (row[segment == 0] == 0).all()
        assert (weight[segment == 0] == 0).all()
    wanted = [(p + c, [0.25] * len(p) + [1.0] * len(c)) for p, c in documents]
    assert sorted(found) == sorted(wanted)
    assert len(tokens) < 1.25 * next_id / 40  # and rows are well filled


def test_pack_rows_worked_example():
    """By hand at width 6, two rows a micro-batch: the longest example first, a shorter one into the room it leaves."""
    batch = pack_rows([([1], [2]), ([3, 4, 5], [6]), ([7, 8], [9, 1, 2])], 6, 2, 0)
    assert batch["tokens"].tolist() == [[7, 8, 9, 1, 2, 0], [3, 4, 5, 6, 1, 2]]
    assert batch["segment"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 2, 2]]
    assert batch["mask"].tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1]]
    empty = {name: a[2:] for name, a in pack_rows([([1] * 4, [2])] * 3, 6, 2, 9).items()}
    assert empty["tokens"].tolist() == [[1, 1, 1, 1, 2, 9], [9] * 6]
    assert empty["segment"][1].tolist() == empty["mask"][1].tolist() == [0] * 6


def test_pack_rows_keeps_every_example_once():
    """Random examples: each is one contiguous segment, only its second part is learnt, and rows are well filled."""
    rng = np.random.default_rng(5)
    examples = [([int(i)] * int(rng.integers(1, 120)), [1000 + int(i)] * int(rng.integers(1, 80))) for i in range(200)]
    batch = pack_rows(examples, 208, 8, 0)
    assert len(batch["tokens"]) % 8 == 0
    found = []
    for tokens, segment, mask in zip(*batch.values()):
        for s in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == s)
            assert (np.diff(at) == 1).all()
            found.append((tokens[at][mask[at] == 0].tolist(), tokens[at][mask[at] == 1].tolist()))
        assert not mask[segment == 0].any()
    assert sorted(found) == sorted(examples)
    assert (batch["segment"] > 0).mean() > 0.95


@pytest.mark.parametrize(("n_micro", "multiple"), [(8, 1), (4, 2), (1, 8), (1, 1)])
def test_row_shape(n_micro, multiple):
    """Steps of 64 examples need as many micro-batches as there are, and little of them is padding."""
    rng = np.random.default_rng(1)
    short = [([1] * int(n), [2] * int(m)) for n, m in rng.integers(20, 100, (500, 2))]
    width, rows = row_shape(short, 64, n_micro, multiple)
    assert width % 16 == 0 and rows % multiple == 0
    steps = [pack_rows([short[i] for i in data_indices(500, 64, 3, k)], width, rows, 0)["segment"] for k in range(20)]
    assert max(len(segment) for segment in steps) <= n_micro * rows
    assert (np.concatenate(steps) > 0).mean() > 0.6


@pytest.mark.parametrize(
    ("lengths", "times"), [([192], 1), ([80, 100, 112], 1), ([60, 70, 112], 2), ([30, 460, 960], 1)]
)
def test_row_shape_chooses_the_width(lengths, times):
    """Rows of one example where that leaves no room; longer ones where it does, unless attention would cost more."""
    examples = [([1] * (n - 1), [2]) for n in lengths * 40]
    assert row_shape(examples, 8 * len(lengths), 1, 1)[0] == times * max(lengths)


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
        "y0_given": (2, MAX_STEPS, 170), "wrong": (2,),
    }  # fmt: skip
    assert out["attempt_prompt_len"].tolist() == [len(attempt_prompt("x")), len(attempt_prompt("xy"))]
    assert out["y0_mask"][:, :4].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert out["y1_mask"][:, :4].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert out["flagged"][:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert out["wrong"].tolist() == [1, 0]
    assert out["y1_tokens"].sum(1).tolist() == [len(quads[0].y1) + 1, len(quads[1].y1) + 1]  # with the end token
    for q, prompt, f_T in zip(quads, revise["prompt"], out["f_tokens"][:, 0]):
        assert byte_tokenizer.decode([prompt[f_T > 0].tolist()]) == [q.f]
    for q, prompt, on_JT in zip(quads, revise["prompt"], out["y0_given"]):  # each state emits the token after its own
        spelled = [byte_tokenizer.decode([prompt[1:][on_T[:-1] > 0].tolist()])[0] for on_T in on_JT[:4]]
        steps = [*filter(None, q.y0.split("\n"))]
        assert spelled == steps + [""] * (4 - len(steps))


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
        emitted = revise["prompt"][0][1:][out["y0_given"][0, 0, :-1] > 0].tolist()
        assert framed.decode([emitted]) == ["2+3=6"]


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


WIDTHS = [dict(P_revise=2, P_attempt=2, T=3, T_replay=3), dict(P_revise=4, P_attempt=4, T=6, T_replay=6)]


def grpo_batch(lengths, prompt_len) -> dict[str, np.ndarray]:
    """Prompts of 4 and completions of 6 tokens that say where they come from; masks of the given lengths."""
    mask = length_mask(np.array(lengths).reshape(-1), 6).reshape(*np.shape(lengths), 6)
    B, G = np.shape(lengths)
    out = {"prompt": np.arange(B)[:, None] * 10 + np.arange(4), "prompt_len": np.array(prompt_len), "mask": mask}
    where = np.arange(B)[:, None, None] * 100 + np.arange(G)[:, None] * 10 + np.arange(6)
    return out | dict.fromkeys(("tokens", "old_logp", "adv"), where)


def test_live_rows_by_hand():
    """A masked row never counts; one without an advantage, or with a rounding error for one, only with a KL."""
    adv = np.array([[[0.5, 0.5], [0.0, 0.0], [3e-8, 3e-8]], [[0.5, 0.0], [-0.5, -0.5], [0.0, 1e-3]]])
    mask = np.array([[[1, 1], [1, 1], [1, 0]], [[0, 1], [0, 0], [0, 1]]], np.float32)
    assert live_rows(adv, mask, 0.0).tolist() == [[True, False, False], [False, False, True]]
    assert live_rows(adv, mask, 0.1).tolist() == [[True, True, True], [True, False, True]]


def test_micro_batches_leave_out_what_carries_nothing():
    """Four prompts, of which the second has no live row: long ones first, each as narrow as it may be."""
    batch = grpo_batch([[3, 1], [6, 6], [2, 3], [5, 6]], [2, 4, 2, 1])
    live = np.array([[1, 1], [0, 0], [1, 1], [1, 1]], bool)
    long, *short = micro_batches(batch, 4, WIDTHS, live)
    assert long["prompt"].tolist() == [[30, 31, 32, 33]] and long["mask"].tolist() == [[[1] * 5 + [0], [1] * 6]]
    assert [one["prompt"].tolist() for one in short] == [[[0, 1]], [[20, 21]]]
    assert [one["tokens"][0, :, 0].tolist() for one in short] == [[0, 10], [200, 210]]
    assert all(one["tokens"].shape == (1, 2, 3) for one in short)


def test_a_micro_batch_is_filled_up_with_nothing():
    """Two prompts a micro-batch: the dead one fills the second up, masked, cut, its length with it."""
    batch = grpo_batch([[3, 1], [6, 6], [2, 3], [3, 3]], [2, 4, 2, 1])
    live = np.array([[1, 1], [0, 0], [1, 1], [1, 1]], bool)
    one, two = micro_batches(batch, 2, WIDTHS, live)
    assert one["prompt"][:, 0].tolist() == [0, 20] and two["prompt"].tolist() == [[30, 31], [10, 11]]
    assert two["prompt_len"].tolist() == [1, 2] and not two["mask"][1].any() and two["mask"][0].all()
    assert batch["mask"][1].all() and batch["prompt_len"][1] == 4  # what was given is as it was


def test_half_a_group_is_computed_where_no_more_is_live():
    """In two of three groups two rows of four or fewer are live: they come first, in order; the third stays whole."""
    batch = grpo_batch([[3, 2, 1, 3], [3, 3, 3, 3], [1, 2, 3, 3]], [2, 2, 2])
    live = np.array([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]], bool)
    parts = list(micro_batches(batch, 3, WIDTHS, live))
    assert [one["tokens"][0, :, 0].tolist() for one in parts] == [[10, 30], [100, 110, 120, 130], [220, 200]]
    assert [one["mask"].sum((0, 2)).tolist() for one in parts] == [[2, 3], [3, 3, 3, 0], [3, 0]]
    live[2] = True  # now in one of three: one shape for all
    assert {one["tokens"].shape[1] for one in micro_batches(batch, 3, WIDTHS, live)} == {4}


def test_where_nothing_is_live_there_is_one_micro_batch():
    """It is masked throughout, so that a step still has its metrics, and as narrow as can be."""
    batch = grpo_batch([[6, 6], [6, 6]], [4, 4])
    (one,) = micro_batches(batch, 2, WIDTHS, np.zeros((2, 2), bool))
    assert not one["mask"].any() and one["prompt"].shape == (1, 2) and one["prompt_len"].tolist() == [2]


def test_without_rows_that_are_live_all_are_computed():
    """As in b0, b1 and the terms of b5: every row once, arrays without a width whole."""
    batch = {k: v for k, v in grpo_batch([[3], [6], [2], [1]], [2, 2, 3, 1]).items() if k != "adv"}
    parts = list(micro_batches(batch | {"share": np.arange(4)}, 2, WIDTHS))
    assert [one["share"].tolist() for one in parts] == [[1, 2], [0, 3]]
    assert [one["prompt"].shape for one in parts] == [(2, 4), (2, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_keep_every_live_token(seed):
    """Random groups: of every live row the tokens under its mask, once, and nothing else."""
    rng = np.random.default_rng(seed)
    B, G, size = 8, 4, int(rng.choice([1, 2, 4, 8]))
    batch = grpo_batch(rng.integers(0, 7, (B, G)), rng.integers(1, 5, B))
    live = (rng.random((B, G)) < rng.random()) & batch["mask"].any(-1)
    parts = list(micro_batches(batch, B // size, WIDTHS, live))
    kept = sorted(token for one in parts for token in one["tokens"][one["mask"] > 0].tolist())
    assert kept == sorted(batch["tokens"][(batch["mask"] * live[..., None]) > 0].tolist())
    assert all(len(one["prompt"]) == size and one["prompt_len"].max() <= one["prompt"].shape[1] for one in parts)
    assert len(parts) == max(1, -(-int(live.any(1).sum()) // size))
    prompts = {tuple(one["prompt"][b, : one["prompt_len"][b]]) for one in parts for b in range(size)}
    for b in np.flatnonzero(live.any(1)):
        assert tuple(batch["prompt"][b, : batch["prompt_len"][b]]) in prompts


def test_update_widths(byte_tokenizer):
    """Of 30 problems whose texts grow by a letter each: half, and 11/12 where the longest prompts are far longer
    than theirs, else all; the last width is what none needs."""
    quads = [Quadruple("x" * (i + 1), "a" * (3 * i), "f", "b" * (2 * i), {}) for i in range(30)]
    for longest, second, shares in ((600, 80, (1 / 2, 11 / 12)), (304, 96, (1 / 2, 1))):
        shapes = {"P_attempt": 400, "P_revise": longest, "T": 48, "T_replay": 96}
        widths = update_widths(byte_tokenizer, quads, shapes)
        assert widths[-1] == shapes
        assert [w["T"] for w in widths] == [32, 48, 48]
        assert [w["T_replay"] for w in widths] == [48, second, 96]
        for width, share in zip(widths, shares):
            needed = [len(byte_tokenizer.encode_prompt(revise_prompt(q.x, q.y0, q.f))) for q in quads]
            assert share <= np.mean(np.array(needed) <= width["P_revise"]) < share + 1 / 12
        assert update_widths(byte_tokenizer, quads[:1], shapes | {"T": 16})[0]["T"] == 16


@pytest.mark.parametrize(
    "longest, widths, cut",
    [
        *((200, (240, 368, 624), 368), (368, (240, 368, 624), 368), (369, (240, 368, 624), 624)),
        *((9, (176, 272, 368), 368), (9, (368, 368, 368), 368), (9, (240, 400, 600), 400), (9, (240, 401, 600), 600)),
    ],
)
def test_rollout_prompts(longest, widths, cut):
    """Sampling reads prompts in one of two widths: the second of all, if that holds them and saves a third or more."""
    batch = {"prompt": np.arange(2 * widths[-1]).reshape(2, -1), "prompt_len": np.array([5, longest])}
    prompt_BP, len_B = rollout_prompts(batch, [{"P_revise": width} for width in widths])
    assert prompt_BP.shape == (2, cut) and len_B.tolist() == [5, longest]
    assert (prompt_BP == batch["prompt"][:, :cut]).all()
