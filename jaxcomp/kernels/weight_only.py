"""Products of float activations and a packed weight in plain jax.numpy: what kernels fall back on and are tested by.

Three forms. **Sums** for one row: the bytes are multiplied by the activations and summed in one kernel, which reads
packed bytes and writes a number for each feature. **Chunks** for more on CPU: a few features at a time are dequantized
into what a core's cache holds, and multiplied. **Whole** for more elsewhere: the weight is dequantized first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.types import DType
from jaxcomp.kernels.blocks import ONE, shape_class
from jaxcomp.kernels.packing import FIELDS, PackedWeight
from jaxcomp.kernels.sparse import SparseWeight

CHUNK = 1 << 17
"""How many weights are dequantized at once on CPU: half a megabyte of float32."""
SUMMED = 1 << 19
"""How many are cut out of their bytes at once on CPU: half a megabyte."""


def weight_only(x: jax.Array, w: PackedWeight | SparseWeight, *, dtype: DType | None = None) -> jax.Array:
    """``x @ values(w).T`` with sums in the scale's type, by the form for these shapes on the platform that runs it.

    Args:
      x: ``(..., length)``, float.
      w: ``(features, length)``; its values are not rounded to its own type. A sparse one is made whole.
      dtype: of the result ``(..., features)``; that of ``x`` if None.

    >>> from dataclasses import replace
    >>> from jaxcomp.quantization import Int
    >>> codes = jnp.array([[1, 2], [3, -4]], jnp.int8)
    >>> w = PackedWeight(codes, jnp.array([[1.0], [0.5]]), None, Int(8), 2, 2, 8, jnp.dtype("float32"))
    >>> weight_only(jnp.array([1.0, 10.0]), replace(w, codes=jnp.pad(codes, ((0, 0), (0, 6))))).tolist()
    [21.0, -18.5]
    """
    rows = x.reshape(-1, w.length).astype(w.computed)
    rows, w = in_step(rows, w)
    cpu, other = _forms(rows.shape[0], w)
    y = cpu(rows, w) if cpu is other else lax.platform_dependent(rows, w, cpu=cpu, default=other)
    return y.reshape(*x.shape[:-1], w.shape[-2]).astype(dtype or x.dtype)


def in_step(x: jax.Array, w: PackedWeight | SparseWeight) -> tuple[jax.Array, PackedWeight | SparseWeight]:
    """Activations and a weight that comes with them.

    In a loop over tokens the weight is the same in each step, and XLA would convert its codes in front of the loop, all
    of them, to a dense array.
    """
    if isinstance(w, SparseWeight):
        return x, w  # made whole in front of the loop, if at all
    x, codes = lax.optimization_barrier((x, w.codes))
    return x, replace(w, codes=codes)


Form = Callable[[jax.Array, Any], jax.Array]


def _forms(rows: int, w: PackedWeight | SparseWeight) -> tuple[Form, Form]:
    """The form on CPU and the one elsewhere."""
    if isinstance(w, SparseWeight) or 0 in (rows, *w.shape):
        return whole, whole
    return (sums_of_bytes, sums) if rows == 1 and summable(w) else (chunks, whole)


def summable(w: PackedWeight) -> bool:
    """Whether sums of products of bytes can be: a code is one field of an integer, and groups are whole blocks."""
    whole_blocks = w.scale.shape[-1] == 1 or w.group % w.block == 0 == w.length % w.group
    return w.is_integer and len(FIELDS[w.bits]) == 1 and whole_blocks


def sums(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row: codes are cut out of the bytes by shifts, multiplied and summed in one kernel."""
    data, runs = _paired(x, w)
    products = [field.astype(x.dtype) * run[None] for field, run in zip(_fields(data, w.bits), runs, strict=True)]
    return _scaled(sum(products[1:], products[0]).sum(-1), x, w)


def sums_of_bytes(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row on CPU: XLA keeps conversions and products in one kernel with their sum, but neither shifts nor masks.

    So codes of less than a byte are cut out as bytes first, of some features at a time.
    """
    return _by_features(_apart, SUMMED, x, w) if w.bits < 8 else _apart(x, w)


def _apart(x: jax.Array, w: PackedWeight) -> jax.Array:
    data, runs = _paired(x, w)
    parts = [(f.astype(x.dtype) * run[None]).sum(-1) for f, run in zip(_fields(data, w.bits), runs, strict=True)]
    return _scaled(sum(parts[1:], parts[0]), x, w)


def _fields(data: jax.Array, width: int) -> list[jax.Array]:
    """The codes in each byte, the low ones first."""
    if width == 8:
        return [data]
    shifted = [data >> jnp.uint8(at) if at else data for at in range(0, 8, width)]
    return [*(field & jnp.uint8(2**width - 1) for field in shifted[:-1]), shifted[-1]]


def _paired(x: jax.Array, w: PackedWeight) -> tuple[jax.Array, list[jax.Array]]:
    """Bytes ``(features, groups, bytes)``, and for each code in a byte the activations ``(groups, bytes)`` it meets.

    The axis of groups is left out where there is one.
    """
    runs, groups = 8 // w.bits, w.scale.shape[-1]
    by_run = jnp.pad(x[0], (0, w.padded - w.length)).reshape(-1, runs, w.block // runs)
    shape = (-1,) if groups == 1 else (groups, -1)
    data = w.codes if groups == 1 else w.codes.reshape(w.codes.shape[0], *shape)
    if w.bits == 8:
        data = lax.optimization_barrier(data)  # or XLA cuts into groups after the conversion, by copies
    return data, [by_run[:, j].reshape(shape) for j in range(runs)]


def _scaled(sums: jax.Array, x: jax.Array, w: PackedWeight) -> jax.Array:
    """``Σ_g scale_g (sums_g + (lowest - zero_g) Σ x)``: codes begin at the lowest number."""
    lowest = 0.0 if w.bits == 8 else -(2.0 ** (w.bits - 1))
    if sums.ndim == 1:
        sums = sums[:, None]
    if w.zero is not None or lowest:
        offset = jnp.full_like(w.scale, lowest) if w.zero is None else lowest - w.zero
        sums = sums + offset * x.reshape(w.scale.shape[-1], -1).sum(-1)[None]
    return (sums * w.scale).sum(-1)[None]


def chunks(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Some features at a time are dequantized, and multiplied."""
    if shape_class(x.shape[0]) != ONE:
        return _by_features(whole, CHUNK, x, w)
    return _by_features(whole, CHUNK, jnp.concatenate([x, x]), w)[:1]  # a product of one row is slow on CPU


def _by_features(form: Form, most: int, x: jax.Array, w: PackedWeight) -> jax.Array:
    """A form on at most so many weights at a time; for the gradient each part is made again, and none is kept."""
    features = w.codes.shape[0]
    size = min(features, max(8, most // max(w.padded, 1)))
    count = -(-features // size)
    if count == 1:
        return form(x, w)

    @jax.checkpoint
    def part(x: jax.Array, w: PackedWeight, start: jax.Array) -> jax.Array:
        return form(x, jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size, 0), w))

    starts = np.minimum(np.arange(count) * size, features - size).astype(np.int32)  # the last may overlap
    parts = lax.map(lambda start: part(x, w, start), starts)
    first = jnp.moveaxis(parts[:-1], 0, 1).reshape(x.shape[0], -1)
    return jnp.concatenate([first, parts[-1][:, count * size - features :]], -1)


def dot_of_bytes(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Codes of activations, int8 or int16 of 255 at most, by bytes with a scale a feature: int8 by int8 into int32.

    Numbers of 9 bits are their half and their last bit, two rows of int8; one row of int8 is two as well, for XLA on
    CPU (jax 0.12) makes an int32 array of the whole weight for one.
    """
    halved = x.dtype != jnp.int8
    count = x.shape[0]
    parts = [(x >> 1).astype(jnp.int8), (x & 1).astype(jnp.int8)] if halved else [x, *[x] * (shape_class(count) == ONE)]
    numbers = w.codes[:, : w.length]
    rows = lax.dot_general(
        jnp.concatenate(parts), numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).reshape(len(parts), count, -1)
    totals = (2 * rows[0] + rows[1] if halved else rows[0]).astype(w.scale.dtype)
    if w.zero is not None:
        totals = totals - x.astype(jnp.int32).sum(-1, keepdims=True).astype(totals.dtype) * w.zero[None, :, 0]
    return totals * w.scale[None, :, 0]


def whole(x: jax.Array, w: PackedWeight | SparseWeight) -> jax.Array:
    """The weight is dequantized first."""
    return _dot(x, w.values())


def _dot(x: jax.Array, values: jax.Array) -> jax.Array:
    return lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=values.dtype)
