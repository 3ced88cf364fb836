"""Attention in floats on a CPU: products with keys and values, and what is made of the scores between, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_beside import laid_beside
from jaxcomp.kernels.llvm_calls import Work, call, digest, features, missing, parts
from jaxcomp.kernels.llvm_float_heads import mixed
from jaxcomp.kernels.llvm_float_laid import Heads, Place, Strides
from jaxcomp.trace.pointwise import Pointwise
from jaxcomp.trace.rowwise import Axes

FEWEST = 4
"""Queries for which that pays."""


class Lay(NamedTuple):
    """How an array lies.

    Attributes:
      axes: for each axis of the scores its own, or None where it does not vary along it.
      width: the axis that scores do not have: what is summed of queries and keys, the features of values and results.
      order: its axes, the slowest first.
    """

    axes: Axes
    width: int
    order: tuple[int, ...]


class How(NamedTuple):
    """What attention is.

    Attributes:
      sizes: of the scores.
      keys, queries: the axis along which keys and values vary, and one along which they do not.
      q, k, v, result: how these lie.
      function: what is made of the scores, rows of keys.
      varying: for each of its values whether it varies along a row.
      beside: for each axis of the scores that of the values that meet them.
    """

    sizes: Shape
    keys: int
    queries: int
    q: Lay
    k: Lay
    v: Lay
    result: Lay
    function: Pointwise
    varying: tuple[bool, ...]
    beside: tuple[Axes, ...]


def refusal(how: How, widths: tuple[int, int]) -> str | None:
    """Why there is no such code here; None if there is.

    Args:
      how: what attention is.
      widths: of keys and of values.
    """
    if why := missing():
        return why
    if not all(isinstance(n, int) and n > 0 for n in (*how.sizes, *widths)):
        return "there is nothing to attend to, or it is any number"
    if any(n % 8 for n in widths):
        return f"keys and values are of whole vectors of 8, and have {widths[0]} and {widths[1]} numbers"
    if how.sizes[how.queries] < FEWEST:
        return f"it pays for {FEWEST} queries, and there are {how.sizes[how.queries]}"
    return None


def llvm_mixed(how: How, q: jax.Array, k: jax.Array, v: jax.Array, *beside: jax.Array) -> jax.Array:
    """What attention gives of float32; what meets the scores is float32 or booleans."""
    sizes = {axis: size for axis, size in zip(how.result.axes, how.sizes, strict=True) if axis is not None}
    sizes[how.result.width] = v.shape[how.v.width]
    shape, order = tuple(sizes.get(i, 1) for i in range(len(how.result.order))), how.result.order
    met = [laid_beside(x, axes, how.keys) for x, axes in zip(beside, how.beside, strict=True)]
    places = [_place(*one) for one in ((how.q, q.shape), (how.k, k.shape), (how.v, v.shape), (how.result, shape))]
    code = _heads(how, (k.shape[how.k.width], v.shape[how.v.width]), places, met)
    work = Work(f"floats_{digest(code)}", partial(mixed, code), 1, by=0)
    out = jax.ShapeDtypeStruct(tuple(shape[i] for i in order), jnp.float32)
    # As they lie: XLA cancels these transpositions with the program's own.
    given = [jnp.transpose(x, lay.order) for x, lay in ((q, how.q), (k, how.k), (v, how.v))]
    return jnp.transpose(call(work, out, parts(code.chunks, 1), *given, *met), np.argsort(order).tolist())


def _place(lay: Lay, shape: Shape) -> Place:
    steps, step = {}, 1
    for axis in reversed(lay.order):
        steps[axis], step = step, step * shape[axis]
    return Place(tuple(0 if axis is None else steps[axis] for axis in lay.axes), steps[lay.width])


def _steps(shape: Shape, keys: int) -> Strides:
    """Of what lies with the axis of keys last."""
    *steps, last = (0 if n == 1 else math.prod(shape[i + 1 :]) for i, n in enumerate(shape))
    return (*steps[:keys], last, *steps[keys:])


def _heads(how: How, widths: tuple[int, int], places: Sequence[Place], met: Sequence[jax.Array]) -> Heads:
    """In vectors that the processor has, of which so many keys are met at once that few are beyond the last."""
    wide = "avx512f" in features()
    lanes = 16 if wide and not any(n % 16 for n in widths) else 8
    most = 4 if wide else 2
    vectors = -(-how.sizes[how.keys] // lanes)
    several = min(range(most, max(most // 2, 1) - 1, -1), key=lambda n: -(-vectors // n) * n)
    beside = tuple((_steps(x.shape, how.keys), x.dtype == jnp.bool_) for x in met)
    q, k, v, result = places
    function = how.function, how.varying
    return Heads(how.sizes, how.keys, how.queries, widths, q, k, v, result, beside, *function, lanes, several, most)
