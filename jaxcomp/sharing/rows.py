"""The values that each table serves, as k-means takes them: a row a table or, on a mesh, where they lie; and codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Blocks
from jaxcomp.core.meshes import over_all, spread
from jaxcomp.core.slots import Slot
from jaxcomp.sharing.kmeans.fit import Parts, code_dtype, member_means, member_means_of_parts, nearest
from jaxcomp.sharing.kmeans.points import SORTED
from jaxcomp.sharing.kmeans.tables import blocks_first, from_rows, table_count, to_rows, within_blocks

_SMALL = 1 << 12  # sorting so many values takes no time beside a compilation


class Rows(NamedTuple):
    """The values that one state table serves, a row a table; which of them count, or None for all."""

    values: jax.Array
    counted: jax.Array | None


class Laid(NamedTuple):
    """A slot and the blocks that have a table each."""

    slot: Slot
    blocks: Blocks

    def values(self, zero_first: bool) -> Rows | Parts:
        """The values and which of them k-means sees: not those that are masked, and no zeros that keep an entry."""
        if in_parts([self]):
            return self.parts(zero_first)
        return _rows(self.slot.array, self.slot.full_mask, blocks=self.blocks, zero_first=zero_first)

    def parts(self, zero_first: bool) -> Parts:
        """The same of a slot with one table, where they lie."""
        values, counted = _counted(self.slot.array, self.slot.full_mask, zero_first=zero_first)
        return Parts((values,), (counted,))

    def codes(self, table: jax.Array, zero_first: bool) -> jax.Array:
        """The nearest entry of each weight; entry 0 of those that do not count."""
        return _codes(self.slot.array, self.slot.full_mask, table, blocks=self.blocks, zero_first=zero_first)


def in_parts(every: Sequence[Laid]) -> bool:
    """Whether the values of slots that share one table stay where they lie: on a mesh, where they are many.

    A row of few values is sorted: it is less than the counts would be.
    """
    arrays = [one.slot.array for one in every]
    wide = any(compute_dtype(x.dtype) == jnp.float64 for x in arrays)
    single = len(every) > 1 or table_count(every[0].blocks) == 1
    return single and not wide and sum(x.size for x in arrays) > SORTED and spread(arrays)


def joined(every: Sequence[Laid], zero_first: bool) -> Rows | Parts:
    """The values of all slots, which share one table."""
    if in_parts(every):
        parts = [one.parts(zero_first) for one in every]
        return Parts(tuple(p.values[0] for p in parts), tuple(p.counted[0] for p in parts))
    rows = [_rows(x.slot.array, x.slot.full_mask, blocks=x.blocks, zero_first=zero_first) for x in every]
    dtype = jnp.result_type(*(r.values.dtype for r in rows))
    values = jnp.concatenate([r.values.reshape(1, -1).astype(dtype) for r in rows], axis=1)
    if all(r.counted is None for r in rows):
        return Rows(values, None)
    counted = [jnp.ones(r.values.shape, bool) if r.counted is None else r.counted for r in rows]
    return Rows(values, jnp.concatenate([c.reshape(1, -1) for c in counted], axis=1))


def means(values: Rows | Parts, every: Sequence[Laid], codes: Sequence[jax.Array], table: jax.Array) -> jax.Array:
    """A table, or tables, of the means of the members of each code; the slots that they serve have these codes."""
    if isinstance(values, Parts):
        return member_means_of_parts(values, codes, table[:, 0])[:, None]
    rows = [to_rows(c, one.blocks) for c, one in zip(codes, every, strict=True)]
    row = rows[0] if len(rows) == 1 else jnp.concatenate([r.reshape(1, -1) for r in rows], axis=1)
    return jax.vmap(member_means)(*values, row, table.T).T


@jax.jit
def padded(rows: Rows) -> Rows:
    """Rows of a power of two, a single row not below a small one: leaves of many sizes are then few compilations."""
    tables, size = rows.values.shape
    more = max(1 << (size - 1).bit_length(), _SMALL if tables == 1 else 1) - size
    counted = jnp.ones((tables, size), bool) if rows.counted is None else rows.counted
    return Rows(jnp.pad(rows.values, ((0, 0), (0, more))), jnp.pad(counted, ((0, 0), (0, more))))


@partial(jax.jit, static_argnames=("zero_first",))
def _counted(x: jax.Array, counted: jax.Array | None, *, zero_first: bool) -> tuple[jax.Array, jax.Array | None]:
    if zero_first:
        nonzero = x != 0
        counted = nonzero if counted is None else counted & nonzero
    return x.astype(compute_dtype(x.dtype)), counted


@partial(jax.jit, static_argnames=("blocks", "zero_first"))
def _rows(x: jax.Array, counted: jax.Array | None, *, blocks: Blocks, zero_first: bool) -> Rows:
    values, counted = _counted(x, counted, zero_first=zero_first)
    if counted is None and blocks.row and x.size % blocks.row:
        counted = jnp.ones(x.shape, bool)  # what pads the last row does not count
    values, counted = to_rows(values, blocks), None if counted is None else to_rows(counted, blocks)
    if values.shape[0] > 1:  # on a mesh whole rows go to the devices: none sorts, or holds, more than its share of them
        values, counted = over_all(values), None if counted is None else over_all(counted)
    return Rows(values, counted)


# One program a leaf where nobody else compiles one; inside jit it is inlined.
@partial(jax.jit, static_argnames=("blocks", "zero_first"), inline=True)
def _codes(x: jax.Array, counted: jax.Array | None, table: jax.Array, *, blocks: Blocks, zero_first: bool) -> jax.Array:
    values, counted = _counted(x, counted, zero_first=zero_first)
    free = table.astype(values.dtype)[int(zero_first) :]
    codes = _nearest(values, free, blocks).astype(code_dtype(table.shape[0]))
    codes = codes + jnp.asarray(zero_first, codes.dtype)
    return codes if counted is None else jnp.where(counted, codes, jnp.zeros((), codes.dtype))


def _nearest(x: jax.Array, table: jax.Array, blocks: Blocks) -> jax.Array:
    """The nearest entry of each element's own table; no axis is merged with another, so that none need be gathered."""
    if table.shape[1] == 1:
        return nearest(x, table[:, 0])
    if blocks.row:
        return from_rows(jax.vmap(nearest)(to_rows(x, blocks), table.T), tuple(x.shape), blocks)
    own = nearest
    for _ in blocks.shape:
        own = jax.vmap(own)
    return within_blocks(own(blocks_first(x, blocks), table.T.reshape(*blocks.shape, -1)), tuple(x.shape), blocks)
