"""One run on several hosts, the (data, model) mesh, and the one table that shards every weight. Used by all trainers.

Every host runs the same program and meets the others in the same collectives. Process 0 alone writes and prints, in
`on_leader` or behind `leads()`; all hosts read what it wrote, so out_dir, replay and checkpoints lie on a file system
that all of them see."""

import importlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from common.basics import DiskError, InputError, write_atomic
from common.replay import Quadruple


def start_hosts(spec: str) -> None:
    """Join the run's other hosts, before any device is used. `--hosts` is auto (what a TPU pod, Slurm under srun, an
    indexed Kubernetes job or Open MPI tell) or ADDRESS:PORT,COUNT,INDEX; InputError if it is neither, or they do not
    meet."""
    if jax.distributed.is_initialized():
        return
    env, vfio, given = os.environ, pathlib.Path("/dev/vfio"), {}
    if spec != "auto":
        try:
            address, count, index = spec.split(",")
            given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        except ValueError:
            raise InputError(f"--hosts {spec}: expected auto or ADDRESS:PORT,COUNT,INDEX") from None
    detected = (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
        or (importlib.util.find_spec("libtpu") and [*pathlib.Path("/dev").glob("accel*"), *vfio.glob("[0-9]*")])
    )
    if not given and not detected:
        return
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as e:
        why = f"--hosts {spec}: the hosts did not meet ({' '.join(str(e).split())[:200]})"
        if isinstance(e, ValueError) or "CTS_LAUNCHER" not in env:
            raise InputError(why) from None
        print(f"error: {why}", file=sys.stderr)  # one may have been late: no bad input, and nothing is lost yet
        sys.exit(128 + signal.SIGTERM)
    if jax.default_backend() == "cpu":  # a CPU program from the cache and one compiled here order collectives otherwise
        jax.config.update("jax_enable_compilation_cache", False)


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(*words) -> None:
    """Print, once per run."""
    if leads():
        print(*words)


def progress(steps, **options):
    """A tqdm bar over steps, shown once per run."""
    return tqdm(steps, disable=not leads(), **{"unit": "step", **options})


def broadcast(value: str) -> str:
    """Process 0's text, on every host."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(value.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(raw))))
    buffer = np.zeros(size, np.uint8)
    if leads():
        buffer[:] = raw
    return multihost_utils.broadcast_one_to_all(buffer).tobytes().decode()


def on_leader(f, *args) -> None:
    """Run f on process 0 while the others wait; its InputError or DiskError is raised on all of them."""
    error = ""
    if leads():
        try:
            f(*args)
        except InputError as e:
            error = f"{'disk' if isinstance(e, DiskError) else 'input'}:{e}"
    kind, _, text = broadcast(error).partition(":")
    if kind:
        raise (DiskError if kind == "disk" else InputError)(text)


def kept(path: pathlib.Path, make: Callable[[], str]) -> str:
    """The text in a file; where there is none it is made, on every host, and written for the next time."""
    text = broadcast(path.read_text(encoding="utf-8") if leads() and path.is_file() else "")
    if not text:
        text = make()
        if leads():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    return text


def put(tree, shardings):
    """The tree on the mesh. On several hosts each hands its own shards over, of values that all of them hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf if leaf.sharding.is_equivalent_to(sharding, leaf.ndim) else jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(one, tree, shardings)


def fetch(tree):
    """The whole tree as NumPy arrays, on every host."""
    whole = lambda a: not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
    gather = lambda a: np.asarray(a) if whole(a) else multihost_utils.process_allgather(a, tiled=True)
    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(gather, tree)


def by_host(score, texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """[B, G] of `score(texts, a quadruple for each)` over B*G texts: every host scores its own prompts, then all know
    all."""
    B, G, hosts = len(quads), len(texts) // len(quads), jax.process_count()
    mine = range(jax.process_index() * B // hosts, (jax.process_index() + 1) * B // hosts)
    scores = np.zeros((B, G), np.float32)
    some = texts[mine.start * G : mine.stop * G]
    scores[mine.start : mine.stop] = np.reshape(score(some, [quads[b] for b in mine for _ in range(G)]), (-1, G))
    return scores if hosts == 1 else multihost_utils.process_allgather(scores).sum(0)


_RULES = {  # leaf name -> mesh axis of each dimension
    "embed": ("model", "data"), "head": ("model", "data"),
    "q": (None, "data", "model", None), "k": (None, "data", "model", None), "v": (None, "data", "model", None),
    "o": (None, "model", None, "data"), "gate": (None, "data", "model"), "up": (None, "data", "model"),
    "down": (None, "model", "data"),
}  # fmt: skip


def make_mesh(spec: str) -> jax.sharding.Mesh:
    """The device mesh of `--mesh DATA,MODEL` ("auto": all devices on data); InputError if it does not fit."""
    devices = jax.devices()
    try:
        data, model = (len(devices), 1) if spec == "auto" else (int(n) for n in spec.split(","))
    except ValueError:
        raise InputError(f"--mesh {spec}: expected two numbers DATA,MODEL or auto") from None
    if data < 1 or model < 1 or data * model != len(devices):
        raise InputError(f"--mesh {spec}: {data} x {model} devices asked for, {len(devices)} are here")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_shardings(mesh: jax.sharding.Mesh) -> tuple[NamedSharding, NamedSharding]:
    """(rows over the data axis, the whole on every device): the layouts of a batch and of what all devices share."""
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def count_micro_batches(mesh: jax.sharding.Mesh, prompts: int, micro_batch: int) -> int:
    """Micro-batches a step of `prompts` prompts, `micro_batch` prompts each (0: one per data device on CPUs, elsewhere
    all at once); InputError where they do not divide evenly over each other and the data devices."""
    data = mesh.shape["data"]
    size = micro_batch or (data if jax.default_backend() == "cpu" else prompts)
    if size < 1 or prompts % data or prompts % size or size % data:
        raise InputError(
            f"--prompts {prompts} (micro-batches of {size}) is not divisible over {data} data devices; choose multiples"
        )
    return prompts // size


def gather(mesh: jax.sharding.Mesh, weights):
    """Weights as a program computes with them, for use under jit: gathered over the data axis once, so that each of its
    devices computes its own rows, and no weight is gathered for every token. Their gradient comes back as they lie at
    rest (fully sharded data parallelism, ZeRO 3: https://arxiv.org/abs/1910.02054)."""

    @jax.custom_vjp
    def gathered(weights):
        return jax.lax.with_sharding_constraint(weights, shard_rule(mesh, weights, at_rest=False))

    at_rest = lambda _, grads: (jax.lax.with_sharding_constraint(grads, shard_rule(mesh, grads)),)
    gathered.defvjp(lambda weights: (gathered(weights), None), at_rest)
    return gathered(weights) if mesh.size > 1 else weights


def shard_rule(mesh: jax.sharding.Mesh, tree, at_rest: bool = True):
    """NamedShardings for a tree of weights or optimizer state by leaf name; axes that do not divide stay whole.

    at_rest=False leaves the data axis out: the layout that programs compute with.
    """

    def one(path, leaf):
        keys = [getattr(p, "key", getattr(p, "name", None)) for p in path]
        axes = next(
            (_RULES[k] for k in reversed(keys) if k in _RULES and len(_RULES[k]) == leaf.ndim), (None,) * leaf.ndim
        )
        keep = [
            a if a and (at_rest or a != "data") and n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*keep))

    return jax.tree_util.tree_map_with_path(one, tree)
