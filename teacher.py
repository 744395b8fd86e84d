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

Teachers `anthropic` and `openai` ask a model over an API for the critique and y1, and for y0 unless `--y0` says whose
it is. All is verified; docs/teachers.md says how they are run, what they cost, what is kept and what is written where.

    python teacher.py --task gsm8k          (about half a minute; the default, fixtures_long, as well)
    python teacher.py --y0 model            (two to three minutes on 2 CPU cores, more where it makes the base)
    python teacher.py --task mbpp           (two to three minutes on 2 CPU cores: every program is run)
    python teacher.py --teacher anthropic --teacher_model MODEL --task gsm8k --max_usd 20
    python teacher.py --teacher openai --base_url http://localhost:8000/v1 --teacher_model MODEL --dry_run yes
    python teacher.py --stats data/replay/gsm8k
"""

import dataclasses
import pathlib
from typing import Any, Literal

import cts_common as cts


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- what is made ----
    task: str = "fixtures_long"
    """source of the problems: fixtures_long, fixtures_rare, fixtures_math, fixtures_code, gsm8k, mbpp or apps"""
    teacher: Literal["perturb", "anthropic", "openai"] = "perturb"
    """who makes f, and y0 unless --y0 says else; perturb = rules, no key; openai = any server of its form"""
    y0: Literal["auto", "teacher", "perturb", "model"] = "auto"
    """whose flawed attempts: the teacher's own (auto), a reference with one step corrupted, wrong samples of --model"""
    model: str = "nano"
    """of --y0 model: nano (the task's base, shipped or made here), or a checkpoint: folder or hub id"""
    samples: int = 4
    """of --y0 model: attempts sampled of a problem, at most; over an API each try is on another wrong one"""
    temperature: float = 0.7
    """of --y0 model: sampling temperature"""
    data_dir: str | None = None
    """folder with the source's own files (gsm8k, apps: train.jsonl, test.jsonl; mbpp: mbpp.jsonl); none = the hub"""
    out: str | None = None
    """folder for the replay; none = data/replay/<task>, with --y0 model <task>_model, over an API <task>_<teacher>"""
    out_dir: str = "runs"
    """of --y0 model: folder of the cached nano base, the --out_dir of the scripts"""
    seed: int = 0
    """which corruption each problem gets, or which samples, and the order in which an API is asked"""
    limit: int = 0
    """problems per split; 0 = all"""
    keep_unverified: Literal["no", "yes"] = "no"
    """yes = also keep quadruples that the verifier does not confirm (meta.verified says which)"""
    unsafe_sandbox: Literal["refuse", "allow"] = "refuse"
    """allow = run the programs of code tasks even where this machine can confine nothing; they are hostile"""
    # ---- a teacher over an API ----
    teacher_model: str = ""
    """the provider's name of the model; there is no default"""
    base_url: str | None = None
    """address of another server of the same form (vLLM, llama.cpp, Ollama: no key needed); none = the provider's"""
    form: Literal["auto", "schema", "tool", "plain"] = "auto"
    """how JSON is asked for; auto = by schema, else as a tool, else in words, as the server can"""
    concurrency: int = 8
    """requests under way at a time"""
    timeout: float = 120.0
    """seconds for one request, from its first byte to the answer's last"""
    max_tokens: int = 4096
    """tokens of one answer, at most, reasoning included"""
    tries: int = 3
    """answers for one problem before it is rejected"""
    max_usd: float = 0.0
    """dollars for this folder, over all its starts; 0 = no bound"""
    max_requests: int = 0
    """requests for this folder, over all its starts; 0 = no bound"""
    price_in: float | None = None
    """dollars per million prompt tokens; none = that of a small dated table, where it has the model"""
    price_cached: float | None = None
    """dollars per million prompt tokens read from the provider's cache; none = as --price_in or the table says"""
    price_out: float | None = None
    """dollars per million answer tokens; none = that of the table, where it has the model"""
    batch: Literal["no", "yes"] = "no"
    """yes = through the provider's batch interface: half the price, answers within a day"""
    dry_run: Literal["no", "yes"] = "no"
    """yes = print the first prompt and an estimate of the cost, ask nothing and write nothing"""
    # ---- replay that is there ----
    stats: str | None = None
    """only print what the replay in this folder holds"""
    merge: tuple[str, ...] | None = None
    """only put the replays of these folders together, into --out"""
    audit: int = 0
    """only write a sheet of so many quadruples of --out for a person to judge, into --out/audit; 0 = off"""
    audited: str | None = None
    """only read such a sheet back, filled in, into the replay in --out"""


TERMS = ("teacher", "teacher_model", "base_url", "form", "y0", "concurrency", "timeout", "max_tokens", "tries",
         "max_usd", "max_requests", "price_in", "price_cached", "price_out", "batch")  # fmt: skip
SAMPLING = ("model", "samples", "temperature", "out_dir")
COMMON = ("task", "data_dir", "out", "seed", "limit", "keep_unverified", "unsafe_sandbox")


def main(args: Args) -> dict[str, Any]:
    flags = dataclasses.asdict(args)
    pick = lambda names: {name: flags[name] for name in names}
    uses = [name for name in ("stats", "merge", "audit", "audited") if flags[name] not in (None, 0)]
    if len(uses) > 1:
        raise cts.InputError(f"--{uses[0]}, --{uses[1]}: one at a time")
    if uses and args.dry_run == "yes":
        raise cts.InputError(f"--dry_run yes: is of a teacher over an API; leave it out, --{uses[0]} asks nobody")
    if uses:
        return use_replay(args)
    for name in ("model", "samples", "temperature") if args.y0 != "model" else ():
        if flags[name] != getattr(Args, name):
            raise cts.InputError(f"--{name}: is of attempts that a model samples; add --y0 model")
    if args.teacher == "perturb":
        for name in (*TERMS, "dry_run"):  # whoever names a model or a cap means another teacher
            if name not in ("teacher", "y0") and flags[name] != getattr(Args, name):
                raise cts.InputError(f"--{name}: is of a teacher over an API; add --teacher anthropic or openai")
        if args.y0 == "teacher":
            raise cts.InputError("--y0 teacher: needs a teacher over an API; leave it out, or choose perturb or model")
        if args.y0 == "model":
            return cts.sample_replay(**pick(COMMON), **pick(SAMPLING))
        return cts.make_replay(teacher="perturb", **pick(COMMON))
    # the rooms of teachers over an API are no part of what the methods import
    from common.taught import Terms, teach_replay

    terms = Terms(**pick(TERMS) | {"y0": "teacher" if args.y0 == "auto" else args.y0})
    return teach_replay(terms=terms, **pick(COMMON), **pick(SAMPLING), dry=args.dry_run == "yes")


def use_replay(args: Args) -> dict[str, Any]:
    """What is done with a replay that is there."""
    from common import shelf

    if args.stats is not None:
        return shelf.stats(args.stats)
    if args.merge is not None:
        if not args.merge:
            raise cts.InputError("--merge: name the folders that are put together")
        if not args.out:
            raise cts.InputError("--merge: say with --out into which folder")
        return shelf.merge(args.merge, args.out)
    from common import human

    if args.audit < 0:
        raise cts.InputError(f"--audit {args.audit}: must be 0 (off) or more")
    folder = pathlib.Path(args.out or f"data/replay/{args.task}")
    if args.audited is not None:
        found = human.read_audit(args.audited, pathlib.Path(args.audited).with_name("key.json"), folder)
        print(f"{folder}: {found['audited']} of {found['rows']} rows of {args.audited} are read back")
        return found
    key = human.export_audit(folder, folder / "audit", args.audit, args.seed)
    print(f"{folder}/audit: fill in audit.csv or audit.html, then --audited {folder}/audit/audit.csv")
    return key


if __name__ == "__main__":
    cts.cli(main, Args)
