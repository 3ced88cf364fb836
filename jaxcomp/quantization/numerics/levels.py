"""Rounding to a table of levels, minifloats by arithmetic and other tables by their midpoints; their codes and back.

Values here are in units of the scale. A level is a number in a float type, a code its index or bit pattern in uint8.
``levels`` are plain numbers, all that there are, ascending.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Num, UInt8

from jaxcomp.core.gradients import straight_through
from jaxcomp.quantization.numerics.rounding import hair

_FEW = 16  # up to so many levels a chain of comparisons, which fuses, else a search in the table
_SLACK = 1 + 2.0**-10  # absorbs the rounding error of w / scale


def exponent_of(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """``floor(log2|x|)``, from the bits; of 0 and of subnormal numbers, one less than that of the smallest normal one.

    >>> exponent_of(jnp.array([1.0, -7.9, 0.25, 0.0]))
    Array([   0,    2,   -2, -127], dtype=int32)
    """
    info = jnp.finfo(x.dtype)
    word = jnp.int64 if info.bits == 64 else jnp.int32
    field = jax.lax.bitcast_convert_type(jnp.abs(x), word) >> info.nmant
    return field.astype(jnp.int32) + (int(info.minexp) - 1)


def power_of_two(e: Int32[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """``2**e`` exactly, for exponents of normal numbers.

    >>> power_of_two(jnp.array([0, 3, -2]), jnp.dtype("float32"))
    Array([1.  , 8.  , 0.25], dtype=float32)
    """
    info = jnp.finfo(dtype)
    word = jnp.int64 if info.bits == 64 else jnp.int32
    return jax.lax.bitcast_convert_type((e.astype(word) - (int(info.minexp) - 1)) << info.nmant, dtype)


class Minifloat(NamedTuple):
    """What a minifloat's bit patterns mean.

    Fields:
      bits: of a code, with the sign, which is on top.
      mantissa: the lowest bits.
      bias: of the exponent.
    """

    bits: int
    mantissa: int
    bias: int


def to_table(
    x: Float[Array, "*shape"],
    levels: tuple[float, ...],
    *,
    noise: Float[Array, "*shape"] | None = None,
    clipped: bool = True,
) -> Float[Array, "*shape"]:
    """The nearest level, or with ``noise`` in [0, 1) a neighbour such that the expectation is ``clip(x)``; NaN stays.

    The gradient is straight through, and where ``clipped`` cut outside the levels' cells: half the end cell beyond it.

    >>> to_table(jnp.array([0.7, -2.4, 9.0]), (-1.0, 0.0, 1.0, 4.0))
    Array([ 1., -1.,  4.], dtype=float32)
    """
    frozen = jax.lax.stop_gradient(x)
    value = _table(frozen, levels, noise)
    return _through(x, jnp.where(jnp.isnan(frozen), frozen, value), levels, clipped)


def to_minifloat(
    x: Float[Array, "*shape"],
    kind: Minifloat,
    levels: tuple[float, ...],
    *,
    noise: Float[Array, "*shape"] | None = None,
    clipped: bool = True,
    to_even: bool = True,
) -> Float[Array, "*shape"]:
    """:func:`to_table` by arithmetic, for the levels of a minifloat; halves go to the even code or towards zero.

    >>> to_minifloat(jnp.array([0.2, 0.25, 9.0]), Minifloat(3, 1, 1), (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
    Array([0., 0., 3.], dtype=float32)
    """
    frozen = jax.lax.stop_gradient(x)
    short = 1.0 if to_even or noise is not None else hair(x.dtype)
    value = _minifloat(frozen, kind, levels[-1], noise, short)
    return _through(x, jnp.where(jnp.isnan(frozen), frozen, value), levels, clipped)


def _through(x: jax.Array, value: jax.Array, levels: tuple[float, ...], clipped: bool) -> jax.Array:
    """The level with the gradient of what was rounded to it."""
    ends = levels[0], levels[-1]
    inner = levels[1], levels[-2]
    low, high = ((end + (end - near) / 2) * _SLACK for end, near in zip(ends, inner, strict=True))
    return straight_through(x, value, (x >= low) & (x <= high) if clipped else None)


def table_codes(numbers: Float[Array, "*shape"], levels: tuple[float, ...]) -> UInt8[Array, "*shape"]:
    """The index of each number, which is a level."""
    return _index(numbers, np.asarray(levels[:-1]))


def table_values(codes: Num[Array, "*shape"], levels: tuple[float, ...], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The inverse of :func:`table_codes`, bit for bit."""
    table = jnp.asarray(np.asarray(levels, np.float64), dtype)
    return table.at[codes.astype(jnp.int32)].get(mode="clip")


def minifloat_codes(numbers: Float[Array, "*shape"], kind: Minifloat) -> UInt8[Array, "*shape"]:
    """The bit pattern of each number, which is a level."""
    sign = (numbers < 0).astype(jnp.int32) << (kind.bits - 1)
    magnitude = jnp.abs(numbers)
    unit = _unit(magnitude, kind)
    steps = (magnitude * power_of_two(-unit, magnitude.dtype)).astype(jnp.int32)
    code = steps + ((unit + kind.mantissa - (1 - kind.bias)) << kind.mantissa)
    return (code + sign).astype(jnp.uint8)


def minifloat_values(codes: Num[Array, "*shape"], kind: Minifloat, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The inverse of :func:`minifloat_codes`, bit for bit."""
    m, word = kind.mantissa, codes.astype(jnp.int32)
    magnitude = word & (2 ** (kind.bits - 1) - 1)
    field = magnitude >> m
    whole = (magnitude & (2**m - 1)) + jnp.where(field > 0, 2**m, 0)
    value = whole.astype(dtype) * power_of_two(jnp.maximum(field, 1) - (kind.bias + m), dtype)
    return jnp.where(word > magnitude, -value, value)


def _minifloat(x: jax.Array, kind: Minifloat, top: float, noise: jax.Array | None, short: float) -> jax.Array:
    """In units of the binade's spacing a minifloat's mantissa is an integer, and its parity that of the code."""
    magnitude = jnp.minimum(jnp.abs(x), jnp.asarray(top, x.dtype)) * short
    unit = _unit(magnitude, kind)
    steps = magnitude * power_of_two(-unit, x.dtype)
    if noise is None:
        steps = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        steps = whole + (noise < steps - whole).astype(x.dtype)
    value = jnp.minimum(steps * power_of_two(unit, x.dtype), jnp.asarray(top, x.dtype))
    return jnp.where((x < 0) & (value > 0), -value, value)


def _unit(magnitude: jax.Array, kind: Minifloat) -> jax.Array:
    """The exponent of the spacing of the levels about a magnitude."""
    return jnp.maximum(exponent_of(magnitude), 1 - kind.bias) - kind.mantissa


def _table(x: jax.Array, levels: tuple[float, ...], noise: jax.Array | None) -> jax.Array:
    if noise is None:
        return _chosen(x, _edges(levels, x.dtype), levels)
    x = jnp.clip(x, levels[0], levels[-1])  # apart from the product that made it, in jit as in eager
    below = _below(np.asarray(levels[1:-1], x.dtype))
    low, high = _chosen(x, below, levels[:-1]), _chosen(x, below, levels[1:])
    return jnp.where(noise * (high - low) < x - low, high, low)


def _edges(levels: tuple[float, ...], dtype: jnp.dtype) -> np.ndarray:
    """Between two levels, the largest number that belongs to the lower.

    Halves, and what is one but for rounding errors, go towards zero, as :func:`nearest` has it; at zero upward.
    """
    values = np.asarray(levels, np.float64)
    middle = (values[:-1] + values[1:]) / 2
    return np.where(middle == 0, _below(np.zeros((), dtype)), (middle / hair(dtype)).astype(dtype))


def _below(x: np.ndarray) -> np.ndarray:
    """The next smaller number; of 0 and its neighbours the negative normal one, for subnormals may be read as 0."""
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) <= tiny, -tiny, np.nextafter(x, -np.inf, dtype=x.dtype))


def _chosen(x: jax.Array, edges: np.ndarray, levels: tuple[float, ...]) -> jax.Array:
    """``levels[i]`` for the i edges below x."""
    if len(levels) > _FEW:
        return table_values(_index(x, edges), levels, x.dtype)
    value = jnp.full_like(x, levels[0])
    for edge, level in zip(edges, levels[1:], strict=True):
        value = jnp.where(x > edge, jnp.asarray(level, x.dtype), value)
    return value


def _index(x: jax.Array, edges: np.ndarray) -> jax.Array:
    """How many edges are below x."""
    if len(edges) < _FEW:
        return sum(
            ((x > jnp.asarray(edge, x.dtype)).astype(jnp.uint8) for edge in edges), jnp.zeros(x.shape, jnp.uint8)
        )
    table = jnp.asarray(edges, x.dtype)
    return jnp.searchsorted(table, x, method="scan_unrolled").astype(jnp.uint8)
