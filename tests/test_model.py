"""Decoder, log-probs, sampler and mesh table, against a naive NumPy decoder with a loop for every axis."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AbstractMesh

from common.basics import InputError
from common.hosts import count_micro_batches, make_mesh, shard_rule
from common.model import Decoder, ModelConfig, Reading, attend, attend_causal, last_tokens
from common.sampling import generate, token_logp

V, PAD, NEVER = 17, 0, -1  # NEVER: an end token that no sampler gives
TINY = ModelConfig(vocab_size=V, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)
LLAMA3 = (8.0, 1.0, 4.0, 32)  # at theta 100 and H=6 the wavelengths are 6 (kept), 29 (blended), 135 (divided by 8)
CONFIGS = {
    "nano": TINY,
    "qwen2": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True, rope_theta=1e2, norm_eps=1e-2),
    "llama3": dataclasses.replace(
        TINY, n_kv_heads=1, qk_norm=False, tie_embeddings=False, rope_theta=1e2, rope_scaling=LLAMA3
    ),
    "all": dataclasses.replace(TINY, n_kv_heads=4, qkv_bias=True, tie_embeddings=False, rope_scaling=LLAMA3),
}


@functools.cache
def decoder(cfg: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder whose every leaf, norms and biases too, is random and large enough to matter."""
    graphdef, shapes = split(nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    fill = lambda path, a: jnp.asarray(0.4 * rng.standard_normal(a.shape) + ("norm" in str(path)), jnp.float32)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))


def split(model: Decoder):
    return nnx.split(model, nnx.Param)


@functools.cache
def compiled(cfg: ModelConfig):
    """Jitted (prefill, call, decode) of a config, with the parameters as an argument."""
    graphdef = split(decoder(cfg))[0]
    prefill = jax.jit(lambda params, *a: nnx.merge(graphdef, params).prefill(*a))
    call = jax.jit(lambda params, *a: nnx.merge(graphdef, params)(*a))
    decode = jax.jit(lambda params, *a: nnx.merge(graphdef, params).decode(*a))
    return prefill, call, decode


# ---- the naive decoder --------------------------------------------------------------------------------------------
def naive_weights(model: Decoder) -> dict[str, np.ndarray]:
    """All weights as float64 arrays under plain names."""
    w = {name: np.asarray(leaf[...], np.float64) for name, leaf in nnx.state(model.blocks).items()}
    w["embed"], w["final_norm"] = (np.asarray(leaf[...], np.float64) for leaf in (model.embed, model.final_norm))
    w["out"] = w["embed"] if model.cfg.tie_embeddings else np.asarray(model.head[...], np.float64)
    return w


def naive_norm(x, scale, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * scale


def naive_frequencies(cfg: ModelConfig) -> list[float]:
    """theta^(-2i/H); for Llama 3.1 as in `apply_scaling` of its reference code."""
    freqs = [1.0 / cfg.rope_theta ** (2 * i / cfg.head_dim) for i in range(cfg.head_dim // 2)]
    if cfg.rope_scaling is None:
        return freqs
    scale_factor, low_freq_factor, high_freq_factor, old_context_len = cfg.rope_scaling
    low_freq_wavelen, high_freq_wavelen = old_context_len / low_freq_factor, old_context_len / high_freq_factor
    scaled = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            scaled.append(freq)
        elif wavelen > low_freq_wavelen:
            scaled.append(freq / scale_factor)
        else:
            smooth = (old_context_len / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
            scaled.append((1 - smooth) * freq / scale_factor + smooth * freq)
    return scaled


def naive_rope(x, position, freqs):
    """Channel i turns with channel i + H/2."""
    out, half = np.array(x), len(x) // 2
    for i in range(half):
        c, s = math.cos(position * freqs[i]), math.sin(position * freqs[i])
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


def naive_hidden(cfg: ModelConfig, w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Hidden states [len(tokens), D] of one sequence."""
    freqs = naive_frequencies(cfg)
    xs = [w["embed"][t] for t in tokens]
    for i in range(cfg.n_layers):
        keys, values, after = [], [], []
        for position, x in enumerate(xs):
            h = naive_norm(x, w["attn_norm"][i], cfg.norm_eps)

            def head(name, n, h=h, i=i, position=position):
                out = h @ w[name][i][:, n]
                if cfg.qkv_bias:
                    out = out + w[f"{name}_bias"][i][n]
                if cfg.qk_norm and name in "qk":
                    out = naive_norm(out, w[f"{name}_norm"][i], cfg.norm_eps)
                return naive_rope(out, position, freqs) if name in "qk" else out

            keys.append([head("k", n) for n in range(cfg.n_kv_heads)])
            values.append([head("v", n) for n in range(cfg.n_kv_heads)])
            for n in range(cfg.n_heads):
                kv, q = n // (cfg.n_heads // cfg.n_kv_heads), head("q", n)
                scores = np.array([q @ keys[s][kv] / math.sqrt(cfg.head_dim) for s in range(position + 1)])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed = sum(weights[s] * values[s][kv] for s in range(position + 1))
                x = x + mixed @ w["o"][i][n]
            h = naive_norm(x, w["mlp_norm"][i], cfg.norm_eps)
            gate = h @ w["gate"][i]
            after.append(x + (gate / (1 + np.exp(-gate)) * (h @ w["up"][i])) @ w["down"][i])
        xs = after
    return np.array([naive_norm(x, w["final_norm"], cfg.norm_eps) for x in xs])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# ---- decoder ------------------------------------------------------------------------------------------------------
LENGTHS, WIDTH, GROUP, T = [6, 3], 8, 2, 4


def batch(pad_seed: int = 0):
    """(prompt_BP with garbage in the pads, len_B, tokens_MT): the real tokens do not depend on pad_seed."""
    rng = np.random.default_rng(1)
    prompt_BP, tokens_MT = rng.integers(V, size=(2, WIDTH)), rng.integers(V, size=(2 * GROUP, T))
    garbage = np.random.default_rng((2, pad_seed)).integers(V, size=(2, WIDTH))
    for b, n in enumerate(LENGTHS):
        prompt_BP[b, n:] = garbage[b, n:]
    return prompt_BP.astype(np.int32), np.array(LENGTHS, np.int32), tokens_MT.astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_equals_naive(name):
    """Prefill, rows of a group on their one prompt, and decoding step by step give the naive full sequence's logits."""
    cfg = CONFIGS[name]
    model = decoder(cfg)
    params, w = split(model)[1], naive_weights(model)
    prefill, call, decode = compiled(cfg)
    prompt_BP, len_B, tokens_MT = batch()
    prefix, prompt_hidden_BPD = prefill(params, prompt_BP, len_B)
    last_B = last_tokens(prompt_BP, len_B)
    read = call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0]
    np.testing.assert_array_equal(read[0], prompt_hidden_BPD)
    logits_MTV = np.asarray(read[1]) @ w["out"].T
    layers, cache = model.unstack(prefix), model.new_cache(len(tokens_MT), T)
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
        return call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0]

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
            states = [h for call in calls for _, *completions in model(call) for h in completions]
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
    ((_, hidden_MTD),) = model([Reading(prompt_BP, len_B, [tokens_MT])], dtype)
    return token_logp(hidden_MTD, tokens_MT, model.head_VD(), 0.7)[0].sum()


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
    hidden = np.asarray(call(params, [Reading(prompt_BP, len_B, [tokens_MT])])[0][1])
    logp, entropy = token_logp(hidden, tokens_MT, decoder(cfg).head_VD())

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        ((_, hidden_MTD),) = model([Reading(prompt_BP, len_B, [tokens_MT])], jnp.bfloat16)
        return hidden_MTD, token_logp(hidden_MTD, tokens_MT, model.head_VD())

    hidden16, (logp16, entropy16) = run(params)
    assert hidden16.dtype == jnp.bfloat16 and logp16.dtype == entropy16.dtype == jnp.float32
    assert np.abs(np.asarray(hidden16, np.float32) - hidden).max() < 0.05 * np.abs(hidden).max()
    assert 0 < np.abs(logp16 - logp).max() < 0.1 and np.abs(entropy16 - entropy).max() < 0.1


def test_bfloat16_adds_up_the_embedding_gradient_in_float32():
    """One token some 3,700 times: added up in bfloat16, its gradient would stop growing after a few hundred."""
    cfg = dataclasses.replace(TINY, n_layers=1)
    graphdef, params = split(decoder(cfg))
    tokens = np.random.default_rng(5).integers(V, size=(16, 256)).astype(np.int32)
    tokens[:, 1:] = np.where(np.random.default_rng(6).random((16, 255)) < 0.9, 3, tokens[:, 1:])

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, dtype):
        def total(params):
            ((_, h),) = nnx.merge(graphdef, params)([Reading(tokens[:, :8], np.full(16, 8), [tokens])], dtype)
            return h.astype(jnp.float32)[..., 0].sum()

        return jax.grad(total)(params)["embed"][...]

    full, half = gradient(params, jnp.float32), gradient(params, jnp.bfloat16)
    assert np.abs(full - half)[3].max() < 0.03 * np.abs(full)[3].max()


# ---- log-probs ----------------------------------------------------------------------------------------------------
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


# ---- sampler ------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logp_equals_token_logp(temperature):
    model = decoder(TINY)
    params = split(model)[1]
    _, call, _ = compiled(TINY)
    prompt_BP, len_B, _ = batch()
    out = sampler(TINY, 3, STEPS)(prompt_BP, len_B, temperature=temperature, eos_id=5)
    hidden_MTD = call(params, [Reading(prompt_BP, len_B, [out["tokens_MT"]])])[0][1]
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


# ---- mesh ---------------------------------------------------------------------------------------------------------
def specs(mesh, tree, **options):
    return jax.tree.map(lambda s: tuple(s.spec), shard_rule(mesh, tree, **options))


def test_shard_rule_leaves_undivided_axes_whole():
    """On a (4, 2) mesh: D=12 and H=6 against 4 and 2, V=17 against 2, N=4 and K=1 against 2, F=10 against both."""
    mesh = AbstractMesh((4, 2), ("data", "model"))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {
        "embed": shape(17, 12), "head": shape(18, 13), "final_norm": shape(12), "scale": shape(),
        "blocks": {"q": shape(2, 12, 4, 6), "k": shape(2, 12, 1, 6), "o": shape(2, 4, 6, 12), "gate": shape(2, 12, 10),
                   "down": shape(2, 10, 14), "q_norm": shape(2, 6), "q_bias": shape(2, 4, 6)},
    }  # fmt: skip
    got = specs(mesh, tree)
    assert got["embed"] == (None, "data") and got["head"] == ("model", None)
    assert got["final_norm"] == (None,) and got["scale"] == ()
    assert got["blocks"] == {
        "q": (None, "data", "model", None), "k": (None, "data", None, None), "o": (None, "model", None, "data"),
        "gate": (None, "data", "model"), "down": (None, "model", None), "q_norm": (None, None),
        "q_bias": (None, None, None),
    }  # fmt: skip
    assert specs(mesh, {"a": {"q": tree["blocks"]["q"]}}, at_rest=False)["a"]["q"] == (None, None, "model", None)


def test_shard_rule_finds_the_weights_of_a_real_tree():
    """Model and optimizer state: every matrix is sharded as its name says, counters stay whole."""
    mesh = AbstractMesh((2, 2), ("data", "model"))
    params = split(decoder(CONFIGS["all"]))[1]
    flat = jax.tree_util.tree_leaves_with_path(shard_rule(mesh, (params, optax.adamw(1.0).init(params))))
    downs = [tuple(s.spec) for path, s in flat if "'down'" in str(path)]
    assert downs == [(None, "model", "data")] * 3  # the weight and both moments
    assert all(tuple(s.spec) == () for path, s in flat if "count" in str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("4", "--mesh 4: expected two numbers DATA,MODEL or auto"),
        ("two,1", "--mesh two,1: expected two numbers"),
        ("1,1,1", "expected two numbers"),
        ("", "expected two numbers"),
        ("3,1", "3 x 1 devices asked for, 4 are here"),
        ("0,4", "0 x 4 devices asked for"),
        ("-2,-2", "-2 x -2 devices asked for"),
    ],
)
def test_make_mesh_refuses(spec, message, monkeypatch):
    """On four devices (faked: the refusal comes before any is used)."""
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    with pytest.raises(InputError, match=message):
        make_mesh(spec)


@pytest.mark.parametrize(
    ("data", "prompts", "micro", "expected"),
    [
        (4, 16, 0, 4),  # a CPU's own choice: one prompt per device at a time
        (1, 6, 0, 6),
        (1, 6, 3, 2),
        (4, 16, 16, 1),
        (4, 6, 0, "--prompts 6 .* is not divisible over 4 data devices"),
        (1, 16, 3, "micro-batches of 3"),
        (4, 16, 2, "micro-batches of 2"),
        (1, 16, 32, "micro-batches of 32"),
        (1, 16, -4, "micro-batches of -4"),
    ],
)
def test_count_micro_batches(data, prompts, micro, expected):
    mesh = types.SimpleNamespace(shape={"data": data, "model": 1})
    if isinstance(expected, int):
        assert count_micro_batches(mesh, prompts, micro) == expected
    else:
        with pytest.raises(InputError, match=expected):
            count_micro_batches(mesh, prompts, micro)


@pytest.mark.parametrize("spec", ["auto", "1,1"])
def test_make_mesh(spec):
    if len(jax.devices()) != 1:
        pytest.skip("needs exactly one device")
    assert dict(make_mesh(spec).shape) == {"data": 1, "model": 1}
