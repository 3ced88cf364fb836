"""Quantization of parameters onto grids with straight-through gradients: grid, scale, what shares it, rounding."""

from __future__ import annotations

import numbers
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.grids import E8M0, NF4, Blocked, Grid
from jaxcomp.leaves import Folded, Masked, Quantized, dense
from jaxcomp.numerics.coding import block_scales, encode, find_range, scale_of
from jaxcomp.numerics.quantizers import compute_dtype, scale_shape
from jaxcomp.paths import Where, leaves_with_paths, matrices, some_paths
from jaxcomp.scaling import AbsMax, Fixed, MeanAbs, Nearest, Rounding, ScaleRule, Stochastic
from jaxcomp.slots import Slot, check_finite, rewrite, slots
from jaxcomp.specs import Int
from jaxcomp.structures import is_integer
from jaxcomp.transform import Params, State, Transform, stateless


class Sharing(NamedTuple):
    """What shares a scale; at most one of the last two is given, and then the others are not."""

    channel_axes: tuple[int, ...] | None
    group_axis: int
    tile: tuple[int, ...] | None
    bucket: int | None


def quantize(
    grid: Grid | Blocked = Int(8),  # noqa: B008 - frozen
    *,
    channel_axes: tuple[int, ...] | None = None,
    group_axis: int = -2,
    tile: tuple[int, ...] | None = None,
    bucket: int | None = None,
    scale: ScaleRule | None = None,
    rounding: Rounding = Nearest(),  # noqa: B008 - frozen
    clip_gradient: bool = True,
    where: Where = matrices,
) -> Transform:
    """Rounds the selected arrays to a grid; ``apply`` makes a ``Quantized`` leaf of each.

    The scale follows the parameters at every ``apply`` and carries no gradient; the rounding's gradient is straight
    through, cut outside the grid's range. A mask of an earlier ``prune`` stays, and what it hides stays zero. For
    scales that are trained see :func:`~jaxcomp.learned.learned`.

    Args:
      grid: ``Int(bits, group=, symmetric=, narrow=)``, ``Log(bits)`` or ``Companded``, ``Float(exponent, mantissa)``,
        ``NF4()``, ``PoT(bits)``, ``APoT(bits)``, ``Levels(values)``; with scales on a grid of their own
        ``MX(element)``, ``NVFP4`` or ``Blocked``.
      channel_axes: the axes that keep a scale for each index. The default is the last one, the output features of a
        Flax kernel; ``()`` is one scale a tensor; ``(0,)`` one a row (a token of an embedding), and suits Equinox's and
        PyTorch's weights; ``(0, -1)`` suits kernels that a scan has stacked. For NF4 and ``Blocked``, whose blocks are
        exactly their group, the default is all but the group axis.
      group_axis: the axis that the grid's ``group`` cuts into groups; the default is the input features of a Flax
        kernel.
      tile: the sides of a block along the last axes, such as ``(128, 128)``; each index of the axes before them has
        its own blocks.
      bucket: cut the flattened array into buckets of so many elements, the last one shorter.
      scale: how the range is found: ``AbsMax()``, ``MeanAbs()``, ``Percentile(percent)``, ``MSE()``, ``Fixed(end)``.
        The default is ``MeanAbs()`` for the sign, ``Int(1)``, and ``AbsMax()`` for all others.
      rounding: ``Nearest()`` or ``Stochastic(key)``, which takes new random numbers at each ``update``.
      clip_gradient: whether the gradient is cut outside the range; outside that of ``AbsMax()`` nothing is.
      where: which leaves.

    Raises:
      TypeError: a grid, a rule or a rounding that is not one.
      ValueError: a tile or bucket that is not positive, or more than one way to share a scale; at ``init``, what
        :func:`~jaxcomp.slots.slots` raises, a group or tile that does not divide, an axis that a selected leaf does not
        have, or a ``Fixed`` tree without the leaf. The message names the path.

    >>> t = quantize(Int(2, narrow=True))
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [0.2, 3.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 1., -4.],
           [ 0.,  4.]], dtype=float32)

    Source: Krishnamoorthi 2018, arXiv:1806.08342; straight-through as in Bengio et al. 2013, arXiv:1308.3432; buckets
    as in Polino et al. 2018, arXiv:1802.05668.
    """
    sharing = checked_sharing("quantize", grid, scale, channel_axes, group_axis, tile, bucket)
    if not isinstance(rounding, Nearest | Stochastic):
        raise TypeError(f"quantize: rounding must be Nearest() or Stochastic(key), got {rounding!r}.")

    def apply(state: State, params: Params) -> Params:
        new = {}
        for path, slot in slots(params, where, "quantize").items():
            key = None if isinstance(rounding, Nearest) else _leaf_key(state, rounding, path)
            leaf = quantized_leaf(path, slot, grid, sharing, scale, key=key, clipped=clip_gradient)
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return rewrite(params, new)

    if isinstance(rounding, Nearest):
        inner = stateless(lambda params: apply((), params))
    else:
        inner = _drawing(rounding.key, apply)

    def init(params: Params) -> State:
        check_finite(slots(params, where, "quantize"), "quantize")
        return inner.init(params)

    return Transform(init, inner.update, inner.apply)


def _drawing(key: jax.Array, apply: Any) -> Transform:
    """A transform whose state is the data of the step's key."""

    def init(params: Params) -> State:
        state = jax.random.key_data(key)
        jax.eval_shape(apply, state, params)
        return state

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        return jax.random.key_data(jax.random.fold_in(key, jnp.asarray(step, jnp.uint32)))

    return Transform(init, update, apply)


def _leaf_key(state: State, rounding: Stochastic, path: str) -> jax.Array:
    """The step's key for a leaf: by its path, so that another leaf more changes none."""
    step = jax.random.wrap_key_data(state, impl=jax.random.key_impl(rounding.key))
    return jax.random.fold_in(step, zlib.crc32(path.encode()))


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


def quantized_leaf(
    path: str,
    slot: Slot,
    grid: Grid | Blocked,
    sharing: Sharing,
    rule: ScaleRule | None,
    *,
    key: jax.Array | None = None,
    clipped: bool = True,
) -> Quantized | Folded:
    """One array on its grid."""
    w: Any = slot.array
    mask = slot.full_mask
    if sharing.bucket is None:
        blocks = scale_blocks(path, w.shape, grid, sharing, "quantize")
        return _quantized(path, w, mask, blocks, grid, rule, key, clipped)
    rows, kept = fold(w, mask, sharing.bucket)
    blocks = (rows.shape[0], 1)
    return Folded(_quantized(path, rows, kept, blocks, grid, rule, key, clipped), tuple(w.shape))


def fold(w: jax.Array, mask: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array | None]:
    """The flattened array as rows of ``length``, the last one padded with zeros, and which of their entries count."""
    missing = -w.size % length
    rows = jnp.pad(w.reshape(-1), (0, missing)).reshape(-1, length)
    if mask is None and not missing:
        return rows, None
    real = jnp.ones(w.size, bool) if mask is None else mask.reshape(-1)
    return rows, jnp.pad(real, (0, missing)).reshape(-1, length)


def _quantized(
    path: str,
    w: jax.Array,
    mask: jax.Array | None,
    blocks: tuple[int, ...],
    grid: Grid | Blocked,
    rule: ScaleRule | None,
    key: jax.Array | None,
    clipped: bool,
) -> Quantized:
    ends = range_of(path, w, mask, blocks, grid, rule)
    inner = grid.grid if isinstance(grid, Blocked) else grid
    scale: Any
    if isinstance(grid, Blocked):
        part, outer = block_scales(ends[0], grid)
        scale, zero = Quantized(part, outer, None, grid.scales, part.dtype), None
    else:
        scale, zero = scale_of(*ends, grid)
    noise = None if key is None else jax.random.uniform(key, w.shape, compute_dtype(w.dtype))
    # No weight is outside its own block's range, so the backward pass need not look.
    covered = isinstance(rule, AbsMax | None) and not isinstance(grid, Blocked)
    codes = encode(w, dense(scale), zero, inner, noise=noise, clipped=clipped and not covered)
    return Quantized(codes, scale, zero, inner, jnp.dtype(w.dtype))


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
