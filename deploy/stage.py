"""Puts a run's data and weights where workers without a hub find them: a folder or a bucket. On the workers it brings
them into a folder. Both ways every file is checked by its digest when it has arrived.

    python deploy/stage.py --task gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --to gs://me-cts/staged
    python deploy/stage.py --fetch gs://me-cts/staged --to /data/staged

What is there: replay/{train,val,test}.jsonl and model/, a checkpoint's folder (of `--model nano` the task's base, which
is trained here if need be). A run takes them as `--replay /data/staged/replay --model /data/staged/model`; where the
bucket is mounted, from the mount.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cts_common as cts
from common.base import fetch_model, nano_base
from common.buckets import Bucket, Damaged, digest, is_url, reason

PARTS = ("replay", "model")


@dataclasses.dataclass(frozen=True)
class Args:
    to: str
    """where to: a folder, gs://... or s3://...; with --fetch a folder"""
    fetch: str | None = None
    """bring what was staged at this folder or address, and nothing else; none = stage"""
    task: str = "fixtures_long"
    """task whose replay is staged, made if there is none yet"""
    replay: str | None = None
    """folder with {train,val,test}.jsonl; none = data/replay/<task>"""
    data_dir: str | None = None
    """folder with the task's source files, where its replay has to be made; none = the hub"""
    model: str = "nano"
    """nano (its base), or a checkpoint: folder or hub id"""
    out_dir: str = "runs"
    """folder of the cached nano base, the --out_dir of the scripts"""


def place(address: str) -> Bucket:
    """A folder as a bucket, or a bucket."""
    return Bucket(address if is_url(address) else f"file://{pathlib.Path(address).absolute()}")


def check(bucket: Bucket, part: str) -> int:
    """Bytes of a part that has arrived; InputError naming the file whose digest is not that of what was sent."""
    names = bucket.marker(part)
    for name, expected in names.items():
        if not bucket.holds(f"{part}/{name}", expected):
            raise cts.InputError(f"{bucket.url}/{part}/{name}: is not what was sent; stage it again")
    return sum(bucket.fs.size(f"{bucket.root}/{part}/{name}") for name in names)


def main(args: Args) -> None:
    if args.fetch:
        if is_url(args.to):
            raise cts.InputError(f"--to {args.to}: what is fetched goes into a folder")
        source = place(args.fetch)
        for part in PARTS:
            if not source.marker(part):
                raise cts.InputError(f"--fetch {args.fetch}: no {part} was staged there")
            target = pathlib.Path(args.to).absolute() / part
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.fetch_group(part, target)
            for name, expected in source.marker(part).items():  # one that was here already may be another
                if not (target / name).is_file() or digest(target / name) != expected:
                    raise cts.InputError(f"{target / name}: is not what was staged; remove {target}")
            print(f"{part}: in {target}, digests checked")
    else:
        replay = cts.load_replay(args.task, args.replay, args.data_dir)
        target, folders = place(args.to), {"replay": pathlib.Path(args.replay or f"data/replay/{args.task}")}
        nano = args.model == "nano"
        folders["model"] = nano_base(args.task, replay["train"], args.out_dir) if nano else fetch_model(args.model)
        for part, folder in folders.items():
            target.send_group(folder, part, trusted=False)
            print(f"{part}: {check(target, part) / 1e6:.1f} MB from {folder} to {args.to}/{part}, digests checked")
    if not is_url(args.to):
        print(f"use it: --replay {args.to}/replay --model {args.to}/model")


def understood(args: Args) -> None:
    """`main`, with what the clients of buckets raise in one line."""
    try:
        main(args)
    except cts.InputError:
        raise
    except (Damaged, PermissionError, FileNotFoundError) as e:
        raise cts.InputError(f"--to {args.to}: {reason(e)}") from None
    except Exception as e:  # each client raises errors of its own, and the same command may do better later
        sys.exit(f"error: {args.fetch or args.to}: {reason(e)}")


if __name__ == "__main__":
    cts.cli(understood, Args)
