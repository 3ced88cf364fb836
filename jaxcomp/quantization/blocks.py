"""What shares a scale: the blocks of a leaf, and the range of each."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.specs import is_integer
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.level_grids import NF4
from jaxcomp.quantization.microscaling import E8M0, Blocked, Grid
from jaxcomp.quantization.numerics.affine import scale_shape
from jaxcomp.quantization.numerics.coding import find_range
from jaxcomp.quantization.scales import AbsMax, Fixed, MeanAbs, ScaleRule


class Sharing(NamedTuple):
    """What shares a scale; at most one of the last two is given, and then the others are not."""

    channel_axes: tuple[int, ...] | None
    group_axis: int
    tile: tuple[int, ...] | None
    bucket: int | None


def checked_sharing(
    owner: str,
    grid: Any,
    scale: Any,
    channel_axes: tuple[int, ...] | None,
    group_axis: int,
    tile: Any,
    bucket: Any = None,
) -> Sharing:
    """What shares a scale; checks all that does not need the leaves, and raises what :func:`quantize` says."""
    if not isinstance(grid, Grid | Blocked) or isinstance(grid, E8M0):
        raise TypeError(f"{owner}: wants a grid such as Int(8) or Log(4), got {grid!r}.")
    if scale is not None and not isinstance(scale, ScaleRule):
        raise TypeError(f"{owner}: scale must be a rule such as AbsMax() or MSE(), got {scale!r}.")
    if tile is not None and (
        not isinstance(tile, tuple | list) or not tile or not all(isinstance(n, int) and n > 0 for n in tile)
    ):
        raise ValueError(f"{owner}: tile must be a tuple of positive integers, got {tile!r}.")
    if bucket is not None and (not isinstance(bucket, int) or bucket < 1):
        raise ValueError(f"{owner}: bucket must be a positive integer, got {bucket!r}.")
    given = {"channel_axes": channel_axes, "tile": tile, "bucket": bucket, "the grid's group": _group(grid)}
    names = [name for name, value in given.items() if value is not None]
    if (tile is not None or bucket is not None) and len(names) > 1:
        raise ValueError(f"{owner}: a scale is shared in one way, got {' and '.join(names)}; take one of them.")
    if channel_axes is not None and not (isinstance(channel_axes, tuple | list) and all(map(is_integer, channel_axes))):
        raise ValueError(f"{owner}: channel_axes must be a tuple of integers, such as (-1,), got {channel_axes!r}.")
    if not is_integer(group_axis):
        raise ValueError(f"{owner}: group_axis must be an integer, got {group_axis!r}.")
    axes, sizes = (None if x is None else tuple(x) for x in (channel_axes, tile))
    return Sharing(axes, group_axis, sizes, bucket)


def _group(grid: Grid | Blocked) -> int | None:
    return getattr(grid, "group", None)


def scale_blocks(path: str, shape: tuple[int, ...], grid: Grid | Blocked, sharing: Sharing, owner: str) -> tuple:
    """The shape of a leaf's scale; raises what :func:`quantize` says."""
    group, axes = _group(grid), sharing.channel_axes
    try:
        if sharing.tile is not None:
            return _tiles(shape, sharing.tile)
        if axes is None and group and isinstance(grid, Blocked | NF4):
            axes = tuple(i for i in range(len(shape)) if i != sharing.group_axis % len(shape))
        axes = (-1,) if axes is None else axes
        return scale_shape(shape, channel_axes=axes, group=group, group_axis=sharing.group_axis)
    except ValueError as e:
        raise ValueError(f"{owner}: {path!r} {e}.") from e


def _tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    if len(tile) > len(shape):
        raise ValueError(f"has shape {shape}, which has fewer axes than the tile {tile}")
    before, last = shape[: len(shape) - len(tile)], shape[len(shape) - len(tile) :]
    if any(n % t for n, t in zip(last, tile, strict=True)):
        raise ValueError(
            f"has shape {shape}, which tiles of {tile} do not divide; take divisors of {last}, or leave this leaf out"
            " by a rule"
        )
    return (*before, *(n // t for n, t in zip(last, tile, strict=True)))


def fold(w: jax.Array, mask: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array | None]:
    """The flattened array as rows of ``length``, the last one padded with zeros, and which of their entries count."""
    missing = -w.size % length
    rows = jnp.pad(w.reshape(-1), (0, missing)).reshape(-1, length)
    if mask is None and not missing:
        return rows, None
    real = jnp.ones(w.size, bool) if mask is None else mask.reshape(-1)
    return rows, jnp.pad(real, (0, missing)).reshape(-1, length)


def range_of(
    path: str,
    w: jax.Array,
    mask: jax.Array | None,
    blocks: tuple[int, ...],
    grid: Grid | Blocked,
    rule: ScaleRule | None,
    owner: str = "quantize",
) -> tuple[jax.Array, jax.Array | None]:
    """The range of each block, found by the rule or given."""
    if rule is None:
        rule = MeanAbs() if isinstance(grid, Int) and grid.is_sign else AbsMax()
    if not isinstance(rule, Fixed):
        return find_range(w, blocks, grid, rule, mask)
    end = rule.end
    if not isinstance(end, numbers.Real):
        known = dict(leaves_with_paths(end)[0])
        if path not in known:
            raise ValueError(f"{owner}: the tree of Fixed has no entry for {path!r}, only {some_paths(known)}.")
        end = known[path]
    try:
        top = jnp.broadcast_to(jnp.asarray(end, compute_dtype(w.dtype)), blocks)
    except ValueError as e:
        raise ValueError(
            f"{owner}: the tree of Fixed has shape {jnp.shape(end)} at {path!r}, which does not broadcast to the"
            f" scale's shape {blocks}."
        ) from e
    return top, -top
