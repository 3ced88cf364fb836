"""A cache of keys and values in codes: appended in place, and read by attention as it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.errors import count_known
from jaxcomp.core.specs import check_positive, is_integer
from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.attention import Given, How, attend_rows, block_size, place
from jaxcomp.kernels.rows import CodedRows, blank_rows, checked_grid, no_gradient
from jaxcomp.quantization.grids import Grid, Int

INT8 = Int(8)


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far as codes, with a scale a head and token; what is there is never rewritten.

    A pytree of fixed shapes that knows no position: where tokens go is an argument, the one that positional embeddings
    have too. So a scan over layers steps over stacked caches, rows of a batch may be of different lengths, and to go
    back (speculative decoding) is to pass a smaller ``start``. Donate it to a jitted step, and it is updated in place.

    Attributes:
      keys, values: ``([layers,] batch, heads, capacity, width)``.
    """

    keys: CodedRows
    values: CodedRows

    @property
    def capacity(self) -> int:
        """How many tokens a row of the batch has room for."""
        return int(self.keys.codes.shape[-2])

    def append(
        self, k: jax.Array, v: jax.Array, start: int | jax.Array, *, layer: int | jax.Array | None = None
    ) -> KVCache:
        """The cache with new tokens at ``start, start + 1, …``; only they are quantized.

        Args:
          k, v: ``(batch, new, heads, width)``.
          start: how many tokens there are before them, one integer or ``(batch,)`` of them.
          layer: of a cache with layers, which one.

        Raises:
          ValueError: shapes that do not fit, or, where it is known, tokens beyond the capacity. In jit, where ``start``
            is not known, such tokens are dropped, and attention at their positions is NaN.
          TypeError: ``start`` or ``layer`` is no integer; or, at the time of differentiation, a gradient is asked for.
        """
        self._check_new(k, v)
        layer = self._layer("append", layer)
        start = self._start("append", start, k.shape[1])

        def written(old: CodedRows, x: jax.Array) -> CodedRows:
            new = old.of(jnp.swapaxes(no_gradient("append", x), 1, 2))
            put = _put_each if start.ndim else _put
            return jax.tree.map(lambda a, b: put(a, b, start, layer=layer), old, new)

        return KVCache(written(self.keys, k), written(self.values, v))

    def attend(
        self,
        q: jax.Array,
        start: int | jax.Array,
        *,
        layer: int | jax.Array | None = None,
        causal: bool = True,
        window: int | None = None,
        mask: jax.Array | None = None,
        scale: float | None = None,
        block: int | None = None,
    ) -> jax.Array:
        """Attention of queries at ``start, start + 1, …`` to the cached tokens up to their own, which is appended.

        The sums are float32 (float64 for float64 queries); what is multiplied are codes, so a GPU or TPU at its default
        precision rounds the queries and the probabilities alone. Tokens are read in blocks, those in use alone: the
        time is that of the tokens so far, not of the capacity.

        Args:
          q: ``(batch, queries, query heads, width)``; a whole number of query heads shares each head of the cache.
          start: as in :meth:`append`.
          layer: of a cache with layers, which one.
          causal: whether each query sees the tokens up to its own; else all see the ``start`` tokens before them, as in
            attention to another sequence.
          window: see that many last tokens only.
          mask: booleans that broadcast to ``(batch, queries, capacity)``; False hides a token.
          scale: of the scores; None is ``width**-0.5``.
          block: how many tokens are read at once; None takes what a core's cache holds.

        Returns:
          ``(batch, queries, query heads, width of values)`` in the type of ``q``; 0 where a query sees no token, NaN at
          positions that the cache has no room for, and where keys or values that are seen were not finite.

        Raises:
          ValueError: shapes that do not fit, or, where it is known, a position beyond the capacity.
          TypeError: ``start`` or ``layer`` is no integer; or, at the time of differentiation, a gradient is asked for.
        """
        batch, heads = self._check_queries(q)
        check_positive("attend", window, "window")
        check_positive("attend", block, "block")
        layer, count = self._layer("attend", layer), q.shape[1]
        start = self._start("attend", start, count if causal else 0)
        size = min(block or block_size(self.keys, batch, heads), self.capacity)
        last = jnp.atleast_1d(start)[:, None] + (jnp.arange(count, dtype=jnp.int32)[None] if causal else -1)
        last = jnp.broadcast_to(last, (last.shape[0], count))
        hidden = self._mask(mask, (batch, count, self.capacity))
        grouped = jnp.transpose(no_gradient("attend", q).reshape(batch, count, heads, -1, q.shape[-1]), (0, 2, 3, 1, 4))
        by = float(q.shape[-1] ** -0.5 if scale is None else scale)
        out = attend_rows(Given(grouped, self.keys, self.values, last, hidden, layer), How(by, size, window))
        lost = (last >= self.capacity) | (last < (0 if causal else -1))
        out = jnp.where(lost[:, None, None, :, None], jnp.nan, out).astype(q.dtype)
        return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, count, q.shape[2], -1)

    # Checks

    def _rows(self) -> tuple[int, int]:
        """Batch, which may be an expression of ``jax.export.symbolic_shape``, and heads."""
        batch, heads = self.keys.codes.shape[-4:-2]
        return batch, heads

    def _check_new(self, k: jax.Array, v: jax.Array) -> None:
        batch, heads = self._rows()
        for name, x, rows in (("keys", k, self.keys), ("values", v, self.values)):
            new = x.shape[1] if x.ndim == 4 else 0
            if not new or x.shape != (batch, new, heads, rows.width):
                raise ValueError(
                    f"append: {name} of shape {x.shape} do not fit a cache of batch {batch}, {heads} heads and width"
                    f" {rows.width}; pass ({batch}, new tokens, {heads}, {rows.width})."
                )
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"append: {k.shape[1]} keys come with {v.shape[1]} values; pass as many of both.")
        if k.shape[1] > self.capacity:
            raise ValueError(
                f"append: {k.shape[1]} tokens are more than the cache's capacity of {self.capacity}; make it larger."
            )

    def _check_queries(self, q: jax.Array) -> tuple[int, int]:
        batch, heads = self._rows()
        width = self.keys.width
        if q.ndim != 4 or q.shape[0] != batch or q.shape[2] % heads or q.shape[3] != width or not q.size:
            raise ValueError(
                f"attend: queries of shape {q.shape} do not fit a cache of batch {batch}, {heads} heads and width"
                f" {width}; pass ({batch}, queries, a multiple of {heads}, {width})."
            )
        return batch, heads

    def _layer(self, owner: str, layer: int | jax.Array | None) -> jax.Array | None:
        layers = self.keys.codes.shape[:-4]
        if len(layers) > 1 or bool(layers) != (layer is not None):
            mend = f"pass layer= of its {layers[0]} layers" if layers else "leave layer= out"
            raise ValueError(f"{owner}: the cache has the axes {self.keys.shape}, and layer is {layer!r}; {mend}.")
        if layer is None:
            return None
        at = _integers(owner, "layer", layer)
        if at.ndim or count_known(lambda i: (i < 0) | (i >= layers[0]), at):
            raise ValueError(f"{owner}: layer must be one of 0..{layers[0] - 1}, got {layer!r}.")
        return at

    def _start(self, owner: str, start: int | jax.Array, count: int) -> jax.Array:
        at, (batch, _) = _integers(owner, "start", start), self._rows()
        if at.shape not in ((), (batch,)):
            raise ValueError(f"{owner}: start must be one integer or one for each of {batch} rows, got {at.shape}.")
        if count_known(lambda i: (i < 0) | (i > self.capacity - count), at):
            raise ValueError(
                f"{owner}: {count} tokens from position {start!r} on do not fit a cache of {self.capacity} tokens; make"
                " it larger, or begin a new one."
            )
        return at

    def _mask(self, mask: jax.Array | None, shape: Shape) -> jax.Array | None:
        if mask is None:
            return None
        good = mask.dtype == jnp.bool_ and mask.ndim == 3
        if not good or any(n not in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
            raise ValueError(
                f"attend: the mask is of {mask.dtype} and shape {mask.shape}; pass booleans that broadcast to"
                f" (batch, queries, capacity) = {shape}."
            )
        return jnp.broadcast_to(mask, (*mask.shape[:2], shape[2]))


def kv_cache(
    shape: Shape,
    *,
    keys: Grid = INT8,
    values: Grid | None = None,
    value_width: int | None = None,
    layers: int | None = None,
    dtype: DType = jnp.float32,
) -> KVCache:
    """An empty cache: codes of ``keys.bits`` and ``values.bits`` bits and a float32 scale for each head and token.

    Int(8) and Int(4), float8 (``E4M3``), tables (``NF4()``); an asymmetric grid keeps a zero point beside the scale, a
    byte: of use to values of 4 bits and fewer. Codes of fewer than 8 bits are packed along the width.

    Args:
      shape: ``(batch, capacity, heads, width)``.
      keys: the grid of the keys.
      values: that of the values; the same if None.
      value_width: of the values; the same as of the keys if None.
      layers: stack that many caches, for programs that scan over layers.
      dtype: of the keys and values that it stands for.

    Raises:
      ValueError: a size that is no positive integer.
      TypeError: a grid whose codes have no scale outside.

    >>> from jaxcomp.core.leaves import nbytes
    >>> cache = kv_cache((1, 128, 2, 64), keys=Int(8), values=Int(4))
    >>> k = v = jnp.ones((1, 3, 2, 64))
    >>> cache = cache.append(k, v, 0)
    >>> cache.attend(jnp.ones((1, 1, 4, 64)), 2).shape, nbytes(cache)
    ((1, 1, 4, 64), 26624)

    Source: Liu et al. 2024, arXiv:2402.02750, for values per token. Deviation: keys per token too, so that nothing is
    kept in float until a group of tokens is full, and none is quantized twice; keys whose channels differ are balanced
    by ``k / c`` and ``q * c`` before, which leaves their products as they are.
    """
    sizes = {"batch": shape[0], "capacity": shape[1], "heads": shape[2], "width": shape[3]} if len(shape) == 4 else {}
    if not sizes or not all(is_integer(n) and n > 0 for n in sizes.values()):
        raise ValueError(
            f"kv_cache: shape must be four positive integers (batch, capacity, heads, width), got {shape}."
        )
    for name, n in (("value_width", value_width), ("layers", layers)):
        check_positive("kv_cache", n, name)
    batch, capacity, heads, width = shape
    lead = () if layers is None else (layers,)
    first = checked_grid("kv_cache", "keys", keys)
    second = first if values is None else checked_grid("kv_cache", "values", values)
    rows = (*lead, batch, heads, capacity)
    return KVCache(blank_rows((*rows, width), first, dtype), blank_rows((*rows, value_width or width), second, dtype))


def _put(old: jax.Array, new: jax.Array, start: jax.Array, *, layer: jax.Array | None) -> jax.Array:
    """``new`` tokens in the place of old ones; those that would lie outside are dropped, and nothing else moves."""
    room, count = old.shape[-2], new.shape[-2]
    begin = jnp.clip(start, 0, room - count)
    source = jnp.arange(count, dtype=jnp.int32) + (begin - start)
    there = place(old, begin, layer)
    kept = lax.dynamic_slice(old, there, (1,) * (old.ndim - new.ndim) + new.shape)
    moved = jnp.take(new, jnp.clip(source, 0, count - 1), axis=-2)
    inside = ((source >= 0) & (source < count))[:, None]
    return lax.dynamic_update_slice(old, jnp.where(inside, moved, kept.reshape(new.shape)).reshape(kept.shape), there)


def _put_each(old: jax.Array, new: jax.Array, start: jax.Array, *, layer: jax.Array | None) -> jax.Array:
    """:func:`_put` with a start for each row of the batch: one scatter, which drops what lies outside."""
    batch, _, count, _ = new.shape
    position = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    position = jnp.where(position < 0, old.shape[-2] - position, position)  # a negative one would count from the end
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    where = (row, slice(None), position) if layer is None else (layer, row, slice(None), position)
    return old.at[where].set(jnp.swapaxes(new, 1, 2), mode="drop", unique_indices=True)


def _integers(owner: str, name: str, x: int | jax.Array) -> jax.Array:
    """As int32.

    Raises:
      TypeError: it is something else.
    """
    if not is_integer(x) and not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{owner}: {name} must be integers, got {x!r}.")
    return jnp.asarray(x, jnp.int32)
