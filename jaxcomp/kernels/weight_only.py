"""Products of float activations and a packed weight in plain jax.numpy: what kernels fall back on and are tested by.

Three forms. **Sums** for one row: the bytes are multiplied by the activations and summed in one kernel, which reads
packed bytes and writes a number for each feature. **Chunks** for more on CPU: a few features at a time are dequantized
into what a core's cache holds, and multiplied. **Whole** for more elsewhere: the weight is dequantized, then multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.types import DType
from jaxcomp.kernels.packing import FIELDS, PackedWeight

CHUNK = 1 << 17
"""How many weights are dequantized at once on CPU: half a megabyte of float32."""


def weight_only(x: jax.Array, w: PackedWeight, *, dtype: DType | None = None) -> jax.Array:
    """``x @ values(w).T`` with sums in the scale's type, by the form for these shapes on the platform that runs it.

    Args:
      x: ``(..., length)``, float.
      w: ``(features, length)``; its values are not rounded to its own type.
      dtype: of the result ``(..., features)``; that of ``x`` if None.

    >>> from jaxcomp.quantization import Int
    >>> codes = jnp.array([[1, 2], [3, -4]], jnp.int8)
    >>> w = PackedWeight(codes, jnp.array([[1.0], [0.5]]), None, Int(8), 2, 2, 8, jnp.dtype("float32"))
    >>> weight_only(jnp.array([1.0, 10.0]), replace(w, codes=jnp.pad(codes, ((0, 0), (0, 6))))).tolist()
    [21.0, -18.5]
    """
    rows = x.reshape(-1, w.length).astype(w.scale.dtype)
    cpu, other = _forms(rows.shape[0], w)
    y = cpu(rows, w) if cpu is other else lax.platform_dependent(rows, w, cpu=cpu, default=other)
    return y.reshape(*x.shape[:-1], w.shape[-2]).astype(dtype or x.dtype)


Form = Callable[[jax.Array, PackedWeight], jax.Array]


def _forms(rows: int, w: PackedWeight) -> tuple[Form, Form]:
    """The form on CPU and the one elsewhere."""
    if 0 in (rows, *w.shape):
        return whole, whole
    few = rows == 1 and summable(w)
    return (wrapped_sums if few else chunks), (shifted_sums if few else whole)


def summable(w: PackedWeight) -> bool:
    """Whether sums of products of bytes can be: codes are integers, and no block has two scales."""
    return w.is_integer and (w.scale.shape[-1] == 1 or w.group % w.block == 0)


class _Term(NamedTuple):
    """Part of a sum over a block: bytes, and the activations, or what stands for them, that they are multiplied by."""

    bytes: jax.Array
    by: jax.Array


def wrapped_sums(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row on CPU: a kernel for each code in a byte, that multiplies bytes by numbers and does nothing else.

    XLA on CPU keeps products, sums and conversions of bytes in one kernel with the sum over them, and writes out what
    is shifted or masked. So no code is cut out: of a byte ``Σ f_j 2**(w j)`` the product ``2**(8 - w (j + 1))``, modulo
    256, is field j at the top with those below it, which are taken out of the sum by the activations:
    ``Σ f_j x_j == Σ_j wrapped_j (x_j - x_(j+1) / 2**w) / 2**(8 - w)``, exactly.
    """
    return _sums(x, w, _wrapped, apart=True)


def shifted_sums(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row elsewhere: codes are cut out of the bytes by shifts, multiplied and summed in one kernel."""
    return _sums(x, w, _shifted, apart=False)


def _wrapped(data: jax.Array, x: jax.Array, width: int) -> list[_Term]:
    terms, count = [], 8 // width
    for j in range(count):
        above = x[:, j + 1] * 2.0**-width if j + 1 < count else jnp.zeros_like(x[:, j])
        terms.append(_Term(data * jnp.uint8(2 ** (8 - width * (j + 1))), (x[:, j] - above) * 2.0 ** (width - 8)))
    return terms


def _shifted(data: jax.Array, x: jax.Array, width: int) -> list[_Term]:
    mask = jnp.uint8(2**width - 1)
    return [_Term((data >> jnp.uint8(width * j)) & mask, x[:, j]) for j in range(8 // width)]


def _sums(
    x: jax.Array, w: PackedWeight, cut: Callable[[jax.Array, jax.Array, int], list[_Term]], *, apart: bool
) -> jax.Array:
    """``Σ_g scale_g (Σ_k code_k x_k + (lowest - zero_g) Σ_k x_k)``, with raw codes, of one row.

    Args:
      x: ``(1, length)``.
      w: the weight.
      cut: the terms of one field of the codes, given its bytes ``(features, blocks, bytes)`` and ``(blocks, runs,
        bytes)`` activations.
      apart: whether each term is a kernel of its own.
    """
    features, block = w.codes.shape[0], w.block
    x = jnp.pad(x[0], (0, w.padded - w.length)).reshape(-1, block)
    data = lax.optimization_barrier(w.codes.reshape(features, x.shape[0], -1))  # or it is cut up after its conversion
    terms, at, done = [], 0, 0
    if w.bits == 8:
        terms = [_Term(data, x)]
    else:
        for width in FIELDS[w.bits]:
            size = block * width // 8
            field = data[..., at : at + size]
            parts = cut(field, x.reshape(-1, 8 // width, size), width)
            terms += [_Term(part.bytes, part.by * 2.0**done) for part in parts]
            at, done = at + size, done + width
    lowest = 0 if w.bits == 8 else -(2 ** (w.bits - 1))
    return _scaled(terms, x, w, lowest, apart=apart)


def _scaled(terms: list[_Term], x: jax.Array, w: PackedWeight, lowest: int, *, apart: bool) -> jax.Array:
    groups = w.scale.shape[-1]
    per = 1 if groups == 1 else w.group // w.block  # blocks that share a scale
    dtype = w.scale.dtype
    products = [term.bytes.astype(dtype) * term.by for term in terms]
    if not apart:
        products = [sum(products[1:], products[0])] if len({p.shape for p in products}) == 1 else products
    by_block = [product.sum(-1) for product in products]
    scale = w.scale if per == 1 else jnp.repeat(w.scale, per, -1)
    offset = jnp.asarray(lowest, dtype) if w.zero is None else lowest - w.zero
    if groups == 1:
        y = sum(b.sum(-1) for b in by_block) + (offset * x.sum()).reshape(-1)
        return (y * scale[:, 0])[None]
    of_x = x.reshape(groups, -1).sum(-1)
    y = sum((b * scale).sum(-1) for b in by_block)
    if w.zero is not None or lowest:
        y = y + (offset * w.scale * of_x).sum(-1)
    return y[None]


def chunks(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Some features at a time; for the gradient each is dequantized again, so that no dense weight is kept."""
    features = w.codes.shape[0]
    size = min(features, max(8, CHUNK // max(w.padded, 1)))
    count = -(-features // size)
    rows = x if x.shape[0] > 1 else jnp.concatenate([x, x])  # a product of one row is slow on CPU

    @jax.checkpoint
    def part(x: jax.Array, w: PackedWeight, start: jax.Array) -> jax.Array:
        cut = jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size, 0), w)
        return _dot(x, cut.values())

    starts = np.minimum(np.arange(count) * size, features - size).astype(np.int32)  # the last may overlap
    parts = lax.map(lambda start: part(rows, w, start), starts)[:, : x.shape[0]]
    first = jnp.moveaxis(parts[:-1], 0, 1).reshape(x.shape[0], -1)
    return jnp.concatenate([first, parts[-1][:, (count * size - features) :]], -1)


def whole(x: jax.Array, w: PackedWeight) -> jax.Array:
    """The weight is dequantized first."""
    return _dot(x, w.values())


def _dot(x: jax.Array, values: jax.Array) -> jax.Array:
    return lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=values.dtype)
