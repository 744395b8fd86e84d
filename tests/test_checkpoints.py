"""Hugging Face checkpoints in and out: logits of `transformers` (tests/golden/make_golden.py), and every refusal.

pytest tests/test_checkpoints.py
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from examples import GOLDEN, IDS, ROOT, assert_equal_trees, edit, load_tokenizer, mesh, qwen, refused
from flax import nnx

from common.batches import right_pad
from common.checkpoints import load_hf_weights, save_hf
from common.hf_config import read_hf_config
from common.model import Decoder, ModelConfig, Reading, last_tokens, leaf_names
from common.tokenizer import train_tokenizer

MODELS = ("qwen2", "qwen3", "qwen3_tied", "llama3", "smollm2")
LIMIT = 2e-4  # of logits against transformers, both in float32
NANO = ModelConfig(vocab_size=280, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)


@functools.cache
def loaded(name: str):
    """(config, parameters) of a golden checkpoint."""
    cfg = read_hf_config(GOLDEN / name)
    return cfg, load_hf_weights(GOLDEN / name, cfg, mesh())


@functools.cache
def nano():
    """(config, parameters, tokenizer) of a random nano model."""
    tokenizer = train_tokenizer([text for text, _ in IDS["qwen2"]], 280)
    cfg = dataclasses.replace(NANO, vocab_size=tokenizer.vocab_size)
    return cfg, nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param), tokenizer


def rewrite(path: pathlib.Path, change) -> None:
    """Rewrite a safetensors file with `change` applied to its {name: array}."""
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})


# ---- logits ---------------------------------------------------------------------------------------------------------
PROMPTS, T = (5, 3, 2), 7  # of each golden row of 12, 9 and 4 tokens: its prompt, the rest is its completion


@functools.cache
def our_logits(name: str):
    """Logits of the golden rows three ways: whole rows by `prefill`, completions by `__call__`, by `decode` steps."""
    cfg, params = loaded(name)
    golden = np.load(GOLDEN / name / "golden.npz")
    graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0))), nnx.Param)[0]
    rows, len_B = golden["right"].astype(np.int32), golden["lengths"].astype(np.int32)
    prompts, prompt_len = right_pad([row[:n] for row, n in zip(rows.tolist(), PROMPTS)], max(PROMPTS), 0)
    tokens_MT, _ = right_pad([row[n:k] for row, n, k in zip(rows.tolist(), PROMPTS, len_B)], T, 0)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        to_logits = lambda hidden: jnp.einsum("...D,VD->...V", hidden, model.head_VD())
        prefix, _ = model.prefill(prompts, prompt_len)
        last_B = last_tokens(prompts, prompt_len)
        layers = model.unstack(prefix)
        inputs_TM = jnp.concatenate([last_B[:, None], tokens_MT[:, :-1]], 1).T

        def step(carry, input_M):
            t, cache = carry
            hidden_MD, cache = model.decode(input_M, t, cache, layers, prefix.len_B)
            return (t + 1, cache), hidden_MD

        _, hidden_TMD = jax.lax.scan(step, (0, model.new_cache(len(rows), T)), inputs_TM)
        whole, (read,) = model.prefill(rows, len_B)[1], model([Reading(prompts, prompt_len, [tokens_MT])])
        return to_logits(whole), to_logits(read.completions[0]), to_logits(hidden_TMD.swapaxes(0, 1))

    return golden, len_B, [np.asarray(a) for a in run(params)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_padded_rows_equal_transformers(name, side):
    """Our rows are padded on the right; against rows that transformers padded on either side, token by token."""
    golden, len_B, (whole, _, _) = our_logits(name)
    for row, n, theirs in zip(whole, len_B, golden[f"{side}_logits"]):
        theirs = theirs[:n] if side == "right" else theirs[len(theirs) - n :]
        assert np.abs(theirs).max() > 1
        assert np.abs(row[:n] - theirs).max() <= LIMIT


@pytest.mark.parametrize("path", ["call", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_completions_equal_transformers(name, path):
    """A completion that attends to its prompt's prefix: in one call, and token by token with the cache."""
    golden, len_B, (_, call, decode) = our_logits(name)
    for row, n, prompt, theirs in zip(call if path == "call" else decode, len_B, PROMPTS, golden["right_logits"]):
        count = min(T, n - prompt + 1)
        assert np.abs(row[:count] - theirs[prompt - 1 : prompt - 1 + count]).max() <= LIMIT


# ---- weights --------------------------------------------------------------------------------------------------------
def test_weights_are_float32_of_the_stored_values():
    """bfloat16, float16 and sharded float32 files; linear weights are transposed, heads taken apart."""
    for name in MODELS:
        cfg, params = loaded(name)
        leaves = leaf_names(params)
        stored = {
            k: v for f in (GOLDEN / name).glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()
        }
        assert {str(a.dtype) for a in leaves.values()} == {"float32"}
        assert {str(a.dtype) for a in stored.values()} == {
            {"smollm2": "bfloat16", "qwen3_tied": "float16"}.get(name, "float32")
        }
        stored = {k: v.astype(np.float32) for k, v in stored.items()}
        np.testing.assert_array_equal(leaves["embed"], stored["model.embed_tokens.weight"])
        D, N, H = cfg.d_model, cfg.n_heads, cfg.head_dim
        for i in range(cfg.n_layers):
            at = f"model.layers.{i}."
            q, o = stored[at + "self_attn.q_proj.weight"], stored[at + "self_attn.o_proj.weight"]
            np.testing.assert_array_equal(leaves["blocks/q"][i], q.reshape(N, H, D).transpose(2, 0, 1))
            np.testing.assert_array_equal(leaves["blocks/o"][i], o.T.reshape(N, H, D))
            np.testing.assert_array_equal(leaves["blocks/down"][i], stored[at + "mlp.down_proj.weight"].T)
        assert sum(a.size for a in leaves.values()) == sum(a.size for a in stored.values())


def digest(params) -> str:
    leaves = leaf_names(params).values()
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in leaves)).hexdigest()


SHARDED_DRIVER = """
import pathlib, sys
sys.path.insert(0, "tests")
from test_checkpoints import digest
from common.checkpoints import load_hf_weights
from common.hf_config import read_hf_config
from common.hosts import make_mesh, shard_rule
from common.model import leaf_names
mesh = make_mesh("2,2")
for name in sys.argv[2:]:
    directory = pathlib.Path(sys.argv[1]) / name
    params = load_hf_weights(directory, read_hf_config(directory), mesh)
    leaves, wanted = leaf_names(params), leaf_names(shard_rule(mesh, params))
    assert all(a.sharding.is_equivalent_to(wanted[n], a.ndim) for n, a in leaves.items())
    cut = sorted(n for n, a in leaves.items() if a.addressable_shards[0].data.size < a.size)
    print(name, digest(params), ",".join(cut))
"""


def test_sharded_load_equals_unsharded():
    """Four devices as (2, 2): the shards of every weight hold the values of the whole weight."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_DRIVER, str(GOLDEN), *MODELS],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    matrices = [f"blocks/{n}" for n in ("down", "gate", "k", "o", "q", "up", "v")]
    for name, line in zip(MODELS, done.stdout.splitlines(), strict=True):
        cfg, params = loaded(name)
        cut = sorted([*matrices, "embed", *([] if cfg.tie_embeddings else ["head"])])
        assert line.split(" ") == [name, digest(params), ",".join(cut)]


def load(directory: pathlib.Path):
    return load_hf_weights(directory, read_hf_config(directory), mesh())


def test_weights_refuse_missing_tensor(golden_copy):
    directory = golden_copy("qwen2")
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(directory / "model.safetensors", lambda arrays: arrays.pop(name))
    refused(lambda: load(directory), str(directory / "model.safetensors"), name, "missing")
    untied = golden_copy("llama3")
    rewrite(untied / "model.safetensors", lambda arrays: arrays.pop("lm_head.weight"))
    refused(lambda: load(untied), "lm_head.weight", "missing")


def test_weights_refuse_extra_tensor(golden_copy):
    """An adapter, a bias that our decoder has not, a layer too many."""
    directory = golden_copy("qwen3_tied")
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight", "base.lora_A.weight"):
        spoilt = pathlib.Path(shutil.copytree(directory, directory.with_name(f"with_{name}")))
        rewrite(spoilt / "model.safetensors", lambda arrays, name=name: arrays.update({name: np.ones(3, np.float32)}))
        refused(lambda spoilt=spoilt: load(spoilt), str(spoilt / "model.safetensors"), name, "unexpected")


def test_weights_refuse_wrong_shape_and_type(golden_copy):
    directory = golden_copy("qwen2")
    edit(directory / "config.json", intermediate_size=25)
    refused(lambda: load(directory), str(directory / "model.safetensors"), "mlp.", "[24, 16]", "[25, 16]")
    directory = golden_copy("smollm2")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory / "model.safetensors", lambda a: a.update({name: a[name].astype(np.int8)}))
    refused(lambda: load(directory), str(directory / "model.safetensors"), name, "I8")


@pytest.mark.parametrize("keep", [0, 5, 400, -10])
def test_weights_refuse_truncated_file(golden_copy, keep):
    directory = golden_copy("qwen3")
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: load(directory), str(path), "download it again")


def test_weights_refuse_broken_index(golden_copy):
    """A shard that is not there, a tensor that is not in its shard, an index that names nothing."""
    directory = golden_copy("qwen3")
    index, second = directory / "model.safetensors.index.json", directory / "model-00002-of-00002.safetensors"
    moved = second.rename(directory / "elsewhere")
    refused(lambda: load(directory), str(second), "download it again")
    moved.rename(second)
    rewrite(second, lambda arrays: arrays.pop("model.norm.weight"))
    refused(lambda: load(directory), str(second), "model.norm.weight", "missing")
    edit(index, weight_map={})
    refused(lambda: load(directory), str(index), "weight_map")
    index.unlink()  # without an index all files are read
    refused(lambda: load(directory), str(directory / "*.safetensors"), "model.norm.weight", "missing")
    for path in directory.glob("*.safetensors"):
        path.unlink()
    refused(lambda: load(directory), str(directory), "no *.safetensors")


def test_weights_refuse_doubled_tensor(golden_copy):
    directory = golden_copy("smollm2")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")
    refused(lambda: load(directory), str(directory / "b.safetensors"), "a.safetensors")


def test_weights_tolerate_rotary_buffers_and_a_copied_head(golden_copy):
    directory = golden_copy("smollm2")
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    extra = dict.fromkeys(buffers, np.ones(2, np.float32))
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    rewrite(directory / "model.safetensors", lambda arrays: arrays.update(extra, **{head: arrays[embed]}))
    assert_equal_trees(load(directory), loaded("smollm2")[1])
    rewrite(directory / "model.safetensors", lambda arrays: arrays.update({head: arrays[head] + 1}))
    refused(lambda: load(directory), str(directory / "model.safetensors"), head, "tie_word_embeddings")


# ---- writing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path, name):
    """load -> save_hf -> load: the same bits, in one file and in many; configuration and tokenizer files go along."""
    cfg, params = loaded(name)
    source, out = GOLDEN / name, tmp_path / "new" / "out"
    save_hf(out, cfg, params, qwen(), source)
    names = {path.name for path in out.iterdir()}
    kept = {path.name for path in source.glob("*.json")} - {"model.safetensors.index.json"}
    assert names == {"model.safetensors", *kept}
    assert read_hf_config(out) == cfg
    assert_equal_trees(load_hf_weights(out, cfg, mesh()), params)
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    for file in kept - {"config.json"}:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    if "tokenizer.json" in kept:
        assert load_tokenizer(out).sha256() == load_tokenizer(source).sha256()

    many = tmp_path / "many"
    save_hf(many, cfg, params, qwen(), source, max_shard_bytes=4000)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * a.size for a in jax.tree.leaves(params))
    sizes = [sum(a.nbytes for a in safetensors.numpy.load_file(many / f).values()) for f in files]
    counts = [len(safetensors.numpy.load_file(many / f)) for f in files]
    assert all(size <= 4000 or count == 1 for size, count in zip(sizes, counts))
    assert_equal_trees(load_hf_weights(many, cfg, mesh()), params)


def test_saved_tensors_are_those_of_the_checkpoint(tmp_path):
    """By name, shape and value: what transformers reads is what it wrote."""
    for name in MODELS:
        cfg, params = loaded(name)
        save_hf(tmp_path / name, cfg, params, qwen(), GOLDEN / name)
        wanted = {}
        for path in (GOLDEN / name).glob("*.safetensors"):
            wanted |= safetensors.numpy.load_file(path)
        saved = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == wanted.keys()
        with safetensors.safe_open(tmp_path / name / "model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it
        for key, value in saved.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, wanted[key].astype(np.float32), err_msg=key)


def test_nano_is_written_as_a_checkpoint_of_its_own(tmp_path):
    cfg, params, tokenizer = nano()
    out = tmp_path / "out"
    out.mkdir()  # an empty directory may be there
    save_hf(out, cfg, params, tokenizer)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert read_hf_config(out) == cfg
    assert_equal_trees(load_hf_weights(out, cfg, mesh()), params)
    again = load_tokenizer(out)
    assert again.sha256() == tokenizer.sha256() and again.pad_id == tokenizer.pad_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", dict(qk_norm=False, qkv_bias=True, tie_embeddings=False)),
        ("llama", dict(qk_norm=False, rope_scaling=(8.0, 1.0, 4.0, 8192))),
    ],
)
def test_other_shapes_without_a_source(tmp_path, kind, changes):
    cfg, _, tokenizer = nano()
    cfg = dataclasses.replace(cfg, **changes)
    params = nnx.state(Decoder(cfg, nnx.Rngs(1)), nnx.Param)
    save_hf(tmp_path / "out", cfg, params, tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == kind and config["max_position_embeddings"] >= 32768
    assert read_hf_config(tmp_path / "out") == cfg
    assert_equal_trees(load(tmp_path / "out"), params)


def test_save_refuses(tmp_path, golden_copy, monkeypatch):
    """A directory in use, a shape no model has, a source that changed, a full disk: nothing is left behind."""
    cfg, params, tokenizer = nano()
    used = tmp_path / "used"
    used.mkdir()
    (used / "x").touch()
    refused(lambda: save_hf(used, cfg, params, tokenizer), "--save_hf", str(used))
    refused(lambda: save_hf(used / "x", cfg, params, tokenizer), "--save_hf", str(used / "x"))
    refused(lambda: save_hf(used / "x" / "y", cfg, params, tokenizer), "--save_hf")
    both = dataclasses.replace(cfg, qkv_bias=True)
    refused(lambda: save_hf(tmp_path / "out", both, params, tokenizer), "--save_hf")
    source = golden_copy("qwen3")
    edit(source / "config.json", rms_norm_eps=1e-3)
    refused(lambda: save_hf(tmp_path / "out", *loaded("qwen3"), tokenizer, source), "config.json", "changed")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    refused(lambda: save_hf(tmp_path / "out", cfg, params, tokenizer), "--save_hf", "No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen3", "used"]
