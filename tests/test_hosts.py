"""Several hosts, the mesh, and the table that says how each weight is sharded.

pytest tests/test_hosts.py
"""

import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from naive_decoder import CONFIGS, decoder, split

from common.basics import DiskError, InputError
from common.hosts import by_host, count_micro_batches, make_mesh, on_leader, shard_rule, start_hosts


def test_what_the_leader_raises_keeps_its_kind():
    """A full disk is no bad input: it ends with another exit code, and launchers try again."""
    for kind in (InputError, DiskError):
        with pytest.raises(InputError, match=r"^--out: a:b$") as error:
            on_leader(lambda kind=kind: (_ for _ in ()).throw(kind("--out: a:b")))
        assert type(error.value) is kind


def specs(mesh, tree, **options):
    return jax.tree.map(lambda s: tuple(s.spec), shard_rule(mesh, tree, **options))


def test_shard_rule_leaves_undivided_axes_whole():
    """On a (4, 2) mesh: D=12 and H=6 against 4 and 2, V=17 against 2, N=4 and K=1 against 2, F=10 against both."""
    mesh = AbstractMesh((4, 2), ("data", "model"))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {
        "embed": shape(17, 12), "head": shape(18, 13), "final_norm": shape(12), "scale": shape(),
        "blocks": {"q": shape(2, 12, 4, 6), "k": shape(2, 12, 1, 6), "o": shape(2, 4, 6, 12), "gate": shape(2, 12, 10),
                   "down": shape(2, 10, 14), "q_norm": shape(2, 6), "q_bias": shape(2, 4, 6)},
    }  # fmt: skip
    got = specs(mesh, tree)
    assert got["embed"] == (None, "data") and got["head"] == ("model", None)
    assert got["final_norm"] == (None,) and got["scale"] == ()
    assert got["blocks"] == {
        "q": (None, "data", "model", None), "k": (None, "data", None, None), "o": (None, "model", None, "data"),
        "gate": (None, "data", "model"), "down": (None, "model", None), "q_norm": (None, None),
        "q_bias": (None, None, None),
    }  # fmt: skip
    assert specs(mesh, {"a": {"q": tree["blocks"]["q"]}}, at_rest=False)["a"]["q"] == (None, None, "model", None)


def test_shard_rule_finds_the_weights_of_a_real_tree():
    """Model and optimizer state: every matrix is sharded as its name says, counters stay whole."""
    mesh = AbstractMesh((2, 2), ("data", "model"))
    params = split(decoder(CONFIGS["all"]))[1]
    flat = jax.tree_util.tree_leaves_with_path(shard_rule(mesh, (params, optax.adamw(1.0).init(params))))
    downs = [tuple(s.spec) for path, s in flat if "'down'" in str(path)]
    assert downs == [(None, "model", "data")] * 3  # the weight and both moments
    assert all(tuple(s.spec) == () for path, s in flat if "count" in str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("4", "--mesh 4: expected two numbers DATA,MODEL or auto"),
        ("two,1", "--mesh two,1: expected two numbers"),
        ("1,1,1", "expected two numbers"),
        ("", "expected two numbers"),
        ("3,1", "3 x 1 devices asked for, 4 are here"),
        ("0,4", "0 x 4 devices asked for"),
        ("-2,-2", "-2 x -2 devices asked for"),
    ],
)
def test_make_mesh_refuses(spec, message, monkeypatch):
    """On four devices (faked: the refusal comes before any is used)."""
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    with pytest.raises(InputError, match=message):
        make_mesh(spec)


@pytest.mark.parametrize(
    ("data", "prompts", "micro", "expected"),
    [
        (4, 16, 0, 4),  # a CPU's own choice: one prompt per device at a time
        (1, 6, 0, 6),
        (1, 6, 3, 2),
        (4, 16, 16, 1),
        (4, 6, 0, "--prompts 6 .* is not divisible over 4 data devices"),
        (1, 16, 3, "micro-batches of 3"),
        (4, 16, 2, "micro-batches of 2"),
        (1, 16, 32, "micro-batches of 32"),
        (1, 16, -4, "micro-batches of -4"),
    ],
)
def test_count_micro_batches(data, prompts, micro, expected):
    mesh = types.SimpleNamespace(shape={"data": data, "model": 1})
    if isinstance(expected, int):
        assert count_micro_batches(mesh, prompts, micro) == expected
    else:
        with pytest.raises(InputError, match=expected):
            count_micro_batches(mesh, prompts, micro)


@pytest.mark.parametrize("spec", ["auto", "1,1"])
def test_make_mesh(spec):
    if len(jax.devices()) != 1:
        pytest.skip("needs exactly one device")
    assert dict(make_mesh(spec).shape) == {"data": 1, "model": 1}


def test_hosts_flag_is_checked():
    with pytest.raises(InputError, match="--hosts here: expected auto or ADDRESS:PORT,COUNT,INDEX"):
        start_hosts("here")


def test_hosts_that_did_not_meet_are_no_bad_input_to_a_launcher(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: (_ for _ in ()).throw(RuntimeError("too late")))
    monkeypatch.delenv("CTS_LAUNCHER", raising=False)
    with pytest.raises(InputError, match="the hosts did not meet"):
        start_hosts("a:1,2,0")
    monkeypatch.setenv("CTS_LAUNCHER", "cell.sh")
    with pytest.raises(SystemExit, match="143"):
        start_hosts("a:1,2,0")
    assert "the hosts did not meet (too late)" in capsys.readouterr().err


def test_by_host_scores_every_text_once():
    calls = []
    score = lambda texts, quads: calls.extend(zip(texts, quads)) or [float(text) for text in texts]
    assert by_host(score, ["1", "2", "3", "4"], ["a", "b"]).tolist() == [[1, 2], [3, 4]]
    assert calls == [("1", "a"), ("2", "a"), ("3", "b"), ("4", "b")]
