"""Verdicts on programs: what honest programs of each kind get, and the program of a completion.

pytest tests/test_programs.py
"""

import json
import os
import pathlib

import pytest
from examples import REFERENCE, ROOT, VALUE, programs_of

from common.programs import Verdict, extract_program, grade, program_of, run_program, run_programs, same_output
from common.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("confined")


# ---- asserts --------------------------------------------------------------------------------------------------------
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


def test_a_timeout_keeps_what_passed_before():
    tests = {"asserts": ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]}
    verdict = run_program("def f(x):\n    while x == 2: pass\n    return x", tests, timeout_s=0.3)
    assert verdict == Verdict("timeout", 1, 3, "test 1: took too long", 1)


# ---- stdin and calls ------------------------------------------------------------------------------------------------
ADD = {"inputs": ["1 2\n", "10 20"], "outputs": ["3\n", "30\n"]}
READERS = programs_of(r"""
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


SIX = {"inputs": ["1\n"], "outputs": ["6\n"]}
ENDS = programs_of(r"""
== exit handler
import atexit
atexit.register(lambda: print(6))
== replaced output
import io, sys
r = sys.stdout; sys.stdout = io.StringIO(); print(6); r.write(sys.stdout.getvalue())
== descriptor opened
o = open(1, "w"); o.write("6")
== wrapper
import io, sys
w = io.TextIOWrapper(sys.stdout.buffer); w.write("6")
== closed output
import sys
sys.stdout.write("6"); sys.stdout.close()
== output dropped
import sys
print(6); sys.stdout.flush(); sys.stdout = None
== output dropped, not flushed
import sys
print(6); sys.stdout = None
== del
class A:
    def __del__(self): print(6)
a = A()
== del in a cycle
class A:
    def __del__(self): print(6)
a = A(); a.a = a
== del and a library that knows the class
from typing import List
class A:
    def __del__(self): print(6)
def f(x: List[A]): pass
a = A()
== unflushed and a library that knows the class
from typing import List
class A:
    def f(self): pass
def f(x: List[A]): pass
o = open(1, "w"); o.write("6")
== finally of a generator
def g():
    try: yield
    finally: print(6)
x = g(); next(x)
== finalizer
import weakref
class A: pass
a = A()
weakref.finalize(a, print, 6)
== thread
import threading, time
threading.Thread(target=lambda: (time.sleep(0.1), print(6))).start()
== pool left open
from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(2).submit(print, 6)
== busy daemons
import threading
def f():
    while True: pass
for _ in range(4): threading.Thread(target=f, daemon=True).start()
print(6)
== os._exit in a handler, which the main module's output precedes
import atexit, os
atexit.register(os._exit, 0)
print(6)
== os.write in a handler
import atexit, os
atexit.register(os.write, 1, b"6")
== log kept back
import logging.handlers, sys
h = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout))
logging.getLogger().addHandler(h); logging.warning(6)
== handler that fails
import atexit
atexit.register(lambda: 1 / 0)
print(6)
== SystemExit in a handler
import atexit, sys
@atexit.register
def f():
    print(6)
    sys.exit(3)
sys.exit()
== os._exit after a flush
import os
print(6, flush=True)
os._exit(0)
== quit
print(6)
quit()
== SystemExit
raise SystemExit(print(6))
== detached
import sys
sys.stdout.detach().write(b"6")
== detached and wrapped
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.detach(), write_through=True)
print(6)
== a stream of a codec
import codecs, sys
sys.stdout = codecs.getwriter("utf-8")(sys.stdout.buffer)
print(6)
== a descriptor's copy
import os
os.dup2(1, 9); os.close(1); os.write(9, b"6")
== daemon of old
import os
os.closerange(3, 1000)
print(6)
""")


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_program_is_the_interpreters(name):
    """On each input: what stands in buffers, handlers and objects is printed at the end, once."""
    verdict = run_program(ENDS[name], {"inputs": ["1", "2"], "outputs": ["6", "6"]})
    assert verdict == Verdict("pass", 2, 2), verdict


@pytest.mark.parametrize(
    ("program", "outcome", "words"),
    [
        ("import os\nprint(6)\nos._exit(0)", "wrong", "printed ''"),
        ("import sys\nprint(6)\nsys.exit('bye')", "crash", "ended with exit code 1"),
        ("print(6)\nexit(2)", "crash", "ended with exit code 2"),
        ("import os\nprint(6, flush=True)\nos._exit(3)", "crash", "ended with exit code 3"),
        ("print(6)\nraise KeyError(1)", "crash", "raised KeyError: 1"),
        ("import atexit\natexit.register(print, 7)\nprint(6)", "wrong", "printed '6\\n7\\n'"),
        ("import threading\nthreading.Thread(target=print, args=(7,)).start()\nprint(6)", "wrong", "printed"),
        ("import sys\nsys.stdout = None\nprint(6)", "wrong", "printed ''"),
        ("import os\nos.close(1)\nprint(6)", "wrong", "printed ''"),
        ("def f(:", "crash", "SyntaxError"),
        ("x = bytearray(10 ** 10)", "oom", "MemoryError"),
        ("print('x' * 5000000)", "crash", "OutputLimit: more than 4 MB printed"),
    ],
)  # fmt: skip
def test_ends_that_are_not_right(program, outcome, words):
    verdict = run_program(program, SIX)
    assert verdict.outcome == outcome and words in verdict.detail and verdict.passed == 0, verdict


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
        ("import collections; return collections.namedtuple('P', 'a b')(1, 2)", [1], [1, 2], "pass"),
        ("import enum; return enum.IntEnum('E', 'A B').B", [1], 2, "pass"),
        ("import enum; return enum.Enum('E', 'A B').B", [1], 2, "wrong"),
        ("return type('F', (float,), {})(2.5)", [1], 2.5, "pass"),
        ("return Counter(x)", ["aab"], {"a": 2, "b": 1}, "pass"),
        ("return {1: 2, 3: 4}.keys()", [1], [1, 3], "pass"), ("return {1: 2}.items()", [1], [[1, 2]], "pass"),
        ("return {1: 2, 3: 4}.values()", [1], [2, 4], "pass"), ("return {1: 2}.keys()", [1], [2], "wrong"),
        ("return map(abs, x)", [[-1, 2]], [1, 2], "pass"), ("return (i for i in x)", [[1, 2]], [1, 2], "pass"),
        ("return map(abs, x)", [[-1, 2]], [[1, 2]], "pass"), ("return (i for i in x)", [[1, 2]], [1], "wrong"),
        ("return [zip(x, x)]", [[1]], [[[1, 1]]], "pass"), ("return iter(x)", [[1, 2]], {"1": 2}, "wrong"),
        ("yield from x", [[1, 2]], [1, 2], "pass"), ("return itertools.count()", [1], [0, 1], "wrong"),
        ("return range(x)", [3], [0, 1, 2], "pass"), ("return deque(x)", [[3]], [3], "pass"),
        ("return range(10 ** 18)", [3], [0], "wrong"), ("return iter('12')", [3], "12", "wrong"),
        ("x.sort()", [[2, 1]], [1, 2], "wrong"), ("x.sort(); return x", [[2, 1]], [1, 2], "pass"),
    ],
)  # fmt: skip
def test_values_of_calls(body, args, expected, outcome):
    tests = {"fn_name": "f", "inputs": [args], "outputs": [expected]}
    assert run_program(f"def f(x):\n    {body}", tests).outcome == outcome


def test_asserts_on_values_that_are_not_lists():
    """Python's ==, as in an assert on a plain machine."""
    program = "import collections\nP = collections.namedtuple('P', 'a b')\ndef f(x): return {}"
    for value, check, outcome in (
        ("P(1, 2)", "f(0) == (1, 2)", "pass"), ("{1: 2}.keys()", "f(0) == {1}", "pass"),
        ("{1: 2}.keys()", "f(0) == [1]", "wrong"), ("map(abs, [-1])", "f(0) == [1]", "wrong"),
        ("map(abs, [-1])", "list(f(0)) == [1]", "pass"), ("(i for i in [2, 1])", "sorted(f(0)) == [1, 2]", "pass"),
        ("iter([3])", "next(f(0)) == 3", "pass"), ("{1: 2}.items()", "dict(f(0)) == {1: 2}", "pass"),
    ):  # fmt: skip
        assert run_program(program.format(value), {"asserts": [f"assert {check}"]}).outcome == outcome, (value, check)


def test_a_function_that_works_in_place_is_told_so():
    verdict = run_program("def f(x): x.sort()", {"fn_name": "f", "inputs": [[[2, 1]]], "outputs": [[1, 2]]})
    assert verdict.outcome == "wrong" and "None (what a function does to its argument in place" in verdict.detail


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
        ("1. So:\n\n   ```python\n   def f(x):\n       return x\n   ```\n", F),
        ("- ```python\n  def f(x):\n      return x\n  ```\n", F),
        ("10) ~~~py\n    def f(x):\n        return x\n    ~~~\n", F),
        ("* So:\n\t```python\n\tdef f(x):\n\t    return x\n\t```\n", F),
        (
            "  * So:\n    ```python\n    def f(x):\n        s = '''\n  a'''\n        return x\n    ```",
            "def f(x):\n    s = '''\na'''\n    return x",
        ),
        ("> ```python\n> def f(x):\n>     return x\n> ```\n", F),
        (f"~~~python\n{F}~~~", F),
        (f"~~~\n{F}", F),
        (f"~~~~\n~~~\n{F}~~~~", f"~~~\n{F}"),
        (f"```text\nno\n```\n~~~python\n{F}~~~\n", F),
        (f"`````python\n{F}`````", F),
        (f"```f(1)``` is the call.\n```python\n{F}```", F),
        (f"So:\r\n```python\r\n{F}```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"), F),
        (f"\ufeffimport math\n{F}That is all", f"import math\n{F}"),
        (f"import math\n\f\n{F}That is all", f"import math\n\f\n{F}"),
    ],
)
def test_extract_program(completion, program):
    assert extract_program(completion).strip() == program.strip()


@pytest.mark.parametrize(
    "text", ["```", "(", "def ", " ", "\0\ud800", "a =", "a, ", ": ", "# ", "\n```\n", "```python\n", "~~~", "- ", "> ",
             "1. ~~~\n", "~~~\n> ", "   ```\n     x\n"]
)  # fmt: skip
def test_extraction_takes_any_text(text):
    """None of it takes long: quadratic time would be seen."""
    for start in ("", "def f(x):\n", "for ", "import ", "x"):
        assert isinstance(extract_program(start + text * 50000), str)


def test_a_program_without_a_fence_is_taken_whole():
    """Also where it does not open with a definition, as programs on standard input do."""
    tests = {"inputs": ["3\n"], "outputs": ["6\n"]}
    text = "n = int(input())\nfor _ in range(1):\n    n *= 2\nprint(n)"
    assert [v.outcome for v in grade([text, f"So:\n```\n{text}\n```"], [tests] * 2)] == ["pass"] * 2
    assert program_of(f"~~~python\n{REFERENCE}").strip() == REFERENCE
    assert program_of(text) == text and program_of(f"Say\n```python\n{REFERENCE}\n```").strip() == REFERENCE


# ---- batches --------------------------------------------------------------------------------------------------------
def test_equal_pairs_run_once(monkeypatch):
    started = []
    fork = Sandbox._fork
    monkeypatch.setattr(Sandbox, "_fork", lambda self, slot, *rest: started.append(slot) or fork(self, slot, *rest))
    pairs = [("def f(x): return 4", VALUE(4)), ("def f(x): return 5", VALUE(4))] * 20
    assert [v.outcome for v in run_programs(pairs, workers=2)] == ["pass", "wrong"] * 20
    assert len(started) == 2


# ---- long runs ------------------------------------------------------------------------------------------------------
MBPP = pathlib.Path(os.environ.get("CTS_MBPP", ROOT.parent / "shared" / "data" / "mbpp" / "mbpp.jsonl"))


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
