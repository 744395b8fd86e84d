"""Blinded pairs, what judgements say, audits of a replay.

pytest tests/test_human.py
"""

import csv
import io
import json
import random
from collections import Counter

import numpy as np
import pytest
import tyro
from examples import math_line, refused
from scipy.stats import t

from common.basics import InputError, sha256
from common.human import (
    AUDIT,
    PAIRS,
    Export,
    HumanArgs,
    Pair,
    Score,
    cohen_kappa,
    draw,
    export,
    export_audit,
    fleiss_kappa,
    human_main,
    read_audit,
    read_pairs,
    score,
    win_rate,
)
from common.replay import parse_quadruple, read_replay, replay_sha256, write_replay
from common.results import SCHEMA_VERSION
from common.sheets import read_key

METHOD, AGAINST = "b5_cts", "b3_grpo_verifier"


def quad(i: int, split: str = "test"):
    return parse_quadruple(math_line({"task_id": f"own/{i}", "split": split}, x=f"What is {i}+3?"), "here:1")


QUADS = [quad(i) for i in range(12)]


# ---- runs -----------------------------------------------------------------------------------------------------------
def write_run(folder, method: str, seed: int, replay, texts=lambda i: f"#### {i}", fingerprint=None, **fields):
    """A finished run's folder with what an evaluation of people's reads of it."""
    path = folder / f"{method}__own__s{seed}__{sha256(str(fields))[:8]}"
    path.mkdir(parents=True)
    args = {"task": "own", "seed": seed, "replay": str(replay), **fields}
    (path / "args.json").write_text(json.dumps(args))
    of = lambda q: {key: q.meta[key] for key in ("task_id", "horizon", "edit_distance", "error_tags")}
    scores = {"y0": 0.0, "attempt": 0.0, "revised": 0.0}
    records = [{**of(q), **scores, "revision": texts(i)} for i, q in enumerate(QUADS)]
    prints = {"test_replay": replay_sha256(QUADS), "optimizer_steps": 5, "digest": method, **(fingerprint or {})}
    result = {"schema_version": SCHEMA_VERSION, "method": method, "args": args, "records": records,
              "fingerprint": prints, "summary": {}, "base": {}}  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def runs(tmp_path):
    """Two seeds of two methods, one more of a third; on problem 0 the two write the same text."""
    (tmp_path / "replay").mkdir()
    write_replay(tmp_path / "replay" / "test.jsonl", QUADS)
    for seed in (0, 1):
        write_run(tmp_path / "runs", METHOD, seed, tmp_path / "replay")
        other = lambda i: "#### 0" if i == 0 else f"no {i}"
        write_run(tmp_path / "runs", AGAINST, seed, tmp_path / "replay", other)
    write_run(tmp_path / "runs", "b0_sft", 0, tmp_path / "replay")
    return tmp_path / "runs"


def test_pairs_of_two_methods(runs):
    """Of the same problem and seed, whichever way the folders are given; other methods are passed over."""
    pairs = read_pairs([str(runs)], METHOD, AGAINST)
    assert [(p.seed, p.quad.meta["task_id"]) for p in pairs] == [(s, f"own/{i}") for s in (0, 1) for i in range(12)]
    assert pairs[1] == Pair("own", 0, QUADS[1], "#### 1", "no 1")
    assert read_pairs([str(path) for path in runs.iterdir()], METHOD, AGAINST) == pairs
    (runs / "cells").mkdir()  # where a sweep keeps a log of each run
    (runs / "cells" / f"{METHOD}__fixtures_math__s0__01234567.log").write_text("")
    assert read_pairs([str(runs.parent)], METHOD, AGAINST) == read_pairs([str(runs)], METHOD, AGAINST) == pairs


def test_runs_that_make_no_pairs(runs, tmp_path):
    pairs = lambda *folders, **how: read_pairs([*map(str, folders)], METHOD, how.pop("against", AGAINST), **how)
    refused(lambda: pairs(tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(lambda: pairs(runs, against="b2_grpo"), "no finished runs of 'b2_grpo'; there are b5_cts; run what is")
    refused(lambda: read_pairs([str(runs)], "b1_dpo", "b2_grpo"), "there are no runs of b1_dpo or b2_grpo")
    again = write_run(tmp_path / "again", METHOD, 1, tmp_path / "replay")
    refused(lambda: pairs(runs, again), str(again), "'seed' 1 is there twice", str(runs), "give one of them")
    path = next(runs.glob("b5*s1*")) / "result.json"
    whole = path.read_text()
    for text in (whole[:100], "[]", whole.replace("revision", "text"), whole.replace('"#### 1"', "null"), ""):
        path.write_text(text)
        refused(lambda: pairs(runs), str(path))
    path.unlink()
    refused(lambda: pairs(runs), "own: b3_grpo_verifier has 'seed' 1, and b5_cts no finished run of that; run what is")
    assert len(pairs(runs, allow_partial=True)) == 12
    assert len(read_pairs([str(runs)], "b0_sft", AGAINST, allow_partial=True)) == 12  # nobody asked for b5's
    path.write_text(whole.replace('"optimizer_steps": 5', '"optimizer_steps": 6'))
    with pytest.raises(InputError, match="2 fingerprints, which differ in optimizer_steps;"):
        pairs(runs)
    path.write_text(json.dumps({**json.loads(whole), "records": json.loads(whole)["records"][:3]}))
    refused(lambda: pairs(runs), "have 'records' of other problems")
    path.write_text(whole)
    write_replay(tmp_path / "replay" / "test.jsonl", QUADS[:-1])
    refused(lambda: pairs(runs), "own: the test.jsonl of its runs is not here; give its folder with --replay")
    refused(lambda: pairs(runs, replay=str(tmp_path)), "no test.jsonl that own was tested on")
    (tmp_path / "own").mkdir()
    write_replay(tmp_path / "own" / "test.jsonl", QUADS)
    for given in (tmp_path, tmp_path / "own"):  # the folder of the task, or the one of all
        assert len(pairs(runs, runs, replay=str(given))) == 24


def test_arms_are_not_mixed(runs, tmp_path):
    """A method with other flags is another arm, of the name that a report gives it."""
    write_run(runs, METHOD, 2, tmp_path / "replay", lam_align=0.0)
    write_run(runs, AGAINST, 2, tmp_path / "replay")
    refused(lambda: read_pairs([str(runs)], METHOD, AGAINST), "b3_grpo_verifier has 'seed' 2, and b5_cts no finished")
    pairs = read_pairs([str(runs)], METHOD, AGAINST, allow_partial=True)
    assert {p.seed for p in pairs} == {0, 1} and len(pairs) == 24
    ablated = read_pairs([str(runs)], "b5_cts lam_align=0", AGAINST, allow_partial=True)
    assert {p.seed for p in ablated} == {2}


def test_drawing_takes_a_problem_twice_only_when_all_are_taken(runs):
    pairs, rng = read_pairs([str(runs)], METHOD, AGAINST), np.random.default_rng(0)
    chosen, same = draw(pairs, 11, rng)
    assert sorted(Counter(p.quad.meta["task_id"] for p in [*chosen, *same]).values()) == [1] * (11 + len(same))
    assert {p.seed for p in chosen} == {0, 1} and all(p.quad.meta["task_id"] == "own/0" for p in same)
    chosen, same = draw(pairs, 1000, rng)
    assert (len(chosen), len(same)) == (22, 2)


# ---- the sheets -----------------------------------------------------------------------------------------------------
def fill(path, label):
    """Answer a sheet: label(line as a dict) gives the cells of the open columns."""
    head, *lines = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    width = next(i for i, name in enumerate(head) if " (" in name)
    rows = [[*line[:width], *label(dict(zip(head, line)))] for line in lines]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    path.write_bytes(text.getvalue().encode())
    return path


def by_text(judge):
    """A rater who sees texts: judge(problem, a is the method's) is a, b, tie or skip, for the method's being A."""
    swap = {"a": "b", "b": "a"}

    def label(line):
        ours = line["text_a"].startswith("#")
        wanted = judge(line["problem"])
        return [wanted if ours else swap.get(wanted, wanted), ""]

    return label


@pytest.fixture
def out(runs, tmp_path):
    export(read_pairs([str(runs)], METHOD, AGAINST), tmp_path / "out", METHOD, AGAINST, raters=3)
    return tmp_path / "out"


def test_sheets_are_blind_and_balanced(out):
    """The same pairs for all, in orders of their own, the method on each side in half of them; no name in any sheet."""
    key = read_key(out / "key.json", "pairs")
    rows = {name: list(some.values()) for name, some in key["sheets"].items()}
    place = lambda row: (row["task_id"], row["seed"])
    assert list(rows) == ["rater1", "rater2", "rater3"]
    orders = [[place(row) for row in some] for some in rows.values()]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) and orders[0] != orders[1] != orders[2]
    for some in rows.values():
        assert Counter(row["a"] for row in some) == {"method": 11, "against": 11}
        assert all({row["a"], row["b"]} == {"method", "against"} for row in some)
    assert len({tuple(row["a"] for row in sorted(some, key=place)) for some in rows.values()}) == 3
    sheets = "".join(path.read_text() for path in out.iterdir() if path.name != "key.json")
    assert not [word for word in (METHOD, AGAINST, '"method"', "against", "own/1") if word in sheets]


def test_the_seed_draws_sheets(runs, tmp_path):
    pairs = read_pairs([str(runs)], METHOD, AGAINST)
    keys = [export(pairs, tmp_path / f"{i}", METHOD, AGAINST, n=5, seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert keys[0] == keys[1] != keys[2] and keys[0]["of"] == {"own": [0, 1]}
    drawn = [export(pairs, tmp_path / f"drawn{i}", METHOD, AGAINST, n=5) for i in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]  # who can guess it sees through the blinding
    assert [len(some) for some in keys[0]["sheets"].values()] == [5, 5]
    same = [p for p in pairs if p.quad.meta["task_id"] == "own/0"]
    refused(lambda: export(same, tmp_path / "same", METHOD, AGAINST), "nothing to judge")


def test_scores_of_raters(out):
    """One for whom the method always wins, one for whom it loses on a problem, one with ties and skips."""
    odd = lambda x: int(x.split()[2].partition("+")[0]) % 2 == 1
    judges = [lambda x: "a", lambda x: "b" if x == "What is 7+3?" else "a", lambda x: "tie" if odd(x) else "skip"]
    sheets = [fill(out / f"rater{i}.csv", by_text(judge)) for i, judge in enumerate(judges, 1)]
    found = score(sheets, out / "key.json")
    assert found["raters"]["rater1"]["outcomes"] == {"method": 22}
    assert found["raters"]["rater2"]["outcomes"] == {"method": 20, "against": 2}
    assert found["raters"]["rater3"]["labels"] == {"a": 0, "b": 0, "tie": 12, "skip": 10}
    rate = found["win_rate"]
    assert rate["rate"] == pytest.approx((22 + 20 + 6) / 56) and (rate["judgements"], rate["problems"]) == (56, 11)
    more = found["win_rate_same_text_as_ties"]
    assert more["rate"] == pytest.approx((22 + 20 + 6 + 3) / 62) and (more["judgements"], more["problems"]) == (62, 12)
    assert (found["pairs"], found["same_text"], found["missing_sheets"]) == (22, 2, [])
    assert found["seeds_by_task"] == {"own": [0, 1]}
    both = found["cohen"]["rater1 rater2"]
    assert (both["n"], both["agreed"], both["kappa"]) == (22, 20, 0.0) and both["table"]["method"]["against"] == 2
    assert found["cohen"]["rater1 rater3"]["n"] == 12 and found["fleiss"]["n"] == 12
    assert {(d["task_id"], d["seed"]) for d in found["disagreements"]} == {
        (f"own/{i}", s) for i in range(1, 12, 2) for s in (0, 1)
    }
    assert found["disagreements"][-2]["outcomes"] == {"rater1": "method", "rater2": "method", "rater3": "tie"}


def test_one_rater_agrees_with_nobody(out):
    found = score([fill(out / "rater2.csv", by_text(lambda x: "a"))], out / "key.json")
    assert (found["cohen"], found["fleiss"], found["missing_sheets"]) == ({}, None, ["rater1", "rater3"])
    assert found["win_rate"]["rate"] == 1.0 and 0.5 < found["win_rate"]["interval"][0] < 0.95


def test_sheets_that_are_not_scored(out):
    path = fill(out / "rater1.csv", by_text(lambda x: "a"))
    refused(lambda: score([path, path], out / "key.json"), "rater1.csv", "second sheet of rater1")
    refused(lambda: score([fill(path, lambda line: ["c", ""])], out / "key.json"), "row r001", "label is 'c'")


def test_from_the_command_line(runs, tmp_path, capsys):
    """What `aggregate.py human WORDS` parses and does."""
    args = lambda *words: tyro.cli(HumanArgs, args=[*map(str, words)])
    out = tmp_path / "human"
    words = ["export", runs, "--pairs", 6, "--out", out]
    assert args(*words) == Export((str(runs),), pairs=6, out=str(out))
    human_main(args(*words))
    assert "6 pairs of 24" in capsys.readouterr().out
    wins, loses = by_text(lambda x: "a"), by_text(lambda x: "b")
    sheets = [fill(out / "rater1.csv", wins), fill(out / "rater2.csv", lambda line: [loses(line)[0], "=a typo, or so"])]
    found = human_main(args("score", *sheets, "--key", out / "key.json", "--out", out))
    assert json.loads((out / "human.json").read_text()) == json.loads(json.dumps(found))
    said = capsys.readouterr().out
    for part in (
        "win rate 0.500",
        "12 judgements of 6 problems",
        "agreed on 0 of 6 pairs",
        "6 pairs on which raters dis",
    ):
        assert part in said, said
    lines = list(csv.reader((out / "disagreements.csv").open(encoding="utf-8-sig")))
    assert len(lines) == 7 and lines[1][3:] == ["method", "against", "", "'=a typo, or so"]  # no formula
    assert len(found["comments"]) == 6 and found["comments"][0]["comments"] == {"rater2": "=a typo, or so"}
    (out / "key.json").rename(tmp_path / "key.json")  # kept apart: the sheets that are out stay
    refused(lambda: human_main(args(*words)), "rater1.csv is there already")
    refused(lambda: human_main(args(*words, "--seed", -1)), "--seed -1: must be at least 0")
    assert args("score") == Score(())
    for words in (["score"], ["export"], ["export", runs, "--pairs", 0], ["export", runs, "--against", METHOD]):
        refused(lambda words=words: human_main(args(*words)), "give")


# ---- statistics -----------------------------------------------------------------------------------------------------
def ratings() -> list[list[str]]:
    """Four raters' labels of forty items."""
    rng, labels = random.Random(0), ("method", "against", "tie")
    truth = [rng.choice(labels) for _ in range(40)]
    return [[label if rng.random() < 0.6 else rng.choice(labels) for label in truth] for _ in range(4)]


def test_kappas_are_those_of_scikit_learn_and_statsmodels():
    """scikit-learn 1.9.1, statsmodels 0.15.0, in an environment of their own, for `ratings()` as `r`:

    python -c "from sklearn.metrics import cohen_kappa_score as k; print(k(r[0], r[1]), k(r[0], r[2]), k(r[2], r[3]))"
    python -c "from statsmodels.stats.inter_rater import *; print(*(fleiss_kappa(aggregate_raters(np.array(
        [[('method', 'against', 'tie').index(x) for x in row] for row in zip(*r[:k])]))[0]) for k in (3, 4)))"
    """
    r = ratings()
    found = [cohen_kappa(r[0], r[1]), cohen_kappa(r[0], r[2]), cohen_kappa(r[2], r[3])]
    np.testing.assert_allclose(found, [0.1713747645951036, 0.5185185185185186, 0.46153846153846156], atol=1e-12)
    found = [fleiss_kappa(list(zip(*r[:k]))) for k in (3, 4)]
    np.testing.assert_allclose(found, [0.2796967144060657, 0.33798321314576196], atol=1e-12)


def test_kappas_that_say_nothing():
    """One item, none, or one label alone; not 0, which would be agreement by chance."""
    assert cohen_kappa(["a"], ["a"]) is cohen_kappa([], []) is cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert fleiss_kappa([]) is fleiss_kappa([("a", "b")]) is fleiss_kappa([("a", "a"), ("a", "a")]) is None
    assert cohen_kappa(["a", "b"], ["a", "b"]) == fleiss_kappa([("a", "a"), ("b", "b")]) == 1.0


def test_win_rate_of_independent_judgements_is_wilsons():
    """One judgement a problem: Wilson's interval for n - 1 of them (the variance is the sample's), Student's t."""
    n, wins = 40, 28
    found = win_rate({i: [float(i < wins)] for i in range(n)})
    p, z, m = wins / n, t.ppf(0.975, n - 1), n - 1
    middle, half = (
        (p + z**2 / (2 * m)) / (1 + z**2 / m),
        z * np.sqrt(p * (1 - p) / m + z**2 / (4 * m**2)) / (1 + z**2 / m),
    )
    np.testing.assert_allclose(found["interval"], [middle - half, middle + half], rtol=1e-12)


def test_judgements_of_one_problem_are_no_independent_ones():
    """Three raters who agree tell what one tells; three who do not, more."""
    width = lambda found: found["interval"][1] - found["interval"][0]
    one = win_rate({i: [float(i < 14)] for i in range(20)})
    three = win_rate({i: [float(i < 14)] * 3 for i in range(20)})
    assert three["interval"] == pytest.approx(one["interval"]) and three["judgements"] == 60
    parted = [[1.0, 1.0, 0.0]] * 10 + [[1.0, 1.0, 1.0]] * 6 + [[0.0, 1.0, 0.0]] * 4
    assert win_rate(dict(enumerate(parted)))["rate"] == pytest.approx(0.7)
    assert width(win_rate(dict(enumerate(parted)))) < 0.7 * width(one)


def test_win_rates_at_the_edges():
    assert win_rate({}) == {"rate": None, "interval": None, "judgements": 0, "problems": 0}
    assert win_rate({1: [1.0, 0.0]}) == {"rate": 0.5, "interval": None, "judgements": 2, "problems": 1}
    low, high = win_rate({i: [1.0] for i in range(20)})["interval"]
    assert 0.75 < low < 0.9 and high == 1.0  # twenty of twenty is no certainty


def test_intervals_cover():
    """95 % of the true rates, with problems that differ, ties, two or three judgements each, few and many problems."""
    rng, covered = np.random.default_rng(0), []
    for problems, judgements, ties in ((20, 2, 0.2), (60, 3, 0.5)):
        for _ in range(300):
            chances = rng.beta(2.0, 1.5, problems)
            wins = (rng.random((judgements, problems)) < chances).astype(float)
            wins[rng.random(wins.shape) < ties] = 0.5
            low, high = win_rate({i: list(wins[:, i]) for i in range(problems)})["interval"]
            covered.append(low <= ties / 2 + (1 - ties) * 2.0 / 3.5 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


# ---- audits ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def replay(tmp_path):
    folder = tmp_path / "replay"
    folder.mkdir()
    for at, split in ((0, "train"), (100, "test")):
        write_replay(folder / f"{split}.jsonl", [quad(at + i, split) for i in range(6)])
    return folder


ANSWERS = lambda line: {"r001": ["yes", "no", "yes", "it leaks"], "r002": ["yes", "yes", "skip", ""]}.get(
    line["row"], ["yes", "yes", "no", ""]
)


def test_an_audit_sets_what_it_answers(replay, tmp_path):
    """And only that: a quadruple with a question skipped stays unaudited, all others stay as they are."""
    key = export_audit(replay, tmp_path / "audit", n=7)
    rows = key["sheets"]["audit"]
    assert len(rows) == 7 and {row["split"] for row in rows.values()} == {"train", "test"}
    before = {split: read_replay(replay / f"{split}.jsonl") for split in ("train", "test")}
    sheet = fill(tmp_path / "audit" / "audit.csv", ANSWERS)
    report = read_audit(sheet, tmp_path / "audit" / "key.json", replay)
    assert report == {
        "rows": 7,
        "audited": 6,
        "right": 1.0,
        "first": pytest.approx(5 / 6),
        "leaks": pytest.approx(1 / 6),
    }
    for split, quads in before.items():
        for was, now in zip(quads, read_replay(replay / f"{split}.jsonl"), strict=True):
            row = next((row for row, place in rows.items() if place["task_id"] == was.meta["task_id"]), None)
            if row in (None, "r002"):
                assert now == was
            else:
                answers = dict(zip(("right", "first", "leaks"), ANSWERS({"row": row})))
                assert now.meta == {**was.meta, "is_human_audited": True, "audit": answers}
                assert (now.x, now.y0, now.f, now.y1) == (was.x, was.y0, was.f, was.y1)
    assert read_audit(sheet, tmp_path / "audit" / "key.json", replay) == report  # again: nothing else


def test_audits_that_are_refused_change_nothing(replay, tmp_path):
    export_audit(replay, tmp_path / "audit", n=12)
    key, bytes_of = tmp_path / "audit" / "key.json", lambda: [p.read_bytes() for p in sorted(replay.iterdir())]
    before, sheet = bytes_of(), tmp_path / "audit" / "audit.csv"
    refused(lambda: read_audit(sheet, key, replay), "row r001", "has no right")
    fill(sheet, ANSWERS)
    refused(lambda: score([sheet], key), "is a key of audit, not of pairs")
    assert bytes_of() == before
    write_replay(replay / "test.jsonl", [quad(i + 200) for i in range(6)])
    before = bytes_of()
    refused(lambda: read_audit(sheet, key, replay), "audit.csv, row r0", "test.jsonl no longer has own/10")
    assert bytes_of() == before
    refused(lambda: export_audit(tmp_path / "none", tmp_path / "other"), "holds no replay")
    refused(lambda: export_audit(replay, tmp_path / "other", seed=-1), "--seed -1")


def test_the_forms_have_labels_with_letters_of_their_own():
    for form in (PAIRS, AUDIT):
        for question in form.questions:
            assert len({label[0] for label in question.labels}) == len(question.labels)
