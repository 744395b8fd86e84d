"""config.json of Qwen2, Qwen3 and Llama checkpoints: into the decoder's shape, and back. What the decoder would not
compute as the checkpoint means it is refused, field by field. Used by checkpoints, chat and base; knows no weights."""

import math
import pathlib
from typing import Any

from common.basics import InputError, read_json
from common.model import ModelConfig
from common.tokenizer import Tokenizer

# layers x width above which the backward pass computes each layer again (ModelConfig.remat). Keeping what the layers
# computed is a quarter faster, and up to the benchmarks' small model (8 x 512) memory and the time to compile allow it;
# SmolLM2-135M (30 x 576) is above, nano (4 x 128) below, by name as from a folder.
REMAT_ABOVE = 8 * 512
_HF_MODELS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_HF_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
}  # fmt: skip
_HF_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
_HF_READ = {*_HF_SIZES, *_HF_ROPE, "model_type", "architectures", "layer_types", "rms_norm_eps", "tie_word_embeddings"}
_HF_ONLY = {  # field -> the one value that the decoder computes; absent, transformers takes it to be that value
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1,
    "partial_rotary_factor": 1, "rope_interleaved": False, "use_mrope": False, "is_llama_config": True,
    "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
}  # fmt: skip
_HF_HARMLESS = {  # they change no logit: bookkeeping, training, token ids (read with the tokenizer), old sampling flags
    "_name_or_path", "_attn_implementation_autoset", "attn_implementation", "dtype", "torch_dtype", "use_cache",
    "transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed", "return_dict", "use_bfloat16",
    "output_attentions", "output_hidden_states", "torchscript", "tf_legacy_loss", "is_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
    "problem_type", "tokenizer_class", "prefix", "initializer_range", "attention_dropout",
    "sliding_window", "max_window_layers",  # only read where use_sliding_window is on, which is refused
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "begin_suppress_tokens",
}  # fmt: skip


def refuse_hf(path: pathlib.Path, what: str):
    raise InputError(f"{path}: {what} is not supported; choose another --model")


def hf_number(config: dict[str, Any], field: str, path: pathlib.Path, whole: bool = False):
    """A number above 0 of config.json, an integer if `whole`; InputError naming the field otherwise."""
    value = config.get(field)
    if value is None:
        raise InputError(f"{path}: {field} is missing; download the file again")
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{path}: {field} = {value!r} must be {'an integer' if whole else 'a number'} above 0")
    return value if whole else float(value)


def read_hf_rope(config: dict[str, Any], path: pathlib.Path):
    """(theta, scaling) of ModelConfig from rope_theta and rope_scaling, or from the rope_parameters that replaced both
    in transformers 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling must be an object; download the file again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse_hf(path, f"rope_scaling of type {kind!r}")
    scaled = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(scaled if kind == "llama3" else ())}
    for field in rope:
        if field not in known and rope[field] is not None:
            refuse_hf(path, f"{field!r} in rope_scaling of type {kind!r}")
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        refuse_hf(path, f"partial_rotary_factor = {rope['partial_rotary_factor']}")
    first = lambda *values: next((value for value in values if value is not None), None)
    theta = first(rope.get("rope_theta"), config.get("rope_theta"), 1e4)
    theta = hf_number({"rope_theta": theta}, "rope_theta", path)
    if kind == "default":
        return theta, None
    original = {scaled[3]: first(rope.get(scaled[3]), config.get("max_position_embeddings"))}
    factor, low, high = (hf_number(rope, field, path) for field in scaled[:3])
    if high <= low:
        raise InputError(f"{path}: high_freq_factor {high} must be above low_freq_factor {low}")
    return theta, (factor, low, high, hf_number(original, scaled[3], path, whole=True))


def check_hf_fields(config: dict[str, Any], path: pathlib.Path) -> None:
    """InputError naming the first field that the decoder does not compute as the checkpoint means it. A field that is
    not known here is refused too: whether it matters is not for this program to guess. null is 'not set'."""
    kind = config.get("model_type")
    if kind not in tuple(_HF_MODELS):
        refuse_hf(path, f"model_type {kind!r} (supported: {', '.join(_HF_MODELS)})")
    if config.get("architectures") not in (None, [_HF_MODELS[kind]]):
        refuse_hf(path, f"architectures = {config['architectures']}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        refuse_hf(path, f"layer_types = {layer_types} (supported: full_attention)")
    for field, value in config.items():
        if value is None or field in _HF_READ or field in _HF_HARMLESS:
            continue
        if field not in _HF_ONLY:
            raise InputError(
                f"{path}: the field {field!r} is not known; if it does not change what the model computes, remove it"
                " from the file, else choose another --model"
            )
        if value != _HF_ONLY[field]:
            refuse_hf(path, f"{field} = {value!r}")


def read_hf_config(directory: pathlib.Path) -> ModelConfig:
    """The decoder's shape from config.json; InputError on any field that the decoder would not compute rightly."""
    path = directory / "config.json"
    config = read_json(path)
    check_hf_fields(config, path)
    kind = config["model_type"]
    N, D = (hf_number(config, field, path, whole=True) for field in ("num_attention_heads", "hidden_size"))
    defaults = {}  # where a field may be absent, what transformers makes of it
    if kind == "llama":
        defaults["num_key_value_heads"] = N
    if kind != "qwen3":
        defaults["head_dim"] = D // N
    config = defaults | {field: value for field, value in config.items() if value is not None}
    sizes = {ours: hf_number(config, theirs, path, whole=True) for theirs, ours in _HF_SIZES.items()}
    if N % sizes["n_kv_heads"] or sizes["head_dim"] % 2 or (sizes["head_dim"] == defaults.get("head_dim") and D % N):
        raise InputError(
            f"{path}: num_attention_heads {N}, num_key_value_heads {sizes['n_kv_heads']}, head_dim"
            f" {sizes['head_dim']} and hidden_size {D} do not go together; download the file again"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise InputError(f"{path}: tie_word_embeddings = {tied!r} must be true or false")
    theta, scaling = read_hf_rope(config, path)
    return ModelConfig(
        **sizes, rope_theta=theta, rope_scaling=scaling, norm_eps=hf_number(config, "rms_norm_eps", path),
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", tie_embeddings=tied,
        remat=sizes["n_layers"] * sizes["d_model"] > REMAT_ABOVE,
    )  # fmt: skip


def hf_config(cfg: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a decoder that was not read from a checkpoint. rope_theta and rope_scaling are the older spelling,
    which every version of transformers and vLLM reads."""
    if cfg.qk_norm and cfg.qkv_bias:
        raise InputError("--save_hf: no model of transformers has both q/k norms and q/k/v biases")
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    config = {"architectures": [_HF_MODELS[kind]], "model_type": kind, "torch_dtype": "float32", "hidden_act": "silu"}
    config |= {theirs: getattr(cfg, ours) for theirs, ours in _HF_SIZES.items()}
    config |= {"rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": cfg.tie_embeddings, "rope_theta": cfg.rope_theta}
    config["max_position_embeddings"] = 32768  # no limit of the decoder; vLLM asks for one
    if cfg.rope_scaling is not None:
        factor, low, high, original = cfg.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        config["max_position_embeddings"] = max(32768, int(factor * original))
    return config | {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
