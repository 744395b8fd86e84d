"""A run's name, and what its sweep expects it to be.

pytest tests/test_cells.py
"""

import dataclasses
import re

import pytest

import b2_grpo
from common.basics import InputError
from common.cells import EXPECTED, NOT_IN_RUN_NAME, check_expected, differing, expectation, flat, run_name, run_settings

IDENTITY = {"base_weights": "b", "decode": {"temperature": 0.7, "T": 48}, "planned_steps": 50, "digest": "d"}


def test_the_name_says_what_changes_the_result():
    """Flags that do not are in no name; task and seed stand in it themselves."""
    args = b2_grpo.Args(task="fixtures_math")
    name = run_name(args, "b2_grpo")
    assert re.fullmatch(r"b2_grpo__fixtures_math__s0__[0-9a-f]{8}", name)
    other = {"task": "gsm8k", "seed": 3, "mesh": "2,1", "resume": True, "save_every": 7, "out_dir": "there"}
    same = dataclasses.replace(args, **other)
    assert run_name(same, "b2_grpo") == name.replace("fixtures_math__s0", "gsm8k__s3")
    for change in ({"steps": 51}, {"model": "folder"}, {"dtype": "float32"}, {"clip_low": 0.1}):
        assert run_name(dataclasses.replace(args, **change), "b2_grpo") != name
    assert not {*run_settings(args)} & {*NOT_IN_RUN_NAME} and {*run_settings(args), *NOT_IN_RUN_NAME} == {
        field.name for field in dataclasses.fields(args)
    }


def test_fields_that_differ_are_named_one_by_one():
    assert flat(IDENTITY) == {"base_weights": "b", "decode.temperature": 0.7, "decode.T": 48, "planned_steps": 50}
    other = {**IDENTITY, "decode": {"temperature": 0.9, "T": 48}, "digest": "e", "more": 1}
    assert differing(IDENTITY, other) == ["decode.temperature", "more"] and differing(IDENTITY, dict(IDENTITY)) == []


def test_outside_of_a_sweep_nothing_is_expected(monkeypatch):
    monkeypatch.delenv(EXPECTED, raising=False)
    check_expected(IDENTITY)


def test_a_run_that_is_not_the_planned_one_is_refused(monkeypatch):
    """By field, with what it has; also where the sweep was planned by code that knew other fields."""
    planned = expectation(IDENTITY)
    assert re.fullmatch(r"base_weights:[0-9a-f]{8},decode:[0-9a-f]{8},planned_steps:[0-9a-f]{8}", planned)
    monkeypatch.setenv(EXPECTED, planned)
    check_expected({**IDENTITY, "digest": "another"})
    with pytest.raises(InputError, match=r'not the run .* another base_weights \("c"\), planned_steps \(51\): bring'):
        check_expected({**IDENTITY, "base_weights": "c", "planned_steps": 51})
    with pytest.raises(InputError, match=r'another decode \(\{"temperature": 0.7, "T": 64\}\)'):
        check_expected({**IDENTITY, "decode": {"temperature": 0.7, "T": 64}})
    with pytest.raises(InputError, match=r"another more \(1\)"):
        check_expected({**IDENTITY, "more": 1})
    monkeypatch.setenv(EXPECTED, planned + ",gone:12345678")
    with pytest.raises(InputError, match=r"another gone \(null\)"):
        check_expected(IDENTITY)
    monkeypatch.setenv(EXPECTED, "no list")
    with pytest.raises(InputError, match="another no list"):
        check_expected(IDENTITY)
