"""What enters the sites: second moments of the inputs that each leaf multiplies, and their norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import Where, matches, matrices
from jaxcomp.core.roles import BATCH, CONTRACTED, SPATIAL, STACKED
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.collect import ADDED, Nothing, Observer, collect
from jaxcomp.trace.exact import Squares, Sum, squared, summed
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import CUSTOM_RULE
from jaxcomp.trace.sites import Operand, Site
from jaxcomp.trace.walk import Fn


def input_moments(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, jax.Array]]:
    """``Σ xᵀ x`` over the rows ``x`` that each leaf multiplies in ``fn(params, *args)``, by the leaf's path.

    Of a dot, ``x`` runs over the axes in front of the leaf that are summed over; of a convolution over the input
    features (its taps are taken as alike). Sites where a leaf is multiplied from its last axes, as a transposed one, or
    whose weight is computed, are left out. In a scan over stacked layers there is a moment for each layer. Moments of
    several batches add: ``jax.tree.map(jnp.add, a, b)``. They are float32 (float64 of such values): elements beyond
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
        axes = _input_axes(site, op)
        return _moments(site, axes) if axes and matches(where, site.path, site) else None

    nothing = Nothing("input_moments", where, "site that multiplies rows by a leaf")
    found = collect(fn, observer, merged=ADDED, nothing=nothing)

    @wraps(fn)
    def moments(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        return {path: total.rounded() for path, total in found(params, *args, **kwargs).seen.items()}

    return moments


def input_norms(fn: Fn, where: Where = matrices) -> Callable[..., dict[str, jax.Array]]:
    """ℓ2 norms of what each weight multiplies, one for each index of its contraction axis: the statistic of ``wanda``.

    They have the weight's rank, and 1 along all its other axes but those of stacked layers. Several batches together
    have ``jax.tree.map(jnp.hypot, a, b)``. Covered are weights of dots and convolutions with one contracted axis
    (beside the window) and no batch axes or feature groups; a leaf with several sites has all their inputs together.

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
        weight = _plain_weight(site)
        if weight is None or weight.leaf is None:
            return None
        like = jax.ShapeDtypeStruct(weight.leaf_shape, weight.leaf_dtype)
        return _squares(site) if matches(where, weight.leaf, like) else None

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


def _input_axes(site: Site, op: Op) -> list[int]:
    """The axes of the activation that run over the leaf's rows, in the leaf's order; none where that has no meaning."""
    barred = CUSTOM_RULE | {"while_cond"}
    if site.weight is None or len(site.activations) != 1 or not barred.isdisjoint(site.inside):
        return []
    weight, x = site.operands[site.weight], site.operands[site.activations[0]]
    if not weight.exact or BATCH in weight.roles or site.groups != 1 or site.kind == "embed":
        return []
    if site.kind == "conv":
        own = [r for r in weight.leaf_roles if r != STACKED]
        return [x.roles.index(CONTRACTED)] if own[-2:-1] == [CONTRACTED] and own[0] == SPATIAL else []
    pairs = sorted(_paired(site, op))
    summed = [a for axes, _ in pairs for a in axes]
    stacked = sum(r == STACKED for r in weight.leaf_roles)
    first = list(range(stacked, stacked + len(summed)))
    return [x_axis for _, x_axis in pairs] if summed == first and len(first) + stacked < len(weight.leaf_shape) else []


def _paired(site: Site, op: Op) -> list[tuple[tuple[int, ...], int]]:
    """For each axis that a dot sums over, the leaf's axes and the activation's."""
    summed, _ = op.eqn.params["dimension_numbers"]
    assert site.weight is not None
    origin = op.tags[site.weight].origin
    assert origin is not None
    pairs = zip(summed[site.weight], summed[site.activations[0]], strict=True)
    return [(origin.axes[i], j) for i, j in pairs]


def _moments(site: Site, axes: Sequence[int]) -> Observer:
    def look(values: Sequence[jax.Array]) -> dict[str, Sum]:
        x = jnp.moveaxis(values[site.activations[0]], axes, range(-len(axes), 0))
        width = math.prod(x.shape[-len(axes) :])
        rows = x.reshape(x.size // max(width, 1), width).astype(compute_dtype(x.dtype))
        return {str(site.leaf): summed(jnp.einsum("ni,nj->ij", rows, rows, precision="highest"))}

    return look


def _plain_weight(site: Site) -> Operand | None:
    """The weight of a site whose inputs have norms: one axis is summed over, and each layer of a stack is met once."""
    weight = None if site.weight is None else site.operands[site.weight]
    if weight is None or weight.leaf is None or site.groups != 1 or len(site.activations) != 1:
        return None
    x = site.operands[site.activations[0]]
    alone = len(weight.leaf_axes(CONTRACTED)) == 1 and x.roles.count(CONTRACTED) == 1
    layers = tuple(weight.leaf_shape[i] for i in weight.leaf_axes(STACKED)) == site.layer_steps
    return weight if alone and layers and BATCH not in weight.roles and "while_cond" not in site.inside else None


def _squares(site: Site) -> Observer:
    operand = site.activations[0]
    axis = site.operands[operand].roles.index(CONTRACTED)

    def look(values: Sequence[jax.Array]) -> dict[str, Squares]:
        x = values[operand].astype(compute_dtype(values[operand].dtype))
        return {site.path: squared(x, tuple(i for i in range(x.ndim) if i != axis))}

    return look


def _at_leaf(site: Site, x: jax.Array) -> jax.Array:
    """Norms with the layers' axes in front, at the rank of the site's weight."""
    weight = site.operands[site.weight or 0]
    stacked, (contracted,) = weight.leaf_axes(STACKED), weight.leaf_axes(CONTRACTED)
    x = x.reshape(*(weight.leaf_shape[i] for i in stacked), weight.leaf_shape[contracted])
    axes = (*stacked, contracted)
    x = jnp.transpose(x, sorted(range(len(axes)), key=axes.__getitem__))
    return x.reshape([size if i in axes else 1 for i, size in enumerate(weight.leaf_shape)])
