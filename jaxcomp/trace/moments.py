"""``input_moments``: second moments of the inputs that each leaf multiplies, for errors weighted by the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.paths import Where, describe, matches, some_paths
from jaxcomp.core.roles import BATCH, CONTRACTED, SPATIAL, STACKED
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid
from jaxcomp.trace.nested import CUSTOM_RULE
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Site, sites_of

SUMMED = Monoid(
    lambda shapes: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
    lambda a, b: jax.tree.map(jnp.add, a, b),
)
"""Moments as emissions: they add."""


def input_moments(fn: Callable[..., Any], where: Where = r".*") -> Callable[..., dict[str, jax.Array]]:
    """``Σ xᵀ x`` over the rows ``x`` that each leaf multiplies in ``fn(params, *args)``, by the leaf's path.

    Of a dot, ``x`` runs over the axes in front of the leaf that are summed over; of a convolution over the input
    features (its taps are taken as alike). Sites where a leaf is multiplied from its last axes, as a transposed one, or
    whose weight is computed, are left out. In a scan over stacked layers there is a moment for each layer. Moments of
    several batches add: ``jax.tree.map(jnp.add, a, b)``.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      where: which sites, by path or as a predicate of ``(path, site)``.

    Raises:
      ValueError: no site is left.

    >>> m = input_moments(lambda p, x: x @ p["w"])({"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 1.0]]))
    >>> m["w"].tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """

    @wraps(fn)
    def collected(params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        program = trace(fn, params, *args, **kwargs)
        ops = {op.location: op for op in program.flow.ops}
        every = sites_of(program)
        claims = {}
        for site in every:
            axes = _input_axes(site, ops[site.location])
            if axes and matches(where, site.path, site):
                claims[site.location] = Claim(_observing(site, ops[site.location], axes))
        if not claims:
            raise ValueError(
                f"input_moments: {describe(where)} matches no site that multiplies rows by a leaf; there are "
                f"{some_paths(s.path for s in every) or 'none'}."
            )
        return evaluate(program, claims, program.flatten(params, *args, **kwargs), collect=SUMMED).aux

    return collected


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


def _observing(site: Site, op: Op, axes: list[int]) -> Callable[..., Emitted]:
    def run(*values: Any) -> Emitted:
        x = jnp.moveaxis(values[site.activations[0]], axes, range(-len(axes), 0))
        rows = x.reshape(-1, math.prod(x.shape[-len(axes) :])).astype(jnp.float32)
        return Emitted(op.bind(*values), {str(site.leaf): jnp.einsum("ni,nj->ij", rows, rows, precision="highest")})

    return run
