"""Makes replay quadruples (x, y0, f, y1) from problems with reference solutions.

Teacher `perturb` needs no key and no model: y1 is the reference, y0 the reference with one corrupted step from which
every later step is recomputed, so that the attempt is consistent after its one error:

    y1  Tom has 48/2 = <<48/2=24>>24 red pens.        y0  Tom has 48/2 = <<48/2=26>>26 red pens.
        He has 48+24 = <<48+24=72>>72 pens.               He has 48+26 = <<48+26=74>>74 pens.
        #### 72                                           #### 74
    f   The first step is wrong: 48/2 is not 26.

For programs y0 is a mutant of the reference that fails a test: one node or statement of its syntax tree is changed, in
the source text. f names line and call: "Line 2 is wrong: it uses the wrong operator. f(3) fails."

With `--y0 model` the flawed attempts are a model's own: of each problem the first of some samples that is wrong and in
which the step checker finds the wrong step. f names that step, y1 is the reference as before (math tasks).

    python teacher.py --task gsm8k          (about half a minute; fixtures_math about ten seconds)
    python teacher.py --y0 model            (two to three minutes on 2 CPU cores, more where it makes the base)
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
    """who makes f, and y0 with --y0 perturb; perturb = rules, no key and no network"""
    y0: Literal["perturb", "model"] = "perturb"
    """whose flawed attempts: perturb = the reference with one step corrupted; model = wrong samples of --model"""
    model: str = "nano"
    """of --y0 model: nano (its base, made from data/replay/<task>), or a checkpoint: folder or hub id"""
    samples: int = 4
    """of --y0 model: attempts sampled of a problem, at most; the first that makes a quadruple ends it"""
    temperature: float = 0.7
    """of --y0 model: sampling temperature"""
    data_dir: str | None = None
    """folder with the source's own files (gsm8k, apps: train.jsonl, test.jsonl; mbpp: mbpp.jsonl); none = the hub"""
    out: str | None = None
    """folder for {train,val,test}.jsonl and report.json; none = data/replay/<task>, with --y0 model <task>_model"""
    out_dir: str = "runs"
    """of --y0 model: folder of the cached nano base, the --out_dir of the scripts"""
    seed: int = 0
    """which corruption each problem gets, or which samples"""
    limit: int = 0
    """problems per split; 0 = all"""
    keep_unverified: Literal["no", "yes"] = "no"
    """yes = also keep quadruples that the verifier does not confirm (meta.verified says which)"""
    unsafe_sandbox: Literal["refuse", "allow"] = "refuse"
    """allow = run the programs of code tasks even where this machine can confine nothing; they are hostile"""


def main(args: Args) -> dict[str, Any]:
    flags = dataclasses.asdict(args)
    teacher, y0 = flags.pop("teacher"), flags.pop("y0")
    if y0 == "model":
        return cts.sample_replay(**flags)
    of_model = ("model", "samples", "temperature", "out_dir")
    return cts.make_replay(teacher=teacher, **{k: v for k, v in flags.items() if k not in of_model})


if __name__ == "__main__":
    cts.cli(main, Args)
