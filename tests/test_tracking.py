"""W&B in every state a run can meet it in: a run goes on, says in one line what is lost, and has every line of
metrics.jsonl. No server is asked: what is unreachable is a port of this machine.

pytest tests/test_tracking.py
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import struct
import time

import pytest
from processes import children

from common import tracking
from common.tracking import Lines, Tracker, wandb_mode

KEY = "a" * 40
NOWHERE = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("flag", "env", "netrc", "mode"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {}, b"machine api.wandb.ai login user password x", "online"),
        ("auto", {}, b"# caf\xe9\nmachine api.wandb.ai login user password x", "online"),
        ("auto", {}, b"machine example.org login user password x", "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, None, "online"),
        ("auto", {"WANDB_API_KEY": ""}, None, "offline"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, None, "disabled"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_DISABLED": "true"}, None, "disabled"),
        ("auto", {"WANDB_DISABLED": "false"}, None, "offline"),
        ("auto", {"WANDB_MODE": "online"}, None, "online"),
        ("auto", {"WANDB_MODE": "dryrun"}, None, "offline"),
        ("offline", {"WANDB_API_KEY": "x", "WANDB_MODE": "online"}, None, "offline"),
        ("offline", {"WANDB_DISABLED": "true"}, None, "offline"),
        ("disabled", {}, None, "disabled"),
    ],
)
def test_wandb_mode(monkeypatch, tmp_path, flag, env, netrc, mode):
    """The flag first, then WANDB_MODE and WANDB_DISABLED, then whether a key is known."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_bytes(netrc)
    assert wandb_mode(flag) == mode


@pytest.mark.parametrize("netrc", ["/proc/none/netrc", "~nobody_of_this_name/netrc", "/proc/self/mem"])
def test_a_netrc_that_cannot_be_read_knows_no_key(monkeypatch, netrc):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", netrc)
    assert wandb_mode("auto") == "offline"


def test_lines_are_given_once_and_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert Lines(path, 0).new() == []
    path.write_text('{"step": 0}\n')
    lines, later = Lines(path, 0), Lines(path, path.stat().st_size)
    assert lines.new() == [{"step": 0}] and lines.new() == []
    with open(path, "a") as f:
        f.write('{"step": 1}\n{"st')
    assert lines.new() == later.new() == [{"step": 1}]
    with open(path, "a") as f:
        f.write('ep": 2}\n')
    assert lines.new() == later.new() == [{"step": 2}]


# ---- the process, on a run's directory without a run ----------------------------------------------------------------
def logged(directory: pathlib.Path) -> list[int]:
    """The steps that the newest offline file of a run's directory holds, in order: its records stand in blocks of 32
    KiB, as in LevelDB's log, behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (*_, path) = sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    data, at, record, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last part
            message = wandb_internal_pb2.Record.FromString(record)
            keys = {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}
            steps += [int(keys["step"])] if "losses/loss" in keys else []
            record = b""
    return steps


def write(directory: pathlib.Path, steps) -> None:
    for step in steps:
        with open(directory / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "losses/loss": 0.5}) + "\n")


def open_tracker(directory: pathlib.Path, mode: str = "offline") -> Tracker:
    return Tracker(directory, mode, name="a_run", job_type="method", config={"seed": 0})


@pytest.fixture
def clean(monkeypatch):
    """No variable of W&B's from outside."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def wait_for(condition, seconds: float = 60):
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


def services(tracker: Tracker) -> list[int]:
    """W&B's own processes below the tracker's, once it has begun to log."""
    wait_for(lambda: [*(tracker.directory / "wandb").glob("offline-run-*/*.wandb")])
    return children(tracker.process.pid)


def test_nothing_is_lost_offline_and_a_resumed_run_goes_on(tmp_path, clean, capsys):
    """Lines from before the start belong to the run that wrote them, which has handed them over."""
    write(tmp_path, range(3))
    tracker = open_tracker(tmp_path)
    write(tmp_path, range(3, 400))
    tracker.look()
    tracker.close(0)
    assert logged(tmp_path) == [*range(3, 400)]
    first = (tmp_path / "wandb_id").read_text()
    open_tracker(tmp_path).close(143, tracking.STOP_WAIT)
    assert (tmp_path / "wandb_id").read_text() == first
    assert capsys.readouterr().out == ""
    assert "wandb" not in json.loads((tmp_path / "wandb" / "about.json").read_text())["config"]


def test_disabled_touches_nothing(tmp_path, clean):
    tracker = open_tracker(tmp_path, "disabled")
    tracker.look()
    tracker.close(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_SILENT": "perhaps"},
        {"WANDB_DIR": "/proc/none", "WANDB_CACHE_DIR": "/proc/none", "WANDB_DATA_DIR": "/proc/none"},
        {"WANDB_SERVICE": "nonsense"},
        {"WANDB_RUN_ID": "a/b:c", "WANDB_ENTITY": "no such/entity", "WANDB_CONFIG_DIR": "/proc/none"},
        {"WANDB_BASE_URL": "no url"},
        {"HOME": "/proc/none"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_bad_variables_lose_nothing(tmp_path, clean, capsys, variables):
    for name, value in variables.items():
        clean.setenv(name, value)
    tracker = open_tracker(tmp_path)
    write(tmp_path, range(5))
    tracker.close(0)
    assert logged(tmp_path) == [*range(5)]
    assert capsys.readouterr().out.count("\n") <= 1


def test_the_service_dies_in_the_middle(tmp_path, clean, capsys):
    """All of it goes into another offline file, lines from before included."""
    tracker = open_tracker(tmp_path)
    write(tmp_path, range(5))
    for pid in services(tracker):
        with contextlib.suppress(ProcessLookupError):  # one may have gone with the one before it
            os.kill(pid, signal.SIGKILL)
    write(tmp_path, range(5, 10))
    wait_for(lambda: len([*(tmp_path / "wandb").glob("offline-run-*")]) == 2)
    tracker.close(0)
    assert logged(tmp_path) == [*range(10)]
    line = capsys.readouterr().out
    assert re.fullmatch(rf"W&B: offline failed \(.+\): all of it is logged offline; `wandb sync {tmp_path}.+\n", line)


def test_its_process_dies_in_the_middle(tmp_path, clean, capsys):
    tracker = open_tracker(tmp_path)
    os.kill(tracker.process.pid, signal.SIGKILL)
    tracker.process.wait()
    for _ in range(3):
        tracker.look()
    tracker.close(0)
    line = capsys.readouterr().out
    assert line.startswith("W&B: its process ended (signal 9); what it lacks is in") and line.count("\n") == 1


def test_it_ends_when_the_run_is_killed(tmp_path, clean):
    """Nobody tells it the exit code then; what was written before is in the file."""
    tracker = open_tracker(tmp_path)
    write(tmp_path, range(5))
    services(tracker)
    tracker.process.stdin.close()  # what the kernel does
    assert tracker.process.wait(60) == 0
    assert logged(tmp_path) == [*range(5)]


@pytest.mark.parametrize("place", ["wandb", "wandb_id", "wandb/about.json"])
def test_a_folder_that_cannot_be_written(tmp_path, clean, capsys, place):
    """Root may write anywhere, but not make a folder of a file, nor rename a file onto a folder."""
    if place == "wandb":
        (tmp_path / place).write_text("")
    else:
        (tmp_path / place).mkdir(parents=True)
    tracker = open_tracker(tmp_path)
    tracker.look()
    tracker.close(0)
    line = capsys.readouterr().out
    assert line.startswith("W&B: not started (") and line.count("\n") == 1


# ---- a W&B that does its worst --------------------------------------------------------------------------------------
def meet(directory: pathlib.Path, monkeypatch, fault: str, exit_code: int = 0) -> str:
    """A run of three steps and its result under a fault of tests/faulty; what W&B was given."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent / "faulty"))
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("LOGGED", str(directory / "logged"))
    tracker = open_tracker(directory, "online")
    write(directory, range(3))
    began = time.monotonic()
    tracker.look()
    (directory / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": "x", "completion": "y", "reward": 1.0}))
    (directory / "result.json").write_text(json.dumps({"summary": {"n": 3}, "fingerprint": {"digest": "d"}}))
    assert time.monotonic() - began < 1
    tracker.close(exit_code)
    return (directory / "logged").read_text()


FUNCTIONS = ("import", "init", "define_metric", "log", "add_file", "log_artifact", "finish")


WAYS = ["ImportError", "OSError", "ValueError", "TimeoutError", "SystemExit", "KeyboardInterrupt", "MemoryError"]


@pytest.mark.parametrize("fault", [*(f"{name} Error" for name in FUNCTIONS), *(f"init {way}" for way in WAYS)])
def test_whatever_raises_all_goes_offline(tmp_path, clean, capsys, fault):
    """And one line says so."""
    assert meet(tmp_path, clean, fault) == "offline: 0 1 2 other exit=0 "
    line = capsys.readouterr().out
    why = fault.split()[1]
    assert line == f"W&B: online failed ({why}: why): all of it is logged offline; `wandb sync SYNC_DIR` sends it\n"


@pytest.mark.parametrize("name", [pytest.param(f, marks=pytest.mark.slow) if f != "log" else f for f in FUNCTIONS])
def test_whatever_hangs_all_goes_offline(tmp_path, clean, capsys, name):
    assert meet(tmp_path, clean, f"{name} hangs") == "offline: 0 1 2 other exit=0 "
    line = capsys.readouterr().out
    assert line.startswith("W&B: online failed (no answer in time when ") and line.count("\n") == 1


@pytest.mark.parametrize("fault", ["import ImportError", "init Error", "log OSError", "finish Error"])
def test_where_nothing_works_one_line_says_so(tmp_path, clean, capsys, fault):
    clean.setenv("ALWAYS", "1")
    meet(tmp_path, clean, fault)
    *early, line = capsys.readouterr().out.splitlines()
    assert line.endswith(f"it gets nothing more of this run; metrics.jsonl in {tmp_path} has every line")
    assert all(f"{mode} failed ({fault.split()[1]}: why)" in line for mode in ("online", "offline", "bare"))
    assert not early or "log" in fault or "finish" in fault  # then the next mode had begun to take lines


def test_uploads_that_take_too_long_stay_on_disk(tmp_path, clean, capsys):
    """`finish` raises TimeoutError after its own limit."""
    assert meet(tmp_path, clean, "finish TimeoutError") == "online: 0 1 2 other "
    line = capsys.readouterr().out
    assert line == "W&B: not all was sent within 3 s of the end; `wandb sync SYNC_DIR` sends the rest\n"


def test_a_signal_marks_the_run_preempting(tmp_path, clean):
    """Also where the attempt that heard of it failed."""
    assert meet(tmp_path, clean, "none none", 128 + 15) == "online: 0 1 2 other preempting exit=143 "
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).unlink()
    assert meet(tmp_path, clean, "finish Error", 128 + 15) == "offline: 0 1 2 other preempting exit=143 "


def test_the_end_of_a_run_does_not_wait_for_ever(tmp_path, clean, capsys):
    """A process of W&B's that is stopped, and can do nothing about it itself."""
    tracker = open_tracker(tmp_path)
    os.kill(tracker.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    tracker.close(0, wait=1)
    assert time.monotonic() - began < 5
    line = capsys.readouterr().out
    assert line.startswith("W&B: did not end within 1 s; what it lacks is in ") and line.count("\n") == 1


# ---- the real command -----------------------------------------------------------------------------------------------
LATIN = b"# caf\xe9\nmachine api.wandb.ai login user password " + KEY.encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "variables", "why"),
    [
        ("1", NOWHERE, r"online failed \(.+\)"),
        ("2", {"HOME": "/proc/none"}, None),
        ("3", {"NETRC": "LATIN", "WANDB_BASE_URL": "http://127.0.0.1:9"}, r"online failed \(UnicodeDecodeError: .+\)"),
        ("4", {"WANDB_MODE": "bogus"}, "WANDB_MODE=bogus is none of online, offline, disabled"),
    ],
    ids=["no network", "no home", "netrc in latin-1", "no such mode"],
)
def test_a_run_goes_on(command, tmp_path, seed, variables, why):
    """To its summary, with every line in metrics.jsonl and in W&B's offline file."""
    if "NETRC" in variables:
        variables = variables | {"NETRC": str(tmp_path / "netrc")}
        (tmp_path / "netrc").write_bytes(LATIN)
    out, err = (run := command("--seed", seed, **variables)).communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    (directory,) = command.out.glob(f"b2_grpo__fixtures_math__s{seed}__*")
    assert "24 test problems, greedy, last checkpoint" in out and "Traceback" not in out + err
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 2
    assert logged(directory) == [0, 1]
    lines = [line for line in out.splitlines() if line.startswith("W&B")]
    if why is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.fullmatch(rf"W&B: {why}: all of it is logged offline; `wandb sync {directory}/\S+` sends it", line)


@pytest.mark.slow
def test_disabled_is_not_even_imported_and_needs_no_home(command, tmp_path):
    """The run ends in its summary and its export."""
    variables = {"PYTHONPATH": str(pathlib.Path(__file__).parent / "faulty"), "LOGGED": str(tmp_path / "logged")}
    flags = ("--seed", "5", "--wandb", "disabled", "--save_hf", str(tmp_path / "export"))
    run = command(*flags, FAULT="import Error", HOME="/proc/none", **variables)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    assert "24 test problems, greedy, last checkpoint" in out and (tmp_path / "export" / "model.safetensors").is_file()
    (directory,) = command.out.glob("b2_grpo__fixtures_math__s5__*")
    assert not (tmp_path / "logged").exists() and not [*directory.glob("wandb*")]
