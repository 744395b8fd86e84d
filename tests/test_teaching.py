"""What a teacher is asked and what becomes of its answer: prompts, quotes as spans, leaks, reasons.

pytest tests/test_teaching.py
"""

import dataclasses
import json

import pytest
from examples import PROBLEM, REFERENCE, WRONG, problem_of

from common import teaching
from common.providers import Reply
from common.replay import ERROR_TAGS, parse_quadruple
from common.teaching import (
    LEAK,
    find_quote,
    judge_reply,
    make_prompt,
    normal_form,
    read_answer,
    repair_prompt,
    schema_of,
    widen,
)

LINES = ("All: <<3+5=8>>8.", "Now: <<8+14=22>>22.", "#### 22")
PENS = problem_of("3 and 5 pens, 14 more. All?", *LINES)
Y1 = "\n".join(LINES)
Y0 = "All: <<3+5=8>>8.\nNow: <<8+14=21>>21.\n#### 21"
GOOD = {"attempt": Y0, "wrong_step": "Now: <<8+14=21>>21.", "critique": "8+14 is not 21.",
        "error_tags": ["local_arithmetic"], "revision": Y1}  # fmt: skip


def judge(answer, y0=None, problem=PENS, domain="math", keep=False, stop="end", category=""):
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return judge_reply(problem, domain, y0, Reply(text, None, stop, category), "own", "teacher", keep)


# ---- the prompt -----------------------------------------------------------------------------------------------------
def test_a_prompt_holds_what_the_teacher_needs():
    """Problem and reference, the attempt where one is given, and on a second try why the first was of no use."""
    prompt = make_prompt(PENS, "math", None)
    assert [role for role, _ in prompt.turns] == ["user"] and prompt.schema == schema_of(False)
    user = prompt.turns[0][1]
    assert PENS.x in user and Y1 in user and "Attempt" not in user and "could not be used" not in user
    assert all(f"- {field}: " in prompt.system for field in schema_of(False)["properties"])
    given = make_prompt(PENS, "math", Y0, LEAK)
    assert Y0 in given.turns[0][1] and LEAK in given.turns[0][1] and "attempt" not in given.schema["properties"]
    assert "- attempt:" not in given.system
    code = make_prompt(PROBLEM, "code", None)
    assert "program" in code.system and "####" not in code.system and REFERENCE in code.turns[0][1]
    assert given.bytes() > len(given.turns[0][1].encode()) + len(given.system)
    again = repair_prompt(prompt, "Well.")
    assert [role for role, _ in again.turns] == ["user", "assistant", "user"] and "critique" in again.turns[2][1]


def test_the_schema_is_in_the_subset_that_all_providers_take():
    for given in (False, True):
        schema = schema_of(given)
        assert schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])
    assert schema["properties"]["error_tags"]["items"]["enum"] == list(ERROR_TAGS)


def test_the_digest_is_that_of_the_wording(monkeypatch):
    before = teaching.wording_sha256()
    monkeypatch.setattr(teaching, "AGAIN", "Once more: {reason}")
    assert teaching.wording_sha256() != before


# ---- the answer -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"Gladly.\n```json\n{json.dumps(GOOD, indent=2)}\n```\nDone {{}}.",
        f"<think>{{\"attempt\": 1}}</think>{json.dumps({**GOOD, 'more': 1})}",
        f"{{x}} {{}} {json.dumps(GOOD)}",
    ],
)
def test_answers_are_found(text):
    assert read_answer(text, list(GOOD)) == GOOD


@pytest.mark.parametrize(
    "text",
    ["", "No.", "{", json.dumps(GOOD)[:-9], json.dumps({**GOOD, "critique": 3}), json.dumps([1]), "{" * 5000,
     json.dumps({**GOOD, "error_tags": "x"}), json.dumps({**GOOD, "error_tags": [1]})],
)  # fmt: skip
def test_what_is_no_answer(text):
    assert read_answer(text, list(GOOD)) is None


@pytest.mark.parametrize(
    ("quote", "found", "how"),
    [
        ("Now: <<8+14=21>>21.", "Now: <<8+14=21>>21.", "exact"),
        ("  Now: <<8+14=21>>21.\n", "Now: <<8+14=21>>21.", "exact"),
        ("8.  Now:", "8.\nNow:", "white space"),
        ("now: 21", "Now: <<8+14=21>>21", "normal form"),
        ("**NOW**: 21", "Now: <<8+14=21>>21", "normal form"),
        ("Then: 21", None, "not found"),
        ("", None, "not found"),
        ("...", None, "not found"),
    ],
)
def test_quotes_become_spans(quote, found, how):
    span, said = find_quote(Y0, quote)
    assert said == how and (span and Y0[slice(*span)]) == found


@pytest.mark.parametrize(
    ("y0", "quote", "found"),
    [
        ("1.5+1.5 = 3\n15+15 = 3", "15+15=3", "15+15 = 3"), ("12+3 = 60\n2+3 = 6", "2+3=6", "2+3 = 6"),
        ("12+3 = 60", "2+3=6", None), ("48", "4", None), ("48 and 4.5 or 4", "4", "4"), ("12 + 3", "2 +  3", None),
        ("1.5 + 2 = 3", "1.5+2=3", "1.5 + 2 = 3"), ("So 1,234.", "234", None), ("It is 6. So", "6", "6"),
    ],
)  # fmt: skip
def test_a_quote_cuts_no_number_in_two(y0, quote, found):
    span, _ = find_quote(y0, quote)
    assert (span and y0[slice(*span)]) == found
    if found and y0.count(found) == 1:
        assert span[0] == y0.index(found)


def test_normal_form_maps_every_character_back():
    text = "\ufb01ve \u2212 \u00bd\u00a0<<1=1>> X"
    kept, places = normal_form(text)
    assert len(kept) == len(places) and kept.startswith("five-1") and kept.endswith("x")
    assert [text[i] for i in places][:2] == ["\ufb01", "\ufb01"]
    assert normal_form("<<8+14=21>>")[0] == "<<8+14=21>>"


def test_what_is_flagged_is_a_whole_step():
    assert [Y0[slice(*widen(Y0, (at, at + 3)))] for at in (2, 20)] == ["All: <<3+5=8>>8.", "Now: <<8+14=21>>21."]
    q = judge({**GOOD, "wrong_step": "8+14=21"})
    assert Y0[slice(*q.meta["error_span"])] == "Now: <<8+14=21>>21." and q.meta["span_by_rule"] is True
    assert judge({**GOOD, "wrong_step": "All: <<3+5=8>>8."}).meta["span_by_rule"] is False


# ---- the verdict ----------------------------------------------------------------------------------------------------
def test_a_good_answer_is_a_quadruple():
    q = judge(GOOD)
    assert (q.x, q.y0, q.f, q.y1) == (PENS.x, Y0, GOOD["critique"], Y1)
    expected = {"task_id": "own/x", "horizon": 2, "edit_distance": 2, "error_tags": ["local_arithmetic"],
                "answer": "22", "teacher": "own", "y0_source": "teacher", "span_found": "exact"}  # fmt: skip
    assert {key: q.meta[key] for key in expected} == expected
    assert parse_quadruple(json.dumps(dataclasses.asdict(q)), "here") == q
    given = judge({k: v for k, v in GOOD.items() if k != "attempt"}, y0=Y0 + "\n")
    assert given.y0 == Y0 + "\n"


def test_a_step_that_is_not_found_costs_the_span_alone():
    q = judge({**GOOD, "wrong_step": "The second step."})
    assert (q.meta["error_span"], q.meta["span_found"], q.meta["span_by_rule"]) == (None, "not found", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attempt": Y1}, "the attempt is right"),
        ({"revision": Y0}, "the revision is wrong"),
        ({"attempt": "Now: <<8+14=21>>21.\nSo 21."}, "the attempt states no answer"),
        ({"critique": "It should be 22."}, LEAK),
        ({"critique": "It should be twenty-two, no, twelve."}, LEAK),
        ({"error_tags": ["slip"]}, "no error tag that is known"),
        ({"critique": " \n"}, "an empty critique"),
        ({"revision": ""}, "an empty revision"),
        ({"critique": "half \ud800"}, "text that no replay file holds"),
    ],
)
def test_why_an_answer_makes_none(change, reason):
    assert judge({**GOOD, **change}) == reason


def test_an_answer_in_words_leaks_where_it_is_no_everyday_number():
    twelve = problem_of("3 and 5 pens, 4 more. All?", "All: <<3+5=8>>8.", "Now: <<8+4=12>>12.", "#### 12")
    two = problem_of("3 pens, 1 less. All?", "All: <<3-1=2>>2.", "#### 2")
    of = lambda p, f: {**GOOD, "attempt": "All: <<3+1=4>>4.\n#### 4", "critique": f, "revision": p.reference}
    assert judge(of(twelve, "It is twelve."), problem=twelve) == LEAK
    assert judge(of(two, "The two do not go together."), problem=two).f.startswith("The two")
    assert judge(of(two, "It is 2."), problem=two) == LEAK


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("15", "fifteen"), ("21", "twenty-one"), ("21", "Twenty one"), ("72", "seventy-two"), ("100", "one hundred"),
        ("100", "a hundred"), ("150", "a hundred and fifty"), ("1250", "one thousand two hundred fifty"),
        ("12", "a dozen"), ("24", "two dozen"), ("6", "half a dozen"), ("5000000", "5 million"),
        ("5000000", "five million"), ("1000", "1k"), ("1234", "1 234"), ("1234", "1\u2009234"), ("1234", "1\u202f234"),
        ("1234567", "1 234 567"),
        ("72", "7200%"), ("0.5", "50%"), ("0.5", "50 percent"), ("1/2", "one half"), ("3/4", "three quarters"),
        ("-5", "minus five"), ("72", "_72_"), ("72", "**72**"), ("24", "12*2"), ("24", "12 x 2"), ("24", "12 \u00d7 2"),
        ("72", "48+24"), ("72", "48 plus 24"), ("72", "(48 + 24)"), ("9", "4 + 5"), ("1/2", "\u00bd"),
    ],
)  # fmt: skip
def test_an_answer_in_other_words_leaks(answer, said):
    problem = dataclasses.replace(problem_of("A sum?", "It is.", "#### 1"), answer=answer)
    y0 = "<<1+1=3>>3\n#### 31"
    quadruple = {**GOOD, "attempt": y0, "revision": f"#### {answer}"}
    for text in (f"It should be {said}.", f"Not 31 but {said}", f"{said} is right."):
        assert judge({**quadruple, "critique": text}, problem=problem) == LEAK


@pytest.mark.parametrize(
    ("answer", "critique"),
    [
        ("9", "Nine pens are not eight."), ("2", "The two steps do not go together, as one of them is wrong."),
        ("22", "8+14 is not 21."), ("22", "8 plus 14 is not 21."), ("8", "Look at 3 + 5 again, and at the half of it."),
        ("20", "The one in the second line is wrong."), ("100", "Hundredths are meant."), ("12", "Count the dozens."),
        ("3", "One and two are mixed up."), ("1/2", "Half of the step is missing."), ("7", "It takes 10 from 2."),
        ("30", "Three of the ten are left out."), ("60", "Twenty, three times."), ("5", "Step five is fine."),
    ],
)  # fmt: skip
def test_what_a_critique_may_say(answer, critique):
    """Everyday words; what problem and attempt hold already."""
    problem = dataclasses.replace(problem_of("3 + 5 pens?", "It is.", "#### 1"), answer=answer)
    quadruple = {**GOOD, "attempt": "Now: <<8+14=21>>21.\n#### 41", "revision": f"#### {answer}"}
    assert judge({**quadruple, "critique": critique}, problem=problem).f == critique


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize(
    ("critique", "leaky"),
    [("It should be R = r-b.", True), ("Write  r=r - b.", True), ("r = r + b adds.", False), ("It adds b.", False),
     ("You want max(0, r ).", True), ("Return is where it goes wrong, r.", False)],
)  # fmt: skip
def test_a_line_of_the_right_program_leaks_in_any_case(critique, leaky):
    """And without its `return`."""
    right = REFERENCE.replace("return r", "return max(0, r)")
    answer = {**GOOD, "attempt": WRONG, "revision": REFERENCE, "critique": "No."}
    q = judge(answer, problem=PROBLEM, domain="code")
    assert teaching.gives_line(dataclasses.replace(q, f=critique, y1=right)) == leaky


@pytest.mark.parametrize(
    ("stop", "category", "reason"),
    [("refused", "frontier_llm", "refused (frontier_llm)"), ("refused", "", "refused"),
     ("pause_turn", "", "ended with pause_turn"), ("cut off", "", "cut off at the token limit")],
)  # fmt: skip
def test_how_an_answer_ended_comes_first(stop, category, reason):
    assert judge(GOOD, stop=stop, category=category) == reason


def test_unverified_ones_are_kept_on_request():
    q = judge({**GOOD, "revision": Y0}, keep=True)
    assert (q.meta["verified"], q.meta["y0_correct"], q.meta["y1_correct"]) == (False, False, False)


@pytest.mark.usefixtures("confined")
def test_programs_are_run_and_taken_out_of_their_fences():
    fence = lambda program: f"```python\n{program}\n```"
    answer = {**GOOD, "attempt": fence(WRONG), "revision": REFERENCE, "wrong_step": "r = r + b"}
    q = judge(answer, problem=PROBLEM, domain="code")
    assert (q.y0, q.y1) == (WRONG, REFERENCE) and q.y0[slice(*q.meta["error_span"])] == "r = r + b"
    assert q.meta["tests"] == PROBLEM.tests and q.meta["difficulty"] == "easy" and q.meta["horizon"] == 4
    assert judge({**answer, "attempt": REFERENCE}, problem=PROBLEM, domain="code") == "the attempt is right"
    assert judge({**answer, "revision": WRONG}, problem=PROBLEM, domain="code") == "the revision is wrong"
    endless = "def calc(a, b):\n    while True:\n        pass"
    assert "does not end" in judge({**answer, "attempt": endless}, problem=PROBLEM, domain="code")
    assert judge({**answer, "critique": "Write r = r - b there."}, problem=PROBLEM, domain="code") == LEAK
