"""Products of float activations and a packed weight in plain jax.numpy: what kernels fall back on and are tested by.

Three forms. **Sums** for one row: the bytes are multiplied by the activations and summed in one kernel, which reads
packed bytes and writes a number for each feature. **Chunks** for more on CPU: a few features at a time are dequantized
into what a core's cache holds, and multiplied. **Whole** for more elsewhere: the weight is dequantized, then multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def form_of(rows: int, w: PackedWeight) -> str:
    """The name of the form for so many rows."""
    cpu, other = (form.__name__ for form in _forms(rows, w))
    names = {"wrapped_sums": "sums", "shifted_sums": "sums"}
    cpu, other = names.get(cpu, cpu), names.get(other, other)
    return cpu if cpu == other else f"{cpu} on CPU, else {other}"


def summable(w: PackedWeight) -> bool:
    """Whether sums of products of bytes can be: a code is one field of an integer, and no block has two scales."""
    return w.is_integer and len(FIELDS[w.bits]) == 1 and (w.scale.shape[-1] == 1 or w.group % w.block == 0)


def wrapped_sums(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row on CPU: bytes are multiplied by numbers, and nothing else is done to them.

    XLA on CPU keeps products, sums and conversions of bytes in one kernel with the sum over them, and writes out what
    is shifted or masked. So no code is cut out: of a byte ``Σ f_j 2**(w j)`` the product ``2**(8 - w (j + 1))``, modulo
    256, is field j at the top with those below it, which are taken out of the sum by the activations:
    ``Σ f_j x_j == Σ_j wrapped_j (x_j - x_(j+1) / 2**w) / 2**(8 - w)``, exactly.

    Infinities would meet in these differences: a row that has some, or NaN, goes by :func:`chunks`. The branch also
    keeps XLA from making the factors, which are alike in all products of a program, once for all, in the bytes' size.
    """
    if w.bits == 8:
        return _wrapped(x, w)
    return lax.cond(jnp.isfinite(x).all(), _wrapped, chunks, x, w)


def _wrapped(x: jax.Array, w: PackedWeight) -> jax.Array:
    data, runs = _paired(x, w)
    width, sums = w.bits, []
    for j, run in enumerate(runs):
        above = runs[j + 1] * 2.0**-width if j + 1 < len(runs) else jnp.zeros_like(run)
        by = (run - above) * 2.0 ** (width - 8)
        top = data if j + 1 == len(runs) else data * jnp.uint8(2 ** (8 - width * (j + 1)))
        sums.append(_scaled((top.astype(x.dtype) * by[None]).sum(-1), w))
    return _with_offset(sum(sums[1:], sums[0]), x, w)


def shifted_sums(x: jax.Array, w: PackedWeight) -> jax.Array:
    """One row elsewhere: codes are cut out of the bytes by shifts, multiplied and summed in one kernel."""
    data, runs = _paired(x, w)
    width, mask = w.bits, jnp.uint8(2**w.bits - 1)
    fields = [data] if width == 8 else [(data >> jnp.uint8(width * j)) & mask for j in range(len(runs))]
    products = [field.astype(x.dtype) * run[None] for field, run in zip(fields, runs, strict=True)]
    return _with_offset(_scaled(sum(products[1:], products[0]).sum(-1), w), x, w)


def _paired(x: jax.Array, w: PackedWeight) -> tuple[jax.Array, list[jax.Array]]:
    """Bytes ``(features, groups, bytes)``, and for each code in a byte the activations ``(groups, bytes)`` it meets.

    The axis of groups is left out where there is one.
    """
    runs, groups = 8 // w.bits, w.scale.shape[-1]
    by_run = jnp.pad(x[0], (0, w.padded - w.length)).reshape(-1, runs, w.block // runs)
    shape = (-1,) if groups == 1 else (groups, -1)
    data = w.codes if groups == 1 else w.codes.reshape(w.codes.shape[0], *shape)
    data = lax.optimization_barrier(data)  # or XLA cuts it into groups after its conversion, one by one
    return data, [by_run[:, j].reshape(shape) for j in range(runs)]


def _scaled(sums: jax.Array, w: PackedWeight) -> jax.Array:
    """A number for each feature, of one for each of its groups."""
    return sums * w.scale[:, 0] if w.scale.shape[-1] == 1 else (sums * w.scale).sum(-1)


def _with_offset(y: jax.Array, x: jax.Array, w: PackedWeight) -> jax.Array:
    """``y + Σ_g scale_g (lowest - zero_g) Σ x``: codes begin at the lowest number."""
    lowest = 0.0 if w.bits == 8 else -(2.0 ** (w.bits - 1))
    if w.zero is None and not lowest:
        return y[None]
    offset = jnp.full_like(w.scale, lowest) if w.zero is None else lowest - w.zero
    of_x = x.reshape(w.scale.shape[-1], -1).sum(-1)
    return (y + (offset * w.scale * of_x[None]).sum(-1))[None]


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
