"""A run's folder in a bucket: the order in which it arrives, what is brought, a bucket that fails, a lost machine.

A folder stands in for the bucket where only the order counts; the rest asks moto's S3 server, by s3fs.

pytest tests/test_buckets.py
"""

import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from examples import ROOT

from common.basics import InputError
from common.buckets import Bucket, Damaged, Mirror, Sender, mirrored
from common.report import read_metrics


def put(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(folder of runs, bucket), both empty; the working directory is elsewhere, as on another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    return tmp_path / "here", Bucket(f"file://{tmp_path}/there")


def a_run(folder, steps=(2, 4), lines=4, result=True):
    """What a run of the name `run` leaves: the files that matter, and some that do not."""
    for step in steps:
        put(folder / f"run/checkpoints/{step}/state/.zarray", f"weights {step}")
    put(folder / "run/args.json", "{}")
    put(folder / "run/metrics.jsonl", "".join(json.dumps({"step": i}) + "\n" for i in range(lines)) + '{"step"')
    put(folder / "run/checkpoints/6.orbax-checkpoint-tmp/state")
    for name in ("lock", ".args.json.7.tmp", "wandb/run-1.wandb", "wandb/cache/a"):
        put(folder / "run" / name)
    put(folder / "base/key/model.safetensors")
    put(folder / "xla_cache/program")
    if result:
        put(folder / "run/result.json", '{"done": 1}')


# ---- the order ------------------------------------------------------------------------------------------------------
def test_what_is_sent_and_in_which_order(place, monkeypatch):
    """Lines before checkpoints, a checkpoint before its marker, the result last; W&B's files when the run has ended."""
    folder, bucket = place
    a_run(folder)
    order, write = [], bucket.write
    monkeypatch.setattr(bucket, "write", lambda name, what: (order.append(name), write(name, what)))
    sender = Sender(folder, bucket, "run")
    sender.look()
    assert order == [
        "run/args.json", "run/metrics.jsonl", "run/checkpoints/2/state/.zarray", "run/checkpoints/2.complete",
        "run/checkpoints/4/state/.zarray", "run/checkpoints/4.complete", "base/key/model.safetensors",
        "base/key.complete", "run/result.json",
    ]  # fmt: skip
    assert bucket.read("run/metrics.jsonl").endswith(b'"step": 3}\n')  # no half line
    del order[:]
    sender.look()
    assert order == []
    with open(folder / "run/metrics.jsonl", "a") as f:
        f.write(": 4}\n")
    sender.look(ended=True)
    assert order == ["run/metrics.jsonl", "run/wandb/run-1.wandb"]
    assert bucket.read("run/metrics.jsonl").count(b"\n") == 5


@pytest.mark.parametrize("dies_at", range(10))
def test_what_is_there_is_whole_wherever_the_sender_dies(place, dies_at, monkeypatch):
    """After any number of objects a new machine finds a checkpoint whose lines are there, or none; and what a second
    sender adds is all."""
    folder, bucket = place
    a_run(folder)
    left, write = [dies_at], bucket.write

    def dying(name, what):
        if not left[0]:
            raise OSError("the machine is gone")
        left[0] -= 1
        write(name, what)

    monkeypatch.setattr(bucket, "write", dying)
    with contextlib.suppress(OSError):
        Sender(folder, bucket).look()
    bring = lambda at: (monkeypatch.chdir(at), Mirror(bucket.url).bring(at / "run"))
    other = folder.parent / "other"
    other.mkdir()
    bring(other)
    found = sorted(int(path.name) for path in other.glob("run/checkpoints/*"))
    if found:
        lines = read_metrics(other / "run")
        assert len(lines) >= found[-1] and (other / f"run/checkpoints/{found[-1]}/state/.zarray").is_file()
    assert not (other / "run/result.json").exists() or found == [4]
    left[0] = 99
    Sender(folder, bucket).look()
    third = folder.parent / "third"
    third.mkdir()
    bring(third)
    assert json.loads((third / "run/result.json").read_text()) == {"done": 1}
    assert (third / "run/checkpoints/4/state/.zarray").read_text() == "weights 4"


@pytest.mark.parametrize(
    "refusal", [None, PermissionError("Access Denied"), OSError("Forbidden: there"), OSError("503 Slow Down")]
)
def test_what_the_run_no_longer_keeps_is_removed_there(place, refusal, monkeypatch, capsys):
    """Where nothing may be deleted it stays, said once, and is not tried again; any other error is raised."""
    folder, bucket = place
    a_run(folder, result=False)
    sender = Sender(folder, bucket, "run")
    sender.look()
    (folder / "run/checkpoints/2/state/.zarray").unlink()
    (folder / "run/checkpoints/2/state").rmdir()
    (folder / "run/checkpoints/2").rmdir()
    put(folder / "run/checkpoints/6/state/a")
    tries = []
    if refusal:
        monkeypatch.setattr(Bucket, "remove", lambda *_: tries.append(1) or (_ for _ in ()).throw(refusal))
    for _ in range(3):
        with pytest.raises(OSError, match="503") if "503" in str(refusal) else contextlib.nullcontext():
            sender.look()
    said = capsys.readouterr().err.count("old checkpoints stay there")
    assert (len(tries), said) == ((0, 0) if refusal is None else (3, 0) if "503" in str(refusal) else (1, 1))
    there = {name.split("/")[2] for name in bucket.names("run/checkpoints")}
    assert there == {"4", "4.complete", "6", "6.complete"} | ({"2", "2.complete"} if refusal else set())


# ---- what is brought ------------------------------------------------------------------------------------------------
def test_bring(place, monkeypatch, capsys):
    """Nothing where what is here is as new; a damaged checkpoint gives way to the one before; what was behind stays."""
    folder, bucket = place
    a_run(folder, result=False)
    Sender(folder, bucket).look()
    here = Mirror(bucket.url).folder
    assert (here / "base/key/model.safetensors").is_file()  # with the mirror, before anything is trained
    bucket.write("run/checkpoints/4/state/.zarray", b"cut o")
    with pytest.raises(Damaged, match=r"checkpoints/4/state/\.zarray is missing, or not what was sent"):
        bucket.fetch_group("run/checkpoints/4", folder / "x")
    put(here / "run/args.json", "{}")
    Mirror(bucket.url).bring(here / "run")
    assert [path.name for path in here.glob("run/checkpoints/*")] == ["2"]
    assert "trying the one before" in capsys.readouterr().err
    assert len(list(here.glob(".run.*.behind/args.json"))) == 1
    put(here / "run/checkpoints/4/state", "newer")
    Mirror(bucket.url).bring(here / "run")
    assert (here / "run/checkpoints/4/state").read_text() == "newer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(out_dir="nowhere://b"), "^nowhere://b: cannot be opened; give .*or mount it and give the path"),
        (dict(replay="gs://b/r"), "--replay gs://b/r: has to be a folder; python deploy/stage.py --fetch gs://b/r"),
        (dict(model="s3://b/m"), "--model s3://b/m: has to be a folder"),
        (dict(out_dir="file:///proc/nowhere"), "--out_dir file:///proc/nowhere: cannot write there"),
        (dict(out_dir="s3://b", hosts=2), "--out_dir s3://b: 2 hosts need one folder that all of them see; mount the"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(flags, message):
    import b2_grpo

    hosts = flags.pop("hosts", 1)
    with pytest.raises(InputError, match=message), mirrored(b2_grpo.Args(**flags), lambda: hosts):
        pass


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs://b/x: cannot be opened .*pip install -r deploy/buckets.txt .*gcsfs"):
        Bucket("gs://b/x")


@pytest.mark.parametrize(
    "url", ["s3://", "gs://", "gs:/b", "memory://a", "data://a", "hf://a", "http://a/b", "ftp://a", "zip://a", "S3://b"]
)
def test_an_address_that_is_none_is_refused(url):
    import b2_grpo

    with (
        pytest.raises(InputError, match=f"^{url}: cannot be opened; give gs://NAME"),
        mirrored(b2_grpo.Args(out_dir=url)),
    ):
        pass


def test_what_was_cut_is_mended(place):
    """Sent again without trust: whatever is another is sent, and the files of another model go. A sender that dies in
    between leaves no marker that says what is not so."""
    folder, bucket = place
    for name, files in dict(a=dict(x="A", y="same"), b=dict(x="B", y="same", z="")).items():
        for file, text in files.items():
            put(folder / name / file, text)
    bucket.send_group(folder / "b", "model")
    bucket.send_group(folder / "a", "model", trusted=False)
    assert bucket.names() == ["model.complete", "model/x", "model/y"] and bucket.read("model/x") == b"A"
    for broken in (lambda: bucket.write("model/x", b""), lambda: bucket.remove("model/y")):
        broken()
        bucket.send_group(folder / "a", "model", trusted=False)
        assert (bucket.read("model/x"), bucket.read("model/y")) == (b"A", b"same")
    write, bucket.write = bucket.write, lambda name, what: (write(name, what), (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bucket.send_group(folder / "b", "model")
    assert bucket.marker("model") == {}
    bucket.write = write
    bucket.send_group(folder / "a", "model")
    bucket.fetch_group("model", folder / "c")
    assert (folder / "c/x").read_text() == "A"
    bucket.fetch_group("model", folder / "c")  # as another process may have done meanwhile


def test_a_damaged_base_is_made_again(place, capsys):
    """Of two machines that made one at once there is the marker of one and a file of the other."""
    folder, bucket = place
    put(folder / "base/key/model", "one")
    Sender(folder, bucket).look()
    bucket.write("base/key/model", b"two")
    assert not (Mirror(bucket.url).folder / "base/key").exists()
    assert "it is made here again" in capsys.readouterr().err
    Sender(folder, bucket).look()
    assert (Mirror(bucket.url).folder / "base/key/model").read_text() == "one"


def test_a_bucket_that_deletes_nothing_is_no_reason_to_stop(place, monkeypatch):
    monkeypatch.setattr(Bucket, "remove", lambda *_: (_ for _ in ()).throw(OSError("503 Slow Down")))
    assert Mirror(place[1].url).folder.is_dir()


def test_a_sender_that_is_killed_is_started_again(place, capsys):
    mirror = Mirror(place[1].url)
    put(mirror.folder / "run/args.json", "{}")
    mirror.begin(mirror.folder / "run")
    mirror.process.kill()
    mirror.process.wait(60)
    mirror.look()
    assert mirror.process.poll() is None and "is started again" in capsys.readouterr().err
    mirror.process.kill()
    mirror.process.wait(60)
    assert mirror.close(60) and "run/args.json" in place[1].names()


def test_main_takes_a_folder():
    import b2_grpo

    with pytest.raises(InputError, match="--out_dir s3://b/x: is for the command line; `main` takes a folder"):
        b2_grpo.main(b2_grpo.Args(out_dir="s3://b/x"))


# ---- a server -------------------------------------------------------------------------------------------------------
class Server:
    """moto's S3 on a port of its own; `fail()` says whether the next request is answered with 503."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.fail, app = lambda: False, DomainDispatcherApplication(create_backend_app)

        def answer(environ, start_response):
            if self.fail():
                start_response("503 Slow Down", [("Content-Length", "0")])
                return [b""]
            return app(environ, start_response)

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self.http = make_server("127.0.0.1", 0, answer, threaded=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("moto", reason="pip install -r tests/requirements.txt")
    pytest.importorskip("s3fs", reason="pip install -r tests/requirements.txt")
    server = Server()
    variables = dict(
        AWS_ENDPOINT_URL=server.url, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("cts")
        yield server
    server.http.shutdown()


def test_a_bucket_that_is_not_there_is_bad_input(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out_dir s3://none/x: cannot write there"):
        Mirror("s3://none/x")


def test_the_sender_catches_up_after_failures(server, tmp_path):
    """The bucket answers 503 for a while as lines are written; after the run's end all is there."""
    a_run(tmp_path)
    command = [sys.executable, "-m", "common.buckets", str(tmp_path), "s3://cts/failing", "run"]
    server.fail = lambda: True
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert "s3://cts/failing fails" in line and f"files stay in {tmp_path}" in line
    process.stdin.close()
    server.fail = lambda: False
    assert "answers again: all is there" in process.stderr.read()
    assert process.wait(120) == 0
    names = Bucket("s3://cts/failing").names()
    assert "run/result.json" in names and "run/checkpoints/4.complete" in names and "base/key.complete" in names


def start(command, place, *flags):
    """b0_sft.py as a user starts it in a folder of their own, with its results in a bucket."""
    place.mkdir(exist_ok=True)
    flags = [*command.sft, "--out_dir", "s3://cts/runs", "--save_every", "1", "--steps", "30", *flags]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(command.out.parent / "xla_cache")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "b0_sft.py"), *flags], cwd=place, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def senders(place) -> list[int]:
    """The processes that send what lies in a place."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"common.buckets" in path.read_bytes() and str(place).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def lines_of(path) -> int:
    return path.read_bytes().count(b"\n")


def wait_for(what, process) -> None:
    """Until `what()` is, while the process lives."""
    deadline = time.monotonic() + 1200
    while not what():
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()[-2000:]
        time.sleep(0.05)


def no_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "charts/SPS"))} for row in rows]


def test_nothing_is_lost_with_a_machine(server, command, tmp_path):
    """Every fifth request fails. The run and its sender get SIGKILL and their disk is gone; another machine goes on
    from the bucket to the bits of a run that nothing happened to. A third finds it finished."""
    requests = iter(range(10**9))
    server.fail = lambda: next(requests) % 5 == 4
    first = start(command, tmp_path / "first", "--seed", "7")
    here = lambda: [p for p in (tmp_path / "first").glob("runs/buckets/cts/runs/*/metrics.jsonl") if lines_of(p) > 4]
    wait_for(here, first)
    first.send_signal(signal.SIGSTOP)  # in the midst of its steps, until the sender has one of its checkpoints
    bucket = Bucket("s3://cts/runs")
    wait_for(lambda: [n for n in bucket.names() if n.endswith(".complete") and "checkpoints" in n], first)
    for process in [first.pid, *senders(tmp_path / "first")]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    first.wait(60)
    assert not list((tmp_path / "first").rglob("result.json"))
    (tmp_path / "first").rename(tmp_path / "gone")
    second = start(command, tmp_path / "second", "--seed", "7", "--resume")
    output = second.communicate(timeout=1200)[0]
    assert second.returncode == 0, output[-2000:]
    assert "is ahead of" in output
    server.fail = lambda: False
    third = start(command, tmp_path / "third", "--seed", "7", "--resume")
    assert "has finished already" in third.communicate(timeout=1200)[0] and third.returncode == 0
    alone = start(command, tmp_path / "alone", "--seed", "7", "--out_dir", str(tmp_path / "runs"))
    assert alone.wait(1200) == 0
    (local,) = (tmp_path / "runs").glob("b0_sft__*")
    names = [name for name in bucket.names() if name.endswith("metrics.jsonl")]
    rows = [json.loads(line) for line in bucket.read(names[0]).decode().splitlines()]
    assert no_times(rows) == no_times(read_metrics(local)) and len(rows) == 30
    assert rows[-1]["losses/loss"] < 0.9 * rows[0]["losses/loss"]


def test_sigterm_sends_before_it_exits(server, command, tmp_path):
    """Exit 143, and the bucket has the checkpoint and every line."""
    server.fail = lambda: False
    process = start(command, tmp_path / "first", "--seed", "8", "--save_every", "0", "--steps", "4000")
    wait_for(lambda: list((tmp_path / "first").glob("runs/buckets/cts/runs/*__s8__*/metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output[-2000:]
    (directory,) = (tmp_path / "first/runs/buckets/cts/runs").glob("*__s8__*")
    (step,) = (path.name for path in directory.glob("checkpoints/*"))
    bucket = Bucket("s3://cts/runs")
    assert bucket.marker(f"{directory.name}/checkpoints/{step}")
    assert bucket.read(f"{directory.name}/metrics.jsonl") == (directory / "metrics.jsonl").read_bytes()
