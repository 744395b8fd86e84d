"""The benchmarks run: each by its own command line on the smallest work, since nothing else calls them.

pytest -m slow tests/test_benchmarks.py
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = ("--size=64x1", "--prompts=2", "--group=2", "--prompt_tokens=16", "--new_tokens=8")

pytestmark = pytest.mark.slow


def lines(name: str, *flags: str) -> list[dict]:
    """The JSON lines that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("task", ["grpo", "cts", "sft", "dpo"])
def test_paired(task):
    (line,) = lines("paired.py", *SMALL, f"--task={task}", "--warmup=1", "--steps=2")
    parts = {"update"} | ({"rollout", "score"} if task in ("grpo", "cts") else {"batch"})
    assert parts < set(line["wall_s"]) and line["steps_used"] == 2
    together = sum(line["wall_s"][part]["median"] for part in parts)
    assert 0 < together < 2 * line["wall_s"]["step"]["median"]


def test_roofline():
    found = lines("roofline.py", *SMALL, "--repeats=1")
    assert {line["part"].split("/")[0] for line in found[1:]} == {"update", "rollout"}
    assert all(line["ms"] > 0 for line in found[1:])


@pytest.mark.parametrize(("name", "case"), [("memory", 1), ("steptime", 0), ("steptime", 1)])
def test_what_is_predicted_of_devices_is_what_xla_compiles(name, case):
    """Memory, FLOPs and bytes exchanged on eight devices, within a seventh. So weights are gathered over the data axis,
    once a program; were activations exchanged instead, far more would be summed. Never are all logits there."""
    code = f"import json, memory, {name} as module; print(json.dumps(module.check(*memory.CHECKED[{case}])))"
    command = [sys.executable, "-c", code]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT / "benchmarks", env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.pop("logits at a time", 0) <= 0.5
    assert len(found) >= 3 and all(6 / 7 < ratio < 7 / 6 for ratio in found.values()), found


def test_programs(confined):
    (line,) = lines("programs.py", "--batch=40")
    assert all(value > 0 for value in line.values() if isinstance(value, int | float))


PEER = """
import argparse, json
ap = argparse.ArgumentParser()
for flag in "model prompts_file prompts group new_tokens steps warmup reward".split():
    ap.add_argument("--" + flag, required=True)
args = ap.parse_args()
rows = [json.loads(line) for line in open(args.prompts_file)]
print("chatter")
line = {"engine": "peer", "step_s": 1000.0, "rollout_s": 500.0, "peak_rss_mb": 100, "rows": rows}
print(json.dumps(line | vars(args)))
"""


def test_natural(golden_copy, tmp_path):
    """Both engines get the same prompts in the same order, with each reward once; the ratios are of their lines."""
    row = lambda i: {
        "question": f"Ann has {i} pens, buys {i + 1} and gives 2 away. How many has she?",
        "answer": f"She has {i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} pens.\n"
        f"Then {2 * i + 1}-2=<<{2 * i + 1}-2={2 * i - 1}>>{2 * i - 1}.\n#### {2 * i - 1}",
    }
    (tmp_path / "data").mkdir()
    for split, numbers in (("train", range(2, 40)), ("test", range(40, 50))):
        text = "".join(json.dumps(row(i)) + "\n" for i in numbers)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    (tmp_path / "a peer.py").write_text(PEER)
    work = dict(prompts=2, group=2, new_tokens=8, warmup=1, steps=2)
    found = lines(
        "natural.py", f"--model={golden_copy('qwen2')}", f"--data_dir={tmp_path / 'data'}",
        *(f"--{flag}={value}" for flag, value in work.items()),
        f"--peer={shlex.join([sys.executable, str(tmp_path / 'a peer.py')])}",
    )  # fmt: skip
    assert [(line.get("engine"), line["reward"]) for line in found[:4]][0::2] == [("cts", "digits"), ("cts", "answer")]
    for ours, peers, ratio in zip(found[0:4:2], found[1:4:2], found[4:]):
        assert {k: int(peers[k]) for k in work} == work and peers["reward"] == ratio["reward"]
        assert len(peers["rows"]) == 3 * 2 and all("Ann has" in row["prompt"] for row in peers["rows"])
        assert 1 <= ours["steps_used"] <= 2 and 0 < ours["completion_tokens"] <= 2 * 2 * 8 and 0 <= ours["cut"] <= 1
        assert ratio["times_as_fast"]["step"] == pytest.approx(1000 / ours["step_s"], rel=0.01)
        assert ratio["memory"] == pytest.approx(ours["peak_memory_mib"]["host"] / 100, rel=0.01)
    assert found[1]["rows"] == found[3]["rows"]
