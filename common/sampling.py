"""Token log-probs without a [B, T, V] array, and the sampler. Used by all trainers and the evaluation."""

import math

import jax
import jax.numpy as jnp

from common.model import Decoder, last_tokens

HALVINGS = 2  # of a batch that shrinks with its prompts


def by_chunks(one, inputs, chunk: int):
    """`one(None, inputs)` of chunks of the arrays [M, T, ...] over time, its results [M, T, ...] put together again."""
    M, T = inputs[0].shape[:2]
    n = -(-T // chunk)
    chunk = -(-T // n)  # as even as may be; the last chunk is filled up
    fill = lambda a: jnp.pad(a, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (a.ndim - 2))
    split = lambda a: fill(a).reshape(M, n, chunk, *a.shape[2:]).swapaxes(0, 1)
    _, outs = jax.lax.scan(one, None, tuple(map(split, inputs)))
    return tuple(a.swapaxes(0, 1).reshape(M, n * chunk, *a.shape[3:])[:, :T] for a in outs)


def token_logp(hidden_MTD, tokens_MT, head_VD, temperature=1.0, chunk: int = 32):
    """log-prob and entropy [M, T] (float32) of tokens_MT under softmax(hidden @ head / temperature).

    Computed in chunks over time and recomputed in the backward pass, so that no [M, T, V] array ever exists.
    """
    D, head_VD = hidden_MTD.shape[-1], head_VD.astype(hidden_MTD.dtype)

    @jax.checkpoint
    def one(_, inputs):
        hidden, tokens = inputs
        logits = jnp.dot(hidden.reshape(-1, D), head_VD.T, preferred_element_type=jnp.float32) / temperature
        logits = logits.reshape(*tokens.shape, -1)
        norm = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        probs = jax.lax.stop_gradient(jnp.exp(logits - norm[..., None]))
        entropy = norm - (probs * logits).sum(-1)
        return None, (picked - norm, jax.lax.stop_gradient(entropy))

    return by_chunks(one, (hidden_MTD, tokens_MT), chunk)


def read_tokens(
    hidden_MTD, tokens_MT, other_MT, head_VD, kind_V, powers: tuple[float, ...], chunk: int = 32
) -> dict[str, jax.Array]:
    """What the next token's probabilities p say of tokens_MT and of others beside them, in chunks like `token_logp`.

    other_MT: a token, or -1 for the likeliest one of the same kind (kind_V [V]: integers) as the token itself, which it
    is not. "logp", "other_logp" [M, T]; "other" [M, T]; "norm" [M, T, K]: log sum_v p_v^k for K `powers` k, so that
    at temperature 1 / k a token has the log-prob k log p - norm.
    """
    D, head_VD = hidden_MTD.shape[-1], head_VD.astype(hidden_MTD.dtype)

    def one(_, inputs):
        hidden, tokens, other = inputs
        logits = jnp.dot(hidden.reshape(-1, D), head_VD.T, preferred_element_type=jnp.float32)
        logp = jax.nn.log_softmax(logits.reshape(*tokens.shape, -1))
        itself = jnp.arange(len(kind_V)) == tokens[..., None]
        rival = first_argmax(jnp.where((kind_V == kind_V[tokens][..., None]) & ~itself, logp, -jnp.inf))
        other = jnp.where(other < 0, rival, other)
        pick = lambda at: jnp.take_along_axis(logp, at[..., None], -1)[..., 0]
        norm = jnp.stack([jax.nn.logsumexp(k * logp, -1) for k in powers], -1)
        return None, (pick(tokens), pick(other), other, norm)

    outs = by_chunks(one, (hidden_MTD, tokens_MT, other_MT), chunk)
    return dict(zip(("logp", "other_logp", "other", "norm"), outs))


def first_argmax(z_MV):
    """Index of each row's maximum, the first of several [M]. Two plain reductions: on a CPU four times as fast as
    jnp.argmax."""
    at_top_MV = z_MV == z_MV.max(-1, keepdims=True)
    last = z_MV.shape[-1] - 1
    return jnp.where(at_top_MV, jnp.arange(last + 1), last).min(-1)


def draw(weight_MV, uniform_M2):
    """A column of each row [M], drawn in proportion to its weight (>= 0) by the row's two numbers from [0, 1): one of
    about sqrt(V) blocks, then a column inside it, each where the cumulative sum passes the number's share of the sum.
    The blocks are a power of two that divides V (of an odd vocabulary, one), so that columns which are cut over devices
    need not be gathered.

    Two numbers a row, where Gumbel noise takes V of them and two logarithms of each: with 49,152 words on a CPU a
    tenth of the time. What weighs nothing is never drawn, however sums round.
    """
    M, V = weight_MV.shape
    N = math.gcd(V, 2 ** round(math.log2(V) / 2))
    weight_MNC = weight_MV.reshape(M, N, V // N)

    def choose(weight_MK, uniform_M):
        sum_MK, at, some = weight_MK.cumsum(-1), jnp.arange(weight_MK.shape[1]), weight_MK > 0
        passed = sum_MK > uniform_M[:, None] * sum_MK[:, -1:]
        return jnp.minimum(jnp.where(passed & some, at, len(at)).min(-1), jnp.where(some, at, 0).max(-1))

    block_M = choose(weight_MNC.sum(-1), uniform_M2[:, 0])
    inside_M = choose(jnp.take_along_axis(weight_MNC, block_M[:, None, None], 1)[:, 0], uniform_M2[:, 1])
    return block_M * (V // N) + inside_M


def generate(
    model: Decoder,
    prompt_BP,
    len_B,
    key,
    group: int,
    T: int,
    temperature,
    eos_ids: tuple[int, ...],
    pad_id: int,
    greedy: bool = False,
    dtype=jnp.float32,
    shrink: bool = False,
) -> dict[str, jax.Array]:
    """Sample `group` completions of at most T tokens per prompt; stops when all rows have ended.

    Returns tokens_MT (after the end: pad_id), logp_MT (of the sampled tokens, at `temperature`; 0 after the end), len_M
    (with the end token), truncated_M (1.0 where no end token came), entropy_M (of the distributions that a row's tokens
    came from, summed; 0 if greedy). One prefill per prompt serves its group. Draws
    depend on (key, time, row) only, so they are the same on every mesh.

    `shrink`: once half of the prompts have ended, with all of their rows, the others go on alone, HALVINGS times. It
    changes nothing but roundings, and costs the compilation of the loop for each size. Not for rows that lie on several
    devices: they would have to move.
    """
    B, M = len(prompt_BP), len(prompt_BP) * group  # of the batch; n prompts and m rows of them go on
    is_end = lambda tokens: jnp.isin(tokens, jnp.array(eos_ids))
    prefix, _ = model.prefill(prompt_BP, len_B, dtype)
    head_VD = model.head_VD().astype(dtype)
    weights, *prompt_kv = zip(*model.unstack(prefix))

    def one_token(state):
        t, rows, (k, v, seen_n), cache = state
        done_m, layers = rows["done_m"], list(zip(weights, k, v))
        hidden_mD, cache = model.decode(rows["input_m"], t, cache, layers, seen_n, dtype)
        logits_mV = jnp.einsum("mD,VD->mV", hidden_mD, head_VD, preferred_element_type=jnp.float32) / temperature
        top_m = logits_mV.max(-1)
        weight_mV = jnp.exp(logits_mV - top_m[:, None])
        total_m = weight_mV.sum(-1)
        norm_m, entropy_m = top_m + jnp.log(total_m), rows["entropy_m"]
        if greedy:
            token_m = first_argmax(logits_mV)
        else:
            token_m = draw(weight_mV, jax.random.uniform(jax.random.fold_in(key, t), (M, 2))[rows["row_m"]])
            now_m = norm_m - (weight_mV * logits_mV).sum(-1) / total_m
            entropy_m = entropy_m + jnp.where(done_m, 0.0, now_m)
        logp_m = jnp.take_along_axis(logits_mV, token_m[:, None], 1)[:, 0] - norm_m
        token_m = jnp.where(done_m, pad_id, token_m).astype(jnp.int32)
        rows = rows | {"input_m": token_m, "done_m": done_m | is_end(token_m), "entropy_m": entropy_m}
        rows["tokens_mT"] = rows["tokens_mT"].at[:, t].set(token_m)
        rows["logp_mT"] = rows["logp_mT"].at[:, t].set(jnp.where(done_m, 0.0, logp_m))
        return t + 1, rows, (k, v, seen_n), cache

    rows = {
        "row_m": jnp.arange(M), "input_m": jnp.repeat(last_tokens(prompt_BP, len_B), group),
        "done_m": jnp.zeros(M, bool), "tokens_mT": jnp.full((M, T), pad_id, jnp.int32), "logp_mT": jnp.zeros((M, T)),
        "entropy_m": jnp.zeros(M),
    }  # fmt: skip
    state, found = (0, rows, (*prompt_kv, prefix.len_B), model.new_cache(M, T, dtype)), rows
    alive_n = lambda state: ~state[1]["done_m"].reshape(-1, group).all(1)
    take = lambda tree, at, axis=0: jax.tree.map(lambda a: jnp.take(a, at, axis), tree)
    sizes = [B >> i for i in range(HALVINGS + 1 if shrink else 1) if B >> i]
    for n, left in zip(sizes, [*sizes[1:], 0]):  # n prompts go on until at most `left` of them are alive
        if n < B:
            t, rows, prompts, cache = state
            prompt_n = jnp.argsort(~alive_n(state))[:n]  # those alive come first
            row_m = (prompt_n[:, None] * group + jnp.arange(group)).ravel()
            state = (t, take(rows, row_m), take(prompts, prompt_n), take(cache, row_m, 1))
        going = lambda state, left=left: (state[0] < T) & (alive_n(state).sum() > left)
        state = jax.lax.while_loop(going, one_token, state)
        rows = state[1]
        found = rows if n == B else {name: found[name].at[rows["row_m"]].set(a) for name, a in rows.items()}
    done_M, tokens_MT = found["done_m"], found["tokens_mT"]
    len_M = jnp.where(done_M, is_end(tokens_MT).argmax(-1) + 1, T)
    out = {"tokens_MT": tokens_MT, "logp_MT": found["logp_mT"], "len_M": len_M, "truncated_M": 1.0 - done_M}
    return out | {"entropy_M": found["entropy_m"]}
