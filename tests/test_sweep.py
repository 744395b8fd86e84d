"""Files of sweeps: what is one, what is refused, and that every cell of ours is a command line.

pytest tests/test_sweep.py
"""

import dataclasses
import importlib
import itertools
import re
from collections import Counter

import pytest
import tyro
import yaml
from examples import ROOT

from common.basics import InputError
from common.claims import read_family
from common.sweep import Cell, command_words, expand, make_cell, read_sweep, scripts

FILES = {path.stem: path for path in sorted(ROOT.glob("sweeps/*.yaml"))}
METHODS = scripts()
PLAIN = """
program: sweeps/cell.py
command: ["${env}", python, "${program}", "${args}"]
method: grid
parameters:
  seed: {values: [0, 1]}
  task: {value: fixtures_math}
  arm: {values: [b0_sft, b5_cts --align=l2]}
"""


# ---- ours -----------------------------------------------------------------------------------------------------------
def test_there_are_the_sweeps_of_the_paper():
    assert [*FILES] == ["ablations", "alignment", "credit", "nano", "paper", "smoke"]
    sizes = {name: len(expand(read_sweep(path))) for name, path in FILES.items()}
    assert sizes == {
        "smoke": 6 * 2, "paper": 6 * 2 * 5, "nano": 6 * 3 * 6, "ablations": 26 * 2 * 6, "credit": 6 * 2 * 3,
        "alignment": 5 * 6,
    }  # fmt: skip
    for name in ("smoke", "paper", "nano"):
        cells = expand(read_sweep(FILES[name]))
        seeds = sizes[name] // 6 // len({c.task for c in cells})
        assert {*Counter((c.script, c.task) for c in cells).values()} == {seeds}
        assert sorted({c.script for c in cells}) == METHODS


@pytest.mark.parametrize("name", FILES)
def test_every_cell_is_understood_by_its_script(name):
    """All of the command line, by the script's own parser; and the flags arrive as they were meant."""
    config = read_sweep(FILES[name])
    for cell in expand(config):
        script, *flags = command_words(cell, "folder", "there")
        args = tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
        assert args.resume and (args.model, args.out_dir, args.task) == ("folder", "there", cell.task)
        for flag in cell.flags:
            key, _, value = flag.removeprefix("--").partition("=")
            assert key == "model" or str(type(getattr(args, key))(value)) == str(getattr(args, key))


@pytest.mark.parametrize("name", FILES)
def test_every_family_is_of_arms_that_the_sweep_has(name):
    """Named as in a report: the script, then flags."""
    given = read_sweep(FILES[name])["parameters"]["arm"]["values"]
    arms = {arm.replace(" --", " ").replace(".0", "") for arm in given}
    comparisons = read_family(str(FILES[name])).comparisons
    assert {*itertools.chain(*comparisons)} <= arms and len(comparisons) > 1


def test_seeds_vary_slowest_so_that_what_is_there_is_whole_tables():
    for path in FILES.values():
        seeds = [int(re.search(r"s(\d+)$", c.label)[1]) for c in expand(read_sweep(path))]
        assert seeds == sorted(seeds)


def test_cells_of_ablations_and_nano_are_the_same_runs():
    lines = lambda name: {tuple(sorted(command_words(c, "", "runs"))) for c in expand(read_sweep(FILES[name]))}
    assert len(lines("nano") & lines("ablations")) == 2 * 2 * 6  # B3 and B5
    assert lines("credit") <= lines("ablations")


def test_every_ablation_and_control_of_b5_is_there():
    """Those that its docstring lists, and every other target and critique."""
    from b5_cts import Args

    arms, vary = {*read_sweep(FILES["ablations"])["parameters"]["arm"]["values"]}, ("align", "target", "critique")
    options = {f.name: f.type.__args__ for f in dataclasses.fields(Args) if f.name in vary}
    for flag, values in options.items():
        default = getattr(Args(), flag)
        assert {f"b5_cts --{flag}={value}" for value in values if value != default} <= arms
    more = {"b5_cts --lam_align=0 --lam_decode=0", "b5_cts --lam_align=0"}
    more |= {"b5_cts --lam_decode=0", "b5_cts --energy=frozen", "b3_grpo_verifier --process_credit=from_error"}
    assert more | {"b5_cts", "b3_grpo_verifier"} <= arms


@pytest.mark.parametrize("name", FILES)
def test_wandb_would_take_the_file(name):
    """It checks on its server alone; so here by what its documentation and code say. YAML is read as W&B reads it."""
    config = yaml.safe_load(FILES[name].read_text())
    assert config == read_sweep(FILES[name])
    kinds = {"name": str, "description": str, "program": str, "command": list, "method": str, "metric": dict,
             "parameters": dict}  # fmt: skip
    assert {key: type(value) for key, value in config.items()} == kinds
    assert config["method"] == "grid" and {*config["metric"]} == {"name", "goal"}
    assert config["metric"]["goal"] in ("maximize", "minimize") and (ROOT / config["program"]).is_file()
    for given in config["parameters"].values():
        assert [*given] in (["value"], ["values"])
        for value in given.get("values", [given.get("value")]):
            assert type(value) in (int, float, str)
            if isinstance(value, str):
                with pytest.raises(ValueError):
                    float(value)  # as 1e-4 is, without a dot


def test_no_flag_that_can_be_swept_is_a_boolean():
    """W&B writes --flag=True, which tyro does not take."""
    for script in METHODS:
        fields = dataclasses.fields(importlib.import_module(script).Args)
        assert [field.name for field in fields if field.type is bool or isinstance(field.default, bool)] == ["resume"]


# ---- expansion ------------------------------------------------------------------------------------------------------
def test_expansion_and_command_lines(tmp_path):
    (tmp_path / "a.yaml").write_text(PLAIN + "  learning_rate: {values: [1.0e-4, 0.002]}\n")
    cells = expand(read_sweep(tmp_path / "a.yaml"))
    assert [c.label for c in cells] == [
        f"{arm} fixtures_math s{seed} learning_rate={rate}"
        for seed, arm, rate in itertools.product((0, 1), ("b0_sft", "b5_cts --align=l2"), (0.0001, 0.002))
    ]
    flags = ("--align=l2", "--seed=1", "--task=fixtures_math", "--learning_rate=0.002")
    assert cells[-1] == Cell("b5_cts", flags, cells[-1].label, "fixtures_math")
    assert command_words(cells[-1], "", "runs") == ["b5_cts.py", *flags, "--resume"]
    more = ["--model=runs/base/1", "--out_dir=there", "--resume"]
    assert command_words(cells[-1], "runs/base/1", "there") == ["b5_cts.py", *flags, *more]


def test_a_cell_of_texts_is_that_of_values():
    """W&B hands over texts."""
    values = {"seed": 1, "task": "gsm8k", "arm": "b0_sft", "learning_rate": 1e-05}
    assert make_cell(values, {}) == make_cell({k: str(v) for k, v in values.items()}, {})
    assert "--learning_rate=1e-05" in make_cell(values, {}).flags


# ---- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("method: grid", "method: bayes", "method is bayes: must be grid"),
        ("sweeps/cell.py", "b0_sft.py", "program is b0_sft.py: must be sweeps/cell.py"),
        ("python,", '"${interpreter}",', "command is .*interpreter.*: must be"),
        ("method: grid", "method: grid\nrun_cap: 3", "run_cap: unknown here; a sweep has name, "),
        ("seed: {values: [0, 1]}", "steps: {value: 3}", "parameters: seed must be among them"),
        ("[0, 1]", "[0, 1, 0]", "parameters.seed.values: 0 stands there twice"),
        ("[0, 1]", "[]", "parameters.seed.values: must be a list with something in it"),
        ("{values: [0, 1]}", "0", r"parameters.seed: must be \{value: SCALAR\}"),
        ("{values: [0, 1]}", "{min: 0, max: 1}", r"parameters.seed: must be \{value: SCALAR\}"),
        ("{values: [0, 1]}", "{value: 0, distribution: constant}", r"parameters.seed: must be"),
        ("b0_sft,", "b9_no,", "parameters.arm: b9_no is no script; there are b0_sft, b1_dpo, "),
        ("b0_sft,", "teacher,", "parameters.arm: teacher is no script"),
        ("--align=l2", "--align l2", "parameters.arm: --align in .* is not of the form --flag=value"),
        ("--align=l2", "--seed=3", "parameters.arm: --seed cannot be set in .*it is set twice"),
        ("--align=l2", "--out_dir=there", "parameters.arm: --out_dir cannot be set in .*launch.py --out_dir"),
        ("b0_sft,", "b5_cts --align=l2 ,", "parameters.arm.values: b5_cts --align=l2 stands there twice"),
        ("b0_sft,", "b5_cts  --align=l2,", "comes twice: two of the arms are one"),
        ("method: grid", "method: [grid", "no valid YAML"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how(tmp_path, old, new, words):
    assert PLAIN.count(old) == 1
    (tmp_path / "a.yaml").write_text(PLAIN.replace(old, new))
    with pytest.raises(InputError, match=words) as error:
        expand(read_sweep(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("optimizer: {parameters: {learning_rate: {value: 0.1}}}", "optimizer: nested parameters, which"),
        ("learning_rate: {value: 1e-4}", "learning_rate: 1e-4 is text in YAML, .* 0.0001 or 1.0e-4"),
        ("learning_rate: {value: '0.1'}", "learning_rate: 0.1 is text in YAML"),
        ("steps: {value: 0x10}", "line 9: 0x10 is not a number in its usual form"),
        ("steps: {value: 1_000}", "line 9: 1_000 is not a number in its usual form"),
        ("steps: {value: 1:30}", "line 9: 1:30 is not a number in its usual form"),
        ("learning_rate: {value: .inf}", "line 9: .inf is not a number in its usual form"),
        ("kl_coef: {value: off}", "kl_coef: False is a boolean"),
        ("kl_coef: {value: null}", "kl_coef: None is neither a number nor a text"),
        ("kl_coef: {value: 2026-01-01}", "kl_coef: .*date.* is neither a number nor a text"),
        ("kl_coef: {values: [[0, 1]]}", r"kl_coef: \[0, 1\] is neither a number nor a text"),
        ("a-b: {value: 1}", "parameters.a-b: is no flag's name"),
        ("seed: {value: 1}", "line 6: seed stands there twice"),
        ("resume: {value: yes}", r"parameters.resume: cannot be set here \(every cell resumes\)"),
        ("out_dir: {value: there}", r"parameters.out_dir: cannot be set here \(launch.py --out_dir\)"),
        ("save_hf: {value: there}", "parameters.save_hf: cannot be set here"),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_parameter(tmp_path, more, words):
    """Traps of YAML and of W&B's grid; `more` is line 9 of the file."""
    (tmp_path / "a.yaml").write_text(f"{PLAIN}  {more}\n")
    with pytest.raises(InputError, match=words) as error:
        expand(read_sweep(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)


def test_no_sweep_at_all(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    for text in ("", "- a\n", "parameters: 3\n"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(InputError, match=r"a.yaml: expected a mapping with the key parameters"):
            read_sweep(tmp_path / "a.yaml")
