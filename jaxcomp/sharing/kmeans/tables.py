"""Which table serves which element of an array: each block of a layout has its own. Arrays in, arrays out.

Tables are numbered in the C order of the blocks; a table's elements are in their C order within the block.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxcomp.core.layouts import Blocks
from jaxcomp.core.types import Shape


def table_count(blocks: Blocks) -> int:
    """How many tables there are.

    >>> table_count(Blocks((1, 4))), table_count(Blocks((3, 1), 5))
    (4, 3)
    """
    return math.prod(blocks.shape)


def to_rows(x: Shaped[Array, "*shape"], blocks: Blocks) -> Shaped[Array, "tables n"]:
    """A row of elements for each table; the last one of an array cut into rows is padded with zeros (False).

    >>> to_rows(jnp.array([[1, 2], [3, 4]]), Blocks((1, 2))).tolist()
    [[1, 3], [2, 4]]
    """
    if blocks.row:
        rows = blocks.shape[0]
        return jnp.pad(x.reshape(-1), (0, rows * blocks.row - x.size)).reshape(rows, blocks.row)
    return blocks_first(x, blocks).reshape(table_count(blocks), -1)


def from_rows(rows: Shaped[Array, "tables n"], shape: Shape, blocks: Blocks) -> Shaped[Array, "*shape"]:
    """The inverse of :func:`to_rows`."""
    if blocks.row:
        return rows.reshape(-1)[: math.prod(shape)].reshape(shape)
    split = _split(shape, blocks)
    return within_blocks(rows.reshape([split[i] for i in _order(len(shape))]), shape, blocks)


def blocks_first(x: Shaped[Array, "*shape"], blocks: Blocks) -> Shaped[Array, "*blocks_then_places"]:
    """The axes of an array that is not cut into rows as two each: all blocks, then all places within them.

    >>> blocks_first(jnp.zeros((6, 4)), Blocks((3, 1))).shape
    (3, 1, 2, 4)
    """
    return x.reshape(_split(tuple(x.shape), blocks)).transpose(_order(x.ndim))


def within_blocks(x: Shaped[Array, "*blocks_then_places"], shape: Shape, blocks: Blocks) -> Shaped[Array, "*shape"]:
    """The inverse of :func:`blocks_first`."""
    order = _order(len(shape))
    return x.transpose(sorted(range(len(order)), key=order.__getitem__)).reshape(shape)


def table_index(shape: Shape, blocks: Blocks) -> Int[Array, "*shape"]:
    """The number of each element's table.

    >>> table_index((2, 4), Blocks((1, 2))).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if blocks.row:
        return (jnp.arange(math.prod(shape), dtype=jnp.int32) // blocks.row).reshape(shape)
    out = jnp.zeros(shape, jnp.int32)
    for a, (n, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        if count > 1:
            own = jax.lax.broadcasted_iota(jnp.int32, shape, a)
            out = out * count + (own if n == count else own // (n // count))
    return out


def _split(shape: Shape, blocks: Blocks) -> list[int]:
    """Each axis as two: the block, and the place within it."""
    return [size for n, count in zip(shape, blocks.shape, strict=True) for size in (count, n // count)]


def _order(rank: int) -> tuple[int, ...]:
    """The order of split axes that puts all blocks before all places."""
    return (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
