"""config.json of a checkpoint, into the decoder's shape and back.

pytest tests/test_hf_config.py
"""

import dataclasses
import json

import jax
import pytest
from examples import GOLDEN, edit, refused
from flax import nnx

from common.hf_config import read_hf_config
from common.model import Decoder, ModelConfig


# ---- config.json ----------------------------------------------------------------------------------------------------
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


def test_config_new_and_old_spelling_agree(golden_copy):
    old = read_hf_config(GOLDEN / "llama3")
    directory = golden_copy("llama3")
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
def test_config_refuses(golden_copy, name, changes, word):
    """Each field that the decoder would get wrong is refused by name, in the file's name."""
    directory = golden_copy(name)
    edit(directory / "config.json", **changes)
    refused(lambda: read_hf_config(directory), str(directory / "config.json"), word)


def test_config_takes_null_and_harmless_fields(golden_copy):
    directory = golden_copy("qwen2")
    edit(directory / "config.json", quantization_config=None, num_experts=None, use_cache=False, attention_dropout=0.1)
    assert read_hf_config(directory) == read_hf_config(GOLDEN / "qwen2")


@pytest.mark.parametrize("text", [None, "{", "[1]", "\x00"])
def test_config_missing_or_malformed(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refused(lambda: read_hf_config(tmp_path), str(tmp_path / "config.json"))
