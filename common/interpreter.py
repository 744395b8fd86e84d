"""What a program finds in the sandbox: modules, streams and limits, as like those of a plain machine as confinement
allows. All of it is Python in the candidate's process and holds nobody: what does is the kernel's side, in
sandbox_server, the only room that uses this one."""

import builtins
import contextlib
import ctypes
import gc
import importlib.machinery
import io
import os
import re
import resource
import sys
import threading
import types
import weakref

STDLIB = os.path.dirname(os.path.abspath(os.__file__))
TEMP = "/temp" if f"{STDLIB}/".startswith("/tmp/") else "/tmp"  # the temp directory in a file system of our own
SOLUTION = "solution.py"  # what a whole program is called, in its temp directory

# What programs of the APPS kind use without importing it: modules, and names of modules.
_MODULES = "math cmath re sys itertools collections heapq bisect functools string random time copy operator"
_NAMES = {
    "typing": "Any Dict List Optional Set Tuple Union", "collections": "Counter OrderedDict defaultdict deque",
    "functools": "lru_cache reduce cmp_to_key", "itertools": "accumulate combinations permutations product",
    "heapq": "heapify heappop heappush", "bisect": "bisect_left bisect_right", "math": "gcd inf sqrt",
}  # fmt: skip
PRELUDE = {name: importlib.import_module(name) for name in _MODULES.split()}
PRELUDE |= {name: getattr(importlib.import_module(m), name) for m, names in _NAMES.items() for name in names.split()}


def fresh_streams() -> None:
    """sys.stdin and its kin as an interpreter makes them, for descriptors 0, 1 and 2."""
    for fd, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        buffering, errors = (1, "backslashreplace") if name == "stderr" else (-1, "surrogateescape")
        stream = open(fd, mode, buffering, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        stream.buffer.raw.name = f"<{name}>"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


# ---- a plain machine's ways ---------------------------------------------------------------------------------------
# What honest programs do that confinement would make fail for no good reason. All of it runs in Python, inside.
class End(io.FileIO):
    """An end of a pipe as asyncio wants a socket."""

    recv, send = io.FileIO.read, io.FileIO.write

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self.fileno(), flag)


def pipe_for_socketpair(loop) -> None:
    """What wakes an asyncio loop, where no sockets can be made."""
    get, put = os.pipe()
    loop._ssock, loop._csock = End(get, "r"), End(put, "w")
    for end in (loop._ssock, loop._csock):
        end.setblocking(False)
    loop._internal_fds += 1
    loop._add_reader(get, loop._read_from_self)


def adapt_multiprocessing(module) -> None:
    """Locks of threads, where there are neither processes nor POSIX semaphores: a ThreadPool makes one."""
    for name in ("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier"):
        setattr(module.BaseContext, name, staticmethod(getattr(threading, name)))


def adapt_asyncio(module) -> None:
    module.BaseSelectorEventLoop._make_self_pipe = pipe_for_socketpair


ADAPTED = {"multiprocessing.context": adapt_multiprocessing, "asyncio.selector_events": adapt_asyncio}


def find_adapted(name: str, path=None, target=None):
    """A finder for sys.meta_path: modules of ADAPTED are changed as soon as they are loaded, and not before anyone asks
    for them, for loaded modules make every fork slower."""
    if name not in ADAPTED:
        return None
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    load = spec.loader.exec_module
    spec.loader.exec_module = lambda module: (load(module), ADAPTED[name](module))
    return spec


def adapt_limits() -> None:
    """Programs ask for more stack than they have. More than a child may have is what it may have, and no error; a
    thread's stack is reserved as a whole, so it gets at most a quarter of the address space."""
    real_limit, real_size = resource.setrlimit, threading.stack_size

    def setrlimit(what, limits):
        top = resource.getrlimit(what)[1]
        real_limit(what, tuple(top if top >= 0 and not 0 <= limit <= top else limit for limit in limits))

    def stack_size(size=0):
        return real_size(min(size, resource.getrlimit(resource.RLIMIT_AS)[0] // 4))

    resource.setrlimit, threading.stack_size = setrlimit, stack_size


class Leave:
    """Ends the process in the middle of the interpreter's end, once nothing of the program is left and its output is
    out: taking the server's modules apart too would cost three times what all the rest of a short program does.

    It is deleted when EDGE is cleared, after the modules that the program imported and before those that it found. The
    main module's loader tells whether the program's globals, and with them all its functions and classes, are gone; if
    not (something of a library may hold one), the interpreter goes on to its full end.
    """

    def __init__(self, loader: weakref.ref):
        self.loader = loader
        for forget in getattr(sys.modules.get("typing"), "_cleanups", ()):  # its caches hold the program's classes
            forget()

    def __del__(self, gc=gc, leave=os._exit, quiet=contextlib.suppress, kinds=(io.TextIOWrapper, io.BufferedWriter)):
        if self.loader() is None:
            for stream in gc.get_objects():  # the output, and files that a module of ours was given to keep
                if isinstance(stream, kinds):
                    with quiet(Exception):
                        stream.flush()
            leave(0)
        gc.unfreeze()  # what a frozen object holds would never be collected


EDGE = types.ModuleType("common.edge")  # the last entry of sys.modules that a program finds


# ---- before the first fork ----------------------------------------------------------------------------------------
# Imported by then: quick for every child, and there where its own imports cannot read the library.
WARM = """
__future__ _sitebuiltins abc array base64 bisect calendar cmath copy csv dataclasses datetime decimal difflib enum
fractions functools glob hashlib heapq inspect numbers operator pickle pprint queue secrets statistics string textwrap
timeit traceback typing unicodedata uuid zlib encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16"""


def load_libraries() -> None:
    """What lies outside STDLIB and is looked for late, so before this process leaves the machine's file system: shared
    libraries of standard modules, the one that ends threads (without it the C library aborts), and the locale."""
    here = importlib.machinery.EXTENSION_SUFFIXES[0]
    names = "_bz2 _crypt _ctypes _curses _hashlib _lzma _sqlite3 _ssl _uuid pyexpat readline zlib"
    for path in ("libgcc_s.so.1", *(f"{STDLIB}/lib-dynload/{name}{here}" for name in names.split())):
        with contextlib.suppress(OSError):
            ctypes.CDLL(path)
    ctypes.CDLL(None).newlocale(0x1FBF, b"C.UTF-8", None)  # all categories; never freed, so setlocale finds it again


def warm(mode: str) -> None:
    """What every child would do again, names that `-S` leaves out, and a plain machine's ways."""
    for name in WARM.split():
        importlib.import_module(name)
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.modules["_sitebuiltins"].Quitter(name, "Ctrl-D"))
    builtins.help = sys.modules["_sitebuiltins"]._Helper()
    re.compile(r"(\d+)[a-z]*").findall("1a")
    sys.argv, sys.path[:] = [SOLUTION], [STDLIB, f"{STDLIB}/lib-dynload"]
    adapt_limits()
    if mode != "none":
        sys.meta_path.insert(0, types.SimpleNamespace(find_spec=find_adapted))
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=TEMP, LANG="C.UTF-8", TZ="UTC")
    sys.modules[EDGE.__name__] = EDGE
    gc.collect()
    gc.freeze()
