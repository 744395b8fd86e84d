"""What a run ends with: result.json, curves.png, the printed summary; when its process began. Used by run."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from typing import Any

import jax

from common.basics import TRACES
from common.fingerprint import run_fingerprint
from common.replay import replay_report
from common.results import SCHEMA_VERSION
from common.slips import KINDS


def seconds_since_start() -> float:
    """Wall time since this process began, its imports included; 0 where the system does not tell (it is no Linux)."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


PROCESS_START = time.time() - seconds_since_start()


def peak_memory() -> dict[str, float]:
    """MiB that this process has held at most, "host", and, where devices count theirs, its fullest one, "device"."""
    try:  # not of the process that started this one, whose peak ru_maxrss takes over
        peak = re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    kinds = {"host": (int(peak[1]) if peak else most) / 1024}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in counted for counted in stats):
        kinds["device"] = max(counted["peak_bytes_in_use"] for counted in stats) / 2**20
    return {kind: round(mib, 1) for kind, mib in kinds.items()}


def make_result(args, method: str, identity, counted, replay, base, records, final, timings) -> dict[str, Any]:
    """The content of result.json; `counted` are the budgets as they were spent, which complete the fingerprint."""
    return {
        "schema_version": SCHEMA_VERSION, "method": method, "args": dataclasses.asdict(args),
        "fingerprint": run_fingerprint(identity, counted),
        "replay": {split: replay_report(quads) for split, quads in replay.items()}, "precheck": base["precheck"],
        "base": base["summary"], "summary": final, "records": records, "traces": dict(TRACES), "timings": timings,
        "peak_memory_mib": peak_memory(), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what the result depends on, and the commit if this is a git checkout."""
    import platform
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ott-jax", "tokenizers", "numpy")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(), "device": jax.devices()[0].device_kind,
        "commit": git.stdout.strip() or "none", **{n: version(n) for n in names},
    }  # fmt: skip


def read_metrics(directory: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def plot_curves(directory: pathlib.Path, base: dict[str, Any], final: dict[str, Any]) -> None:
    """curves.png: accuracy of the samples (where nothing is sampled, the loss) over steps, and revised accuracy by
    horizon before and after training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(directory)
    sampled = "charts/accuracy" in rows[0]
    key = "charts/accuracy" if sampled else "losses/loss"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r], lw=1)
    left.set(xlabel="step", ylabel="accuracy of sampled revisions" if sampled else "loss", title="training")
    left.set_ylim(0, 1 if sampled else None)
    horizons = list(final["by_horizon"])
    for summary, label in ((base, "base"), (final, "trained")):
        right.plot(horizons, [summary["by_horizon"][h]["accuracy_revised"] for h in horizons], marker="o", label=label)
    right.set(
        xlabel="horizon (steps of the reference)", ylabel="revised accuracy", ylim=(0, 1), title="test split, greedy"
    )
    right.legend()
    figure.tight_layout()
    figure.savefig(directory / "curves.png", dpi=110)
    plt.close(figure)


def credit_lines(base: dict[str, Any], final: dict[str, Any]) -> list[str]:
    """What the measures of credit say, as far as there are any; errors are standard errors."""
    known, lines = lambda key: final[key] is not None, []
    figure = lambda key: f"{final[key]:+.3f}" + (f" \u00b1 {final[f'{key}_se']:.3f}" if known(f"{key}_se") else "")
    parts = []
    if known("credit_excess"):
        parts.append(f"AUC of the flagged step over its null {figure('credit_excess')}")
    if known("flip_gain"):
        parts.append(f"flip gain {figure('flip_gain')} nats")
    if parts:
        lines.append(f"credit, beyond the base at T {final['credit_temperature']:.2f}: {'; '.join(parts)}")
    if known("value_excess"):
        lines.append(
            f"rank correlation of steps' shifts with their drops in value, over its null {figure('value_excess')}"
        )
    if known("survival"):
        shares = lambda summary: " ".join(f"{100 * share:.0f}" for share in summary["survival"]["all"])
        lines.append(f"% of first attempts that hold for 1, 2, ... steps: base {shares(base)}, trained {shares(final)}")
    if known("attempt_kinds"):
        pairs = [(kind, base["attempt_kinds"][kind], final["attempt_kinds"][kind]) for kind in KINDS]
        changes = [f"{kind} {was:.3f} -> {now:.3f}" for kind, was, now in pairs if None not in (was, now)]
        lines.append(f"errors of first attempts, a step: {', '.join(changes)}")
    return lines


def print_summary(
    name: str, directory: pathlib.Path, result: dict, base: dict[str, Any], final: dict[str, Any]
) -> None:
    """The table a run ends with."""
    percent = lambda v: "     -" if v is None else f"{100 * v:5.1f}%"
    n, total = final["n"], result["replay"]["test"]["quadruples"]
    which = "" if n == total else f"the first {n} in a fixed shuffled order of "  # --eval_problems
    print(f"\n{name}: {which}{total} test problems, greedy, last checkpoint")
    print(f"  {'':28}{'base':>8}{'trained':>10}{'change':>9}")
    rows = (
        ("revised accuracy", "accuracy_revised"), ("first-attempt accuracy", "accuracy"),
        ("delta_critique", "delta_critique"), ("wrong -> right", "wrong_to_right"),
        ("right -> wrong", "right_to_wrong"), ("well-formed answers", "format_frac"),
    )  # fmt: skip
    for label, key in rows:
        change = "" if base[key] is None or final[key] is None else f"{100 * (final[key] - base[key]):+.1f}"
        print(f"  {label:28}{percent(base[key]):>8}{percent(final[key]):>10}{change:>9}")
    for h in final["by_horizon"]:
        before, after = base["by_horizon"][h]["accuracy_revised"], final["by_horizon"][h]["accuracy_revised"]
        change = "" if None in (before, after) else f"{100 * (after - before):+.1f}"
        print(f"    horizon {h!s:18}{percent(before):>10}{percent(after):>10}{change:>9}")
    if final["harness_errors"]:
        print(f"  {final['harness_errors']} of {final['n']} could not be scored (harness errors) and are left out")
    for line in credit_lines(base, final):
        print(f"  {line}")
    t = result["timings"]
    parts = ", ".join(f"{k} {v:.2f}" for k, v in t.items() if k not in ("step", "first_step", "total"))
    print(f"  time: {t['total']:.0f} s in all; a step {t['step']:.2f} s ({parts})")
    memory = (f"{mib:,.0f} MiB ({kind})" for kind, mib in result["peak_memory_mib"].items())
    print(f"  memory at its peak: {', '.join(memory)}")
    print(
        f"  fingerprint {result['fingerprint']['digest'][:16]}; result.json, metrics.jsonl, curves.png in {directory}"
    )
