"""Distances of padded trajectories: by hand, against naive oracles in NumPy, and by properties.

pytest tests/test_distances.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import floats
from scipy.optimize import linear_sum_assignment

import b5_cts as b5
from common.distances import l2_distance, pool_steps, sinkhorn_distance, soft_dtw, soft_dtw_distance


def test_pool_steps():
    out = pool_steps(jnp.array([[[1.0], [3.0], [5.0]]]), floats([[1, 1, 0], [0, 0, 1], [0, 0, 0]]))
    np.testing.assert_array_equal(out, [[[2], [5], [0]]])
    rng = np.random.default_rng(3)
    hidden, step = rng.standard_normal((2, 6, 4)), (rng.random((2, 3, 6)) < 0.5).astype(np.float32)
    out = pool_steps(jnp.asarray(hidden, jnp.bfloat16), step)
    assert out.dtype == jnp.float32
    for b in range(2):
        for j in range(3):
            rows = hidden[b][step[b, j] == 1]
            np.testing.assert_allclose(out[b, j], rows.mean(0) if len(rows) else np.zeros(4), atol=0.02)


J, R = 6, 3
DISTANCES = {
    "sinkhorn": functools.partial(sinkhorn_distance, epsilon=0.05, iterations=200),
    "soft_dtw": functools.partial(soft_dtw_distance, gamma=0.1), "l2": l2_distance,
}  # fmt: skip


@functools.cache
def distance_and_gradient(name: str, **options):
    fn = functools.partial(DISTANCES[name], **options)
    return jax.jit(jax.value_and_grad(lambda *a: fn(*a)[0]))


def unit_points(seed: int, n: int = J) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, R))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def steps(n: int, width: int = J) -> np.ndarray:
    return (np.arange(width) < n).astype(np.float32)


def garbage(points: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The same points with large random numbers from row n on."""
    out = points.copy()
    out[n:] = 30 * np.random.default_rng((5, seed)).standard_normal(out[n:].shape)
    return out


@pytest.mark.parametrize("name", DISTANCES)
def test_padding_does_not_change_a_distance(name):
    """Value and gradient with garbage in the pads = those of the bare points, and no gradient on the pads."""
    a, b, n, m = unit_points(0), unit_points(1), 4, 3
    run = distance_and_gradient(name)
    shared = min(n, m) if name == "l2" else None  # l2 takes arrays of one length
    bare_value, bare_grad = run(a[: shared or n], b[: shared or m], steps(n, shared or n), steps(m, shared or m))
    for seed in range(3):
        value, grad = run(garbage(a, n, seed), garbage(b, m, seed + 9), steps(n), steps(m))
        assert value == pytest.approx(float(bare_value), abs=1e-5) and value > 0.05
        np.testing.assert_allclose(grad[: len(bare_grad)], bare_grad, atol=1e-4)
        np.testing.assert_array_equal(grad[n:], 0)
    assert np.abs(bare_grad).max() > 0.01


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_empty_rows_are_zero_and_finite(name, n, m):
    value, grad = distance_and_gradient(name)(
        garbage(unit_points(0), n, 0), garbage(unit_points(1), m, 1), steps(n), steps(m)
    )
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", DISTANCES)
def test_self_distance_is_zero(name):
    """Debiased: a sequence is at distance 0 from itself, where the gradient is 0 too."""
    a = unit_points(0)
    value, grad = distance_and_gradient(name)(garbage(a, 4, 0), garbage(a, 4, 1), steps(4), steps(4))
    assert value == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(grad[:4], 0, atol=2e-3)


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_symmetric(name):
    run, a, b = distance_and_gradient(name), unit_points(0), unit_points(1)
    there, back = run(a, b, steps(5), steps(3))[0], run(b, a, steps(3), steps(5))[0]
    assert there == pytest.approx(float(back), abs=2e-3)


def test_sinkhorn_equals_assignment_at_small_epsilon():
    """Equal-size sets, half of the array padding: the optimal transport cost is that of the best matching."""
    run = distance_and_gradient("sinkhorn", epsilon=0.02)
    for seed in range(4):
        n = 3 + seed
        a, b = garbage(unit_points(seed), n, 0), garbage(unit_points(seed + 20), n, 1)
        cost = ((a[:n, None] - b[None, :n]) ** 2).sum(-1)
        best = cost[linear_sum_assignment(cost)].mean()
        value, grad = run(a, b, steps(n), steps(n))
        assert value == pytest.approx(best, rel=0.01)
        # Danskin: each point is pulled straight to its partner
        partner = b[linear_sum_assignment(cost)[1]]
        np.testing.assert_allclose(grad[:n], 2 * (a[:n] - partner) / n, atol=0.05)


def test_sinkhorn_gradient_equals_finite_differences():
    run, a, b = distance_and_gradient("sinkhorn"), unit_points(0), unit_points(1)
    along = np.random.default_rng(6).standard_normal(a.shape).astype(np.float32)
    _, grad = run(a, b, steps(5), steps(4))
    up, down = (run(a + h * along, b, steps(5), steps(4))[0] for h in (0.02, -0.02))
    assert float((grad * along).sum()) == pytest.approx(float(up - down) / 0.04, rel=0.05, abs=0.01)


def test_sinkhorn_says_whether_it_converged():
    run = jax.jit(lambda *a: DISTANCES["sinkhorn"](*a)[1])
    assert run(unit_points(0), unit_points(1), steps(5), steps(4)) == 1
    assert run(30 * unit_points(0), 30 * unit_points(1), steps(5), steps(4)) == 0


def test_unbalanced_sinkhorn_forgives_an_outlier():
    """tau below 1 lets mass stay at home: a far outlier costs less than in balanced transport."""
    a, b = unit_points(0), unit_points(0)
    b[0] += 2
    balanced = distance_and_gradient("sinkhorn")(a, b, steps(6), steps(6))[0]
    relaxed = distance_and_gradient("sinkhorn", tau=0.9)(a, b, steps(6), steps(6))[0]
    assert 0 < relaxed < 0.8 * balanced


def naive_soft_dtw(cost: np.ndarray, gamma: float) -> float:
    """The textbook double loop in float64; the sums run inside the soft minimum."""
    n, m = cost.shape
    table = np.full((n + 1, m + 1), np.inf)
    table[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            before = [v for v in (table[i - 1, j], table[i, j - 1], table[i - 1, j - 1]) if v < np.inf]
            low = min(before)
            table[i, j] = cost[i - 1, j - 1] + low - gamma * math.log(sum(math.exp((low - v) / gamma) for v in before))
    return float(table[n, m])


@functools.cache
def soft_dtw_rows():
    one = jax.value_and_grad(lambda cost, n, m, gamma: soft_dtw(cost, n, m, gamma))
    return jax.jit(jax.vmap(one, (0, 0, 0, None)))


@pytest.mark.parametrize("gamma", [0.01, 0.1])
def test_soft_dtw_equals_naive(gamma):
    """All lengths 1..5 x 1..5 in one padded 6 x 7 matrix with garbage in the pads; gradient by finite differences."""
    rng = np.random.default_rng(7)
    sizes = np.array([(n, m) for n in range(1, 6) for m in range(1, 6)])
    costs = rng.uniform(-100, 100, size=(25, 6, 7)).astype(np.float32)
    for cost, (n, m) in zip(costs, sizes):
        cost[:n, :m] = rng.uniform(0, 2, size=(n, m))
    values, grads = soft_dtw_rows()(costs, *sizes.T, gamma)
    assert np.isfinite(grads).all()
    for cost, (n, m), value, grad in zip(costs, sizes, values, grads):
        real, h = cost[:n, :m].astype(float), 1e-6
        assert value == pytest.approx(naive_soft_dtw(real, gamma), abs=1e-4)
        expected = np.zeros((6, 7))
        for i, j in np.ndindex(n, m):
            up, down = real.copy(), real.copy()
            up[i, j], down[i, j] = up[i, j] + h, down[i, j] - h
            expected[i, j] = (naive_soft_dtw(up, gamma) - naive_soft_dtw(down, gamma)) / (2 * h)
        np.testing.assert_allclose(grad[:n, :m], expected[:n, :m], atol=1e-3)
        np.testing.assert_array_equal(np.where(expected == 0, 0, grad), grad * (expected != 0))
        assert not grad[n:].any() and not grad[:, m:].any()


def test_soft_dtw_distance_by_naive_parts():
    """(sdtw(a, b) - sdtw(a, a) / 2 - sdtw(b, b) / 2) / (n + m - 1) on squared distances."""
    a, b, n, m = unit_points(0), unit_points(1), 4, 3
    sdtw = lambda x, y: naive_soft_dtw(((x[:, None] - y[None]) ** 2).sum(-1).astype(float), 0.1)
    x, y = a[:n], b[:m]
    expected = (sdtw(x, y) - 0.5 * sdtw(x, x) - 0.5 * sdtw(y, y)) / (n + m - 1)
    assert distance_and_gradient("soft_dtw")(a, b, steps(n), steps(m))[0] == pytest.approx(expected, abs=1e-5)


def test_l2_distance_by_hand():
    """Steps 0 and 1 are in both: (25 + 1) / 2."""
    a, b = floats([0, 0], [1, 0], [9, 9]), floats([3, 4], [1, 1], [0, 0])
    assert l2_distance(a, b, floats(1, 1, 1), floats(1, 1, 0))[0] == 13


@pytest.mark.parametrize("name", DISTANCES)
def test_points_without_mass_do_not_count(name):
    """Mass on steps 1 and 3 alone: the distance is that of the two points, whatever stands between them."""
    a, b = unit_points(0), unit_points(1)
    mass = floats(0, 0.5, 0, 0.5, 0, 0)
    run = distance_and_gradient(name)
    value, grad = run(a, b, mass, mass)
    picked, _ = run(a[[1, 3]], b[[1, 3]], floats(1, 1), floats(1, 1))
    assert value == pytest.approx(float(picked), abs=1e-5) and value > 0.05
    grad = np.asarray(grad)
    assert not grad[[0, 2, 4, 5]].any() and np.abs(grad[[1, 3]]).max() > 0.01


@pytest.mark.parametrize("name", DISTANCES)
def test_descent_on_the_distance_brings_trajectories_together(name):
    """Thirty steps of gradient descent on a trajectory, with the time channel: it ends near the target.

    For Sinkhorn in any order: the time channel weighs less than the points.
    """
    target, start, mask = unit_points(1, 4) * R**0.5, unit_points(0, 4) * R**0.5, jnp.ones(4)
    loss = lambda x: DISTANCES[name](b5.with_time(x, mask), b5.with_time(target, mask), mask, mask)[0]
    run = jax.jit(jax.value_and_grad(loss))
    x, first = start, run(start)[0]
    for _ in range(30):
        x = x - (2.5 if name == "soft_dtw" else 3.0) * run(x)[1]
    last = run(x)[0]

    def apart(x):
        cost = ((np.asarray(x)[:, None] - target[None]) ** 2).sum(-1)
        return cost[linear_sum_assignment(cost)].mean() if name == "sinkhorn" else np.diag(cost).mean()

    assert last < 0.2 * first
    assert apart(x) < 0.2 * apart(start)
