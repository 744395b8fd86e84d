"""Generated problems that need no file and no network: `fixtures_math`, a small GSM8K, `fixtures_long` and
`fixtures_rare`, its like with up to twelve steps, and `fixtures_code`, small functions. Used by tasks alone."""

import itertools
from typing import Any

import numpy as np

from common.basics import normalize_x
from common.prompts import CODE_LINE
from common.replay import Problem, salted_bucket

NAMES = ("Tom", "Amy", "Ben", "Sue", "Max", "Eva", "Sam", "Ann")
GOODS = ("pens", "books", "coins", "cards", "nuts", "toys")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def fixtures_math(seed: int = 0, size: int = 3000) -> list[Problem]:
    """Generated word problems in GSM8K's own format (`<<16+5=21>>21`, `#### 21`), horizons 2 to 8, numbers below 100.

    Two templates: one person whose stock changes month by month, and a row of people each compared with the one before,
    whose last step adds two of them up. `size` problems, no text twice; deterministic in `seed`.
    """
    rng = np.random.default_rng((seed, 71))
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.choice(np.arange(2, 9), p=np.arange(7, 0, -1) ** 2 / 140))  # short ones more often
        try:
            x, lines, value = (_months if rng.random() < 0.5 else _comparisons)(rng, horizon)
        except StopIteration:
            continue
        if normalize_x(x) not in problems:
            reference = "\n".join([*lines, f"#### {value}"])
            problems[normalize_x(x)] = Problem(f"fixtures_math/{len(problems):05d}", x, reference, str(value), None)
    return list(problems.values())


def _change(rng, value: int, results: set[int], givens: set[int]) -> tuple[str, int, int]:
    """One operation on `value` that keeps it in 2..40: (operator, operand, new value).

    No result comes twice and no given number equals a result, so that a number in a solution says where it comes from.
    Raises StopIteration where nothing is left.
    """
    for _ in range(200):
        op = str(rng.choice(["+", "+", "-", "-", "*", "/"]))
        n = int(rng.integers(2, 4)) if op in "*/" else int(rng.integers(2, 10))
        if op == "/" and value % n:
            continue
        new = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        if 2 <= new <= 40 and new != n and n not in results and new not in results | givens:
            results.add(new)
            givens.add(n)
            return op, n, new
    raise StopIteration


def _months(rng, horizon: int) -> tuple[str, list[str], int]:
    name, goods = NAMES[rng.integers(len(NAMES))], GOODS[rng.integers(len(GOODS))]
    value, first = int(rng.integers(10, 20)), int(rng.integers(12))
    sentences, lines, results, givens = [f"{name} has {value} {goods}."], [], {value}, set()
    for i in range(horizon):
        op, n, new = _change(rng, value, results, givens)
        event = {"+": ("are bought", "are found"), "-": ("are lost", "are sold"), "*": ("times as many",) * 2,
                 "/": ("times fewer",) * 2}[op][rng.integers(2)]  # fmt: skip
        month = MONTHS[(first + i) % 12]
        sentences.append(f"In {month} {n} {event}.")
        lines.append(f"In {month} {n} {event}: <<{value}{op}{n}={new}>>{new}.")
        value = new
    return " ".join([*sentences, f"How many {goods} does {name} have now?"]), lines, value


def _comparisons(rng, horizon: int) -> tuple[str, list[str], int]:
    people = [NAMES[i] for i in rng.permutation(len(NAMES))[:horizon]]
    goods, value = GOODS[rng.integers(len(GOODS))], int(rng.integers(10, 20))
    sentences, lines, stock = [f"{people[0]} has {value} {goods}."], [], [value]
    results, givens = {value}, set()
    for before, name in itertools.pairwise(people):
        op, n, new = _change(rng, value, results, givens)
        how = {"+": "more", "-": "fewer", "*": "times as many", "/": "times fewer"}[op]
        sentences.append(f"{name} has {n} {how} {'as' if op == '*' else 'than'} {before}.")
        lines.append(f"So {name} has {n} {how}: <<{value}{op}{n}={new}>>{new}.")
        stock.append(new)
        value = new
    i = int(rng.integers(horizon - 1))
    total = stock[i] + value
    lines.append(f"So {people[i]} and {people[-1]} have <<{stock[i]}+{value}={total}>>{total}.")
    return " ".join([*sentences, f"How many {goods} do {people[i]} and {people[-1]} have?"]), lines, total


STATIONS = ("bank", "barn", "dock", "farm", "fort", "hill", "inn", "lake", "mill", "park", "port", "shop", "yard",
            "zoo")  # fmt: skip
VEHICLES = ("bus", "tram", "train", "boat")
HELD_OUT = 20  # percent of the sequences of operations


def fixtures_long(seed: int = 0, size: int = 11_000) -> list[Problem]:
    """Generated word problems in GSM8K's format with 2 to 12 steps, short ones more often (p ~ 13 - horizon)."""
    return _chains("fixtures_long", (seed, 79), size, np.arange(11, 0, -1))


def fixtures_rare(seed: int = 0, size: int = 11_000) -> list[Problem]:
    """Like `fixtures_long`, all horizons equally often. What tells the two apart is their base (room `slips`)."""
    return _chains("fixtures_rare", (seed, 83), size, np.ones(11))


def _chains(task: str, seed: tuple[int, int], size: int, weights: np.ndarray) -> list[Problem]:
    """Problems with horizons 2, 3, ... as often as `weights` say. Two templates: a stock that changes month by month
    and a vehicle that people get on and off.

    Split by structure: no sequence of operations of a test problem is one of training, whatever stands around it.
    """
    rng = np.random.default_rng(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.choice(np.arange(2, 2 + len(weights)), p=weights / weights.sum()))
        try:
            x, lines, value, structure = (_stock if rng.random() < 0.5 else _journey)(rng, horizon)
        except StopIteration:
            continue
        if normalize_x(x) not in problems:
            split = "test" if salted_bucket(structure) < HELD_OUT else "train"
            reference = "\n".join([*lines, f"#### {value}"])
            problems[normalize_x(x)] = Problem(f"{task}/{len(problems):05d}", x, reference, str(value), split)
    return list(problems.values())


def _move(rng, value: int, results: set[int]) -> tuple[str, int, int]:
    """One operation on `value` that keeps it in 10..49: (operator, operand, new value). Raises StopIteration where none
    is found.

    Operands have one digit and results two, and no result comes twice: a number in a solution says where it comes from.
    Nothing is divided, for what follows from a wrong value has to come out even too.
    """
    for _ in range(200):
        op = "*" if rng.random() < 0.2 else "+-"[rng.integers(2)]
        n = int(rng.integers(2, 4)) if op == "*" else int(rng.integers(2, 10))
        new = {"+": value + n, "-": value - n, "*": value * n}[op]
        if 10 <= new < 50 and new not in results:
            results.add(new)
            return op, n, new
    raise StopIteration


def _chain(rng, horizon: int, value: int, where: list[str], events: dict[str, tuple[str, str]]):
    """(sentences, solution lines, last value, structure) of so many operations on `value`."""
    sentences, lines, results, structure = [], [], {value}, []
    for place in where[:horizon]:
        op, n, new = _move(rng, value, results)
        event = f"{place} {n} {events[op][rng.integers(2)]}"
        sentences.append(f"{event}.")
        lines.append(f"{event}: <<{value}{op}{n}={new}>>{new}.")
        structure.append(f"{op}{n}")
        value = new
    return sentences, lines, value, " ".join(structure)


def _stock(rng, horizon: int) -> tuple[str, list[str], int, str]:
    name, goods, value = NAMES[rng.integers(len(NAMES))], GOODS[rng.integers(len(GOODS))], int(rng.integers(10, 40))
    first = int(rng.integers(12))
    events = {"+": ("are bought", "are found"), "-": ("are lost", "are sold"), "*": ("times as many",) * 2}
    where = [f"In {MONTHS[(first + i) % 12]}" for i in range(12)]
    sentences, lines, last, structure = _chain(rng, horizon, value, where, events)
    x = " ".join([f"{name} has {value} {goods}.", *sentences, f"How many {goods} does {name} have now?"])
    return x, lines, last, structure


def _journey(rng, horizon: int) -> tuple[str, list[str], int, str]:
    vehicle, value = VEHICLES[rng.integers(len(VEHICLES))], int(rng.integers(10, 40))
    where = [f"At the {STATIONS[i]}" for i in rng.permutation(len(STATIONS))]
    events = {"+": ("get on", "come in"), "-": ("get off", "go out"), "*": ("times as many",) * 2}
    sentences, lines, last, structure = _chain(rng, horizon, value, where, events)
    x = " ".join([f"A {vehicle} starts with {value} people.", *sentences, f"How many people does the {vehicle} hold?"])
    return x, lines, last, structure


FUNCTIONS = ("base", "calc", "find", "gain", "make", "part", "size", "work")
OPERATIONS = {"+": ("Add {}.", "plus"), "-": ("Subtract {}.", "minus"), "*": ("Multiply by {}.", "times")}


def fixtures_code(seed: int = 0, size: int = 3000) -> list[Problem]:
    """Generated small functions with four asserts each, horizons 2 to 8 (statements below the def).

    Two templates, each sentence of x a statement or two: arithmetic on two numbers, and a loop over a list followed by
    the same. `size` problems, no text twice; deterministic in `seed`.
    """
    rng = np.random.default_rng((seed, 73))
    problems: dict[str, Problem] = {}
    while len(problems) < size:
        horizon = int(rng.choice(np.arange(2, 9), p=np.array([5, 6, 5, 4, 3, 2, 1]) / 26))  # short ones more often
        name, loops = FUNCTIONS[rng.integers(len(FUNCTIONS))], horizon >= 4 and rng.random() < 0.5
        parameters, sentences, lines = (_loop if loops else _arithmetic)(rng, horizon)
        x = f"{name}({parameters}): {' '.join(sentences)}{CODE_LINE}"
        if normalize_x(x) in problems:
            continue
        program = "\n    ".join([f"def {name}({parameters}):", *lines, "return r"])
        space: dict[str, Any] = {}
        exec(program, space)  # of the templates below and nothing else
        asserts: dict[str, None] = {}
        while len(asserts) < 4:
            draw = lambda n: [int(i) for i in rng.integers(0, 13, n)]
            call = f"{name}({draw(rng.integers(1, 6)) if loops else ', '.join(map(str, draw(2)))})"
            asserts[f"assert {call} == {eval(call, space)}"] = None
        tests = {"setup": "", "asserts": list(asserts)}
        problems[normalize_x(x)] = Problem(f"fixtures_code/{len(problems):05d}", x, program, "", None, tests)
    return list(problems.values())


def _operations(rng, count: int, operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Sentences and lines of `count` statements on r; an `if` and what it guards are two."""
    sentences, lines = [], []
    while len(lines) < count:
        op = str(rng.choice(list(OPERATIONS)))
        n = str(rng.choice(operands)) if op != "*" and rng.random() < 0.3 else str(rng.integers(2, 10))
        sentence, line = OPERATIONS[op][0].format(n), f"r = r {op} {n}"
        if len(lines) + 2 <= count and rng.random() < 0.4:
            sign, word = ((">", "above"), ("<", "below"))[rng.integers(2)]
            limit = rng.integers(5, 20)
            sentences.append(f"If it is {word} {limit}, {sentence[0].lower()}{sentence[1:]}")
            lines += [f"if r {sign} {limit}:", f"    {line}"]
        else:
            sentences.append(sentence)
            lines.append(line)
    return sentences, lines


def _arithmetic(rng, horizon: int) -> tuple[str, list[str], list[str]]:
    a, b = (("a", "b"), ("m", "n"), ("p", "q"))[rng.integers(3)]
    op, n = str(rng.choice(list(OPERATIONS))), b if rng.random() < 0.5 else rng.integers(2, 10)
    sentences, lines = _operations(rng, horizon - 2, (a, b))
    return f"{a}, {b}", [f"Start with {a} {OPERATIONS[op][1]} {n}.", *sentences], [f"r = {a} {op} {n}", *lines]


def _loop(rng, horizon: int) -> tuple[str, list[str], list[str]]:
    start, op = rng.integers(0, 10), ("+", "-")[rng.integers(2)]
    lines, sentences, pad = [f"r = {start}", "for x in xs:"], [f"Start with {start}."], "    "
    each = "each x"
    if horizon >= 5 and rng.random() < 0.6:
        sign, word = ((">", "above"), ("<", "below"))[rng.integers(2)]
        limit = rng.integers(2, 11)
        lines.append(f"    if x {sign} {limit}:")
        each, pad = f"each x {word} {limit}", "        "
    times = rng.integers(2, 6) if rng.random() < 0.4 else None
    lines.append(f"{pad}r = r {op} x" + (f" * {times}" if times else ""))
    sentences.append(f"For {each}, {'add' if op == '+' else 'subtract'} x{f' times {times}' if times else ''}.")
    more, after = _operations(rng, horizon - 1 - len(lines), ("len(xs)",))
    return "xs", [*sentences, *more], [*lines, *after]
