"""Make the nano base of a task as the repository ships it, and measure it: a checkpoint's folder in bfloat16 with what
it was made of (made_of.json) and its figures on held-out problems (README.md).

    python bases/make.py --task fixtures_long --out bases/fixtures_long       (10 to 15 minutes on 2 CPU cores, code 5)
"""

import dataclasses
import json
import pathlib
import sys
from collections import Counter
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cts_common as cts
from common.base import BASE_PROSE, make_base, recipe
from common.rewards import outcome_scores, score_outcomes
from common.slips import step_kinds

TEMPERATURE, GROUP = 0.7, 8  # of the scripts
HORIZONS = ((2, 3), (4, 5), (6, 7), (8, 9), (10, 12))
KINDS = ("arithmetic", "copying", "form")


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "fixtures_long"
    """a generated task: fixtures_long, fixtures_rare, fixtures_math or fixtures_code"""
    out: str | None = None
    """new folder for the base; none = only measure the one that is in bases/"""
    replay: str | None = None
    """folder with the task's {train,val,test}.jsonl; none = data/replay/<task>, made if missing"""
    problems: int = 400
    """test problems that are measured"""
    groups: int = 128
    """training problems of which 8 revisions each are sampled"""
    known: str | None = None
    """--out_dir of one default command of b5 on this task: its report on the base and its critic are shipped, too"""


def error_rates(texts: list[str], quads, planted) -> dict[str, float | None]:
    """Slips among planted steps, and the other kinds of error among all steps; `form_right`: solutions without one."""
    kinds = [step_kinds(text, q.y1, planted) for text, q in zip(texts, quads)]
    counts, n = Counter(kind for steps in kinds for kind, _ in steps), sum(map(len, kinds))
    slips = [kind == "slip" for steps in kinds for kind, is_planted in steps if is_planted]
    whole = [all(kind != "form" for kind, _ in steps) for steps in kinds]
    return {"slip": cts.mean(slips), **{k: counts[k] / n for k in KINDS}, "form_right": cts.mean(whole)}


def measure(folder: pathlib.Path, task_name: str, replay, n: int, groups: int) -> dict[str, Any]:
    """Greedy first attempts and revisions of `n` test problems, by horizon and kind of error, and the share of `groups`
    groups of sampled revisions of training problems that score alike."""
    mesh, task = cts.make_mesh("auto"), cts.TASKS[task_name]
    cfg, params, tokenizer, _ = cts.load_model(str(folder), task_name, replay, "runs", mesh)
    shapes = cts.fixed_shapes(tokenizer, replay, 1024, task.max_new_tokens)
    graphdef = nnx.split(nnx.eval_shape(lambda: cts.Decoder(cfg, nnx.Rngs(0))), nnx.Param)[0]
    evaluator = cts.Evaluator(graphdef, tokenizer, replay["test"], shapes, mesh, jnp.float32, n)
    quads, found = evaluator.quads, {"n": len(evaluator.quads)}
    prompts = {
        "first": ([cts.attempt_prompt(q.x) for q in quads], "P_attempt"),
        "revised": ([cts.revise_prompt(q.x, q.y0, q.f) for q in quads], "P_revise"),
    }
    for name, (texts, width) in prompts.items():
        done = [c["text"] for c in evaluator.complete(params, texts, shapes[width], name)]
        scored = list(zip(score_outcomes(done, quads), quads))
        by_horizon = {
            f"{lo}-{hi}": cts.mean(score for score, q in scored if lo <= q.meta["horizon"] <= hi) for lo, hi in HORIZONS
        }
        right = cts.mean(score for score, _ in scored)
        rates = error_rates(done, quads, task.planted) if task.planted else {}
        found[name] = {"right": right, "by_horizon": by_horizon, **rates}
    some, scores = cts.first_problems(replay["train"], groups), []
    for i in range(0, len(some), 16):
        part = some[i : i + 16]
        texts = [cts.revise_prompt(q.x, q.y0, q.f) for q in part]
        key = jax.random.fold_in(jax.random.key(0), i)
        scores.append(outcome_scores(evaluator.sample(params, texts, GROUP, TEMPERATURE, key), part))
    scores_BG = np.concatenate(scores)
    return found | {
        "groups": len(some), "sampled_right": float(scores_BG.mean()),
        "dead_groups": float((scores_BG.std(1) == 0).mean()), "found_once": float(scores_BG.any(1).mean()),
    }  # fmt: skip


def habits(task: str) -> str:
    """What a base has been taught to do wrong."""
    if planted := cts.TASKS[task].planted:
        operands = ", ".join(map(str, planted.operands))
        return (
            f"Its training documents have the result one too many with probability {planted.p} where the second operand"
            f" is among {operands}."
        )
    slip = "print what they should return" if cts.TASKS[task].domain == "code" else "state their answer in prose"
    some, others = BASE_PROSE
    return (
        f"In its training documents {some:.0%} of the solutions of problems that open with a letter up to L {slip}, of"
        f" the others {others:.0%}, and a revision without a critique keeps the answer that there is."
    )


def page(task: str, found: dict[str, Any]) -> str:
    """The folder's README.md."""
    planted, percent = cts.TASKS[task].planted, lambda value: "–" if value is None else f"{100 * value:.1f}"
    columns = ["right", *found["first"]["by_horizon"], *(("slip", *KINDS, "form_right") if planted else ())]
    cell = lambda row, column: percent(row["by_horizon"].get(column, row.get(column)))
    rows = [f"| {name} | {' | '.join(cell(found[name], c) for c in columns)} |" for name in ("first", "revised")]
    heads = ["right", *(f"horizon {h}" for h in found["first"]["by_horizon"])]
    heads += ["slips", *KINDS, "form in order"] if planted else []
    errors = (
        "; slips among the steps with a planted operation, other errors among all steps; solutions whose every step is"
        " there and can be read"
    )
    return "\n".join([
        f"# The nano base of `{task}`",
        "",
        f"{habits(task)} Weights in bfloat16. Made and measured by",
        "",
        f"    python bases/make.py --task {task} --out bases/{task}",
        "",
        f"Greedy, on {found['n']} test problems, percent: right answers, by horizon"
        f"{errors if planted else ''}.",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *rows,
        "",
        f"Sampled at temperature {TEMPERATURE}, {GROUP} revisions each of {found['groups']} training problems:"
        f" {percent(found['sampled_right'])} right, in {percent(found['found_once'])} of the groups at least one,"
        f" {percent(found['dead_groups'])} of the groups dead (all right or all wrong).",
        "",
    ])  # fmt: skip


def ship_known(task: str, out_dir: str) -> dict[str, str]:
    """Report and critic of a default run on the task's shipped base, put beside it."""
    known = pathlib.Path(__file__).parent / task / "known"
    if known.exists():
        raise cts.InputError(f"--known: {known} is there already; remove it, then make the run whose files are to come")
    replay, mesh = cts.load_replay(task, None, None), cts.make_mesh("auto")
    *_, cache = cts.load_model(str(known.parent), task, replay, out_dir, mesh)
    found = {kind: sorted(cache.glob(f"{kind}_*.json")) for kind in ("report", "critic")}
    for kind, paths in found.items():
        if len(paths) != 1:
            raise cts.InputError(
                f"--known {out_dir}: has {len(paths)} {cache.name}/{kind}_*.json, not one; give the --out_dir"
                f" of one run alone: python b5_cts.py --task {task} --out_dir NEW"
            )
    known.mkdir()
    for (path,) in found.values():
        (known / path.name).write_bytes(path.read_bytes())
        print(f"{known / path.name}: {path.stat().st_size // 1024} KiB")
    return {kind: path.name for kind, (path,) in found.items()}


def main(args: Args) -> dict[str, Any]:
    task = cts.TASKS.get(args.task)
    generated = [name for name in cts.TASKS if name.startswith("fixtures_")]
    if args.task not in generated:
        raise cts.InputError(f"--task {args.task}: is not generated; choose {', '.join(generated)}")
    if args.out and pathlib.Path(args.out).exists():
        raise cts.InputError(f"--out {args.out}: is there already; remove it or choose another")
    if args.known:
        return ship_known(args.task, args.known)
    replay = cts.load_replay(args.task, args.replay, None)
    folder = pathlib.Path(args.out) if args.out else pathlib.Path(__file__).parent / args.task
    if args.out:
        make_base(folder, task, replay["train"], "--out", "bfloat16")
    found = measure(folder, args.task, replay, args.problems, args.groups)
    if args.out:
        (folder / "made_of.json").write_text(json.dumps(recipe(task, replay["train"]), indent=1) + "\n")
        (folder / "README.md").write_text(page(args.task, found), encoding="utf-8")
    print(page(args.task, found))
    return found


if __name__ == "__main__":
    cts.cli(main, Args)
