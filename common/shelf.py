"""What a person does with replay folders that are there: look into one, put several together. Used by `teacher.py`;
makes no quadruple."""

import pathlib
from collections import Counter
from typing import Any

from common.basics import InputError, normalize_x, writable
from common.replay import SPLITS, Quadruple, check_leakage, read_replay, replay_report, write_replay


def read_folder(folder: str) -> dict[str, list[Quadruple]]:
    """{split: quadruples} of a replay folder, of the splits that are there; InputError where none is."""
    paths = {split: pathlib.Path(folder) / f"{split}.jsonl" for split in SPLITS}
    found = {split: read_replay(path) for split, path in paths.items() if path.is_file() and path.stat().st_size}
    if not found:
        raise InputError(f"{folder}: holds no replay; give a folder with train.jsonl, val.jsonl, test.jsonl")
    return found


def stats(folder: str) -> dict[str, Any]:
    """Print and return what a replay holds."""
    replay = read_folder(folder)
    quads = [q for some in replay.values() for q in some]
    counts = lambda key: dict(sorted(Counter(str(q.meta.get(key, "not said")) for q in quads).items()))
    middle = lambda values: sorted(values)[len(quads) // 2]
    found = {
        "splits": {split: len(some) for split, some in replay.items()}, **replay_report(quads),
        "domains": counts("domain"), "teachers": counts("teacher"), "y0_sources": counts("y0_source"),
        "with_span": sum(q.meta["error_span"] is not None for q in quads) / len(quads),
        "verified": counts("verified"), "audited": sum(q.meta["is_human_audited"] for q in quads),
        "problems": len({normalize_x(q.x) for q in quads}),
        "median_characters": {part: middle(len(getattr(q, part)) for q in quads) for part in ("x", "y0", "f", "y1")},
        "median_edit_distance": middle(q.meta["edit_distance"] for q in quads),
    }  # fmt: skip
    for name, value in found.items():
        told = ", ".join(f"{k} {n}" for k, n in value.items()) if isinstance(value, dict) else value
        print(f"{name:21s} {f'{told:.3f}' if isinstance(told, float) else told}")
    return found


def merge(folders: tuple[str, ...], out: str) -> dict[str, Any]:
    """Write the quadruples of several folders into a new one; of a problem that stands in several, or twice, the first
    one counts. InputError where domains differ, or a problem stands in two splits."""
    if pathlib.Path(out).exists() and any(pathlib.Path(out).glob("*.jsonl")):
        raise InputError(f"--out {out}: holds files already; choose a new folder")
    merged: dict[str, list[Quadruple]] = {}
    seen: dict[str, str] = {}
    domains, twice = {}, 0
    for folder in folders:
        for split, quads in read_folder(folder).items():
            domains |= {q.meta["domain"]: folder for q in quads}
            for q in quads:
                key = normalize_x(q.x)
                if seen.get(key) == split:
                    twice += 1
                else:
                    seen[key] = split
                    merged.setdefault(split, []).append(q)
    if len(domains) > 1:
        kinds = " and ".join(f"{folder} is {domain}" for domain, folder in domains.items())
        raise InputError(f"--merge: {kinds}; merge replays of one kind")
    check_leakage(merged)
    writable(out, "out")
    for split in dict.fromkeys(("train", "val", "test", *merged)):
        write_replay(pathlib.Path(out) / f"{split}.jsonl", merged.get(split, []))
    sizes = {split: len(quads) for split, quads in merged.items()}
    print(f"{out}: {', '.join(f'{split} {n}' for split, n in sizes.items())}; {twice} left out, being there")
    return {"splits": sizes, "left_out": twice}
