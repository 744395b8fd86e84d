"""Token log-probs and the sampler, against a naive decoder in NumPy.

pytest tests/test_sampling.py
"""

import functools
import math
from collections import Counter

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from naive_decoder import (
    LENGTHS,
    NEVER,
    PAD,
    TINY,
    V,
    batch,
    compiled,
    decoder,
    log_softmax,
    naive_hidden,
    naive_weights,
    split,
)

from common.model import Decoder, ModelConfig, Reading
from common.sampling import draw, generate, read_tokens, token_logp


# ---- log-probs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("chunk", "temperature"), [(32, 1.0), (5, 0.6), (1, 1.7)])
def test_token_logp_equals_naive(chunk, temperature):
    """Value, entropy and gradient (in hidden states and in the head) against the full [M, T, V] formula; T is prime."""
    rng = np.random.default_rng(5)
    hidden, head = rng.standard_normal((3, 13, 5)).astype(np.float32), rng.standard_normal((V, 5)).astype(np.float32)
    tokens, weight = rng.integers(V, size=(3, 13)), rng.standard_normal((3, 13)).astype(np.float32)
    logp, entropy = token_logp(hidden, tokens, head, temperature, chunk)
    full = log_softmax(np.einsum("MTD,VD->MTV", hidden.astype(float), head) / temperature)
    np.testing.assert_allclose(logp, np.take_along_axis(full, tokens[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(full) * full).sum(-1), atol=1e-5)
    # d logp / d logits = onehot - softmax
    d_logits = (np.eye(V)[tokens] - np.exp(full)) * weight[..., None] / temperature
    loss = lambda hidden, head: (token_logp(hidden, tokens, head, temperature, chunk)[0] * weight).sum()
    d_hidden, d_head = jax.grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(d_hidden, d_logits @ head, atol=1e-4)
    np.testing.assert_allclose(d_head, np.einsum("MTV,MTD->VD", d_logits, hidden), atol=1e-4)


def test_entropy_carries_no_gradient():
    """It is a metric, not a bonus."""
    hidden = np.random.default_rng(6).standard_normal((1, 4, 5)).astype(np.float32)
    grad = jax.grad(lambda h: token_logp(h, np.zeros((1, 4), int), np.eye(V, 5, dtype=np.float32))[1].sum())(hidden)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("chunk", [32, 5])
def test_read_tokens_equals_naive(chunk):
    """Against the full formula: given others are kept, the rest are the likeliest of their kind but for the token."""
    rng = np.random.default_rng(7)
    hidden, head = rng.standard_normal((3, 13, 5)).astype(np.float32), rng.standard_normal((V, 5)).astype(np.float32)
    tokens, kind, powers = rng.integers(V, size=(3, 13)), rng.integers(0, 2, V), (0.5, 1.0, 2.5)
    other = np.where(rng.random((3, 13)) < 0.2, rng.integers(V, size=(3, 13)), -1)
    out = jax.jit(read_tokens, static_argnums=(5, 6))(hidden, tokens, other, head, kind, powers, chunk)
    full = log_softmax(np.einsum("MTD,VD->MTV", hidden.astype(float), head))
    for m, t in np.ndindex(3, 13):
        rivals = [v for v in range(V) if kind[v] == kind[tokens[m, t]] and v != tokens[m, t]]
        beside = other[m, t] if other[m, t] >= 0 else max(rivals, key=lambda v: full[m, t, v])
        assert out["other"][m, t] == beside
        expected = [full[m, t, tokens[m, t]], full[m, t, beside]]
        np.testing.assert_allclose([out["logp"][m, t], out["other_logp"][m, t]], expected, atol=1e-5)
        norms = [np.log((np.exp(full[m, t]) ** k).sum()) for k in powers]
        np.testing.assert_allclose(out["norm"][m, t], norms, atol=1e-5)


# ---- the sampler ----------------------------------------------------------------------------------------------------
STEPS = 6


@functools.cache
def sampler(cfg: ModelConfig, group: int, steps: int, greedy: bool = False):
    graphdef, params = split(decoder(cfg))

    @jax.jit
    def run(params, prompt_BP, len_B, key, temperature, eos_id):
        return generate(
            nnx.merge(graphdef, params), prompt_BP, len_B, key, group, steps, temperature, (eos_id,), PAD, greedy
        )

    return lambda prompt_BP, len_B, seed=0, temperature=1.0, eos_id=NEVER: jax.device_get(
        run(params, prompt_BP, len_B, jax.random.key(seed), temperature, eos_id)
    )


@functools.cache
def greedy_rows() -> np.ndarray:
    """Greedy continuations by full naive forwards, one per token; the end token is never met."""
    w, (prompt_BP, _, _) = naive_weights(decoder(TINY)), batch()
    rows = []
    for b, n in enumerate(LENGTHS):
        row = list(prompt_BP[b, :n])
        for _ in range(STEPS):
            row.append(int((naive_hidden(TINY, w, row)[-1] @ w["out"].T).argmax()))
        rows.append(row[n:])
    return np.array(rows)


def test_greedy_equals_argmax_loop():
    prompt_BP, len_B, _ = batch()
    out = sampler(TINY, 1, STEPS, greedy=True)(prompt_BP, len_B)
    np.testing.assert_array_equal(out["tokens_MT"], greedy_rows())
    assert out["len_M"].tolist() == [STEPS] * 2 and out["truncated_M"].tolist() == [1.0] * 2


@pytest.mark.parametrize(("row", "at"), [(0, 0), (1, 0), (0, 3), (1, STEPS - 1)])
def test_stops_at_the_end_token(row, at):
    """With the greedy token of (row, at) as end token: it is counted, pads and log-prob 0 follow, at position 0 too."""
    prompt_BP, len_B, _ = batch()
    run, free = sampler(TINY, 1, STEPS, greedy=True), greedy_rows()
    eos_id, logp_MT = int(free[row, at]), sampler(TINY, 1, STEPS, greedy=True)(prompt_BP, len_B)["logp_MT"]
    out = run(prompt_BP, len_B, eos_id=eos_id)
    for m in range(2):
        expected, n, truncated = list(free[m]), STEPS, 1.0
        if eos_id in expected:
            n, truncated = expected.index(eos_id) + 1, 0.0
            expected = expected[:n] + [PAD] * (STEPS - n)
        assert out["tokens_MT"][m].tolist() == expected
        assert (out["len_M"][m], out["truncated_M"][m]) == (n, truncated)
        np.testing.assert_allclose(out["logp_MT"][m, :n], logp_MT[m, :n], atol=1e-5)
        np.testing.assert_array_equal(out["logp_MT"][m, n:], 0)
    assert out["len_M"][row] <= at + 1


@pytest.mark.parametrize(("B", "group", "sizes"), [(8, 2, [16, 8, 4]), (5, 1, [5, 2, 1])])
def test_a_batch_that_shrinks_samples_the_same(B, group, sizes, monkeypatch):
    """Prompts that have ended are left out, every completion stays in its place and draws as it would beside them."""
    decoded, steps, decode = [], 40, Decoder.decode
    note = lambda m: jax.debug.callback(lambda: decoded.append(m))  # when it runs, not when it is traced
    watched = lambda model, input_M, *rest: note(len(input_M)) or decode(model, input_M, *rest)
    monkeypatch.setattr(Decoder, "decode", watched)
    graphdef, params = split(decoder(TINY))
    prompt_BP = np.random.default_rng(3).integers(3, V, (B, 7)).astype(np.int32)
    len_B, ends = np.arange(B) % 6 + 2, tuple(range(0, V, 9))

    def run(shrink):
        decoded.clear()
        how = (group, steps, 1.0, ends, PAD)
        sample = lambda params: generate(
            nnx.merge(graphdef, params), prompt_BP, len_B, jax.random.key(5), *how, shrink=shrink
        )
        out = jax.device_get(jax.jit(sample)(params))
        jax.effects_barrier()
        return out

    whole = run(False)
    last_B = np.sort(whole["len_M"].reshape(B, group).max(1))
    assert Counter(decoded) == {B * group: last_B[-1]}
    shrunk = run(True)
    until = [*(last_B[B - m // group - 1] for m in sizes[1:]), last_B[-1]]
    steps_of = dict(zip(sizes, np.diff(until, prepend=0)))
    assert min(steps_of.values()) > 0 and Counter(decoded) == steps_of
    for name in ("tokens_MT", "len_M", "truncated_M"):
        np.testing.assert_array_equal(shrunk[name], whole[name])
    for name in ("logp_MT", "entropy_M"):
        np.testing.assert_allclose(shrunk[name], whole[name], rtol=1e-5, atol=1e-5)


NEARLY_1 = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.mark.parametrize("V", [2, 9, 50, 1000, 1024])
@pytest.mark.parametrize("skew", [1.0, 10.0])
def test_draw_in_proportion_to_weight(V, skew):
    """On an even grid of both numbers every column comes as often as its share of the row's weight says, exactly but
    for the grid's width: a block's columns have its share, and inside it their own."""
    weight_V = np.exp(skew * np.random.default_rng(V).normal(size=V)).astype(np.float32)
    weight_V[V // 2] = 0.0
    n = 64  # of the grid, a side
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n
    uniform_M2 = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    drawn = np.asarray(jax.jit(draw)(np.broadcast_to(weight_V, (n * n, V)), uniform_M2))
    C = V // math.gcd(V, 2 ** round(math.log2(V) / 2))  # columns of a block
    share = weight_V.astype(np.float64) / weight_V.astype(np.float64).sum()
    blocks = np.array([share[i : i + C].sum() for i in range(0, V, C)])
    np.testing.assert_allclose(np.bincount(drawn // C, minlength=len(blocks)) / n**2, blocks, atol=1.01 / n)
    seen = np.bincount(drawn, minlength=V) / n**2
    np.testing.assert_allclose(seen, share, atol=2.02 / n)
    assert seen[V // 2] == 0 and len(seen) == V


@pytest.mark.parametrize("first", [0.0, 0.3, NEARLY_1])
@pytest.mark.parametrize("second", [0.0, 0.7, NEARLY_1])
def test_what_weighs_nothing_is_never_drawn(first, second):
    """At both ends of [0, 1), weights of any size at the first, a middle and the last column."""
    for at in ([0], [57], [99], [3, 98], [0, 99]):
        for size in (1e-30, 1e-6, 1.0, 3e4):
            weight_V = np.zeros(100, np.float32)
            weight_V[at] = size
            assert int(draw(weight_V[None], np.float32([[first, second]]))[0]) in at


def test_what_weighs_nothing_is_never_drawn_where_sums_round():
    """Over 500 columns XLA adds up in pieces, and a sum may rise, by rounding, at a column that weighs nothing: there
    lies the number of each row. In half of the rows only such columns follow."""
    rng, M, V = np.random.default_rng(0), 512, 1187
    weight_MV = np.exp(4 * rng.normal(size=(M, V))).astype(np.float32)
    weight_MV[rng.random((M, V)) < 0.4] = 0
    weight_MV[M // 2 :, 600:] = 0
    sum_MV = np.asarray(jax.jit(lambda w: w.cumsum(-1))(weight_MV))
    rises = (np.diff(sum_MV, prepend=0) > 0) & (weight_MV == 0)
    at_M = np.where(rises.any(1), V - 1 - rises[:, ::-1].argmax(1), 0)  # the last one
    between_M = (sum_MV[np.arange(M), at_M] + sum_MV[np.arange(M), at_M - 1].astype(np.float64)) / 2
    second_M = np.minimum(between_M / sum_MV[:, -1], NEARLY_1).astype(np.float32)
    assert rises.any(1)[: M // 2].sum() > 100 and rises.any(1)[M // 2 :].sum() > 100
    for number_M in (second_M, np.nextafter(second_M, np.float32(0)), np.full(M, NEARLY_1, np.float32)):
        drawn_M = draw(weight_MV, np.stack([np.zeros(M, np.float32), number_M], -1))
        assert (weight_MV[np.arange(M), np.asarray(drawn_M)] > 0).all()


def test_draw_is_exact_in_long_tails():
    """A block of 1e-6 of the weight is as evenly drawn inside as any other: its columns have a number of their own."""
    weight_V = np.full(100, 1e-7, np.float32)
    weight_V[0] = 1.0
    inside = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    drawn = draw(np.broadcast_to(weight_V, (1000, 100)), np.stack([np.full(1000, NEARLY_1, np.float32), inside], -1))
    counts = np.bincount(np.asarray(drawn), minlength=100)
    assert counts.sum() == counts[75:].sum() == 1000 and counts[75:].tolist() == [40] * 25


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logp_equals_token_logp(temperature):
    model = decoder(TINY)
    params = split(model)[1]
    _, call, _ = compiled(TINY)
    prompt_BP, len_B, _ = batch()
    out = sampler(TINY, 3, STEPS)(prompt_BP, len_B, temperature=temperature, eos_id=5)
    hidden_MTD = call(params, [Reading(prompt_BP, len_B, [out["tokens_MT"]])])[0].completions[0]
    full = log_softmax(np.asarray(hidden_MTD) @ np.asarray(model.head_VD()).T / temperature)
    expected = np.take_along_axis(full, out["tokens_MT"][..., None], -1)[..., 0]
    logp_MT, _ = token_logp(hidden_MTD, out["tokens_MT"], model.head_VD(), temperature)
    mask_MT = np.arange(STEPS) < out["len_M"][:, None]
    np.testing.assert_allclose(out["logp_MT"], expected * mask_MT, atol=1e-4)
    np.testing.assert_allclose(out["logp_MT"], logp_MT * mask_MT, atol=1e-4)


def test_key_decides_the_tokens():
    prompt_BP, len_B, _ = batch()
    first, again, other = (sampler(TINY, 3, STEPS)(prompt_BP, len_B, seed=s)["tokens_MT"] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(row) for row in first}) == len(first)  # rows of one group draw on their own


def test_distribution_of_two_tokens():
    """Chi-square of the pairs of first and second token over many rows against the naive probabilities."""
    w, (prompt_BP, len_B, _), rows, temperature = naive_weights(decoder(TINY)), batch(), 4096, 0.8
    out = sampler(TINY, rows // 2, 2)(prompt_BP, len_B, seed=3, temperature=temperature)
    statistic, cells = 0.0, 0
    for b, n in enumerate(LENGTHS):
        prompt = list(prompt_BP[b, :n])
        probs = lambda row: np.exp(log_softmax(naive_hidden(TINY, w, row)[-1] @ w["out"].T / temperature))
        expected = np.stack([p * probs([*prompt, a]) for a, p in enumerate(probs(prompt))]).ravel() * (rows // 2)
        pairs = out["tokens_MT"][b * rows // 2 : (b + 1) * rows // 2]
        seen = np.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V)
        rare = expected < 5  # one cell together
        expected, seen = (np.append(a[~rare], a[rare].sum()) for a in (expected, seen))
        statistic, cells = statistic + ((seen - expected) ** 2 / expected).sum(), cells + len(seen) - 1
    assert cells > 50
    assert scipy.stats.chi2.cdf(statistic, cells) < 0.9999
