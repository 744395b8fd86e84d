"""Memory a device needs for a step of b3, from shapes alone, by part; and how far XLA agrees.

    python benchmarks/memory.py                                      the table of docs/scale.md
    python benchmarks/memory.py --model qwen2.5-7b --mesh 8,1        one line, by part
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/memory.py --check

`--check` compiles b3's own sampler and update for small models on meshes of eight devices, and prints what XLA's memory
analysis says of the compiled programs beside the prediction.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import paired
from flax import nnx
from jax.sharding import AbstractMesh

import cts_common as cts

shape = lambda V, D, L, N, K, H, F, tie, bias=True, qk=False: cts.ModelConfig(
    V, D, L, N, K, H, F, qkv_bias=bias, qk_norm=qk, tie_embeddings=tie, remat=True
)
MODELS = {
    "qwen2.5-0.5b": shape(151936, 896, 24, 14, 2, 64, 4864, True),
    "qwen2.5-1.5b": shape(151936, 1536, 28, 12, 2, 128, 8960, True),
    "qwen2.5-7b": shape(152064, 3584, 28, 28, 4, 128, 18944, False),
    "llama-3.1-8b": shape(128256, 4096, 32, 32, 8, 128, 14336, False, bias=False),
    "qwen2.5-32b": shape(152064, 5120, 64, 40, 8, 128, 27648, False),
}
CHIPS = {"v5e": 16, "v6e": 32, "H100": 80, "v5p": 95}  # GB of a chip
SPARE = 0.9  # of it is there for a program
CHUNK = inspect.signature(cts.token_logp).parameters["chunk"].default  # positions whose logits are there at a time
MESHES = {1: ["1,1"], 8: ["8,1", "4,2", "2,4"], 16: ["16,1", "8,2", "4,4"], 256: ["256,1", "64,4", "32,8"]}


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = ""
    """a name of the table; none = all of them"""
    mesh: str = ""
    """DATA,MODEL; none = those of the table"""
    prompts: int = 1
    """prompts of a micro-batch, for each device of the data axis"""
    group: int = 8
    """completions per prompt"""
    prompt_tokens: int = 512
    """longest prompt, in tokens"""
    new_tokens: int = 512
    """longest completion, in tokens"""
    kl_coef: float = 0.0
    """above 0 a copy of the base stays in memory"""
    check: bool = False
    """compile small models on eight devices and compare"""


# ---- from shapes ----------------------------------------------------------------------------------------------------
def shard_bytes(tree, mesh, **options) -> int:
    """Bytes of a tree on one device, laid out by the table that all scripts use."""
    layout = cts.shard_rule(mesh, tree, **options)
    sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, tree, layout)
    return sum(jax.tree.leaves(sizes))


def predict(cfg, data: int, model: int, work, width: int) -> dict[str, float]:
    """{part: bytes a device}. `work`: prompts of a micro-batch and device, group, prompt_tokens, new_tokens, kl_coef;
    `width`: bytes of a number in the compute dtype."""
    mesh = AbstractMesh((data, model), ("data", "model"))
    params = nnx.eval_shape(lambda: nnx.state(cts.Decoder(cfg, nnx.Rngs(0)), nnx.Param))
    weights, gathered = shard_bytes(params, mesh), shard_bytes(params, mesh, at_rest=False)
    b, G, P, T = work.prompts, work.group, work.prompt_tokens, work.new_tokens
    L, D, V = cfg.n_layers, cfg.d_model, cfg.vocab_size
    cut = lambda n: n / model if n % model == 0 else n
    N, K, F = cut(cfg.n_heads), cut(cfg.n_kv_heads), cut(cfg.d_ff)
    tokens = b * P + b * G * T
    one_layer = tokens * (4 * D + 3 * N * cfg.head_dim + 4 * K * cfg.head_dim + 4 * F) * width
    scores = 3 * 4 * N * (b * G * T * (T + P) + b * P * P)  # float32: scores, their exponentials, a gradient
    keeps = L * tokens * D * width + 2 * one_layer + scores if cfg.remat else L * (1.5 * one_layer + scores)
    logits = 3 * 4 * b * G * min(CHUNK, T) * cut(V)
    cache = 2 * L * K * cfg.head_dim * (b * P + b * G * T) * width
    apart = gathered if data > 1 else 0  # weights of all data devices, as far as XLA has them at a time
    return {
        "weights": weights, "moments": 2 * weights, "base": weights if work.kl_coef else 0, "gradients": 2 * weights,
        "gathered": apart, "activations": keeps, "logits": logits, "sampler": gathered * (1 + width / 4) + cache,
    }  # fmt: skip


def totals(parts: dict[str, float]) -> tuple[float, float]:
    """(bytes in an update, bytes in sampling): what is kept, and what either needs beside it."""
    kept = parts["weights"] + parts["moments"] + parts["base"]
    update = parts["gradients"] + parts["gathered"] + parts["activations"] + parts["logits"]
    return kept + update, kept + parts["sampler"]


# ---- what XLA says --------------------------------------------------------------------------------------------------
class Compiled(Exception):
    """All programs of a step have been seen."""


def programs(size: str, mesh: str, prompts: int, group: int, P: int, T: int, **flags) -> dict[str, jax.stages.Compiled]:
    """b3's own `rollout`, `add_grads` and `train_step`, compiled by its own `main`; `flags`: others of b3's."""
    found, real = {}, jax.jit

    def recording(f=None, **options):
        if f is None:
            return functools.partial(recording, **options)
        jitted = real(f, **options)
        if f.__name__ not in ("rollout", "add_grads", "train_step"):
            return jitted

        def call(*inputs):
            if f.__name__ not in found:
                found[f.__name__] = jitted.lower(*inputs).compile()
            if f.__name__ == "train_step":
                raise Compiled
            return found[f.__name__](*inputs)

        return call

    script = importlib.import_module("b3_grpo_verifier")
    work = paired.Args(size=size, prompts=prompts, group=group, prompt_tokens=P, new_tokens=T)
    every = paired.batches("grpo", paired.config_of(size).vocab_size, prompts, P, T)
    with tempfile.TemporaryDirectory() as folder:
        flags |= dict(prompts=prompts, group=group, mesh=mesh, out_dir=folder, wandb="disabled", steps=2, **paired.GRPO)
        with (
            mock.patch.multiple(cts, **paired.stand_ins(work, folder, prompts, P, T)),
            mock.patch.object(cts, "pack_revise", lambda *_: next(every)),
            mock.patch.object(jax, "jit", recording),
        ):
            try:
                script.main(script.Args(**flags))
            except Compiled:
                return found
    raise AssertionError("a step compiles all three")


def check(size: str, mesh: str, prompts: int, group: int, P: int, T: int) -> dict[str, float]:
    """Predicted bytes over XLA's, by program: arguments that stay (weights, moments), and temporaries."""
    data, model = map(int, mesh.split(","))
    cfg = paired.config_of(size)
    found = {name: c.memory_analysis() for name, c in programs(size, mesh, prompts, group, P, T).items()}
    # on CPUs a micro-batch is one prompt a device; the sampler takes all prompts at once
    parts = predict(cfg, data, model, Args(prompts=1, group=group, prompt_tokens=P, new_tokens=T), 4)
    alike = Args(prompts=prompts // data, group=group, prompt_tokens=P, new_tokens=T)
    sampler = predict(cfg, data, model, alike, 4)["sampler"]
    temporary = sum(parts[name] for name in ("gradients", "gathered", "activations", "logits"))
    kept = found["train_step"].argument_size_in_bytes  # with the gradient, which is a temporary of the update
    return {
        "state": (2 * parts["weights"] + parts["moments"]) / kept,
        "update": temporary / (found["add_grads"].temp_size_in_bytes + parts["weights"]),
        "sampling": sampler / found["rollout"].temp_size_in_bytes,
    }  # fmt: skip


CHECKED = [("256x6", mesh, 8, 4, 64, 64) for mesh in ("8,1", "4,2", "2,4")] + [("512x8", "4,2", 8, 4, 128, 128)]


def main(args: Args) -> None:
    if args.check:
        if len(jax.devices()) != 8:
            raise cts.InputError("--check: needs eight devices, which XLA_FLAGS can simulate (see the docstring)")
        print("model, mesh, prompts, group, P, T: predicted over XLA's")
        for case in CHECKED:
            print(*case, {name: round(ratio, 2) for name, ratio in check(*case).items()}, flush=True)
        return
    if args.model and args.model not in MODELS:
        raise cts.InputError(f"--model {args.model}: choose one of {', '.join(MODELS)}")
    print("| model | chips | mesh | GB update | GB sampling | fits |\n|---|---|---|---|---|---|")
    for name in [args.model] if args.model else MODELS:
        for chips, meshes in MESHES.items() if not args.mesh else {0: [args.mesh]}.items():
            for mesh in meshes:
                data, model = map(int, mesh.split(","))
                parts = predict(MODELS[name], data, model, args, 2)
                update, sampling = (total / 1e9 for total in totals(parts))
                room = {chip: SPARE * size for chip, size in CHIPS.items()}
                fits = ", ".join(c for c in room if max(update, sampling) <= room[c]) or "none"
                print(f"| {name} | {chips or data * model} | {mesh} | {update:.1f} | {sampling:.1f} | {fits} |")
                if args.model and args.mesh:
                    print({part: round(size / 1e9, 2) for part, size in parts.items()})


if __name__ == "__main__":
    cts.cli(main, Args)
