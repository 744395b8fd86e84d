"""Time a training step on the work of workload.py, which other engines do too, or on work of another size; prints one
JSON line.

It is a script's own `main` that runs, loop, sampler, scoring, update and logging: b3's for `--task grpo`, b5's for cts,
b0's for sft, b1's for dpo. `run_main` puts its data, its model and its evaluation in place from outside.

    python benchmarks/paired.py --size nano --steps 6 --warmup 2 --task grpo
    python benchmarks/paired.py --size small --task cts --prompt_tokens 240
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Literal
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import workload as wl
from flax import nnx

import cts_common as cts

GRPO = dict(adv_norm="std", loss_norm="token", clip_low=wl.CLIP, clip_high=wl.CLIP, truncated="keep")
TASKS = {  # script, its flags
    "grpo": ("b3_grpo_verifier", GRPO),
    "cts": ("b5_cts", GRPO),
    "sft": ("b0_sft", {}),
    "dpo": ("b1_dpo", dict(beta=wl.DPO_BETA, nll_coef=0.0)),
}
PACK = {"sft": "cts_common.pack_rows", "dpo": "b1_dpo.pack_pairs"}  # what makes a batch, where nothing is sampled


@dataclasses.dataclass(frozen=True)
class Work:
    size: str = "nano"
    """nano, small, WIDTHxLAYERS, or the folder of a checkpoint (its config.json is read, its weights are not)"""
    prompts: int = wl.PROMPTS
    """prompts per step; SFT and DPO take half as many groups of sequences"""
    group: int = wl.GROUP
    """completions per prompt"""
    prompt_tokens: int = wl.PROMPT_TOKENS
    """tokens of every prompt"""
    new_tokens: int = wl.NEW_TOKENS
    """tokens of every completion; b5's y0 and y1 have as many"""


@dataclasses.dataclass(frozen=True)
class Args(Work):
    task: Literal["grpo", "cts", "sft", "dpo"] = "grpo"
    """what a step does"""
    micro_batch: int = 0
    """prompts per micro-batch; 0 = the script's own choice"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    warmup: int = 2
    """steps before those that count"""
    steps: int = 6
    """steps that count"""


# ---- model --------------------------------------------------------------------------------------------------------
def config_of(size: str) -> cts.ModelConfig:
    """The decoder's shape of `--size`; InputError if there is none of that name."""
    if size in wl.SIZES:
        return cts.ModelConfig(**wl.SIZES[size], rope_theta=wl.ROPE_THETA, norm_eps=wl.NORM_EPS)
    if pathlib.Path(size).is_dir():
        return cts.read_hf_config(pathlib.Path(size))
    if not (shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)) or int(shape[1]) % 64:
        raise cts.InputError(f"--size {size}: choose nano, small, a folder, or WIDTHxLAYERS with a multiple of 64")
    heads, layers = int(shape[1]) // 64, int(shape[2])
    return cts.ModelConfig(512, 64 * heads, layers, 2 * heads, heads, 32, 256 * heads, wl.ROPE_THETA, remat=True)


def first_params(size: str):
    """A decoder's parameters: the workload's, which have a checkpoint's names and layout, or random ones."""
    cfg, mesh = config_of(size), cts.make_mesh("auto")
    if size in wl.SIZES:
        with tempfile.TemporaryDirectory() as folder:
            safetensors.numpy.save_file(wl.initial_weights(size), f"{folder}/model.safetensors")
            return cts.load_hf_weights(pathlib.Path(folder), cfg, mesh)
    params = jax.jit(lambda: nnx.state(cts.Decoder(cfg, nnx.Rngs(0)), nnx.Param))()
    return cts.put(params, cts.shard_rule(mesh, params))


def proof(size: str) -> dict[str, float]:
    """Parameters, and the mean next-token NLL of the first prompts: every engine computes the same function."""
    cfg, params = config_of(size), first_params(size)
    ids = jnp.asarray(next(batches("grpo", cfg.vocab_size, wl.PROMPTS, wl.PROMPT_TOKENS, wl.NEW_TOKENS))["prompt"])
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0)))), params)
    hidden_BPD = model.packed(ids, jnp.ones_like(ids))
    nll = -float(cts.token_logp(hidden_BPD[:, :-1], ids[:, 1:], model.head_VD())[0].mean())
    return {"params": sum(a.size for a in jax.tree.leaves(params)), "check_nll": nll}


# ---- a script's main on work from here ----------------------------------------------------------------------------
def batches(task: str, *shape: int):
    """A packed batch for every step; what SFT and DPO learn is in it. `shape` is (vocabulary, rows, P, T)."""
    for step in itertools.count():
        prompt, *answers = (ids.astype(np.int32) for ids in wl.step_ids(task, step, *shape))
        if task == "sft":  # all of a sequence but its first token is learnt, as in next-token training
            learnt = np.ones(prompt.shape, np.float32) * (np.arange(prompt.shape[1]) > 0)
            yield {"tokens": prompt, "segment": np.ones_like(prompt), "mask": learnt}
            continue
        if task == "dpo":
            answers = np.stack(answers, axis=1)
        learnt = {"tokens": answers, "mask": np.ones(np.shape(answers), np.float32)} if task in PACK else {}
        yield {"prompt": prompt, "prompt_len": np.full(len(prompt), prompt.shape[1], np.int32), **learnt}


def trajectories(vocab: int, B: int, P: int, T: int) -> dict[str, np.ndarray]:
    """b5's part of a batch: y0 and y1 of full length in eight steps each, a critique over a quarter of the prompt."""
    J, n, t = cts.MAX_STEPS, min(8, T), np.arange(T)
    x, y0, y1 = (ids.astype(np.int32) for ids in wl.step_ids("dpo", 0, vocab, B, P, T))
    steps_BJT, flagged_BJ, f_B1P = (np.zeros(shape, np.float32) for shape in ((B, J, T), (B, J), (B, 1, P)))
    steps_BJT[:, t * n // T, t] = 1.0
    flagged_BJ[:, n // 2] = 1.0
    f_B1P[..., -max(1, P // 4) :] = 1.0
    return {
        "attempt_prompt": x, "attempt_prompt_len": np.full(B, P, np.int32), "y0": y0, "y1": y1, "f_tokens": f_B1P,
        "y0_steps": steps_BJT, "y1_steps": steps_BJT, "y0_mask": steps_BJT.max(-1), "y1_mask": steps_BJT.max(-1),
        "flagged": flagged_BJ, "y1_tokens": np.ones((B, T), np.float32), "wrong": np.ones(B, np.float32),
    }  # fmt: skip


def stand_ins(args: Args, folder: str, B: int, P: int, T: int) -> dict:
    """What stands in for a script's data, model and evaluation: {name in cts_common: replacement}."""
    cfg = config_of(args.size)
    V = cfg.vocab_size
    meta = {"task_id": "random", "domain": "math", "answer": "0", "horizon": 1, "edit_distance": 0, "error_tags": [],
            "error_span": None}  # fmt: skip
    quads = [cts.Quadruple("x", "y0", "f", "y1", meta)] * B
    shapes = {"P_attempt": P, "P_revise": P, "T": T, "T_replay": T}
    decode = lambda ids_MT: [wl.to_text(ids) for ids in ids_MT]
    tokenizer = SimpleNamespace(pad_id=0, eos_id=V, eos_ids=(V,), vocab_size=V, decode=decode, sha256=lambda: "words")

    def rewards(texts, quads):
        assert all(text.count(" ") == T - 1 for text in texts), "a completion ended early"
        return np.array([wl.reward(text) for text in texts], np.float32).reshape(B, -1)

    return {
        "load_replay": lambda *_: dict.fromkeys(("train", "val", "test"), quads),
        "load_model": lambda *_: (cfg, first_params(args.size), tokenizer, pathlib.Path(folder)),
        "fixed_shapes": lambda *_: shapes,
        "update_widths": lambda *_: [shapes],
        "row_shape": lambda _, sequences, n_micro, data: (P + T, sequences // n_micro),
        "Evaluator": lambda *_: None,
        "base_report": lambda *_: {"precheck": {}, "summary": {}},
        "pack_trajectories": lambda *_: trajectories(V, B, P, T),
        "outcome_scores": rewards,
        "process_scores": lambda texts, quads: np.zeros((B, len(texts) // B), np.float32),
    }


def clock_of(watch: wl.Stopwatch):
    """A script's StepClock that tells `watch` of steps and of their parts."""

    class Clock(cts.StepClock):
        def start(self):
            watch.start()
            super().start()

        def mark(self, part):
            super().mark(part)
            watch.mark(part)

    return Clock


def run_main(args: Args) -> dict:
    """Run `main` of the task's script for `warmup` + `steps` steps; returns their figures. AdamW has the workload's
    constants."""
    (script, flags), steps, adamw, watch = TASKS[args.task], args.warmup + args.steps, optax.adamw, wl.Stopwatch()
    B, G, P, T = args.prompts, args.group, args.prompt_tokens, args.new_tokens
    if args.task in PACK:
        B = max(1, B // 2)
    rows = {"sft": B * G, "dpo": B * G // 2}.get(args.task, B)
    shape = (args.task, config_of(args.size).vocab_size, rows, P, T)
    every, before = itertools.islice(batches(*shape), steps), batches(*shape)  # b5 reads some before its first step
    pack = lambda *_: next(before if watch.began is None else every)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(cts, StepClock=clock_of(watch), **stand_ins(args, folder, B, P, T)),
        mock.patch(PACK.get(args.task, "cts_common.pack_revise"), pack),
        mock.patch("b0_sft.make_examples", lambda _, quads, *__: [([0] * P, [0] * T)] * len(quads)),  # their lengths
        mock.patch.object(optax, "adamw", lambda *_, **__: adamw(**wl.ADAMW)),
        mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=folder),  # no compiled program from before
        contextlib.redirect_stdout(sys.stderr),  # what the script prints is no part of the answer
        contextlib.suppress(StopIteration),  # there is no batch for one step more: it ends the last one, and the run
    ):
        flags = dict(prompts=B, group=G, micro_batch=args.micro_batch, dtype=args.dtype, out_dir=folder, **flags)
        flags |= dict(steps=steps + 1, temperature=wl.TEMPERATURE, save_every=0, wandb="disabled")
        module = importlib.import_module(script)
        module.main(module.Args(**flags))
    assert len(watch.rows["step"]) == steps
    return wl.report(watch, args.warmup, B * G * T, B * G * (P + T))  # trained on with their prompts, as peers count


# ---- rates --------------------------------------------------------------------------------------------------------
def model_flops(cfg: cts.ModelConfig, work: Work) -> dict[str, float]:
    """Model FLOPs of one rollout and of one b3 update, the prompt counted once per group and nothing for recomputation:
    2 per weight and token forward, 6 forward and backward, and as many times the multiply-adds of causal attention."""
    heads = cfg.n_heads * cfg.head_dim
    block = cfg.d_model * (2 * heads + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.d_ff)
    B, M, P, T = work.prompts, work.prompts * work.group, work.prompt_tokens, work.new_tokens
    weights = (B * P + M * T) * cfg.n_layers * block + M * T * cfg.vocab_size * cfg.d_model
    attention = cfg.n_layers * 2 * heads * (B * P * P / 2 + M * T * (P + T / 2))
    return {"rollout": 2.0 * (weights + attention), "update": 6.0 * (weights + attention)}


def seconds(f, *args, repeats: int) -> float:
    """Median wall time of f(*args), compiled and warm."""
    f, times = jax.jit(f), []
    jax.block_until_ready(f(*args))
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def matmul_ceiling(dtype, n: int = 2048) -> float:
    """FLOP/s of one n x n x n matmul."""
    return 2 * n**3 / seconds(lambda a: a @ a, jnp.ones((n, n), dtype), repeats=10)


def main(args: Args) -> None:
    cts.check_args(args, "prompt_tokens", "new_tokens")
    cfg, known = config_of(args.size), proof(args.size) if args.size in wl.SIZES else {}
    engine = "cts" if args.task == "grpo" else f"cts-{args.task}"
    line = {"engine": engine, **dataclasses.asdict(args), **run_main(args), **known}
    ceiling = matmul_ceiling(cts.pick_dtype(args.dtype))
    if args.task not in PACK:
        for part, flops in model_flops(cfg, args).items():
            line[f"{part}_mfu"] = round(flops / line["wall_s"][part]["median"] / ceiling, 4)
    line |= {"ceiling_gflop_s": round(ceiling / 1e9, 1), "device": jax.devices()[0].device_kind}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    cts.cli(main, Args)
