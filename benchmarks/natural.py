"""GRPO on real work: a real checkpoint, real revise prompts of GSM8K, completions that end where the model ends them.

    python benchmarks/natural.py --model DIR
    python benchmarks/natural.py --model DIR --peer "PYTHON SCRIPT"

It is b2's own `main` that runs, with its data, model, sampler, verifier and update; only evaluation is left out. Prints
one JSON line: seconds of a step, of its rollout and of its update (medians over the counted steps in which nothing was
compiled), the tokens that were sampled and how many completions were cut, so that nobody wins by stopping early, and
peak memory.

--peer is another engine's script, which is given --model, --prompts_file (the same prompts, in the same order),
--prompts, --group, --new_tokens, --steps, --warmup and --reward, and prints such a line too, with `step_s`, `rollout_s`
and `peak_rss_mb`. Both run one after the other with each reward, and the last lines are the ratios. The one that counts
is of `digits`, the share of digits among a completion's characters: it gives every group a spread. With `answer`, which
is real, nearly all groups of a small model are dead, and whoever leaves them out wins by computing nothing.
"""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Literal
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import paired
import workload as wl

import b2_grpo
import cts_common as cts
from common.basics import TRACES
from common.report import peak_memory

REWARDS = ("digits", "answer")


@dataclasses.dataclass(frozen=True)
class Args:
    model: str
    """checkpoint: folder or hub id"""
    data_dir: str | None = None
    """folder with GSM8K's train.jsonl and test.jsonl; none = the hub"""
    replay: str | None = None
    """folder with the quadruples whose prompts are used; none = the perturb teacher's"""
    prompts: int = 4
    """prompts per step"""
    group: int = 4
    """completions per prompt"""
    new_tokens: int = 128
    """longest completion, in tokens"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    warmup: int = 1
    """steps before those that count"""
    steps: int = 4
    """steps that count"""
    reward: Literal["digits", "answer"] = "digits"
    """share of digits in a completion, or the verifier's"""
    peer: str = ""
    """command of another engine's script, to be run on the same prompts; its rewards are all that --reward can be"""
    prompts_file: str | None = None
    """where the prompts of all steps are written, one JSON object a line; none = nowhere"""


def digits(texts: list[str], quads) -> np.ndarray:
    """Share of digits among each completion's characters [B, G]."""
    shares = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]
    return np.array(shares, np.float32).reshape(len(quads), -1)


def run_b2(args: Args, folder: str) -> dict:
    """b2's `main` for `warmup` + `steps` steps; its figures."""
    seen, traced, outcome_scores = [], [], cts.outcome_scores

    class Watch(wl.Stopwatch):
        def start(self):
            traced.append(sum(TRACES.values()))
            super().start()

    def scores(texts, quads):
        right_BG = outcome_scores(texts, quads)
        reward_BG = digits(texts, quads) if args.reward == "digits" else right_BG
        spread_B = reward_BG.max(1) > reward_BG.min(1)
        prompts = [{"prompt": cts.revise_prompt(q.x, q.y0, q.f), "answer": str(q.meta["answer"])} for q in quads]
        seen.append({"right": right_BG.mean(), "alive": spread_B.mean(), "prompts": prompts})
        return reward_BG

    def lengths(out, *_):
        seen[-1] |= {"tokens": out["len_M"].sum(), "cut": out["truncated_M"].mean()}
        return {}

    watch = Watch()
    the_end = lambda policy: watch.start()  # in place of an evaluation: the last step has ended
    flags = dict(task="gsm8k", model=args.model, data_dir=args.data_dir, replay=args.replay, dtype=args.dtype)
    flags |= dict(prompts=args.prompts, group=args.group, max_new_tokens=args.new_tokens, temperature=1.0)
    flags |= dict(steps=args.warmup + args.steps, learning_rate=1e-6, save_every=0, wandb="disabled", out_dir=folder)
    instead = dict(StepClock=paired.clock_of(watch), Evaluator=lambda *_: the_end)
    instead |= dict(base_report=lambda *_: {"precheck": {}, "summary": {}}, summarize=lambda *_: {})
    instead |= dict(outcome_scores=scores, rollout_metrics=lengths)
    with (
        mock.patch.multiple(cts, **instead),
        mock.patch.object(cts.Run, "finish", lambda *_: {}),
        contextlib.redirect_stdout(sys.stderr),  # what the script prints is no part of the answer
    ):
        b2_grpo.main(b2_grpo.Args(**flags))
    counted = [i for i in range(args.warmup, len(seen)) if traced[i] == traced[i + 1]] or [len(seen) - 1]
    if args.prompts_file:
        lines = [json.dumps(prompt) + "\n" for step in seen for prompt in step["prompts"]]
        pathlib.Path(args.prompts_file).write_text("".join(lines), encoding="utf-8")
    mean = lambda name: float(np.mean([seen[i][name] for i in counted]))
    wall = {part: np.array(rows)[counted, 0] for part, rows in watch.rows.items()}
    others = np.array(watch.rows["step"])[counted, 2] / wall["step"]
    return {
        **{f"{part}_s": round(float(np.median(t)), 2) for part, t in wall.items()},
        "all_steps": [round(float(t), 2) for t in np.array(watch.rows["step"])[:, 0]],
        "steps_used": len(counted), "completion_tokens": round(mean("tokens")), "accuracy": round(mean("right"), 3),
        "cut": round(mean("cut"), 3), "alive": round(mean("alive"), 3), "peak_memory_mib": peak_memory(),
        "others_cores": round(float(others.mean()), 2),
    }  # fmt: skip


def ours(args: Args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        line = {"engine": "cts", "work": "natural", **dataclasses.asdict(args), **run_b2(args, folder)}
    line["device"] = jax.devices()[0].device_kind
    return {k: v for k, v in line.items() if k not in ("data_dir", "replay", "peer", "prompts_file")}


def in_turn(args: Args) -> None:
    """Both engines with each reward, each in a process of its own; their lines, then the ratios."""

    def run(command: list[str]) -> dict:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode or not done.stdout.strip():
            raise cts.InputError(f"{shlex.join(command)}: ended with status {done.returncode}, see above")
        print(done.stdout.strip().splitlines()[-1], flush=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for reward in REWARDS:
            same = {k: getattr(args, k) for k in ("model", "prompts", "group", "new_tokens", "warmup", "steps")}
            same |= {"reward": reward, "prompts_file": f"{folder}/prompts.jsonl"}
            own = same | {"dtype": args.dtype} | {k: v for k in ("data_dir", "replay") if (v := getattr(args, k))}
            line = lambda flags: [text for k, v in flags.items() for text in (f"--{k}", str(v))]
            here, there = run([sys.executable, __file__, *line(own)]), run([*shlex.split(args.peer), *line(same)])
            ratio = {part: round(there[f"{part}_s"] / here[f"{part}_s"], 2) for part in ("step", "rollout")}
            memory = round(here["peak_memory_mib"]["host"] / there["peak_rss_mb"], 3)
            ratios.append({"reward": reward, "alive": here["alive"], "times_as_fast": ratio, "memory": memory})
    for line in ratios:
        print(json.dumps(line), flush=True)


def main(args: Args) -> None:
    cts.check_args(args, "new_tokens")
    in_turn(args) if args.peer else print(json.dumps(ours(args)), flush=True)


if __name__ == "__main__":
    cts.cli(main, Args)
