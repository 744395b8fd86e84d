"""A checkpoint's tokenizer and the frame of its prompts: token ids of `transformers`, and every refusal.

pytest tests/test_chat.py
"""

import json
import shutil

import pytest
import tokenizers
from examples import GOLDEN, IDS, edit, load_tokenizer, qwen, refused

from common.chat import load_hf_tokenizer
from common.tokenizer import Frame


def test_prompt_ids_equal_transformers(golden_copy):
    """Chat templates in tokenizer_config.json and in a file (which strips the text), and a base tokenizer's [bos]."""
    llama, chat = load_tokenizer(GOLDEN / "llama3"), golden_copy("llama3")
    shutil.copy(GOLDEN / "llama3_chat.jinja", chat / "chat_template.jinja")
    for name, tokenizer in (("qwen2", qwen()), ("llama3", llama), ("llama3_chat", load_tokenizer(chat))):
        for text, ids in IDS[name]:
            assert tokenizer.encode_prompt(text) == ids, name
    bos = llama.inner.token_to_id("<|begin_of_text|>")
    assert llama.frame == Frame(prefix=(bos,))
    assert qwen().decode([IDS["qwen2"][1][1]]) == [IDS["decoded"]]


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_plain_text_of_a_frame_joins_the_message(golden_copy, name):
    """Line breaks of a frame and of a message are one token where transformers makes them one."""
    directory = golden_copy(name)
    joined = 0
    for template, prompts in IDS["frames"][name]:
        (directory / "chat_template.jinja").write_text(template)
        tokenizer = load_tokenizer(directory)
        for text, ids in prompts:
            assert tokenizer.encode_prompt(text) == ids, (template, text)
            prefix, before, after, suffix, *_ = tokenizer.frame
            parts = (before, text.strip() if tokenizer.frame.strip else text, after)
            joined += [*prefix, *(i for part in parts for i in tokenizer.encode(part)), *suffix] != ids
    assert joined  # it matters


BESIDE = "{{ '<|im_start|>' + A + messages[0]['content'] + B + '<|im_end|>' + '\n<|im_start|>a' }}"


@pytest.mark.parametrize(("left", "right"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("a", "b"), [("''", "''"), ("'\n'", "' '"), ("' \n'", "''"), ("'u:\n'", "'\n\n.'")])
def test_control_tokens_that_eat_whitespace(golden_copy, left, right, a, b):
    """AddedToken's rstrip and lstrip, some checkpoints' way: what stands beside such a token goes with it, the
    message's whitespace too. Expected: what the library makes of the rendered text."""
    directory = golden_copy("qwen2")
    spec = json.loads((directory / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] |= left and token["content"] == "<|im_start|>"
        token["lstrip"] |= right and token["content"] == "<|im_end|>"
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "chat_template.jinja").write_text(BESIDE.replace("A", a).replace("B", b))
    tokenizer = load_tokenizer(directory)
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    a, b = (part.strip("'").replace("\\n", "\n") for part in (a, b))
    for text in ("2+2", " \n2+2\n", "2+2\n\n ", " ", ""):
        rendered = f"<|im_start|>{a}{text}{b}<|im_end|>\n<|im_start|>a"
        ids = library.encode(rendered, add_special_tokens=False).ids
        assert tokenizer.encode_prompt(text) == ids, text
        if "2" in text:
            at = text.index("2")
            on = tokenizer.prompt_overlap(ids, text, [(at, at + 3)])[0]
            assert tokenizer.decode([[i for i, here in zip(ids, on) if here]])[0].strip() == "2+2"


def test_special_tokens_in_a_problem_stay_text():
    text, ids = IDS["plain"]
    tokenizer = qwen()
    special = {i for i, token in tokenizer.inner.get_added_tokens_decoder().items() if token.special}
    assert tokenizer.encode(text) == ids and not special & set(ids)
    prefix, before, after, suffix, *_ = tokenizer.frame
    assert prefix[-1] == tokenizer.inner.token_to_id("<|im_start|>") and suffix[0] == tokenizer.eos_id
    assert (before, after) == ("user\n", "")
    assert tokenizer.encode_prompt(text) == [*prefix, *tokenizer.encode(before), *ids, *suffix]
    assert tokenizer.decode([ids]) == [text]


def test_end_and_pad_tokens(golden_copy):
    """generation_config.json's ends before config.json's, with the tokenizer's; no pad token: the end token pads."""
    tokenizer, to_id = qwen(), qwen().inner.token_to_id
    assert set(tokenizer.eos_ids) == {to_id("<|im_end|>"), to_id("<|endoftext|>")}
    assert (tokenizer.eos_id, tokenizer.pad_id) == (to_id("<|im_end|>"), to_id("<|endoftext|>"))
    directory = golden_copy("llama3")
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


def test_tokenizer_hash_covers_ends_and_frame(golden_copy):
    again = load_tokenizer(GOLDEN / "qwen2")
    assert again.sha256() == qwen().sha256()
    directory = golden_copy("qwen2")
    edit(directory / "generation_config.json", eos_token_id=[5])
    other_end = load_tokenizer(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    template = config["chat_template"]
    edit(directory / "tokenizer_config.json", chat_template=template.replace("You are helpful", "Help"))
    other_prefix = load_tokenizer(directory)
    edit(directory / "tokenizer_config.json", chat_template=template.replace("assistant", "user"))
    other_suffix = load_tokenizer(directory)
    hashes = {t.sha256() for t in (again, other_end, other_prefix, other_suffix)}
    assert len(hashes) == 4 and other_prefix.frame.suffix == other_end.frame.suffix


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
def test_chat_template_environment(golden_copy, template, before, after):
    """What templates on the hub use: loop controls, the date (fixed), generation marks, tojson, unset tokens."""
    directory = golden_copy("qwen2")
    (directory / "chat_template.jinja").write_text(template)  # goes before tokenizer_config.json's
    tokenizer = load_tokenizer(directory)
    assert tokenizer.frame == Frame((), before, after, (), "trim" in template)
    padded = tokenizer.decode([tokenizer.encode_prompt("\n x ")])[0]
    assert padded == before + ("x" if tokenizer.frame.strip else "\n x ") + after


def test_chat_template_list_uses_default(golden_copy):
    directory = golden_copy("qwen2")
    path = directory / "tokenizer_config.json"
    edit(path, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHAT}])
    assert load_tokenizer(directory).frame.after == "[a]"
    edit(path, chat_template=[{"name": "tool_use", "template": "T"}])
    refused(lambda: load_tokenizer(directory), str(directory), "default")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{% if %}", "{{ raise_exception('a\nb') }}",
     "nothing", "{{ messages[0].content * 2 }}",
     "{{ messages[0].content.lstrip() }}", "{{ messages.append(1) }}", "{{ messages[7].content.x }}"],
)  # fmt: skip
def test_chat_template_refused(golden_copy, template):
    directory = golden_copy("qwen2")
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


def compatibility():
    inner = tokenizers.Tokenizer.from_file(str(GOLDEN / "qwen2" / "tokenizer.json"))
    inner.normalizer = tokenizers.normalizers.NFKC()  # 10³ would be read as 103
    return inner


def decomposing():
    inner = tokenizers.Tokenizer.from_file(str(GOLDEN / "qwen2" / "tokenizer.json"))
    inner.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), tokenizers.normalizers.NFD()])
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
        (compatibility, "give back"),
        (decomposing, "give back"),
        (added_space, "give back"),
    ],
)
def test_tokenizer_refuses_other_kinds(golden_copy, make, word):
    directory = golden_copy("qwen2")
    make().save(str(directory / "tokenizer.json"))
    refused(lambda: load_tokenizer(directory), str(directory / "tokenizer.json"), word)


def test_tokenizer_refuses_bad_files(golden_copy):
    directory = golden_copy("qwen2")
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


def test_tokenizer_drops_padding_and_truncation(golden_copy):
    """Flags that some checkpoints leave in tokenizer.json would pad and cut every text."""
    directory = golden_copy("qwen2")
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.enable_padding(length=64)
    inner.enable_truncation(8)
    inner.save(str(directory / "tokenizer.json"))
    text, ids = IDS["qwen2"][0]
    assert load_tokenizer(directory).encode_prompt(text) == ids
