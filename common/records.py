"""What the starts of a folder have come to, and what a report says of it: who is kept, who is rejected and why, whose
turn is next. Used by taught; asks nobody."""

import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

from common.basics import InputError, read_json, write_atomic
from common.ledger import Ledger
from common.replay import SPLITS, Problem, Quadruple, parse_quadruple, read_replay
from common.teaching import LEAK

FILES = ("accepted", "rejected", "requests", "attempts", "batches")
LEAKS = 2  # critiques that give the answer away: the first is told so and tries again


def check_job(out: pathlib.Path, job: dict[str, Any]) -> None:
    """A folder belongs to one job; InputError names what is other."""
    path = out / "job.json"
    if not path.is_file():
        if (out / "train.jsonl").exists():
            raise InputError(f"--out {out}: holds a replay that another command made; choose another folder")
        write_atomic(path, json.dumps(job, indent=1) + "\n")
    try:
        former = read_json(path)
    except InputError:
        raise InputError(f"{path}: cannot be read; restore it, or choose another --out") from None
    differs = ", ".join(key for key in job if former.get(key) != job[key])
    if differs:
        raise InputError(f"--out {out}: was begun with another {differs}; choose another folder, or the former flags")


class Records:
    """What the starts of a folder have come to: who is kept, who is rejected for good, what each problem has tried."""

    def __init__(self, out: pathlib.Path, problems: dict[str, Problem]):
        self.files = {name: Ledger(out / f"{name}.jsonl") for name in FILES}
        self.repaired = [file.repaired for file in self.files.values() if file.repaired]
        self.kept: set[str] = set()
        self.final: dict[str, str] = {}
        self.tries: dict[str, list[str]] = {}
        self.problems = problems
        self.files["accepted"].each(self.note_kept)
        self.files["rejected"].each(self.note)
        self.quadruples()  # what cannot be read is said before anything is paid

    def note_kept(self, row: dict[str, Any]) -> None:
        task_id = row["meta"]["task_id"]
        if task_id in self.problems and self.problems[task_id].x != row["x"]:
            out = self.files["accepted"].path.parent
            raise InputError(f"{out}: {task_id} is another problem by now; choose another --out")
        self.kept.add(task_id)

    def note(self, row: dict[str, Any]) -> None:
        self.tries.setdefault(row["task_id"], []).append(row["reason"])
        if row["final"]:
            self.final[row["task_id"]] = row["reason"]

    def done(self, task_id: str) -> bool:
        return task_id in self.kept or task_id in self.final

    async def accept(self, q: Quadruple) -> None:
        """On disk first; then it counts."""
        await self.files["accepted"].commit(dataclasses.asdict(q))
        self.kept.add(q.meta["task_id"])

    async def reject(self, task_id: str, reason: str, tries: int, final: bool = False) -> None:
        """One try is used up; the last one makes it final, and so does a second critique that gives the answer away."""
        so_far = [*self.tries.get(task_id, ()), reason]
        final = final or len(so_far) >= tries or so_far.count(LEAK) >= LEAKS
        row = {"task_id": task_id, "try": len(so_far), "reason": reason, "final": final}
        await self.files["rejected"].commit(row)
        self.note(row)

    def quadruples(self) -> dict[str, Quadruple]:
        """Those kept, by task id. Should one stand there twice, the first counts. What a person has said of one in the
        replay that was written before stays."""
        accepted, found, texts = self.files["accepted"], {}, lambda q: (q.x, q.y0, q.f, q.y1)
        for i, row in enumerate(accepted.rows(), 1):
            q = parse_quadruple(json.dumps(row), f"{accepted.path}:{i}")
            found.setdefault(q.meta["task_id"], q)
        for path in (accepted.path.with_name(f"{split}.jsonl") for split in SPLITS):
            for q in read_replay(path) if path.is_file() and path.stat().st_size else ():
                own = found.get(q.meta["task_id"])
                if q.meta["is_human_audited"] and own and texts(own) == texts(q):
                    found[q.meta["task_id"]] = q
        return found

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def why_not(self, problems: list[Problem], y0s: dict[str, list[str]] | None, put_off: dict[str, str]) -> Counter:
        """Why problems are not kept: they have no attempt, were rejected, got no answer (`put_off`), were not asked."""
        rejected: Counter[str] = Counter()
        for p in problems:
            if p.task_id not in self.kept:
                without = y0s is not None and not y0s.get(p.task_id)
                asked = self.final.get(p.task_id) or put_off.get(p.task_id) or "not asked to the end"
                rejected["no wrong attempt" if without else asked] += 1
        return rejected


def spans_and_leaks(records: Records, quads: list[Quadruple]) -> dict[str, Any]:
    """What a report says of the answers of all starts: why they were rejected, how the quoted steps were found and how
    often they are the ones that the step checker finds, the share of critiques that gave the answer away."""
    answers = Counter(reason for reasons in records.tries.values() for reason in reasons)
    agrees = [q.meta["span_by_rule"] for q in quads if q.meta.get("span_by_rule") is not None]
    return {
        "answers_rejected": dict(sorted(answers.items())),
        "leaks_rejected": answers[LEAK] / max(1, len(quads) + sum(answers.values())),
        "spans": dict(sorted(Counter(q.meta["span_found"] for q in quads).items())),
        "spans_at_the_rules_step": sum(agrees) / len(agrees) if agrees else None, "repaired": records.repaired,
    }  # fmt: skip
