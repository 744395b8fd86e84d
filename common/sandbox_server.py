"""The process that hostile programs are forked from; `common.sandbox` starts it and speaks to it.

    python -P -s -S sandbox_server.py CONTROL_FD MODE

One thread, no JAX, small imports done. It is told on CONTROL_FD to fork a child and is handed one end of that child's
own socket. Programs, inputs and values pass only over that socket, never through this process, so nothing of one
candidate is in the memory that the next one is forked from. Expected outputs are in neither: the other end compares.

A whole program (tests on standard input) has a child for each input, and that child is an interpreter from beginning to
end: it goes back through `serve` to this file's last line and runs the program there, so exit handlers, threads, module
teardown and the last flush are CPython's own, in CPython's order, and none of them has to be imitated. What counts is
read by the other end from the pipe that is the child's standard output, once the child has ended, and how it ended.

MODE is "namespaces" (a file system, process tree and network of their own, and seccomp where the kernel has it),
"landlock" (Landlock and seccomp), "none" (limits alone) or "auto": the first of the first two that works here.
"""

import array
import builtins
import collections
import contextlib
import ctypes
import decimal
import errno
import fractions
import importlib.machinery
import itertools
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types
import weakref

from common.interpreter import EDGE, PRELUDE, SOLUTION, STDLIB, TEMP, Leave, fresh_streams, load_libraries, warm

CHANNEL = 3  # a child's descriptor beside 0, 1, 2: its socket
FRAME = struct.Struct("!Id")  # length of the payload, CPU seconds used so far
FRAME_MAX = 8 << 20  # bytes of one value on its way
OUTPUT_MAX = 4 << 20  # bytes that one test may print
ITEMS_MAX = 1 << 20  # items that an iterator may give
FILES_MB = 32  # what the temp directory holds, and one file in it
THREADS = 64
UIDS = 1024  # slots: each has a user id of its own where the server is root

# ---- values -------------------------------------------------------------------------------------------------------
# Plain data as JSON. What a candidate's class derives from a plain type is made plain in the candidate's process, by
# methods of that type; the other side is given exact types only and never calls a method of a candidate's class.
_TAGS = {tuple: "t", set: "s", frozenset: "z", collections.deque: "q"}
_VIEWS = {type({}.keys()): "k", type({}.values()): "u", type({}.items()): "j"}
_EXACT = {
    **{kind: kind.__pos__ for kind in (int, float, complex, fractions.Fraction)},
    decimal.Decimal: lambda x: decimal.Decimal(decimal.Decimal.__str__(x)),
    str: str.__str__,
    **{kind: lambda x, kind=kind: kind.__getitem__(x, slice(None)) for kind in (bytes, tuple, list)},
    **{kind: lambda x, kind=kind: kind(kind.__iter__(x)) for kind in (set, frozenset, collections.deque)},
    dict: lambda x: dict(dict.items(x)),
}


class NotPlain(Exception):
    """A value that is no plain data; the text names its type."""


def encode(x):
    """Plain data as what json.dumps takes. Raises NotPlain, or RecursionError for what contains itself.

    >>> encode([1, (2.5, None), {"a": {3}}, 1 << 60, map(abs, [-1])])
    [1, {'t': [2.5, None]}, {'d': [['a', {'s': [3]}]]}, {'i': '0x1000000000000000'}, {'e': [1]}]
    """
    kind = type(x)
    if x is None or kind is bool or kind is str or kind is float:
        return x
    if kind is int:
        return x if -(1 << 53) < x < 1 << 53 else {"i": hex(x)}  # hex: no limit on digits, linear time
    if kind is list:
        return [encode(v) for v in x]
    if kind in _TAGS:
        return {_TAGS[kind]: [encode(v) for v in x]}
    if kind is dict:
        return {"d": [[encode(k), encode(v)] for k, v in x.items()]}
    if kind is complex:
        return {"c": [x.real, x.imag]}
    if kind is bytes:
        return {"b": x.hex()}
    if kind is range:
        return {"r": [encode(v) for v in (x.start, x.stop, x.step)]}
    if kind is fractions.Fraction:
        return {"f": [encode(x.numerator), encode(x.denominator)]}
    if kind is decimal.Decimal:
        return {"n": decimal.Decimal.__str__(x)}
    if kind is array.array:
        return {"a": [x.typecode, [encode(v) for v in x.tolist()]]}
    for base in type.mro(kind):
        if base in _VIEWS:
            return {_VIEWS[base]: [encode(v) for v in x]}
        if base in _EXACT and base is not kind:
            return encode(_EXACT[base](x))
    if hasattr(kind, "__next__"):
        items = list(itertools.islice(x, ITEMS_MAX + 1))
        if len(items) > ITEMS_MAX:
            raise NotPlain(f"{kind.__name__!s:.60} gives more than {ITEMS_MAX} items")
        return {"e": [encode(v) for v in items]}
    raise NotPlain(f"{kind.__name__!s:.60} is no plain data")


_MAKE = {
    "t": lambda v: tuple(map(decode, v)),
    "s": lambda v: set(map(decode, v)),
    "z": lambda v: frozenset(map(decode, v)),
    "q": lambda v: collections.deque(map(decode, v)),
    "d": lambda v: {decode(k): decode(x) for k, x in v},
    "i": lambda v: int(v, 16),
    "c": lambda v: complex(float(v[0]), float(v[1])),
    "b": bytes.fromhex,
    "r": lambda v: range(*map(decode, v)),
    "f": lambda v: fractions.Fraction(*(decode(x) for x in v if len(str(x)) < 5000)),  # a longer one takes too long
    "n": decimal.Decimal,
    "a": lambda v: array.array(str(v[0]), [decode(x) for x in v[1]]),
    "k": lambda v: dict.fromkeys(map(decode, v)).keys(),
    "u": lambda v: dict(enumerate(map(decode, v))).values(),
    "j": lambda v: dict(map(decode, v)).items(),
    "e": lambda v: iter(list(map(decode, v))),
}


def decode(x):
    """The value of what `encode` made. What it did not make raises some Exception."""
    if type(x) is list:
        return [decode(v) for v in x]
    if type(x) is dict:
        ((tag, value),) = x.items()
        return _MAKE[tag](value)
    return x


# ---- the kernel's side --------------------------------------------------------------------------------------------
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
ARCH = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
DEVICES = ("null", "zero", "urandom")  # of the machine, in the /dev of a whole program
# What a Python program with threads and files calls, and its number on x86_64 and on aarch64 ("-": has none). All else
# fails with EPERM: sockets, processes, other programs, mounts, ptrace, System V and POSIX IPC, modes and owners.
SYSCALLS = """
    read 0 63, write 1 64, close 3 57, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133,
    rt_sigtimedwait 128 137, sigaltstack 131 132, pread64 17 67, pwrite64 18 68, readv 19 65,
    writev 20 66, preadv 295 69, pwritev 296 70, sched_yield 24 124, mremap 25 216, madvise 28 233, mincore 27 232,
    dup 32 23, dup3 292 24, nanosleep 35 101, clock_nanosleep 230 115, getitimer 36 102, setitimer 38 103,
    getpid 39 172, getppid 110 173, gettid 186 178, exit 60 93, exit_group 231 94, uname 63 160,
    flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents64 217 61, getcwd 79 17,
    chdir 80 49, fchdir 81 50, fstat 5 80, newfstatat 262 79, statx 332 291, umask 95 166, gettimeofday 96 169,
    getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174,
    geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
    getpgid 121 155, getsid 124 156, futex 202 98, set_tid_address 218 96, set_robust_list 273 99,
    get_robust_list 274 100, rseq 334 293, sched_getaffinity 204 123, sched_getparam 143 121,
    sched_getscheduler 145 120, clock_gettime 228 113, clock_getres 229 114, openat 257 56, unlinkat 263 35,
    mkdirat 258 34, renameat 264 38, renameat2 316 276, symlinkat 266 36, linkat 265 37, readlinkat 267 78,
    faccessat 269 48, faccessat2 439 439, ppoll 271 73, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21,
    epoll_pwait 281 22, pipe2 293 59, eventfd2 290 19, getrandom 318 278, restart_syscall 219 128,
    membarrier 324 283, statfs 137 43, fstatfs 138 44, fadvise64 221 223, fallocate 285 47, copy_file_range 326 285,
    sendfile 40 71, splice 275 76, wait4 61 260, waitid 247 95, getcpu 309 168, getpriority 140 141,
    close_range 436 436, timer_create 222 107, timer_settime 223 110, timer_delete 226 111, dup2 33 -, pipe 22 -,
    open 2 -, access 21 -, stat 4 -, lstat 6 -, poll 7 -, select 23 -, readlink 89 -, rename 82 -, mkdir 83 -,
    rmdir 84 -, unlink 87 -, link 86 -, symlink 88 -, getdents 78 -, epoll_create 213 -, epoll_wait 232 -,
    time 201 -, alarm 37 -, pause 34 -, getpgrp 111 -, arch_prctl 158 -, eventfd 284 -, creat 85 -
"""  # fmt: skip
SIGNALLING = ((62, 129), (200, 130), (234, 131), (129, 138), (297, 240), (424, 424))  # kill and its kin: fatal
CLONE3 = (435, 435)
# Calls of which one argument decides: (number, argument, values that are allowed or refused, is it allowed). prlimit64
# is for the caller itself; a descriptor may not be made to signal others (F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN).
BY_ARGUMENT = (
    ((302, 261), 0, (0,), True),
    ((72, 25), 1, (8, 10, 15), False),
    ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), True),
)
CLONE, CLONE_THREAD = (56, 220), 0x10000
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """A C call's result, or OSError with `what`."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = [w.encode() if w is not None else None for w in (source, target, kind, data)]
    check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def seccomp_filter() -> ctypes.Array:
    """The filter program of SYSCALLS, for this machine."""
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, lambda code: 0x00050000 | code
    numbers = [int(entry.split()[1 + ARCH]) for entry in SYSCALLS.split(",") if entry.split()[1 + ARCH] != "-"]
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[ARCH]), (give, 0, 0, kill), (load, 0, 0, 0)]
    for call in SIGNALLING:
        program += [(equal, 0, 1, call[ARCH]), (give, 0, 0, kill)]
    program += [(equal, 0, 1, CLONE3[ARCH]), (give, 0, 0, refuse(errno.ENOSYS))]  # the C library then calls clone
    program += [(equal, 0, 4, CLONE[ARCH]), (load, 0, 0, 16), (bits, 0, 1, CLONE_THREAD), (give, 0, 0, allow)]
    program += [(give, 0, 0, refuse(errno.EPERM))]  # not a thread: a process
    for call, argument, values, allowed in BY_ARGUMENT:
        program += [(equal, 0, len(values) + 3, call[ARCH]), (load, 0, 0, 16 + 8 * argument)]
        program += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
        ends = [(give, 0, 0, refuse(errno.EPERM)), (give, 0, 0, allow)]
        program += ends if allowed else ends[::-1]
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(give, 0, 0, refuse(errno.EPERM)), (give, 0, 0, allow)]
    return ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))


def install_seccomp(program) -> None:
    """From here on this process can call SYSCALLS only; nothing takes it back."""
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", (len(program) - 1) // 8, ctypes.addressof(program)))
    check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    check(libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(head)), 0, 0), "seccomp")


def drop_capabilities() -> None:
    """None left, and none to be had by running another program."""
    check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)), "capset")


def install_landlock(directory: str) -> None:
    """Of the file system only STDLIB can be read, and files made and read in `directory`; /dev/null is there."""
    abi = check(libc.syscall(444, None, ctypes.c_size_t(0), 1), "Landlock")
    handled = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1  # the accesses that this kernel knows
    rules = check(libc.syscall(444, struct.pack("Q", handled), ctypes.c_size_t(8), 0), "Landlock")
    read_file, read_dir, write, remove, make, truncate = 1 << 2, 1 << 3, 1 << 1, 1 << 5, 1 << 8, 1 << 14
    own = read_file | read_dir | write | remove | make | truncate  # plain files only, so that removing them is easy
    null = read_file | write | truncate
    for path, access in ((STDLIB, read_file | read_dir), (directory, own), ("/dev/null", null)):
        fd = os.open(path, os.O_PATH)
        check(libc.syscall(445, rules, 1, struct.pack("=Qi", access & handled, fd), 0), f"Landlock {path}")
        os.close(fd)
    check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    check(libc.syscall(446, rules, 0), "Landlock")
    os.close(rules)


def works(*steps) -> str:
    """Do the steps work here, one after another, in a child that ends after them? "" or what the first failure says."""
    get, put = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = ""
        try:
            for step in steps:
                step()
        except BaseException as e:
            message = f"{e}"
        os.write(put, message.encode()[:500] or b"+")
        os._exit(0)
    os.close(put)
    message = os.read(get, 500).decode()
    os.close(get)
    os.waitpid(pid, 0)
    return "" if message == "+" else message or "killed"


def pick_uids() -> int:
    """The first of UIDS user ids for children that no one has: only root has a choice. 0: there is none."""
    if os.geteuid() != 0:
        return 0
    with open("/proc/self/uid_map") as f:
        first, _, length = max((tuple(map(int, line.split())) for line in f), key=lambda extent: extent[2])
    top = min(first + length, 2_000_000_000)
    if length < 4 * UIDS:
        return 0
    return top - UIDS * (1 + os.getpid() % max(1, min(1000, length // UIDS - 3)))  # servers have different ones


def enter_namespaces(user: str, base: int) -> None:
    """This process gets namespaces of its own; the next fork is the first of the new process tree.

    `user`: the user namespace before the others, which makes it root over them and over nothing else. "range" keeps
    root and the UIDS ids from `base` on (only root can make it), "single" has one id, the caller's, as "nobody"; ""
    makes none (root only).
    """
    if user == "single":
        uid, gid = os.geteuid(), os.getegid()
        check(libc.unshare(NEWUSER), "user namespace")
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    elif user == "range":
        me = os.readlink("/proc/self")
        get, put = os.pipe()
        helper = os.fork()
        if helper == 0:  # maps can be written from outside only
            code = 1
            try:
                os.close(put)
                os.read(get, 1)
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{me}/{name}", "w") as f:
                        f.write(f"0 0 1\n{base} {base} {UIDS}\n")
                code = 0
            finally:
                os._exit(code)
        result = libc.unshare(NEWUSER)
        os.close(put)
        os.close(get)
        if os.waitpid(helper, 0)[1] or result:
            raise OSError("user namespace with several ids")
    check(libc.unshare(NEWNS | NEWIPC | NEWPID | NEWNET), "namespaces")


def enter_root() -> None:
    """The file system from here on: the standard library, read-only and without installed packages, and TEMP."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    flags = os.statvfs(STDLIB).f_flag
    keep = flags & (MS_NOEXEC | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)  # a user namespace may not drop these
    root = "/proc"  # any directory that is always there: it is covered in this mount namespace only
    here = f"{root}{STDLIB}"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    os.makedirs(here)
    mount(os.path.realpath(STDLIB), here, None, MS_BIND | MS_REC)
    mount("none", here, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | keep)
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(f"{here}/{packages}"):
            mount("tmpfs", f"{here}/{packages}", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=0755")
    for name in (TEMP, "/.old", "/dev", "/devices"):
        os.mkdir(f"{root}{name}")
    for name in DEVICES:
        os.close(os.open(f"{root}/devices/{name}", os.O_CREAT | os.O_WRONLY))
        with contextlib.suppress(OSError):  # then a whole program has an empty file there that it cannot write
            mount(f"/dev/{name}", f"{root}/devices/{name}", None, MS_BIND)
    pivot_root = -1 if ARCH is None else (155, 41)[ARCH]
    check(libc.syscall(pivot_root, root.encode(), f"{root}/.old".encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/.old", 2), "umount")
    os.rmdir("/.old")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def enter_root_as_first() -> None:
    """`enter_root` in a child, after `enter_namespaces`: the first process of the new tree."""
    trouble = works(enter_root)
    if trouble:
        raise OSError(f"mounts in a mount namespace: {trouble}")


# ---- the child: confinement ---------------------------------------------------------------------------------------
class Confinement:
    """What every child is put under; made once, before the first fork."""

    def __init__(self, mode: str):
        self.uids = pick_uids()
        self.null = os.open("/dev/null", os.O_RDWR)
        self.filter = seccomp_filter() if ARCH is not None else None
        program = self.filter
        no_seccomp = works(lambda: install_seccomp(program)) if program else f"no seccomp on {platform.machine()}"
        self.mode, self.missing, self.user = mode.removesuffix("-user"), [], ""
        if no_seccomp:
            self.filter = None
        if self.mode in ("auto", "namespaces"):
            kinds = ("range", "", "single") if self.uids and self.mode == mode else ("single",)
            for self.user in kinds:
                trouble = works(lambda: enter_namespaces(self.user, self.uids), enter_root_as_first)
                if not trouble:
                    self.mode = "namespaces"
                    break
            else:
                self.missing.append(trouble)
                self.mode = "landlock" if mode == "auto" else "refused"
        if self.mode == "landlock":
            trouble = no_seccomp or works(lambda: install_landlock("/tmp"))
            if trouble:
                self.missing.append(trouble)
                self.mode = "refused"
        if self.mode == "namespaces" and self.user == "single":
            self.uids = 0
        self.base = None  # directory of the children's directories where they have no file system of their own

    def start(self) -> None:
        """Enter what the server shares with its children. In a process tree of its own this call forks: the caller
        waits, for when the first process of the tree ends, the kernel ends all of it."""
        if self.mode != "namespaces":
            if self.mode != "refused":
                self.base = tempfile.mkdtemp(prefix="cts-sandbox-")
                os.chmod(self.base, 0o711)
            return
        enter_namespaces(self.user, self.uids)
        pid = os.fork()
        if pid:
            os.closerange(3, 256)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
        check(libc.prctl(1, signal.SIGKILL, 0, 0, 0), "parent-death signal")
        self.tree = os.open("/proc/self/ns/pid", os.O_RDONLY)
        enter_root()

    def fork(self) -> int:
        """os.fork; with namespaces the child is the first process of a new tree."""
        if self.mode != "namespaces":
            return os.fork()
        check(libc.unshare(NEWPID), "process namespace")
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                check(libc.setns(self.tree, NEWPID), "process namespace of the server")
        return pid

    def streams(self, channel: int, uid: int, whole: bool) -> tuple[int, int]:
        """A child's standard input and output. The other end gets what a whole program's output is read from, over
        `channel` with the byte b"O"; the output of other children is thrown away."""
        if not whole:
            return self.null, os.memfd_create("stdout")
        if self.mode == "namespaces":  # without /proc these two names have to be files themselves
            options = f"size={FILES_MB}m,nr_inodes=16,mode=0555"
            mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
            for name, target in [*zip(DEVICES, DEVICES), ("stderr", "null")]:
                os.symlink(f"/devices/{target}", f"/dev/{name}")
            os.mkfifo("/dev/stdout")
            get, put = (os.open("/dev/stdout", way) for way in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY))
            given = os.open("/dev/stdin", os.O_RDWR | os.O_CREAT)
        else:
            (get, put), given = os.pipe(), os.memfd_create("stdin")
            os.set_blocking(get, False)
        for fd in (given, put):
            os.fchown(fd, uid, -1)
        with socket.socket(fileno=os.dup(channel)) as s:
            socket.send_fds(s, [b"O"], [get])
        return given, put

    def confine(self, channel: int, slot: int, memory_mb: int, cpu_s: int, whole: bool) -> None:
        """Called in the child, before it reads anything. Raises OSError: then nothing may be run."""
        os.setsid()
        uid = self.uids + slot if self.uids else os.geteuid()
        directory = TEMP
        if self.mode == "namespaces":
            check(libc.unshare(NEWNS | NEWIPC | (0 if self.filter else NEWNET)), "namespaces")
            options = f"size={FILES_MB}m,nr_inodes=1024,mode=0700,uid={uid}"
            mount("tmpfs", TEMP, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
        else:
            directory = f"{self.base}/{slot}"
            os.mkdir(directory, 0o700)
            if self.uids:
                os.chown(directory, uid, uid)
        os.chdir(directory)
        tempfile.tempdir = directory
        given, put = self.streams(channel, uid, whole)
        for i, fd in enumerate((given, put, self.null, channel)):
            os.dup2(fd, 200 + i)
        for i in (0, 1, 2, CHANNEL):
            os.dup2(200 + i, i)
        os.closerange(CHANNEL + 1, 1 << 16)
        r = resource
        for what, soft in (
            (r.RLIMIT_CORE, 0), (r.RLIMIT_FSIZE, FILES_MB << 20), (r.RLIMIT_NOFILE, 64), (r.RLIMIT_CPU, cpu_s),
            (r.RLIMIT_AS, memory_mb << 20), (r.RLIMIT_STACK, 120 << 20), (r.RLIMIT_MEMLOCK, 0), (r.RLIMIT_MSGQUEUE, 0),
            (r.RLIMIT_NPROC, THREADS if self.uids else UIDS),
        ):  # fmt: skip
            hard = r.getrlimit(what)[1]
            limit = soft if hard == r.RLIM_INFINITY else min(soft, hard)
            r.prlimit(0, what, (limit, limit))
        if self.mode == "landlock":
            install_landlock(directory)
        if self.uids:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        drop_capabilities()
        check(libc.prctl(1, signal.SIGKILL, 0, 0, 0), "parent-death signal")
        if self.filter is not None:
            install_seccomp(self.filter)

    def clean(self, slot: int) -> None:
        """Remove what an ended child left; with namespaces it went with the child's mount namespace."""
        if self.base:
            shutil.rmtree(f"{self.base}/{slot}", ignore_errors=True)


# ---- the child: running a program ---------------------------------------------------------------------------------
CHECK_MODULES = ("math", "cmath", "re", "sys", "itertools", "collections")  # what an assert may use without an import


def send(message: dict) -> None:
    """One frame: what a test gave. The other end trusts it to be nothing but a value."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > FRAME_MAX:
        data = b'{"err":"OutputLimit: a value of more than 8 MB"}'
    data = FRAME.pack(len(data), time.process_time()) + data
    at = 0
    while at < len(data):
        at += os.write(CHANNEL, data[at : at + (1 << 20)])


def describe(e: BaseException) -> str:
    """Type and message of an exception on one short line; a message that cannot be had is left out."""
    text = ""
    with contextlib.suppress(BaseException):
        text = str(e)
    return f"{type(e).__name__}: {text}"[:200].replace("\n", " ").rstrip(": ")


def caught(f) -> dict:
    """The frame of f(): its value, or what was raised."""
    try:
        return {"v": encode(f())}
    except NotPlain as e:
        return {"odd": str(e)}
    except BaseException as e:
        return {"err": describe(e)}


def new_module(name: str, names: dict) -> dict:
    """The globals of a fresh module that pickle, dataclasses and typing find under its name."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module.__dict__


def whole_program(source: str, text: str) -> types.CodeType:
    """A program that is to run on standard input `text`; the process is now as `python solution.py` finds it."""
    data = text.encode("utf-8", "surrogateescape")
    while data:
        data = data[os.write(0, data) :]
    os.lseek(0, 0, os.SEEK_SET)
    fresh_streams()
    with open(SOLUTION, "w", encoding="utf-8", errors="surrogatepass") as f:
        f.write(source)
    sys.path.insert(0, os.getcwd())
    return compile(source, os.path.abspath(SOLUTION), "exec", dont_inherit=True)


def run(code: types.CodeType) -> None:
    """Run a whole program as the interpreter's main one. What it raises goes on: the interpreter ends with it."""
    more = {"__builtins__": builtins, "__file__": code.co_filename, "__cached__": None, "__annotations__": {}}
    more["__loader__"] = importlib.machinery.SourceFileLoader("__main__", code.co_filename)
    loader = weakref.ref(more["__loader__"])
    names = new_module("__main__", PRELUDE | more)
    del more
    sys.setrecursionlimit(sys.getrecursionlimit() + 3)  # what stands below it here
    try:
        exec(code, names)
        EDGE.leave = Leave(loader)
    except SystemExit as e:
        if e.code is None or e.code is False or (type(e.code) is int and e.code == 0):
            EDGE.leave = Leave(loader)
        raise
    except BaseException as e:
        with contextlib.suppress(BaseException):  # a word for the verdict; the exit code decides it
            send({"err": describe(e)})
        raise


def source_of(job: dict) -> str:
    """Its program without a byte-order mark, which Python takes off a file only."""
    return job["program"].removeprefix("\ufeff")


def evaluated(source: str, names: dict, convert=lambda x: x):
    """An expression as a function that makes its frame."""
    code = compile(source, "<assert>", "eval")
    return lambda: caught(lambda: convert(eval(code, names)))


def prepared(job: dict) -> list:
    """The job's tests as functions without arguments that make a frame each; raises what the program raises."""
    kind = job["kind"]
    if kind == "values":  # the trusted side: expressions over values that candidates returned
        names = new_module("checks", {m: PRELUDE[m] for m in CHECK_MODULES})
        exec(compile(job["setup"], "<setup>", "exec"), names)
        names.update({name: decode(json.loads(text)["v"]) for name, text in job["values"].items()})
        return [evaluated(source, names, bool) for source in job["tests"]]
    code = compile(source_of(job), "<program>", "exec", dont_inherit=True)
    fresh_streams()
    names = new_module("candidate", PRELUDE if kind == "call" else {})
    exec(compile(job["before"], "<setup>", "exec"), names)
    exec(code, names)
    if kind == "call":
        owner = names["Solution"]() if "Solution" in names else None
        f = getattr(owner, job["fn_name"]) if owner is not None else names[job["fn_name"]]
        return [lambda args=args: caught(lambda: f(*map(decode, args))) for args in job["tests"]]
    exec(compile(job["after"], "<setup>", "exec"), names)
    return [evaluated(source, names) for source in job["tests"]]


def child() -> types.CodeType | None:
    """Read a job, run its tests, send a frame for each: all that a candidate's process does. A whole program is not run
    here but returned."""
    sys.set_int_max_str_digits(0)
    random.seed(0)  # the same program prints the same numbers in every run
    with open(CHANNEL, "rb", closefd=False) as channel:
        (length,) = struct.unpack("!I", channel.read(4))
        job = json.loads(channel.read(length))
    try:
        if job["kind"] == "stdin":
            return whole_program(source_of(job), *job["tests"])
        tests = prepared(job)
    except BaseException as e:
        send({"fail": describe(e)})
        return None
    del job
    for test in tests:
        send(test())
    return None


# ---- the server ---------------------------------------------------------------------------------------------------
def serve(control: socket.socket, mode: str) -> types.CodeType | None:
    """Fork, renice and kill children as told on `control`, and tell when they ended, until its other end closes.

    Returns in children too: in one that is to run a whole program, with that program, once it is confined.
    """
    confinement = Confinement(mode)
    load_libraries()
    confinement.start()
    warm(confinement.mode)
    hello = {"mode": confinement.mode, "seccomp": confinement.filter is not None}
    hello |= {"missing": confinement.missing, "base": confinement.base}
    control.send(json.dumps(hello).encode())
    if confinement.mode == "refused":
        return None
    slots: dict[int, int] = {}  # process id -> slot
    program = None
    try:
        program = listen(control, confinement, slots)
    finally:
        if program is None:  # this is the server
            for pid in slots:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid, slot in slots.items():
                os.waitpid(pid, 0)
                confinement.clean(slot)
            if confinement.base:
                shutil.rmtree(confinement.base, ignore_errors=True)
    return program


def listen(control: socket.socket, confinement: Confinement, slots: dict[int, int]) -> types.CodeType | None:
    """The loop of `serve`: None at the end of all messages, and in a child its whole program."""
    wake, waker = os.pipe()
    for fd in (wake, waker):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            report_ended(control, confinement, slots)
        if control.fileno() in ready:
            data, fds, _, _ = socket.recv_fds(control, 4096, 1)
            program = obey(json.loads(data), fds, control, confinement, slots) if data else None
            if program is not None or not data:
                return program


def report_ended(control: socket.socket, confinement: Confinement, slots: dict[int, int]) -> None:
    """Collect children that ended; one message each."""
    while slots:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        slot = slots.pop(pid, None)
        if slot is not None:
            if confinement.mode != "namespaces":
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            confinement.clean(slot)
            message = {"slot": slot, "status": os.waitstatus_to_exitcode(status)}
            control.send(json.dumps(message).encode())


def obey(order: dict, fds: list, control: socket.socket, confinement: Confinement, slots: dict[int, int]):
    """One message: fork, kill, nice, cpu. Returns None, and in a child what `begin` does."""
    slot = order["slot"]
    if order["op"] == "fork":
        (channel,) = fds
        try:
            pid = confinement.fork()
        except OSError as e:
            os.close(channel)
            control.send(json.dumps({"slot": slot, "error": str(e)}).encode())
            return None
        if pid == 0:
            control.detach()  # its descriptor is closed below and will be the program's
            return begin(order, channel, confinement)
        os.close(channel)
        slots[pid] = slot
        return None
    pid = next((p for p, s in slots.items() if s == slot), None)  # none: it ended and the message is on its way
    with contextlib.suppress(OSError):
        if pid is not None and order["op"] == "kill":
            os.kill(pid, signal.SIGKILL)
        elif pid is not None and order["op"] == "nice":
            os.setpriority(os.PRIO_PGRP, pid, 10)
        elif pid is not None:
            seconds = time.clock_gettime(~pid << 3 | 2)  # the CPU clock of that process
            control.send(json.dumps({"slot": slot, "cpu": seconds}).encode())
    return None


def begin(order: dict, channel: int, confinement: Confinement) -> types.CodeType:
    """All of a child's life, unless it is to run a whole program: then its beginning, and nothing else returns."""
    program, code = None, 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            confinement.confine(channel, order["slot"], order["memory_mb"], order["cpu_s"], order["whole"])
        except BaseException as e:
            for fd in (channel, CHANNEL):  # it may have moved by then
                with contextlib.suppress(OSError):
                    os.write(fd, b"E" + describe(e).encode())
            os._exit(1)
        os.write(CHANNEL, b"R")
        program = child()
        code = 0
    finally:
        if program is None:
            os._exit(code)
    return program


if __name__ == "__main__":
    main = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    if main is not None:
        run(main)
