"""The launcher of sweeps on stand-ins for the scripts, in a repository of its own; at the end on a real script.

pytest tests/test_launch.py        (and with -m slow)
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from examples import ROOT

from common.basics import InputError
from common.locks import process_start
from sweeps.local import last_lines, shares_of_cores, span

# A script in miniature: takes its lock, goes on where it was, writes a line a step, at the end its result. What goes
# wrong is said by --prompts, which real scripts have, too: 1: killed after a step, once; 2: fails always; 3: bad input.
STAND_IN = """
import json, os, pathlib, signal, sys, time
from common.cells import check_expected
from common.locks import lock
from common.basics import InputError
flags = dict(w.removeprefix("--").partition("=")[::2] for w in sys.argv[1:])
assert "resume" in flags
name = f"{pathlib.Path(__file__).stem}__{flags['task']}__s{flags['seed']}__{flags.get('prompts', '0')}"
folder = pathlib.Path(flags.get("out_dir", "runs")) / name
folder.mkdir(parents=True, exist_ok=True)
try:
    lock(folder / "lock")
    check_expected(json.loads(os.environ.get("IDENTITY", '{"base_weights": "b", "decode": {"T": 8}}')))
    if flags.get("prompts") == "3":
        raise InputError("--prompts 3: no such number")
except InputError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
if (folder / "result.json").is_file():  # as real ones show it
    sys.exit()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
rows = folder / "metrics.jsonl"
done = len(rows.read_text().splitlines()) if rows.is_file() else 0
(folder / "starts").open("a").write(f"{os.getpid()} {done}\\n")
for step in range(done, int(flags["steps"])):
    time.sleep(float(os.environ.get("STEP", "0.02")))
    rows.open("a").write(json.dumps({"step": step}) + "\\n")
    if flags.get("prompts") == "1" and step == 1 and done == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if flags.get("prompts") == "2" and step >= 1:
        print("no luck\\rlast bar")
        raise ValueError("this always fails")
    if stopped:
        sys.exit(143)
fingerprint = {"base_weights": "b", "decode": {"T": 8}, "optimizer_steps": int(flags["steps"]), "digest": "d"}
result = {"fingerprint": fingerprint, "summary": {"accuracy_revised": 0.25}, "timings": {"total": 1.0}}
(folder / "result.json").write_text(json.dumps(result))
"""
# identify.py in miniature: --temperature and --model are in the fingerprint, as far as these stand-ins have them.
IDENTIFY = """
import json, sys
request = json.load(sys.stdin)
cells = []
for c in request["cells"]:
    flags = dict(w.removeprefix("--").partition("=")[::2] for w in c["flags"])
    name = f"{c['script']}__{flags['task']}__s{flags['seed']}__{flags.get('prompts', '0')}"
    steps, T = int(flags["steps"]), int(flags.get("max_new_tokens", 8))
    identity = {"base_weights": "b" + flags.get("model", ""), "decode": {"T": T}, "digest": "i"}
    cells.append({"name": name, "model": "", "steps": steps, "identity": identity, "dtype": flags.get("dtype", "auto"),
                  "fingerprint": {**identity, "optimizer_steps": steps, "digest": "d"}})
print(json.dumps({"cells": cells, "backend": "cpu"}))
"""


@pytest.fixture
def repository(tmp_path):
    """A folder with the launcher and what it imports, and two stand-ins."""
    root = tmp_path / "repository"
    (root / "sweeps").mkdir(parents=True)
    (root / "common").mkdir()
    for name in ("basics", "cells", "locks", "sweep", "__init__"):
        shutil.copy(ROOT / "common" / f"{name}.py", root / "common")
    for name in ("launch", "local", "cell"):
        shutil.copy(ROOT / "sweeps" / f"{name}.py", root / "sweeps")
    (root / "sweeps" / "identify.py").write_text(IDENTIFY)
    for name in ("b0_one", "b1_two"):
        (root / f"{name}.py").write_text(STAND_IN)
    return root


def sweep(root, **parameters):
    """A sweep's file in the repository; by default of four cells with three steps each."""
    given = {"seed": [0, 1], "task": "fixtures_math", "arm": ["b0_one", "b1_two"], "steps": 3, **parameters}
    spec = lambda value: {"values": value} if isinstance(value, list) else {"value": value}
    config = {
        "program": "sweeps/cell.py", "command": ["${env}", "python", "${program}", "${args}"], "method": "grid",
        "parameters": {name: spec(value) for name, value in given.items()},
    }  # fmt: skip
    (root / "a.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return root / "a.yaml"


def launch(root, *flags, **variables):
    """The launcher, started as a user starts it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "CTS_"))} | variables
    command, pipes = [sys.executable, "sweeps/launch.py", "a.yaml", *flags], dict.fromkeys(("stdout", "stderr"), -1)
    return subprocess.Popen(command, cwd=root, env=env, text=True, **pipes)


def launched(root, *flags, **variables):
    """(exit code, standard output, standard error) of a launcher that was left to end."""
    process = launch(root, *flags, **variables)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def starts(root):
    """{run: [steps that were done at each of its starts]}."""
    read = lambda path: [int(line.split()[1]) for line in path.read_text().splitlines()]
    return {path.parent.name: read(path) for path in root.glob("runs/*/starts")}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


# ---- here -----------------------------------------------------------------------------------------------------------
def test_cores_are_shared_evenly(monkeypatch):
    """Each core in one share; no shares where there are too few cores."""
    for cores in ({0, 1}, {1, 3, 4, 6, 7}, {5}):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        for n in (1, 2, 3):
            shares = shares_of_cores(n)
            if n > len(cores):
                assert shares == []
                continue
            assert sorted(core for share in shares for core in share) == sorted(cores)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_cells_side_by_side_have_cores_of_their_own(repository):
    """Two at a time: what a script finds as its cores is one of two halves, and both halves are used."""
    path = repository / "b0_one.py"
    path.write_text(STAND_IN + "\n(folder / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))\n")
    sweep(repository, arm="b0_one", seed=[0, 1, 2, 3], steps=20)
    code, out, err = launched(repository, "--at_once", "2")
    assert code == 0, out + err
    seen = {p.read_text() for p in repository.glob("runs/*/cores")}
    assert seen == {str(sorted(share)) for share in shares_of_cores(2)}


@pytest.mark.parametrize("own", [None, "glibc.malloc.perturb=0"])
def test_cells_have_huge_pages(repository, own):
    """Unless whoever started the launcher has settings of glibc of their own."""
    path = repository / "b0_one.py"
    path.write_text(STAND_IN + "\n(folder / 'tunables').write_text(os.environ['GLIBC_TUNABLES'])\n")
    sweep(repository, arm="b0_one", seed=[0], steps=1)
    code, out, err = launched(repository, **({"GLIBC_TUNABLES": own} if own else {}))
    assert code == 0, out + err
    (seen,) = repository.glob("runs/*/tunables")
    assert seen.read_text() == (own or "glibc.malloc.hugetlb=1")


def test_cells_run_once_and_finished_ones_are_skipped(repository):
    sweep(repository)
    code, out, err = launched(repository, "--at_once", "2")
    assert (code, err) == (0, "")
    assert "4 cells, 0 of them finished, 2 at a time" in out and "fixtures_math: fingerprint d in all cells" in out
    assert out.count(": started\n") == 4 and out.count("finished in") == 4 and "revised accuracy 25.0%" in out
    assert re.search(r"1/4  b\d_\w+ fixtures_math s\d: finished in .*; about \d+ s left", out)
    assert "4 of 4 cells have finished." in out
    assert starts(repository) == {f"{arm}__fixtures_math__s{s}__0": [0] for arm in ("b0_one", "b1_two") for s in (0, 1)}
    sweep(repository, seed=[0, 1, 2])  # an amended file: only the new cells run
    code, out, _ = launched(repository)
    assert code == 0 and "6 cells, 4 of them finished" in out and out.count(": started\n") == 2
    assert len(starts(repository)) == 6 and {*map(len, starts(repository).values())} == {1}


def test_the_first_of_a_task_goes_alone_until_it_trains(repository):
    sweep(repository, seed=[0, 1, 2], steps=2)
    launched(repository, "--at_once", "6", STEP="0.5")
    logs = sorted((repository / "runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    assert len(logs) == 6
    began = {p.parent.name: (p.parent / "starts").stat().st_mtime for p in logs}
    first = min(began, key=began.get)
    assert sorted(began.values())[1] - began[first] > 0.4  # a step of the first


def test_a_cell_killed_by_sigkill_goes_on(repository):
    sweep(repository, arm=["b0_one --prompts=1", "b1_two"], seed=[0])
    code, out, _ = launched(repository)
    assert code == 0 and "2 of 2 cells have finished." in out
    assert "b0_one --prompts=1 fixtures_math s0: killed by signal 9 after 2 of 3 steps; it goes on when there is" in out
    assert "started again after 2 of 3 steps, try 2 of 3" in out
    assert starts(repository)["b0_one__fixtures_math__s0__1"] == [0, 2]
    lines = [line.split(": ")[1] for line in out.splitlines() if "started" in line]
    assert lines == ["started", "started again after 2 of 3 steps, try 2 of 3", "started"]  # when its slot is free


def test_what_always_fails_is_told_with_the_end_of_its_log(repository):
    sweep(repository, arm=["b0_one --prompts=2", "b0_one --prompts=3", "b1_two"], seed=[0])
    code, out, _ = launched(repository, "--tries", "2")
    assert code == 1 and "1 of 3 cells have finished." in out
    assert [len(s) for _, s in sorted(starts(repository).items())] == [2, 1]  # bad input never starts
    told = out[out.index("FAILED") :]
    assert "FAILED  b0_one --prompts=2 fixtures_math s0: ended with exit code 1 after 3 of 3 steps" in told
    assert "    ValueError: this always fails\n" in told and "    last bar\n" in told and "no luck" not in told
    assert "FAILED  b0_one --prompts=3 fixtures_math s0: ended with exit code 2" in told
    assert "    error: --prompts 3: no such number" in told and "python b0_one.py --prompts=3" in told
    assert out.count("b0_one --prompts=3 fixtures_math s0: started") == 1
    assert "The same command goes on with those that have not." in told


def test_a_launcher_that_is_killed_loses_no_run(repository):
    """Its runs live on, the next launcher takes them over, counts them, and starts none of them twice."""
    sweep(repository, steps=30)
    first = launch(repository, "--at_once", "2", STEP="0.1")
    wait_for(lambda: len([*repository.glob("runs/*/metrics.jsonl")]) == 2)
    first.kill()
    first.communicate()
    code, out, _ = launched(repository, "--at_once", "2", STEP="0.1")
    assert code == 0 and "4 of 4 cells have finished." in out
    assert out.count("runs already, started by a launcher that is gone") == 2
    assert {*map(tuple, starts(repository).values())} == {(0,)} and len(starts(repository)) == 4
    told = [line for line in out.splitlines() if ": started" in line or "finished in" in line]
    assert "finished in" in told[0]  # both slots were taken


def test_a_run_whose_launcher_and_self_were_killed_goes_on(repository):
    sweep(repository, steps=20, seed=[0])
    first = launch(repository, STEP="0.1")
    run = wait_for(lambda: next(iter(repository.glob("runs/*/metrics.jsonl")), None)).parent
    wait_for(lambda: (run / "metrics.jsonl").read_text().count("\n") > 2)
    first.kill()
    os.kill(int((run / "starts").read_text().split()[0]), signal.SIGKILL)
    first.communicate()
    code, out, _ = launched(repository)
    assert code == 0 and re.search(r"started again after \d+ of 20 steps\n", out)
    again = starts(repository)[run.name]
    assert len(again) == 2 and again[1] >= 2


def test_two_launchers_share_the_work(repository):
    sweep(repository, seed=[0, 1, 2], steps=8)
    both = [launch(repository, "--at_once", "1", STEP="0.1") for _ in range(2)]
    outs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("6 of 6 cells have finished." in out for out in outs)
    assert {*map(tuple, starts(repository).values())} == {(0,)} and len(starts(repository)) == 6
    assert sum(out.count(": started\n") for out in outs) == 6 and all(": started\n" in out for out in outs)


def test_a_run_that_somebody_has_started_by_hand_is_waited_for(repository):
    """Nothing is counted against it: there was no crash."""
    sweep(repository, seed=[0], arm="b0_one", steps=8)
    text = (repository / "sweeps" / "local.py").read_text()
    (repository / "sweeps" / "local.py").write_text(text.replace("= 0.5, 5, 120, 30", "= 0.1, 5, 120, 0.1"))
    words = ["b0_one.py", "--seed=0", "--task=fixtures_math", "--steps=8", "--resume"]
    hand = subprocess.Popen([sys.executable, *words], cwd=repository, env={**os.environ, "STEP": "0.4"})
    wait_for(lambda: [*repository.glob("runs/*/metrics.jsonl")])
    code, out, _ = launched(repository, "--tries", "1")
    assert code == 0 and hand.wait() == 0 and "FAILED" not in out
    assert [*starts(repository).values()] == [[0]]


def test_a_stop_lets_the_runs_save(repository):
    sweep(repository, steps=100)
    process = launch(repository, "--at_once", "2", STEP="0.1")
    wait_for(lambda: len([*repository.glob("runs/*/metrics.jsonl")]) == 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.count("saves after its step and ends") == 2 and out.count("ended with exit code 143") == 2
    assert "0 of 4 cells have finished." in out and "FAILED" not in out
    for pid in (int(path.read_text().split()[0]) for path in repository.glob("runs/*/starts")):
        assert process_start(pid) is None


# ---- the guard ------------------------------------------------------------------------------------------------------
def test_cells_that_differ_are_refused_before_the_first_starts(repository):
    sweep(repository, arm=["b0_one", "b1_two", "b1_two --model=other"], max_new_tokens=[8, 9])
    code, out, err = launched(repository)
    assert (code, out) == (2, "") and not starts(repository)
    assert err.startswith("error: these cells do not belong in one table. fixtures_math: base_weights is ")
    assert 'is "bother" in b1_two --model=other fixtures_math s0 max_new_tokens=8, ' in err and " and 5 more" in err
    assert "fixtures_math: decode.T is 8 in b0_one fixtures_math s0 max_new_tokens=8, " in err and "; is 9 in " in err
    sweep(repository, task=["fixtures_math", "fixtures_long"], seed=[0])  # tasks have tables of their own
    assert launched(repository)[0] == 0


def test_a_result_of_other_code_is_refused(repository):
    sweep(repository, seed=[0])
    assert launched(repository)[0] == 0
    path = repository / "runs" / "b1_two__fixtures_math__s0__0" / "result.json"
    result = json.loads(path.read_text())
    result["fingerprint"]["decode"]["T"] = 9
    path.write_text(json.dumps(result))
    code, _, err = launched(repository)
    assert code == 2 and f"{path.parent.relative_to(repository)} has finished with another decode.T" in err
    path.write_text("{")
    code, _, err = launched(repository)
    assert code == 2 and f"{path.relative_to(repository)}: cut off or damaged" in err and "Traceback" not in err


def test_a_run_that_is_not_as_planned_refuses_itself(repository):
    sweep(repository, seed=[0], arm="b0_one")
    code, out, _ = launched(repository, IDENTITY='{"base_weights": "another", "decode": {"T": 8}}')
    assert code == 1 and 'for it has another base_weights ("another")' in out and "try 2" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tries", "0"), "error: --at_once must be at least 0, --tries at least 1"),
        (("--out_dir", "gs://b"), "error: --out_dir gs://b: must be a folder: what has finished is looked up there"),
        (("--wandb", "--out_dir", "there"), "error: --out_dir there: cells that an agent starts write into runs/"),
    ],
)
def test_bad_flags_are_one_line(repository, flags, words):
    sweep(repository, dtype="float32")
    code, out, err = launched(repository, *flags)
    assert (code, out, err.strip()) == (2, "", words)


# ---- elsewhere ------------------------------------------------------------------------------------------------------
def test_print_gives_lines_that_a_shell_runs(repository):
    sweep(repository, seed=[0], arm=["b0_one", "b1_two --prompts=1"])
    _, out, _ = launched(repository, "--print")
    first, second = out.splitlines()
    expected = shlex.split(first)[0]
    assert re.fullmatch(r"CTS_EXPECTED=base_weights:[0-9a-f]{8},decode:[0-9a-f]{8}", expected)
    words = ["python", "b1_two.py", "--prompts=1", "--seed=0", "--task=fixtures_math", "--steps=3", "--resume"]
    assert shlex.split(second) == [expected, "WANDB_RUN_GROUP=a-fixtures_math-d", *words]
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert subprocess.run(first, shell=True, cwd=repository, env=env, check=False).returncode == 0
    _, out, err = launched(repository, "--print")  # what has finished is left out
    assert out.splitlines() == [second] and "1 of 2 cells have finished here and are left out" in err
    other = first.replace("base_weights:", "base_weights:0")
    done = subprocess.run(other, shell=True, cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "it has another base_weights" in done.stderr


def test_what_slurm_and_sky_are_given(tmp_path, capsys):
    """Nothing where all has finished; several arrays where one is too long; a path as it is; no cell without
    its base or bucket."""
    from types import SimpleNamespace

    from sweeps.launch import say_elsewhere

    def say(count, *, model="", **options):
        cell = SimpleNamespace(has_result=not count, dtype="float32", model=model, line="python b5_cts.py")
        usual = dict(print=False, slurm=False, sky=False, wandb=False, out_dir="runs", at_once=0)
        given = SimpleNamespace(**{**usual, "file": pathlib.Path("a.yaml"), **options})
        say_elsewhere([cell] * max(count, 1), {}, given)
        return capsys.readouterr().out

    (tmp_path / "a,b c/cells").mkdir(parents=True)
    where = str(tmp_path / "a,b c")
    assert say(0, slurm=True, out_dir=where) == say(0, sky=True) == "" and not list(tmp_path.rglob("*.txt"))
    lines = [shlex.split(line) for line in say(1500, slurm=True, out_dir=where).splitlines()]
    assert lines == [[f"CELLS={where}/cells/a{part}.txt", "sbatch", f"--array=1-{n}", "deploy/slurm.sbatch"]
                     for part, n in (("", 1000), ("-2", 500))]  # fmt: skip
    assert (tmp_path / "a,b c/cells/a-2.txt").read_text().count("\n") == 500
    with pytest.raises(InputError, match="start from runs/base/k, which SkyPilot's machines do not have"):
        say(1, sky=True, model="runs/base/k")
    with pytest.raises(InputError, match="--out_dir x: SkyPilot's machines send to BUCKET/runs"):
        say(1, sky=True, out_dir="x")


def test_slurm_and_sky_take_the_same_lines(repository):
    sweep(repository, seed=[0])
    code, _, err = launched(repository, "--slurm")
    assert code == 2 and "--dtype is auto" in err  # the other machine's might be another
    sweep(repository, seed=[0], dtype="float32")
    lines = launched(repository, "--print")[1]
    code, out, _ = launched(repository, "--slurm", "--at_once", "8")
    assert out == "CELLS=runs/cells/a.txt sbatch --array=1-2%8 deploy/slurm.sbatch\n"
    assert (repository / "runs" / "cells" / "a.txt").read_text() == lines
    code, out, _ = launched(repository, "--sky")
    for i, (line, command) in enumerate(zip(out.splitlines(), lines.splitlines(), strict=True), 1):
        words = ["sky", "jobs", "launch", "-y", "-n", f"cts-a-{i}", "--env", "BUCKET=$BUCKET"]
        assert shlex.split(line) == [*words, "--env", f"COMMAND={command}", "deploy/sky.yaml"]


WANDB = """
import json, pathlib
def sweep(config, entity=None, project=None):
    if entity == "nobody":
        raise ValueError("no\\nsuch entity")
    pathlib.Path("registered.json").write_text(json.dumps([config, entity, project]))
    return "abc123"
"""


def test_wandb_registers_the_sweep_and_its_cells_are_the_launchers(repository):
    """W&B's own agent code makes the command line of each cell from what was registered."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    path = sweep(repository, seed=[0], arm=["b0_one", "b1_two --prompts=1"], dtype="float32")
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"entity": "us"}, sort_keys=False))
    (repository / "wandb.py").write_text(WANDB)
    code, out, err = launched(repository, "--wandb")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f'PATH="{pathlib.Path(sys.executable).parent}:$PATH" wandb agent us/cts/abc123'
    registered, *where = json.loads((repository / "registered.json").read_text())
    assert where == ["us", "cts"] and registered.pop("entity") == "us"
    guard = registered["parameters"].pop("guard")
    assert registered == config
    lines = launched(repository, "--print")[1].splitlines()
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env["PATH"] = f"{pathlib.Path(sys.executable).parent}:{env['PATH']}"
    run = lambda command: subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    show = "import sys, sweeps.cell as c; w, e = c.prepare(sys.argv[1:]); print(*e.items(), *w, sep='\\n')"
    for arm, line in zip(("b0_one", "b1_two --prompts=1"), lines, strict=True):
        values = {"arm": arm, "seed": 0, "task": "fixtures_math", "steps": 3, "dtype": "float32"}
        values["guard"] = guard["value"]
        again = {"_wandb": {"preempted": True}}  # what a run that is started again is given
        args = create_sweep_command_args({"args": {k: {"value": v} for k, v in (values | again).items()}})["args"]
        command = create_sweep_command(registered["command"])
        assert command == ["${env}", "python", "${program}", "${args}"]
        command = ["/usr/bin/env", "python", registered["program"], *args]
        done = run(command)
        killed = "prompts=1" in arm  # by SIGKILL: a failure, which W&B would not see in a negative code
        assert done.returncode == (128 + signal.SIGKILL if killed else 0), done.stderr
        first, second, _, *words = shlex.split(line)
        variables = [str(tuple(word.split("=", 1))) for word in (first, second)]
        assert sorted(run([sys.executable, "-c", show, *args]).stdout.splitlines()) == sorted([*variables, *words])
    done = run([*command[:3], *(word.replace("base_weights:", "base_weights:0") for word in args)])
    assert done.returncode == 2 and "it has another base_weights" in done.stderr
    path.write_text(yaml.safe_dump(config | {"entity": "nobody"}, sort_keys=False))
    code, _, err = launched(repository, "--wandb")
    assert code == 2 and "error: W&B has not registered it (no such entity); see: wandb login" in err


def test_a_cell_is_stopped_with_what_runs_it(repository):
    """By a signal, which it hands on, and by SIGKILL, which it cannot."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        words = ["--arm=b0_one", f"--seed={code}", "--task=fixtures_math", "--steps=500"]
        process = subprocess.Popen(
            [sys.executable, "sweeps/cell.py", *words], cwd=repository, stderr=subprocess.PIPE, text=True
        )
        folder = repository / "runs" / f"b0_one__fixtures_math__s{code}__0"
        wait_for(lambda folder=folder: (folder / "metrics.jsonl").is_file())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "registered without its fingerprints" in err
        wait_for(lambda folder=folder: process_start(int((folder / "starts").read_text().split()[0])) is None)


def test_words_that_no_agent_writes_are_refused(repository):
    for words, said in (
        (["run"], "run: expected --parameter=value"), (["--seed=0"], "--arm is missing"),
        (["--arm=b9_no", "--task=t", "--seed=0"], "b9_no is no script; there are b0_one, b1_two"),
    ):  # fmt: skip
        command = [sys.executable, "sweeps/cell.py", *words]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


# ---- the real thing -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_real_cells_end_under_the_fingerprint_that_was_planned(command, tmp_path):
    """Two scripts on a tiny checkpoint; a cell is killed after a step, the launcher too, and the next one goes on."""
    given = {k: v for k, v in command.settings.items() if k not in ("out_dir", "truncated")}  # b0 has no such flag
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in given.items()}
    file = sweep(tmp_path, seed=[0], arm=["b0_sft", "b2_grpo"], **settings | {"steps": 6, "save_every": 1})
    start = [sys.executable, "sweeps/launch.py", str(file), "--out_dir", str(tmp_path / "runs")]
    run = lambda *more: subprocess.run([*start, *more], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    first = subprocess.Popen([*start], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    began = lambda: first.poll() is not None or next(iter((tmp_path / "runs").glob("b0_sft__*/metrics.jsonl")), None)
    metrics = wait_for(began, 600)
    assert first.poll() is None
    pid = int(re.search(r"process (\d+) on", (metrics.parent / "lock").read_text())[1])
    first.kill()
    os.kill(pid, signal.SIGKILL)
    done = run("--at_once", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"b0_sft fixtures_math s0: started again after \d of 6 steps", done.stdout)
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")]
    assert len(results) == 2 and results[0]["fingerprint"] == results[1]["fingerprint"]
    assert results[0]["fingerprint"]["digest"][:16] in done.stdout
    rows = [path.read_text().splitlines() for path in (tmp_path / "runs").glob("b?_*/metrics.jsonl")]
    assert [*map(len, rows)] == [6, 6]
    assert run("--print").stdout == ""  # nothing is left


# ---- small pieces ---------------------------------------------------------------------------------------------------
def test_last_lines_and_spans(tmp_path):
    (tmp_path / "log").write_text("a\n\nbar 1%\rbar 2%\n  \nlast")
    assert last_lines(tmp_path / "log", 2) == ["bar 2%", "last"] and last_lines(tmp_path / "none") == []
    assert [span(s) for s in (4.6, 99, 100, 5000, 9000)] == ["5 s", "99 s", "2 min", "83 min", "2.5 h"]
