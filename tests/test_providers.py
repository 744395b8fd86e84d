"""The two wire forms, read from bodies written by hand; what each status means. Requests over HTTP: tests/test_taught.

pytest tests/test_providers.py
"""

import email.utils
import json
import time

import pytest

from common import providers
from common.basics import InputError
from common.providers import PROVIDERS, Failure, Prompt, Reply, Usage, retry_after, word

for package in ("anthropic", "openai"):
    pytest.importorskip(package, reason="pip install -r requirements-teacher.txt")

PROMPT = Prompt("Be kind.", (("user", "Hi"),), {"type": "object", "properties": {"a": {"type": "string"}}})
BASE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in (*providers.KEYS.values(), *providers.BASES.values(), "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def make(teacher: str, form: str = "auto", base_url: str | None = BASE):
    return PROVIDERS[teacher]("m", base_url, 100, 5.0, form)


class Refused(Exception):
    """A status error as the SDKs' are."""

    def __init__(self, status, text="", headers=None, **fields):
        self.status_code, self.__dict__ = status, {"status_code": status, **fields}
        self.response = type("R", (), {"text": text, "headers": headers or {}})()


# ---- what is sent ---------------------------------------------------------------------------------------------------
def test_bodies_of_the_messages_api():
    schema, tool, plain = (make("anthropic", form).params(PROMPT) for form in ("schema", "tool", "plain"))
    assert schema["output_config"] == {"format": {"type": "json_schema", "schema": PROMPT.schema}}
    assert schema["system"] == "Be kind." and schema["messages"] == [{"role": "user", "content": "Hi"}]
    assert tool["tool_choice"] == {"type": "tool", "name": tool["tools"][0]["name"]}
    assert plain.keys() == {"model", "max_tokens", "system", "messages"} and '"properties"' in plain["system"]


def test_bodies_of_chat_completions():
    schema, tool, plain = (make("openai", form).params(PROMPT) for form in ("schema", "tool", "plain"))
    assert schema["response_format"]["json_schema"] == {"name": providers.TOOL, "schema": PROMPT.schema, "strict": True}
    assert [m["role"] for m in schema["messages"]] == ["system", "user"] and schema["max_tokens"] == 100
    assert tool["tool_choice"]["function"]["name"] == tool["tools"][0]["function"]["name"]
    assert "response_format" not in plain and '"properties"' in plain["messages"][0]["content"]


def test_openai_itself_gets_its_own_name_of_the_limit(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert make("openai", base_url=None).params(PROMPT)["max_completion_tokens"] == 100


# ---- what comes back ------------------------------------------------------------------------------------------------
def test_messages_are_read():
    read = make("anthropic").read_checked
    used = {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 7}
    message = {"content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "{}"}], "usage": used}
    assert read({**message, "stop_reason": "end_turn"}) == Reply("{}", Usage(5, 3, 2, 7), "end", "")
    assert read({**message, "stop_reason": "max_tokens"}).stop == "cut off"
    refusal = {"content": [], "stop_reason": "refusal", "stop_details": {"category": "reasoning_extraction"}}
    assert read(refusal) == Reply("", None, "refused", "reasoning_extraction")
    call = {"type": "tool_use", "name": providers.TOOL, "input": {"a": "b"}}
    assert read({**message, "content": [call], "stop_reason": "tool_use"}).text == '{"a": "b"}'


def test_completions_are_read():
    read = make("openai").read_checked
    used = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
    message = lambda finish="stop", **said: {
        "choices": [{"message": {"content": "{}", **said}, "finish_reason": finish}], "usage": used
    }
    assert read(message()) == Reply("{}", Usage(3, 6, 0, 4), "end", "")
    assert read(message("length")).stop == "cut off"
    assert read(message(content=None, refusal="No.")) == Reply("", Usage(3, 6, 0, 4), "refused", "refusal")
    assert read(message("content_filter"))[2:] == ("refused", "content_filter")
    call = {"function": {"name": providers.TOOL, "arguments": '{"a": 1}'}}
    assert read(message("tool_calls", content=None, tool_calls=[call])).text == '{"a": 1}'
    assert read({"choices": [{"message": {"content": None}}]}) == Reply("", None, "end", "")


def completion(**said):
    return {"choices": [{"message": {"content": None, **said}, "finish_reason": "stop"}]}


def calls(*named):
    return [{"function": {"name": name, "arguments": arguments}} for name, arguments in named]


def test_parts_and_tool_calls_in_other_shapes_are_read():
    """A list of parts, arguments that are an object, the call of our tool behind another one."""
    read = make("openai").read_checked
    parts = [{"type": "text", "text": '{"a"'}, {"type": "image", "url": "u"}, {"type": "text", "text": ": 1}"}]
    assert read(completion(content=parts)).text == '{"a": 1}'
    assert read(completion(tool_calls=calls((providers.TOOL, {"a": 1})))).text == '{"a": 1}'
    assert read(completion(tool_calls=calls(("look_up", "{}"), (providers.TOOL, '{"a": 1}')))).text == '{"a": 1}'
    assert read(completion(content="{}", tool_calls=calls(("look_up", None)))).text == "{}"


DEEP = []
for _ in range(100_000):
    DEEP = [DEEP]
ODD = (
    "<html>", [], [1], {}, {"choices": []}, {"content": 3}, None, {"choices": [{"message": 1}]}, completion(content=3),
    completion(content=[1]), completion(content={"a": 1}), completion(content="half \ud800"),
    completion(tool_calls=calls((providers.TOOL, None))), completion(tool_calls=calls((providers.TOOL, {"a": DEEP}))),
    {"content": [{"type": "text", "text": "half \ud800"}]}, {"content": [{"type": "text", "text": 3}]},
    {"content": [{"type": "tool_use", "name": providers.TOOL, "input": None}]},
)  # fmt: skip


@pytest.mark.parametrize("teacher", PROVIDERS)
@pytest.mark.parametrize("body", ODD, ids=range(len(ODD)))
def test_what_is_no_message_is_tried_again(teacher, body):
    with pytest.raises(Failure) as error:
        make(teacher).read_checked(body)
    assert error.value.kind == "broken" and error.value.billed


@pytest.mark.parametrize(
    ("used", "usage"),
    [
        ({"prompt_tokens": 5000.0, "completion_tokens": 7.0}, Usage(5000, 0, 0, 7)), ({"total_tokens": 5000}, None),
        ({"prompt_tokens": -5, "completion_tokens": 7}, None), ({"prompt_tokens": 5, "completion_tokens": None}, None),
        ({"prompt_tokens": 10**400, "completion_tokens": 7}, None), ({}, None), (None, None),
        ({"prompt_tokens": float("nan"), "completion_tokens": 7}, None),
        ({"prompt_tokens": 5, "completion_tokens": True}, None),
        ({"prompt_tokens": 5, "completion_tokens": 2.5}, None), ({"prompt_tokens": 5, "completion_tokens": "7"}, None),
    ],
)  # fmt: skip
def test_counts_that_are_none_make_no_usage(used, usage):
    """Then a request counts at its worst case; as nothing, it would pass every cap."""
    assert make("openai").read_checked({**completion(content="{}"), "usage": used}).usage == usage
    names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
    used = used and {names.get(name, name): n for name, n in used.items()}
    assert make("anthropic").read_checked({"content": [], "usage": used}).usage == usage


# ---- what a status means --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, "unfit"), (413, None, "unfit"), (422, None, "unfit"), (401, None, "fatal"), (403, None, "fatal"),
        (404, None, "fatal"), (402, None, "fatal"), (429, None, "busy"), (529, None, "busy"),
        (429, "insufficient_quota", "fatal"), (400, "billing_hard_limit_reached", "fatal"),
        (400, "billing_not_active", "fatal"), (500, None, "broken"), (503, None, "broken"), (408, None, "broken"),
        *((status, None, "broken") for status in (301, 304, 405, 409, 418, 421, 423, 424, 425, 451)),
    ],
)  # fmt: skip
def test_statuses(status, code, kind):
    provider = make("openai")
    refused = Refused(status, json.dumps({"error": {"message": "secret words"}}), code=code)
    failure = provider.failure(refused, (provider.forms, provider.limits))
    assert failure.kind == kind and failure.what.startswith(f"status {status}") and "secret" not in failure.what


@pytest.mark.parametrize("status", [400, 413, 422])
def test_of_bad_requests_only_an_error_object_speaks(status):
    """A page in HTML is a proxy's; a 400 may say that there is no credit; an error may be a text."""
    provider = make("anthropic")
    kind = lambda text: provider.failure(Refused(status, text), (provider.forms, provider.limits)).kind
    for page in ("<html>Too large</html>", "", "[1]", "{}", "[" * 100_000):
        assert kind(page) == "broken"
    for error in ({"error": "too long"}, {"detail": [{"msg": "too long"}]}, {"message": "too long"}):
        assert kind(json.dumps(error)) == "unfit"
    low = "Your credit balance is too low to access the API."
    assert kind(json.dumps({"error": {"type": "invalid_request_error", "message": low}})) == "fatal"
    assert kind(json.dumps({"error": {"message": f"messages: {low}"}})) == "unfit"  # it quotes a prompt


def test_ways_fall_back_once_for_many_requests():
    provider = make("openai")
    way = provider.forms, provider.limits
    fail = lambda words, way: provider.failure(Refused(400, json.dumps({"error": {"message": words}})), way).kind
    assert fail("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", way) == "form"
    assert provider.limits == ("max_completion_tokens",) and fail("whatever", way) == "form"
    for form in ("tool", "plain"):
        way = provider.forms, provider.limits
        assert fail("response_format and tools are unknown", way) == "form" and provider.form == form
    assert fail("response_format", (provider.forms, provider.limits)) == "unfit"
    other = make("openai")
    way = other.forms, other.limits
    for status, words, kind in ((500, "oops", "broken"), (500, "('body', 'response_format', 'type')", "form")):
        assert other.failure(Refused(status, words), way).kind == kind
    assert other.form == "tool"
    forced = make("openai", "schema")
    error = Refused(400, '{"message": "response_format"}')
    assert forced.failure(error, (forced.forms, forced.limits)).kind == "unfit"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "too long: 'He has 3 tools and a response_format in his grammar'"}, "unfit"),
        ({"message": "Invalid value", "param": "response_format.json_schema"}, "form"),
        ({"message": "Invalid value", "param": "messages[0]"}, "unfit"),
        ({"message": "Invalid parameter: 'response_format' of type 'json_schema' is not supported"}, "form"),
        ({"message": "This response_format type is unavailable now"}, "form"),
        ({"message": "response_format: Extra inputs are not permitted"}, "form"),
        ({"message": "This model does not support structured output"}, "form"),
    ],
)
def test_a_form_falls_back_where_the_error_is_of_it(error, kind):
    provider = make("openai")
    way = provider.forms, provider.limits
    assert provider.failure(Refused(400, json.dumps({"error": error})), way).kind == kind
    assert provider.form == ("tool" if kind == "form" else "schema")
    proven = make("openai")
    proven.proven = way
    assert proven.failure(Refused(400, json.dumps({"error": error})), way).kind == "unfit" and proven.form == "schema"


def test_retry_after_in_all_its_forms():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    for headers, least, most in (
        ({"retry-after": "7"}, 7, 7), ({"retry-after-ms": "250"}, 0.25, 0.25), ({"retry-after": date}, 27, 31),
        ({"retry-after": "-3"}, 0, 0), ({"retry-after-ms": "x", "retry-after": "2"}, 2, 2),
    ):  # fmt: skip
        assert least <= retry_after(headers) <= most
    assert [retry_after({"retry-after": text}) for text in ("soon", "", "nan")] == [None] * 3
    assert retry_after({}) is None
    assert retry_after({"retry-after": "1 Jan 99999999999999999999 00:00:00 GMT"}) is None


def test_words_of_a_server_are_identifiers_or_nothing():
    assert [word(w) for w in ("rate_limit_error", "max.tokens-1", "Your key sk-1 is bad", "x" * 60, 3, None)] == [
        "rate_limit_error", "max.tokens-1", "", "", "", ""
    ]  # fmt: skip


# ---- keys and packages ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("teacher", PROVIDERS)
def test_what_is_missing_is_one_line(teacher, monkeypatch):
    with pytest.raises(InputError, match=f"no key; set {teacher.upper()}_API_KEY"):
        make(teacher, base_url=None)
    monkeypatch.setenv(f"{teacher.upper()}_BASE_URL", BASE)
    assert make(teacher, base_url=None).base_url == BASE

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(providers.importlib, "import_module", refuse)
    with pytest.raises(InputError, match=r"pip install -r requirements-teacher\.txt"):
        make(teacher)


@pytest.mark.parametrize("teacher", PROVIDERS)
def test_keys_are_tidied_or_refused(teacher, monkeypatch):
    name = f"{teacher.upper()}_API_KEY"
    monkeypatch.setenv(name, " sk-1\n")
    assert make(teacher).client.api_key == "sk-1"
    for bad in ("sk-\u201c1", "sk\n1"):
        monkeypatch.setenv(name, bad)
        with pytest.raises(InputError, match=f"{name} holds what no key holds") as error:
            make(teacher)
        assert bad not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://a/v1", "http://[", "http://a:99999", "http://a:x", "http://a b/v1", "http://a/\nv1",
     "http://", "http://a:0", "a"],
)  # fmt: skip
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(InputError, match="is no address; give one as http") as error:
        make("openai", base_url=url)
    assert "\n" not in str(error.value)


def test_what_was_never_sent_is_not_spent():
    class LocalProtocolError(Exception):
        pass

    error = Exception()
    error.__cause__ = LocalProtocolError()
    assert providers.never_sent(error) and not providers.never_sent(Exception())
