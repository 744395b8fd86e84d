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


@pytest.mark.parametrize("script", [b3])
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
def test_pack_examples(tokenizer, objective):
    """What is given and what is learnt, read back from the arrays."""
    batch = b0.pack_examples(tokenizer, QUADS, {"P_revise": 120, "T": 40}, objective)
    assert {k: v.shape for k, v in batch.items()} == {
        "prompt": (2, 120), "prompt_len": (2,), "tokens": (2, 40), "mask": (2, 40)
    }  # fmt: skip
    for q, prompt, n, tokens, mask in zip(QUADS, *(batch[k] for k in ("prompt", "prompt_len", "tokens", "mask"))):
        given, learnt = tokenizer.decode([prompt[:n].tolist(), tokens[mask > 0].tolist()])
        assert tokens[int(mask.sum()) - 1] == tokenizer.eos_id
        assert learnt == (q.y1 if objective == "revision" else q.f)
        assert q.x in given and q.y0 in given and (q.f in given) == (objective == "revision") and q.y1 not in given


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
    """b0's and b1's forward share a prompt and pad; the log-probs are those of each sequence by itself."""
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
        ([0, 1, 0, 0], [1, 1, 1, 0], [0, 2 / 3, 1 / 3, 0]),
        ([0, 0], [1, 1], [1 / 2, 1 / 2]),
        ([0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 4 / 11, 4 / 11, 2 / 11, 1 / 11]),
        ([0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0]),
        ([0, 0, 0, 1], [1, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, 0]),  # a span on padding is none
        ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
    ],
)
def test_critique_weights(overlap, mask, expected):
    np.testing.assert_allclose(b5.critique_weights(floats(overlap), floats(mask))[0], expected, atol=1e-6)


def test_critique_weights_invariances():
    """Sum 1 on real steps, 0 on padding; more padding, or junk in its overlap, changes nothing."""
    rng = np.random.default_rng(4)
    mask = np.array([np.arange(8) < n for n in (1, 3, 5, 8)], np.float32)
    overlap = (rng.random((4, 8)) < 0.4).astype(np.float32)
    alpha = b5.critique_weights(overlap, mask)
    np.testing.assert_allclose(alpha.sum(1), 1, rtol=1e-6)
    assert not (alpha * (1 - mask)).any() and (alpha >= 0).all()
    junk = np.where(mask == 1, overlap, 1 - overlap)
    wide = b5.critique_weights(np.pad(junk, ((0, 0), (0, 3)), constant_values=1), np.pad(mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(wide[:, :8], alpha, rtol=1e-6)
    assert not wide[:, 8:].any()


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


def naive_energy(point: np.ndarray, f: np.ndarray) -> float:
    c = critic()
    w_in, bias, w_out = (np.asarray(w[...], float) for w in (c.energy_in, c.energy_bias, c.energy_out))
    h = np.concatenate([point, f]).astype(float) @ w_in + bias
    return float((h / (1 + np.exp(-h)) @ w_out)[0])


def latent(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng((9, seed)).standard_normal((*shape, b5.LATENT_DIM)).astype(np.float32)


def test_points_have_unit_rms():
    c, hidden = critic(), np.random.default_rng(10).standard_normal((2, 3, D)).astype(np.float32)
    for scale in (1, 100):
        points = c.points(jnp.asarray(scale * hidden), c.project)
        np.testing.assert_allclose((points**2).mean(-1), 1, rtol=1e-4)
    z = hidden @ np.asarray(c.project[...])
    np.testing.assert_allclose(points, z / np.sqrt((z**2).mean(-1, keepdims=True)), atol=1e-4)
    assert c.points(jnp.asarray(hidden, jnp.bfloat16), c.project).dtype == jnp.float32
    assert np.abs(points - c.points(jnp.asarray(hidden), c.project_f)).max() > 0.1
    value, grad = jax.value_and_grad(lambda h: c.points(h, c.project).sum())(jnp.zeros((1, D)))
    assert value == 0 and np.isfinite(grad).all()  # an empty step


def test_energies_equal_naive():
    traj, f = latent(0, 2, 3), latent(1, 2)
    expected = [[naive_energy(traj[b, j], f[b]) for j in range(3)] for b in range(2)]
    np.testing.assert_allclose(critic().energies(jnp.asarray(traj), jnp.asarray(f)), expected, atol=1e-4)


class LinearCritic:
    """E(r, e_f) = r . e_f, so dE/dr = e_f at every step."""

    def energies(self, traj_BJR, critique_BR):
        return jnp.einsum("BJR,BR->BJ", traj_BJR, critique_BR)


@pytest.mark.parametrize("width", [2, 3, 8, 32])
def test_edit_is_one_gradient_step_at_the_flagged_step(width):
    """R - R* = eta * e_f at the flagged step however many steps follow, half and a quarter of it after, 0 before."""
    traj, f, eta = latent(0, 2, width), latent(1, 2), 0.3
    overlap, mask = np.zeros((2, width), np.float32), np.ones((2, width), np.float32)
    overlap[0, 0] = overlap[1, 1] = 1
    mask[0, -1] = 0
    edited = b5.edit_trajectory(
        LinearCritic(), jnp.asarray(traj), jnp.asarray(f), b5.critique_weights(overlap, mask), eta
    )
    moved = traj - np.asarray(edited)
    np.testing.assert_allclose(moved[0, 0], eta * f[0], atol=1e-5)
    np.testing.assert_allclose(moved[1, 1], eta * f[1], atol=1e-5)
    np.testing.assert_array_equal(moved[1, 0], 0)
    np.testing.assert_array_equal(moved[0, -1], 0)
    for j in range(2, width):
        np.testing.assert_allclose(moved[1, j], eta * f[1] * 0.5 ** (j - 1), atol=1e-5)


def test_edit_follows_the_real_energy_down():
    """Against finite differences of the naive energy; a short enough step lowers the energy of the attempt."""
    traj, f, alpha = latent(0, 1, 4), latent(1, 1), floats([0, 0.5, 0.25, 0.25])
    edited = np.asarray(b5.edit_trajectory(critic(), jnp.asarray(traj), jnp.asarray(f), alpha, 0.1))
    for j, share in enumerate((0, 1, 0.5, 0.5)):
        slope = np.zeros(b5.LATENT_DIM)
        for r in range(b5.LATENT_DIM):
            e = 1e-5 * np.eye(b5.LATENT_DIM)[r]
            slope[r] = (naive_energy(traj[0, j] + e, f[0]) - naive_energy(traj[0, j] - e, f[0])) / 2e-5
        assert np.linalg.norm(slope) > 0.05
        np.testing.assert_allclose((traj - edited)[0, j], 0.1 * share * slope, atol=1e-4)
    U = lambda traj: sum(a * naive_energy(p, f[0]) for a, p in zip(alpha[0], traj[0]))
    assert U(edited) < U(traj) - 1e-3


def test_edit_without_weights_stays():
    traj, f = latent(0, 1, 3), latent(1, 1)
    edited = b5.edit_trajectory(critic(), jnp.asarray(traj), jnp.asarray(f), np.zeros((1, 3), np.float32), 0.5)
    np.testing.assert_array_equal(edited, traj)


def test_no_gradient_flows_through_the_edit():
    graphdef, params = nnx.split(critic(), nnx.Param)
    edit = lambda params, *a: b5.edit_trajectory(nnx.merge(graphdef, params), *a, 0.5).sum()
    grads = jax.grad(edit, (0, 1, 2, 3))(
        params, jnp.asarray(latent(0, 1, 3)), jnp.asarray(latent(1, 1)), jnp.ones((1, 3)) / 3
    )
    assert all(not g.any() for g in jax.tree.leaves(grads))


B, T, WIDTH = 3, 6, 5
TINY = ModelConfig(vocab_size=11, d_model=D, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=6)
NAMES = ("align", "decode", "energy")  # in the order of `cts_losses`
STEPS = ("y0_steps", "y1_steps")


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
        "wrong": floats([1, 1, 0])[0], "wrong_weight": floats([0.5, 0.5, 0])[0], "noise": latent(3, B, 3),
    }  # fmt: skip
    out["f_tokens"][:, :, 1:3] = 1
    for name in ("y0", "y1"):
        out[f"{name}_mask"] = (out[f"{name}_steps"].sum(-1) > 0).astype(np.float32)
    out["flagged"] = floats([0, 1, 0], [1, 0, 0], [0, 0, 0])
    out["alpha"] = b5.critique_weights(out["flagged"], out["y0_mask"])
    length = np.array([6, 4, 2])
    out["decode_weight"] = (np.arange(T) < length[:, None]).astype(np.float32) / length.sum()
    return out


@functools.cache
def tiny() -> Decoder:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(TINY, nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(12)
    fill = lambda path, a: jnp.asarray(0.4 * rng.standard_normal(a.shape) + ("norm" in str(path)), jnp.float32)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))


@functools.cache
def cts_outputs():
    """With align=l2: ({target: {name: loss}}, their jacobian in "policy", "critic", "y0_steps", "y1_steps")."""
    (model_def, policy), (critic_def, critic_params) = (nnx.split(m, nnx.Param) for m in (tiny(), critic()))

    def losses(params, batch, target):
        decoder, batch = nnx.merge(model_def, params["policy"]), {**batch, **{k: params[k] for k in STEPS}}
        readings = b5.with_replay(Reading(batch["prompt"], batch["prompt_len"], [batch["y0"]]), batch)
        critic, args = nnx.merge(critic_def, params["critic"]), b5.Args(align="l2", target=target)
        *out, _ = b5.cts_losses(decoder, decoder(readings), critic, batch, args)
        return jnp.stack(out)

    @jax.jit
    def everything(params, batch):
        values = {target: losses(params, batch, target) for target in ("energy", "random", "ref_only")}
        return values, jax.jacrev(losses)(params, batch, "energy")

    values, grads = everything(
        {"policy": policy, "critic": critic_params, **{k: jnp.asarray(cts_batch()[k]) for k in STEPS}}, cts_batch()
    )
    return {target: dict(zip(NAMES, np.asarray(row))) for target, row in values.items()}, grads


def test_cts_losses_reach_what_they_should():
    """L_align: policy and projection through y0's steps alone, not the energy. L_decode: policy. L_E: critic."""
    groups, size = ("policy", "energy", "project_f", "project", *STEPS), {}
    for path, g in jax.tree_util.tree_leaves_with_path(cts_outputs()[1]):
        group = next(k for k in groups if k in jax.tree_util.keystr(path))
        for loss, part in zip(NAMES, np.asarray(g)):
            size[loss, group] = size.get((loss, group), 0) + float(np.abs(part).sum())
    assert {loss: {group for group in groups if size[loss, group]} for loss in NAMES} == {
        "align": {"policy", "project", "y0_steps"},
        "decode": {"policy"},
        "energy": {"energy", "project", "project_f"},
    }


def test_cts_losses_by_parts():
    """The three losses again, from states of one row at a time, with loops over steps and tokens."""
    model, c, batch = tiny(), critic(), cts_batch()
    head, packed = np.asarray(model.embed[...], float), jax.jit(model.packed)

    def states(prompt, n, completion):
        """Final hidden states of the plain sequence, as one packed document (what follows it is not seen)."""
        row = np.zeros((1, WIDTH + T), int)
        row[0, : n + T] = [*prompt[:n], *completion]
        return np.asarray(packed(row, np.ones_like(row)), float)[0, : n + T]

    def point(h, w):
        z = h @ np.asarray(w[...], float)
        return z / math.sqrt((z**2).mean() + 1e-6)

    expected, gamma = dict.fromkeys(NAMES, 0.0), b5.ENERGY_MARGIN
    for b in range(B):
        n, p, x = batch["prompt_len"][b], batch["prompt"][b], batch["attempt_prompt_len"][b]
        revise = states(p, n, batch["y1"][b])
        for t in range(T):
            logits = revise[n - 1 + t] @ head.T
            logp = logits[batch["y1"][b, t]] - LOG(np.exp(logits).sum())
            expected["decode"] -= logp * batch["decode_weight"][b, t]
        f = point(revise[1:3].mean(0), c.project_f)
        traj = {}
        for name in ("y0", "y1"):
            emit = states(batch["attempt_prompt"][b], x, batch[name][b])[x - 1 :]  # the state before a token emits it
            count = int(batch[f"{name}_mask"][b].sum())
            traj[name] = [point(emit[2 * j : 2 * j + 2].mean(0), c.project) for j in range(count)]
        U_y0 = sum(a * naive_energy(r, f) for a, r in zip(batch["alpha"][b], traj["y0"]))
        U_y1 = sum(naive_energy(r, f) for r in traj["y1"]) / len(traj["y1"])
        expected["energy"] += max(0.0, gamma - U_y0 + U_y1) * batch["wrong_weight"][b]
        shared = min(map(len, traj.values()))
        time_gap = [(j + 1) / len(traj["y0"]) - (j + 1) / len(traj["y1"]) for j in range(shared)]
        gaps = [((r - s) ** 2).mean() + (b5.TIME_WEIGHT * d) ** 2 for r, s, d in zip(traj["y0"], traj["y1"], time_gap)]
        expected["align"] += np.mean(gaps) * batch["wrong_weight"][b]
    values = cts_outputs()[0]["ref_only"]
    for name in NAMES:
        assert expected[name] > 0.05 and values[name] == pytest.approx(expected[name], rel=1e-3), name


def test_align_loss_by_hand():
    """Two targets, three rows with weights 1/2, 1/2, 0; the distance is the difference of the first coordinates."""
    same = lambda mask_a, mask_b: mask_a.sum() == mask_b.sum()
    distance = lambda a, b, mask_a, mask_b: (jnp.abs(a[0, 0] - b[0, 0]) + 10 * mask_b.sum(), same(mask_a, mask_b))
    points = lambda *first: jnp.array(first)[:, None, None] * jnp.ones((3, 2, 1))
    mask = jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    targets = [(points(1.0, 3.0, 9.0), mask), (points(5.0, 1.0, 9.0), mask[:, ::-1])]
    loss, S, converged = b5.align_loss(points(2.0, 2.0, 2.0), mask, targets, jnp.array([0.5, 0.5, 0.0]), distance)
    np.testing.assert_allclose(S, [[21, 11, 27], [23, 11, 27]])
    assert converged.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert loss == 0.5 * (21 + 23) / 2 + 0.5 * 11


def test_decode_and_energy_loss_by_hand():
    """-(-1 - 2) / 4 - (-4) / 4; max(0, 1 - 3 + 1) and max(0, 1 - 0.5 + 2), half of each."""
    assert b5.decode_loss(floats([-1, -2], [-4, -9]), floats([0.25, 0.25], [0.25, 0])) == 1.75
    assert b5.energy_loss(floats(3, 0.5), floats(1, 2), floats(0.5, 0.5), 1.0) == 1.25


def test_converged_counts_both_transports(monkeypatch):
    """A distance that says it has converged where the masks are of one size: it has to R*, and not to y1's."""
    monkeypatch.setattr(cts, "l2_distance", lambda a, b, mask_a, mask_b: ((a - b).sum(), mask_a.sum() == mask_b.sum()))

    @jax.jit
    def metrics(batch):
        readings = b5.with_replay(Reading(batch["prompt"], batch["prompt_len"], [batch["y0"]]), batch)
        return b5.cts_losses(tiny(), tiny()(readings), critic(), batch, b5.Args(align="l2"))[-1]

    total, count = metrics(cts_batch())["losses/align_converged"]
    assert (float(total), float(count)) == (1.0, 2.0)  # two wrong attempts, half of whose transports converged


def test_random_target_is_as_far_as_the_edit():
    """With align=l2 the term to R* is the mean squared length of the edit: the control arm's is the same."""
    edit, noise, ref = (cts_outputs()[0][target]["align"] for target in ("energy", "random", "ref_only"))
    assert edit == pytest.approx(noise, rel=1e-4)
    assert abs(edit - 0.5 * ref) > 1e-5
