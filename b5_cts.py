"""B5: critique-transport smoothing (CTS). B3's GRPO + verifier, plus an alignment of latent reasoning trajectories.

    L  = L_GRPO(B3) + lam_align * L_align + lam_decode * L_decode + lam_energy * L_E
    R  = P(h(y0 | x))            one point per reasoning step of the flawed attempt, projected, unit RMS   (states that
                                 emit the step's tokens, through the current policy)
    U  = sum_t alpha_t E(R_t, e_f)   energy of the attempt under the critique; alpha is mass on the step f points at
    R* = stopgrad(R - edit_eta * dU/dR)             gradient at the scale of one step: divided by max(alpha)
    L_align  = mean over wrong y0 of [ S(R + time, R* + time) + S(R + time, stopgrad P(h(y1 | x)) + time) ] / 2
    L_decode = -log pi(y1 | x, y0, f) per token         L_E = max(0, margin - U(y0) + U(y1)) on stop-gradient states

S is the debiased Sinkhorn divergence (OTT-JAX, https://ott-jax.readthedocs.io), or soft-DTW, or L2 step by step. Differs
from b3 only in the blocks marked CTS. With all three lam at 0 it is B3, update for update. Ablations: A1 all lam 0, A1d
--lam_align=0 --lam_energy=0, A2 --align=l2, A3 --align=soft_dtw, A4 --lam_decode=0, A5 --energy=frozen, A6 --critique=online.

    python b5_cts.py --task gsm8k --seed 3        (fixtures_math: about 5 minutes on 2 CPU cores, 2 more the first time)
"""

import dataclasses
import functools
import os
# CTS: redaction of critiques.
import re
import statistics
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

# CTS: optimal transport.
from ott.geometry import pointcloud
from ott.tools.sinkhorn_divergence import sinkhorn_divergence

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- run ----
    task: str = "fixtures_math"
    """task to train on: fixtures_math (generated, needs nothing) or gsm8k"""
    data_dir: str | None = None
    """folder with the task's source files (gsm8k: train.jsonl, test.jsonl); none = the hub"""
    replay: str | None = None
    """folder with {train,val,test}.jsonl quadruples; none = data/replay/<task>, made if it is not there"""
    model: str = "nano"
    """model to start from: nano, a 1M-parameter LM whose base is trained once per task and cached"""
    seed: int = 0
    """seed of data order and sampling (the base has its own, fixed)"""
    out_dir: str = "runs"
    """folder for the run's directory, the cached bases and compiled programs"""
    resume: bool = False
    """continue this very command's run from its last checkpoint"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode; auto = online where you are logged in, else offline"""
    # ---- shared by all methods ----
    steps: int = 80
    """optimizer steps"""
    prompts: int = 16
    """prompts per step"""
    group: int = 8
    """completions per prompt"""
    max_prompt_tokens: int = 1024
    """longest prompt allowed, in tokens; a longer one is an error"""
    max_new_tokens: int = 0
    """longest completion, in tokens; 0 = the task's (fixtures_math 112, gsm8k 320)"""
    temperature: float = 1.0
    """sampling temperature; the same in sampling and in training"""
    learning_rate: float = 1e-3
    """peak AdamW learning rate, decayed linearly to 0 over the run (fits nano; checkpoints of 0.5B and up want 1e-6)"""
    micro_batch: int = 0
    """prompts per micro-batch; 0 = all at once"""
    mesh: str = "auto"
    """device mesh DATA,MODEL, e.g. 4,2; auto = all devices on data"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; auto = bfloat16 on accelerators, float32 on CPU; weights and reductions are float32 always"""
    eval_every: int = 0
    """steps between evaluations on the validation split; 0 = only the final one, on test"""
    save_every: int = 40
    """steps between checkpoints; 0 = only the last"""
    # ---- GRPO ----
    adv_norm: Literal["center", "std"] = "center"
    """center = reward minus group mean (Dr. GRPO); std = also divided by the group's standard deviation (GRPO)"""
    clip_low: float = 0.2
    """lower clip of the ratio, 1 - clip_low (PPO, GRPO)"""
    clip_high: float = 0.28
    """upper clip of the ratio, 1 + clip_high (DAPO's clip-higher)"""
    kl_coef: float = 0.0
    """weight of the k3 KL to the frozen base; 0 = off, no reference forward (DAPO, Dr. GRPO)"""
    loss_norm: Literal["constant", "token"] = "constant"
    """divide the summed loss by the constant token budget (Dr. GRPO) or by the batch's tokens (DAPO)"""
    truncated: Literal["mask", "keep"] = "mask"
    """completions cut at max_new_tokens: leave them out of loss and baseline (DAPO) or keep them with their reward"""
    # VERIFIER: what B3 adds to outcome-only GRPO.
    process_coef: float = 0.5
    """weight of the process reward; 0 = outcome only"""
    process_credit: Literal["rolled_up", "per_step"] = "rolled_up"
    """rolled_up = one scalar per completion; per_step = step-level advantages (DeepSeekMath 4.1.3)"""
    # CTS: what B5 adds.
    lam_align: float = 0.1
    """weight of the trajectory alignment at the first step; 0 = off"""
    lam_align_final: float = 0.0
    """its weight at the last step, reached linearly: matching a privileged target peaks early and then declines"""
    lam_decode: float = 0.1
    """weight of the next-token loss on the revision y1; 0 = off"""
    lam_energy: float = 0.1
    """weight of the energy critic's margin loss; 0 = off"""
    align: Literal["sinkhorn", "soft_dtw", "l2"] = "sinkhorn"
    """distance between trajectories"""
    energy: Literal["trained", "frozen"] = "trained"
    """frozen = the energy stays as initialised (A5)"""
    critique: Literal["replay", "shuffled", "redacted", "online"] = "replay"
    """f from replay; of another problem (control); with its numbers removed (control); of the policy's own attempt (A6)"""
    target: Literal["energy", "ref_only", "random"] = "energy"
    """R* from the energy edit; no R*, only y1's trajectory; an edit of the same length in a random direction (controls)"""
    edit_eta: float = 0.5
    """step length of the energy edit"""
    sinkhorn_tau: float = 1.0
    """marginal relaxation of the transport; 1 = balanced"""


# CTS: constants that no ablation varies.
LATENT_DIM, ENERGY_HIDDEN, ENERGY_MARGIN = 32, 64, 1.0  # R, hidden width of E, margin of L_E
TIME_WEIGHT, EPSILON, GAMMA, ALPHA_DECAY = 0.5, 0.05, 0.1, 0.5  # time channel, Sinkhorn, soft-DTW, alpha past the span


# ---- method pieces ------------------------------------------------------------------------------------------------
def group_advantages(reward_BG: np.ndarray, valid_BG: np.ndarray, norm: str) -> np.ndarray:
    """Advantages within each group, over its valid completions; invalid ones get 0.

    Rewards [1, 0, 0, 1] with all valid: center -> [.5, -.5, -.5, .5], std -> [1, -1, -1, 1].
    Rewards [1, 0, 9] with the last one invalid: center -> [.5, -.5, 0].
    """
    n_B1 = np.maximum(valid_BG.sum(1, keepdims=True), 1)
    centred_BG = (reward_BG - (reward_BG * valid_BG).sum(1, keepdims=True) / n_B1) * valid_BG
    if norm == "std":
        centred_BG = centred_BG / (np.sqrt((centred_BG**2).sum(1, keepdims=True) / n_B1) + 1e-6)
    return centred_BG.astype(np.float32)


# VERIFIER: step-level credit.
def step_advantages(step_reward_BGT: np.ndarray, step_end_BGT: np.ndarray, norm: str) -> np.ndarray:
    """DeepSeekMath eq. in 4.1.3: centre (or normalise) all step rewards of a group, then each token sums those of the
    steps that end at or after it.

    One group of two completions with step rewards [1, 0] at tokens 1 and 3, and [1] at token 0, T=4: mean 2/3, so
    centred [1/3, -2/3] and [1/3]; advantages [-1/3, -1/3, -2/3, -2/3] and [1/3, 0, 0, 0].
    """
    n_B11 = np.maximum(step_end_BGT.sum((1, 2), keepdims=True), 1)
    centred_BGT = (step_reward_BGT - (step_reward_BGT * step_end_BGT).sum((1, 2), keepdims=True) / n_B11) * step_end_BGT
    if norm == "std":
        centred_BGT = centred_BGT / (np.sqrt((centred_BGT**2).sum((1, 2), keepdims=True) / n_B11) + 1e-6)
    return centred_BGT[..., ::-1].cumsum(-1)[..., ::-1].astype(np.float32)


# CTS: the energy critic and the pieces of the alignment.
class Critic(nnx.Module):
    """P: hidden state -> latent point of unit RMS, for steps and for the critique; E: (point, critique) -> energy."""

    def __init__(self, d_model: int, rngs: nnx.Rngs):
        normal = lambda n_in, n_out: nnx.Param(jax.random.normal(rngs.params(), (n_in, n_out)) * n_in**-0.5)
        self.project, self.project_f = normal(d_model, LATENT_DIM), normal(d_model, LATENT_DIM)
        self.energy_in, self.energy_bias = normal(2 * LATENT_DIM, ENERGY_HIDDEN), nnx.Param(jnp.zeros(ENERGY_HIDDEN))
        self.energy_out = normal(ENERGY_HIDDEN, 1)

    def points(self, hidden, weights):
        """Unit-RMS points [..., R] of hidden states in float32; the scale is fixed so that the space cannot collapse."""
        z = hidden.astype(jnp.float32) @ weights[...]
        return z * jax.lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-6)

    def energies(self, traj_BJR, critique_BR):
        """E [B, J] of every point under its critique."""
        both = jnp.concatenate([traj_BJR, jnp.broadcast_to(critique_BR[:, None], traj_BJR.shape)], -1)
        return (jax.nn.silu(both @ self.energy_in[...] + self.energy_bias[...]) @ self.energy_out[...])[..., 0]


def pool_steps(hidden_BTD, step_BJT):
    """Mean hidden state of each step's tokens [B, J, D]; steps without tokens give 0.

    hidden [[1], [3], [5]] with step tokens [[1, 1, 0], [0, 0, 1], [0, 0, 0]] gives [[2], [5], [0]].
    """
    return jnp.einsum("BJT,BTD->BJD", step_BJT, hidden_BTD) / jnp.maximum(step_BJT.sum(-1), 1.0)[..., None]


def critique_weights(overlap_BJ: np.ndarray, step_mask_BJ: np.ndarray) -> np.ndarray:
    """alpha [B, J]: 1 on the steps the span overlaps, halved with every step after the last, 0 before; sums to 1 over
    real steps. Uniform where there is no span.

    overlap [0, 1, 0, 0] with mask [1, 1, 1, 0] gives [0, 2/3, 1/3, 0]; overlap [0, 0] with mask [1, 1] gives [1/2, 1/2].
    """
    alpha_BJ = np.zeros(overlap_BJ.shape, np.float32)
    for alpha_J, overlap_J, mask_J in zip(alpha_BJ, overlap_BJ * step_mask_BJ, step_mask_BJ):
        hit = np.flatnonzero(overlap_J)
        if len(hit):
            alpha_J[hit] = 1.0
            alpha_J[hit[-1] + 1 :] = ALPHA_DECAY ** np.arange(1, len(alpha_J) - hit[-1])
        else:
            alpha_J[:] = 1.0
        alpha_J *= mask_J / max((alpha_J * mask_J).sum(), 1e-9)
    return alpha_BJ


def with_time(traj_JR, mask_J):
    """Points scaled to unit length with the time channel TIME_WEIGHT * t / T beside them: [J, R + 1]."""
    t_J = jnp.cumsum(mask_J) / jnp.maximum(mask_J.sum(), 1.0)
    return jnp.concatenate([traj_JR / traj_JR.shape[-1] ** 0.5, TIME_WEIGHT * t_J[:, None]], -1)


def sinkhorn_distance(a_JR, b_KR, mask_J, mask_K, tau: float = 1.0):
    """Debiased Sinkhorn divergence of two masked point sets (uniform weights on real points, 0 on padding), and whether it
    converged. Fixed float epsilon: a data-dependent one would let the padding change the result. b is a constant.
    """
    some = (mask_J.sum() > 0) & (mask_K.sum() > 0)
    w_J, w_K = jnp.where(some, mask_J, 1.0), jnp.where(some, mask_K, 1.0)
    value, out = sinkhorn_divergence(
        pointcloud.PointCloud, a_JR, b_KR, a=w_J / w_J.sum(), b=w_K / w_K.sum(), epsilon=EPSILON, static_b=True,
        solve_kwargs={"threshold": 1e-3, "max_iterations": 200, "tau_a": tau, "tau_b": tau},
    )  # fmt: skip
    return jnp.where(some, value, 0.0), out.converged[0].astype(jnp.float32)


def soft_dtw(cost_JK, n, m, gamma: float = GAMMA):
    """Soft-DTW (https://arxiv.org/abs/1703.01541) of the leading n x m block of a cost matrix, by anti-diagonals.

    BIG is finite on purpose: with BIG / gamma beyond 1e11 the value stays right and the gradient becomes NaN.
    """
    J, K = cost_JK.shape
    BIG = 1e6
    k_D = jnp.arange(J + K - 1)[:, None] - jnp.arange(J)[None, :]  # column of cell (diagonal d, row j)
    skewed_DJ = jnp.where((k_D >= 0) & (k_D < K), jnp.take_along_axis(cost_JK.T, jnp.clip(k_D, 0, K - 1), 0), BIG)

    def diagonal(carry, cost_J):
        before_J, last_J, d = carry  # the two previous anti-diagonals, by row
        shift = lambda a, fill: jnp.concatenate([jnp.full(1, fill), a[:-1]])
        corner_J = shift(before_J, BIG).at[0].set(jnp.where(d == 0, 0.0, BIG))
        options = jnp.stack([last_J, shift(last_J, BIG), corner_J])
        new_J = jnp.minimum(cost_J - gamma * jax.nn.logsumexp(-options / gamma, axis=0), BIG)
        return (last_J, new_J, d + 1), new_J

    start = (jnp.full(J, BIG), jnp.full(J, BIG), 0)
    _, table_DJ = jax.lax.scan(diagonal, start, skewed_DJ)
    return table_DJ[n + m - 2, n - 1]


def soft_dtw_distance(a_JR, b_KR, mask_J, mask_K):
    """Debiased soft-DTW divergence of two masked point sequences, per step of the longest possible path."""
    n, m = mask_J.sum().astype(int), mask_K.sum().astype(int)
    cost = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)
    some, n, m = (n > 0) & (m > 0), jnp.maximum(n, 1), jnp.maximum(m, 1)
    value = soft_dtw(cost(a_JR, b_KR), n, m) - 0.5 * (soft_dtw(cost(a_JR, a_JR), n, n) + soft_dtw(cost(b_KR, b_KR), m, m))
    return jnp.where(some, value / (n + m), 0.0), jnp.float32(1.0)


def l2_distance(a_JR, b_KR, mask_J, mask_K):
    """Mean squared distance of the steps that both have, index by index."""
    both_J = mask_J * mask_K
    return (((a_JR - b_KR) ** 2).sum(-1) * both_J).sum() / jnp.maximum(both_J.sum(), 1.0), jnp.float32(1.0)


def edit_trajectory(critic: Critic, traj_BJR, critique_BR, alpha_BJ, eta: float):
    """R* = stopgrad(R - eta * dU/dR / max(alpha)), so the step the critique points at moves by eta times its own gradient
    however long the attempt is; also the mean length of the edit on the steps that have weight."""
    U = lambda traj_BJR: (critic.energies(traj_BJR, critique_BR) * alpha_BJ).sum()
    grad_BJR = jax.grad(U)(traj_BJR) / jnp.maximum(alpha_BJ.max(-1), 1e-9)[:, None, None]
    return jax.lax.stop_gradient(traj_BJR - eta * grad_BJR)


def margin_loss(energy_y0_B, energy_y1_B):
    """L_E per quadruple: the flawed trajectory's energy should lie ENERGY_MARGIN above the revision's."""
    return jax.nn.relu(ENERGY_MARGIN - energy_y0_B + energy_y1_B)


def cts_losses(model, critic: Critic, batch, prefix, last_B, prompt_hidden_BPD, dtype, args: "Args"):
    """{"align", "decode", "energy"} losses of one batch (sums of terms whose weights add up to 1 over the whole batch) and
    their metrics. `prefix` is the revise prompts' own: y1 is decoded from it without computing the prompt again."""
    stop = jax.lax.stop_gradient
    # L_decode: y1 is one more completion of the revise prompt
    y1_hidden_BTD = model(last_B, batch["y1"], prefix, dtype)
    y1_logp_BT, _ = cts.token_logp(y1_hidden_BTD, batch["y1"], model.head_VD())
    decode_loss = -(y1_logp_BT * batch["decode_weight"]).sum()
    # trajectories of y0 and y1, both after the attempt prompt, in one forward
    x_last_B = cts.last_tokens(batch["x_prompt"], batch["x_prompt_len"])
    x_prefix, _ = model.prefill(batch["x_prompt"], batch["x_prompt_len"], dtype)
    both_MT = jnp.stack([batch["y0"], batch["y1"]], 1).reshape(-1, batch["y0"].shape[-1])
    hidden_MTD = model(x_last_B, both_MT, x_prefix, dtype).astype(jnp.float32)
    pooled_BJD = [pool_steps(h, batch[k]) for h, k in ((hidden_MTD[0::2], "y0_steps"), (hidden_MTD[1::2], "y1_steps"))]
    mask_y0_BJ, mask_y1_BJ = batch["y0_step_mask"], batch["y1_step_mask"]
    f_BD = stop(pool_steps(prompt_hidden_BPD.astype(jnp.float32), batch["f_tokens"][:, None])[:, 0])
    f_BR = critic.points(f_BD, critic.project_f)
    # L_align: only the attempt's side carries gradient
    traj_BJR = critic.points(pooled_BJD[0], critic.project)
    ref_BJR = stop(critic.points(pooled_BJD[1], critic.project))
    target_BJR = edit_trajectory(critic, stop(traj_BJR), stop(f_BR), batch["alpha"], args.edit_eta)
    edit_BJ = jnp.linalg.norm(target_BJR - stop(traj_BJR), axis=-1)
    if args.target == "random":
        noise_BJR = batch["noise"] / jnp.linalg.norm(batch["noise"], axis=-1, keepdims=True)
        target_BJR = stop(traj_BJR) + edit_BJ[..., None] * noise_BJR
    distance = {"sinkhorn": functools.partial(sinkhorn_distance, tau=args.sinkhorn_tau), "soft_dtw": soft_dtw_distance, "l2": l2_distance}[args.align]
    apart = jax.vmap(lambda a, b, mask_a, mask_b: distance(with_time(a, mask_a), with_time(b, mask_b), mask_a, mask_b))
    to_ref_B, converged_B = apart(traj_BJR, ref_BJR, mask_y0_BJ, mask_y1_BJ)
    align_B = to_ref_B
    if args.target != "ref_only":
        to_target_B, _ = apart(traj_BJR, target_BJR, mask_y0_BJ, mask_y0_BJ)
        align_B = 0.5 * (to_target_B + to_ref_B)
    align_loss = (align_B * batch["align_weight"]).sum()
    # L_E: on stop-gradient states, so that it trains only the critic
    U_y0_B = (critic.energies(critic.points(stop(pooled_BJD[0]), critic.project), f_BR) * batch["alpha"]).sum(-1)
    uniform_BJ = mask_y1_BJ / jnp.maximum(mask_y1_BJ.sum(-1, keepdims=True), 1.0)
    U_y1_B = (critic.energies(critic.points(stop(pooled_BJD[1]), critic.project), f_BR) * uniform_BJ).sum(-1)
    energy_loss = (margin_loss(U_y0_B, U_y1_B) * batch["energy_weight"]).sum() * (args.energy == "trained")
    wrong_B = batch["align_weight"] > 0
    metrics = {
        "losses/energy_gap": ((U_y0_B - U_y1_B).sum(), 1.0 * len(last_B)),
        "losses/edit_norm": ((edit_BJ.max(-1) * wrong_B).sum(), wrong_B.sum()),
        "losses/align_converged": ((converged_B * wrong_B).sum(), wrong_B.sum()),
        "losses/align_ref": ((to_ref_B * wrong_B).sum(), wrong_B.sum()),
    }
    return {"align": align_loss, "decode": decode_loss, "energy": energy_loss}, metrics


def pack_cts(tokenizer: cts.Tokenizer, quads: list[cts.Quadruple], shapes: dict[str, int], revise: dict) -> dict[str, np.ndarray]:
    """The arrays of one batch that only CTS needs: y0 and y1 after the attempt prompt, their steps, f's tokens, alpha."""
    B, T = len(quads), shapes["T_replay"]
    prompts = cts.pack_prompts(tokenizer, [cts.attempt_prompt(q.x) for q in quads], shapes["P_attempt"])
    out = {"x_prompt": prompts["prompt"], "x_prompt_len": prompts["prompt_len"]}
    overlap_BJ = np.zeros((B, cts.MAX_STEPS), np.float32)
    for name in ("y0", "y1"):
        out[name], len_B = cts.pack_answers(tokenizer, [getattr(q, name) for q in quads], T)
        out[f"{name}_steps"] = np.zeros((B, cts.MAX_STEPS, T), np.float32)
        for b, q in enumerate(quads):
            text = getattr(q, name)
            steps = cts.split_steps(text)[: cts.MAX_STEPS]
            ids = out[name][b, : len_B[b]].tolist()
            out[f"{name}_steps"][b, : len(steps), : len(ids)] = tokenizer.overlap(ids, text, [(s.start, s.end) for s in steps])
            if name == "y0" and q.meta["error_span"]:
                start, end = q.meta["error_span"]
                overlap_BJ[b, : len(steps)] = [s.start < end and s.end > start for s in steps]
        out[f"{name}_step_mask"] = (out[f"{name}_steps"].sum(-1) > 0).astype(np.float32)
    out["overlap"], out["alpha"] = overlap_BJ, critique_weights(overlap_BJ, out["y0_step_mask"])
    decode_BT = np.asarray(cts.length_mask(len_B, T))
    out["decode_weight"] = decode_BT / decode_BT.sum()
    wrong_B = np.array([not q.meta["y0_correct"] for q in quads], np.float32)
    out["align_weight"], out["energy_weight"] = (wrong_B / max(wrong_B.sum(), 1.0) for _ in range(2))
    out["f_tokens"] = np.zeros(revise["prompt"].shape, np.float32)
    for b, q in enumerate(quads):
        text = cts.revise_prompt(q.x, q.y0, q.f)
        start = text.index(q.y0, len(q.x)) + len(q.y0)  # f stands after y0 in the prompt
        at = text.index(q.f, start)
        ids = revise["prompt"][b, : revise["prompt_len"][b]].tolist()
        out["f_tokens"][b, : len(ids)] = tokenizer.overlap(ids, text, [(at, at + len(q.f))])[0]
    return out


def control_critiques(quads: list[cts.Quadruple], everyone: list[cts.Quadruple], kind: str, rng) -> list[cts.Quadruple]:
    """Control arms: f of another, random problem (with its span left where it was), or f without its numbers."""
    if kind == "shuffled":
        fs = [everyone[i].f for i in rng.integers(len(everyone), size=len(quads))]
        return [dataclasses.replace(q, f=f) for q, f in zip(quads, fs)]
    ordinals = "|".join(cts.ORDINALS)
    return [dataclasses.replace(q, f=re.sub(rf"\d+(?:[.,]\d+)*|\b(?:{ordinals})\b", "_", q.f)) for q in quads]


def online_quadruples(quads: list[cts.Quadruple], attempts: list[str], fits) -> list[cts.Quadruple]:
    """A6: the policy's own attempt in place of y0, with the rule-based step checker's critique and span. An attempt that
    would make the prompt too long for the run's shape (`fits` says) loses its end."""
    out = []
    for q, y0 in zip(quads, attempts):
        f, span = cts.check_critique(y0, q.y1)
        while not fits(cts.revise_prompt(q.x, y0, f)):
            y0 = y0[: int(0.9 * len(y0))]
            f, span = cts.check_critique(y0, q.y1)
        right = cts.score_math(y0, q.meta["answer"]) == 1.0
        out.append(dataclasses.replace(q, y0=y0, f=f, meta={**q.meta, "error_span": span, "y0_correct": right}))
    return out


# ---- loss ---------------------------------------------------------------------------------------------------------
def grpo_loss(logp_MT, old_logp_MT, adv_MT, mask_MT, clip_low: float, clip_high: float, denom):
    """Clipped policy-gradient loss, summed over tokens and divided by `denom`; also its metrics as (sum, count)."""
    log_ratio_MT = (logp_MT - old_logp_MT) * mask_MT
    ratio_MT = jnp.exp(log_ratio_MT)
    clipped_MT = jnp.clip(ratio_MT, 1 - clip_low, 1 + clip_high)
    pg_loss_MT = -jnp.minimum(ratio_MT * adv_MT, clipped_MT * adv_MT)
    loss = (pg_loss_MT * mask_MT).sum() / denom
    n_tokens = mask_MT.sum()
    metrics = {
        "losses/clipfrac": (((ratio_MT * adv_MT > clipped_MT * adv_MT) * mask_MT).sum(), n_tokens),
        "losses/ratio_dev": (jnp.abs(ratio_MT - 1).sum(), n_tokens),
        "rollout/sampler_kl": ((ratio_MT - 1 - log_ratio_MT).sum(), n_tokens),
    }
    return loss, metrics


def k3_kl(logp_MT, ref_logp_MT, mask_MT, denom):
    """Schulman's k3 estimate of KL(pi || base) (http://joschu.net/blog/kl-approx.html), summed and divided by denom."""
    diff_MT = (ref_logp_MT - logp_MT) * mask_MT
    return ((jnp.exp(diff_MT) - 1 - diff_MT) * mask_MT).sum() / denom


def main(args: Args) -> dict:
    # ---- checks, data, model --------------------------------------------------------------------------------------
    method = os.path.basename(__file__)[: -len(".py")]
    cts.check_counts(steps=args.steps, prompts=args.prompts, group=args.group, max_prompt_tokens=args.max_prompt_tokens)
    cts.open_out_dir(args.out_dir)
    mesh, dtype = cts.make_mesh(args.mesh, args.prompts, args.micro_batch), cts.pick_dtype(args.dtype)
    replay = cts.load_replay(args.task, args.replay, args.data_dir)
    cfg, base_params, tokenizer, base_dir = cts.load_base(args.model, args.task, replay, args.out_dir)
    shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, args.max_new_tokens or cts.TASKS[args.task].max_new_tokens)
    B, G, T = args.prompts, args.group, shapes["T"]
    M = B * G
    run = cts.Run(args, method)
    if run.finished:
        print(f"{run.name} has finished already: {run.dir / 'result.json'}")
        return run.result()

    # ---- parameters, optimizer, shardings -------------------------------------------------------------------------
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))))
    root = jax.random.key(args.seed)
    rollout_key = jax.random.fold_in(root, cts.STREAM_ROLLOUT)
    # CTS: A6 draws from its own stream.
    attempt_key = jax.random.fold_in(root, cts.STREAM_CONTROL)
    base_params = jax.device_put(base_params, cts.shard_rule(mesh, base_params))
    params = {"policy": jax.tree.map(jnp.copy, base_params)}  # a copy: the step donates its parameters
    # CTS: the projection and the energy are trained beside the policy.
    critic_def, critic = nnx.split(Critic(cfg.d_model, nnx.Rngs(jax.random.fold_in(root, cts.STREAM_INIT))), nnx.Param)
    params["critic"] = critic
    # one optimizer per subtree, so that nothing but the policy's gradient enters the policy's clipping
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(args.learning_rate, 0.0, args.steps), b2=0.99, weight_decay=0.0),
    )
    opt_state = {name: tx.init(subtree) for name, subtree in params.items()}
    state_sharding = cts.shard_rule(mesh, (params, opt_state))
    params, opt_state = jax.device_put((params, opt_state), state_sharding)
    by_row, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    # ---- jitted functions -----------------------------------------------------------------------------------------
    @jax.jit
    def rollout(policy, prompt_BP, prompt_len_B, key):
        cts.count_trace("rollout")
        policy = jax.lax.with_sharding_constraint(policy, cts.shard_rule(mesh, policy, at_rest=False))
        model = nnx.merge(graphdef, policy)
        return cts.generate(model, prompt_BP, prompt_len_B, key, G, T, args.temperature, tokenizer.eos_id, tokenizer.pad_id, dtype=dtype)

    # CTS: A6 samples one first attempt per problem from the current policy.
    @jax.jit
    def attempt(policy, prompt_BP, prompt_len_B, key):
        cts.count_trace("attempt")
        policy = jax.lax.with_sharding_constraint(policy, cts.shard_rule(mesh, policy, at_rest=False))
        model, longest = nnx.merge(graphdef, policy), shapes["T_replay"] - 1
        return cts.generate(model, prompt_BP, prompt_len_B, key, 1, longest, args.temperature, tokenizer.eos_id, tokenizer.pad_id, dtype=dtype)

    @jax.jit
    def step_energies(params, batch):
        model, critic = nnx.merge(graphdef, params["policy"]), nnx.merge(critic_def, params["critic"])
        _, prompt_hidden_BPD = model.prefill(batch["prompt"], batch["prompt_len"], dtype)
        x_prefix, _ = model.prefill(batch["x_prompt"], batch["x_prompt_len"], dtype)
        hidden_BTD = model(cts.last_tokens(batch["x_prompt"], batch["x_prompt_len"]), batch["y0"], x_prefix, dtype)
        f_BD = pool_steps(prompt_hidden_BPD.astype(jnp.float32), batch["f_tokens"][:, None])[:, 0]
        points_BJR = critic.points(pool_steps(hidden_BTD.astype(jnp.float32), batch["y0_steps"]), critic.project)
        return critic.energies(points_BJR, critic.points(f_BD, critic.project_f))

    def loss_fn(params, batch, denom, base_params):
        model = nnx.merge(graphdef, params["policy"])
        tokens_MT, old_logp_MT, adv_MT, mask_MT = (batch[k].reshape(-1, T) for k in ("tokens", "old_logp", "adv", "mask"))
        last_B = cts.last_tokens(batch["prompt"], batch["prompt_len"])
        prefix, prompt_hidden_BPD = model.prefill(batch["prompt"], batch["prompt_len"], dtype)
        hidden_MTD = model(last_B, tokens_MT, prefix, dtype)
        logp_MT, entropy_MT = cts.token_logp(hidden_MTD, tokens_MT, model.head_VD(), args.temperature)
        loss, metrics = grpo_loss(logp_MT, old_logp_MT, adv_MT, mask_MT, args.clip_low, args.clip_high, denom)
        share = len(last_B) / B  # of the batch: these losses are sums over micro-batches already divided by denom
        metrics["losses/policy_loss"] = (loss, share)
        metrics["losses/entropy"] = ((entropy_MT * mask_MT).sum(), mask_MT.sum())
        if args.kl_coef:
            base = nnx.merge(graphdef, base_params)
            base_prefix, _ = base.prefill(batch["prompt"], batch["prompt_len"], dtype)
            base_hidden_MTD = base(last_B, tokens_MT, base_prefix, dtype)
            base_logp_MT, _ = cts.token_logp(base_hidden_MTD, tokens_MT, base.head_VD(), args.temperature)
            kl = k3_kl(logp_MT, base_logp_MT, mask_MT, denom)
            loss = loss + args.kl_coef * kl
            metrics["losses/kl"] = (kl, share)
        # CTS: alignment, decoding and energy; each lam comes with the batch, one per row.
        critic = nnx.merge(critic_def, params["critic"])
        extra, extra_metrics = cts_losses(model, critic, batch, prefix, last_B, prompt_hidden_BPD, dtype, args)
        lam = {"align": batch["lam_align"].mean(), "decode": args.lam_decode, "energy": args.lam_energy}
        for name, value in extra.items():
            loss = loss + lam[name] * value
            metrics[f"losses/{name}_loss"] = (value, share)
        metrics |= extra_metrics
        metrics["losses/loss"] = (loss, share)
        return loss, metrics

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*state_sharding, replicated))
    def train_step(params, opt_state, batch, denom, base_params):
        cts.count_trace("train_step")
        n_micro = B // (args.micro_batch or B)
        micro = jax.tree.map(lambda a: a.reshape(B // n_micro, n_micro, *a.shape[1:]).swapaxes(0, 1), batch)
        grad_fn = lambda one: jax.grad(loss_fn, has_aux=True)(params, one, denom, base_params)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(grad_fn, jax.tree.map(lambda a: a[0], micro)))
        (grads, metrics), _ = jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, grad_fn(one)), None), zeros, micro)
        metrics["losses/grad_norm"] = (optax.tree.norm(grads["policy"]), 1.0)
        # CTS: a frozen energy keeps its parameters; the projection goes on.
        if args.energy == "frozen":
            grads["critic"] = jax.tree_util.tree_map_with_path(lambda p, g: g * ("energy" not in str(p)), grads["critic"])
        for name in params:
            updates, opt_state[name] = tx.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return params, opt_state, metrics

    # ---- base: what there is to improve ---------------------------------------------------------------------------
    evaluator = cts.Evaluator(graphdef, tokenizer, replay["test"], shapes, mesh, dtype)

    def sampled_zero_std(quads: list[cts.Quadruple]) -> float:
        std_n = []
        for i in range(0, len(quads) - B + 1, B):
            batch = cts.pack_prompts(tokenizer, [cts.revise_prompt(q.x, q.y0, q.f) for q in quads[i : i + B]], shapes["P_revise"])
            out = rollout(base_params, *jax.device_put(tuple(batch.values()), by_row), jax.random.fold_in(root, cts.STREAM_EVAL))
            texts = cts.decode_rows(tokenizer, out["tokens_MT"], out["len_M"])
            std_n += list(cts.outcome_scores(texts, quads[i : i + B]).std(1))
        return float(np.mean(np.array(std_n) == 0))

    base = cts.base_report(base_dir, evaluator, base_params, sampled_zero_std, replay, (G, args.temperature, args.seed, str(dtype)))
    cts.print_precheck(base["precheck"])
    base_attempt_logp, _ = evaluator.attempt_logp(base_params)
    cts.reset_traces()

    # ---- loop -----------------------------------------------------------------------------------------------------
    identity = cts.fingerprint(
        base_weights=cts.weights_sha256(base_params), tokenizer=tokenizer.sha256(), templates=cts.templates_sha256(),
        train_replay=cts.replay_sha256(replay["train"]), test_replay=cts.replay_sha256(replay["test"]),
        verifier=cts.verifier_sha256(), temperature=args.temperature, dtype=jnp.dtype(dtype).name, revision_budget=1, shapes=shapes,
    )  # fmt: skip
    run.start({**dataclasses.asdict(args), "identity": identity})
    (params, opt_state), first_step = run.restore((params, opt_state), identity)
    times, completions = {"rollout": [], "score": [], "update": [], "step": []}, 0
    progress = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, desc=method, unit="step")
    for step in progress:
        clock = [time.perf_counter()]
        quads = [replay["train"][i] for i in cts.data_indices(len(replay["train"]), B, args.seed, step)]
        # CTS: control arms and A6 change the critique before it reaches the prompt.
        step_rng = np.random.default_rng((args.seed, cts.STREAM_CONTROL, step))
        if args.critique in ("shuffled", "redacted"):
            quads = control_critiques(quads, replay["train"], args.critique, step_rng)
        if args.critique == "online":
            x_batch = cts.pack_prompts(tokenizer, [cts.attempt_prompt(q.x) for q in quads], shapes["P_attempt"])
            own = attempt(params["policy"], *jax.device_put(tuple(x_batch.values()), by_row), jax.random.fold_in(attempt_key, step))
            fits = lambda prompt: len(tokenizer.encode(prompt)) <= shapes["P_revise"]
            quads = online_quadruples(quads, cts.decode_rows(tokenizer, own["tokens_MT"], own["len_M"]), fits)
        batch = cts.pack_prompts(tokenizer, [cts.revise_prompt(q.x, q.y0, q.f) for q in quads], shapes["P_revise"])

        # ---- rollout ----
        device_batch = jax.device_put(batch, by_row)
        out = rollout(params["policy"], device_batch["prompt"], device_batch["prompt_len"], jax.random.fold_in(rollout_key, step))
        out = jax.device_get(out)
        clock.append(time.perf_counter())

        # ---- score ----
        texts = cts.decode_rows(tokenizer, out["tokens_MT"], out["len_M"])
        outcome_BG = cts.outcome_scores(texts, quads)
        truncated_BG = out["truncated_M"].reshape(B, G)
        reward_BG = outcome_BG
        # VERIFIER: the process reward joins the outcome.
        process_BG = cts.process_scores(texts, quads)
        if args.process_credit == "rolled_up":
            reward_BG = reward_BG + args.process_coef * process_BG

        # ---- advantages ----
        valid_BG = 1.0 - truncated_BG if args.truncated == "mask" else np.ones((B, G))
        adv_BG = group_advantages(reward_BG, valid_BG, args.adv_norm)
        mask_BGT = np.asarray(cts.length_mask(out["len_M"], T)).reshape(B, G, T) * valid_BG[..., None]
        adv_BGT = np.repeat(adv_BG[..., None], T, axis=-1)
        # VERIFIER: or each step's own reward goes to the tokens before its end.
        if args.process_credit == "per_step":
            step_reward_BGT, step_end_BGT = cts.step_rewards(tokenizer, out["tokens_MT"], out["len_M"], texts, quads)
            step_adv_BGT = step_advantages(step_reward_BGT * valid_BG[..., None], step_end_BGT * valid_BG[..., None], args.adv_norm)
            adv_BGT = adv_BGT + args.process_coef * step_adv_BGT
        batch["tokens"] = out["tokens_MT"].reshape(B, G, T)
        batch["old_logp"] = out["logp_MT"].reshape(B, G, T)
        batch["adv"] = adv_BGT.astype(np.float32)
        batch["mask"] = mask_BGT.astype(np.float32)
        denom = np.float32(M * T if args.loss_norm == "constant" else max(mask_BGT.sum(), 1.0))
        # CTS: what the alignment needs, and lam_align on its schedule.
        batch |= pack_cts(tokenizer, quads, shapes, batch)
        progressed = step / max(1, args.steps - 1)
        batch["lam_align"] = np.full(B, args.lam_align + progressed * (args.lam_align_final - args.lam_align), np.float32)
        batch["noise"] = step_rng.standard_normal((B, cts.MAX_STEPS, LATENT_DIM)).astype(np.float32)
        clock.append(time.perf_counter())

        # ---- update ----
        params, opt_state, sums = train_step(params, opt_state, jax.device_put(batch, by_row), denom, base_params)
        metrics = cts.reduce(jax.device_get(sums))
        clock.append(time.perf_counter())

        # ---- log, save ----
        for name, a, b in (("rollout", 0, 1), ("score", 1, 2), ("update", 2, 3), ("step", 0, 3)):
            times[name].append(clock[b] - clock[a])
        completions += M
        metrics["charts/reward"] = float(reward_BG.mean())
        metrics["charts/accuracy"] = float(outcome_BG.mean())
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * B * (shapes["P_revise"] + G * T)
        metrics["charts/SPS"] = M / times["step"][-1]
        metrics["rollout/len_mean"] = float(out["len_M"].mean())
        metrics["rollout/truncated_frac"] = float(truncated_BG.mean())
        metrics["rollout/zero_std_frac"] = float((reward_BG.std(1) == 0).mean())
        metrics["rollout/format_frac"] = float(np.mean([cts.format_valid(t) for t in texts]))
        # VERIFIER: how far the steps hold, whether or not the answer is right.
        metrics["rollout/process_mean"] = float(process_BG.mean())
        for name in ("rollout", "score", "update"):
            metrics[f"time/{name}"] = times[name][-1]
        if step == first_step:
            metrics["time/compile"] = times["step"][0]  # the first step, compilation included
        run.check_finite(metrics, step, [q.meta["task_id"] for q in quads])
        if args.eval_every and (step + 1) % args.eval_every == 0:
            validation = cts.Evaluator(graphdef, tokenizer, replay["val"], shapes, mesh, dtype)
            summary = cts.summarize(validation(params["policy"]))
            metrics |= {f"eval/{k}": summary[k] for k in ("accuracy", "accuracy_revised", "delta_critique")}
        run.log(metrics, step)
        progress.set_postfix(reward=f"{metrics['charts/reward']:.3f}", accuracy=f"{metrics['charts/accuracy']:.3f}")
        if step % max(1, args.steps // 4) == 0:
            run.log_samples([(cts.revise_prompt(q.x, q.y0, q.f), texts[i * G], reward_BG[i, 0]) for i, q in enumerate(quads)], step)
        if args.save_every and (step + 1) % args.save_every == 0:
            run.save(step + 1, (params, opt_state), identity)
        run.stop_if_asked(step + 1, (params, opt_state), identity)

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    run.save(args.steps, (params, opt_state), identity)
    records = evaluator(params["policy"], base_attempt_logp)
    final = cts.summarize(records)
    # CTS: does the energy rise on the step that the critique points at?
    energy_auc = []
    for i in range(0, len(replay["test"]) - B + 1, B):
        quads = replay["test"][i : i + B]
        batch = cts.pack_prompts(tokenizer, [cts.revise_prompt(q.x, q.y0, q.f) for q in quads], shapes["P_revise"])
        batch |= pack_cts(tokenizer, quads, shapes, batch)
        energy_BJ, n_B = np.asarray(step_energies(params, jax.device_put(batch, by_row))), batch["y0_step_mask"].sum(1).astype(int)
        energy_auc += [cts.detector_auc(e[:n], o[:n]) for e, o, n in zip(energy_BJ, batch["overlap"], n_B)]
    final["energy_auc"] = cts.mean(energy_auc)
    print(f"Energy of the flagged step against the others of its attempt: AUC {final['energy_auc']:.3f} (0.5 = chance)")
    counted = {
        "optimizer_steps": args.steps,
        "training_tokens": args.steps * B * (shapes["P_revise"] + G * T),
        "rollout_budget": [args.steps, B, G, T],
        "test_compute_budget": len(records) * 2 * T,
    }
    steady = {name: statistics.median(t[1:] or t or [0.0]) for name, t in times.items()}
    result = {
        "schema_version": cts.SCHEMA_VERSION,
        "method": method,
        "args": dataclasses.asdict(args),
        "fingerprint": cts.fingerprint(**{k: v for k, v in identity.items() if k != "digest"}, **counted),
        "replay": {split: cts.replay_report(quads) for split, quads in replay.items()},
        "precheck": base["precheck"],
        "base": base["summary"],
        "summary": final,
        "records": records,
        "traces": cts.traces(),
        "timings": {**steady, "first_step": (times["step"] or [0.0])[0], "total": run.seconds()},
        "versions": cts.versions(),
    }
    run.finish(result, base["summary"], final)
    return result


if __name__ == "__main__":
    cts.cli(main, Args)
