"""Replay whose flawed attempts a model made: its own wrong samples, criticised by the step checker. Used by
`teacher.py`; math alone: a program that goes another way has no line that a rule could point at."""

import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from tqdm import tqdm

from common.answers import final_answers, score_math
from common.base import load_model
from common.basics import STREAM_ROLLOUT, InputError, round_up
from common.batches import decode_rows, pack_prompts
from common.critique import check_critique
from common.fingerprint import weights_sha256
from common.hosts import batch_shardings, fetch, gather, make_mesh, put, say
from common.making import load_replay, make_replay, quadruple
from common.mistakes import count_steps
from common.model import Decoder
from common.programs import grade
from common.prompts import attempt_prompt
from common.replay import Problem, Quadruple
from common.run import pick_dtype
from common.sampling import generate
from common.tasks import get_task
from common.verifier import equation_holds, split_steps

ROWS = 128  # attempts decoded at once
RIGHT, CUT_OFF, NOT_FOUND = "right", "cut off", "wrong step not found by rule"


def make_sampler(graphdef, params, tokenizer, P: int, T: int, rows: int, temperature: float, seed: int, mesh):
    """A function of at most `rows` prompts: (text, whether it ended within T tokens) of one sampled completion each.
    Its n-th call draws from the n-th key of `seed`."""
    dtype, (by_row, _), key = pick_dtype("auto"), batch_shardings(mesh), jax.random.key(seed)
    key, calls = jax.random.fold_in(key, STREAM_ROLLOUT), 0

    @jax.jit
    def rollout(params, prompt_BP, len_B, key):
        how = (1, T, temperature, tokenizer.eos_ids, tokenizer.pad_id)
        model = nnx.merge(graphdef, gather(mesh, params))
        return generate(model, prompt_BP, len_B, key, *how, dtype=dtype, shrink=mesh.size == 1)

    def sample(prompts: list[str]) -> list[tuple[str, bool]]:
        nonlocal calls
        batch = pack_prompts(tokenizer, prompts + prompts[:1] * (rows - len(prompts)), P)
        batch = put((batch["prompt"], batch["prompt_len"]), by_row)
        out = fetch(rollout(params, *batch, jax.random.fold_in(key, calls)))
        calls += 1
        texts = decode_rows(tokenizer, out["tokens_MT"], out["len_M"])
        return list(zip(texts, out["truncated_M"] == 0))[: len(prompts)]

    return sample


def judge(problem: Problem, y0: str, ended: bool, y1_correct: bool) -> Quadruple | str:
    """The quadruple of one sampled attempt, its critique and span by the step checker, else why it makes none: it was
    cut off, it is right, or no rule finds its wrong step: its steps hold and its answer stands nowhere in form."""
    if not ended:
        return CUT_OFF
    if score_math(y0, problem.answer) == 1:
        return RIGHT
    f, span = check_critique(y0, problem.reference)
    if span is None:
        return NOT_FOUND
    (step,) = (step for step in split_steps(y0) if step.start == span[0])
    slip = not step.is_final and not all(equation_holds(expr, value) for expr, value in step.equations)
    tag = "local_arithmetic" if slip else "wrong_decomposition"
    more = dict(answer=problem.answer, verified=y1_correct, teacher="rules", y0_source="model")
    return quadruple(problem, "math", y0, f, tag, span, count_steps(problem), False, y1_correct, **more)


def sampled_quadruples(
    by_split: dict[str, list[Problem]], sample: Callable, samples: int, rows: int, keep_unverified: bool
) -> tuple[dict[str, list[Quadruple]], Counter[str], dict[str, Any]]:
    """({split: quadruples}, how many problems yielded none, by reason, how many attempts came to what).

    Every problem is tried until an attempt makes a quadruple, at most `samples` times: its first flawed attempt whose
    wrong step is found. `sample` is `make_sampler`'s.
    """
    todo = [problem for problems in by_split.values() for problem in problems]
    y1_correct = {p.task_id: score_math(p.reference, p.answer) == 1 for p in todo}
    rejected, attempts, made = Counter(), Counter(), {}
    rejected["reference not verified"] = 0 if keep_unverified else sum(not right for right in y1_correct.values())
    # short and long together would decode to the longest
    left = sorted(todo, key=lambda p: (len(p.reference), p.task_id))
    left = [p for p in left if keep_unverified or y1_correct[p.task_id]]
    reasons: dict[str, set[str]] = {p.task_id: set() for p in left}
    with tqdm(total=len(left), desc="attempts", unit="problem") as bar:
        for _ in range(samples):
            for i in range(0, len(left), rows):
                some = left[i : i + rows]
                for problem, (y0, ended) in zip(some, sample([attempt_prompt(p.x) for p in some])):
                    one = judge(problem, y0, ended, y1_correct[problem.task_id])
                    if isinstance(one, Quadruple):
                        made[problem.task_id] = one
                        bar.update()
                    else:
                        reasons[problem.task_id].add(one)
                    attempts["kept" if isinstance(one, Quadruple) else one] += 1
            left = [p for p in left if p.task_id not in made]
        bar.update(len(left))
    for p in left:
        wrong = next((r for r in (NOT_FOUND, CUT_OFF) if r in reasons[p.task_id]), None)
        rejected[wrong or "every attempt right"] += 1
    replay = {split: [made[p.task_id] for p in some if p.task_id in made] for split, some in by_split.items()}
    without = sum("its result is off" in q.f for q in made.values())  # it would have named the answer
    return replay, +rejected, {"attempts": dict(sorted(attempts.items())), "critiques_without_numbers": without}


def open_sampler(
    task: str, model: str, prompts: list[str], temperature: float, seed: int, out_dir: str, data_dir: str | None
) -> tuple[Callable, int, dict[str, Any]]:
    """(`make_sampler`'s function for these prompts, rows at once, what a report says of the model). nano is the base
    that the task's own replay makes, or the one that comes with the repository."""
    mesh, replay = make_mesh("auto"), load_replay(task, None, data_dir) if model == "nano" else {}
    cfg, params, tokenizer, cache = load_model(model, task, replay, out_dir, mesh)
    P = round_up(max(map(len, tokenizer.encode_prompts(prompts))), 16)
    rows = round_up(min(ROWS, len(prompts)), mesh.shape["data"])
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0))))
    how = (P, get_task(task).max_new_tokens, rows, temperature, seed, mesh)
    if model == "nano" and (cache / "config.json").is_file():  # one that was trained here
        say(f"Attempts are those of the base in {cache}; --model {cache} trains from that very base.")
    return make_sampler(graphdef, params, tokenizer, *how), rows, {"base_weights": weights_sha256(params)}


def check_sampling(samples: int, temperature: float) -> None:
    """InputError where nothing can be sampled so."""
    if samples < 1:
        raise InputError(f"--samples {samples}: must be at least 1")
    if not 0 < temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: must be above 0")


def wrong_attempts(task: str, problems: list[Problem], model: str, samples: int, temperature: float, **where: Any):
    """Of each problem, batch by batch, (problem, its wrong ones among `samples` sampled attempts, each once). Wrong is
    what states another answer, or a program that ends and fails a test: an answer in no form is no flaw of reasoning.
    `where`: seed, out_dir, data_dir."""
    sample, rows, _ = open_sampler(task, model, [attempt_prompt(p.x) for p in problems], temperature, **where)
    problems = sorted(problems, key=lambda p: (len(p.reference), p.task_id))
    for i in range(0, len(problems), rows):
        some = problems[i : i + rows]
        tries = [sample([attempt_prompt(p.x) for p in some]) for _ in range(samples)]
        found = [list(dict.fromkeys(y0 for y0, ended in own if ended and y0.strip())) for own in zip(*tries)]
        if get_task(task).domain == "math":
            wrong = lambda y0, p: final_answers(y0) and score_math(y0, p.answer) == 0
            yield from [(p, [y0 for y0 in own if wrong(y0, p)]) for p, own in zip(some, found)]
            continue
        programs = [(p, y0) for p, own in zip(some, found) for y0 in own]
        verdicts = grade([y0 for _, y0 in programs], [p.tests for p, _ in programs])
        bad = {(p.task_id, y0) for (p, y0), v in zip(programs, verdicts) if v.outcome in ("wrong", "crash")}
        yield from [(p, [y0 for y0 in own if (p.task_id, y0) in bad]) for p, own in zip(some, found)]


def sample_replay(
    task: str, model: str, samples: int, temperature: float, out_dir: str, data_dir: str | None, out: str | None,
    seed: int, **flags: Any,
) -> dict[str, Any]:  # fmt: skip
    """`make_replay` with wrong attempts of `model` as y0, into data/replay/<task>_model where `out` says nothing else.
    nano is the base that the task's own replay makes, cached in `out_dir` as every script does."""
    if get_task(task).domain != "math":
        raise InputError(f"--y0 model: works on math tasks, {task} is code; use --y0 perturb")
    check_sampling(samples, temperature)
    own = pathlib.Path(f"data/replay/{task}")
    out = pathlib.Path(out or f"{own}_model")
    if model == "nano" and out.absolute() == own.absolute():
        raise InputError(f"--out {out}: the nano base is made from the replay in it; choose another folder")

    def make(by_split, domain, seed, keep_unverified):
        prompts = [attempt_prompt(p.x) for problems in by_split.values() for p in problems]
        sample, rows, base = open_sampler(task, model, prompts, temperature, seed, out_dir, data_dir)
        replay, rejected, found = sampled_quadruples(by_split, sample, samples, rows, keep_unverified)
        about = {"y0": "model", "model": model, **base, "samples": samples}
        return replay, rejected, {**about, "temperature": temperature, **found}

    return make_replay(task, "rules", data_dir, str(out), seed, make=make, **flags)
