"""One decoder-only transformer for the nano-LM and for Llama/Qwen-shaped checkpoints. Returns hidden states; log-probs
and samples are made from them in `sampling`. Used by all trainers; knows no text."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHUNK = 64  # keys of a completion that decoding reads at once, on CPUs


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder; the defaults are the `nano` preset. rope_scaling is (factor, low, high, original_len)."""

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 512
    rope_theta: float = 1e4
    rope_scaling: tuple[float, float, float, int] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    remat: bool = False  # the backward pass computes each layer again: a quarter slower, a fraction of the memory


class Reading(NamedTuple):
    """B prompts [B, P], len_B tokens long, and completions that follow them, given and not sampled: arrays of tokens
    [M, T], whose row m belongs to prompt m // (M // B)."""

    prompt_BP: jax.Array
    len_B: jax.Array
    completions: Sequence[jax.Array] = ()


class States(NamedTuple):
    """Hidden states of one Reading: `prompt` [B, P, D], and of each of its completions [M, T, D], where the state at
    position t is the one that emits token t."""

    prompt: jax.Array
    completions: list[jax.Array]


class Rows(NamedTuple):
    """Rows of tokens [M, T] that pass through the layers together. They may also see the first seen_B keys of the rows
    at index `after`: their prompts."""

    tokens_MT: jax.Array
    pos_MT: jax.Array
    mask: jax.Array
    after: int | None = None
    seen_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys [L, B, K, H, P] and values [L, B, K, P, H] of B prompts, and how many of each count [B]."""

    k_LBKHP: jax.Array
    v_LBKPH: jax.Array
    len_B: jax.Array


def rms_norm(x, scale, eps: float):
    """RMSNorm in float32 (https://arxiv.org/abs/1910.07467), returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rope_table(cfg: ModelConfig, pos_MT):
    """cos, sin [M, T, 1, 2, H/2] of rotary embeddings, sin with the sign of its half; with Llama-3.1's frequency
    scaling where the config has it."""
    freq_H = cfg.rope_theta ** -(jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    if cfg.rope_scaling is not None:
        factor, low, high, original = cfg.rope_scaling
        blend = jnp.clip((original * freq_H / (2 * math.pi) - low) / (high - low), 0, 1)
        freq_H = freq_H * (blend + (1 - blend) / factor)
    angle = pos_MT[..., None].astype(jnp.float32) * freq_H
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos, cos], 2)[:, :, None], jnp.stack([-sin, sin], 2)[:, :, None]


def rotate(x_MTNH, cos, sin):
    """Rotate halves, as Llama and Qwen checkpoints expect. Two halves on an axis of their own, swapped by a flip: no
    concatenation, which a CPU runs slowly."""
    halves = x_MTNH.reshape(*x_MTNH.shape[:-1], 2, -1).astype(jnp.float32)
    return (halves * cos + jnp.flip(halves, -2) * sin).reshape(x_MTNH.shape).astype(x_MTNH.dtype)


def dense(x, w, n_in: int = 1):
    """x [..., *in] times w [*in, *out], with n_in input axes, as one 2-D matmul.

    The same as einsum, but XLA's CPU backend computes the weight gradient of a 2-D matmul 2.5 times as fast, and a
    product of bfloat16 three times as fast where it is asked for in float32.
    """
    n = math.prod(w.shape[:n_in])
    out_type = jnp.float32 if jax.default_backend() == "cpu" else x.dtype
    out = jnp.matmul(x.reshape(-1, n), w.astype(x.dtype).reshape(n, -1), preferred_element_type=out_type)
    return out.astype(x.dtype).reshape(*x.shape[: x.ndim - n_in], *w.shape[n_in:])


def attend(q_MTNH, k_MKHS, v_MKSH, mask, prefix=None):
    """Grouped-query attention of M rows on their own keys and, if given, on the keys of their group's one prompt.

    mask: boolean, broadcastable to [M, 1, 1, T, S]. prefix: (k_BKHP, v_BKPH, len_B); row m belongs to prompt m // G.
    The two parts share one softmax by its maximum and sum; nothing is concatenated and no prompt is repeated. Keys are
    stored with time last: on a CPU the small matmuls of decoding are five times as fast that way.
    """
    (M, T, N, H), K = q_MTNH.shape, k_MKHS.shape[1]
    R = N // K
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    q_MKRTH = (q_MTNH * H**-0.5).reshape(M, T, K, R, H).transpose(0, 2, 3, 1, 4)
    own = matmul(q_MKRTH.reshape(M, K, R * T, H), k_MKHS).reshape(M, K, R, T, -1)
    own = jnp.where(mask, own, -1e30)
    top = own.max(-1)
    if prefix is not None:
        k_BKHP, v_BKPH, len_B = prefix
        B, P = k_BKHP.shape[0], k_BKHP.shape[3]
        G = M // B
        by_prompt = lambda a: a.reshape(B, G, *a.shape[1:]).swapaxes(1, 2)  # [M, K, ...] -> [B, K, G, ...]
        by_row = lambda a: a.swapaxes(1, 2).reshape(M, K, *a.shape[3:])
        shared = matmul(by_prompt(q_MKRTH).reshape(B, K, G * R * T, H), k_BKHP).reshape(B, K, G, R, T, P)
        shared = jnp.where((jnp.arange(P) < len_B[:, None])[:, None, None, None, None], shared, -1e30)
        top = jnp.maximum(top, by_row(shared.max(-1)))
    top = jax.lax.stop_gradient(top)  # the maximum only keeps exp in range: it cancels
    own = jnp.exp(own - top[..., None])
    total = own.sum(-1)
    out = matmul(own.reshape(M, K, R * T, -1).astype(v_MKSH.dtype), v_MKSH).reshape(M, K, R, T, H)
    if prefix is not None:
        shared = jnp.exp(shared - by_prompt(top)[..., None])
        total = total + by_row(shared.sum(-1))
        out_p = matmul(shared.reshape(B, K, G * R * T, P).astype(v_BKPH.dtype), v_BKPH)
        out = out + by_row(out_p.reshape(B, K, G, R, T, H))
    out = (out / total[..., None]).astype(q_MTNH.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(M, T, N, H)


def attend_written(q_M1NH, k_CMKHS, v_CMKSH, t, prefix):
    """Attention of one query a row, at time t, on the keys of its prompt and on its own up to t; those lie in C chunks
    of S, of which the chunks after t are not read. `prefix` as in `attend`; what the parts give is put together by
    maximum and sum, as there."""
    (M, _, N, H), (C, _, K, _, S) = q_M1NH.shape, k_CMKHS.shape
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    q_MKRH = (q_M1NH * H**-0.5).reshape(M, K, N // K, H)

    def add(parts, score, v, seen):
        """(maximum, sum of exponentials, sum of values) so far, with those of some more keys."""
        top, total, out = parts
        score = jnp.where(seen, score, -1e30)
        now = jnp.maximum(top, score.max(-1))
        shrink, weight = jnp.exp(top - now), jnp.exp(score - now[..., None])
        return now, total * shrink + weight.sum(-1), out * shrink[..., None] + matmul(weight.astype(v.dtype), v)

    k_BKHP, v_BKPH, len_B = prefix
    B, P = k_BKHP.shape[0], k_BKHP.shape[3]
    by_prompt = lambda a: a.reshape(B, M // B, *a.shape[1:]).swapaxes(1, 2).reshape(B, K, -1, *a.shape[3:])
    by_row = lambda a: a.reshape(B, K, M // B, -1, *a.shape[3:]).swapaxes(1, 2).reshape(M, K, -1, *a.shape[3:])
    none = (jnp.full((B, K, M // B * N // K), -1e30), jnp.zeros(()), jnp.zeros(()))
    seen = (jnp.arange(P) < len_B[:, None])[:, None, None]
    parts = tuple(map(by_row, add(none, matmul(by_prompt(q_MKRH), k_BKHP), v_BKPH, seen)))

    def chunk(c, parts):
        return add(parts, matmul(q_MKRH, k_CMKHS[c]), v_CMKSH[c], c * S + jnp.arange(S) <= t)

    _, total, out = chunk(0, parts) if C == 1 else jax.lax.fori_loop(0, t // S + 1, chunk, parts)
    return (out / total[..., None]).astype(q_M1NH.dtype).reshape(M, 1, N, H)


def attend_causal(q_MTNH, k_MKHT, v_MKTH, mask, prefix=None):
    """`attend` where key t is none of the queries before t: block by block of queries, each on the keys up to its end,
    which leaves out up to 3/8 of the work. mask: [T, T] or [M, 1, 1, T, T]."""
    T = q_MTNH.shape[1]
    size = -(-T // max(1, min(4, T // 64)))
    parts = [
        attend(q_MTNH[:, i : i + size], k_MKHT[..., :end], v_MKTH[:, :, :end], mask[..., i : i + size, :end], prefix)
        for i, end in ((i, min(i + size, T)) for i in range(0, T, size))
    ]
    return jnp.concatenate(parts, 1)


class Blocks(nnx.Module):
    """All L transformer blocks, their weights stacked on a leading layer axis so that one scan runs them."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        L, D, N, K, H, F = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff
        normal = lambda *shape, std=cfg.d_model**-0.5: nnx.Param(
            jax.random.normal(rngs.params(), (L, *shape), jnp.float32) * std
        )
        ones = lambda *shape: nnx.Param(jnp.ones((L, *shape), jnp.float32))
        self.attn_norm, self.mlp_norm = ones(D), ones(D)
        self.q, self.k, self.v = normal(D, N, H), normal(D, K, H), normal(D, K, H)
        self.o = normal(N, H, D, std=D**-0.5 / math.sqrt(2 * L))  # residual outputs scaled down with depth (GPT-2)
        self.gate, self.up = normal(D, F), normal(D, F)
        self.down = normal(F, D, std=D**-0.5 / math.sqrt(2 * L))
        if cfg.qkv_bias:
            zeros = lambda *shape: nnx.Param(jnp.zeros((L, *shape), jnp.float32))
            self.q_bias, self.k_bias, self.v_bias = zeros(N, H), zeros(K, H), zeros(K, H)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = ones(H), ones(H)


class Decoder(nnx.Module):
    """Decoder-only transformer: RMSNorm, RoPE, GQA, SwiGLU. Returns hidden states, not log-probs.

    A prompt is computed once; the completions of all its rows attend to it, in training (`__call__`) and in sampling
    (`prefill`, `decode`). The first input of a completion is the prompt's last token, so that the state at position t
    is the one that emits token t.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        V, D = cfg.vocab_size, cfg.d_model
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32) * 0.02)
        self.blocks = Blocks(cfg, rngs)
        self.final_norm = nnx.Param(jnp.ones((D,), jnp.float32))
        if not cfg.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32) * 0.02)

    def head_VD(self):
        """Output embedding [V, D]."""
        return self.embed[...] if self.cfg.tie_embeddings else self.head[...]

    def _layer(self, w, x_MTD, rope, mask, prefix, cache, t):
        """One block: (x, its own keys and values). cache: None, or (k_CMKHS, v_CMKSH), written at time t in place."""
        cfg = self.cfg
        h = rms_norm(x_MTD, w["attn_norm"], cfg.norm_eps)
        q, k, v = (dense(h, w[name]) for name in "qkv")
        if cfg.qkv_bias:
            q, k, v = (a + w[name].astype(h.dtype) for a, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
        if cfg.qk_norm:
            q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # heads first; keys [M, K, H, S], values [M, K, S, H]
        if cache is not None:
            c, s = t // cache[0].shape[-1], t % cache[0].shape[-1]
            k = jax.lax.dynamic_update_slice(cache[0], k[None].astype(cache[0].dtype), (c, 0, 0, 0, s))
            v = jax.lax.dynamic_update_slice(cache[1], v[None].astype(cache[1].dtype), (c, 0, 0, s, 0))
        attended = attend_causal(q, k, v, mask, prefix) if cache is None else attend_written(q, k, v, t, prefix)
        x_MTD = x_MTD + dense(attended, w["o"], n_in=2)
        h = rms_norm(x_MTD, w["mlp_norm"], cfg.norm_eps)
        h = jax.nn.silu(dense(h, w["gate"])) * dense(h, w["up"])
        return x_MTD + dense(h, w["down"]), (k, v)

    def _run(self, rows: list[Rows], dtype, keep_kv=False, depth: int = 0, learns: bool = True):
        """All layers (or the first `depth`) without a cache: of every Rows its hidden states [M, T, D] after the final
        norm, and its stacked (k, v) if asked for. `learns`: as in `__call__`.

        All rows pass a layer before any enters the next: so the backward pass adds up what they give to the weights
        layer by layer and holds one gradient, whatever their number.
        """
        ropes = [rope_table(self.cfg, r.pos_MT) for r in rows]
        depth = depth or self.cfg.n_layers
        weights = {name: w[:depth] for name, w in nnx.state(self.blocks).items()}

        def layer(xs, w):
            out, kv = [], []
            for r, x, rope in zip(rows, xs, ropes):
                prefix = None if r.after is None else (*kv[r.after], r.seen_B)
                x, new_kv = self._layer(w, x, rope, r.mask, prefix, None, None)
                out.append(x)
                kv.append(new_kv)
            return out, kv if keep_kv else None

        # one lookup for all, prompt by prompt: its gradient is one array of the vocabulary's size, added up in float32
        B = min(len(r.tokens_MT) for r in rows)
        flat = [r.tokens_MT.reshape(B, -1) for r in rows]
        x_BSD = self.embed[...][jnp.concatenate(flat, 1)].astype(dtype)
        parts = jnp.split(x_BSD, np.cumsum([f.shape[1] for f in flat])[:-1], 1)
        xs = [part.reshape(*r.tokens_MT.shape, -1) for r, part in zip(rows, parts)]
        # unrolled, what the layers keep for the backward pass is not copied into one stacked array; else a loop is as
        # fast and compiles sooner
        unroll = depth if learns and not self.cfg.remat else 1
        xs, kept = jax.lax.scan(jax.checkpoint(layer) if self.cfg.remat else layer, xs, weights, unroll=unroll)
        return [rms_norm(x, self.final_norm[...], self.cfg.norm_eps) for x in xs], kept

    def packed(self, tokens_MT, segment_MT, dtype=jnp.float32):
        """Hidden states of rows that hold several documents, told apart by segment_MT (RoPE is relative)."""
        T = tokens_MT.shape[1]
        same = segment_MT[:, :, None] == segment_MT[:, None, :]
        mask = (same & jnp.tril(jnp.ones((T, T), bool)))[:, None, None]
        return self._run([Rows(tokens_MT, jnp.broadcast_to(jnp.arange(T), tokens_MT.shape), mask)], dtype)[0][0]

    def _prompts(self, prompt_BP) -> Rows:
        P = prompt_BP.shape[1]
        return Rows(prompt_BP, jnp.broadcast_to(jnp.arange(P), prompt_BP.shape), jnp.tril(jnp.ones((P, P), bool)))

    def prefill(self, prompt_BP, len_B, dtype=jnp.float32):
        """Prompts -> (Prefix of all but each prompt's last token, hidden states [B, P, D])."""
        (hidden_BPD,), ((k, v),) = self._run([self._prompts(prompt_BP)], dtype, keep_kv=True, learns=False)
        return Prefix(k, v, len_B - 1), hidden_BPD

    def __call__(
        self, readings: Sequence[Reading], dtype=jnp.float32, depth: int = 0, learns: bool = True
    ) -> list[States]:
        """The States of each Reading, of the last layer or of layer `depth`, the first being 1. All readings of a call
        have the same B. `learns`: a gradient will be taken; without, the program is the smaller one."""
        rows, firsts = [], []
        for prompt_BP, len_B, completions in readings:
            B, seen_B, last_B1 = len(prompt_BP), len_B - 1, last_tokens(prompt_BP, len_B)[:, None]
            assert len(readings[0].prompt_BP) == B, "readings of one call have as many prompts"
            firsts.append(len(rows))
            rows.append(self._prompts(prompt_BP))
            for tokens_MT in completions:
                M, T = tokens_MT.shape
                inputs_MT = jnp.concatenate([jnp.repeat(last_B1, M // B, 0), tokens_MT[:, :-1]], 1)
                pos_MT = jnp.repeat(seen_B, M // B)[:, None] + jnp.arange(T)
                rows.append(Rows(inputs_MT, pos_MT, jnp.tril(jnp.ones((T, T), bool)), firsts[-1], seen_B))
        hidden, _ = self._run(rows, dtype, depth=depth, learns=learns)
        return [States(hidden[i], hidden[i + 1 : j]) for i, j in zip(firsts, [*firsts[1:], None])]

    def unstack(self, prefix: Prefix) -> list[tuple]:
        """[(weights, prompt keys, prompt values)] of every layer: taken apart once, outside the decoding loop, where
        slicing a stacked array would copy it for every token. Keys and values in the type of `cache_dtype`."""
        weights = {name: w[...] for name, w in nnx.state(self.blocks).items()}
        dtype = cache_dtype(prefix.k_LBKHP.dtype)
        k_LBKHP, v_LBKPH = prefix.k_LBKHP.astype(dtype), prefix.v_LBKPH.astype(dtype)
        take = lambda i: ({n: w[i] for n, w in weights.items()}, k_LBKHP[i], v_LBKPH[i])
        return [take(i) for i in range(self.cfg.n_layers)]

    def new_cache(self, M: int, T: int, dtype=jnp.float32) -> list[tuple]:
        """Empty keys [C, M, K, H, S] and values [C, M, K, S, H] of every layer, C * S >= T: on CPUs in chunks, so that
        a step reads what is written; elsewhere, where a loop inside the loop would wait for the host, in one."""
        K, H, C = self.cfg.n_kv_heads, self.cfg.head_dim, -(-T // CHUNK) if jax.default_backend() == "cpu" else 1
        keys, values = (C, M, K, H, -(-T // C)), (C, M, K, -(-T // C), H)
        zeros = lambda shape: jnp.zeros(shape, cache_dtype(dtype))
        return [(zeros(keys), zeros(values)) for _ in range(self.cfg.n_layers)]

    def decode(self, input_M, t, cache, layers, len_B, dtype=jnp.float32):
        """One decoding step at time t: (hidden [M, D], cache). `layers` is `unstack(prefix)`, len_B is prefix.len_B."""
        M, B = input_M.shape[0], len_B.shape[0]
        rope = rope_table(self.cfg, (jnp.repeat(len_B, M // B) + t)[:, None])
        x = self.embed[...].astype(dtype)[input_M][:, None]
        written = []
        for (w, k, v), own in zip(layers, cache):
            x, own = self._layer(w, x, rope, None, (k, v, len_B), own, t)
            written.append(own)
        return rms_norm(x[:, 0], self.final_norm[...], self.cfg.norm_eps), written


def cache_dtype(dtype):
    """What decoding keeps keys and values in: the compute dtype, but on CPUs float32, whose many small matmuls of
    bfloat16 take longer than all else of a token."""
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def last_tokens(prompt_BP, len_B):
    """Each prompt's last token [B]."""
    return jnp.take_along_axis(prompt_BP, (len_B - 1)[:, None], 1)[:, 0]


def leaf_name(path) -> str:
    """The name of a leaf by its path in a parameter tree, e.g. "blocks/q"."""
    return "/".join(str(k.key) for k in path if hasattr(k, "key"))


def leaf_names(tree) -> dict[str, Any]:
    """{"blocks/q": leaf, ...} of a parameter tree, sorted by name."""
    named = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return dict(sorted(named.items()))
