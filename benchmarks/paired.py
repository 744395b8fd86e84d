"""Time a script's training step on work that other engines do too, for a side-by-side comparison; one JSON line.

The work is a module `workload` on the path: model shapes, initial weights, prompts, reward, AdamW's constants, timers
and the JSON line. `step_time.py` does the rest: it is the script's own `main` that runs: b3's (from text to text), b0's
for `--task sft`, b1's for `--task dpo`.

    PYTHONPATH=<folder of workload.py> python benchmarks/paired.py --size nano --steps 6 --warmup 2 --task grpo
"""

import contextlib
import functools
import itertools
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import step_time
import workload as wl
from flax import nnx

import b0_sft as b0
import b1_dpo as b1
import b3_grpo_verifier as b3
import cts_common as cts


def initial_params(cfg: cts.ModelConfig, size: str):
    """The workload's weights, which have a checkpoint's names and layout, as the decoder's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file(wl.initial_weights(size), f"{folder}/model.safetensors")
        return cts.load_hf_weights(pathlib.Path(folder), cfg, cts.make_mesh("auto"))


def mean_nll(cfg: cts.ModelConfig, params, ids) -> float:
    """Mean next-token NLL of the first step's prompts: proof that every engine computes the same function."""
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0)))), params)
    hidden_BPD = model.packed(ids, jnp.ones_like(ids))
    return -float(cts.token_logp(hidden_BPD[:, :-1], ids[:, 1:], model.head_VD())[0].mean())


def timed_clock(timer):
    """The loop's own clock, which also tells the workload's timer where steps begin."""

    class Clock(cts.StepClock):
        def start(self):
            super().start()
            timer()

    return Clock


def grpo_places(size: str, timer, clock) -> dict:
    """b3's data of the workload, and its clock: `gen` is sampling, decoding and scoring, `train` the update."""
    steps, B, P, T = itertools.count(), wl.PROMPTS_PER_STEP, wl.PROMPT_LEN, wl.NEW_TOKENS

    class Clock(timed_clock(timer)):
        def start(self):
            super().start()
            self.at = wl.now()

        def mark(self, name):
            super().mark(name)
            if name in ("score", "update"):
                clock.between({"score": "gen", "update": "train"}[name], self.at, wl.now())
                self.at = wl.now()

    def prompts(*_):
        return {"prompt": wl.prompt_ids(size, next(steps)).astype(np.int32), "prompt_len": np.full(B, P, np.int32)}

    def rewards(texts, quads):
        assert all(text.count(" ") == T - 1 for text in texts), "a completion stopped early"
        return np.array([wl.reward_text(text) for text in texts], np.float32).reshape(B, -1)

    return dict(pack_revise=prompts, outcome_scores=rewards, StepClock=Clock)


def supervised_batches(task: str, size: str):
    """b0's or b1's packed batches of the workload. A sequence of SFT is one token of prompt and the rest, so that its
    loss covers what next-token training on whole sequences covers."""
    for step in itertools.count():
        if task == "sft":
            ids = wl.sup_ids(size, step).astype(np.int32)
            prompt, tokens = ids[:, :1], ids[:, 1:]
        else:
            prompt, chosen, rejected = (a.astype(np.int32) for a in wl.dpo_ids(size, step))
            tokens = np.stack([chosen, rejected], 1)
        length = np.full(len(prompt), prompt.shape[1], np.int32)
        yield {"prompt": prompt, "prompt_len": length, "tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}


def main() -> None:
    add_task = lambda parser: parser.add_argument("--task", choices=("grpo", "sft", "dpo"), default="grpo")
    args = wl.parse_args(__doc__.split("\n")[0], extra=add_task)
    out, size, task = wl.claim_stdout(), args.size, args.task
    shape = wl.SIZES[size]
    cfg = cts.ModelConfig(
        shape["vocab"], shape["d_model"], shape["layers"], shape["heads"], shape["kv_heads"], shape["head_dim"],
        shape["mlp"], wl.ROPE_THETA, norm_eps=wl.NORM_EPS,
    )  # fmt: skip
    params, clock = initial_params(cfg, size), wl.Clock()
    nll = mean_nll(cfg, params, jnp.asarray(wl.prompt_ids(size, 0), jnp.int32))
    timer, tokenizer = wl.StepTimer(clock), step_time.Numbers(cfg.vocab_size)
    adamw = functools.partial(optax.adamw, wl.LR, wl.ADAM_B1, wl.ADAM_B2, wl.ADAM_EPS, weight_decay=wl.WEIGHT_DECAY)
    flags = dict(
        group=wl.GROUP, steps=args.warmup + args.steps, temperature=wl.TEMPERATURE, dtype="float32", save_every=0,
        wandb="disabled",
    )  # fmt: skip
    work = {"load_model": lambda name, task, replay, folder, mesh: (cfg, params, tokenizer, pathlib.Path(folder))}
    if task == "grpo":
        script, B, P, T = b3, wl.PROMPTS_PER_STEP, wl.PROMPT_LEN, wl.NEW_TOKENS
        flags |= dict(adv_norm="std", loss_norm="token", clip_low=wl.CLIP_EPS, clip_high=wl.CLIP_EPS, truncated="keep")
        work |= grpo_places(size, timer, clock)
        replaced, counted = contextlib.nullcontext(), {}
    else:
        script, B = (b0, b1)[task == "dpo"], wl.SUP_BATCH // wl.GROUP
        P, T = (1, wl.SEQ_LEN - 1) if task == "sft" else (wl.PROMPT_LEN, wl.NEW_TOKENS)
        flags |= dict(beta=wl.DPO_BETA, nll_coef=0.0) if task == "dpo" else {}
        work["StepClock"] = timed_clock(timer)
        batches = supervised_batches(task, size)
        pack = "pack_examples" if task == "sft" else "pack_pairs"
        replaced = mock.patch.object(script, pack, lambda *_: next(batches))
        counted = dict(train="step", train_tokens=wl.SUP_TOKENS_PER_STEP)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(optax, "adamw", lambda *_, **__: adamw()), replaced:
        places = step_time.in_place(cfg.vocab_size, B, P, T) | work
        with step_time.placed(places, folder):
            try:
                script.main(script.Args(prompts=B, out_dir=folder, **flags))
            except step_time.Finished:
                timer(last=True)
    n_params = sum(a.size for a in jax.tree.leaves(params))
    name = "cts" if task == "grpo" else f"cts-{task}"
    wl.report(out, name, size, clock, args.warmup, params=n_params, check_nll=nll, **counted)


if __name__ == "__main__":
    main()
