"""The report as one file: what is in it, hostile texts, its size; and driven in a browser, where there is one.

pytest tests/test_page.py
"""

import html.parser
import io
import json
import math
import re

import matplotlib.figure
import pytest
from browser import browser

from common.page import MOST_BYTES, Table, fitting, pixels_across, render, shown_problem, write_page

HOSTILE = (
    "</script><script>document.title='owned'</script><!-- \"'&lt;\u2028\u2029 \U0001f600 <img src=x onerror=alert(1)>"
)
PNG = b"\x89PNG\r\n\x1a\n"
QUESTION, ANSWER = "Is it so?", "Undecided: +1.0 [-2.0, 4.0]."
TABLE = Table(
    "Accuracy", ["method", "revised", "verdict"], [["B3", "41.0 [40.1, 42.2]", "-"], ["B5", "43.5", "yes"]], "Percent."
)
ABOUT = {"fingerprint": {"base": "ab12", "decode": {"T": 3}}, "commands": ["python b5_cts.py <x>"],
         "versions": {"jax": "0.1"}, "note": "Revisions of seed 0."}  # fmt: skip


def problem(i: int, task: str = "one", ours: float | None = 1.0, theirs: float | None = 0.0, **fields) -> dict:
    base = {
        "task": task, "task_id": f"{task}/{i}", "x": f"Problem {i}?", "y0": "2+3=6\n#### 6", "span": [0, 5],
        "f": "2+3 is not 6.", "horizon": 2, "outcomes": {"b3": theirs, "b5": ours},
        "texts": {"b3": "2+3=6\n#### 6", "b5": "2+3=5\n#### 5"}, "shown": {"b3": 0.0, "b5": 1.0},
    }  # fmt: skip
    return {**base, **fields}


def problem_of(text: str) -> dict:
    """A problem with a text in all places."""
    return problem(0, x=text, y0=f"\U0001f600 {text} end", span=[2, 2 + len(text)], f=text,
                   texts={"b3": text, "b5": "half \ud800, none \0"})  # fmt: skip


PROBLEMS = [
    problem_of(HOSTILE), problem(1), problem(2, ours=0.0, theirs=1.0), problem(3, "two", ours=0.6, theirs=0.4),
    problem(4, "two", ours=None, theirs=math.nan, span=None, x="A needle?"),
]  # fmt: skip


def write(path, problems=PROBLEMS, tables=(TABLE,), plots=None):
    plots = {"Curves": PNG} if plots is None else plots
    write_page(path, QUESTION, ANSWER, list(tables), plots, problems, ABOUT)
    return path


class Parts(html.parser.HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data


# ---- the file -------------------------------------------------------------------------------------------------------
def test_same_content_same_bytes(tmp_path):
    assert write(tmp_path / "a.html").read_bytes() == write(tmp_path / "b.html").read_bytes()


def test_hostile_texts_stay_texts(tmp_path):
    """They make no element and no attribute, wherever they stand: the page has those of harmless texts. In JSON they
    are as they were; half a surrogate pair, which no file can hold, is a question mark outside of it."""

    def page(text: str) -> str:
        table, about = (
            Table(text, [text], [[text]], text),
            {"fingerprint": {text: text}, "commands": [text], "note": text},
        )
        path = tmp_path / "page.html"
        write_page(path, text, text, [table], {text: PNG}, [problem_of(text)], about)
        return path.read_text(encoding="utf-8")

    text = page(HOSTILE)
    parts, harmless = Parts(text), Parts(page("harmless"))
    names = lambda parts: [(tag, list(attributes)) for tag, attributes in parts.elements]
    assert names(parts) == names(harmless)
    assert "broken ?" in page("broken \ud800")
    data = json.loads(parts.scripts[0])
    assert data["problems"][0]["x"] == HOSTILE and data["problems"][0]["y0"] == ["\U0001f600 ", HOSTILE, " end"]
    assert data["problems"][0]["texts"]["b5"] == "half \ud800, none \0"
    assert parts.scripts[0].isascii() and "<" not in parts.scripts[0]


def test_nothing_is_fetched(tmp_path):
    """No address in it, and a policy that lets none be asked."""
    text = write(tmp_path / "page.html", [problem(1)], [Table("T", ["a"], [["1"]])], {"Curves": PNG}).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|srcset", text)
    sources = [attributes["src"] for _, attributes in Parts(text).elements if "src" in attributes]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "default-src 'none'" in text


def test_question_answer_and_the_end_are_readable_without_scripts(tmp_path):
    text = write(tmp_path / "page.html").read_text()
    order = [text.index(part) for part in (
        f"<h1>{QUESTION}", ANSWER, ">Accuracy</h3>", "data:image", 'id="problems"', "python b5_cts.py &lt;x&gt;",
        ">ab12</td>", ">{&#34;T&#34;: 3}</td>", ">0.1</td>",
    )]  # fmt: skip
    assert order == sorted(order)
    assert "5 problems. Revisions of seed 0." in text


def test_parts_that_are_not_there_leave_no_heading(tmp_path):
    write_page(tmp_path / "page.html", QUESTION, ANSWER, [], {}, [], {})
    text = (tmp_path / "page.html").read_text()
    for part in ("tables", "plots", "problems", "facts1"):
        assert f'id="{part}"' not in text


def test_columns_of_numbers():
    assert TABLE.numbers == [False, True, False]
    cells = ["12.5", "\u22121.0 \u00b1 0.3", "n/a", "\u2013", "", "1,319", "< 0.001", "95 %", "[1.0, 2.0]",
             "\u22121.1 to +3.9", "0.05 \u00b1 0.1 (n=51)"]  # fmt: skip
    assert Table("", ["a", "b"], [[cell, cell and f"B{cell}"] for cell in cells]).numbers == [True, False]
    assert Table("", ["a", "b"], [["1 to", "to 1"]]).numbers == [False, False]
    assert Table("", ["a"], []).numbers == [False]


def test_a_problem_as_the_script_takes_it():
    shown = shown_problem(problem(1, ours=math.nan, theirs=0.5, span=[6, 10]))
    assert shown["y0"] == ["2+3=6\n", "####", " 6"]
    assert shown["outcomes"] == {"b3": 0.5, "b5": None}
    assert shown_problem(problem(1, span=None))["y0"] == ["2+3=6\n#### 6", "", ""]


def test_size_of_the_paper_matrix(tmp_path):
    """Six methods, 150 problems of programs, six plots: below 5 MB. Of 1,200 such problems as many as keep it so."""
    texts = {f"b{i}": "    x = f(x) < 3\n" * 60 for i in range(6)}
    plots = {f"Plot {i}": bytes(95_000) for i in range(6)}
    long = lambda i: problem(i, x="What? " * 200, outcomes=dict.fromkeys(texts, 0.2), texts=texts)
    size = write(tmp_path / "a.html", [long(i) for i in range(150)], plots=plots).stat().st_size
    assert 1_000_000 < size < MOST_BYTES
    page = write(tmp_path / "b.html", [long(i) for i in range(1200)], plots=plots)
    assert 4_000_000 < page.stat().st_size < 5_000_000
    shown, total = re.search(r"(\d+) of (1,200) problems, drawn by the digest", page.read_text()).groups()
    assert len(json.loads(Parts(page.read_text()).scripts[0])["problems"]) == int(shown) > 150


def test_what_is_left_out_knows_nothing_of_outcomes():
    some = [shown_problem(problem(i)) for i in range(40)]
    other = [shown_problem(problem(i, ours=0.0, theirs=1.0)) for i in range(40)]
    chosen = fitting(some, 3000)
    assert 5 < len(chosen) < 20 and chosen != some[: len(chosen)]
    assert [p["task_id"] for p in chosen] == [p["task_id"] for p in fitting(other, 3000)]
    assert [p["task_id"] for p in chosen] == [p["task_id"] for p in some if p in chosen]
    assert fitting(some, 10**6) == some


def test_a_problem_that_is_too_large_hides_no_other(tmp_path):
    large = [problem(i, x="x" * 5_000_000 if i == 3 else "x") for i in range(6)]
    page = write(tmp_path / "a.html", large).read_text()
    assert "5 of 6 problems, drawn by the digest" in page
    assert [p["task_id"] for p in json.loads(Parts(page).scripts[0])["problems"]] == [
        large[i]["task_id"] for i in (0, 1, 2, 4, 5)
    ]
    assert "0 of 1 problems" in write(tmp_path / "b.html", large[3:4]).read_text()


def test_why_no_problem_is_shown_stands_there(tmp_path):
    assert ABOUT["note"] in write(tmp_path / "a.html", []).read_text()


def test_render_wants_every_field():
    with pytest.raises(Exception, match="undefined"):
        render("report", {"methods": [], "problems": []})


# ---- in a browser ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def picture(inches: float) -> bytes:
    """An empty plot so many hundred pixels wide."""
    out = io.BytesIO()
    matplotlib.figure.Figure((inches, 3), dpi=100).savefig(out, format="png")
    return out.getvalue()


@pytest.mark.parametrize("width, narrow, wide", [(400, 480, 1104), (1280, 552, 1104)])
def test_plots_are_large_enough_to_read(chromium, tmp_path, width, narrow, wide):
    """Two of one panel stand side by side where there is room, one of three has a row; none is shrunk to the screen."""
    plots = {"one": picture(7.6), "two": picture(7.6), "panels": picture(13.8)}
    chromium.open(write(tmp_path / "page.html", plots=plots), width=width)
    assert pixels_across(plots["panels"]) == 1380
    shown = chromium.value("[...document.querySelectorAll('figure img')].map(i => i.getBoundingClientRect().width)")
    assert shown == [pytest.approx(narrow, abs=8)] * 2 + [pytest.approx(wide, abs=8)]
    tops = chromium.value("[...document.querySelectorAll('figure')].map(i => i.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) is (width == 1280) and tops[2] > tops[1]
    whole = "(box => box.scrollWidth <= box.clientWidth)(document.querySelector('.wide .scroll'))"
    assert chromium.value(whole) is (width == 1280)  # the row is its own
    assert chromium.value("document.documentElement.scrollWidth") == width


def test_on_paper_nothing_is_cut(chromium, tmp_path):
    """A4 across, less its margins, is 1,047 pixels wide: there a table of fourteen columns and wide plots end."""
    head = ["fixtures_code: b4_grpo_critique − b3_grpo_verifier (primary)", *["+46.4 to +57.4"] * 13]
    plots = {"one": picture(7.6), "panels": picture(13.8)}
    chromium.open(write(tmp_path / "page.html", tables=[Table("T", head, [head])], plots=plots), width=1047)
    cut = "[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth > box.clientWidth)"
    assert chromium.value(cut)[0]
    chromium.ask("Emulation.setEmulatedMedia", media="print")
    try:
        assert not any(chromium.value(cut))
        assert chromium.value("getComputedStyle(document.querySelector('.filters')).display") == "none"
    finally:
        chromium.ask("Emulation.setEmulatedMedia", media="")


@pytest.fixture
def report(chromium, tmp_path):
    """A function that opens a report: report(anchor, width=, dark=)."""
    path = write(tmp_path / "page.html")

    def open_it(anchor: str = "", **how):
        chromium.errors.clear()
        chromium.open(path, anchor, **how)
        return chromium

    return open_it


def place(page) -> str:
    return page.value("document.getElementById('place').textContent")


def shown(page) -> str:
    """What stands in the browser of problems, without what is for screen readers alone."""
    return page.value("document.getElementById('problem').innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_is_dark_where_that_is_wanted(report, width, dark):
    """The page does not scroll sideways, wide tables do so in their box; nothing is refused by the policy."""
    page = report(width=width, dark=dark)
    assert page.errors == []
    assert page.value("document.title") == QUESTION
    assert page.value("document.documentElement.scrollWidth") == width
    light = page.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(light) < 60) is dark
    boxes = "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth, b.clientWidth])"
    assert all(inside < width for _, inside in page.value(boxes))


def test_hostile_problem_in_the_browser(report):
    page = report()
    assert page.value("[...document.querySelectorAll('#problem pre')].map(p => p.textContent)[0]") == HOSTILE
    assert page.value("document.querySelector('#problem mark').textContent") == f"[flagged step: {HOSTILE}] "
    assert page.value("document.querySelectorAll('#problem img, #problem script').length") == 0


def test_next_and_previous_by_keys_and_buttons_and_in_the_address(report):
    page = report()
    assert place(page) == "1 of 5"
    page.press("ArrowRight")
    assert place(page) == "2 of 5" and "Problem 1?" in shown(page)
    page.value("document.getElementById('next').click()")
    assert place(page) == "3 of 5"
    page.wait("location.hash.includes('p=one%2F2')")
    for _ in range(3):
        page.press("ArrowLeft")
    assert place(page) == "5 of 5"  # round to the end
    page.value("document.querySelector('.scroll').focus()")  # there the arrows scroll
    page.press("ArrowRight")
    assert place(page) == "5 of 5"
    page.value("document.activeElement.blur(); document.querySelector('#problem').style.marginTop = '3000px'")
    page.value("document.querySelector('main').style.paddingTop = '3000px'; scrollTo(0, 0)")
    page.press("ArrowRight")  # nor does anything move that nobody sees
    assert place(page) == "5 of 5"
    page.choose("jump", "1")
    assert place(page) == "2 of 5"
    assert page.errors == []


def test_steps_that_come_while_the_address_is_written_are_not_lost(report):
    """News of an address that the page wrote itself comes when the next problem is shown already."""
    page = report()
    twice = "move(1); setTimeout(() => { move(1); setTimeout(done, 600); }, 150)"
    page.value(f"new Promise((done) => {{ {twice}; }})")
    assert place(page) == "3 of 5"


def test_an_address_opens_a_problem_with_its_filter(report):
    page = report("#p=two%2F3&method=b3&outcome=worse%3Ab5")
    assert place(page) == "3 of 3" and "Problem 3?" in shown(page)
    assert page.value("document.getElementById('method').value") == "b3"
    page.value("location.hash = 'p=one%2F2&outcome=right&method=b5'")  # which that filter would hide
    page.wait("document.getElementById('place').textContent === '3 of 5'")
    page.value("location.hash = 'tables'")  # a part of the page is no problem
    assert place(page) == "3 of 5"
    page.value("location.hash = 'p=gone'")
    page.wait("document.getElementById('place').textContent === 'That problem is not in this report. 1 of 5'")


def test_filters(report):
    page = report()
    page.choose("task", "two")
    assert place(page) == "1 of 2"
    page.choose("method", "b5")
    page.choose("outcome", "mixed")
    assert place(page) == "1 of 1" and "right in 60 % of seeds, in this one" in shown(page)
    assert "right in 40 % of seeds, not in this one" in shown(page)
    page.choose("outcome", "unscored")
    assert place(page) == "1 of 1" and "not scored" in shown(page) and "no step flagged" in shown(page)
    page.choose("task", "")
    page.choose("outcome", "better:b3")
    assert place(page) == "1 of 3"
    page.choose("outcome", "")
    page.choose("words", "NEEDLE  two/4 a")  # each of the words, wherever it stands
    assert place(page) == "1 of 1"
    page.wait("location.hash.includes('words=NEEDLE++two')")
    page.choose("words", "no such text")
    assert place(page) == "No problem fits the filter." and page.value("document.getElementById('next').disabled")
    page.press("ArrowRight")
    page.choose("words", "")
    assert place(page) == "5 of 5"  # the problem that was shown last
    assert page.errors == []


def test_new_lines_of_a_revision_are_set_off(report):
    page = report("#p=one%2F1")
    assert page.value("[...document.querySelectorAll('#problem ins')].map(i => i.textContent)") == ["2+3=5", "#### 5"]


def test_the_keyboard_reaches_everything_and_one_sees_where_it_is(report):
    """First a link past the head; then every control, each with an outline and a name."""
    page = report()
    page.press("Tab")
    assert page.value("document.activeElement.textContent") == "Skip to the answer"
    assert page.value("document.activeElement.getBoundingClientRect().left") >= 0
    page.press("Enter")
    assert page.value("document.activeElement.id") == "answer"
    seen = []
    for _ in range(30):
        page.press("Tab")
        seen.append(page.value("document.activeElement.id || document.activeElement.className"))
        if seen[-1] == "jump":
            break
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen
    assert [s for s in seen if s in ("scroll", "task", "method", "outcome", "words", "previous", "next", "jump")] == [
        "scroll", "scroll", "task", "method", "outcome", "words", "previous", "next", "jump",
    ]  # fmt: skip  # the table, the plot
    assert page.value("document.getElementById('place').getAttribute('aria-live')") == "polite"
