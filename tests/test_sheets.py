"""Sheets and their keys: what comes back is what went out, or is refused by file and row; filled in in a browser.

pytest tests/test_sheets.py
"""

import csv
import io
import json

import pytest
from browser import browser, wait_until
from examples import refused

from common.sheets import Form, Question, cell, key_id, read_key, read_sheet, write_sheets

FORM = Form(
    "Which?", "Say which.", {"problem": "Problem", "text_a": "A", "text_b": "B"},
    (Question("label", "Which?", {"a": "A is", "b": "B is", "tie": "both"}),
     Question("sure", "Sure?", {"yes": "I am", "no": "I am not"})),
)  # fmt: skip
HOSTILE = '=1+1\r\n</script><script>alert(1)</script> "quoted", a;b\tc \u2028 \U0001f600'
ROWS = [{"problem": f"Problem {i}?\nSecond line", "text_a": HOSTILE, "text_b": "-2"} for i in range(3)]


def write(out, **about) -> dict:
    """Two sheets of the same rows."""
    rows = {"r1": ROWS, "r2": ROWS[::-1]}
    hidden = {name: [{"secret": i} for i in range(3)] for name in rows}
    return write_sheets(out, FORM, rows, hidden, kind="own", **about)


def read_csv(path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def fill(path, change=lambda lines: lines, delimiter=",", ends="\r\n", mark="\ufeff"):
    """Answer every row of a sheet, change its lines, save it as another program would."""
    head, *lines = read_csv(path)
    lines = [[*line[:-3], "a", "yes", "so"] for line in lines]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=ends).writerows(change([head, *lines]))
    path.write_bytes(f"{mark}{text.getvalue()}".encode())
    return path


@pytest.fixture
def out(tmp_path):
    write(tmp_path)
    return tmp_path


def test_cells():
    """What a spreadsheet would compute starts with a quote; line ends are of one kind; all can be encoded."""
    assert [cell(text) for text in ("=a", "+a", "-a", "@a", "\ta", "a=")] == ["'=a", "'+a", "'-a", "'@a", "'\ta", "a="]
    assert cell("a\r\nb\rc\0\ud800") == "a\nb\nc\ufffd?"


def test_the_head_says_what_labels_mean(out):
    head, first, *_ = read_csv(out / "r1.csv")
    assert head == FORM.head == [
        "sheet", "row", "problem", "text_a", "text_b", "label (a = A is; b = B is; tie = both)",
        "sure (yes = I am; no = I am not)", "comment",
    ]  # fmt: skip
    key = read_key(out / "key.json", "own")
    assert first[:3] == [f"r1-{key['id']}", "r001", ROWS[0]["problem"]] and first[3][0] == "'"
    assert key["sheets"]["r2"]["r003"]["secret"] == 2
    assert "secret" not in (out / "r1.html").read_text() + (out / "r1.csv").read_text()


def test_same_rows_same_bytes(out, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write(again)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@pytest.mark.parametrize(
    "how", [{}, {"delimiter": ";"}, {"delimiter": "\t", "ends": "\n", "mark": ""}], ids=["as it was", ";", "tabs"]
)
def test_a_filled_in_sheet(out, how):
    """Whatever separator and line ends it was saved with, in whatever order of rows."""
    fill(out / "r2.csv", lambda lines: [lines[0], *lines[:0:-1], [""] * 8], **how)
    name, answers = read_sheet(out / "r2.csv", read_key(out / "key.json", "own"), FORM)
    assert name == "r2" and sorted(answers) == ["r001", "r002", "r003"]
    assert answers["r002"] == {"label": "a", "sure": "yes", "comment": "so"}


def test_line_ends_inside_cells_and_case_of_labels_do_not_count(out):
    other = lambda line: [*(text.replace("\n", "\r\n") for text in line[:-3]), " TIE ", "No", ""]
    path = fill(out / "r1.csv", lambda lines: [lines[0], *map(other, lines[1:])])
    _, answers = read_sheet(path, read_key(out / "key.json", "own"), FORM)
    assert answers["r001"] == {"label": "tie", "sure": "no", "comment": ""}


def put(row: int, column: int, text: str):
    """A change of one cell."""

    def change(lines):
        lines[row][column] = text
        return lines

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(2, 3, "better"), ("row r002", "text_a was edited")),
        (put(2, 2, "Problem 1?"), ("row r002", "problem was edited")),
        (lambda lines: [*lines[:2], lines[3]], ("row r002", "is missing (1 in all)")),
        (lambda lines: lines[:1], ("has no rows",)),
        (lambda lines: [*lines, lines[2]], ("row r002", "stands there twice")),
        (put(2, 1, "r099"), ("row r099", "no such row")),
        (put(2, 5, "left"), ("row r002", "label is 'left'", "one of a, b, tie")),
        (put(3, 6, ""), ("row r003", "has no sure", "one of yes, no")),
        (put(2, 0, "r1-k0123"), ("row r002", "is of sheet 'r1-k0123', not of this key")),
        (put(0, 5, "label"), ("no sheet of this kind", "its columns are")),
        (lambda lines: [*lines[:2], lines[2][:-1]], ("7 cells instead of 8", "r002")),
        (lambda lines: [], ("is empty",)),
    ],
)
def test_sheets_that_are_refused(out, change, words):
    """Each names the file and, where there is one, the row."""
    path, key = fill(out / "r1.csv", change), read_key(out / "key.json", "own")
    refused(lambda: read_sheet(path, key, FORM), str(path), *words)


def test_a_quotation_mark_too_many_is_named_by_line(out):
    path, key = fill(out / "r1.csv"), read_key(out / "key.json", "own")
    path.write_text(path.read_text(encoding="utf-8-sig").rstrip() + '\n"so" it is,\n')
    refused(lambda: read_sheet(path, key, FORM), "r1.csv, line ", "look for a quotation mark too many")


def test_what_spreadsheets_add_is_no_matter(out):
    """Empty columns at the end of every line, a quote before what would be a formula."""
    key = read_key(out / "key.json", "own")
    change = lambda lines: [[*line[:-1], "'=so" if i else line[-1], "", ""] for i, line in enumerate(lines)]
    _, answers = read_sheet(fill(out / "r1.csv", change), key, FORM)
    assert {row: answer["comment"] for row, answer in answers.items()} == dict.fromkeys(("r001", "r002", "r003"), "=so")


def test_a_sheet_of_two_raters_or_of_another_key(out, tmp_path_factory):
    key = read_key(out / "key.json", "own")
    other = read_csv(fill(out / "r2.csv"))[2]
    refused(lambda: read_sheet(fill(out / "r1.csv", lambda lines: [*lines[:2], other]), key, FORM), "row r002", "of r1")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, seed=1)
    refused(lambda: read_sheet(fill(elsewhere / "r1.csv"), key, FORM), "row r001", "not of this key")


def test_files_that_are_no_sheets(out):
    key = read_key(out / "key.json", "own")
    refused(lambda: read_sheet(out / "none.csv", key, FORM), "none.csv", "cannot be read")
    (out / "r1.csv").write_bytes("h\u00e9".encode("latin-1"))
    refused(lambda: read_sheet(out / "r1.csv", key, FORM), "UTF-8")


def test_keys_that_are_refused(out):
    path = out / "key.json"
    refused(lambda: read_key(path, "audit"), "is a key of own, not of audit")
    key = json.loads(path.read_text())
    key["sheets"]["r1"]["r001"]["secret"] = 1
    path.write_text(json.dumps(key))
    refused(lambda: read_key(path, "own"), "is not as it was written")
    for text in ("{", "[]", "{}", "[" * 100_000, json.dumps({"id": key_id({})})):
        path.write_text(text)
        refused(lambda: read_key(path, "own"), "no key of sheets")


def test_sheets_are_not_written_over(out):
    refused(lambda: write(out), "key.json is there already")
    (out / "key.json").rename(out / "elsewhere.json")  # where no rater finds it
    refused(lambda: write(out), "r1.csv is there already")


# ---- in a browser ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits(out, chromium, width, dark):
    chromium.errors.clear()
    chromium.open(out / "r1.html", width=width, dark=dark)
    assert chromium.errors == []
    assert chromium.value("document.documentElement.scrollWidth") == width
    light = chromium.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(light) < 60) is dark


def open_unanswered(page, out) -> None:
    """The first sheet, without what another test has answered."""

    def empty() -> bool:  # what one page stores reaches the next one a moment later
        page.open(out / "r1.html")
        page.value("localStorage.clear()")
        return page.value("Object.keys(answers).length === 0")

    wait_until(empty)


def saved(folder):
    """The file that the browser saves, once it is there."""
    path = folder / "saved" / "r1.csv"
    wait_until(path.is_file)
    return path


def test_filled_in_by_keys_and_saved(out, chromium, tmp_path):
    """The table that the browser saves is the sheet, answered: also after the page was closed in between."""
    place = lambda: chromium.value("document.getElementById('place').textContent")
    chromium.errors.clear()
    chromium.save_files_to(tmp_path / "saved")
    chromium.open(out / "r1.html")
    assert chromium.value("document.querySelectorAll('#texts pre')[1].textContent") == HOSTILE.replace("\r\n", "\n")
    chromium.press("b")
    assert place() == "row 1 of 3, 0 answered"  # one question is open
    chromium.press("y")
    assert place() == "row 2 of 3, 1 answered"
    chromium.press("t")
    chromium.press("n")

    def reopened() -> bool:  # what one page stores reaches the next one a moment later
        chromium.open(out / "r1.html", "#row=r003")
        return place() == "row 3 of 3, 2 answered"

    wait_until(reopened)
    chromium.value("document.querySelector('#label input').click()")
    chromium.value("document.getElementById('comment').focus()")
    for letter in "any":  # letters that would answer elsewhere
        chromium.press(letter)
    assert place() == "row 3 of 3, 2 answered"
    chromium.value("document.getElementById('save').click()")
    assert "1 rows have no answer yet" in chromium.value("document.getElementById('said').textContent")
    saved(tmp_path).unlink()
    chromium.value("document.querySelectorAll('#sure input')[1].click()")
    assert chromium.value("document.getElementById('said').textContent") == ""  # the saved table lacks this one
    chromium.press("ArrowLeft")
    chromium.value("document.getElementById('save').click()")
    name, answers = read_sheet(saved(tmp_path), read_key(out / "key.json", "own"), FORM)
    assert name == "r1" and answers == {
        "r001": {"label": "b", "sure": "yes", "comment": ""}, "r002": {"label": "tie", "sure": "no", "comment": ""},
        "r003": {"label": "a", "sure": "no", "comment": "any"},
    }  # fmt: skip
    assert chromium.errors == []


def test_the_next_row_is_read_from_its_beginning(out, chromium):
    chromium.open(out / "r1.html", width=400)
    chromium.value("document.body.style.paddingBottom = '2000px'; scrollTo(0, 900)")
    assert chromium.value("document.getElementById('texts').getBoundingClientRect().top") < 0
    chromium.press("ArrowRight")
    top = chromium.value("document.getElementById('texts').getBoundingClientRect().top")
    bar = "document.querySelector('.move').getBoundingClientRect().bottom"
    assert top >= chromium.value(bar)
    chromium.value(f"scrollBy(0, document.getElementById('texts').getBoundingClientRect().top - {bar} + 40)")
    chromium.press("ArrowRight")  # also where the bar alone hides it
    assert chromium.value("document.getElementById('texts').getBoundingClientRect().top") >= chromium.value(bar)


def test_answers_stay_where_the_browser_keeps_no_more(out, chromium, tmp_path):
    chromium.save_files_to(tmp_path / "saved")
    open_unanswered(chromium, out)
    chromium.press("b")
    chromium.value("Storage.prototype.setItem = () => { throw new Error('full'); }; 0")
    for key in "ytnan":
        chromium.press(key)
    assert "keeps nothing" in chromium.value("document.getElementById('said').textContent")
    chromium.value("document.getElementById('save').click()")
    _, answers = read_sheet(saved(tmp_path), read_key(out / "key.json", "own"), FORM)
    given = [(a["label"], a["sure"]) for a in answers.values()]
    assert given == [("b", "yes"), ("tie", "no"), ("a", "no")]


def test_a_key_that_is_held_answers_one_row(out, chromium):
    """Where there is one question, so that the same letter would answer the next row as well."""
    open_unanswered(chromium, out)
    chromium.value("data.questions.length = columns.length = 1")
    for held in (False, True, True):
        about = {"key": "t", "windowsVirtualKeyCode": ord("T"), "text": "t"}
        chromium.ask("Input.dispatchKeyEvent", type="keyDown", autoRepeat=held, **about)
    assert chromium.value("document.getElementById('place').textContent") == "row 2 of 3, 1 answered"


def test_two_tabs(out, chromium, tmp_path):
    """What another tab answers is here at once, where it says so, and at the next answer and in the saved table where
    it does not."""
    place = lambda: chromium.value("document.getElementById('place').textContent")
    chromium.save_files_to(tmp_path / "saved")
    open_unanswered(chromium, out)
    elsewhere = "(row) => localStorage.setItem(store, JSON.stringify({...stored(), [row]: {label: 'a', sure: 'yes'}}))"
    chromium.value(f"({elsewhere})('r003')")
    chromium.press("b")
    assert place() == "row 1 of 3, 1 answered"
    chromium.press("y")
    assert place() == "row 2 of 3, 2 answered"
    for key in "tn":
        chromium.press(key)
    assert place() == "row 3 of 3, 3 answered"
    other = {row: {"label": "a", "sure": "no"} for row in ("r001", "r002", "r003")}
    chromium.value(f"localStorage.setItem(store, {json.dumps(json.dumps(other))})")
    chromium.value("document.getElementById('save').click()")
    _, answers = read_sheet(saved(tmp_path), read_key(out / "key.json", "own"), FORM)
    assert answers == {row: {**given, "comment": ""} for row, given in other.items()}
    chromium.value(f"({elsewhere})('r002'); dispatchEvent(new StorageEvent('storage'))")
    chromium.press("ArrowLeft")
    assert chromium.value("document.querySelector('[name=sure]:checked').value") == "yes"
    assert chromium.errors == []
