"""What a program in the sandbox costs. One JSON line: milliseconds of one program, programs a second of a batch,
seconds of a batch with endless loops, and how programs are confined on this machine.

    python benchmarks/programs.py
    python benchmarks/programs.py --mbpp mbpp.jsonl --workers 2
"""

import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

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


def pairs(path: str | None, n: int) -> list[tuple[str, dict]]:
    """n programs with their tests, all different."""
    if path is None:
        body = "import math\ndef f(n):\n    return sum(math.gcd(n, i) for i in range(n))  # {}\n"
        asserts = ["assert f(1) == 1", "assert f(6) == 15", "assert f(10) == 27"]
        return [(body.format(i), {"asserts": asserts}) for i in range(n)]
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    found = [(r["code"], {"setup": r["test_setup_code"], "asserts": r["test_list"]}) for r in rows]
    return [
        (f"{code}\n# {i // len(found)}", tests) for i, (code, tests) in zip(range(n), found * (n // len(found) + 1))
    ]


def main(args: Args) -> None:
    mode = cts.check_sandbox()
    found = pairs(args.mbpp, 974)
    cts.run_programs(found[:4])
    single = []
    for program, tests in found[:200]:
        began = time.perf_counter()
        cts.run_program(program, tests)
        single.append(time.perf_counter() - began)
    began = time.perf_counter()
    verdicts = cts.run_programs(found, workers=args.workers, timeout_s=args.timeout_s)
    rate = len(found) / (time.perf_counter() - began)
    mixed = pairs(args.mbpp, args.batch)
    for i in range(0, args.batch, round(1 / args.loops)):
        mixed[i] = (f"{mixed[i][0]}\nwhile True:\n    pass", mixed[i][1])
    began = time.perf_counter()
    mixed_verdicts = cts.run_programs(mixed, workers=args.workers, timeout_s=args.timeout_s)
    print(
        json.dumps(
            {
                "mode": mode,
                "workers": args.workers,
                "single_median_ms": round(1000 * float(np.median(single)), 2),
                "single_p90_ms": round(1000 * float(np.quantile(single, 0.9)), 2),
                "programs_per_s": round(rate, 1),
                "passed": sum(v.outcome == "pass" for v in verdicts),
                "of": len(found),
                "mixed_s": round(time.perf_counter() - began, 2),
                "mixed_timeouts": sum(v.outcome == "timeout" for v in mixed_verdicts),
                "mixed_passed": sum(v.outcome == "pass" for v in mixed_verdicts),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
