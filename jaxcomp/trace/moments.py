"""What enters the sites: second moments of the inputs that each leaf multiplies, and their norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import Where, matches, matrices
from jaxcomp.core.roles import BATCH, CONTRACTED, SPATIAL, STACKED
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.collect import ADDED, Nothing, Observer, collect
from jaxcomp.trace.exact import Squares, Sum, squared, squared_by_group, summed
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import BARRED, UNSEEN
from jaxcomp.trace.products import by_rows, dot_numbers, groups_of
from jaxcomp.trace.sites import Operand, Site
from jaxcomp.trace.walk import Fn


def input_moments(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, jax.Array]]:
    """``Σ xᵀ x`` over the rows ``x`` that each leaf multiplies in ``fn(params, *args)``, by the leaf's path.

    Of a dot, ``x`` runs over the axes in front of the leaf that are summed over; of a convolution over the input
    features (its taps are taken as alike). Sites where a leaf is multiplied from its last axes, as a transposed one, or
    whose weight is computed, are left out. In a scan over stacked layers there is a moment for each layer, and where
    the leaf's first axes are batch axes or experts (``ragged_dot``), one for each of these, over its own rows. Moments
    of several batches add: ``jax.tree.map(jnp.add, a, b)``. They are float32 (float64 of such values): elements beyond
    1e19 give infinities, those below 1e-19 zeros.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which sites, by path or as a predicate of ``(path, site)``.

    Raises:
      ValueError: no site is left.

    >>> m = input_moments(lambda p, x: x @ p["w"])({"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 1.0]]))
    >>> m["w"].tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """

    def observer(site: Site, op: Op) -> Observer | None:
        rows = _rows(site, op)
        return _moments(site, op, rows) if rows is not None and matches(where, site.path, site) else None

    nothing = Nothing("input_moments", where, "site that multiplies rows by a leaf")
    found = collect(fn, observer, merged=ADDED, nothing=nothing)

    @wraps(fn)
    def moments(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        return {path: total.rounded() for path, total in found(params, *args, **kwargs).seen.items()}

    return moments


def input_norms(fn: Fn, where: Where = matrices) -> Callable[..., dict[str, jax.Array]]:
    """ℓ2 norms of what each weight multiplies, one for each index of its contraction axis: the statistic of ``wanda``.

    They have the weight's rank, and 1 along all its other axes but those of stacked layers, batches and experts.
    Several batches together have ``jax.tree.map(jnp.hypot, a, b)``. Covered are weights of dots, ragged dots and
    convolutions with one contracted axis (beside the window) and no feature groups; a leaf with several sites has all
    their inputs together.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which leaves.

    Raises:
      ValueError: no site is left.

    >>> p = {"kernel": jnp.ones((2, 3))}
    >>> input_norms(lambda p, x: x @ p["kernel"])(p, jnp.array([[3.0, 1.0], [4.0, 0.0]]))["kernel"].tolist()
    [[5.0], [1.0]]
    """

    def observer(site: Site, op: Op) -> Observer | None:
        weight = _plain_weight(site, op)
        if weight is None or weight.leaf is None:
            return None
        like = jax.ShapeDtypeStruct(weight.leaf_shape, weight.leaf_dtype)
        return _squares(site, op) if matches(where, weight.leaf, like) else None

    nothing = Nothing("input_norms", where, "weight with one contracted axis")
    found = collect(fn, observer, merged=ADDED, nothing=nothing)

    @wraps(fn)
    def norms(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        chosen, squares = found(params, *args, **kwargs)
        total: dict[str, jax.Array] = {}
        for site in chosen:
            path, here = site.leaf or "", _at_leaf(site, squares[site.path].root())
            total[path] = jnp.hypot(total[path], here) if path in total else here
        return total

    return norms


class _Rows(NamedTuple):
    """Axes of the activation: those that each have a moment of their own, and those that run over the leaf's rows."""

    apart: tuple[int, ...]
    summed: tuple[int, ...]


def _rows(site: Site, op: Op) -> _Rows | None:
    """Where the leaf's rows lie in the activation, in the leaf's order; None where that has no meaning."""
    if site.weight is None or len(site.activations) != 1 or not BARRED.isdisjoint(site.inside):
        return None
    weight, x = site.operands[site.weight], site.operands[site.activations[0]]
    if not weight.exact or site.groups != 1 or site.kind == "embed":
        return None
    if site.kind == "conv":
        own = [r for r in weight.leaf_roles if r != STACKED]
        window = own[-2:-1] == [CONTRACTED] and own[0] == SPATIAL
        return _Rows((), (x.roles.index(CONTRACTED),)) if window else None
    if site.kind == "ragged" and (site.weight != 1 or by_rows(op.eqn) is None):
        return None
    batch, summed = paired(site, op)
    front = [a for axes, _ in (*batch, *summed) for a in axes]
    stacked = sum(r == STACKED for r in weight.leaf_roles)
    if front != list(range(stacked, stacked + len(front))) or stacked + len(front) == len(weight.leaf_shape):
        return None
    return _Rows(tuple(j for _, j in batch if j is not None), tuple(j for _, j in summed if j is not None))


_Pairs = list[tuple[tuple[int, ...], int | None]]


def paired(site: Site, op: Op) -> tuple[_Pairs, _Pairs]:
    """For each axis that the operands share, and each that is summed over: the leaf's axes and the activation's.

    The axis of a ragged dot's groups has none in the activation.
    """
    summed, batch = dot_numbers(op.eqn)
    weight, x = site.weight, site.activations[0]
    assert weight is not None
    origin = op.tags[weight].origin
    assert origin is not None
    shared: _Pairs = [(origin.axes[i], j) for i, j in zip(batch[weight], batch[x], strict=True)]
    if site.kind == "ragged":
        groups = op.eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
        shared += [(origin.axes[i], None) for i in groups]
    over: _Pairs = [(origin.axes[i], j) for i, j in zip(summed[weight], summed[x], strict=True)]
    return sorted(shared, key=lambda pair: pair[0]), sorted(over, key=lambda pair: pair[0])


def _moments(site: Site, op: Op, at: _Rows) -> Observer:
    first, last = range(len(at.apart)), range(-len(at.summed), 0)

    def look(values: Sequence[jax.Array]) -> dict[str, Sum]:
        x = jnp.moveaxis(values[site.activations[0]], (*at.apart, *at.summed), (*first, *last))
        apart, width = x.shape[: len(at.apart)], math.prod(x.shape[-len(at.summed) :])
        count = x.size // max(math.prod(apart) * width, 1)
        rows = x.reshape(*apart, count, width).astype(compute_dtype(x.dtype))
        if site.kind == "ragged":
            found = lax.ragged_dot_general(rows, rows, values[2], BY_GROUP, precision="highest")
        else:
            found = jnp.einsum("...ni,...nj->...ij", rows, rows, precision="highest")
        return {str(site.leaf): summed(found)}

    return look


BY_GROUP = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)
"""``xᵀ y`` over the rows of each group."""


def _plain_weight(site: Site, op: Op) -> Operand | None:
    """The weight of a site whose inputs have norms: one axis is summed over, and each layer of a stack is met once."""
    weight = None if site.weight is None else site.operands[site.weight]
    if weight is None or weight.leaf is None or site.groups != 1 or len(site.activations) != 1:
        return None
    if site.kind == "ragged" and (site.weight != 1 or by_rows(op.eqn) is None):
        return None
    x = site.operands[site.activations[0]]
    alone = len(weight.leaf_axes(CONTRACTED)) == 1 and x.roles.count(CONTRACTED) == 1
    batch = len(weight.leaf_axes(BATCH)) == weight.roles.count(BATCH)
    layers = tuple(weight.leaf_shape[i] for i in weight.leaf_axes(STACKED)) == site.layer_steps
    return weight if alone and batch and layers and UNSEEN.isdisjoint(site.inside) else None


def _squares(site: Site, op: Op) -> Observer:
    operand = site.activations[0]
    axis = site.operands[operand].roles.index(CONTRACTED)
    batch = [] if site.kind == "conv" else [j for _, j in paired(site, op)[0] if j is not None]
    at = by_rows(op.eqn) if site.kind == "ragged" else None
    groups = 0 if at is None else site.operands[1].shape[at.group]

    def look(values: Sequence[jax.Array]) -> dict[str, Squares]:
        x = values[operand].astype(compute_dtype(values[operand].dtype))
        if groups:
            rows = jnp.moveaxis(x, axis, 1)
            return {site.path: squared_by_group(rows, groups_of(values[2], len(rows)), groups)}
        x = jnp.moveaxis(x, (*batch, axis), (*range(len(batch)), -1))
        return {site.path: squared(x, tuple(range(len(batch), x.ndim - 1)))}

    return look


def _at_leaf(site: Site, x: jax.Array) -> jax.Array:
    """Norms with the layers' axes in front, then those of batches or groups, at the rank of the site's weight."""
    weight = site.operands[site.weight or 0]
    stacked, batch, (contracted,) = (weight.leaf_axes(role) for role in (STACKED, BATCH, CONTRACTED))
    axes = (*stacked, *batch, contracted)
    x = x.reshape([weight.leaf_shape[i] for i in axes])
    x = jnp.transpose(x, sorted(range(len(axes)), key=axes.__getitem__))
    return x.reshape([size if i in axes else 1 for i, size in enumerate(weight.leaf_shape)])
