"""aggregate.py as a user runs it: what it writes, what it refuses, and that nothing is left half-written.

pytest tests/test_aggregate.py
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from made_results import made_matrix, made_quads, made_run

import aggregate
from common.basics import InputError
from common.replay import write_replay
from common.results import find_runs, read_runs

ROOT = pathlib.Path(__file__).parents[1]
B3, B5 = "b3_grpo_verifier", "b5_cts"
FILES = ["plots", "report.html", "report.json", "table.csv", "table.md", "table.tex"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """B5 is much better than B3."""
    return made_matrix(tmp_path_factory.mktemp("made") / "runs", (B3, B5), n=40, effects={B5: 3.0})


@pytest.fixture
def runs(made, tmp_path):
    """A copy, to be spoilt."""
    return pathlib.Path(shutil.copytree(made, tmp_path / "runs"))


def start(*words, cwd=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "aggregate.py"), *map(str, words)], capture_output=True, text=True, timeout=300,
        cwd=cwd,
    )  # fmt: skip


def report(runs, **flags):
    """report.json of these runs."""
    out = runs.parent / "report"
    aggregate.main(aggregate.Args(runs=(str(runs),), out=str(out), **flags))
    return json.loads((out / "report.json").read_text())


def test_a_report_from_the_command_line(runs, tmp_path):
    done = start(runs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Supported: on fixtures_math b5_cts revises ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 6
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["answer"] in done.stdout and found["verdict"] == "supported"
    assert len(found["cells"]) == 6 and found["missing"] == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert found["answer"] in page and "&lt;b&gt;eggs" not in page and "<b>eggs" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_it_needs_no_jax(runs, tmp_path):
    program = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport aggregate\n"
        f"aggregate.main(aggregate.Args(runs=({str(runs)!r},), out={str(tmp_path / 'out')!r}))\n"
        "sys.exit('jax' in sys.modules or 'wandb' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_problems_with_texts_and_shares(runs):
    (task,) = read_runs(find_runs([runs]))
    quads = aggregate.tested_problems(task, None)
    assert len(quads) == 40
    problems = aggregate.page_problems(task, quads, 10)
    assert [p["task_id"] for p in problems] == sorted(p["task_id"] for p in problems) and len(problems) == 10
    share = lambda p: p["outcomes"][B5] - p["outcomes"][B3]
    every = aggregate.page_problems(task, quads, 100)
    assert min(abs(share(p)) for p in problems) >= sorted(map(abs, map(share, every)))[-11] - 1e-9
    i = task.first.ids.index(problems[0]["task_id"])
    assert problems[0]["texts"] == {arm: task.arms[arm][0].texts[i] for arm in (B3, B5)}
    at = {arm: task.arms[arm][0].values["revised"] for arm in (B3, B5)}
    for p in every:  # of the run whose text it is
        assert p["shown"] == {arm: at[arm][task.first.ids.index(p["task_id"])] for arm in (B3, B5)}
    assert (problems[0]["x"], problems[0]["f"]) == (quads[i].x, quads[i].f)


def test_a_test_split_that_the_runs_were_not_tested_on_is_not_shown(tmp_path):
    runs = made_matrix(tmp_path / "runs", (B3, B5), seeds=(0, 1), n=40)
    (task,) = read_runs(find_runs([runs]))
    shutil.rmtree(runs / "replay_fixtures_math")
    assert aggregate.tested_problems(task, None) == []
    (tmp_path / "mine").mkdir()
    write_replay(tmp_path / "mine" / "test.jsonl", made_quads("fixtures_math", 39))
    with pytest.raises(InputError, match=r"--replay .*mine: no test.jsonl that fixtures_math was tested on"):
        aggregate.tested_problems(task, str(tmp_path / "mine"))
    write_replay(tmp_path / "mine" / "test.jsonl", made_quads("fixtures_math", 40))
    assert len(aggregate.tested_problems(task, str(tmp_path / "mine"))) == 40
    assert "its test.jsonl is not here" in report(runs)["note"]


# ---- what is refused ------------------------------------------------------------------------------------------------
def spoil_score(runs):
    (path,) = runs.glob("b5*s1*/result.json")
    result = json.loads(path.read_text())
    result["records"][0]["revised"] = float("nan")
    path.write_text(json.dumps(result))


def spoil_schema(runs):
    (path,) = runs.glob("b5*s1*/result.json")
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 0'))


CUT = lambda runs: [path.write_text(path.read_text()[:900]) for path in runs.glob("b5*s1*/result.json")]
BAD = {  # what is wrong: (how to make it so, what the line says)
    "empty": (lambda runs: [shutil.rmtree(path) for path in runs.iterdir()], "no runs there"),
    "truncated": (CUT, "cut off or damaged"),
    "two schemas": (spoil_schema, "'schema_version'"),
    "unfinished": (lambda runs: next(runs.glob("b5*s1*/result.json")).unlink(), "has not finished"),
    "nan": (spoil_score, "'revised' has no score for 1 of 40 problems, first fixtures_math/00000 (harness errors)"),
    "seeds": (lambda runs: shutil.rmtree(next(runs.glob("b5*s1*"))), "b5_cts lacks 'seed' 1"),
    "twice": (lambda runs: shutil.copytree(next(runs.glob("b5*s1*")), runs / "copy"), "'seed' 1 is there twice"),
    "mixed": (lambda runs: made_run(runs, "b2_grpo", "fixtures_math", 0, 40, fields={"optimizer_steps": 7}),
              "differ in optimizer_steps"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_runs_are_named_in_a_line_with_exit_2_and_nothing_is_written(runs, tmp_path, what):
    how, line = BAD[what]
    how(runs)
    before = sorted(tmp_path.iterdir())
    done = start(runs, "--out", tmp_path / "out")
    first = done.stderr.splitlines()[0]
    assert done.returncode == 2 and first.startswith("error: ") and line in first, done.stderr
    assert str(runs) in done.stderr or "fixtures_math" in first
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_missing_stands_in_the_table_under_allow_partial(runs):
    shutil.rmtree(next(runs.glob("b5*s1*")))
    next(runs.glob("b3*s2*/result.json")).unlink()
    found = report(runs, allow_partial=True)
    assert found["missing"] == [
        {"arm": B3, "task": "fixtures_math", "seed": 2, "why": "has not finished (no result.json)"},
        {"arm": B5, "task": "fixtures_math", "seed": 1, "why": "no run"},
    ]  # fmt: skip
    text = (runs.parent / "report" / "table.md").read_text()
    assert f"| {B5} | 2 (without 1) |" in text and f"{B3} seed 2: has not finished" in text
    assert found["comparisons"][0]["seeds"] == [0] and found["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (dict(base="b9_none"), "--base b9_none: there is no such arm in fixtures_math; there are b3_grpo"),
        (dict(group="g"), "give folders of runs, e.g. runs, or --wandb"),
        (dict(wandb="a/b"), "give folders of runs, e.g. runs, or --wandb"),
        (dict(family="none.yaml"), "--family none.yaml: cannot be read"),
    ],
)
def test_bad_flags_are_named(runs, flags, line):
    with pytest.raises(InputError, match=re.escape(line)):
        report(runs, **flags)
    assert [path.name for path in runs.parent.iterdir()] == ["runs"]


# ---- the folder -----------------------------------------------------------------------------------------------------
def test_an_earlier_report_is_replaced_whole_and_stays_where_the_new_one_fails(runs):
    first = report(runs)
    (runs.parent / "report" / "left over").write_text("")
    assert report(runs)["answer"] == first["answer"]
    assert sorted(path.name for path in (runs.parent / "report").iterdir()) == FILES
    CUT(runs)
    with pytest.raises(InputError):
        report(runs)
    assert sorted(path.name for path in (runs.parent / "report").iterdir()) == FILES


def test_a_folder_of_something_else_is_not_replaced(runs):
    (runs.parent / "report").mkdir()
    (runs.parent / "report" / "mine.txt").write_text("")
    with pytest.raises(InputError, match=r"--out .*report: is there and holds no report"):
        report(runs)
    assert (runs.parent / "report" / "mine.txt").is_file()


def test_a_family_and_another_base(runs, tmp_path):
    (tmp_path / "family.yaml").write_text(f"primary: [{B3}, {B5}]\nmargin: 2\n")
    found = report(runs, family=str(tmp_path / "family.yaml"))
    assert found["question"] == "Does b3_grpo_verifier revise more flawed attempts to right ones than b5_cts?"
    assert found["verdict"] == "not supported" and found["family"]["margin"] == 2.0
    assert len(found["family"]["digest"]) == 64
    assert report(runs, base=B5)["comparisons"][0]["base"] == B5


def test_one_method_alone_has_tables_and_no_claim(runs):
    for path in runs.glob("b5*"):
        shutil.rmtree(path)
    found = report(runs)
    assert found["verdict"] == "undecided" and found["comparisons"] == [] and found["rows"]


def test_one_arm_that_is_not_the_base_is_no_claim_either(runs):
    for path in runs.glob("b3*"):
        shutil.rmtree(path)
    found = report(runs)
    assert found["verdict"] == "undecided" and found["answer"].startswith("Undecided: there is one arm alone")
    assert found["question"] == "What do these runs show?" and found["comparisons"] == []


def test_a_task_without_the_base_is_named_or_said(runs):
    """Complete runs of six methods on one task, of one on another."""
    made_matrix(runs, (B5,), ("gsm8k",), n=20)
    with pytest.raises(InputError, match=r"gsm8k: no runs of 'b3_grpo_verifier'; there are b5_cts; run what is"):
        report(runs)
    found = report(runs, allow_partial=True)
    assert found["answer"].endswith("On gsm8k nothing: no runs of 'b3_grpo_verifier'.")
    assert found["verdict"] == "undecided"
    note = "Not compared, and counted as showing nothing: gsm8k, b5_cts − b3_grpo_verifier: no runs of"
    assert note in (runs.parent / "report" / "table.md").read_text()


def test_an_arm_whose_runs_have_not_finished_stands_in_the_table(runs):
    for seed in range(3):
        (made_run(runs, B5, "fixtures_math", seed, 40, flags={"lam_align": 0.0}) / "result.json").unlink()
    found = report(runs, allow_partial=True)
    assert [(m["arm"], m["seed"]) for m in found["missing"]] == [(f"{B5} lam_align=0", seed) for seed in range(3)]
    text = (runs.parent / "report" / "table.md").read_text()
    assert f"| {B5} | 3 |" in text and f"| {B5} lam_align=0 | 0 (without 0, 1, 2) | n/a |" in text


def test_an_unfinished_run_with_other_flags_renames_no_arm(runs):
    """All that have finished share a flag, which therefore names none of them; one that has not lacks it."""
    for path in runs.glob("*/result.json"):
        result = json.loads(path.read_text())
        result["args"]["kl_coef"] = 0.05
        path.write_text(json.dumps(result))
    (made_run(runs, "b2_grpo", "fixtures_math", 0, 40) / "result.json").unlink()
    found = report(runs, allow_partial=True)
    assert {cell["arm"] for cell in found["cells"]} == {B3, B5}
    assert [(m["arm"], m["seed"]) for m in found["missing"]] == [("b2_grpo", 0)]


def test_arms_that_share_no_task_are_no_report_of_one_arm(runs):
    for path in runs.glob("b5*"):
        shutil.rmtree(path)
    made_matrix(runs, (B5,), ("gsm8k",), n=20)
    for flags in ({}, {"allow_partial": True}):
        with pytest.raises(InputError, match="no runs of 'b"):
            report(runs, **flags)


def test_a_run_under_another_name_is_not_lost(runs):
    path = next(runs.glob("b5*s2*"))
    (path / "result.json").unlink()
    path.rename(runs / "mine")
    found = report(runs, allow_partial=True)
    assert {"arm": B5, "task": "fixtures_math", "seed": 2, "why": "no run"} in found["missing"]
    assert "mine: has not finished" in (runs.parent / "report" / "table.md").read_text()


def test_what_a_sweep_declares_has_to_be_there(runs):
    """Who looks after three seeds of four, or at one task of two, does not have what was declared."""
    (runs.parent / "mine.yaml").write_text(
        f"# family: {{primary: [{B5}, {B3}]}}\n"
        "parameters: {seed: {values: [0, 1, 2, 3]}, task: {values: [fixtures_math, gsm8k]}}\n"
    )
    family = str(runs.parent / "mine.yaml")
    with pytest.raises(InputError, match=f"fixtures_math: {B3} lacks 'seed' 3, which was declared; run what is"):
        report(runs, family=family)
    found = report(runs, family=family, allow_partial=True)
    assert [(m["arm"], m["seed"], m["why"]) for m in found["missing"]] == [(B3, 3, "no run"), (B5, 3, "no run")]
    end = "after Holm over 2, 3 of 4 declared seeds, 40 problems). On gsm8k nothing: no runs."
    assert found["verdict"] == "undecided" and found["answer"].endswith(end)
    table = (runs.parent / "report" / "table.md").read_text()
    assert f"gsm8k, {B5} − {B3}: no runs" in table and f"| {B5} | 3 (without 3) |" in table
    assert f"Incomplete: {B3}, {B5} seed 3: no run." in table
    made_run(runs, B3, "fixtures_math", 3, 40), made_run(runs, B5, "fixtures_math", 3, 40)
    with pytest.raises(InputError, match=r"gsm8k: no runs; mine\.yaml declares it; run what is missing, or --allow"):
        report(runs, family=family)


def test_problems_without_a_score_are_counted(runs):
    spoil_score(runs)
    found = report(runs, allow_partial=True)
    text = (runs.parent / "report" / "table.md").read_text()
    assert "Percent of 40 test problems" in text and "left out of its arm; problems left: b5_cts 39." in text
    assert found["comparisons"][0]["problems"] == 39
    assert "39 problems" in found["answer"] and "fixtures_math: the 39 problems" in found["note"]


def test_texts_are_said_to_be_of_the_seed_that_they_are_of(runs):
    shutil.rmtree(next(runs.glob("b5*s0*")))
    note = report(runs, allow_partial=True)["note"]
    assert note.endswith("texts: seed b3_grpo_verifier 0, b5_cts 1.")


def test_commands_say_how_the_runs_were_made(runs):
    made_run(runs, B5, "fixtures_math", 0, 40, flags={"lam_align": 0.0})
    found = report(runs, allow_partial=True)
    line = next(line for line in found["commands"] if "lam_align" in line)
    assert line.startswith("for s in 0; do python b5_cts.py --task=fixtures_math --seed=$s --lam_align=0.0 --replay=")
    assert "replay_fixtures_math; done" in line


def test_people_are_another_command():
    done = subprocess.run([sys.executable, "-c", HUMAN], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "('sheet.csv',)\n"), done.stderr


HUMAN = """
import dataclasses, runpy, sys, types
@dataclasses.dataclass
class HumanArgs:
    sheets: "tyro.conf.Positional[tuple[str, ...]]"
import tyro
room = types.ModuleType("common.human")
room.HumanArgs, room.human_main = HumanArgs, lambda args: print(args.sheets)
sys.modules["common.human"] = room
sys.argv = ["aggregate.py", "human", "sheet.csv"]
runpy.run_path("aggregate.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_matrix_of_a_paper_takes_20_seconds_and_a_gibibyte_at_most(tmp_path):
    """6 methods, 2 tasks, 5 seeds, 1,319 problems. Seconds of the processor: others may be at work here."""
    folder = made_matrix(tmp_path / "runs", tasks=("gsm8k", "apps"), seeds=range(5), n=1319)
    program = (
        f"import re, resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport aggregate\n"
        f"aggregate.main(aggregate.Args(runs=({str(folder)!r},), out={str(tmp_path / 'out')!r}))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"  # ru_maxrss: the parent's too
        "print(used.ru_utime + used.ru_stime, peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seconds, kibibytes = map(float, done.stdout.splitlines()[-1].split())
    assert seconds <= 20 and kibibytes <= 2**20
    assert (tmp_path / "out" / "report.html").stat().st_size < 5_000_000
