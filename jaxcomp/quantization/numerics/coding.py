"""One way onto every grid and back: scales of ranges, codes of values, values of codes, stored codes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from jaxcomp.core.bits import compute_dtype
from jaxcomp.quantization import level_grids as grids
from jaxcomp.quantization.grids import Companded, Int
from jaxcomp.quantization.level_grids import LevelGrid
from jaxcomp.quantization.microscaling import E8M0, Blocked, Grid
from jaxcomp.quantization.numerics.affine import (
    companded_codes,
    companded_step,
    dequantize,
    int_codes,
    int_scale_of,
    positive,
    spread,
)
from jaxcomp.quantization.numerics.levels import exponent_of, level_codes, level_values, power_of_two, to_levels
from jaxcomp.quantization.numerics.ranges import Ends, absmax_range, mean_range, mse_range, percentile_range
from jaxcomp.quantization.numerics.rounding import round_with
from jaxcomp.quantization.scales import MSE, MeanAbs, Percentile, ScaleRule

_SIGNS = grids.Levels((-1.0, 1.0))


def is_asymmetric(grid: Grid | Blocked) -> bool:
    """Whether a range's two ends matter."""
    return isinstance(grid, Int) and not grid.symmetric


def find_range(
    w: Float[Array, "*shape"],
    blocks: tuple[int, ...],
    grid: Grid | Blocked,
    rule: ScaleRule,
    mask: Bool[Array, "*shape"] | None,
) -> Ends:
    """The range of each block as a rule finds it; no gradient flows into it."""
    x = jax.lax.stop_gradient(w).astype(compute_dtype(w.dtype))
    symmetric = not is_asymmetric(grid)
    match rule:
        case MeanAbs():
            return mean_range(x, blocks, mask)
        case Percentile():
            top, bottom = percentile_range(x, blocks, mask, percent=float(rule.percent), symmetric=symmetric)
            lost = jnp.isnan(absmax_range(x, blocks, True)[0])  # a percentile may pass NaN by
            return jnp.where(lost, jnp.nan, top), bottom
        case MSE():
            ratios = np.linspace(1.0, float(rule.smallest), int(rule.steps))
            return mse_range(x, blocks, absmax_range(x, blocks, symmetric), ratios, partial(_on_grid, x, grid))
    return absmax_range(x, blocks, symmetric)


def _on_grid(x: jax.Array, grid: Grid | Blocked, top: jax.Array, bottom: jax.Array | None) -> jax.Array:
    """The values on the grid of a range."""
    scale, zero = scale_of(top, bottom, grid)
    inner = grid.grid if isinstance(grid, Blocked) else grid
    return decode(encode(x, scale, zero, inner), scale, zero, inner)


def scale_of(
    top: Float[Array, "*blocks"], bottom: Float[Array, "*blocks"] | None, grid: Grid | Blocked
) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"] | None]:
    """Scale and zero point (None for most) of a grid whose ends meet the range's."""
    if isinstance(grid, Blocked):
        part, outer = block_scales(top, grid)
        return part * outer, None
    if isinstance(grid, Int):
        scale, zero = int_scale_of(top, bottom, grid)
        return scale, None if grid.symmetric else zero
    if isinstance(grid, Companded):
        return companded_step(top, grid), None
    if isinstance(grid, E8M0):
        raise TypeError("E8M0 is a grid for scales, not for weights; see Blocked.")
    return positive(top * (1.0 / grid.top), least=1 / min(abs(v) for v in grid.levels if v)), None


def block_scales(top: Float[Array, "*blocks"], grid: Blocked) -> tuple[Float[Array, "*blocks"], Float[Array, "*ones"]]:
    """The scales of blocks on their own grid, and the one number over all of them, in the same rank.

    Deviation for float scales: none is smaller than their grid's smallest positive level, so that a block of small
    weights does not vanish because another one is large.
    """
    one = (1,) * top.ndim
    if isinstance(grid.scales, E8M0):
        e = jnp.clip(exponent_of(top) - grid.top_exponent, -100, 127)
        lost = jnp.any(jnp.isnan(top))  # which a power of two cannot say
        return power_of_two(e, top.dtype), jnp.full(one, jnp.where(lost, jnp.nan, 2.0**grid.shift), top.dtype)
    end = grid.grid.code_range[1] if isinstance(grid.grid, Int) else grid.grid.top
    wanted = top * (1.0 / end)
    outer = positive(jnp.max(wanted, keepdims=True) * (1.0 / grid.scales.top), least=2.0**20)
    least = grid.scales.magnitudes[1]
    return to_levels(jnp.maximum(wanted * (1.0 / outer), least), grid.scales), outer


def encode(
    w: Float[Array, "*shape"],
    scale: Float[Array, "*blocks"],
    zero_point: Float[Array, "*blocks"] | None,
    grid: Grid,
    *,
    noise: Float[Array, "*shape"] | None = None,
    clipped: bool = True,
) -> Float[Array, "*shape"]:
    """Codes, or levels where the grid is a table, in the scale's type, with a straight-through gradient in w."""
    rounded = partial(round_with, noise=noise, clipped=clipped)
    if isinstance(grid, Companded):
        return companded_codes(w, scale, grid, rounded)
    if isinstance(grid, Int) and not grid.is_sign:
        return int_codes(w, scale, zero_point, grid, rounded)
    x = w.astype(scale.dtype) * spread(1.0 / scale, w.shape)
    if isinstance(grid, LevelGrid):
        return to_levels(x, grid, noise=noise, clipped=clipped)
    return to_levels(x, _SIGNS, noise=noise, clipped=False)


def decode(
    codes: Num[Array, "*shape"],
    scale: Float[Array, "*blocks"],
    zero_point: Float[Array, "*blocks"] | None,
    grid: Grid,
) -> Float[Array, "*shape"]:
    """The values of what :func:`encode` gave, in the scale's type."""
    compander = grid.compander if isinstance(grid, Companded) else None
    return dequantize(codes, scale, zero_point, compander)


def stored_codes(codes: Float[Array, "*shape"], grid: Grid) -> tuple[Array, int]:
    """What a packed leaf keeps of :func:`encode`'s result: integers, and the lowest of them."""
    if isinstance(grid, Int | Companded):
        if isinstance(grid, Int) and grid.is_sign:
            return level_codes(codes, _SIGNS), 0
        return codes, grid.low
    return level_codes(codes, grid), 0


def loaded_codes(stored: Array, grid: Grid, dtype: jnp.dtype) -> Array:
    """The inverse of :func:`stored_codes`: codes in an integer type, or levels in the type of the scale."""
    if isinstance(grid, Int | Companded):
        if isinstance(grid, Int) and grid.is_sign:
            return stored.astype(jnp.int8) * 2 - 1
        return stored
    return level_values(stored.astype(jnp.uint8), grid, dtype)
