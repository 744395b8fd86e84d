"""The clock of a run, and the metrics of a rollout.

pytest tests/test_stepmetrics.py
"""

import subprocess
import sys

import numpy as np
import pytest
from examples import REFERENCE, ROOT, code_quad, math_quad

from common.stepmetrics import StepClock, rollout_metrics


def test_rollout_metrics_count_harness_errors():
    reward_BG = np.array([[1.0, np.nan, 1.0], [0.0, 1.0, np.nan], [np.nan] * 3])
    out = {"len_M": np.ones(9), "truncated_M": np.zeros(9)}
    metrics = rollout_metrics(out, [REFERENCE, *["("] * 8], reward_BG, [code_quad()] * 3)
    assert metrics["rollout/harness_errors"] == 5
    assert metrics["rollout/zero_std_frac"] == pytest.approx(2 / 3)
    assert metrics["rollout/format_frac"] == pytest.approx(1 / 9)
    assert "rollout/unread_frac" not in metrics  # programs have no answer field


def test_rollout_metrics_count_unread_answers_apart():
    """Of four completions one is right, one wrong, one without an answer, one with an answer that is not read."""
    texts, out = ["#### 7", "#### 8", "7", "#### 7 or 8"], {"len_M": np.ones(4), "truncated_M": np.zeros(4)}
    metrics = rollout_metrics(out, texts, np.array([[1.0, 0.0, 0.0, 0.0]]), [math_quad(0)])
    assert metrics["rollout/unread_frac"] == 1 / 4 and metrics["rollout/format_frac"] == 1 / 2


def test_the_clock_keeps_the_first_step_apart():
    """It holds the compilation: it is no part of rates and medians."""
    clock = StepClock()
    clock.times = {"step": [60.0, 2.0, 4.0], "update": [50.0, 1.0, 3.0], "rollout": [10.0, 1.0, 1.0]}
    found = clock.summary()
    assert (found["step"], found["update"], found["rollout"], found["first_step"]) == (3.0, 2.0, 1.0, 60.0)
    last = clock.metrics(8)
    assert (last["charts/SPS"], last["time/update"]) == (2.0, 3.0) and "time/compile" not in last
    clock.times = {"step": [60.0]}
    assert clock.metrics(8)["time/compile"] == 60.0 and "charts/SPS" not in clock.metrics(8)


def test_a_run_counts_from_the_start_of_its_process():
    """Imports, here a sleep of a second before them, are part of it."""
    code = "import time; time.sleep(1); import common.report as report; print(time.time() - report.PROCESS_START)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert 1 <= float(out) < 120
