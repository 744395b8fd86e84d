"""What bounds a training step: every part of it by itself, beside the matmul rate that this machine reaches.

    python benchmarks/roofline.py --size nano
    python benchmarks/roofline.py --size small --prompt_tokens 512

One JSON line a part: how often a step runs it, milliseconds in a step (median of several), FLOPs that the model needs
for it, and their rate as a share of the ceiling, which is one large matmul. Parts of the update are measured forward
and backward on one micro-batch, parts of a rollout on one token of all rows. They run alone and from memory that is
warm: their sum is less than the whole, whose share paired.py reports (rollout_mfu, update_mfu).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import paired

import cts_common as cts
from common.sampling import draw


@dataclasses.dataclass(frozen=True)
class Args(paired.Work):
    repeats: int = 15
    """runs of which the median counts"""


def backward(f):
    """f's value and its gradient by all arguments: forward and backward, of which nothing is left out as unused."""

    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return both


def parts(cfg: cts.ModelConfig, work: paired.Work, dtype):
    """Yields (part, how often in a step, FLOPs of one call, function, its arguments)."""
    B, G, P, T = work.prompts, work.group, work.prompt_tokens, work.new_tokens
    L, D, N, K = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads
    H, F, V = cfg.head_dim, cfg.d_ff, cfg.vocab_size
    keys = iter(jax.random.split(jax.random.key(0), 8 * L + 40))
    rand = lambda *shape, dtype=dtype: jax.random.normal(next(keys), shape, dtype) * shape[-1] ** -0.5
    ffw, qkv = lambda: (rand(D, F), rand(D, F), rand(F, D)), lambda: (rand(D, N, H), rand(D, K, H), rand(D, K, H))
    mlp = lambda x, gate, up, down: cts.dense(jax.nn.silu(cts.dense(x, gate)) * cts.dense(x, up), down)
    dense = lambda x, *weights: [cts.dense(x, w) for w in weights]
    head_VD = rand(V, D, dtype=jnp.float32)

    # ---- update: one micro-batch forward and backward ----
    n = cts.count_micro_batches(cts.make_mesh("auto"), B, 0)
    M, prompts = B * G // n, B // n  # of one micro-batch
    x_MTD = rand(M, T, D)
    yield "update/mlp", n * L, 6.0 * M * T * 3 * D * F, backward(mlp), x_MTD, *ffw()
    flops = 6.0 * M * T * D * (2 * N + 2 * K) * H
    yield "update/qkvo", n * L, flops, backward(dense), x_MTD, *qkv(), rand(D, N * H)
    rope = cts.rope_table(cfg, jnp.broadcast_to(jnp.arange(T), (M, T)))
    rotary = lambda *qk: [cts.rotate(cts.rms_norm(a, 1.0, 1e-6), *rope) for a in qk]
    yield "update/rope and q-k norm", n * L, 0.0, backward(rotary), rand(M, T, N, H), rand(M, T, K, H)
    norm = lambda x, scale: cts.rms_norm(x, scale, 1e-6)
    yield "update/norms", n * (2 * L + 1), 0.0, backward(norm), x_MTD, jnp.ones(D)
    causal, length = jnp.tril(jnp.ones((T, T), bool)), jnp.full(prompts, P)
    attend = lambda q, k, v, k_p, v_p: cts.attend_causal(q, k, v, causal, (k_p, v_p, length))
    keys_values = rand(M, K, H, T), rand(M, K, T, H), rand(prompts, K, H, P), rand(prompts, K, P, H)
    flops = 12.0 * N * H * M * T * (P + T / 2)
    yield "update/attention", n * L, flops, backward(attend), rand(M, T, N, H), *keys_values
    tokens_MT = jax.random.randint(next(keys), (M, T), 0, V)
    head = lambda hidden, head_VD: cts.token_logp(hidden, tokens_MT, head_VD)[0]
    yield "update/head", n, 6.0 * M * T * V * D, backward(head), x_MTD, head_VD
    tx, params = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)), paired.first_params(work.size)
    yield "update/optimizer", 1, 0.0, tx.update, jax.tree.map(jnp.ones_like, params), tx.init(params), params

    # ---- rollout: one token of all rows ----
    R, len_B = B * G, jnp.full(B, P)
    x_R1D = rand(R, 1, D)
    matmuls = lambda x, layers: [(mlp(x, *a), dense(x, *b)) for a, b in layers]
    flops = 2.0 * R * L * D * ((N + 2 * K) * H + 3 * F)
    yield "rollout/matmuls of the layers", T, flops, matmuls, x_R1D, [(ffw(), qkv()) for _ in range(L)]
    written = jnp.arange(T) <= T // 2
    attention = lambda q, caches, *prompt: [cts.attend(q, k, v, written, (*prompt, len_B)) for k, v in caches]
    caches, prompt = [(rand(R, K, H, T), rand(R, K, T, H)) for _ in range(L)], (rand(B, K, H, P), rand(B, K, P, H))
    flops = 4.0 * L * N * H * R * (P + T / 2)
    yield "rollout/attention", T, flops, attention, rand(R, 1, N, H), caches, *prompt

    def head_and_draw(hidden, head_VD, key):
        logits = hidden @ head_VD.T.astype(hidden.dtype)
        weight = jnp.exp(logits - logits.max(-1, keepdims=True))
        return draw(weight, jax.random.uniform(key, (R, 2))), weight.sum(-1), (weight * logits).sum(-1)

    yield "rollout/head and draw", T, 2.0 * R * V * D, head_and_draw, x_R1D[:, 0], head_VD, next(keys)


def main(args: Args) -> None:
    cts.check_args(args, "prompt_tokens", "new_tokens", "repeats")
    dtype, cfg = cts.pick_dtype("auto"), paired.config_of(args.size)
    ceiling = paired.matmul_ceiling(dtype)
    print(json.dumps({"part": "one 2048-cube matmul", "gflop_s": round(ceiling / 1e9, 1), "size": args.size}))
    for part, times, flops, f, *inputs in parts(cfg, args, dtype):
        t = paired.seconds(f, *inputs, repeats=args.repeats)
        line = {"part": part, "times": times, "ms": round(1e3 * t * times, 2), "gflop": round(flops * times / 1e9, 2)}
        print(json.dumps(line | {"of_ceiling": round(flops / t / ceiling, 3)}), flush=True)


if __name__ == "__main__":
    cts.cli(main, Args)
