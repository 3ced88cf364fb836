"""N:M groups and filters lie where the program sums and keeps, in every layout: numpy, along axes said by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.roles import AxisRoles, Roles
from jaxcomp.pruning.specs import Tied
from tests.marks import quick

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def masks_of(t: jc.Transform, params: Any) -> dict[str, np.ndarray]:
    """The masks at the leaves' own shapes, by path."""
    named, _ = leaves_with_paths(t.apply(t.init(params), params), is_leaf=is_compressed)
    return {p: np.broadcast_to(x.mask, x.shape) for p, x in named if is_compressed(x)}


def n_m_along(w: np.ndarray, axis: int) -> np.ndarray:
    """The two largest of every four along an axis, by sorting; the groups are whole here."""
    rows = np.moveaxis(np.abs(w), axis, -1)
    groups = rows.reshape(-1, 4)
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, np.argsort(groups, axis=1)[:, 2:], True, axis=1)
    return np.moveaxis(kept.reshape(rows.shape), -1, axis)


def half_of_filters(w: np.ndarray, own: tuple[int, ...]) -> np.ndarray:
    """All but the half of the slices at each index of ``own`` whose magnitudes sum to least."""
    sums = np.abs(w.astype(np.float64)).sum(tuple(i for i in range(w.ndim) if i not in own), keepdims=True)
    flat = np.ones(sums.size, bool)
    flat[np.argsort(sums, axis=None, kind="stable")[: round(0.5 * sums.size)]] = False
    return np.broadcast_to(flat.reshape(sums.shape), w.shape)


def equinox_layers() -> tuple[Callable[..., Any], Any, Any]:
    a, b = jax.random.split(KEY)
    params = {"up": eqx.nn.Linear(8, 12, key=a), "down": eqx.nn.Linear(12, 4, key=b)}
    return lambda p, x: jax.vmap(lambda x: p["down"](jax.nn.relu(p["up"](x))))(x), params, normal(5, 8)


def torch_layout() -> tuple[Callable[..., Any], Any, Any]:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = lax.conv_general_dilated(x, p["conv"]["weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return x.mean((2, 3)) @ p["fc"]["weight"].T

    params = {"conv": {"weight": normal(8, 4, 3, 3)}, "fc": {"weight": normal(6, 8, seed=1)}}
    return fn, params, normal(2, 4, 5, 5)


def scanned_dense() -> tuple[Callable[..., Any], Any, Any]:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(8)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]

    return _linen(Net(), normal(5, 8))


def attention() -> tuple[Callable[..., Any], Any, Any]:
    return _linen(nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32), normal(2, 5, 16))


def _linen(model: nn.Module, x: jax.Array) -> tuple[Callable[..., Any], Any, Any]:
    params = model.init(KEY, x)["params"]
    params = jax.tree.map(lambda w: w + 0.01 * normal(*w.shape), params)
    return lambda p, x: model.apply({"params": p}, x), params, x


def tied_kernels() -> tuple[Callable[..., Any], Any, Any]:
    """One table is looked up and multiplied by; one matrix is used in two layers alike."""

    def fn(p: Any, ids: jax.Array) -> jax.Array:
        h = p["table"][ids]
        return jnp.tanh(jnp.tanh(h @ p["b"]) @ p["b"]) @ p["table"].T

    return fn, {"table": normal(12, 8), "b": normal(8, 8, seed=1)}, jnp.arange(6)


# By path: the axis of N:M, and the axes of which each index combination is a filter.
LAYOUTS = {
    "equinox": (equinox_layers, {"up/weight": (1, (0,)), "down/weight": (1, (0,))}),
    "torch": (torch_layout, {"conv/weight": (1, (0,)), "fc/weight": (1, (0,))}),
    "scan": (scanned_dense, {"ScanLayer_0/Dense_0/kernel": (1, (0, 2))}),
    "heads": (
        attention,
        {**{f"{n}/kernel": (0, (1, 2)) for n in ("query", "key", "value")}, "out/kernel": (1, (2,))},
    ),
    "tied": (tied_kernels, {"table": (1, (0,)), "b": (0, (1,))}),
}


@pytest.mark.parametrize("name", quick(LAYOUTS, "scan", "tied"))
def test_groups_and_filters_fall_where_the_program_sums_and_keeps(name) -> None:
    make, wanted = LAYOUTS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fn, params, x = make()
        roles = jc.roles(fn)(params, x)
    weights = {p: np.asarray(w) for p, w in leaves_with_paths(params)[0] if p in wanted}
    by_groups = masks_of(jc.prune(structure=jc.NM(2, 4), roles=roles), params)
    by_filters = masks_of(jc.prune(0.5, structure=jc.Filters(), roles=roles), params)
    assert by_groups.keys() == by_filters.keys() == wanted.keys()
    for path, (axis, own) in wanted.items():
        np.testing.assert_array_equal(by_groups[path], n_m_along(weights[path], axis), path)
        np.testing.assert_array_equal(by_filters[path], half_of_filters(weights[path], own), path)


@pytest.mark.parametrize("name", quick(["equinox", "torch"], "equinox"))
def test_without_roles_names_settle_matrices_and_convolutions(name) -> None:
    make, wanted = LAYOUTS[name]
    _, params, _ = make()
    weights = {p: np.asarray(w) for p, w in leaves_with_paths(params)[0] if p in wanted}
    for path, mask in masks_of(jc.prune(structure=jc.NM(2, 4)), params).items():
        np.testing.assert_array_equal(mask, n_m_along(weights[path], wanted[path][0]), path)
    for path, mask in masks_of(jc.prune(0.5, structure=jc.Filters()), params).items():
        np.testing.assert_array_equal(mask, half_of_filters(weights[path], wanted[path][1]), path)


def test_axes_said_by_hand_are_taken() -> None:
    w = normal(4, 8, 3)
    got = masks_of(jc.prune(structure=jc.NM(2, 4, axis=-2)), {"kernel": w})["kernel"]
    np.testing.assert_array_equal(got, n_m_along(np.asarray(w), 1))
    got = masks_of(jc.prune(0.5, structure=jc.Filters((0, -1))), {"kernel": w})["kernel"]
    np.testing.assert_array_equal(got, half_of_filters(np.asarray(w), (0, 2)))


@pytest.mark.parametrize(("name", "axis"), [("kernel", 0), ("weight", 1)])
def test_factors_know_their_own_roles(name, axis) -> None:
    """``x @ u @ v`` of a kernel sums over rows of u, then of v; ``x @ v.T @ u.T`` of a weight over columns of both."""
    t = jc.chain(jc.low_rank(4), jc.prune(structure=jc.NM(2, 4)))
    params = {name: normal(16, 8)}
    seen = t.apply(t.init(params), params)[name]
    dense = jc.low_rank(4).apply(jc.low_rank(4).init(params), params)[name]
    np.testing.assert_array_equal(seen.u.mask, n_m_along(np.asarray(dense.u), axis))
    np.testing.assert_array_equal(seen.v.mask, n_m_along(np.asarray(dense.v), axis))


def test_roles_choose_the_leaves_and_where_overrides_them() -> None:
    params = {"b": normal(8, 4), "unused": normal(8, 4), "norm": {"scale": normal(2, 4)}}
    roles = Roles({"b": AxisRoles(("contracted", "output"))})
    assert masks_of(jc.prune(0.5, roles=roles), params).keys() == {"b"}
    assert masks_of(jc.prune(0.5, where="unused"), params).keys() == {"unused"}
    with pytest.raises(ValueError, match=r"prune: rule in_products matches nothing; the paths are 'kernel'"):
        jc.prune(0.5, roles=roles).init({"kernel": params["b"]})
    with pytest.raises(ValueError, match=r"prune: 'unused' is in no product of the program .* which has 'b'"):
        jc.prune(structure=jc.NM(2, 4), roles=roles, where="unused").init(params)
    with pytest.raises(ValueError, match=r"matrices: 'b' of shape \(8, 4\) may be a matrix, or the biases of stacked"):
        jc.prune(0.5).init(params)


@pytest.mark.parametrize("structure", [jc.NM(2, 4), jc.Filters()])
def test_what_nothing_settles_is_named(structure) -> None:
    amount = None if isinstance(structure, jc.NM) else 0.5
    params = {"query": {"kernel": normal(8, 4, 2)}}
    with pytest.raises(ValueError, match=r"prune: 'query/kernel' has 3 axes, and neither its path .* roles=jaxcomp"):
        jc.prune(amount, structure=structure).init(params)
    twice = jc.roles(lambda p, x: x @ p["kernel"] @ p["kernel"].T)({"kernel": normal(4, 4)}, normal(2, 4))
    with pytest.raises(ValueError, match=r"prune: 'kernel' has an axis that products sum over and keep, both"):
        jc.prune(amount, structure=structure, roles=twice).init({"kernel": normal(4, 4)})
    with pytest.raises(TypeError, match=r"prune: roles must be what jaxcomp.roles\(fn\)"):
        jc.prune(amount, structure=structure, roles={"kernel": ("contracted", "output")})


def test_elements_blocks_and_ties_need_no_roles() -> None:
    params = {"query": {"kernel": normal(8, 4, 2)}}
    for structure in (jc.pruning.Element(), jc.pruning.Block((2, 2)), Tied({".*": 1})):
        got = masks_of(jc.prune(0.5, structure=structure), params)["query/kernel"]
        assert got.sum() == 32


def test_a_leaf_without_such_an_axis_is_named() -> None:
    table = jc.roles(lambda p, i: p["table"][i])({"table": normal(8, 4)}, jnp.arange(3))
    with pytest.raises(ValueError, match=r"'table' has no axis that a product sums over \(indexed, output\); name one"):
        jc.prune(structure=jc.NM(2, 4), roles=table).init({"table": normal(8, 4)})
    whole = Roles({"kernel": AxisRoles(("contracted", "spatial"))})
    with pytest.raises(ValueError, match=r"prune: 'kernel' has no axis that products keep \(contracted, spatial\)"):
        jc.prune(0.5, structure=jc.Filters(), roles=whole).init({"kernel": normal(8, 4)})
