"""Attention that reads keys and values as codes, a block of tokens at a time, and writes no dense copy of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import DType, PyTree
from jaxcomp.kernels.llvm_attention import llvm_attention, refusal
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.rows import CodedRows
from jaxcomp.trace.primitives import ATTENTION

CACHED = 1 << 19
"""Bytes of dequantized keys that a block aims at: what a core's second-level cache holds beside the values."""
LEAST, MOST = 64, 512
"""Tokens of a block: fewer do not fill a product, more leave the cache."""


class Reach(NamedTuple):
    """Which keys each query sees: ``last - window < position <= last``, and where the mask is True.

    Fields:
      last: int32 ``(batch or 1, queries)``.
      window: how many keys, or None for all.
      mask: booleans ``(batch or 1, queries or 1, tokens)``, or None.
    """

    last: jax.Array
    window: int | None
    mask: jax.Array | None

    def seen(self, position: jax.Array, begin: jax.Array) -> jax.Array:
        """Whether the keys at ``position``, which are a block that begins at ``begin``, are seen."""
        last = self.last[:, :, None]
        seen = position[None, None] <= last
        if self.window is not None:
            seen = seen & (position[None, None] > last - self.window)
        if self.mask is not None:
            seen = seen & lax.dynamic_slice_in_dim(self.mask, begin, position.size, axis=-1)
        return seen[:, None, None]


class Sums(NamedTuple):
    """A softmax so far, as one over blocks is made: the largest score, the sum of exponentials, that of values."""

    top: jax.Array
    total: jax.Array
    out: jax.Array


class How(NamedTuple):
    """What attention knows beside arrays.

    Fields:
      scale: of the scores.
      block: how many tokens are read at once.
      window: see :class:`Reach`.
    """

    scale: float
    block: int
    window: int | None


class Given(NamedTuple):
    """What attention is of.

    Fields:
      q: ``(batch, heads, sharing, queries, width)``; ``sharing`` query heads read one head of keys.
      keys, values: ``([layers,] batch, heads, tokens, width)``.
      last, mask: see :class:`Reach`.
      layer: which of the layers, or None where there is no such axis.
    """

    q: jax.Array
    keys: CodedRows
    values: CodedRows
    last: jax.Array
    mask: jax.Array | None
    layer: jax.Array | None


class _Static(TypedDict):
    """What the primitive knows beside arrays: how they make operands, what is done, and that in JAX's operations."""

    tree: PyTree
    how: How
    jaxpr: ClosedJaxpr


def attend_rows(given: Given, how: How) -> jax.Array:
    """``softmax(q · keys * scale) · values``, ``(batch, heads, sharing, queries, width of values)``.

    A few queries to integers meet the bytes in one pass in code of our own on a CPU, if llvmlite is installed; else a
    block of tokens after the other becomes floats. A query that sees nothing gives 0.
    """
    leaves, tree = jax.tree.flatten(given)
    if explicit_mesh(leaves) is not None:
        return _plain(given, how)
    body = _in_jax(tree, how).trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)).jaxpr
    return _primitive.bind(*leaves, tree=tree, how=how, jaxpr=body)[0]


@cache
def _in_jax(tree: PyTree, how: How) -> Any:
    """What readers of programs see, and what runs where there is no kernel; traced once for all that are alike."""
    return jax.jit(lambda *leaves: [_plain(jax.tree.unflatten(tree, leaves), how)])


def _kernel(given: Given, how: How) -> jax.Array:
    """In one pass."""
    reach = Reach(given.last, how.window, given.mask)
    tokens = given.keys.codes.shape[-2]
    seen = reach.seen(jnp.arange(tokens, dtype=jnp.int32), jnp.int32(0))[:, 0, 0]
    bounds = _blocks(reach, 1, tokens)
    return llvm_attention(given.q.astype(jnp.float32) * how.scale, given.keys, given.values, seen, bounds, given.layer)


@cache
def _jitted(tree: PyTree, how: How) -> Callable[..., list[jax.Array]]:
    return jax.jit(lambda *leaves: [attend_rows(jax.tree.unflatten(tree, leaves), how)])


def _for_cpu(*leaves: jax.Array, **static: Unpack[_Static]) -> list[jax.Array]:
    given: Given = jax.tree.unflatten(static["tree"], leaves)
    if refusal(given.q.shape[2] * given.q.shape[3], given.q.dtype, given.keys, given.values):
        return run_call(*leaves, **static)
    return [_kernel(given, static["how"])]


_primitive = call_in_one_piece(ATTENTION, _for_cpu)
_primitive.def_impl(lambda *leaves, **static: _jitted(static["tree"], static["how"])(*leaves))


def _plain(given: Given, how: How) -> jax.Array:
    """A block of tokens after the other, the keys' and values' scales outside both products.

    ``q · k == (q · numbers - zero * sum(q)) * s``, and ``sum_t p_t v_t`` is the sum of ``p_t s_t`` times the numbers,
    less that of ``p_t s_t z_t``: what is multiplied are the numbers, and only a block of them is ever held as floats.
    Blocks that nobody sees are not read.
    """
    q, keys, values, layer = given.q, given.keys, given.values, given.layer
    reach, scale, block = Reach(given.last, how.window, given.mask), how.scale, how.block
    tokens, kind = keys.codes.shape[-2], operand_type(q.dtype)
    sums_type = keys.scale.dtype
    totals, q = jnp.sum(q.astype(sums_type), -1, keepdims=True), q.astype(kind)

    def step(i: jax.Array, sums: Sums) -> Sums:
        begin = jnp.minimum(i * block, tokens - block)
        position = begin + jnp.arange(block, dtype=jnp.int32)
        new = position >= i * block  # the last block may begin in the one before
        seen = reach.seen(position, begin) & new.reshape(1, 1, 1, 1, -1)
        k, v = tokens_of(keys, begin, block, layer), tokens_of(values, begin, block, layer)
        scores = _product("bhgqd,bhtd->bhgqt", q, k, sums_type)
        if k.zero is not None:
            scores = scores - totals * _flat(k.offsets())
        scores = jnp.where(seen, scores * (_flat(k.scale) * scale), -jnp.inf)
        top = jnp.maximum(sums.top, jnp.max(scores, -1, keepdims=True))
        at = jnp.where(top == -jnp.inf, 0.0, top)
        weights, less = jnp.exp(scores - at), jnp.exp(sums.top - at)
        scaled = jnp.where(seen, weights * _flat(v.scale), 0.0)  # the scale of what is hidden may be NaN
        out = _product("bhgqt,bhtd->bhgqd", scaled.astype(kind), v, sums_type)
        if v.zero is not None:
            out = out - jnp.sum(scaled * _flat(v.offsets()), -1, keepdims=True)
        total = sums.total * less + jnp.sum(weights, -1, keepdims=True)
        return Sums(top, total, sums.out * less + out)

    rows = q.shape[:-1]
    nothing = jnp.zeros((*rows, 1), sums_type)
    sums = Sums(nothing - jnp.inf, nothing, jnp.zeros((*rows, values.width), sums_type))
    sums = lax.fori_loop(*_blocks(reach, block, tokens), step, sums)
    return sums.out / jnp.where(sums.total == 0, 1.0, sums.total)


def _blocks(reach: Reach, block: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The first block that a query sees, and the one after the last."""
    until = jnp.clip(jnp.max(reach.last) + 1, 0, tokens)
    first = jnp.zeros((), jnp.int32)
    if reach.window is not None:
        first = jnp.clip(jnp.min(reach.last) + 1 - reach.window, 0, tokens) // block
    return first, (until + (block - 1)) // block


def _product(spec: str, x: jax.Array, rows: CodedRows, dtype: DType) -> jax.Array:
    return jnp.einsum(spec, x, rows.numbers().astype(x.dtype), preferred_element_type=dtype)


def _flat(per_row: jax.Array | None) -> jax.Array:
    """A number for each token, ``(batch, heads, tokens, 1)``, beside scores."""
    assert per_row is not None
    return per_row[..., 0][:, :, None, None]


def tokens_of(rows: CodedRows, begin: jax.Array, count: int, layer: jax.Array | None) -> CodedRows:
    """``count`` tokens of one layer."""

    def cut(a: jax.Array) -> jax.Array:
        if layer is None:
            return lax.dynamic_slice_in_dim(a, begin, count, axis=-2)
        sizes = (1, *a.shape[1:-2], count, a.shape[-1])
        return lax.dynamic_slice(a, place(a, begin, layer), sizes)[0]

    return jax.tree.map(cut, rows)


def place(a: jax.Array, begin: jax.Array, layer: jax.Array | None) -> list[jax.Array]:
    """Where the token ``begin`` of a layer is in a field of :class:`CodedRows`."""
    origin = jnp.zeros((), jnp.int32)
    where = [origin] * (a.ndim - 2) + [begin, origin]
    return where if layer is None else [layer, *where[1:]]


def operand_type(dtype: DType) -> DType:
    """What is multiplied: codes are exact in bfloat16; a probability times a scale may be too small for float16."""
    if dtype == jnp.float64:
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def block_size(keys: CodedRows, batch: int, heads: int) -> int:
    """A power of two of tokens whose keys take about ``CACHED`` bytes as floats; all tokens where they are fewer.

    In a program for any batch those of one sequence are counted.
    """
    sequences = batch if isinstance(batch, int) else 1
    tokens, size = int(keys.codes.shape[-2]), sequences * heads * keys.width * 4
    block = LEAST
    while block < MOST and 2 * block * size <= CACHED:
        block *= 2
    return min(block, tokens)
