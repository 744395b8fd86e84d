"""B3: GRPO with a verifier reward. Reward = outcome + process_coef * process; the strong baseline.

    A       = r - mean(r over the group)                                    group-centred advantage (Dr. GRPO)
    L       = -sum min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) / budget  + kl_coef * kl
    r       = outcome in {0, 1}  +  process_coef * (share of steps that hold up to the first that does not)
    A_t     = A;  with --process_credit from_error: 0 where A < 0 and token t stands before the first wrong step

Prompts are replay's (x, y0, f): revise the flawed attempt y0 under the critique f. One optimizer step per batch of
`prompts` x `group` completions, so the ratio is that of trainer to sampler and the clip guards only numerics.

Papers: GRPO https://arxiv.org/abs/2402.03300 (process credit: its section 4.1.3), Dr. GRPO
https://arxiv.org/abs/2503.20783, DAPO https://arxiv.org/abs/2503.14476, prefix-form process reward
https://arxiv.org/abs/2504.15275, VPPO (error-localised advantages) https://arxiv.org/abs/2601.18984.

    python b3_grpo_verifier.py --task fixtures_long --seed 0      (up to 5 minutes on 2 CPU cores, later runs 3)
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
    cts.check_args(args, clip_low=1)
    # VERIFIER: step-level credit needs steps that can be checked one by one.
    cts.check_step_credit(args.task, args.process_credit)
    cts.open_out_dir(args)
    mesh, dtype = cts.make_mesh(args.mesh), cts.pick_dtype(args.dtype)
    n_micro = cts.count_micro_batches(mesh, args.prompts, args.micro_batch)
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    cfg, base_params, tokenizer, base_dir = cts.load_model(args.model, args.task, replay, args.out_dir, mesh)
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
        model = nnx.merge(graphdef, cts.gather(mesh, policy))
        how = (G, T, args.temperature, tokenizer.eos_ids, tokenizer.pad_id)
        return cts.generate(model, prompt_BP, prompt_len_B, key, *how, dtype=dtype, shrink=mesh.size == 1)

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

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*state_sharding, replicated))
    def train_step(params, opt_state, grads):
        cts.TRACES["train_step"] += 1
        metrics = {"losses/grad_norm": optax.tree.norm(grads["policy"])}
        for name in params:
            updates, opt_state[name] = tx.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return params, opt_state, metrics

    # ---- base: what there is to improve ---------------------------------------------------------------------------
    evaluator = cts.Evaluator(graphdef, tokenizer, replay["test"], shapes, mesh, dtype, args.eval_problems)
    validation = cts.Evaluator(graphdef, tokenizer, replay["val"], shapes, mesh, dtype, args.eval_problems)
    base = cts.base_report(base_dir, evaluator, base_params, replay["train"], B, G, args.temperature)

    # ---- loop -----------------------------------------------------------------------------------------------------
    identity = cts.run_identity(args, base_params, tokenizer, replay, shapes, dtype)
    base_params = base_params if args.kl_coef else None  # the KL alone still needs it: else its memory is free
    params, opt_state = run.start(identity, params, opt_state)
    clock = cts.StepClock()
    for step in run.steps():
        clock.start()
        quads = [replay["train"][i] for i in cts.data_indices(len(replay["train"]), B, args.seed, step)]
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
        params, opt_state, norm = train_step(params, opt_state, grads)
        metrics = cts.reduce(cts.fetch([*sums, norm]))
        del grads  # their memory is free
        clock.mark("update")

        # ---- log, save ----
        metrics["charts/reward"] = float(np.nanmean(reward_BG))
        metrics["charts/accuracy"] = float(np.nanmean(outcome_BG))
        metrics["losses/entropy"] = float((out["entropy_M"].reshape(B, G) * valid_BG).sum() / max(mask_BGT.sum(), 1.0))
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * B * (shapes["P_revise"] + G * T) * (2 if args.kl_coef else 1)
        metrics |= clock.metrics(M) | cts.rollout_metrics(out, texts, reward_BG, quads)
        # VERIFIER: how far the steps hold, whether or not the answer is right.
        metrics["rollout/process_mean"] = float(np.nanmean(process_BG))
        run.end_step(step, metrics, params, opt_state, quads, validation, texts[::G], reward_BG[:, 0])

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    records = evaluator(params["policy"])
    final = cts.summarize(records)
    return run.finish(replay, shapes, base, records, final, clock, (cfg, params["policy"], tokenizer))


if __name__ == "__main__":
    cts.cli(main, Args)
