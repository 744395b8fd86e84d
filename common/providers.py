"""The wire forms of the two kinds of teachers behind one interface: a Prompt goes out, a Reply comes back, or a Failure
that says what kind it was. Used by asking and batch_jobs; knows neither what is asked nor when it is asked again.

The SDKs are imported when a provider is made, and only then. They send, and give names to what comes back; bodies are
read here, from their text: `parse()` loses the usage of an answer that was cut off, and a page in HTML with status 200
reaches the caller as it is. Nothing that a server says in words is ever passed on: errors quote prompts.
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import time
import urllib.parse
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from common.basics import InputError

KEYS = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
BASES = {"anthropic": "ANTHROPIC_BASE_URL", "openai": "OPENAI_BASE_URL"}
FORMS = ("schema", "tool", "plain")  # how JSON is asked for, the strictest first
SIGNS = {  # what a server names that does not know a form
    "schema": ("response_format", "output_config", "json_schema", "output_format", "structured output", "grammar"),
    "tool": ("tools", "tool_choice", "tool use", "tool call", "function call"),
    "plain": (),
}
NOT_KNOWN = r"un(?:support|known|recogni[sz]ed|expected|availabl)|not? (?:support|permit|allowed)|extra|invalid param"
NO_CREDIT = ("insufficient_quota", "billing_error", "billing_hard_limit_reached", "billing_not_active")
NO_CREDIT_WORDS = "your credit balance is too low"  # of a 400 without a code of its own
TOOL = "write_down"  # the name of the tool whose input is the answer
ENDS = {"end_turn": "end", "stop": "end", "stop_sequence": "end", "tool_use": "end", "tool_calls": "end",
        "max_tokens": "cut off", "length": "cut off", "model_context_window_exceeded": "cut off",
        "refusal": "refused", "content_filter": "refused"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a teacher is told (system), what is said in turn (role, text), and the schema of the answer."""

    system: str
    turns: tuple[tuple[str, str], ...]
    schema: dict[str, Any]

    def bytes(self) -> int:
        """At least as many as its tokens: no byte-level tokenizer makes more of them, and frames are short."""
        told = [self.system, json.dumps(self.schema), *(text for _, text in self.turns)]
        return sum(len(text.encode()) for text in told) + 500


class Usage(NamedTuple):
    """Tokens billed for a request: of the prompt in full, read from a cache, written to one; of the answer."""

    fresh: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0


class Reply(NamedTuple):
    """An answer: its text, its usage (None: the server gives none), how it ended ("end", "cut off", "refused", else the
    server's own word) and the category of a refusal."""

    text: str
    usage: Usage | None
    stop: str
    category: str = ""


class Failure(Exception):
    """No answer. `kind`: busy (the provider wants less), broken (worth another try), form (it does not know this form
    of a request: there is another), unfit (this request will never do), fatal (none will). `what` is in our words."""

    def __init__(self, kind: str, what: str, wait: float | None = None, billed: bool = False):
        super().__init__(what)
        self.kind, self.what, self.wait, self.billed = kind, what, wait, billed


def word(value: Any) -> str:
    """A server's short word as it may be printed: an identifier, or nothing."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]{0,48}", value) else ""


def usage_of(fresh: Any, cached: Any, written: Any, output: Any) -> Usage | None:
    """A server's counts, 5000.0 as 5000; None where one of them is no count: then nobody knows what it costs."""
    counts = [fresh, cached or 0, written or 0, output]
    if not all(type(n) in (int, float) and 0 <= n < 1e12 and n == int(n) for n in counts):
        return None
    return Usage(*map(int, counts))


def text_of(said: Any) -> str:
    """What is said in a message: a text, the texts in a list of parts, or nothing. TypeError at anything else,
    ValueError at half a surrogate pair."""
    if isinstance(said, list):
        said = "".join(part["text"] for part in said if part.get("type") in ("text", "output_text"))
    if not isinstance(said, str | None):
        raise TypeError
    (said or "").encode()
    return said or ""


def input_of(arguments: Any) -> str:
    """What a tool is called with, as JSON; TypeError where it is none."""
    if not isinstance(arguments, dict | str):
        raise TypeError
    return text_of(arguments if isinstance(arguments, str) else json.dumps(arguments))


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name)
        try:
            wait = float(text) / unit if text else None
        except ValueError:
            try:
                wait = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):  # a year of twenty digits
                wait = None
        if wait is not None and wait == wait:
            return max(0.0, wait)
    return None


class Provider:
    """A model at a provider. What a request looks like (`form`, and the name of its limit) changes where the server
    does not know it."""

    teacher = ""

    def __init__(self, model: str, base_url: str | None, max_tokens: int, timeout: float, form: str = "auto"):
        """InputError where the SDK or the key is missing, or one of them or the address is none."""
        self.model, self.max_tokens, self.timeout = model, max_tokens, timeout
        self.forms = FORMS if form == "auto" else (form,)
        self.base_url = base_url = base_url or os.environ.get(BASES[self.teacher])
        self.limits, self.proven = self.limit_names(), None
        if base_url:
            check_url(base_url)
        key = (os.environ.get(KEYS[self.teacher]) or "").strip() or ("none" if base_url else None)
        if key and not (key.isascii() and key.isprintable()):
            raise InputError(f"--teacher {self.teacher}: {KEYS[self.teacher]} holds what no key holds; copy it anew")
        if key is None:
            way_out = "or give --base_url of a server that needs none"
            raise InputError(f"--teacher {self.teacher}: no key; set {KEYS[self.teacher]}, {way_out}")
        try:
            self.sdk = importlib.import_module(self.teacher)
        except ImportError:
            way_out = "pip install -r requirements-teacher.txt"
            raise InputError(f"--teacher {self.teacher}: its package is not installed; {way_out}") from None
        for name in ("httpx2", "httpx", "httpcore2", "httpcore"):  # they log addresses
            logging.getLogger(name).setLevel(logging.WARNING)
        # One connection a request. What a server or a proxy sends twice stays in the buffer of a connection that is
        # kept, and is read as the answer to the next request on it: another problem's.
        how = {"max_retries": 0, "timeout": timeout, "default_headers": {"Connection": "close"}}
        self.client = self.make_client(api_key=key, base_url=base_url, **how)

    def limit_names(self) -> tuple[str, ...]:
        return ("max_tokens",)

    @property
    def form(self) -> str:
        return self.forms[0]

    def fall_back(self, way: tuple, error: dict[str, Any], words: str) -> bool:
        """Is there another way, once a server has refused this one, with this error, in these words? Of many requests
        under way that fail for one cause the first changes it. A way that was answered once stays: errors quote
        prompts."""
        if way != (self.forms, self.limits):
            return True
        if way == self.proven:
            return False
        if len(self.limits) > 1 and blames(error, words, self.limits[0]):
            self.limits = self.limits[1:]
        elif len(self.forms) > 1 and any(blames(error, words, name) for name in SIGNS[self.form]):
            self.forms = self.forms[1:]
        else:
            return False
        return True

    async def ask(self, prompt: Prompt) -> Reply:
        """One request, sent once; Failure where it brings no answer. Not bounded in time: the SDKs' own limits end
        with the first byte."""
        way = self.forms, self.limits
        try:
            raw = await self.create(**self.params(prompt))
            body = raw.http_response.content
        except self.sdk.APIStatusError as e:
            raise self.failure(e, way) from None
        except self.sdk.APIConnectionError as e:  # a time-out too
            raise Failure("broken", "no connection, or a broken one", billed=not never_sent(e)) from None
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise Failure("broken", "an answer that is no JSON", billed=True) from None
        reply = self.read_checked(message)
        if way == (self.forms, self.limits):
            self.proven = way
        return reply

    def read_checked(self, message: Any) -> Reply:
        """`read`, where the shape is a message's."""
        try:
            return self.read(message)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
            raise Failure("broken", "an answer that is no message", billed=True) from None

    def failure(self, e: Any, way: tuple) -> Failure:
        """What a status means."""
        status, code = e.status_code, word(getattr(e, "code", None)) or word(getattr(e, "type", None))
        what, error = f"status {status}" + (f" ({code})" if code else ""), error_in(e.response.text)
        if status == 402 or code in NO_CREDIT or str(error.get("message")).lower().startswith(NO_CREDIT_WORDS):
            return Failure("fatal", f"{what}: no credit is left")
        if status in (401, 403):
            return Failure("fatal", f"{what}: the key is not accepted")
        if status == 404:
            return Failure("fatal", f"{what}: no such model, or nothing at this address")
        if status in (429, 529):
            return Failure("busy", what, retry_after(e.response.headers))
        words = e.response.text.lower()
        if status in (400, 413, 422) and error:
            return Failure("form" if self.fall_back(way, error, words) else "unfit", what)
        named = any(blames(error, words, name) for name in SIGNS[way[0][0]])
        if status >= 500 and named and self.fall_back(way, error, words):
            return Failure("form", what)  # llama-cpp-python answers so to a field that it does not know
        return Failure("broken", what, retry_after(e.response.headers), billed=status >= 500)

    def told(self, prompt: Prompt) -> str:
        """The system's words; in plain form they hold the schema."""
        if self.form != "plain":
            return prompt.system
        asked = "Answer with one JSON object and nothing else. It fits this JSON schema:"
        return f"{prompt.system}\n\n{asked}\n{json.dumps(prompt.schema)}"


def blames(error: dict[str, Any], words: str, name: str) -> bool:
    """Does an error say that this field of the request is not known? It names it, or says so next to its name, or is a
    validator's that gives its place."""
    if error.get("param") and str(error["param"]).split(".")[0].split("[")[0] == name:
        return True
    name, gap = rf"\b{re.escape(name)}\b", r"(?:\W+\w+){0,5}?\W+"
    near = rf"(?:{NOT_KNOWN})\w*{gap}{name}|{name}{gap}(?:{NOT_KNOWN})|\bbody\b\W+{name}"
    return re.search(near, words) is not None


def error_in(text: str) -> dict[str, Any]:
    """The error object in the body of a status; empty where the body is none, a proxy's page in HTML, say."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    error = body.get("error", body) if isinstance(body, dict) else {}
    return error if isinstance(error, dict) else {"message": error} if error else {}


def never_sent(e: Exception) -> bool:
    """Did it fail before a byte of the request was out?"""
    return type(e.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "LocalProtocolError")


def check_url(url: str) -> None:
    """InputError where that is no address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port out of range, half a bracket
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        shown = "".join(c if c.isprintable() else "?" for c in url)
        raise InputError(f"--base_url {shown}: is no address; give one as http://localhost:8000/v1")


class Anthropic(Provider):
    """Messages of the Anthropic API. `input_tokens` are without those of the cache."""

    teacher = "anthropic"

    def make_client(self, **settings: Any) -> Any:
        client = self.sdk.AsyncAnthropic(**settings)
        self.create = client.messages.with_raw_response.create
        return client

    def params(self, prompt: Prompt) -> dict[str, Any]:
        turns = [{"role": role, "content": text} for role, text in prompt.turns]
        body = {"model": self.model, "max_tokens": self.max_tokens, "system": self.told(prompt), "messages": turns}
        if self.form == "schema":
            body["output_config"] = {"format": {"type": "json_schema", "schema": prompt.schema}}
        elif self.form == "tool":
            body["tools"] = [{"name": TOOL, "description": "Write the answer down.", "input_schema": prompt.schema}]
            body["tool_choice"] = {"type": "tool", "name": TOOL}
        return body

    def read(self, message: dict[str, Any]) -> Reply:
        blocks, used = message["content"], message.get("usage") or {}
        calls = [input_of(b["input"]) for b in blocks if b.get("type") == "tool_use" and b.get("name") == TOOL]
        usage = usage_of(used.get("input_tokens"), used.get("cache_read_input_tokens"),
                         used.get("cache_creation_input_tokens"), used.get("output_tokens"))  # fmt: skip
        stop = message.get("stop_reason") or "end_turn"
        category = word((message.get("stop_details") or {}).get("category"))
        return Reply(calls[0] if calls else text_of(blocks), usage, ENDS.get(stop, word(stop) or "other"), category)


class OpenAI(Provider):
    """Chat completions, of OpenAI and of all servers that speak its form. `prompt_tokens` hold those of the cache, and
    `completion_tokens` the reasoning."""

    teacher = "openai"

    def make_client(self, **settings: Any) -> Any:
        client = self.sdk.AsyncOpenAI(**settings)
        self.create = client.chat.completions.with_raw_response.create
        return client

    def limit_names(self) -> tuple[str, ...]:
        """OpenAI's new models refuse `max_tokens`; others overlook what they do not know, the bound with it."""
        names = ("max_completion_tokens", "max_tokens")
        return names[::-1] if self.base_url else names

    def params(self, prompt: Prompt) -> dict[str, Any]:
        turns = [("system", self.told(prompt)), *prompt.turns]
        body = {"model": self.model, self.limits[0]: self.max_tokens,
                "messages": [{"role": role, "content": text} for role, text in turns]}  # fmt: skip
        if self.form == "schema":
            schema = {"name": TOOL, "schema": prompt.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.form == "tool":
            body["tools"] = [{"type": "function", "function": {"name": TOOL, "parameters": prompt.schema}}]
            body["tool_choice"] = {"type": "function", "function": {"name": TOOL}}
        return body

    def read(self, message: dict[str, Any]) -> Reply:
        choice, used = message["choices"][0], message.get("usage") or {}
        said, stop = choice["message"], choice.get("finish_reason") or "stop"
        called = [call["function"] for call in said.get("tool_calls") or []]
        calls = [input_of(one["arguments"]) for one in called if one.get("name") == TOOL]
        cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens")
        usage = usage_of(used.get("prompt_tokens"), cached, 0, used.get("completion_tokens"))
        if usage:
            usage = usage._replace(fresh=max(0, usage.fresh - usage.cached))
        if said.get("refusal"):
            return Reply("", usage, "refused", "refusal")
        return Reply(calls[0] if calls else text_of(said.get("content")), usage, ENDS.get(stop, word(stop) or "other"),
                     "content_filter" if stop == "content_filter" else "")  # fmt: skip


PROVIDERS = {"anthropic": Anthropic, "openai": OpenAI}
