"""The windows of a convolution as rows, one by one or added up a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxcomp.core.bits import compute_dtype
from jaxcomp.trace.walk import shape_of

_PATCHES = 1 << 24
"""Elements of a convolution's patches that are made at once."""


class _Adds(Protocol):
    def plus(self: A, other: A, /) -> A: ...


A = TypeVar("A", bound=_Adds)


def over_windows(
    x: jax.Array, eqn: core.JaxprEqn, take: Callable[[jax.Array], A], *, sizes: Sequence[int], order: Sequence[int]
) -> A:
    """What adds up over all windows, a part of the images at a time where their patches together are large.

    Args:
      x: the convolution's input.
      eqn: the convolution.
      take: of rows, ``(windows, n)``, or ``(groups, windows, n)`` where there are several feature groups.
      sizes: of the input features of a group and of the window.
      order: in which of these a row's entries run, the slowest first.
    """
    batch = eqn.params["dimension_numbers"].lhs_spec[0]
    windows = math.prod(shape_of(eqn.outvars[0])) // max(_features(eqn), 1)
    wide = math.prod(sizes) * int(eqn.params["feature_group_count"]) * windows
    images = x.shape[batch]
    parts = next((k for k in range(1, images) if not images % k and wide // k <= _PATCHES), max(images, 1))

    def of(part: jax.Array) -> A:
        return take(_patches(part, eqn, sizes=sizes, order=order))

    if parts == 1:
        return of(x)
    split = jnp.moveaxis(x.reshape(*x.shape[:batch], parts, images // parts, *x.shape[batch + 1 :]), batch, 0)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, split[0]))
    found: A = lax.scan(lambda total, part: (total.plus(of(part)), None), zero, split)[0]
    return found


def _features(eqn: core.JaxprEqn) -> int:
    return int(shape_of(eqn.outvars[0])[eqn.params["dimension_numbers"].out_spec[1]])


def _patches(x: jax.Array, eqn: core.JaxprEqn, *, sizes: Sequence[int], order: Sequence[int]) -> jax.Array:
    """The windows as rows: ``(windows, n)``, or of each feature group."""
    p = eqn.params
    groups = int(p["feature_group_count"])
    numbers: lax.ConvDimensionNumbers = p["dimension_numbers"]
    same = {name: p[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    found = lax.conv_general_dilated_patches(
        x.astype(compute_dtype(x.dtype)),
        tuple(sizes[1:]),
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
        **same,
    )
    found = jnp.moveaxis(found, numbers.out_spec[1], -1)
    count = found.size // max(math.prod(sizes) * groups, 1)
    split = jnp.moveaxis(found.reshape(count, groups, *sizes), 1, 0)
    rows = jnp.transpose(split, (0, 1, *(i + 2 for i in order))).reshape(groups, count, math.prod(sizes))
    return rows[0] if groups == 1 else rows
