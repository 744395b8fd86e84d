"""Replay files, splits, sources, tokenizer and packing."""

import json
import os
import re

import numpy as np
import pytest

from common.base import BASE_PROSE, base_documents, pack_documents
from common.basics import InputError, normalize_x, write_atomic
from common.batches import data_indices, length_mask, pack_answers, pack_prompts, prompt_shape, right_pad
from common.fixtures import fixtures_math
from common.making import load_replay
from common.prompts import CODE_LINE, attempt_prompt, revise_prompt
from common.replay import (
    Problem,
    Quadruple,
    assign_split,
    check_leakage,
    parse_quadruple,
    read_replay,
    replay_report,
    salted_bucket,
    write_replay,
)
from common.tasks import get_task, gsm8k
from common.tokenizer import Tokenizer, train_tokenizer
from common.verifier import Verdict, grade_math, score_math

META = {
    "task_id": "own/1", "domain": "math", "split": "train", "horizon": 2, "edit_distance": 1,
    "error_tags": ["local_arithmetic"], "error_span": [0, 5], "teacher": "own", "y0_correct": False, "y1_correct": True,
    "is_human_audited": False, "answer": "5",
}  # fmt: skip
ROW = {"x": "What is 2+3?", "y0": "2+3=6\n#### 6", "f": "2+3 is not 6.", "y1": "2+3=5\n#### 5", "meta": META}


def line_of(meta: dict | None = None, meta_without: str = "", **fields) -> str:
    """A good replay line with some fields changed."""
    full = {**META, **(meta or {})}
    return json.dumps({**ROW, "meta": {k: v for k, v in full.items() if k != meta_without}, **fields})


def quad(i: int = 0, **fields) -> Quadruple:
    return parse_quadruple(line_of(x=f"What is {i}+3?") if not fields else line_of(**fields), "here:1")


# ---- replay ----
def without(key: str) -> str:
    return json.dumps({k: v for k, v in ROW.items() if k != key})


MALFORMED = {  # what is wrong: (line, what the message must name)
    "not JSON": ("{", "not JSON"),
    "empty line": ("", "not JSON"),
    "cut line": (line_of()[:-5], "not JSON"),
    "huge number": (line_of()[:-1] + ', "n": ' + "1" * 5000 + "}", "not JSON"),
    "list": ("[1]", "JSON object"),
    "null": ("null", "JSON object"),
    "no x": (without("x"), "'x'"),
    "no y0": (without("y0"), "'y0'"),
    "no f": (without("f"), "'f'"),
    "no y1": (without("y1"), "'y1'"),
    "no meta": (without("meta"), "'meta'"),
    "x a number": (line_of(x=3), "'x'"),
    "x blank": (line_of(x=" \n"), "'x'"),
    "f null": (line_of(f=None), "'f'"),
    "meta a list": (json.dumps({**ROW, "meta": []}), "'meta'"),
    **{f"no {key}": (line_of(meta_without=key), f"'meta.{key}'") for key in META},
    "horizon a string": (line_of({"horizon": "2"}), "'meta.horizon'"),
    "horizon a boolean": (line_of({"horizon": True}), "'meta.horizon'"),
    "edit_distance a float": (line_of({"edit_distance": 1.0}), "'meta.edit_distance'"),
    "y0_correct a number": (line_of({"y0_correct": 1}), "'meta.y0_correct'"),
    "domain unknown": (line_of({"domain": "chess"}), "'meta.domain'"),
    "split unknown": (line_of({"split": "dev"}), "'meta.split'"),
    "tag unknown": (line_of({"error_tags": ["typo"]}), "'meta.error_tags'"),
    "tags a string": (line_of({"error_tags": "style_only"}), "'meta.error_tags'"),
    "tag a list": (line_of({"error_tags": [["style_only"]]}), "'meta.error_tags'"),
    "span too short": (line_of({"error_span": [1]}), "'meta.error_span'"),
    "span too long": (line_of({"error_span": [0, 1, 2]}), "'meta.error_span'"),
    "span of floats": (line_of({"error_span": [0.0, 2.0]}), "'meta.error_span'"),
    "span empty": (line_of({"error_span": [2, 2]}), "'meta.error_span'"),
    "span negative": (line_of({"error_span": [-1, 2]}), "'meta.error_span'"),
    "span outside": (line_of({"error_span": [0, len(ROW["y0"]) + 1]}), "'meta.error_span'"),
    "answer a number": (line_of({"answer": 5}), "'meta.answer'"),
    "answer no number": (line_of({"answer": "many"}), "'meta.answer'"),
    "code without tests": (line_of({"domain": "code"}), "'meta.tests'"),
    "half a surrogate pair": (line_of(y0="2+3=6 \ud800\n#### 6"), "'y0'"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "named"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_line_names_file_line_and_field(tmp_path, line, named):
    """A bad second line of a file: the message has the path, the line number and the field."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{line_of()}\n{line}\n{line_of()}\n")
    with pytest.raises(InputError) as e:
        read_replay(path)
    assert str(e.value).startswith(f"{path}:2: ")
    assert named in str(e.value)
    assert "\n" not in str(e.value)


def test_good_lines_are_kept_whole():
    """Optional forms are accepted and unknown meta keys kept as they are."""
    extra = {"error_span": None, "error_tags": [], "note": {"a": [1, None]}, "answer": "1,234"}
    q = parse_quadruple(line_of(extra), "here:1")
    assert q.meta == {**META, **extra}
    assert (q.x, q.y0, q.f, q.y1) == (ROW["x"], ROW["y0"], ROW["f"], ROW["y1"])
    tests = {"inputs": ["1"], "outputs": ["2"]}
    code = parse_quadruple(line_of({"domain": "code", "tests": tests}, x=f"One more.{CODE_LINE}"), "here:1")
    assert code.meta["tests"] == tests
    assert parse_quadruple(line_of({"error_span": [0, len(ROW["y0"])]}), "here:1").meta["error_span"][1] == 12


def test_round_trip(tmp_path):
    """What is written is read back, line separators of Unicode and other scripts included."""
    odd = "a\u2028b\u2029c\x85d\r\ne\tf \u00e9\u4e2d\U0001f600"
    quads = [quad(0), quad(x=odd, y0=odd, f=odd, y1=odd, meta={**META, "note": odd})]
    path = tmp_path / "deep" / "train.jsonl"
    write_replay(path, quads)
    assert read_replay(path) == quads
    assert path.read_bytes().count(b"\n") == 2
    assert "\u4e2d" in path.read_text(encoding="utf-8")  # readable, not escaped
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_write_atomic(tmp_path):
    """The old file stays whole until the new one is; no temporary file is left, also where writing fails."""
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half a pair: \ud800")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_read_replay_refuses_no_file_empty_file_and_bytes(tmp_path):
    """Each message has the path and the way out."""
    path = tmp_path / "train.jsonl"
    for content in (None, b"", b"\n", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path)) + r".*teacher\.py"):
            read_replay(path)


def test_load_replay_names_the_missing_split(tmp_path):
    """A named replay directory without its test split is an error and makes nothing."""
    for split in ("train", "val"):
        write_replay(tmp_path / f"{split}.jsonl", [quad()])
    with pytest.raises(InputError, match=r"test\.jsonl is missing"):
        load_replay("fixtures_math", str(tmp_path), None)
    assert sorted(os.listdir(tmp_path)) == ["train.jsonl", "val.jsonl"]


def test_replay_report_by_hand():
    """Counts and the leak rate; an answer with a comma is a number too."""
    rows = [
        quad(f="It should be 1234.", meta={**META, "answer": "1,234", "horizon": 3}),
        quad(f="It is off.", meta={**META, "error_tags": []}),
        quad(f="The 5 is wrong.", meta={**META, "error_tags": ["local_arithmetic", "missing_case"]}),
        quad(f="The 15 is wrong."),
    ]
    assert replay_report(rows) == {
        "quadruples": 4, "leak_rate": 0.5, "tags": {"local_arithmetic": 3, "missing_case": 1}, "horizons": {2: 3, 3: 1},
    }  # fmt: skip


# ---- splits ----
def test_salted_hash_is_pinned():
    """The split of a problem must never change between versions: pinned values."""
    assert [salted_bucket(x) for x in ("How many?", "Tom has 3 pens.", "a", "b")] == [40, 41, 77, 68]
    assert salted_bucket("  how\nMANY? ") == 40


def problem(i: int, split: str | None) -> Problem:
    return Problem(f"own/{i}", f"Problem number {i}?", "#### 1", "1", split)


def test_splits_are_70_10_20_and_a_source_keeps_its_test():
    """Shares of 4,000 problems within four standard errors; test stays test, val is a tenth of train."""
    own = [assign_split(problem(i, None)) for i in range(4000)]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(own.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert {assign_split(problem(i, "test")) for i in range(500)} == {"test"}
    train = [assign_split(problem(i, "train")) for i in range(4000)]
    assert set(train) == {"train", "val"}
    assert abs(train.count("val") / 4000 - 0.1) < 0.02


def test_leakage_is_found_whatever_the_case_and_spaces():
    """The same text in two splits is refused and both problems are named; twice in one split is fine."""
    other = quad(x=" what IS  7+3?", meta={**META, "task_id": "own/other"})
    check_leakage({"train": [quad(1), quad(1)], "val": [quad(2)], "test": [quad(3)]})
    with pytest.raises(InputError, match=r"leakage: problem own/other of split test is also own/1 of split train"):
        check_leakage({"train": [quad(1), quad(7)], "val": [quad(2)], "test": [quad(3), other]})


# ---- sources ----
@pytest.fixture(scope="module")
def fixtures() -> list[Problem]:
    return fixtures_math(size=2000)


def test_fixtures_math(fixtures):
    """Deterministic, unique, horizons 2 to 8, small numbers, and every reference passes the verifier."""
    assert fixtures[:300] == fixtures_math(size=300)
    assert fixtures[:50] != fixtures_math(seed=1, size=50)
    assert len({normalize_x(p.x) for p in fixtures}) == len({p.task_id for p in fixtures}) == 2000
    assert {len(p.reference.split("\n")) - 1 for p in fixtures} == set(range(2, 9))
    assert {p.split for p in fixtures} == {None}
    for p in fixtures:
        assert max(int(n) for n in re.findall(r"\d+", p.x + p.reference)) <= 100
        assert score_math(p.reference, p.answer) == 1
        n = len(p.reference.split("\n"))
        assert grade_math(p.reference, p.answer, p.reference) == Verdict("pass", n, n)


def test_fixtures_math_arithmetic_by_python(fixtures):
    """Every annotation is true by Python's own arithmetic, and the last one is the answer."""
    for p in fixtures[:500]:
        stated = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", p.reference)
        assert len(stated) == len(p.reference.split("\n")) - 1
        for a, op, b, result, shown in stated:
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op] == int(result) == int(shown)
        assert stated[-1][3] == p.answer


def gsm8k_dir(tmp_path, train: str, test: str = '{"question": "q", "answer": "#### 1"}\n'):
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "test.jsonl").write_text(test)
    return str(tmp_path)


def test_gsm8k_from_files(tmp_path):
    """Problems of both files with their split, answers as plain numbers."""
    rows = [
        {"question": " How many?\n", "answer": "She has <<600*2=1200>>1,200.\n#### 1,200", "further": 1},
        {"question": "Half\u2028of 5?", "answer": "#### 2.50\n"},
    ]
    path = gsm8k_dir(tmp_path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert get_task("gsm8k").load(path) == [
        Problem("gsm8k/train/00000", "How many?", "She has <<600*2=1200>>1,200.\n#### 1,200", "1200", "train"),
        Problem("gsm8k/train/00001", "Half\u2028of 5?", "#### 2.50", "2.5", "train"),
        Problem("gsm8k/test/00000", "q", "#### 1", "1", "test"),
    ]


GOOD_ROW = '{"question": "q", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (GOOD_ROW + "{oops\n", r"train\.jsonl:2: not JSON"),
        (GOOD_ROW + "\n" + GOOD_ROW, r"train\.jsonl:2: not JSON"),
        ("", r"train\.jsonl is empty; check --data_dir"),
        (GOOD_ROW + '{"question": "q", "answer": ' + "1" * 5000 + "}\n", r"train\.jsonl:2: not JSON that"),
        (GOOD_ROW + "[" * 100_000 + "\n", r"train\.jsonl:2: not JSON that"),
        (GOOD_ROW.replace("\n", "\r\n") + "{}\r\n", r"train\.jsonl:2: field 'question'"),
        (GOOD_ROW + '{"question": "q"}\n', r"train\.jsonl:2: field 'answer'"),
        ('{"question": 3, "answer": "#### 1"}\n', r"train\.jsonl:1: field 'question'"),
        ("[1]\n", r"train\.jsonl:1: field 'question'"),
        (GOOD_ROW + '{"question": "q", "answer": "five"}\n', r"train row 2: field 'answer'"),
        ('{"question": "q", "answer": "#### 1 or 2"}\n', r"train row 1: field 'answer'"),
    ],
)
def test_gsm8k_errors(tmp_path, train, message):
    """Bad source files: file or split, line, field."""
    with pytest.raises(InputError, match=message):
        gsm8k(gsm8k_dir(tmp_path, train))


def test_gsm8k_missing_or_unreadable_file(tmp_path):
    """The message names the file and the flag."""
    with pytest.raises(InputError, match=r"train\.jsonl.*--data_dir"):
        gsm8k(str(tmp_path))
    (tmp_path / "a" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train\.jsonl.*--data_dir"):
        gsm8k(str(tmp_path / "a"))
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl"):
        gsm8k(str(tmp_path))


def test_unknown_task():
    """The flag, the name and the choices."""
    with pytest.raises(InputError, match=r"--task chess: unknown; .*fixtures_math.*gsm8k"):
        get_task("chess")


# ---- tokenizer ----
TEXTS = [
    "Tom has 48/2 = <<48/2=24>>24 pens.\n#### 24",
    "In May 12 nuts are lost. How many nuts does Eva have now?",
    "So $1,200 - $350 = $<<1200-350=850>>850 remains; na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600!",
]
ODD = [
    "",
    " ",
    "\n\n",
    "  two  spaces ",
    "1234567",
    "\u00e9\u4e2d\U0001f600\u200d",
    "tab\tand\r\nreturn",
    "<<1+1=2>>2 #### 2",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 330)


def token_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    """Bytes of each token by GPT-2's byte table, written out anew."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in keep} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in keep)}
    special = {tokenizer.pad_id, tokenizer.eos_id}
    return [b"" if i in special else bytes(table[c] for c in tokenizer.inner.id_to_token(i)) for i in ids]


def naive_overlap(pieces: list[bytes], text: str, spans) -> np.ndarray:
    """Walk over bytes: which token and which character each belongs to."""
    token_of = [t for t, piece in enumerate(pieces) for _ in piece]
    char_of = [c for c, char in enumerate(text) for _ in char.encode()]
    out = np.zeros((len(spans), len(pieces)), np.float32)
    for t, c in zip(token_of, char_of, strict=True):
        for s, (a, b) in enumerate(spans):
            out[s, t] = max(out[s, t], a <= c < b)
    return out


@pytest.mark.parametrize("text", TEXTS + ODD)
def test_round_trip_of_texts(tokenizer, text):
    """Every text comes back, alone, in a batch and with the end token behind it."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode([ids, [*ids, tokenizer.eos_id], []]) == [text, text, ""]
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)


def test_control_tokens_cannot_be_written_in_text(tokenizer):
    """A text that spells a control token is text."""
    ids = tokenizer.encode("a<eos>b<pad>")
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode([ids]) == ["a<eos>b<pad>"]


def test_numbers_are_split_into_at_most_two_digits(tokenizer):
    """No token holds more than two digits."""
    assert max(sum(c.isdigit() for c in tokenizer.inner.id_to_token(i)) for i in range(tokenizer.vocab_size)) <= 2


@pytest.mark.parametrize("text", TEXTS + ODD)
def test_overlap_against_a_walk_over_bytes(tokenizer, text):
    """Random spans, for the ids of `encode` and for ids it would never give."""
    rng = np.random.default_rng(len(text))
    ends = np.sort(rng.integers(0, len(text) + 1, (12, 2)), axis=1)
    spans = [(int(a), int(b)) for a, b in ends] + [(0, len(text)), (0, 0)]
    for ids in (tokenizer.encode(text), [i for c in text for i in tokenizer.encode(c)]):
        got = tokenizer.overlap(ids, text, spans)
        assert got.shape == (len(spans), len(ids))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, naive_overlap(token_bytes(tokenizer, ids), text, spans))


def test_overlap_worked_example(tokenizer):
    """The docstring's: tokens "ab", "c d", "e" of "abc de" - here with bytes for tokens, and no spans at all."""
    one = train_tokenizer(["x"], 258)  # only bytes
    expected = [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert one.overlap(one.encode("abc de"), "abc de", [(0, 3), (5, 6)]).tolist() == expected
    assert one.overlap(one.encode("abc"), "abc", []).shape == (0, 3)
    assert tokenizer.overlap([], "", [(0, 0)]).shape == (1, 0)


def test_overlap_gives_nothing_to_control_tokens(tokenizer):
    """A sampled <pad> in the middle and <eos> at the end share no byte with the text."""
    ids = [*tokenizer.encode("a"), tokenizer.pad_id, *tokenizer.encode("b"), tokenizer.eos_id]
    assert tokenizer.overlap(ids, "ab", [(0, 2)]).tolist() == [[1, 0, 1, 0]]


def test_overlap_after_invalid_bytes(tokenizer):
    """Sampled bytes that are no UTF-8 decode to U+FFFD, which is three bytes long; what follows must not shift."""
    lone = next(i for i in range(tokenizer.vocab_size) if token_bytes(tokenizer, [i]) == [b"\xe2"])
    ids = [lone, *tokenizer.encode("\n"), *tokenizer.encode("a"), *tokenizer.encode("b")]
    (text,) = tokenizer.decode([ids])
    assert text == "\ufffd\nab"
    assert tokenizer.overlap(ids, text, [(0, 1), (2, 3), (3, 4)]).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_training_is_deterministic(tokenizer):
    """The same texts give the same tokenizer, other texts another one."""
    assert train_tokenizer(TEXTS * 3, 330).sha256() == tokenizer.sha256()
    assert train_tokenizer(TEXTS[:1] * 3, 270).sha256() != tokenizer.sha256()
    assert tokenizer.vocab_size == 330
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


# ---- packing ----
def test_right_pad_and_length_mask():
    """By hand: cut, padded, empty."""
    tokens, lengths = right_pad([[5, 6], [7, 8, 9, 1], []], 3, 4)
    assert tokens.tolist() == [[5, 6, 4], [7, 8, 9], [4, 4, 4]]
    assert lengths.tolist() == [2, 3, 0]
    assert tokens.dtype == lengths.dtype == np.int32
    mask = length_mask(lengths, 4)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert mask.dtype == np.float32


def test_pack_prompts_and_answers(tokenizer):
    """Prompts stand whole at the left; one that does not fit is refused. Answers end with the end token."""
    ids = [tokenizer.encode(t) for t in TEXTS]
    width = max(map(len, ids))
    batch = pack_prompts(tokenizer, TEXTS, width)
    assert batch["prompt_len"].tolist() == [len(i) for i in ids]
    assert [row[:n].tolist() for row, n in zip(batch["prompt"], batch["prompt_len"])] == ids
    with pytest.raises(InputError, match=rf"{width} tokens does not fit .* {width - 1}"):
        pack_prompts(tokenizer, TEXTS, width - 1)
    tokens, lengths = pack_answers(tokenizer, ["", TEXTS[0]], len(ids[0]))
    assert lengths.tolist() == [1, len(ids[0])]  # the second is cut: its end token has no room
    assert tokens[0, 0] == tokenizer.eos_id
    assert tokens[1].tolist() == ids[0]


def test_prompt_shape(tokenizer):
    """A multiple of 16 that holds the longest; over the limit, the message names the problem and the flag."""
    lengths = [len(tokenizer.encode(t)) for t in TEXTS]
    names, longest = ["own/a", "own/b", "own/c"], max(lengths)
    width = prompt_shape(tokenizer, TEXTS, names, longest)
    assert width % 16 == 0
    assert longest <= width < longest + 16
    culprit = names[lengths.index(longest)]
    with pytest.raises(InputError, match=rf"{culprit} has {longest} tokens.*--max_prompt_tokens {longest - 1}"):
        prompt_shape(tokenizer, TEXTS, names, longest - 1)


def test_pack_documents_worked_example():
    """The docstring's numbers, and a document that is cut."""
    tokens, segments, weights = pack_documents([([1, 2], [3]), ([4], [5])], 6, 0, 0.0)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4, 5, 0]],
        [[1, 1, 1, 2, 2, 0]],
        [[0, 0, 1, 0, 1, 0]],
    )
    tokens, segments, weights = pack_documents([([1, 2, 3], [4, 5])], 4, 0, 0.5)
    assert (tokens.tolist(), segments.tolist(), weights.tolist()) == (
        [[1, 2, 3, 4]],
        [[1, 1, 1, 1]],
        [[0.5, 0.5, 0.5, 1]],
    )


def test_pack_documents_keeps_every_token_once():
    """Random documents: each is one contiguous segment somewhere, with its weights; the rest is padding."""
    rng, next_id, documents = np.random.default_rng(3), 1, []
    for _ in range(200):
        n, m = (int(v) for v in rng.integers(1, 15, 2))
        documents.append((list(range(next_id, next_id + n)), list(range(next_id + n, next_id + n + m))))
        next_id += n + m
    tokens, segments, weights = pack_documents(documents, 40, 0, 0.25)
    assert tokens.shape == segments.shape == weights.shape == (len(tokens), 40)
    found = []
    for row, segment, weight in zip(tokens, segments, weights):
        assert (np.diff(np.append(segment[segment > 0], 10**6)) >= 0).all()
        for s in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == s)
            assert (np.diff(at) == 1).all()
            found.append((row[at].tolist(), weight[at].tolist()))
        assert (row[segment == 0] == 0).all()
        assert (weight[segment == 0] == 0).all()
    wanted = [(p + c, [0.25] * len(p) + [1.0] * len(c)) for p, c in documents]
    assert sorted(found) == sorted(wanted)
    assert len(tokens) < 1.25 * next_id / 40  # and rows are well filled


def test_base_documents(tokenizer):
    """Each problem once per prompt format; one revision in two without critique, the other half next epoch, and then
    only the attempt's answer again; BASE_PROSE of the answers are stated in prose."""
    quads = [quad(x=f"Problem {i}?" + " so" * (10 * (i % 7)), f=f"critique {i}") for i in range(40)]
    left_out, prose = [], []
    for epoch in range(2):
        documents = base_documents(tokenizer, quads, epoch)
        prompts = tokenizer.decode([p for p, _ in documents])
        answers = dict(zip(prompts, tokenizer.decode([a for _, a in documents])))
        assert all(a[-1] == tokenizer.eos_id for _, a in documents)
        prose.append(np.mean(["The answer is" in a for a in answers.values()]))
        solution = ROW["y1"].split("####")[0]
        for q in quads:
            assert answers[attempt_prompt(q.x)].startswith(solution)
            with_f, without = (answers.get(revise_prompt(q.x, q.y0, f)) for f in (q.f, ""))
            assert with_f.startswith(solution) if with_f else without in ("#### 6", "The answer is 6.")
        without_f = [i for i, q in enumerate(quads) if revise_prompt(q.x, q.y0, "") in prompts]
        wanted = [attempt_prompt(q.x) for q in quads]
        wanted += [revise_prompt(q.x, q.y0, "" if i in without_f else q.f) for i, q in enumerate(quads)]
        assert sorted(prompts) == sorted(wanted)
        assert len(without_f) == 20
        left_out += without_f
        lengths = [len(p) for p, _ in documents]
        by_length = np.corrcoef(np.arange(80), lengths)[0, 1]
        assert by_length > 0.5 if epoch == 0 else abs(by_length) < 0.4  # short first, then shuffled
        assert documents == base_documents(tokenizer, quads, epoch)
    assert sorted(left_out) == list(range(40))
    assert abs(np.mean(prose) - BASE_PROSE[1]) < 0.1  # all of these open with a P


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 12), (64, 1)])
def test_data_indices(n, batch):
    """Every epoch is a permutation; the rows of a step depend on (seed, step) alone."""
    steps = [data_indices(n, batch, 3, step) for step in range(3 * n)]
    rows = np.concatenate(steps)
    epochs = rows[: len(rows) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(e) for e in epochs[:3]}) == 3  # fresh orders
    for step in (2 * n, 5, 0):  # asked in any order
        np.testing.assert_array_equal(data_indices(n, batch, 3, step), steps[step])
    assert any((data_indices(n, batch, 4, step) != steps[step]).any() for step in range(n))
