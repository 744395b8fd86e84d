"""One HTML file that says what runs showed, readable without a network: question, answer, tables, plots, a browser of
problems, how it was made. Used by aggregate.py and, for its way to make a page, by sheets; knows no statistics and
reads no run. What it looks like stands beside it in pages/."""

import base64
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any

import jinja2
from markupsafe import Markup

from common.basics import sha256, write_atomic

PAGES = pathlib.Path(__file__).parent / "pages"
MOST_BYTES = 4_800_000  # of a report; mail and review systems take 5 MB
WIDE, SCALE = 800, 0.8  # pixels; a plot of more has a row of the page for itself, and is shown at this scale
NUMBER = re.compile(r"(?:[\d\s.,:;/%()\[\]<>=\u2264\u2265+\-\u2212\u2013\u2014\u00b1eE*]| to |n=)*|n/a")  # or dashes


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is to be read: cells are texts already. Columns of numbers are set to the right."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def numbers(self) -> list[bool]:
        """Of each column, whether all of its cells are numbers, intervals or dashes."""
        columns = zip(*self.rows) if self.rows else [[""]] * len(self.head)
        return [any(column) and all(NUMBER.fullmatch(cell) for cell in column) for column in columns]


def as_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: in ASCII, and without what ends or opens a tag there."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def render(name: str, data: Any, **fields: Any) -> str:
    """pages/<name>.html with pages/style.css, pages/<name>.js and `data` (JSON) inside. Nothing else than these two may
    run or set styles in it, and it may fetch nothing: its policy says so to the browser."""
    read = lambda file: (PAGES / file).read_text(encoding="utf-8")
    style, script = read("style.css"), read(f"{name}.js")
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    policy = f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}"
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    inside = dict(style=Markup(style), script=Markup(script), policy=Markup(policy), json=as_json(data), data=data)
    text = pages.from_string(read(f"{name}.html")).render(**inside, **fields)
    return text.encode(errors="replace").decode()  # half a surrogate pair is no text: it becomes "?"


def shown_problem(problem: dict[str, Any]) -> dict[str, Any]:
    """A problem as the page's script takes it: y0 in three parts, the second the flagged step. (Its offsets count
    characters; those of the script would count UTF-16 units.) What is no share, also NaN, is null."""
    y0, (start, end) = problem["y0"], problem["span"] or (len(problem["y0"]),) * 2
    share = lambda value: None if value is None or math.isnan(value) else float(value)
    outcomes = {method: share(value) for method, value in problem["outcomes"].items()}
    kept = {key: problem[key] for key in ("task", "task_id", "x", "f", "horizon", "texts")}
    shown = {method: share(value) for method, value in problem["shown"].items()}
    return {**kept, "outcomes": outcomes, "shown": shown, "y0": [y0[:start], y0[start:end], y0[end:]]}


def fitting(problems: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """As many of the problems as take `most` bytes, in their order: those whose names have the smallest digests, so
    that of those given no outcome is preferred, and two reports on the same problems show the same."""
    left, chosen = most, set()
    for i in sorted(range(len(problems)), key=lambda i: sha256(f"{problems[i]['task']}\0{problems[i]['task_id']}")):
        size = len(as_json(problems[i])) + 1
        if size <= left:  # one that is too large alone leaves its place to the next
            left -= size
            chosen.add(i)
    return [problem for i, problem in enumerate(problems) if i in chosen]


def pixels_across(png: bytes) -> int:
    """The width in a PNG's head (big-endian, after the signature and the first chunk's length and name)."""
    return int.from_bytes(png[16:20], "big")


def facts(about: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, rows) of the tables at the end: the fingerprint, the versions."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    titles = {"fingerprint": "Fingerprint: what all of these runs share", "versions": "Versions"}
    return [
        (title, [(name, text(value)) for name, value in about[key].items()])
        for key, title in titles.items()
        if about.get(key)
    ]


def write_page(
    path: pathlib.Path, question: str, answer: str, tables: list[Table], plots: dict[str, bytes],
    problems: list[dict[str, Any]], about: dict[str, Any],
) -> None:  # fmt: skip
    """Write the report, the same bytes for the same content.

    plots: {caption: PNG}. problems: {"task", "task_id", "x", "y0", "span": [start, end] or None, "f", "horizon",
    "outcomes": {method: share of seeds that are right}, "texts": {method: a revision}, "shown": {method: whether that
    one is right}} each; of more than fit into MOST_BYTES some are shown. about: "fingerprint" {name: value}, "commands"
    [line], "versions" {name: version} and "note", a sentence on the texts (of which seed they are), if there.
    """
    across = {caption: pixels_across(png) for caption, png in plots.items()}
    pictures = [
        (caption, base64.b64encode(png).decode(), round(SCALE * across[caption]), across[caption] > WIDE)
        for caption, png in plots.items()
    ]
    ready = [shown_problem(problem) for problem in problems]
    methods = list(dict.fromkeys(method for problem in ready for method in (*problem["outcomes"], *problem["texts"])))

    def page(some: list[dict[str, Any]]) -> str:
        shown = "" if not ready else f"{len(some):,} problems." if len(some) == len(ready) else (
            f"{len(some):,} of {len(ready):,} problems, drawn by the digest of their names, to keep this file small."
        )  # fmt: skip
        return render("report", {"methods": methods, "problems": some}, question=question, answer=answer, tables=tables,
                      plots=pictures, shown=shown, about={"note": "", "commands": [], **about},
                      facts=facts(about))  # fmt: skip

    rest = len(page([]).encode()) + 10_000  # the filter's own part, which is not there without problems
    write_atomic(path, page(fitting(ready, MOST_BYTES - rest)))
