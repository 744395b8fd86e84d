"""docs/methods.md says what the scripts say: its diffs, its line numbers, its metrics."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("update_methods", ROOT / "docs" / "update_methods.py")
update_methods = importlib.util.module_from_spec(spec)
spec.loader.exec_module(update_methods)
PAGE = update_methods.PAGE.read_text()
SCRIPTS = sorted(path.name for path in ROOT.glob("b?_*.py"))


def test_diffs_and_line_numbers_are_those_of_the_files():
    assert len(update_methods.DIFF.findall(PAGE)) == 5 and len(update_methods.REFERENCE.findall(PAGE)) > 25
    assert update_methods.updated(PAGE) == PAGE, "run: python docs/update_methods.py"


def test_a_reference_that_fits_no_line_or_several_is_an_error():
    for piece in ("no such text", "return"):
        with pytest.raises(ValueError, match="must be on one"):
            update_methods.line_of("b2_grpo.py", piece)


def test_every_logged_metric_is_explained_and_none_else():
    """Keys as they stand in the scripts and the common module."""
    text = "".join((ROOT / name).read_text() for name in [*SCRIPTS, "cts_common.py"])
    logged = set(re.findall(r'"((?:charts|losses|rollout|time)/\w+)"', text))
    logged |= {f"time/{part}" for part in re.findall(r'clock\.mark\("(\w+)"\)', text)} | {"time/step"}
    logged |= {f"losses/{name}_loss" for name in ("align", "decode", "energy")}
    logged |= {f"eval/{name}" for name in ("accuracy", "accuracy_revised", "delta_critique")}
    explained = re.findall(r"^\| `([\w/]+)` \| [^|]+ \| .{10,} \|$", PAGE, re.MULTILINE)
    assert sorted(explained) == sorted(logged)
