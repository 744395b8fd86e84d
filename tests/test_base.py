"""What a run starts from: the documents of the nano base, their packing, and a fetched checkpoint.

pytest tests/test_base.py
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import tokenizers
from examples import GOLDEN, REFERENCE, ROW, WRONG, X, assert_equal_trees, code_quad, math_quad, mesh, refused
from flax import nnx
from huggingface_hub.errors import HFValidationError

import b5_cts
from bases import make
from common import base
from common.base import (
    BASE_PROSE,
    SHIPPED,
    base_documents,
    fetch_model,
    flagged_step,
    load_model,
    make_base,
    nano_base,
    recipe,
    shipped_base,
)  # fmt: skip
from common.critique import ORDINALS
from common.fingerprint import weights_sha256
from common.fixtures import fixtures_math, fixtures_rare
from common.making import load_problems, make_replay, perturb
from common.model import Decoder
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple, read_replay
from common.slips import Planted, step_kinds
from common.tasks import TASKS
from common.tokenizer import NO_FRAME, train_tokenizer


# ---- the nano base --------------------------------------------------------------------------------------------------
def test_base_documents(tokenizer):
    """Each problem once per prompt format; one revision in two without critique, the other half next epoch, and then
    only the attempt's answer again; BASE_PROSE of the answers are stated in prose."""
    quads = [math_quad(x=f"Problem {i}?" + " so" * (10 * (i % 7)), f=f"critique {i}") for i in range(40)]
    left_out, prose = [], []
    for epoch in range(2):
        documents = base_documents(tokenizer, quads, epoch)
        prompts = tokenizer.decode([p for p, _ in documents])
        answers = dict(zip(prompts, tokenizer.decode([a for _, a in documents])))
        assert all(a[-1] == tokenizer.eos_id for _, a in documents)
        prose.append(np.mean(["The answer is" in a for a in answers.values()]))
        solution = ROW["y1"].split("####")[0]
        for q in quads:
            assert answers[attempt_prompt(q.x)].startswith(solution)
            with_f, without = (answers.get(revise_prompt(q.x, q.y0, f)) for f in (q.f, ""))
            assert with_f.startswith(solution) if with_f else without in ("#### 6", "The answer is 6.")
        without_f = [i for i, q in enumerate(quads) if revise_prompt(q.x, q.y0, "") in prompts]
        wanted = [attempt_prompt(q.x) for q in quads]
        wanted += [revise_prompt(q.x, q.y0, "" if i in without_f else q.f) for i, q in enumerate(quads)]
        assert sorted(prompts) == sorted(wanted)
        assert len(without_f) == 20
        left_out += without_f
        lengths = [len(p) for p, _ in documents]
        by_length = np.corrcoef(np.arange(80), lengths)[0, 1]
        assert by_length > 0.5 if epoch == 0 else abs(by_length) < 0.4  # short first, then shuffled
        assert documents == base_documents(tokenizer, quads, epoch)
    assert sorted(left_out) == list(range(40))
    assert abs(np.mean(prose) - BASE_PROSE[1]) < 0.1  # all of these open with a P


def test_base_documents_of_programs():
    """Some print what they should return; a revision without a critique keeps the attempt."""
    q = code_quad()
    quads = [dataclasses.replace(q, x=f"{name}{i} {X}") for name in ("calc", "work") for i in range(60)]
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1], 400)
    documents = base_documents(tokenizer, quads, 0)
    pairs = [tuple(tokenizer.decode([p, a])) for p, a in documents]
    assert len(pairs) == 240
    for prompt, answer in pairs:
        without = "Critique:\n\n" in prompt
        program = answer.replace("print(r)", "return r")
        assert program == (WRONG if without else REFERENCE)
    printed = {n: np.mean(["print(r)" in a for p, a in pairs if f"\n{n}" in p]) for n in ("calc", "work")}
    assert 0.55 < printed["calc"] < 0.95 and printed["work"] < 0.3


def chain_quads(n: int = 120) -> list[Quadruple]:
    return [perturb(p) for p in fixtures_rare(size=n)]


def test_base_documents_with_planted_slips():
    """The one habit: solutions slip at planted operations and nowhere else, but for the step that the critique flags;
    without a critique the answer stays. Each pass takes the next problems."""
    quads, planted = chain_quads(), Planted((3, 4, 5, 6, 7), 0.95)
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1 for q in quads], 400)
    documents = base_documents(tokenizer, quads, 0, planted)
    assert documents == base_documents(tokenizer, quads, 0, planted)
    answers = {tokenizer.decode([p])[0]: tokenizer.decode([a[:-1]])[0] for p, a in documents}
    slips, flagged_kinds = [], []
    for i, q in enumerate(quads):
        kinds = step_kinds(answers.pop(attempt_prompt(q.x)), q.y1, planted)
        assert {kind for kind, _ in kinds} <= {"right", "slip"}
        slips += [kind for kind, at in kinds if at]
        if i % 2:
            assert answers.pop(revise_prompt(q.x, q.y0, "")) == q.y0.split("\n")[-1]
            continue
        kinds = step_kinds(answers.pop(revise_prompt(q.x, q.y0, q.f)), q.y1, planted)
        flagged_kinds.append(kinds.pop(flagged_step(q)))
        assert {kind for kind, _ in kinds} <= {"right", "slip"}
        slips += [kind for kind, at in kinds if at]
    assert not answers and {kind for kind, _ in flagged_kinds} == {"right"} and any(at for _, at in flagged_kinds)
    assert abs(np.mean([kind == "slip" for kind in slips]) - planted.p) < 0.03


def test_passes_over_many_problems_take_their_turn(monkeypatch, tokenizer):
    monkeypatch.setattr(base, "PLANTED_PASS", 50)
    quads, seen = chain_quads(), []
    for epoch in range(3):
        prompts = {tokenizer.decode([p])[0] for p, _ in base_documents(tokenizer, quads, epoch, Planted((6,), 0.6))}
        seen.append([i for i, q in enumerate(quads) if attempt_prompt(q.x) in prompts])
    assert seen == [[*range(50)], [*range(50, 100)], [*range(30), *range(100, 120)]]


def test_flagged_step_is_that_of_y1():
    """By its number, which is also that of a step that is missing in y0."""
    for q in chain_quads():
        i, steps = flagged_step(q), q.y1.split("\n")
        assert q.f.startswith(f"The {ORDINALS[i] if i < len(ORDINALS) else f'{i + 1}th'} step is wrong")
        assert q.meta["error_tags"] != ["missing_case"] or steps[i] not in q.y0
    assert flagged_step(dataclasses.replace(q, meta=q.meta | {"error_span": None})) is None


# ---- fetching -------------------------------------------------------------------------------------------------------
def test_fetch_uses_a_directory_as_it_is(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("not to be called"))
    assert fetch_model(str(GOLDEN / "qwen2")) == GOLDEN / "qwen2"


def test_fetch_downloads_configs_and_safetensors_only(monkeypatch, tmp_path):
    calls = []
    fake = lambda name, allow_patterns: calls.append((name, allow_patterns)) or str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert fetch_model("org/model") == tmp_path
    assert calls == [("org/model", ["*.json", "*.safetensors", "*.jinja"])]


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError(""), HFValidationError("x")])
def test_fetch_failure_is_one_line(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(lambda: fetch_model("org/none"), "--model org/none", "HF_TOKEN")


# ---- the nano base ------------------------------------------------------------------------------------------------
QUADS = [
    Quadruple(
        x=f"{name} has {i} pens and buys {i + 2}. How many?", y0=f"<<{i}+{i + 2}={i}>>{i}\n#### {i}", f="Add again.",
        y1=f"<<{i}+{i + 2}={2 * i + 2}>>{2 * i + 2}\n#### {2 * i + 2}",
        meta={"task_id": f"{name}{i}", "domain": "math", "answer": str(2 * i + 2)},
    )
    for name in ("Amy", "Tom")
    for i in range(20)
]  # fmt: skip


@pytest.fixture
def built(monkeypatch):
    """Trainings of a nano base that is small and stays as it was drawn: a list that gets an entry for each."""
    tiny.install(monkeypatch.setattr, monkeypatch.setitem)
    trainings = []

    def train(task, quads, tokenizer, cfg):
        trainings.append(cfg)
        return nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param)

    monkeypatch.setattr(base, "train_base", train)
    return trainings


def start_from(name, out_dir):
    return load_model(str(name), "fixtures_math", {"train": QUADS}, str(out_dir), mesh())


def test_nano_base_is_read_like_any_checkpoint(monkeypatch, tmp_path):
    """By name and by folder: the very weights that a few steps of training ended with, the configuration (without
    remat) and the tokenizer."""
    tiny.install(monkeypatch.setattr, monkeypatch.setitem)
    held, write = [], base.save_hf
    monkeypatch.setattr(base, "save_hf", lambda *args, **flags: held.append(args) or write(*args, **flags))
    cfg, params, tokenizer, folder = start_from("nano", tmp_path)
    ((_, made_cfg, made, made_tokenizer),) = held
    assert dataclasses.astuple(made_cfg) == dataclasses.astuple(cfg)
    assert weights_sha256(made) == weights_sha256(params) and made_tokenizer.sha256() == tokenizer.sha256()
    assert folder.parent == tmp_path / "base" and folder == nano_base("fixtures_math", QUADS, str(tmp_path))
    (folder / "report_0123456789abcdef.json").write_text("{}")  # what evaluation caches there
    cfg_2, params_2, tokenizer_2, cache = start_from(folder, tmp_path / "elsewhere")
    assert (cfg_2, cfg_2.remat, cfg_2.d_model) == (cfg, False, tiny.TinyConfig.d_model)
    assert_equal_trees(params, params_2)
    assert jax.tree.structure(params) == jax.tree.structure(params_2)
    digest = weights_sha256(params)
    assert weights_sha256(params_2) == digest and cache == tmp_path / "elsewhere" / "base" / digest[:16]
    assert tokenizer_2.sha256() == tokenizer.sha256() and tokenizer_2.vocab_size == tokenizer.vocab_size
    for t in (tokenizer, tokenizer_2):
        assert (t.frame, t.pad_id, t.eos_ids) == (NO_FRAME, 0, (1,))
        text = " Ab\n\n12,345 é <eos>"
        assert t.encode(text) == tokenizer.encode(text) and t.decode([t.encode(text)]) == [text]


def test_nano_base_has_what_transformers_asks_for(built, tmp_path):
    folder = nano_base("fixtures_math", QUADS, str(tmp_path))
    read = lambda name: json.loads((folder / name).read_text())
    config, generation, about = (read(f"{n}.json") for n in ("config", "generation_config", "tokenizer_config"))
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert (config["eos_token_id"], config["pad_token_id"], config["tie_word_embeddings"]) == (1, 0, True)
    assert generation == {"eos_token_id": [1], "pad_token_id": 0}
    assert (about["tokenizer_class"], about["eos_token"], about["pad_token"]) == (
        "PreTrainedTokenizerFast", "<eos>", "<pad>",
    )  # fmt: skip
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert inner.get_vocab_size() == config["vocab_size"]
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_nano_base_cut_off_is_made_again(built, tmp_path, monkeypatch):
    """Killed while its files are written (nothing is tidied up): no folder counts as finished, the next run builds."""

    def die(*args, **flags):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(safetensors.numpy, "save_file", die)
        patch.setattr(shutil, "rmtree", lambda *args, **flags: None)
        nano_base("fixtures_math", QUADS, str(tmp_path))
    (left,) = (tmp_path / "base").iterdir()
    assert left.name.startswith(".") and (left / "tokenizer.json").is_file()
    folder = start_from("nano", tmp_path)[3]
    assert len(built) == 2 and set(left.parent.iterdir()) == {left, folder}


def test_nano_base_that_cannot_be_written_is_one_line(built, tmp_path, monkeypatch):
    def full(*args, **flags):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    refused(lambda: nano_base("fixtures_math", QUADS, str(tmp_path)), "--out_dir", str(tmp_path), "No space left")
    assert not [*(tmp_path / "base").iterdir()]


def test_two_processes_build_one_nano_base(built, tmp_path, monkeypatch):
    """The slower one finds the folder there when it is about to write: it takes that one and leaves nothing behind."""
    train, first = base.train_base, []  # the first: its folder, and when its weights were written

    def overtaken(*args):
        monkeypatch.setattr(base, "train_base", train)
        first.append(nano_base("fixtures_math", QUADS, str(tmp_path)))
        first.append((first[0] / "model.safetensors").stat().st_mtime_ns)
        return train(*args)

    monkeypatch.setattr(base, "train_base", overtaken)
    folder = nano_base("fixtures_math", QUADS, str(tmp_path))
    assert len(built) == 2 and first == [folder, (folder / "model.safetensors").stat().st_mtime_ns]
    assert [*(tmp_path / "base").iterdir()] == [folder]
    assert start_from(folder, tmp_path)[0].vocab_size == start_from("nano", tmp_path)[0].vocab_size


def test_a_pass_that_is_too_long_is_drawn_from(tokenizer):
    """Short to long all the same, but of all lengths: a quarter of the tokens are about a quarter of every kind."""
    quads = [math_quad(x=f"Problem {i}?" + " so" * (3 * (i % 60)), f=f"critique {i}") for i in range(240)]
    size = lambda document: len(document[0]) + len(document[1])
    whole = base_documents(tokenizer, quads, 0)
    budget = sum(map(size, whole)) // 4
    some = base_documents(tokenizer, quads, 0, budget=budget)
    assert budget - max(map(size, whole)) < sum(map(size, some)) <= budget
    places = [whole.index(document) for document in some]
    assert places == sorted(places) and abs(np.mean(places) / len(whole) - 0.5) < 0.08
    assert base_documents(tokenizer, quads, 0, budget=4 * budget + 3) == whole


def test_documents_that_do_not_fill_a_step_are_repeated(monkeypatch):
    """One row of them, in a step of one or of eight, is the same mean loss and so the same training."""
    tiny.install(monkeypatch.setattr, monkeypatch.setitem)
    task = dataclasses.replace(TASKS["fixtures_math"], base_steps=3, base_width=1024)
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1 for q in QUADS], 300)
    cfg, make, passes = tiny.TinyConfig(tokenizer.vocab_size), base.base_documents, iter(range(6))  # one a step
    monkeypatch.setattr(base, "base_documents", lambda *args: (next(passes), make(*args))[1])
    train = lambda M: base.train_base(dataclasses.replace(task, base_rows=M), QUADS[:2], tokenizer, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), train(1), train(8))


# ---- a base that comes with the repository --------------------------------------------------------------------------
@pytest.fixture
def shipped(built, tmp_path, monkeypatch):
    """A folder as bases/make.py writes it for QUADS, in the repository's place."""
    monkeypatch.setattr(base, "SHIPPED", tmp_path / "bases")
    folder = tmp_path / "bases" / "fixtures_math"
    make_base(folder, TASKS["fixtures_math"], QUADS, "--out", "bfloat16")
    (folder / "made_of.json").write_text(json.dumps(recipe(TASKS["fixtures_math"], QUADS)))
    built.clear()
    return folder


def test_a_shipped_base_is_used_as_it_is(shipped, built, tmp_path, capsys):
    """Nothing is trained, and nothing is written beside it: what is cached about it lies in out_dir, by its weights."""
    before = {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()}
    cfg, params, tokenizer, cache = start_from("nano", tmp_path / "runs")
    assert not built and nano_base("fixtures_math", QUADS, str(tmp_path / "runs")) == shipped
    assert cache == tmp_path / "runs" / "base" / weights_sha256(params)[:16]
    assert {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()} == before
    assert not (tmp_path / "runs").exists() and capsys.readouterr().out == ""


def test_a_shipped_base_is_in_bfloat16_and_read_as_float32(shipped, tmp_path):
    stored = safetensors.numpy.load_file(shipped / "model.safetensors")
    assert {str(a.dtype) for a in stored.values()} == {"bfloat16"}
    assert json.loads((shipped / "config.json").read_text())["torch_dtype"] == "bfloat16"
    cfg, params, tokenizer, _ = start_from("nano", tmp_path)
    drawn = nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param)
    assert_equal_trees(params, jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), drawn))


@pytest.mark.parametrize("changed", ["train_replay", "base_steps", "made_of"])
def test_a_shipped_base_made_otherwise_is_not_used(shipped, built, tmp_path, capsys, monkeypatch, changed):
    """One line says what is other, and the base is trained here."""
    quads = QUADS[1:] if changed == "train_replay" else QUADS
    if changed == "base_steps":
        task = dataclasses.replace(TASKS["fixtures_math"], base_steps=7)
        monkeypatch.setitem(TASKS, "fixtures_math", task)
    if changed == "made_of":
        (shipped / "made_of.json").unlink()
    folder = nano_base("fixtures_math", quads, str(tmp_path / "runs"))
    assert len(built) == 1 and folder.parent == tmp_path / "runs" / "base"
    first, second = capsys.readouterr().out.splitlines()
    named = changed if changed != "made_of" else "nano_vocab, base_steps"
    assert first.startswith(f"The base in {shipped} is not used: it was made with another {named}")
    assert second.startswith("Building the nano base for fixtures_math once")


def test_a_shipped_base_serves_the_replay_of_another_teacher_on_its_own_problems(shipped, built, tmp_path, monkeypatch):
    """Some of the task's training problems, another's attempts and critiques. Not where the task is another by now, nor
    on a problem that the base may not know, nor for what the keyless teacher has made otherwise."""
    task = TASKS["fixtures_math"]
    use = lambda problems: monkeypatch.setitem(
        TASKS, "fixtures_math", dataclasses.replace(task, load=lambda data_dir: problems)
    )
    problems = [dataclasses.replace(p, split="train") for p in fixtures_math(size=40)]
    use(problems)
    made = [perturb(p) for p in load_problems("fixtures_math", None)[0]["train"]]
    (shipped / "made_of.json").write_text(json.dumps(recipe(TASKS["fixtures_math"], made)))
    other = [dataclasses.replace(q, f="Other.", meta={**q.meta, "teacher": "rules"}) for q in made]
    assert len(made) > 10 and shipped_base("fixtures_math", made) == shipped
    assert shipped_base("fixtures_math", other[1:]) == shipped and not built
    strange = dataclasses.replace(other[0], x="Another problem?")
    assert shipped_base("fixtures_math", [*other[1:], strange]) is None
    assert shipped_base("fixtures_math", made[1:]) is None
    use(problems[1:])
    assert shipped_base("fixtures_math", other[1:]) is None


BASES = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


@pytest.mark.slow
@pytest.mark.parametrize("task", BASES)
def test_the_shipped_bases_are_those_of_the_replay_that_is_made_here(task, tmp_path):
    """So every run on this task starts from the same weights, whatever the machine. A minute each: the replay is made.

    And they are what their pages say: the longer the chain the fewer right; where slips are planted, form and
    arithmetic are in order, and slips at planted operations.
    """
    make_replay(task, out=str(tmp_path / "replay"))
    replay = {split: read_replay(tmp_path / "replay" / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert nano_base(task, replay["train"], str(tmp_path)) == SHIPPED / task
    found = make.measure(SHIPPED / task, task, replay, 128, 32)
    first, revised = found["first"], found["revised"]
    if not TASKS[task].planted:
        assert min(first["right"], revised["right"]) > 0.1
        assert first["by_horizon"]["2-3"] > first["by_horizon"]["6-7"]
        return
    assert first["form_right"] >= 0.95 and first["arithmetic"] <= 0.03 and first["copying"] <= 0.05
    assert first["slip"] >= 0.5 and revised["right"] > first["right"]
    assert first["by_horizon"]["2-3"] > first["by_horizon"]["8-9"]
    assert (found["dead_groups"] >= 0.6) == (task == "fixtures_rare")


def test_what_is_known_of_a_shipped_base_lies_where_runs_look(shipped, tmp_path):
    """Its report and critic are in the cache before a run asks; what a run has made there itself stays."""
    (shipped / "known").mkdir()
    for name in ("report_1.json", "critic_2.json"):
        (shipped / "known" / name).write_text(f"shipped {name}")
    *_, cache = start_from("nano", tmp_path / "runs")
    assert sorted(path.name for path in cache.iterdir()) == ["critic_2.json", "report_1.json"]
    assert (cache / "report_1.json").read_text() == "shipped report_1.json"
    (cache / "report_1.json").write_text("made here")
    for model in ("nano", str(shipped)):
        assert start_from(model, tmp_path / "runs")[-1] == cache
        assert (cache / "report_1.json").read_text() == "made here"


@pytest.mark.slow
@pytest.mark.parametrize("task", BASES)
def test_the_default_commands_find_what_is_known(task, tmp_path, monkeypatch):
    """The keys of known/ are those of today's sources: else every first run makes report and critic again (bases/
    README.md says how to make them)."""
    asked = []

    def look(path, make):
        asked.append(path.name.partition("_")[0])
        assert path.is_file(), f"{path.name} is not in bases/{task}/known"
        if asked[-1] == "critic":
            raise StopIteration
        return path.read_text(encoding="utf-8")

    monkeypatch.setattr("common.evaluation.kept", look)
    monkeypatch.setattr("cts_common.kept", look)
    monkeypatch.setattr("common.evaluation.Evaluator.read_base", lambda *_: None)
    with pytest.raises(StopIteration):
        b5_cts.main(b5_cts.Args(task=task, out_dir=str(tmp_path), wandb="disabled"))
    assert asked == ["report", "critic"]


SAYS_ITS_IDENTITY = """
import json, sys
import b3_grpo_verifier as b3, cts_common as cts
args, out = b3.Args(), sys.argv[1]
replay, mesh = cts.load_replay(args.task, None, None), cts.make_mesh("auto")
_, params, tokenizer, _ = cts.load_model(args.model, args.task, replay, out, mesh)
shapes = cts.fixed_shapes(tokenizer, replay, args.max_prompt_tokens, cts.TASKS[args.task].max_new_tokens)
print(json.dumps(cts.run_identity(args, params, tokenizer, replay, shapes, cts.pick_dtype("auto"))))
"""


@pytest.mark.slow
def test_two_machines_have_one_fingerprint(tmp_path):
    """The default task from nothing, twice: other folders, user, host, language, clock, hash seed, time, devices."""
    found = []
    for i, more in enumerate(({}, {"TZ": "Asia/Tokyo", "LC_ALL": "C", "USER": "other", "HOME": str(tmp_path)})):
        folder = tmp_path / str(i)
        folder.mkdir()
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={1 + 3 * i}"
        env = os.environ | {"PYTHONHASHSEED": str(i), "PYTHONPATH": str(SHIPPED.parent), "XLA_FLAGS": flags} | more
        command = [sys.executable, "-c", SAYS_ITS_IDENTITY, str(folder / "runs")]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
        assert not [*(folder / "runs").glob("base/*/model.safetensors")]  # the base is the one in the repository
    assert found[0] == found[1] and found[0]["digest"]


def test_what_is_said_of_a_base_on_its_page():
    """Rates by hand: of two planted steps one slips, of four steps one is no equation; one solution of two has all."""
    y1 = "<<20+6=26>>26\n<<26-4=22>>22\n#### 22"
    quads = [math_quad(y1=y1, meta={"answer": "22"})] * 2
    slip, lost = "<<20+6=27>>27\n<<27-4=23>>23\n#### 23", "<<20+6=26>>26\nand 22\n#### 22"
    rates = make.error_rates([slip, lost], quads, Planted((6,), 0.6))
    assert rates == {"slip": 0.5, "arithmetic": 0, "copying": 0, "form": 0.25, "form_right": 0.5}
    part = {"right": 0.125, "by_horizon": {"2-3": 0.25, "4-5": None}, **rates}
    found = {
        "n": 2,
        "first": part,
        "revised": part,
        "groups": 4,
        "sampled_right": 0.5,
        "dead_groups": 1,
        "found_once": 0,
    }
    text = make.page("fixtures_rare", found)
    assert "| first | 12.5 | 25.0 | \u2013 | 50.0 | 0.0 | 0.0 | 25.0 | 50.0 |" in text
    assert "probability 0.9 where the second operand is among 4, 5, 6, 7" in text
    plain = {"right": 0.125, "by_horizon": {}}
    text = make.page("fixtures_code", {**found, "first": plain, "revised": plain})
    assert "| first | 12.5 |\n" in text and "75% of the solutions" in text and "print what they should return" in text


def test_no_base_is_made_where_one_is(tmp_path):
    refused(lambda: make.main(make.Args(out=str(tmp_path))), "--out", "is there already")
    refused(lambda: make.main(make.Args(task="gsm8k")), "--task gsm8k", "fixtures_long")
