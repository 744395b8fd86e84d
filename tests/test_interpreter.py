"""What a program finds in the sandbox, beside what it finds on the machine that the tests run on.

pytest tests/test_interpreter.py
"""

import json
import os
import subprocess
import sys

import pytest
from examples import ROOT, VALUE, programs_of

from common import interpreter
from common.programs import Verdict, run_program
from common.sandbox import Job, Sandbox

pytestmark = pytest.mark.usefixtures("confined")

# ---- what is there --------------------------------------------------------------------------------------------------
STARTS = programs_of(r"""
== stack without a limit
import resource
resource.setrlimit(resource.RLIMIT_STACK, (-1, -1))
print(6)
== more stack
import resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (2**26, -1))
resource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[1],) * 2)
print(6)
== deep recursion in a thread
import sys, threading
from functools import lru_cache
sys.setrecursionlimit(10**6)
threading.stack_size(2**29)
@lru_cache(None)
def f(n): return n and 1 + f(n - 1)
def main(): print(6 * f(50000) // 50000)
t = threading.Thread(target=main)
t.start()
t.join()
== thread pool
from multiprocessing.pool import ThreadPool
with ThreadPool(4) as pool: print(sum(pool.map(int, "123")))
== thread pool of many, left open
from multiprocessing.pool import ThreadPool
pool = ThreadPool(16)
print(len(pool.map(lambda n: list(range(100000)), range(32))) - 26)
== dummy pool
from multiprocessing.dummy import Pool
print(sum(Pool(3).map(int, "123")))
== locks of multiprocessing
import multiprocessing as m
q, lock, done = m.Queue(), m.Lock(), m.Event()
with lock: q.put(6)
done.set()
print(q.get())
== standard input by name
print(6 * int(open("/dev/stdin").read()))
== standard input by name, as sys.stdin
import sys
sys.stdin = open("/dev/stdin")
print(6 * int(input()))
== standard input mapped
import mmap
print(6 * int(mmap.mmap(0, 0, access=mmap.ACCESS_READ).read()))
== standard input twice
import sys
sys.stdin.read()
sys.stdin.seek(0)
print(6 * int(sys.stdin.read()))
== standard output by name
f = open("/dev/stdout", "w")
f.write("6")
== nowhere
import os, sys
sys.stderr = open(os.devnull, "w")
print("x" * 10**6, file=sys.stderr)
print(6)
== random bytes
print(2 * len(open("/dev/urandom", "rb").read(3)))
== asyncio
import asyncio
async def f():
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(lambda: 6)
print(asyncio.run(f()))
== loop of old
import asyncio
async def f(): return 6
print(asyncio.new_event_loop().run_until_complete(f()))
== locale
import locale
locale.setlocale(locale.LC_ALL, "")
print(6)
== sqlite3
import sqlite3
print(sqlite3.connect(":memory:").execute("select 1 + 5").fetchone()[0])
== modules with libraries
import bz2, ctypes, hashlib, lzma, readline, ssl, uuid, zlib, xml.etree.ElementTree
print(6 if hashlib.new("sha256") and lzma.decompress(lzma.compress(b"x")) else 0)
== its own source
import inspect
def f(): pass
print(6 if "def f" in inspect.getsource(f) and "inspect" in open(__file__).read() else 0)
== a module that it writes
open("helper.py", "w").write("x = 6")
import helper
print(helper.x)
== future, form feed, no main
#!/usr/bin/env python3
# -*- coding: latin-1 -*-
'''doc'''
from __future__ import annotations
def f(x: Missing): return "é"
print(6 if __doc__ == "doc" and len(f(1)) == 1 and __name__ == "__main__" else 0)
== fileinput and arguments
import fileinput, sys
print(sum(6 for _ in fileinput.input()) if len(sys.argv) == 1 else 0)
== a command
import os
os.system("clear")
print(6)
== pickled
import dataclasses, pickle
@dataclasses.dataclass
class A: x: int = 6
print(pickle.loads(pickle.dumps(A())).x)
== built-in names
print(6 if __builtins__.len("x") == 1 and __spec__ is None else 0)
""")
STARTS["byte-order mark"] = "\ufeffprint(6)"
STARTS["form feeds and carriage returns"] = "\x0cx = 6\r\n\x0c\r\nif x:\r\n\tprint(x)\r\n\x0c"
STARTS["fast input and output"] = r"""
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\r\n")
print(" " * 100000)
print(6 * int(input()))
"""


@pytest.mark.parametrize("name", STARTS)
def test_honest_programs_find_what_they_need(name):
    text = " " * 100000 + "\n6\n" if name.startswith("fast") else "6\n"
    assert run_program(STARTS[name], {"inputs": ["1\n"], "outputs": [text]}) == Verdict("pass", 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        "import multiprocessing.pool as p\n    return sum(p.ThreadPool(2).map(int, '123'))",
        "import asyncio\n    async def g(): return 6\n    return asyncio.run(g())",
        "import resource as r\n    r.setrlimit(r.RLIMIT_STACK, (-1, -1))\n    return 6",
        "import locale\n    locale.setlocale(locale.LC_ALL, '')\n    return 6",
        "import sqlite3\n    return sqlite3.connect(':memory:').execute('select 6').fetchone()[0]",
    ],
)  # fmt: skip
def test_functions_find_it_too(body):
    assert run_program(f"\ufeffdef f(x):\n    {body}", VALUE(6)) == Verdict("pass", 1, 1)


def test_limits_are_not_to_be_raised():
    """Asking is no error and gains nothing; lowering works."""
    program = """
import resource as r
def f(x):
    all = r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NOFILE, r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_STACK
    before = [r.getrlimit(what) for what in all]
    for what in all:
        for ask in ((-1, -1), (2**40, 2**40), (r.getrlimit(what)[0], -1), (-5, -1)): r.setrlimit(what, ask)
    after = [r.getrlimit(what) for what in all]
    r.setrlimit(r.RLIMIT_NOFILE, (20, -1))
    return before == after, r.getrlimit(r.RLIMIT_NOFILE)
"""
    assert run_program(program, VALUE((True, (20, 64)))) == Verdict("pass", 1, 1)


# ---- beside the interpreter of these tests --------------------------------------------------------------------------
BESIDE = programs_of(r"""
== depth
def f(n):
    global most
    most = n
    f(n + 1)
try: f(0)
except RecursionError: print(most)
== names of the main module
import sys
print(sorted(k for k in globals() if k.startswith("__")), __name__, __package__, __cached__, __annotations__)
print(sys.argv, sys.modules["__main__"].__dict__ is globals(), __builtins__, __file__.endswith("/solution.py"))
== streams
import sys
for s in (sys.stdin, sys.stdout, sys.stderr):
    print(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno(), s.isatty())
print(sys.stdout.seekable(), sys.stdin.seekable())
== order of deletion
class A:
    def __init__(self, n): self.n = n
    def __del__(self): print("del", self.n)
a = A(1); b = A(2); c = [A(3), A(4)]; d = {1: A(5)}
== things left in other modules
import builtins, math, sys
class A:
    def __init__(self, n): self.n = n
    def __del__(self): print("del", self.n)
def f(): return a
a, math.x, sys.y, builtins.z = map(A, range(4))
== files left in other modules
import builtins, io, math, sys
builtins.o = open(1, "w"); builtins.o.write("a")
math.w = io.TextIOWrapper(sys.stdout.buffer); math.w.write("b")
print("c")
== a file left in another module
import builtins
builtins.o = open(1, "w"); builtins.o.write("a")
== order of handlers, threads, finalizers and references
import atexit, threading, time, weakref
class A: pass
a = A()
atexit.register(print, "first"); atexit.register(print, "second")
weakref.finalize(a, print, "finalizer")
r = weakref.ref(a, lambda r: print("reference"))
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
atexit.register(lambda: atexit.register(print, "again"))
print("main")
== handler with an end of its own
import atexit
class A:
    def __call__(self): print("call")
    def __del__(self): print("del")
atexit.register(A())
== output that was replaced
import io, sys
class W(io.StringIO):
    def flush(self): sys.__stdout__.write("F")
sys.stdout = W()
print("b")
== two buffers and one descriptor
o = open(1, "w")
o.write("a")
print("b")
== stdout in a destructor
import io, sys
class A:
    def __del__(self): print(sys.stdout is sys.__stdout__)
a = A()
sys.stdout = io.StringIO()
== hooks
import sys
sys.unraisablehook = lambda a: print("unraisable")
class A:
    def __del__(self): 1 / 0
a = A()
== no builtins left
import builtins
print("x")
for n in dir(builtins):
    if n not in ("__build_class__", "__import__"): delattr(builtins, n)
== no modules left
import sys
sys.modules.clear()
print("x")
== bytes
import sys
sys.stdout.buffer.write(b"\xff"); print("\ud800é")
== pool and coroutine
import asyncio, concurrent.futures
async def f():
    try: await asyncio.sleep(10)
    finally: print("cancelled")
async def main():
    asyncio.ensure_future(f())
    await asyncio.sleep(0)
asyncio.run(main())
concurrent.futures.ThreadPoolExecutor(1).submit(print, "late")
== thread data
import threading
data = threading.local()
class A:
    def __del__(self): print("del")
data.a = A()
== unit tests
import unittest
class T(unittest.TestCase):
    def test(self): print("tested")
unittest.main()
== codes
import sys
print("x")
sys.exit(256)
== number that is no code
import sys
print("x")
sys.exit(0.0)
== a thread's exit
import sys, threading
threading.Thread(target=sys.exit, args=(3,)).start()
== handlers, the last of which leaves
import atexit, os
atexit.register(lambda: os._exit(0))
atexit.register(print, "lost")
print("kept")
== traceback
import traceback, sys
try: 1 / 0
except Exception: traceback.print_exc(file=sys.stdout)
""")


def test_a_whole_program_runs_as_in_an_interpreter_of_its_own(tmp_path):
    """Its output and its exit code are those of `python solution.py < input`, to the byte."""
    box = Sandbox()
    jobs = {name: Job({"kind": "stdin", "program": text, "tests": ["é1\n2"]}) for name, text in BESIDE.items()}
    box.run([*jobs.values()], 2, 4.0, 512)
    box.close()
    (tmp_path / "input").write_text("é1\n2")
    env = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0", "PATH": os.defpath}
    for name, text in BESIDE.items():
        (tmp_path / "solution.py").write_text(text)
        with open(tmp_path / "input") as f:
            command = [sys.executable, "solution.py"]
            plain = subprocess.run(command, cwd=tmp_path, stdin=f, capture_output=True, timeout=60, env=env)
        printed = plain.stdout.decode("utf-8", "replace").replace(str(tmp_path), interpreter.TEMP)
        (frame,) = jobs[name].kept
        if plain.returncode:
            assert frame.startswith((b'{"err":', b'{"crash":')), name
        else:
            assert json.loads(frame) == {"out": printed}, name


def test_the_room_changes_nothing_where_it_is_only_imported():
    code = (
        "import resource, sys, threading\nbefore = resource.setrlimit, threading.stack_size, sys.meta_path[:]\n"
        "import common.programs\nassert before == (resource.setrlimit, threading.stack_size, sys.meta_path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
