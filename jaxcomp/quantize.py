"""Quantization of parameters onto uniform and companded grids, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxcomp.leaves import Masked, Quantized
from jaxcomp.numerics.quantizers import companded_codes, companded_step, int_codes, int_scale, scale_shape
from jaxcomp.paths import Where, matrices
from jaxcomp.slots import Slot, check_finite, rewrite, slots
from jaxcomp.specs import Companded, Grid, Int
from jaxcomp.transform import Params, State, Transform, stateless


def quantize(
    grid: Grid = Int(8),  # noqa: B008 - frozen
    *,
    channel_axes: tuple[int, ...] = (-1,),
    group_axis: int = -2,
    where: Where = matrices,
) -> Transform:
    """Rounds the selected arrays to a grid; ``apply`` makes a ``Quantized`` leaf of each.

    The scale follows the parameters at every ``apply`` and carries no gradient; the rounding's gradient is straight
    through, cut outside the grid's range. A mask of an earlier ``prune`` stays, and what it hides stays zero.

    Args:
      grid: ``Int(bits, group=, symmetric=, narrow=)``, ``Companded(bits, compander)`` or ``Log(bits)``.
      channel_axes: the axes that keep a scale for each index. The default is the last one, the output features of a
        Flax kernel; ``()`` is one scale a tensor; ``(0, -1)`` suits kernels that a scan has stacked; Equinox's and
        PyTorch's weights keep ``(0,)``.
      group_axis: the axis that ``Int(group=…)`` cuts into groups; the default is the input features of a Flax kernel.
      where: which leaves.

    Raises:
      TypeError: the grid is not one.
      ValueError: at ``init``, what :func:`~jaxcomp.slots.slots` raises, a group that does not divide, or an axis that a
        selected leaf does not have. The message names the path.

    >>> t = quantize(Int(2, narrow=True))
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [0.2, 3.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 1., -4.],
           [ 0.,  4.]], dtype=float32)

    Source: Krishnamoorthi 2018, arXiv:1806.08342; straight-through as in Bengio et al. 2013, arXiv:1308.3432.
    """
    if not isinstance(grid, Int | Companded):
        raise TypeError(f"quantize: wants a grid such as Int(8) or Log(4), got {grid!r}.")

    def apply(params: Params) -> Params:
        new = {}
        for path, slot in slots(params, where, "quantize").items():
            leaf = _quantized(path, slot, grid, tuple(channel_axes), group_axis)
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return rewrite(params, new)

    inner = stateless(apply)

    def init(params: Params) -> State:
        check_finite(slots(params, where, "quantize"), "quantize")
        return inner.init(params)

    return Transform(init, inner.update, inner.apply)


def _quantized(path: str, slot: Slot, grid: Grid, channel_axes: tuple[int, ...], group_axis: int) -> Quantized:
    w: Any = slot.array
    group = grid.group if isinstance(grid, Int) else None
    try:
        blocks = scale_shape(w.shape, channel_axes=channel_axes, group=group, group_axis=group_axis)
    except ValueError as e:
        raise ValueError(f"quantize: {path!r} {e}.") from e
    dtype = jnp.dtype(w.dtype)
    if isinstance(grid, Companded):
        step = companded_step(w, grid, blocks)
        return Quantized(companded_codes(w, step, grid), step, None, grid, dtype)
    scale, zero_point = int_scale(w, grid, blocks)
    codes = int_codes(w, scale, zero_point, grid)
    return Quantized(codes, scale, None if grid.symmetric else zero_point, grid, dtype)
