"""Sheets that people fill in, and their keys: a CSV file and an HTML page a rater, whose columns but the answers' are
locked by digests in a key that the rater does not get. Used by human; knows not what is asked."""

import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

from common.basics import InputError, sha256, write_atomic
from common.page import render

FORMULA = ("=", "+", "-", "@", "\t")  # a cell that starts with one of these is computed, or loses it
SEPARATORS = ",;\t"  # a spreadsheet saves with that of its country


@dataclasses.dataclass(frozen=True)
class Question:
    """One column to be filled in with one of `labels` {label: what it means}; their first letters differ."""

    column: str
    ask: str
    labels: dict[str, str]

    @property
    def head(self) -> str:
        """The head of its column, which says what the labels mean."""
        return f"{self.column} ({'; '.join(f'{label} = {meaning}' for label, meaning in self.labels.items())})"


@dataclasses.dataclass(frozen=True)
class Form:
    """What a sheet shows and asks: `shown` {locked column: its title}, the last `side_by_side` beside each other."""

    title: str
    about: str
    shown: dict[str, str]
    questions: tuple[Question, ...]
    side_by_side: int = 2

    @property
    def head(self) -> list[str]:
        return ["sheet", "row", *self.shown, *(question.head for question in self.questions), "comment"]


def cell(text: str) -> str:
    """A text as it stands in a sheet: no spreadsheet takes it for a formula or drops a character of it.

    >>> cell("=1+1"), cell("one\\r\\ntwo")
    ("'=1+1", 'one\\ntwo')
    """
    text = text.encode(errors="replace").decode().replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    return f"'{text}" if text.startswith(FORMULA) else text


def digest(text: str) -> str:
    """Of a locked cell; what spreadsheets do to line ends does not count."""
    return sha256(text.replace("\r\n", "\n").replace("\r", "\n"))[:16]


def write_sheets(
    out: pathlib.Path, form: Form, rows: dict[str, list[dict[str, str]]], hidden: dict[str, list[dict]], **about: Any
) -> dict[str, Any]:
    """Write <sheet>.csv and <sheet>.html of every sheet in `rows` {sheet: [{locked column: text}]} and key.json, which
    has `about` and, of each row, what `hidden` says of it; returns the key. InputError if one of the files is there."""
    for path in (out / "key.json", *(out / f"{name}.{end}" for name in rows for end in ("csv", "html"))):
        if path.exists():
            raise InputError(f"{path} is there already, and sheets may be out with it: choose another --out")
    cells = lambda row: {column: cell(row[column]) for column in form.shown}
    table = {name: [cells(row) for row in some] for name, some in rows.items()}
    locks = lambda row: {column: digest(text) for column, text in row.items()}
    content = {**about, "sheets": {
        name: {f"r{i:03}": {**hide, "locked": locks(row)} for i, (row, hide) in enumerate(zip(some, hidden[name]), 1)}
        for name, some in table.items()
    }}  # fmt: skip
    key = {"id": key_id(content), **content}
    for name, some in table.items():
        sheet, numbered = f"{name}-{key['id']}", [{"row": f"r{i:03}", **row} for i, row in enumerate(some, 1)]
        text = io.StringIO(newline="")
        lines = [[sheet, *row.values(), *[""] * (len(form.questions) + 1)] for row in numbered]
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows([form.head, *lines])
        write_atomic(out / f"{name}.csv", f"\ufeff{text.getvalue()}")  # the mark tells spreadsheets that it is UTF-8
        asked = [{"column": q.column, "labels": list(q.labels)} for q in form.questions]
        data = {"sheet": sheet, "file": f"{name}.csv", "head": form.head, "shown": list(form.shown.items()),
                "side_by_side": form.side_by_side, "questions": asked, "rows": numbered}  # fmt: skip
        letters = sorted({label[0] for q in form.questions for label in q.labels})
        write_atomic(out / f"{name}.html", render("sheet", data, form=form, keys=letters))
    write_atomic(out / "key.json", json.dumps(key, indent=1) + "\n")
    return key


def key_id(content: dict[str, Any]) -> str:
    """The digest of a key, which names it. A letter comes first, or a spreadsheet might read a number."""
    return f"k{sha256(json.dumps(content, sort_keys=True))[:11]}"


def read_key(path: str | pathlib.Path, kind: str) -> dict[str, Any]:
    """The key of sheets of a kind; InputError if it is none, or is not as it was written."""
    try:
        key = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        content = {name: value for name, value in key.items() if name != "id"}
        sound, found = key["id"] == key_id(content), content["kind"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{path}: no key of sheets ({e}); give the key.json that was written with them") from None
    if not sound:
        raise InputError(f"{path}: is not as it was written, its digest is another; take the original")
    if found != kind:
        raise InputError(f"{path}: is a key of {found}, not of {kind}")
    return key


def read_table(path: pathlib.Path, head: list[str]) -> list[list[str]]:
    """The lines of a CSV file below its head, whatever its separator; InputError if the head is another."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e}); save the sheet as CSV in UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; give the sheet that was filled in")
    found: list[str] = []
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        first: list[str] = []
        try:
            first = without_empty_end([name.strip() for name in next(reader)], len(head))
            found = max(found, first, key=len)
            if first == head:
                return [without_empty_end(line, len(head)) for line in reader if any(line)]
        except csv.Error as e:
            if first == head:
                raise InputError(f"{path}, line {reader.line_num}: {e}; look for a quotation mark too many") from None
    columns = ", ".join(" ".join(name.split())[:20] for name in found[:12])
    raise InputError(
        f"{path}: no sheet of this kind (its columns are {columns}); the first line must stay as it was written"
    )


def without_empty_end(line: list[str], n: int) -> list[str]:
    """A line without the empty cells after the n-th."""
    return line if any(line[n:]) else line[:n]


def read_sheet(path: str | pathlib.Path, key: dict[str, Any], form: Form) -> tuple[str, dict[str, dict[str, str]]]:
    """(sheet, {row: {question's column: label, "comment": text}}) of a filled-in sheet.

    InputError naming file and row: a sheet of another key, a row edited in its locked columns, missing, doubled or
    foreign, a label that is none.
    """
    path, answers, name = pathlib.Path(path), {}, None
    for line in read_table(path, form.head):
        if len(line) != len(form.head):
            raise InputError(f"{path}: a line with {len(line)} cells instead of {len(form.head)}: {line[:2]}")
        sheet, row, rest = line[0].strip(), " ".join(line[1].split()), line[2:]
        where, stem = f"{path}, row {row}", sheet.rpartition("-")[0]
        if sheet not in {f"{known}-{key['id']}" for known in key["sheets"]}:
            raise InputError(f"{where}: is of sheet {sheet!r}, not of this key ({key['id']})")
        if stem != (name := name or stem):
            raise InputError(f"{where}: is of sheet {stem}, those above are of {name}; one file holds one sheet")
        if row not in key["sheets"][name]:
            raise InputError(f"{where}: this sheet has no such row; remove it")
        if row in answers:
            raise InputError(f"{where}: stands there twice; keep one")
        locked = key["sheets"][name][row]["locked"]
        edited = [column for column, text in zip(form.shown, rest) if digest(text) != locked[column]]
        if edited:
            raise InputError(f"{where}: {', '.join(edited)} was edited; restore it from the sheet as it was written")
        comment = rest[-1].strip()
        answers[row] = {"comment": comment[1:] if comment[:1] == "'" and comment[1:].startswith(FORMULA) else comment}
        for question, text in zip(form.questions, rest[len(form.shown) :]):
            label = text.strip().lower()
            if label not in question.labels:
                what = f"{question.column} is {text.strip()!r}" if label else f"has no {question.column}"
                raise InputError(f"{where}: {what}; give one of {', '.join(question.labels)}")
            answers[row][question.column] = label
    if name is None:
        raise InputError(f"{path}: has no rows")
    missing = [row for row in key["sheets"][name] if row not in answers]
    if missing:
        raise InputError(f"{path}, row {missing[0]}: is missing ({len(missing)} in all); restore the sheet as it was")
    return name, answers
