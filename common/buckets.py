"""A run's folder in a bucket: `--out_dir gs://...` or `s3://...`. Used by run, and by deploy/stage.py for what it
stages; knows of a run only the names of its files.

The run writes to a folder on its own disk, as ever. A process of its own looks at that folder and sends what is new. An
object appears whole or not at all, a folder does not, so what counts is the order: metrics.jsonl goes before the
checkpoint that was saved after it, a checkpoint's files before the marker that makes it one (their digests), and
result.json when all else is there. Where the bucket fails, the run goes on and the sender tries again.

A run that starts where its folder is empty or behind the bucket first brings it: the newest checkpoint whose marker is
there and whose digests agree. Compiled programs stay where they are.

    python -m common.buckets FOLDER URL [RUN]      (the process; by hand it sends what ended runs could not)
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from common.basics import InputError

LIBRARY = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}  # what fsspec needs; deploy/buckets.txt has the pins
# the run is not to wait for a client's own patience
PATIENCE = {"s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}}}
EVERY, SLOWEST = 5.0, 60.0  # seconds between two looks at the folder; and between two tries, where the bucket fails
START_WAIT, END_WAIT, STOP_WAIT = 120, 600, 90  # seconds: for an answer at the start, for the last files, after SIGTERM
MARKER = ".complete"  # {file: digest} of a folder that counts as a whole, beside it
LEFT = ("xla_cache", "lock", "checkpoints", "cache", "data", "artifacts")  # not sent, or not as single files


class Damaged(Exception):
    """What is in the bucket is not what was sent."""


def is_url(path: str | None) -> bool:
    """Whether a flag's value is a bucket's address, or meant as one: Bucket refuses `gs:/b`."""
    return "://" in (path or "") or bool(re.match(r"(gs|gcs|s3):", path or "", re.IGNORECASE))


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bucket:
    """What is under one address. Names are relative to it."""

    def __init__(self, url: str):
        """InputError where it is no such address, or the library for it is missing."""
        import fsspec

        scheme, _, rest = url.partition("://")
        if scheme not in (*LIBRARY, "file") or not rest.strip("/"):
            raise InputError(f"{url}: cannot be opened; give gs://NAME or s3://NAME, or mount it and give the path")
        try:
            options = {"auto_mkdir": True} if scheme == "file" else PATIENCE.get(scheme, {})
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as e:
            how = f"pip install -r deploy/buckets.txt (it needs {LIBRARY.get(scheme)}), or mount it and give the path"
            raise InputError(f"{url}: cannot be opened ({e}); {how}") from None
        self.url, self.root = url.rstrip("/"), self.root.rstrip("/")

    def names(self, under: str = "") -> list[str]:
        """All that is there, sorted."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(f"{self.root}/{under}".rstrip("/"))
        except FileNotFoundError:
            return []
        return sorted(name.removeprefix(self.root).lstrip("/") for name in found)

    def write(self, name: str, what: bytes | pathlib.Path) -> None:
        """A whole object, of bytes or of a file."""
        if isinstance(what, bytes):
            self.fs.pipe_file(f"{self.root}/{name}", what)
        else:
            self.fs.put_file(str(what), f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{name}")

    def fetch(self, name: str, path: pathlib.Path) -> None:
        """An object into a file, whose folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(f"{self.root}/{name}", str(path))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    # ---- folders that count as a whole ------------------------------------------------------------------------------
    def marker(self, group: str) -> dict[str, str]:
        """{file: digest} that the marker of a folder says; {} where there is none."""
        try:
            return json.loads(self.read(group + MARKER))
        except FileNotFoundError:
            return {}

    def holds(self, name: str, expected: str) -> bool:
        """Whether an object is there, with that digest."""
        try:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == expected
        except FileNotFoundError:
            return False

    def send_group(self, folder: pathlib.Path, group: str, trusted: bool = True) -> None:
        """The files of a folder, then its marker; what else is there is removed. Unless the old marker is `trusted`,
        every file that it names is read back, and sent where it is another."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_passing(path.name))
        now = {path.relative_to(folder).as_posix(): digest(path) for path in files}
        before = self.marker(group)
        same = [name for name in now if before.get(name) == now[name]]
        there = {name for name in same if trusted or self.holds(f"{group}/{name}", now[name])}
        if now == before and len(there) == len(now) and trusted:
            return
        if before:  # it is not true while files change
            self.remove(group + MARKER)
        for name in sorted(now.keys() - there):
            self.write(f"{group}/{name}", folder / name)
        for name in set(self.names(group + "/")) - {f"{group}/{name}" for name in now}:
            self.remove(name)
        self.write(group + MARKER, json.dumps(now, indent=1).encode())

    def fetch_group(self, group: str, target: pathlib.Path) -> None:
        """A folder as its marker has it, whole or not at all; Damaged names the file that is missing or another."""
        tmp = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        try:
            for name, expected in self.marker(group).items():
                with contextlib.suppress(FileNotFoundError):
                    self.fetch(f"{group}/{name}", tmp / name)
                if not (tmp / name).is_file() or digest(tmp / name) != expected:
                    raise Damaged(f"{self.url}/{group}/{name} is missing, or not what was sent")
            try:
                os.replace(tmp, target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    def disown(self, group: str, e: Damaged, then: str) -> None:
        """Name a damaged folder; without its marker it is sent anew, whatever its files are."""
        print(f"{e}; {then}", file=sys.stderr)
        with contextlib.suppress(Exception):  # each client raises errors of its own; it is named again the next time
            self.remove(group + MARKER)

    def remove_group(self, group: str) -> None:
        """The marker first: without it the rest is nothing."""
        for name in (group + MARKER, *self.names(group + "/")):
            self.remove(name)


def is_passing(name: str) -> bool:
    """Whether a file or folder of that name is none yet, or no longer."""
    return name.endswith((".tmp", ".behind")) or ".orbax-checkpoint-tmp" in name


class Sender:
    """Sends a folder of runs, look by look."""

    def __init__(self, folder: pathlib.Path, bucket: Bucket, run: str = "*"):
        """`run`: the directory of the one run that is sent, with the bases; all by default."""
        self.folder, self.bucket, self.run, self.keeps = folder, bucket, run, False  # keeps: it lets nobody delete
        self.sent: dict[str, Any] = {}  # {name: size and time of it when it was sent}

    def files(self, ended: bool) -> list[str]:
        """Names of single files; those of W&B, which grow all the time, when the run has `ended`."""
        names = []
        for path, folders, files in itertools.chain(*map(os.walk, self.folder.glob(self.run))):
            here = pathlib.Path(path).relative_to(self.folder)
            folders[:] = [f for f in folders if f not in LEFT and (ended or f != "wandb")]
            if here.parts[0] not in (*LEFT, "base") and not is_passing(here.parts[0]):
                names += [(here / f).as_posix() for f in files if f not in LEFT and not is_passing(f)]
        return sorted(names)

    def groups(self) -> dict[str, list[tuple]]:
        """{folder that counts as a whole: its files, their sizes and times}: checkpoints, and the folders of bases."""
        found = {}
        for path in (*self.folder.glob(f"{self.run}/checkpoints/*"), *self.folder.glob("base/*")):
            whole = path.parent.name == "base" or path.name.isdecimal()
            group = path.relative_to(self.folder)
            if path.is_dir() and whole and not any(map(is_passing, group.parts)):
                inside = [(str(file), state(file)) for file in sorted(path.rglob("*")) if not is_passing(file.name)]
                found[group.as_posix()] = inside
        return found

    def look(self, ended: bool = False) -> None:
        """Send what is new. The order of the lists matters: what is in one was there before the next was made."""
        files = self.files(ended)
        groups = self.groups()
        results = [name for name in files if name.endswith("result.json")]
        for name in files:
            if name not in results:
                self.send(name)
        for group, files_now in groups.items():
            if self.sent.get(group) != files_now and (self.folder / group).is_dir():
                try:
                    self.bucket.send_group(self.folder / group, group)
                except FileNotFoundError:
                    if (self.folder / group).is_dir():
                        raise
                    continue  # an old checkpoint, removed meanwhile
                self.sent[group] = files_now
        for name in results:
            self.send(name)
        self.drop(groups)

    def send(self, name: str) -> None:
        path, now = self.folder / name, state(self.folder / name)
        if now is None or self.sent.get(name) == now:
            return
        if path.suffix == ".jsonl":  # whole lines alone
            data = path.read_bytes()
            self.bucket.write(name, data[: data.rfind(b"\n") + 1])
        else:
            self.bucket.write(name, path)
        self.sent[name] = now

    def drop(self, groups: dict[str, Any]) -> None:
        """Remove checkpoints that the run itself no longer keeps, where it has sent a newer one."""
        for folder in {group.rpartition("/")[0] for group in groups if "/checkpoints/" in group}:
            names = (name.removeprefix(folder + "/").partition("/")[0] for name in self.bucket.names(folder + "/"))
            for group in sorted({f"{folder}/{name.removesuffix(MARKER)}" for name in names} - set(groups)):
                if not (self.folder / group).exists() and not self.keeps:
                    try:
                        self.bucket.remove_group(group)
                    except OSError as e:
                        self.keeps = isinstance(e, PermissionError) or str(e).startswith("Forbidden")  # s3fs, gcsfs
                        if not self.keeps:
                            raise
                        print(f"{self.bucket.url}: old checkpoints stay there ({reason(e)})", file=sys.stderr)


def state(path: pathlib.Path) -> tuple[int, int] | None:
    """(size, time) of a file; None where it is gone."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


# ---- the run's side -------------------------------------------------------------------------------------------------
class Mirror:
    """A bucket as the run sees it: opened, asked for what is there, closed."""

    def __init__(self, url: str):
        """InputError where the bucket cannot be written."""
        self.bucket, self.process, rest = Bucket(url), None, url.partition("://")[2].strip("/")
        self.folder = pathlib.Path("runs/buckets").absolute() / rest
        self.folder.mkdir(parents=True, exist_ok=True)
        self.patient(lambda: self.bucket.write(f".probe.{os.getpid()}", b"can this be written?"))
        with contextlib.suppress(Exception):  # each client raises errors of its own
            self.bucket.remove(f".probe.{os.getpid()}")
        for name in self.patient(lambda: self.bucket.names("base/")):
            group = name.removesuffix(MARKER)
            if name.endswith(MARKER) and not (self.folder / group).exists():
                (self.folder / "base").mkdir(exist_ok=True)
                try:
                    self.patient(lambda group=group: self.bucket.fetch_group(group, self.folder / group))
                except Damaged as e:  # as by two machines that made it at once
                    self.bucket.disown(group, e, "it is made here again")

    def patient(self, call):
        """What `call()` gives, tried for START_WAIT seconds: what there is to go on with has to be known."""
        deadline = time.monotonic() + START_WAIT
        while True:
            try:
                return call()
            except Damaged:
                raise
            except (PermissionError, FileNotFoundError) as e:
                raise InputError(f"--out_dir {self.bucket.url}: cannot write there ({reason(e)})") from None
            except Exception as e:  # each client raises errors of its own
                if "credentials" in str(e).lower():
                    raise InputError(f"--out_dir {self.bucket.url}: {reason(e)}; log in, or set them") from None
                if time.monotonic() > deadline:
                    sys.exit(f"error: {self.bucket.url} does not answer ({reason(e)}); try again later")
                time.sleep(2)

    def begin(self, directory: pathlib.Path) -> None:
        """Bring the run's directory, where the bucket is ahead of what is here; from now on it is sent."""
        self.bring(directory)
        self.start(directory.name)

    def start(self, run: str) -> None:
        command = [sys.executable, "-m", "common.buckets", str(self.folder), self.bucket.url, run]
        place, self.run = pathlib.Path(__file__).parents[1], run
        self.process = subprocess.Popen(command, cwd=place, stdin=subprocess.PIPE, start_new_session=True)

    def look(self) -> None:
        if self.process is not None and (self.process.poll() or 0) < 0:  # by a signal
            print(f"what sends to {self.bucket.url} was killed; it is started again", file=sys.stderr)
            self.start(self.run)

    def bring(self, directory: pathlib.Path) -> None:
        run, names = directory.name, self.patient(lambda: self.bucket.names(directory.name + "/"))
        markers = [n.removesuffix(MARKER) for n in names if n.startswith(f"{run}/checkpoints/") and n.endswith(MARKER)]
        step = lambda group: int(group.rpartition("/")[2])
        here = [int(p.name) for p in directory.glob("checkpoints/*") if p.name.isdecimal()]
        ended_there = f"{run}/result.json" in names and not (directory / "result.json").is_file()
        ahead = max(map(step, markers), default=0) > max(here, default=0)
        if f"{run}/args.json" not in names or ((directory / "args.json").is_file() and not (ahead or ended_there)):
            return
        print(f"{self.bucket.url} is ahead of {directory}: bringing what is there", file=sys.stderr)
        tmp = directory.with_name(f".{run}.{os.urandom(4).hex()}.tmp")
        (tmp / "checkpoints").mkdir(parents=True)
        for group in sorted(markers, key=step, reverse=True):
            try:
                self.patient(lambda group=group: self.bucket.fetch_group(group, tmp / "checkpoints" / str(step(group))))
                break
            except Damaged as e:
                self.bucket.disown(group, e, "trying the one before")
        for name in names:
            if name.count("/") == 1:  # the files of the directory itself
                self.patient(lambda name=name: self.bucket.fetch(name, tmp / name.partition("/")[2]))
        if directory.exists():  # behind, but whose it was only its owner knows
            os.replace(directory, directory.with_name(f".{run}.{os.urandom(4).hex()}.behind"))
        os.replace(tmp, directory)

    def close(self, wait: float) -> bool:
        """Whether all is in the bucket, after at most `wait` seconds."""
        if self.process is None:
            return True
        self.look()
        self.process.stdin.close()
        try:
            return self.process.wait(wait) == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False


_MIRRORS: list[Mirror] = []  # the one of this process


def begin(directory: pathlib.Path) -> None:
    """A run begins in its directory: of the bucket of `--out_dir`, if that is one."""
    for mirror in _MIRRORS:
        mirror.begin(directory)


def look() -> None:
    """A step of the run has ended: what sends is to be there still."""
    for mirror in _MIRRORS:
        mirror.look()


@contextlib.contextmanager
def mirrored(args, hosts: Callable[[], int] = lambda: 1) -> Iterator[Any]:
    """The arguments with a folder for `--out_dir`, which is sent to the bucket that they name, if they name one. At the
    end all is there, or the exit code is 1 and the line says how to send the rest."""
    for flag in ("replay", "model", "data_dir", "save_hf", "out"):
        if is_url(value := getattr(args, flag, None)):
            way = f"python deploy/stage.py --fetch {value} --to FOLDER, or mount the bucket, and give the folder"
            raise InputError(f"--{flag} {value}: has to be a folder; {way}")
    url = getattr(args, "out_dir", None)
    if not is_url(url):
        yield args
        return
    if (count := hosts()) > 1:
        way = "mount the bucket (gcsfuse; deploy/README.md) and give the path"
        raise InputError(f"--out_dir {url}: {count} hosts need one folder that all of them see; {way}")
    mirror = Mirror(url)
    _MIRRORS.append(mirror)
    wait = STOP_WAIT  # unless all goes well
    try:
        yield dataclasses.replace(args, out_dir=str(mirror.folder))
        wait = END_WAIT
    finally:
        _MIRRORS.remove(mirror)
        if not mirror.close(wait):
            again = f"python -m common.buckets {shlex.quote(str(mirror.folder))} {shlex.quote(url)}"
            print(f"not all is in {url}; {mirror.folder} has it, and `{again}` sends it", file=sys.stderr)
            if wait == END_WAIT:
                sys.exit(1)


# ---- the process ----------------------------------------------------------------------------------------------------
def reason(e: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def main(folder: str, url: str, run: str = "*") -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are for the run, whose end we see
        signal.signal(number, signal.SIG_IGN)
    try:
        sender = Sender(pathlib.Path(folder), Bucket(url), run)
    except InputError as e:
        sys.exit(f"error: {e}")
    wait, ended, failed = EVERY, False, ""
    while True:
        if not ended and (sys.stdin.isatty() or select.select([sys.stdin], [], [], wait)[0]):
            ended, deadline = True, time.monotonic() + END_WAIT  # closed: the run has ended, however it did
        try:
            sender.look(ended)
        except Exception as e:  # each client raises errors of its own, and a full disk may be one
            if not failed:
                print(f"{url} fails ({reason(e)}): files stay in {folder}, trying again", file=sys.stderr)
            failed, wait = reason(e), min(SLOWEST, 2 * wait)
            if ended:
                if time.monotonic() > deadline:
                    sys.exit(1)
                time.sleep(2)
            continue
        if failed:
            print(f"{url} answers again: all is there", file=sys.stderr)
        wait, failed = EVERY, ""
        if ended:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
