"""A right program made wrong: one node or statement of its syntax tree is changed in the source text. Used by making,
which runs the mutants; this room runs nothing."""

import ast
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator

from common.plans import parse_program

FLAWS = {  # kind of mutation: (tag, what the critique says of it; never what would be right)
    "comparison": ("invalid_assumption", "it compares in the wrong way"),
    "condition": ("invalid_assumption", "its condition or truth value is wrong"),
    "off_by_one": ("local_arithmetic", "a number in it is off by one"),
    "operator": ("local_arithmetic", "it uses the wrong operator"),
    "dropped_statement": ("missing_case", "a statement is missing here"),
    "dropped_branch": ("missing_case", "a case is missing here"),
    "wrong_variable": ("state_tracking", "it uses the wrong variable"),
    "swapped": ("wrong_decomposition", "two of its parts stand in the wrong order"),
    "early_return": ("wrong_decomposition", "it returns too early"),
    "wrong_call": ("tool_misuse", "it calls the wrong function"),
}
COMPARISONS = {"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",),
               "in": ("not in",), "not in": ("in",), "is": ("is not",), "is not": ("is",)}  # fmt: skip
OPERATORS = {"+": ("-",), "-": ("+",), "*": ("+",), "/": ("*", "//"), "//": ("/", "*"), "%": ("//",), "**": ("*",),
             "<<": (">>",), ">>": ("<<",), "&": ("|",), "|": ("&",), "^": ("|",)}  # fmt: skip
TWINS = (("min", "max"), ("any", "all"), ("upper", "lower"), ("append", "extend"), ("floor", "ceil"), ("find", "rfind"),
         ("startswith", "endswith"), ("lstrip", "rstrip"), ("sum", "len"), ("union", "intersection"),
         ("popleft", "pop"), ("isdigit", "isalpha"), ("sorted", "list"), ("islower", "isupper"))  # fmt: skip
TWIN = {a: b for pair in TWINS for a, b in (pair, pair[::-1])}
SYMBOL = re.compile(r"not\s+in\b|is\s+not\b|in\b|is\b|\*\*|//|<<|>>|[<>=!]=|[-+*/%<>&|^@]")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A program with one flaw: its kind, its text, and the character span of the statement that is wrong in it."""

    kind: str
    program: str
    span: tuple[int, int]


class Source:
    """A program's text and tree; offsets are characters of the text (the tree's columns are UTF-8 bytes)."""

    def __init__(self, program: str):
        self.text, self.tree = program, parse_program(program)
        self.starts = list(itertools.accumulate((len(line) + 1 for line in program.split("\n")), initial=0))
        self.nodes = list(ast.walk(self.tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def at(self, line: int, column: int) -> int:
        start = self.starts[line - 1]
        return start + len(self.text[start : self.starts[line]].encode()[:column].decode())

    def start(self, node) -> int:
        first = node.decorator_list[0] if getattr(node, "decorator_list", None) else node
        return self.at(first.lineno, first.col_offset) - (first is not node)  # the @ stands before its decorator

    def end(self, node) -> int:
        return self.at(node.end_lineno, node.end_col_offset)

    def span(self, node) -> tuple[int, int]:
        return self.start(node), self.end(node)

    def cut(self, node) -> str:
        return self.text[slice(*self.span(node))]

    def head(self, statement: ast.stmt) -> tuple[int, int]:
        """The span of a statement, of a compound one (`if`, `for`, ...) that of its head."""
        start, body = self.start(statement), getattr(statement, "body", None) or getattr(statement, "cases", None)
        if not body:
            return start, self.end(statement)
        first = body[0] if isinstance(body[0], ast.stmt) else body[0].pattern
        rows = [line.split("#")[0].rstrip() for line in self.text[start : self.start(first)].split("\n")]
        return start, start + len("\n".join(rows).rstrip())

    def last(self, statement: ast.stmt) -> ast.stmt:
        """The statement that a compound one ends with, itself if it is none."""
        inside = [n for n in ast.walk(statement) if isinstance(n, ast.stmt)]
        return max(inside, key=lambda n: (n.lineno, n.col_offset))

    def symbol(self, left, right) -> tuple[int, str] | None:
        """(place, text) of the operator between two neighbouring operands; brackets and comments stand there too."""
        start, end = self.end(left), self.start(right)
        m = SYMBOL.search(re.sub(r"#[^\n]*", lambda c: " " * len(c.group()), self.text[start:end]))
        return (start + m.start(), m.group()) if m else None

    def replaced(self, kind: str, node, start: int, end: int, new: str) -> Mutant:
        """The mutant with text [start, end), inside the head of the statement around `node`, replaced."""
        while not isinstance(node, ast.stmt):
            node = self.parent[node]
        a, b = self.head(node)
        return Mutant(kind, self.text[:start] + new + self.text[end:], (a, b + len(new) - (end - start)))

    def alone(self, statement: ast.stmt) -> bool:
        """Does it stand on lines of its own?"""
        before = self.text[: self.start(statement)].rpartition("\n")[2]
        return not before.strip() and not self.text[self.end(statement) :].partition("\n")[0].strip()


def expression_mutants(source: Source) -> Iterator[Mutant]:
    """Other comparisons, operators, numbers, conditions, names, orders and calls in their place."""
    for node in source.nodes:
        if isinstance(node, ast.Compare):
            for left, right in itertools.pairwise([node.left, *node.comparators]):
                found = source.symbol(left, right)
                for new in COMPARISONS.get(" ".join(found[1].split()), ()) if found else ():
                    yield source.replaced("comparison", node, found[0], found[0] + len(found[1]), new)
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            found = source.symbol(left, right)
            for new in OPERATORS.get(found[1], ()) if found else ():
                yield source.replaced("operator", node, found[0], found[0] + len(found[1]), new)
            if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add | ast.Mult):
                yield from swapped(source, node, left, right)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            truth = type(node.value) is bool
            news = [not node.value] if truth else [node.value + 1, max(node.value - 1, 0)]
            for new in dict.fromkeys(n for n in news if n != node.value):
                yield source.replaced("condition" if truth else "off_by_one", node, *source.span(node), str(new))
        elif isinstance(node, ast.BoolOp):
            start, end = source.end(node.values[0]), source.start(node.values[1])
            new = re.sub(r"\b(and|or)\b", lambda m: {"and": "or", "or": "and"}[m.group()], source.text[start:end])
            if len(node.values) == 2:
                yield source.replaced("condition", node, start, end, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield source.replaced("condition", node, source.start(node), source.start(node.operand), "")
        elif isinstance(node, ast.Call):
            end, called = source.end(node.func), getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in TWIN:
                yield source.replaced("wrong_call", node, end - len(called), end, TWIN[called])
            if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
                yield from swapped(source, node, *node.args[:2])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from other_names(source, node)


def swapped(source: Source, node, left, right) -> Iterator[Mutant]:
    """Two parts of an expression in each other's place; each needs to bind as one (a name, a number, a call, ...)."""
    a, b = source.cut(left), source.cut(right)
    whole = ast.Name | ast.Constant | ast.Call | ast.Subscript | ast.Attribute
    if a != b and isinstance(left, whole) and isinstance(right, whole):
        start, end = source.start(left), source.end(right)
        yield source.replaced("swapped", node, start, end, b + source.text[source.end(left) : source.start(right)] + a)


def other_names(source: Source, node: ast.Name) -> Iterator[Mutant]:
    """Another variable of the same function in a name's place."""
    scope = node
    while scope in source.parent and not isinstance(scope, ast.FunctionDef):
        scope = source.parent[scope]
    inside = list(ast.walk(scope))
    own = [n.arg for n in inside if isinstance(n, ast.arg)]
    own += [n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    if node.id in own and isinstance(source.parent[node], ast.expr | ast.stmt):
        for new in sorted(set(own) - {node.id}):
            yield source.replaced("wrong_variable", node, *source.span(node), new)


def statement_mutants(source: Source) -> Iterator[Mutant]:
    """A statement or a branch left out; a return moved into the loop before it."""
    text = source.text
    line_start = lambda node: text.rfind("\n", 0, source.start(node)) + 1
    lists = [getattr(node, field, None) for node in source.nodes for field in ("body", "orelse", "finalbody")]
    for block in [part for part in lists if isinstance(part, list)]:  # a lambda's body is none
        for i, statement in enumerate(block):
            start, end = line_start(statement), source.end(statement)
            whole = source.alone(statement)
            end += len(text[end:].partition("\n")[0]) if whole else 0
            kind = "dropped_branch" if isinstance(statement, ast.If) else "dropped_statement"
            keep = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Return, ast.Global, ast.Nonlocal)
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if len(block) > 1 and whole and not isinstance(statement, keep) and not docstring:
                gone = text[:start] + text[end + 1 :] if end < len(text) else text[: start - 1]
                if i + 1 < len(block):  # what now stands in its place; behind the last one the statement before it
                    a, b = (x - (end + 1 - start) for x in source.head(block[i + 1]))
                else:
                    a, b = source.head(source.last(block[i - 1]))
                yield Mutant(kind, gone, (a, b))
            if isinstance(statement, ast.If) and statement.orelse and whole:
                cut = source.end(statement.body[-1])
                yield Mutant("dropped_branch", text[:cut] + text[end:], source.head(source.last(statement.body[-1])))
            after = block[i + 1] if i + 1 < len(block) else None
            if isinstance(statement, ast.For | ast.While) and isinstance(after, ast.Return) and not statement.orelse:
                body = statement.body[-1]
                pad, line = text[line_start(body) : source.start(body)], source.cut(after)
                if source.alone(body) and source.alone(after) and "\n" not in line:
                    new = text[: line_start(after)] + pad + line
                    yield Mutant("early_return", new + text[source.end(after) :], (len(new) - len(line), len(new)))


def mutants(program: str, key: str) -> list[Mutant]:
    """All mutants of a program, kinds in turn; kinds and places in an order that depends on `key` alone."""
    source, rng = Source(program), random.Random(key)
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in FLAWS}
    for mutant in itertools.chain(expression_mutants(source), statement_mutants(source)):
        tree = parse_program(mutant.program)
        if tree is not None and ast.dump(tree) != ast.dump(source.tree) and mutant.span[0] < mutant.span[1]:
            by_kind[mutant.kind].append(mutant)
    kinds = [rng.sample(by_kind[kind], len(by_kind[kind])) for kind in rng.sample(list(by_kind), len(by_kind))]
    return [m for turn in itertools.zip_longest(*kinds) for m in turn if m is not None]


def count_statements(program: str) -> int:
    """The horizon of a program: its statements, without imports and the heads of functions and classes."""
    heads = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    return sum(isinstance(n, ast.stmt) and not isinstance(n, heads) for n in ast.walk(parse_program(program)))
