"""One run on many devices: simulated meshes, several processes, a checkpoint that moves to another mesh.

pytest tests/test_devices.py        (and with -m slow)
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import tiny

import teacher
from common.report import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = {**tiny.FLAGS, "energy_fit": tiny.FIT, "prompts": 8, "group": 2, "save_every": 1}
PROGRAM = """
import jax, json, sys
sys.path.insert(0, "tests")
import b5_cts, cts_common as cts, tiny
from common.hosts import start_hosts
tiny.install(setattr, dict.__setitem__)
hosts, flags = json.loads(sys.argv[1])
start_hosts(hosts)
if sys.argv[2:]:  # kill it as a scheduler would, once a checkpoint is there
    import os, signal
    save = cts.Run.save
    def save_then_stop(run, step, *rest):
        save(run, step, *rest)
        if step == 1 and jax.process_index() == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGTERM)
    cts.Run.save = save_then_stop
b5_cts.main(b5_cts.Args(**flags))
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    teacher.main(teacher.Args(task="fixtures_math", out=str(folder / "replay"), limit=24))
    (folder / "base").mkdir()
    return folder


def launch(space, out, devices, hosts="auto", stop_on=None, **changes):
    """One process of a run in `space`/`out`, on simulated devices; all runs share one base."""
    (space / out).mkdir(exist_ok=True)
    if not (space / out / "base").exists():
        (space / out / "base").symlink_to(space / "base")  # one base, not one trained on each mesh
    flags = {**FLAGS, "replay": str(space / "replay"), "out_dir": str(space / out), **changes}
    many = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {many}", "JAX_PLATFORMS": "cpu"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(space / f"xla_cache{devices}")
    command = [sys.executable, "-c", PROGRAM, json.dumps([hosts, flags]), *([] if stop_on is None else [str(stop_on)])]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes, code=0):
    """Wait for all; a collective that one of them misses hangs them, and the time limit makes that a failure."""
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    ends = "\n\n".join(output[-1500:] for output in outputs)
    assert [p.returncode for p in processes] == [code] * len(processes), ends
    return outputs


def metrics(space, out):
    (directory,) = (space / out).glob("b5_cts__*")
    return read_metrics(directory), directory


def assert_same(space, a, b):
    """Equal metrics, times aside: to 1e-4 in the first step, to 1e-3 after updates, which make more of roundings."""
    no_times = lambda row: {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "charts/SPS"))}
    rows, others = ([no_times(row) for row in metrics(space, out)[0]] for out in (a, b))
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others):
        assert other == pytest.approx(row, abs=1e-4, rel=1e-3 if row["step"] else 1e-4)


@pytest.fixture(scope="module")
def one(space):
    """The run that all others are compared with: one device."""
    finish(launch(space, "one", 1))
    assert any(row["losses/grad_norm"] > 0 for row in metrics(space, "one")[0])
    return "one"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8,1", "4,2", "2,4"])
def test_eight_devices_equal_one(space, one, mesh):
    finish(launch(space, f"mesh{mesh}", 8, mesh=mesh))
    assert_same(space, one, f"mesh{mesh}")


def pair(space, out, stop_on=None, **changes):
    """Two processes with four devices each, in one run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = [f"127.0.0.1:{port},2,{i}" for i in range(2)]
    return [launch(space, out, 4, h, stop_on, mesh="4,2", **changes) for h in hosts]


@pytest.mark.slow
def test_two_processes_train_save_and_resume(space, one):
    """SIGTERM reaches one process only; both save and stop, and both resume to what one device gives."""
    outputs = finish(*pair(space, "two", stop_on=1), code=128 + 15)
    assert "stopped by signal 15 after step 1" in outputs[0] and "stopped by" not in outputs[1]
    rows, directory = metrics(space, "two")
    assert len(rows) == 1 and not (directory / "result.json").exists()
    outputs = finish(*pair(space, "two", resume=True, save_hf=str(space / "hf")))
    assert_same(space, one, "two")
    assert "test problems" in outputs[0] and "test problems" not in outputs[1]
    result = json.loads((directory / "result.json").read_text())
    alone = json.loads((metrics(space, one)[1] / "result.json").read_text())
    assert result["fingerprint"] == alone["fingerprint"]
    assert (space / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_mesh(space, one):
    finish(launch(space, "moved", 8, stop_on=0, mesh="4,2"), code=128 + 15)
    finish(launch(space, "moved", 1, resume=True))
    assert_same(space, one, "moved")
