"""Replay that a teacher over an API wrote: from problems and, where they are given, flawed attempts to quadruples,
asked for at once or in batches, kept on disk as they come. Used by `teacher.py`.

A folder holds, beside the replay, what its starts have come to: accepted.jsonl (the quadruples), rejected.jsonl (every
answer that made none, and why), requests.jsonl (what each request cost), attempts.jsonl (flawed attempts that are not
the teacher's), batches.jsonl, and job.json (what it was asked for). Started again it goes on from there.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import pathlib
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from common import asking
from common.asking import Asker, Budget, GaveUp, Pace, Prices, Stop
from common.basics import InputError, sha256, writable
from common.batch_jobs import Batches, open_batches
from common.locks import lock, unlock
from common.making import load_problems, make_quadruples, make_replay
from common.providers import FORMS, PROVIDERS, Provider, Reply
from common.records import Records, check_job, spans_and_leaks
from common.replay import Problem, Quadruple
from common.sampled import check_sampling, wrong_attempts
from common.tasks import get_task
from common.teaching import judge_reply, make_prompt, read_answer, repair_prompt, wording_sha256

BARREN = 3  # batches in a row; the last one may be of one request, and expire
HOLDER = "an attempt of --model stands here"  # in a dry run: sampling one takes a minute


@dataclasses.dataclass(frozen=True)
class Terms:
    """How a teacher is asked; each field is the flag of that name."""

    teacher: str
    teacher_model: str
    base_url: str | None
    form: str
    y0: str
    concurrency: int
    timeout: float
    max_tokens: int
    tries: int
    max_usd: float
    max_requests: int
    price_in: float | None
    price_cached: float | None
    price_out: float | None
    batch: str

    def check(self) -> Prices | None:
        """The prices; InputError where a flag makes no sense."""
        if not self.teacher_model:
            raise InputError(f"--teacher {self.teacher}: name its model with --teacher_model")
        for flag in ("concurrency", "max_tokens", "tries", "timeout"):
            if not 0 < getattr(self, flag) < float("inf"):
                raise InputError(f"--{flag} {getattr(self, flag)}: must be above 0")
        if self.form not in ("auto", *FORMS):
            raise InputError(f"--form {self.form}: choose one of auto, {', '.join(FORMS)}")
        given = self.price_in, self.price_cached, self.price_out
        if any(price is not None and not 0 <= price < float("inf") for price in given):
            raise InputError("--price_in, --price_cached, --price_out: must be 0 or more, dollars per million tokens")
        prices = asking.find_prices(self.teacher_model, given, self.batch == "yes")
        asking.check_caps(prices, self.teacher_model, self.max_usd, self.max_requests)
        return prices

    def provider(self) -> Provider:
        """InputError where its package or its key is missing."""
        how = (self.teacher_model, self.base_url, self.max_tokens, self.timeout, self.form)
        return PROVIDERS[self.teacher](*how)

    @property
    def name(self) -> str:
        return f"{self.teacher}/{self.teacher_model}"


class Course:
    """One start: problems go in, records come out."""

    def __init__(
        self, terms: Terms, domain: str, keep_unverified: bool, records: Records, asker: Asker, bar: tqdm,
        y0s: dict[str, list[str]] | None,
    ):  # fmt: skip
        """`y0s`: where attempts are given, those of each problem."""
        self.terms, self.domain, self.keep_unverified = terms, domain, keep_unverified
        self.records, self.asker, self.bar, self.y0s = records, asker, bar, y0s
        self.put_off: dict[str, str] = {}  # no answer in this start, and why
        self.refused: dict[str, float] = {}  # put off for now: refused as bad, and when
        self.verifying = asyncio.Semaphore(1)  # programs run one batch at a time

    def prompt(self, problem: Problem):
        """The next prompt of a problem and the attempt in it, by how often it was tried."""
        tried = self.records.tries.get(problem.task_id, [])
        y0 = None if self.y0s is None else self.y0s[problem.task_id][len(tried) % len(self.y0s[problem.task_id])]
        told = tried[-1] if tried and not tried[-1].startswith("refused") else None
        return make_prompt(problem, self.domain, y0, told), y0

    async def record(self, problem: Problem, y0: str | None, reply: Reply) -> None:
        """An answer's verdict, on disk."""
        how = (problem, self.domain, y0, reply, self.terms.name, self.terms.y0, self.keep_unverified)
        if self.domain == "math":
            outcome = judge_reply(*how)
        else:
            async with self.verifying:
                outcome = await asyncio.to_thread(judge_reply, *how)
        if isinstance(outcome, Quadruple):
            await self.records.accept(outcome)
        else:
            await self.records.reject(problem.task_id, outcome, self.terms.tries)

    async def lesson(self, problem: Problem) -> None:
        """Ask until a problem is done. What is no JSON is asked for once more in the same breath."""
        while not self.records.done(problem.task_id):
            prompt, y0 = self.prompt(problem)
            try:
                reply = await self.asker.ask(prompt)
                if reply.stop == "end" and read_answer(reply.text, list(prompt.schema["properties"])) is None:
                    reply = await self.asker.ask(repair_prompt(prompt, reply.text or "-"))
            except GaveUp as e:
                self.put_off[problem.task_id] = e.why
                if e.final:
                    self.refused[problem.task_id] = time.monotonic()
                return
            await self.reject_refused()
            await self.record(problem, y0, reply)

    async def reject_refused(self) -> None:
        """What was refused as bad is rejected for good once a request that was sent later is answered: then it was
        neither the way of asking nor a provider that takes nothing any more."""
        for task_id in [name for name, at in self.refused.items() if at < self.asker.proven]:
            del self.refused[task_id]
            await self.records.reject(task_id, self.put_off[task_id], self.terms.tries, final=True)

    async def teach(self, todo: list[Problem]) -> None:
        """All lessons, so many at once. Problems are taken one by one: of ten thousand, few are in memory twice."""
        queue = iter(todo)

        async def worker():
            for problem in queue:
                with contextlib.suppress(Stop):
                    await self.lesson(problem)
                if self.asker.stopped:
                    return
                self.show(1)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.terms.concurrency):
                group.create_task(worker())

    async def teach_in_batches(self, todo: list[Problem], others: list[Problem]) -> None:
        """Round after round: all that is open goes into batches, what comes back is recorded, the rest goes again. What
        a former start has sent of `others` is recorded, too; they are not asked again."""
        batches = Batches(self.asker, self.records.files["batches"])
        used = lambda task_id: len(self.records.tries.get(task_id, ()))
        by_id, barren = {p.task_id: p for p in [*others, *todo]}, 0
        while not self.asker.stopped:
            open_ones = [p for p in todo if not self.records.done(p.task_id)]
            jobs = [(p.task_id, used(p.task_id), self.prompt(p)[0]) for p in open_ones]
            async for task_id, tried, result in batches.round(jobs):
                # of a batch that was read in part before a kill, some are recorded
                if task_id not in by_id or self.records.done(task_id) or tried != used(task_id):
                    continue
                if isinstance(result, Reply):
                    await self.record(by_id[task_id], self.prompt(by_id[task_id])[1], result)
                elif result.final:
                    await self.records.reject(task_id, result.why, self.terms.tries, final=True)
                else:
                    self.put_off[task_id] = result.why
                self.show(self.records.done(task_id))
            if not batches.went_out:
                return
            barren = barren + 1 if batches.barren else 0
            if barren == BARREN:
                raise self.asker.stop(Stop(f"{barren} batches in a row came back without an answer", fatal=True))

    def show(self, n: int) -> None:
        """Move the bar; what the rest will cost is reckoned from what was done in all starts."""
        records, budget = self.records, self.asker.budget
        done = len(records.kept) + len(records.final)
        money = {}
        if budget.prices:
            estimate = budget.spent * (self.bar.total - self.bar.n + done) / max(1, done)
            money = {"spent": f"${budget.spent:.2f}", "estimate": f"${estimate:.2f}"}
        self.bar.set_postfix(kept=len(records.kept), rejected=len(records.final), **money, refresh=False)
        self.bar.update(n)


@contextlib.contextmanager
def stopping_on_signals(asker: Asker, caught: list[int]):
    """SIGINT and SIGTERM stop the asking: what is under way is waited for, what is there is written. A second one ends
    the process at once."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        caught.append(number)
        asker.stop(Stop(f"stopped by {signal.Signals(number).name}"))
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(one)

    for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        if not caught and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def in_order(problems: list[Problem], seed: int) -> list[Problem]:
    """Problems by chance, so that what a capped run has is of all splits and lengths."""
    return sorted(problems, key=lambda p: sha256(f"{seed}\0{p.task_id}"))


def given_attempts(
    terms: Terms, task: str, problems: list[Problem], records: Records, seed: int, sampling: dict[str, Any]
) -> dict[str, list[str]] | None:
    """The flawed attempts of each problem that are not the teacher's, made once and kept in attempts.jsonl; none where
    the teacher writes them."""
    if terms.y0 == "teacher":
        return None
    file, planted = records.files["attempts"], get_task(task).planted
    found: dict[str, list[str]] = {}
    file.each(lambda row: found.update({row["task_id"]: row["y0s"]}))
    left = [p for p in problems if p.task_id not in found and not records.done(p.task_id)]
    if left and terms.y0 == "model":
        desc = dict(total=len(left), desc="attempts", unit="problem")
        for p, y0s in tqdm(wrong_attempts(task, left, **sampling, seed=seed), **desc):
            file.note({"task_id": p.task_id, "y0s": y0s})
            found[p.task_id] = y0s
    elif left:
        replay, _, _ = make_quadruples({"train": left}, get_task(task).domain, seed, False, planted)
        made = {q.meta["task_id"]: [q.y0] for q in replay["train"]}
        for p in left:
            found[p.task_id] = made.get(p.task_id, [])
            file.note({"task_id": p.task_id, "y0s": found[p.task_id]})
    return found


def still_out(terms: Terms, records: Records, problems: list[Problem], task: str, data_dir: str | None):
    """Problems of a batch that a former start has sent, but for those of this one, which may have a smaller --limit.
    InputError where nobody would read the batch: what it brings is paid for."""
    out, known = open_batches(records.files["batches"])[0], {p.task_id for p in problems}
    if out and terms.batch == "no":
        where = records.files["batches"].path
        raise InputError(f"{where}: a batch is out; add --batch yes to read it, or remove the file to give it up")
    sent = {task_id for jobs in out.values() for task_id, *_ in jobs} - known
    every = itertools.chain(*load_problems(task, data_dir)[0].values()) if sent else ()
    return [p for p in every if p.task_id in sent]


def dry_run(terms: Terms, task: str, data_dir: str | None, limit: int, seed: int, prices: Prices | None) -> dict:
    """Print the first prompt and an estimate of the cost; nothing is asked and nothing is written."""
    by_split, _, _ = load_problems(task, data_dir, limit)
    problems, domain = in_order([p for some in by_split.values() for p in some], seed), get_task(task).domain
    y0 = None if terms.y0 == "teacher" else f"<{HOLDER}>" if terms.y0 == "model" else "<the perturbed reference>"
    prompts = [make_prompt(p, domain, y0, None) for p in problems]
    print(f"{'system':-^60}\n{prompts[0].system}\n{'user':-^60}\n{prompts[0].turns[0][1]}{'':-^60}")
    given = 0 if y0 is None else 1
    tokens_in = sum(p.bytes() for p in prompts) // 4 + given * sum(len(p.reference) for p in problems) // 4
    tokens_out = sum((2 - given) * len(p.reference) + 500 for p in problems) // 4
    usage = asking.Usage(fresh=tokens_in, output=tokens_out)
    worst = asking.Usage(fresh=sum(p.bytes() for p in prompts), output=len(problems) * terms.max_tokens)
    print(f"{len(problems)} problems: about {tokens_in:,} tokens of prompts and {tokens_out:,} of answers, once each")
    if prices:
        most = terms.tries * prices.usd(worst)
        print(f"  about ${prices.usd(usage):.2f}; ${most:.2f} if every try were used, each answer as long as can be")
        print(f"  prices {prices} dollars per million tokens, the table's as of {asking.PRICES_AS_OF}")
    else:
        print("  what that costs is not known: give --price_in and --price_out")
    return {"problems": len(problems), "tokens_in": tokens_in, "tokens_out": tokens_out,
            "usd": prices and prices.usd(usage)}  # fmt: skip


def teach_all(
    terms: Terms, provider: Provider, prices: Prices | None, records: Records, problems: list[Problem], domain: str,
    keep_unverified: bool, y0s: dict[str, list[str]] | None, caught: list[int], others: list[Problem],
) -> Course:  # fmt: skip
    """One start over all that is not done yet, and over what a batch holds of `others`; the course that it was."""
    todo = [p for p in problems if not records.done(p.task_id) and (y0s is None or y0s[p.task_id])]
    todo = [p for p in todo if domain == "math" or p.tests is not None]

    async def run() -> Course:
        budget = Budget(records.files["requests"], prices, terms.max_usd, terms.max_requests)
        asker = Asker(provider, budget, Pace(terms.concurrency))
        with tqdm(total=len(todo), desc=terms.teacher, unit="problem") as bar, stopping_on_signals(asker, caught):
            course = Course(terms, domain, keep_unverified, records, asker, bar, y0s)
            with contextlib.suppress(Stop):
                await (course.teach_in_batches(todo, others) if terms.batch == "yes" else course.teach(todo))
        await provider.client.close()
        return course

    try:
        return asyncio.run(run())
    except BaseExceptionGroup as group:
        raise next((e for e in group.exceptions if isinstance(e, InputError)), group) from None


def teach_replay(
    task: str, terms: Terms, model: str, samples: int, temperature: float, out_dir: str, data_dir: str | None,
    out: str | None, seed: int, limit: int, keep_unverified: str, unsafe_sandbox: str, dry: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`make_replay` with a teacher over an API, into data/replay/<task>_<teacher> where `out` says nothing else."""
    prices, folder = terms.check(), pathlib.Path(out or f"data/replay/{task}_{terms.teacher}")
    sampling = {"model": model, "samples": samples, "temperature": temperature} if terms.y0 == "model" else {}
    if sampling:
        check_sampling(samples, temperature)
    if limit < 0:
        raise InputError(f"--limit {limit}: must be 0 (all) or more")
    if dry:
        return dry_run(terms, task, data_dir, limit, seed, prices)
    get_task(task)
    provider = terms.provider()
    job = {"task": task, "teacher": terms.teacher, "teacher_model": terms.teacher_model, "y0": terms.y0, "seed": seed,
           "keep_unverified": keep_unverified, "wording": wording_sha256(), **sampling}  # fmt: skip
    lock(writable(folder, "out") / "lock")
    caught, stopped = [], []

    def make(by_split, domain, seed, keep):
        problems = in_order([p for some in by_split.values() for p in some], seed)
        records = Records(folder, {p.task_id: p for p in problems})
        for line in records.repaired:
            print(line)
        where = {**sampling, "out_dir": out_dir, "data_dir": data_dir}
        y0s = given_attempts(terms, task, problems, records, seed, where)
        others = still_out(terms, records, problems, task, data_dir)
        course = teach_all(terms, provider, prices, records, problems, domain, keep, y0s, caught, others)
        stopped.append(course.asker.stopped)
        found = records.quadruples()
        replay = {s: [found[p.task_id] for p in some if p.task_id in found] for s, some in by_split.items()}
        quads, usd = list(itertools.chain(*replay.values())), course.asker.budget.spent
        rejected = records.why_not(problems, y0s, course.put_off)
        about = {"y0": terms.y0, **sampling, "batch": terms.batch, **spans_and_leaks(records, quads),
                 "usd_per_kept": usd / len(quads) if quads and prices else None,
                 **asking.describe(course.asker)}  # fmt: skip
        records.close()
        return replay, rejected, about

    try:
        check_job(folder, job)
        how = (data_dir, str(folder), seed, limit, keep_unverified, unsafe_sandbox, make)
        report = make_replay(task, terms.name, *how)
    finally:
        unlock(folder / "lock")
    print_costs(report, prices)
    if caught:
        sys.exit(128 + caught[0])
    if stopped[0] and stopped[0].fatal:
        raise InputError(f"--teacher {terms.teacher}: {stopped[0].why}; what is there is kept, start again to go on")
    return report


def print_costs(report: dict[str, Any], prices: Prices | None) -> None:
    """The part of the report that a keyless one has not, for a person."""
    listed = lambda counts: ", ".join(f"{key} {n}" for key, n in counts.items()) or "none"
    print(f"  answers rejected: {listed(report['answers_rejected'])}")
    print(f"  quoted steps found: {listed(report['spans'])}")
    print(f"  failures of this start: {listed(report['failures'])}")
    tokens, each = Counter(report["tokens"]), report["usd_per_kept"]
    print(f"  {report['requests']} requests, {tokens['fresh']:,} + {tokens['cached']:,} cached tokens in,"
          f" {tokens['output']:,} out; spent {asking.cost(prices, report['usd'] or 0.0)}"
          + ("" if each is None else f", ${each:.5f} a kept quadruple"))  # fmt: skip
    if report["stopped"]:
        print(f"  stopped: {report['stopped']}; the same command goes on from here")
