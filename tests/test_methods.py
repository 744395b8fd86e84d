"""Advantages, losses and the pieces of CTS: worked examples, numbers computed by hand, naive oracles in NumPy.

pytest tests/test_methods.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import floats
from flax import nnx

import b0_sft as b0
import b1_dpo as b1
import b2_grpo as b2
import b3_grpo_verifier as b3
import b4_grpo_critique as b4
import b5_cts as b5
import cts_common as cts
from common.model import Decoder, ModelConfig, Reading
from common.prompts import revise_prompt
from common.replay import Quadruple
from common.sampling import token_logp
from common.tokenizer import train_tokenizer

SCRIPTS = pytest.mark.parametrize("script", [b2, b3, b4, b5])
PROCESS = pytest.mark.parametrize("script", [b3, b5])
LOG = math.log


# ---- advantages ---------------------------------------------------------------------------------------------------
@SCRIPTS
@pytest.mark.parametrize(
    ("norm", "reward", "valid", "expected"),
    [
        ("center", [1, 0, 0, 1], [1, 1, 1, 1], [0.5, -0.5, -0.5, 0.5]),
        ("std", [1, 0, 0, 1], [1, 1, 1, 1], [1, -1, -1, 1]),
        ("center", [1, 0, 9], [1, 1, 0], [0.5, -0.5, 0]),
        ("std", [1, 0, 9], [1, 1, 0], [1, -1, 0]),
        ("center", [1.5, 0, 0, 0.5], [1, 1, 1, 1], [1, -0.5, -0.5, 0]),
        ("std", [3, 0, 0], [1, 1, 1], [2**0.5, -(0.5**0.5), -(0.5**0.5)]),  # mean 1, variance (4 + 1 + 1) / 3 = 2
        ("std", [7, 7, 7], [1, 1, 1], [0, 0, 0]),
        ("center", [5, 3], [0, 1], [0, 0]),
        ("center", [5, 3], [0, 0], [0, 0]),
        ("std", [5, 3], [0, 0], [0, 0]),
    ],
)
def test_group_advantages(script, norm, reward, valid, expected):
    """Each case beside a plain group, which it must not touch."""
    pad = len(reward)
    out = script.group_advantages(floats(reward, [2] + [0] * (pad - 1)), floats(valid, [1] * pad), norm)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    other = np.array([2 - 2 / pad] + [-2 / pad] * (pad - 1))
    np.testing.assert_allclose(out[1], other / (other.std() if norm == "std" else 1), atol=1e-5)
    assert out.dtype == np.float32


@PROCESS
def test_step_advantages_worked_example(script):
    reward, end = floats([[0, 1, 0, 0], [1, 0, 0, 0]]), floats([[0, 1, 0, 1], [1, 0, 0, 0]])
    out = script.step_advantages(reward, end, "center")
    np.testing.assert_allclose(out[0], [[-1 / 3, -1 / 3, -2 / 3, -2 / 3], [1 / 3, 0, 0, 0]], atol=1e-6)
    # std: variance of [1, 0, 1] is 2/9; rewards where no step ends are ignored
    out = script.step_advantages(reward + 5 * (1 - end), end, "std")
    np.testing.assert_allclose(out[0] * 2**0.5 / 3, [[-1 / 3, -1 / 3, -2 / 3, -2 / 3], [1 / 3, 0, 0, 0]], atol=1e-5)


@PROCESS
@pytest.mark.parametrize("norm", ["center", "std"])
def test_step_advantages_by_loops(script, norm):
    rng = np.random.default_rng(0)
    end = (rng.random((3, 4, 7)) < 0.4).astype(np.float32)
    reward = rng.random((3, 4, 7)).astype(np.float32)
    end[1] = 0  # a group without any step
    out = script.step_advantages(reward, end, norm)
    assert np.isfinite(out).all() and not out[1].any()
    for b in (0, 2):
        rewards = reward[b][end[b] == 1]
        scale = rewards.std() if norm == "std" else 1.0
        for g in range(4):
            for t in range(7):
                later = [(reward[b, g, s] - rewards.mean()) / scale for s in range(t, 7) if end[b, g, s]]
                assert out[b, g, t] == pytest.approx(sum(later), abs=1e-4)


@pytest.mark.parametrize("script", [b3, b5])
def test_from_error_advantages_by_hand(script):
    """Blame before the first wrong step is dropped, praise is not; per completion, with an error or without one."""
    adv = floats([-0.5] * 4, [-0.5] * 4, [0.75] * 4, [0] * 4)[None]
    from_error = floats([0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1])[None]
    out = script.from_error_advantages(adv, from_error)
    np.testing.assert_array_equal(out[0], [[0, 0, -0.5, -0.5], [-0.5] * 4, [0.75] * 4, [0] * 4])
    assert out.dtype == np.float32
    np.testing.assert_array_equal(script.from_error_advantages(adv, np.ones_like(adv)), adv)


# ---- losses -------------------------------------------------------------------------------------------------------
@SCRIPTS
def test_grpo_loss_by_hand(script):
    """Clip 0.2 and 0.28, denominator 10. Objective per token:
    ratio 1.1, adv  2: inside                    2.2     gradient -ratio * adv / 10 = -0.22
    ratio 1.5, adv  1: clipped at 1.28           1.28    0
    ratio 0.5, adv -1: clipped at 0.8           -0.8     0
    ratio 1.5, adv -1: the worse one counts     -1.5     0.15
    ratio 0.5, adv  1: the worse one counts      0.5    -0.05
    masked                                       0       0
    Their sum is 1.68.
    """
    ratio, adv = [1.1, 1.5, 0.5, 1.5, 0.5, 9.0], floats([2, 1, -1, -1, 1, 100])
    old, mask = floats([-1, -2, -0.5, -3, -1, -1]), floats([1, 1, 1, 1, 1, 0])
    logp = old + np.log(floats(ratio))
    loss_fn = lambda logp: script.grpo_loss(logp, old, adv, mask, 0.2, 0.28, 10.0)
    (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(logp)
    assert loss == pytest.approx(-0.168, abs=1e-6)
    np.testing.assert_allclose(grad, [[-0.22, 0, 0, 0.15, -0.05, 0]], atol=1e-6)
    values = {k: float(total / count) for k, (total, count) in metrics.items()}
    assert values["losses/clipfrac"] == pytest.approx(2 / 5)
    assert values["losses/ratio_dev"] == pytest.approx((0.1 + 4 * 0.5) / 5, abs=1e-6)
    kl = sum(r - 1 - LOG(r) for r in ratio[:5]) / 5
    assert values["rollout/sampler_kl"] == pytest.approx(kl, abs=1e-6)


@SCRIPTS
def test_grpo_gradient_on_policy(script):
    """At ratio 1 it is REINFORCE: -adv / denom, for either sign."""
    logp, adv, mask = floats([-1, -2, -3]), floats([0.5, -0.25, 7]), floats([1, 1, 0])
    grad = jax.grad(lambda l: script.grpo_loss(l, logp, adv, mask, 0.2, 0.28, 4.0)[0])(logp)
    np.testing.assert_allclose(grad, [[-0.125, 0.0625, 0]], atol=1e-7)


@SCRIPTS
def test_grpo_loss_against_loops(script):
    rng = np.random.default_rng(1)
    logp, old, adv = (rng.standard_normal((5, 9)).astype(np.float32) for _ in range(3))
    mask = (rng.random((5, 9)) < 0.7).astype(np.float32)
    total, clipped = 0.0, 0
    for m in range(5):
        for t in range(9):
            if mask[m, t]:
                ratio = math.exp(float(logp[m, t]) - float(old[m, t]))
                inside = min(max(ratio, 0.9), 1.3)
                total += min(ratio * adv[m, t], inside * adv[m, t])
                clipped += inside * adv[m, t] < ratio * adv[m, t]
    loss, metrics = script.grpo_loss(logp, old, adv, mask, 0.1, 0.3, 7.0)
    assert loss == pytest.approx(-total / 7, rel=1e-5)
    assert 0 < clipped == metrics["losses/clipfrac"][0] and metrics["losses/clipfrac"][1] == mask.sum()
    # what stands under the mask never counts
    again, _ = script.grpo_loss(
        np.where(mask, logp, 3), np.where(mask, old, -3), np.where(mask, adv, 99), mask, 0.1, 0.3, 7.0
    )
    assert again == pytest.approx(float(loss), rel=1e-6)


@SCRIPTS
def test_k3_kl(script):
    """pi 1/2, base 1/4: e^(-ln 2) - 1 + ln 2 = 0.19315; the masked token is ignored; never below 0."""
    logp, ref = floats([LOG(0.5), LOG(0.5), LOG(0.5)]), floats([LOG(0.25), LOG(0.5), LOG(0.01)])
    assert script.k3_kl(logp, ref, floats([1, 1, 0]), 2.0) == pytest.approx(0.1931472 / 2, abs=1e-6)
    rng = np.random.default_rng(2)
    logp, ref = -rng.exponential(size=(2, 50, 1)).astype(np.float32)
    each = jax.vmap(lambda l, r: script.k3_kl(l, r, jnp.ones(1), 1.0))(logp, ref)
    assert (each >= 0).all() and each.max() > 0.1
    expected = [math.exp(r - l) - 1 - (r - l) for l, r in zip(logp[:, 0].astype(float), ref[:, 0].astype(float))]
    np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-6)


def test_k3_kl_is_unbiased():
    """Its mean under pi is the KL divergence, summed over a whole vocabulary."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    terms = [float(b3.k3_kl(np.log(floats([a])), np.log(floats([b])), floats([1]), 1.0)) for a, b in zip(p, q)]
    assert p @ terms == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


# ---- the same numbers by TRL 1.16.0 (python tests/golden/make_trl_numbers.py) ----------------------------------------
LOGP = floats([-1.0, -0.2, -3.0, -0.7], [-0.5, -2.0, -0.1, -9.0], [-4.0, -0.3, -1.5, -2.5])
OLD = floats([-1.2, -0.1, -2.0, -0.7], [-0.4, -2.6, -0.1, -1.0], [-3.0, -0.9, -1.5, -2.0])
REF = floats([-1.1, -0.3, -2.5, -1.0], [-0.9, -2.2, -0.2, -1.0], [-3.5, -0.5, -1.0, -2.2])
MASK = floats([1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1])
ADV = floats([0.8] * 4, [-0.6] * 4, [-0.2] * 4)
TRL = {  # (loss, its gradient on LOGP)
    "dr_grpo": (
        0.0437751,
        [
            [-0.0814269, -0.0603225, -0.0245253, 0.0],
            [0.0452419, 0.0911059, 0.0, 0.0],
            [0.0, 0.0303686, 0.0166667, 0.0],
        ],
    ),
    "dr_grpo with beta 0.05": (
        0.0463313,
        [
            [-0.0810303, -0.059926, -0.0272283, 0.0],
            [0.0466155, 0.0918612, 0.0, 0.0],
            [-0.002703, 0.0311239, 0.0139637, -0.0014577],
        ],
    ),
    "dapo": (
        0.0583669,
        [
            [-0.1085691, -0.08043, -0.0327004, 0.0],
            [0.0603225, 0.1214746, 0.0, 0.0],
            [0.0, 0.0404915, 0.0222222, 0.0],
        ],
    ),
    "dpo": (
        0.7391593,
        [
            [-0.0522485, -0.0522485, -0.0522485, 0.0],
            [0.0522485, 0.0522485, 0.0, 0.0],
        ],
    ),
}


@SCRIPTS
@pytest.mark.parametrize(
    ("name", "denom", "beta"), [("dr_grpo", 12, 0), ("dr_grpo with beta 0.05", 12, 0.05), ("dapo", 9, 0)]
)
def test_grpo_loss_equals_trl(script, name, denom, beta):
    """loss_norm constant is TRL's dr_grpo (3 completions of at most 4 tokens), token is its dapo (9 tokens)."""

    def loss_fn(logp):
        loss, _ = script.grpo_loss(logp, OLD, ADV, MASK, 0.2, 0.28, denom)
        return loss + beta * script.k3_kl(logp, REF, MASK, denom)

    loss, grad = jax.value_and_grad(loss_fn)(LOGP)
    assert loss == pytest.approx(TRL[name][0], abs=1e-6)
    np.testing.assert_allclose(grad, TRL[name][1], atol=1e-6)


def test_dpo_loss_equals_trl():
    """One pair: the first two rows."""
    sums = lambda rows: (rows[:2] * MASK[:2]).sum(-1)[None]
    loss, grad = jax.value_and_grad(lambda logp: b1.dpo_loss(sums(logp), sums(REF), 0.1)[0].sum())(LOGP)
    assert loss == pytest.approx(TRL["dpo"][0], abs=1e-6)
    np.testing.assert_allclose(grad[:2], TRL["dpo"][1], atol=1e-6)


# ---- supervised losses --------------------------------------------------------------------------------------------
def test_sft_loss_by_hand():
    """(1 + 2 + 3) / 3; its gradient is -mask / denom, whatever the log-probs."""
    logp, mask = floats([-1, -2], [-3, -9]), floats([1, 1], [1, 0])
    loss, grad = jax.value_and_grad(b0.sft_loss)(logp, mask, 3.0)
    assert loss == pytest.approx(2.0)
    np.testing.assert_allclose(grad, [[-1 / 3, -1 / 3], [-1 / 3, 0]], atol=1e-7)


def test_dpo_loss_by_hand():
    """Margins 2, 0 and -40 at beta 0.1: -log sigmoid of 0.2, 0 and -4."""
    logp, ref = floats([-10, -12], [-5, -7], [-50, -10]), floats([-11, -11], [-5, -7], [-20, -20])
    loss, margin = b1.dpo_loss(logp, ref, 0.1)
    np.testing.assert_allclose(margin, [2, 0, -40], atol=1e-5)
    np.testing.assert_allclose(loss, [math.log(1 + math.exp(-m)) for m in (0.2, 0.0, -4.0)], rtol=1e-5)
    assert loss[0] == pytest.approx(0.598139, abs=1e-6)
    # dL/dlogp = -beta * sigmoid(-beta * margin) on the chosen, the opposite on the rejected
    grad = jax.grad(lambda l: b1.dpo_loss(l, ref, 0.1)[0].sum())(logp)
    pull = np.array([0.1 / (1 + math.exp(0.1 * m)) for m in (2, 0, -40)])
    np.testing.assert_allclose(grad, np.stack([-pull, pull], 1), rtol=1e-5)


def test_dpo_loss_at_the_reference_is_log_2():
    """The policy starts as its own reference; there the gradient is beta / 2, not 0."""
    logp = floats([-3, -4])
    assert b1.dpo_loss(logp, logp, 0.3)[0][0] == pytest.approx(math.log(2))
    grad = jax.grad(lambda l: b1.dpo_loss(l, logp, 0.3)[0][0])(logp)
    np.testing.assert_allclose(grad, [[-0.15, 0.15]], atol=1e-6)


QUADS = [
    Quadruple("A has 2.", "So <<2+3=6>>6.\n#### 6", "The first step is wrong.", "So <<2+3=5>>5.\n#### 5", {}),
    Quadruple("B?", "#### 1", "No.", "<<4*5=20>>20\n#### 20", {}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1 for q in QUADS], 300)


@pytest.mark.parametrize("objective", ["revision", "critique"])
def test_make_examples(tokenizer, objective):
    """What is given and what is learnt, read back; a target is cut at T."""
    for q, (given, learnt) in zip(QUADS, b0.make_examples(tokenizer, QUADS, 40, objective)):
        assert learnt[-1] == tokenizer.eos_id
        given, learnt = tokenizer.decode([given, learnt[:-1]])
        assert learnt == (q.y1 if objective == "revision" else q.f)
        assert q.x in given and q.y0 in given and (q.f in given) == (objective == "revision") and q.y1 not in given
    assert [len(learnt) for _, learnt in b0.make_examples(tokenizer, QUADS, 3, objective)] == [3, 3]


def test_pack_pairs(tokenizer):
    batch = b1.pack_pairs(tokenizer, QUADS, {"P_revise": 120, "T": 40})
    assert batch["tokens"].shape == batch["mask"].shape == (2, 2, 40)
    for q, prompt, n, pair, masks in zip(QUADS, *(batch[k] for k in ("prompt", "prompt_len", "tokens", "mask"))):
        assert tokenizer.decode([prompt[:n].tolist()]) == [revise_prompt(q.x, q.y0, q.f)]
        assert tokenizer.decode([t[m > 0].tolist() for t, m in zip(pair, masks)]) == [q.y1, q.y0]


def sequence_logp(model, prompt, completion):
    """log pi(completion | prompt), token by token, from one plain sequence and float64 log-softmax in NumPy."""
    ids = [*prompt, *completion]
    padded = jnp.array([ids + [0] * (160 - len(ids))])  # one shape for all
    hidden = np.asarray(model.packed(padded, jnp.ones((1, 160), int))[0], np.float64)
    logits = hidden @ np.asarray(model.head_VD(), np.float64).T
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [logp[t, ids[t + 1]] for t in range(len(prompt) - 1, len(ids) - 1)]


def test_supervised_log_probs_equal_plain_sequences(tokenizer):
    """b0's examples share a row, b1's a prompt, and both pad; the log-probs are those of each sequence by itself."""
    cfg = ModelConfig(tokenizer.vocab_size, d_model=32, n_layers=2, head_dim=8, d_ff=48)
    model, encode = Decoder(cfg, nnx.Rngs(0)), tokenizer.encode
    batch = b1.pack_pairs(tokenizer, QUADS, {"P_revise": 128, "T": 48})
    tokens_MT = batch["tokens"].reshape(-1, 48)
    (states,) = model([Reading(batch["prompt"], batch["prompt_len"], [tokens_MT])])
    logp_MT, _ = token_logp(states.completions[0], tokens_MT, model.head_VD())
    for q, pair, mask in zip(QUADS, logp_MT.reshape(2, 2, 48), batch["mask"]):
        for y, row, on in zip((q.y1, q.y0), pair, mask):
            expected = sequence_logp(model, encode(revise_prompt(q.x, q.y0, q.f)), [*encode(y), tokenizer.eos_id])
            np.testing.assert_allclose(np.asarray(row)[on > 0], expected, atol=2e-5)
    examples = b0.make_examples(tokenizer, QUADS, 48, "revision")
    batch = cts.pack_rows(examples, 288, 2, tokenizer.pad_id)
    assert batch["segment"].max(1).tolist() == [2, 0]  # both in one row, and an empty one
    hidden_RWD = model.packed(batch["tokens"], batch["segment"])
    logp_RW, _ = token_logp(hidden_RWD[:, :-1], batch["tokens"][:, 1:], model.head_VD())
    expected = sum(sum(sequence_logp(model, *example)) for example in examples)
    np.testing.assert_allclose(b0.sft_loss(logp_RW, batch["mask"][:, 1:], 2.0), -expected / 2, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", ["dead groups", "truncated", "kl", "most rows masked"])
def test_micro_batches_add_up_to_the_whole_gradient(case, size):
    """GRPO's gradient of four groups of four, all at once in full width, and in micro-batches of what carries it."""
    rng = np.random.default_rng(len(case))
    n, G, P, T = 4, 4, 12, 16
    widths = [dict(P_revise=6, P_attempt=6, T=8, T_replay=8), dict(P_revise=P, P_attempt=P, T=T, T_replay=T)]
    length = rng.integers(3, 9, (n, G)) * np.array([[1], [1], [1], [2]])
    valid, reward = np.ones((n, G)), rng.integers(0, 2, (n, G)).astype(np.float32)
    reward[0] = 1 / 3  # no variance, but for rounding
    reward[1:, :2] = [0, 1]
    valid[1, 2:] = case not in ("truncated", "most rows masked")
    valid[2:, 2:] = case != "most rows masked"
    adv = np.repeat(b2.group_advantages(reward, valid, "std")[..., None], T, -1)
    batch = {
        "prompt": rng.integers(11, size=(n, P)), "prompt_len": np.array([6, 3, 11, 5]),
        "tokens": rng.integers(11, size=(n, G, T)), "old_logp": -2 * rng.random((n, G, T)).astype(np.float32),
        "adv": adv, "mask": cts.length_mask(length.reshape(-1), T).reshape(n, G, T),
    }  # fmt: skip
    batch["mask"] *= valid[..., None].astype(np.float32)
    (graphdef, policy), (_, base) = (nnx.split(m, nnx.Param) for m in (tiny(), tiny(13)))

    def logp(params, batch):
        model, tokens = nnx.merge(graphdef, params), batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        (states,) = model([Reading(batch["prompt"], batch["prompt_len"], [tokens])])
        return token_logp(states.completions[0], tokens, model.head_VD(), 0.7)[0]

    @jax.jit
    def grads(params, batch):
        def loss(params):
            now = logp(params, batch)
            old, adv, mask = (batch[name].reshape(now.shape) for name in ("old_logp", "adv", "mask"))
            total, _ = b2.grpo_loss(now, old, adv, mask, 0.2, 0.28, 50.0)
            return total + (0.3 * b2.k3_kl(now, logp(base, batch), mask, 50.0) if case == "kl" else 0.0)

        return jax.grad(loss)(params)

    live = cts.live_rows(batch["adv"], batch["mask"], 0.3 if case == "kl" else 0.0)
    parts = list(cts.micro_batches(batch, n // size, widths, live))
    assert live[0].any() == (case == "kl")
    assert sum(len(one["prompt"]) * np.prod(one["tokens"].shape[1:]) for one in parts) <= n * G * T * (size < 4 or 1)
    assert case != "most rows masked" or size > 1 or any(one["tokens"].shape[1] == G // 2 for one in parts)
    whole, summed = grads(policy, batch), jax.tree.map(lambda *g: sum(g), *(grads(policy, one) for one in parts))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed)):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, atol=1e-6 * float(np.abs(a).max()), rtol=2e-5)


def test_order_and_padding_of_a_batch_change_no_gradient(tokenizer):
    """Rows in another order, prompts and completions padded wider: the same gradient of the SFT and the DPO loss."""
    cfg = ModelConfig(tokenizer.vocab_size, d_model=32, n_layers=2, head_dim=8, d_ff=48)
    graphdef, params = nnx.split(Decoder(cfg, nnx.Rngs(0)), nnx.Param)
    reference = jax.tree.map(lambda a: 0.9 * a, params)

    def gradient(quads, P, T):
        batch = b1.pack_pairs(tokenizer, quads, {"P_revise": P, "T": T})
        tokens_MT, mask = batch["tokens"].reshape(-1, T), batch["mask"]

        def logp(params):
            model = nnx.merge(graphdef, params)
            (states,) = model([Reading(batch["prompt"], batch["prompt_len"], [tokens_MT])])
            return token_logp(states.completions[0], tokens_MT, model.head_VD())[0].reshape(mask.shape)

        def loss(params):
            sums = (logp(params) * mask).sum(-1), (logp(reference) * mask).sum(-1)
            return b1.dpo_loss(*sums, 0.1)[0].sum() + b0.sft_loss(logp(params), mask, mask.sum())

        return jax.jit(jax.grad(loss))(params)

    one, other = gradient(QUADS, 112, 40), gradient(QUADS[::-1], 128, 64)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


# ---- CTS: steps and weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overlap", "mask", "expected"),
    [
        ([0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]),
        ([0, 0], [1, 1], [0, 0]),  # a critique that names no step
        ([0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1 / 2, 1 / 2, 0, 0]),
        ([0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]),  # a span on padding is none
        ([0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 0]),
    ],
)
def test_critique_weights(overlap, mask, expected):
    np.testing.assert_allclose(b5.critique_weights(floats(overlap), floats(mask))[0], expected, atol=1e-6)


def test_another_step_is_drawn_for_good():
    """One of the two steps that are not flagged, the same each time; none where there is no other or no span."""
    alpha, mask = floats([0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]), floats([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0])
    draw = lambda seed: b5.another_step(alpha, mask, [np.random.default_rng((seed, i)) for i in range(3)])
    rows = np.array([draw(seed) for seed in range(20)])
    assert set(map(tuple, rows[:, 0])) == {(1, 0, 0, 0), (0, 0, 1, 0)} and not rows[:, 1:].any()
    np.testing.assert_array_equal(draw(3), draw(3))


def test_with_time():
    """Four channels of 1 scaled to length 1; three real steps at weight * [1/3, 2/3, 1]; padding changes nothing."""
    out = np.asarray(b5.with_time(jnp.ones((4, 4)), jnp.array([1.0, 1.0, 1.0, 0.0])))
    assert out.shape == (4, 5)
    np.testing.assert_allclose(np.linalg.norm(out[:, :4], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(out[:3, 4], b5.TIME_WEIGHT * np.array([1 / 3, 2 / 3, 1]), rtol=1e-6)
    np.testing.assert_allclose(b5.with_time(jnp.ones((3, 4)), jnp.ones(3)), out[:3], rtol=1e-6)
    assert np.isfinite(b5.with_time(jnp.ones((2, 4)), jnp.zeros(2))).all()


# ---- CTS: critic, energy edit, losses -----------------------------------------------------------------------------
D = 5


@functools.cache
def critic() -> b5.Critic:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: b5.Critic(D, nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(8)
    fill = lambda a: jnp.asarray(rng.standard_normal(a.shape) * a.shape[0] ** -0.5, jnp.float32)
    return nnx.merge(graphdef, jax.tree.map(fill, shapes))


def naive_energy(point: np.ndarray, step: int, f: np.ndarray) -> float:
    """Two hidden layers over the point, its step's sines and cosines and the projected critique, in float64."""
    c = critic()
    weights = (c.project_f, c.energy_in, c.bias_in, c.energy_mid, c.bias_mid, c.energy_out)
    project_f, w_in, b_in, w_mid, b_mid, w_out = (np.asarray(w[...], float) for w in weights)
    e_f = f.astype(float) @ project_f
    e_f /= math.sqrt((e_f**2).mean() + 1e-6)
    angles = [(step + 1) * math.pi / cts.MAX_STEPS * 2**k for k in range(b5.PLACE_DIM // 2)]
    h = np.concatenate([point, np.sin(angles), np.cos(angles), e_f]).astype(float)
    for w, b in ((w_in, b_in), (w_mid, b_mid)):
        h = h @ w + b
        h = h / (1 + np.exp(-h))
    return float((h @ w_out)[0])


def latent(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng((9, seed)).standard_normal((*shape, b5.LATENT_DIM)).astype(np.float32)


def states_of_f(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng((13, seed)).standard_normal((n, D)).astype(np.float32)


def test_points_have_unit_rms():
    hidden = np.random.default_rng(10).standard_normal((2, 3, D)).astype(np.float32)
    for scale in (1, 100):
        points = b5.project(jnp.asarray(scale * hidden))
        np.testing.assert_allclose((points**2).mean(-1), 1, rtol=1e-4)
    gram = np.einsum("bjr,bkr->bjk", points, points) / b5.LATENT_DIM  # a random projection nearly keeps angles
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    assert np.abs(gram - np.einsum("bjd,bkd->bjk", unit, unit)).max() < 0.5
    assert b5.project(jnp.asarray(hidden, jnp.bfloat16)).dtype == jnp.float32
    value, grad = jax.value_and_grad(lambda h: b5.project(h).sum())(jnp.zeros((1, D)))
    assert value == 0 and np.isfinite(grad).all()  # an empty step


def test_energies_equal_naive():
    traj, f, step = latent(0, 2, 3), states_of_f(1, 2), np.array([[0, 1, 2], [4, 0, 9]])
    expected = [[naive_energy(traj[b, j], step[b, j], f[b]) for j in range(3)] for b in range(2)]
    energies = critic().energies(jnp.asarray(traj), jnp.asarray(step), jnp.asarray(f))
    np.testing.assert_allclose(energies, expected, atol=1e-4)


def naive_slope(point: np.ndarray, step: int, f: np.ndarray) -> np.ndarray:
    at = lambda r, e: naive_energy(point + e * np.eye(b5.LATENT_DIM)[r], step, f)
    return np.array([(at(r, 1e-5) - at(r, -1e-5)) / 2e-5 for r in range(b5.LATENT_DIM)])


def test_the_edit_moves_the_flagged_steps_alone():
    """By the asked length, straight down the energy (finite differences); every other step is R to the bit."""
    traj, f, alpha = latent(0, 2, 4), states_of_f(1, 2), floats([0, 1, 0, 0], [0.5, 0, 0.5, 0])
    length = np.full((2, 4), 0.3, np.float32)
    edited = np.asarray(b5.edit_trajectory(critic(), jnp.asarray(traj), jnp.asarray(f), alpha, length))
    for b, j in np.ndindex(2, 4):
        if not alpha[b, j]:
            np.testing.assert_array_equal(edited[b, j], traj[b, j])
            continue
        slope = naive_slope(traj[b, j], j, f[b])
        np.testing.assert_allclose(edited[b, j], traj[b, j] - 0.3 * slope / np.linalg.norm(slope), atol=2e-3)
        assert naive_energy(edited[b, j], j, f[b]) < naive_energy(traj[b, j], j, f[b])


def test_no_gradient_flows_through_the_edit():
    graphdef, params = nnx.split(critic(), nnx.Param)
    edit = lambda params, *a: b5.edit_trajectory(nnx.merge(graphdef, params), *a, jnp.ones((1, 3))).sum()
    grads = jax.grad(edit, (0, 1, 2, 3))(
        params, jnp.asarray(latent(0, 1, 3)), jnp.asarray(states_of_f(1, 1)), jnp.ones((1, 3)) / 3
    )
    assert all(not g.any() for g in jax.tree.leaves(grads))


def target_batch() -> dict[str, np.ndarray]:
    """Two attempts of four and three steps, the second and the first flagged; y1 has three and three."""
    alpha, y0, y1 = floats([0, 1, 0, 0], [1, 0, 0, 0]), floats([1, 1, 1, 1], [1, 1, 1, 0]), floats(*[[1, 1, 1, 0]] * 2)
    elsewhere = floats([0, 0, 0, 1], [0, 0, 1, 0])
    return {"alpha": alpha, "y0_mask": y0, "y1_mask": y1, "elsewhere": elsewhere, "noise": latent(5, 2, 4),
            "edit_length": np.zeros(2, np.float32)}  # fmt: skip


@pytest.mark.parametrize("target", ["energy", "ref_only", "hindsight", "random", "shuffled_locus"])
def test_a_target_differs_at_one_step(target):
    """At the flagged step, or at the other one that the control takes; an edit by eta times the way to ref."""
    batch, R, ref, seen, f = target_batch(), latent(0, 2, 4), latent(1, 2, 4), latent(2, 2, 4), states_of_f(1, 2)
    args = b5.Args(target=target, edit_eta=0.5)
    now, goal = b5.pick_target(critic(), *map(jnp.asarray, (R, ref, f)), [jnp.asarray(seen)], batch, args)
    np.testing.assert_array_equal(now.points, R)
    mass = batch["elsewhere" if target == "shuffled_locus" else "alpha"]
    for measure in (now, goal):
        np.testing.assert_array_equal(measure.mass, mass)
        np.testing.assert_array_equal(measure.mask, batch["y0_mask"])
    np.testing.assert_array_equal(np.asarray(goal.points)[mass == 0], R[mass == 0])
    moved, flagged = np.asarray(goal.points - now.points)[mass > 0], batch["alpha"] > 0
    way = (ref - R)[flagged]
    if target in ("ref_only", "hindsight"):
        np.testing.assert_allclose(moved, ((ref if target == "ref_only" else seen) - R)[flagged], atol=1e-5)
    else:
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.5 * np.linalg.norm(way, axis=1), rtol=1e-3)
    if target == "shuffled_locus":  # the very edit of the flagged step
        _, energy = b5.pick_target(critic(), *map(jnp.asarray, (R, ref, f)), [], batch, b5.Args(edit_eta=0.5))
        np.testing.assert_allclose(moved, np.asarray(energy.points - R)[flagged], atol=1e-5)
    batch["edit_length"] = floats([2.0, 0.0])[0]  # known for the first: by eta times it
    _, goal = b5.pick_target(critic(), *map(jnp.asarray, (R, ref, f)), [jnp.asarray(seen)], batch, args)
    if target in ("energy", "random"):
        lengths = np.linalg.norm(np.asarray(goal.points - R)[flagged], axis=1)
        np.testing.assert_allclose(lengths, [1.0, 0.5 * np.linalg.norm(way[1])], rtol=1e-3)


def test_the_target_of_all_steps_is_the_whole_revision():
    batch, R, ref = target_batch(), latent(0, 2, 4), latent(1, 2, 4)
    now, goal = b5.pick_target(critic(), R, ref, states_of_f(1, 2), [], batch, b5.Args(target="all_steps"))
    np.testing.assert_array_equal(goal.points, ref)
    np.testing.assert_allclose(now.mass, floats([1 / 4] * 4, [1 / 3, 1 / 3, 1 / 3, 0]))
    np.testing.assert_allclose(goal.mass, floats(*[[1 / 3, 1 / 3, 1 / 3, 0]] * 2))


def measure(points, mask, mass) -> b5.Measure:
    return b5.Measure(jnp.asarray(points), jnp.asarray(mask), jnp.asarray(mass))


def test_align_loss_by_hand():
    """Rows with weights 1/2, 1/2, 0. S = squared distance of the flagged step / R; the other steps by their drift."""
    ones = np.ones((3, 3, 2), np.float32)
    R, mask, mass = 0 * ones, floats([1, 1, 1], [1, 1, 0], [1, 1, 1]), floats([0, 1, 0], [1, 0, 0], [1, 0, 0])
    now, goal = measure(R, mask, mass), measure(2 * ones, mask, mass)
    theta = jnp.asarray(ones) * jnp.array([3.0, 1.0, 5.0])[None, :, None]  # the steps stand at 3, 1, 5
    loss, (S, converged, moved) = b5.align_loss(theta, now, goal, jnp.array([0.5, 0.5, 0.0]), 0.1, cts.l2_distance)
    np.testing.assert_allclose(S, [(1 - 2) ** 2, (3 - 2) ** 2, (3 - 2) ** 2], rtol=1e-5)
    assert converged.tolist() == [1, 1, 1] and moved.tolist() == [0, 0, 0]
    drift = [(9 + 25) / 2, 1.0]
    assert loss == pytest.approx(0.5 * (1 + 0.1 * drift[0]) + 0.5 * (1 + 0.1 * drift[1]), rel=1e-5)


@pytest.mark.parametrize("name", ["sinkhorn", "soft_dtw", "l2"])
def test_only_the_flagged_step_is_pulled(name):
    """Not held, no other step has any gradient: not before the error and not after it."""
    distance = {
        "sinkhorn": lambda *a: cts.sinkhorn_distance(*a, b5.SINKHORN_EPSILON, b5.SINKHORN_ITERATIONS),
        "soft_dtw": lambda *a: cts.soft_dtw_distance(*a, b5.SOFT_DTW_GAMMA), "l2": cts.l2_distance,
    }[name]  # fmt: skip
    R, goal, mask, mass = latent(0, 1, 5), latent(1, 1, 5), floats([1, 1, 1, 1, 0]), floats([0, 0, 1, 0, 0])
    now, goal = measure(R, mask, mass), measure(np.where(mass[..., None] > 0, goal, R), mask, mass)
    loss = lambda theta, hold: b5.align_loss(theta, now, goal, jnp.ones(1), hold, distance)[0]
    pull = lambda hold: jax.grad(loss)(jnp.asarray(R + 0.1 * latent(2, 1, 5)), hold)[0]
    free, held = np.abs(pull(0.0)).max(-1), np.abs(pull(1.0)).max(-1)
    assert free[2] > 1e-3 and not free[[0, 1, 3, 4]].any()
    assert (held[[0, 1, 2, 3]] > 1e-4).all() and not held[4]


def test_a_dropped_step_shows_in_the_plan():
    """y0 lacks y1's second step: from there on its mass goes to the step after; the same trajectory moves none."""
    ref = 4 * np.eye(6, b5.LATENT_DIM, dtype=np.float32)
    y0 = np.concatenate([np.delete(ref, 1, 0), np.zeros((1, b5.LATENT_DIM), np.float32)])
    run = lambda a, b, n, m: cts.sinkhorn_distance(
        jnp.asarray(a), jnp.asarray(b), 1.0 * (jnp.arange(6) < n), 1.0 * (jnp.arange(6) < m), 0.05, 200
    )
    assert run(y0, ref, 5, 6)[2] > 0.6 and abs(run(ref, ref, 6, 6)[2]) < 1e-2


def test_energy_loss_is_the_miss_of_the_slope():
    """Three points with weights 1, 1/2, 0 by finite differences."""
    points, way, f, step = latent(0, 1, 3), latent(1, 1, 3), states_of_f(1, 1), np.array([[0, 2, 1]])
    weight = floats([1, 0.5, 0])
    miss = [((naive_slope(points[0, k], step[0, k], f[0]) + way[0, k]) ** 2).sum() for k in range(3)]
    loss = b5.energy_loss(critic(), *map(jnp.asarray, (points, step, way, f, weight)))
    assert loss == pytest.approx(miss[0] + 0.5 * miss[1], rel=1e-3)


def test_energy_points():
    """R's flagged step goes the way to ref, all others and ref's stay; each kind's weights sum to 1."""
    R, ref, batch = latent(0, 2, 4), latent(1, 2, 4), target_batch()
    points, step, way, weight = map(np.asarray, b5.energy_points(R, ref, batch))
    np.testing.assert_array_equal(points, np.concatenate([R, ref], 1))
    np.testing.assert_array_equal(step, [[0, 1, 2, 3] * 2] * 2)
    np.testing.assert_allclose(way[0, 1], ref[0, 1] - R[0, 1], rtol=1e-5)
    np.testing.assert_allclose(way[1, 0], ref[1, 0] - R[1, 0], rtol=1e-5)
    assert not np.delete(way[0], 1, 0).any() and not way[1, 1:].any()
    np.testing.assert_allclose(weight.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weight[0, :, :4], [[0, 1, 0, 0], [1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(weight[1, :, 4:], [[0, 0, 0, 0], [0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]], atol=1e-6)


def test_the_fit_finds_a_way_that_the_critique_names(monkeypatch):
    """Eight critiques, each with its own way: the fitted energy goes it (cosine above 0.8 on attempts that were not
    fitted) and, under another critique, does not; with no updates it knows nothing."""
    monkeypatch.setattr(b5, "FIT_ROWS", 32)
    rng = np.random.default_rng(14)
    ways, names = rng.standard_normal((8, b5.LATENT_DIM)), 3 * rng.standard_normal((8, D))

    def cached(n):
        kind, out = rng.integers(8, size=n), {"R": rng.standard_normal((n, 4, b5.LATENT_DIM)).astype(np.float32)}
        out["alpha"] = np.eye(4, dtype=np.float32)[rng.integers(4, size=n)]
        out["ref"] = (out["R"] + out["alpha"][..., None] * ways[kind][:, None]).astype(np.float32)
        return out | {"f": names[kind].astype(np.float32), "y0_mask": np.ones((n, 4)), "y1_mask": np.ones((n, 4))}

    critic_def, start = nnx.split(b5.Critic(D, nnx.Rngs(0)), nnx.Param)
    train, held = cached(256), cached(64)
    arrays = dict(zip(("points", "step", "way", "weight"), b5.energy_points(train["R"], train["ref"], train)))
    fitted = b5.fit_critic(critic_def, start, arrays | {"f": jnp.asarray(train["f"])}, 400)
    check = lambda critic, f: b5.check_edit(nnx.merge(critic_def, critic), held | {"f": f}, 0.5)
    right, other, none = check(fitted, held["f"]), check(fitted, np.roll(held["f"], 1, 0)), check(start, held["f"])
    assert right["cosine"] > 0.8 and right["nearer"] > 0.95 and 0.5 <= right["left"] < 0.65
    assert other["cosine"] < 0.4 and abs(none["cosine"]) < 0.2
    assert right["way"] == pytest.approx(np.linalg.norm(held["ref"] - held["R"], axis=-1).max(-1).mean(), rel=1e-3)


def test_decode_loss_by_hand():
    """-(-1 - 2) / 4 - (-4) / 4."""
    assert b5.decode_loss(floats([-1, -2], [-4, -9]), floats([0.25, 0.25], [0.25, 0])) == 1.75


B, T, WIDTH = 3, 6, 5
TINY = ModelConfig(vocab_size=11, d_model=D, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=6)
TERMS = {"align": b5.align_term, "decode": b5.decode_term, "energy": b5.energy_term}


@functools.cache
def cts_batch() -> dict[str, np.ndarray]:
    """Three problems, the last with a right attempt; y0 has 2, 3, 1 steps of two tokens, y1 has 3, 2, 1."""
    rng = np.random.default_rng(11)
    tokens = lambda *shape: rng.integers(11, size=shape).astype(np.int32)
    of_steps = lambda *n: np.stack([np.kron(np.eye(3), [1.0, 1.0]) * (np.arange(3) < k)[:, None] for k in n]).astype(
        np.float32
    )
    out = {
        "prompt": tokens(B, WIDTH), "prompt_len": np.array([5, 4, 3], np.int32), "attempt_prompt": tokens(B, WIDTH),
        "attempt_prompt_len": np.array([2, 5, 3], np.int32), "y0": tokens(B, T), "y1": tokens(B, T),
        "y0_steps": of_steps(2, 3, 1), "y1_steps": of_steps(3, 2, 1), "f_tokens": np.zeros((B, 1, WIDTH), np.float32),
        "align_weight": floats([0.5, 0.5, 0])[0], "noise": latent(3, B, 3),
        "edit_length": np.zeros(B, np.float32),
    }  # fmt: skip
    out["f_tokens"][:, :, 1:3] = 1
    for name in ("y0", "y1"):
        out[f"{name}_mask"] = (out[f"{name}_steps"].sum(-1) > 0).astype(np.float32)
    out["alpha"] = b5.critique_weights(floats([0, 1, 0], [1, 0, 0], [0, 0, 0]), out["y0_mask"])
    out["elsewhere"] = floats([1, 0, 0], [0, 0, 1], [0, 0, 0])
    length = np.array([6, 4, 2])
    out["decode_weight"] = (np.arange(T) < length[:, None]).astype(np.float32) / length.sum()
    return out


@functools.cache
def tiny(seed: int = 12) -> Decoder:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(TINY, nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(seed)
    fill = lambda path, a: jnp.asarray(0.4 * rng.standard_normal(a.shape) + ("norm" in str(path)), jnp.float32)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))


def test_terms_reach_what_they_should():
    """L_align and L_decode: the policy. L_E: the critic. None the base; R* of no target hands a gradient on."""
    (model_def, policy), (critic_def, critic_params) = (nnx.split(m, nnx.Param) for m in (tiny(), critic()))
    params = {"policy": policy, "base": nnx.split(tiny(13), nnx.Param)[1], "critic": critic_params}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def grads(params, term, target):
        def loss(params):
            model, base = (nnx.merge(model_def, params[name]) for name in ("policy", "base"))
            args = b5.Args(align="l2", target=target)
            return TERMS[term](model, base, nnx.merge(critic_def, params["critic"]), cts_batch(), args, jnp.float32)[0]

        return jax.grad(loss)(params)

    moved = lambda *a: {k for k, g in grads(params, *a).items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(g))}
    for target in ("energy", "ref_only", "hindsight", "random", "shuffled_locus", "all_steps"):
        assert moved("align", target) == {"policy"}
    assert moved("decode", "energy") == {"policy"} and moved("energy", "energy") == {"critic"}


def test_a_trajectory_in_the_revise_prompt_is_the_completion_of_what_precedes_it():
    """--align_reading revise: what base and policy make of y0 inside the revise prompt is what they make of y0 as the
    completion of that prompt's text before it; y1's points are those of a completion of the whole prompt."""
    before, after = np.random.default_rng(14).integers(11, size=(2, B, 4)).astype(np.int32)
    batch = cts_batch() | {"prompt": np.concatenate([before, cts_batch()["y0"], after], 1)}
    batch["prompt_len"] = np.array([14, 13, 12], np.int32)
    batch["f_tokens"] = np.zeros((B, 1, 14), np.float32)
    batch["f_tokens"][:, :, 10:12] = 1
    batch["y0_given"] = np.zeros((B, 3, 14), np.float32)
    batch["y0_given"][:, :, 3 : 3 + T] = batch["y0_steps"]  # the state of the token before emits
    args, plain = b5.Args(align_reading="revise"), b5.Args()
    R, ref, f, hindsight = b5.read_base(tiny(), batch, jnp.float32, args, hindsight=True)
    theta = b5.read_policy(tiny(), batch, jnp.float32, args)
    as_attempt = {"attempt_prompt": before, "attempt_prompt_len": np.full(B, 4, np.int32)}
    expected = b5.read_base(tiny(), batch | as_attempt, jnp.float32, plain, hindsight=True)
    for got, by in ((R, expected[0]), (theta, expected[0]), (f, expected[2]), (hindsight, expected[3])):
        np.testing.assert_allclose(got, by, atol=1e-5)
    behind = {"attempt_prompt": batch["prompt"], "attempt_prompt_len": batch["prompt_len"]}
    np.testing.assert_allclose(ref, b5.read_base(tiny(), batch | behind, jnp.float32, plain)[1], atol=1e-5)
    assert np.abs(np.asarray(ref - expected[1])).max() > 0.01  # after another prompt it is another state


def test_terms_by_parts():
    """L_align (ref_only, l2, held) and L_decode again, of one row at a time, with loops over steps and tokens."""
    model, base, batch, hold = tiny(), tiny(13), cts_batch(), 0.3
    head = np.asarray(model.embed[...], float)
    packed = {name: jax.jit(decoder.packed) for name, decoder in (("policy", model), ("base", base))}

    def states(who, prompt, n, completion):
        """Final hidden states of the plain sequence, as one packed document (what follows it is not seen)."""
        row = np.zeros((1, WIDTH + T), int)
        row[0, : n + T] = [*prompt[:n], *completion]
        return np.asarray(packed[who](row, np.ones_like(row)), float)[0, : n + T]

    P = np.asarray(jax.random.normal(jax.random.key(0), (D, b5.LATENT_DIM)), float)

    def points(who, b, y):
        x = batch["attempt_prompt_len"][b]
        emit = states(who, batch["attempt_prompt"][b], x, batch[y][b])[x - 1 :]  # the state before a token emits it
        z = [emit[2 * j : 2 * j + 2].mean(0) @ P for j in range(int(batch[f"{y}_mask"][b].sum()))]
        return [r / math.sqrt((r**2).mean() + 1e-6) for r in z]

    align = decode = 0.0
    for b in range(B):
        n, p = batch["prompt_len"][b], batch["prompt"][b]
        revise = states("policy", p, n, batch["y1"][b])
        for t in range(T):
            logits = revise[n - 1 + t] @ head.T
            decode -= (logits[batch["y1"][b, t]] - LOG(np.exp(logits).sum())) * batch["decode_weight"][b, t]
        if batch["align_weight"][b]:
            theta, R, ref = points("policy", b, "y0"), points("base", b, "y0"), points("base", b, "y1")
            at = int(batch["alpha"][b].argmax())
            drift = [((theta[j] - R[j]) ** 2).mean() for j in range(len(R)) if j != at]
            align += batch["align_weight"][b] * (((theta[at] - ref[at]) ** 2).mean() + hold * np.mean(drift))
    args = b5.Args(align="l2", target="ref_only", hold=hold)
    for term, expected in (("align", align), ("decode", decode)):
        loss, metrics = TERMS[term](model, base, critic(), batch, args, jnp.float32)
        assert expected > 0.05 and loss == pytest.approx(expected, rel=2e-3)
        assert metrics[f"losses/{term}_loss"] == loss
