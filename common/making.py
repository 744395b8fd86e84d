"""From problems to replay files: the keyless teacher's quadruples, verified, and the report of what was kept and why
not. Used by `teacher.py` and by every script whose task has no replay yet; what a mistake looks like is known to
mistakes and mutants."""

import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from common.answers import score_math
from common.basics import InputError, normalize_x, read_json, writable, write_atomic
from common.critique import check_critique, describe_call, write_code_critique
from common.hosts import on_leader, say
from common.mistakes import TAG_OF_KIND, attempts, count_steps, equations_in, lines_of
from common.mutants import FLAWS, Mutant, count_statements, mutants
from common.plans import parse_program
from common.programs import Verdict, grade
from common.replay import (
    Problem,
    Quadruple,
    assign_split,
    check_leakage,
    edit_distance,
    read_replay,
    replay_report,
    write_replay,
)  # fmt: skip
from common.sandbox import check_sandbox
from common.slips import Planted, plant_slips
from common.tasks import TASKS, get_task
from common.verifier import first_wrong_step, split_steps

MOST_MUTANTS = 48  # tried on one problem
BATCH = 128  # problems whose programs run together


def check_source(task: str, data_dir: str, directory: pathlib.Path) -> None:
    """InputError unless the replay that is there says it was made of the problems in `data_dir`."""
    made_of = read_json(directory / "report.json", {}).get("source_sha256")
    if load_problems(task, data_dir)[2] != made_of:
        raise InputError(
            f"--data_dir {data_dir}: {directory} is what is read, and it does not say that it was made of these"
            " problems; remove that folder, or leave --data_dir out"
        )


def load_replay(task: str, replay_dir: str | None, data_dir: str | None, unsafe_sandbox: str = "refuse"):
    """{"train", "val", "test"} quadruples of a task; where none exist yet they are made with the keyless teacher. For a
    code task InputError where its programs cannot be confined, unless `unsafe_sandbox` is "allow"."""
    if get_task(task).domain == "code":
        check_sandbox(unsafe_sandbox)
    directory = pathlib.Path(replay_dir or f"data/replay/{task}")
    missing = [s for s in ("train", "val", "test") if not (directory / f"{s}.jsonl").is_file()]
    if missing and replay_dir:
        way_out = f"make it with: python teacher.py --task {task} --out {replay_dir}"
        raise InputError(f"--replay {replay_dir}: {missing[0]}.jsonl is missing; {way_out}")
    if missing:
        say(f"No replay for {task} in {directory} yet: making it with the keyless perturb teacher (teacher.py --help).")
        on_leader(lambda: make_replay(task, data_dir=data_dir, out=str(directory), unsafe_sandbox=unsafe_sandbox))
    elif data_dir:
        on_leader(check_source, task, data_dir, directory)
    replay = {split: read_replay(directory / f"{split}.jsonl") for split in ("train", "val", "test")}
    domains = sorted({q.meta["domain"] for quads in replay.values() for q in quads})
    if domains != [TASKS[task].domain]:
        raise InputError(f"{directory}: --task {task} is {TASKS[task].domain}, this replay {' and '.join(domains)}")
    check_leakage(replay)
    return replay


def slips(problem: Problem, seed: int, planted: Planted) -> Iterator[tuple[str, str, int, str]]:
    """Like `mistakes.attempts`: what a base whose slips are planted writes itself, criticised by the step checker."""
    rng = np.random.default_rng([seed, *hashlib.sha256(problem.task_id.encode()).digest()])
    for y0 in (plant_slips(problem.reference, planted, rng) for _ in range(4)):
        flagged = first_wrong_step(y0, problem.reference)
        if flagged is not None:
            yield "wrong_result", y0, flagged, check_critique(y0, problem.reference)[0]


def perturb(
    problem: Problem, seed: int = 0, keep_unverified: bool = False, planted: Planted | None = None
) -> Quadruple | str:
    """The first verified quadruple of a problem, else (if wanted) the first unverified one, else why there is none.
    Where slips are planted y0 has such slips, and another mistake where no operation is a planted one."""
    y1_correct = score_math(problem.reference, problem.answer) == 1
    if not any(map(equations_in, lines_of(problem.reference))):
        return "no arithmetic step"
    chosen = None
    tries = attempts(problem, seed)
    for kind, y0, flagged, f in itertools.chain(slips(problem, seed, planted), tries) if planted else tries:
        y0_correct = score_math(y0, problem.answer) == 1
        verified = y1_correct and not y0_correct and first_wrong_step(y0, problem.reference) == flagged
        if verified or chosen is None:
            place, horizon = split_steps(y0)[flagged], count_steps(problem)
            chosen = quadruple(problem, "math", y0, f, TAG_OF_KIND[kind], [place.start, place.end], horizon, y0_correct,
                               y1_correct, answer=problem.answer, verified=verified)  # fmt: skip
        if verified or (keep_unverified and not y1_correct):
            break
    if chosen is None or not (chosen.meta["verified"] or keep_unverified):
        return "no verified perturbation" if y1_correct else "reference not verified"
    return chosen


def quadruple(
    problem: Problem, domain: str, y0: str, f: str, tag: str, span: list[int], horizon: int, y0_correct: bool,
    y1_correct: bool, **more: Any,
) -> Quadruple:  # fmt: skip
    """The quadruple of a problem and a flawed attempt; `more` are the fields of meta that only its domain, or its
    teacher, has."""
    meta = {
        "task_id": problem.task_id, "domain": domain, "split": assign_split(problem), "horizon": horizon,
        "edit_distance": edit_distance(y0, problem.reference), "error_tags": [tag], "error_span": span,
        "teacher": "perturb", "y0_correct": y0_correct, "y1_correct": y1_correct, "is_human_audited": False, **more,
    }  # fmt: skip
    return Quadruple(problem.x, y0, f, problem.reference, meta)


def unfit(problem: Problem, verdict: Verdict | None = None) -> str | None:
    """Why a problem yields no quadruple before any mutant is tried, or None; `verdict` is the reference's."""
    if problem.tests is None:
        return "no usable tests"
    if not problem.reference.strip():
        return "no reference program"
    if parse_program(problem.reference) is None:
        return "reference is not Python 3"
    if verdict is None or verdict.outcome == "pass":
        return None
    return "harness error" if verdict.outcome == "harness_error" else "reference fails its tests"


def perturb_programs(problems: list[Problem], seed: int = 0, keep_unverified: bool = False) -> list[Quadruple | str]:
    """For each problem its first mutant that fails a test, as a quadruple, else why there is none.

    Programs run in batches over all problems: references, then of each open problem its next 1, 2, 4, ... mutants. A
    mutant that neither ends nor stays within its memory is passed over: it would cost its time limit at every scoring.
    """
    done: list[Quadruple | str | None] = [unfit(p, None) for p in problems]
    todo = [i for i, reason in enumerate(done) if reason is None]
    verdicts = dict(zip(todo, grade([problems[i].reference for i in todo], [problems[i].tests for i in todo])))
    for i in todo:
        reason = unfit(problems[i], verdicts[i])
        done[i] = None if keep_unverified and reason != "harness error" else reason
    keys = [hashlib.sha256(f"{seed}\0{p.task_id}".encode()).hexdigest() for p in problems]
    left = {i: mutants(problems[i].reference, keys[i])[:MOST_MUTANTS] for i in todo if done[i] is None}
    first = {i: tries[0] for i, tries in left.items() if tries}
    chosen: dict[int, tuple[Mutant, Verdict]] = {}
    size = 1
    while any(left.values()):
        batch = [(i, mutant) for i, tries in left.items() for mutant in tries[:size]]
        results = grade([m.program for _, m in batch], [problems[i].tests for i, _ in batch])
        for (i, mutant), verdict in zip(batch, results):
            if verdict.outcome in ("wrong", "crash"):
                chosen.setdefault(i, (mutant, verdict))
        left = {i: tries[size:] for i, tries in left.items() if i not in chosen}
        size *= 2
    if keep_unverified:
        spare = [i for i in first if i not in chosen]
        some = grade([first[i].program for i in spare], [problems[i].tests for i in spare])
        chosen |= {i: (first[i], verdict) for i, verdict in zip(spare, some) if verdict.outcome != "harness_error"}
    for i, (mutant, verdict) in chosen.items():
        done[i] = code_quadruple(problems[i], mutant, verdict, verdicts[i])
    return ["no mutant fails a test" if made is None else made for made in done]


def code_quadruple(problem: Problem, mutant: Mutant, verdict: Verdict, reference: Verdict) -> Quadruple:
    """The quadruple of a mutant, its verdict and the reference's."""
    tag, flaw = FLAWS[mutant.kind]
    line = mutant.program.count("\n", 0, mutant.span[0]) + 1
    f = write_code_critique(line, flaw, describe_call(problem.tests, verdict.failed))
    y0_correct, y1_correct = verdict.outcome == "pass", reference.outcome == "pass"
    verified = y1_correct and verdict.outcome in ("wrong", "crash")
    return quadruple(problem, "code", mutant.program, f, tag, list(mutant.span), count_statements(problem.reference),
                     y0_correct, y1_correct, tests=problem.tests, verified=verified, mutation=mutant.kind,
                     **problem.notes)  # fmt: skip


def print_report(report: dict[str, Any], out: pathlib.Path) -> None:
    kept, total, replay = report["kept"], report["problems"], {**report, **report["replay"]}
    print(f"{report['task']}: {kept} of {total} problems kept ({kept / max(1, total):.1%})")
    for name in ("attempts", "rejected", "tags", "horizons"):
        if name not in replay:  # attempts are those of a model
            continue
        print(f"  {name:9s} " + (", ".join(f"{key} {n}" for key, n in replay[name].items()) or "none"))
    print("  splits    " + ", ".join(f"{split} {n['kept']}/{n['total']}" for split, n in report["splits"].items()))
    print(f"  leak rate {replay['leak_rate']:.3f} (critiques that say what the revision has to say)")
    print(f"  written to {out}/")


def split_problems(problems: list[Problem]) -> dict[str, list[Problem]]:
    """Problems by split. A source may hold a problem twice: test keeps it."""
    by_split: dict[str, list[Problem]] = {"train": [], "val": [], "test": []}
    for problem in problems:
        by_split[assign_split(problem)].append(problem)
    tested = {normalize_x(p.x) for p in by_split["test"]}
    for split in ("train", "val"):
        by_split[split] = [p for p in by_split[split] if normalize_x(p.x) not in tested]
    return by_split


def load_problems(task: str, data_dir: str | None, limit: int = 0) -> tuple[dict[str, list[Problem]], int, str]:
    """(problems by split, the first `limit` of each if that is not 0; how many were left out since test has them too;
    the digest of them all)."""
    problems, digest = get_task(task).load(data_dir), hashlib.sha256()
    for p in problems:
        digest.update(json.dumps([p.x, p.reference, *([p.tests] if p.tests else [])]).encode())
    by_split = split_problems(problems)
    twice = len(problems) - sum(map(len, by_split.values()))
    return {split: some[: limit or None] for split, some in by_split.items()}, twice, digest.hexdigest()


def make_quadruples(
    by_split: dict[str, list[Problem]], domain: str, seed: int, keep_unverified: bool, planted: Planted | None = None
):
    """({split: quadruples}, how many problems yielded none, by reason, what else the report says: nothing)."""
    replay: dict[str, list[Quadruple]] = {split: [] for split in by_split}
    rejected: Counter[str] = Counter()
    todo = [(split, problem) for split, problems in by_split.items() for problem in problems]
    with tqdm(total=len(todo), desc="perturb", unit="problem") as bar:
        for i in range(0, len(todo), BATCH):
            splits, some = zip(*todo[i : i + BATCH])
            if domain == "math":
                made = [perturb(problem, seed, keep_unverified, planted) for problem in some]
            else:
                made = perturb_programs(some, seed, keep_unverified)
            for split, one in zip(splits, made):
                if isinstance(one, str):
                    rejected[one] += 1
                else:
                    replay[split].append(one)
            bar.update(len(some))
    return replay, rejected, {}


def make_replay(
    task: str, teacher: str = "perturb", data_dir: str | None = None, out: str | None = None, seed: int = 0,
    limit: int = 0, keep_unverified: str = "no", unsafe_sandbox: str = "refuse", make=make_quadruples,
) -> dict[str, Any]:  # fmt: skip
    """Write {train,val,test}.jsonl and report.json of a task into `out`; returns the report. `make` makes the
    quadruples, as `make_quadruples` does."""
    if limit < 0:
        raise InputError(f"--limit {limit}: must be 0 (all) or more")
    source, out = get_task(task), pathlib.Path(out or f"data/replay/{task}")
    if source.domain == "code":
        check_sandbox(unsafe_sandbox)
    writable(out, "out")
    by_split, twice, digest = load_problems(task, data_dir, limit)
    more = {} if make is not make_quadruples else {"planted": source.planted}
    replay, rejected, further = make(by_split, source.domain, seed, keep_unverified == "yes", **more)
    rejected += Counter({"stands in test too": twice})  # a count of 0 is dropped
    check_leakage(replay)
    quads, total = list(itertools.chain(*replay.values())), {s: len(some) for s, some in by_split.items()}
    report = {
        "task": task, "teacher": teacher, "seed": seed, "problems": sum(total.values()) + twice, "kept": len(quads),
        "unverified": sum(not q.meta["verified"] for q in quads), "rejected": dict(sorted(rejected.items())),
        "splits": {s: {"kept": len(kept), "total": total[s]} for s, kept in replay.items()},
        "replay": replay_report(quads), "source_sha256": digest, **further,
    }  # fmt: skip
    for split, kept in replay.items():
        write_replay(out / f"{split}.jsonl", kept)
    write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    print_report(report, out)
    return report
