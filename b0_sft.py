"""B0: supervised fine-tuning on the revision. Next-token loss on y1, given problem, flawed attempt and critique.

    L = -sum_t log pi(y1_t | x, y0, f, y1_<t) / tokens        over `prompts` x `group` replay quadruples a step

so a step learns from as many completions as a step of the methods that sample theirs. `--objective=critique` is
critique fine-tuning, -log pi(f | x, y0): a model that must say what is wrong learns more than one that copies what is
right (https://arxiv.org/abs/2501.17703). The loss is taken at temperature 1 and on no prompt token; what is evaluated
is the same for all methods, the revision. Several short examples share a row and do not see each other.

`--temperature` is that of the base's pre-check, which all methods share; it samples `--group` completions a problem.

    python b0_sft.py --task fixtures_long --seed 0      (up to 5 minutes on 2 CPU cores, later runs 3)
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
    """sampling temperature of the base's pre-check; the loss is taken at 1"""
    learning_rate: float = 1e-3
    """peak AdamW learning rate, decayed linearly to 0 over the run"""
    micro_batch: int = 0
    """prompts whose examples fill a micro-batch; 0 = one per device on CPUs (what fits the cache), elsewhere all"""
    eval_problems: int = 0
    """problems of each evaluation, the first N of a fixed shuffled order; the pre-check takes no more; 0 = all"""
    # ---- SFT ----
    objective: Literal["revision", "critique"] = "revision"
    """what is learnt: revision = y1 from (x, y0, f); critique = f from (x, y0), critique fine-tuning"""


# ---- method pieces ------------------------------------------------------------------------------------------------
def make_examples(tokenizer, quads, T: int, objective: str) -> list[cts.Document]:
    """Of each quadruple the token ids of what is given and of what is learnt, with its end token and cut at T."""
    if objective == "revision":
        prompts, targets = [cts.revise_prompt(q.x, q.y0, q.f) for q in quads], [q.y1 for q in quads]
    else:
        prompts, targets = [cts.critique_prompt(q.x, q.y0) for q in quads], [q.f for q in quads]
    learnt = [[*tokenizer.encode(target), tokenizer.eos_id][:T] for target in targets]
    return list(zip(tokenizer.encode_prompts(prompts), learnt))


# ---- loss ---------------------------------------------------------------------------------------------------------
def sft_loss(logp_RW, mask_RW, denom):
    """Negative log-likelihood of the masked tokens, summed and divided by `denom`.

    Log-probs [[-1, -2], [-3, -9]] with mask [[1, 1], [1, 0]] and denom 3: 2.
    """
    return -(logp_RW * mask_RW).sum() / denom


def main(args: Args) -> dict:
    # ---- checks, data, model --------------------------------------------------------------------------------------
    cts.check_args(args)
    cts.open_out_dir(args)
    mesh, dtype = cts.make_mesh(args.mesh), cts.pick_dtype(args.dtype)
    n_micro = cts.count_micro_batches(mesh, args.prompts, args.micro_batch)
    replay = cts.load_replay(args.task, args.replay, args.data_dir, args.unsafe_sandbox)
    cfg, base_params, tokenizer, base_dir = cts.load_model(args.model, args.task, replay, args.out_dir, mesh)
    max_new_tokens = args.max_new_tokens or cts.TASKS[args.task].max_new_tokens
    shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, max_new_tokens)
    B, G, M, T = args.prompts, args.group, args.prompts * args.group, shapes["T"]
    examples = make_examples(tokenizer, replay["train"], T, args.objective)
    mean_length = cts.mean([len(given) + len(learnt) for given, learnt in examples])
    W, R = cts.row_shape(examples, M, n_micro, mesh.shape["data"])  # tokens of a row, rows of a micro-batch
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
        """(log-probs, entropies) [R, W - 1] of every token but a row's first."""
        model = nnx.merge(graphdef, cts.gather(mesh, policy))
        hidden_RWD = model.packed(batch["tokens"], batch["segment"], dtype)
        return cts.token_logp(hidden_RWD[:, :-1], batch["tokens"][:, 1:], model.head_VD())

    def loss_fn(params, batch, denom):
        logp_RW, entropy_RW = forward(params["policy"], batch)
        mask_RW = batch["mask"][:, 1:]
        loss = sft_loss(logp_RW, mask_RW, denom)
        metrics = {"losses/loss": loss}
        metrics["losses/entropy"] = ((entropy_RW * mask_RW).sum(), mask_RW.sum())
        return loss, metrics

    no_grads = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=state_sharding[0])

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_sharding[0], replicated))
    def add_grads(grads, params, micro, denom):
        cts.TRACES["add_grads"] += 1
        new, metrics = jax.grad(loss_fn, has_aux=True)(params, micro, denom)
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
    base_params = None  # nothing needs it from here on: its memory is free
    params, opt_state = run.start(identity, params, opt_state)
    clock = cts.StepClock()
    for step in run.steps():
        clock.start()
        indices = cts.data_indices(len(examples), M, args.seed, step)
        quads = [replay["train"][i] for i in indices]

        # ---- batch ----
        batch = cts.pack_rows([examples[i] for i in indices], W, R, tokenizer.pad_id)
        denom = np.float32(batch["mask"].sum())
        clock.mark("batch")

        # ---- update ----
        grads, sums = no_grads(params), []
        for i in range(0, len(batch["mask"]), R):
            micro = {name: array[i : i + R] for name, array in batch.items()}
            grads, one = add_grads(grads, params, cts.put(micro, by_row), denom)
            sums.append(one)
        params, opt_state, norm = train_step(params, opt_state, grads)
        metrics = cts.reduce(cts.fetch([*sums, norm]))
        del grads  # their memory is free
        clock.mark("update")

        # ---- log, save ----
        metrics["charts/learning_rate"] = args.learning_rate * (1 - step / args.steps)
        metrics["charts/tokens"] = (step + 1) * M * mean_length
        metrics |= clock.metrics(M)
        run.end_step(step, metrics, params, opt_state, quads, validation)

    # ---- final evaluation, result ---------------------------------------------------------------------------------
    records = evaluator(params["policy"])
    final = cts.summarize(records)
    return run.finish(replay, shapes, base, records, final, clock, (cfg, params["policy"], tokenizer))


if __name__ == "__main__":
    cts.cli(main, Args)
