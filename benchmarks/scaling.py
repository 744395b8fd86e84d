"""How a step's cost grows with prompts, prompt and completion length and model size: step_time.py over a small grid.

    python benchmarks/scaling.py --out docs/scaling.png         (5 to 15 minutes on 2 CPU cores)

Every point is a process of its own, on an otherwise idle machine; the JSON lines go to stdout, the plot to --out.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cts_common as cts

HERE = pathlib.Path(__file__).resolve().parent
GRID = {  # axis of a panel: (flag, values); all else is the default of step_time.py
    "prompts per step (8 completions each)": ("prompts", (2, 4, 8, 16)),
    "prompt tokens": ("prompt_tokens", (64, 256, 512, 1024)),
    "new tokens": ("new_tokens", (32, 64, 128, 256)),
}
WIDTHS = ((64, 2), (128, 4), (256, 6), (384, 8))  # d_model, layers


@dataclasses.dataclass(frozen=True)
class Args:
    out: str = "scaling.png"
    """file of the plot"""
    method: str = "b3_grpo_verifier"
    """the script to time: b3_grpo_verifier or b5_cts"""
    steps: int = 3
    """steps that count, of each point"""


def checkpoint_config(folder: str, d_model: int, layers: int) -> str:
    """A folder with the config.json of a Qwen3-shaped model of this size; returns it."""
    path = pathlib.Path(folder) / f"{d_model}x{layers}"
    path.mkdir()
    config = dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=d_model, intermediate_size=4 * d_model,
        num_hidden_layers=layers, num_attention_heads=d_model // 32, num_key_value_heads=d_model // 64, head_dim=32,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, vocab_size=512,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def point(args: Args, flag: str, value) -> dict:
    """step_time.py's JSON line at one value of one flag."""
    command = [sys.executable, str(HERE / "step_time.py"), f"--method={args.method}", f"--steps={args.steps}"]
    done = subprocess.run([*command, "--warmup=1", f"--{flag}={value}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise cts.InputError(f"step_time.py --{flag}={value} failed: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def draw(panels: list[tuple[str, list[float], list[dict]]], title: str, out: str) -> None:
    """One panel per axis (its name, its values, their JSON lines) with a dashed line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.8), sharey=True)
    for axis, (name, x, lines) in zip(axes, panels):
        for part in ("step", "update", "rollout"):
            axis.plot(x, [line[f"{part}_s"] for line in lines], marker="o", label=part)
        axis.plot(x, [lines[0]["step_s"] * value / x[0] for value in x], "--", color="grey", label="proportional")
        axis.set(xlabel=name, xscale="log", yscale="log")
        axis.set_xticks(x, [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in x])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    seconds = [line[f"{part}_s"] for _, _, lines in panels for line in lines for part in ("step", "update", "rollout")]
    axes[0].set(ylabel="seconds", ylim=(min(seconds) / 2, max(seconds) * 2))
    axes[-1].legend(loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main(args: Args) -> None:
    if not pathlib.Path(args.out).absolute().parent.is_dir():
        raise cts.InputError(f"--out {args.out}: there is no such folder")
    if not args.out.endswith((".png", ".svg", ".pdf")):
        raise cts.InputError(f"--out {args.out}: must end in .png, .svg or .pdf")
    panels = [(name, values, [point(args, flag, value) for value in values]) for name, (flag, values) in GRID.items()]
    with tempfile.TemporaryDirectory() as folder:
        lines = [point(args, "model", checkpoint_config(folder, *width)) for width in WIDTHS]
    parameters = [layers * 15 * d * d / 1e6 for d, layers in WIDTHS]  # q, o: d^2 each, k, v: d^2 / 2, MLP: 12 d^2
    panels.append(("million parameters in blocks", parameters, lines))
    title = f"{args.method}: nano, 8 prompts of 64 tokens x 8 completions of 128, where not said otherwise"
    draw(panels, title, args.out)


if __name__ == "__main__":
    cts.cli(main, Args)
