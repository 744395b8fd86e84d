"""The tokenizer of a checkpoint and the frame its prompts stand in: chat template, special tokens, end ids. Used by
base; knows no weights and no task."""

import datetime
import functools
import json
import pathlib
from typing import Any

import tokenizers

from common.basics import InputError, read_json
from common.hf_config import refuse_hf
from common.tokenizer import Frame, Tokenizer

_CHAT_SENTINEL = "\ue000"  # private use: in no template
_CHAT_DATE = datetime.datetime(2024, 7, 26)  # Llama 3's own default


def render_chat(template: str, special: dict[str, str], path: pathlib.Path) -> tuple[str, str, bool]:
    """(text before, text after, whether it is stripped) of one user message in a chat template, with the generation
    prompt, in the environment that transformers renders it in.

    Only the date differs: a template that asks for today's gets a fixed one, else a run would not be the same, nor
    resume, on the next day.
    """
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks assistant text for training, prints what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": _CHAT_DATE.strftime}
    spaced = f" \t{_CHAT_SENTINEL}\t "  # tells whether the template strips the message, as Llama's does
    messages = [{"role": "user", "content": spaced}]
    try:
        text = env.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
    except Exception as e:  # a template is a program: it may raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(
            f"{path}: its chat template failed on one user message ({reason}); choose another --model"
        ) from None
    if text.count(_CHAT_SENTINEL) != 1:
        raise InputError(f"{path}: its chat template does not show the user's message once; choose another --model")
    strip = spaced not in text
    before, after = text.split(_CHAT_SENTINEL if strip else spaced)
    if strip and (before.endswith(" \t") or after.startswith("\t ")):
        raise InputError(f"{path}: its chat template strips one side of the message only; choose another --model")
    return before, after, strip


def read_chat_template(directory: pathlib.Path, config: dict[str, Any]) -> tuple[str | None, pathlib.Path]:
    """The chat template, if any, and its file: chat_template.jinja, else tokenizer_config.json (its "default" where it
    has several)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), path
    template, path = config.get("chat_template"), directory / "tokenizer_config.json"
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise InputError(f"{path}: none of its chat templates is named 'default'; name the one to use so")
        template = named["default"]
    return template, path


def special_tokens(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} as transformers passes them to a chat template: those that are set."""
    config = read_json(directory / "special_tokens_map.json", {}) | config
    fields = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    plain = lambda token: token.get("content") if isinstance(token, dict) else token
    tokens = {field: plain(config.get(field)) for field in fields}
    for field, token in tokens.items():
        if not isinstance(token, str | None):
            raise InputError(f"{directory / 'tokenizer_config.json'}: {field} = {token!r} must be a text; correct it")
    return {field: token for field, token in tokens.items() if token is not None}


def end_ids(directory: pathlib.Path, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, as a list."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        ids = read_json(path, {}).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for i in ids:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise InputError(f"{path}: eos_token_id {i!r} is none of the model's {vocab_size} ids; correct it")
        return ids
    return []


def read_byte_level(path: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
    """tokenizer.json, if it is a byte-level BPE that gives texts back as they were and fits the model's vocabulary."""
    read_json(path)
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({' '.join(str(e).split())}); download it again") from None
    kinds = type(inner.model).__name__, type(inner.decoder).__name__
    if kinds != ("BPE", "ByteLevel"):
        refuse_hf(path, f"a tokenizer of {kinds[0]} with {kinds[1]} decoder (supported: byte-level BPE)")
    inner.no_padding()
    inner.no_truncation()
    for probe in (" Ab  c\n\n\t12,345 = é’😀\r\n", "Ab", "10³ ½ ﬁ"):  # NFC may act; NFKC makes 103 of 10³
        if inner.decode(inner.encode(probe, add_special_tokens=False).ids) != probe:
            refuse_hf(path, "a tokenizer that does not give back the text it encodes (a normalizer, an added space)")
    top = max(inner.get_vocab(with_added_tokens=True).values())
    if top >= vocab_size:
        raise InputError(
            f"{path}: id {top} ({inner.id_to_token(top)}) is beyond config.json's vocab_size {vocab_size};"
            " take both from one checkpoint"
        )
    return inner


def frame_of(inner: tokenizers.Tokenizer, before: str, after: str, strip: bool) -> Frame:
    """The frame of a chat template, `before` and `after` the message. Control tokens cut a text in pieces, and a piece
    is tokenized as a whole: the message with the plain text up to the next control token on either side."""
    added = inner.get_added_tokens_decoder()
    encoded = inner.encode(before + _CHAT_SENTINEL + after, add_special_tokens=False)
    ids, place = encoded.ids, encoded.offsets
    control = [k for k, i in enumerate(ids) if i in added and added[i].special]
    last = max((k for k in control if place[k][1] <= len(before)), default=None)
    first = min((k for k in control if place[k][0] > len(before)), default=None)
    return Frame(
        prefix=() if last is None else tuple(ids[: last + 1]),
        before=before if last is None else before[place[last][1] :],
        after=after if first is None else after[: place[first][0] - len(before) - 1],
        suffix=() if first is None else tuple(ids[first:]),
        strip=strip,
        eats=(last is not None and added[ids[last]].rstrip, first is not None and added[ids[first]].lstrip),
    )


def load_hf_tokenizer(directory: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint, with what ends its answers and what its prompts stand in.

    With a chat template a prompt is one user message of it. Without one, the prompt follows what the tokenizer itself
    puts in front of a text: a begin token for Llama 3, nothing for Qwen.
    """
    path = directory / "tokenizer_config.json"
    inner = read_byte_level(directory / "tokenizer.json", vocab_size)
    config = read_json(path, {})
    special, ids = special_tokens(directory, config), end_ids(directory, vocab_size)
    eos = special.get("eos_token") or (inner.id_to_token(ids[0]) if ids else None)
    pad = special.get("pad_token") or eos
    if eos is None:
        raise InputError(f"{directory}: no eos_token in {path.name}, no eos_token_id in config.json; add one")
    for field, token in (("eos_token", eos), ("pad_token", pad)):
        if inner.token_to_id(token) is None:
            raise InputError(f"{path}: {field} {token!r} is not in tokenizer.json; correct it")
    template, template_path = read_chat_template(directory, config)
    if template is None:
        plain, framed = inner.encode("0", add_special_tokens=False).ids, inner.encode("0").ids
        frame = Frame(prefix=tuple(framed[: framed.index(plain[0])]))
    else:
        frame = frame_of(inner, *render_chat(template, special, template_path))
    return Tokenizer(inner, pad, eos, tuple(ids), frame, vocab_size)
