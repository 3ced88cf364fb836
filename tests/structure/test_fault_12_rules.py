"""Fault 12: rules of what mixes whole dimensions, and the reasons why something stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.structure import channel_groups, check_shrink, plan
from tests.marks import quick
from tests.structure.models import normal, plain
from tests.structure.test_architectures import found


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def gram(h):
    """(n, c) -> (c, 3, 3): a positive definite matrix for each channel."""
    rows = h.T.reshape(h.shape[1], 3, -1)
    return rows @ rows.transpose(0, 2, 1) + jnp.eye(3)


BATCHED = {
    "cholesky": lambda h: jnp.linalg.cholesky(gram(h))[:, 2, 0],
    "eigh": lambda h: jnp.linalg.eigh(gram(h))[0][:, 1],
    "svd": lambda h: jnp.linalg.svd(gram(h), compute_uv=False)[:, 0],
    "qr": lambda h: jnp.linalg.qr(gram(h))[1][:, 0, 1],
    "lu": lambda h: lax.linalg.lu(gram(h))[0][:, 1, 1],
    "triangular_solve": lambda h: lax.linalg.triangular_solve(gram(h), gram(h) * 2 - jnp.eye(3))[:, 0, 1],
    "fft": lambda h: jnp.abs(jnp.fft.fft(h, axis=0))[1],
    "approx_top_k": lambda h: lax.approx_max_k(h, 2, reduction_dimension=0)[0][1],
    "reduce": lambda h: lax.reduce((h, 2 * h), (1.0, 0.0), lambda a, b: (a[0] * b[0], a[1] + b[1]), (0,))[1],
    "sort": lambda h: jnp.sort(h, axis=0)[1],
    "select": lambda h: jnp.select([h > 1, h < -1], [h, 2 * h], h**2).sum(0),
    "diagonal": lambda h: jnp.trace(gram(h), axis1=1, axis2=2),
}


@pytest.mark.parametrize("name", quick(BATCHED, "fft", "approx_top_k", "reduce", "diagonal"))
def test_fault_12_channels_that_are_batches_go(name):
    def fn(p, x):
        return BATCHED[name](x @ p["w"]) @ p["v"]

    params, x = plain({"w": (3, 5), "v": (5, 2)}), normal(6, 3)
    groups = channel_groups(fn)(params, x)
    assert found(groups) == [(5, frozenset({"w:1", "v:0"}))]
    assert not groups.unknown
    half = plan(groups, params, sparsity=0.4)
    assert check_shrink(fn, half, params, x) < 1e-4
    kept = half.kept[0]
    cut = {"w": params["w"][:, kept], "v": params["v"][kept]}
    rest = np.setdiff1d(np.arange(5), kept)
    zeroed = {"w": params["w"].at[:, rest].set(0), "v": params["v"].at[rest].set(0)}
    np.testing.assert_allclose(fn(cut, x), fn(zeroed, x), atol=1e-4)


MIXED = {
    "fft": lambda h: jnp.abs(jnp.fft.fft(h)),
    "cholesky": lambda h: jnp.linalg.cholesky(h[:5].T @ h[:5] + jnp.eye(5)),
    "approx_top_k": lambda h: lax.approx_max_k(h, 5)[0],
    "sort": lambda h: jnp.sort(h),
    "cumsum": lambda h: jnp.cumsum(h, axis=1),
    "reduce_max": lambda h: h - h.max(1, keepdims=True),
    "custom_linear_solve": lambda h: jnp.linalg.solve(h[:5].T @ h[:5] + jnp.eye(5), jnp.eye(5)),
}


@pytest.mark.parametrize("name", MIXED)
def test_fault_12_what_stays_says_which_primitive_and_line_want_it(name):
    def fn(p, x):
        return MIXED[name](x @ p["w"]) @ p["v"]

    groups = channel_groups(fn)(plain({"w": (3, 5), "v": (5, 2)}), normal(6, 3))
    assert len(groups) == 0
    (why,) = [f for f in groups.frozen if (f.path, f.axis) == ("w", 1)]
    wanted = {"custom_linear_solve": "lu"}.get(name, name)  # the first that solving asks for
    assert why.primitive == wanted
    assert why.indices == 5
    assert "test_fault_12_rules.py" in why.source
    assert why.why
    with pytest.raises(ValueError, match=rf"froze every dimension:\n(.*\n)*.*w:1, 5 indices.*{wanted} at"):
        plan(groups, {}, sparsity=0.5)


def test_fault_12_every_dimension_is_in_a_group_or_has_a_reason():
    """Of each parameter's indices, each is a unit's or counted by a reason; dimensions of one need none."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]).reshape(len(x), 2, -1) * p["s"]
        h = jax.nn.softmax(h @ p["b"]) @ p["c"][:, :3]
        return h.sum(1), p["n"]

    shapes = {"a": (3, 8), "s": (1, 4), "b": (4, 5), "c": (5, 7), "n": (2,)}
    params = plain(shapes) | {"steps": jnp.arange(4)}
    groups = channel_groups(fn)(params, normal(6, 3))
    for path, shape in groups.shapes.items():
        for axis, n in enumerate(shape):
            units = sum(
                int((s.unit_of >= 0).sum()) for g in groups for s in g.slices if (s.path, s.axis) == (path, axis)
            )
            reasons = sum(f.indices for f in groups.frozen if (f.path, f.axis) == (path, axis))
            assert units + reasons == n or n == 1, (path, axis)
    assert {f.path: f.why for f in groups.frozen}["steps"] == "it is not of a floating type, so no weight"
    assert {f.path: f.why for f in groups.frozen}["n"] == "it is in the result '1' of the function"


def test_fault_12_experts_of_a_ragged_dot_lose_their_hidden_units():
    def fn(p, x, sizes):
        return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    params = plain({"up": (2, 3, 6), "down": (2, 6, 4)})
    x, sizes = normal(7, 3), jnp.array([3, 4])
    groups = channel_groups(fn)(params, x, sizes)
    assert found(groups) == [(6, frozenset({"up:2", "down:1"}))]
    assert groups.macs() == 7 * 3 * 6 + 7 * 6 * 4
    half = plan(groups, params, sparsity=0.5)
    assert check_shrink(fn, half, params, x, sizes) < 1e-5
    kept = half.kept[0]
    dense = [np.asarray(params[n]) for n in ("up", "down")]
    rows = [
        np.maximum(np.asarray(x)[i] @ dense[0][e][:, kept], 0) @ dense[1][e][kept]
        for i, e in enumerate([0] * 3 + [1] * 4)
    ]
    small = {"up": params["up"][..., kept], "down": params["down"][:, kept]}
    np.testing.assert_allclose(fn(small, x, sizes), np.stack(rows), atol=1e-5)


SIZES = [(2, 2, 3), (3, 2, 2), (6, 2), (2, 6), (4, 3), (3, 4), (12,)]


@pytest.mark.parametrize("seed", quick(range(12), 1, 2))
def test_fault_9_any_chain_of_reshapes_gives_units_that_are_exact(seed):
    """Splits and merges at random, with something that fixes an axis between them: cut equals masked whatever comes."""
    rng = np.random.default_rng(seed)
    steps = [SIZES[int(rng.integers(len(SIZES)))] for _ in range(3)]
    fixed = [int(rng.integers(2)) * int(rng.integers(1, len(s) + 1)) for s in steps]

    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        for shape, axis in zip(steps, fixed, strict=True):
            h = h.reshape(len(x), *shape)
            h = h * (1 + jnp.sin(h.max(axis, keepdims=True))) if axis else jnp.tanh(h)
        return h.reshape(len(x), -1) @ p["v"]

    params, x = plain({"w": (3, 12), "v": (12, 2)}), normal(4, 3)
    groups = channel_groups(fn)(params, x)
    if not any(fixed):
        assert len(groups)
    if len(groups):
        assert check_shrink(fn, plan(groups, params, sparsity=0.5), params, x) < 1e-5
