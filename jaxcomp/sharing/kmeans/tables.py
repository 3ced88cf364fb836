"""Which table serves which element of an array: one for all, one an index of some axes, or one a bucket.

``axes`` are those that keep tables of their own; with a ``bucket`` above 0 there are none, and the elements in C order
are cut into buckets of that many.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def table_count(shape: tuple[int, ...], axes: tuple[int, ...], bucket: int) -> int:
    """How many tables an array of this shape has.

    >>> table_count((3, 4), (1,), 0), table_count((3, 4), (), 5)
    (4, 3)
    """
    if bucket:
        return -(-_size(shape) // bucket)
    return _size(tuple(shape[a] for a in axes))


def to_rows(x: Shaped[Array, "*shape"], axes: tuple[int, ...], bucket: int) -> Shaped[Array, "tables n"]:
    """A row of elements for each table; the last bucket is padded with zeros (False).

    >>> to_rows(jnp.array([[1, 2], [3, 4]]), (1,), 0).tolist()
    [[1, 3], [2, 4]]
    """
    if bucket:
        tables = table_count(x.shape, axes, bucket)
        return jnp.pad(x.reshape(-1), (0, tables * bucket - x.size)).reshape(tables, bucket)
    return jnp.moveaxis(x, axes, range(len(axes))).reshape(table_count(x.shape, axes, bucket), -1)


def from_rows(
    rows: Shaped[Array, "tables n"], shape: tuple[int, ...], axes: tuple[int, ...], bucket: int
) -> Shaped[Array, "*shape"]:
    """The inverse of :func:`to_rows`."""
    if bucket:
        return rows.reshape(-1)[: _size(shape)].reshape(shape)
    moved = [shape[a] for a in axes] + [n for a, n in enumerate(shape) if a not in axes]
    return jnp.moveaxis(rows.reshape(moved), range(len(axes)), axes)


def table_index(shape: tuple[int, ...], axes: tuple[int, ...], bucket: int) -> Int[Array, "*shape"]:
    """The number of each element's table.

    >>> table_index((2, 2), (1,), 0).tolist()
    [[0, 1], [0, 1]]
    """
    if bucket:
        return (jnp.arange(_size(shape), dtype=jnp.int32) // bucket).reshape(shape)
    out = jnp.zeros(shape, jnp.int32)
    for a in axes:
        out = out * shape[a] + jax.lax.broadcasted_iota(jnp.int32, shape, a)
    return out


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
