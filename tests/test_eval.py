"""Evaluation, rewards, fingerprint and what a run prints, against values worked out by hand."""

import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest

from common import fingerprint as fingerprint_room
from common import prompts as prompts_room
from common.basics import InputError, mean
from common.batches import pack_answers, right_pad
from common.evaluation import credit_record, detector_auc, score_records, summarize
from common.fingerprint import count_budgets, fingerprint, run_identity, verifier_sha256, weights_sha256
from common.programs import CODE_LIMITS
from common.prompts import templates_sha256
from common.replay import Quadruple, replay_sha256
from common.report import plot_curves, print_precheck, print_summary, read_metrics
from common.rewards import outcome_scores, process_scores, step_rewards
from common.run import check_args, reduce, wandb_mode
from common.tokenizer import Tokenizer, train_tokenizer

ROOMS = pathlib.Path(fingerprint_room.__file__).parent
Y1 = "So <<2+3=5>>5.\n#### 5"
BAD = "So <<2+3=6>>6.\n#### 6"
META = {
    "task_id": "own/1", "domain": "math", "split": "test", "horizon": 1, "edit_distance": 2,
    "error_tags": ["local_arithmetic"], "error_span": [0, 14], "teacher": "own", "y0_correct": False,
    "y1_correct": True, "is_human_audited": False, "answer": "5",
}  # fmt: skip
QUAD = Quadruple("What is 2+3?", BAD, "The first step is wrong: 2+3 is not 6.", Y1, META)
OTHER = Quadruple(
    "Then 4+3?", "<<4+3=8>>8\n#### 8", "No.", "<<4+3=7>>7\n<<7+0=7>>7\n#### 7", {**META, "answer": "7"}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, so that positions can be counted by hand."""
    return train_tokenizer(["x"], 258)


# ---- credit localization ----
@pytest.mark.parametrize("seed", range(5))
def test_detector_auc_against_all_pairs(seed):
    """Random scores with many ties against two loops."""
    rng = np.random.default_rng(seed)
    score, label = rng.integers(0, 6, 40).astype(float), rng.integers(0, 2, 40)
    wins = [(a > b) + 0.5 * (a == b) for a, la in zip(score, label) for b, lb in zip(score, label) if la and not lb]
    assert detector_auc(score, label) == pytest.approx(sum(wins) / len(wins))


def test_detector_auc_without_both_kinds():
    """Undefined, not 0.5."""
    assert detector_auc(np.ones(3), np.zeros(3)) is None
    assert detector_auc(np.ones(3), np.ones(3)) is None
    assert detector_auc(np.zeros(0), np.zeros(0)) is None


def test_credit_record_by_hand(tokenizer):
    """Five tokens, the first two on the span."""
    q = dataclasses.replace(QUAD, y0="ab cd", meta={**META, "error_span": [0, 2]})
    shift, ids = np.array([-3.0, -1.0, 0.0, -2.0, 1.0]), tokenizer.encode("ab cd")
    record = credit_record(tokenizer, q, shift, ids)
    assert record["credit_auc"] == pytest.approx(5 / 6)  # of 3 and 1 against 0, 2 and -1, only 1 against 2 is lost
    assert record["credit_gap"] == pytest.approx(-1 / 3 + 2)
    nothing = {"credit_auc": None, "credit_gap": None}
    for span in (None, [0, 5]):  # nothing to find, and nothing to tell it from
        q = dataclasses.replace(q, meta={**META, "error_span": span})
        assert credit_record(tokenizer, q, shift, ids) == nothing


def test_score_records():
    """Every kept figure of one evaluated quadruple."""
    attempt = {"text": "#### 4", "tokens": 6, "truncated": False}
    revision = {"text": "So 5", "tokens": 9, "truncated": True}
    (record,) = score_records([QUAD], [attempt], [revision])
    assert record == {
        "task_id": "own/1", "horizon": 1, "edit_distance": 2, "error_tags": ["local_arithmetic"], "y0": 0.0,
        "attempt": 0.0, "revised": 0.0, "revised_tokens": 9, "revised_truncated": True, "revised_format": False,
        "attempt_tokens": 6, "attempt_truncated": False, "revision": "So 5",
    }  # fmt: skip
    (good,) = score_records([QUAD], [{**attempt, "text": Y1}], [{**revision, "text": Y1}])
    assert (good["y0"], good["attempt"], good["revised"], good["revised_format"]) == (0.0, 1.0, 1.0, True)


# ---- summary ----
def record(horizon, edit, tags, y0, attempt, revised, **further) -> dict:
    base = {"horizon": horizon, "edit_distance": edit, "error_tags": tags, "y0": y0, "attempt": attempt,
            "revised": revised, "revised_format": True, "revised_truncated": False, "revised_tokens": 10}  # fmt: skip
    return {**base, **further}


RECORDS = [
    record(2, 1, ["local_arithmetic"], 0.0, 1.0, 1.0, credit_auc=0.75, credit_gap=2.0),
    record(2, 3, ["local_arithmetic", "missing_case"], 0.0, 0.0, 0.0, revised_format=False, revised_truncated=True),
    record(10, 12, [], 1.0, 1.0, 0.0, credit_auc=None, credit_gap=None),
    record(10, 10, ["missing_case"], 0.0, 0.0, 1.0, credit_auc=0.25, credit_gap=-1.0),
    record(3, 2, [], 1.0, 1.0, 1.0, revised_tokens=60),
]


def test_summarize_by_hand():
    """Every figure of five records."""
    s = summarize(RECORDS)
    assert (s["n"], s["harness_errors"]) == (5, 0)
    figures = {
        "accuracy": 3 / 5, "accuracy_revised": 3 / 5, "delta_critique": 1 / 5, "accuracy_y0": 2 / 5,
        "wrong_to_right": 2 / 3, "right_to_wrong": 1 / 2, "format_frac": 4 / 5, "truncated_frac": 1 / 5,
        "tokens_mean": 20.0, "credit_auc": 0.5, "credit_gap": 0.5,
    }  # fmt: skip
    assert {k: s[k] for k in figures} == pytest.approx(figures)
    rates = lambda n, accuracy, revised, delta: pytest.approx(
        {"n": n, "accuracy": accuracy, "accuracy_revised": revised, "delta_critique": delta}
    )
    assert s["by_horizon"] == {"2": rates(2, 0.5, 0.5, 0.5), "3": rates(1, 1, 1, 0), "10": rates(2, 0.5, 0.5, 0)}
    assert list(s["by_horizon"]) == ["2", "3", "10"]  # as numbers, not as words
    assert s["by_edit_distance"] == {
        "<=2": rates(2, 1, 1, 0.5), "<=5": rates(1, 0, 0, 0), "<=10": rates(1, 0, 1, 1), ">10": rates(1, 1, 0, -1),
    }  # fmt: skip
    assert s["by_tag"] == {"local_arithmetic": rates(2, 0.5, 0.5, 0.5), "missing_case": rates(2, 0, 0.5, 0.5)}
    json.dumps(s, allow_nan=False)


def test_edit_buckets_stand_in_order():
    """From short to long in the written summary."""
    assert list(summarize(RECORDS)["by_edit_distance"]) == ["<=2", "<=5", "<=10", ">10"]


def test_summarize_without_right_attempts():
    """A rate over no records is None, not 0 and not NaN."""
    s = summarize(RECORDS[:2])
    assert s["right_to_wrong"] is None
    assert s["wrong_to_right"] == 0.5
    assert summarize(RECORDS[-1:])["credit_auc"] is None


def test_reduce_and_mean():
    """(sum, count) divided once; an empty count gives 0; None and NaN do not enter a mean."""
    assert reduce({"a": (6.0, 3.0), "b": (np.float32(1), np.int32(4))}) == {"a": 2.0, "b": 0.25}
    assert reduce({"a": (0.0, 0.0)}) == {"a": 0.0}
    assert mean([None, 1, 2, float("nan")]) == 1.5
    assert mean(iter([])) is None is mean([None])


# ---- rewards ----
GROUPS = [Y1, BAD, "#### 5", "<<4+3=7>>7\n#### 7", "#### 5", "<<4+3=7>>7\n<<7+0=7>>7\n#### 7"]


def test_outcome_and_process_scores():
    """Two prompts with three completions each: row b belongs to quadruple b."""
    outcome, process = outcome_scores(GROUPS, [QUAD, OTHER]), process_scores(GROUPS, [QUAD, OTHER])
    assert outcome.dtype == process.dtype == np.float32
    np.testing.assert_array_equal(outcome, [[1, 0, 1], [1, 0, 1]])
    np.testing.assert_allclose(process, [[1, 0, 1 / 2], [2 / 3, 0, 1]], rtol=1e-6)


def test_step_rewards_by_hand(tokenizer):
    """Ends on the last byte of each line, rewards up to the first step that does not hold, nothing after the end."""
    late = "<<4+3=7>>7\n<<7+0=8>>8\n#### 7"  # the second step is wrong, the answer right
    texts, T = [Y1, BAD, late, ""], 32
    ids = [[*tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    tokens, lengths = right_pad(ids, T, tokenizer.pad_id)
    reward, end = step_rewards(tokenizer, tokens, lengths, texts, [QUAD, OTHER])
    assert reward.shape == end.shape == (2, 2, T)
    positions = lambda row: np.flatnonzero(row).tolist()
    assert [positions(r) for r in end.reshape(4, T)] == [[13, 20], [13, 20], [9, 20, 27], []]
    assert [positions(r) for r in reward.reshape(4, T)] == [[13, 20], [], [9], []]
    assert set(np.unique(reward)) == set(np.unique(end)) == {0.0, 1.0}


def test_step_rewards_of_merged_tokens():
    """With a trained tokenizer the end is the token that holds the line's last character."""
    tokenizer = train_tokenizer([Y1, BAD, "na\u00efve\n"] * 20, 300)
    text = "na\u00efve: <<2+3=5>>5.\n#### 5"
    tokens, lengths = pack_answers(tokenizer, [text], 40)
    _, end = step_rewards(tokenizer, tokens, lengths, [text], [QUAD])
    for at, prefix in zip(np.flatnonzero(end[0, 0]), ("na\u00efve: <<2+3=5>>5.", text), strict=True):
        before, upto = tokenizer.decode([tokens[0, :at].tolist(), tokens[0, : at + 1].tolist()])
        assert not before.startswith(prefix)
        assert upto.startswith(prefix)


# ---- fingerprint ----
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
        ("verifier", 'r"\\1/\\2"', 'r"\\2/\\1"'),
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


def test_fingerprint_changes_with_the_limits_of_programs(monkeypatch):
    before = digest()
    monkeypatch.setitem(CODE_LIMITS, "timeout_s", 5.0)
    assert digest() != before


def test_what_trains_or_reports_is_not_the_verifier(tmp_path, monkeypatch):
    before = verifier_sha256()
    for room in ("distances", "report", "run", "base"):
        copy_of_the_rooms(tmp_path / room, monkeypatch, room, "import", "import ")
        assert verifier_sha256() == before


IDENTITY = dict(params=WEIGHTS, replay={"train": [QUAD], "test": [OTHER]}, shapes={"P_revise": 64, "T": 32}, steps=50,
                temperature=0.7, dtype=np.float32)  # fmt: skip
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
        dict(dtype=np.float16),
    ],
)
def test_identity_changes_with_what_was_loaded(tokenizer, changes):
    identity = lambda params, **rest: run_identity(params, tokenizer, **rest)["digest"]
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


# ---- run plumbing ----
@pytest.mark.parametrize(
    ("flag", "env", "netrc", "mode"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {}, "machine api.wandb.ai login user password x", "online"),
        ("auto", {}, "machine example.org login user password x", "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, None, "online"),
        ("auto", {"WANDB_API_KEY": ""}, None, "offline"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, None, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, None, "online"),
        ("offline", {"WANDB_API_KEY": "x", "WANDB_MODE": "online"}, None, "offline"),
        ("disabled", {}, None, "disabled"),
    ],
)
def test_wandb_mode(monkeypatch, tmp_path, flag, env, netrc, mode):
    """The flag first, then WANDB_MODE, then whether a key is known."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    assert wandb_mode(flag) == mode


def test_check_args():
    """The flag, its value and the least value stand in the message."""
    args = types.SimpleNamespace(group=0, rate=0.0, kl_coef=-0.5, steps=3)
    check_args(args, ("steps",), ())
    for above, least, words in (
        (("group",), (), "--group 0: must be at least 1"),
        (("rate",), (), "--rate 0.0: must be above 0"),
        ((), ("kl_coef",), "--kl_coef -0.5: must be at least 0"),
    ):
        with pytest.raises(InputError, match=words):
            check_args(args, above, least)


def test_plot_curves_writes_a_picture(tmp_path):
    """Lines without an accuracy (there may be others in the file) are passed over."""
    rows = [{"step": 0, "charts/accuracy": 0.1}, {"step": 1}, {"step": 2, "charts/accuracy": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_metrics(tmp_path) == rows
    plot_curves(tmp_path, summarize(RECORDS), summarize(RECORDS))
    flat = (tmp_path / "curves.png").read_bytes()
    better = summarize([{**r, "revised": 1.0} for r in RECORDS])
    plot_curves(tmp_path, summarize(RECORDS), better)
    assert flat.startswith(b"\x89PNG\r\n")
    assert flat != (tmp_path / "curves.png").read_bytes()


def test_print_summary(capsys, tmp_path):
    """Every line's numbers, base and trained in their columns, the change in points, `-` where there is no rate."""
    base = summarize(RECORDS[:2])
    final = summarize([{**r, "revised": 1.0} for r in RECORDS[:2]])
    result = {"timings": {"total": 61.4, "step": 2.0, "rollout": 1.25, "score": 0.25, "update": 0.5},
              "fingerprint": {"digest": "0123456789abcdef" * 4}}  # fmt: skip
    print_summary("b9__own__s1", tmp_path, result, base, final)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.strip().splitlines()]
    assert lines == [
        "b9__own__s1: 2 test problems, greedy, last checkpoint",
        "base trained change",
        "revised accuracy 50.0% 100.0% +50.0",
        "first-attempt accuracy 50.0% 50.0% +0.0",
        "delta_critique 50.0% 100.0% +50.0",
        "wrong -> right 50.0% 100.0% +50.0",
        "right -> wrong - -",
        "well-formed answers 50.0% 50.0% +0.0",
        "horizon 2 50.0% 100.0% +50.0",
        "credit localization: AUC 0.750 (0.5 = chance), gap +2.000 nats",
        "time: 61 s in all; a step 2.00 s (rollout 1.25, score 0.25, update 0.50)",
        f"fingerprint 0123456789abcdef; result.json, metrics.jsonl, curves.png in {tmp_path}",
    ]


@pytest.mark.parametrize(("gain", "says"), [(0.1, "carries signal: +10.0"), (0.02, "WARNING"), (-0.1, "WARNING")])
def test_print_precheck(capsys, gain, says):
    """In plain words whether the critique helps; 3 points are wanted."""
    print_precheck({"n": 8, "accuracy_y0": 0.0, "accuracy_with_f": 0.5 + gain, "accuracy_without_f": 0.5,
                        "leak_rate": 0.25, "zero_std_frac": 0.125, "groups": 8})  # fmt: skip
    out = capsys.readouterr().out
    assert says in out
    assert "answer leaked by f 25.0%" in out
    assert "without variance 12.5%" in out
