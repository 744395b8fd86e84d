"""Runs found, read, and refused by name; what makes an arm.

pytest tests/test_results.py
"""

import importlib
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
from made_results import METHODS, made_matrix, made_run

from common.basics import InputError
from common.locks import lock, unlock
from common.results import (
    NO_ARM,
    SCHEMA_VERSION,
    fetch_wandb,
    find_runs,
    flat,
    group_masks,
    name_arms,
    read_cell,
    read_runs,
    script_defaults,
    state,
)

TWO = ("b3_grpo_verifier", "b5_cts")


@pytest.fixture
def runs(tmp_path):
    """Two methods, two seeds, 12 problems."""
    return made_matrix(tmp_path / "runs", TWO, seeds=(0, 1), n=12)


def refused(folder, **kwargs) -> str:
    with pytest.raises(InputError) as e:
        read_runs(find_runs([folder]), **kwargs)
    return str(e.value)


def spoil(folder, pattern, change) -> None:
    """Change the result of the one run whose name fits."""
    (path,) = folder.glob(f"{pattern}/result.json")
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


# ---- finding --------------------------------------------------------------------------------------------------------
def test_a_run_is_found_by_itself_by_its_result_and_up_to_two_levels_down(runs):
    one = runs / next(runs.glob("b5*s0*")).name
    assert find_runs([one]) == find_runs([one / "result.json"]) == [one]
    assert len(find_runs([runs])) == len(find_runs([runs.parent])) == len(find_runs([runs, one])) == 4


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: there is no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no runs there \(folders with args.json and result.json\)"):
        find_runs([tmp_path])


def test_a_run_that_is_going_is_told_from_one_that_was_stopped(runs):
    (run,) = runs.glob("b5*s1*")
    (run / "result.json").unlink()
    assert "has not finished (no result.json)" in refused(runs)
    lock(run / "lock")
    try:
        assert state(run).startswith("is still going (process ")
        message = refused(runs)
    finally:
        unlock(run / "lock")
    assert str(run) in message and "is still going" in message and "--allow_partial" in message


# ---- reading --------------------------------------------------------------------------------------------------------
def test_a_truncated_result_is_named(runs):
    (path,) = runs.glob("b5*s1*/result.json")
    path.write_text(path.read_text()[:700])
    assert f"{path}: cut off or damaged" in refused(runs)


@pytest.mark.parametrize("field", ["method", "args", "fingerprint", "records", "summary", "base"])
def test_a_missing_field_is_named(runs, field):
    spoil(runs, "b5*s1*", lambda result: result.pop(field))
    assert f"b5_cts__fixtures_math__s1__44136fa3/result.json: field {field!r} is missing" in refused(runs)


@pytest.mark.parametrize("value", ["right", 1.5, -0.1])
def test_what_is_no_score_is_named(runs, value):
    spoil(runs, "b5*s1*", lambda result: result["records"][3].update(revised=value))
    assert f"field 'records[3].revised' is {value!r}, not a score from 0 to 1" in refused(runs)


def test_a_record_without_its_problem_or_twice_is_named(runs):
    spoil(runs, "b5*s1*", lambda result: result["records"][3].pop("task_id"))
    assert "field 'records[3].task_id' is missing" in refused(runs)
    spoil(runs, "b5*s1*", lambda result: result["records"][3].update(task_id="fixtures_math/00001"))
    assert "field 'records' has fixtures_math/00001 2 times" in refused(runs)


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("field", ["y0", "attempt", "revised"])
def test_missing_and_nan_scores_are_harness_errors(runs, field, value):
    spoil(runs, "b5*s1*", lambda result: result["records"][3].update({field: value}))
    message = refused(runs)
    assert f"field {field!r} has no score for 1 of 12 problems, first fixtures_math/00003 (harness errors)" in message
    assert "b5_cts__fixtures_math__s1" in message
    (task,) = read_runs(find_runs([runs]), allow_partial=True)
    key = {"y0": "delta_critique"}.get(field, field)
    assert np.isnan(task.arms["b5_cts"][1].values[key]).sum() == 1


def test_schema_versions_two_and_unknown(runs):
    for path in runs.glob("b5*/result.json"):
        path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    message = refused(runs)
    assert "two versions of 'schema_version'" in message and "99 in " in message and "b5_cts__" in message
    for path in runs.glob("b3*/result.json"):
        path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    assert f"field 'schema_version' is 99, this code reads {SCHEMA_VERSION}" in refused(runs)


def test_values_are_in_the_order_of_the_problems_whatever_that_of_the_records(runs):
    (run,) = runs.glob("b5*s0*")
    before = read_cell(run)
    spoil(runs, "b5*s0*", lambda result: result["records"].reverse())
    after = read_cell(run)
    assert after.ids == before.ids == sorted(before.ids)
    for name, values in before.values.items():
        np.testing.assert_array_equal(after.values[name], values)


def test_measures_that_depend_on_y0(tmp_path):
    def change(result):
        for r, scores in zip(result["records"], [(0, 1), (0, 0), (1, 1), (1, 0)]):
            r["y0"], r["revised"] = scores

    cell = read_cell(made_run(tmp_path, "b5_cts", "fixtures_math", 0, 4, change=change))
    nan = math.nan
    np.testing.assert_array_equal(cell.values["delta_critique"], [1, 0, 0, -1])
    np.testing.assert_array_equal(cell.values["wrong_to_right"], [1, 0, nan, nan])
    np.testing.assert_array_equal(cell.values["right_to_wrong"], [nan, nan, 0, 1])


def test_groups():
    record = lambda h, edit, *tags: {"horizon": h, "edit_distance": edit, "error_tags": [*tags]}
    found = group_masks([record(2, 1, "a"), record(2, 5), record(7, 10, "a", "b"), record(7, 11)])
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "horizon 2": [True, True, False, False], "horizon 7": [False, False, True, True],
        "edit 1-2": [True, False, False, False], "edit 3-5": [False, True, False, False],
        "edit 6-10": [False, False, True, False], "edit 11+": [False, False, False, True],
        "tag a": [True, False, True, False], "tag b": [False, False, True, False],
    }  # fmt: skip


def test_a_damaged_metrics_file_is_named(runs):
    (path,) = runs.glob("b5*s0*/metrics.jsonl")
    path.write_text('{"step": 0}\n{"ste')
    assert f"{path}: not lines of JSON" in refused(runs)
    path.unlink()
    assert read_cell(path.parent).curves == []


# ---- arms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_script(method):
    args = importlib.import_module(method).Args()
    assert script_defaults(method) == {name: getattr(args, name) for name in script_defaults(method)}
    assert {*NO_ARM} <= {*script_defaults(method)} == {*vars(args)}


def test_an_arm_is_named_by_the_flags_that_differ_from_the_defaults(tmp_path):
    flags = ({}, {"lam_align": 0.0, "align": "l2"}, {"model": "bases/x", "replay": "y", "out_dir": "z"})
    made = (made_run(tmp_path / str(i), "b5_cts", "fixtures_math", 0, 4, flags=f) for i, f in enumerate(flags))
    cells = [read_cell(run) for run in made]
    assert name_arms(cells) == ["b5_cts", "b5_cts align=l2 lam_align=0", "b5_cts"]


def test_a_flag_that_all_methods_were_given_alike_makes_no_arm(tmp_path):
    """The learning rate of a whole sweep; a flag that one method alone has does."""
    flags = {"learning_rate": 1e-6}
    cells = [
        read_cell(made_run(tmp_path, "b3_grpo_verifier", "gsm8k", 0, 4, flags=flags)),
        read_cell(made_run(tmp_path, "b5_cts", "gsm8k", 0, 4, flags=flags | {"lam_align": 0.0})),
    ]
    assert name_arms(cells) == ["b3_grpo_verifier", "b5_cts lam_align=0"]
    assert name_arms(cells[:1]) == ["b3_grpo_verifier learning_rate=1e-06"]


def test_of_a_method_whose_script_is_not_here_the_runs_tell_the_defaults(tmp_path):
    def foreign(result):
        result["method"] = "b9_theirs"

    cells = [
        read_cell(made_run(tmp_path / str(i), "b5_cts", "fixtures_math", i, 4, flags={"hold": h}, change=foreign))
        for i, h in enumerate((0.2, 0.5))
    ]
    assert script_defaults("b9_theirs") is None
    assert name_arms(cells[:1]) == ["b9_theirs"]
    assert name_arms(cells) == ["b9_theirs hold=0.2", "b9_theirs hold=0.5"]


# ---- what belongs together ------------------------------------------------------------------------------------------
def test_a_full_matrix_is_read(tmp_path):
    folder = made_matrix(tmp_path, TWO, ("fixtures_math", "gsm8k"), (0, 1), 12)
    tasks = read_runs(find_runs([folder]))
    assert [(task.name, list(task.arms), task.missing) for task in tasks] == [
        ("fixtures_math", [*TWO], {}), ("gsm8k", [*TWO], {}),
    ]  # fmt: skip
    assert tasks[0].seeds(*TWO) == [0, 1]
    assert tasks[0].scores("b5_cts", "revised", [0, 1]).shape == (2, 12)


def test_mixed_fingerprints_are_refused_with_the_fields_side_by_side(runs):
    shutil.rmtree(next(runs.glob("b5*s1*")))
    fields = {"optimizer_steps": 60, "decode": {"temperature": 0.7, "dtype": "bfloat16", "T": 128}}
    odd = made_run(runs, "b5_cts", "fixtures_math", 1, 12, fields=fields)
    first, *lines = refused(runs).splitlines()
    assert "the runs have 2 fingerprints, which differ in decode.dtype, optimizer_steps" in first and str(odd) in first
    assert [line.split() for line in lines[:3]] == [
        ["A", "B"], ["decode.dtype", "float32", "bfloat16"], ["optimizer_steps", "50", "60"],
    ]  # fmt: skip
    assert lines[3].strip().startswith("A: 3 of 4 runs") and lines[4].strip().startswith("B: 1 of 4 runs")
    assert refused(runs, allow_partial=True).startswith(first)


def test_fields_of_flat():
    assert flat({"a": 1, "b": {"c": 2}, "digest": "x"}) == {"a": 1, "b.c": 2}


def test_other_problems_under_one_fingerprint_are_refused(runs):
    spoil(runs, "b5*s1*", lambda result: result["records"].pop())
    assert "have 'records' of other problems: fixtures_math/00011" in refused(runs)


def test_a_cell_that_is_there_twice_is_refused(runs):
    (run,) = runs.glob("b5*s1*")
    copy = shutil.copytree(run, runs.parent / "more" / run.name)
    with pytest.raises(InputError) as e:
        read_runs(find_runs([runs, runs.parent / "more"]))
    assert "b5_cts, fixtures_math, 'seed' 1 is there twice: " in str(e.value)
    assert str(run) in str(e.value) and str(copy) in str(e.value)


def test_a_method_without_the_seeds_of_others_is_refused_or_shown(runs):
    shutil.rmtree(next(runs.glob("b5*s1*")))
    assert "fixtures_math: b5_cts lacks 'seed' 1, which b3_grpo_verifier has" in refused(runs)
    (task,) = read_runs(find_runs([runs]), allow_partial=True)
    assert task.missing == {("b5_cts", 1): "no run"} and task.seeds(*TWO) == [0]


def test_an_unfinished_run_is_missing_under_allow_partial(runs):
    next(runs.glob("b5*s1*/result.json")).unlink()
    (task,) = read_runs(find_runs([runs]), allow_partial=True)
    assert task.missing == {("b5_cts", 1): "has not finished (no result.json)"}


def test_nothing_finished_is_refused_even_then(runs):
    for path in runs.glob("*/result.json"):
        path.unlink()
    assert "none of these runs has finished" in refused(runs, allow_partial=True)


# ---- W&B ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def service(monkeypatch, runs):
    """A W&B that knows the runs as artifacts."""

    asked = []

    class Artifact:
        type = "result"

        def __init__(self, run):
            self.run = run

        def download(self, root):
            shutil.copy(self.run / "result.json", root)

    class Api:
        def runs(self, path, filters, order):
            asked.append((path, filters))
            if path == "me/locked":
                raise ValueError("No API key configured.\nmore")
            found = [] if path == "me/empty" else sorted(path.parent for path in runs.glob("*/result.json"))
            return [
                types.SimpleNamespace(id=f"id{i}", name=run.name, logged_artifacts=lambda run=run: [Artifact(run)])
                for i, run in enumerate(found)
            ]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Api, asked=asked))
    return sys.modules["wandb"]


def test_results_are_read_from_wandb(service, tmp_path, capsys):
    (task,) = read_runs(fetch_wandb("me/project", "sweep1", tmp_path / "down"))
    assert list(task.arms) == [*TWO] and task.seeds(*TWO) == [0, 1]
    assert service.asked == [("me/project", {"group": "sweep1"})]
    assert "W&B: 4 runs, 4 with a result" in capsys.readouterr().out


def test_what_wandb_lacks_is_named(service, tmp_path):
    with pytest.raises(InputError, match=r"--wandb me/locked: No API key configured\.; see `wandb login`"):
        fetch_wandb("me/locked", None, tmp_path / "a")
    with pytest.raises(InputError, match="--wandb me/empty: no runs in --group g"):
        fetch_wandb("me/empty", "g", tmp_path / "b")


def test_a_wandb_run_without_a_result_is_unfinished(service, runs, tmp_path, monkeypatch):
    listed = service.Api.runs

    def one_going(self, *args, **kwargs):
        found = listed(self, *args, **kwargs)
        found[0].logged_artifacts = lambda: []
        return found

    monkeypatch.setattr(service.Api, "runs", one_going)
    with pytest.raises(InputError, match="b3_grpo_verifier__fixtures_math__s0__44136fa3: has not finished"):
        read_runs(fetch_wandb("me/project", None, tmp_path / "down"))
    (task,) = read_runs(fetch_wandb("me/project", None, tmp_path / "again"), allow_partial=True)
    assert task.missing == {("b3_grpo_verifier", 0): "has not finished (no result.json)"}
