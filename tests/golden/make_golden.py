"""Golden logits and token ids of `transformers` on tiny random checkpoints, for
tests/test_checkpoints.py and tests/test_chat.py.

    python tests/golden/make_golden.py                # rewrites the checkpoints and golden files of this folder

Made with Python 3.11, transformers 5.12.1, torch 2.13.0+cpu, tokenizers 0.22.2, safetensors 0.7.0, numpy 2.4.6. The
tests need neither transformers nor torch. The other direction, `transformers` on what `save_hf` writes,
takes both stacks one after the other:

    python tests/golden/make_golden.py save DIR       # the project's packages: save_hf, and the decoder's own logits
    python tests/golden/make_golden.py check DIR      # transformers: loads them, prints and bounds the differences
"""

import copy
import json
import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
LENGTHS, WIDTH = (12, 9, 4), 12
LIMIT = 2e-4  # of logits, float32 against float32

_SMALL = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    hidden_act="silu", attention_dropout=0.0, initializer_range=0.02, use_cache=True,
)  # fmt: skip
# config.json of each checkpoint as the real ones spell it: Qwen2, Llama 3.1 and SmolLM2 in the older way; None keeps
# the file that transformers 5 writes (rope_parameters, layer_types, dtype)
CONFIGS = {
    "qwen2": dict(
        _SMALL, architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=320, max_position_embeddings=256,
        max_window_layers=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=128, use_sliding_window=False,
        tie_word_embeddings=True, torch_dtype="float32", transformers_version="4.40.1", bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen3": dict(
        _SMALL, architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, head_dim=8, attention_bias=False,
        max_position_embeddings=256, max_window_layers=2, rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
        sliding_window=None, use_sliding_window=False, tie_word_embeddings=False,
    ),
    "qwen3_tied": dict(
        _SMALL, architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, head_dim=6, attention_bias=False,
        max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
    ),
    # theta 100 with 8 channels has the wavelengths 6 (kept), 20 (blended), 63 and 199 (divided by the factor)
    "llama3": dict(
        _SMALL, architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=320, head_dim=8, mlp_bias=False,
        attention_bias=False, pretraining_tp=1, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=100.0,
        rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
            rope_type="llama3",
        ),
        tie_word_embeddings=False, torch_dtype="float32", transformers_version="4.43.0", bos_token_id=None,
        eos_token_id=None,
    ),
    "smollm2": {
        **_SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "bos_token_id": 0,
        "eos_token_id": 0, "attention_bias": False, "is_llama_config": True, "max_position_embeddings": 256,
        "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
}  # fmt: skip
OLD_SPELLING = ("qwen2", "llama3", "smollm2")
DTYPES = {"smollm2": "bfloat16", "qwen3_tied": "float16"}
SHARDED = {"qwen3": "16KB"}

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = (
    "{% if messages[0]['role'] != 'system' %}\n    {{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
TEXTS = (
    "Problem:\nA box holds 1234 nails. How many nails do 7 boxes hold?\nSolution:\n",
    "It's 3,5 = “é” 😀  and\ttwo  spaces\n\n so <think> it over </think>.",
)
FRAMES = (  # chat templates with plain text beside the message
    "{{ '### user:\n' + messages[0]['content'] + '\n\n### assistant:\n' }}",
    "{{ '<|im_start|>user: ' + messages[0]['content'] + '\n\n<|im_end|>\n' + 'assistant:\n' }}",
    "{{ '[user] ' + messages[0]['content'] | trim + ' [' + 'assistant]' }}",
)
FRAMED = (*TEXTS, "\n\n 12 eggs: 3 caf\u00e9s \n", "cafe\u0301s\n\n", "What is 2+2?", "", "\u0301 7")
SPECIAL_TEXT = "Say <|im_end|> or <|eot_id|>."


# ---- tokenizers ---------------------------------------------------------------------------------------------------
def byte_level(split: str, special: list[str], plain: list[str] = ()):
    """A byte-level BPE of the given split with 24 merges, its added tokens behind the vocabulary."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + 24, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([*TEXTS, TEXTS[0]], trainer)
    inner.add_special_tokens(special)
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return inner


def write_qwen_tokenizer(directory: pathlib.Path) -> None:
    """As in Qwen2.5's instruct models: two end tokens, a pad token, the template in tokenizer_config.json."""
    from tokenizers import normalizers

    inner = byte_level(QWEN_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"])
    inner.normalizer = normalizers.NFC()
    inner.save(str(directory / "tokenizer.json"))
    end, im_end = (inner.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    added = {
        str(i): dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        | {"content": t.content, "special": t.special}
        for i, t in sorted(inner.get_added_tokens_decoder().items())
    }
    config = dict(
        add_bos_token=False, add_prefix_space=False, added_tokens_decoder=added, bos_token=None, chat_template=CHATML,
        clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace", model_max_length=256,
        pad_token="<|endoftext|>", split_special_tokens=False, tokenizer_class="Qwen2Tokenizer", unk_token=None,
    )  # fmt: skip
    dump(directory / "tokenizer_config.json", config)
    dump(directory / "generation_config.json", dict(eos_token_id=[im_end, end], pad_token_id=end, do_sample=True))
    edit(directory / "config.json", bos_token_id=end, eos_token_id=im_end)


def write_llama_tokenizer(directory: pathlib.Path) -> None:
    """As in Llama 3's base models: a begin token from the post-processor, no pad token, no template."""
    from tokenizers import processors

    bos = "<|begin_of_text|>"
    special = [bos, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    inner = byte_level(LLAMA_SPLIT, special)
    frame = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    inner.save(str(directory / "tokenizer.json"))
    config = dict(
        bos_token=bos, eos_token="<|end_of_text|>", clean_up_tokenization_spaces=False, model_max_length=256,
        model_input_names=["input_ids", "attention_mask"], tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip
    dump(directory / "tokenizer_config.json", config)
    ids = {field: inner.token_to_id(config[field.removesuffix("_id")]) for field in ("bos_token_id", "eos_token_id")}
    edit(directory / "config.json", **ids)


def golden_ids() -> dict:
    """What transformers makes of prompts: by the chat template of qwen2, by llama3's base tokenizer and with a chat
    template beside it."""
    from transformers import AutoTokenizer

    qwen, llama = (AutoTokenizer.from_pretrained(HERE / name) for name in ("qwen2", "llama3"))
    chat = lambda tokenizer, text, **how: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False, **how
    )
    return {
        "qwen2": [[text, chat(qwen, text)] for text in TEXTS],
        "llama3": [[text, llama(text)["input_ids"]] for text in TEXTS],
        "llama3_chat": [[text, chat(llama, text, chat_template=LLAMA_CHAT)] for text in TEXTS],
        "frames": {
            name: [[frame, [[text, chat(t, text, chat_template=frame)] for text in FRAMED]] for frame in FRAMES]
            for name, t in (("qwen2", qwen), ("llama3", llama))
        },
        "plain": [SPECIAL_TEXT, qwen(SPECIAL_TEXT, split_special_tokens=True)["input_ids"]],
        "decoded": qwen.decode(chat(qwen, TEXTS[1]), skip_special_tokens=True),
    }


# ---- models -------------------------------------------------------------------------------------------------------
def dump(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def edit(path: pathlib.Path, **changes) -> None:
    dump(path, json.loads(path.read_text()) | changes)


def write_checkpoint(name: str) -> None:
    """Random weights, norms and biases too, in the checkpoint's type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[name]
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager")
    torch.manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(0.0, 0.3).add_(1.0 if "norm" in key else 0.0)
    model.to(getattr(torch, DTYPES.get(name, "float32")))
    model.save_pretrained(directory, max_shard_size=SHARDED.get(name, "1GB"))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if name in OLD_SPELLING:
        dump(directory / "config.json", config)


def logits_of(directory: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 logits [B, T, V], 0 where the mask is."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    position = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        out = model(*(torch.from_numpy(a.astype(np.int64)) for a in (tokens, mask)), torch.from_numpy(position))
    return out.logits.numpy() * mask[:, :, None].astype(np.float32)


def write_golden(name: str) -> None:
    """golden.npz: tokens of three rows and their logits, the rows padded on the right and on the left."""
    vocab = CONFIGS[name]["vocab_size"]
    rows = [np.random.default_rng((len(name), n)).integers(1, vocab, n) for n in LENGTHS]
    out = {"lengths": np.array(LENGTHS)}
    for side in ("right", "left"):
        pad = lambda a, side=side: np.pad(a, (0, WIDTH - len(a)) if side == "right" else (WIDTH - len(a), 0))
        out[side] = np.stack([pad(row) for row in rows])
        mask = np.stack([pad(np.ones(len(row), np.int64)) for row in rows])
        out[f"{side}_logits"] = logits_of(HERE / name, out[side], mask)
    np.savez_compressed(HERE / name / "golden.npz", **out)


def make() -> None:
    import torch

    torch.set_num_threads(1)
    for name in CONFIGS:
        write_checkpoint(name)
        if name == "qwen2":
            write_qwen_tokenizer(HERE / name)
        if name == "llama3":
            write_llama_tokenizer(HERE / name)
        write_golden(name)
    (HERE / "llama3_chat.jinja").write_text(LLAMA_CHAT)
    (HERE / "ids.json").write_text(json.dumps(golden_ids(), ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the other direction ------------------------------------------------------------------------------------------
def save(out: pathlib.Path) -> None:
    """save_hf of every golden checkpoint and of nano-like, qwen2-like and llama3-like decoders without a source; beside
    each, in OUT/NAME.npz, the decoder's own logits of some tokens."""
    sys.path.insert(0, str(HERE.parents[1]))
    import jax
    from flax import nnx

    import cts_common as cts
    from common.chat import load_hf_tokenizer
    from common.tokenizer import train_tokenizer

    mesh = cts.make_mesh("auto")
    nano = train_tokenizer([*TEXTS], 280)
    small = dict(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24)
    shapes = {
        "new_nano": cts.ModelConfig(nano.vocab_size, **small),
        "new_qwen2": cts.ModelConfig(nano.vocab_size, **small, qk_norm=False, qkv_bias=True, tie_embeddings=False),
        "new_llama3": cts.ModelConfig(nano.vocab_size, **small, qk_norm=False, rope_scaling=(8.0, 1.0, 4.0, 32)),
    }
    for name in (*CONFIGS, *shapes):
        source = HERE / name if name in CONFIGS else None
        if source is None:
            cfg, tokenizer = shapes[name], nano
            noise = np.random.default_rng(0).standard_normal
            params = nnx.state(cts.Decoder(cfg, nnx.Rngs(0)), nnx.Param)
            params = jax.tree.map(lambda a, noise=noise: a + 0.2 * noise(a.shape).astype(np.float32), params)
        else:
            cfg = cts.read_hf_config(source)
            params = cts.load_hf_weights(source, cfg, mesh)
            has_tokenizer = (source / "tokenizer.json").is_file()
            tokenizer = load_hf_tokenizer(source, cfg.vocab_size) if has_tokenizer else nano
        cts.save_hf(out / name, cfg, params, tokenizer, source, max_shard_bytes=20_000)
        model = nnx.merge(nnx.split(nnx.eval_shape(lambda cfg=cfg: cts.Decoder(cfg, nnx.Rngs(0))))[0], params)
        tokens = np.random.default_rng(1).integers(1, cfg.vocab_size, (2, 40)).astype(np.int32)
        hidden = model.prefill(tokens, np.array([40, 40], np.int32))[1]
        logits = np.einsum("BTD,VD->BTV", hidden, model.head_VD())
        ids = np.array(tokenizer.encode(TEXTS[0]), np.int32)
        np.savez(out / f"{name}.npz", tokens=tokens, logits=logits, ids=ids, has=int(source is None or has_tokenizer))


def check(out: pathlib.Path) -> None:
    """transformers on what `save` wrote: AutoModelForCausalLM within LIMIT of our logits, AutoTokenizer giving our
    ids."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    for path in sorted(out.glob("*.npz")):
        directory, ours = path.with_suffix(""), np.load(path)
        worst = np.abs(logits_of(directory, ours["tokens"], np.ones_like(ours["tokens"])) - ours["logits"]).max()
        print(
            f"{directory.name:12} max logit difference {worst:.1e}, files {len(list(directory.glob('*.safetensors')))}"
        )
        assert worst < LIMIT, directory
        if ours["has"]:
            tokenizer = AutoTokenizer.from_pretrained(directory)
            assert tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] == ours["ids"].tolist(), directory
            print(f"{'':12} tokenizer equal: eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")


if __name__ == "__main__":
    if sys.argv[1:] == []:
        make()
    else:
        {"save": save, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
