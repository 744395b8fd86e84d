"""B5: critique-transport smoothing (CTS). B3's GRPO + verifier, plus an alignment of latent reasoning trajectories.

    L  = L_GRPO(B3) + lam_align * L_align + lam_decode * L_decode + lam_energy * L_E
    R_theta  = project(h(y0 | x))      one point per step of the flawed attempt, through the policy: has the gradient
    R, ref   = project(h(y0 | x)), project(h(y1 | x))     through the frozen base, as is e_f = project_f(h(f | x, y0))
    h        = mean over a step's tokens of the states that emit them; for f, of the states at its tokens
    U        = sum_j alpha_j E(R_j, j, e_f)    alpha, the critique's mass: even on flagged steps that y1 has too, else 0
    R*       = R - edit_eta * |ref_j - R_j| * dU/dR_j / |dU/dR_j|      differs from R at the flagged steps alone
    L_align  = mean over wrong, located y0 of S_alpha(R_theta, R*) + hold * mean of |R_theta - R|^2 / dim at other steps
    L_decode = -log pi(y1_t | x, y0, f, y1_<t), mean over all y1 tokens of the batch, temperature 1
    L_E      = mean of |-dE/dr - (ref_j - R_j)|^2 at R's flagged steps + of |dE/dr|^2 at its others + at ref's: the fit

alpha says where, the energy which way: the critic is fitted before step 0 and then constant (lam_energy > 0: trained
on). S is the Sinkhorn divergence (OTT-JAX), soft-DTW (both debiased) or squared L2 of measures weighted by alpha, of
points / sqrt(dim) with t / T beside them. Each term moves the policy (L_E: the critic) by an Adam of its own, lam times
as far, on top of GRPO's update: in one Adam, whose steps have one length, it takes from GRPO what it adds (--aux joint:
one loss and one Adam, as L is written). Differs from b3 in blocks marked CTS; with all lam 0 and critique=replay it is
B3 (A1). Arms: A1d lam_align=0, A2 align=l2, A3 align=soft_dtw, A4 lam_decode=0, A5 energy=frozen, A6 critique=online.

    python b5_cts.py --task gsm8k --seed 3        (fixtures_long: 5 to 9 minutes on 2 CPU cores, later 4)
"""

import dataclasses
import functools

# CTS: the critic's key, and measures.
import json
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args(cts.RunArgs):
    # ---- run ----
    task: str = "fixtures_long"
    """task to train on: fixtures_{long, rare, math, code} (generated, they need nothing), gsm8k, mbpp or apps"""
    model: str = "nano"
    """nano (1M parameters, its base shipped or made here), or a Qwen2, Qwen3 or Llama checkpoint: folder or hub id"""
    seed: int = 0
    """seed of data order and sampling (the base has its own, fixed)"""
    # ---- shared by all methods ----
    steps: int = 50
    """optimizer steps"""
    prompts: int = 8
    """prompts per step"""
    group: int = 8
    """completions per prompt"""
    max_prompt_tokens: int = 1024
    """longest prompt allowed, in tokens; a longer one is an error"""
    max_new_tokens: int = 0
    """longest completion, in tokens; 0 = the task's (fixtures_long, gsm8k and mbpp 256, ...)"""
    temperature: float = 0.7
    """sampling temperature; the same in sampling and in training"""
    learning_rate: float = 3e-4
    """peak AdamW learning rate, decayed linearly to 0 over the run"""
    micro_batch: int = 0
    """prompts per micro-batch; 0 = one per device on CPUs (what fits the cache is fastest), elsewhere all at once"""
    eval_problems: int = 0
    """problems of each evaluation, the first N of a fixed shuffled order; the pre-check takes no more; 0 = all"""
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
    process_credit: Literal["rolled_up", "per_step", "from_error"] = "rolled_up"
    """rolled_up = one scalar; per_step = DeepSeekMath 4.1.3; from_error = blame from the first wrong step on (VPPO)"""
    # CTS: what B5 adds.
    lam_align: float = 3.0
    """length of the alignment's updates at the first step, relative to GRPO's; 0 = off"""
    lam_align_final: float = 1.0
    """what share of that is left at the last step, reached linearly"""
    lam_decode: float = 1.0
    """length of the updates by the next-token loss on the revision y1; 0 = off"""
    lam_energy: float = 0.0
    """length of the critic's updates during training (--aux joint: any is the same); 0 = it stays as fitted"""
    aux: Literal["own", "joint"] = "own"
    """own = an Adam for each term, lam scales its updates; joint = one loss and one Adam, lam scales the losses"""
    align: Literal["sinkhorn", "soft_dtw", "l2"] = "sinkhorn"
    """distance between trajectories"""
    energy: Literal["fitted", "frozen"] = "fitted"
    """fitted = before step 0; frozen = E and project_f stay as initialised (A5)"""
    energy_fit: int = 3000
    """updates of that fit"""
    energy_quads: int = 4096
    """training quadruples that the base reads for it; 0 = all"""
    critique: Literal["replay", "shuffled", "redacted", "online"] = "replay"
    """f of replay; another problem's f and place; without numbers and place (controls); of the policy's attempt (A6)"""
    target: Literal["energy", "ref_only", "hindsight", "random", "shuffled_locus", "all_steps"] = "energy"
    """R* by the energy; y1's state; the base's behind f; controls: a random edit, at another step, all steps to y1's"""
    align_reading: Literal["attempt", "revise"] = "attempt"
    """where trajectories are read: as answers to the attempt prompt; y0 as given in the revise prompt, y1 behind it"""
    align_layer: int = 0
    """layer whose states they are, the first being 1; 0 = the last"""
    edit_eta: float = 1.0
    """length of the energy's or a random edit, relative to the way from R to ref; online: to its mean held out"""
    hold: float = 0.2
    """weight that keeps the other steps of y0 at the base's states; 0, or target all_steps = not held"""
    sinkhorn_tau: float = 1.0
    """marginal relaxation of the Sinkhorn transport; 1 = balanced"""


# CTS: constants that no ablation varies.
LATENT_DIM, ENERGY_HIDDEN, PLACE_DIM, TIME_WEIGHT = 32, 256, 8, 0.5  # R, E's width, j's features, weight of t / T
SINKHORN_EPSILON, SINKHORN_ITERATIONS, SOFT_DTW_GAMMA = 0.05, 200, 0.1  # on squared distances of `with_time` points
FIT_ROWS, FIT_RATE, FIT_DECAY, CHECK_QUADS = 64, 2e-3, 0.2, 256  # rows, peak rate, weight decay; quadruples that check


# ---- method pieces ------------------------------------------------------------------------------------------------
def group_advantages(reward_BG: np.ndarray, valid_BG: np.ndarray, norm: str) -> np.ndarray:
    """Advantages within each group, over its valid completions; invalid ones get 0.

    Rewards [1, 0, 0, 1] with all valid: center -> [.5, -.5, -.5, .5], std -> [1, -1, -1, 1].
    Rewards [1, 0, 9] with the last one invalid: center -> [.5, -.5, 0].
    """
    n_B1 = np.maximum(valid_BG.sum(1, keepdims=True), 1)
    reward_BG = reward_BG.astype(np.float64)  # in float32 the mean of equal rewards may be off by more than nothing
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


def from_error_advantages(adv_BGT: np.ndarray, from_error_BGT: np.ndarray) -> np.ndarray:
    """VPPO's form: what is negative counts from the first wrong step on alone; what is positive counts everywhere.

    A completion with -1/2 on its four tokens, the third its first wrong one, [0, 0, 1, 1], keeps [0, 0, -1/2, -1/2].
    """
    return np.where(adv_BGT < 0, adv_BGT * from_error_BGT, adv_BGT).astype(np.float32)


# CTS: the energy critic and the pieces of the alignment.
class Measure(typing.NamedTuple):
    """A trajectory as a measure: points [B, J, R], which of them are steps [B, J], their mass [B, J]."""

    points: jax.Array
    mask: jax.Array
    mass: jax.Array


def project(hidden):
    """Points [..., R] of unit RMS, by a fixed random projection: no training can shrink or turn their space."""
    z = hidden.astype(jnp.float32) @ jax.random.normal(jax.random.key(0), (hidden.shape[-1], LATENT_DIM))
    return z * jax.lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-6)


class Critic(nnx.Module):
    """project_f: the critique's state -> e_f; E: (point, index of its step, e_f) -> energy."""

    def __init__(self, d_model: int, rngs: nnx.Rngs):
        normal = lambda n_in, n_out: nnx.Param(jax.random.normal(rngs.params(), (n_in, n_out)) * n_in**-0.5)
        self.project_f, self.energy_in = normal(d_model, LATENT_DIM), normal(2 * LATENT_DIM + PLACE_DIM, ENERGY_HIDDEN)
        self.energy_mid, self.energy_out = normal(ENERGY_HIDDEN, ENERGY_HIDDEN), normal(ENERGY_HIDDEN, 1)
        self.bias_in, self.bias_mid = nnx.Param(jnp.zeros(ENERGY_HIDDEN)), nnx.Param(jnp.zeros(ENERGY_HIDDEN))

    def energies(self, points_BKR, step_BK, f_BD):
        """E [B, K] of points that belong to the steps `step_BK` of an attempt, under its critique."""
        e_f_BR = f_BD @ self.project_f[...]
        e_f_BR = e_f_BR * jax.lax.rsqrt((e_f_BR * e_f_BR).mean(-1, keepdims=True) + 1e-6)
        angle_BKp = (step_BK[..., None] + 1.0) * jnp.pi / cts.MAX_STEPS * 2.0 ** jnp.arange(PLACE_DIM // 2)
        e_f_BKR = jnp.broadcast_to(e_f_BR[:, None], points_BKR.shape)
        inputs = jnp.concatenate([points_BKR, jnp.sin(angle_BKp), jnp.cos(angle_BKp), e_f_BKR], -1)
        hidden = jax.nn.silu(inputs @ self.energy_in[...] + self.bias_in[...])
        return (jax.nn.silu(hidden @ self.energy_mid[...] + self.bias_mid[...]) @ self.energy_out[...])[..., 0]

    def slope(self, points_BKR, step_BK, f_BD):
        """dE/dr [B, K, R] at each point."""
        return jax.grad(lambda points: self.energies(points, step_BK, f_BD).sum())(points_BKR)


def critique_weights(flagged_BJ: np.ndarray, step_mask_BJ: np.ndarray) -> np.ndarray:
    """alpha [B, J]: even on those steps under the span that count, summing to 1; 0 everywhere without one.
    Flagged [0, 1, 1, 0] with mask [1, 1, 1, 0] gives [0, 1/2, 1/2, 0].
    """
    alpha_BJ = flagged_BJ * step_mask_BJ
    return (alpha_BJ / np.maximum(alpha_BJ.sum(-1, keepdims=True), 1.0)).astype(np.float32)


def another_step(alpha_BJ: np.ndarray, step_mask_BJ: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
    """alpha [B, J] moved to a step of the attempt that is not flagged, drawn by the row's generator; 0 without one."""
    out_BJ = np.zeros_like(alpha_BJ)
    for out_J, free_J, rng in zip(out_BJ, (alpha_BJ == 0) * step_mask_BJ * alpha_BJ.sum(-1, keepdims=True), rngs):
        if free_J.any():
            out_J[rng.choice(np.flatnonzero(free_J))] = 1.0
    return out_BJ


def pack_terms(tokenizer, quads: list[cts.Quadruple], rows, shapes, revise: dict, args: Args, way: float = 0.0) -> dict:
    """What the terms read of quadruples that stand in the `rows` of the replay: `revise`, the packed revise prompts,
    trajectories, and alpha, elsewhere [B, J], align_weight, edit_length [B], decode_weight [B, T], noise [B, J, R] (the
    same draw every time). `way`: the mean held out, for --critique online."""
    batch = revise | cts.pack_trajectories(tokenizer, quads, shapes, revise)
    known_BJ = batch["y0_mask"] if args.critique == "online" else batch["y0_mask"] * batch["y1_mask"]
    batch["alpha"] = critique_weights(batch["flagged"], known_BJ)
    on_B = batch["wrong"] * (1.0 if args.target == "all_steps" else batch["alpha"].sum(-1) > 0)
    batch["align_weight"] = (on_B / max(on_B.sum(), 1.0)).astype(np.float32)
    batch["decode_weight"] = batch["y1_tokens"] / batch["y1_tokens"].sum()
    rngs = [np.random.default_rng((args.seed, cts.STREAM_CONTROL, int(row))) for row in rows]
    batch["elsewhere"] = another_step(batch["alpha"], batch["y0_mask"], rngs)
    batch["noise"] = np.stack([rng.standard_normal((cts.MAX_STEPS, LATENT_DIM)) for rng in rngs]).astype(np.float32)
    batch["edit_length"] = np.full(len(quads), way, np.float32)
    return batch


def with_time(traj_JR, mask_J):
    """Points / sqrt(R) (projected: of unit length), beside them the time channel TIME_WEIGHT * t / T: [J, R + 1]."""
    t_J = jnp.cumsum(mask_J) / jnp.maximum(mask_J.sum(), 1.0)
    return jnp.concatenate([traj_JR / traj_JR.shape[-1] ** 0.5, TIME_WEIGHT * t_J[:, None]], -1)


def edit_trajectory(critic: Critic, R_BJR, f_BD, alpha_BJ, length_BJ):
    """R* = stopgrad(R - length_j * dU/dR_j / |dU/dR_j|), U = sum_j alpha_j E(R_j, j, e_f): R where alpha is 0."""
    step_BJ = jnp.broadcast_to(jnp.arange(R_BJR.shape[1]), alpha_BJ.shape)
    U = lambda R_BJR: (critic.energies(R_BJR, step_BJ, f_BD) * alpha_BJ).sum()
    slope_BJR = jax.grad(U)(R_BJR)
    unit_BJR = slope_BJR / jnp.maximum(jnp.linalg.norm(slope_BJR, axis=-1, keepdims=True), 1e-9)
    return jax.lax.stop_gradient(R_BJR - length_BJ[..., None] * unit_BJR)


def read_base(model, batch, dtype, args: Args, hindsight: bool = False):
    """What the frozen base makes of a batch: R and ref [B, J, R], the pooled state of f [B, D], and with `hindsight`
    the points [B, J, R] of y0's steps once it has read x, y0 and f."""
    given = args.align_reading == "revise"
    attempt = cts.Reading(batch["attempt_prompt"], batch["attempt_prompt_len"], [batch["y0"], batch["y1"]])
    behind_f = [*[batch["y1"]] * given, *[batch["y0"]] * hindsight]
    revise = cts.Reading(batch["prompt"], batch["prompt_len"], behind_f)
    revise, *attempt = model([revise, *[attempt] * (not given)], dtype, args.align_layer, learns=False)
    points = lambda hidden_BTD, steps: project(cts.pool_steps(hidden_BTD, batch[steps]))
    R_BJR = points(revise.prompt, "y0_given") if given else points(attempt[0].completions[0], "y0_steps")
    ref_BJR = points(revise.completions[0] if given else attempt[0].completions[1], "y1_steps")
    f_BD = cts.pool_steps(revise.prompt, batch["f_tokens"])[:, 0]
    after_f = [points(hidden_BTD, "y0_steps") for hidden_BTD in revise.completions[-1:] * hindsight]
    return jax.lax.stop_gradient((R_BJR, ref_BJR, f_BD, *after_f))


def read_policy(model, batch, dtype, args: Args):
    """R_theta [B, J, R]: y0 read as `read_base` reads it."""
    if args.align_reading == "revise":
        (states,) = model([cts.Reading(batch["prompt"], batch["prompt_len"])], dtype, args.align_layer)
        return project(cts.pool_steps(states.prompt, batch["y0_given"]))
    attempt = cts.Reading(batch["attempt_prompt"], batch["attempt_prompt_len"], [batch["y0"]])
    (states,) = model([attempt], dtype, args.align_layer)
    return project(cts.pool_steps(states.completions[0], batch["y0_steps"]))


def pick_target(critic: Critic, R_BJR, ref_BJR, f_BD, hindsight, batch, args: Args) -> tuple[Measure, Measure]:
    """(R with the mass it is compared under, the target's measure) of `--target`; `batch["edit_length"]` [B] is 0 where
    the way to ref is known and gives the edit's length, else that length."""
    alpha_BJ, mask_BJ = batch["alpha"], batch["y0_mask"]
    way_BJ = jnp.linalg.norm(ref_BJR - R_BJR, axis=-1)
    length_BJ = args.edit_eta * jnp.where(batch["edit_length"][:, None] > 0, batch["edit_length"][:, None], way_BJ)
    at_BJ1 = alpha_BJ[..., None] > 0
    if args.target == "all_steps":
        even = lambda mask_BJ: mask_BJ / jnp.maximum(mask_BJ.sum(-1, keepdims=True), 1.0)
        return Measure(R_BJR, mask_BJ, even(mask_BJ)), Measure(ref_BJR, batch["y1_mask"], even(batch["y1_mask"]))
    if args.target in ("ref_only", "hindsight"):
        target_BJR = jnp.where(at_BJ1, ref_BJR if args.target == "ref_only" else hindsight[0], R_BJR)
    elif args.target == "random":
        noise_BJR = batch["noise"] / jnp.linalg.norm(batch["noise"], axis=-1, keepdims=True)
        target_BJR = R_BJR + at_BJ1 * length_BJ[..., None] * noise_BJR
    else:
        target_BJR = edit_trajectory(critic, R_BJR, f_BD, alpha_BJ, length_BJ)
    if args.target == "shuffled_locus":
        edit_BR = ((target_BJR - R_BJR) * alpha_BJ[..., None]).sum(1)
        alpha_BJ = batch["elsewhere"]
        target_BJR = R_BJR + alpha_BJ[..., None] * edit_BR[:, None]
    return Measure(R_BJR, mask_BJ, alpha_BJ), Measure(target_BJR, mask_BJ, alpha_BJ)


# ---- loss ---------------------------------------------------------------------------------------------------------
# CTS: its three terms. A weight is 1 over what the mean runs over in the whole batch, so that micro-batches add up.
def align_loss(R_theta_BJR, now: Measure, target: Measure, weight_B, hold: float, distance):
    """L_align = sum_b weight_b * (S(R_theta, R*) + hold * mean over steps without mass of |R_theta - R|^2 / R), and of
    each row S, whether it converged and the transported mass that changes its step [B]. `now` has R and the masses."""
    S = lambda a, b: distance(with_time(a.points, a.mask), with_time(b.points, b.mask), a.mass, b.mass)
    S_B, converged_B, moved_B = jax.vmap(S)(now._replace(points=R_theta_BJR), target)
    free_BJ = now.mask * (now.mass == 0)
    drift_B = (((R_theta_BJR - now.points) ** 2).mean(-1) * free_BJ).sum(-1) / jnp.maximum(free_BJ.sum(-1), 1.0)
    return ((S_B + hold * drift_B) * weight_B).sum(), (S_B, converged_B, moved_B)


def decode_loss(logp_BT, weight_BT):
    """L_decode = -sum_bt weight_bt * log pi(y1_t | x, y0, f, y1_<t)."""
    return -(logp_BT * weight_BT).sum()


def energy_points(R_BJR, ref_BJR, batch):
    """What L_E fits: points [B, 2J, R] of R and ref, their steps [B, 2J], the way each should be pushed [B, 2J, R], and
    three weights [B, 3, 2J], each summing to 1, or 0 without such steps: R's flagged ones, its others, ref's."""
    alpha_BJ, y0_BJ, y1_BJ = batch["alpha"], batch["y0_mask"] * (batch["alpha"] == 0), batch["y1_mask"]
    even = lambda mask_BJ: mask_BJ / jnp.maximum(mask_BJ.sum(-1, keepdims=True), 1.0)
    none_BJ, step_BJ = jnp.zeros_like(alpha_BJ), jnp.broadcast_to(jnp.arange(alpha_BJ.shape[1]), alpha_BJ.shape)
    way_BJR = jnp.where(alpha_BJ[..., None] > 0, ref_BJR - R_BJR, 0.0)
    rows = ([alpha_BJ, none_BJ], [even(y0_BJ), none_BJ], [none_BJ, even(y1_BJ)])
    weight_B3K = jnp.stack([jnp.concatenate(row, 1) for row in rows], 1)
    join = lambda a, b: jnp.concatenate([a, b], 1)
    return join(R_BJR, ref_BJR), join(step_BJ, step_BJ), join(way_BJR, jnp.zeros_like(ref_BJR)), weight_B3K


def energy_loss(critic: Critic, points_BKR, step_BK, way_BKR, f_BD, weight_BK):
    """L_E = sum_bk weight_bk * |-dE/dr - way|^2: the energy falls along the way from R to ref, and only there."""
    miss_BK = ((critic.slope(points_BKR, step_BK, f_BD) + way_BKR) ** 2).sum(-1)
    return (miss_BK * weight_BK).sum()


def align_term(model, base_model, critic: Critic, batch, args: Args, dtype):
    """(L_align, metrics) of a micro-batch: y0 through the policy, R* from what the base reads."""
    R_BJR, ref_BJR, f_BD, *hindsight = read_base(base_model, batch, dtype, args, args.target == "hindsight")
    now, target = pick_target(critic, R_BJR, ref_BJR, f_BD, hindsight, batch, args)
    R_theta_BJR = read_policy(model, batch, dtype, args)
    sinkhorn = lambda *a: cts.sinkhorn_distance(*a, SINKHORN_EPSILON, SINKHORN_ITERATIONS, args.sinkhorn_tau)
    soft_dtw = lambda *a: cts.soft_dtw_distance(*a, SOFT_DTW_GAMMA)
    distance = {"sinkhorn": sinkhorn, "soft_dtw": soft_dtw, "l2": cts.l2_distance}[args.align]
    loss, rows = align_loss(R_theta_BJR, now, target, batch["align_weight"], args.hold, distance)
    aligned_B = batch["align_weight"] > 0
    metrics = {"losses/align_loss": loss, "losses/aligned": (aligned_B.sum(), len(aligned_B))}
    names = ("losses/align_distance", "losses/align_converged", "losses/align_moved")
    metrics |= {name: ((row_B * aligned_B).sum(), aligned_B.sum()) for name, row_B in zip(names, rows)}
    return loss, metrics


def decode_term(model, base_model, critic: Critic, batch, args: Args, dtype):
    """(L_decode, metrics) of a micro-batch: y1 after the revise prompt, through the policy."""
    (states,) = model([cts.Reading(batch["prompt"], batch["prompt_len"], [batch["y1"]])], dtype)
    logp_BT, _ = cts.token_logp(states.completions[0], batch["y1"], model.head_VD())
    loss = decode_loss(logp_BT, batch["decode_weight"])
    return loss, {"losses/decode_loss": loss}


def energy_term(model, base_model, critic: Critic, batch, args: Args, dtype):
    """(L_E, metrics) of a micro-batch, on what the base reads."""
    R_BJR, ref_BJR, f_BD = read_base(base_model, batch, dtype, args)
    points_BKR, step_BK, way_BKR, weight_B3K = energy_points(R_BJR, ref_BJR, batch)
    weight_BK = weight_B3K.sum(1) * batch["align_weight"][:, None]
    loss = energy_loss(critic, points_BKR, step_BK, way_BKR, f_BD, weight_BK)
    return loss, {"losses/energy_loss": loss}


# CTS: the critic's fit before step 0, and how well its edit repairs attempts that it was not fitted on.
def fit_critic(critic_def, critic, cached, updates: int):
    """The critic after `updates` AdamW steps on L_E, each of FIT_ROWS attempts of `cached` (arrays by name, as of
    `energy_points`, and "f") with one point of each of its three kinds."""
    tx = optax.adamw(optax.cosine_decay_schedule(FIT_RATE, max(updates, 1)), weight_decay=FIT_DECAY)

    @jax.jit
    def some(state, cached, keys):
        def one(state, key):
            (critic, opt_state), (row_key, point_key) = state, jax.random.split(key)
            row_B = jax.random.randint(row_key, (FIT_ROWS,), 0, len(cached["f"]))
            rows = {name: array[row_B] for name, array in cached.items()}
            at_B3 = jax.random.categorical(point_key, jnp.log(rows["weight"]), axis=-1)
            points, step, way = (jax.vmap(lambda a, at: a[at])(rows[name], at_B3) for name in ("points", "step", "way"))
            loss = lambda critic: energy_loss(
                nnx.merge(critic_def, critic), points, step, way, rows["f"], jnp.full(at_B3.shape, 1.0 / FIT_ROWS)
            )
            grads = jax.grad(loss)(critic)
            new, opt_state = tx.update(grads, opt_state, critic)
            return (optax.apply_updates(critic, new), opt_state), None

        return jax.lax.scan(one, state, keys)[0]

    state, keys = (critic, tx.init(critic)), jax.random.split(jax.random.key(cts.STREAM_INIT), updates)
    for i in cts.progress(range(0, updates, 100), desc="energy", unit="x100", leave=False):
        state = some(state, cached, keys[i : i + 100])
    return state[0]


def check_edit(critic: Critic, cached, eta: float) -> dict[str, jax.Array]:
    """How well the energy's edit repairs attempts, over their flagged steps: its cosine with the way to ref, the share
    that it brings nearer to ref, the distance left relative to the way, and the way, the unit of `edit_eta`."""
    R_BJR, ref_BJR, f_BD, alpha_BJ = (cached[name] for name in ("R", "ref", "f", "alpha"))
    way_BJ = jnp.linalg.norm(ref_BJR - R_BJR, axis=-1)
    edited_BJR = edit_trajectory(critic, R_BJR, f_BD, alpha_BJ, eta * way_BJ)
    left_BJ = jnp.linalg.norm(ref_BJR - edited_BJR, axis=-1)
    dot_BJ = ((edited_BJR - R_BJR) * (ref_BJR - R_BJR)).sum(-1)
    cosine_BJ = dot_BJ / jnp.maximum(jnp.linalg.norm(edited_BJR - R_BJR, axis=-1) * way_BJ, 1e-9)
    found = {"cosine": cosine_BJ, "nearer": left_BJ < way_BJ, "left": left_BJ / jnp.maximum(way_BJ, 1e-9)}
    found |= {"way": way_BJ, "n": jnp.full_like(way_BJ, len(f_BD))}
    return {name: (value_BJ * alpha_BJ).sum() / jnp.maximum(alpha_BJ.sum(), 1e-9) for name, value_BJ in found.items()}


def read_quads(read_rows, tokenizer, quads: list[cts.Quadruple], shapes, B: int, args: Args) -> dict[str, np.ndarray]:
    """R, ref, f, alpha and masks of the wrong, located attempts among `quads`; `read_rows` is `read_base` of B rows."""
    parts, widths = [], cts.update_widths(tokenizer, quads, shapes)
    quads = sorted(quads, key=lambda q: len(q.y1))  # those of one length share a batch
    for i in cts.progress(range(0, len(quads), B), desc="states", unit="batch", leave=False):
        rows = [j % len(quads) for j in range(i, i + B)]  # the last batch is filled up
        some = [quads[j] for j in rows]
        batch = pack_terms(tokenizer, some, rows, shapes, cts.pack_revise(tokenizer, some, shapes), args)
        (batch,) = cts.micro_batches(batch | {"new": np.arange(B) < len(quads) - i}, 1, widths)
        out = dict(zip(("R", "ref", "f"), read_rows(batch))) | {k: batch[k] for k in ("alpha", "y0_mask", "y1_mask")}
        keep = np.flatnonzero(batch["new"] * batch["wrong"] * batch["alpha"].sum(-1) > 0)
        parts.append({name: array[keep] for name, array in out.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fit_on_base(critic_def, critic, read_rows, tokenizer, replay, shapes, B: int, args: Args) -> str:
    """The critic fitted on quadruples of the train split (--energy frozen: as it is), with `check_edit` on CHECK_QUADS
    of the validation split (--eval_problems, if less), as they are, under other critiques and under redacted ones."""
    args = dataclasses.replace(args, critique="replay")  # one critic for all arms
    read = lambda quads: read_quads(read_rows, tokenizer, quads, shapes, B, args)
    cached = read(cts.first_problems(replay["train"], args.energy_quads))
    if args.energy == "fitted" and len(cached["f"]):
        arrays = dict(zip(("points", "step", "way", "weight"), energy_points(cached["R"], cached["ref"], cached)))
        critic = fit_critic(critic_def, critic, arrays | {"f": cached["f"]}, args.energy_fit)
    held = cts.first_problems(replay["val"], min(CHECK_QUADS, args.eval_problems or CHECK_QUADS))
    redacted = read([cts.with_critique(q, cts.redact(q.f), q.meta["error_span"]) for q in held])
    found = {"replay": read(held), "redacted": redacted}
    found["shuffled"] = found["replay"] | {"f": np.roll(found["replay"]["f"], 1, 0)}
    check = jax.jit(lambda critic, cached: check_edit(nnx.merge(critic_def, critic), cached, args.edit_eta))
    about = {name: jax.tree.map(float, cts.fetch(check(critic, cached))) for name, cached in found.items()}
    return cts.pack_arrays(jax.tree.leaves(cts.fetch(critic)), about)


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
    cts.check_args(args, clip_low=1)
    # CTS: the transport may be relaxed, not undone; nothing is trained that nothing reads; online, y0 has no y1.
    cts.check_args(args, "sinkhorn_tau", sinkhorn_tau=1)
    online, reads_energy = args.critique == "online", args.lam_align and args.target in ("energy", "shuffled_locus")
    if args.lam_energy and (args.energy == "frozen" or online or not reads_energy):
        raise cts.InputError("--lam_energy: needs a fitted critic, a target that reads it, and a y1; else set it to 0")
    if online and args.target in ("ref_only", "all_steps"):
        raise cts.InputError(f"--target {args.target}: y1 is not the attempt's with --critique online; choose another")
    # VERIFIER: step-level credit needs steps that can be checked one by one.
    cts.check_step_credit(args.task, args.process_credit)
    cts.open_out_dir(args)
    mesh, dtype = cts.make_mesh(args.mesh), cts.pick_dtype(args.dtype)
    n_micro = cts.count_micro_batches(mesh, args.prompts, args.micro_batch)
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    cfg, base_params, tokenizer, base_dir = cts.load_model(args.model, args.task, replay, args.out_dir, mesh)
    # CTS: the layer must exist.
    if args.align_layer > cfg.n_layers:
        raise cts.InputError(f"--align_layer {args.align_layer}: the model has {cfg.n_layers} layers")
    max_new_tokens = args.max_new_tokens or cts.TASKS[args.task].max_new_tokens
    shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, max_new_tokens)
    widths = cts.update_widths(tokenizer, replay["train"], shapes)
    B, G, M, T = args.prompts, args.group, args.prompts * args.group, shapes["T"]
    run = cts.Run(args, __file__)
    if run.finished:
        return run.result(cfg, base_params, tokenizer)

    # ---- parameters, optimizer, shardings -------------------------------------------------------------------------
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))))
    rollout_key = jax.random.fold_in(jax.random.key(args.seed), cts.STREAM_ROLLOUT)
    params = {"policy": jax.tree.map(jnp.copy, base_params)}  # a copy: the step donates its parameters
    # CTS: the critic is the same for all seeds; which terms are on, and what each moves.
    critic_def, params["critic"] = nnx.split(Critic(cfg.d_model, nnx.Rngs(cts.STREAM_INIT)), nnx.Param)
    aligns, trains_energy = args.lam_align > 0, args.lam_energy > 0
    terms = [*["align"] * aligns, *["decode"] * (args.lam_decode > 0), *["energy"] * trains_energy]
    moved = {"align": "policy", "decode": "policy", "energy": "critic"}
    keeps_base = aligns or trains_energy
    # one optimizer per subtree, so that nothing but the policy's gradient enters the policy's clipping
    schedule = optax.linear_schedule(args.learning_rate, 0.0, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0))
    opt_state = {name: tx.init(subtree) for name, subtree in params.items()}
    # CTS: and one per term, whose steps are lam times as long.
    def lam_at(name, count):
        lam = {"align": args.lam_align, "decode": args.lam_decode, "energy": args.lam_energy}[name]
        end = args.lam_align_final if name == "align" else 1.0
        return lam * (1 + (end - 1) * count / max(args.steps - 1, 1))

    adam = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.0))
    rate_of = lambda name: lambda count: lam_at(name, count) * schedule(count)
    own_tx = {name: adam(rate_of(name)) for name in terms if args.aux == "own"}
    opt_state |= {name: own.init(params[moved[name]]) for name, own in own_tx.items()}
    state_sharding = cts.shard_rule(mesh, (params, opt_state))
    params, opt_state = cts.put((params, opt_state), state_sharding)
    by_row, replicated = cts.batch_shardings(mesh)

    # ---- jitted functions -----------------------------------------------------------------------------------------
    @jax.jit
    def rollout(policy, prompt_BP, prompt_len_B, key):
        cts.TRACES["rollout"] += 1
        model = nnx.merge(graphdef, cts.gather(mesh, policy))
        how = (G, T, args.temperature, tokenizer.eos_ids, tokenizer.pad_id)
        return cts.generate(model, prompt_BP, prompt_len_B, key, *how, dtype=dtype, shrink=mesh.size == 1)

    # CTS: what the base makes of attempts, for the fit of the critic.
    @jax.jit
    def base_states(base_params, batch):
        return read_base(nnx.merge(graphdef, cts.gather(mesh, base_params)), batch, dtype, args)

    def forward(policy, batch):
        """Log-probs [M, T] of the completions; a prompt is computed once a group."""
        model = nnx.merge(graphdef, cts.gather(mesh, policy))
        tokens_MT = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        (states,) = model([cts.Reading(batch["prompt"], batch["prompt_len"], [tokens_MT])], dtype)
        logp_MT, _ = cts.token_logp(states.completions[0], tokens_MT, model.head_VD(), args.temperature)
        return logp_MT

    def loss_fn(params, batch, scalars, base_params):
        logp_MT = forward(params["policy"], batch)
        old_logp_MT, adv_MT, mask_MT = (batch[name].reshape(logp_MT.shape) for name in ("old_logp", "adv", "mask"))
        denom = scalars["denom"]
        loss, metrics = grpo_loss(logp_MT, old_logp_MT, adv_MT, mask_MT, args.clip_low, args.clip_high, denom)
        metrics["losses/policy_loss"] = loss
        if args.kl_coef:
            kl = k3_kl(logp_MT, forward(base_params, batch), mask_MT, denom)
            loss = loss + args.kl_coef * kl
            metrics["losses/kl"] = kl
        metrics["losses/loss"] = loss
        return loss, metrics

    no_grads = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=state_sharding[0])

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_sharding[0], replicated))
    def add_grads(grads, params, micro, scalars, base_params):
        cts.TRACES["add_grads"] += 1
        new, metrics = jax.grad(loss_fn, has_aux=True)(params, micro, scalars, base_params)
        return jax.tree.map(jnp.add, grads, new), metrics

    # CTS: its terms, each with a pass of its own over what it needs to read.
    def term_loss(part, name, params, batch, base_params):
        params = params | {moved[name]: part}
        model = nnx.merge(graphdef, cts.gather(mesh, params["policy"]))
        base_model = nnx.merge(graphdef, cts.gather(mesh, base_params)) if keeps_base else None
        critic = nnx.merge(critic_def, params["critic"])
        return {"align": align_term, "decode": decode_term, "energy": energy_term}[name](
            model, base_model, critic, batch, args, dtype
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def add_term(name, grads, lam, params, micro, base_params):
        cts.TRACES[f"add_{name}"] += 1
        new, metrics = jax.grad(term_loss, has_aux=True)(params[moved[name]], name, params, micro, base_params)
        grads = jax.tree.map(lambda old, new: old + lam * new, grads, new)
        return jax.lax.with_sharding_constraint(grads, cts.shard_rule(mesh, grads)), metrics

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*state_sharding, replicated))
    def train_step(params, opt_state, grads):
        cts.TRACES["train_step"] += 1
        metrics = {"losses/grad_norm": optax.tree.norm(grads["policy"])}
        for name in params:
            updates, opt_state[name] = tx.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        # CTS: each term's own update on top, from its gradient at the same weights.
        for name, own in own_tx.items():
            metrics[f"losses/{name}_grad_norm"] = norm = optax.tree.norm(grads[name])
            if moved[name] == "policy":
                cosine = optax.tree.vdot(grads[name], grads["policy"]) / (norm * metrics["losses/grad_norm"] + 1e-12)
                metrics[f"losses/{name}_grad_cosine"] = cosine
            updates, opt_state[name] = own.update(grads[name], opt_state[name], params[moved[name]])
            params[moved[name]] = optax.apply_updates(params[moved[name]], updates)
        return params, opt_state, metrics

    # ---- base: what there is to improve ---------------------------------------------------------------------------
    evaluator = cts.Evaluator(graphdef, tokenizer, replay["test"], shapes, mesh, dtype, args.eval_problems)
    validation = cts.Evaluator(graphdef, tokenizer, replay["val"], shapes, mesh, dtype, args.eval_problems)
    # CTS: the control arms of the critique; A6 takes the policy's greedy first attempts, a batch at a time.
    attempter = cts.Evaluator(graphdef, tokenizer, replay["train"][:B], shapes, mesh, dtype)

    def change_critiques(quads: list[cts.Quadruple], step_rng: np.random.Generator) -> list[cts.Quadruple]:
        if args.critique == "online":
            prompts = [cts.attempt_prompt(q.x) for q in quads]
            attempts = attempter.complete(params["policy"], prompts, shapes["P_attempt"])
            fits = lambda prompt: len(tokenizer.encode_prompt(prompt)) <= shapes["P_revise"]
            return cts.with_attempts(quads, [a["text"] for a in attempts], fits)
        others = step_rng.integers(len(replay["train"]), size=len(quads))
        changed = {
            "replay": lambda q, other: q, "shuffled": cts.with_critique_of,
            "redacted": lambda q, other: cts.with_critique(q, cts.redact(q.f), None),
        }[args.critique]  # fmt: skip
        return [changed(q, replay["train"][i - (replay["train"][i] is q)]) for q, i in zip(quads, others)]

    base = cts.base_report(base_dir, evaluator, base_params, replay["train"], B, G, args.temperature)

    # ---- loop -----------------------------------------------------------------------------------------------------
    identity = cts.run_identity(args, base_params, tokenizer, replay, shapes, dtype)
    # CTS: the critic is fitted on the base's states before step 0, once for a base and its replay.
    read_rows = lambda batch: cts.fetch(base_states(base_params, cts.put(batch, by_row)))
    fit = lambda: fit_on_base(critic_def, params["critic"], read_rows, tokenizer, replay, shapes, B, args)
    edit, figures = None, {}
    if reads_energy or (aligns and online and args.target == "random"):
        key = [identity[name] for name in ("base_weights", "tokenizer", "templates", "train_replay", "decode")]
        key += [args.energy, args.energy_fit, args.energy_quads, args.edit_eta, args.align_reading, args.align_layer]
        key += [cts.program_sha256(__file__), cts.sources_sha256("batches", "critique", "distances", "model")]
        key += [cts.replay_sha256(replay["val"]), jax.default_backend()]
        leaves, figures = cts.unpack_arrays(cts.kept(base_dir / f"critic_{cts.sha256(json.dumps(key))[:16]}.json", fit))
        params["critic"] = jax.tree.unflatten(jax.tree.structure(params["critic"]), leaves)
        params = cts.put(params, state_sharding[0])
        edit, *controls = (figures[name] for name in ("replay", "shuffled", "redacted"))
        cts.say(
            f"Energy critic ({args.energy}), held out: its edit has cosine {edit['cosine']:.2f} with the way to y1's"
            f" (under another critique {controls[0]['cosine']:.2f}, a redacted one {controls[1]['cosine']:.2f}), brings"
            f" {edit['nearer']:.0%} of {edit['n']:.0f} attempts nearer to it and leaves {edit['left']:.2f} of the way."
        )
        if edit["cosine"] < 0.3:
            cts.say("R* is not a repair here: the energy does not know which way the flagged step should go.")
    frozen_params = base_params if keeps_base else None
    base_params = base_params if args.kl_coef else None  # the KL alone still needs it: else its memory is free
    # CTS: the alignment and L_E need it too.
    base_params = frozen_params if keeps_base else base_params
    params, opt_state = run.start(identity, params, opt_state)
    clock = cts.StepClock()
    for step in run.steps():
        clock.start()
        quads = [replay["train"][i] for i in cts.data_indices(len(replay["train"]), B, args.seed, step)]
        # CTS: control arms and A6 change the critique before it reaches the prompt.
        quads = change_critiques(quads, np.random.default_rng((args.seed, cts.STREAM_CONTROL, step)))
        batch = cts.pack_revise(tokenizer, quads, shapes)

        # ---- rollout ----
        prompts = cts.put(cts.rollout_prompts(batch, widths), by_row)
        out = cts.fetch(rollout(params["policy"], *prompts, jax.random.fold_in(rollout_key, step)))
        clock.mark("rollout")

        # ---- score ----
        texts = cts.decode_rows(tokenizer, out["tokens_MT"], out["len_M"])
        outcome_BG = cts.outcome_scores(texts, quads)
        truncated_BG = out["truncated_M"].reshape(B, G)
        reward_BG = outcome_BG
        # VERIFIER: the process reward joins the outcome.
        process_BG = cts.process_scores(texts, quads)
        if args.process_credit != "per_step":
            reward_BG = reward_BG + args.process_coef * process_BG

        # ---- advantages ----
        valid_BG = ~np.isnan(reward_BG) * (1.0 - truncated_BG if args.truncated == "mask" else np.ones((B, G)))
        adv_BG = group_advantages(np.nan_to_num(reward_BG), valid_BG, args.adv_norm)  # NaN: not scored, harness error
        mask_BGT = cts.length_mask(out["len_M"], T).reshape(B, G, T) * valid_BG[..., None]
        adv_BGT = np.repeat(adv_BG[..., None], T, axis=-1)
        # VERIFIER: or each step's own reward goes to the tokens before its end; or blame starts where the error is.
        if args.process_credit == "per_step":
            step_reward_BGT, step_end_BGT = cts.step_rewards(tokenizer, out["tokens_MT"], out["len_M"], texts, quads)
            step_end_BGT = step_end_BGT * valid_BG[..., None]
            adv_BGT = adv_BGT + args.process_coef * step_advantages(step_reward_BGT, step_end_BGT, args.adv_norm)
        elif args.process_credit == "from_error":
            from_error_BGT = cts.from_first_error(tokenizer, out["tokens_MT"], out["len_M"], texts, quads)
            adv_BGT = from_error_advantages(adv_BGT, from_error_BGT)
        batch["tokens"] = out["tokens_MT"].reshape(B, G, T)
        batch["old_logp"] = out["logp_MT"].reshape(B, G, T)
        batch["adv"] = adv_BGT.astype(np.float32)
        batch["mask"] = mask_BGT.astype(np.float32)
        scalars = {"denom": np.float32(M * T if args.loss_norm == "constant" else max(mask_BGT.sum(), 1.0))}
        clock.mark("score")

        # ---- update ----
        live_BG = cts.live_rows(batch["adv"], batch["mask"], args.kl_coef)
        grads, sums = no_grads(params), []
        for micro in cts.micro_batches(batch, n_micro, widths, live_BG):  # what carries gradient, in a few widths
            grads, one = add_grads(grads, params, cts.put(micro, by_row), scalars, base_params)
            sums.append(one)
        # CTS: what its terms read, and their gradients; with --aux joint they join GRPO's, lam times.
        rows = cts.data_indices(len(replay["train"]), B, args.seed, step)
        way = edit["way"] if online and edit else 0.0  # else that to y1's step itself
        revise = {"prompt": batch["prompt"], "prompt_len": batch["prompt_len"]}
        reads = pack_terms(tokenizer, quads, rows, shapes, revise, args, way) if terms else {}
        joint = {name: lam_at(name, step) for name in terms if args.aux == "joint"}
        grads |= {name: no_grads(params)[moved[name]] for name in own_tx}
        for micro in cts.micro_batches(reads, n_micro, widths) if terms else ():
            micro = cts.put(micro, by_row)
            for name in terms:
                into = moved[name] if joint else name
                term = (grads[into], joint.get(name, 1.0), params, micro, base_params)
                grads[into], one = add_term(name, *term)
                sums.append(one)
        params, opt_state, norm = train_step(params, opt_state, grads)
        metrics = cts.reduce(cts.fetch([*sums, norm]))
        del grads  # their memory is free
        # CTS: the one loss, as L is written.
        metrics["losses/loss"] += sum(lam * metrics[f"losses/{name}_loss"] for name, lam in joint.items())
        clock.mark("update")

        # ---- log, save ----
        metrics["charts/reward"] = float(np.nanmean(reward_BG))
        metrics["charts/accuracy"] = float(np.nanmean(outcome_BG))
        metrics["losses/entropy"] = float((out["entropy_M"].reshape(B, G) * valid_BG).sum() / max(mask_BGT.sum(), 1.0))
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * B * (shapes["P_revise"] + G * T) * (2 if args.kl_coef else 1)
        # CTS: the base reads f, y0 and y1, the policy y0 (align) and y1 (decode); and the fit's share, once.
        read = {"align": shapes["P_revise"] + 2 * shapes["P_attempt"] + 3 * shapes["T_replay"]}
        read |= {"decode": shapes["P_revise"] + shapes["T_replay"]}
        read["energy"] = shapes["P_revise"] + shapes["P_attempt"] + 2 * shapes["T_replay"]
        if args.align_reading == "revise":
            read["align"], read["energy"] = read["decode"] + shapes["P_revise"], read["decode"]
        read["align"] += shapes["T_replay"] * (args.target == "hindsight")
        metrics["charts/tokens"] += (step + 1) * B * ((shapes["P_attempt"] + T) * online + sum(read[n] for n in terms))
        fitted_on = cts.first_problems(replay["train"], args.energy_quads) if edit else []
        metrics["charts/tokens"] += len(fitted_on) * read["energy"]
        metrics |= clock.metrics(M) | cts.rollout_metrics(out, texts, reward_BG, quads)
        # VERIFIER: how far the steps hold, whether or not the answer is right.
        metrics["rollout/process_mean"] = float(np.nanmean(process_BG))
        run.end_step(step, metrics, params, opt_state, quads, validation, texts[::G], reward_BG[:, 0])

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    records = evaluator(params["policy"])
    final = cts.summarize(records)
    # CTS: how far the energy's edit repaired held-out attempts.
    final["edit"] = figures
    return run.finish(replay, shapes, base, records, final, clock, (cfg, params["policy"], tokenizer))


if __name__ == "__main__":
    cts.cli(main, Args)
