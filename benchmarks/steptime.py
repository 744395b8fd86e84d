"""Seconds of a step of b3 on accelerators, term by term, from shapes and the table that lays the weights out; and how far
the compiled programs bear it out. Nothing of it is measured: it says what bounds a step and which mesh to try first.

    python benchmarks/steptime.py                                    the tables of docs/performance.md
    python benchmarks/steptime.py --model qwen2.5-7b --chip v5p --mesh 8,2
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/steptime.py --check

`--check` compiles b3's own sampler and update on meshes of eight devices and compares FLOPs and what is exchanged between
devices with XLA's own programs: collectives are read from their HLO, those in a loop as often as it runs.
"""

import collections
import dataclasses
import math
import re
import sys

import jax
import memory
import paired

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a chip: bfloat16 FLOP/s, bytes/s of its memory, and bytes/s that leave it in a ring over one axis."""

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
    chip: str = "H100"
    """H100, v5e, v5p or v6e"""
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


@dataclasses.dataclass(frozen=True)
class Counts:
    """FLOPs, bytes read and bytes sent on one device in one step, by term; `ring` are bytes that pass a device's link."""

    flops: dict[str, float]
    read: dict[str, float]
    ring: dict[str, float]
    hops: dict[str, float]


def count(cfg: cts.ModelConfig, data: int, model: int, work, width: int, micro: int = 1) -> Counts:
    """What one device does. `work`: prompts (of all devices), group, prompt_tokens, new_tokens; `width`: bytes of a number
    in the compute dtype; `micro`: micro-batches of an update.

    Multiply-adds count 2 FLOPs. With remat the forward pass is computed twice; the head's is always.
    """
    L, D, V, H = cfg.n_layers, cfg.d_model, cfg.vocab_size, cfg.head_dim
    cut = lambda n: n / model if n % model == 0 else n
    N, K, F = cut(cfg.n_heads), cut(cfg.n_kv_heads), cut(cfg.d_ff)
    layer = D * (2 * N * H + 2 * K * H + 3 * F)  # weights of a layer on a device, data axis gathered
    head, G, P, T = cut(V) * D, work.group, work.prompt_tokens, work.new_tokens
    b, R = work.prompts / data, work.prompts * work.group / data
    whole = L * layer + head * (1 if cfg.tie_embeddings else 2)
    seen = b * P * P / 2 + R * T * (P + T / 2)  # pairs of a query and a key
    scores = 4 * L * N * H * seen
    passes = 8 if cfg.remat else 6
    exchange = 2 * (model - 1) / model * D * width  # of one token, summed over the model axis
    tokens = b * P + R * T
    gathered = 4 * whole * (data - 1) / data  # float32, a ring's worth
    return Counts(
        flops={
            "prefill": 2 * L * layer * b * P + 4 * L * N * H * b * P * P / 2,
            "decode": T * (2 * (L * layer + head) * R + 4 * L * N * H * R * (P + T / 2)),
            "update": passes * L * layer * tokens + passes / 2 * scores + 8 * head * R * T,
        },
        read={
            "decode": T * ((L * layer + head) + 2 * L * K * H * (b * P + R * T)) * width,
            "optimizer": 7 * 4 * whole / data,  # weights and moments read and written, the gradient read
        },
        ring={
            "gather for sampling": gathered,
            "decode": T * 2 * L * R * exchange,
            "gather and reduce in the update": micro * 3 * gathered,  # weights forward and backward, gradients
            "update, model axis": (passes / 2 + 2) * L * tokens * exchange if model > 1 else 0.0,
        },
        hops={"decode": T * (2 * L + 9) if model > 1 else 0},
    )


def seconds(cfg: cts.ModelConfig, chip: Chip, data: int, model: int, work, width: int = 2) -> dict[str, float]:
    """{term: seconds} of one step. Terms are added, as if nothing ran beside anything else, but for reading and computing
    of one decoding step, of which the longer counts."""
    c = count(cfg, data, model, work, width)
    compute = {name: flops / (chip.flops * MATMUL) for name, flops in c.flops.items()}
    ring = {name: sent / (chip.ring * LINK) for name, sent in c.ring.items()}
    reading = {name: size / (chip.memory * READING) for name, size in c.read.items()}
    return {
        "gather": ring["gather for sampling"], "prefill": compute["prefill"],
        "decode: read or compute": max(reading["decode"], compute["decode"]),
        "decode: calls": work.new_tokens * cfg.n_layers * CALLS * chip.call_s,
        "decode: exchange": ring["decode"] + HOP_S * c.hops["decode"],
        "update: compute": compute["update"],
        "update: exchange": ring["gather and reduce in the update"] + ring["update, model axis"],
        "optimizer": reading["optimizer"],
    }  # fmt: skip


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
            for kind, callee in re.findall(r"(body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
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
    return [(*one, bodies[name]) for name, all_of in found.items() if name in bodies for one in all_of]


def sent(found, data: int, model: int) -> float:
    """Bytes that pass a device's link: of an all-reduce twice its result, less a device's share."""
    factor = {"all-reduce": 2.0, "reduce-scatter": 1.0}
    return sum(factor.get(kind, 1.0) * size * times for kind, size, _, (times, _) in found)


def main(args: Args) -> None:
    raise SystemExit


if __name__ == "__main__":
    cts.cli(main, Args)
