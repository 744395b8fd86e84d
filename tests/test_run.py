"""Flags, a run's directory and its checkpoints; whole runs are in tests/test_scripts.py.

pytest tests/test_run.py
"""

import dataclasses
import json
import math
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import b0_sft
import b1_dpo
import b2_grpo
import b3_grpo_verifier
import b4_grpo_critique
import b5_cts
import teacher
from common.basics import DiskError, InputError
from common.locks import unlock
from common.report import read_metrics
from common.run import Run, check_args
from common.tasks import TASKS


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
        (dict(seed=2**32), "--seed 4294967296: must be at most 4294967295"),
    ],
)
def test_every_number_is_checked(flags, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_args(b5_cts.Args(**flags), clip_low=1)


def opened(out_dir, **flags) -> Run:
    """A run's directory, made and locked."""
    return Run(b0_sft.Args(out_dir=str(out_dir), wandb="disabled", **flags), "b0_sft.py")


def closed(run: Run) -> None:
    """As a process that ends leaves it."""
    unlock(run.dir / "lock")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def test_a_checkpoint_of_another_identity_is_named_and_not_called_damaged(tmp_path, capsys):
    """Another base may have other shapes, too."""
    run = opened(tmp_path)
    run.start({"digest": "1", "base_weights": "a"}, {"w": jnp.ones((4, 3))}, {})
    run.save(1, ({"w": jnp.ones((4, 3))}, {}))
    closed(run)
    again = opened(tmp_path, resume=True)
    with pytest.raises(InputError, match="was started with another base_weights; choose another --out_dir"):
        again.start({"digest": "2", "base_weights": "b"}, {"w": jnp.ones((5, 3))}, {})
    assert "damaged" not in capsys.readouterr().out
    closed(again)
    last = opened(tmp_path, resume=True)
    params, _ = last.start({"digest": "1", "base_weights": "a"}, {"w": jnp.zeros((4, 3))}, {})
    assert last.first_step == 1 and params["w"].sum() == 12
    closed(last)


def test_lines_that_were_cut_off_are_dropped_wherever_they_end(tmp_path):
    run = opened(tmp_path)
    run._append("metrics.jsonl", [{"step": 0, "a": 1.0}])
    with open(run.dir / "samples.jsonl", "w") as file:
        file.write('{"step": 0, "prompt": "x"}\n{"step": 0, "prompt": "a \\\\boxed{5}')
    run._truncate(5)
    assert (run.dir / "samples.jsonl").read_text() == '{"step": 0, "prompt": "x"}\n'
    assert (run.dir / "metrics.jsonl").read_text() == '{"step": 0, "a": 1.0}\n'
    closed(run)


def test_resume_says_what_it_goes_on_with(tmp_path, capsys):
    """An unfinished run with other flags is named, with a flag that the code has no longer; where none is unfinished a
    new run begins, and says so."""
    first = opened(tmp_path)
    closed(first)
    then = json.loads((first.dir / "args.json").read_text())
    (first.dir / "args.json").write_text(json.dumps({**then, "gone": 3}))
    with pytest.raises(InputError, match=r"was started with --steps 50 \(now 60\), --gone 3 \(now None\); give"):
        opened(tmp_path, resume=True, steps=60)
    (first.dir / "result.json").write_text("{}")
    closed(opened(tmp_path, resume=True, steps=60))
    assert "there is no run with these flags in" in capsys.readouterr().out


def test_an_export_is_a_run_s_own_if_both_say_so(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    run = opened(tmp_path / "runs", save_hf=str(target))
    (run.dir / "exports").write_text(f"{target}\n")
    (target / "config.json").write_text("{}")
    (target / "made_by.txt").write_text("another")
    assert not run._exported()
    (target / "made_by.txt").write_text(run.name)
    assert run._exported()
    closed(run)


def test_a_full_disk_under_a_log_is_no_bad_input(tmp_path):
    run = opened(tmp_path)
    (run.dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        run._append("metrics.jsonl", [{"step": 0}])
    closed(run)


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
