"""A server that speaks the wire forms of both teachers over real HTTP, and fails as such servers do. It knows
nothing of the rooms: it finds problem, reference and attempt in the prompt, and answers with a corrupted reference.

    python tests/teacher_server.py --port 8123 --faults 0.2 --delay 0.02
"""

import argparse
import asyncio
import contextlib
import email.utils
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter

FAULTS = (
    "busy", "busy_after", "busy_date", "error", "overloaded", "slow", "reset", "reset_early", "garbage", "html",
    "html_error", "shape", "text_plain", "twice", "refusal", "cut", "no_json", "leak", "right", "wrong",
)  # fmt: skip
PROMPT = re.compile(
    r"Problem:\n(.*?)\n\nReference solution:\n(.*?)\n(?:\nAttempt:\n(.*?)\n)?(?:\nYour former.*)?\Z", re.DOTALL
)


def answer_to(user: str, flaw: str = "") -> dict:
    """The fields of a right answer to a prompt, or of one with a flaw."""
    x, reference, attempt = PROMPT.match(user).groups()
    lines = reference.split("\n")
    if reference.startswith("def "):  # a program: its result is off by one
        y0 = re.sub(r"return (.+)$", r"return (\1) + 1", reference)
        quote = y0.split("\n")[-1]
    else:
        gold = lines[-1].removeprefix("#### ")
        off = str(int(gold) + 1)
        lines[-2] = lines[-2].replace(f"={gold}>>{gold}", f"={off}>>{off}")
        y0, quote = "\n".join([*lines[:-1], f"#### {off}"]), lines[-2]
    if attempt is not None:
        y0, quote = attempt, attempt.split("\n")[0]
    critique = f"The step before the last does not follow{'; it is ' + gold if flaw == 'leak' else ''}."
    answer = {"attempt": reference if flaw == "right" else y0, "wrong_step": quote, "critique": critique,
              "error_tags": ["local_arithmetic"], "revision": y0 if flaw == "wrong" else reference}  # fmt: skip
    if attempt is not None:
        del answer["attempt"]
    return answer


class Server:
    """One server, in a thread of its own. What it has seen stands in `seen` ({problem: times of its requests}) and
    `fault_counts`; `forms` are those that it knows; `status`, if set, is the (status, body) of every answer."""

    def __init__(self, faults: float = 0.0, delay: float = 0.0, only=FAULTS, forms=("schema",), port: int = 0):
        self.faults, self.delay, self.only, self.forms, self.port = faults, delay, only, forms, port
        self.seen: dict[str, list[float]] = {}
        self.headers: list[dict[str, str]] = []  # of the last requests
        self.bodies: list[dict] = []
        self.fault_counts: Counter[str] = Counter()
        self.status: tuple[int, dict] | None = None
        self.batches: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.polls, self.expire, self.drop_creates = 1, 0.0, 0
        self.requests = self.most_at_once = self.at_once = 0

    # ---- plumbing --------------------------------------------------------------------------------------------------
    def __enter__(self):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        def run():
            asyncio.set_event_loop(self.loop)
            self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", self.port))
            self.port = self.server.sockets[0].getsockname()[1]
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        ready.wait(10)
        return self

    def __exit__(self, *_):
        def stop():
            self.server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_later(0.05, self.loop.stop)

        self.loop.call_soon_threadsafe(stop)
        self.thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader, writer):
        """Requests of one connection, one after another."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *rest = head.split("\r\n")
                method, path, _ = first.split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    await self.route(method, path.partition("?")[0], headers, body, writer)
                finally:
                    self.at_once -= 1
        writer.close()

    def response(self, status: int, body, headers: dict | None = None, kind: str = "application/json") -> bytes:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(data)}"]
        lines += [f"{k}: {v}" for k, v in (headers or {}).items()]
        return "\r\n".join([*lines, "", ""]).encode() + data

    async def route(self, method, path, headers, body, writer):
        if path.endswith(("/v1/messages", "/chat/completions")):
            await self.one(path, headers, json.loads(body), writer)
        else:
            status, reply = self.batch_route(method, path, headers, body, writer)
            if status:
                writer.write(self.response(status, reply))
        await writer.drain()

    # ---- messages and chat completions -----------------------------------------------------------------------------
    async def one(self, path, headers, request, writer):
        self.requests += 1
        self.headers = [*self.headers[-50:], headers]
        self.bodies = [*self.bodies[-50:], request]
        x, user, times = self.note(request)
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.status:
            status, error = self.status
            writer.write(self.response(status, error))
            return
        if complaint := self.unknown_form(request):
            self.fault_counts["form"] += 1
            writer.write(self.response(400, {"error": {"type": "invalid_request_error", "message": complaint}}))
            return
        fault = self.fault_of(x, len(times))
        self.fault_counts[fault] += 1
        await self.send(fault, path, request, user, writer)

    def note(self, request):
        """(problem, the user's first words, times of its requests)."""
        user = next(m["content"] for m in request["messages"] if m["role"] == "user")
        x = PROMPT.match(user)[1]
        times = self.seen.setdefault(x, [])
        times.append(time.monotonic())
        return x, user, times

    def fault_of(self, x: str, n: int) -> str:
        """Of the n-th request on a problem; the third is always answered well."""
        number = int(hashlib.sha256(f"{x}{n}".encode()).hexdigest(), 16)
        fault = self.only[number % len(self.only)] if n < 3 and (number >> 64) % 1000 < 1000 * self.faults else ""
        return "" if fault == "leak" and n > 1 else fault  # a second leak ends it

    def unknown_form(self, request) -> str:
        has = {"schema": "response_format" in request or "output_config" in request, "tool": "tools" in request,
               "max_tokens": "max_tokens" in request and "plain_only" in self.forms}  # fmt: skip
        names = {"schema": "response_format, output_config", "tool": "tools", "max_tokens": "max_tokens"}
        return "".join(f"unsupported: {names[form]}" for form, there in has.items() if there and form not in self.forms)

    async def send(self, fault, path, request, user, writer):
        error = lambda status, headers=None, kind="some_error": self.response(
            status, {"error": {"type": kind, "message": f"about: {user}"}}, headers
        )
        good = self.response(200, self.message(path, request, user, fault))
        if fault == "busy":
            writer.write(error(429))
        elif fault == "busy_after":
            writer.write(error(429, {"retry-after": "0.3"}))
        elif fault == "busy_date":
            writer.write(error(429, {"retry-after": email.utils.formatdate(time.time() + 1, usegmt=True)}))
        elif fault == "error":
            writer.write(error(500))
        elif fault == "overloaded":
            writer.write(error(529))
        elif fault == "slow":  # a body that drips
            for i in range(len(good)):
                writer.write(good[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
        elif fault in ("reset", "reset_early"):
            writer.write(good[: len(good) // 2] if fault == "reset" else b"")
            await writer.drain()
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            raise ConnectionError
        elif fault == "garbage":
            writer.write(self.response(200, good.partition(b"\r\n\r\n")[2][:-20]))
        elif fault == "html":
            writer.write(self.response(200, b"<html>Sign in</html>", kind="text/html"))
        elif fault == "html_error":
            writer.write(self.response(502, b"<html>Bad gateway</html>", kind="text/html"))
        elif fault == "shape":
            writer.write(self.response(200, [1]))
        elif fault == "text_plain":
            writer.write(self.response(200, self.message(path, request, user, ""), kind="text/plain"))
        elif fault == "twice":
            writer.write(good + good)
        else:
            writer.write(good)

    def message(self, path, request, user, fault="") -> dict:
        """The body of an answer in the wire form of `path`."""
        text = json.dumps(answer_to(user, fault))
        text = {"no_json": "Here you are: {", "cut": text[:40], "refusal": ""}.get(fault, text)
        if "plain_only" in self.forms and fault == "":
            text = f"Gladly!\n```json\n{text}\n```"
        n_in, n_out = len(json.dumps(request)) // 4, len(text) // 4 + 1
        if path.endswith("/messages"):
            stop, details = {"refusal": ("refusal", {"category": "frontier_llm"}), "cut": ("max_tokens", None)}.get(
                fault, ("end_turn", None)
            )
            block = {"type": "text", "text": text}
            if "tools" in request and not fault:
                block, stop = {"type": "tool_use", "id": "t", "name": request["tools"][0]["name"],
                               "input": json.loads(text)}, "tool_use"  # fmt: skip
            return {"id": "always-the-same", "type": "message", "role": "assistant", "model": request["model"],
                    "content": [block] if text else [], "stop_reason": stop, "stop_details": details,
                    "usage": {"input_tokens": n_in - 8, "cache_read_input_tokens": 8,
                              "output_tokens": n_out}}  # fmt: skip
        said = {"role": "assistant", "content": text}
        if fault == "refusal":
            said = {"role": "assistant", "content": None, "refusal": "I cannot."}
        elif "tools" in request and not fault:
            call = {"id": "c", "type": "function", "function": {"name": request["tools"][0]["function"]["name"],
                                                                "arguments": text}}  # fmt: skip
            said = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"id": "always-the-same", "object": "chat.completion", "model": request["model"], "created": 1,
                "choices": [{"index": 0, "message": said, "finish_reason": "length" if fault == "cut" else "stop"}],
                "usage": {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out,
                          "prompt_tokens_details": {"cached_tokens": 8}}}  # fmt: skip

    # ---- batches ---------------------------------------------------------------------------------------------------
    def batch_route(self, method, path, headers, body, writer):
        """(status, body) of a call of either batch interface; (0, None) where the connection is cut instead."""
        if method == "POST" and path.endswith("/messages/batches"):
            return self.create_batch(json.loads(body)["requests"], {}, writer)
        if method == "POST" and path.endswith("/files"):
            name = f"file-{len(self.files)}"
            self.files[name] = re.search(rb"\r\n\r\n(\{.*?)\r\n--", body[body.index(b"filename") :], re.DOTALL)[1]
            return 200, {"id": name, "object": "file", "purpose": "batch", "bytes": 1, "created_at": 1, "filename": "f"}
        if method == "GET" and path.endswith("/content"):
            return 200, self.files[path.split("/")[-2]]
        if method == "POST" and path.endswith("/batches"):
            asked = json.loads(body)
            rows = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
            requests = [{"custom_id": row["custom_id"], "params": row["body"]} for row in rows]
            return self.create_batch(requests, asked.get("metadata") or {}, writer)
        if method == "GET" and path.endswith("/batches"):
            listed = [self.view(batch) for batch in reversed(self.batches.values())]
            return 200, {"object": "list", "data": listed, "has_more": False}
        if method == "GET" and path.endswith("/results"):
            return 200, self.results(self.batches[path.split("/")[-2]], "anthropic")
        if method == "GET" and "/batches/" in path:
            batch = self.batches[path.split("/")[-1]]
            batch["polls"] -= 1
            return 200, self.view(batch)
        return 404, {"error": {"type": "not_found_error", "message": "no"}}

    def create_batch(self, requests, metadata, writer):
        name = f"batch-{len(self.batches)}"
        batch = {"id": name, "requests": requests, "metadata": metadata, "polls": self.polls}
        batch["expire"] = self.expire if len(self.batches) < 3 else 0.0  # so that it ends
        self.batches[name] = batch
        for request in requests:
            self.note(request["params"])
        if self.drop_creates:
            self.drop_creates -= 1
            writer.transport.abort()
            return 0, None
        return 200, self.view(batch)

    def view(self, batch) -> dict:
        """What both interfaces say of a batch, in one."""
        done, lost = batch["polls"] <= 0, batch["expire"] > 0
        if done and "output" not in batch:
            batch["output"], batch["errors"] = f"{batch['id']}-out", f"{batch['id']}-err"
            lines = self.results(batch, "openai").splitlines()
            self.files[batch["output"]] = b"\n".join(line for line in lines if b'"status_code": 200' in line)
            self.files[batch["errors"]] = b"\n".join(line for line in lines if b'"status_code": 200' not in line)
        return {
            "id": batch["id"], "type": "message_batch", "processing_status": "ended" if done else "in_progress",
            "request_counts": {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0},
            "results_url": f"{self.url}/v1/messages/batches/{batch['id']}/results" if done else None,
            "created_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-02T00:00:00Z",
            "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": "x", "completion_window": "24h",
            "status": ("expired" if lost else "completed") if done else "in_progress", "metadata": batch["metadata"],
            "output_file_id": batch.get("output"), "error_file_id": batch.get("errors"),
        }  # fmt: skip

    def results(self, batch, wire: str) -> bytes:
        """The lines of a batch's results, in no order; some expired."""
        lines = []
        for request in sorted(batch["requests"], key=lambda r: hashlib.sha256(r["custom_id"].encode()).hexdigest()):
            number = int(hashlib.sha256(request["custom_id"].encode()).hexdigest(), 16)
            user = next(m["content"] for m in request["params"]["messages"] if m["role"] == "user")
            path = "/v1/messages" if wire == "anthropic" else "/v1/chat/completions"
            lost = number % 1000 < 1000 * batch["expire"]
            message = None if lost else self.message(path, request["params"], user)
            if wire == "anthropic":
                result = {"type": "expired"} if lost else {"type": "succeeded", "message": message}
                lines.append({"custom_id": request["custom_id"], "result": result})
            else:
                response = None if lost else {"status_code": 200, "body": message}
                error = {"code": "batch_expired", "message": "late"} if lost else None
                lines.append({"id": "r", "custom_id": request["custom_id"], "response": response, "error": error})
        return "".join(json.dumps(line) + "\n" for line in lines).encode()


def main() -> None:
    """Serve until killed; the address is printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    with Server(args.faults, args.delay, port=args.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
