"""What a run prints and draws.

pytest tests/test_report.py
"""

import ast
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
from examples import RECORDS

from common.evaluation import summarize
from common.report import credit_lines, peak_memory, plot_curves, print_summary, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_plot_curves_writes_a_picture(tmp_path):
    """Lines without an accuracy (there may be others in the file) are passed over."""
    rows = [{"step": 0, "charts/accuracy": 0.1}, {"step": 1}, {"step": 2, "charts/accuracy": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_metrics(tmp_path) == rows
    plot_curves(tmp_path, summarize(RECORDS), summarize(RECORDS))
    flat = (tmp_path / "curves.png").read_bytes()
    better = summarize([{**r, "revised": 1.0} for r in RECORDS])
    plot_curves(tmp_path, summarize(RECORDS), better)
    assert flat.startswith(b"\x89PNG\r\n")
    assert flat != (tmp_path / "curves.png").read_bytes()


def test_peak_memory(monkeypatch):
    """Of a process that has let go of 300 MiB: those, and not what the process holds that started it. On devices, the
    fullest one's."""
    ours = np.ones(2**27, np.float64)  # 1 GiB, written to
    code = ("from common.report import peak_memory as peak; import numpy as np; before = peak()['host'];"
            "a = np.ones(300 * 2**17); del a; print(before, peak())")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = out.split(" ", 1)
    assert ast.literal_eval(after).keys() == {"host"}  # CPUs count nothing
    assert 200 < ast.literal_eval(after)["host"] - float(before) < 400 and float(before) < 1000 < peak_memory()["host"]
    device = lambda peak: SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak, "bytes_in_use": 1})
    monkeypatch.setattr(jax, "local_devices", lambda: [device(5 << 20), device(7 << 20)])
    assert peak_memory()["device"] == 7.0
    del ours


def test_print_summary(capsys, tmp_path):
    """Every line's numbers, base and trained in their columns, the change in points, `-` where there is no rate."""
    base = summarize(RECORDS[:2])
    final = summarize([{**r, "revised": 1.0} for r in RECORDS[:2]])
    result = {"peak_memory_mib": {"host": 1234.6, "device": 70.4},
              "timings": {"total": 61.4, "step": 2.0, "rollout": 1.25, "score": 0.25, "update": 0.5},
              "fingerprint": {"digest": "0123456789abcdef" * 4}, "replay": {"test": {"quadruples": 2}}}  # fmt: skip
    print_summary("b9__own__s1", tmp_path, result, base, final)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.strip().splitlines()]
    assert lines == [
        "b9__own__s1: 2 test problems, greedy, last checkpoint",
        "base trained change",
        "revised accuracy 50.0% 100.0% +50.0",
        "first-attempt accuracy 50.0% 50.0% +0.0",
        "delta_critique 50.0% 100.0% +50.0",
        "wrong -> right 50.0% 100.0% +50.0",
        "right -> wrong - -",
        "well-formed answers 50.0% 50.0% +0.0",
        "horizon 2 50.0% 100.0% +50.0",
        "credit, beyond the base at T 0.80: AUC of the flagged step over its null +0.250; flip gain +1.500 nats",
        "% of first attempts that hold for 1, 2, ... steps: base 100 50, trained 100 50",
        "time: 61 s in all; a step 2.00 s (rollout 1.25, score 0.25, update 0.50)",
        "memory at its peak: 1,235 MiB (host), 70 MiB (device)",
        f"fingerprint 0123456789abcdef; result.json, metrics.jsonl, curves.png in {tmp_path}",
    ]
    result["replay"]["test"]["quadruples"] = 605  # and --eval_problems 2
    print_summary("b9__own__s1", tmp_path, result, base, final)
    assert "b9__own__s1: the first 2 in a fixed shuffled order of 605 test problems, greedy" in capsys.readouterr().out


def test_credit_lines():
    """With errors of several problems, with kinds of steps and values where they are known; without any."""
    kinds = lambda *found: {"attempt_kinds": [[kind, kind == "slip"] for kind in found]}
    base = summarize([RECORDS[0] | kinds("slip", "right"), RECORDS[3] | kinds("slip", "copying")])
    final = summarize([RECORDS[0] | {"value_excess": 0.5} | kinds("right", "slip"), RECORDS[3]])
    assert credit_lines(base, final) == [
        "credit, beyond the base at T 0.80: AUC of the flagged step over its null +0.100 \u00b1 0.150;"
        " flip gain +1.000 \u00b1 0.500 nats",
        "rank correlation of steps' shifts with their drops in value, over its null +0.500",
        "% of first attempts that hold for 1, 2, ... steps: base 100 100, trained 100 100",
        "errors of first attempts, a step: slip 1.000 -> 1.000, arithmetic 0.000 -> 0.000, copying 0.250 -> 0.000,"
        " form 0.000 -> 0.000",
    ]
    assert credit_lines(summarize(RECORDS[-1:]), summarize(RECORDS[-1:])) == []
