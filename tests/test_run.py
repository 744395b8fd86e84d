"""Flags, sums, the metrics of a rollout, the export of a finished run; whole runs are in tests/test_scripts.py.

pytest tests/test_run.py
"""

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from examples import REFERENCE, ROOT, code_quad, math_quad

import b0_sft
import b1_dpo
import b2_grpo
import b3_grpo_verifier
import b4_grpo_critique
import b5_cts
import teacher
from common.basics import InputError
from common.report import read_metrics
from common.run import check_args, rollout_metrics
from common.tasks import TASKS


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


# ---- a whole run on programs ----------------------------------------------------------------------------------------
@pytest.mark.usefixtures("confined")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [(b2_grpo, {}), (b4_grpo_critique, {}), (b5_cts, {"critique": "online"})],
    ids=["b2", "b4", "b5"],
)
def test_scripts_run_on_programs(tmp_path, monkeypatch, script, flags):
    """From generated problems to the result; a verdict for every completion."""
    task = dataclasses.replace(TASKS["fixtures_code"], base_steps=4, base_width=256)
    monkeypatch.setitem(TASKS, "fixtures_code", task)
    monkeypatch.setattr("common.base.ModelConfig", tiny.TinyConfig)
    monkeypatch.setattr("common.evaluation.PRECHECK_GROUPS", 8)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla_cache"))
    teacher.main(teacher.Args(task="fixtures_code", out=str(tmp_path / "replay"), limit=12))
    own = {"task": "fixtures_code", "replay": str(tmp_path / "replay"), "out_dir": str(tmp_path)}
    result = script.main(script.Args(**{**tiny.flags(script), "steps": 2, "max_new_tokens": 24, **own, **flags}))
    assert (result["summary"]["n"], result["summary"]["harness_errors"], result["summary"]["accuracy_y0"]) == (12, 0, 0)
    assert result["replay"]["train"]["leak_rate"] == 0
    rows = read_metrics(next(tmp_path.glob(f"{script.__name__}__fixtures_code__*")))
    assert [row["rollout/harness_errors"] for row in rows] == [0, 0]
    assert all(np.isfinite(v) for row in rows for v in row.values())


def test_a_run_counts_from_the_start_of_its_process():
    """Imports, here a sleep of a second before them, are part of it."""
    code = "import time; time.sleep(1); import common.run as run; print(time.time() - run.PROCESS_START)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert 1 <= float(out) < 120


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(steps=0), "--steps 0: must be at least 1"),
        (dict(group=1), "--group 1: a completion is compared with the others of its group; give 2 or more"),
        (dict(learning_rate=math.nan), "--learning_rate nan: must be above 0"),
        (dict(temperature=0.0), "--temperature 0.0: must be above 0"),
        (dict(save_every=-1), "--save_every -1: must be at least 0"),
        (dict(lam_align=-0.1), "--lam_align -0.1: must be at least 0"),
        (dict(lam_decode=math.inf), "--lam_decode inf: must be at least 0"),
        (dict(clip_low=1.5), "--clip_low 1.5: must be at most 1"),
    ],
)
def test_every_number_is_checked(flags, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_args(b5_cts.Args(**flags), clip_low=1)


def test_a_rate_for_nano_is_named_where_a_checkpoint_is_trained(capsys):
    for model, rate, said in (("nano", 3e-4, False), ("folder", 3e-4, True), ("folder", 1e-5, False)):
        check_args(b5_cts.Args(model=model, learning_rate=rate), clip_low=1)
        assert ("suits the nano model" in capsys.readouterr().out) == said


def test_a_layer_that_the_model_has_not_is_refused_before_a_run_is_begun(tmp_path):
    args = b5_cts.Args(task="fixtures_rare", align_layer=5, out_dir=str(tmp_path), wandb="disabled")
    with pytest.raises(InputError, match=r"^--align_layer 5: the model has 4 layers$"):
        b5_cts.main(args)
    assert not [*tmp_path.glob("b5_cts__*")]


def test_every_number_of_every_script_is_checked():
    """None is forgotten: each, set below 0, is refused by its script before anything else happens."""
    for script in (b0_sft, b1_dpo, b2_grpo, b3_grpo_verifier, b4_grpo_critique, b5_cts):
        for field in dataclasses.fields(script.Args):
            if field.type in (int, float):
                with pytest.raises(InputError, match=f"^--{field.name} -1"):
                    script.main(script.Args(**{field.name: field.type(-1)}))
    for tau in (0.0, 1.5):
        with pytest.raises(InputError, match=r"^--sinkhorn_tau"):
            b5_cts.main(b5_cts.Args(sinkhorn_tau=tau))
