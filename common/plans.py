"""The tests of a program as data: what of them the program may see, and what is done with the values it hands back; and
what has to be known of source text for that. Used by programs, by critique (which call a test makes) and wherever tests
or programs are read; runs nothing itself."""

import ast
import builtins
import contextlib
import dataclasses
import functools
import itertools
import json
import re
import warnings
from typing import Any

from common import sandbox_server
from common.basics import InputError, parse_python


def parse_program(program: str) -> ast.Module | None:
    """The syntax tree of a program, or None where it is not Python 3 (or nested too deep to be read)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence": the programs are not ours
            return parse_python(program.removeprefix("\ufeff"))  # as of a file
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def flaw_of_tests(tests: Any) -> str | None:
    """What is wrong with a problem's tests, or None: {"setup", "asserts"}, or {"inputs", "outputs"} for standard input,
    with "fn_name" for calls of that function."""
    texts = lambda a: isinstance(a, list) and all(isinstance(t, str) for t in a)
    if not isinstance(tests, dict):
        return "must be an object"
    if "asserts" in tests:
        fine = texts(tests["asserts"]) and tests["asserts"] and isinstance(tests.get("setup", ""), str)
        return None if fine else "needs asserts, a list of one string or more, and setup, a string"
    if "inputs" not in tests:
        return "needs asserts, or inputs and outputs"
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not 0 < len(inputs) == len(outputs):
        return "needs inputs and outputs, two lists of one length"
    if "fn_name" in tests:
        fine = isinstance(tests["fn_name"], str) and all(isinstance(args, list) for args in inputs)
        return None if fine else "needs fn_name, a string, and inputs that are lists of arguments"
    return None if texts(inputs) and texts(outputs) else "needs inputs and outputs that are strings"


def bound_names(node: ast.AST) -> set[str]:
    """Names that a piece of code gives a value: assignments, imports, definitions, arguments, loop variables."""
    names = set()
    for n in ast.walk(node):
        match n:
            case ast.alias():
                names.add((n.asname or n.name).split(".")[0])
            case ast.Name(name, ast.Store() | ast.Del()) | ast.arg(name) | ast.ClassDef(name):
                names.add(name)
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                names.add(name)
    return names


def used_names(node: ast.AST) -> set[str]:
    """Names that a piece of code reads."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


class Hoist(ast.NodeTransformer):
    """Takes out of an expression what needs the program, each as large as a call, an index or an attribute makes it,
    and puts names `_0`, `_1` … in its place: of `set(f([1])) == {1}` the program sees `f([1])` alone."""

    def __init__(self, known: set[str], inner: set[str]):
        self.known, self.inner, self.taken = known, inner, []

    def visit(self, node):
        root = node
        while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
            root = root.func if isinstance(root, ast.Call) else root.value
        if not isinstance(root, ast.Name) or root.id in self.known | self.inner:
            return self.generic_visit(node)
        if used_names(node) & (self.inner - bound_names(node)):
            raise ValueError("a call inside a comprehension cannot be separated from what is expected of it")
        self.taken.append(ast.unparse(node))
        return ast.Name(f"_{len(self.taken) - 1}", ast.Load())


def split_assert(text: str, known: set[str]) -> tuple[list[str], Any, str | None]:
    """What of an assert needs the program, and what does not: (expressions for the program, expected value, check).

    The check is None where the one expression just has to equal the expected value; else it is an expression over the
    values `_0`, `_1` …. `known`: names that do not come from the program. Raises ValueError for another shape.

    >>> split_assert("assert f(2) == [4]", set()), split_assert("assert abs(f(2) - 4) < 0.1", {"abs"})
    ((['f(2)'], [4], None), (['f(2)'], None, 'abs(_0 - 4) < 0.1'))
    """
    body = parse_python(text.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError("not one assert statement")
    test = body[0].test
    hoist = Hoist(known, bound_names(test))
    rest = hoist.visit(test)
    if not hoist.taken and isinstance(test, ast.Compare) and isinstance(test.left, ast.Call):
        hoist.taken, test.left = [ast.unparse(test.left)], ast.Name("_0", ast.Load())  # a function named as a builtin
    if not hoist.taken:
        raise ValueError("it calls nothing of the program")
    if isinstance(rest, ast.Compare) and len(rest.ops) == 1 and isinstance(rest.ops[0], ast.Eq):
        for one, other in ((rest.left, rest.comparators[0]), (rest.comparators[0], rest.left)):
            if isinstance(one, ast.Name) and one.id == "_0" and len(hoist.taken) == 1:
                with contextlib.suppress(ValueError):
                    return hoist.taken, ast.literal_eval(other), None
    return hoist.taken, None, ast.unparse(rest)


def split_setup(setup: str, asserts: list[str]) -> tuple[str, str, str, set[str]]:
    """Set-up code as (before the program, after it, for checks, names known without the program).

    What needs the program (`root = Node(1)`) runs after it; imports and classes run before it. Other values go to
    the program only if something there reads them: a constant that asserts compare with is none of its business.
    """
    known, before, after, checks, waiting = {*dir(builtins), *sandbox_server.CHECK_MODULES}, [], [], [], []
    for statement in parse_python(setup).body:
        if used_names(statement) - bound_names(statement) - known:
            after.append(statement)
            continue
        checks.append(statement)
        known |= bound_names(statement)
        early = isinstance(statement, (ast.Import, ast.ImportFrom, ast.ClassDef))
        (before if early else waiting).append(statement)
    expressions = [parse_python(expression) for text in asserts for expression in split_assert(text, known)[0]]
    needed = set().union(*map(used_names, [*before, *after, *expressions]))
    for statement in reversed(waiting):
        if bound_names(statement) & needed:
            before.append(statement)
            needed |= used_names(statement)
    before.sort(key=checks.index)
    source = lambda statements: "\n".join(map(ast.unparse, statements))
    return source(before), source(after), source(checks), known


@dataclasses.dataclass(frozen=True)
class TestPlan:
    """Tests as a job for the sandbox and what is done with its frames; `problem`: why they cannot be run."""

    __test__ = False  # not one of pytest's
    job: dict[str, Any]
    checks: list[tuple[int, int, Any, str | None]]  # of each test: first frame, frames, expected value, check
    setup: str = ""  # of checks
    problem: str = ""

    @functools.cached_property
    def owner(self) -> list[int]:
        """The test of each frame."""
        return [i for i, (_, n, _, _) in enumerate(self.checks) for _ in range(n)]


def joined(text: Any) -> Any:
    """An input or output of a stdin test: a string as it is, a list of its lines as one string."""
    return "\n".join(map(str, text)) if isinstance(text, list) else text


@functools.lru_cache(maxsize=4096)
def plan_tests(tests_json: str) -> TestPlan:
    """The plan of a test dict, given as JSON. Raises InputError where it is none of the three kinds."""
    tests = json.loads(tests_json)
    kind = "asserts" if "asserts" in tests else "call" if "fn_name" in tests else "stdin"
    if kind == "stdin":
        tests |= {k: list(map(joined, tests[k])) for k in ("inputs", "outputs") if isinstance(tests.get(k), list)}
    flaw = flaw_of_tests(tests)
    if flaw:
        raise InputError(f"tests of a program: {flaw}")
    given, wanted = tests["asserts" if kind == "asserts" else "inputs"], tests.get("outputs")
    if kind == "stdin":
        return TestPlan({"kind": kind, "tests": given}, [(i, 1, text, None) for i, text in enumerate(wanted)])
    if kind == "call":
        given = [[_int_keys(v) if i == 0 else v for i, v in enumerate(args)] for args in given]
        job = {"kind": kind, "fn_name": tests["fn_name"], "tests": [list(map(sandbox_server.encode, v)) for v in given]}
        return TestPlan({**job, "before": ""}, [(i, 1, value, None) for i, value in enumerate(wanted)])
    try:
        before, after, setup, known = split_setup(tests.get("setup") or "", given)
        split = [split_assert(text, known) for text in given]
    except (SyntaxError, ValueError, RecursionError) as e:
        return TestPlan({}, [(0, 0, None, None)] * len(given), problem=f"asserts: {e}")
    starts = [0, *itertools.accumulate(len(expressions) for expressions, _, _ in split)]
    checks = [(start, len(parts), value, check) for start, (parts, value, check) in zip(starts, split)]
    job = {"kind": kind, "before": before, "after": after, "tests": [e for parts, _, _ in split for e in parts]}
    return TestPlan(job, checks, setup)


def _int_keys(value):
    """JSON has string keys only: a dict of whole numbers as it was."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d{1,18}", k) for k in value):
        return {int(k): v for k, v in value.items()}
    return value
