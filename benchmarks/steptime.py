"""Seconds of a step of b3 on accelerators, term by term, from shapes and the table that lays the weights out; and how
far the compiled programs bear it out. Nothing of it is measured: it says what bounds a step, and which mesh to try.

    python benchmarks/steptime.py                                    the tables of docs/performance.md
    python benchmarks/steptime.py --model qwen2.5-7b --chip v5p --mesh 8,2
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/steptime.py --check

`--check` compiles b3's own sampler and update on meshes of eight devices and compares FLOPs and what is exchanged
between devices with XLA's own programs: collectives are read from their HLO, those in a loop as often as it runs.
"""

import collections
import dataclasses
import math
import re
from typing import Literal

import jax
import memory
import paired

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a chip: bfloat16 FLOP/s, bytes/s of its memory, and bytes/s that leave it in a ring of one axis."""

    flops: float
    memory: float
    ring: float
    call_s: float  # what one operation of a decoding step takes beyond its bytes: launch, or the gap between two


# NVIDIA's data sheet of the H100 SXM; https://jax-ml.github.io/scaling-book/tpus for the others (both ways of one axis)
CHIPS = {
    "H100": Chip(989e12, 3.35e12, 450e9, 2e-6), "v5e": Chip(197e12, 0.81e12, 90e9, 0.5e-6),
    "v5p": Chip(459e12, 2.8e12, 180e9, 0.5e-6), "v6e": Chip(920e12, 1.6e12, 180e9, 0.5e-6),
}  # fmt: skip
MATMUL, READING, LINK = 0.5, 0.7, 0.7  # shares of those rates that are reached
HOP_S = 5e-6  # what a collective takes beyond its bytes
CALLS = 14  # operations of a layer in a decoding step, as fused
TARGETS = [("qwen2.5-1.5b", "H100", mesh) for mesh in ("8,1", "4,2")] + [
    ("qwen2.5-1.5b", "v5e", mesh) for mesh in ("16,1", "8,2", "4,4")
]


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = ""
    """a name of memory.py's table; none = the tables of the documentation"""
    chip: Literal["H100", "v5e", "v5p", "v6e"] = "H100"
    """whose peak rates are taken"""
    mesh: str = "8,1"
    """DATA,MODEL"""
    prompts: int = 64
    """prompts of a step, on all devices"""
    group: int = 8
    """completions per prompt"""
    prompt_tokens: int = 512
    """prompt, in tokens"""
    new_tokens: int = 512
    """completion, in tokens"""
    check: bool = False
    """compile small models on eight devices and compare"""


# ---- from shapes ----------------------------------------------------------------------------------------------------
def shares(cfg: cts.ModelConfig, data: int, model: int, work) -> dict[str, float]:
    """What one device has of a step: heads, weights of a `layer` and of the `head`, prompts `b`, `rows` of completions
    and `tokens` of both. `work`: prompts of all devices, group, prompt_tokens, new_tokens."""
    cut = lambda n: n / model if n % model == 0 else n
    N, K, F = cut(cfg.n_heads), cut(cfg.n_kv_heads), cut(cfg.d_ff)
    b, R = work.prompts / data, work.prompts * work.group / data
    return {
        "N": N, "K": K, "layer": cfg.d_model * ((2 * N + 2 * K) * cfg.head_dim + 3 * F),
        "head": cut(cfg.vocab_size) * cfg.d_model, "b": b, "rows": R,
        "tokens": b * work.prompt_tokens + R * work.new_tokens,
    }  # fmt: skip


def flops(cfg: cts.ModelConfig, data: int, model: int, work) -> dict[str, float]:
    """FLOPs of one device, 2 for a multiply-add, by part of a step; of decoding those of one token of each row. An
    update computes forward (2), backward (4) and, with remat and for the head always, forward once more."""
    s, L, P, T = shares(cfg, data, model, work), cfg.n_layers, work.prompt_tokens, work.new_tokens
    attention = 4 * s["N"] * cfg.head_dim
    before, after = s["b"] * P * (P + 1) / 2, s["rows"] * T * (P + (T + 1) / 2)  # pairs of query and key
    passes = 4 if cfg.remat else 3
    return {
        "prefill": L * (2 * s["layer"] * s["b"] * P + attention * before),
        "token": L * (2 * s["layer"] * s["rows"] + attention * after / T) + 2 * s["head"] * s["rows"],
        "update": passes * L * (2 * s["layer"] * s["tokens"] + attention * (before + after)),
        "head": 4 * 2 * s["head"] * s["rows"] * T,
    }


def exchanged(cfg: cts.ModelConfig, data: int, model: int, work, width: int) -> dict[str, float]:
    """Bytes that leave a device in a ring, by what they are for; of decoding for one token. `width`: bytes of a number
    in the compute dtype. Weights and gradients are float32, the latter summed over the data axis for prompts and
    completions apart, the head's for every memory.CHUNK positions. The model axis sums activations: twice a layer
    forward, once when it is computed again, five times backward."""
    s, L = shares(cfg, data, model, work), cfg.n_layers
    over = lambda n: (n - 1) / n
    whole = L * s["layer"] + s["head"] * (1 if cfg.tie_embeddings else 2)
    one_token = 2 * over(model) * cfg.d_model * width
    chunks = -(-work.new_tokens // memory.CHUNK)
    return {
        "weights": over(data) * 4 * whole,
        "gradients": over(data) * 4 * (2 * L * s["layer"] + (chunks + 1) * s["head"]),
        "token": (2 * L + 1) * s["rows"] * one_token,
        "activations": (8 if cfg.remat else 7) * L * s["tokens"] * one_token,
    }


def seconds(cfg: cts.ModelConfig, chip: Chip, data: int, model: int, work, width: int = 2) -> dict[str, float]:
    """{term: seconds} of one step. Terms are added, as if nothing ran beside anything else, but for reading and
    computing in decoding, of which the longer counts."""
    s, L, T = shares(cfg, data, model, work), cfg.n_layers, work.new_tokens
    compute = {name: n / (chip.flops * MATMUL) for name, n in flops(cfg, data, model, work).items()}
    ring = {name: n / (chip.ring * LINK) for name, n in exchanged(cfg, data, model, work, width).items()}
    keys = 2 * L * s["K"] * cfg.head_dim * (s["b"] * work.prompt_tokens + s["rows"] * T)
    read = width * (L * s["layer"] + s["head"] + keys) / (chip.memory * READING)
    weights = 4 * (L * s["layer"] + s["head"]) / data
    hops = (2 * L + 9) * HOP_S if model > 1 else 0.0
    return {
        "gather for sampling": ring["weights"], "prefill": compute["prefill"],
        "decode: read, compute": T * max(read, compute["token"]), "decode: calls": T * L * CALLS * chip.call_s,
        "decode: exchange": T * (ring["token"] + hops), "update: compute": compute["update"] + compute["head"],
        "update: weights, gradients": ring["weights"] + ring["gradients"], "update: activations": ring["activations"],
        "optimizer": 7 * weights / (chip.memory * READING),  # weights, moments: read and written; the gradient read
    }  # fmt: skip


def table(targets, work) -> list[str]:
    """Markdown: a row for every term, a column for every target (model, chip, mesh)."""
    columns = [
        seconds(memory.MODELS[name], CHIPS[chip], *map(int, mesh.split(",")), work) for name, chip, mesh in targets
    ]
    cells = lambda values: " | ".join(f"{v:.2f}" for v in values)
    yield "| seconds of a step | " + " | ".join(f"{chip} `{mesh}`" for _, chip, mesh in targets) + " |"
    yield "|---" * (len(targets) + 1) + "|"
    yield from (f"| {term} | {cells(c[term] for c in columns)} |" for term in columns[0])
    yield f"| **in all** | {cells(sum(c.values()) for c in columns)} |"


# ---- what XLA says --------------------------------------------------------------------------------------------------
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?op_name=\"([^\"]*)\""
)
SHAPE, WIDTHS = re.compile(r"\b(f32|bf16|s32|u32|pred)\[([\d,]*)\]"), {"bf16": 2, "pred": 1}


def collectives(hlo: str) -> list[tuple[str, int, int, str, bool]]:
    """(kind, bytes of its result, times it runs, name of the operation, whether in a loop of unknown length) of every
    collective of a compiled program. A loop of unknown length counts once: it is the decoding of one token."""
    bodies, calls, found, name = {}, collections.defaultdict(list), collections.defaultdict(list), ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{", line):
            name = head[1]
            if line.startswith("ENTRY"):
                bodies[name] = (1, False)
        elif line.startswith("  "):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            times = int(trips[1]) if trips else 1
            for kind, callee in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                calls[name].append((callee, times, kind == "body" and not trips))
            if hit := COLLECTIVE.search(line):
                size = sum(
                    WIDTHS.get(kind, 4) * math.prod(map(int, filter(None, shape.split(","))))
                    for kind, shape in SHAPE.findall(hit[1])
                )
                found[name].append((hit[2], size, hit[3]))
    todo = list(bodies)
    while todo:
        name = todo.pop()
        for callee, times, open_ended in calls[name]:
            if callee not in bodies:
                bodies[callee] = (bodies[name][0] * times, bodies[name][1] or open_ended)
                todo.append(callee)
    return [(*one, *bodies[name]) for name, every in found.items() if name in bodies for one in every]


def check(size: str, mesh: str, prompts: int, group: int, P: int, T: int) -> dict[str, float]:
    """Predicted over XLA's: FLOPs of a device (of a loop's body once, as XLA counts) and bytes exchanged. An all-reduce
    does what a reduce-scatter and an all-gather do: it counts twice. And, where the vocabulary is whole, of how many of
    an update's tokens the logits are there at a time, as a share of all."""
    data, model = map(int, mesh.split(","))
    cfg = paired.config_of(size)
    work = Args(prompts=prompts, group=group, prompt_tokens=P, new_tokens=T)
    micro = dataclasses.replace(work, prompts=data)  # on CPUs one prompt a device
    found = memory.programs(size, mesh, prompts, group, P, T, dtype="float32")
    counted = {name: c.cost_analysis()["flops"] for name, c in found.items()}
    of, once, L = flops(cfg, data, model, work), flops(cfg, data, model, micro), cfg.n_layers
    assert cfg.remat, "the layers of an update are a loop"
    ring = exchanged(cfg, data, model, micro, 4)
    sent = {name: collections.Counter() for name in found}
    for name, program in found.items():
        for kind, size_, _, times, open_ended in collectives(program.as_text()):
            purpose = "token" if open_ended else "gather" if kind == "all-gather" else "sum"
            sent[name][purpose] += (2.0 if kind == "all-reduce" else 1.0) * size_ * times
    over = lambda n: (n - 1) / n
    sums = 2 * ring["gradients"] / over(data) + (ring["activations"] / over(model) if model > 1 else 0)
    ratios = {
        "rollout flops": (of["prefill"] / L + of["token"]) / counted["rollout"],
        "update flops": (once["update"] / L + once["head"] * min(1, memory.CHUNK / T)) / counted["add_grads"],
        "gathered in a rollout": ring["weights"] / over(data) / sent["rollout"]["gather"],
        "gathered in an update": ring["weights"] / over(data) / sent["add_grads"]["gather"],
        "summed in an update": sums / sent["add_grads"]["sum"],
    }
    if model == 1:  # a vocabulary that is cut may be as wide as the model
        shapes = {tuple(map(int, s.split(","))) for _, s in SHAPE.findall(found["add_grads"].as_text()) if s}
        head = (cfg.d_model, cfg.vocab_size)
        rows = max(math.prod(shape[:-1]) for shape in shapes if shape[-1] == cfg.vocab_size and shape != head)
        ratios["logits at a time"] = rows / (group * T)
    token = exchanged(cfg, data, model, work, 4)["token"] / over(model) if model > 1 else 0
    return ratios | ({"exchanged for a token": token / sent["rollout"]["token"]} if model > 1 else {})


def main(args: Args) -> None:
    if args.check:
        if len(jax.devices()) != 8:
            raise cts.InputError("--check: needs eight devices, which XLA_FLAGS can simulate (see the docstring)")
        print("model, mesh, prompts, group, P, T: predicted over XLA's")
        for case in memory.CHECKED:
            print(*case, {name: round(ratio, 2) for name, ratio in check(*case).items()}, flush=True)
        return
    if args.model and args.model not in memory.MODELS:
        raise cts.InputError(f"--model {args.model}: choose one of {', '.join(memory.MODELS)}")
    targets = [(args.model, args.chip, args.mesh)] if args.model else TARGETS
    print("\n".join(table(targets, args)))


if __name__ == "__main__":
    cts.cli(main, Args)
