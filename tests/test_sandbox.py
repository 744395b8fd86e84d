"""The sandbox: every attack by itself, then what honest programs of each kind get."""

import doctest
import gc
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from common import sandbox, sandbox_server
from common.basics import InputError
from common.programs import Verdict, extract_program, run_program, run_programs, same_output
from common.sandbox import Job, Sandbox, check_sandbox, close_sandboxes

ROOT = pathlib.Path(__file__).parents[1]
MBPP = pathlib.Path(os.environ.get("CTS_MBPP", ROOT.parent / "shared" / "data" / "mbpp" / "mbpp.jsonl"))
SECRET = "s3cr3t-4711"  # what f(2) should be: no program below knows it, and none has it in one piece
TESTS = {"asserts": [f"assert f(2) == {SECRET!r}"]}
VALUE = lambda x: {"asserts": [f"assert f(2) == {x!r}"]}


def programs(text: str) -> dict[str, str]:
    """Programs by name, each after a line `== name`."""
    return dict(part.split("\n", 1) for part in text.lstrip("\n=").removeprefix(" ").split("\n== "))


def children(pid: int) -> list[int]:
    """All processes below one, in process-id order of the tree."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def survivors(box: Sandbox) -> list[int]:
    """Candidates alive: what is below the server, or was and has now no parent."""
    alive = children(box.process.pid)[1 if box.mode == "namespaces" else 0 :]
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            orphan = path.with_name("stat").read_text().rsplit(")", 1)[1].split()[1] == "1"
            if orphan and os.path.abspath(sandbox_server.__file__).encode() in path.read_bytes():
                alive.append(int(path.parent.name))
        except OSError:
            continue
    return alive


@pytest.fixture(
    scope="module", params=["namespaces", pytest.param("namespaces-user", marks=pytest.mark.slow), "landlock"]
)
def box(request):
    """Programs run in this kind of sandbox while a test asks for it."""
    try:
        made = Sandbox(request.param)
    except InputError as e:
        pytest.skip(str(e))
    BOXED["programs"] = made
    yield made
    for other in BOXED.values():
        other.close()
    BOXED.clear()


BOXED, USUAL = {}, {}  # sandboxes of the tests that ask for a kind, and of the others


@pytest.fixture(autouse=True)
def sandboxes(request, monkeypatch):
    """Tests without `box` run in what this machine has."""
    monkeypatch.setattr(sandbox, "_sandboxes", BOXED if "box" in request.fixturenames else USUAL)
    try:
        check_sandbox()
    except InputError as e:
        pytest.skip(str(e))


@pytest.fixture
def outside(tmp_path):
    """A folder that anybody may write to, with one file. It and the temp directory must be as they were after."""
    for path in (tmp_path, *tmp_path.parents[:3]):
        if (
            path != pathlib.Path(tempfile.gettempdir())
            and path.owner() == pathlib.Path(tempfile.gettempdir(), ".").owner()
        ):
            path.chmod(0o777)
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o666)
    yield tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["secret"] and (tmp_path / "secret").read_text() == SECRET
    assert not list(pathlib.Path(tempfile.gettempdir()).glob("attack*"))
    assert not list(pathlib.Path("/dev/shm").glob("attack*"))


def attack(box, program, outcomes, tests=TESTS, **limits):
    """Run it; its outcome is one of `outcomes`, it has no process left, and the next program runs as ever."""
    verdict = run_program(program, tests, **{"timeout_s": 1.0, **limits})
    assert verdict.outcome in outcomes.split() and verdict.passed == 0, verdict
    assert not survivors(box)
    assert run_program("def f(x):\n    return x * x", VALUE(4)).outcome == "pass"
    assert sandbox._sandboxes["programs"] is box, "the server had to be started again"
    return verdict


# ---- exits ----------------------------------------------------------------------------------------------------------
EXITS = programs(r"""
== sys.exit
import sys
sys.exit(0)
== exit
exit()
== os._exit
import os
os._exit(0)
== SystemExit
raise SystemExit
== sys.exit inside
import sys
def f(x):
    sys.exit(0)
== os._exit inside
import os
def f(x):
    os._exit(0)
== SystemExit inside
def f(x):
    raise SystemExit(0)
== KeyboardInterrupt
def f(x):
    raise KeyboardInterrupt
== GeneratorExit
def f(x):
    raise GeneratorExit
== kill
import os
def f(x):
    os.kill(os.getpid(), 9)
== term
import os, signal
def f(x):
    os.kill(0, signal.SIGTERM)
== abort
import os
def f(x):
    os.abort()
== segfault
import ctypes
def f(x):
    ctypes.string_at(0)
== atexit
import atexit, os
atexit.register(print, 'passed')
os._exit(0)
== thread
import threading, os
def f(x):
    t = threading.Thread(target=os._exit, args=(0,))
    t.start()
    t.join()
""")


@pytest.mark.parametrize("name", EXITS)
def test_an_exit_is_no_pass(box, name):
    attack(box, EXITS[name], "crash")


@pytest.mark.parametrize("call", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_an_exit_of_a_stdin_program_is_no_pass(box, call):
    attack(box, call, "wrong crash", {"inputs": ["1\n"], "outputs": ["1\n"]})


def test_printed_markers_are_no_pass(box):
    words = "\\n".join(["passed", "pass", "OK", '{"v":true}', "PASSED 1/1", "1.0"])
    attack(box, f"print('{words}')\ndef f(x):\n    print('{words}')", "wrong")
    attack(box, f"import os\nos.write(1, b'{words}')\nos._exit(0)", "crash")


# ---- lies -----------------------------------------------------------------------------------------------------------
LIES = programs(r"""
== eq
class A:
    __eq__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __hash__ = lambda s: 0
def f(x): return A()
== eq of str
class A(str):
    __eq__ = lambda s, o: True
    __hash__ = str.__hash__
def f(x): return A('')
== eq of int
class A(int):
    __eq__ = lambda s, o: True
def f(x): return A(3)
== repr
class A:
    __repr__ = __str__ = lambda s: "'4'"
def f(x): return A()
== class
class A:
    __class__ = str
    __eq__ = lambda s, o: True
def f(x): return A()
== metaclass
class M(type):
    __eq__ = lambda s, o: True
    __hash__ = lambda s: hash(int)
class A(metaclass=M): pass
def f(x): return A()
== list
class A(list):
    __eq__ = lambda s, o: True
    __len__ = lambda s: 11
    __iter__ = lambda s: iter('abc')
def f(x): return A()
== nested
class A:
    __eq__ = lambda s, o: True
    __hash__ = lambda s: 1
def f(x): return [A()], {A(): A()}
== reduce
class A:
    __reduce__ = lambda s: (eval, ('__import__("os")._exit(0)',))
def f(x): return A()
== mock
from unittest import mock
def f(x): return mock.ANY
""")


@pytest.mark.parametrize("name", LIES)
def test_a_lying_object_is_no_value(box, name):
    attack(box, LIES[name], "wrong crash")


@pytest.mark.parametrize("expected", [4, 2.5, True, None, "x", [1, 2], (1,), {1}, {"a": 1}])
def test_no_lie_equals_anything(box, expected):
    attack(box, LIES["eq"], "wrong", VALUE(expected))
    attack(box, LIES["eq"], "wrong", {"fn_name": "f", "inputs": [[2]], "outputs": [4]})


PATCHES = programs(r"""
== builtins
import builtins
for n in ('type', 'isinstance', 'all', 'len', 'sum', 'str'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return None
== eval
import builtins
builtins.eval = builtins.exec = builtins.compile = lambda *a, **k: True
def f(x): return 1
== modules
import sys
for n in list(sys.modules):
    sys.modules[n] = None
def f(x): return True
== json
import json
json.dumps = lambda *a, **k: '{"v":true}'
def f(x): return 1
== json pass
import json
json.dumps = lambda *a, **k: '{"pass":true}'
def f(x): return 1
== encode
import gc
for o in gc.get_objects():
    if isinstance(o, dict) and 'encode' in o and 'caught' in o:
        o['encode'] = lambda x: True
def f(x): return 1
== os.write
import os
w = os.write
os.write = lambda fd, d: w(fd, b'\0' * len(d))
def f(x): return 1
== settrace
import sys
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
def f(x): return 1
""")


@pytest.mark.parametrize("name", PATCHES)
def test_patching_its_own_interpreter_gains_nothing(box, name):
    attack(box, PATCHES[name], "wrong crash timeout")


@pytest.mark.parametrize(
    "data",
    [
        "b'passed'", "b'\\xff' * 100000", "b'R' * 100", "struct.pack('!Id', 4, 0.0) + b'true'",
        "struct.pack('!Id', 1 << 31, 0.0)", "struct.pack('!Id', 14, float('nan')) + b'{\"pass\": true}'",
        "struct.pack('!Id', 2, 0.0) + b'{}'", "struct.pack('!Id', 100000, 0.0) + b'[' * 100000",
        "struct.pack('!Id', 17, 0.0) + b'{\"v\":{\"x\":[1,2]}}'", "struct.pack('!Id', 10, 0.0) + b'{\"err\": 1}'",
        "struct.pack('!Id', 31, 0.0) + b'{\"v\":{\"n\":\"1e999999999999999\"}}'",
    ],
)  # fmt: skip
def test_forged_frames(box, data):
    program = (
        f"import os, struct\nfor fd in range(64):\n    try: os.write(fd, {data})\n    except OSError: pass\nos._exit(0)"
    )
    attack(box, program, "wrong crash")
    attack(box, program, "wrong crash", {"asserts": ["assert abs(f(2) - 4) < 1"]})
    attack(box, program, "wrong crash", {"inputs": ["1"], "outputs": ["1"]})


def test_a_closed_channel(box):
    attack(box, "import os\nos.closerange(0, 64)\nwhile True: pass", "crash timeout")


# ---- looking for the tests ------------------------------------------------------------------------------------------
SEARCH = """
import os, sys, gc, inspect, ctypes, glob
A, B = "s3cr3t", "-4711"
def whole(text):  # what is looked for stands in memory itself, but with no digits after it
    return next((A + B[:1] + part[:4] for part in text.split(A + B[:1])[1:] if part[:4].isdigit()), None)
def files():
    proc = ["/proc/*/" + name for name in ("environ", "cmdline", "mem", "maps", "fd/*")]
    for pattern in [*proc, "/tmp/*", "/tmp/*/*", "/*/*.json", "FOLDER/*"]:
        for path in [*glob.glob(pattern), pattern.replace("*", "self")]:
            try:
                with open(path, "rb") as f:
                    yield f.read(1 << 20).decode("latin-1")
            except OSError:
                pass
def frames():
    frame = sys._getframe()
    while frame:
        for x in [*frame.f_locals.values(), *frame.f_globals.values()]:
            yield x if type(x) is str else repr(x)[:100000]
        frame = frame.f_back
    for info in inspect.stack():
        yield str(info.code_context)
def objects():
    for o in gc.get_objects():
        if isinstance(o, (list, tuple, dict)):
            for x in (o.values() if isinstance(o, dict) else o):
                if type(x) is str:
                    yield x
def memory():
    libc = ctypes.CDLL(None)
    get, put = os.pipe()
    for start in (id([]), id(open), id("x" * 5000), id(object())):
        base = start & ~4095
        for page in range(base - (4 << 20), base + (4 << 20), 4096):
            if libc.write(put, ctypes.c_void_p(page), 4096) == 4096:
                yield os.read(get, 4096).decode("latin-1")
def f(x):
    for text in WHERE():
        found = whole(text)
        if found:
            return found
    return "nothing"
"""


@pytest.mark.parametrize("where", ["files", "frames", "objects", "memory"])
def test_the_expected_output_is_nowhere(box, outside, where):
    run_program(f"def f(x):\n    return '{SECRET}' * 3", TESTS)  # a program before that knew it
    program = SEARCH.replace("WHERE", where).replace("FOLDER", str(outside))
    verdict = attack(box, program, "wrong", timeout_s=5.0)
    assert "nothing" in verdict.detail
    tests = {"setup": f"WANT = {SECRET!r}", "asserts": ["assert f(2) == WANT"]}
    attack(box, program, "wrong", tests, timeout_s=5.0)


def test_set_up_code_shows_no_expected_value(box):
    tests = {"setup": "WANT = ['GIVEN']\nGIVEN = 2", "asserts": ["assert f(GIVEN) == WANT"]}
    program = "def f(x):\n    return sorted(k for k in globals() if k.isupper())"
    assert run_program(program, tests).outcome == "pass"


def test_system_calls_by_ctypes(box):
    """Each call's result; none may work."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    calls = [
        ("fork", ()), ("vfork", ()), ("unshare", (0x10000000,)), ("setns", (0, 0)), ("ptrace", (16, 1, 0, 0)),
        ("mount", (b"none", b"/tmp", b"tmpfs", 0, None)), ("umount2", (b"/tmp", 2)), ("chroot", (b"/",)),
        ("execve", (b"/bin/sh", None, None)), ("setuid", (0,)), ("setsid", ()), ("chmod", (b"/tmp", 0o777)),
        ("socket", (2, 1, 0)), ("socketpair", (1, 1, 0, None)), ("shmget", (0, 4096, 0o1666)),
        ("process_vm_readv", (1, None, 0, None, 0, 0)), ("memfd_create", (b"a", 0)), ("inotify_init", ()),
        ("prctl", (4, 1, 0, 0, 0)), ("setpriority", (0, 0, -5)), ("personality", (0x40000,)), ("klogctl", (3, None, 0)),
        ("prlimit", (os.getppid() or 1, 7, None, None)), ("fcntl", (3, 8, 1)), ("fcntl", (3, 10, 9)),
        ("ioctl", (3, 0x8901, b"\\1\\0\\0\\0")), ("truncate", (b"/tmp/a", 0)), ("syscall", (321, 0, None, 0)),
        ("syscall", (425, 4, None)), ("syscall", (250, 0, 0, 0)),
    ]
    return [name for name, args in calls if getattr(libc, name)(*args) != -1 or ctypes.get_errno() not in (1, 38)]
"""
    if not box.seccomp:
        pytest.skip("needs seccomp")
    assert run_program(program, VALUE([])) == Verdict("pass", 1, 1, "")


def test_environment_has_no_secrets(box, monkeypatch):
    monkeypatch.setenv("CTS_TEST_TOKEN", SECRET)
    program = """
import os, ctypes
def f(x):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return sorted(os.environ), getenv(b"CTS_TEST_TOKEN")
"""
    fresh = Sandbox(box.mode)  # started with the token about
    monkeypatch.setitem(sandbox._sandboxes, "programs", fresh)
    verdict = run_program(program, VALUE((["HOME", "LANG", "PATH", "TZ"], None)))
    fresh.close()
    assert verdict.outcome == "pass", verdict


# ---- processes ------------------------------------------------------------------------------------------------------
PROCESSES = programs(r"""
== fork and outlive
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
    os._exit(0)
== fork in a thread
import os, threading, time
def go():
    if os.fork() == 0: time.sleep(60)
def f(x):
    t = threading.Thread(target=go)
    t.start()
    t.join()
    return 0
== fork bomb
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
== subprocess
import subprocess
def f(x): return subprocess.run(['/bin/sh', '-c', 'sleep 60 &'])
== spawn
import os
def f(x): return os.posix_spawn('/bin/sleep', ['sleep', '60'], {})
== exec
import os
def f(x): os.execv('/bin/sleep', ['sleep', '60'])
== multiprocessing
import multiprocessing as m
def f(x): return m.get_context('fork').Pool(2).map(abs, [1])
== loop
def f(x):
    while True: pass
== loop at import
while True: pass
== sleep
import time
def f(x): time.sleep(60)
== SIGTERM ignored
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
== exceptions ignored
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
== regular expression
import re
def f(x): return re.match('(a+)+b', 'a' * 40)
== threads
import threading, time
def f(x):
    for _ in range(10000): threading.Thread(target=time.sleep, args=(60,)).start()
== kill all
import os
def f(x): os.kill(-1, 9)
== kill parent
import os
def f(x): os.kill(os.getppid(), 9)
""")


@pytest.mark.parametrize("name", PROCESSES)
def test_no_process_stays(box, outside, name):
    attack(box, PROCESSES[name], "crash timeout wrong oom", timeout_s=0.5)


def test_threads_that_print_after_the_return(box):
    """They end with their process; the next input's output is not theirs."""
    program = (
        "import threading, time, sys\n"
        "n = input()\nprint(n)\n"
        "def late():\n    time.sleep(0.05)\n    while n == '1': print('late')\n"
        "threading.Thread(target=late, daemon=True).start()\n"
    )
    noise = "def go():\n    while True: print('x', flush=True)\n"
    attack(box, f"import threading\n{noise}def f(x):\n    threading.Thread(target=go).start()\n    return 1", "wrong")
    verdict = run_program(program, {"inputs": ["1"], "outputs": ["1"]}, timeout_s=1)
    assert verdict.outcome == "pass" and not survivors(box)


def test_a_killed_caller_takes_all_with_it(box):
    code = f"""
from common import sandbox
from common.programs import run_program
sandbox._sandboxes["programs"] = box = sandbox.Sandbox({box.mode!r})
print(box.process.pid, flush=True)
run_program("while True: pass", {TESTS!r}, timeout_s=60)
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


# ---- memory, output, files ------------------------------------------------------------------------------------------
MEMORY = programs(r"""
== 10 GB
def f(x): return len(bytearray(10 ** 10))
== list
def f(x):
    y = []
    while True: y.append('x' * 1000000 + str(len(y)))
== mmap
import mmap
def f(x): return len(mmap.mmap(-1, 10 ** 10))
== at import
x = bytearray(10 ** 10)
== int
def f(x): return 1 << (1 << 60)
""")


@pytest.mark.parametrize("name", MEMORY)
def test_memory(box, name):
    attack(box, MEMORY[name], "oom crash" if name == "mmap" else "oom", memory_mb=256, timeout_s=10)


def test_memory_error_caught_by_the_program(box):
    attack(box, "def f(x):\n    try: bytearray(10 ** 10)\n    except MemoryError: return 'small'", "wrong")


@pytest.mark.parametrize(
    "write", ["print('x' * 1000000)", "os.write(1, b'x' * 1000000)", "sys.stderr.write('x' * 1000000)"]
)
def test_ten_gigabytes_of_output(box, write):
    program = f"import os, sys\nfor _ in range(10000): {write}\n"
    outcomes = "wrong timeout" if "stderr" in write else "crash"  # standard error is thrown away
    attack(box, program, outcomes, {"inputs": ["1"], "outputs": ["1"]}, timeout_s=0.5)
    attack(box, f"{program}def f(x): return 1", outcomes, timeout_s=0.5)


def test_a_value_too_long(box):
    attack(box, "def f(x): return 'x' * 100000000", "crash oom")
    attack(box, "def f(x): return 'x' * 5000000", "wrong")
    attack(box, "def f(x): return {i * (2 ** 61 - 1) for i in range(3000)}", "wrong timeout", VALUE({1, 2}))


FILES = programs(r"""
== huge file
def f(x):
    with open('attack', 'wb') as g:
        for _ in range(10000): g.write(b'x' * 1000000)
== many files
def f(x):
    for i in range(10 ** 6): open(f'attack{i}', 'wb').write(b'x' * 4096) if i < 3000 else 1 / 0
== outside
def f(x):
    open('FOLDER/new', 'w').write('x')
== overwrite
def f(x):
    open('FOLDER/secret', 'w').write('x')
== remove
import os
def f(x):
    os.remove('FOLDER/secret')
== temp
def f(x):
    open('/tmp/../tmp/attack', 'w').write('x')
== shm
def f(x):
    open('/dev/shm/attack', 'w').write('x')
== shared memory
from multiprocessing import shared_memory as s
def f(x): return s.SharedMemory('attack', True, 4096).size
== symlink
import os
def f(x):
    os.symlink('FOLDER/secret', 'attack')
    return open('attack').read()
== symlink to a folder
import os
def f(x):
    os.symlink('FOLDER', 'attack')
    open('attack/new', 'w').write('x')
== hard link
import os
def f(x):
    os.link('FOLDER/secret', 'attack')
    return open('attack').read()
== library
import os
def f(x):
    open(os.path.dirname(os.__file__) + '/attack.py', 'w').write('x')
== chmod
import os
def f(x):
    os.chmod('FOLDER/secret', 0)
== deep folders
import os
def f(x):
    for _ in range(5000):
        os.mkdir('attack')
        os.chdir('attack')
""")


@pytest.mark.parametrize("name", FILES)
def test_files(box, outside, name):
    attack(box, FILES[name].replace("FOLDER", str(outside)), "crash wrong", timeout_s=5)


def test_each_program_has_an_empty_folder_of_its_own(box):
    body = "names = os.listdir()\n    open('left', 'w').write('x')\n    return names, open('left').read()"
    program = f"import os\ndef f(x):\n    {body}"
    for i in range(2):
        assert run_program(f"{program}  # {i}", VALUE(([], "x"))).outcome == "pass"


def test_nothing_of_the_machine_is_to_be_seen(box):
    program = """
import os
def f(x):
    places = ("/etc", "/home", "/usr/bin", "/proc/1", "/sys", "/dev", "/var")
    return [place for place in places if os.path.exists(place) and os.listdir(place)]
"""
    verdict = run_program(program, VALUE([]))
    assert verdict.outcome == ("pass" if box.mode == "namespaces" else "crash"), verdict


# ---- network --------------------------------------------------------------------------------------------------------
def test_network(box, tmp_path):
    """Listeners of all kinds see nobody; neither Python's socket module nor a plain system call makes a socket."""
    tmp_path.chmod(0o777)
    name = f"attack-{os.getpid()}"
    addresses = [
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_INET6, ("::1", 0)),
        (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, f"\0{name}"),
    ]
    listeners = []
    for family, address in addresses:
        listener = socket.socket(family)
        try:
            listener.bind(address)
        except OSError:  # a machine without IPv6
            continue
        listener.listen()
        listener.setblocking(False)
        listeners.append(listener)
    targets = [(int(s.family), s.getsockname()) for s in listeners]
    targets = [(family, a.decode("latin-1") if isinstance(a, bytes) else a) for family, a in targets]
    program = f"""
import socket
def f(x):
    reached = []
    for family, address in {targets!r}:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            try:
                socket.socket(family, kind).connect(tuple(address) if type(address) is not str else address)
                reached.append(address)
            except OSError: pass
    for make in (socket.socketpair, lambda: socket.getaddrinfo("localhost", 80)):
        try: reached.append(str(make()))
        except OSError: pass
    return reached
"""
    verdict = run_program(program, VALUE([]))
    assert verdict.outcome == "pass", verdict
    for listener in listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()


# ---- odd but honest -------------------------------------------------------------------------------------------------
ODD = [
    ("def f(x): return f(x)", VALUE(1), "crash"),
    ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return [f(x)]", VALUE(1), "crash oom timeout"),
    ("def f(x):\n    y = []\n    y.append(y)\n    return y", VALUE(1), "crash"),
    ("def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y", VALUE([]), "crash"),
    ("def f(x): return 10 ** 6000", VALUE(1), "wrong"),
    ("def f(x): return 7 ** 9", VALUE(7**9), "pass"),
    ("def f(x): return 3 ** 90", VALUE(3**90), "pass"),
    ("def f(x): return -(3 ** 90)", VALUE(-(3**90)), "pass"),
    ("print(10 ** 6000)", {"inputs": [""], "outputs": ["1" + "0" * 6000]}, "pass"),
    ("input()\nprint(1)\ninput()", {"inputs": ["1"], "outputs": ["1"]}, "crash"),
    ("def f(x): return input()", VALUE(""), "crash"),
    ("import pickle\nclass A: pass\ndef f(x): return pickle.loads(pickle.dumps([A, 1]))[1]", VALUE(1), "pass"),
    ("import pickle\ndef f(x): return pickle.loads(b'cos\\nsystem\\n(S\"true\"\\ntR.')", VALUE(0), "crash wrong"),
    ("def f(x) return 1", VALUE(1), "crash"),
    ("", VALUE(1), "crash"),
    ("\0", VALUE(1), "crash"),
    ("def f(x): return '\\ud800'", VALUE("x"), "wrong"),
    ("def f(x): return (i for i in [1])", VALUE([1]), "wrong"),
    ("def f(x): return float('nan')", VALUE(1), "wrong"),
    ("x = '" + "(" * 100000 + "'\ndef f(x): return " + "(" * 1000 + ")" * 1000, VALUE(1), "crash"),
    ("def f(x): return " + "-" * 20000 + "1", VALUE(1), "crash oom pass"),
]


@pytest.mark.parametrize("i", range(len(ODD)))
def test_odd_programs(box, i):
    program, tests, outcomes = ODD[i]
    verdict = run_program(program, tests, timeout_s=1)
    assert verdict.outcome in outcomes.split(), verdict
    assert len(verdict.detail) < 300 and "\n" not in verdict.detail and not survivors(box)


# ---- asserts --------------------------------------------------------------------------------------------------------
ASSERTS = [  # set-up, assert, a program that passes, one that does not
    ("", "assert f(2) == [1, (2, 3)]", "return [1, (2, 3)]", "return [1, [2, 3]]"),
    ("", "assert f(2) == {1: 3, 2: 1}", "from collections import Counter; return Counter([1, 2, 1, 1])", "return 0"),
    ("", "assert f(2) == {(1, 2), (3, 4)}", "return {(3, 4), (1, 2)}", "return [(1, 2), (3, 4)]"),
    ("", "assert 4 == f(2)", "return 4", "return 5"),
    ("", "assert f(2) == 4.0", "return 4", "return 4.1"),
    ("", "assert f(2) == (-1, 2+3j)", "return (-1, 2 + 3j)", "return (-1, 2)"),
    ("", "assert f(2) == True", "return True", "return False"),
    ("", "assert f(2)", "return [0]", "return []"),
    ("", "assert not f(2)", "return []", "return [0]"),
    ("", "assert f(2) is None", "return None", "return 0"),
    ("", "assert f(2) != 5", "return 4", "return 5"),
    ("", "assert f(2) in (3, 4)", "return 4", "return 5"),
    ("", "assert 3 < f(2) <= 4", "return 4", "return 5"),
    ("import math", "assert math.isclose(f(2), 0.3, rel_tol=1e-6)", "return 0.1 + 0.2", "return 0.31"),
    ("", "assert math.isclose(f(2), 0.3)", "return 0.1 + 0.2", "return 'x'"),
    ("", "assert abs(f(2) - 0.3) < 1e-9", "return 0.1 + 0.2", "return None"),
    ("", "assert set(f(2)) == set([1, 2])", "return [2, 1, 1]", "return [3]"),
    ("", "assert sorted(f(2)) == [1, 2]", "return (2, 1)", "return [2, 1, 1]"),
    ("", "assert len(f(2)) == 2 and f(2)[0] == 1", "return [1, 2]", "return [2, 1]"),
    ("", "assert f(2)[1] == 7", "return [1, 7]", "return 7"),
    ("", "assert f(2).upper() == 'AB'", "return 'ab'", "return 'a'"),
    ("", "assert int(f(2)) == 3", "return 3.7", "return 4"),
    ("", "assert f(2) == sys.getsizeof(())", "import sys; return sys.getsizeof(())", "return 0"),
    ("", "assert f(f(2)) == 16", "return x * x", "return x"),
    ("", "assert f([y for y in range(3)]) == 3", "return len(x)", "return x"),
    ("", "assert f(lambda y: y + 1) == 3", "return x(2)", "return 0"),
    ("", "assert f(2) == 4, 'a message'", "return 4", "return 5"),
    ("class P:\n    def __init__(s, v): s.v = v", "assert f(P(4)) == 4", "return x.v", "return x"),
    ("p = f(2)\np.append(3)", "assert p == [2, 3]", "return [x]", "return [x, x]"),
    ("import math\ndef near(a, b): return math.isclose(a, b)", "assert near(f(2), .3)", "return .1 + .2", "return 1"),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(ASSERTS)))
def test_shapes_of_asserts(i):
    setup, text, right, wrong = ASSERTS[i]
    tests = {"setup": setup, "asserts": [text]}
    good, bad = run_programs([(f"def f(x):\n    {body}", tests) for body in (right, wrong)])
    assert good == Verdict("pass", 1, 1, "")
    assert bad.outcome in ("wrong", "crash") and bad.passed == 0 and bad.detail.startswith("test 0: ")


def test_a_function_named_as_a_builtin():
    tests = {"asserts": ["assert sum(10, 15) == 6"]}
    assert run_program("def sum(a, b):\n    return 6", tests).outcome == "pass"
    assert run_program("def total(a, b):\n    return 6", tests).outcome == "crash"


@pytest.mark.parametrize(
    "text",
    ["assert all(f(i) == i * i for i in range(3))", "x = f(1)", "assert 1 == 1", "assert f(", "assert g(1) == h"],
)
def test_what_cannot_be_judged_is_a_harness_error(text):
    verdict = run_program("def f(x): return x * x\ndef g(x): return 1", {"asserts": [text]})
    assert verdict.outcome in ("harness_error", "crash") and verdict.passed == 0
    assert verdict.outcome == "harness_error" or text.endswith("== h")


def test_a_check_names_what_it_lacks():
    verdict = run_program("def f(x): return 1", {"asserts": ["assert math.nothing(f(1))"]})
    assert verdict.outcome == "wrong"
    tests = {"setup": "import no_such_module", "asserts": ["assert abs(f(1)) == 1"]}
    assert run_program("def f(x): return 1", tests).outcome == "crash"


def test_a_program_cannot_widen_what_it_is_asked():
    """It defines the names that the assert uses; they are the judge's own."""
    program = (
        "def abs(x): return 0\ndef set(x): return 1\ndef f(x): return 5\nclass math:\n    isclose = lambda *a: True"
    )
    for text in ("math.isclose(f(2), 4)", "abs(f(2) - 4) < 1", "set(f(2)) == set([4])"):
        assert run_program(program, {"asserts": [f"assert {text}"]}).outcome == "wrong"


def test_counts_and_the_first_failure():
    tests = {"asserts": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(0) == 0"]}
    program = "def f(x):\n    if x == 2: raise ValueError('two')\n    return x * x if x < 3 else 8"
    assert run_program(program, tests) == Verdict("crash", 2, 4, "test 1: raised ValueError: two", 1)


# ---- stdin and calls ------------------------------------------------------------------------------------------------
ADD = {"inputs": ["1 2\n", "10 20"], "outputs": ["3\n", "30\n"]}
READERS = programs(r"""
== reader 0
a, b = map(int, input().split())
print(a + b)
== reader 1
import sys
print(sum(map(int, sys.stdin.read().split())))
== reader 2
import sys
print(sum(map(int, sys.stdin.buffer.readline().split())))
== reader 3
print(sum(map(int, open(0).read().split())))
== reader 4
import os
os.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))
== reader 5
import sys
for line in sys.stdin:
    sys.stdout.write(str(sum(map(int, line.split()))))
sys.exit()
== reader 6
def main():
    print(sum(map(int, input().split())))
if __name__ == '__main__':
    main()
    exit(0)
== reader 7
import threading
threading.stack_size(2 ** 26)
def main():
    print(sum(map(int, input().split())))
threading.Thread(target=main).start()
== reader 8
import io, sys
sys.stdout = out = io.StringIO()
print(sum(map(int, input().split())))
sys.stdout = sys.__stdout__
print(out.getvalue())
== reader 9
import sys
input = sys.stdin.readline
print = sys.stdout.write
print(str(sum(map(int, input().split()))))
== reader 10
a, b = map(int, input().split())
print(reduce(lambda x, y: x + y, deque([a, b])))
""")


@pytest.mark.parametrize("name", READERS)
def test_stdin_programs(name):
    verdict = run_program(READERS[name], ADD)
    assert verdict.outcome == "pass", verdict


def test_output_of_a_failed_input_is_not_the_next_ones():
    program = "n = int(input())\nprint(n)\nif n == 1: raise ValueError"
    verdict = run_program(program, {"inputs": ["1", "2"], "outputs": ["1", "2"]})
    assert (verdict.outcome, verdict.passed, verdict.total) == ("crash", 1, 2)


def test_lines_as_lists():
    tests = {"inputs": [["1", "2"]], "outputs": [["2", "1"]]}
    assert run_program("a = input()\nprint(input())\nprint(a)", tests).outcome == "pass"


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1 2", True), ("1  2 ", "1 2", True), ("1\n\n2", "1\n2", True), ("1 2", "1\n2", False),
        ("2 1", "1 2", False), ("0.3333333", "0.333333", True), ("0.34", "0.333333", False), ("3", "3.0", True),
        ("3.0", "3", False), ("1000001", "1000000", False), ("nan", "nan", True), ("nan", "1.5", False),
        ("1e400", "1.5", False), ("1.5", "1e400", False), ("inf", "1e400", False), ("Yes", "YES", False),
        ("", "", True), ("", "1", False), ("1_0.0", "10.0", False), ("x", "1.0", False),
    ],
)  # fmt: skip
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) is same


CALL = {"fn_name": "pair", "inputs": [[1, [2, 3]], [2, []]], "outputs": [[1, [2, 3]], [2, []]]}


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def pair(a, b):\n    return a, b", "pass"),
        ("class Solution:\n    def pair(self, a: int, b: List[int]) -> List:\n        return [a, tuple(b)]", "pass"),
        ("def pair(a, b):\n    return b, a", "wrong"),
        ("def pair(a):\n    return a", "crash"),
        ("def other(a, b):\n    return a, b", "crash"),
    ],
)  # fmt: skip
def test_calls(program, outcome):
    assert run_program(program, CALL).outcome == outcome


@pytest.mark.parametrize(
    ("body", "args", "expected", "outcome"),
    [
        ("return x", [3], [3], "pass"), ("return [x]", [3], [3], "pass"), ("return x", [3], [3, 4], "wrong"),
        ("return 0.1 + 0.2", [1], 0.3, "pass"), ("return 3", [1], 3.0, "pass"), ("return 3.0001", [1], 3, "wrong"),
        ("return x", [{"1": 2}], {"1": 2}, "pass"), ("return x[1]", [{"1": 2}], 2, "pass"),
        ("return [(1, 2)]", [1], [[1, 2]], "pass"), ("return 'a'", [1], "a", "pass"), ("return {1}", [1], [1], "wrong"),
        ("return None", [1], None, "pass"), ("return True", [1], True, "pass"), ("return '3'", [1], 3, "wrong"),
        ("return 10 ** 400", [1], 1.5, "wrong"),
    ],
)  # fmt: skip
def test_values_of_calls(body, args, expected, outcome):
    tests = {"fn_name": "f", "inputs": [args], "outputs": [expected]}
    assert run_program(f"def f(x):\n    {body}", tests).outcome == outcome


@pytest.mark.parametrize(
    "tests",
    [{}, {"asserts": []}, {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, {"asserts": [{1}]},
     {"fn_name": "f", "inputs": [1], "outputs": [1]}],
)  # fmt: skip
def test_tests_of_no_known_form_are_refused(tests):
    with pytest.raises(InputError):
        run_program("def f(x): return x", tests)


# ---- programs of completions ----------------------------------------------------------------------------------------
F = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (f"```python\n{F}```", F),
        (f"Here:\n\n```py\n{F}```\nDone.", F),
        (f"```\n{F}```", F),
        (f"```python\n{F}", F),
        (f"```text\nno\n```\n```python\n{F}```", F),
        (f"```python\ndef f(x): pass  # first try\n```\nNo:\n```python\n{F}```", F),
        (f"```python\n{F}```\nUse:\n```python\nf(1)\n```", F),
        (f"  ```python\n{F}  ```", F),
        (F, F),
        (f"The function is\n\n{F}\nIt returns x.", F + "\n"),
        (f"import math\n{F}That is all", f"import math\n{F}"),
        ("n = int(input())\nprint(n)", "n = int(input())\nprint(n)"),
        ("no program", "no program"),
        ("", ""),
        ("```python\n```", "```python\n```"),
    ],
)
def test_extract_program(completion, program):
    assert extract_program(completion).strip() == program.strip()


@pytest.mark.parametrize(
    "text", ["```", "(", "def ", " ", "\0\ud800", "a =", "a, ", ": ", "# ", "\n```\n", "```python\n"]
)
def test_extraction_takes_any_text(text):
    """None of it takes long: quadratic time would be seen."""
    for start in ("", "def f(x):\n", "for ", "import ", "x"):
        assert isinstance(extract_program(start + text * 50000), str)


# ---- batches --------------------------------------------------------------------------------------------------------
def test_equal_pairs_run_once(monkeypatch):
    started = []
    fork = Sandbox._fork
    monkeypatch.setattr(Sandbox, "_fork", lambda self, slot, *rest: started.append(slot) or fork(self, slot, *rest))
    pairs = [("def f(x): return 4", VALUE(4)), ("def f(x): return 5", VALUE(4))] * 20
    assert [v.outcome for v in run_programs(pairs, workers=2)] == ["pass", "wrong"] * 20
    assert len(started) == 2


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


def test_a_timeout_keeps_what_passed_before():
    tests = {"asserts": ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]}
    verdict = run_program("def f(x):\n    while x == 2: pass\n    return x", tests, timeout_s=0.3)
    assert verdict == Verdict("timeout", 1, 3, "test 1: took too long", 1)


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


def test_the_same_set_order_in_every_run():
    program = "import random\ndef f(x): return list({'a', 'b', 'c', 'd', 'e'}), random.random()"
    tests = {"asserts": ["assert f(1) == 0"]}
    first = run_program(program, tests).detail
    close_sandboxes()
    assert run_program(program, tests).detail == first


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


def test_values_round_trip():
    for value in (
        1,
        -(2**200),
        2.5,
        float("inf"),
        None,
        True,
        "é\n",
        b"\x00",
        (1, [2]),
        {(1, 2): {3}},
        frozenset({1}),
        1j,
    ):
        assert sandbox_server.decode(json.loads(json.dumps(sandbox_server.encode(value)))) == value
    assert not doctest.testmod(sandbox_server).failed


# ---- long runs ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not MBPP.exists(), reason="MBPP is not there: set CTS_MBPP to its jsonl")
def test_references_of_mbpp_pass():
    rows = [json.loads(line) for line in MBPP.read_text().splitlines()]
    pairs = [
        (row["code"], {"setup": row["test_setup_code"], "asserts": row["test_list"] + row["challenge_test_list"]})
        for row in rows
    ]
    verdicts = run_programs(pairs, timeout_s=20)
    assert [(row["task_id"], v) for row, v in zip(rows, verdicts) if v.outcome != "pass"] == []


def state(pids: list[int]) -> list[tuple[int, int]]:
    """Descriptors and resident kB of each process."""
    rss = lambda pid: int(pathlib.Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
    return [(len(os.listdir(f"/proc/{pid}/fd")), rss(pid)) for pid in pids]


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
