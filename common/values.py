"""The one value that a text states, read whole by a grammar: a lead ("the answer is", "x ="), one value, then units,
punctuation, emphasis. The value: a sign, money, thousands, a fraction, a mixed number, a percentage, a power, a scale
word, closed arithmetic, an equation that holds; in plain text, LaTeX or Unicode. What is left over and could change the
value makes the text not read: a reward is a claim. Exact fractions, no eval. Used by answers and verifier; knows
nothing of completions, fields or steps."""

import ast
import functools
import operator
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from common.basics import parse_python


class Value(NamedTuple):
    """The number that stands there (18 for "18%", 5,000,000 for "5 million"), and what it is in an equation that holds
    with that alone: 18/100, as in 9/50 = 18%, and 5, as in 2 + 3 = 5 million."""

    number: Fraction
    also: Fraction | None = None


# ---- words ----------------------------------------------------------------------------------------------------------
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# May stand before the value without a colon behind them.
_LEAD = _words("""
    so therefore thus hence then and now finally in conclusion we i you he she it they there this that these the a an
    our my your his her its their get gets got have has had is are was were be been will would must should can find
    conclude final correct total right overall numerical exact exactly precisely only just answer answers ans result
    solution value sum amount number price cost equal equals to of pay make makes made usd us eur gbp inr rs cad aud chf
    jpy cny
""")
# End a subject, as a colon does: "the number of eggs is 18", "Janet makes $18".
_VERBS = _words("""
    is are was were equals has have had makes made earns earned gets got needs costs pays paid spends spent saves saved
    sells sold becomes weighs contains holds gives leaves uses used buys bought receives owes eats drinks reads runs
    walks drives be
""")
# With one of these beside it a number is denied, guessed, computed with, or one of several.
_CHANGES = _words("""
    not no non never none nobody nothing neither nor cannot without except excluding unlike wrong incorrect incorrectly
    false untrue invalid impossible undefined mistake mistaken error doubt infinite infinity inf nan or either versus vs
    almost nearly approx approximately approximate roughly rounded estimated estimate circa barely ish some several bit
    plus minus divided multiplied squared cubed factorial root sqrt power mod modulo log ln sin cos tan exp inverse
    reciprocal opposite absolute remainder itself binary octal hexadecimal hex half halves halved double doubled twice
    triple tripled thrice third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth
    eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth millionths zero one two
    three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion
    billions trillion trillions lakh lakhs crore crores mil dozen dozens pi tau xyz abc if unless but however although
    though instead rather otherwise maybe perhaps possibly probably likely guess unsure unclear uncertain unknown ignore
    am pm
""")
# And before it alone: "over 5", "the square is 5"; "5 left over" and "5 square feet" are 5.
_BOUNDS = _words("""
    least most up under over above below beyond exceeding exceeds within about around close near between than square
    cube may might could
""")
_OPEN_END = re.compile(r"\bat (?:least|most)\b|\band (?:up|over|under|above|below|older|younger|change)\b|-odd\b", re.I)
# May be glued to the number; longer words may too. Letters that are no unit here are variables: 3x, 2e, 5i.
_UNITS = _words("""
    m cm mm km g kg mg s h L l ml mL cl dl lb lbs oz hr hrs min mins sec secs ms ft in yd yds mi mph kph gal pt qt pts
    day MB GB TB KB kB Hz W V N J C F st nd rd th ths cts kr deg pcs USD EUR GBP INR CAD AUD CHF JPY CNY cups men ppl
""")
_SCALES = {"k": 3, "m": 6, "mn": 6, "b": 9, "bn": 9, "t": 12, "hundred": 2, "thousand": 3, "lakh": 5, "million": 6,
           "crore": 7, "billion": 9, "trillion": 12}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


def _changes(words: list[str], more: frozenset[str] = frozenset()) -> bool:
    """Does one of the words, or one of `more`, change what the number beside them says?"""
    parts = [part.lower() for word in words for part in (word, *word.split("-"))]
    return any(part in _CHANGES or part in more or part.endswith("n't") for part in parts)


# ---- one spelling ---------------------------------------------------------------------------------------------------
_SAME = dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad", "")  # no width
_SAME |= dict.fromkeys("\u2212\u2010\u2011\u2012\ufe63\uff0d", "-") | dict.fromkeys("\u2715\u22c5\u00b7\u2217", "×")
_SAME |= (
    dict.fromkeys("÷\u2044\u2215\uff0f", "/") | dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"')
)
_SAME |= dict(zip("\uff0b\uff1d\uff05\uff08\uff09\uff0c\uff0e\u3002\uff1a\uff04\u00ba\u02da", "+=%(),..:$°°"))
_RAISED, _LOWERED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "\u2080-\u2089"
_SCRIPTS = re.compile(f"([{_RAISED}]+)(?:[\u2044/]([{_LOWERED}]+))?")
_TAGS = re.compile(r"</?(?:b|strong|em|i|u|span|code|mark)>|(?:<\|\w{1,20}\|>\s*|</s>\s*)+$", re.I)
_SAID = [(re.compile(pattern, re.I), sign) for pattern, sign in (
    (r"\b(?:minus|negative)\s+(?=[$€£]?\s?[\d.(⟦])", "-"), (r"\bplus\s+(?=[$€£]?[\d.(])", "+"),
    (r"\b(?:times|multiplied by)\s+(?=[$€£]?[\d.(])", "× "), (r"\bdivided by\s+(?=[\d.(])", "/ "),
    (r"\b(?:is )?(?:equals|equal to)\b", "="))]  # fmt: skip


@functools.lru_cache(4096)
def _same(c: str) -> str:
    """The ASCII spelling of a character; what has none stays, and is read by no rule."""
    if c.isascii() or c in _SAME:
        return _SAME.get(c, c)
    if unicodedata.category(c) in ("Nd", "Zs"):
        return str(unicodedata.decimal(c, " "))
    broken = unicodedata.normalize("NFKD", c)
    if "\u2044" in broken[1:-1]:  # a fraction in one character
        return "⟦({})/({})⟧".format(*broken.split("\u2044"))
    return broken[0] if c.isalpha() and "a" <= broken[0].lower() <= "z" and len(broken) > 1 else c


def _raised(m: re.Match) -> str:
    above, below = (unicodedata.normalize("NFKC", part or "") for part in m.groups())
    return f"⟦({above})/({below})⟧" if below else f"^({above})".replace("\u2212", "-")


_TEX = re.compile(  # the innermost group of each kind
    r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))|\^\s*\{([^{}]*)\}|(?<![\w}^])\{([^{}]*)\}"
    r"|\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|[mh]box|boxed|fbox|emph|underline|bm|boldsymbol|pmb)"
    r"\s*\{([^{}]*)\}"
)
_COMMANDS = dict.fromkeys((",", ";", ":", " ", "quad", "qquad", "thinspace", "(", ")", "[", "]"), " ") | {
    **dict.fromkeys(("!", "left", "right", "displaystyle", "textstyle", "bf", "rm", "it", "bfseries"), ""),
    "times": "×", "cdot": "×", "div": "/", "degree": "°", "%": "%", "$": "$", "_": "_", "#": "#",
    "pounds": "£", "textdollar": "$", "euro": "€", "texteuro": "€", "therefore": "∴", "implies": "⇒",
    "Rightarrow": "⇒", "rightarrow": "→",
}  # fmt: skip


def _tex_group(m: re.Match) -> str:
    top, top1, under, under1, power, bare, inner = m.groups()
    if (top or top1) and (under or under1):
        return f"⟦({top or top1})/({under or under1})⟧"
    return f"^({power})" if power is not None else inner or bare or ""


def _without_tex(text: str) -> str:
    """LaTeX as plain text: groups opened from the innermost, known commands replaced; unknown ones keep a backslash."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text.replace("{,}", ","))
    for pattern in (_TEX, re.compile(r"\{([^{}]*)\}")):
        for _ in range(12):  # nested deeper than anybody writes: braces are left over
            new = pattern.sub(_tex_group if pattern is _TEX else r"\1", text)
            if new == text:
                break
            text = new
    return re.sub(r"\\([A-Za-z]+|.)", lambda m: _COMMANDS.get(m[1], "\\"), text.replace("~", " ~ "))


def _plain(text: str) -> str:
    """A field in one spelling: of minus, space, quote, digit, fraction, power, times and of what LaTeX and HTML add."""
    if not text.isascii():
        text = "".join(map(_same, _SCRIPTS.sub(_raised, text)))
    if "<" in text:
        text = _TAGS.sub("", text)
    if "\\" in text or "{" in text:
        text = _without_tex(text)
    for pattern, sign in _SAID:
        text = pattern.sub(sign, text)
    text = re.sub(r"\^\((st|nd|rd|th)\)", r"\1", text)
    return text.strip()


# ---- one value ------------------------------------------------------------------------------------------------------
_NUMERAL = (  # atomic: all of a number or none; thousands in groups of three, or of two and a last three (India)
    r"(?>(?P<apart>[1-9]\d{0,2}(?:(?P<gap>[ '_])\d{3})(?:(?P=gap)\d{3}){0,8}(?!\d|\s?/)(?:\.\d{1,30}|,\d{1,2})?)"
    r"|(?P<euro>[1-9]\d{0,2}(?:(?:\.\d{3}){2,9}(?:,\d{1,2})?|\.\d{3},\d{1,2}))"
    r"|(?:[1-9]\d{0,2}(?:,\d{3}){1,9}(?!\d)|[1-9]\d?(?:,\d\d){1,9},\d{3}|\d{1,30}(?!,\d))(?:\.\d{1,30})?|\.\d{1,30})"
    r"(?!\d|[.,'_]\d)"
)
_AMOUNT = (
    rf"(?P<cur>[$€£¥₹₩₽]\s?)?(?P<num>{_NUMERAL})(?:[eE](?P<exp>[-+]?\d{{1,2}})(?!\d))?"
    r"(?P<mixed>(?:\s(?:and\s)?(?P<top>\d{1,2})\s?/\s?(?P<under>\d{1,4})|\s?⟦\((?P<top2>\d+)\)/\((?P<under2>\d+)\)"
    r"⟧)(?!\d|[.,/]\d))?"
    r"(?P<scale>(?:[kK](?![A-Za-z\d])|\s?bn\b|(?(cur)\s?(?:[mMbBT]|[mM]n)\b|(?!))|(?:(?:\s|-)?(?i:hundred|thousand|lakh"
    r"|million|crore|billion|trillion)s?\b)*))(?P<percent>\s?%(?=\s*(?:[-+*/=×)]|$)))?"
)
_START = r"(?=\s*[-+]?\s*[\d.$€£(\[⟦])"  # of an operand
_TOKEN = re.compile(
    rf"\s*(?:{_AMOUNT}|(?P<skip>[$€£¥₹₩₽¢])"
    rf"|(?P<op>[-+*/^×\u2013(\[⟦]{_START}|[)\]⟧]|(?:(?<=\s)[xX](?=\s)|[xX](?=\s?10\s?\^)){_START}))"
)
_IN_PYTHON = {"x": "*", "X": "*", "×": "*", "^": "**", "]": ")", "⟧": ")"}
_IN_PYTHON |= dict.fromkeys("([⟦", "_(")  # a bracket is a call: then the tree keeps it
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_EMPHASIS = re.compile(r"[\s*_`\"']*")
_DEPTH = 20  # of brackets
_DASH = "\u2013"  # a minus before a number or between spaces, else a range
_COINS = "$€£¥₹₩₽¢"


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent) > 2000 or (base == 0 and exponent <= 0):
        raise ValueError
    return base ** int(exponent)


def value_of(expression: str, numbers: list[Fraction]) -> Fraction | None:
    """The exact value of an expression in Python's spelling over the names n0, n1, ... of `numbers`, brackets as calls
    `_(...)`; None where it is not that. Python parses it, and of the tree only these operations are known here.

    >>> str(value_of("n0 /_(n1 -n0 )", [Fraction(1), Fraction(3)]))
    '1/2'
    """

    def value(node: ast.AST, depth: int) -> Fraction:
        match node:
            case ast.Name():
                return numbers[int(node.id[1:])]
            case ast.UnaryOp(ast.USub()):
                return -value(node.operand, depth + 1)
            case ast.BinOp(op=ast.Pow()):
                return _power(value(node.left, depth), value(node.right, depth))
            case ast.BinOp() if type(node.op) in _OPERATIONS:
                return _OPERATIONS[type(node.op)](value(node.left, depth), value(node.right, depth))
            case ast.Call() if depth < _DEPTH:
                return value(node.args[0], depth + 1)
        raise ValueError

    try:
        return value(parse_python(expression, mode="eval").body, 0)
    except (SyntaxError, ValueError, IndexError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _amount(m: re.Match) -> Fraction | None:
    """The number of an _AMOUNT; None for a mixed number whose fraction is none of a whole."""
    text = m["num"]
    if m["apart"] or m["euro"]:
        text = re.sub(r"[ '_]" if m["apart"] else r"\.", "", text).replace(",", ".")
    number = Fraction(text.replace(",", "")) * Fraction(10) ** int(m["exp"] or 0)
    if m["mixed"]:
        top, under = int(m["top"] or m["top2"]), int(m["under"] or m["under2"])
        if number.denominator != 1 or not 0 < top < under or m["exp"]:
            return None
        number += Fraction(top, under)
    return number * _scale(m["scale"]) / (100 if m["percent"] else 1)


def _scale(words: str) -> int:
    """ "hundred million" is 10**8."""
    return 10 ** sum(_SCALES[word.lower().removesuffix("s")] for word in _WORD.findall(words))


def _ambiguous(text: str, ops: list[str], found: list[re.Match], value: Fraction) -> bool:
    """Can an expression that no equation confirms be meant otherwise: a range, a date, a score, a mixed number?"""
    if re.search(rf"[-+{_DASH}]\s*[-+{_DASH}]", text) or any(re.match(r"0\d", m["num"]) for m in found):  # --5, 01/05
        return len(found) > 1 or text[:1] in "-+"
    if re.search(r"\d/\d+/\d", text) or re.fullmatch(rf"\d+[-{_DASH}]\d+/\d+", text):  # 12/25/2024, 2-1/2
        return True
    if any(m["mixed"] and text[: m.start("num")].rstrip().endswith("/") for m in found):  # 1/2 1/2
        return True
    percents, scaled = [bool(m["percent"]) for m in found], [bool(m["scale"]) for m in found]
    if set(ops) & set("-+/^") and (any(percents) or any(scaled) > all(scaled)):  # 10 + 5%, 2 + 3 million, 1/2 million
        return True
    only_minus = ops and set(ops) == {"-"} and len(found) == len(ops) + 1
    return bool(only_minus and (value < 0 or (len(ops) > 1 and not re.search(r"\s", text))))  # 3-5, 2024-10-12


def _expression(text: str, start: int, confirmed: bool) -> tuple[Value, str] | None:
    """(value, what stands behind it) of a text that has an amount or a closed arithmetic expression at `start`; None
    where it has not. `confirmed`: an equation stands for it, so that no other reading has to be feared."""
    expression, numbers, found, ops = "", [], [], []
    at = start = _EMPHASIS.match(text, start).end()
    emphasis = len(re.findall(r"\*+", text[:start])) % 2
    while m := _TOKEN.match(text, at):
        op, sign = m["op"], not expression or expression[-1] in "(*/-+"
        if m["num"]:
            number = _amount(m)
            if number is None or (m["num"] == "0" and text[m.end() : m.end() + 1] in ("x", "X")):
                return None
            expression += f"n{len(numbers)} "
            numbers.append(number)
            found.append(m)
        elif op:
            apart = m.start("op") > at and text[m.end() : m.end() + 1].isspace()
            if not (sign or apart) and (op == _DASH or (op == "*" and emphasis)):
                return None  # a range; the end of an emphasis
            op = "-" if op == _DASH else op
            expression += "" if op == "+" and sign else _IN_PYTHON.get(op, op)
            ops += [] if sign or op in "()[]⟦⟧" else [op]
        at = m.end() if numbers else _EMPHASIS.match(text, m.end()).end()
    value = value_of(expression.strip(), numbers) if numbers else None
    if value is None or (not confirmed and _ambiguous(text[start:at].strip(), ops, found, value)):
        return None
    if len(numbers) == 1 and found[0]["percent"]:
        return Value(value * 100, value), text[at:]
    scale = _scale(found[0]["scale"]) if len(numbers) == 1 else 1
    return Value(value, value / scale if scale > 1 else None), text[at:]


# ---- a field --------------------------------------------------------------------------------------------------------
_LABEL = re.compile(
    r"[\s*_`\"'$→⇒∴•]*((?:(?>[A-Za-z]+(?:['-][A-Za-z]+)*)[\s,()*_\"`$€£]*+){1,12}?)"  # at most twelve words
    rf"(?:[:=]|(?<=\s)(?:{'|'.join(sorted(_VERBS))})\b)"
)
_LEADS = re.compile(r"[\s:=,*_`\"'→⇒∴•]*(?:([A-Za-z]+)(?:(?=[$€£])|\b)\.?)?")
_TAIL = re.compile(
    r"(?:-(?=[A-Za-z]{2}))?(?:\s+|[,;.](?![.\d])|[*_`\"']+|[°%$€£¥₹¢~]|/(?=\s?[A-Za-z])"
    r"|\([A-Za-z\s,.'%$-]*\)|(?:[ckm]?m|ft|in|yd|mi)[23](?!\w)|\b(?i:per|every|each|in|for)\s+1(?![\w.,/:^-])"
    r"|[A-Za-z]+(?:['-][A-Za-z]+)*(?:\^\(?-?\d\)?)?)*+",
)
_MONEY = re.compile(r"[$€£¥₹]|\b(?:dollar|euro|pound|buck|usd|eur|gbp)s?\b", re.I)


def _lead_end(text: str) -> int | None:
    """Where the value begins behind "the answer is", "x =", "Total cost:"; None where a dash may be no minus."""
    at = 0
    for _ in range(12):
        m = _LABEL.match(text, at)
        if not m or _changes(_WORD.findall(m[1]), _BOUNDS):
            m = _LEADS.match(text, at)
            money = m[1] and m[1].isupper() and len(m[1]) < 3 and text[m.end() : m.end() + 1] in _COINS  # US$
            if not money and (m[1] or "").lower() not in _LEAD:
                break
        at = m.end()
    at = at if m[1] else m.end()
    dashed = text[at : at + 1] in ("-", _DASH) and (text[at - 1 : at].isalpha() or text[at + 1 : at + 2].isspace())
    return None if dashed and text[:at].rstrip()[-1:].isalpha() else at


def _tail_fits(tail: str, field: str) -> bool:
    """Is what stands behind the value units, punctuation and emphasis alone?"""
    if not _TAIL.fullmatch(tail) or _OPEN_END.search(tail):
        return False
    words = _WORD.findall(re.sub(r"(?i)\b(per|each|every|in|for) one\b", r"\1", tail))
    if words and tail[0].isalpha() and not (words[0] in _UNITS or len(words[0]) > 3):
        return False
    if words and words[0] in ("m", "mm", "M") and _MONEY.search(field):  # meters, or millions?
        return False
    words = words[:1] + [word for word in words[1:] if word not in ("squared", "cubed")]
    article = [word in ("a", "A") and word not in (tail[0], words[-1]) for word in words]
    return not _changes(words) and all(len(w) > 1 or w in _UNITS or a for w, a in zip(words, article))


_BARE = re.compile(r"\s*(-?)\$?(\d{1,30}|[1-9]\d{0,2}(?:,\d{3}){1,9})(\.\d{1,30})?\.?\s*")


def read_value(text: str) -> Value | None:
    """The one value that a text states, or None where any of it that could change the value is not understood.

    >>> [str(read_value(t).number) for t in ("$1,234.50 a day", "x = 2\\\\frac{1}{2}", "5 * 3 = 15 eggs", "minus 5k")]
    ['2469/2', '5/2', '15', '-5000']
    >>> [read_value(t) for t in ("17 or 18", "> 5", "about 5", "3-5", "5 hours 5 minutes", "3x", "10:10")] == [None] * 7
    True
    """
    if m := _BARE.fullmatch(text):
        return Value(Fraction(m[1] + m[2].replace(",", "") + (m[3] or "")))
    if len(text) > 300:
        return None
    field = _plain(text)
    if len(field) > 600:  # fractions in one character grow
        return None
    if m := re.fullmatch(r"[(\[]([^()\[\]]*)[)\]]\.?", field):
        field = m[1]
    at = _lead_end(field)
    if at is None:
        return None
    *before, last = field[at:].split("=")
    if before and field[at].isalpha():  # a lead that is not understood: "more than 5 * 3 = 15"
        return None
    read = _expression(last, 0, True) if before else _expression(field, at, False)
    if read is None or not _tail_fits(read[1], field):
        return None
    value, tail = read
    if re.match(r"\s*(?:%|per\s?cent\b|pct\b)", tail):
        value = Value(value.number, value.number / 100)
    sides = [_known_side(side) for side in before] + [value]
    if before and (None in sides or not set.intersection(*map(_either, sides))):
        return None
    return value


def _known_side(text: str) -> Value | None:
    """The value of a side of an equation, units between its numbers left out: "5 boxes * 3 eggs/box"."""
    if not _changes(_WORD.findall(text)):
        text = re.sub(r"/?\s?\b[A-Za-z]{2,}(?:['-][A-Za-z]+)*", " ", text)
    read = _expression(text, 0, confirmed=True)
    return read[0] if read and _tail_fits(read[1], text) else None


def _either(value: Value) -> set[Fraction]:
    return {value.number, value.also} - {None}
