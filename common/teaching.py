"""What a teacher is asked and what becomes of its answer: the prompt and the schema, the quoted step as a span of y0,
the leak check, the verdict, the reasons of a rejection. Used by taught; knows no provider and sends nothing.

A quadruple is kept if the verifier scores y0 wrong and y1 right and the critique does not say what the revision has to
say. Nothing that a teacher claims about itself is believed.
"""

import dataclasses
import json
import re
import unicodedata
from fractions import Fraction
from typing import Any

from common.answers import final_answers, score_math
from common.basics import InputError, sha256
from common.mistakes import NUMBER_WORDS, count_steps
from common.mutants import count_statements
from common.plans import parse_program
from common.programs import grade, program_of
from common.providers import Prompt, Reply
from common.replay import ERROR_TAGS, Problem, Quadruple, assign_split, edit_distance, leaks, parse_quadruple
from common.values import read_value
from common.verifier import evaluate_arithmetic, first_wrong_step, numbers_in, split_steps, to_fraction

LEAK = "the critique gives the answer away"
SPANS = ("exact", "white space", "normal form", "not found")  # how a quote was found in y0

SYSTEM = """You write exercises in which a student finds and repairs the mistake in a worked solution.
{task}
Write down:
{fields}"""
GIVEN = "You are given a problem, its reference solution and a student's attempt that is wrong."
NOT_GIVEN = "You are given a problem and its reference solution."
MATH = {
    "attempt": "a student's attempt at the problem, in the format of the reference solution: one step a line, the "
    "answer behind #### on the last line. One step of it is wrong, as students go wrong; the later steps go on from "
    "its wrong result, so the answer is wrong too. No word in it says that it is wrong.",
    "wrong_step": "the first wrong step of the attempt: its whole line, copied letter by letter.",
    "critique": "one or two sentences to the student: which step is wrong, and why. They give away neither the answer "
    "of the problem nor the right result of any step; the student has to work that out.",
    "error_tags": "what kind of mistake it is.",
    "revision": "the attempt repaired, in the same format: what is right is kept as it stands, the wrong step and what "
    "follows from it are put right, the answer stands behind #### on the last line.",
}
CODE = {
    "attempt": "a student's program for the problem, as plain text without a fence. One place in it is wrong, as "
    "students go wrong, so that it fails on some input. No word in it says that it is wrong.",
    "wrong_step": "the wrong line of the attempt, copied letter by letter.",
    "critique": "one or two sentences to the student: which line is wrong, and why. They hold no piece of the right "
    "program; the student has to work that out.",
    "error_tags": "what kind of mistake it is.",
    "revision": "the attempt repaired: the whole program as plain text without a fence, with no more changed than has "
    "to be.",
}
USER = "Problem:\n{x}\n\nReference solution:\n{reference}\n"
ATTEMPT = "\nAttempt:\n{y0}\n"
AGAIN = "\nYour former answer could not be used: {reason}. Answer again, without that flaw.\n"
REPAIR = "That is not one JSON object with the fields {fields}. Give the same answer again as that JSON object alone."


def schema_of(given: bool) -> dict[str, Any]:
    """The JSON schema of an answer, in the subset that all providers take; without the attempt where one is given."""
    text = {"type": "string"}
    tags = {"type": "array", "items": {"type": "string", "enum": list(ERROR_TAGS)}}
    fields = {"attempt": text, "wrong_step": text, "critique": text, "error_tags": tags, "revision": text}
    if given:
        del fields["attempt"]
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def make_prompt(problem: Problem, domain: str, y0: str | None, reason: str | None = None) -> Prompt:
    """The prompt for a problem, around an attempt where one is given; `reason`: why the last answer was rejected."""
    wording, schema = MATH if domain == "math" else CODE, schema_of(y0 is not None)
    fields = "\n".join(f"- {name}: {wording[name]}" for name in schema["properties"])
    system = SYSTEM.format(task=NOT_GIVEN if y0 is None else GIVEN, fields=fields)
    user = USER.format(x=problem.x, reference=problem.reference)
    user += ("" if y0 is None else ATTEMPT.format(y0=y0)) + (AGAIN.format(reason=reason) if reason else "")
    return Prompt(system, (("user", user),), schema)


def repair_prompt(prompt: Prompt, said: str) -> Prompt:
    """The one further request after an answer that is not in form."""
    again = REPAIR.format(fields=", ".join(prompt.schema["properties"]))
    return dataclasses.replace(prompt, turns=(*prompt.turns, ("assistant", said), ("user", again)))


def wording_sha256() -> str:
    """Digest of all that a prompt is made of."""
    parts = [SYSTEM, GIVEN, NOT_GIVEN, MATH, CODE, USER, ATTEMPT, AGAIN, REPAIR, schema_of(False)]
    return sha256(json.dumps(parts))


# ---- the answer -----------------------------------------------------------------------------------------------------
def read_answer(text: str, fields: list[str]) -> dict[str, Any] | None:
    """The JSON object of an answer that has all of `fields`, texts and a list of texts; None where there is none. It
    may stand in a fence or among words, as that of a server without structured output does.

    >>> read_answer('Sure:\\n{"critique": "No.", "error_tags": []}', ["critique", "error_tags"])
    {'critique': 'No.', 'error_tags': []}
    """
    decoder, found = json.JSONDecoder(), None
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    places = [m.start() for m in re.finditer(r"\{", text)][:50]
    for at in places:
        try:
            found, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        kinds = {field: list if field == "error_tags" else str for field in fields}
        good = isinstance(found, dict) and all(isinstance(found.get(field), kind) for field, kind in kinds.items())
        if good and all(isinstance(tag, str) for tag in found["error_tags"]):
            return {field: found[field] for field in fields}
    return None


_ALIKE = str.maketrans("\u2212\u2013\u2014\u00f7", "---/")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def normal_form(text: str) -> tuple[str, list[int]]:
    """What of a text any way of writing it down has, and where each character of it stands: letters, digits,
    signs and points in numbers, in one case and one form; no white space, mark-up (stars, too), calculator annotation.

    >>> normal_form("**So** 2 \u00d7 3 = <<2*3=6>>6.")[0]
    'so23=6'
    """
    hidden = {i for m in _ANNOTATION.finditer(text) for i in range(*m.span())}
    if len(hidden) == len(text.strip()):  # nothing else is there
        hidden = set()
    kept, places = [], []
    for i, letter in enumerate(text):
        for c in "" if i in hidden else unicodedata.normalize("NFKC", letter).translate(_ALIKE).casefold():
            inside = c == "." and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit()
            if c.isalnum() or c in "+-/=%<>" or inside:
                kept.append(c)
                places.append(i)
    return "".join(kept), places


def find_quote(y0: str, quote: str) -> tuple[tuple[int, int] | None, str]:
    """(characters of y0 that a quote is of, how it was found): as it is, up to white space, in normal form, or not.

    >>> find_quote("So 2+3 = 6.", "2+3  =\\n6"), find_quote("So 2+3 = 6.", "2 + 3 = 6"), find_quote("So", "No")
    (((3, 10), 'white space'), ((3, 10), 'normal form'), (None, 'not found'))
    """
    quote = quote.strip()
    if not quote:
        return None, "not found"
    for how, pattern in (("exact", re.escape(quote)), ("white space", r"\s+".join(map(re.escape, quote.split())))):
        for m in re.finditer(pattern, y0):
            if not cuts_number(y0, *m.span()):
                return m.span(), how
    (text, places), (wanted, _) = normal_form(y0), normal_form(quote)
    at = text.find(wanted) if len(wanted) >= 3 else -1
    while at >= 0:
        span = places[at], places[at + len(wanted) - 1] + 1
        if not cuts_number(y0, *span):
            return span, "normal form"
        at = text.find(wanted, at + 1)
    return None, "not found"


def cuts_number(text: str, start: int, end: int) -> bool:
    """Does a span begin or end inside a number, as 2+3 = 6 does in 12+3 = 60?"""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    begins = text[start].isdigit() and re.search(r"\d[.,]?\Z", before)
    return bool(begins or (text[end - 1].isdigit() and re.match(r"[.,]?\d", after)))


def widen(y0: str, span: tuple[int, int]) -> list[int]:
    """The first step of a math attempt that a span touches, as a whole: what is flagged is a step."""
    step = next((s for s in split_steps(y0) if s.start < span[1] and s.end > span[0]), None)
    return [step.start, step.end] if step else list(span)


# ---- what a critique gives away, beyond what `leaks` finds -----------------------------------------------------------
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {"one": 1, **NUMBER_WORDS} | {word: n for n, word in enumerate(_TEENS.split(), 13)}
_SMALL |= {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}
_TIMES = {"hundred": 100, "dozen": 12, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4,
          "fifth": 5, "fifths": 5, "tenth": 10, "tenths": 10}  # fmt: skip
_WORD = "|".join(sorted([*_SMALL, *_TIMES, *_PARTS, "a", "minus", "negative"], key=len, reverse=True))
_WORDS = re.compile(rf"\b(?:{_WORD})\b(?:(?:\s|-|\sand\s)(?:{_WORD})\b)*")
_FIGURE = r"\d+(?:,\d{3})*+(?:\.\d+)?"
_SCALED = re.compile(rf"(?<![\w.])({_FIGURE})(?:([kmb]|bn)\b|[\s-]?({'|'.join(_TIMES)})s?\b|\s?(%|per\s?cent))")
_SPACED = re.compile(r"(?<![\w.,])\d{1,3}(?: \d{3})+(?![\d,])")
_ARITHMETIC = re.compile(rf"\(*\$?{_FIGURE}%?\)*(?:\s?[-+*/x]\s?\(*\$?{_FIGURE}%?\)*)+")
_SIGNS = {"times": "*", "multiplied by": "*", "plus": "+", "minus": "-", "divided by": "/", "over": "/"}
_LETTERS = {"k": 10**3, "m": 10**6, "b": 10**9, "bn": 10**9}


def plain(text: str) -> str:
    """A text in one case and one form: spaces of any width, signs in ASCII, no marks of emphasis around words."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_ALIKE).translate({0xD7: "*", 0x2044: "/"})
    return re.sub(r"(?<![a-z0-9])_+|_+(?![a-z0-9])|`|\*\*+|(?<!\S)\*(?=\S)|(?<=\w)\*(?!\s*[\w($])", "", text)


def spelled_out(text: str) -> set[Fraction]:
    """The numbers that a text in plain form says in words. Those up to ten, said by one word, are everyday words, and
    count as figures alone.

    >>> sorted(map(str, spelled_out("a hundred and fifty, twenty-one, nine, two dozen, minus five, one half")))
    ['-5', '1/2', '150', '21', '24']
    """
    found = set()
    for m in _WORDS.finditer(text):
        total, now, sign, said = 0, 0, 1, 0  # thousands, what is below them, how many words
        for word in [*(w for w in re.findall("[a-z]+", m.group()) if w != "and"), "."]:
            if word in _PARTS:  # "half a dozen" is six
                now = Fraction(now or 1, _PARTS[word])
            elif _TIMES.get(word, 0) > 100:
                total, now = total + (now or 1) * _TIMES[word], 0
            elif word in _TIMES:
                now = (now or 1) * _TIMES[word]
            elif word in _SMALL and (now % 100 == 0 or (now % 10 == 0 and now % 100 > 10 > _SMALL[word])):
                now += _SMALL[word]
            elif word != "a":  # the number has ended
                if total + now > 10 or (said > 1 and total + now):
                    found.add(sign * Fraction(total + now))
                total, now, sign, said = 0, _SMALL.get(word, 0), -1 if word in ("minus", "negative") else 1, 0
            said += 1
    return found


def gives_value(q: Quadruple) -> bool:
    """Does a critique say the final answer in another way than as a figure: in words, scaled ("5 million", "7200%"), or
    as closed arithmetic that neither problem nor attempt holds?"""
    f, squeeze = plain(q.f), lambda text: re.sub(r"[\s$,]", "", text)
    said = spelled_out(f) | {to_fraction(m.group().replace(" ", "")) for m in _SPACED.finditer(f)}
    for number, letter, word, percent in _SCALED.findall(f):
        said.add(to_fraction(number) * (Fraction(1, 100) if percent else _LETTERS.get(letter) or _TIMES[word]))
    said |= set(numbers_in(f))  # as figures, but for emphasis
    signed = lambda text: re.sub("|".join(_SIGNS), lambda m: _SIGNS[m.group()], plain(text))
    there = squeeze(signed(f"{q.x}\n{q.y0}"))
    for m in _ARITHMETIC.finditer(signed(f)):
        expr = m.group()
        if not re.search(rf"(?<![\d.]){re.escape(squeeze(expr).strip('()'))}(?![\d.]*\d)", there):
            said |= {evaluate_arithmetic(expr), evaluate_arithmetic(expr.strip("()"))}
    return read_value(q.meta["answer"]).number in said


def gives_line(q: Quadruple) -> bool:
    """Does a critique hold a line of the right program, whatever its case and white space, or what it returns? What
    stands in the attempt, too, gives nothing away."""
    for line in {line.strip() for line in q.y1.split("\n")} - {line.strip() for line in q.y0.split("\n")}:
        tokens = re.findall(r"\w+|[^\w\s]", line)
        returned = tokens[1:] if tokens[:1] == ["return"] else tokens
        if len(returned) < 3 or (len(line) <= 5 and returned is tokens):
            continue
        ends = [r"\b" if re.match(r"\w", token) else "" for token in (returned[0], returned[-1])]
        pattern = re.compile(r"\s*".join(map(re.escape, returned)).join(ends), re.IGNORECASE)
        if pattern.search(q.f) and not pattern.search(q.y0):
            return True
    return False


# ---- the verdict ----------------------------------------------------------------------------------------------------
def why_not(reply: Reply) -> str | None:
    """Why an answer is none, by how it ended."""
    if reply.stop == "refused":
        return f"refused ({reply.category})" if reply.category else "refused"
    if reply.stop == "cut off":
        return "cut off at the token limit"
    return None if reply.stop == "end" else f"ended with {reply.stop}"


def scores(problem: Problem, domain: str, y0: str, y1: str) -> tuple[bool, bool] | str:
    """Are y0 and y1 right? A reason where that cannot be said. Programs are run: this may take seconds."""
    if domain == "math":
        return score_math(y0, problem.answer) == 1, score_math(y1, problem.answer) == 1
    first, second = grade([y0, y1], [problem.tests] * 2)
    if "harness_error" in (first.outcome, second.outcome):
        return "harness error"
    if first.outcome in ("timeout", "oom"):  # it would cost its time limit at every scoring
        return "the attempt does not end in time or memory"
    return first.outcome == "pass", second.outcome == "pass"


def judge_reply(
    problem: Problem, domain: str, y0: str | None, reply: Reply, teacher: str, source: str, keep_unverified: bool
) -> Quadruple | str:
    """The quadruple of an answer, else why it makes none. `source`: whose the attempt is (teacher, model, perturb)."""
    if reason := why_not(reply):
        return reason
    answer = read_answer(reply.text, list(schema_of(y0 is not None)["properties"]))
    if answer is None:
        return "no JSON with all fields"
    tidy = (lambda text: program_of(text).strip("\n")) if domain == "code" else str.strip
    f, y1, given = answer["critique"].strip(), tidy(answer["revision"]), y0 is not None
    y0 = y0 if given else tidy(answer["attempt"])
    tags = [tag for tag in dict.fromkeys(answer["error_tags"]) if tag in ERROR_TAGS]
    for what, missing in (("attempt", y0), ("critique", f), ("revision", y1)):
        if not missing.strip():
            return f"an empty {what}"
    if not tags:
        return "no error tag that is known"
    right = scores(problem, domain, y0, y1)
    if isinstance(right, str):
        return right
    verified = right == (False, True)
    if not (verified or keep_unverified):
        return "the attempt is right" if right[0] else "the revision is wrong"
    if domain == "math" and not given and not final_answers(y0):
        return "the attempt states no answer"
    found, how = find_quote(y0, answer["wrong_step"])
    meta = {
        "task_id": problem.task_id, "domain": domain, "split": assign_split(problem), "horizon": horizon(problem, y1),
        "edit_distance": edit_distance(y0, y1), "error_tags": tags,
        "error_span": found and (widen(y0, found) if domain == "math" else list(found)), "teacher": teacher,
        "y0_correct": right[0], "y1_correct": right[1], "is_human_audited": False, "verified": verified,
        "y0_source": source, "span_found": how, **problem.notes,
    }  # fmt: skip
    meta |= {"answer": problem.answer} if domain == "math" else {"tests": problem.tests}
    if domain == "math":
        meta["span_by_rule"] = rule_agrees(problem, y0, meta["error_span"])
    q = Quadruple(problem.x, y0, f, y1, meta)
    if leaks(q) or (gives_value(q) if domain == "math" else gives_line(q)):
        return LEAK
    try:
        return parse_quadruple(json.dumps(dataclasses.asdict(q)), "answer")
    except InputError:  # half a surrogate pair, say
        return "text that no replay file holds"


def rule_agrees(problem: Problem, y0: str, span: list[int] | None) -> bool | None:
    """Does a critique's span hold the step that the step checker finds wrong? None where either finds none."""
    wrong = first_wrong_step(y0, problem.reference)
    return None if span is None or wrong is None else split_steps(y0)[wrong].start == span[0]


def horizon(problem: Problem, y1: str) -> int:
    """Steps of the reference; statements of a program, of y1 where there is no reference."""
    if problem.tests is None and read_value(problem.answer) is not None:
        return count_steps(problem)
    program = problem.reference if problem.reference.strip() and parse_program(problem.reference) else y1
    return count_statements(program) if parse_program(program) else len(program.splitlines())
