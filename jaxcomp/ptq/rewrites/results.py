"""What a rewrite gives back, and how it is checked against the function that it must keep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.paths import some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.walk import Fn


class Left(NamedTuple):
    """What was left as it was: the ``path`` of a product's weight, and ``why``."""

    path: str
    why: str


class Rewritten(NamedTuple):
    """Rewritten parameters, and the function that takes them.

    Attributes:
      params: the tree given, of the same structure, shapes and types; with factors inserted, ``{"params": that tree,
        "inputs": factors}`` as :func:`~jaxcomp.ptq.rewrites.inputs.with_factors` takes it.
      fn: what computes the same of ``params``: the function given, unless factors were inserted.
      moved: paths of the leaves that changed.
      left: the products that were wanted and were not served, and why.
      difference: the largest difference of the function's results on the arguments given, relative to the largest
        magnitude of that result.
    """

    params: Params
    fn: Fn
    moved: tuple[str, ...]
    left: tuple[Left, ...]
    difference: float

    def __repr__(self) -> str:
        lost = "".join(f"\nleft {path!r}: {why}" for path, why in self.left)
        moved = some_paths(self.moved) or "nothing"
        return f"<Rewritten: moved {moved}; the results differ by {self.difference:.1e}>{lost}"


class NotKept(UserWarning):
    """A rewrite that keeps the function changed its results by more than rounding does."""


TOLERANCE = 1e-3
"""More than this, relative to the largest result, is no rounding."""


Call = tuple[tuple[PyTree, ...], Mapping[str, PyTree]]


def difference(before: tuple[Fn, Params], after: tuple[Fn, Params], call: Call) -> float:
    """The largest relative difference of the results of two functions, each of its own parameters."""
    args, kwargs = call
    one, other = (jax.tree.leaves(fn(params, *args, **kwargs)) for fn, params in (before, after))
    return max((float(_relative(jnp.asarray(a), jnp.asarray(b))) for a, b in zip(one, other, strict=True)), default=0.0)


def _relative(a: jax.Array, b: jax.Array) -> jax.Array:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.float32(0)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b), initial=0.0) / jnp.maximum(jnp.max(jnp.abs(a), initial=0.0), 1e-30)


def checked(owner: str, worst: float, moved: tuple[str, ...]) -> float:
    """The difference, with a warning where it is no rounding."""
    if not worst <= TOLERANCE:
        warnings.warn(
            f"{owner}: the results differ by {worst:.1e} of the largest after {some_paths(moved)} were rewritten; the "
            "factors are very large or small, so that float32 rounds or overflows: calibrate on more data, or leave "
            "these out by where=.",
            NotKept,
            stacklevel=3,
        )
    return worst
