"""How a step's cost grows with prompts, prompt and completion length and model size: paired.py over a small grid.

    python benchmarks/scaling.py --out docs/scaling.png         (5 to 15 minutes on 2 CPU cores)

Every point is a process of its own, on an otherwise idle machine; the JSON lines go to stdout, the plot to --out.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cts_common as cts

WIDTHS = {15 * d * d * layers / 1e6: f"{d}x{layers}" for d, layers in ((64, 2), (128, 4), (256, 6), (384, 8))}
GRID = {  # axis of a panel: (flag, {position: value}); all else is the default of paired.py
    "prompts per step (8 completions each)": ("prompts", {n: n for n in (2, 4, 8, 16)}),
    "prompt tokens": ("prompt_tokens", {n: n for n in (64, 256, 512, 1024)}),
    "new tokens": ("new_tokens", {n: n for n in (32, 64, 128, 256)}),
    # of a block: q, o: d^2 each, k, v: d^2 / 2, MLP: 12 d^2
    "million parameters in blocks (with remat)": ("size", WIDTHS),
}
PARTS = ("step", "update", "rollout")


@dataclasses.dataclass(frozen=True)
class Args:
    out: str = "scaling.png"
    """file of the plot"""
    task: Literal["grpo", "cts"] = "grpo"
    """what a step does: b3's or b5's"""
    steps: int = 3
    """steps that count, of each point"""


def point(args: Args, flag: str, value) -> dict[str, float]:
    """Seconds of a step and of its parts at one value of one flag; prints paired.py's line."""
    paired = pathlib.Path(__file__).with_name("paired.py")
    flags = [f"--task={args.task}", f"--steps={args.steps}", "--warmup=1", f"--{flag}={value}"]
    done = subprocess.run([sys.executable, str(paired), *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise cts.InputError(f"paired.py --{flag}={value} failed: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout.strip(), flush=True)
    return {part: times["median"] for part, times in json.loads(done.stdout)["wall_s"].items()}


def draw(panels: dict[str, dict[float, dict]], title: str, out: str) -> None:
    """One panel per axis, {its name: {position: seconds}}, with a dashed line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.8), sharey=True)
    for axis, (name, found) in zip(axes, panels.items()):
        x = list(found)
        for part in PARTS:
            axis.plot(x, [times[part] for times in found.values()], marker="o", label=part)
        axis.plot(x, [found[x[0]]["step"] * at / x[0] for at in x], "--", color="grey", label="proportional")
        axis.set(xlabel=name, xscale="log", yscale="log")
        axis.set_xticks(x, [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in x])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[-1].legend(loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main(args: Args) -> None:
    if not (pathlib.Path(args.out).absolute().parent.is_dir() and args.out.endswith((".png", ".svg", ".pdf"))):
        raise cts.InputError(f"--out {args.out}: must be a .png, .svg or .pdf file in a folder that is there")
    points = lambda flag, values: {at: point(args, flag, value) for at, value in values.items()}
    panels = {name: points(*axis) for name, axis in GRID.items()}
    title = f"{args.task}: nano, 8 prompts of 64 tokens x 8 completions of 128, where not said otherwise"
    draw(panels, title, args.out)


if __name__ == "__main__":
    cts.cli(main, Args)
