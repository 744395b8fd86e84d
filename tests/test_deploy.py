"""Every launcher against programs that stand in for gcloud, sky, sbatch, srun, docker and kubectl: they record their
calls and fail when told. Then what the files of deploy/ say, and a run on two nodes of real processes.

pytest tests/test_deploy.py        (and with -m slow)
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml
from examples import GOLDEN, ROOT, math_quad

from common.basics import InputError
from common.replay import write_replay
from common.report import read_metrics

DEPLOY, STAND_INS = ROOT / "deploy", ROOT / "tests/stand_ins"
NAMES = ("gcloud", "gsutil", "sky", "sbatch", "srun", "scontrol", "scancel", "squeue", "docker", "kubectl", "xpk")
SHOW = f"{sys.executable} {{}}/show.py"  # a command that prints its arguments as JSON


class Place:
    """A folder with stand-ins on PATH: `rules` say what they do, `calls` what they were asked."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.log = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name in NAMES:
            shutil.copy(STAND_INS / "stand_in.sh", folder / "bin" / name)
            (folder / "bin" / name).chmod(0o755)
        (folder / "show.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
        self.rules("")

    def rules(self, *lines: str) -> None:
        """PATTERN|TIMES|EXIT CODE|OUTPUT each; of those that fit the first counts, TIMES times (0: always)."""
        (self.folder / "rules").write_text("".join(f"{line}\n" for line in lines if line))
        self.log.unlink(missing_ok=True)
        pathlib.Path(f"{self.log}.used").unlink(missing_ok=True)

    def env(self, **variables: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SKYPILOT_")) and k != "CTS_LAUNCHER"}
        env |= {"PATH": f"{self.folder / 'bin'}:{env['PATH']}", "CALLS": str(self.log), "TMPDIR": str(self.folder)}
        return env | {"RULES": str(self.folder / "rules")} | variables

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, env=self.env(**variables), cwd=self.folder, **pipes)

    def bash(self, script: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start("bash", str(DEPLOY / script), **variables)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.is_file() else []


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def shown(output: str) -> list[str]:
    """The calls that a launcher prints, without those of programs that are not stood in for."""
    return [line for line in output.splitlines() if line.startswith("+ ") and not line.startswith(("+ tar ", "+ git "))]


def test_shellcheck_finds_nothing():
    """Debian's package, or the one of PyPI."""
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if not program:
        pytest.skip("apt-get install shellcheck, or pip install -r tests/requirements.txt")
    scripts = [*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.sbatch"), *STAND_INS.glob("*.sh"), *ROOT.glob("tests/*.sh")]
    assert len(scripts) >= 4
    done = subprocess.run([program, *map(str, scripts)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


# ---- a cell ---------------------------------------------------------------------------------------------------------
def test_a_cell_gets_its_arguments_as_they_are_written(place):
    command = SHOW.format(place.folder) + """ 'a b' --x=1=2 "it's" '$HOME' '' '*'"""
    done = place.bash("cell.sh", COMMAND=command)
    assert json.loads(done.stdout) == ["a b", "--x=1=2", "it's", "$HOME", "", "*"] and done.returncode == 0
    assert place.bash("cell.sh", COMMAND=command, DRY_RUN="1").stdout == f"{command}\n"
    assert done.stderr == f"cell: {command}\n"
    (place.folder / "cells of mine.txt").write_text(f"false\nX='a b' {command}\n")
    done = place.bash("cell.sh", CELLS="cells of mine.txt", CELL="2")
    assert json.loads(done.stdout)[:2] == ["a b", "--x=1=2"] and done.returncode == 0
    assert place.bash("cell.sh", CELLS="cells of mine.txt", CELL="1").returncode == 1


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        (r'"cost $\$(5)"', "cost $$(5)"), (r'"$\\(x)"', r"$\(x)"), ('"${HERE}/$HERE"', "a b/a b"),
        ("'$(x)`x`'", "$(x)`x`"), (r"\$\(x\)", "$(x)"), ('"a$"', "a$"), ("$HERE", "a"), (r'"\`x\`"', "`x`"),
    ],
)  # fmt: skip
def test_what_runs_nothing_is_no_command_in_a_command(place, text, argument):
    done = place.bash("cell.sh", COMMAND=SHOW.format(place.folder) + f" {text}", HERE="a b")
    assert json.loads(done.stdout)[0] == argument, done.stderr


@pytest.mark.parametrize(
    ("command", "variables", "added"),
    [
        ("python b5_cts.py --seed 3", {}, " --resume"),
        ("python b5_cts.py --resume --out_dir=x", dict(OUT_DIR="/y"), ""),
        ("python b5_cts.py", dict(OUT_DIR="/my runs/x=1"), r" --resume --out_dir /my\ runs/x=1"),
        ("python ./b3_grpo_verifier.py --out-dir y", dict(OUT_DIR="/y"), " --resume"),
        ("python teacher.py --task gsm8k", dict(OUT_DIR="/y"), ""),
        ("python b0_sft.py --resume", dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
         SKYPILOT_NODE_RANK="1"), " --hosts 10.0.0.1:8476,2,1"),
        ("python b0_sft.py --resume --hosts auto", dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS="10.0.0.1",
         SKYPILOT_NODE_RANK="1"), ""),
        ("python b0_sft.py --resume", dict(SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_IPS="10.0.0.1",
         SKYPILOT_NODE_RANK="0"), ""),
        ("python b0_sft.py --resume", dict(CLUSTER_SPEC=json.dumps({"cluster": {"workerpool0": ["a:2222"],
         "workerpool1": ["b:2222", "c:2222"]}, "task": {"type": "workerpool1", "index": 1}})), " --hosts a:2222,3,2"),
        ("python b0_sft.py --resume", dict(CLUSTER_SPEC=json.dumps({"cluster": {"workerpool0": ["a:2222"]},
         "task": {"type": "workerpool0", "index": 0}})), ""),
    ],
)  # fmt: skip
def test_what_a_cell_is_given(place, command, variables, added):
    done = place.bash("cell.sh", COMMAND=command, DRY_RUN="1", **variables)
    assert (done.stdout, done.returncode) == (f"{command}{added}\n", 0), done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "COMMAND is not set"),
        (dict(CELLS="nowhere"), "CELLS=nowhere cannot be read"),
        (dict(CELLS="cells"), "CELL=: give the number of a line"),
        (dict(CELLS="cells", CELL="0"), "CELL=0: give the number of a line"),
        (dict(CELLS="cells", CELL="3"), "CELL=3: cells has no such line"),
        *((dict(COMMAND=text), "COMMAND names no program") for text in (" ", "X=1", "X='a b' Y=", "$NONE", "-i", "''")),
        (dict(COMMAND="#x"), "COMMAND has an unquoted #"),
        *(
            (dict(COMMAND=f"true {c} false"), f"COMMAND has an unquoted {c[0]}")
            for c in ("&&", ";", "|", ">x", "(", "`x`")
        ),
        (dict(COMMAND="python b5_cts.py # seed 3"), "COMMAND has an unquoted #; give one"),
        *(
            (dict(COMMAND=f"true \"it's {c} isn't\""), f"COMMAND has a {c[0]}")
            for c in ("$(touch made)", "`touch made`")
        ),
        (dict(COMMAND='true "\\\\$(touch made)"'), "COMMAND has a $("),
        *(
            (dict(COMMAND=f"true {text}"), "COMMAND has a $")
            for text in (
                "$'\\'' $(touch made) \\'",
                "$'\\'' ; touch made ; \\'",
                '"${x-"\'$(touch made)\'"}"',
                "${x:='$(touch made)'} ${x@P}",
                "${x:='a[$(touch made)]'} $[x]",
                '"$[x]"',
                '"$((2+2))"',
            )
        ),
        (dict(COMMAND="true 'a"), "COMMAND has an unquoted '"),
        (dict(COMMAND="true\nfalse"), "COMMAND has several lines"),
        (dict(COMMAND="true", SECRETS="bad.env"), "SECRETS=bad.env: line 2 is not NAME=value"),
        (dict(COMMAND="true", SECRETS="nowhere"), "SECRETS=nowhere cannot be read"),
        (dict(COMMAND="true", SECRETS="cells"), "SECRETS=cells can be read by others; chmod 600 it"),
    ],
)
def test_a_cell_that_cannot_be_is_bad_input(place, variables, message):
    (place.folder / "cells").write_text("true\ntrue\n")
    (place.folder / "cells").chmod(0o644)
    (place.folder / "bad.env").write_text("A=1\nvery secret\n")
    (place.folder / "bad.env").chmod(0o600)
    done = place.bash("cell.sh", **variables)
    assert "very" not in done.stderr and done.stdout == "" and not (place.folder / "made").exists()
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_secrets_reach_the_command_and_no_line(place):
    """Each value as it stands: nothing of it is executed, expanded or unquoted. The file is this, not one on PATH."""
    values = ["very secret", "a$HOME$(touch x)", "`touch x`", "a&b;c|d #e", "'q' \"r\"", "", " s ", "last"]
    lines = "".join(f"S{i}={value}\n" for i, value in enumerate(values[:-1]))
    (place.folder / "secrets").write_text(f"# mine\n\n{lines}S{len(values) - 1}={values[-1]}")
    (place.folder / "secrets").chmod(0o600)
    (place.folder / "bin/secrets").write_text("S0=other\n")
    program = "import json, os; print(json.dumps([os.environ[f'S{i}'] for i in range(8)]), os.environ['CTS_LAUNCHER'])"
    done = place.bash("cell.sh", COMMAND=f'{sys.executable} -c "{program}"', SECRETS="secrets")
    assert done.stdout == f"{json.dumps(values)} cell.sh\n" and "very" not in done.stderr and "last" not in done.stderr
    assert not list(place.folder.glob("**/x")) and not (ROOT / "x").exists()


def test_a_cell_s_line_may_be_a_comment_and_end_as_it_likes(place):
    (place.folder / "cells").write_text("# python b5_cts.py\n\tpython b5_cts.py  \r\n")
    done = place.bash("cell.sh", CELLS="cells", CELL="1")
    assert (done.returncode, done.stdout) == (0, "") and "is a comment: nothing to run" in done.stderr
    done = place.bash("cell.sh", CELLS="cells", CELL="2", OUT_DIR="/y", DRY_RUN="1")
    assert done.stdout == "python b5_cts.py --resume --out_dir /y\n"
    done = place.bash("cell.sh", COMMAND="python b5_cts.py\n", OUT_DIR="/y", DRY_RUN="1")
    assert done.stdout == "python b5_cts.py --resume --out_dir /y\n"


@pytest.mark.parametrize(("device", "added"), [("accel0", ""), ("vfio/0", ""), ("nvidia0", " --hosts a:8476,2,1")])
def test_a_tpu_s_hosts_are_not_named(place, device, added):
    """They find each other; what a machine has is looked up in /dev."""
    (place.folder / "dev" / device).parent.mkdir(parents=True)
    (place.folder / "dev" / device).touch()
    script = (DEPLOY / "cell.sh").read_text().replace("/dev/accel", f"{place.folder}/dev/accel")
    (place.folder / "cell.sh").write_text(script.replace("/dev/vfio", f"{place.folder}/dev/vfio"))
    nodes = dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS="a\nb", SKYPILOT_NODE_RANK="1")
    process = place.start("bash", "cell.sh", DRY_RUN="1", COMMAND="python b5_cts.py --resume", **nodes)
    assert process.communicate(timeout=60)[0] == f"python b5_cts.py --resume{added}\n"


def test_the_signal_and_the_exit_code_are_the_command_s(place):
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143));"
    program += "print('up', flush=True); time.sleep(60)"
    process = place.start("bash", str(DEPLOY / "cell.sh"), COMMAND=f'{sys.executable} -c "{program}"')
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert place.bash("cell.sh", COMMAND="bash -c 'exit 2'").returncode == 2


def test_a_launched_run_begins_beside_unfinished_ones(tmp_path, monkeypatch):
    """--resume is refused where a run of other flags is unfinished, for a person would have meant that one; a launcher
    that repeats its command means the one it says."""
    import types

    import b2_grpo
    from common.run import Run

    args = b2_grpo.Args(out_dir=str(tmp_path), resume=True, steps=3)
    other = tmp_path / "b2_grpo__fixtures_math__s0__0"
    other.mkdir()
    (other / "args.json").write_text("{}")
    name = "b2_grpo__fixtures_math__s0__1"
    run = types.SimpleNamespace(args=args, dir=tmp_path / name, name=name)
    run._refuse_other_flags = lambda settings: Run._refuse_other_flags(run, settings)
    monkeypatch.delenv("CTS_LAUNCHER", raising=False)
    with pytest.raises(InputError, match=r"--resume: .* was started with --steps None"):
        Run._open(run, {"steps": 3})
    monkeypatch.setenv("CTS_LAUNCHER", "cell.sh")
    Run._open(run, {"steps": 3})
    assert (run.dir / "args.json").is_file()


# ---- Slurm ----------------------------------------------------------------------------------------------------------
SLURM = dict(REPO=str(ROOT), SLURM_JOB_ID="7")
ARRAY = dict(SLURM, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2", CELLS="cells")


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (0, SLURM, None), (2, SLURM, None), (1, SLURM, None), (143, SLURM, "7"), (143, ARRAY, "5_2"), (2, ARRAY, None),
        (143, {**ARRAY, "CELLS": ""}, "5_2"),
        (143, dict(SLURM, SLURM_RESTART_COUNT="49"), "7"), (143, dict(SLURM, SLURM_RESTART_COUNT="50"), None),
    ],
)  # fmt: skip
def test_slurm_requeues_what_was_stopped_and_nothing_else(place, code, variables, requeued):
    (place.folder / "cells").write_text("a\nb\n")
    place.rules(f"+ srun|0|{code}|")
    done = place.bash("slurm.sbatch", COMMAND="x", **variables)
    assert done.returncode == code
    expected = [f"+ srun --wait=60 bash {ROOT}/deploy/cell.sh"]
    assert place.calls == expected + ([f"+ scontrol requeue {requeued}"] if requeued else [])
    assert shown(done.stdout) == place.calls
    assert ("not requeued: 50 restarts" in done.stderr) == (code == 143 and not requeued)


def test_slurm_says_that_it_was_not_requeued(place):
    place.rules("+ srun|0|143|", "+ scontrol|0|1|")
    done = place.bash("slurm.sbatch", COMMAND="x", **SLURM)
    assert done.returncode == 143 and "scontrol did not requeue 7: submit it again" in done.stderr


@pytest.mark.parametrize("more", [{}, dict(DRY_RUN="1")])
@pytest.mark.parametrize("given", [dict(CELLS="nowhere"), dict(MAX_RESTARTS="many")])
def test_slurm_refuses_in_one_line(place, given, more):
    done = place.bash("slurm.sbatch", **{**ARRAY, "CELLS": "", **given, **more})
    (name, value), *_ = given.items()
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name}={value}") and done.stderr.count("\n") == 1
    assert place.calls == []


def test_slurm_dry_run_is_what_is_called(place):
    place.rules("+ srun|0|143|")
    done = place.bash("slurm.sbatch", COMMAND="x", **SLURM)
    calls = place.calls
    place.rules()
    dry = place.bash("slurm.sbatch", COMMAND="x", DRY_RUN="1", SCRATCH=str(place.folder / "scratch"), **SLURM)
    assert not (place.folder / "scratch").exists()
    assert shown(dry.stdout) == calls == shown(done.stdout) and place.calls == [] and dry.returncode == 0


def test_slurm_hands_the_cell_on(place):
    """The line of its array index, the folders, through srun, quoted as it was."""
    (place.folder / "my cells").write_text("false\n" + SHOW.format(place.folder) + " 'a b' --x=1=2\n")
    (place.folder / "bin/srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    done = place.bash("slurm.sbatch", **dict(ARRAY, CELLS="my cells", SCRATCH=str(place.folder / "a b")))
    assert json.loads(done.stdout.splitlines()[-1]) == ["a b", "--x=1=2"] and done.returncode == 0
    assert (place.folder / "a b").is_dir()


def test_slurm_asks_which_line(place):
    (place.folder / "cells").write_text("a\nb\nc\n")
    done = place.bash("slurm.sbatch", CELLS="cells", **SLURM)
    assert done.returncode == 2 and "sbatch --array=1-3%8 deploy/slurm.sbatch" in done.stderr and place.calls == []


def test_slurm_directives():
    text = (DEPLOY / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert dict(options)["signal"] == "TERM@120" and ("requeue", "") in options
    assert dict(options)["open-mode"] == "append"
    assert text.index("#SBATCH --output") < text.index("set -euo")  # Slurm reads none after the first command


def test_gpus_of_a_node_that_one_task_has_alone(place):
    """Under Slurm JAX gives a task one GPU, unless JAX_LOCAL_DEVICE_IDS says more."""
    command = f"""{sys.executable} -c 'import os; print(os.environ.get("JAX_LOCAL_DEVICE_IDS"))'"""
    ids = lambda **v: place.bash("cell.sh", COMMAND=command, **v).stdout.strip()
    step = dict(SLURM_STEP_NUM_TASKS="2", SLURM_GPUS_ON_NODE="4")
    assert ids(SLURM_STEP_TASKS_PER_NODE="1(x2)", **step) == "0,1,2,3"
    assert ids(SLURM_STEP_TASKS_PER_NODE="4(x2)", **step) == "None"
    assert ids(SLURM_STEP_TASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4") == "None"  # alone: all are seen anyway


# ---- a TPU ----------------------------------------------------------------------------------------------------------
TPU = dict(
    NAME="me-cts", PROJECT="p", ZONE="z", TYPE="v6e-8", RUNTIME="v2-alpha-tpuv6e", BUCKET="gs://b", WAIT="0", TRIES="3",
    COMMAND="python b5_cts.py --task 'a b' --x=1=2",
)  # fmt: skip
NEW = "describe me-cts|1|1|ERROR: NOT_FOUND: no such resource"  # the first question: is it there already?
ACTIVE = "describe me-cts|0|0|ACTIVE"
ENDED = "cell.sh|0|0|cts-exit 0"


def steps(calls) -> list[str]:
    """The calls in a word each."""
    words = ("describe", "create", "delete", "cell.sh", "scp", "ssh")
    return [next(word for word in words if f"{word} " in call or f"{word}\\" in call) for call in calls]


INSTALL = ["scp", "ssh"]
GOOD = ["describe", "create", "describe", *INSTALL, "cell.sh", "delete"]


def test_tpu_dry_run_is_what_is_called(place):
    (place.folder / "secrets").write_text("WANDB_API_KEY=very-secret\n")
    (place.folder / "secrets").chmod(0o600)
    (place.folder / "cells").write_text(f"{TPU['COMMAND']}\n\npython b3_grpo_verifier.py --data_dir '/my data'\n")
    more = dict(TPU, CELLS="cells", SECRETS=str(place.folder / "secrets"), WORKERS="4", MODEL="reserved")
    for variables in (TPU, dict(TPU, MODEL="on-demand"), more):
        place.rules(NEW, ACTIVE, "cell.sh|0|0|" + r"cts-exit 0\n" * int(variables.get("WORKERS", 1)))
        done = place.bash("tpu.sh", **variables)
        assert done.returncode == 0, done.stderr
        calls = place.calls
        place.rules()
        dry = place.bash("tpu.sh", DRY_RUN="1", **variables)
        assert shown(dry.stdout) == calls == shown(done.stdout) and place.calls == [] and dry.returncode == 0
        assert "very-secret" not in done.stdout + done.stderr + dry.stdout + "".join(calls)
    assert not list(place.folder.glob("*.tgz"))
    assert "--reserved" in calls[1] and "gcsfuse" in "".join(calls) and steps(calls).count("cell.sh") == 2


def test_tpu_dry_run_leaves_the_note_of_a_machine_that_stands(place):
    (place.folder / "me-cts.not-deleted").write_text("it goes on costing")
    assert place.bash("tpu.sh", **TPU, DRY_RUN="1").returncode == 0 and place.calls == []
    assert (place.folder / "me-cts.not-deleted").exists()


def test_tpu_runs_the_command_as_it_is_written(place):
    """What the workers' shell makes of the line is the command, quotes, spaces and signs as they were."""
    place.rules(NEW, ACTIVE, ENDED)
    place.bash("tpu.sh", **TPU)
    assert steps(place.calls) == GOOD
    (line,) = [call for call in place.calls if "cell.sh" in call]
    (remote,) = [w for w in subprocess.run(["bash", "-c", f"printf '%s\\0' {line[2:]}"], capture_output=True, text=True)
                 .stdout.split("\0") if w.startswith("--command=")]  # fmt: skip
    home = place.folder / "home"
    (home / "cts").mkdir(parents=True)
    shutil.copytree(DEPLOY, home / "cts/deploy")
    (home / "cts-venv/bin").mkdir(parents=True)
    (home / "cts-venv/bin/activate").write_text("")
    (home / "bin").mkdir()
    (home / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} {place.folder}/show.py "$@"\n')
    (home / "bin/python").chmod(0o755)
    env = place.env(HOME=str(home), PATH=f"{home / 'bin'}:{os.environ['PATH']}")
    done = subprocess.run(["bash", "-c", remote.removeprefix("--command=")], env=env, capture_output=True, text=True)
    words, end = done.stdout.splitlines()
    assert end == "cts-exit 0"
    assert json.loads(words) == ["b5_cts.py", "--task", "a b", "--x=1=2", "--resume", "--out_dir", "gs://b/runs"]


@pytest.mark.parametrize(
    ("rules", "code", "expected"),
    [
        pytest.param(["queued-resources create|1|1|"], 0, ["describe", "create", "delete", *GOOD[1:]], id="create"),
        pytest.param(["queued-resources create|0|1|"], 143, ["describe", *["create", "delete"] * 3], id="never"),
        pytest.param([NEW, "describe me-cts|1|0|FAILED"], 0, [*GOOD[:3], "delete", *GOOD[1:]], id="stock-out"),
        pytest.param([NEW, "describe me-cts|2|0|WAITING_FOR_RESOURCES"], 0,
                     [*GOOD[:3], "describe", "describe", *GOOD[3:]], id="queue"),
        pytest.param([NEW, "describe me-cts|1|1|quota of requests"], 0, [*GOOD[:3], *GOOD[2:]], id="no-answer"),
        pytest.param(["scp|0|1|"], 1, [*GOOD[:3], "scp", "describe", "delete"], id="scp"),
        pytest.param(["set -e|0|1|", "set\\ -e|0|1|"], 1, [*GOOD[:3], *INSTALL, "describe", "delete"], id="install"),
        pytest.param([NEW, "describe me-cts|1|0|ACTIVE", "describe me-cts|1|0|SUSPENDED", "scp|1|1|"], 0,
                     [*GOOD[:3], "scp", "describe", "delete", *GOOD[1:]], id="preempted-while-installing"),
        pytest.param(["cell.sh|1|255|"], 0, [*GOOD[:6], "delete", *GOOD[1:]], id="preempted"),
        pytest.param(["cell.sh|1|0|cts-exit 143"], 0, [*GOOD[:6], "delete", *GOOD[1:]], id="143"),
        pytest.param(["cell.sh|0|0|cts-exit 143"], 143, ["describe", *GOOD[1:] * 3], id="always-143"),
        pytest.param(["cell.sh|0|0|cts-exit 2"], 2, GOOD, id="bad-input"),
        pytest.param(["cell.sh|0|1|cts-exit 1"], 1, GOOD, id="fault"),
        pytest.param(["queued-resources delete|2|1|"], 0, [*GOOD, "delete", "delete"], id="delete-again"),
        pytest.param(["queued-resources delete|0|1|"], 1, [*GOOD, *["delete"] * 5], id="delete-never"),
    ],
)  # fmt: skip
def test_tpu_cleans_up_after_a_failure_at_each_step(place, rules, code, expected):
    place.rules(*([] if NEW in rules else [NEW]), *rules, ACTIVE, ENDED)
    done = place.bash("tpu.sh", **TPU)
    assert (steps(place.calls), done.returncode) == (expected, code), done.stderr
    assert ("NOT DELETED, it goes on costing: gcloud" in done.stderr) == (expected[-5:] == ["delete"] * 5)


def test_tpu_goes_on_with_the_cell_that_was_stopped(place):
    (place.folder / "cells").write_text("one\n# not this\n \ntwo\nthree\n")
    place.rules(NEW, ACTIVE, "COMMAND=two|1|255|", "cell.sh|0|0|cts-exit 0")
    done = place.bash("tpu.sh", **TPU, CELLS="cells")
    ran = re.findall(r"COMMAND=(\w+)", "\n".join(place.calls))
    assert done.returncode == 0 and ran == ["one", "two", "two", "three"]
    assert "cell 2 of 3 was stopped; on with another machine" in done.stderr


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([0], 2), ([0, 143], 143), ([0, 0, 2], 2), ([0, 0, 0], 2), ([0, 0], 0),
    ],
)  # fmt: skip
def test_tpu_counts_its_workers(place, said, code):
    """The worst code counts; where all is done on another number of hosts, no more machines are had."""
    place.rules(NEW, ACTIVE, "cell.sh|0|0|" + "\\n".join(f"cts-exit {c}" for c in said))
    done = place.bash("tpu.sh", **dict(TPU, TRIES="2", WORKERS="2"))
    assert done.returncode == code and steps(place.calls)[-1] == "delete"
    assert ("give WORKERS=" in done.stderr) == (set(said) == {0} and len(said) != 2)
    assert steps(place.calls).count("create") == (2 if code == 143 else 1)
    place.rules(NEW, ACTIVE, "cell.sh|1|255|cts-exit 0", "cell.sh|0|0|cts-exit 0\\ncts-exit 0")
    assert place.bash("tpu.sh", **dict(TPU, WORKERS="2")).returncode == 0  # one of two was gone, and ssh said so


def test_tpu_that_is_somebody_else_s_is_left_alone(place):
    place.rules("describe|0|0|ACTIVE")
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 2 and steps(place.calls) == ["describe"] and "me-cts is there already" in done.stderr
    place.rules("describe|0|1|ERROR: you are not logged in")
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 1 and steps(place.calls) == ["describe"] and "not logged in" in done.stderr


@pytest.mark.parametrize("pattern", ["cell.sh", "scp", "queued-resources create"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_tpu_is_deleted_when_its_launcher_is_told_to_go(place, pattern, number, code):
    place.rules(NEW, f"{pattern}|0|hang|", ACTIVE, ENDED)
    process = place.start(*USUAL_SIGNALS, "bash", str(DEPLOY / "tpu.sh"), **TPU)
    wait_for_call(place, pattern, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code and steps(place.calls)[-1] == "delete"
    assert not list(place.folder.glob("cts*"))


# pytest may ignore some, and what it starts would inherit that
USUAL_SIGNALS = (sys.executable, "-c", "import os, signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 13)];"
                 "os.execvp(sys.argv[1], sys.argv[1:])")  # fmt: skip


def wait_for_call(place, pattern, process):
    deadline = time.monotonic() + 60
    while not any(pattern in call for call in place.calls):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("pattern", ["cell.sh", "describe"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("busy", "deletes"), [(1, 2), (0, 3)])
def test_tpu_is_deleted_though_its_reader_is_gone(place, number, pattern, busy, deletes):
    """Ctrl-C and a closed terminal reach all of `tpu.sh | tee log`: what clean-up prints, or gcloud, reaches nobody;
    that it could not be deleted stands in a file."""
    place.rules(NEW, f"resources delete|{busy}|1|busy", f"{pattern}|0|hang|", ACTIVE)
    line = f"bash {DEPLOY}/tpu.sh 2>&1 | tee {place.folder}/log"
    process = place.start(*USUAL_SIGNALS, "setsid", "bash", "-c", line, **TPU)
    wait_for_call(place, "cell.sh" if pattern == "cell.sh" else "resources create", process)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while list(place.folder.glob("cts.*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert steps(place.calls)[-deletes:] == ["delete"] * deletes
    left = place.folder / "me-cts.not-deleted"
    assert left.exists() == (deletes == 3) and (deletes == 2 or "delete me-cts --project" in left.read_text())


def test_tpu_is_deleted_though_it_is_told_twice(place):
    place.rules(NEW, "cell.sh|0|hang|", ACTIVE)
    slow = '#!/bin/sh\ncase "$*" in *"resources delete"*) sleep 1 ;; esac\nexec ' + f'{place.folder}/stand_in "$@"\n'
    (place.folder / "bin/gcloud").rename(place.folder / "stand_in")
    (place.folder / "bin/gcloud").write_text(slow)
    (place.folder / "bin/gcloud").chmod(0o755)
    process = place.start(*USUAL_SIGNALS, "bash", str(DEPLOY / "tpu.sh"), **TPU)
    wait_for_call(place, "cell.sh", process)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.2)
    process.communicate(timeout=60)
    assert process.returncode == 130 and "resources delete" in place.calls[-1]


def test_tpu_hears_what_gcloud_says_and_what_it_warns_of(place):
    """A warning is no state; what is not answered is asked again, but not for ever."""
    place.rules(NEW, ACTIVE, ENDED)
    warn = f'#!/bin/sh\necho "WARNING: updates are available" >&2\nexec {place.folder}/stand_in "$@"\n'
    (place.folder / "bin/gcloud").rename(place.folder / "stand_in")
    (place.folder / "bin/gcloud").write_text(warn)
    (place.folder / "bin/gcloud").chmod(0o755)
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 0 and steps(place.calls) == GOOD
    place.rules(NEW, "describe|0|1|the token has expired")
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 1 and steps(place.calls) == ["describe", "create", *["describe"] * 10, "delete"]
    assert "error: gcloud does not say whether me-cts is there: WARNING" in done.stderr and "expired" in done.stderr
    place.rules(NEW, ACTIVE, "describe me-cts|2|1|later", "scp|0|1|")
    assert place.bash("tpu.sh", **TPU).returncode == 1 and steps(place.calls).count("create") == 1


def test_tpu_whose_creation_failed_is_had_again(place):
    """Its deletion finds nothing, and that is no failure; one that is not there after a while is given up."""
    gone = "delete me-cts|1|1|NOT_FOUND: no such resource"
    place.rules(NEW.replace("|1|1|", "|2|1|"), "resources create|1|1|RESOURCE_EXHAUSTED", gone, ACTIVE, ENDED)
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 0 and "NOT DELETED" not in done.stderr and "RESOURCE_EXHAUSTED" in done.stderr
    assert steps(place.calls) == ["describe", "create", "delete", *GOOD]
    place.rules(NEW.replace("|1|1|", "|0|1|"), gone.replace("|1|1|", "|0|1|"))
    assert place.bash("tpu.sh", **TPU).returncode == 143
    assert steps(place.calls) == ["describe", *["create", *["describe"] * 3, "delete", "describe"] * 3]
    place.rules(NEW, "delete me-cts|0|1|NOT_FOUND: no such resource", ACTIVE, ENDED)
    done = place.bash("tpu.sh", **TPU)  # it is there, whatever deleting says
    assert done.returncode == 1 and "NOT DELETED, it goes on costing" in done.stderr


def test_tpu_that_is_deleted_late_is_not_said_to_stand(place):
    place.rules(NEW, "resources delete|3|1|busy", ACTIVE, ENDED)
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 1 and steps(place.calls) == [*GOOD, *["delete"] * 3]
    assert "NOT DELETED" in done.stderr and not (place.folder / "me-cts.not-deleted").exists()


def test_tpu_that_somebody_else_creates_meanwhile_is_left_alone(place):
    place.rules(NEW, "resources create|0|1|ALREADY_EXISTS: me-cts", ACTIVE)
    done = place.bash("tpu.sh", **TPU)
    assert done.returncode == 2 and steps(place.calls) == ["describe", "create"]
    assert "me-cts was created by somebody else meanwhile" in done.stderr


def test_tpu_that_is_gone_while_its_ssh_hangs(place):
    place.rules(NEW, "describe me-cts|1|0|ACTIVE", "describe me-cts|1|0|SUSPENDED", "cell.sh|1|hang|", ACTIVE, ENDED)
    done = place.bash("tpu.sh", **dict(TPU, WAIT="1"))
    assert done.returncode == 0 and "the machine is SUSPENDED" in done.stdout
    assert steps(place.calls) == [*GOOD[:6], "describe", "delete", *GOOD[1:]]
    assert all("ServerAliveInterval" in call for call in place.calls if "tpu-vm ssh" in call)


def test_tpu_sends_what_the_run_could_not(place):
    said = "not all is in gs://b/runs; /h has it, and `python -m common.buckets /h gs://b/runs` sends it"
    place.rules(NEW, ACTIVE, f"cell.sh|0|0|{said}\\ncts-exit 1")
    assert place.bash("tpu.sh", **TPU).returncode == 1
    assert steps(place.calls) == [*GOOD[:6], "ssh", "delete"]
    assert r"python\ -m\ common.buckets\ /h\ gs://b/runs" in place.calls[-2]


def test_tpu_takes_along_what_git_tracks(place):
    """No secrets, no environments; a checkout is needed for it."""
    root = place.folder / "checkout"
    shutil.copytree(DEPLOY, root / "deploy")
    files = ("a b.py", ".venv/bin/python", "mine.env", "old.py")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("as committed")
    place.rules(NEW, ACTIVE, ENDED)
    go = lambda: subprocess.run(["bash", f"{root}/deploy/tpu.sh"], env=place.env(**TPU), capture_output=True, text=True)
    done = go()
    assert done.returncode == 2 and "is not a checkout of git" in done.stderr and "create" not in steps(place.calls)
    git = lambda *words: subprocess.run(["git", "-C", root, *words], check=True, capture_output=True)
    git("init")
    git("add", "deploy", "a b.py", "old.py")
    (root / "a b.py").write_text("as it stands")
    (root / "old.py").unlink()
    keep = f'#!/bin/sh\ncase "$*" in *scp*) cp cts.tgz {place.folder}/kept ;; esac\nexec {place.folder}/stand_in "$@"\n'
    (place.folder / "bin/gcloud").rename(place.folder / "stand_in")
    (place.folder / "bin/gcloud").write_text(keep)
    (place.folder / "bin/gcloud").chmod(0o755)
    place.rules(NEW, ACTIVE, ENDED)
    done = go()
    assert done.returncode == 0, done.stderr
    with tarfile.open(place.folder / "kept") as tar:
        names = {name for name in tar.getnames() if not name.startswith("deploy/")}
        assert names == {"a b.py"} and tar.extractfile("a b.py").read() == b"as it stands"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict.fromkeys(TPU, ""), "not set: NAME PROJECT ZONE TYPE RUNTIME BUCKET COMMAND or CELLS"),
        (dict(ZONE=""), "not set: ZONE;"),
        (dict(BUCKET="s3://b"), "BUCKET=s3://b: give gs://NAME"),
        (dict(BUCKET="gs://b/x"), "BUCKET=gs://b/x: give gs://NAME, without a path"),
        (dict(BUCKET="gs://b/"), "BUCKET=gs://b/: give gs://NAME, without a path"),
        (dict(WORKERS="four"), "WORKERS=four TRIES=3 WAIT=0: give whole numbers"),
        (dict(TRIES="0"), "WORKERS=1 TRIES=0 WAIT=0: give whole numbers"),
        (dict(WAIT="1m"), "WORKERS=1 TRIES=3 WAIT=1m: give whole numbers"),
        (dict(NAME="Me!"), "NAME=Me!: lower-case letters"),
        (dict(MODEL="cheap"), "MODEL=cheap: spot, on-demand or reserved"),
        (dict(CELLS="nowhere"), "CELLS=nowhere cannot be read"),
        (dict(SECRETS="nowhere"), "SECRETS=nowhere is not there"),
    ],
)
def test_tpu_names_what_is_missing_before_anything_is_created(place, variables, message):
    done = place.bash("tpu.sh", **{**TPU, **variables})
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and place.calls == []


# ---- files ----------------------------------------------------------------------------------------------------------
def test_sky_yaml_starts_a_cell(place):
    """Its `run` on one machine and on the second of two; where runs go; empty secrets are none."""
    run = yaml.safe_load((DEPLOY / "sky.yaml").read_text())["run"]
    assert run.endswith("exec bash deploy/cell.sh\n")
    run = run.replace("exec bash", "env; DRY_RUN=1 exec bash")

    def start(**variables):
        given = dict(COMMAND="python b5_cts.py --a 'b c' --d=e", BUCKET="gs://b", OUT_DIR="", PORT="8476", **variables)
        done = subprocess.run(["bash", "-c", run], cwd=ROOT, env=place.env(**given), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = start(WANDB_API_KEY="", HF_TOKEN="secret")
    assert output.endswith("python b5_cts.py --a 'b c' --d=e --resume --out_dir gs://b/runs\n")
    assert "WANDB_API_KEY" not in output and "HF_TOKEN=secret" in output
    two = dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NODE_RANK="1")
    assert start(**two).endswith("--hosts 10.0.0.1:8476,2,1\n")


def test_the_image_s_entry_point_runs_a_cell(place):
    """One text is the command; COMMAND or CELLS in the environment are taken, too."""
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    tini, group, end, *command = json.loads(line)
    assert (tini, group, end) == ("tini", "-g", "--")

    def start(*words, **variables):
        env = place.env(DRY_RUN="1", **variables)
        return subprocess.run([*command, *words], cwd=ROOT, env=env, capture_output=True, text=True).stdout

    assert start("python b5_cts.py --a 'b c' --d=e") == "python b5_cts.py --a 'b c' --d=e --resume\n"
    assert start(COMMAND="python teacher.py --x 'a b'") == "python teacher.py --x 'a b'\n"
    (place.folder / "cells").write_text("true 'a b'\n")
    assert start(CELLS=str(place.folder / "cells"), CELL="1") == "true 'a b'\n"


def test_the_image_is_pinned_and_runs_as_no_root():
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    lines = text.splitlines()
    assert lines.index("USER cts") > max(i for i, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
    jax = re.search(r"^jax==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    files = [text, *((DEPLOY / name).read_text() for name in ("sky.yaml", "tpu.sh"))]
    assert {version for file in files for version in re.findall(r"jax\[[\w,]+\]==([\d.]+)", file)} == {jax}


def test_the_job_set_restarts_what_was_stopped_and_ends_what_is_bad():
    *_, jobset = yaml.safe_load_all((DEPLOY / "jobset.yaml").read_text())
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # as its definition asks
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 4
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)  # one host less ends all: the set starts anew
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "cts", "operator": "In", "values": [1, 2]}
    chips = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert chips * job["parallelism"] == int(rows) * int(columns)


COMMANDS = re.findall(r"^    (.*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
OURS = ("python", "pip", "export")


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(OURS) and "bash deploy" not in line])
def test_the_page_s_commands_are_calls(place, line):
    """Each is understood by a shell, with every quote in its place, and calls the program that it names."""
    (place.folder / "cts.env").write_text("")
    variables = dict(HOME=str(place.folder), BUCKET="gs://me-cts")
    done = subprocess.run(["bash", "-euc", line], cwd=ROOT, env=place.env(**variables), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (call,) = place.calls
    program = next(word for word in line.split() if word in NAMES)
    assert call.startswith(f"+ {program} ")
    files = re.findall(r"(?<![\w/])deploy/[\w.]+", call)
    assert all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("DRY_RUN")])
def test_the_page_s_dry_runs_run(place, line):
    names = [line for line in COMMANDS if line.startswith("export NAME=")]
    script = f"{names[0]}\n{line}"
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=place.env(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("+ ") and place.calls == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["schemas", "sky"])
def test_files_are_what_their_publishers_describe(kind):
    """In environments of their own, for these packages pin what we pin otherwise."""
    place = os.environ.get("SCHEMAS")
    if not place:
        pytest.skip("SCHEMAS: a folder with environments of tests/schemas.txt and tests/sky.txt, named after them")
    command = [f"{place}/{kind}/bin/python", "tests/check_schemas.py", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "fine: " in done.stdout, done.stderr[-2000:]


# ---- data and weights -----------------------------------------------------------------------------------------------
@pytest.fixture
def staged(tmp_path):
    """A folder with a staged replay and a staged checkpoint."""
    for i, split in enumerate(("train", "val", "test")):
        write_replay(tmp_path / f"replay/{split}.jsonl", [math_quad(i)])
    flags = ["--replay", str(tmp_path / "replay"), "--model", str(GOLDEN / "qwen3"), "--to", str(tmp_path / "there")]
    done = stage(*flags)
    assert done.returncode == 0 and done.stdout.count("digests checked") == 2, done.stderr
    return tmp_path


def stage(*flags):
    command = [sys.executable, str(DEPLOY / "stage.py"), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_stage_and_fetch(staged):
    """What arrives is what was there; a file that changed on the way, or here, is named."""
    done = stage("--fetch", str(staged / "there"), "--to", str(staged / "here"))
    assert done.returncode == 0, done.stderr
    assert f"--replay {staged}/here/replay --model {staged}/here/model" in done.stdout
    for part, source in (("replay", staged / "replay"), ("model", GOLDEN / "qwen3")):
        content = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        assert content(source) == content(staged / "here" / part)
    (staged / "here/replay/val.jsonl").write_text("x")
    done = stage("--fetch", str(staged / "there"), "--to", str(staged / "here"))
    assert done.returncode == 2 and "here/replay/val.jsonl: is not what was staged; remove" in done.stderr
    (staged / "there/model/config.json").write_text("{}")
    done = stage("--fetch", str(staged / "there"), "--to", str(staged / "new"))
    assert done.returncode == 2 and "model/config.json is missing, or not what was sent" in done.stderr
    assert not (staged / "new/model").exists()


def test_what_was_staged_and_is_cut_is_staged_again(staged):
    (staged / "there/replay/val.jsonl").write_text("cut")
    (staged / "there/model/another.safetensors").write_text("of another model")
    flags = ["--replay", str(staged / "replay"), "--model", str(GOLDEN / "qwen3"), "--to", str(staged / "there")]
    assert stage(*flags).returncode == 0 and not (staged / "there/model/another.safetensors").exists()
    assert stage("--fetch", str(staged / "there"), "--to", str(staged / "here")).returncode == 0


def test_a_bucket_that_fails_is_no_bad_input(monkeypatch):
    monkeypatch.syspath_prepend(str(DEPLOY))
    import stage as module

    monkeypatch.setattr(module, "main", lambda args: (_ for _ in ()).throw(OSError("503 Slow Down")))
    with pytest.raises(SystemExit, match="error: gs://b: OSError: 503 Slow Down"):
        module.understood(module.Args(to="gs://b"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fetch", "/nowhere", "--to", "x"], "--fetch /nowhere: no replay was staged there"),
        (["--fetch", "/nowhere", "--to", "gs://b/x"], "--to gs://b/x: what is fetched goes into a folder"),
        (["--replay", "/nowhere", "--to", "x"], "--replay /nowhere: train.jsonl is missing"),
        (["--task", "none", "--to", "x"], "--task none: unknown"),
        (["--to", "nowhere://b"], "nowhere://b: cannot be opened"),
    ],
)
def test_stage_refuses_in_one_line(flags, message, staged):
    if "--replay" not in flags and "--fetch" not in flags:
        flags = [*flags, "--replay", str(staged / "replay"), "--model", str(GOLDEN / "qwen3")]
    done = stage(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- two nodes ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif("TWO_NODES" not in os.environ, reason="two nodes on two cores take minutes; TWO_NODES=1 runs it")
def test_two_nodes_of_slurm_train_stop_and_go_on_to_the_same_bits(place, command):
    """The batch script as Slurm runs it, with an srun that starts both nodes here. One node alone gets SIGTERM: both
    save and end with 143, the job is requeued, and its second start ends with the weights and metrics, to the bit, of a
    job that nobody stopped."""
    (place.folder / "bin/srun").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_INS}/srun.py "$@"\n')
    flags = [*command.sft, "--prompts", "8", "--save_every", "0", "--steps", "30"]
    jobs = {"stopped": "4001", "alone": "4002"}
    for name in jobs:
        (place.folder / name).mkdir()
        (place.folder / name / "runs").mkdir()

    def job(name, restarts):
        export = str(place.folder / name / "hf")
        script = " ".join([sys.executable, "b0_sft.py", *flags, "--save_hf", export])
        many = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
        return place.start(
            "bash", str(DEPLOY / "slurm.sbatch"), COMMAND=script, NODES=str(place.folder / name), JAX_PLATFORMS="cpu",
            OUT_DIR=str(place.folder / name / "runs"), REPO=str(ROOT), SLURM_JOB_ID=jobs[name], XLA_FLAGS=many,
            SLURM_RESTART_COUNT=str(restarts),
        )  # fmt: skip

    logs = lambda name: "".join((place.folder / name / f"node{i}.log").read_text()[-1500:] for i in range(2))
    first = job("stopped", 0)
    while not list((place.folder / "stopped/runs").glob("b0_sft__*/metrics.jsonl")):
        assert first.poll() is None, logs("stopped")
        time.sleep(0.1)
    os.kill(int((place.folder / "stopped/node1.pid").read_text()), signal.SIGTERM)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 143, output + logs("stopped")
    assert place.calls == ["+ scontrol requeue 4001"]
    assert "stopped by signal 15 after step" in (place.folder / "stopped/node0.log").read_text()
    assert "stopped by" not in (place.folder / "stopped/node1.log").read_text()
    second, alone = job("stopped", 1), None
    second.communicate(timeout=1200)
    assert second.returncode == 0, logs("stopped")
    alone = job("alone", 0)
    alone.communicate(timeout=1200)
    assert alone.returncode == 0, logs("alone")
    assert place.calls == ["+ scontrol requeue 4001"]
    runs = [next((place.folder / name / "runs").glob("b0_sft__*")) for name in jobs]
    no_times = lambda row: {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "charts/SPS"))}
    rows, others = ([no_times(row) for row in read_metrics(run)] for run in runs)
    assert rows == others and len(rows) == 30 and rows[-1]["losses/loss"] < 0.9 * rows[0]["losses/loss"]
    weights, other_weights = ((place.folder / name / "hf/model.safetensors").read_bytes() for name in jobs)
    assert weights == other_weights
