"""The scripts from end to end on a tiny replay, and the rules they are written by.

pytest tests/test_scripts.py        (and with -m slow)
"""

import ast
import dataclasses
import difflib
import gc
import glob
import importlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

import b0_sft
import b5_cts
import cts_common as cts
import teacher
from common.basics import InputError, mean
from common.cells import differing, run_name
from common.chat import load_hf_tokenizer
from common.credit import NOTHING
from common.model import leaf_names
from common.report import read_metrics
from common.results import find_runs, read_runs
from common.run import Run
from common.tables import BASE_KEYS
from common.tasks import TASKS
from sweeps import identify

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ("b0_sft", "b1_dpo", "b2_grpo", "b3_grpo_verifier", "b4_grpo_critique", "b5_cts")
SCRIPT = {**{name[:2]: name for name in SCRIPTS}, "a1": "b5_cts"}
FAMILY = (  # parent, child, what opens every block that the child adds
    ("b2_grpo", "b3_grpo_verifier", "# VERIFIER:"),
    ("b2_grpo", "b4_grpo_critique", "# CRITIQUE:"),
    ("b3_grpo_verifier", "b5_cts", "# CTS:"),
)
IN_TINY = (  # opens the other processes' programs
    "import functools, sys; sys.path.insert(0, 'tests'); import cts_common as cts, tiny\n"
    "tiny.install(setattr, dict.__setitem__)\n"
)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with a tiny replay; compiled programs are shared by all runs of the session."""
    folder = tmp_path_factory.mktemp("space")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla_cache")
    teacher.main(teacher.Args(task="fixtures_math", out=str(folder / "replay"), limit=24))
    return folder


@pytest.fixture(scope="module", autouse=True)
def tiny_session():
    """tiny.py in place for these tests, and out of it for others."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch.setattr, patch.setitem)
        yield


def run(space, script, out, **changes):
    """The script's result; all output folders of the session share one base."""
    (space / out).mkdir(exist_ok=True)
    (space / "base").mkdir(exist_ok=True)
    if not (space / out / "base").exists():
        (space / out / "base").symlink_to(space / "base", target_is_directory=True)
    module = importlib.import_module(script)
    return module.main(
        module.Args(**{**tiny.flags(module), "replay": str(space / "replay"), "out_dir": str(space / out), **changes})
    )


def run_dir(space, out, script):
    (directory,) = (space / out).glob(f"{script}__*")
    return directory


def checkpoint(directory, step=None):
    """{leaf name: array} of a run's parameters."""
    manager = ocp.CheckpointManager(directory / "checkpoints")
    step = manager.latest_step() if step is None else step
    args = ocp.args.Composite(state=ocp.args.StandardRestore(), identity=ocp.args.JsonRestore())
    params, opt_state = manager.restore(step, args=args)["state"]
    plain = lambda tree: {name.removesuffix("/value"): leaf for name, leaf in leaf_names(tree).items()}
    return {"params": plain(params), "opt": plain(opt_state)}


def metrics(directory):
    """metrics.jsonl without its times."""
    times = re.compile("time/|memory/|charts/SPS")
    return [{k: v for k, v in row.items() if not times.match(k)} for row in read_metrics(directory)]


@pytest.fixture(scope="module")
def runs(space, tiny_session):
    """Results by output folder, of one seed: b0 to b5, and a1 (b5 with every lam at 0). Run when first asked for."""

    class Runs(dict):
        def __missing__(self, out):
            script, flags = SCRIPT[out], dict(lam_align=0.0, lam_decode=0.0, lam_energy=0.0) if out == "a1" else {}
            self[out] = run(space, script, out, **flags)
            return self[out]

    return Runs()


def test_what_runs_write_is_what_aggregate_reads(space, runs):
    """Flags that all have alike make no arm, b5's shorter fit does."""
    assert {runs[out]["method"] for out in ("b3", "b5")} == {SCRIPT["b3"], SCRIPT["b5"]}
    (task,) = read_runs(find_runs([space / "b3", space / "b5"]))
    assert list(task.arms) == ["b3_grpo_verifier", "b5_cts energy_fit=20"] and task.missing == {}
    cell, summary = task.arms["b3_grpo_verifier"][0], runs["b3"]["summary"]
    for measure, key in BASE_KEYS.items():
        assert mean(cell.values[measure]) == pytest.approx(summary[key], abs=1e-12)
    assert [row["step"] for row in cell.curves] == [0, 1, 2] and "charts/tokens" in cell.curves[0]


# ---- the rules of the family ----------------------------------------------------------------------------------------
def body(script):
    text = (ROOT / f"{script}.py").read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


@pytest.mark.parametrize("parent, child, marker", FAMILY)
def test_a_child_is_its_parent_plus_marked_insertions(parent, child, marker):
    a, b = body(parent), body(child)
    changes = [op for op in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if op[0] != "equal"]
    assert changes
    for kind, _, _, start, end in changes:
        assert kind == "insert", f"{child} changes its parent near: {b[start:end][:3]}"
        first = next(line for line in b[start:end] if line.strip())
        assert first.strip().startswith(marker), f"an unmarked insertion: {first!r}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script):
    text = (ROOT / f"{script}.py").read_text()
    common = "".join(path.read_text() for path in ROOT.glob("common/*.py"))
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert re.search(rf"\bargs\.{field.name}\b", text + common), f"--{field.name} is read nowhere"
        help_text = rf'^    {field.name}: .*\n    """.+"""$'
        assert re.search(help_text, text + common, re.MULTILINE), f"--{field.name} has no help text"


def test_size_budgets():
    for script in SCRIPTS:
        limit = 750 if script == "b5_cts" else 480  # a critic, its fit, six targets and two readings are its own
        assert len((ROOT / f"{script}.py").read_text().splitlines()) <= limit


# ... but for those of aggregate.py: the declared comparison is one of methods
ROOMS = [room for room in sorted(ROOT.glob("common/*.py")) if room.stem not in ("claims", "human")]


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_no_room_knows_a_method(room):
    tree = ast.parse(room.read_text())
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    for word in (*SCRIPTS, "sft", "dpo", "grpo"):
        assert not [s for s in strings + names if word in s.lower() and "\n" not in s and len(s) < 60]


# ---- what a run leaves behind ---------------------------------------------------------------------------------------
def test_one_loss_and_one_adam(space):
    """--aux joint, of one step, which is the last: at lam_align; losses/loss is L as it is written."""
    flags = dict(steps=1, aux="joint", lam_align=0.5, lam_align_final=0.0, lam_decode=0.3, lam_energy=0.2)
    run(space, "b5_cts", "joint", **flags)
    directory = run_dir(space, "joint", "b5_cts")
    (row,) = metrics(directory)
    terms = (0.5, "align"), (0.3, "decode"), (0.2, "energy")
    extra = sum(lam * row[f"losses/{name}_loss"] for lam, name in terms)
    assert row["losses/align_loss"] > 0.001 and row["losses/energy_loss"] > 0.1
    assert row["losses/loss"] == pytest.approx(row["losses/policy_loss"] + extra, rel=1e-4)
    assert not [name for name in checkpoint(directory)["opt"] if name.split("/")[0] in ("align", "decode", "energy")]


def test_each_term_moves_the_policy_lam_times_as_far(space):
    """Adam's first step has the learning rate for its length in every weight: GRPO moves it by 1, decode by lam on top,
    so that it moves by 1 + lam or 1 - lam of that; where one of the two has no gradient by lam or 1."""
    run(space, "b5_cts", "own", steps=1, lam_align=0.0, lam_decode=0.25, learning_rate=1e-3)
    mesh, end = cts.make_mesh("auto"), checkpoint(run_dir(space, "own", "b5_cts"))["params"]
    (base,) = (path.parent for path in (space / "own" / "base").glob("*/model.safetensors"))
    steps = []
    for name, leaf in leaf_names(cts.load_hf_weights(base, cts.read_hf_config(base), mesh)).items():
        steps += (np.abs(end[f"policy/{name}"] - leaf) / 1e-3).ravel().tolist()
    near = lambda size: float((np.abs(np.array(steps) - size) < 0.02).mean())
    assert near(1.25) > 0.1 and near(0.75) > 0.1 and near(1.25) + near(0.75) + near(0.25) + near(1) + near(0) > 0.8


@pytest.mark.parametrize("script, N", [("b0_sft", 5), ("b5_cts", 7)])  # two reports on the base
def test_eval_problems_bounds_every_evaluation(space, runs, capsys, script, N):
    """The base's report, pre-check, validation, the evaluation at the end, b5's energies; and nothing of training."""
    whole = runs[script[:2]]
    capsys.readouterr()
    result = run(space, script, "few", eval_problems=N, eval_every=3)
    out = capsys.readouterr().out
    assert f"{N} test problems and {N} training problems twice each, {N} groups of 4" in out
    assert f"Pre-check of the base on {N} training problems" in out and "of 8.\n" in out  # two batches of 4 prompts
    assert f"the first {N} in a fixed shuffled order of 24 test problems" in out
    assert result["summary"]["n"] == result["base"]["n"] == len(result["records"]) == result["precheck"]["n"] == N
    old, new = whole["fingerprint"], result["fingerprint"]
    assert (new["decode"]["eval_problems"], new["test_compute_budget"]) == (N, old["test_compute_budget"] * N // 24)
    assert {k for k in old if old[k] != new[k]} == {"decode", "test_compute_budget", "digest"}
    before = {r["task_id"]: r for r in whole["records"]}
    credit = lambda r: {k: r[k] for k in ("credit_auc", "credit_gap")}  # the others' null is made of all evaluated
    for r in result["records"]:
        same = {k: v for k, v in r.items() if k not in (*credit(r), *NOTHING)}
        assert same == {k: v for k, v in before[r["task_id"]].items() if k in same}
        assert credit(r) == pytest.approx(credit(before[r["task_id"]]), abs=1e-4)
    a, b = (metrics(run_dir(space, folder, script)) for folder in ("few", script[:2]))
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in a] == b
    assert {round(row.get("eval/accuracy_revised", 0.0) * N, 6) % 1 for row in a} == {0.0}


def test_tokens_are_those_computed(space, runs):
    """Of b3 the prompts and their completions; of b5 also f, y0 and y1 through the base, y0 after the attempt prompt
    and y1 after the revise prompt through the policy; and once what the critic is fitted on."""
    (shapes, _) = (runs[out]["fingerprint"]["decode"] for out in ("b5", "b3"))
    b3, b5 = (metrics(run_dir(space, out, SCRIPT[out])) for out in ("b3", "b5"))
    for step, (one, other) in enumerate(zip(b3, b5), 1):
        assert one["charts/tokens"] == step * 4 * (shapes["P_revise"] + 4 * shapes["T"])
        base = shapes["P_revise"] + shapes["P_attempt"] + 2 * shapes["T_replay"]
        policy = shapes["P_attempt"] + shapes["T_replay"] + shapes["P_revise"] + shapes["T_replay"]
        assert other["charts/tokens"] - one["charts/tokens"] == step * 4 * (base + policy) + 24 * base


def test_tokens_of_the_methods_without_a_sampler(space, runs):
    """Of b1 a pair's prompt once and its two answers, through policy and base; of b0 its packed examples."""
    assert runs["b0"]
    shapes = runs["b1"]["fingerprint"]["decode"]
    b0, b1 = (metrics(run_dir(space, out, SCRIPT[out])) for out in ("b0", "b1"))
    quads = cts.load_replay("fixtures_math", str(space / "replay"), None)["train"]
    (folder,) = (path.parent for path in (space / "base").glob("*/tokenizer.json"))
    tokenizer = load_hf_tokenizer(folder, 512)
    examples = b0_sft.make_examples(tokenizer, quads, shapes["T"], "revision")
    drawn = [i for step in range(3) for i in cts.data_indices(len(examples), 16, 0, step)]  # two whole epochs
    assert b0[2]["charts/tokens"] == pytest.approx(sum(len(examples[i][0]) + len(examples[i][1]) for i in drawn))
    for step, row in enumerate(b1, 1):
        assert row["charts/tokens"] == step * 8 * 2 * (shapes["P_revise"] + 2 * shapes["T"])


def test_the_policy_gets_a_gradient(space, runs):
    """Without it the comparisons below would compare 0 with 0."""
    for out, script in SCRIPT.items():
        assert runs[out]["summary"]["n"] == 24
        rows = metrics(run_dir(space, out, script))
        assert all(row["losses/grad_norm"] > 0 and row["losses/loss"] != 0 for row in rows[:2]), out


def test_a_run_writes_its_result(space, runs):
    directory = run_dir(space, "b3", "b3_grpo_verifier")
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(runs["b3"]))
    assert (directory / "curves.png").stat().st_size > 5000
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for key in (
        "charts/reward",
        "losses/loss",
        "losses/grad_norm",
        "rollout/zero_std_frac",
        "time/rollout",
        "time/score",
        "time/update",
    ):
        assert all(key in row for row in rows), key
    assert len(runs["b3"]["records"]) == runs["b3"]["summary"]["n"] == 24
    assert runs["b3"]["summary"]["accuracy_y0"] == 0.0
    assert None not in runs["b3"]["fingerprint"].values()


def test_the_step_compiles_once(runs):
    for name in SCRIPT:
        assert runs[name]["traces"]["train_step"] == 1
        assert runs[name]["traces"].get("rollout", 1) == 1


def test_a_child_logs_its_parents_keys_and_its_own(space, runs):
    keys = {out: set(metrics(run_dir(space, out, SCRIPT[out]))[0]) for out in SCRIPT if runs[out]}
    assert keys["b3"] - keys["b2"] == {"rollout/process_mean"} and keys["b2"] <= keys["b3"]
    assert keys["b4"] - keys["b2"] == {"rollout/uptake_mean"} and keys["b2"] <= keys["b4"]
    own = {"aligned", *(f"align_{k}" for k in ("distance", "converged", "moved"))}
    own |= {f"{term}_{k}" for term in ("align", "decode") for k in ("loss", "grad_norm", "grad_cosine")}
    assert keys["b5"] - keys["b3"] == {f"losses/{k}" for k in own} and keys["b3"] <= keys["b5"]
    shared = {"step", "losses/loss", "losses/entropy", "losses/grad_norm", "charts/learning_rate", "charts/tokens"}
    assert keys["b0"] == shared == keys["b0"] & keys["b1"] & keys["b2"]


def test_methods_share_one_fingerprint_and_one_report_on_the_base(runs):
    for out in SCRIPT:
        assert runs[out]["fingerprint"] == runs["b2"]["fingerprint"]
        assert runs[out]["base"] == runs["b2"]["base"] and runs[out]["precheck"] == runs["b2"]["precheck"]
    assert None not in runs["b2"]["fingerprint"].values()


def cells_of(space, **changes):
    """Cells of a sweep with the flags of `run`, one a script, as the launcher hands them to identify.py."""
    cells = []
    for script in SCRIPTS:
        flags = {**tiny.flags(importlib.import_module(script)), "replay": space / "replay", **changes}
        cells.append({"label": script, "script": script, "flags": [f"--{k}={v}" for k, v in flags.items()]})
    return cells


def test_fingerprints_are_known_before_a_run_starts(space, runs, monkeypatch):
    """By the launcher of sweeps: to the last field what the runs write; data and base are loaded once."""
    loads = []
    monkeypatch.setattr(cts, "load_model", lambda *a, load=cts.load_model: (loads.append(a[0]), load(*a))[1])
    out_dir = str(space / "b2")
    assert runs["b2"]
    found = identify.identify_all(cells_of(space), out_dir, None)
    for cell, out in zip(found, ("b0", "b1", "b2", "b3", "b4", "b5")):
        assert cell["fingerprint"] == runs[out]["fingerprint"]
        args = dataclasses.replace(importlib.import_module(SCRIPT[out]).Args(), **runs[out]["args"])
        assert cell["name"] == run_name(dataclasses.replace(args, model=cell["model"]), SCRIPT[out])
    (folder,) = {cell["model"] for cell in found}
    assert loads == [folder] and pathlib.Path(folder).parent == space / "b2" / "base"
    cells = [*cells_of(space)[2:3], *cells_of(space, eval_problems=7, temperature=0.9, group=2)[2:3]]
    whole, few = (cell["fingerprint"] for cell in identify.identify_all(cells, out_dir, None))
    assert whole == runs["b2"]["fingerprint"] and few["test_compute_budget"] == 7 * 2 * 48
    assert differing(whole, few) == ["decode.temperature", "decode.eval_problems", "training_tokens",
                                     "rollout_budget", "test_compute_budget"]  # fmt: skip


def test_a_shared_base_travels_without_what_was_cached_beside_it(space, runs):
    """It is the base of the runs, in a folder of the user's choice, made once."""
    assert runs["b2"]
    found = [identify.identify_all(cells_of(space)[2:3], str(space / "b2"), str(space / "bases"))[0] for _ in range(2)]
    assert found[0] == found[1] and found[0]["fingerprint"] == runs["b2"]["fingerprint"]
    folder = pathlib.Path(found[0]["model"])
    assert folder.parent == space / "bases" and [*folder.parent.iterdir()] == [folder]
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [*folder.glob("report*"), *folder.glob("critic*")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(lam_alig=0), r"^b2_grpo: b2_grpo.py does not take .*--lam_alig=0 .*[Uu]nrecognized"),
        (dict(dtype="half"), r"^b2_grpo: b2_grpo.py does not take .*--dtype=half .*float32"),
        (dict(task="gsm9k"), r"^--task gsm9k: unknown"),
        (dict(steps=0), r"^--steps 0: must be at least 1"),
    ],
)
def test_a_cell_that_its_script_would_refuse_is_named(space, changes, words):
    with pytest.raises(InputError, match=words) as error:
        identify.identify_all(cells_of(space, **changes)[2:3], str(space / "bad"), None)
    assert "\n" not in str(error.value)


def test_all_lam_zero_is_the_parent(space, runs):
    assert runs["a1"] and runs["b3"]
    b3 = checkpoint(run_dir(space, "b3", "b3_grpo_verifier"))["params"]
    a1 = checkpoint(run_dir(space, "a1", "b5_cts"))["params"]
    for name, leaf in b3.items():
        np.testing.assert_allclose(a1[name], leaf, rtol=0, atol=1e-6, err_msg=name)


def test_every_trainable_leaf_moves(space, runs):
    mesh = cts.make_mesh("auto")
    for out in ("b0", "b1", "b2", "b4", "b5"):
        assert runs[out]
        (base,) = (path.parent for path in (space / out / "base").glob("*/model.safetensors"))
        end = checkpoint(run_dir(space, out, SCRIPT[out]))["params"]
        for name, leaf in leaf_names(cts.load_hf_weights(base, cts.read_hf_config(base), mesh)).items():
            assert np.abs(end[f"policy/{name}"] - leaf).max() > 0, (out, name)


@pytest.mark.slow
def test_a_critic_that_is_trained_on_moves(space, runs, ablations):
    """Every leaf of it, with --lam_energy; by default it stays as fitted."""
    for out, moves in (("trained", True), ("b5", False)):
        assert runs["b5"]
        directory = run_dir(space, out, "b5_cts")
        early, late = (checkpoint(directory, step)["params"] for step in (2, 3))
        critic = [name for name in late if name.startswith("critic/")]
        assert len(critic) == 6
        for name in critic:
            assert (np.abs(late[name] - early[name]).max() > 0) == moves, (out, name)


def test_the_reference_of_b1_stays_the_base(space, runs):
    """At the first step the policy is its reference, then it moves away; a reference that followed would stay at 0."""
    assert runs["b1"]
    first, second, _ = metrics(run_dir(space, "b1", "b1_dpo"))
    assert first["losses/dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["losses/chosen_shift"] == pytest.approx(0.0, abs=1e-3) and abs(second["losses/chosen_shift"]) > 0.01


@pytest.mark.parametrize("script, second", [("b3_grpo_verifier", "process"), ("b4_grpo_critique", "uptake")])
def test_the_second_reward_joins_the_outcome(space, monkeypatch, script, second):
    """With an outcome of 0 everywhere, reward and gradient are the second reward's alone."""
    monkeypatch.setattr(cts, f"{second}_scores", tiny.parity_scores)
    monkeypatch.setattr(cts, "outcome_scores", lambda texts, quads: 0 * tiny.parity_scores(texts, quads))
    run(space, script, f"second_{second}")
    for row in metrics(run_dir(space, f"second_{second}", script)):
        assert row["charts/accuracy"] == 0
        assert row["charts/reward"] == pytest.approx(0.5 * row[f"rollout/{second}_mean"])
        assert row["rollout/zero_std_frac"] == 1 or row["losses/grad_norm"] > 0
    assert row["charts/reward"] > 0


@pytest.mark.parametrize("script", ["b0_sft", "b1_dpo", "b3_grpo_verifier"])
def test_micro_batches_give_the_same_step(space, runs, script):
    """All prompts at once; in the other runs one prompt at a time, the choice on a CPU."""
    assert runs[script[:2]]
    run(space, script, "micro", micro_batch=4)
    whole, parts = (metrics(run_dir(space, out, script)) for out in ("micro", script[:2]))
    assert whole[0].keys() == parts[0].keys()
    for key in whole[0].keys() - {"losses/preference_acc"}:  # at the first step margins are 0 up to rounding
        assert parts[0][key] == pytest.approx(whole[0][key], rel=2e-4, abs=1e-5), key


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.slow if name != "b5_cts" else ()) for name in SCRIPTS]
)
def test_four_devices_equal_one(space, runs, script):
    assert runs[script[:2]]
    module = importlib.import_module(script)
    flags = dict(tiny.flags(module), replay=str(space / "replay"), out_dir=str(space / "four"), mesh="2,2")
    driver = f"{IN_TINY}import {script} as script\nscript.main(script.Args(**{flags!r}))\n"
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    (space / "four").mkdir(exist_ok=True)
    if not (space / "four" / "base").exists():
        (space / "four" / "base").symlink_to(space / "base")  # the same base, not one trained on four devices
    done = subprocess.run(
        [sys.executable, "-c", driver], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, four = metrics(run_dir(space, script[:2], script)), metrics(run_dir(space, "four", script))
    assert len(four) == 3
    for a, b in zip(one, four):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, abs=1e-4, rel=1e-4), key


ABLATIONS = {
    "redacted": dict(critique="redacted"),
    "online": dict(critique="online", align="soft_dtw"),
    "hindsight": dict(target="hindsight", hold=0.0, align_layer=1),
    "given": dict(target="hindsight", align_reading="revise"),
    "trained": dict(align_reading="revise", lam_energy=0.5),
    "locus": dict(target="shuffled_locus", critique="shuffled"),
    "all_steps": dict(target="all_steps", process_credit="from_error"),
    "frozen": dict(align="l2", target="random", energy="frozen", kl_coef=0.01, truncated="keep"),
}


@pytest.fixture(scope="module")
def ablations(space, tiny_session):
    """One short b5 run per entry of ABLATIONS."""
    return {name: run(space, "b5_cts", name, **flags) for name, flags in ABLATIONS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_and_controls_run(space, ablations, name):
    rows = metrics(run_dir(space, name, "b5_cts"))
    assert len(rows) == 3 and all(np.isfinite(v) for row in rows for v in row.values())
    assert ablations[name]["summary"]["n"] == 24
    if "kl_coef" in ABLATIONS[name]:
        assert rows[0]["losses/kl"] == pytest.approx(0.0, abs=1e-6) and rows[1]["losses/kl"] > 0


def test_step_level_credit_and_validation_run(space):
    run(
        space, "b3_grpo_verifier", "per_step", process_credit="per_step", adv_norm="std", truncated="keep", eval_every=3
    )
    rows = metrics(run_dir(space, "per_step", "b3_grpo_verifier"))
    assert "eval/accuracy_revised" in rows[2] and "eval/accuracy_revised" not in rows[1]


def test_error_localised_advantages_are_those_of_the_step(space, runs, monkeypatch):
    """Where no wrong step is found it is rolled_up to the bit; where it is the last token, only that is blamed."""
    assert runs["b3"]
    rows = {"rolled_up": metrics(run_dir(space, "b3", "b3_grpo_verifier"))}
    for name, start in (("nowhere", 0), ("last", tiny.FLAGS["max_new_tokens"] - 1)):
        mask = lambda tokenizer, tokens_MT, len_M, texts, quads, start=start: np.broadcast_to(
            np.arange(tokens_MT.shape[1]) >= start, (len(quads), len(texts) // len(quads), tokens_MT.shape[1])
        ).astype(np.float32)
        monkeypatch.setattr(cts, "from_first_error", mask)
        run(space, "b3_grpo_verifier", name, process_credit="from_error")
        rows[name] = metrics(run_dir(space, name, "b3_grpo_verifier"))
    assert rows["nowhere"] == rows["rolled_up"]
    first, other = rows["last"][0], rows["rolled_up"][0]
    assert first["charts/reward"] == other["charts/reward"]  # the same samples, the same reward
    assert first["losses/policy_loss"] < other["losses/policy_loss"] - 1e-4  # praise stays, almost no blame is left
    assert first["losses/grad_norm"] > 0


# ---- stopping and going on ------------------------------------------------------------------------------------------
def test_stop_and_resume_is_bit_identical(space, runs, monkeypatch):
    """And with it: the same seed twice gives the same result."""
    assert runs["b5"]
    log = Run.log

    def log_and_stop(self, row, step):
        log(self, row, step)
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_stop)
    with pytest.raises(SystemExit) as stopped:
        run(space, "b5_cts", "resumed")
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(Run, "log", log)
    directory = run_dir(space, "resumed", "b5_cts")
    with pytest.raises(InputError, match="there already and has not finished"):
        run(space, "b5_cts", "resumed")
    with open(directory / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "half": 0}\n{"step": 2, "ha')  # written after the checkpoint, then cut off
    run(space, "b5_cts", "resumed", resume=True)
    whole, resumed = run_dir(space, "b5", "b5_cts"), directory
    assert metrics(resumed) == metrics(whole)
    for part in ("params", "opt"):
        a, b = checkpoint(whole)[part], checkpoint(resumed)[part]
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    again = run(space, "b5_cts", "resumed", resume=True)  # finished: shows its result, trains nothing
    of_process = ("timings", "peak_memory_mib", "args", "versions", "traces")
    strip = lambda result: {k: v for k, v in result.items() if k not in of_process}
    assert json.dumps(strip(again)) == json.dumps(strip(runs["b5"]))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_bit_identical(space, script):
    """SIGKILL after a step and half-way through a save (b3: after four steps; b5: also in the critic's fit, which
    is then made again); it ends as one that was never killed."""
    module = importlib.import_module(script)
    flags = dict(tiny.flags(module), steps=8, save_every=1, replay=str(space / "replay"), resume=True)
    for name in ("base", "never", "killed"):
        (space / name).mkdir(exist_ok=True)
    for name in ("never", "killed"):
        if not (space / name / "base").exists():
            (space / name / "base").symlink_to(space / "base")
    module.main(module.Args(**flags, out_dir=str(space / "never")))
    driver = (
        f"{IN_TINY}import glob, os, signal, threading, time, cts_common as cts, {script} as script\n"
        "def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "{where}\n"
        f"script.main(script.Args(**{flags!r}, out_dir={str(space / 'killed')!r}))\n"
    )
    in_log = "log = cts.Run.log\ncts.Run.log = lambda self, row, step: (log(self, row, step), step == {at} and die())"
    half = f"{space / 'killed'}/{script}*/checkpoints/*tmp*"  # where Orbax writes before it renames
    in_save = (
        f"def watch():\n    while not glob.glob({half!r}): time.sleep(0.001)\n    die()\n"
        "save = cts.Run.save\ncts.Run.save = lambda *a: (threading.Thread(target=watch).start(), save(*a))"
    )
    steps = (0, 1, 3, 6) if script == "b3_grpo_verifier" else (2,)
    in_fit = []
    if script == "b5_cts":
        bar = "lambda *a, **k: die() if k['desc'] == 'energy' else bar(*a, **k)"
        in_fit = [f"bar = cts.progress\ncts.progress = {bar}"]
        fitted = [*space.glob("base/*/critic_*")]
        assert fitted
        for path in fitted:  # as fitted for the run that is never killed
            path.unlink()
    for where in (*in_fit, *(in_log.format(at=at) for at in steps), in_save):
        done = subprocess.run([sys.executable, "-c", driver.replace("{where}", where)], cwd=ROOT, timeout=300)
        assert done.returncode == -signal.SIGKILL
    assert glob.glob(half)
    module.main(module.Args(**flags, out_dir=str(space / "killed")))
    whole, killed = (run_dir(space, name, script) for name in ("never", "killed"))
    assert metrics(whole) == metrics(killed)
    a, b = checkpoint(whole), checkpoint(killed)
    for part in a:
        for name in a[part]:
            np.testing.assert_array_equal(a[part][name], b[part][name], err_msg=name)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(space, runs, capsys):
    """A b3 run without its result, its last checkpoint cut off: it goes on from the one before, to the same bits."""
    assert runs["b3"]
    whole = run_dir(space, "b3", "b3_grpo_verifier")
    for damage in ("cut", "gone"):
        copy = space / damage / whole.name
        shutil.copytree(whole, copy)
        (copy / "result.json").unlink()
        files = [f for f in (copy / "checkpoints" / "3" / "state").rglob("*") if f.is_file()]
        largest = max(files, key=lambda f: f.stat().st_size)
        if damage == "cut":
            largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        else:
            largest.unlink()
        run(space, "b3_grpo_verifier", damage, resume=True)
        assert "checkpoint 3 in" in capsys.readouterr().out
        assert metrics(copy) == metrics(whole)
        a, b = checkpoint(whole), checkpoint(copy)
        for part in a:
            for name in a[part]:
                np.testing.assert_array_equal(a[part][name], b[part][name], err_msg=name)


def test_no_readable_checkpoint_is_refused_and_none_removed(space, runs):
    assert runs["b3"]
    whole = run_dir(space, "b3", "b3_grpo_verifier")
    copy = space / "unreadable" / whole.name
    shutil.copytree(whole, copy)
    (copy / "result.json").unlink()
    for step in ("2", "3"):
        (copy / "checkpoints" / step / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        run(space, "b3_grpo_verifier", "unreadable", resume=True)
    assert {"2", "3"} <= {f.name for f in (copy / "checkpoints").iterdir()}


def test_resume_with_another_flag_names_it(space, runs):
    assert runs["b3"]
    whole = run_dir(space, "b3", "b3_grpo_verifier")
    shutil.copytree(whole, space / "flag" / whole.name)
    (space / "flag" / whole.name / "result.json").unlink()
    with pytest.raises(InputError, match=r"--temperature 0.7 \(now 0.9\)"):
        run(space, "b3_grpo_verifier", "flag", resume=True, temperature=0.9)


def exported(folder):
    """{leaf name: array} of a checkpoint in the Hugging Face layout."""
    params = cts.load_hf_weights(folder, cts.read_hf_config(folder), cts.make_mesh("auto"))
    return {f"policy/{name}": np.asarray(leaf) for name, leaf in leaf_names(params).items()}


def test_a_finished_run_makes_the_export_that_is_missing(space, runs, capsys):
    """Of its last checkpoint, where and as often as it is asked for; what is there already stays."""
    assert runs["b5"]
    whole = run_dir(space, "b5", "b5_cts")
    copy = space / "late" / whole.name
    shutil.copytree(whole, copy)
    policy = {name: leaf for name, leaf in checkpoint(copy)["params"].items() if name.startswith("policy/")}
    for folder in (space / "export", space / "another", space / "export"):
        result = run(space, "b5_cts", "late", resume=True, save_hf=str(folder))
        assert result == json.loads((whole / "result.json").read_text())
        assert "has finished already" in capsys.readouterr().out
        weights = exported(folder)
        assert weights.keys() == policy.keys()
        for name in policy:
            np.testing.assert_array_equal(weights[name], policy[name], err_msg=name)
        written = (folder / "config.json").stat().st_mtime_ns
        run(space, "b5_cts", "late", resume=True, save_hf=str(folder))
        assert (folder / "config.json").stat().st_mtime_ns == written
        shutil.rmtree(folder)
    (space / "foreign").mkdir()
    (space / "foreign" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="exists and is not empty"):
        run(space, "b5_cts", "late", resume=True, save_hf=str(space / "foreign"))
    (copy / "checkpoints" / "3" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match=r"^--save_hf: checkpoint 3 in .* cannot be read .*remove result.json there"):
        run(space, "b5_cts", "late", resume=True, save_hf=str(folder))
    gc.collect()  # where a run ends here, this process goes on: see `Run._restore`


def test_an_end_cut_off_before_the_export_is_made_up_for(space, monkeypatch, capsys):
    """By then the result is written and shown."""
    flags = dict(save_hf=str(space / "cut_off_export"), steps=2)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("common.run.save_hf", killed)
        with pytest.raises(KeyboardInterrupt):
            run(space, "b0_sft", "cut_off", **flags)
    assert "24 test problems, greedy, last checkpoint" in capsys.readouterr().out
    assert (run_dir(space, "cut_off", "b0_sft") / "result.json").is_file()
    run(space, "b0_sft", "cut_off", resume=True, **flags)
    end = checkpoint(run_dir(space, "cut_off", "b0_sft"))["params"]
    for name, leaf in exported(space / "cut_off_export").items():
        np.testing.assert_array_equal(leaf, end[name], err_msg=name)


@pytest.mark.parametrize("term", ["loss", "align_loss", "decode_grad_norm"])
def test_not_finite_stops_with_step_term_and_batch(space, monkeypatch, term):
    """Whichever term it is: each has an optimizer of its own that moves the policy."""
    found = {"losses/loss": 0.0, "losses/grad_norm": 1.0, f"losses/{term}": float("nan")}
    monkeypatch.setattr(cts, "reduce", lambda sums: dict(found))
    with pytest.raises(FloatingPointError, match=rf"step 0 \(losses/{term}; batch fixtures_math/"):
        run(space, "b3_grpo_verifier", f"nan_{term}")
    assert not list(run_dir(space, f"nan_{term}", "b3_grpo_verifier").glob("checkpoints/*"))


@pytest.mark.parametrize("moment", ["start", "finish"])
def test_a_signal_outside_of_the_steps_ends_the_run_at_once(space, monkeypatch, capfd, moment):
    """There is nothing to save then; it goes on from the last checkpoint, if there is one."""
    flags, out = dict(steps=2), f"signal_{moment}"

    def killed(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(Run, moment, killed)
        with pytest.raises(SystemExit) as stopped:
            run(space, "b0_sft", out, **flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by signal 15 outside of the steps; continue with --resume" in capfd.readouterr().err
    directory = run_dir(space, out, "b0_sft")
    assert [path.name for path in directory.glob("checkpoints/*")] == ["2"] * (moment == "finish")
    gc.collect()
    assert run(space, "b0_sft", out, resume=True, **flags)["summary"]["n"] == 24
    assert [row["step"] for row in metrics(directory)] == [0, 1]


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(task="gsm9k"), "--task gsm9k: unknown; choose one of fixtures_math, fixtures_long"),
        (dict(model="no/such-model"), "--model no/such-model: no such directory, and not fetched from the hub"),
        (dict(replay="no/such"), r"--replay no/such: train.jsonl is missing"),
        (dict(max_prompt_tokens=20), r"fixtures_math/\d+ has \d+ tokens, more than --max_prompt_tokens 20"),
        (dict(prompts=0), "--prompts 0: must be at least 1"),
        (dict(steps=-1), "--steps -1: must be at least 1"),
        (dict(prompts=4, micro_batch=3), "--prompts 4 .* not divisible"),
        (dict(mesh="2,2"), "--mesh 2,2: 2 x 2 devices asked for, 1 are here"),
        (dict(mesh="two"), "--mesh two: expected two numbers"),
        (dict(temperature=0.0), "--temperature 0.0: must be above 0"),
        *(
            (dict(lam_energy=0.5, **more), "--lam_energy: needs a fitted critic, a target that reads it")
            for more in (
                dict(energy="frozen"), dict(critique="online"), dict(target="hindsight"), dict(lam_align=0.0),
            )
        ),
        (dict(critique="online", target="ref_only"), "--target ref_only: y1 is not the attempt's"),
        (dict(critique="online", target="all_steps"), "--target all_steps: y1 is not the attempt's"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_no_run(space, changes, words):
    with pytest.raises(InputError, match=words) as error:
        run(space, "b5_cts", "bad", **changes)
    assert "\n" not in str(error.value)
    assert not list((space / "bad").glob("b5_cts__*"))


def test_unwritable_output_directory(space):
    (space / "a_file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        b5_cts.main(b5_cts.Args(**tiny.FLAGS, out_dir=str(space / "a_file" / "runs")))


def test_malformed_replay_names_file_and_line(space):
    folder = space / "broken"
    folder.mkdir()
    for split in ("train", "val", "test"):
        lines = (space / "replay" / f"{split}.jsonl").read_text().splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join([*lines[:2], lines[2][:-20]]) + "\n")
    with pytest.raises(InputError, match=r"train.jsonl:3: not JSON"):
        run(space, "b5_cts", "bad", replay=str(folder))


def test_the_command_line_exits_with_2():
    done = subprocess.run(
        [sys.executable, "b5_cts.py", "--task", "nope"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"error: --task nope: unknown; choose one of {', '.join(TASKS)}"
