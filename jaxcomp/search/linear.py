"""A linear program at inputs of which most are zero: nothing is computed of zeros."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.search.products import Product, Weights
from jaxcomp.trace import nested, walk
from jaxcomp.trace.primitives import JIT, SUMS


class Moved(NamedTuple):
    """A value that the inputs move; None is zero."""

    value: jax.Array | None


Known = Moved | jax.Array
"""A value that the inputs move, or one that they do not."""
ZERO = Moved(None)


class Linear:
    """A linear map of arrays by path, traced once.

    The Hessian's product with a vector that is zero outside of one layer needs the layers behind it alone, and of the
    gradient only that layer's: less work than a gradient, where the product with a full vector takes two.

    Args:
      product: the map.
      like: what it takes.

    >>> twice = Linear(lambda v: {"a": v["a"] + v["b"], "b": 2 * v["b"]}, {"a": jnp.ones(2), "b": jnp.ones(2)})
    >>> twice.at({"b": jnp.ones(2)}, ["b"])
    {'b': Array([2., 2.], dtype=float32)}
    """

    def __init__(self, product: Product, like: Weights) -> None:
        self._program, shapes = jax.make_jaxpr(lambda v: dict(product(v)), return_shape=True)(dict(like))
        self._inputs, self._shapes = sorted(like), dict(sorted(shapes.items()))

    def at(self, given: Weights, wanted: Collection[str]) -> dict[str, jax.Array]:
        """Some of the results, where the inputs that are not given are zero."""
        moved = [Moved(given.get(path)) for path in self._inputs]
        found = dict(zip(self._shapes, _run(self._program, moved), strict=True))
        return {path: _filled(found[path], self._shapes[path]) for path in wanted}


def _run(program: nested.Closed, values: Sequence[Known]) -> list[Known]:
    return walk.run(program, values, _equation, constant=_fixed)


def _fixed(value: jax.Array) -> Known:
    return value


def _equation(eqn: core.JaxprEqn, at: walk.Location, values: list[Known]) -> list[Known]:
    """Zero where all that moves is zero, for each equation is linear in what moves."""
    moving = [v for v in values if isinstance(v, Moved)]
    if not moving:
        return [*nested.bind(eqn, values)]
    if all(v.value is None for v in moving):
        return [ZERO] * len(eqn.outvars)
    body = nested.call_body(eqn) if eqn.primitive.name in JIT else None
    if body is not None:
        return _run(body, values)
    if eqn.primitive.name in SUMS and any(v.value is None for v in moving):
        return [next(v for v in moving if v.value is not None)]
    shapes = walk.shapes_of(eqn.invars)
    return [Moved(x) for x in nested.bind(eqn, [_filled(v, s) for v, s in zip(values, shapes, strict=True)])]


def _filled(value: Known, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array, zeros in the place of zero."""
    x = value.value if isinstance(value, Moved) else value
    return jnp.zeros(like.shape, like.dtype) if x is None else x
