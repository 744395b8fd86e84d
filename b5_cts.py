"""B5: critique-transport smoothing (CTS). B3's GRPO + verifier, plus an alignment of latent reasoning trajectories.

    L  = L_GRPO(B3) + lam_align * L_align + lam_decode * L_decode + lam_energy * L_E
    R        = project(h(y0 | x))     one point per step of the flawed attempt: states that emit its tokens, unit RMS
    ref      = stopgrad(project(h(y1 | x)))         the revision's trajectory
    U        = sum_j alpha_j E(R_j, e_f)     e_f = project_f(h(f)); alpha falls from y0's flagged step on, is even on y1
    R*       = stopgrad(R - edit_eta * dU/dR / max(alpha))
    L_align  = mean over wrong y0 of [ S(R, R*) + S(R, ref) ] / 2     (points with their time): trains policy, project
    L_decode = -log pi(y1_t | x, y0, f, y1_<t), mean over all y1 tokens of the batch, temperature 1: trains the policy
    L_E      = mean over wrong y0 of max(0, margin - U(y0) + U(y1)), on constant states: trains E, project, project_f

S is the Sinkhorn divergence (OTT-JAX), soft-DTW (both debiased) or step-wise squared L2. Differs from b3 only in blocks
marked CTS; with all lam 0 and --critique=replay it is B3, update for update. Ablations: A1 all lam 0, A1d --lam_align=0
--lam_energy=0, A2 --align=l2, A3 --align=soft_dtw, A4 --lam_decode=0, A5 --energy=frozen, A6 --critique=online.

    python b5_cts.py --task gsm8k --seed 3        (fixtures_math: 1 to 4 minutes on 2 CPU cores, 4 to 9 the first time)
"""

import dataclasses
import functools
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
    task: str = "fixtures_math"
    """task to train on: fixtures_math or fixtures_code (generated, they need nothing), gsm8k, mbpp or apps"""
    model: str = "nano"
    """nano (1M parameters, its base trained once per task), or a Qwen2, Qwen3 or Llama checkpoint: folder or hub id"""
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
    """longest completion, in tokens; 0 = the task's (fixtures_math 128, gsm8k and mbpp 256, ...)"""
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
    """frozen = L_E off, as at lam_energy 0 (A5): E and project_f stay as initialised"""
    critique: Literal["replay", "shuffled", "redacted", "online"] = "replay"
    """f of replay; a random problem's, or without numbers and ordinals (controls); on the policy's own attempt (A6)"""
    target: Literal["energy", "ref_only", "random"] = "energy"
    """targets, averaged: energy = [R*, ref]; controls: ref_only = [ref]; random = [as long a random edit, ref]"""
    edit_eta: float = 0.5
    """step size of the energy edit, on points of unit RMS"""
    sinkhorn_tau: float = 1.0
    """marginal relaxation of the transport; 1 = balanced"""


# CTS: constants that no ablation varies.
LATENT_DIM, ENERGY_HIDDEN, ENERGY_MARGIN = 32, 64, 1.0  # R, hidden width of E, margin of L_E
TIME_WEIGHT, ALPHA_DECAY = 0.5, 0.5  # weight of the time channel; alpha past the span, from a step to the next
SINKHORN_EPSILON, SINKHORN_ITERATIONS, SOFT_DTW_GAMMA = 0.05, 200, 0.1  # on squared distances of `with_time` points


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
    """project: hidden state -> latent point of unit RMS, of steps and of critiques; E: (point, critique) -> energy."""

    def __init__(self, d_model: int, rngs: nnx.Rngs):
        normal = lambda n_in, n_out: nnx.Param(jax.random.normal(rngs.params(), (n_in, n_out)) * n_in**-0.5)
        self.project, self.project_f = normal(d_model, LATENT_DIM), normal(d_model, LATENT_DIM)
        self.energy_in, self.energy_bias = normal(2 * LATENT_DIM, ENERGY_HIDDEN), nnx.Param(jnp.zeros(ENERGY_HIDDEN))
        self.energy_out = normal(ENERGY_HIDDEN, 1)

    def points(self, hidden, weights):
        """Points [..., R] = hidden @ weights at unit RMS: their scale is fixed, their direction is not."""
        z = hidden.astype(jnp.float32) @ weights[...]
        return z * jax.lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-6)

    def energies(self, traj_BJR, e_f_BR):
        """E [B, J] of every point under its critique."""
        both = jnp.concatenate([traj_BJR, jnp.broadcast_to(e_f_BR[:, None], traj_BJR.shape)], -1)
        return (jax.nn.silu(both @ self.energy_in[...] + self.energy_bias[...]) @ self.energy_out[...])[..., 0]


def critique_weights(flagged_BJ: np.ndarray, step_mask_BJ: np.ndarray) -> np.ndarray:
    """alpha [B, J], summing to 1: even on the steps under the span, halved with every step after, 0 before it and on
    padding; uniform without a span. Flagged [0, 1, 0, 0] with mask [1, 1, 1, 0] gives [0, 2/3, 1/3, 0].
    """
    alpha_BJ = np.zeros(flagged_BJ.shape, np.float32)
    for alpha_J, flagged_J, mask_J in zip(alpha_BJ, flagged_BJ * step_mask_BJ, step_mask_BJ):
        hit = np.flatnonzero(flagged_J)
        alpha_J[hit if len(hit) else slice(None)] = 1.0
        if len(hit):
            alpha_J[hit[-1] + 1 :] = ALPHA_DECAY ** np.arange(1, len(alpha_J) - hit[-1])
        alpha_J *= mask_J / max((alpha_J * mask_J).sum(), 1e-9)
    return alpha_BJ


def with_time(traj_JR, mask_J):
    """Points scaled to unit length with the time channel TIME_WEIGHT * t / T beside them: [J, R + 1]."""
    t_J = jnp.cumsum(mask_J) / jnp.maximum(mask_J.sum(), 1.0)
    return jnp.concatenate([traj_JR / traj_JR.shape[-1] ** 0.5, TIME_WEIGHT * t_J[:, None]], -1)


def edit_trajectory(critic: Critic, traj_BJR, e_f_BR, alpha_BJ, eta: float):
    """R* = stopgrad(R - eta * dU/dR / max(alpha)): the flagged step moves by eta times its own gradient."""
    U = lambda traj_BJR: (critic.energies(traj_BJR, e_f_BR) * alpha_BJ).sum()
    grad_BJR = jax.grad(U)(traj_BJR) / jnp.maximum(alpha_BJ.max(-1), 1e-9)[:, None, None]
    return jax.lax.stop_gradient(traj_BJR - eta * grad_BJR)


def with_replay(revise: cts.Reading, batch) -> list[cts.Reading]:
    """What CTS reads: the revise prompt's reading with y1 appended; y0 and y1 after the attempt prompt."""
    revise = revise._replace(completions=[*revise.completions, batch["y1"]])
    return [revise, cts.Reading(batch["attempt_prompt"], batch["attempt_prompt_len"], [batch["y0"], batch["y1"]])]


def step_states(states: list[cts.States], batch):
    """Pooled states: [B, J, D] of y0's and y1's steps after the attempt prompt, [B, D] of f (y1, f: constants)."""
    revise, (_, (y0_BTD, y1_BTD)) = states
    y0_BJD, y1_BJD = cts.pool_steps(y0_BTD, batch["y0_steps"]), cts.pool_steps(y1_BTD, batch["y1_steps"])
    f_BD = cts.pool_steps(revise.prompt, batch["f_tokens"])[:, 0]
    return y0_BJD, *jax.lax.stop_gradient((y1_BJD, f_BD))


# ---- loss ---------------------------------------------------------------------------------------------------------
# CTS: its three terms. A weight is 1 over what the mean runs over in the whole batch, so that micro-batches add up.
def align_loss(R_BJR, mask_BJ, targets, weight_B, distance):
    """L_align = sum_b weight_b * mean over targets of S(R_b, target_b), with S and whether it converged [targets, B].
    A target is points [B, J, R] and their step mask [B, J]; S is `distance(a, b, mask_a, mask_b)`."""
    target_KBJR, target_mask_KBJ = (jnp.stack(part) for part in zip(*targets))
    S = jax.vmap(lambda a, b, mask_a, mask_b: distance(with_time(a, mask_a), with_time(b, mask_b), mask_a, mask_b))
    S_KB, converged_KB = jax.vmap(S, (None, 0, None, 0))(R_BJR, target_KBJR, mask_BJ, target_mask_KBJ)
    return (S_KB.mean(0) * weight_B).sum(), S_KB, converged_KB


def decode_loss(logp_BT, weight_BT):
    """L_decode = -sum_bt weight_bt * log pi(y1_t | x, y0, f, y1_<t)."""
    return -(logp_BT * weight_BT).sum()


def energy_loss(U_y0_B, U_y1_B, weight_B, margin: float):
    """L_E = sum_b weight_b * max(0, margin - U(y0_b) + U(y1_b)): a wrong attempt has more energy than its revision."""
    return (jax.nn.relu(margin - U_y0_B + U_y1_B) * weight_B).sum()


def cts_losses(model, states: list[cts.States], critic: Critic, batch, args: Args):
    """(L_align, L_decode, L_E, metrics) of a micro-batch, from the States of the readings of `with_replay`."""
    stop = jax.lax.stop_gradient
    logp_BT, _ = cts.token_logp(states[0].completions[-1], batch["y1"], model.head_VD())
    decode = decode_loss(logp_BT, batch["decode_weight"])
    # L_align: gradient enters by R alone, to the policy (h(y0 | x)) and to `project`
    y0_BJD, y1_BJD, f_BD = step_states(states, batch)
    e_f_BR = critic.points(f_BD, critic.project_f)
    R_BJR, ref_BJR = critic.points(y0_BJD, critic.project), stop(critic.points(y1_BJD, critic.project))
    edited_BJR = edit_trajectory(critic, stop(R_BJR), stop(e_f_BR), batch["alpha"], args.edit_eta)
    edit_len_BJ = jnp.linalg.norm(edited_BJR - stop(R_BJR), axis=-1)
    if args.target == "random":
        noise_BJR = batch["noise"] / jnp.linalg.norm(batch["noise"], axis=-1, keepdims=True)
        edited_BJR = stop(R_BJR) + edit_len_BJ[..., None] * noise_BJR
    edited, ref = (edited_BJR, batch["y0_mask"]), (ref_BJR, batch["y1_mask"])
    targets = [ref] if args.target == "ref_only" else [edited, ref]
    sinkhorn = lambda *a: cts.sinkhorn_distance(*a, SINKHORN_EPSILON, SINKHORN_ITERATIONS, args.sinkhorn_tau)
    soft_dtw = lambda *a: cts.soft_dtw_distance(*a, SOFT_DTW_GAMMA)
    distance = {"sinkhorn": sinkhorn, "soft_dtw": soft_dtw, "l2": cts.l2_distance}[args.align]
    align, S_KB, converged_KB = align_loss(R_BJR, batch["y0_mask"], targets, batch["wrong_weight"], distance)
    # L_E: constant states, so that its gradient is the critic's alone
    U_y0_B = (critic.energies(critic.points(stop(y0_BJD), critic.project), e_f_BR) * batch["alpha"]).sum(-1)
    alpha_y1_BJ = batch["y1_mask"] / jnp.maximum(batch["y1_mask"].sum(-1, keepdims=True), 1.0)
    U_y1_B = (critic.energies(critic.points(y1_BJD, critic.project), e_f_BR) * alpha_y1_BJ).sum(-1)
    energy = energy_loss(U_y0_B, U_y1_B, batch["wrong_weight"], ENERGY_MARGIN)

    of_wrong = lambda value_B: ((value_B * batch["wrong"]).sum(), batch["wrong"].sum())
    metrics = {"losses/energy_gap": of_wrong(U_y0_B - U_y1_B), "losses/edit_norm": of_wrong(edit_len_BJ.max(-1))}
    metrics |= {"losses/align_converged": of_wrong(converged_KB.mean(0)), "losses/align_ref": of_wrong(S_KB[-1])}
    return align, decode, energy, metrics


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
    # CTS: the transport may be relaxed, not undone.
    cts.check_args(args, "sinkhorn_tau", sinkhorn_tau=1)
    # VERIFIER: step-level credit needs steps that can be checked one by one.
    cts.check_step_credit(args.task, args.process_credit)
    cts.open_out_dir(args)
    mesh, dtype = cts.make_mesh(args.mesh), cts.pick_dtype(args.dtype)
    n_micro = cts.count_micro_batches(mesh, args.prompts, args.micro_batch)
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    cfg, base_params, tokenizer, base_dir = cts.load_model(args.model, args.task, replay, args.out_dir, mesh)
    max_new_tokens = args.max_new_tokens or cts.TASKS[args.task].max_new_tokens
    shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, max_new_tokens)
    B, G, M, T = args.prompts, args.group, args.prompts * args.group, shapes["T"]
    run = cts.Run(args, __file__)
    if run.finished:
        return run.result(cfg, base_params, tokenizer)

    # ---- parameters, optimizer, shardings -------------------------------------------------------------------------
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))))
    rollout_key = jax.random.fold_in(jax.random.key(args.seed), cts.STREAM_ROLLOUT)
    params = {"policy": jax.tree.map(jnp.copy, base_params)}  # a copy: the step donates its parameters
    # CTS: the projection and the energy are trained beside the policy.
    init_key = jax.random.fold_in(jax.random.key(args.seed), cts.STREAM_INIT)
    critic_def, params["critic"] = nnx.split(Critic(cfg.d_model, nnx.Rngs(init_key)), nnx.Param)
    # one optimizer per subtree, so that nothing but the policy's gradient enters the policy's clipping
    schedule = optax.linear_schedule(args.learning_rate, 0.0, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0))
    opt_state = {name: tx.init(subtree) for name, subtree in params.items()}
    state_sharding = cts.shard_rule(mesh, (params, opt_state))
    params, opt_state = cts.put((params, opt_state), state_sharding)
    by_row, replicated = cts.batch_shardings(mesh)

    # ---- jitted functions -----------------------------------------------------------------------------------------
    @jax.jit
    def rollout(policy, prompt_BP, prompt_len_B, key):
        cts.TRACES["rollout"] += 1
        policy = jax.lax.with_sharding_constraint(policy, cts.shard_rule(mesh, policy, at_rest=False))
        model = nnx.merge(graphdef, policy)
        how = (G, T, args.temperature, tokenizer.eos_ids, tokenizer.pad_id)
        return cts.generate(model, prompt_BP, prompt_len_B, key, *how, dtype=dtype)

    # CTS: the energies of y0's steps, for their evaluation.
    @jax.jit
    def step_energies(params, batch):
        model, critic = nnx.merge(graphdef, params["policy"]), nnx.merge(critic_def, params["critic"])
        states = model(with_replay(cts.Reading(batch["prompt"], batch["prompt_len"]), batch), dtype)
        y0_BJD, _, f_BD = step_states(states, batch)
        return critic.energies(critic.points(y0_BJD, critic.project), critic.points(f_BD, critic.project_f))

    def forward(policy, batch):
        """(model, its States, log-probs and entropies [M, T] of the completions); a prompt is computed once a group."""
        model, tokens_MT = nnx.merge(graphdef, policy), batch["tokens"].reshape(-1, T)
        readings = [cts.Reading(batch["prompt"], batch["prompt_len"], [tokens_MT])]
        # CTS: y0 and y1 are read in the same pass.
        readings = with_replay(readings[0], batch)
        states = model(readings, dtype)
        return model, states, *cts.token_logp(states[0].completions[0], tokens_MT, model.head_VD(), args.temperature)

    def loss_fn(params, batch, scalars, base_params):
        model, states, logp_MT, entropy_MT = forward(params["policy"], batch)
        old_logp_MT, adv_MT, mask_MT = (batch[name].reshape(-1, T) for name in ("old_logp", "adv", "mask"))
        denom = scalars["denom"]
        loss, metrics = grpo_loss(logp_MT, old_logp_MT, adv_MT, mask_MT, args.clip_low, args.clip_high, denom)
        micro_share = len(batch["prompt"]) / B  # of the batch: summed over micro-batches, losses stay losses
        metrics["losses/policy_loss"] = (loss, micro_share)
        metrics["losses/entropy"] = ((entropy_MT * mask_MT).sum(), mask_MT.sum())
        if args.kl_coef:
            _, _, base_logp_MT, _ = forward(base_params, batch)
            kl = k3_kl(logp_MT, base_logp_MT, mask_MT, denom)
            loss = loss + args.kl_coef * kl
            metrics["losses/kl"] = (kl, micro_share)
        # CTS: alignment, decoding and energy.
        critic = nnx.merge(critic_def, params["critic"])
        align, decode, energy, cts_metrics = cts_losses(model, states, critic, batch, args)
        loss = loss + scalars["lam_align"] * align
        loss = loss + scalars["lam_decode"] * decode
        loss = loss + scalars["lam_energy"] * energy
        metrics |= {"losses/align_loss": (align, micro_share), "losses/decode_loss": (decode, micro_share)}
        metrics |= {"losses/energy_loss": (energy, micro_share), **cts_metrics}
        metrics["losses/loss"] = (loss, micro_share)
        return loss, metrics

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*state_sharding, replicated))
    def train_step(params, opt_state, batch, scalars, base_params):
        cts.TRACES["train_step"] += 1
        micro = jax.tree.map(lambda a: a.reshape(B // n_micro, n_micro, *a.shape[1:]).swapaxes(0, 1), batch)

        def add(grads, one):
            new, metrics = jax.grad(loss_fn, has_aux=True)(params, one, scalars, base_params)
            return jax.tree.map(jnp.add, grads, new), metrics
        grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro)
        metrics = jax.tree.map(lambda a: a.sum(0), metrics)
        metrics["losses/grad_norm"] = (optax.tree.norm(grads["policy"]), 1.0)
        for name in params:
            updates, opt_state[name] = tx.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
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
        another = lambda q: replay["train"][step_rng.integers(len(replay["train"]))].f
        f_of = {"replay": lambda q: q.f, "shuffled": another, "redacted": lambda q: cts.redact(q.f)}[args.critique]
        return [dataclasses.replace(q, f=f_of(q)) for q in quads]

    base = cts.base_report(base_dir, evaluator, base_params, replay["train"], B, G, args.temperature)

    # ---- loop -----------------------------------------------------------------------------------------------------
    identity = cts.run_identity(args, base_params, tokenizer, replay, shapes, dtype)
    base_params = base_params if args.kl_coef else None  # the KL alone still needs it: else its memory is free
    params, opt_state = run.start(identity, params, opt_state)
    clock = cts.StepClock()
    for step in run.steps():
        clock.start()
        quads = [replay["train"][i] for i in cts.data_indices(len(replay["train"]), B, args.seed, step)]
        # CTS: control arms and A6 change the critique before it reaches the prompt.
        step_rng = np.random.default_rng((args.seed, cts.STREAM_CONTROL, step))
        quads = change_critiques(quads, step_rng)
        batch = cts.pack_revise(tokenizer, quads, shapes)

        # ---- rollout ----
        prompts = cts.put((batch["prompt"], batch["prompt_len"]), by_row)
        out = cts.fetch(rollout(params["policy"], *prompts, jax.random.fold_in(rollout_key, step)))
        clock.mark("rollout")

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
        valid_BG = ~np.isnan(reward_BG) * (1.0 - truncated_BG if args.truncated == "mask" else np.ones((B, G)))
        adv_BG = group_advantages(np.nan_to_num(reward_BG), valid_BG, args.adv_norm)  # NaN: not scored, harness error
        mask_BGT = cts.length_mask(out["len_M"], T).reshape(B, G, T) * valid_BG[..., None]
        adv_BGT = np.repeat(adv_BG[..., None], T, axis=-1)
        # VERIFIER: or each step's own reward goes to the tokens before its end.
        if args.process_credit == "per_step":
            step_reward_BGT, step_end_BGT = cts.step_rewards(tokenizer, out["tokens_MT"], out["len_M"], texts, quads)
            step_end_BGT = step_end_BGT * valid_BG[..., None]
            adv_BGT = adv_BGT + args.process_coef * step_advantages(step_reward_BGT, step_end_BGT, args.adv_norm)
        batch["tokens"] = out["tokens_MT"].reshape(B, G, T)
        batch["old_logp"] = out["logp_MT"].reshape(B, G, T)
        batch["adv"] = adv_BGT.astype(np.float32)
        batch["mask"] = mask_BGT.astype(np.float32)
        scalars = {"denom": np.float32(M * T if args.loss_norm == "constant" else max(mask_BGT.sum(), 1.0))}
        # CTS: what its terms need, their normalisers, and their weights; lam_align moves on its schedule.
        batch |= cts.pack_trajectories(tokenizer, quads, shapes, batch)
        batch["alpha"] = critique_weights(batch["flagged"], batch["y0_mask"])
        batch["decode_weight"] = batch["y1_tokens"] / batch["y1_tokens"].sum()
        batch["wrong_weight"] = batch["wrong"] / max(batch["wrong"].sum(), 1.0)
        batch["noise"] = step_rng.standard_normal((B, cts.MAX_STEPS, LATENT_DIM)).astype(np.float32)
        ends = [0, max(args.steps - 1, 1)], [args.lam_align, args.lam_align_final]
        scalars["lam_align"] = np.float32(np.interp(step, *ends))
        scalars["lam_decode"] = np.float32(args.lam_decode)
        scalars["lam_energy"] = np.float32(args.lam_energy if args.energy == "trained" else 0.0)
        clock.mark("score")

        # ---- update ----
        params, opt_state, sums = train_step(params, opt_state, cts.put(batch, by_row), scalars, base_params)
        metrics = cts.reduce(cts.fetch(sums))
        clock.mark("update")

        # ---- log, save ----
        metrics["charts/reward"] = float(np.nanmean(reward_BG))
        metrics["charts/accuracy"] = float(np.nanmean(outcome_BG))
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * B * (shapes["P_revise"] + G * T)
        # CTS: y1 after the revise prompt, and y0 and y1 after the attempt prompt, are computed too.
        metrics["charts/tokens"] += (step + 1) * B * (shapes["P_attempt"] + 3 * shapes["T_replay"])
        metrics |= clock.metrics(M) | cts.rollout_metrics(out, texts, reward_BG, quads)
        # VERIFIER: how far the steps hold, whether or not the answer is right.
        metrics["rollout/process_mean"] = float(np.nanmean(process_BG))
        run.end_step(step, metrics, params, opt_state, quads, validation, texts[::G], reward_BG[:, 0])

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    records = evaluator(params["policy"])
    final = cts.summarize(records)
    # CTS: does the energy rise on the step that the critique points at?
    energy_auc, test = [], cts.first_problems(replay["test"], args.eval_problems)
    for i in cts.progress(range(0, len(test), B), desc="energies", unit="batch", leave=False):
        quads = [test[j % len(test)] for j in range(i, i + B)]  # the last batch is filled up
        batch = cts.pack_revise(tokenizer, quads, shapes)
        batch |= cts.pack_trajectories(tokenizer, quads, shapes, batch)
        energy_BJ = cts.fetch(step_energies(params, cts.put(batch, by_row)))[: len(test) - i]
        rows = zip(energy_BJ, batch["flagged"], batch["y0_mask"] > 0)
        energy_auc += [cts.detector_auc(energy_J[real_J], flagged_J[real_J]) for energy_J, flagged_J, real_J in rows]
    final["energy_auc"] = cts.mean(energy_auc)
    return run.finish(replay, shapes, base, records, final, clock, (cfg, params["policy"], tokenizer))


if __name__ == "__main__":
    cts.cli(main, Args)
