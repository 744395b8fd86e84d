"""Small random decoders, and the decoder written out in NumPy with a loop for every axis: what the tests of
`model` and `sampling` measure against."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.model import Decoder, ModelConfig

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


# ---- in NumPy -------------------------------------------------------------------------------------------------------
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


# ---- a batch for it -------------------------------------------------------------------------------------------------
LENGTHS, WIDTH, GROUP, T = [6, 3], 8, 2, 4


def batch(pad_seed: int = 0):
    """(prompt_BP with garbage in the pads, len_B, tokens_MT): the real tokens do not depend on pad_seed."""
    rng = np.random.default_rng(1)
    prompt_BP, tokens_MT = rng.integers(V, size=(2, WIDTH)), rng.integers(V, size=(2 * GROUP, T))
    garbage = np.random.default_rng((2, pad_seed)).integers(V, size=(2, WIDTH))
    for b, n in enumerate(LENGTHS):
        prompt_BP[b, n:] = garbage[b, n:]
    return prompt_BP.astype(np.int32), np.array(LENGTHS, np.int32), tokens_MT.astype(np.int32)
