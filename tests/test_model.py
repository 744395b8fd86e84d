"""The decoder against a naive one in NumPy: prompts, groups, decoding, packing, gradients, bfloat16.

pytest tests/test_model.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_decoder import (
    CONFIGS,
    GROUP,
    LENGTHS,
    TINY,
    T,
    V,
    batch,
    compiled,
    decoder,
    log_softmax,
    naive_frequencies,
    naive_hidden,
    naive_weights,
    split,
)

from common.model import Decoder, ModelConfig, Reading, attend, attend_causal, last_tokens
from common.sampling import token_logp


@pytest.mark.parametrize("chunk", [64, 3, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_equals_naive(name, chunk, monkeypatch):
    """Prefill, rows of a group on their one prompt, and decoding step by step, its keys in one chunk or more, give
    the naive full sequence's logits."""
    monkeypatch.setattr("common.model.CHUNK", chunk)
    cfg = CONFIGS[name]
    model = decoder(cfg)
    params, w = split(model)[1], naive_weights(model)
    prefill, call, decode = compiled(cfg)
    prompt_BP, len_B, tokens_MT = batch()
    prefix, prompt_hidden_BPD = prefill(params, prompt_BP, len_B)
    last_B = last_tokens(prompt_BP, len_B)
    read = call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0]
    np.testing.assert_array_equal(read.prompt, prompt_hidden_BPD)
    logits_MTV = np.asarray(read.completions[0]) @ w["out"].T
    layers, cache = model.unstack(prefix), model.new_cache(len(tokens_MT), T)
    assert cache[0][0].shape[0] == (-(-T // chunk) if chunk < T else 1)
    inputs_M, stepped = np.repeat(last_B, GROUP), []
    for t in range(T):
        hidden_MD, cache = decode(params, inputs_M, t, cache, layers, prefix.len_B)
        stepped.append(np.asarray(hidden_MD) @ w["out"].T)
        inputs_M = tokens_MT[:, t]
    for m, tokens in enumerate(tokens_MT):
        n = LENGTHS[m // GROUP]
        full = naive_hidden(cfg, w, [*prompt_BP[m // GROUP, :n], *tokens[:-1]])
        expected_TV = (full @ w["out"].T)[n - 1 :]
        assert np.abs(expected_TV).max() > 1
        np.testing.assert_allclose(prompt_hidden_BPD[m // GROUP, :n], full[:n], atol=1e-4)
        np.testing.assert_allclose(logits_MTV[m], expected_TV, atol=1e-4)
        np.testing.assert_allclose(np.stack(stepped, 1)[m], expected_TV, atol=1e-4)


def test_llama3_case_covers_all_three_branches():
    cfg = CONFIGS["llama3"]
    plain = naive_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    ratio = np.array(naive_frequencies(cfg)) / plain
    assert ratio[0] == 1 and 1 / 8 < ratio[1] < 1 and ratio[2] == 1 / 8


def test_padding_changes_nothing():
    """Other garbage after a prompt, a wider prompt array, and other tokens after position t change nothing before."""
    cfg = TINY
    params = split(decoder(cfg))[1]
    _, call, _ = compiled(cfg)

    def run(prompt_BP, len_B, tokens_MT):
        read = call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0]
        return read.prompt, read.completions[0]

    (prompt_hidden, hidden), (prompt_other, other) = run(*batch()), run(*batch(pad_seed=1))
    assert (batch()[0] != batch(pad_seed=1)[0]).any()
    np.testing.assert_array_equal(hidden, other)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(prompt_hidden[b, :n], prompt_other[b, :n])
    prompt_BP, len_B, tokens_MT = batch()
    _, wider = run(np.pad(prompt_BP, ((0, 0), (0, 5)), constant_values=3), len_B, tokens_MT)
    np.testing.assert_allclose(hidden, wider, atol=1e-5)
    # the state at t emits token t: it sees tokens before t only
    changed_MT = tokens_MT.copy()
    changed_MT[:, 2:] = (changed_MT[:, 2:] + 5) % V
    _, later = run(prompt_BP, len_B, changed_MT)
    np.testing.assert_array_equal(hidden[:, :3], later[:, :3])
    assert np.abs(np.asarray(hidden[:, 3] - later[:, 3])).max() > 1e-2


def test_readings_together_equal_each_alone():
    """Two readings of different widths, each with two completions of different lengths, in one call: the states, and
    the gradient of a sum over them, are those of each by itself. Readings of other sizes are refused."""
    graphdef, params = split(decoder(dataclasses.replace(CONFIGS["all"], remat=True)))
    (prompt_BP, len_B, tokens_MT), rng = batch(), np.random.default_rng(7)
    other_BP, one_BT, two_BT = (rng.integers(V, size=(2, n)).astype(np.int32) for n in (5, 3, 6))
    first = Reading(prompt_BP, len_B, [tokens_MT, one_BT])
    second = Reading(other_BP, np.array([2, 5], np.int32), [one_BT, two_BT])
    alone = [Reading(r.prompt_BP, r.len_B, [c]) for r in (first, second) for c in r.completions]

    @jax.jit
    def read(params, *calls):
        """States of every completion, each call of the decoder after the other, and the gradient of their sum."""

        def total(params):
            model = nnx.merge(graphdef, params)
            states = [h for call in calls for read in model(call) for h in read.completions]
            return sum(jnp.sin(h).sum() for h in states), states

        return jax.grad(total, has_aux=True)(params)

    (grad, states), (grads, each) = read(params, [first, second]), read(params, *([r] for r in alone))
    for a, b in zip(states, each, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(grad), jax.tree.leaves(grads), strict=True):
        assert np.abs(b).max() > 1e-3 or "head" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    with pytest.raises(AssertionError, match="as many prompts"):
        decoder(CONFIGS["all"])([first, second._replace(prompt_BP=other_BP[:1], len_B=np.array([2]))])


@pytest.mark.parametrize("remat", [False, True])
def test_states_of_a_layer_are_those_of_a_decoder_that_ends_there(remat):
    """Layer 1 of 2 against the naive decoder of the first layer alone; the second layer gets no gradient from it."""
    cfg = dataclasses.replace(CONFIGS["all"], remat=remat)
    model, (prompt_BP, len_B, tokens_MT) = decoder(cfg), batch()
    (graphdef, params), weights = split(model), naive_weights(model)
    assert cfg.n_layers == 2

    @jax.jit
    def read(params):
        (states,) = nnx.merge(graphdef, params)([Reading(prompt_BP, len_B, [tokens_MT])], depth=1)
        return jnp.sin(states.completions[0]).sum(), states.completions[0]

    grads, hidden_MTD = jax.grad(read, has_aux=True)(params)
    for m, tokens_T in enumerate(np.asarray(tokens_MT)):
        b = m // GROUP
        row = [*np.asarray(prompt_BP)[b, : len_B[b]], *tokens_T[:-1]]
        expected = naive_hidden(dataclasses.replace(cfg, n_layers=1), weights, row)
        np.testing.assert_allclose(hidden_MTD[m], expected[len_B[b] - 1 :], atol=2e-5)
    for leaf in jax.tree.leaves(grads["blocks"]):
        assert np.abs(leaf[0]).max() > 0 and not leaf[1].any()


def test_packed_documents_equal_each_alone():
    cfg = CONFIGS["llama3"]
    model = decoder(cfg)
    w, (graphdef, params) = naive_weights(model), split(model)
    tokens_MT = np.random.default_rng(3).integers(V, size=(2, 9)).astype(np.int32)
    segment_MT = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 3, 3, 3, 3]], np.int32)
    hidden_MTD = jax.jit(lambda params, *a: nnx.merge(graphdef, params).packed(*a))(params, tokens_MT, segment_MT)
    for m in range(2):
        for segment in set(segment_MT[m]) - {0}:
            at = np.flatnonzero(segment_MT[m] == segment)
            np.testing.assert_allclose(hidden_MTD[m, at], naive_hidden(cfg, w, tokens_MT[m, at]), atol=1e-4)


def sequence_logp(model: Decoder, dtype=jnp.float32):
    """Summed log-prob of the tokens of `batch`, through the shared prompt and token_logp."""
    prompt_BP, len_B, tokens_MT = batch()
    (read,) = model([Reading(prompt_BP, len_B, [tokens_MT])], dtype)
    return token_logp(read.completions[0], tokens_MT, model.head_VD(), 0.7)[0].sum()


@functools.cache
def gradient(cfg: ModelConfig):
    graphdef, params = split(decoder(cfg))
    return jax.jit(jax.grad(lambda p: sequence_logp(nnx.merge(graphdef, p))))(params)


def test_gradient_equals_finite_differences_of_naive():
    """The derivative along one random direction over all weights, from prompt to log-prob."""
    cfg = CONFIGS["all"]
    model = decoder(cfg)
    params = split(model)[1]
    rng = np.random.default_rng(4)
    along = jax.tree.map(lambda a: rng.standard_normal(a.shape), params)
    grads = gradient(cfg)
    slope = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(along)))
    prompt_BP, _, tokens_MT = batch()
    w, direction = naive_weights(model), naive_weights(nnx.merge(split(model)[0], along))

    def naive(step):
        moved = {name: w[name] + step * direction[name] for name in w}
        total = 0.0
        for m, tokens in enumerate(tokens_MT):
            n = LENGTHS[m // GROUP]
            hidden = naive_hidden(cfg, moved, [*prompt_BP[m // GROUP, :n], *tokens[:-1]])[n - 1 :]
            total += log_softmax(hidden @ moved["out"].T / 0.7)[np.arange(T), tokens].sum()
        return total

    h = 1e-5
    assert abs(slope) > 1
    assert slope == pytest.approx((naive(h) - naive(-h)) / (2 * h), rel=1e-3)


def test_remat_gives_the_same_gradient():
    plain, again = (gradient(dataclasses.replace(CONFIGS["all"], remat=r)) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, again)


def test_remat_is_in_the_program():
    """It is another program, which keeps less: without this the test above could not fail."""
    temporary = {}
    for remat in (False, True):
        graphdef, params = split(decoder(dataclasses.replace(CONFIGS["all"], remat=remat)))
        loss = lambda p, graphdef=graphdef: nnx.merge(graphdef, p).packed(*[jnp.ones((4, 256), int)] * 2).sum()
        temporary[remat] = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert temporary[True] < 0.8 * temporary[False]


@pytest.mark.parametrize("T_", [127, 200])
def test_causal_attention_in_blocks_equals_naive(T_):
    """Rows of several documents, after a prompt shared by two of them; value and gradient."""
    K, R, H, P_, rng = 2, 2, 4, 5, np.random.default_rng(T_)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = draw(4, T_, K * R, H), draw(4, K, H, T_), draw(4, K, T_, H)
    k_p, v_p, len_B = draw(2, K, H, P_), draw(2, K, P_, H), np.array([3, 5])
    document = np.sort(rng.integers(0, 3, (4, T_)), axis=1)
    mask = ((document[:, :, None] == document[:, None]) & np.tril(np.ones((T_, T_), bool)))[:, None, None]

    def naive(q, k, v, at):
        out = np.zeros((4, T_, K * R, H))
        for m, n, t in [(m, n, t) for m in range(4) for n in range(K * R) for t in at]:
            seen, b, h = np.flatnonzero(mask[m, 0, 0, t]), m // 2, n // R
            keys = np.concatenate([k_p[b, h, :, : len_B[b]].T, k[m, h][:, seen].T])
            p = np.exp(keys @ q[m, t, n] / H**0.5)
            out[m, t, n] = p / p.sum() @ np.concatenate([v_p[b, h, : len_B[b]], v[m, h, seen]])
        return out

    at = [0, 1, 42, 63, 64, T_ // 2, T_ - 1]
    ours = jax.jit(lambda q, k, v: attend_causal(q, k, v, mask, (k_p, v_p, len_B)))
    np.testing.assert_allclose(ours(q, k, v)[:, at], naive(q, k, v, at)[:, at], rtol=1e-4, atol=1e-5)
    whole = lambda q, k, v: attend(q, k, v, mask, (k_p, v_p, len_B))
    weight = draw(*q.shape)
    slope = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * weight).sum(), (0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slope(ours), slope(whole))


def test_bfloat16_is_close():
    cfg = TINY
    graphdef, params = split(decoder(cfg))
    prompt_BP, len_B, tokens_MT = batch()

    _, call, _ = compiled(cfg)
    hidden = np.asarray(call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0].completions[0])
    logp, entropy = token_logp(hidden, tokens_MT, decoder(cfg).head_VD())

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        (read,) = model([Reading(prompt_BP, len_B, [tokens_MT])], jnp.bfloat16)
        return read.completions[0], token_logp(read.completions[0], tokens_MT, model.head_VD())

    hidden16, (logp16, entropy16) = run(params)
    assert hidden16.dtype == jnp.bfloat16 and logp16.dtype == entropy16.dtype == jnp.float32
    assert np.abs(np.asarray(hidden16, np.float32) - hidden).max() < 0.05 * np.abs(hidden).max()
    assert 0 < np.abs(logp16 - logp).max() < 0.1 and np.abs(entropy16 - entropy).max() < 0.1


def test_bfloat16_decodes_what_it_reads():
    """Step by step, keys and values kept as decoding keeps them: the states of the float32 model but for roundings."""
    cfg = TINY
    model = decoder(cfg)
    prompt_BP, len_B, tokens_MT = batch()
    (read,) = model([Reading(prompt_BP, len_B, [tokens_MT])])
    prefix, _ = model.prefill(prompt_BP, len_B, jnp.bfloat16)
    layers, cache = model.unstack(prefix), model.new_cache(len(tokens_MT), T, jnp.bfloat16)
    inputs_MT = np.concatenate([np.repeat(last_tokens(prompt_BP, len_B), GROUP)[:, None], tokens_MT[:, :-1]], 1)
    off = []
    for t in range(T):
        hidden_MD, cache = model.decode(inputs_MT[:, t], t, cache, layers, prefix.len_B, jnp.bfloat16)
        assert hidden_MD.dtype == jnp.bfloat16
        off.append(np.abs(np.asarray(hidden_MD, np.float32) - read.completions[0][:, t]).max())
    assert 0 < max(off) < 0.05 * np.abs(read.completions[0]).max()


def test_bfloat16_adds_up_the_embedding_gradient_in_float32():
    """One token some 3,700 times: added up in bfloat16, its gradient would stop growing after a few hundred."""
    cfg = dataclasses.replace(TINY, n_layers=1)
    graphdef, params = split(decoder(cfg))
    tokens = np.random.default_rng(5).integers(V, size=(16, 256)).astype(np.int32)
    tokens[:, 1:] = np.where(np.random.default_rng(6).random((16, 255)) < 0.9, 3, tokens[:, 1:])

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, dtype):
        def total(params):
            (read,) = nnx.merge(graphdef, params)([Reading(tokens[:, :8], np.full(16, 8), [tokens])], dtype)
            return read.completions[0].astype(jnp.float32)[..., 0].sum()

        return jax.grad(total)(params)["embed"][...]

    full, half = gradient(params, jnp.float32), gradient(params, jnp.bfloat16)
    assert np.abs(full - half)[3].max() < 0.03 * np.abs(full)[3].max()
