"""What every room may use: bad input, JSON, atomic writes, digests, PRNG streams, the trace counter. Knows no other
room."""

import ast
import base64
import contextlib
import gc
import hashlib
import json
import math
import os
import pathlib
import pkgutil
from collections import Counter
from typing import Any

import numpy as np


class InputError(Exception):
    """Bad input: one line that says what, where and what to do. `cli` prints it and exits with code 2."""


class DiskError(InputError):
    """The disk took no more: one line, too, but exit code 1, for started again it may go well."""

    @classmethod
    def at(cls, path: str | os.PathLike, e: OSError) -> "DiskError":
        """Of what could not be written."""
        return cls(f"{path}: cannot be written ({e.strerror}); make room and start again")


def parse_line(line: str, where: str) -> Any:
    """One line of JSON, read; InputError naming `where` (file:line) if it is none, or none that Python can read."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON ({e.msg}, column {e.colno}); fix or remove the line") from None
    except (ValueError, RecursionError) as e:  # an integer too long, lists too deep
        raise InputError(f"{where}: not JSON that can be read ({e}); fix or remove the line") from None


def parse_python(source: str, mode: str = "exec") -> Any:
    """`ast.parse` without a garbage collection in its midst: in CPython 3.11 a finalizer that parses (printing a
    traceback does) makes it fail with a SystemError (python/cpython issue 106905)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, mode=mode)
    finally:
        if collects:
            gc.enable()


def read_json(path: pathlib.Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `default` where there is no file and a default is given."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give the directory of a checkpoint") from None
    except ValueError as e:
        raise InputError(f"{path}: no valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; download it again")
    return value


def from_hub(client: str, *args: Any, what: str, way_out: str, **kwargs: Any) -> Any:
    """What a function of a hub client answers ("datasets:load_dataset"; imported here alone, it takes seconds);
    InputError of `what` failed, why, and the way out, where it does not."""
    try:
        return pkgutil.resolve_name(client)(*args, **kwargs)
    except Exception as e:  # the clients raise errors of their own and those of httpx, of the disk and of name checks
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(f"{what} ({reason}); {way_out}") from None


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write to a temporary name beside `path`, then rename: a reader sees the old file or the whole new one. DiskError
    where that cannot be; the temporary file is gone then."""
    path, data = pathlib.Path(path), text.encode()
    tmp = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # a process id may be another container's, too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_bytes(data)
        os.replace(tmp, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise DiskError.at(path, e) from None


def pack_arrays(arrays: list[np.ndarray], about: dict[str, Any]) -> str:
    """float32 arrays and what is said about them as one line of JSON."""
    rows = [[a.shape, base64.b64encode(np.ascontiguousarray(a, np.float32).tobytes()).decode()] for a in arrays]
    return json.dumps({"arrays": rows, "about": about})


def unpack_arrays(text: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(arrays, about) of `pack_arrays`."""
    read = json.loads(text)
    floats = [np.frombuffer(base64.b64decode(raw), np.float32).reshape(shape) for shape, raw in read["arrays"]]
    return floats, read["about"]


def writable(directory: str | os.PathLike, flag: str) -> pathlib.Path:
    """The directory that a flag names, made where it is not there; InputError where nothing can be written in it."""
    path = pathlib.Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.urandom(4).hex()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"--{flag} {directory}: cannot write there ({e.strerror}); choose another") from None
    return path


def sha256(text: str | bytes) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


# PRNG streams: fold_in(root, STREAM)
STREAM_INIT, STREAM_DATA, STREAM_ROLLOUT, STREAM_EVAL, STREAM_BASE, STREAM_CONTROL = range(6)
TRACES: Counter[str] = Counter()  # {jitted function: how often it was traced}: once a shape, if all is well


def normalize_x(x: str) -> str:
    """Case and white space folded: two problems equal under this are the same problem."""
    return " ".join(x.lower().split())


def mean(values) -> float | None:
    """Mean of the values that are not None (nor NaN); None if there are none."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(values)) if values else None


def round_up(n: int, to: int) -> int:
    """The smallest multiple of `to` that is at least n."""
    return -(-n // to) * to


def reduce(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics leave jitted code, once per micro-batch, as (sum, count) or as a sum alone. They are added up and divided
    once, here: [{"a": (6., 3.), "b": 1.}, {"a": (2., 1.), "b": 2.}] -> {"a": 2., "b": 3.}."""
    reduced = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        if isinstance(found[0], tuple):
            total, count = (float(sum(map(float, column))) for column in zip(*found))
            reduced[name] = total / max(count, 1e-9)
        else:
            reduced[name] = float(sum(map(float, found)))
    return reduced
