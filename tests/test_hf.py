"""Checkpoints in and out: logits and token ids of `transformers` (tests/golden/make_golden.py), and every refusal."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import tokenizers
from flax import nnx
from huggingface_hub.errors import HFValidationError

from common import base
from common.base import fetch_model, load_model, nano_base
from common.basics import InputError
from common.batches import right_pad
from common.chat import load_hf_tokenizer
from common.checkpoints import load_hf_weights, save_hf
from common.fingerprint import weights_sha256
from common.hf_config import read_hf_config
from common.hosts import make_mesh
from common.model import Decoder, ModelConfig, Reading, last_tokens, leaf_names
from common.replay import Quadruple
from common.tokenizer import Tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("qwen2", "qwen3", "qwen3_tied", "llama3", "smollm2")
LIMIT = 2e-4  # of logits against transformers, both in float32
IDS = json.loads((GOLDEN / "ids.json").read_text(encoding="utf-8"))
NANO = ModelConfig(vocab_size=280, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)


@functools.cache
def mesh():
    return make_mesh("auto")


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


@pytest.fixture
def copy(tmp_path):
    """A function that copies a golden checkpoint to a folder that the test may spoil."""

    def make(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


def edit(path: pathlib.Path, drop=(), **changes) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def rewrite(path: pathlib.Path, change) -> None:
    """Rewrite a safetensors file with `change` applied to its {name: array}."""
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})


def refused(call, *words: str) -> str:
    """The message of the InputError that `call` raises: one line that has all the words."""
    with pytest.raises(InputError) as e:
        call()
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def assert_equal_trees(a, b) -> None:
    a, b = leaf_names(a), leaf_names(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


# ---- logits -------------------------------------------------------------------------------------------------------
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
        whole, ((_, call),) = model.prefill(rows, len_B)[1], model([Reading(prompts, prompt_len, [tokens_MT])])
        return to_logits(whole), to_logits(call), to_logits(hidden_TMD.swapaxes(0, 1))

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


# ---- config.json --------------------------------------------------------------------------------------------------
def test_config_of_each_family():
    """Both spellings of RoPE, defaults of absent fields, tied and untied."""
    small = dict(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
    llama = ModelConfig(
        320, **small, head_dim=8, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 32), norm_eps=1e-5, qk_norm=False,
        tie_embeddings=False,
    )  # fmt: skip
    assert read_hf_config(GOLDEN / "llama3") == llama
    qwen2 = ModelConfig(320, **small, head_dim=4, rope_theta=1e6, norm_eps=1e-6, qk_norm=False, qkv_bias=True)
    assert read_hf_config(GOLDEN / "qwen2") == qwen2
    qwen3 = ModelConfig(64, **small, head_dim=8, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False)
    assert read_hf_config(GOLDEN / "qwen3") == qwen3
    smollm = ModelConfig(64, **small, head_dim=4, rope_theta=1e5, norm_eps=1e-5, qk_norm=False)
    assert read_hf_config(GOLDEN / "smollm2") == smollm


def test_config_new_and_old_spelling_agree(copy):
    old = read_hf_config(GOLDEN / "llama3")
    directory = copy("llama3")
    rope = json.loads((directory / "config.json").read_text())["rope_scaling"]
    edit(directory / "config.json", drop=("rope_theta", "rope_scaling"), rope_parameters={**rope, "rope_theta": 100.0})
    assert read_hf_config(directory) == old
    del rope["original_max_position_embeddings"]  # transformers then takes max_position_embeddings
    edit(directory / "config.json", rope_parameters={**rope, "rope_theta": 100})
    assert read_hf_config(directory) == dataclasses.replace(old, rope_scaling=(8.0, 1.0, 4.0, 256))
    edit(directory / "config.json", rope_parameters={"type": "default", "rope_theta": None})
    assert read_hf_config(directory) == dataclasses.replace(old, rope_scaling=None, rope_theta=1e4)
    edit(directory / "config.json", drop=("num_key_value_heads", "tie_word_embeddings", "rope_parameters"))
    bare = read_hf_config(directory)
    assert (bare.n_kv_heads, bare.tie_embeddings, bare.rope_theta) == (4, False, 1e4)


QWEN = dict(
    attention_dropout=0.0, bos_token_id=151643, hidden_act="silu", initializer_range=0.02, max_window_layers=28,
    rms_norm_eps=1e-6, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True, use_sliding_window=False,
    vocab_size=151936,
)  # fmt: skip
LLAMA_1B = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
    intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.45.0.dev0",
    use_cache=True, vocab_size=128256,
)  # fmt: skip
REAL = {  # config.json as published, and the number of parameters
    "Qwen2.5-0.5B-Instruct": (494_032_768, dict(
        QWEN, architectures=["Qwen2ForCausalLM"], eos_token_id=151645, hidden_size=896, intermediate_size=4864,
        max_position_embeddings=32768, model_type="qwen2", num_attention_heads=14, num_hidden_layers=24,
        num_key_value_heads=2, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True,
    )),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, dict(
        QWEN, architectures=["Qwen2ForCausalLM"], eos_token_id=151643, hidden_size=1536, intermediate_size=8960,
        max_position_embeddings=131072, model_type="qwen2", num_attention_heads=12, num_hidden_layers=28,
        num_key_value_heads=2, rope_theta=10000, sliding_window=4096, tie_word_embeddings=False, use_mrope=False,
    )),
    "Qwen3-0.6B": (596_049_920, dict(
        QWEN, architectures=["Qwen3ForCausalLM"], attention_bias=False, eos_token_id=151645, head_dim=128,
        hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, model_type="qwen3",
        num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True,
    )),
    "Llama-3.2-1B-Instruct": (1_235_814_400, LLAMA_1B),
    "SmolLM2-135M": (134_515_008, dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664,
        intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, model_type="llama",
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, vocab_size=49152,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_read(tmp_path, name):
    count, config = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = read_hf_config(tmp_path)
    shapes = nnx.eval_shape(lambda: nnx.state(Decoder(cfg, nnx.Rngs(0)), nnx.Param))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == count and cfg.remat


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("qwen2", dict(model_type="mistral"), "'mistral'"),
        ("qwen2", dict(model_type="qwen3_moe"), "'qwen3_moe'"),
        ("qwen2", dict(model_type=None), "model_type"),
        ("qwen2", dict(architectures=["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClassification"),
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        ("qwen3", dict(layer_types=3), "layer_types"),
        ("qwen3", dict(attention_bias=True), "attention_bias"),
        ("llama3", dict(attention_bias=True), "attention_bias"),
        ("llama3", dict(mlp_bias=True), "mlp_bias"),
        ("llama3", dict(pretraining_tp=2), "pretraining_tp"),
        ("llama3", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("llama3", dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        ("llama3", dict(hidden_act="gelu"), "hidden_act"),
        ("llama3", dict(rope_interleaved=True), "rope_interleaved"),
        ("qwen3", dict(num_experts=8), "num_experts"),
        ("qwen3", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
        ("qwen2", dict(rope_scaling=YARN), "'yarn'"),
        ("qwen2", dict(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
        ("qwen2", dict(rope_scaling={"type": "default", "mrope_section": [2]}), "mrope_section"),
        ("qwen2", dict(rope_scaling=[1]), "rope_scaling"),
        ("qwen3", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "full_attention"),
        ("qwen3", dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        ("llama3", dict(rope_scaling={**LLAMA3, "factor": "8"}), "factor"),
        ("llama3", dict(rope_scaling={**LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor"),
        ("llama3", dict(rope_scaling={**LLAMA3, "attention_factor": 2.0}), "attention_factor"),
        ("llama3", dict(rope_theta=0), "rope_theta"),
        ("llama3", dict(rms_norm_eps="1e-5"), "rms_norm_eps"),
        ("llama3", dict(rms_norm_eps=None), "rms_norm_eps"),
        ("llama3", dict(hidden_size=16.0), "hidden_size"),
        ("llama3", dict(num_hidden_layers=True), "num_hidden_layers"),
        ("llama3", dict(vocab_size=None), "vocab_size"),
        ("llama3", dict(num_key_value_heads=3), "num_key_value_heads"),
        ("llama3", dict(head_dim=5), "head_dim"),
        ("qwen2", dict(hidden_size=18), "hidden_size"),
        ("qwen3", dict(head_dim=None), "head_dim"),
        ("qwen3", dict(tie_word_embeddings="no"), "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_config_refuses(copy, name, changes, word):
    """Each field that the decoder would get wrong is refused by name, in the file's name."""
    directory = copy(name)
    edit(directory / "config.json", **changes)
    refused(lambda: read_hf_config(directory), str(directory / "config.json"), word)


def test_config_takes_null_and_harmless_fields(copy):
    directory = copy("qwen2")
    edit(directory / "config.json", quantization_config=None, num_experts=None, use_cache=False, attention_dropout=0.1)
    assert read_hf_config(directory) == read_hf_config(GOLDEN / "qwen2")


@pytest.mark.parametrize("text", [None, "{", "[1]", "\x00"])
def test_config_missing_or_malformed(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refused(lambda: read_hf_config(tmp_path), str(tmp_path / "config.json"))


# ---- weights ------------------------------------------------------------------------------------------------------
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
from test_hf import digest
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


def test_weights_refuse_missing_tensor(copy):
    directory = copy("qwen2")
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(directory / "model.safetensors", lambda arrays: arrays.pop(name))
    refused(lambda: load(directory), str(directory / "model.safetensors"), name, "missing")
    untied = copy("llama3")
    rewrite(untied / "model.safetensors", lambda arrays: arrays.pop("lm_head.weight"))
    refused(lambda: load(untied), "lm_head.weight", "missing")


def test_weights_refuse_extra_tensor(copy):
    """An adapter, a bias that our decoder has not, a layer too many."""
    directory = copy("qwen3_tied")
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight", "base.lora_A.weight"):
        spoilt = pathlib.Path(shutil.copytree(directory, directory.with_name(f"with_{name}")))
        rewrite(spoilt / "model.safetensors", lambda arrays, name=name: arrays.update({name: np.ones(3, np.float32)}))
        refused(lambda spoilt=spoilt: load(spoilt), str(spoilt / "model.safetensors"), name, "unexpected")


def test_weights_refuse_wrong_shape_and_type(copy):
    directory = copy("qwen2")
    edit(directory / "config.json", intermediate_size=25)
    refused(lambda: load(directory), str(directory / "model.safetensors"), "mlp.", "[24, 16]", "[25, 16]")
    directory = copy("smollm2")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory / "model.safetensors", lambda a: a.update({name: a[name].astype(np.int8)}))
    refused(lambda: load(directory), str(directory / "model.safetensors"), name, "I8")


@pytest.mark.parametrize("keep", [0, 5, 400, -10])
def test_weights_refuse_truncated_file(copy, keep):
    directory = copy("qwen3")
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: load(directory), str(path), "download it again")


def test_weights_refuse_broken_index(copy):
    """A shard that is not there, a tensor that is not in its shard, an index that names nothing."""
    directory = copy("qwen3")
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


def test_weights_refuse_doubled_tensor(copy):
    directory = copy("smollm2")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")
    refused(lambda: load(directory), str(directory / "b.safetensors"), "a.safetensors")


def test_weights_tolerate_rotary_buffers_and_a_copied_head(copy):
    directory = copy("smollm2")
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    extra = dict.fromkeys(buffers, np.ones(2, np.float32))
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    rewrite(directory / "model.safetensors", lambda arrays: arrays.update(extra, **{head: arrays[embed]}))
    assert_equal_trees(load(directory), loaded("smollm2")[1])
    rewrite(directory / "model.safetensors", lambda arrays: arrays.update({head: arrays[head] + 1}))
    refused(lambda: load(directory), str(directory / "model.safetensors"), head, "tie_word_embeddings")


# ---- tokenizer ----------------------------------------------------------------------------------------------------
def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    return load_hf_tokenizer(directory, read_hf_config(directory).vocab_size)


@functools.cache
def qwen() -> Tokenizer:
    return load_tokenizer(GOLDEN / "qwen2")


def test_prompt_ids_equal_transformers(copy):
    """Chat templates in tokenizer_config.json and in a file (which strips the text), and a base tokenizer's [bos]."""
    llama, chat = load_tokenizer(GOLDEN / "llama3"), copy("llama3")
    shutil.copy(GOLDEN / "llama3_chat.jinja", chat / "chat_template.jinja")
    for name, tokenizer in (("qwen2", qwen()), ("llama3", llama), ("llama3_chat", load_tokenizer(chat))):
        for text, ids in IDS[name]:
            assert tokenizer.encode_prompt(text) == ids, name
    bos = llama.inner.token_to_id("<|begin_of_text|>")
    assert (llama.prompt_prefix, llama.prompt_suffix, llama.strip) == ([bos], [], False)
    assert qwen().decode([IDS["qwen2"][1][1]]) == [IDS["decoded"]]


def test_special_tokens_in_a_problem_stay_text():
    text, ids = IDS["plain"]
    tokenizer = qwen()
    special = {i for i, token in tokenizer.inner.get_added_tokens_decoder().items() if token.special}
    assert tokenizer.encode(text) == ids and not special & set(ids)
    prefix, suffix = tokenizer.prompt_prefix, tokenizer.prompt_suffix
    assert special & set(prefix) and special & set(suffix)
    assert tokenizer.encode_prompt(text) == [*prefix, *ids, *suffix]
    assert tokenizer.decode([ids]) == [text]


def test_end_and_pad_tokens(copy):
    """generation_config.json's ends before config.json's, with the tokenizer's; no pad token: the end token pads."""
    tokenizer, to_id = qwen(), qwen().inner.token_to_id
    assert set(tokenizer.eos_ids) == {to_id("<|im_end|>"), to_id("<|endoftext|>")}
    assert (tokenizer.eos_id, tokenizer.pad_id) == (to_id("<|im_end|>"), to_id("<|endoftext|>"))
    directory = copy("llama3")
    llama = load_tokenizer(directory)
    end, turn = (llama.inner.token_to_id(t) for t in ("<|end_of_text|>", "<|eot_id|>"))
    assert (llama.eos_ids, llama.eos_id, llama.pad_id) == ((end,), end, end)
    edit(directory / "config.json", eos_token_id=[turn, 7])
    assert (load_tokenizer(directory).eos_ids, load_tokenizer(directory).eos_id) == ((end, turn, 7), end)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": turn}))
    assert load_tokenizer(directory).eos_ids == (end, turn)
    edit(directory / "tokenizer_config.json", eos_token={"content": "<|eot_id|>", "lstrip": False})
    assert (load_tokenizer(directory).eos_ids, load_tokenizer(directory).pad_id) == ((turn,), turn)
    edit(directory / "tokenizer_config.json", drop=("eos_token",))
    assert load_tokenizer(directory).eos_id == turn
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    assert load_tokenizer(directory).eos_id == end


def test_bytes_of_every_id():
    """What an id adds to a text: nothing for special tokens and for ids beyond the tokenizer's; and decode agrees."""
    tokenizer = qwen()
    assert tokenizer.vocab_size == len(tokenizer.bytes_V) == 320
    beyond = tokenizer.inner.get_vocab_size()
    assert beyond < 320 and tokenizer.decode([[319], [40, 319, 40]]) == ["", tokenizer.decode([[40, 40]])[0]]
    texts = tokenizer.decode([[i] for i in range(320)])
    assert texts == [raw.decode(errors="replace") for raw in tokenizer.bytes_V]
    assert tokenizer.bytes_V[tokenizer.inner.token_to_id("<think>")] == b"<think>"
    assert [tokenizer.bytes_V[i] for i in (tokenizer.eos_id, 319)] == [b"", b""]
    text = IDS["qwen2"][1][0]
    ids = [*tokenizer.encode(text), 319, tokenizer.eos_id]
    assert b"".join(tokenizer.bytes_V[i] for i in ids).decode() == text
    at = text.index("two")
    on = tokenizer.overlap(ids, text, [(at, at + 3)])[0]
    assert b"two" in b"".join(tokenizer.bytes_V[i] for i, here in zip(ids, on) if here)
    assert on[-2:].tolist() == [0, 0]


def test_nano_tokenizer_has_no_frame():
    _, _, tokenizer = nano()
    assert (tokenizer.prompt_prefix, tokenizer.prompt_suffix, tokenizer.eos_ids) == ([], [], (tokenizer.eos_id,))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode_prompt(" a <eos>\n") == tokenizer.encode(" a <eos>\n")


def test_tokenizer_hash_covers_ends_and_frame(copy):
    again = load_tokenizer(GOLDEN / "qwen2")
    assert again.sha256() == qwen().sha256()
    directory = copy("qwen2")
    edit(directory / "generation_config.json", eos_token_id=[5])
    other_end = load_tokenizer(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    template = config["chat_template"]
    edit(directory / "tokenizer_config.json", chat_template=template.replace("You are helpful", "Help"))
    other_prefix = load_tokenizer(directory)
    edit(directory / "tokenizer_config.json", chat_template=template.replace("assistant", "user"))
    other_suffix = load_tokenizer(directory)
    hashes = {t.sha256() for t in (again, other_end, other_prefix, other_suffix)}
    assert len(hashes) == 4 and other_prefix.prompt_suffix == other_end.prompt_suffix


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHAT, "[user]", "[a]"),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}<{{ m.content | trim }}>{% endfor %}",
         "<", ">"),
        ("{{ bos_token }}{{ strftime_now('%d %b %Y') }}:{{ messages[0]['content'] }}", "26 Jul 2024:", ""),
        ("{% generation %}\n  {% if not tools %}\n{{ {'é': 1} | tojson }}{% endif %}{% endgeneration %}"
         "{{ messages[0].content }}", '{"é": 1}', ""),
    ],
)  # fmt: skip
def test_chat_template_environment(copy, template, before, after):
    """What templates on the hub use: loop controls, the date (fixed), generation marks, tojson, unset tokens."""
    directory = copy("qwen2")
    (directory / "chat_template.jinja").write_text(template)  # goes before tokenizer_config.json's
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode([tokenizer.prompt_prefix, tokenizer.prompt_suffix]) == [before, after]
    assert tokenizer.strip == ("trim" in template)
    padded = tokenizer.decode([tokenizer.encode_prompt("\n x ")])[0]
    assert padded == before + ("x" if tokenizer.strip else "\n x ") + after


def test_chat_template_list_uses_default(copy):
    directory = copy("qwen2")
    path = directory / "tokenizer_config.json"
    edit(path, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHAT}])
    assert load_tokenizer(directory).prompt_suffix == qwen().encode("[a]")
    edit(path, chat_template=[{"name": "tool_use", "template": "T"}])
    refused(lambda: load_tokenizer(directory), str(directory), "default")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{% if %}", "{{ raise_exception('a\nb') }}",
     "nothing", "{{ messages[0].content * 2 }}",
     "{{ messages[0].content.lstrip() }}", "{{ messages.append(1) }}", "{{ messages[7].content.x }}"],
)  # fmt: skip
def test_chat_template_refused(copy, template):
    directory = copy("qwen2")
    edit(directory / "tokenizer_config.json", chat_template=template)
    refused(lambda: load_tokenizer(directory), str(directory / "tokenizer_config.json"), "template")


def word_level():
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))


def sentencepiece_like():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return inner


def lower_case():
    inner = tokenizers.Tokenizer.from_file(str(GOLDEN / "qwen2" / "tokenizer.json"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    return inner


def added_space():
    inner = tokenizers.Tokenizer.from_file(str(GOLDEN / "qwen2" / "tokenizer.json"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.normalizer = None
    return inner


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (word_level, "WordLevel"),
        (sentencepiece_like, "Sequence"),
        (lower_case, "give back"),
        (added_space, "give back"),
    ],
)
def test_tokenizer_refuses_other_kinds(copy, make, word):
    directory = copy("qwen2")
    make().save(str(directory / "tokenizer.json"))
    refused(lambda: load_tokenizer(directory), str(directory / "tokenizer.json"), word)


def test_tokenizer_refuses_bad_files(copy):
    directory = copy("qwen2")
    path = directory / "tokenizer.json"
    refused(lambda: load_hf_tokenizer(directory, 281), str(path), "vocab_size 281")
    edit(directory / "generation_config.json", eos_token_id=320)
    refused(lambda: load_tokenizer(directory), str(directory / "generation_config.json"), "eos_token_id 320")
    edit(directory / "generation_config.json", eos_token_id=281)
    edit(directory / "tokenizer_config.json", pad_token="<none>")
    refused(lambda: load_tokenizer(directory), str(directory / "tokenizer_config.json"), "pad_token", "<none>")
    edit(directory / "tokenizer_config.json", pad_token=5)
    refused(lambda: load_tokenizer(directory), str(directory / "tokenizer_config.json"), "pad_token", "5")
    edit(directory / "tokenizer_config.json", drop=("eos_token", "pad_token"))
    (directory / "generation_config.json").unlink()
    edit(directory / "config.json", eos_token_id=None)
    refused(lambda: load_tokenizer(directory), str(directory), "eos_token")
    path.write_text(path.read_text()[:1000])
    refused(lambda: load_tokenizer(directory), str(path))
    path.write_text("{}")
    refused(lambda: load_tokenizer(directory), str(path))
    path.unlink()
    refused(lambda: load_tokenizer(directory), str(path))


def test_tokenizer_drops_padding_and_truncation(copy):
    """Flags that some checkpoints leave in tokenizer.json would pad and cut every text."""
    directory = copy("qwen2")
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.enable_padding(length=64)
    inner.enable_truncation(8)
    inner.save(str(directory / "tokenizer.json"))
    text, ids = IDS["qwen2"][0]
    assert load_tokenizer(directory).encode_prompt(text) == ids


# ---- fetching -----------------------------------------------------------------------------------------------------
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


# ---- writing ------------------------------------------------------------------------------------------------------
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


def test_save_refuses(tmp_path, copy, monkeypatch):
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
    source = copy("qwen3")
    edit(source / "config.json", rms_norm_eps=1e-3)
    refused(lambda: save_hf(tmp_path / "out", *loaded("qwen3"), tokenizer, source), "config.json", "changed")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    refused(lambda: save_hf(tmp_path / "out", cfg, params, tokenizer), "--save_hf", "No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen3", "used"]


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
        assert (t.prompt_prefix, t.prompt_suffix, t.strip, t.pad_id, t.eos_ids) == ([], [], False, 0, (1,))
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
