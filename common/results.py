"""What runs have written: found, read, checked, and refused where it does not belong in one table. Used by aggregate.py
and, for the schema, by report; needs no JAX and knows no statistics.

A cell is an arm, a task and a seed. An arm is a method with the flags that its runs changed from the script's defaults:
"b5_cts", "b5_cts lam_align=0". Every refusal is an InputError that names run and field.
"""

import ast
import dataclasses
import fcntl
import json
import math
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from common.basics import InputError, parse_python, read_json
from common.cells import flat
from common.slips import KINDS

SCHEMA_VERSION = 1  # of result.json
ROOT = pathlib.Path(__file__).parents[1]
RUN_NAME = re.compile(r"(\w+?)__(\w+)__s(\d+)__[0-9a-f]{8}")
SCORES = ("y0", "attempt", "revised")
CREDIT = ("credit_auc", "credit_matched", "credit_null", "credit_excess", "flip_gain", "value_correlation",
          "value_excess", "credit_temperature")  # fmt: skip
CURVES = ("charts/accuracy", "charts/tokens")
EDIT_BUCKETS = (2, 5, 10)
# Flags that make no arm: where things lie, how they are computed, what the fingerprint compares.
NO_ARM = (
    "task", "seed", "out_dir", "resume", "wandb", "mesh", "save_every", "save_hf", "hosts", "unsafe_sandbox",
    "data_dir", "replay", "dtype", "eval_every", "micro_batch", "model", "steps", "prompts", "group",
    "max_prompt_tokens", "max_new_tokens", "temperature", "eval_problems",
)  # fmt: skip
TYPES = {"schema_version": int, "method": str, "args": dict, "fingerprint": dict, "records": list, "summary": dict,
         "base": dict}  # fmt: skip
RECORD_TYPES = {"task_id": str, "horizon": int, "edit_distance": int, "error_tags": list, "revision": str}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One finished run. Arrays [N] are in the order of `ids`; NaN is where there is nothing to measure."""

    path: pathlib.Path
    method: str
    args: dict[str, Any]
    fingerprint: dict[str, Any]
    ids: list[str]
    values: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]  # {"horizon 2": which problems [N], ...}
    texts: list[str]
    summary: dict[str, Any]
    base: dict[str, Any]
    curves: list[dict[str, float]]
    versions: dict[str, str]

    @property
    def task(self) -> str:
        return self.args["task"]

    @property
    def seed(self) -> int:
        return self.args["seed"]


@dataclasses.dataclass(frozen=True)
class Started:
    """A run without a result: what its directory's name and its args.json say; seed -1 where it has another name."""

    method: str
    task: str | None
    seed: int
    args: dict[str, Any]
    why: str


@dataclasses.dataclass(frozen=True)
class Task:
    """The cells of one task, which share a fingerprint: {arm: {seed: cell}}, and the cells that are not there."""

    name: str
    arms: dict[str, dict[int, Cell]]
    missing: dict[tuple[str, int], str]  # {(arm, seed): why}

    @property
    def first(self) -> Cell:
        return next(cell for cells in self.arms.values() for cell in cells.values())

    def seeds(self, *arms: str) -> list[int]:
        """Those that all of the arms have."""
        return sorted(set.intersection(*(set(self.arms[arm]) for arm in arms)))

    def scores(self, arm: str, measure: str, seeds: Iterable[int]) -> np.ndarray:
        """[S, N]; NaN where there is nothing to measure."""
        return np.stack([self.arms[arm][seed].values[measure] for seed in seeds])


# ---- finding --------------------------------------------------------------------------------------------------------
def find_runs(paths: Iterable[str]) -> list[pathlib.Path]:
    """The directories of runs: each of `paths` is one, or a result.json, or a folder that holds some, at most two
    levels down. InputError where one holds none."""
    found: list[pathlib.Path] = []
    for text in paths:
        path = pathlib.Path(text)
        if not path.exists():
            raise InputError(f"{path}: there is no such folder; give folders of runs, e.g. runs")
        patterns = [f"{level}{name}" for level in ("", "*/", "*/*/") for name in ("result.json", "args.json")]
        some = [path.parent] if path.name == "result.json" else sorted(
            {hit.parent for pattern in patterns for hit in path.glob(pattern)}
        )  # fmt: skip
        if not some:
            raise InputError(f"{path}: no runs there (folders with args.json and result.json); run the scripts first")
        found += [folder for folder in some if folder.resolve() not in {other.resolve() for other in found}]
    return found


def holder(directory: pathlib.Path) -> str | None:
    """Who works in a run's directory now; None if nobody holds its lock."""
    try:
        with open(directory / "lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "another process"
    except OSError:  # no lock, or none that can be had here
        return None
    return None


def state(directory: pathlib.Path) -> str | None:
    """Why a run's directory has no result; None if it has one."""
    if (directory / "result.json").is_file():
        return None
    who = holder(directory)
    return f"is still going ({who})" if who else "has not finished (no result.json)"


def fetch_wandb(project: str, group: str | None, folder: str) -> list[pathlib.Path]:
    """The result artifacts of a W&B project's runs, one folder a run. InputError if there are none, and where a run has
    none: it has not finished, or was not synced. (Runs that were never synced W&B does not know.)"""
    import wandb

    def ask(what, *args, **kwargs):
        try:
            return what(*args, **kwargs)
        except Exception as e:  # its own errors, those of its HTTP client and of the disk
            reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise InputError(f"--wandb {project}: {reason}; see `wandb login`, or give folders of runs") from None

    api = ask(wandb.Api)
    runs = ask(lambda: list(api.runs(project, filters={"group": group} if group else None, order="+created_at")))
    if not runs:
        raise InputError(f"--wandb {project}: no runs" + (f" in --group {group}" if group else ""))
    found = []
    for run in runs:
        results = ask(lambda run=run: [artifact for artifact in run.logged_artifacts() if artifact.type == "result"])
        place = pathlib.Path(folder) / run.id / run.name  # its name is that of the run's directory
        place.mkdir(parents=True)
        if results:
            ask(results[-1].download, root=str(place))
        found.append(place)
    print(f"W&B: {len(runs)} runs, {sum(state(place) is None for place in found)} with a result")
    return found


# ---- reading --------------------------------------------------------------------------------------------------------
def read_result(directory: pathlib.Path) -> dict[str, Any]:
    """A run's result.json, its fields and records checked."""
    path = directory / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cut off or damaged ({e}); remove it and continue the run with --resume") from None

    def need(ok: bool, field: str, what: str) -> None:
        if not ok:
            raise InputError(f"{path}: field {field!r} {what}")

    need(isinstance(result, dict), "schema_version", "is missing: this is no result of a run")
    for field, kind in TYPES.items():
        need(isinstance(result.get(field), kind), field, f"is missing or not {kind.__name__}")
    version = result["schema_version"]
    need(version == SCHEMA_VERSION, "schema_version", f"is {version}, this code reads {SCHEMA_VERSION}; use the code"
         " that made the run, or run it again")  # fmt: skip
    for field, kind in {"task": str, "seed": int}.items():
        need(isinstance(result["args"].get(field), kind), f"args.{field}", f"is missing or not {kind.__name__}")
    need(isinstance(result["fingerprint"].get("digest"), str), "fingerprint.digest", "is missing")
    need(len(result["records"]) > 0, "records", "is empty")
    for i, r in enumerate(result["records"]):
        need(isinstance(r, dict), f"records[{i}]", "is not an object")
        for field, kind in RECORD_TYPES.items():
            need(isinstance(r.get(field), kind), f"records[{i}].{field}", f"is missing or not {kind.__name__}")
        for field in SCORES:
            value = r.get(field, "")
            number = isinstance(value, int | float) and (math.isnan(value) or 0 <= value <= 1)
            need(value is None or number, f"records[{i}].{field}", f"is {value!r}, not a score from 0 to 1")
    (name, n), *_ = Counter(r["task_id"] for r in result["records"]).most_common(1)
    need(n == 1, "records", f"has {name} {n} times")
    return result


def check_scored(directory: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """InputError if a score is missing or NaN: the harness failed there, and what is left is another sample."""
    for field in SCORES:
        lost = [r["task_id"] for r in records if r[field] is None or math.isnan(r[field])]
        if lost:
            raise InputError(
                f"{directory}: field {field!r} has no score for {len(lost)} of {len(records)} problems, first"
                f" {lost[0]} (harness errors); evaluate it again, or --allow_partial leaves these problems out"
            )


def read_curves(directory: pathlib.Path) -> list[dict[str, float]]:
    """The CURVES by step of a run's metrics.jsonl; empty where that is not there (results from W&B have none)."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: row[key] for key in ("step", *CURVES) if key in row} for row in rows]
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: not lines of JSON ({e}); remove it, or run again") from None


def group_masks(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Which problems [N] are in each group: "horizon 2", "edit 3-5", "tag missing_case"; a problem may have several."""
    low = (1, *(edge + 1 for edge in EDIT_BUCKETS))
    names = [f"{a}-{b}" for a, b in zip(low, EDIT_BUCKETS)] + [f"{low[-1]}+"]
    bucket = lambda r: sum(r["edit_distance"] > edge for edge in EDIT_BUCKETS)
    mask = lambda of: np.array([of(r) for r in records])
    horizons, tags = sorted({r["horizon"] for r in records}), sorted({t for r in records for t in r["error_tags"]})
    return {
        **{f"horizon {h}": mask(lambda r, h=h: r["horizon"] == h) for h in horizons},
        **{f"edit {name}": some for i, name in enumerate(names) if (some := mask(lambda r, i=i: bucket(r) == i)).any()},
        **{f"tag {tag}": mask(lambda r, tag=tag: tag in r["error_tags"]) for tag in tags},
    }


def kind_share(steps: list[tuple[str, bool]] | None, kind: str) -> float:
    """Share of an attempt's steps ([kind, planted] each) with this error, of slips among the planted ones; NaN of none.

    >>> kind_share([["slip", True], ["right", True], ["copying", False]], "slip")
    0.5
    """
    among = [found for found, planted in steps or () if planted or kind != "slip"]
    return sum(found == kind for found in among) / len(among) if among else math.nan


def read_cell(directory: pathlib.Path, allow_partial: bool = False) -> Cell:
    """One finished run; with `allow_partial` it may lack scores."""
    result = read_result(directory)
    if not allow_partial:
        check_scored(directory, result["records"])
    records = sorted(result["records"], key=lambda r: r["task_id"])
    number = lambda value: math.nan if value is None else float(value)
    column = lambda key: np.array([number(r.get(key)) for r in records])
    y0, attempt, revised = (column(key) for key in SCORES)
    values = {
        "revised": revised, "attempt": attempt, "delta_critique": revised - y0,
        "wrong_to_right": np.where(y0 == 0, revised, math.nan),
        "right_to_wrong": np.where(y0 > 0, 1 - revised, math.nan),
        "format": column("revised_format"), "tokens": column("revised_tokens"), **{key: column(key) for key in CREDIT},
        **{kind: np.array([kind_share(r.get("attempt_kinds"), kind) for r in records]) for kind in KINDS},
    }  # fmt: skip
    return Cell(
        directory, result["method"], result["args"], result["fingerprint"], [r["task_id"] for r in records], values,
        group_masks(records), [r["revision"] for r in records], result["summary"], result["base"],
        read_curves(directory), result.get("versions", {}),
    )  # fmt: skip


def read_started(directory: pathlib.Path, why: str) -> Started:
    """An unfinished run; where no args.json tells its flags (W&B's runs have none) they pass for the defaults."""
    named, args = RUN_NAME.fullmatch(directory.name), read_json(directory / "args.json", {})
    method, task, seed = named.groups() if named else (directory.name, None, "-1")
    return Started(method, task, int(seed), args, why)


# ---- arms -----------------------------------------------------------------------------------------------------------
def script_defaults(method: str) -> dict[str, Any] | None:
    """Defaults of a script's flags, read and not run (that takes seconds); None where the script is not here."""
    path, found = ROOT / f"{method}.py", {}
    if not path.is_file():
        return None
    for file, name in ((ROOT / "common" / "run.py", "RunArgs"), (path, "Args")):
        tree = parse_python(file.read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        fields = [node for node in body if isinstance(node, ast.AnnAssign) and node.value is not None]
        found |= {node.target.id: ast.literal_eval(node.value) for node in fields}
    return found


def changed_flags(cell: Cell | Started, defaults: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run that make its arm: those that differ from the defaults; one that the script no longer has
    differs."""
    return {k: v for k, v in cell.args.items() if k not in NO_ARM and (k not in defaults or defaults[k] != v)}


def common_flags(cells: list[Cell]) -> set[str]:
    """The flags that all runs of several methods have, and have alike: they tell no arm from another."""
    if len({cell.method for cell in cells}) == 1:
        return set()
    first = cells[0].args
    return {k for k in first if all(k in cell.args and cell.args[k] == first[k] for cell in cells)}


def name_arms(cells: list[Cell], started: Iterable[Started] = ()) -> list[str]:
    """The arm of each cell of a task, then of each run that has no result, which change no other's name. Where a
    method's script is not here, what all of its runs share are its defaults."""
    names, defaults = [], {run.method: script_defaults(run.method) or run.args for run in started}
    for method in {cell.method for cell in cells}:
        own = [cell.args for cell in cells if cell.method == method]
        shared = {k: v for k, v in own[0].items() if all(args.get(k) == v for args in own)}
        known = script_defaults(method)
        defaults[method] = shared if known is None else known
    text, alike = lambda value: f"{value:g}" if isinstance(value, float) else str(value), common_flags(cells)
    for cell in [*cells, *started]:
        flags = {k: v for k, v in changed_flags(cell, defaults[cell.method]).items() if k not in alike}
        names.append(" ".join([cell.method, *(f"{k}={text(v)}" for k, v in sorted(flags.items()))]))
    return names


# ---- what belongs together ------------------------------------------------------------------------------------------
def check_fingerprints(task: str, cells: list[Cell]) -> None:
    """InputError if they are not all the same, with the fields that differ side by side."""
    by_digest = defaultdict(list)
    for cell in cells:
        by_digest[json.dumps(flat(cell.fingerprint), sort_keys=True)].append(cell)
    if len(by_digest) == 1:
        return
    sets = sorted(by_digest.values(), key=len, reverse=True)
    fields = [flat(some[0].fingerprint) for some in sets]
    names = [name for name in {k: 0 for f in fields for k in f} if len({str(f.get(name)) for f in fields}) > 1]
    short = lambda value: text if len(text := str(value)) <= 20 else text[:17] + "..."
    lines = [f"{'':24}" + "".join(f"{chr(65 + i % 26):22}" for i in range(len(sets)))]
    lines += [f"{name:24}" + "".join(f"{short(f.get(name, '-')):22}" for f in fields) for name in names]
    for i, some in enumerate(sets):
        lines.append(f"{chr(65 + i % 26)}: {len(some)} of {len(cells)} runs, e.g. {some[0].path}")
    raise InputError(
        f"{task}: the runs have {len(sets)} fingerprints, which differ in {', '.join(names)}; they do not belong in one"
        f" table: {sets[-1][0].path} is another experiment than {sets[0][0].path}\n  " + "\n  ".join(lines)
    )


def check_problems(task: str, cells: list[Cell]) -> None:
    """InputError if two runs were not measured on the same problems."""
    for cell in cells[1:]:
        if cell.ids != cells[0].ids:
            other = sorted(set(cell.ids) ^ set(cells[0].ids))
            raise InputError(
                f"{task}: {cell.path} and {cells[0].path} have 'records' of other problems: {', '.join(other[:3])}, ..."
            )


def put_together(cells: list[Cell], started: list[Started]) -> dict[str, tuple[dict, dict]]:
    """{task: ({arm: {seed: cell}}, {(arm, seed): why it is missing})}; InputError if two runs are one cell."""
    found = {}
    for task in sorted({cell.task for cell in cells}):
        own = [cell for cell in cells if cell.task == task]
        begun = [run for run in started if run.task in (task, None)]  # None may be of any: shown with each
        names, arms, missing = name_arms(own, begun), {}, {}
        for arm, cell in sorted(zip(names, own), key=lambda pair: (pair[0], pair[1].seed)):
            seeds = arms.setdefault(arm, {})
            if cell.seed in seeds:
                raise InputError(
                    f"{arm}, {task}, 'seed' {cell.seed} is there twice: {seeds[cell.seed].path} and {cell.path};"
                    " give one of them"
                )
            seeds[cell.seed] = cell
        for arm, run in zip(names[len(own) :], begun):
            if run.seed not in arms.get(arm, {}):
                missing[arm, run.seed] = run.why
        found[task] = arms, missing
    return found


def read_runs(directories: list[pathlib.Path], allow_partial: bool = False, seeds: Iterable[int] = ()) -> list[Task]:
    """The tasks of these runs, checked: finished, of one schema, one fingerprint and one set of problems a task, no
    cell twice, every arm with each of `seeds` and of any other arm's. With `allow_partial` what is missing is noted."""
    versions = {}
    for directory in directories:
        if (why := state(directory)) and not allow_partial:
            raise InputError(f"{directory}: {why}; wait for it or continue it with --resume, or --allow_partial")
        if not why:
            versions.setdefault(read_version(directory), directory)
    if len(versions) > 1:
        pairs = ", ".join(f"{version} in {path}" for version, path in versions.items())
        raise InputError(f"the runs have two versions of 'schema_version': {pairs}; run those of the older code again")
    unfinished = {path: why for path in directories if (why := state(path))}
    cells = [read_cell(path, allow_partial) for path in directories if path not in unfinished]
    if not cells:
        raise InputError(f"none of these runs has finished, e.g. {directories[0]}: {unfinished[directories[0]]}")
    started = [read_started(path, why) for path, why in unfinished.items()]
    for path, run in zip(unfinished, started):
        if run.task not in (None, *(cell.task for cell in cells)):
            print(f"{path}: {run.why}; no run of its task has, so it stands in no table")
    return [make_task(name, *found, seeds, allow_partial) for name, found in put_together(cells, started).items()]


def read_version(directory: pathlib.Path) -> Any:
    """The schema of a result, from its first characters: it is written first."""
    with open(directory / "result.json", encoding="utf-8", errors="replace") as file:
        found = re.search(r'"schema_version": *(\w+)', file.read(200))
    return found[1] if found else str(SCHEMA_VERSION)  # what is wrong with it, `read_result` says


def make_task(name: str, arms: dict, missing: dict, declared: Iterable[int], allow_partial: bool) -> Task:
    """One task of `put_together`, checked."""
    cells = [cell for seeds in arms.values() for cell in seeds.values()]
    check_fingerprints(name, cells)
    check_problems(name, cells)
    wanted = sorted({*declared, *(seed for seeds in arms.values() for seed in seeds)})
    for arm, seeds in arms.items():
        lacks = [seed for seed in wanted if seed not in seeds]
        if lacks and not allow_partial:
            fullest = max(arms, key=lambda other: len(arms[other]))
            has = next((f"{other} has" for other in (fullest, *arms) if lacks[0] in arms[other]), "was declared")
            raise InputError(
                f"{name}: {arm} lacks 'seed' {', '.join(map(str, lacks))}, which {has}; run what is missing,"
                " or --allow_partial shows it in the table"
            )
        for seed in lacks:
            missing.setdefault((arm, seed), "no run")
    return Task(name, arms, missing)
