"""Makes replay quadruples (x, y0, f, y1) from problems with reference solutions.

Teacher `perturb` needs no key and no model: y1 is the reference, y0 the reference with one corrupted step from which
every later step is recomputed, so that the attempt is consistent after its one error:

    y1  Tom has 48/2 = <<48/2=24>>24 red pens.        y0  Tom has 48/2 = <<48/2=26>>26 red pens.
        He has 48+24 = <<48+24=72>>72 pens.               He has 48+26 = <<48+26=74>>74 pens.
        #### 72                                           #### 74
    f   The first step is wrong: 48/2 is not 26.

For programs y0 is a mutant of the reference that fails a test: one node or statement of its syntax tree is changed, in
the source text. f names line and call: "Line 2 is wrong: it uses the wrong operator. f(3) fails."

    python teacher.py --task gsm8k          (about half a minute; fixtures_math about ten seconds)
    python teacher.py --task mbpp           (two to three minutes on 2 CPU cores: every program is run)
"""

import dataclasses
from typing import Any, Literal

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = "fixtures_math"
    """source of the problems: fixtures_math, fixtures_code, gsm8k, mbpp or apps"""
    teacher: Literal["perturb"] = "perturb"
    """who makes y0 and f; perturb = rules, no key and no network"""
    data_dir: str | None = None
    """folder with the source's own files (gsm8k, apps: train.jsonl, test.jsonl; mbpp: mbpp.jsonl); none = the hub"""
    out: str | None = None
    """folder for {train,val,test}.jsonl and report.json; none = data/replay/<task>"""
    seed: int = 0
    """which corruption each problem gets"""
    limit: int = 0
    """problems per split; 0 = all"""
    keep_unverified: Literal["no", "yes"] = "no"
    """yes = also keep quadruples that the verifier does not confirm (meta.verified says which)"""
    unsafe_sandbox: Literal["refuse", "allow"] = "refuse"
    """allow = run the programs of code tasks even where this machine can confine nothing; they are hostile"""


def main(args: Args) -> dict[str, Any]:
    return cts.make_replay(**dataclasses.asdict(args))


if __name__ == "__main__":
    cts.cli(main, Args)
