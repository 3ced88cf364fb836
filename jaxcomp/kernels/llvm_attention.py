"""Attention of a few queries to keys and values in codes on a CPU: one pass over the bytes, in LLVM code."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType
from jaxcomp.kernels.llvm_calls import Work, call, missing
from jaxcomp.kernels.llvm_heads import WIDE, Codes, Heads, attended
from jaxcomp.kernels.rows import CodedRows

MOST, MOST_OF_FLOATS = 16, 8
"""Queries that share a head of integers and of minifloats; more are faster as products of matrices."""


def refusal(queries: int, dtype: DType, keys: CodedRows, values: CodedRows) -> str | None:
    """Why the kernel cannot run attention on the machine that is here; None if it can.

    Args:
      queries: that share a head of the cache.
      dtype: theirs.
      keys, values: ``([layers,] batch, heads, tokens, width)``.
    """
    if why := missing():
        return why
    most = MOST_OF_FLOATS if keys.grid.minifloat or values.grid.minifloat else MOST
    if not 0 < queries <= most:
        return f"it takes {most} queries that share a head, and there are {queries}"
    if dtype.itemsize > 4 or keys.scale.dtype != jnp.float32:
        return f"its sums are in float32, and queries are {dtype}, scales {keys.scale.dtype}"
    if keys.codes.shape[-2] % WIDE:
        return f"it takes {WIDE} tokens at a time, and there is room for {keys.codes.shape[-2]}"
    for rows in (keys, values):
        if rows.grid.code_range is None and rows.grid.minifloat is None:
            return f"the codes of {rows.method} are neither integers nor floats, but names of levels"
        if rows.runs(WIDE) is None:
            return f"the codes of {rows.method} of width {rows.width} do not lie in runs of {WIDE}"
    return None


def llvm_attention(
    q: jax.Array,
    keys: CodedRows,
    values: CodedRows,
    seen: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    layer: jax.Array | None,
) -> jax.Array:
    """``softmax(q · keys) · values`` in float32; a query that sees nothing gives 0.

    Args:
      q: ``(batch, heads, sharing, queries, width)``, times the scale of the scores.
      keys, values: ``([layers,] batch, heads, tokens, width)``.
      seen: booleans ``(batch or 1, queries, tokens)``.
      bounds: the first token that any query sees, and the one after the last.
      layer: which of the layers, or None where there is no such axis.

    Returns:
      ``(batch, heads, sharing, queries, width of values)``.
    """
    batch, heads, sharing, queries, width = q.shape
    tokens = keys.codes.shape[-2]
    shape = Heads(Codes.of(keys), Codes.of(values), sharing, queries, heads, seen.shape[0] > 1)
    operands = [q.astype(jnp.float32).reshape(-1, width)]
    for rows in (keys, values):
        # As they lie: what is reshaped is a copy to XLA where tokens are appended in place before.
        operands += [rows.codes, rows.scale, *([] if rows.zero is None else [rows.zero])]
    operands.append(jnp.where(seen, 0.0, -jnp.inf).astype(jnp.float32).reshape(-1, tokens))
    operands.append(jnp.stack([*bounds, _there(keys, layer)])[None].astype(jnp.int32))
    result = jax.ShapeDtypeStruct((operands[0].shape[0], values.width), jnp.float32)
    work = Work(f"attention_{shape.name}", partial(attended, shape), sharing * queries, by=0)
    return call(work, result, *operands).reshape(batch, heads, sharing, queries, -1)


def _there(rows: CodedRows, layer: jax.Array | None) -> jax.Array:
    """The layer, or the nearest that is there, as ``lax.dynamic_slice`` takes it."""
    if layer is None:
        return jnp.int32(0)
    layers = rows.codes.shape[0]
    return jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)
