"""What bounds a training step: every part of it by itself, beside the matmul rate that this machine reaches.

    python benchmarks/roofline.py --model nano
    python benchmarks/roofline.py --model small --prompt_tokens 512

One JSON line a part: how often a step runs it, milliseconds in a step (median of several), FLOPs that the model needs
for it, and their rate as a share of the ceiling, which is one large matmul. Parts of the update are measured forward
and backward on one micro-batch, parts of a rollout on one token of all rows. They run alone and from memory that is
warm: their sum is less than the whole, which is measured too.
"""

import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_time
from flax import nnx

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = "nano"
    """nano, small, or the folder of a checkpoint (its config.json is read, its weights are not)"""
    prompts: int = 8
    """prompts per step"""
    group: int = 8
    """completions per prompt"""
    prompt_tokens: int = 64
    """tokens of every prompt"""
    new_tokens: int = 128
    """tokens of every completion"""
    repeats: int = 15
    """runs of which the median counts"""


def seconds(f, *args, repeats: int) -> float:
    """Median wall time of f(*args), compiled and warm."""
    f, times = jax.jit(f), []
    jax.block_until_ready(f(*args))
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def backward(f):
    """f's value and its gradient by all arguments: forward and backward, of which nothing is left out as unused."""

    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return both


def parts(cfg: cts.ModelConfig, args: Args, dtype):
    """Yields (part, how often in a step, function, its arguments, FLOPs of one call)."""
    B, G, P, T = args.prompts, args.group, args.prompt_tokens, args.new_tokens
    L, D, N, K, H, F, V = (getattr(cfg, n) for n in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff",
                                                     "vocab_size"))  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(0), 99))
    rand = lambda *shape, dtype=dtype: jax.random.normal(next(keys), shape, dtype) * shape[-1] ** -0.5
    n = cts.count_micro_batches(cts.make_mesh("auto"), B, 0)
    M = B * G // n  # rows of one micro-batch
    params = nnx.state(cts.Decoder(cfg, nnx.Rngs(0)), nnx.Param)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))))

    # ---- update: one micro-batch forward and backward ----
    mlp = lambda x, gate, up, down: cts.dense(jax.nn.silu(cts.dense(x, gate)) * cts.dense(x, up), down)
    weights = rand(D, F), rand(D, F), rand(F, D)
    yield "update/mlp", n * L, backward(mlp), (rand(M, T, D), *weights), 6.0 * M * T * 3 * D * F
    qkvo = lambda x, q, k, v, o: [cts.dense(x, q), cts.dense(x, k), cts.dense(x, v), cts.dense(x, o)]
    weights = rand(D, N, H), rand(D, K, H), rand(D, K, H), rand(D, N * H)
    yield "update/qkvo", n * L, backward(qkvo), (rand(M, T, D), *weights), 6.0 * M * T * D * (2 * N + 2 * K) * H
    rope = cts.rope_table(cfg, jnp.broadcast_to(jnp.arange(T), (M, T)))
    rotary = lambda q, k: (cts.rotate(cts.rms_norm(q, 1.0, 1e-6), *rope), cts.rotate(cts.rms_norm(k, 1.0, 1e-6), *rope))
    yield "update/rope and q-k norm", n * L, backward(rotary), (rand(M, T, N, H), rand(M, T, K, H)), 0.0
    norms = lambda x, scale: cts.rms_norm(x, scale, 1e-6)
    yield "update/norms", n * (2 * L + 1), backward(norms), (rand(M, T, D), jnp.ones(D)), 0.0
    causal, length = jnp.tril(jnp.ones((T, T), bool)), jnp.full(M // G, P)
    attend = lambda q, k, v, k_p, v_p: cts.attend_causal(q, k, v, causal, (k_p, v_p, length))
    own, shared = (rand(M, T, N, H), rand(M, K, H, T), rand(M, K, T, H)), (rand(M // G, K, H, P), rand(M // G, K, P, H))
    yield "update/attention", n * L, backward(attend), (*own, *shared), 12.0 * N * H * M * T * (P + T / 2)
    tokens = jax.random.randint(next(keys), (M, T), 0, V)
    head = lambda hidden, head_VD: cts.token_logp(hidden, tokens, head_VD)[0]
    yield "update/head", n, backward(head), (rand(M, T, D), rand(V, D, dtype=jnp.float32)), 6.0 * M * T * V * D
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    yield "update/optimizer", 1, lambda g, s, p: tx.update(g, s, p), (grads, state, params), 0.0
    prompt, lengths = jax.random.randint(next(keys), (M // G, P), 0, V), jnp.full(M // G, P)

    def whole(params):
        model = nnx.merge(graphdef, params)
        ((_, hidden),) = model([cts.Reading(prompt, lengths, [tokens])], dtype)
        return cts.token_logp(hidden, tokens, model.head_VD())[0].sum()

    micro = step_time.Args(prompts=M // G, group=G, prompt_tokens=P, new_tokens=T)
    yield "update/forward and backward as a whole", n, jax.grad(whole), (params,), step_time.model_flops(cfg, micro)[1]

    # ---- rollout: one token of all rows ----
    R, model = B * G, nnx.merge(graphdef, params)
    per_token = cfg.n_layers * (D * (2 * N + 2 * K) * H + 3 * D * F)
    x = rand(R, 1, D)
    layer = lambda x, w: [mlp(x, w["gate"], w["up"], w["down"]), *(cts.dense(x, w[name]) for name in "qkv")]
    every = [{name: w[...][i] for name, w in nnx.state(model.blocks).items()} for i in range(L)]
    matmuls = lambda x, every: [layer(x, w) for w in every]
    yield "rollout/matmuls of the layers", T, matmuls, (x, every), 2.0 * R * (per_token - L * D * N * H)
    q, cache = rand(R, 1, N, H), [(rand(R, K, H, T), rand(R, K, T, H)) for _ in range(L)]
    prompts = rand(B, K, H, P), rand(B, K, P, H)
    attention = lambda q, cache, k, v: [
        cts.attend(q, a, b, jnp.arange(T) <= T // 2, (k, v, jnp.full(B, P))) for a, b in cache
    ]
    yield "rollout/attention", T, attention, (q, cache, *prompts), 4.0 * L * N * H * R * (P + T / 2)

    def draw(hidden, head_VD, key):
        logits = hidden @ head_VD.T.astype(hidden.dtype)
        return cts.first_argmax(logits + jax.random.gumbel(key, logits.shape)), jax.nn.logsumexp(logits, -1)

    yield "rollout/head and draw", T, draw, (x[:, 0], rand(V, D, dtype=jnp.float32), next(keys)), 2.0 * R * V * D
    prompt_BP, len_B = jax.random.randint(next(keys), (B, P), 0, V), jnp.full(B, P)
    sample = lambda params, key: cts.generate(
        nnx.merge(graphdef, params), prompt_BP, len_B, key, G, T, 1.0, (V,), 0, dtype=dtype
    )
    whole_flops = step_time.model_flops(cfg, step_time.Args(prompts=B, group=G, prompt_tokens=P, new_tokens=T))[0]
    yield "rollout/as a whole", 1, sample, (params, next(keys)), whole_flops


def main(args: Args) -> None:
    cts.check_args(args, ("prompts", "group", "prompt_tokens", "new_tokens", "repeats"), ())
    dtype, cfg = cts.pick_dtype("auto"), step_time.config_of(args.model)
    ceiling = step_time.matmul_ceiling(dtype)
    print(json.dumps({"part": "one 2048-cube matmul", "gflop_s": round(ceiling / 1e9, 1), "model": args.model}))
    for part, times, f, inputs, flops in parts(cfg, args, dtype):
        t = seconds(f, *inputs, repeats=args.repeats)
        line = {"part": part, "times": times, "ms": round(1e3 * t * times, 2), "gflop": round(flops * times / 1e9, 2)}
        print(json.dumps(line | {"of_ceiling": round(flops / t / ceiling, 3)}), flush=True)


if __name__ == "__main__":
    cts.cli(main, Args)
