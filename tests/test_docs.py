"""The pages say what the files say: diffs, line numbers, metrics, names of files, commands; the table of results.

    pytest tests/test_docs.py
"""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update_methods, results_table = load("update_methods"), load("results_table")
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
    return re.findall(rf"^\| `({keys})`(?: \| [^|\n]{{1,}}){{{cells}}} \|$", page, re.MULTILINE)


def test_every_logged_metric_is_explained_and_none_else():
    """Keys as they stand in the scripts and the rooms."""
    text = "".join(path.read_text() for path in [*(ROOT / name for name in SCRIPTS), *ROOT.glob("common/*.py")])
    logged = set(re.findall(r'"((?:charts|losses|rollout|time)/\w+)"', text))
    logged |= {f"time/{part}" for part in re.findall(r'clock\.mark\("(\w+)"\)', text)} | {"time/step"}
    logged |= {f"eval/{name}" for name in ("accuracy", "accuracy_revised", "delta_critique")}
    assert sorted(rows(METRICS, r"\w+/\w+", 3)) == sorted(logged)


def test_every_rate_of_a_summary_is_explained_and_none_else():
    rates = {key for key in summarize([]) if not key.startswith("by_")}
    assert sorted(rows(METRICS, r"\w+", 1)) == sorted({*rates, "energy_auc"})


# ---- names and commands ---------------------------------------------------------------------------------------------
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
MADE = ("data/", "runs/", "result.json", "report.json", "args.json", "config.json")  # by runs, and by other programs


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page):
    """Links, and what stands as code or command and ends like a file."""
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)", text) if "://" not in link}
    assert all((folder / link).exists() for link in links if link), links
    names = set(re.findall(r"(?<![\w/.*-])((?:\w+/)*\w+\.(?:py|md|png))\b", re.sub(r"\]\([^)]*\)", "]", text)))
    names -= {"curves.png"}
    missing = [name for name in names if not ((ROOT / name).exists() or (folder / name).exists())]
    assert not missing


def commands(text):
    """The indented `python ...` lines of a page, without their comments."""
    lines = re.findall(r"^    (?:pip install [^&\n]+&& )?python (\S+\.py)(.*)$", text, re.MULTILINE)
    return [(script, shlex.split(rest, comments=True)) for script, rest in lines]


# ---- the table of results -------------------------------------------------------------------------------------------
def result(method, seed, revised, **fields):
    """A result.json's content: ten problems of horizon 2, thirty of horizons 6 and 11."""
    part = lambda n, value: {"n": n, "accuracy_revised": value}
    summary = {
        "accuracy_revised": revised, "delta_critique": revised, "wrong_to_right": revised, "right_to_wrong": None,
        "accuracy": 0.5, "credit_auc": 0.6123,
        "by_horizon": {"2": part(10, revised), "6": part(10, 0.3), "11": part(20, 0.0)},
    }  # fmt: skip
    fingerprint = {"tokenizer": "t", "optimizer_steps": 50, **fields, "digest": "d" * 64}
    return {"method": method, "args": {"seed": seed}, "fingerprint": fingerprint, "summary": summary, "base": summary}


def test_table_of_results():
    lines = results_table.table([result("b2_grpo", 0, 0.25), result("b0_sft", 1, 0.5), result("b2_grpo", 1, 0.35)])
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines.split("\n")}
    assert list(cells)[2:] == ["base", "B0, 1", "B2, 0", "B2, 1", "**B2**, mean of 2"]
    assert cells["B2, 0"] == ["25.0", "25.0", "25.0", "\u2013", "50.0", "0.612", "25.0", *["\u2013"] * 3, "10.0"]
    assert cells["**B2**, mean of 2"][0] == cells["**B2**, mean of 2"][6] == "30.0"
    assert cells["base"][5] == "\u2013"


def test_no_table_of_runs_that_are_not_comparable():
    with pytest.raises(ValueError, match="b3_grpo_verifier seed 2 differs in optimizer_steps"):
        results_table.table([result("b2_grpo", 0, 0.2), result("b3_grpo_verifier", 2, 0.3, optimizer_steps=60)])
