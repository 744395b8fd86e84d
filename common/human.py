"""People judge: pairs of revisions, blinded, with what the judgements say and how far the raters agree; and audits of a
replay's critiques. Used by `aggregate.py human` and by teacher.py; knows no model, and reads what runs have written."""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import tyro

from common.basics import InputError, read_json, sha256, writable, write_atomic
from common.replay import SPLITS, Quadruple, find_test_split, read_replay, write_replay
from common.results import RUN_NAME, Task, find_runs, read_runs
from common.sheets import Form, Question, cell, read_key, read_sheet, write_sheets

PAIRS = Form(
    "Which revision is better?",
    "Each row is a problem, a flawed attempt at it, a critique of that attempt, and two revisions, A and B, by two"
    " programs. Say which revision answers the problem better: a right answer beats a wrong one; of two right or two"
    " wrong ones the better reasoned wins. Judge alone; nobody may tell you which is whose.",
    {"problem": "Problem", "attempt": "Attempt", "critique": "Critique", "text_a": "A", "text_b": "B"},
    (Question("label", "Which revision is better?", {
        "a": "A is better", "b": "B is better", "tie": "equally good or bad", "skip": "I cannot judge"}),),
)  # fmt: skip
YES_NO = lambda yes, no: {"yes": yes, "no": no, "skip": "I cannot judge"}
AUDIT = Form(
    "Are these critiques right?",
    "Each row is a problem, a flawed attempt at it, the step that is flagged, a critique, and the right solution.",
    {"problem": "Problem", "attempt": "Attempt", "flagged": "Flagged step", "critique": "Critique",
     "solution": "Right solution"},
    (Question("right", "Is what the critique says true?", YES_NO("it is true", "it is not")),
     Question("first", "Is the flagged step the first wrong one?", YES_NO("it is the first", "it is not")),
     Question("leaks", "Does the critique give the final answer away?", YES_NO("it does", "it does not"))),
    side_by_side=3,
)  # fmt: skip
SIDES = ("method", "against")
OUTCOMES = (*SIDES, "tie")  # what a label says once the sides are known


# ---- pairs ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Pair:
    """A quadruple, the training seed of two runs, and their revisions."""

    task: str
    seed: int
    quad: Quadruple
    method: str
    against: str

    @property
    def place(self) -> dict[str, Any]:
        return {"task": self.task, "task_id": self.quad.meta["task_id"], "seed": self.seed}


def read_arms(runs: Iterable[str], arms: tuple[str, str]) -> list[Task]:
    """The tasks with all runs of the two arms' methods, checked as those of a table: one fingerprint and one set of
    problems a task. Runs of other methods may be in any state."""
    methods, own = {arm.split()[0] for arm in arms}, []
    for folder in find_runs(runs):
        named = RUN_NAME.fullmatch(folder.name)  # else its result says what it is, if it has one
        result = {} if named else read_json(folder / "result.json", {})
        if (named[1] if named else result.get("method") if isinstance(result, dict) else None) in methods:
            own.append(folder)
    if not own:
        raise InputError(f"there are no runs of {' or '.join(sorted(methods))} in {', '.join(runs)}")
    return read_runs(own, allow_partial=True)


def read_pairs(
    runs: Iterable[str], method: str, against: str, replay: str | None = None, allow_partial: bool = False
) -> list[Pair]:
    """The revisions of two arms (named as in a report) that are of one problem and one training seed. InputError where
    one of them lacks a task or a seed that the other has; with `allow_partial` that is left out and said."""
    pairs, lost, tasks = [], [], read_arms(runs, (method, against))
    for task in tasks:
        lacks = [arm for arm in (method, against) if arm not in task.arms]
        if lacks:
            there = f"there are {', '.join(task.arms)}"
            lost.append(f"{task.name}: no finished runs of {' and '.join(map(repr, lacks))}; {there}")
            continue
        seeds = task.seeds(method, against)
        for arm, other in ((method, against), (against, method)):
            begun = {seed for (name, seed), why in task.missing.items() if name == arm and why != "no run"}
            alone = sorted({*task.arms[arm], *begun} - {*seeds, *task.arms[other]})
            if alone:
                which = ", ".join(map(str, alone))
                lost.append(f"{task.name}: {arm} has 'seed' {which}, and {other} no finished run of that")
        first = task.first
        quads = find_test_split(task.name, first.fingerprint.get("test_replay"), replay, first.args.get("replay"))
        if not quads:
            raise InputError(f"{task.name}: the test.jsonl of its runs is not here; give its folder with --replay")
        at = {name: i for i, name in enumerate(first.ids)}
        known = [(q, at[q.meta["task_id"]]) for q in quads if q.meta["task_id"] in at]
        for seed in seeds:
            left, right = (task.arms[arm][seed].texts for arm in (method, against))
            pairs += [Pair(task.name, seed, q, left[i], right[i]) for q, i in known]
    if lost and not (allow_partial and pairs):
        raise InputError(f"{lost[0]}; run what is missing" + (", or --allow_partial leaves it out" if pairs else ""))
    for text in lost:
        print(f"left out: {text}")
    return pairs


def draw(pairs: list[Pair], n: int, rng: np.random.Generator) -> tuple[list[Pair], list[Pair]]:
    """(n pairs to be judged, pairs met on the way whose texts are the same) in random order: first one of every
    problem, at a random seed, then another; judgements of one problem tell less than those of two."""
    of_problem = defaultdict(list)
    for i in rng.permutation(len(pairs)):
        of_problem[pairs[i].task, pairs[i].quad.meta["task_id"]].append(pairs[i])
    rounds = itertools.chain(*itertools.zip_longest(*of_problem.values()))
    chosen, same = [], []
    for pair in filter(None, rounds):
        if len(chosen) == n:
            break
        (same if pair.method == pair.against else chosen).append(pair)
    return chosen, same


def export(
    pairs: list[Pair], out: pathlib.Path, method: str, against: str, n: int = 100, raters: int = 2,
    seed: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a sheet for each rater (rater1.csv, rater1.html, ...) and key.json into `out`; returns the key. All raters
    judge the same pairs, each in an order and with sides of their own, drawn from `seed`; None draws one, since who can
    guess it sees through the blinding."""
    seed = secrets.randbits(62) if seed is None else seed
    rng = np.random.default_rng([seed, int(sha256(f"{method}\0{against}")[:8], 16)])
    chosen, same = draw(pairs, n, rng)
    if not chosen:
        raise InputError(f"{method} and {against} wrote the same text everywhere: there is nothing to judge")
    rows, hidden = {}, {}
    for rater in range(1, raters + 1):
        name, order = f"rater{rater}", [chosen[i] for i in rng.permutation(len(chosen))]
        sides = [SIDES[::-1] if flip else SIDES for flip in rng.permutation(len(order)) % 2]  # half of them each way
        rows[name] = [
            {"problem": p.quad.x, "attempt": p.quad.y0, "critique": p.quad.f,
             "text_a": getattr(p, a), "text_b": getattr(p, b)}
            for p, (a, b) in zip(order, sides)
        ]  # fmt: skip
        hidden[name] = [{**p.place, "a": a, "b": b} for p, (a, b) in zip(order, sides)]
    seeds = {task: sorted({p.seed for p in pairs if p.task == task}) for task in sorted({p.task for p in pairs})}
    about = {"kind": "pairs", "method": method, "against": against, "seed": seed, "of": seeds,
             "same": [p.place for p in same]}  # fmt: skip
    return write_sheets(pathlib.Path(out), PAIRS, rows, hidden, **about)


# ---- what judgements say --------------------------------------------------------------------------------------------
def cohen_kappa(a: list[str], b: list[str]) -> float | None:
    """Cohen's kappa, unweighted, of two raters' labels of the same items; None for fewer than two items, and where
    chance alone agrees always (both use one and the same label)."""
    n, left, right = len(a), Counter(a), Counter(b)
    chance = sum(left[label] * right[label] for label in left) / max(1, n * n)
    return None if n < 2 or chance == 1 else (sum(x == y for x, y in zip(a, b)) / n - chance) / (1 - chance)


def fleiss_kappa(items: list[tuple[str, ...]]) -> float | None:
    """Fleiss' kappa of items that the same number of raters labelled; None where `cohen_kappa` is."""
    raters, total = len(items[0]) if items else 0, Counter(itertools.chain(*items))
    if len(items) < 2 or raters < 2 or len(total) == 1:
        return None
    pairs = [sum(c * (c - 1) for c in Counter(item).values()) / (raters * (raters - 1)) for item in items]
    chance = sum((c / (len(items) * raters)) ** 2 for c in total.values())
    return (math.fsum(pairs) / len(items) - chance) / (1 - chance)


def win_rate(scores: dict[Any, list[float]]) -> dict[str, Any]:
    """Mean of scores (1 won, 0 lost, 1/2 tie), {problem: those of its judgements}, with a 95 % interval.

    The variance is that of the mean over problems as drawn, with all judgements of one in one cluster (Miller,
    https://arxiv.org/abs/2411.00640). Wilson's interval is taken at the number of judgements that would have this
    variance if they were independent, with Student's quantile for the problems: it stays within [0, 1] and is no point
    where all agree. Interval None for fewer than two problems.
    """
    from scipy.stats import t

    clusters = list(scores.values())
    C, n = len(clusters), sum(map(len, clusters))
    if n == 0:
        return {"rate": None, "interval": None, "judgements": 0, "problems": 0}
    rate = math.fsum(itertools.chain(*clusters)) / n
    done = {"rate": rate, "interval": None, "judgements": n, "problems": C}
    if C < 2:
        return done
    variance = C / (C - 1) * math.fsum(math.fsum(s - rate for s in some) ** 2 for some in clusters) / n**2
    n_eff = rate * (1 - rate) / variance if variance > 1e-15 else C
    z2 = float(t.ppf(0.975, C - 1)) ** 2
    middle = (rate + z2 / (2 * n_eff)) / (1 + z2 / n_eff)
    half = math.sqrt(z2 * (rate * (1 - rate) / n_eff + z2 / (4 * n_eff**2))) / (1 + z2 / n_eff)
    return {**done, "interval": [max(0.0, middle - half), min(1.0, middle + half)]}


SCORE = {"method": 1.0, "against": 0.0, "tie": 0.5}


def agreement(labels: dict[tuple, dict[str, str]], raters: list[str]) -> dict[str, Any]:
    """Kappas over the pairs {pair: {rater: outcome}} that both, or all, raters judged."""
    found = {"cohen": {}, "fleiss": None}
    for a, b in itertools.combinations(raters, 2):
        both = [(given[a], given[b]) for given in labels.values() if a in given and b in given]
        kappa = cohen_kappa([x for x, _ in both], [y for _, y in both])
        counts = {x: {y: both.count((x, y)) for y in OUTCOMES} for x in OUTCOMES}
        agreed = sum(x == y for x, y in both)
        found["cohen"][f"{a} {b}"] = {"kappa": kappa, "n": len(both), "agreed": agreed, "table": counts}
    if len(raters) > 2:
        all_of = [tuple(given[r] for r in raters) for given in labels.values() if all(r in given for r in raters)]
        found["fleiss"] = {"kappa": fleiss_kappa(all_of), "n": len(all_of), "raters": len(raters)}
    return found


def score(sheets: Iterable[str | pathlib.Path], key_path: str | pathlib.Path) -> dict[str, Any]:
    """What filled-in sheets say: win rate of the method, agreement of the raters, every disagreement."""
    key = read_key(key_path, "pairs")
    names = lambda place: (place["task"], place["task_id"], place["seed"])
    labels, comments, raters, counts = defaultdict(dict), defaultdict(dict), {}, Counter()
    for path in sheets:
        rater, answers = read_sheet(path, key, PAIRS)
        if rater in raters:
            raise InputError(f"{path}: is a second sheet of {rater}, after {raters[rater]}; give one")
        raters[rater] = str(path)
        for row, answer in answers.items():
            place, label = key["sheets"][rater][row], answer["label"]
            counts[rater, label] += 1
            if label != "skip":
                labels[names(place)][rater] = place.get(label, "tie")  # the side that a or b is; else a tie
            if answer["comment"]:
                comments[names(place)][rater] = answer["comment"]
    judged, drawn = defaultdict(list), defaultdict(list)  # by problem; `drawn`: those of one text with them
    for place, given in labels.items():
        judged[place[:2]] += [SCORE[outcome] for outcome in given.values()]
        drawn[place[:2]] += [SCORE[outcome] for outcome in given.values()]
    for place in key["same"]:
        drawn[names(place)[:2]] += [SCORE["tie"]] * len(raters)
    order = sorted(raters)
    tally = {r: dict(Counter(given[r] for given in labels.values() if r in given)) for r in order}
    shown = {r: {label: counts[r, label] for label in PAIRS.questions[0].labels} for r in order}
    parted = [place for place, given in labels.items() if len(set(given.values())) > 1]
    return {
        "method": key["method"], "against": key["against"], "key": key["id"], "seeds_by_task": key.get("of", {}),
        "pairing": "both revisions of a pair are of the same problem and of runs with the same training seed",
        "mapping": "a and b are mapped to the method on that side of that rater's sheet before raters are compared; a"
        " pair that a rater skipped has no label of that rater; a tie counts one half",
        "pairs": len(next(iter(key["sheets"].values()))), "same_text": len(key["same"]), "sheets": raters,
        "missing_sheets": sorted(key["sheets"].keys() - raters.keys()),
        "raters": {r: {"outcomes": tally[r], "labels": shown[r]} for r in order},
        "win_rate": win_rate(judged), "win_rate_same_text_as_ties": win_rate(drawn), **agreement(labels, order),
        "disagreements": [
            {**dict(zip(("task", "task_id", "seed"), place)), "outcomes": labels[place], "comments": comments[place]}
            for place in sorted(parted)
        ],
        "comments": [
            {**dict(zip(("task", "task_id", "seed"), place)), "comments": comments[place]} for place in sorted(comments)
        ],
    }  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    """What `score` found, for people."""
    rounded = lambda value: "n/a" if value is None else f"{value:.3f}"
    between = lambda rate: "n/a" if rate["interval"] is None else " to ".join(map(rounded, rate["interval"]))
    figure = lambda rate: f"{rounded(rate['rate'])} (95 % {between(rate)}, clustered by problem)"
    rate, lines = found["win_rate"], []
    of = "; ".join(f"{task}, 'seed' {', '.join(map(str, some))}" for task, some in found["seeds_by_task"].items())
    lines.append(f"{found['method']} against {found['against']}: {found['pairs']} pairs, {len(found['raters'])} raters")
    lines += [f"  of {of}"] * bool(of)  # a key that was written by older code does not say
    lines.append(f"  win rate {figure(rate)}: {rate['judgements']} judgements of {rate['problems']} problems")
    if found["same_text"]:
        more = figure(found["win_rate_same_text_as_ties"])
        lines.append(f"  with the {found['same_text']} drawn pairs of one and the same text as ties: {more}")
    for rater, of in found["raters"].items():
        outcomes = ", ".join(f"{name} {of['outcomes'].get(name, 0)}" for name in OUTCOMES)
        lines.append(f"  {rater}: {outcomes}; as given: " + ", ".join(f"{k} {v}" for k, v in of["labels"].items()))
    for two, of in found["cohen"].items():
        lines.append(f"  Cohen's kappa of {two}: {rounded(of['kappa'])}; agreed on {of['agreed']} of {of['n']} pairs")
    if found["fleiss"]:
        lines.append(f"  Fleiss' kappa of all: {rounded(found['fleiss']['kappa'])} on {found['fleiss']['n']} pairs")
    lines.append(f"  {len(found['disagreements'])} pairs on which raters disagree")
    if found["missing_sheets"]:
        lines.append(f"  not handed in: {', '.join(found['missing_sheets'])}")
    return "\n".join(lines)


# ---- python aggregate.py human export|score -------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Export:
    """Write blinded sheets of pairs of revisions: a CSV file and an HTML page for each rater, and the key."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of finished runs, or folders that hold them"""
    method: str = "b5_cts"
    """the arm in question: a method, or as a report names it, e.g. "b5_cts lam_align=0" """
    against: str = "b3_grpo_verifier"
    """the arm that it is compared with"""
    pairs: int = 100
    """pairs to judge, each rater all of them; as many as there are, if fewer"""
    raters: int = 2
    """sheets, one a rater"""
    seed: int | None = None
    """which pairs, in what order, on which sides; who knows it sees through the blinding; none = one that is drawn"""
    replay: str | None = None
    """folder with the test.jsonl that the runs were tested on; none = where they had it from"""
    allow_partial: bool = False
    """leave out tasks and seeds that one of the two lacks, and say so"""
    out: str = "human"
    """folder for the sheets and key.json, which no rater may see"""


@dataclasses.dataclass(frozen=True)
class Score:
    """Read filled-in sheets: win rate with its interval, agreement of the raters, their disagreements."""

    sheets: tyro.conf.Positional[tuple[str, ...]]
    """the CSV files that came back"""
    key: str = "human/key.json"
    """the key that was written with them"""
    out: str = "human"
    """folder for human.json and disagreements.csv"""


HumanArgs = Export | Score


def human_main(args: HumanArgs) -> dict[str, Any]:
    """The key of sheets written, or what sheets say."""
    out = pathlib.Path(args.out)
    if isinstance(args, Score):
        if not args.sheets:
            raise InputError("no sheets: give the CSV files that the raters filled in")
        found = score(args.sheets, args.key)
        writable(out, "out")
        write_atomic(out / "human.json", json.dumps(found, indent=1) + "\n")
        write_disagreements(out / "disagreements.csv", found)
        print(f"{as_text(found)}\n  written to {out}/human.json, {out}/disagreements.csv")
        return found
    if not args.runs or args.pairs < 1 or args.raters < 1 or args.method == args.against:
        raise InputError("give folders of runs, two methods, and at least one of --pairs and of --raters")
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed {args.seed}: must be at least 0")
    pairs = read_pairs(args.runs, args.method, args.against, args.replay, args.allow_partial)
    writable(out, "out")
    key = export(pairs, out, args.method, args.against, args.pairs, args.raters, args.seed)
    n = len(key["sheets"]["rater1"])
    print(f"{n} pairs of {len(pairs)}; {len(key['same'])} more were drawn whose two texts are the same")
    print(f"{args.raters} sheets in {out}/: give rater N raterN.html or raterN.csv, and keep key.json to yourself")
    return key


def write_disagreements(path: pathlib.Path, found: dict[str, Any]) -> None:
    """The pairs on which raters disagree, one a line, with each one's outcome and comment."""
    raters, text = list(found["raters"]), io.StringIO(newline="")
    lines = [["task", "task_id", "seed", *raters, *(f"{rater}: comment" for rater in raters)]]
    for place in found["disagreements"]:
        given = [place[part].get(rater, "") for part in ("outcomes", "comments") for rater in raters]
        lines.append([place["task"], place["task_id"], place["seed"], *given])
    csv.writer(text).writerows([[cell(str(value)) for value in line] for line in lines])
    write_atomic(path, f"\ufeff{text.getvalue()}")


# ---- audits of a replay ---------------------------------------------------------------------------------------------
def read_splits(replay_dir: str | os.PathLike) -> dict[str, list[Quadruple]]:
    """{split: quadruples} of the files that a replay's folder has; an empty file is an empty split."""
    paths = [path for split in SPLITS if (path := pathlib.Path(replay_dir) / f"{split}.jsonl").is_file()]
    if not any(path.stat().st_size for path in paths):
        raise InputError(f"{replay_dir}: holds no replay; make one with: python teacher.py")
    return {path.stem: read_replay(path) for path in paths if path.stat().st_size}


def quad_digest(q: Quadruple) -> str:
    """Of what an audit is about: the texts and the flagged place."""
    return sha256(json.dumps([q.x, q.y0, q.f, q.y1, q.meta["error_span"]]))


def export_audit(replay_dir: str | os.PathLike, out: str | os.PathLike, n: int = 50, seed: int = 0) -> dict[str, Any]:
    """Write audit.csv, audit.html and key.json of `n` quadruples of a replay, drawn from all of its splits; returns the
    key."""
    if seed < 0:
        raise InputError(f"--seed {seed}: must be at least 0")
    quads = [(split, q) for split, some in read_splits(replay_dir).items() for q in some]
    chosen = [quads[i] for i in np.random.default_rng(seed).permutation(len(quads))[:n]]
    flagged = lambda q: "(none)" if q.meta["error_span"] is None else q.y0[slice(*q.meta["error_span"])]
    rows = [
        {"problem": q.x, "attempt": q.y0, "flagged": flagged(q), "critique": q.f, "solution": q.y1} for _, q in chosen
    ]
    hidden = [{"split": split, "task_id": q.meta["task_id"], "quad": quad_digest(q)} for split, q in chosen]
    return write_sheets(pathlib.Path(out), AUDIT, {"audit": rows}, {"audit": hidden}, kind="audit", seed=seed)


def read_audit(sheet: str | os.PathLike, key_path: str | os.PathLike, replay_dir: str | os.PathLike) -> dict[str, Any]:
    """Set meta.is_human_audited and meta.audit {"right", "first", "leaks": yes or no} of the quadruples that an audit
    answers in full; returns counts and shares. The replay's digest changes with it: audit before you train.

    InputError, and nothing is written, where the sheet is not as `read_sheet` wants it or the replay has changed.
    """
    key, replay = read_key(key_path, "audit"), read_splits(replay_dir)
    _, answers = read_sheet(sheet, key, AUDIT)
    at = {(split, quad_digest(q)): i for split, quads in replay.items() for i, q in enumerate(quads)}
    columns, audits = [question.column for question in AUDIT.questions], []
    for row, answer in answers.items():
        place = key["sheets"]["audit"][row]
        i, audit = at.get((place["split"], place["quad"])), {column: answer[column] for column in columns}
        if i is None:
            where = f"{replay_dir}/{place['split']}.jsonl"
            raise InputError(f"{sheet}, row {row}: {where} no longer has {place['task_id']} as it was; audit it anew")
        if "skip" not in audit.values():
            audits.append(audit)
            q = replay[place["split"]][i]
            meta = {**q.meta, "is_human_audited": True, "audit": audit}
            replay[place["split"]][i] = dataclasses.replace(q, meta=meta)
    for split in {key["sheets"]["audit"][row]["split"] for row in answers}:
        write_replay(pathlib.Path(replay_dir) / f"{split}.jsonl", replay[split])
    share = lambda column: None if not audits else sum(audit[column] == "yes" for audit in audits) / len(audits)
    return {"rows": len(answers), "audited": len(audits), **{column: share(column) for column in columns}}
