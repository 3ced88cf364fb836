"""Schedules, masks and clusters equal to the TensorFlow Model Optimization Toolkit's, by figures recorded from it.

Source: tensorflow-model-optimization 0.8.1 on tensorflow 2.21.0 and tf-keras 2.21.0; the call is beside each table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.layouts import Channels
from jaxcomp.pruning.schedules import constant, polynomial
from jaxcomp.sharing.kmeans import inits
from jaxcomp.sharing.kmeans.points import points_of
from jaxcomp.sharing.leaves import trained_tables, with_tables
from tests.figures import TIES, W, digits, mask, normal
from tests.marks import quick

X = normal(200)
CONV = normal(2, 2, 8, 3, seed=1)

# PolynomialDecay(initial, final, begin, end, power, frequency)(step): the sparsity at some steps, and the steps below
# 60 that are due.
# fmt: off
POLYNOMIALS = {
    (0.0, 0.8, 6, 26, 3, 4): (
        {0: 0.0, 6: 0.0, 8: 0.2168001, 10: 0.3904, 12: 0.5256, 16: 0.7, 20: 0.7784, 24: 0.7992, 26: 0.8, 30: 0.8},
        [6, 10, 14, 18, 22, 26],
    ),
    (0.2, 0.9, 5, 25, 2, 7): (
        {4: 0.2, 6: 0.26825, 8: 0.39425, 12: 0.60425, 18: 0.81425, 22: 0.88425, 24: 0.89825, 26: 0.9, 30: 0.9},
        [5, 12, 19],
    ),
    (0.1, 0.6, 0, 10, 1, 5): ({0: 0.1, 1: 0.15, 5: 0.35, 9: 0.55, 10: 0.6, 11: 0.6}, [0, 5, 10]),
    (0.5, 0.75, 3, 11, 0.5, 1): (
        {3: 0.5, 4: 0.5161464, 6: 0.5523577, 8: 0.5969069, 10: 0.6616117, 11: 0.75, 13: 0.75}, list(range(3, 12)),
    ),
}
# fmt: on
# ConstantSparsity(0.3, begin_step, end_step, frequency): what is due; end_step -1 is for ever.
CONSTANTS = {
    (5, 9, 2): [5, 7, 9],
    (5, None, 6): [5, 11, 17, 23, 29, 35, 41, 47, 53, 59],
    (5, None, 20): [5, 25, 45],
}


@pytest.mark.parametrize("args", POLYNOMIALS)
def test_polynomial_decay(args) -> None:
    initial, final, begin, end, power, every = args
    plan = polynomial(final, initial=initial, begin=begin, end=end, power=power, every=every)
    values, due = POLYNOMIALS[args]
    assert {step: float(plan(step)) for step in values} == pytest.approx(values, abs=1e-6)
    assert [step for step in range(60) if plan.due(step)] == due


@pytest.mark.parametrize("args", CONSTANTS)
def test_constant_sparsity(args) -> None:
    begin, end, every = args
    plan = constant(0.3, begin=begin, end=end, every=every)
    assert float(plan(7)) == pytest.approx(0.3)
    assert [step for step in range(60) if plan.due(step)] == CONSTANTS[args]


def test_masks_over_a_schedule() -> None:
    """prune_low_magnitude(Dense, PolynomialDecay(0.0, 0.8, 2, 8, power=3, frequency=3)): zeros of W at each step."""
    plan = polynomial(0.8, begin=2, end=8, every=3)
    t = plan.gate(jc.prune(plan))
    params = {"kernel": jnp.asarray(W)}
    state, zeros = t.init(params), []
    for step in range(12):
        state = t.update(state, params, step=jnp.int32(step))
        zeros.append(int((jc.materialize(t.apply(state, params))["kernel"] == 0).sum()))
    assert zeros == [0, 0, 0, 0, 0, 67, 67, 67, 77, 77, 77, 77]


# Pruning(…, ConstantSparsity(sparsity, 1), block_size=(1, 1), …).conditional_mask_update() of W.
MAGNITUDE = {
    0.0: "ffffffffffffffffffffffff",
    0.3: "2bebb6ba4bf3d6ff3dfd5fdd",
    0.5: "03cb16b203f3d27635b519d5",
    0.9: "000800000001800224210050",
}
# The same with block_size and block_pooling_type "AVG" and "MAX", sparsity 0.5.
BLOCKS = {
    (2, 3): ("e00e001c71c7e3fe3ffc0fc0", "e00e00007007e3fe3fff8ff8"),
    (4, 4): ("0f00f00f00f0ff0ff0ff0ff0", "f00f00f00f000ff0ff0ff0ff"),
    (3, 4): ("000000000ff0ff0ff0ff0ff0", "f00f00f0000f00f00fff0ff0"),  # nine blocks, of which it keeps four
}
# The same with sparsity_m_by_n=(m, n): of W and of CONV.
M_BY_N = {
    (2, 4): ("47ce969013ebc2262c3d39dd", "5e1a33c39dc117a31ed43e23"),
    (1, 4): ("4fefd7b2dffbd6e6bdbd3fff", "df9f73c7ffd5f7a77ed5fee7"),
    (5, 8): ("02ca060001e3c0263c3d1dd9", "581a23c254c113a30a543823"),
}
# The same with (2, 4), of the first six and seven rows of W.
UNEVEN = {6: "47ce969013ebffffff", 7: "47ce969013ebd6e6bdbd30"}


@pytest.mark.parametrize("sparsity", MAGNITUDE)
def test_magnitude(sparsity) -> None:
    assert digits(mask(jc.prune(sparsity), W)) == MAGNITUDE[sparsity]


def test_theirs_rounds_what_is_kept_and_keeps_one_at_least_and_all_ties() -> None:
    """At 0.999 of 96 theirs keeps one; at half of seven it keeps four; of 96 with ties, at a half, 79."""
    assert mask(jc.prune(0.999), W).sum() == 0
    seven = np.arange(1.0, 8.0, dtype=np.float32)[None]
    assert mask(jc.prune(0.5), seven).sum() == 3
    ours, size = mask(jc.prune(0.5), TIES), np.abs(TIES)
    assert ours.sum() == 48
    assert (size >= size[ours].min()).sum() == 79


@pytest.mark.parametrize("shape", BLOCKS)
def test_blocks(shape) -> None:
    for pool, want in zip(("mean", "max"), BLOCKS[shape], strict=True):
        amount = 5 if shape == (3, 4) else 0.5
        assert digits(mask(jc.prune(amount, structure=jc.pruning.Block(shape, pool=pool)), W)) == want


@pytest.mark.parametrize("m_by_n", M_BY_N)
def test_m_by_n(m_by_n) -> None:
    m, n = m_by_n
    for w, want in zip((W, CONV), M_BY_N[m_by_n], strict=True):
        assert digits(mask(jc.prune(structure=jc.NM(n - m, n, axis=-2)), w)) == want


def test_m_by_n_where_n_does_not_divide() -> None:
    for rows, want in UNEVEN.items():
        with pytest.warns(UserWarning, match=f"groups of 4 do not divide axis 0 of '.*', {rows} long"):
            assert digits(mask(jc.prune(structure=jc.NM(2, 4)), W[:rows])) == want


# CentroidsInitializerFactory.get_centroid_initializer(LINEAR)(X, k).get_cluster_centroids(), then DENSITY_BASED.
# fmt: off
LINEAR = {
    4: (-2.398233, -0.931358, 0.535517, 2.002393),
    8: (-2.398233, -1.769572, -1.140911, -0.512251, 0.11641, 0.745071, 1.373732, 2.002393),
}
DENSITY = {
    4: (-2.255798, -0.274138, 0.488039, 2.012393),
    8: (-2.255798, -1.036315, -0.426573, -0.121702, 0.335603, 0.640474, 1.09778, 2.012393),
}
# Of CONV, k = 3, cluster_per_channel=True: a row a channel.
LINEAR_CHANNELS = (
    (-2.711163, -0.296662, 2.117839), (-1.889013, -0.297475, 1.294064), (-2.250854, -0.622065, 1.006724),
)
# RANDOM, KMEANS_PLUS_PLUS, k = 6.
RANDOM = (0.93637, -1.370635, -2.188802, -0.113366, -1.864238, 0.741386)
PLUS_PLUS = (0.382757, -0.735483, 1.066935, -1.40152, -0.129614, 1.583473)
# fmt: on


@pytest.mark.parametrize("k", LINEAR)
def test_linear_centroids(k) -> None:
    np.testing.assert_allclose(inits.linear.fn(points_of(jnp.asarray(X)), k, None), LINEAR[k], atol=1e-6)


@pytest.mark.parametrize("k", DENSITY)
def test_density_centroids_are_theirs_to_one_cell(k) -> None:
    """Theirs is the first of 30 even values, from 0.01 below the least to 0.01 above the greatest weight, not below."""
    got = np.asarray(inits.density.fn(points_of(jnp.asarray(X)), k, None))
    grid = np.linspace(X.min() - 0.01, X.max() + 0.01, 30)
    above = [grid[np.searchsorted(grid, v)] for v in got]
    np.testing.assert_allclose(above, DENSITY[k], atol=1e-5)


def test_drawn_centroids_have_theirs_properties() -> None:
    """RANDOM lies in the range; k-means++ gives weights, each once. Ours are ascending."""
    points = points_of(jnp.asarray(X))
    for table in (RANDOM, inits.random.fn(points, 6, jax.random.key(0))):
        assert X.min() <= np.min(table)
        assert np.max(table) <= X.max()
    for table in (PLUS_PLUS, inits.plus_plus.fn(points, 6, jax.random.key(0))):
        assert np.abs(np.asarray(table)[:, None] - X).min(1).max() < 1e-6
        assert np.unique(table).size == 6


# ClusteringAlgorithm(centroids, aggregation) with LINEAR centroids: get_pulling_indices, and the gradient of
# sum(get_clustered_weight * G) by the centroids; by the weights it is G. Of W, k = 4, and of CONV by channel, k = 3.
W_CODES = "222212321112011111222312221112112222122313322133332122122211113121332022213112232111122313131122"
W_GRADIENTS = {
    "sum": (-0.255031, -0.512347, 6.855371, -4.293315),
    "mean": (-0.127515, -0.013847, 0.171384, -0.252548),
}
CONV_CODES = "122122122112111111111122001112201222101101111111122121112101111111120121122110112101121112111120"
CONV_GRADIENTS = {
    "sum": ((-0.182839, -4.316397, -0.30611), (2.990246, -2.093499, -2.503082), (-3.90967, 1.210971, 0.751454)),
    "mean": ((-0.182839, -0.148841, -0.153055), (0.498374, -0.149536, -0.20859), (-1.303223, 0.071234, 0.062621)),
}
CLUSTERED = {
    "one table": (W, normal(8, 12, seed=2), 4, jc.core.Tensor(), W_CODES, W_GRADIENTS),
    "by channel": (CONV, normal(2, 2, 8, 3, seed=3), 3, Channels(-1), CONV_CODES, CONV_GRADIENTS),
}


@pytest.mark.parametrize("name", quick(CLUSTERED, "one table"))
def test_codes_and_aggregated_gradients(name) -> None:
    w, g, k, per, codes, gradients = CLUSTERED[name]
    t = jc.share(k, init=inits.linear, per=per, iterations=0)
    params = {"kernel": jnp.asarray(w)}
    state = t.init(params)
    seen = t.apply(state, params)
    assert "".join(map(str, np.asarray(seen["kernel"].codes).reshape(-1))) == codes
    if per == Channels(-1):
        np.testing.assert_allclose(seen["kernel"].table.T, LINEAR_CHANNELS, atol=1e-6)
    of_weights = jax.grad(lambda p: jnp.sum(jc.materialize(t.apply(state, p))["kernel"] * g))(params)["kernel"]
    np.testing.assert_array_equal(of_weights, g)
    for aggregation, want in gradients.items():
        trained, fixed = trained_tables(seen, aggregation)
        loss = lambda x: jnp.sum(jc.materialize(with_tables(x, fixed))["kernel"] * g)  # noqa: B023, E731
        got = jax.grad(loss)(trained)["kernel"].table
        np.testing.assert_allclose(got.T.reshape(np.shape(want)), want, atol=5e-6)


@pytest.mark.slow
def test_preserved_zeros() -> None:
    """cluster_weights(W where |w| >= 0.6 else 0, 6 clusters, LINEAR, preserve_sparsity=True).

    Both give one cluster to the 39 zeros and no other weight. Theirs deals the other five to the two signs in
    proportion to their weights, and starts each sign by itself; ours starts all nonzero weights together.
    """
    theirs = (-2.325031, -0.617907, 0.0, 0.630412, 1.316402, 2.002393)
    sparse = np.where(np.abs(W) < 0.6, 0, W).astype(np.float32)
    t = jc.share(6, init=inits.linear, preserve_zeros=True, iterations=0)
    params = {"kernel": jnp.asarray(sparse)}
    state = t.init(params)
    dense = np.asarray(jc.materialize(t.apply(state, params))["kernel"])
    assert ((dense == 0) == (sparse == 0)).all()
    assert (dense == 0).sum() == 39
    assert np.unique(dense).size <= 6
    np.testing.assert_allclose(state.tables["kernel"][:, 0], [0, *np.linspace(theirs[0], theirs[-1], 5)], atol=1e-6)
    for sign, want in ((sparse < 0, theirs[:2]), (sparse > 0, theirs[3:])):
        one = inits.linear.fn(points_of(jnp.asarray(sparse[sign])), len(want), None)
        np.testing.assert_allclose(one, want, atol=1e-6)
