"""The pages say what the files say: diffs, line numbers, metrics, names of files, commands.

pytest tests/test_docs.py
"""

import ast
import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import tyro

from common.evaluation import summarize
from common.human import HumanArgs

ROOT = pathlib.Path(__file__).parents[1]


def load(path):
    """A script as a module, with its folder on the path as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / path).parent)
        return importlib.import_module(pathlib.Path(path).stem)


update_methods = load("docs/update_methods.py")
METHODS, METRICS = (path.read_text() for path in update_methods.PAGES)
SCRIPTS = sorted(path.name for path in ROOT.glob("b?_*.py"))


def test_diffs_and_line_numbers_are_those_of_the_files():
    """From b3 on every script is shown as a diff to its parent."""
    assert sorted(child for _, _, child, _ in update_methods.DIFF.findall(METHODS)) == SCRIPTS[3:]
    assert len(update_methods.REFERENCE.findall(METHODS)) > 40
    for page in (METHODS, METRICS):
        assert update_methods.updated(page) == page, "run: python docs/update_methods.py"


def test_a_reference_that_fits_no_line_or_several_is_an_error():
    for piece in ("no such text", "return"):
        with pytest.raises(ValueError, match="must be on one"):
            update_methods.line_of("b2_grpo.py", piece)


def rows(page, keys, cells):
    """First cells of a page's table rows that are `keys` and are followed by so many cells, none of them empty."""
    return re.findall(rf"^\| `({keys})`(?: \| [^|\n]+){{{cells}}} \|$", page, re.MULTILINE)


def test_every_logged_metric_is_explained_and_none_else():
    """Keys as they stand in the scripts and the rooms."""
    text = "".join(path.read_text() for path in [*(ROOT / name for name in SCRIPTS), *ROOT.glob("common/*.py")])
    logged = set(re.findall(r'"((?:charts|losses|rollout|time)/\w+)"', text))
    logged |= {f"time/{part}" for part in re.findall(r'clock\.mark\("(\w+)"\)', text)} | {"time/step"}
    logged |= {f"losses/{term}_grad_norm" for term in ("align", "decode", "energy")}
    logged |= {f"losses/{term}_grad_cosine" for term in ("align", "decode")}
    logged |= {"memory/host", "memory/device"}
    logged |= {f"eval/{name}" for name in ("accuracy", "accuracy_revised", "delta_critique")}
    assert sorted(rows(METRICS, r"\w+/\w+", 3)) == sorted(logged)


def test_every_rate_of_a_summary_is_explained_and_none_else():
    rates = {key for key in summarize([]) if not key.startswith("by_")}
    assert sorted(rows(METRICS, r"\w+", 1)) == sorted({*rates, "edit"})


# ---- names and commands ---------------------------------------------------------------------------------------------
PAGES = ["README.md", "deploy/README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"(?:^    (?:[A-Z_]+=\S+ )*(?:pip [^&\n]+&& )?|`)python ([\w/]+\.py)([^`\n]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page):
    """Links, and all that ends like a file of the repository; `b6_` is the reader's own, curves.png a run's."""
    folder, text = (ROOT / page).parent, (ROOT / page).read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)", text) if "://" not in link} - {""}
    assert [link for link in links if not (folder / link).exists()] == []
    names = set(re.findall(r"(?<![\w/.*<>$-])[\w/]+\.(?:py|md|png)\b", re.sub(r"\]\([^)]*\)", "]", text)))
    names = {name for name in names if not name.startswith("b6_")} - {"curves.png"}
    places = (ROOT, folder, ROOT / "benchmarks", ROOT / "sweeps")  # docs call what is there by bare names
    assert [name for name in names if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page):
    """A script takes the flags that a page gives it. One that has no `Args` takes no flags, or parses them itself."""
    for name, flags in COMMAND.findall((ROOT / page).read_text()):
        args, words = getattr(load(name), "Args", None), shlex.split(flags, comments=True)
        if words[:1] == ["human"]:  # the other half of aggregate.py
            args, words = HumanArgs, words[1:]
        if args is not None and "--help" not in words:
            tyro.cli(args, args=words)  # exits where it does not understand


# ---- the rooms and their map ----------------------------------------------------------------------------------------
ROOMS = {path.stem: path for path in sorted(ROOT.glob("common/*.py")) if path.stem != "__init__"}
MAP = re.findall(r"^# (?!ruff)(\w+): \S.*$", (ROOT / "cts_common.py").read_text(), re.MULTILINE)
CROSS = ("aggregate", "benchmarks", "deploy", "devices", "docs", "launch", "methods", "scripts")
WITHOUT_JAX = (
    "basics", "prompts", "values", "answers", "verifier", "sandbox_server", "plans", "sandbox", "programs",
    "replay", "critique", "fixtures", "tasks", "tokenizer", "mistakes", "mutants", "batches", "locks", "tracking",
    "interpreter", "credit", "cells", "sweep", "results", "page", "sheets", "human", "statistics", "claims", "tables",
    "figures", "shelf", "ledger", "providers", "asking", "teaching", "records", "batch_jobs", "buckets",
)  # fmt: skip


def rooms_imported(text: str) -> set[str]:
    """The rooms that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
            found.add(node.module.removeprefix("common."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("common.") for alias in node.names if alias.name.startswith("common.")}
    return found


def test_every_room_has_its_line_in_the_map_and_its_test_file():
    """And every test file its room, apart from those that look at scripts, whole runs, launchers and pages."""
    assert sorted(MAP) == sorted(ROOMS)
    tests = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_*.py")}
    assert tests - set(CROSS) == set(ROOMS) and set(CROSS) <= tests


@pytest.mark.parametrize("room", ROOMS)
def test_the_test_file_of_a_room_imports_it_and_says_how_it_is_run(room):
    text = (ROOT / "tests" / f"test_{room}.py").read_text()
    assert room in rooms_imported(text) or (room == "making" and "teacher.main(" in text)
    assert ast.get_docstring(ast.parse(text)).splitlines()[-1] == f"pytest tests/test_{room}.py"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    """So there is no import cycle, and the map can be read from top to bottom."""
    above = MAP[: MAP.index(room)]
    assert rooms_imported(ROOMS[room].read_text()) <= {*above}


def test_half_of_the_rooms_need_no_jax():
    """They are imported in a process that refuses JAX and what is built on it; so are the rooms that they import."""
    program = (
        "import builtins, importlib, sys\n"
        "real = builtins.__import__\n"
        "def without_jax(name, *rest, **more):\n"
        "    if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax', 'orbax'):\n"
        "        raise ModuleNotFoundError(f'{name} is refused')\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = without_jax\n"
        "for room in sys.argv[1:]:\n"
        "    importlib.import_module(f'common.{room}')\n"
    )
    run = lambda *rooms: subprocess.run(
        [sys.executable, "-c", program, *rooms], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    done = run(*WITHOUT_JAX)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 2 * len(WITHOUT_JAX) >= len(ROOMS)
    assert "jax is refused" in run("model").stderr  # the refusal works


def test_size_budgets_of_the_files():
    lines = lambda path: len(path.read_text().splitlines())
    folders = ("", "common/", "docs/", "benchmarks/", "deploy/", "sweeps/")
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")] + [*ROOT.glob("common/pages/*")]
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in paths}
    limits = {name: 430 if name.startswith(("common/", "sweeps/")) else 750 for name in sizes}
    limits |= {"cts_common.py": 150, "common/sandbox_server.py": 750}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}
