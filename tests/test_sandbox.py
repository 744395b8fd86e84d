"""The client of the sandbox: what it does when the server, its caller or the machine fails it, and over long runs.

pytest tests/test_sandbox.py
"""

import gc
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
from examples import ROOT, VALUE
from processes import children, survivors

from common import sandbox, sandbox_server
from common.basics import InputError
from common.programs import run_program, run_programs
from common.sandbox import Job, Sandbox, check_sandbox, close_sandboxes


def test_a_killed_caller_takes_all_with_it(box):
    code = f"""
from common import sandbox
from common.programs import run_program
sandbox._sandboxes["programs"] = box = sandbox.Sandbox({box.mode!r})
print(box.process.pid, flush=True)
run_program("while True: pass", {VALUE(4)!r}, timeout_s=60)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    server = int(caller.stdout.readline())
    for _ in range(200):
        below = children(server)
        if len(below) == 1 + (box.mode == "namespaces"):
            break
        time.sleep(0.05)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    for _ in range(200):
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in [server, *below]):
            break
        time.sleep(0.05)
    assert below and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in below)


@pytest.mark.usefixtures("confined")
def test_endless_loops_run_beside_each_other(monkeypatch):
    """All get their verdict; while one loops, others run."""
    most = []
    look = Sandbox._look
    monkeypatch.setattr(
        Sandbox, "_look", lambda self, *rest: most.append(sandbox_server.UIDS - len(self.slots)) or look(self, *rest)
    )
    loops = [(f"def f(x):\n    while True: pass  # {i}", VALUE(4)) for i in range(12)]
    sleeps = [(f"import time\ndef f(x): time.sleep(60)  # {i}", VALUE(4)) for i in range(12)]
    right = [(f"def f(x): return 4  # {i}", VALUE(4)) for i in range(24)]
    verdicts = run_programs(loops + sleeps + right, workers=2, timeout_s=1.0)
    assert [v.outcome for v in verdicts] == ["timeout"] * 24 + ["pass"] * 24
    assert max(most) > 12
    assert not survivors(sandbox._sandboxes["programs"])


@pytest.mark.usefixtures("confined")
def test_a_lost_server_is_a_harness_error():
    run_program("def f(x): return 4", VALUE(4))
    box = sandbox._sandboxes["programs"]
    monkey = Sandbox._look
    try:
        Sandbox._look = lambda self, *rest: (box.process.kill(), monkey(self, *rest))
        verdicts = run_programs(
            [("while True: pass", VALUE(4)), ("def f(x): return 4", VALUE(4))], workers=1, timeout_s=2
        )
    finally:
        Sandbox._look = monkey
    assert verdicts[0].outcome == "harness_error" and "server" in verdicts[0].detail
    assert run_program("def f(x): return 4", VALUE(4)).outcome == "pass"


@pytest.mark.usefixtures("confined")
def test_the_same_set_order_in_every_run():
    program = "import random\ndef f(x): return list({'a', 'b', 'c', 'd', 'e'}), random.random()"
    tests = {"asserts": ["assert f(1) == 0"]}
    first = run_program(program, tests).detail
    close_sandboxes()
    assert run_program(program, tests).detail == first


@pytest.mark.usefixtures("confined")
def test_a_machine_that_cannot_confine(monkeypatch):
    real = Sandbox

    def poor(mode="auto"):
        if mode == "auto":
            raise InputError("programs cannot be confined on this machine")
        return real(mode)

    close_sandboxes()
    monkeypatch.setattr(sandbox, "Sandbox", poor)
    monkeypatch.setattr(sandbox, "UNSAFE_SANDBOX", "refuse")
    with pytest.raises(InputError, match="cannot be confined"):
        run_program("def f(x): return 4", VALUE(4))
    with pytest.raises(InputError, match="allow or refuse"):
        check_sandbox("yes")
    assert check_sandbox("allow") == "none"
    assert run_program("def f(x): return 4", VALUE(4)).outcome == "pass"
    close_sandboxes()


@pytest.mark.usefixtures("confined")
def test_a_child_that_cannot_be_confined_runs_nothing():
    """A limit that cannot be set: the program is not blamed."""
    box = Sandbox()
    job = Job({"kind": "asserts", "before": "", "after": "", "tests": ["1"], "program": "while True: pass"})
    box.run([job], 1, 4.0, 1 << 60)
    box.close()
    assert job.end == "harness_error" and "not confined" in job.why and not job.kept


def test_a_killed_server_leaves_no_folder():
    try:
        box = Sandbox("landlock")
    except InputError as e:
        pytest.skip(str(e))
    folder = pathlib.Path(box.base)
    assert folder.is_dir()
    box.process.kill()
    box.close()
    assert not folder.exists()


# ---- long runs ------------------------------------------------------------------------------------------------------
def state(pids: list[int]) -> list[tuple[int, int]]:
    """Descriptors and resident kB of each process."""
    rss = lambda pid: int(pathlib.Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
    return [(len(os.listdir(f"/proc/{pid}/fd")), rss(pid)) for pid in pids]


@pytest.mark.usefixtures("confined")
@pytest.mark.slow
def test_ten_thousand_programs_leak_nothing():
    def batch(start, n):
        kinds = ("return x * x", "return 5", "raise ValueError", "import os; os._exit(0)", "return 'x' * 10000")
        pairs = [(f"def f(x):\n    {kinds[i % 5]}  # {i}", VALUE(4)) for i in range(start, start + n)]
        verdicts = run_programs(pairs)
        assert [v.outcome for v in verdicts] == ["pass", "wrong", "crash", "crash", "wrong"] * (n // 5)
        gc.collect()

    batch(0, 1000)
    box = sandbox._sandboxes["programs"]
    pids = [os.getpid(), box.process.pid, *children(box.process.pid)]
    before = state(pids)
    for start in range(1000, 11000, 1000):
        batch(start, 1000)
    after = state(pids)
    assert sandbox._sandboxes["programs"] is box and not survivors(box)
    assert [files for files, _ in after] == [files for files, _ in before]
    assert all(b - a < 20000 for (_, a), (_, b) in zip(before, after)), (before, after)


@pytest.mark.usefixtures("confined")
def test_a_slow_caller_with_many_open_files(monkeypatch):
    """Descriptors above 1023, which select.select cannot take, of processes that are gone before they are read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("no more than 2047 open files allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    exchange = Sandbox._exchange
    monkeypatch.setattr(Sandbox, "_exchange", lambda self, *rest: time.sleep(0.02) or exchange(self, *rest))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        pairs = [(f"import os\ndef f(x): os._exit({i})", VALUE(4)) for i in range(8)]
        assert {v.outcome for v in run_programs(pairs, workers=8)} == {"crash"}
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
