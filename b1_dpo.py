"""B1: direct preference optimization (DPO), the revision y1 preferred over the flawed attempt y0.

    m   = [log pi(y1|c) - log pi_base(y1|c)] - [log pi(y0|c) - log pi_base(y0|c)]      c = (x, y0, f); sums over tokens
    L   = -log sigmoid(beta * m)  -  nll_coef * log pi(y1|c) / |y1|                     mean over the pairs

The reference pi_base is the frozen base itself. Margins alone may grow while y1 grows less likely, worst
where the two differ in few tokens, as here (https://arxiv.org/abs/2402.13228); the second term holds y1 up
(https://arxiv.org/abs/2404.19733). A step learns from `prompts` x `group` completions: half as many pairs. A pair's
prompt is computed once.

`--temperature` is that of the base's pre-check, which all methods share; it samples `--group` completions a problem.

Papers: DPO https://arxiv.org/abs/2305.18290.

    python b1_dpo.py --task fixtures_long --seed 0      (up to 5 minutes on 2 CPU cores, later runs 3)
"""

import dataclasses
import functools

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
    """sampling temperature of the base's pre-check; the loss is taken at 1"""
    learning_rate: float = 3e-4
    """peak AdamW learning rate, decayed linearly to 0 over the run"""
    micro_batch: int = 0
    """prompts per micro-batch; 0 = one per device on CPUs (what fits the cache is fastest), elsewhere all at once"""
    eval_problems: int = 0
    """problems of each evaluation, the first N of a fixed shuffled order; the pre-check takes no more; 0 = all"""
    # ---- DPO ----
    beta: float = 0.1
    """strength of the pull to the base: the inverse temperature of the implied reward (DPO)"""
    nll_coef: float = 1.0
    """weight of the per-token loss on y1 (iterative RPO); 0 = plain DPO"""


# ---- method pieces ------------------------------------------------------------------------------------------------
def pack_pairs(tokenizer, quads, shapes: dict[str, int]) -> dict[str, np.ndarray]:
    """{"prompt" [B, P], "prompt_len" [B], "tokens" [B, 2, T], "mask" [B, 2, T]} of B pairs: y1 first, then y0."""
    batch = cts.pack_revise(tokenizer, quads, shapes)
    tokens_MT, len_M = cts.pack_answers(tokenizer, [y for q in quads for y in (q.y1, q.y0)], shapes["T"])
    batch["tokens"] = tokens_MT.reshape(len(quads), 2, -1)
    batch["mask"] = cts.length_mask(len_M, shapes["T"]).reshape(len(quads), 2, -1)
    return batch


# ---- loss ---------------------------------------------------------------------------------------------------------
def dpo_loss(logp_B2, ref_logp_B2, beta: float):
    """(loss [B], margin [B]) of pairs (chosen, rejected) from their summed log-probs (DPO eq. 7).

    One pair, log-probs [-10, -12], reference [-11, -11], beta 0.1: margin 2, loss -log sigmoid(0.2) = 0.598139.
    """
    margin_B = (logp_B2 - ref_logp_B2) @ jnp.array([1.0, -1.0])
    return -jax.nn.log_sigmoid(beta * margin_B), margin_B


def main(args: Args) -> dict:
    # ---- checks, data, model --------------------------------------------------------------------------------------
    cts.check_args(args, "beta")
    cts.open_out_dir(args)
    mesh, dtype = cts.make_mesh(args.mesh), cts.pick_dtype(args.dtype)
    n_micro = cts.count_micro_batches(mesh, args.prompts, args.micro_batch)
    if args.group % 2:
        raise cts.InputError(f"--group {args.group}: must be even, for completions come in pairs (y1, y0)")
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    cfg, base_params, tokenizer, base_dir = cts.load_model(args.model, args.task, replay, args.out_dir, mesh)
    max_new_tokens = args.max_new_tokens or cts.TASKS[args.task].max_new_tokens
    shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, max_new_tokens)
    widths = cts.update_widths(tokenizer, replay["train"], shapes)
    B, G, M, T = args.prompts, args.group, args.prompts * args.group, shapes["T"]
    n_pairs = M // 2  # of a step
    run = cts.Run(args, __file__)
    if run.finished:
        return run.result(cfg, base_params, tokenizer)

    # ---- parameters, optimizer, shardings -------------------------------------------------------------------------
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))))
    params = {"policy": jax.tree.map(jnp.copy, base_params)}  # a copy: the step donates its parameters
    # one optimizer per subtree, so that nothing but the policy's gradient enters the policy's clipping
    schedule = optax.linear_schedule(args.learning_rate, 0.0, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0))
    opt_state = {name: tx.init(subtree) for name, subtree in params.items()}
    state_sharding = cts.shard_rule(mesh, (params, opt_state))
    params, opt_state = cts.put((params, opt_state), state_sharding)
    by_row, replicated = cts.batch_shardings(mesh)

    # ---- jitted functions -----------------------------------------------------------------------------------------
    def forward(policy, batch):
        """(log-probs, entropies) [B, 2, T] of both completions of every pair; their prompt is computed once."""
        model = nnx.merge(graphdef, cts.gather(mesh, policy))
        tokens_MT = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        (states,) = model([cts.Reading(batch["prompt"], batch["prompt_len"], [tokens_MT])], dtype)
        out = cts.token_logp(states.completions[0], tokens_MT, model.head_VD())
        return [a.reshape(batch["tokens"].shape) for a in out]

    def loss_fn(params, batch, base_params):
        mask_B2T = batch["mask"]
        logp_B2T, entropy_B2T = forward(params["policy"], batch)
        ref_logp_B2T, _ = jax.lax.stop_gradient(forward(base_params, batch))
        logp_B2, ref_logp_B2 = (logp_B2T * mask_B2T).sum(-1), (ref_logp_B2T * mask_B2T).sum(-1)
        loss_B, margin_B = dpo_loss(logp_B2, ref_logp_B2, args.beta)
        nll_B = -logp_B2[:, 0] / mask_B2T[:, 0].sum(-1)
        dpo, nll = loss_B.sum() / n_pairs, nll_B.sum() / n_pairs
        loss = dpo + args.nll_coef * nll
        metrics = {"losses/dpo_loss": dpo}
        metrics["losses/nll_loss"] = nll
        metrics["losses/loss"] = loss
        metrics["losses/entropy"] = ((entropy_B2T * mask_B2T).sum(), mask_B2T.sum())
        metrics["losses/margin"] = (margin_B.sum(), len(margin_B))
        metrics["losses/preference_acc"] = ((margin_B > 0).sum(), len(margin_B))
        metrics["losses/chosen_shift"] = ((logp_B2 - ref_logp_B2)[:, 0].sum(), len(margin_B))
        metrics["losses/rejected_shift"] = ((logp_B2 - ref_logp_B2)[:, 1].sum(), len(margin_B))
        return loss, metrics

    no_grads = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=state_sharding[0])

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_sharding[0], replicated))
    def add_grads(grads, params, micro, base_params):
        cts.TRACES["add_grads"] += 1
        new, metrics = jax.grad(loss_fn, has_aux=True)(params, micro, base_params)
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
    params, opt_state = run.start(identity, params, opt_state)
    clock = cts.StepClock()
    for step in run.steps():
        clock.start()
        quads = [replay["train"][i] for i in cts.data_indices(len(replay["train"]), n_pairs, args.seed, step)]

        # ---- batch ----
        batch = pack_pairs(tokenizer, quads, shapes)
        clock.mark("batch")

        # ---- update ----
        grads, sums = no_grads(params), []
        for micro in cts.micro_batches(batch, n_micro, widths):
            grads, one = add_grads(grads, params, cts.put(micro, by_row), base_params)
            sums.append(one)
        params, opt_state, norm = train_step(params, opt_state, grads)
        metrics = cts.reduce(cts.fetch([*sums, norm]))
        del grads  # their memory is free
        clock.mark("update")

        # ---- log, save ----
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * n_pairs * 2 * (shapes["P_revise"] + 2 * T)  # policy and base
        metrics |= clock.metrics(M)
        run.end_step(step, metrics, params, opt_state, quads, validation)

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    records = evaluator(params["policy"])
    final = cts.summarize(records)
    return run.finish(replay, shapes, base, records, final, clock, (cfg, params["policy"], tokenizer))


if __name__ == "__main__":
    cts.cli(main, Args)
