"""Programs of completions: found in the text, run against tests, compared line by line. Of the sandbox's two sides this
is the one that knows the expected outputs, and it alone makes verdicts. Used by rewards, critique and making.

What agrees. Asserts: Python's == on plain data, and all else of an assert is evaluated in a process that never saw the
program. Printed output: `same_output`. Returned values: `same_value`, also with an expected [value] for value. As
APPS's own evaluator does, except that lines or words in another order do not agree, that whole numbers have no
tolerance, and that of an expected list only a list of one may stand for what it contains. Plain data is None, bool,
int, float, complex, str, bytes, list, tuple, set, frozenset, dict, deque, range, array, Fraction and Decimal. A value
of a class derived from one of them counts as the value of that type which it holds (a namedtuple as its tuple, an
IntEnum member as its number, a Counter as its dict), whatever methods the class has. Views of dicts are such views, and
an iterator one over what it still gives (2^20 items at most): Python's == of an iterator and a list is False, but
`same_value` takes both for lists where a list is expected. A value of any other type is wrong.

Printed output is what `python solution.py < input` would have printed: each input has a process of its own, which runs
the program as the main one of its interpreter and ends as interpreters do (threads, exit handlers, `__del__`, the last
flush), all of it in the program's time and under its limits. It counts if that process ended by itself with exit code
0, so also after os._exit(0), or with 120, Python's word for a flush that failed at the very end.

Covered. A program gets the inputs, never an expected output, in a process forked from one that never held any program,
input or output. It answers with values; comparing them is done elsewhere, so what it does to its own interpreter
(exits, builtins, frames, `__eq__`, its channel) can at most change its values. Its process has no network, no other
process in sight, no file but the standard library (read-only) and an empty temp directory of 32 MB, no environment, no
privileges, a user id of its own where the caller is root, and system calls from a list: no sockets, processes,
programs, signals (it dies), mounts, ptrace or IPC. CPU, address space, threads (64), open files (64), file size
(32 MB), output (4 MB a test) and values (8 MB) are limited. The process, and the tree and mounts of which it is the
first, end before `run_program` returns, and with the caller if that is killed.

Not covered:

- bugs of the kernel; side channels of CPU and memory;
- time: near the limit a program may fall to either side, and so may, beside many endless loops or on a busy machine,
  one that needs much CPU time;
- asserts that show the program what they expect (`f(1).__eq__(2)`) or that any value fulfils, and programs that know
  the answers by heart; tests and set-up code are trusted;
- what a program leaves in its own process between the tests of one call, or between asserts;
- with Landlock instead of namespaces: the temp directory is on disk, takes plain files only and has no limit as a
  whole; names and sizes of other files can be asked for, their content cannot; where the caller is root and its Python
  is not for others to read, only the modules of `interpreter.WARM` are there;
- with neither (`unsafe`): files, network and processes, but for what seccomp, if it is there, and limits refuse.

Honest programs that would run on a plain machine and fail or differ here: those that start processes, that import
installed packages (NumPy) or standard modules that need libraries of a desktop or a name service (tkinter, turtle, nis,
dbm.gnu, dbm.ndbm), or that read what is not there: time zones of the system (zoneinfo), users (pwd), /proc, /etc, the
network. Signals to oneself and os.abort are fatal (a program dies of them, as it mostly would). asyncio has a pipe
where it has a pair of sockets and multiprocessing has the locks of threads, so ThreadPool works and its qsize does not.
More than a limit allows cannot be had, but asking for it is no error (resource.setrlimit, threading.stack_size); a
thread's stack has at most a quarter of the address space. A whole program finds /dev/stdin, /dev/stdout, /dev/null,
/dev/zero and /dev/urandom (with Landlock not the last two), its own source as solution.py, no limit on the digits of
numbers, the same random numbers and orders of sets in each run, and names of the APPS kind without an import.
"""

import array
import collections
import copy
import difflib
import functools
import itertools
import json
import math
import os
import re
from collections import abc
from typing import Any

from common import sandbox_server
from common.basics import InputError, sha256
from common.plans import TestPlan, parse_program, plan_tests
from common.sandbox import Job, run_jobs
from common.verifier import Verdict

_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_FENCE = re.compile(r"([ \t]*+(?:>[ \t]*+|(?:[-*+]|\d{1,9}[.)])[ \t]++)*+)(`{3,}+(?=[^`]*$)|~{3,}+)[ \t]*+([\w+-]*+)")
_STARTS = (r"(?:async )?def \w+\(|class \w+ ?[(:]|(?:for|while|if|try|with)\b.*:[ \t]*+(?:#.*)?$|"
           r"from [\w.]+ import\b|import [\w., ]++$|@\w")  # of a line that starts a program, unlike one of prose
_CODE = (rf"{_STARTS}|\s+\S|[\])}}#]|(?:else|finally) ?:|(?:elif|except)\b.*:|[\w.\[\], ]++[-+*/|&]?=[^=]|"
         r"[\w.]++\(.*\) *$")  # of a line that goes on with one


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of each block between lines of ``` or ~~~, also of one cut off at the end.

    Inside a list item or a quotation a block stands to the right; what stands before its fence is taken off its lines.

    >>> fenced_blocks("1. ~~~py\\n   if x:\\n       y\\n   ~~~")
    [('py', 'if x:\\n    y\\n')]
    """
    found, fence = [], ""
    for line in text.split("\n"):
        if fence and line.lstrip(" \t>").startswith(fence):
            fence = ""
        elif fence:
            found[-1][2].append(line)
        elif opening := _FENCE.match(line):
            before, fence, language = opening.groups()
            found.append((before, language, []))
    return [(language, "".join(f"{line}\n" for line in shift(lines, before))) for before, language, lines in found]


def shift(lines: list[str], before: str) -> list[str]:
    """Lines of a block moved to the left by what stands `before` its fence, unless they begin further left."""
    if ">" in before:
        lines = [re.sub(r"^[ \t]*> ?", "", line) for line in lines]
        before = before.rpartition(">")[2][1:]
    indent = lambda line: line[: len(line) - len(line.lstrip(" \t"))]
    first = indent(next((line for line in lines if line.strip()), ""))
    if not before or len(first.expandtabs()) < len(before.expandtabs()):
        return lines
    return [line[min(len(indent(line)), len(first)) :] for line in lines]


def extract_program(completion: str) -> str:
    """The program of a completion. It is found by its lines, never parsed: a completion is hostile text.

    Of the fenced blocks (those marked Python, if any is) it is the last one that is at least half as long as the
    longest: a later block corrects an earlier one, a short last one shows a call. A fence cut off at the end counts.
    Without a fence: from the first line that starts a statement to the last that continues one, or all of the text.

    >>> extract_program("Sure:\\n```python\\ndef f(x):\\n    return x\\n```\\nIt returns x.")
    'def f(x):\\n    return x\\n'
    """
    completion = completion.removeprefix("\ufeff").replace("\r\n", "\n")
    blocks = fenced_blocks(completion)
    marked = [text for language, text in blocks if language.lower() in ("python", "python3", "py")]
    texts = [text for text in marked or [text for _, text in blocks] if text.strip()]
    if texts:
        longest = max(map(len, texts))
        return [text for text in texts if 2 * len(text) >= longest][-1]
    lines = completion.split("\n")  # and not at form feeds
    begin = next((i for i, line in enumerate(lines) if re.match(_STARTS, line)), None)
    if begin is None:
        return completion
    end = max(i for i, line in enumerate(lines) if i == begin or (i > begin and re.match(_CODE, line)))
    return "\n".join(lines[begin : end + 1]) + "\n"


def program_of(completion: str) -> str:
    """The completion itself where it is a program as it stands, as y0 and y1 are; else what stands in its fences."""
    fenced = completion.lstrip().startswith("~~~")  # a fence, though Python reads ~~~python as an expression
    return completion if not fenced and parse_program(completion) is not None else extract_program(completion)


def close_numbers(a: float, b: float) -> bool:
    """numpy.allclose's rule for one pair."""
    return a == b or abs(a - b) <= 1e-8 + 1e-5 * abs(b) < math.inf


def same_output(printed: str, expected: str) -> bool:
    """Do two outputs agree? Lines that are not blank, in order, each by its words; where the expected word is a decimal
    number (`2.50`, `1e-3`) a number within 1e-8 + 1e-5 of it will do. A whole number has to be the same word.

    >>> same_output("1  2\\n\\n3.000001", "1 2 \\n3.0\\n"), same_output("2 1", "1 2"), same_output("1.0", "1")
    (True, False, False)
    """
    mine, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (printed, expected))
    words = itertools.chain.from_iterable
    return list(map(len, mine)) == list(map(len, wanted)) and all(map(_same_word, words(mine), words(wanted)))


def _same_word(word: str, expected: str) -> bool:
    if word == expected or re.fullmatch(r"[-+]?\d+", expected):
        return word == expected
    return all(map(_DECIMAL.fullmatch, (expected, word))) and close_numbers(float(word), float(expected))


_ORDERED = (list, tuple, range, collections.deque, array.array, abc.MappingView)


def same_value(value, expected) -> bool:
    """Does a returned value agree with one from JSON? Keys are strings; where a list is expected, all that has an
    order is one; an expected float has the tolerance of `same_output`; otherwise Python's ==.

    >>> same_value([(1, 2)], [[1, 2]]), same_value({1: 2.0}, {"1": 2}), same_value(1, "1")
    (True, True, False)
    """
    if isinstance(value, abc.Iterator) and isinstance(expected, list):
        value = list(copy.copy(value))  # it may be compared again, with what a list of one contains
    if isinstance(value, _ORDERED) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        mine = {str(k): v for k, v in value.items()}
        return mine.keys() == expected.keys() and all(same_value(v, expected[k]) for k, v in mine.items())
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return close_numbers(value, expected)
    return value == expected


def grade_frame(kind: str, frame: bytes, expected) -> tuple[str, str]:
    """(outcome, what it was) of one test whose frame decides it. The frame is the candidate's: any bytes."""
    try:
        # An equal value is about as long. A far longer one is not looked at: reading and comparing could take its time.
        room = 4000 + 12 * len(expected if kind == "stdin" else json.dumps(sandbox_server.encode(expected)))
        if len(frame) > room:
            return "wrong", f"gave {len(frame)} bytes: {frame[5:60].decode(errors='replace')}"
        ((key, got),) = json.loads(frame).items()
        if key == "err":
            return ("oom" if got.startswith("MemoryError") else "crash"), f"raised {got[:200]}"
        if kind == "stdin" and key in ("oom", "crash"):
            return key, got
        if key == "odd":
            return "wrong", got[:200]
        if kind == "stdin":
            return ("pass", "") if same_output(got, expected) else ("wrong", f"printed {got[:80]!r}")
        if key == "v":
            value = sandbox_server.decode(got)
            if kind == "asserts" and value == expected:
                return "pass", ""
            wrapped = isinstance(expected, list) and len(expected) == 1  # as APPS wraps some
            if kind == "call" and (same_value(value, expected) or (wrapped and same_value(value, expected[0]))):
                return "pass", ""
        if frame == b'{"v":null}':
            return "wrong", "returned None (what a function does to its argument in place is not looked at)"
        return "wrong", f"returned {frame[5:-1][:80].decode(errors='replace')}"
    except Exception as e:  # no frame of ours, or a value that cannot be compared
        return "wrong", f"returned what is no value ({type(e).__name__})"


CHECKED_MAX = 1 << 18  # bytes of a value that an assert other than `f(x) == literal` is evaluated on


def run_program(program: str, tests: dict[str, Any], *, timeout_s: float = 4.0, memory_mb: int = 512) -> Verdict:
    """Run a hostile program against tests. `tests` is one of

    - {"setup": code, "asserts": ["assert f(1) == 2", ...]} (MBPP),
    - {"inputs": [text, ...], "outputs": [text, ...]}: the whole program once per input, on stdin (APPS),
    - {"fn_name": "f", "inputs": [[argument, ...], ...], "outputs": [value, ...]}: f, or that method of a `Solution()`.

    In the last two a program finds what APPS programs use without importing it (math, defaultdict, List, ...). A
    function has to return its value: one that changes its argument in place and returns None is wrong.

    Outcomes: pass; wrong; timeout (a test used `timeout_s` seconds of CPU time, or PATIENCE times as long went by: the
    rest is not run); oom (more than `memory_mb` MB of address space); crash (an exception, a signal, an exit before all
    values were handed over or with a code that is not 0, too much output); harness_error: not the program's fault, so
    no 0 either. Raises InputError on tests of another form, and where this machine cannot confine programs
    (`check_sandbox`).
    """
    return run_programs([(program, tests)], workers=1, timeout_s=timeout_s, memory_mb=memory_mb)[0]


def run_programs(
    pairs: list[tuple[str, dict[str, Any]]], *, workers: int | None = None, timeout_s: float = 4.0, memory_mb: int = 512
) -> list[Verdict]:
    """`run_program` of each (program, tests), in order, `workers` (None: one per core) at a time; equal pairs run once.

    Programs that take longer than QUICK_S do not hold up the others: they go on beside them, up to LIVE at a time and
    at low priority. So a batch takes what its quick programs take, and PATIENCE * timeout_s more for every LIVE loops.
    """
    if not 0 < timeout_s < 1e6 or memory_mb < 64:
        raise InputError(f"timeout_s {timeout_s} has to be above 0 and memory_mb {memory_mb} at least 64")
    workers = workers or len(os.sched_getaffinity(0))
    try:
        keys = [(program, json.dumps(tests, sort_keys=True)) for program, tests in pairs]
    except TypeError as e:
        raise InputError(f"tests of a program have to be plain JSON: {e}") from None
    plans = {key: plan_tests(key[1]) for key in keys}
    fine = {key: plan for key, plan in plans.items() if not plan.problem}
    jobs = {k: Job({**plan.job, "program": k[0]}, functools.partial(grade_test, plan)) for k, plan in fine.items()}
    run_jobs("programs", list(jobs.values()), workers, timeout_s, memory_mb)
    results = {key: [("harness_error", plan.problem)] for key, plan in plans.items()}
    results |= {key: grade_job(plans[key], job) for key, job in jobs.items()}
    entries = [(key, i, entry) for key, result in results.items() for i, entry in enumerate(result)]
    checks = {(key, i): Job(entry) for key, i, entry in entries if isinstance(entry, dict)}  # for the trusted side
    run_jobs("checks", list(checks.values()), workers, timeout_s, memory_mb)
    for (key, i), job in checks.items():
        results[key][i] = grade_check(job)
    verdicts = {key: sum_up(result, len(plans[key].checks)) for key, result in results.items()}
    return [verdicts[key] for key in keys]


def sum_up(results: list[tuple[str, str]], total: int) -> Verdict:
    """The verdict from the (outcome, words) of the tests that were run; a harness error anywhere is the verdict."""
    failed = [(i, outcome, words) for i, (outcome, words) in enumerate(results) if outcome != "pass"]
    passed, harness = len(results) - len(failed), [words for _, outcome, words in failed if outcome == "harness_error"]
    if harness:
        return Verdict("harness_error", passed, total, harness[0])
    if passed == total:
        return Verdict("pass", passed, total)
    assert failed, "fewer results than tests, and none of them says why"
    i, outcome, words = failed[0]
    words = "".join(c if c.isprintable() else " " for c in words[:200])
    return Verdict(outcome, passed, total, f"test {i}: {words}", i)


def grade_test(plan: TestPlan, frame_index: int, frame: bytes) -> tuple[str, str] | bytes:
    """What is kept of a frame as soon as it is there: (outcome, words), or a value that a check is to be told."""
    _, _, expected, check = plan.checks[plan.owner[frame_index]]
    if check is None:
        return grade_frame(plan.job["kind"], frame, expected)
    if not frame.startswith(b'{"v":'):
        return grade_frame("asserts", frame, None)
    return frame if len(frame) <= CHECKED_MAX else ("wrong", "returned a value too long to be checked")


def grade_job(plan: TestPlan, job: Job) -> list:
    """Of each test that was run (outcome, words), or the job of a check where the trusted side has to say it."""
    if job.end == "fail":
        outcome, words = grade_frame("asserts", job.fail.replace(b'{"fail":', b'{"err":', 1), None)
        return [(outcome if outcome == "oom" else "crash", words)]
    result = []
    for first, n, _, check in plan.checks:
        kept = job.kept[first : first + n]
        graded = next((k for k in kept if isinstance(k, tuple)), None)
        if graded is None and len(kept) < n:
            return [*result, (job.end, job.why or "took too long")]
        values = {f"_{i}": frame.decode(errors="replace") for i, frame in enumerate(kept) if graded is None}
        result.append(graded or {"kind": "values", "setup": plan.setup, "tests": [check], "values": values})
    return result


def grade_check(job: Job) -> tuple[str, str]:
    """What the trusted side said of one assert. Only a name that it lacks or an end without a word is its own fault."""
    frame = job.kept[0] if job.kept else job.fail
    if frame == b'{"v":true}':
        return "pass", ""
    if frame == b'{"v":false}':
        return "wrong", "the assert is false"
    if job.end == "timeout":
        return "wrong", "the assert takes too long on the value returned"
    words = frame.decode(errors="replace")
    if not frame or re.match(r'\{"(err|fail)":"(NameError|ImportError|ModuleNotFoundError|SyntaxError)', words):
        return "harness_error", f"the assert could not be evaluated: {words[:120] or job.why}"
    return "wrong", f"the value returned does not fit the assert: {words[:120]}"


CODE_LIMITS = {"timeout_s": 4.0, "memory_mb": 512}
_VERDICTS: dict[str, Verdict] = {}  # of programs that this process has run, so that no second score runs them again


def grade(texts: list[str], tests: list[dict[str, Any]]) -> list[Verdict]:
    """The verdict of each completion's program on its tests; what is not known yet runs in one batch.

    Harness errors are tried once more and not remembered; InputError if eight programs or more ran and all are such.
    """
    jobs = [(program_of(text), t) for text, t in zip(texts, tests, strict=True)]
    keys = [sha256(json.dumps([job, CODE_LIMITS], sort_keys=True)) for job in jobs]
    if len(_VERDICTS) > 100_000:
        _VERDICTS.clear()
    fresh = {key: job for key, job in zip(keys, jobs) if key not in _VERDICTS}
    verdicts: dict[str, Verdict] = {}
    for _ in range(2):
        again = [key for key in fresh if key not in verdicts or verdicts[key].outcome == "harness_error"]
        if again:
            verdicts |= zip(again, run_programs([fresh[key] for key in again], **CODE_LIMITS))
    failed = [v for v in verdicts.values() if v.outcome == "harness_error"]
    if len(failed) == len(fresh) >= 8:
        raise InputError(f"none of {len(failed)} programs could be run: {failed[0].detail}")
    _VERDICTS.update({key: v for key, v in verdicts.items() if v.outcome != "harness_error"})
    return [_VERDICTS[key] if key in _VERDICTS else verdicts[key] for key in keys]


def code_lines(program: str) -> list[tuple[int, int, str]]:
    """(start, end, key) of the lines of a program that say something. The key keeps the indent; other white space does
    not count, nor do blank lines and comments.

    >>> code_lines("if x:\\n    # why\\n    y  = 1")
    [(0, 5, 'if x:'), (20, 26, '    y = 1')]
    """
    found = []
    for m in re.finditer(r"[^\n]+", program):
        text = m.group().strip()
        if text and not text.startswith("#"):
            indent = m.group()[: m.group().index(text[0])]
            start = m.start() + len(indent)
            found.append((start, start + len(text), " " * len(indent.expandtabs()) + " ".join(text.split())))
    return found


def line_changes(old: list[tuple[int, int, str]], new: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """Runs [i, j) of lines of `old` that `new` replaces or deletes; empty ones where it inserts before line i."""
    matcher = difflib.SequenceMatcher(None, [k for *_, k in old], [k for *_, k in new], autojunk=False)
    return [(i1, i2) for op, i1, i2, _, _ in matcher.get_opcodes() if op != "equal"]
