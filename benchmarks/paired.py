"""Time a script's training step on work that other engines do too, for a side-by-side comparison; one JSON line.

The work is a module `workload` on the path: model shapes, initial weights, prompts, reward, AdamW's constants, timers
and the JSON line. `step_time.py` does the rest: it is b3's own `main` that runs, from text to text.

    PYTHONPATH=<folder of workload.py> python benchmarks/paired.py --size nano --steps 6 --warmup 2
"""

import functools
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


def main() -> None:
    args = wl.parse_args(__doc__.split("\n")[0])
    out, size = wl.claim_stdout(), args.size
    shape, B, P, T = wl.SIZES[size], wl.PROMPTS_PER_STEP, wl.PROMPT_LEN, wl.NEW_TOKENS
    cfg = cts.ModelConfig(
        shape["vocab"], shape["d_model"], shape["layers"], shape["heads"], shape["kv_heads"], shape["head_dim"],
        shape["mlp"], wl.ROPE_THETA, norm_eps=wl.NORM_EPS,
    )  # fmt: skip
    params, clock, steps = initial_params(cfg, size), wl.Clock(), iter(range(args.warmup + args.steps))
    nll = mean_nll(cfg, params, jnp.asarray(wl.prompt_ids(size, 0), jnp.int32))
    timer, tokenizer = wl.StepTimer(clock), step_time.Numbers(cfg.vocab_size)

    class Clock(cts.StepClock):
        """The loop's own clock; `gen` is sampling, decoding and scoring, `train` the update."""

        def start(self):
            super().start()
            timer()
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

    adamw = functools.partial(optax.adamw, wl.LR, wl.ADAM_B1, wl.ADAM_B2, wl.ADAM_EPS, weight_decay=wl.WEIGHT_DECAY)
    flags = dict(
        prompts=B, group=wl.GROUP, steps=args.warmup + args.steps, temperature=wl.TEMPERATURE, adv_norm="std",
        loss_norm="token", clip_low=wl.CLIP_EPS, clip_high=wl.CLIP_EPS, truncated="keep", dtype="float32",
        save_every=0, wandb="disabled",
    )  # fmt: skip
    work = dict(
        load_model=lambda name, task, replay, folder, mesh: (cfg, params, tokenizer, pathlib.Path(folder)),
        pack_revise=prompts, outcome_scores=rewards, StepClock=Clock,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(optax, "adamw", lambda *_, **__: adamw()):
        places = step_time.in_place(cfg.vocab_size, B, P, T) | work
        with step_time.placed(places, folder):
            try:
                b3.main(b3.Args(out_dir=folder, **flags))
            except step_time.Finished:
                timer(last=True)
    n_params = sum(a.size for a in jax.tree.leaves(params))
    wl.report(out, "cts", size, clock, args.warmup, params=n_params, check_nll=nll)


if __name__ == "__main__":
    main()
