"""What makes two runs comparable: everything that was loaded or counted, and every rule a score passes through.

pytest tests/test_fingerprint.py
"""

import dataclasses
import pathlib
import shutil
import sys
import threading
import types

import numpy as np
import pytest
from examples import BAD, OTHER, QUAD, REFERENCE, WRONG, Y1, code_quad

from common import fingerprint as fingerprint_room
from common import programs as programs_room
from common import prompts as prompts_room
from common import sandbox as sandbox_room
from common.batches import pack_answers
from common.fingerprint import (
    count_budgets,
    fingerprint,
    program_sha256,
    run_identity,
    verifier_sha256,
    weights_sha256,
)
from common.plans import plan_tests
from common.programs import CODE_LIMITS
from common.prompts import templates_sha256
from common.replay import replay_sha256
from common.rewards import format_valid, outcome_scores, process_scores, step_rewards, uptake_scores

ROOMS = pathlib.Path(fingerprint_room.__file__).parent
WEIGHTS = {"blocks": {"q": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "embed": np.ones(2, np.float32)}


def digest(quads=(QUAD, OTHER), weights=WEIGHTS) -> str:
    return fingerprint(
        weights=weights_sha256(weights), replay=replay_sha256(list(quads)), templates=templates_sha256(),
        verifier=verifier_sha256(), steps=100,
    )["digest"]  # fmt: skip


@pytest.mark.parametrize(
    "quads",
    [
        (OTHER, QUAD),
        (QUAD,),
        (QUAD, dataclasses.replace(OTHER, f="No!")),
        (QUAD, dataclasses.replace(OTHER, meta={**OTHER.meta, "note": 1})),
        (QUAD, dataclasses.replace(OTHER, y0=OTHER.y0 + " ")),
    ],
)
def test_fingerprint_changes_with_the_replay(quads):
    """Order, number, any field of any line."""
    assert digest() == digest()
    assert digest(quads=quads) != digest()


@pytest.mark.parametrize(
    "weights",
    [
        {"blocks": {"q": WEIGHTS["blocks"]["q"] + np.float32(1e-6)}, "embed": WEIGHTS["embed"]},
        {"blocks": {"q": WEIGHTS["blocks"]["q"].reshape(3, 2)}, "embed": WEIGHTS["embed"]},
        {"blocks": {"k": WEIGHTS["blocks"]["q"]}, "embed": WEIGHTS["embed"]},
        {"blocks": {"q": WEIGHTS["blocks"]["q"].view(np.int32)}, "embed": WEIGHTS["embed"]},
        {"blocks": WEIGHTS["blocks"]},
    ],
)
def test_fingerprint_changes_with_the_weights(weights):
    """One value, a shape, a name, a dtype, a leaf less."""
    assert digest(weights=weights) != digest()


@pytest.mark.parametrize("name", ["ATTEMPT_TEMPLATE", "REVISE_TEMPLATE", "CRITIQUE_TEMPLATE"])
def test_fingerprint_changes_with_one_character_of_a_template(monkeypatch, name):
    """A space more is another prompt."""
    before = digest()
    monkeypatch.setattr(prompts_room, name, getattr(prompts_room, name) + " ")
    assert digest() != before


# ---- the verifier ---------------------------------------------------------------------------------------------------
def copy_of_the_rooms(tmp_path, monkeypatch, room: str, old: str, new: str) -> None:
    """The digests read the rooms of a copy in which `old` has become `new` in one room."""
    folder = tmp_path / "common"
    shutil.copytree(ROOMS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / f"{room}.py").read_text()
    assert old in text
    (folder / f"{room}.py").write_text(text.replace(old, new))
    monkeypatch.setattr(fingerprint_room, "__file__", str(folder / "fingerprint.py"))


@pytest.mark.parametrize(
    ("room", "old", "new"),
    [
        ("verifier", "return exact == value or", "return exact == value and"),
        ("answers", "_HASHES = re.compile(", "_HASHES = re.compile( "),
        ("values", '"thousand": 3', '"thousand": 4'),
        ("plans", "starts = [0, ", "starts = [1, "),
        ("plans", "def flaw_of_tests(tests: Any)", "def flaw_of_tests(tests)"),
        ("rewards", "def step_rewards(", "def step_rewards( "),
        ("hosts", "def by_host(", "def by_host( "),
        ("sandbox_server", "THREADS = 64", "THREADS = 65"),
        ("programs", "1e-8 + 1e-5", "1e-8 + 1e-4"),
    ],
)
def test_fingerprint_changes_with_a_rule_of_the_verifier(tmp_path, monkeypatch, room, old, new):
    """Whatever a score passes through is part of the verifier."""
    before = digest()
    copy_of_the_rooms(tmp_path, monkeypatch, room, old, new)
    assert digest() != before


def rooms_called(call) -> set[str]:
    """The rooms whose functions `call` calls, in whatever thread."""
    found = set()

    def note(frame, event, arg):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and path.parent == ROOMS:
            found.add(path.stem)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def score_both_kinds(tokenizer, tokens, lengths) -> None:
    """Every score that there is, of math answers and of programs; `tokens` are those of Y1 and BAD."""
    step_rewards(tokenizer, tokens, lengths, [Y1, BAD], [QUAD])
    for texts, q in (([Y1, BAD], QUAD), ([REFERENCE, WRONG, "def calc(a, b):"], code_quad())):
        for scores in (outcome_scores, process_scores, uptake_scores):
            assert scores(texts, [q]).shape == (1, len(texts))
        assert format_valid(texts[0], q.meta["domain"])


def test_every_room_that_a_score_passes_through_is_in_the_verifier(tmp_path, monkeypatch, byte_tokenizer, confined):
    """With nothing kept from before: no verdict, no plan, no server. A room that scores call and the digest does not
    read would be a rule that could change unseen. (The server itself is another process, and above.)"""
    monkeypatch.setattr(programs_room, "_VERDICTS", {})
    monkeypatch.setattr(sandbox_room, "_sandboxes", {})
    plan_tests.cache_clear()
    packed = pack_answers(byte_tokenizer, [Y1, BAD], 32)
    called = rooms_called(lambda: score_both_kinds(byte_tokenizer, *packed))
    sandbox_room.close_sandboxes()
    assert {"rewards", "answers", "values", "verifier", "programs", "plans", "sandbox", "tokenizer", "hosts"} <= called
    before = verifier_sha256()
    for room in sorted(called):
        copy_of_the_rooms(tmp_path / room, monkeypatch, room, "def ", "def  ")
        assert verifier_sha256() != before, f"{room} scores, and its source is not in the digest"


def test_fingerprint_changes_with_the_limits_of_programs(monkeypatch):
    before = digest()
    monkeypatch.setitem(CODE_LIMITS, "timeout_s", 5.0)
    assert digest() != before


def test_what_trains_or_reports_is_not_the_verifier(tmp_path, monkeypatch):
    before = verifier_sha256()
    for room in ("distances", "report", "run", "base"):
        copy_of_the_rooms(tmp_path / room, monkeypatch, room, "import", "import ")
        assert verifier_sha256() == before


# ---- runs -----------------------------------------------------------------------------------------------------------
IDENTITY = dict(params=WEIGHTS, replay={"train": [QUAD], "test": [OTHER]}, shapes={"P_revise": 64, "T": 32}, steps=50,
                temperature=0.7, eval_problems=0, dtype=np.float32)  # fmt: skip
BUDGETS = dict(steps=50, B=8, G=8, shapes={"P_revise": 64, "T": 32}, n_test=10)


@pytest.mark.parametrize(
    "changes",
    [
        dict(params={**WEIGHTS, "embed": np.zeros(2, np.float32)}),
        dict(replay={"train": [dataclasses.replace(QUAD, f="No!")], "test": [OTHER]}),
        dict(replay={"train": [QUAD], "test": [dataclasses.replace(OTHER, f="No!")]}),
        dict(shapes={"P_revise": 64, "T": 33}),
        dict(steps=51),
        dict(temperature=0.8),
        dict(eval_problems=1),
        dict(dtype=np.float16),
    ],
)
def test_identity_changes_with_what_was_loaded(byte_tokenizer, changes):
    def identity(params, steps, temperature, eval_problems, **rest):
        args = types.SimpleNamespace(steps=steps, temperature=temperature, eval_problems=eval_problems)
        return run_identity(args, params, byte_tokenizer, **rest)["digest"]

    assert identity(**{**IDENTITY, **changes}) != identity(**IDENTITY) == identity(**IDENTITY)


@pytest.mark.parametrize(
    "changes", [dict(steps=49), dict(B=4), dict(G=4), dict(B=16, G=4), dict(n_test=9), dict(shapes={"T": 16})]
)
def test_fingerprint_changes_with_what_was_counted(changes):
    """The group size even where the number of completions stays."""
    assert count_budgets(**BUDGETS) == {
        "optimizer_steps": 50, "training_tokens": 50 * 8 * 8 * 32, "rollout_budget": [50, 8, 8, 32],
        "test_compute_budget": 10 * 2 * 32,
    }  # fmt: skip
    digest = lambda budgets: fingerprint(**count_budgets(**budgets))["digest"]
    assert digest({**BUDGETS, **changes}) != digest(BUDGETS) == digest(BUDGETS)


def test_fingerprint_fields():
    """Fields are kept beside the digest; their order does not matter, their values do; None proves nothing."""
    one = fingerprint(a=1, b="x")
    assert (one["a"], one["b"]) == (1, "x")
    assert one == fingerprint(b="x", a=1)
    assert len({one["digest"], fingerprint(a=2, b="x")["digest"], fingerprint(a=1, c="x")["digest"]}) == 3
    assert fingerprint(a=0, b="", c=False)["digest"]  # empty is not None
    with pytest.raises(ValueError, match="b, c"):
        fingerprint(a=1, b=None, c=None)


def test_a_programs_digest_is_of_its_code(tmp_path):
    """What is said about it may change, what it does may not."""
    path, code = tmp_path / "a.py", ['"""About."""', "x = 1  # one", "def f():", '    """Of f."""', "    return 'a'"]
    variants = {
        "as it is": code, "another docstring": [code[0], *code[1:3], '    """Of f,', '    at length."""', code[4]],
        "a comment and a gap": ["# first", *code[:2], "", "    # in between", *code[2:]], "no docstring": code[1:],
    }  # fmt: skip
    changes = {"another value": [c.replace("= 1", "= 2") for c in code], "another text": [*code[:4], "    return 'b'"]}
    digests = {}
    for name, lines in (variants | changes).items():
        path.write_text("\n".join(lines))
        digests[name] = program_sha256(path)
    assert {digests[name] for name in variants} == {digests["as it is"]}
    assert len({*digests.values()}) == 1 + len(changes)
