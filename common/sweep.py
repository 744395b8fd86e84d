"""The file of a sweep: read whole, checked, and turned into the command lines that it stands for. Used by sweeps/;
starts nothing and knows no method.

A file is what `wandb sweep` takes, and less: a grid over scalars.

    program: sweeps/cell.py
    command: ["${env}", python, "${program}", "${args}"]
    method: grid
    parameters:
      seed: {values: [0, 1]}
      task: {value: fixtures_math}
      arm: {values: [b3_grpo_verifier, b5_cts, b5_cts --align=l2]}

`arm` is a script and the flags that make it this arm; every other parameter is a flag of all scripts."""

import dataclasses
import itertools
import math
import pathlib
import re
from collections import Counter
from typing import Any

import yaml

from common.basics import InputError

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM, COMMAND = "sweeps/cell.py", ["${env}", "python", "${program}", "${args}"]
KEYS = ("name", "description", "project", "entity", "program", "command", "method", "metric", "parameters")
NEEDED = ("arm", "task", "seed")
OURS = {
    "out_dir": "launch.py --out_dir", "resume": "every cell resumes", "guard": "launch.py --wandb writes it",
    "save_hf": "all cells would write into one folder",
}  # fmt: skip
PLAIN = {"int": re.compile(r"-?(0|[1-9]\d*)"), "float": re.compile(r"-?\d+\.\d*([eE][-+]\d+)?")}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: its script (without .py), its flags as they stand in the command line, its name in print."""

    script: str
    flags: tuple[str, ...]
    label: str
    task: str


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no key twice, no number but in the usual form."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key, n in Counter(map(str, keys)).items() if n > 1), None)
        if twice is not None:
            raise InputError(f"line {node.start_mark.line + 1}: {twice} stands there twice")
        return super().construct_mapping(node, deep)

    def number(self, node):
        kind = node.tag.rpartition(":")[2]
        if not PLAIN[kind].fullmatch(node.value):
            where = f"line {node.start_mark.line + 1}"
            raise InputError(f"{where}: {node.value} is not a number in its usual form; write it as 8 or 0.5")
        return int(node.value) if kind == "int" else float(node.value)


for _kind in PLAIN:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number)


def read_sweep(path: str | pathlib.Path) -> dict[str, Any]:
    """The sweep in a file; InputError that names file, place and way out where it is none, or one that W&B and we would
    read in two ways."""
    try:
        config = yaml.load(pathlib.Path(path).read_text(encoding="utf-8"), _Loader)
        check_sweep(config)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a sweep's file, as sweeps/smoke.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: no valid YAML ({' '.join(str(e).split())})") from None
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    return config


def check_sweep(config: Any) -> None:
    """InputError unless this is a sweep as described above."""
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict):
        raise InputError("expected a mapping with the key parameters, as in sweeps/smoke.yaml")
    unknown = [str(key) for key in config if key not in KEYS]
    if unknown:
        raise InputError(f"{', '.join(unknown)}: unknown here; a sweep has {', '.join(KEYS)}")
    for key, value in (("method", "grid"), ("program", PROGRAM), ("command", COMMAND)):
        if config.get(key) != value:
            raise InputError(f"{key} is {config.get(key)}: must be {value}")
    missing = [name for name in NEEDED if name not in config["parameters"]]
    if missing:
        raise InputError(f"parameters: {', '.join(missing)} must be among them")
    for name, given in config["parameters"].items():
        check_parameter(name, given)


def check_parameter(name: Any, given: Any) -> None:
    """InputError unless it is {value: a scalar} or {values: [different scalars]}."""
    where = f"parameters.{name}"
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{where}: is no flag's name")
    if name in OURS:
        raise InputError(f"{where}: cannot be set here ({OURS[name]})")
    if isinstance(given, dict) and "parameters" in given:
        raise InputError(f"{where}: nested parameters, which W&B's grid does not vary; write each one by itself")
    if not isinstance(given, dict) or len(given) != 1 or not {*given} <= {"value", "values"}:
        raise InputError(f"{where}: must be {{value: SCALAR}} or {{values: [SCALAR, ...]}}, nothing else")
    values = given.get("values", [given.get("value")])
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}.values: must be a list with something in it")
    for value in values:
        check_scalar(where, value)
    twice = [text for text, n in Counter(map(str, values)).items() if n > 1]
    if twice:
        raise InputError(f"{where}.values: {twice[0]} stands there twice")


def check_scalar(where: str, value: Any) -> None:
    """InputError unless it is a number, or a text that looks like none."""
    if isinstance(value, bool):
        raise InputError(f"{where}: {value} is a boolean (as YAML reads yes, no, on and off); quote it if it is text")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {value!r} is neither a number nor a text")
    try:
        float(value)
    except ValueError:
        return
    raise InputError(f"{where}: {value} is text in YAML, not a number; write it as 0.0001 or 1.0e-4, without quotes")


def expand(config: dict[str, Any]) -> list[Cell]:
    """The cells of a checked sweep; the last parameter of the file varies fastest."""
    grid = {name: given.get("values", [given.get("value")]) for name, given in config["parameters"].items()}
    cells = [make_cell(dict(zip(grid, values)), grid) for values in itertools.product(*grid.values())]
    twice = [cell for cell, n in Counter((cell.script, *sorted(cell.flags)) for cell in cells).items() if n > 1]
    if twice:
        raise InputError(f"{' '.join(twice[0])} comes twice: two of the arms are one")
    return cells


def make_cell(values: dict[str, Any], grid: dict[str, list]) -> Cell:
    """The cell of one value for each parameter; those that vary in `grid` are in its name."""
    script, *own = str(values["arm"]).split()
    if not re.fullmatch(r"b\d_\w+", script) or not (ROOT / f"{script}.py").is_file():
        raise InputError(f"parameters.arm: {script} is no script; there are {', '.join(scripts())}")
    bad = [word for word in own if not re.fullmatch(r"--\w+=\S+", word)]
    if bad:
        raise InputError(f"parameters.arm: {bad[0]} in {values['arm']!r} is not of the form --flag=value")
    flags = (*own, *(f"--{name}={value}" for name, value in values.items() if name != "arm"))
    names = Counter(flag.partition("=")[0].removeprefix("--") for flag in flags)
    for name, n in names.items():
        if n > 1 or name in OURS:
            why = OURS.get(name, "it is set twice")
            raise InputError(f"parameters.arm: --{name} cannot be set in {values['arm']!r} ({why})")
    more = [f"{name}={values[name]}" for name, of in grid.items() if len(of) > 1 and name not in NEEDED]
    label = " ".join([str(values["arm"]), str(values["task"]), f"s{values['seed']}", *more])
    return Cell(script, flags, label, str(values["task"]))


def scripts() -> list[str]:
    """The methods that there are: a script's name is its method's."""
    return sorted(path.stem for path in ROOT.glob("b[0-9]_*.py"))


def command_words(cell: Cell, model: str, out_dir: str) -> list[str]:
    """What follows `python` in a cell's command line. `model`: the folder of the task's shared base, or ""."""
    more = [f"--model={model}"] * bool(model) + [f"--out_dir={out_dir}"] * (out_dir != "runs")
    return [f"{cell.script}.py", *cell.flags, *more, "--resume"]
