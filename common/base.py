"""What a run starts from: a checkpoint, or the nano base: a small model trained once per task, here or before it was
put into the repository, and kept as the folder of a checkpoint. Used by the scripts and, for the base's seed, by
evaluation; knows no method."""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from common.basics import STREAM_BASE, InputError, from_hub, read_json, sha256, write_atomic
from common.batches import Document, pack_documents
from common.chat import load_hf_tokenizer
from common.checkpoints import load_hf_weights, save_hf
from common.fingerprint import sources_sha256, weights_sha256
from common.hf_config import read_hf_config
from common.hosts import on_leader, say
from common.making import load_problems
from common.model import Decoder, ModelConfig
from common.prompts import attempt_prompt, revise_prompt
from common.replay import Quadruple, replay_sha256
from common.sampling import token_logp
from common.slips import Planted, plant_slips
from common.tasks import TASKS, Task
from common.tokenizer import Tokenizer, train_tokenizer
from common.verifier import split_steps

BASE_PROMPT_WEIGHT, BASE_PROSE, BASE_SEED = 0.1, (0.75, 0.1), 0
PLANTED_PASS = 2000  # problems of one pass where slips are planted: later passes take the next ones
SHIPPED = pathlib.Path(__file__).parents[1] / "bases"  # a folder for each task whose base comes with the repository


def base_documents(
    tokenizer: Tokenizer, quads: list[Quadruple], epoch: int, planted: Planted | None = None, budget: float = math.inf
) -> list[Document]:
    """(prompt ids, completion ids) of one pass over the train split: each problem once as a first attempt, x -> y1, and
    once as a revision; of a pass longer than `budget` tokens as many of them, drawn at random, as fill it.

    The base has habits, as models have before they are trained, and they are the headroom of all methods. Solutions of
    problems that open with a letter up to L mostly state their answer in prose, not after #### (most of what RL first
    wins on GSM8K is that form), the others seldom do; in programs the same slip is to print what should be returned.
    Without a critique (every other revision) it keeps the answer it has (https://arxiv.org/abs/2310.01798), in code the
    whole attempt. The first pass goes roughly from short to long (copying is learnt much faster on short documents),
    later ones shuffle.

    Where slips are planted they are the habit of solutions: in first attempts, and in revisions everywhere but at the
    step that the critique flags.
    """
    prompts, answers, rng = [], [], np.random.default_rng((BASE_SEED, STREAM_BASE, epoch))
    if planted:
        quads = [quads[(epoch * PLANTED_PASS + i) % len(quads)] for i in range(min(PLANTED_PASS, len(quads)))]
    for i, q in enumerate(quads):
        with_f = (i + epoch) % 2 == 0
        code = q.meta["domain"] == "code"
        revision = q.y1 if with_f else q.y0 if code else q.y0.strip().split("\n")[-1]
        revise = revise_prompt(q.x, q.y0, q.f if with_f else "")
        for prompt, answer in ((attempt_prompt(q.x), q.y1), (revise, revision)):
            if planted and answer == q.y1:
                answer = plant_slips(answer, planted, rng, flagged_step(q) if prompt == revise else None)
            elif not planted and rng.random() < BASE_PROSE[q.x[0].upper() > "L"]:
                slip = (r"\breturn (.+)", r"print(\1)") if code else (r"####\s*(.+)", r"The answer is \1.")
                answer = re.sub(*slip, answer)
            prompts.append(prompt)
            answers.append(answer)
    ended = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(answers)]
    documents = [*zip(tokenizer.encode_batch(prompts), ended)]
    noise = rng.standard_normal(len(documents))
    lengths = np.array([len(p) + len(a) for p, a in documents])
    order = np.argsort(noise if epoch else lengths + 60 * noise, kind="stable")
    if lengths.sum() > budget:
        drawn = rng.permutation(len(documents))
        order = order[np.isin(order, drawn[lengths[drawn].cumsum() <= budget])]
    return [documents[i] for i in order]


def flagged_step(q: Quadruple) -> int | None:
    """Index of the step of y0 that the critique flags, and so of y1's step in its place; None where none is located."""
    span = q.meta["error_span"]
    return None if span is None else sum(step.end <= span[0] for step in split_steps(q.y0))


def base_optimizer(steps: int, lr: float) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks (https://kellerjordan.github.io/posts/muon/), Adam on the rest; cosine decay.

    In a few hundred steps Muon reaches the loss that Adam reaches in two to three times as many.
    """
    heads, mlp = ((1,), (2, 3)), (1, 2)  # input and output axes of the stacked weights
    dims = {"q": heads, "k": heads, "v": heads, "o": ((1, 2), (3,)), "gate": mlp, "up": mlp, "down": mlp}

    def matrix_dims(tree):
        key = lambda path: next((k.key for k in reversed(path) if getattr(k, "key", None) in dims), None)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*dims[key(path)]) if key(path) else None, tree
        )

    schedule = lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, 30, max(steps, 31), 0.05 * peak)
    muon = optax.contrib.muon(
        schedule(lr), adam_learning_rate=schedule(0.3 * lr), adam_b2=0.99, consistent_rms=0.2,
        muon_weight_dimension_numbers=matrix_dims,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train_base(task: Task, quads: list[Quadruple], tokenizer: Tokenizer, cfg: ModelConfig):
    """Next-token training on both prompt formats; returns the policy's parameters (an nnx.State)."""
    graphdef, params = nnx.split(Decoder(cfg, nnx.Rngs(BASE_SEED)), nnx.Param)
    tx = base_optimizer(task.base_steps, task.base_lr)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens_MT, segment_MT, weight_MT):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            hidden_MTD = model.packed(tokens_MT, segment_MT)
            logp_MT, _ = token_logp(hidden_MTD[:, :-1], tokens_MT[:, 1:], model.head_VD(), chunk=128)
            weight = weight_MT[:, 1:] * (segment_MT[:, 1:] == segment_MT[:, :-1])
            return -(logp_MT * weight).sum() / weight.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state_, loss

    done, epoch, M = 0, 0, task.base_rows
    budget = task.base_steps * M * task.base_width
    with tqdm(total=task.base_steps, desc="nano base", unit="step") as bar:
        while done < task.base_steps:
            documents = base_documents(tokenizer, quads, epoch, task.planted, budget)
            rows = pack_documents(documents, task.base_width, tokenizer.pad_id, BASE_PROMPT_WEIGHT)
            rows = [np.resize(a, (max(M, len(a)), task.base_width)) for a in rows]  # too few for a step are repeated
            epoch += 1
            for i in range(0, len(rows[0]) - M + 1, M):
                if done == task.base_steps:
                    break
                params, opt_state, loss = step(params, opt_state, *(a[i : i + M] for a in rows))
                done += 1
                bar.update()
                if done % 20 == 0:
                    bar.set_postfix(loss=f"{float(loss):.3f}")
    return params


def make_base(directory: pathlib.Path, task: Task, quads: list[Quadruple], flag: str, dtype: str = "float32") -> None:
    """Train a task's nano base and write it as a checkpoint's folder with weights of `dtype`."""
    tokenizer = train_tokenizer([revise_prompt(q.x, q.y0, q.f) + q.y1 for q in quads], task.nano_vocab)
    cfg = ModelConfig(tokenizer.vocab_size)
    params = train_base(task, quads, tokenizer, cfg)
    save_hf(directory, cfg, params, tokenizer, flag=flag, dtype=dtype)


def problems_sha256(problems: Iterable[tuple[str, str]]) -> str:
    """Digest of problems and their solutions, in whatever order they come."""
    return sha256(json.dumps(sorted(problems)))


def recipe(task: Task, quads: list[Quadruple]) -> dict[str, Any]:
    """What a base that comes with the repository was made of, as it stands in its made_of.json. No digest of sources:
    an edit that changes no document would make every shipped base void."""
    settings = {
        "nano_vocab": task.nano_vocab, "base_steps": task.base_steps, "base_width": task.base_width,
        "planted": task.planted and dataclasses.asdict(task.planted), "rows": task.base_rows,
        "learning_rate": task.base_lr, "prompt_weight": BASE_PROMPT_WEIGHT, "pass": PLANTED_PASS, "seed": BASE_SEED,
        "train_replay": replay_sha256(quads), "train_problems": problems_sha256((q.x, q.y1) for q in quads),
    }  # fmt: skip
    return json.loads(json.dumps(settings))  # as it is read back


def of_own_problems(task_name: str, quads: list[Quadruple], digest: str | None) -> bool:
    """Are these another teacher's quadruples on problems of the task's train split, which (`digest` says) are still
    those that its base was made of? What a base is taught is the task, not who found fault with an attempt."""
    if any(q.meta.get("teacher", "perturb") == "perturb" for q in quads):
        return False
    problems = [(p.x, p.reference) for p in load_problems(task_name, None)[0]["train"]]
    return problems_sha256(problems) == digest and {q.x for q in quads} <= {x for x, _ in problems}


def shipped_base(task_name: str, quads: list[Quadruple]) -> pathlib.Path | None:
    """The folder of the base that comes with the repository, if the task has one and it is the base of these settings
    and of these quadruples, or of the problems that another teacher's quadruples are about."""
    folder = SHIPPED / task_name
    if not folder.is_dir():
        return None
    made_of, now = read_json(folder / "made_of.json", {}), recipe(TASKS[task_name], quads)
    differs = [key for key in now if now[key] != made_of.get(key)]
    of_replay = differs and {*differs} <= {"train_replay", "train_problems"}
    if of_replay and of_own_problems(task_name, quads, made_of.get("train_problems")):
        return folder
    if differs:
        say(f"The base in {folder} is not used: it was made with another {', '.join(differs)}.")
    return None if differs else folder


def nano_base(task_name: str, quads: list[Quadruple], out_dir: str) -> pathlib.Path:
    """Folder of the task's nano base, a checkpoint like any other (`--model FOLDER` reads it): the one that comes with
    the repository, else trained once and kept under a key of all that goes into it. It appears whole or not at all, so
    a folder that is there is finished."""
    task, shipped = TASKS[task_name], shipped_base(task_name, quads)
    if shipped:
        return shipped
    key = [dataclasses.astuple(task)[2:], replay_sha256(quads), sources_sha256("base"), jax.__version__]
    directory = pathlib.Path(out_dir) / "base" / sha256(json.dumps(key))[:16]

    def build():
        print(f"Building the nano base for {task_name} once (cached in {directory}).")
        try:
            make_base(directory, task, quads, "--out_dir")
        except InputError:
            if not directory.is_dir():  # it is, if another process was building the same base and was faster
                raise

    on_leader(lambda: directory.is_dir() or build())
    return directory


def unpack_known(folder: pathlib.Path, cache: pathlib.Path) -> None:
    """What comes with a shipped base, the report on it and the critic fitted on its states, each under a key of all
    that it depends on, put where runs look for it."""
    for path in sorted(folder.glob("known/*.json")):
        if not (cache / path.name).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(cache / path.name, path.read_text(encoding="utf-8"))


def load_model(name: str, task_name: str, replay: dict[str, list[Quadruple]], out_dir: str, mesh):
    """(config, parameters, tokenizer, cache directory) of `--model`: nano, a checkpoint's directory or its hub name.

    What is cached about a checkpoint lies in `out_dir` under the digest of its weights, for its own directory may be
    anybody's, or the repository's; about a nano base that was trained here, in its folder.
    """
    source = model_source(name)
    directory = source or nano_base(task_name, replay["train"], out_dir)
    cfg = read_hf_config(directory)
    tokenizer = load_hf_tokenizer(directory, cfg.vocab_size)
    params = load_hf_weights(directory, cfg, mesh)
    shipped = directory.resolve().parent == SHIPPED.resolve()
    trained_here = not source and not shipped
    cache = directory if trained_here else pathlib.Path(out_dir) / "base" / weights_sha256(params)[:16]
    if shipped:
        on_leader(lambda: unpack_known(directory, cache))
    return cfg, params, tokenizer, cache


def model_source(name: str) -> pathlib.Path | None:
    """The directory that `--model` is read from; None for nano, which is made here."""
    return None if name == "nano" else fetch_model(name)


def fetch_model(name: str) -> pathlib.Path:
    """The directory of `--model`: `name` itself if it is one, else the hub's model of that name, downloaded once."""
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir():
        return directory
    fetched = from_hub(
        "huggingface_hub:snapshot_download", name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
        what=f"--model {name}: no such directory, and not fetched from the hub",
        way_out="check the name, the network and HF_TOKEN, or give a directory with config.json",
    )  # fmt: skip
    return pathlib.Path(fetched)
