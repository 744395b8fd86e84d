"""The process that hostile programs are forked from: every attack by itself, in each kind of confinement.

pytest tests/test_sandbox_server.py
"""

import collections
import decimal
import doctest
import enum
import fractions
import itertools
import json
import os
import pathlib
import socket
import tempfile

import pytest
from examples import VALUE, programs_of
from processes import survivors

from common import sandbox, sandbox_server
from common.programs import Verdict, run_program
from common.sandbox import Sandbox

SECRET = "s3cr3t-4711"  # what f(2) should be: no program below knows it, and none has it in one piece
TESTS = {"asserts": [f"assert f(2) == {SECRET!r}"]}


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
    """Run it; its outcome is one of `outcomes`, it has no process left, and the next program runs as ever.

    A time limit of 1 s where running into it is an answer; else one that no slow machine reaches."""
    patience = {"timeout_s": 1.0 if "timeout" in outcomes.split() else 20.0}
    verdict = run_program(program, tests, **patience | limits)
    assert verdict.outcome in outcomes.split() and verdict.passed == 0, verdict
    assert not survivors(box)
    assert run_program("def f(x):\n    return x * x", VALUE(4)).outcome == "pass"
    assert sandbox._sandboxes["programs"] is box, "the server had to be started again"
    return verdict


# ---- exits ----------------------------------------------------------------------------------------------------------
EXITS = programs_of(r"""
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


ENDS = programs_of(r"""
== handler loops
import atexit
@atexit.register
def f():
    while True: pass
print(input(), flush=True)
== handler sleeps
import atexit, time
atexit.register(time.sleep, 60)
print(input(), flush=True)
== del loops
class A:
    def __del__(self):
        while True: pass
a = A()
print(input(), flush=True)
== thread that never ends
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(input(), flush=True)
== handler crashes the process
import atexit, ctypes
atexit.register(ctypes.string_at, 0)
print(input(), flush=True)
== handler exits with a code
import atexit, os
atexit.register(os._exit, 1)
print(input(), flush=True)
== handler takes memory
import atexit, os
@atexit.register
def f():
    try: bytearray(10 ** 10)
    except MemoryError: os._exit(1)
print(input(), flush=True)
== handler prints 10 GB
import atexit, os
@atexit.register
def f():
    while True: os.write(1, b'\n' * 1000000)
print(input(), flush=True)
== output of a handler lost by the next
import atexit, os
atexit.register(os._exit, 0)
atexit.register(print, input())
== output behind a loop
import atexit
atexit.register(print, input())
while True: pass
== frame of an output
import os, struct
data = b'{"out":"1"}'
os.write(3, struct.pack('!Id', len(data), 0.0) + data)
== frame of an output, then a loop
import os, struct
data = b'{"out":"1"}'
os.write(3, struct.pack('!Id', len(data), 0.0) + data)
while True: pass
== frames without end
import os
while True: os.write(3, b'0' * 65536)
== frame of a pass, then an exit with a code
import os, struct
for data in (b'{"crash":"1"}', b'{"v":true}', b'{"err":{"out":"1"}}'):
    os.write(3, struct.pack('!Id', len(data), 0.0) + data)
os._exit(1)
== no output
import os
os.close(1)
== hook instead of an error
import sys, os
sys.excepthook = lambda *a: os._exit(0)
1 / 0
== reads its own output
print(input(), flush=True)
while True: open('/dev/stdout', 'rb', buffering=0).read(1)
== leaves early
import sys
edge = sys.modules['common.edge']
loader = __loader__
del __loader__, loader
edge.leave = type('A', (), {'__del__': lambda self: print('2')})()
== ends its interpreter
import ctypes
ctypes.pythonapi.Py_Exit(0)
== standard input instead
import os
os.write(0, b'1')
""")


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_program_is_no_second_chance(box, name):
    """Exit handlers and what else runs at the end has the program's time and its limits."""
    attack(box, ENDS[name], "wrong crash timeout", {"inputs": ["1\n"], "outputs": ["1\n"]}, timeout_s=0.5)


def test_nothing_is_left_for_the_next_input(box):
    """Each input has an interpreter, a temp directory and an output of its own."""
    program = (
        "import os, builtins, sys\n"
        "print(input(), hasattr(builtins, 'left'), os.path.exists('left'), sorted(os.listdir()))\n"
        "builtins.left = open('left', 'w')\nsys.stdout.flush()\n"
        "sys.__stdout__ = sys.stdout = None\nos.chdir('/')\n"
    )
    inputs = ["1", "2", "3"]
    tests = {"inputs": inputs, "outputs": [f"{i} False False ['solution.py']" for i in inputs]}
    assert run_program(program, tests) == Verdict("pass", 3, 3) and not survivors(box)


def test_a_failed_input_does_not_stop_the_next_ones_and_a_timeout_does(box):
    program = "import os\nn = int(input())\nprint(n, flush=True)\nif n == 1: os._exit(3)\nwhile n == 3: pass"
    tests = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "3", "4"]}
    verdict = run_program(program, tests, timeout_s=0.5)
    assert verdict == Verdict("crash", 1, 4, "test 0: ended with exit code 3", 0) and not survivors(box)


# ---- lies -----------------------------------------------------------------------------------------------------------
LIES = programs_of(r"""
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


PATCHES = programs_of(r"""
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
PROCESSES = programs_of(r"""
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
        "def late():\n    time.sleep(0.3)\n    while n == '1': print('late')\n"
        "threading.Thread(target=late, daemon=True).start()\n"
    )
    noise = "def go():\n    while True: print('x', flush=True)\n"
    attack(box, f"import threading\n{noise}def f(x):\n    threading.Thread(target=go).start()\n    return 1", "wrong")
    verdict = run_program(program, {"inputs": ["1"], "outputs": ["1"]}, timeout_s=1)
    assert verdict.outcome == "pass" and not survivors(box)


# ---- memory, output, files ------------------------------------------------------------------------------------------
MEMORY = programs_of(r"""
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
    limits = {"timeout_s": 0.5} if "stderr" in write else {}
    attack(box, program, outcomes, {"inputs": ["1"], "outputs": ["1"]}, **limits)
    attack(box, f"{program}def f(x): return 1", outcomes, **limits)


def test_a_value_too_long(box):
    attack(box, "def f(x): return 'x' * 100000000", "crash oom")
    attack(box, "def f(x): return 'x' * 5000000", "wrong")
    attack(box, "def f(x): return {i * (2 ** 61 - 1) for i in range(3000)}", "wrong timeout", VALUE({1, 2}))


FILES = programs_of(r"""
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
    verdict = run_program(program, tests, timeout_s=20)
    assert verdict.outcome in outcomes.split(), verdict
    assert len(verdict.detail) < 300 and "\n" not in verdict.detail and not survivors(box)


# ---- values on their way --------------------------------------------------------------------------------------------
def test_a_value_of_a_derived_class_is_the_plain_value_that_it_holds():
    """By the plain type's own methods, whatever the class defines."""
    lies = {
        name: lambda self, *rest: 1 / 0
        for name in ("__eq__", "__iter__", "__len__", "__repr__", "__str__", "__int__", "__index__", "__float__",
                     "__getitem__", "__pos__", "items", "keys", "copy", "__reduce__")
    }  # fmt: skip
    third = fractions.Fraction(1, 3)
    for value in (3, -(2**70), 2.5, 1j, "é", b"x", (1, [2]), [3], {4}, frozenset({5}), {6: 7}, third):
        made = type("Lie", (type(value),), {**lies, "__hash__": type(value).__hash__})(value)
        back = sandbox_server.decode(json.loads(json.dumps(sandbox_server.encode(made))))
        assert type(back) is type(value) and back == value
    color = enum.IntEnum("Color", "RED GREEN")
    point = collections.namedtuple("Point", "x y")
    counts = collections.Counter("aab")
    for value, plain in (
        (color.GREEN, 2), (enum.StrEnum("S", "A").A, "a"), (point(1, color.RED), (1, 1)), (counts, {"a": 2, "b": 1}),
        (collections.deque([1], maxlen=1), collections.deque([1])), (collections.OrderedDict(a=1), {"a": 1}),
        (enum.IntFlag("F", "A B").B, 2), (type("D", (decimal.Decimal,), {})("1.50"), decimal.Decimal("1.50")),
    ):  # fmt: skip
        back = sandbox_server.decode(sandbox_server.encode(value))
        assert type(back) is type(plain) and back == plain
    with pytest.raises(sandbox_server.NotPlain, match="Mode is no plain data"):
        sandbox_server.encode(enum.Enum("Mode", "A").A)


def test_views_and_iterators_on_their_way():
    d = {"a": [1], "b": [2]}
    back = lambda x: sandbox_server.decode(json.loads(json.dumps(sandbox_server.encode(x))))
    assert back(d.keys()) == {"a", "b"} and [*back(d.values())] == [[1], [2]] and ("b", [2]) in back(d.items())
    assert all(type(back(view)) is type(view) for view in (d.keys(), d.values(), d.items()))
    assert back(collections.OrderedDict(d).keys()) == {"a", "b"}
    for iterator in (map(abs, [-1, 2]), iter((1, 2)), (i for i in (1, 2)), reversed([2, 1]), itertools.count(1)):
        if type(iterator) is itertools.count:
            with pytest.raises(sandbox_server.NotPlain, match="more than 1048576 items"):
                sandbox_server.encode(iterator)
        else:
            assert [*back(iterator)] == [1, 2]


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
