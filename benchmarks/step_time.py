"""Time one training step of a script on a fixed piece of work; prints one JSON line.

The work: random weights, `prompts` x `group` completions of exactly `new_tokens` tokens, after prompts of exactly
`prompt_tokens` tokens (the end token lies outside the vocabulary, so that nothing stops early), one update.
It is the script's own `main` that runs, loop, sampler, scoring, update and logging; only its data, its model and its
evaluation are put in place from here.

    python benchmarks/step_time.py --model nano
    python benchmarks/step_time.py --model small --method b5_cts --steps 5
    python benchmarks/step_time.py --model nano --prompt_tokens 512
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import resource
import sys
import tempfile
import time
from typing import Literal
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cts_common as cts

SIZES = {  # Qwen3-style
    "nano": dict(vocab_size=512, rope_theta=1e6),
    "small": dict(
        vocab_size=4096, d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536, rope_theta=1e6
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = "nano"
    """nano, small, or the folder of a checkpoint (its config.json is read, its weights are not)"""
    method: Literal["b3_grpo_verifier", "b5_cts"] = "b3_grpo_verifier"
    """the script to time"""
    prompts: int = 8
    """prompts per step"""
    group: int = 8
    """completions per prompt"""
    prompt_tokens: int = 64
    """tokens of every prompt"""
    new_tokens: int = 128
    """tokens of every completion; b5's y0 and y1 have as many"""
    micro_batch: int = 0
    """prompts per micro-batch; 0 = the script's own choice"""
    warmup: int = 2
    """steps before those that count"""
    steps: int = 6
    """steps that count"""


class Finished(Exception):
    """Raised where the script would evaluate: the steps are done."""


class Numbers:
    """Stands in for a tokenizer: token i is the word ti; the end token is none of the model's."""

    def __init__(self, vocab_size: int):
        self.pad_id, self.eos_id, self.eos_ids, self.vocab_size = 0, vocab_size, (vocab_size,), vocab_size
        self.prompt_prefix, self.prompt_suffix = [], []

    def sha256(self) -> str:
        return cts.sha256(str(self.vocab_size))

    def decode(self, ids_MT) -> list[str]:
        return [" ".join(f"t{i}" for i in ids) for ids in ids_MT]


def trajectories(rng, B: int, P: int, T: int, vocab: int) -> dict[str, np.ndarray]:
    """b5's part of a batch: y0 and y1 of full length in eight steps each, a critique over a quarter of the prompt."""
    J = cts.MAX_STEPS
    n_steps = min(8, T, J)
    steps_BJT = np.zeros((B, J, T), np.float32)
    for j, of_step in enumerate(np.array_split(np.arange(T), n_steps)):
        steps_BJT[:, j, of_step] = 1.0
    mask_BJ, overlap_BJ = (steps_BJT.sum(-1) > 0).astype(np.float32), np.zeros((B, J), np.float32)
    overlap_BJ[:, n_steps // 2] = 1.0
    f_tokens = np.zeros((B, 1, P), np.float32)
    f_tokens[..., -max(1, P // 4) :] = 1.0
    ids = lambda n: rng.integers(3, vocab, (B, n)).astype(np.int32)
    return {
        "attempt_prompt": ids(P), "attempt_prompt_len": np.full(B, P, np.int32), "y0": ids(T), "y1": ids(T),
        "f_tokens": f_tokens,
        "y0_steps": steps_BJT, "y1_steps": steps_BJT, "y0_mask": mask_BJ, "y1_mask": mask_BJ, "flagged": overlap_BJ,
        "decode_weight": np.full((B, T), 1 / (B * T), np.float32), "wrong_weight": np.full(B, 1 / B, np.float32),
    }  # fmt: skip


def model_flops(cfg: cts.ModelConfig, args: Args) -> tuple[float, float]:
    """Model FLOPs of one rollout and of one b3 update, the prompt counted once per group and nothing for recomputation:
    2 per weight and token forward, 6 forward and backward, and as many times the multiply-adds of causal attention."""
    heads = cfg.n_heads * cfg.head_dim
    block = cfg.d_model * (2 * heads + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.d_ff)
    B, M, P, T = args.prompts, args.prompts * args.group, args.prompt_tokens, args.new_tokens
    weights = (B * P + M * T) * cfg.n_layers * block + M * T * cfg.vocab_size * cfg.d_model
    attention = cfg.n_layers * 2 * heads * (B * P * P / 2 + M * T * (P + T / 2))
    return 2.0 * (weights + attention), 6.0 * (weights + attention)


def matmul_ceiling(dtype, n: int = 2048) -> float:
    """FLOP/s of one n x n x n matmul, the median of ten."""
    a = jnp.ones((n, n), dtype)
    f, seconds = jax.jit(lambda a: a @ a), []
    jax.block_until_ready(f(a))
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(f(a))
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / float(np.median(seconds))


def in_place(vocab: int, B: int, P: int, T: int) -> dict:
    """What stands in for the script's data and evaluation: {name in cts_common: replacement}."""
    meta = {"task_id": "random", "domain": "math", "answer": "0", "horizon": 1, "edit_distance": 0, "error_tags": [],
            "error_span": None}  # fmt: skip
    quads, rng = [cts.Quadruple("x", "y0", "f", "y1", meta)] * (4 * B), np.random.default_rng(0)
    return {
        "load_replay": lambda *_: dict.fromkeys(("train", "val", "test"), quads),
        "fixed_shapes": lambda *_: {"P_attempt": P, "P_revise": P, "T": T, "T_replay": T},
        "base_report": lambda *_: {"precheck": {}, "summary": {}},
        "print_precheck": lambda *_: None,
        "pack_revise": lambda *_: {
            "prompt": rng.integers(3, vocab, (B, P)).astype(np.int32), "prompt_len": np.full(B, P, np.int32)
        },
        "pack_trajectories": lambda *_: trajectories(rng, B, P, T, vocab),
        "outcome_scores": lambda texts, quads: np.array([t.count("7") for t in texts], np.float32).reshape(B, -1),
        "process_scores": lambda texts, quads: np.zeros((B, len(texts) // B), np.float32),
    }  # fmt: skip


@contextlib.contextmanager
def placed(places: dict, folder: str):
    """`places` in cts_common, no evaluation, and no compiled program from before."""

    def stop(*_):
        raise Finished

    with (
        mock.patch.multiple(cts, **places),
        mock.patch.multiple(cts.Evaluator, attempt_logp=lambda *_: ([], []), __call__=stop),
        mock.patch.dict(os.environ, {"JAX_COMPILATION_CACHE_DIR": folder}),
    ):
        yield


def config_of(model: str) -> cts.ModelConfig:
    """The decoder's shape of `--model`; InputError if there is none of that name."""
    if model not in SIZES and not pathlib.Path(model).is_dir():
        raise cts.InputError(f"--model {model}: choose nano, small or the folder of a checkpoint")
    return cts.ModelConfig(**SIZES[model]) if model in SIZES else cts.read_hf_config(pathlib.Path(model))


def measure(args: Args) -> dict:
    """Run the script's `main` on the work; returns the JSON line's content."""
    cts.check_args(args, ("prompts", "group", "prompt_tokens", "new_tokens", "steps"), ("micro_batch", "warmup"))
    cfg = config_of(args.model)
    script, clocks = importlib.import_module(args.method), []
    B, P, T = args.prompts, args.prompt_tokens, args.new_tokens

    def params_of(name, task, replay, out_dir, mesh):
        params = jax.jit(lambda: nnx.state(cts.Decoder(cfg, nnx.Rngs(0)), nnx.Param))()
        return cfg, cts.put(params, cts.shard_rule(mesh, params)), Numbers(cfg.vocab_size), pathlib.Path(out_dir)

    class Clock(cts.StepClock):
        def __init__(self):
            super().__init__()
            clocks.append(self)

    places = in_place(cfg.vocab_size, B, P, T) | {"load_model": params_of, "StepClock": Clock}
    with tempfile.TemporaryDirectory() as folder, placed(places, folder):
        flags = dict(steps=args.warmup + args.steps, save_every=0, wandb="disabled", temperature=1.0, truncated="keep")
        try:
            script.main(script.Args(prompts=B, group=args.group, micro_batch=args.micro_batch, out_dir=folder, **flags))
        except Finished:
            (clock,) = clocks
    times = {name: float(np.median(t[args.warmup :])) for name, t in clock.times.items()}
    first = sum(clock.times["step"][: args.warmup]) - args.warmup * times["step"]
    dtype = cts.pick_dtype("auto")
    ceiling, (rollout_flops, update_flops) = matmul_ceiling(dtype), model_flops(cfg, args)
    return {
        "engine": "cts", "size": args.model, "method": args.method, "prompts": B, "group": args.group,
        "prompt_tokens": P, "new_tokens": T, "dtype": jnp.dtype(dtype).name, "device": jax.devices()[0].device_kind,
        "gen_tok_s": B * args.group * T / times["rollout"],
        "train_tok_s": B * args.group * (P + T) / times["update"],  # each completion with its prompt, as peers count
        "step_s": times["step"], "rollout_s": times["rollout"], "score_s": times["score"], "update_s": times["update"],
        "compile_s": max(0.0, first),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rollout_mfu": rollout_flops / times["rollout"] / ceiling,
        "update_mfu": update_flops / times["update"] / ceiling,
        "ceiling_gflop_s": ceiling / 1e9,
        "step_all_s": [round(t, 4) for t in clock.times["step"]],
    }  # fmt: skip


def main(args: Args) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what the script prints is no part of the answer
    line = json.dumps(measure(args))
    print(line, file=out, flush=True)


if __name__ == "__main__":
    cts.cli(main, Args)
