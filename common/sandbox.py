"""The sandbox's client: starts the server process, hands it programs, collects their frames and how they ended. Used by
programs, which alone makes verdicts, and by making, which asks early whether this machine can confine; what the frames
mean is not known here."""

import atexit
import collections
import contextlib
import json
import math
import os
import pathlib
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from common import sandbox_server
from common.basics import InputError

QUICK_S = 0.1  # a program that runs longer gives its place to the next and goes on beside it, at low priority
PATIENCE = 2.0  # wall time after which a test is cut too (it sleeps, or the machine is busy), in limits of CPU time
LIVE = 64  # programs alive at a time, fewer where half of the free memory is less than their limits
UNSAFE_SANDBOX = "refuse"  # set by `check_sandbox`


class Job:
    """One program under way: what goes in, what is kept of the frames that come out, how it ended.

    A whole program (tests on standard input) has a process for each test, one after another. Its frames are made here,
    of what it printed and how it ended; what it says itself counts only as words on an end that is bad anyway.
    """

    def __init__(self, payload: dict[str, Any], keep=lambda i, frame: frame):
        """`keep(i, frame)` of each frame is kept: frames are long, and there are many."""
        self.payload, self.whole = payload, payload["kind"] == "stdin"
        self.tests, self.keep, self.kept, self.fail = len(payload["tests"]), keep, [], b""
        self.end, self.why = "", ""  # done | fail | timeout | oom | crash | harness_error, and a word on it
        self.slot = -1  # while it runs: its number at the server

    def start(self, channel: socket.socket, timeout_s: float) -> None:
        """A process of its own begins; `channel` is our end of its socket."""
        self.channel, self.output = channel, -1  # and what the output of a whole program is read from
        tests = self.payload["tests"][len(self.kept) :][:1] if self.whole else self.payload["tests"]
        data = json.dumps({**self.payload, "tests": tests}).encode()
        self.outgoing = memoryview(struct.pack("!I", len(data)) + data)
        self.buffer, self.printed, self.said = bytearray(), bytearray(), b""
        self.confined = self.killed = self.closed = self.slow = False
        self.cpu, self.began = 0.0, time.monotonic()
        self.test_began, self.look_at = self.began, self.began + min(QUICK_S, timeout_s)


class Sandbox:
    """The server process and its candidates. Not for several threads at a time."""

    def __init__(self, mode: str = "auto"):
        """Raises InputError where `mode` does not work on this machine."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}  # sets have one order in all runs
        env["MALLOC_ARENA_MAX"] = "1"  # else each thread reserves 64 MB of a program's address space
        env["PYTHONPATH"] = str(pathlib.Path(sandbox_server.__file__).resolve().parents[1])  # for the room it imports
        env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        # -P -s and an environment of our own are -I, but for the hash seed, which -I would leave to chance
        server = os.path.abspath(sandbox_server.__file__)
        command = [sys.executable, "-P", "-s", "-S", server, str(theirs.fileno()), mode]
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], cwd="/", env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self.owner, self.slots, self.base = os.getpid(), list(range(sandbox_server.UIDS)), None
            self.control.settimeout(60)
            hello = self._hear()
            if hello is None:
                self.close()
                errors.seek(0)
                raise InputError(f"the sandbox did not start: {errors.read().decode(errors='replace')[-300:].strip()}")
        self.mode, self.seccomp, self.base = (hello[k] for k in ("mode", "seccomp", "base"))
        self.control.settimeout(None)
        if self.mode == "refused":
            self.close()
            lacks = "; ".join(hello["missing"])
            needs = "it needs user, mount, process and network namespaces, or Landlock and seccomp"
            way_out = "--unsafe_sandbox allow runs them under limits alone"
            raise InputError(f"programs cannot be confined on this machine ({lacks}): {needs}; {way_out}")

    def _hear(self) -> dict[str, Any] | None:
        """The server's next message; None if it is gone."""
        try:
            data = self.control.recv(4096)
        except (TimeoutError, ConnectionError):
            return None
        return json.loads(data) if data else None

    def close(self) -> None:
        """End the server and with it all that it started."""
        self.control.close()
        if self.owner == os.getpid():
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.base:  # a server that was killed left it
                shutil.rmtree(self.base, ignore_errors=True)

    def run(self, jobs: list[Job], workers: int, timeout_s: float, memory_mb: int) -> None:
        """Run all jobs to their ends; whatever happens, none of them is alive after it."""
        try:
            self._run(jobs, workers, timeout_s, memory_mb)
        except ConnectionError:
            self.close()
            for job in jobs:
                if not job.end:
                    job.end, job.why = "harness_error", "the sandbox's server ended"
        except BaseException:
            self.close()
            raise

    def _run(self, jobs: list[Job], workers: int, timeout_s: float, memory_mb: int) -> None:
        waiting = collections.deque(jobs)
        free = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
        room = int(free[1]) // 2048 // (memory_mb + sandbox_server.FILES_MB) if free else workers
        limit = min(max(workers, min(LIVE, room)), sandbox_server.UIDS)
        live: dict[int, Job] = {}  # by slot
        channels = selectors.PollSelector()
        channels.register(self.control, selectors.EVENT_READ)
        try:
            while waiting or live:
                while waiting and len(live) < limit and sum(not job.slow for job in live.values()) < workers:
                    job = waiting.popleft()
                    self._fork(job, timeout_s, memory_mb)
                    live[job.slot] = job
                    channels.register(job.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, job)
                now = time.monotonic()
                wait = min((job.look_at for job in live.values()), default=now) - now
                for (source, _, _, job), event in channels.select(max(0, wait)):
                    if source is self.control:
                        again = self._ended(live, channels, timeout_s)
                        waiting.extendleft([again] if again else [])
                    elif job.slot not in live:  # it has ended by now
                        pass
                    elif source == job.output:
                        self._drain(job, channels)
                    elif not self._exchange(job, event, channels):
                        channels.unregister(source)
                        if job.end:
                            self._kill(job)
                        elif not job.whole:  # about to be gone, and how it ended is worth a wait
                            job.look_at, job.closed = time.monotonic() + 0.5, True
                now = time.monotonic()
                for job in live.values():
                    if job.look_at <= now:
                        self._look(job, now, timeout_s, bool(waiting))
        finally:
            for job in live.values():
                self._close(job)

    def _close(self, job: Job) -> None:
        job.channel.close()
        if job.output >= 0:
            os.close(job.output)

    def _tell(self, job: Job, op: str) -> None:
        self.control.send(json.dumps({"op": op, "slot": job.slot}).encode())

    def _fork(self, job: Job, timeout_s: float, memory_mb: int) -> None:
        """Start a job in a free slot."""
        ours, theirs = socket.socketpair()
        job.slot = self.slots.pop()
        # The kernel's own limit is the last resort, should this process stand still.
        cpu_s = math.ceil(((1 if job.whole else job.tests) + 1) * PATIENCE * timeout_s) + 5
        order = {"op": "fork", "slot": job.slot, "memory_mb": memory_mb, "cpu_s": cpu_s, "whole": job.whole}
        socket.send_fds(self.control, [json.dumps(order).encode()], [theirs.fileno()])
        theirs.close()
        ours.setblocking(False)
        job.start(ours, timeout_s)

    def _kill(self, job: Job) -> None:
        if not job.killed:
            self._tell(job, "kill")
        job.killed, job.look_at = True, time.monotonic() + 60

    def _exchange(self, job: Job, event: int, channels: selectors.BaseSelector) -> bool:
        """Send and receive what can be; False when there is nothing more to come."""
        if event & selectors.EVENT_WRITE and job.outgoing:
            with contextlib.suppress(ConnectionError, BlockingIOError):  # a lost one is seen below
                job.outgoing = job.outgoing[job.channel.send(job.outgoing[: 1 << 20]) :]
            if not job.outgoing:
                channels.modify(job.channel, selectors.EVENT_READ, job)
        if not event & selectors.EVENT_READ:
            return True
        try:
            if job.whole and job.output < 0:  # from one byte, which is ours, so that a program can hand over no file
                data, fds, _, _ = socket.recv_fds(job.channel, 1, 1)
                for job.output in fds:
                    channels.register(job.output, selectors.EVENT_READ, job)
                    return True
            else:
                data = job.channel.recv(1 << 20)
        except BlockingIOError:
            return True
        except ConnectionError:
            data = b""
        job.buffer += data
        return bool(data) and self._frames(job)

    def _drain(self, job: Job, channels: selectors.BaseSelector) -> None:
        """Take what a whole program has printed by now."""
        try:
            while len(job.printed) <= sandbox_server.OUTPUT_MAX:
                data = os.read(job.output, 1 << 20)
                if not data:  # it closed its output, or has ended
                    break
                job.printed += data
            else:
                self._kill(job)
        except BlockingIOError:
            return
        with contextlib.suppress(KeyError):
            channels.unregister(job.output)

    def _frames(self, job: Job) -> bool:
        """Take whole frames out of a job's buffer; False when it has given all."""
        buffer, head = job.buffer, sandbox_server.FRAME
        if not job.confined and buffer:
            if buffer[:1] != b"R":
                return True  # the reason follows; the end of the process ends it
            job.confined, job.test_began = True, time.monotonic()
            del buffer[:1]
        while len(job.kept) < job.tests and len(buffer) >= head.size:
            length, cpu = head.unpack_from(buffer)
            if length > sandbox_server.FRAME_MAX and job.whole:
                return False
            if length > sandbox_server.FRAME_MAX:
                job.end, job.why = "crash", "wrote to the channel what is no frame"
                return False
            if len(buffer) < head.size + length:
                break
            frame = bytes(buffer[head.size : head.size + length])
            del buffer[: head.size + length]
            if frame.startswith(b'{"fail":'):
                job.end, job.fail = "fail", frame
                return False
            if job.whole:
                job.said = frame
                return False
            job.kept.append(job.keep(len(job.kept), frame))
            job.test_began, job.cpu = time.monotonic(), cpu
        if len(job.kept) == job.tests:
            job.end = "done"
            return False
        return True

    def _look(self, job: Job, now: float, timeout_s: float, hurry: bool) -> None:
        """A job is still there at the time it was to be looked at; `hurry`: others wait."""
        if job.killed:
            raise ConnectionError  # killed and not gone in a minute: the server does not answer
        if job.closed:
            self._kill(job)
            return
        if not job.slow and now - job.began >= min(QUICK_S, timeout_s):
            job.slow = True
            if hurry:
                self._tell(job, "nice")
        used = now - job.test_began
        if not job.confined:
            if now - job.began > 60:
                self._kill(job)
            job.look_at = now + 0.2
            return
        if used >= PATIENCE * timeout_s:
            job.end = "timeout"
            self._kill(job)
            return
        if used >= timeout_s:
            self._tell(job, "cpu")  # the answer may end it
        job.look_at = min(job.test_began + PATIENCE * timeout_s, max(job.test_began + timeout_s, now + 0.1))

    def _ended(self, live: dict[int, Job], channels: selectors.BaseSelector, timeout_s: float) -> Job | None:
        """One message of the server: a process has ended, or its CPU time. Returns a job that has a process to come."""
        message = self._hear()
        if message is None:
            raise ConnectionError
        job = live.get(message["slot"])
        if job is None:
            return None
        if "cpu" in message:
            late = time.monotonic() - job.test_began >= timeout_s
            if late and not job.killed and not message["cpu"] - job.cpu < 0.95 * timeout_s:  # `not <`: NaN is a lie
                job.end = "timeout"
                self._kill(job)
            return None
        unread = lambda: any(k.fileobj is job.channel and e & selectors.EVENT_READ for k, e in channels.select(0))
        while unread() and self._exchange(job, selectors.EVENT_READ, channels):
            pass
        if job.output >= 0:
            self._drain(job, channels)
        for source in (job.channel, job.output):
            with contextlib.suppress(KeyError, ValueError):  # no longer listened to
                channels.unregister(source)
        self._close(job)
        del live[job.slot]
        self.slots.append(job.slot)
        if "error" in message or not job.confined:
            job.end = "harness_error"
            job.why = f"not confined: {message.get('error') or job.buffer[1:200].decode(errors='replace')}"
        elif not job.end and not job.whole:
            self._explain(job, message["status"])
        elif not job.end:
            job.kept.append(job.keep(len(job.kept), self._frame_of(job, message["status"])))
            job.end = "done" if len(job.kept) == job.tests else ""
        job.outgoing, job.printed = memoryview(b""), bytearray()
        return None if job.end else job

    def _frame_of(self, job: Job, status: int) -> bytes:
        """The frame of a whole program's test: its output if it ended well, else what it raised or how it ended."""
        if len(job.printed) > sandbox_server.OUTPUT_MAX:
            return json.dumps({"err": f"OutputLimit: more than {sandbox_server.OUTPUT_MAX >> 20} MB printed"}).encode()
        if status in (0, 120):  # 120: Python could not flush standard output once more; what it printed is here
            return json.dumps({"out": job.printed.decode("utf-8", "replace")}).encode()
        if job.said.startswith(b'{"err":'):
            return job.said
        self._explain(job, status)
        return json.dumps({job.end: job.why}).encode()

    def _explain(self, job: Job, status: int) -> None:
        """How a process ended that neither gave all of its values nor was ended from here."""
        if status == -signal.SIGKILL and job.killed:
            job.end, job.why = "crash", "closed its channel"
        elif status == -signal.SIGKILL:
            job.end, job.why = "oom", "killed by the kernel"
        elif status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
            job.end, job.why = "crash", f"ended by {name}{' (a forbidden system call)' * (name == 'SIGSYS')}"
        else:
            job.end, job.why = "crash", f"ended with exit code {status}"


_sandboxes: dict[str, Sandbox] = {}
_sandbox_lock = threading.Lock()


def _sandbox(purpose: str) -> Sandbox:
    """The one for "programs" or the one for "checks"; started if there is none or it ended."""
    box = _sandboxes.get(purpose)
    gone = box is None or box.control.fileno() < 0 or box.owner != os.getpid() or box.process.poll() is not None
    if gone or (box.mode == "none" and UNSAFE_SANDBOX != "allow"):
        if box is not None:
            box.close()
        try:
            _sandboxes[purpose] = Sandbox()
        except InputError:
            if UNSAFE_SANDBOX != "allow":
                raise
            _sandboxes[purpose] = Sandbox("none")
    return _sandboxes[purpose]


def run_jobs(purpose: str, jobs: list[Job], workers: int, timeout_s: float, memory_mb: int) -> None:
    """Run all jobs to their ends in the sandbox for "programs" or in the one for "checks"."""
    with _sandbox_lock:
        if jobs:
            _sandbox(purpose).run(jobs, workers, timeout_s, memory_mb)


@atexit.register
def close_sandboxes() -> None:
    """End the server processes; the next program starts new ones."""
    for box in _sandboxes.values():
        box.close()
    _sandboxes.clear()


def check_sandbox(unsafe: str = "refuse") -> str:
    """How programs are confined here: "namespaces", "landlock" or "none". With `unsafe` "allow", "none" is allowed from
    here on; with "refuse" it raises InputError that says what is missing."""
    global UNSAFE_SANDBOX
    if unsafe not in ("refuse", "allow"):
        raise InputError(f"unsafe_sandbox {unsafe!r}: allow or refuse")
    UNSAFE_SANDBOX = unsafe
    with _sandbox_lock:
        return _sandbox("programs").mode
