"""A leaf cut into the blocks that share a scale: folding, and the range of each block."""

from __future__ import annotations

import numbers
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Layout
from jaxcomp.core.meshes import here
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.roles import Roles
from jaxcomp.core.slots import Slot
from jaxcomp.core.types import PyTree, Shape
from jaxcomp.quantization.grids import Grid
from jaxcomp.quantization.numerics.affine import in_type
from jaxcomp.quantization.scales import Fixed, ScaleRule


class Cut(NamedTuple):
    """One array as a quantizer sees it.

    Fields:
      owner, path: for messages.
      values: the array, or its rows where the layout folds it.
      mask: which of the values count, in their shape; None where all do.
      blocks: how many blocks share a scale along each axis of the values: the shape of the scale.
      folded: whether the values are rows of the flattened array.
    """

    owner: str
    path: str
    values: jax.Array
    mask: jax.Array | None
    blocks: Shape
    folded: bool = False


def cut(slot: Slot, per: Layout, *, roles: Roles | None, owner: str) -> Cut:
    """An array cut as ``per`` says.

    Raises:
      ValueError: it does not fit, or wants roles that are not known; the message names the path.
    """
    blocks, row = slot.blocks(per, roles, owner)
    if not row:
        return Cut(owner, slot.path, slot.array, slot.full_mask, blocks)
    return Cut(owner, slot.path, *fold(slot.array, slot.full_mask, row), blocks, folded=True)


def fold(w: jax.Array, mask: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array | None]:
    """The flattened array as rows of ``length``, the last one padded with zeros, and which of their entries count."""
    missing = -w.size % length
    rows = jnp.pad(w.reshape(-1), (0, missing)).reshape(-1, length)
    if mask is None and not missing:
        return rows, None
    real = jnp.ones(w.size, bool) if mask is None else mask.reshape(-1)
    return rows, jnp.pad(real, (0, missing)).reshape(-1, length)


def range_of(x: Cut, grid: Grid, rule: ScaleRule | None) -> tuple[jax.Array, jax.Array | None]:
    """The range of each block, found by the rule or given; the default rule is the grid's.

    Raises:
      ValueError: the tree of a :class:`Fixed` has nothing for the path, or what does not fit.
    """
    rule = grid.default_rule if rule is None else rule
    if isinstance(rule, Fixed):
        top = _given(x, rule)
        return top, -top
    values = jax.lax.stop_gradient(x.values).astype(compute_dtype(x.values.dtype))
    on_grid = partial(_on_grid, values, grid)
    return rule.ends(values, x.blocks, x.mask, symmetric=not grid.asymmetric, on_grid=on_grid)


def _on_grid(x: jax.Array, grid: Grid, top: jax.Array, bottom: jax.Array | None) -> jax.Array:
    """The values on the grid of a range."""
    scale, zero = grid.scale_of(top, bottom)
    return in_type(grid.decode(grid.encode(x, scale, zero), scale, zero), scale, x.dtype)


def _given(x: Cut, rule: Fixed) -> jax.Array:
    """The end of each block's range, as it was given."""
    end: PyTree = rule.end
    if not isinstance(end, numbers.Real):
        known = dict(leaves_with_paths(end)[0])
        if x.path not in known:
            raise ValueError(f"{x.owner}: the tree of Fixed has no entry for {x.path!r}, only {some_paths(known)}.")
        end = known[x.path]
    try:
        return jnp.broadcast_to(jnp.asarray(here(end), compute_dtype(x.values.dtype)), x.blocks)
    except ValueError as e:
        raise ValueError(
            f"{x.owner}: the tree of Fixed has shape {jnp.shape(end)} at {x.path!r}, which does not broadcast to the"
            f" scale's shape {x.blocks}."
        ) from e
