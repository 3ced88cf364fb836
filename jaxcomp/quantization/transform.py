"""Quantization of parameters onto grids with straight-through gradients: grid, scale, what shares it, rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import Masked, dense
from jaxcomp.core.paths import Where, key_of_leaf, matrices
from jaxcomp.core.slots import Slot, check_finite, rewrite, slots
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.core.types import Params, State
from jaxcomp.quantization.blocks import Sharing, checked_sharing, fold, range_of, scale_blocks
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.leaves import Folded, Quantized
from jaxcomp.quantization.microscaling import Blocked, Grid
from jaxcomp.quantization.numerics.coding import block_scales, encode, scale_of
from jaxcomp.quantization.scales import AbsMax, Nearest, Rounding, ScaleRule, Stochastic


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
    scales that are trained see :func:`~jaxcomp.quantization.learned.learned`.

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
        :func:`~jaxcomp.core.slots.slots` raises, a group or tile that does not divide, an axis that a selected leaf
        does not have, or a ``Fixed`` tree without the leaf. The message names the path.

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
    return key_of_leaf(step, path)


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
