"""Where a completion answers: the fields behind `####`, in `\\boxed{}` and in `<answer>`, each read whole (room
`values`), and the score that follows. What stands in a thinking block, or is a heading, is no field. Linear in the
length of the text. Used by all rooms that score math; knows nothing of steps or replay files."""

import functools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from common.basics import InputError
from common.values import read_value


class Field(NamedTuple):
    """An answer field: its character span in the completion, and its number, or None where it was not read."""

    start: int
    end: int
    number: Fraction | None


class _Place(NamedTuple):
    """Where a field may be. `heading`: may be the title of a section. `piece`: what stands around it changes it."""

    start: int
    end: int
    text: str
    heading: bool = False
    piece: bool = False


_THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.I)
_HASHES = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
_NEXT_LINE = re.compile(r"\s*([^\n]*)")  # that is not empty
_LABEL = re.compile(r"[\s*_:>]*(?:(?:the )?(?:final )?answer(?: is)?|final (?:result|solution))?[\s*_:]*", re.I)
_STEP = re.compile(r"[\s*_]*(?:step|part|case|problem|question|section|example)\b[\s*_#]*(?:\d|[a-z]\b|[ivx]+\b)", re.I)
_WORDS = re.compile(r"[\s*_]*[A-Za-z]")
_ITEM = re.compile(r"[\s*_]*\d{1,2}[.)]\s+[\s*_]*[A-Za-z]")  # "1. Count the eggs"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ELEMENT = re.compile(r"<(/?)answer>", re.I)
_BEFORE_BOX = re.compile(  # on the same line: an operator, a digit, a word that denies or bounds
    r"(?:[-+/^<±≤≥≠≈~×÷\u2212\u2013]|(?<![=-])>|[\d)}]\s?\*|\d(?=\\(?:boxed|fbox))|\\(?:[mp]m|times|cdot|div|neq?|[gl]eq?|approx"
    r"|sim|sqrt|not)|\b(?:not|minus|negative|about|approximately|around|least|most|than))(?:\s|[${(\[]|\*\*)*\\(?:boxed|fbox)"
)
_BEHIND_BOX = re.compile(
    r"[\d²³½¼¾]|\.\d|[^\S\n]*[$)\]]*[^\S\n]*(?:\^(?!\s*\{?\s*\\circ)|[-+*/×÷·\u2212\u2013][^\S\n]*[$(\\]*\d|\\(?:times|cdot|div|pi|sqrt|pm"
    r"|[dt]?frac)|(?:or|to|and a half|hundred|thousand|million|billion|trillion|dozen)\b)",
    re.I,
)


def without_thinking(completion: str) -> str:
    """The text with its thinking blocks blanked, so that every place stays where it was. A block that the prompt has
    opened ends at its `</think>`; one that is never closed hides the rest.

    >>> without_thinking("<think>1</think>2"), without_thinking("1</think>2"), without_thinking("2<think>1")
    ('                2', '         2', '2        ')
    """
    kept, depth, at = [], 0, 0
    for m in _THINKING.finditer(completion):
        if m[1] and not depth:  # opened before the text began
            kept = [" " * m.end()]
        else:
            kept += [" " * (m.start() - at) if depth else completion[at : m.start()], " " * len(m[0])]
            depth += -1 if m[1] else 1
        at = m.end()
    return "".join([*kept, " " * (len(completion) - at) if depth else completion[at:]])


def _line_before(text: str, at: int) -> str:
    """The end of what stands on the line before a place; short, so that many places cost no more than the text."""
    return text[max(0, at - 40) : at].rpartition("\n")[2]


def _behind_hashes(text: str) -> Iterator[_Place]:
    """Of each `####`: what stands behind it, or on the line below where that is nothing, or "Final answer:"."""
    before = 0
    for m in _HASHES.finditer(text):
        again, before = before and "\n" not in text[before : m.start()], m.end()
        start, content, labelled = m.start(1), m[1].partition("</answer>")[0], False
        if tag := re.match(r"\s*<answer>", content):
            start, content = start + tag.end(), content[tag.end() :]
        if _LABEL.fullmatch(content):
            if again:  # the mark that closes a heading
                continue
            labelled, below = _WORDS.match(content), _NEXT_LINE.match(text, m.end())
            start, content = (m.end(), "") if below[1].startswith("#") else (below.start(1), below[1])
        at_line_start = not _line_before(text, m.start()).strip("*_> \t")
        heading = at_line_start and bool(labelled or _WORDS.match(content) or _ITEM.match(content))
        if not _STEP.match(content):
            yield _Place(start, start + len(content), content, heading)


def _in_boxes(text: str) -> Iterator[_Place]:
    """The content of each outermost box; "" of one that is not finished."""
    at = 0
    while box := _BOX.search(text, at):
        at, depth = box.end(), len(box[1])
        for brace in _BRACE.finditer(text, at) if depth else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                before = re.sub(r"</?\w+>", "", _line_before(text, box.start())) + box[0]
                piece = bool(_BEFORE_BOX.search(before) or _BEHIND_BOX.match(text, brace.end()))
                yield _Place(at, brace.start(), text[at : brace.start()], piece=piece)
                at = brace.end()
                break
        else:
            yield _Place(at, at, "")
            at = len(text) if depth else at


def _in_elements(text: str) -> Iterator[_Place]:
    """The content of each `<answer>`; of a long one that holds a box, the last line with one."""
    opened = None
    for tag in _ELEMENT.finditer(text):
        if not tag[1] and opened is None:
            opened = tag.end()
        elif tag[1] and opened is not None:
            start, content = opened, text[opened : tag.start()]
            if "\\boxed" in content:
                start += content.rfind("\n", 0, content.rindex("\\boxed")) + 1
                content = text[start : tag.start()].partition("\n")[0]
            lead = re.match(r"\s*(?:####)?", content).end()
            yield _Place(start + lead, start + len(content), content[lead:])
            opened = None
    if opened is not None:
        yield _Place(opened, opened, "")


@functools.lru_cache(4096)  # of one text several scores are made
def answer_fields(completion: str) -> tuple[Field, ...]:
    """The answer fields of a completion, in order.

    No field is what only looks like one: an empty or unfinished one before the last, and a heading (`#### Step 1`,
    `#### Solution`), unless it states a value or is all that there is.
    """
    if not ("####" in completion or "box" in completion or "<" in completion):
        return ()
    text = without_thinking(completion) if "<" in completion else completion
    places = sorted([*_behind_hashes(text), *_in_boxes(text), *_in_elements(text)])
    places = [place for place in places if place.text.strip() or place is places[-1]]
    found = [None if place.piece else read_value(place.text) for place in places]
    fields, some = [], any(found)
    for place, value in zip(places, found):
        last = place is places[-1]
        title = value is None and some and not (last and re.search(r"\d", place.text))
        if not (place.heading and (title or (_ITEM.match(place.text) and not last))):
            start = place.start + len(place.text) - len(place.text.lstrip())
            fields.append(Field(start, place.end, value and value.number))
    return tuple(fields)


def final_answers(completion: str) -> list[Fraction]:
    """The distinct final answers that a completion commits to; none if one of its answer fields was not read.

    >>> [list(map(str, final_answers(y))) for y in ("#### $18", "\\\\boxed{18} #### 19", "\\\\boxed{18} #### 19 or 18")]
    [['18'], ['18', '19'], []]
    """
    fields = answer_fields(completion)
    return [] if has_unread(completion) else list(dict.fromkeys(field.number for field in fields))


def has_unread(completion: str) -> bool:
    """Does the completion hold an answer field that was not read?"""
    return any(field.number is None for field in answer_fields(completion))


def score_math(completion: str, answer: str) -> float:
    """1.0 if the completion's final answer equals `answer` exactly, else 0.0.

    The final answer is the value behind `####`, in `\\boxed{}` or in `<answer>`; units, money, thousands, emphasis
    and a trailing point do not matter. Two different ones score 0 (hedging), and so does a field that was not read.
    """
    gold = read_value(answer)
    if gold is None:
        raise InputError(f"the reference answer {answer!r} is not a single number")
    return float(final_answers(completion) == [gold.number])
