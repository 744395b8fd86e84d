"""Quick compilation in all tests, subprocesses too: their programs run for a second, LLVM's slow passes take longer.
And no test asks the network. Then the fixtures that several test files share."""
# ruff: noqa: E402 (JAX reads the flags when it is imported)

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
collect_ignore_glob = ["golden/*", "faulty/*", "stand_ins/*"]  # for other environments, and programs

import pytest
from examples import GOLDEN, PROBLEM, TEXTS

from common import programs, sandbox
from common.basics import InputError
from common.fixtures import fixtures_code
from common.making import perturb_programs
from common.programs import Verdict
from common.replay import Quadruple
from common.sandbox import Sandbox, check_sandbox
from common.tokenizer import Tokenizer, train_tokenizer


# ---- tokenizers and checkpoints -------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Trained on TEXTS."""
    return train_tokenizer(TEXTS * 3, 330)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that positions can be counted by hand."""
    return train_tokenizer(["x"], 258)


@pytest.fixture
def golden_copy(tmp_path):
    """A function that copies a golden checkpoint to a folder that the test may spoil."""

    def make(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


# ---- commands ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """A function that starts b2_grpo.py as a user does, `command(*flags, **variables)`, on a tiny checkpoint and a tiny
    replay; `command.out` is its --out_dir, `command.sft` the flags for b0_sft.py, whose weights move
    on this base, and no --out_dir. Runs differ in their --seed and share the report on the base."""
    import tiny

    import teacher
    from common.base import nano_base
    from common.making import load_replay

    folder = tmp_path_factory.mktemp("command")
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch.setattr, patch.setitem)
        teacher.main(teacher.Args(task="fixtures_math", out=str(folder / "replay"), limit=24))
        replay = load_replay("fixtures_math", str(folder / "replay"), None, "refuse")
        model = nano_base("fixtures_math", replay["train"], str(folder / "base"))
    settings = tiny.FLAGS | dict(model=model, replay=folder / "replay", out_dir=folder / "runs", group=2, steps=2)
    given = [text for name, value in settings.items() if name != "wandb" for text in (f"--{name}", str(value))]

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla_cache"), **variables}
        return subprocess.Popen(
            [sys.executable, "b2_grpo.py", *given, *flags], cwd=pathlib.Path(__file__).parents[1], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    start.out, start.settings = folder / "runs", settings
    pairs = [pair for pair in zip(given[::2], given[1::2]) if pair[0] not in ("--out_dir", "--truncated")]
    start.sft = [*itertools.chain(*pairs), "--wandb", "disabled"]
    return start


# ---- programs -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def confined():
    """Where a machine can confine nothing, no program of these tests runs."""
    try:
        check_sandbox()
    except InputError as e:
        pytest.skip(str(e))


@pytest.fixture(
    scope="module", params=["namespaces", pytest.param("namespaces-user", marks=pytest.mark.slow), "landlock"]
)
def boxes(request):
    """{purpose: sandbox}, started once per file and kind; further ones start as they are asked for."""
    try:
        started = {"programs": Sandbox(request.param)}
    except InputError as e:
        pytest.skip(str(e))
    yield started
    for box in started.values():
        box.close()


@pytest.fixture
def box(boxes, monkeypatch, confined):
    """Programs run in this kind of sandbox while a test asks for it."""
    first = boxes["programs"]
    monkeypatch.setattr(sandbox, "_sandboxes", boxes)
    return first


@pytest.fixture
def broken_harness(monkeypatch, confined):
    """A sandbox in which every program that holds the word `broken` gives a harness error."""
    run, ran = programs.run_programs, []

    def run_programs(jobs, **limits):
        ran.append([program for program, _ in jobs])
        verdicts = run([job for job in jobs if "broken" not in job[0]], **limits)
        good = iter(verdicts)
        return [bad(len(tests)) if "broken" in program else next(good) for program, tests in jobs]

    bad = lambda total: Verdict(outcome="harness_error", passed=0, total=total, detail="no fork")
    monkeypatch.setattr(programs, "run_programs", run_programs)
    monkeypatch.setattr(programs, "_VERDICTS", {})
    return ran


@pytest.fixture(scope="session")
def made(confined) -> list[Quadruple]:
    """Forty generated problems and one by hand, each with a mutant of its reference."""
    return perturb_programs([*fixtures_code(size=40), PROBLEM])
