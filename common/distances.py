"""One point per reasoning step, and three distances between two such sequences of different length under masks. Used by
b5."""

import jax
import jax.numpy as jnp


def pool_steps(hidden_BTD, step_BJT):
    """Mean hidden state of each step's tokens [B, J, D] in float32; steps without tokens give 0.

    hidden [[1], [3], [5]] with step tokens [[1, 1, 0], [0, 0, 1], [0, 0, 0]] gives [[2], [5], [0]].
    """
    total_BJD = jnp.einsum("BJT,BTD->BJD", step_BJT, hidden_BTD.astype(jnp.float32))
    return total_BJD / jnp.maximum(step_BJT.sum(-1), 1.0)[..., None]


def sinkhorn_distance(a_JR, b_KR, mass_J, mass_K, epsilon: float, iterations: int, tau: float = 1.0):
    """Debiased Sinkhorn divergence of two weighted point sets (masses are scaled to sum to 1, padding has 0), whether
    it converged within `iterations`, and the share of the transported mass that goes from a step to another one (0: the
    plan is the identity, and the divergence as good as L2). tau below 1 relaxes the marginals. Fixed float epsilon: a
    data-dependent one would let the padding change the result. b is a constant.
    """
    from ott.geometry import pointcloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    some = (mass_J.sum() > 0) & (mass_K.sum() > 0)
    w_J, w_K = jnp.where(some, mass_J, 1.0), jnp.where(some, mass_K, 1.0)
    w_J, w_K = w_J / w_J.sum(), w_K / w_K.sum()
    value, out = sinkhorn_divergence(
        pointcloud.PointCloud, a_JR, jax.lax.stop_gradient(b_KR), a=w_J, b=w_K, epsilon=epsilon,
        solve_kwargs={"threshold": 1e-3, "max_iterations": iterations, "tau_a": tau, "tau_b": tau},
    )  # fmt: skip
    (f_J, g_K), same = jax.lax.stop_gradient(out.potentials[0]), min(len(w_J), len(w_K))
    stay_J = jnp.exp((f_J[:same] + g_K[:same] - ((a_JR[:same] - b_KR[:same]) ** 2).sum(-1)) / epsilon)
    moved = jnp.where(some, 1.0 - jax.lax.stop_gradient(jnp.where(w_J[:same] * w_K[:same] > 0, stay_J, 0.0)).sum(), 0.0)
    return jnp.where(some, value, 0.0), out.converged[0].astype(jnp.float32), moved


def soft_dtw(cost_JK, n, m, gamma: float):
    """Soft-DTW (https://arxiv.org/abs/1703.01541) of the leading n x m block of a cost matrix, by anti-diagonals.

    BIG is finite on purpose: with BIG / gamma beyond 1e11 the value stays right and the gradient becomes NaN.
    """
    J, K = cost_JK.shape
    BIG = 1e6
    k_D = jnp.arange(J + K - 1)[:, None] - jnp.arange(J)[None, :]  # column of cell (diagonal d, row j)
    skewed_DJ = jnp.where((k_D >= 0) & (k_D < K), jnp.take_along_axis(cost_JK.T, jnp.clip(k_D, 0, K - 1), 0), BIG)

    def diagonal(carry, cost_J):
        before_J, last_J, d = carry  # the two previous anti-diagonals, by row
        shift = lambda a, fill: jnp.concatenate([jnp.full(1, fill), a[:-1]])
        corner_J = shift(before_J, BIG).at[0].set(jnp.where(d == 0, 0.0, BIG))
        options = jnp.stack([last_J, shift(last_J, BIG), corner_J])
        new_J = jnp.minimum(cost_J - gamma * jax.nn.logsumexp(-options / gamma, axis=0), BIG)
        return (last_J, new_J, d + 1), new_J

    start = (jnp.full(J, BIG), jnp.full(J, BIG), 0)
    _, table_DJ = jax.lax.scan(diagonal, start, skewed_DJ)
    return table_DJ[n + m - 2, n - 1]


def soft_dtw_distance(a_JR, b_KR, mass_J, mass_K, gamma: float):
    """Debiased soft-DTW divergence of the points with mass of two sequences, in their order, per step of the longest
    possible path; how much mass each has is not read (a critique's is even).

    Returns (value, 1, 0): there is nothing to converge, and no plan.
    """
    first = lambda x_JR, mass_J: x_JR[jnp.argsort(mass_J <= 0, stable=True)]
    a_JR, b_KR, n, m = first(a_JR, mass_J), first(b_KR, mass_K), (mass_J > 0).sum(), (mass_K > 0).sum()
    cost = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)
    some, n, m = (n > 0) & (m > 0), jnp.maximum(n, 1), jnp.maximum(m, 1)
    self_a, self_b = soft_dtw(cost(a_JR, a_JR), n, n, gamma), soft_dtw(cost(b_KR, b_KR), m, m, gamma)
    value = soft_dtw(cost(a_JR, b_KR), n, m, gamma) - 0.5 * (self_a + self_b)
    return jnp.where(some, value / (n + m - 1), 0.0), jnp.float32(1.0), jnp.float32(0.0)


def l2_distance(a_JR, b_KR, mass_J, mass_K):
    """Mean squared distance of the steps that both have, index by index, weighted by the geometric mean of the masses.

    Returns (value, 1, 0): there is nothing to converge, and no mass moves.
    """
    both_J = (mass_J * mass_K) ** 0.5
    value = (((a_JR - b_KR) ** 2).sum(-1) * both_J).sum() / jnp.maximum(both_J.sum(), 1e-9)
    return value, jnp.float32(1.0), jnp.float32(0.0)
