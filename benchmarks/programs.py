"""What a program in the sandbox costs. One JSON line: milliseconds of one program, programs a second of a batch,
seconds of a batch with endless loops, and how programs are confined on this machine.

    python benchmarks/programs.py
    python benchmarks/programs.py --mbpp mbpp.jsonl --workers 2
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    mbpp: str | None = None
    """MBPP's jsonl, for its reference programs; None: a few small programs made here"""
    workers: int = 2
    """programs that run at a time"""
    batch: int = 512
    """programs of the batch with endless loops"""
    loops: float = 0.05
    """share of it that are endless loops"""
    timeout_s: float = 4.0
    """limit of a test, in seconds of CPU time"""


def programs(path: str | None, n: int) -> list[tuple[str, dict]]:
    """n programs with their tests, all different."""
    code = "import math\ndef f(n):\n    return sum(math.gcd(n, i) for i in range(n))"
    known = [(code, {"asserts": ["assert f(1) == 1", "assert f(6) == 15", "assert f(10) == 27"]})]
    if path:
        rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
        known = [(r["code"], {"setup": r["test_setup_code"], "asserts": r["test_list"]}) for r in rows]
    return [(f"{code}\n# {i}", tests) for i, (code, tests) in zip(range(n), itertools.cycle(known))]


def timed(run, *args):
    """(what run returns, seconds)."""
    began = time.perf_counter()
    return run(*args), time.perf_counter() - began


def main(args: Args) -> None:
    mode, found = cts.check_sandbox(), programs(args.mbpp, 974)
    batch = functools.partial(cts.run_programs, workers=args.workers, timeout_s=args.timeout_s)
    cts.run_programs(found[:4])  # the first ones start the server
    single_ms = [1000 * timed(cts.run_program, *one)[1] for one in found[:200]]
    verdicts, seconds = timed(batch, found)
    mixed = programs(args.mbpp, args.batch)
    for i in range(0, args.batch, round(1 / args.loops)):
        mixed[i] = (f"{mixed[i][0]}\nwhile True:\n    pass", mixed[i][1])
    mixed_verdicts, mixed_seconds = timed(batch, mixed)
    count = lambda outcome, verdicts: sum(v.outcome == outcome for v in verdicts)
    line = {
        "mode": mode, "workers": args.workers, "single_median_ms": round(float(np.median(single_ms)), 2),
        "single_p90_ms": round(float(np.quantile(single_ms, 0.9)), 2), "programs_per_s": round(len(found) / seconds, 1),
        "passed": count("pass", verdicts), "of": len(found), "mixed_s": round(mixed_seconds, 2),
        "mixed_timeouts": count("timeout", mixed_verdicts), "mixed_passed": count("pass", mixed_verdicts),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    cts.cli(main, Args)
