"""The tables of a report, and how they are written.

pytest tests/test_tables.py
"""

import csv
import dataclasses
import io
import re

import numpy as np
import pytest
from made_results import made_matrix, made_run

from common.claims import Family, compare, default_family, measure_all
from common.page import Table
from common.results import find_runs, read_runs
from common.statistics import estimate
from common.tables import (
    FEW_PROBLEMS,
    all_tables,
    as_csv,
    as_latex,
    as_markdown,
    credit_table,
    family_table,
    group_table,
    index,
    main_table,
    number,
    p_value,
    per_token,
    with_effect,
    with_interval,
)

B3, B5, CONTROL = "b3_grpo_verifier", "b5_cts", "b5_cts lam_align=0"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two methods with three seeds and a control arm with one of them."""
    folder = made_matrix(tmp_path_factory.mktemp("runs"), (B3, B5), n=60, effects={B5: 2.5})
    made_run(folder, B5, "fixtures_math", 0, 60, flags={"lam_align": 0.0})
    (task,) = read_runs(find_runs([folder]), allow_partial=True)
    return task


@pytest.fixture(scope="module")
def rows(task):
    return measure_all([task], B3)


def test_numbers():
    assert number("tokens", 41.26) == "41.3" and number("credit_auc", 0.51234) == "0.512"
    assert [number("revised", value, sign=True) for value in (-0.0001, 0.0001)] == ["+0.0"] * 2  # no -0.0
    assert (p_value(None), p_value(0.0004), p_value(0.04)) == ("n/a", "<0.001", "0.040")


def test_cells_say_n_a_and_never_0_where_there_is_nothing(task, rows):
    at = index(rows)
    at_all = lambda arm, measure: at[task.name, arm, measure, "all"]
    assert with_interval(at_all(B5, "right_to_wrong")) == "n/a" == with_interval(None)
    assert re.fullmatch(r"\d\d\.\d", with_interval(at_all(CONTROL, "revised")))  # one seed: no interval
    assert re.fullmatch(r"\d\d\.\d ± \d+\.\d", with_interval(at_all(B5, "revised")))
    assert re.fullmatch(r"\d\d\.\d \([+-]\d+\.\d ± \d+\.\d\)", with_effect(at_all(B5, "revised")))
    assert re.fullmatch(r"\d\d\.\d \([+-]\d+\.\d\)", with_effect(at_all(CONTROL, "revised")))
    assert "(" not in with_effect(at_all(B3, "revised"))
    none = estimate(np.zeros((3, 60)))  # nothing varies, which is no knowledge of others
    same = dataclasses.replace(at_all(B5, "revised"), mean=1.0, low=1.0, high=1.0, effect=none, difference=0.0)
    assert (with_interval(same), with_effect(same)) == ("100.0", "100.0 (+0.0)")


def test_main_table_has_the_untrained_base_every_arm_and_what_is_missing(task, rows):
    table = main_table(task, index(rows))
    assert [row[0] for row in table.rows] == ["untrained base", B3, B5, CONTROL]
    assert [row[1] for row in table.rows] == ["n/a", "3", "3", "1 (without 1, 2)"]
    assert table.rows[0][2] == "23.0" and {len(row) for row in table.rows} == {len(table.head)}
    assert f"Incomplete: {CONTROL} seeds 1, 2: no run." in table.note


def test_points_per_token_are_of_all_tokens_computed_else_of_completions(task, tmp_path):
    assert per_token(task, B5, 0.93) == (f"{70 / 0.7:+.1f}", "")  # 50 steps of 14,000
    run = made_run(tmp_path, B5, "gsm8k", 0, 8)
    (run / "metrics.jsonl").unlink()
    (other,) = read_runs([run])
    assert per_token(other, B5, 0.23 + 0.4096) == ("+100.0", " (completions alone)")
    assert per_token(other, B5, None) == ("n/a", "")


def test_family_table_has_the_detectable_effect_beside_what_decides_nothing(task):
    family = default_family([task], B3)
    table = family_table(compare([task], family), family, {})
    row = {name: dict(zip(table.head, line)) for name, line in zip(("b5", "control"), table.rows)}
    assert row["b5"]["verdict"] == "supported" and row["b5"]["MDE"] == "–"
    assert row["b5"]["comparison"] == f"{B5} − {B3} (primary)"
    found = compare([task], family)
    other = family_table([*found, *(dataclasses.replace(c, task="apps") for c in found)], family, {})
    lacking = family_table(found, family, {("apps", B5, B3): "no runs"})
    assert lacking.rows[0][0] == f"{task.name}: {B5} − {B3} (primary)"  # the answer speaks of two tasks
    assert [line[0] for line in other.rows[1:3]] == [f"{task.name}: {CONTROL} − {B3}", f"apps: {B5} − {B3} (primary)"]
    assert len(row["b5"]["McNemar by seed"].split()) == 3
    assert (row["control"]["verdict"], row["control"]["MDE"], row["control"]["p"]) == ("undecided", "n/a", "n/a")
    assert family.digest[:16] in table.note
    equal = compare([task], Family(((B3, B5),)))[0]
    assert equal.verdict == "not supported"


def test_an_open_row_says_what_seeds_and_what_problems_would_shrink(tmp_path):
    folder = made_matrix(tmp_path, (B3, B5), n=60)
    tasks = read_runs(find_runs([folder]))
    family = default_family(tasks, B3)
    table = family_table(compare(tasks, family), family, {})
    row = dict(zip(table.head, table.rows[0]))
    assert row["verdict"] == "undecided" and float(row["MDE"]) > 0
    shares = re.findall(r"(\d+) %", row["of it seeds / problems / either"])
    assert len(shares) == 3 and 98 <= sum(map(int, shares)) <= 102
    assert row["seeds to find it"] == "more problems" or int(row["seeds to find it"]) > 3


def test_all_tables_are_rectangular_and_credit_stands_beside_its_null(task, rows):
    family = default_family([task], B3)
    tables = all_tables([task], rows, compare([task], family), family, B3, {})
    assert [t.title.rpartition(": ")[2] for t in tables] == [
        "Comparisons of methods", "accuracy", "revised by horizon", "first attempt by horizon",
        "revised by edit distance", "revised by error tag", "credit",
    ]  # fmt: skip
    assert all(len(row) == len(table.head) for table in tables for row in table.rows)
    credit = credit_table(task, index(rows))
    assert credit.rows[0][4].endswith(" (n=51)")  # few, which it says: those that have it
    many = [dataclasses.replace(row, problems=FEW_PROBLEMS) for row in rows]
    assert not any("(n=" in cell for line in credit_table(task, index(many)).rows for cell in line)
    assert credit.head[2:5] == ["AUC matched", "its null", "excess"] and "value excess" not in credit.head


# ---- files ----------------------------------------------------------------------------------------------------------
TABLE = Table("T: a_b", ["method", "a|b"], [["b5_cts", "1.0 ± 2.0 %"], ["x", "<0.001 → −1"]], "note & more")


def test_markdown():
    assert as_markdown("Why?", "So.", [TABLE]) == (
        "# Why?\n\nSo.\n\n## T: a_b\n\n| method | a\\|b |\n|---|---|\n| b5_cts | 1.0 ± 2.0 % |\n| x | <0.001 → −1 |\n\n"
        "note & more\n"
    )


def test_latex_escapes_what_is_special():
    text = as_latex([TABLE])
    assert r"b5\_cts & 1.0 $\pm$ 2.0 \% \\" in text and r"x & $<$0.001 $\to$ $-$1 \\" in text
    assert text.startswith("% T: a_b\n% note & more\n\\begin{tabular}{lr}\n")


def test_csv_has_every_row_in_full_and_nothing_for_nothing(rows):
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(read) == len(rows)
    for line, row in zip(read, rows):
        assert (line["method"], line["measure"], line["group"]) == (row.arm, row.measure, row.group)
        assert (float(line["mean"]) if line["mean"] else None) == row.mean
        assert (float(line["p"]) if line["p"] else None) == row.against["p"]
    assert {line["mean"] for line in read if line["measure"] == "value_excess"} == {""}


def test_the_base_stands_in_the_tables_of_groups(task, rows):
    """As its report names them; n/a where it has none."""
    base = {
        "by_horizon": {"2": {"accuracy_revised": 0.25, "accuracy": 0.125}},
        "by_edit_distance": {"<=2": {"accuracy_revised": 0.5}, ">10": {"accuracy_revised": 0.75}},
        "by_tag": {"missing_case": {"accuracy_revised": 1.0}},
    }
    (arm, cells), *_ = task.arms.items()
    seed, cell = next(iter(cells.items()))
    task = dataclasses.replace(task, arms={arm: {seed: dataclasses.replace(cell, base=base)}})
    row = lambda kind, measure="revised": group_table(task, index(rows), kind, measure, B3).rows[0]
    assert row("horizon") == ["untrained base", "25.0", *["n/a"] * 4] and row("horizon", "attempt")[1] == "12.5"
    assert row("edit") == ["untrained base", "50.0", "n/a", "n/a", "75.0"]
    assert sorted(row("tag")[1:]) == ["100.0", "n/a", "n/a"]
