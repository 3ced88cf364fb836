"""Networks and transforms for the tests of files."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.core import Tiles
from jaxcomp.core.packed import Packed
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.level_grids import E2M1, E4M3, Float
from jaxcomp.quantization.microscaling import E8M0


def params(inputs: int = 128, outputs: int = 24) -> dict:
    """A matrix and a vector, of wide and of small values, one block of zeros among them."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs, outputs)) * np.exp2(rng.integers(-6, 2, (1, outputs)))
    kernel[:64, 3] = 0
    kernel[5, 0] = -kernel[:, 0].max()  # an extreme code
    return {"a": {"mlp": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(rng.normal(size=outputs))}}}


def spread(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each entry over its block."""
    for axis, n in enumerate(shape):
        x = np.repeat(x, n // x.shape[axis], axis)
    return x


def value(leaf: Quantized) -> np.ndarray:
    """A packed leaf dequantized by numpy, for ``materialize`` compiles for each shape."""
    codes = leaf.codes.on_host() if isinstance(leaf.codes, Packed) else np.asarray(leaf.codes)
    numbers = codes if leaf.grid.code_range else table(leaf.grid)[codes]
    zero = 0 if leaf.zero_point is None else spread(np.asarray(leaf.zero_point), leaf.shape)
    scale = value(leaf.scale) if isinstance(leaf.scale, Quantized) else np.asarray(leaf.scale)
    return ((numbers.astype(np.float32) - zero) * spread(scale, leaf.shape)).astype(leaf.dtype)


def table(grid: Float | E8M0) -> np.ndarray:
    """What each code stands for."""
    if grid == E8M0():
        return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    magnitudes = np.array([*grid.magnitudes, *[np.nan] * grid.reserved])
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


def float_leaf(grid: Float, *, blocks: tuple[int, int] = (1, 6), scales: Float | E8M0 | None = None) -> Quantized:
    """A packed leaf of random codes of a table, 64 by 6."""
    rng = np.random.default_rng(1)
    half = 2 ** (grid.bits - 1)
    codes = rng.integers(1, half - grid.reserved, (64, 6)) + half * rng.integers(0, 2, (64, 6))
    held = jnp.asarray(codes, jnp.uint8) if grid.bits == 8 else Packed.of(jnp.asarray(codes), grid.bits, 0)
    scale = jnp.asarray(rng.uniform(0.1, 9, blocks), jnp.float32)
    if scales is not None:
        outer = jnp.full((1, 1), 1.0 if scales == E8M0() else 0.0123, jnp.float32)
        scale = Quantized(jnp.asarray(rng.integers(60, 126, blocks), jnp.uint8), outer, None, scales, scale.dtype)
    return Quantized(held, scale, None, grid, jnp.dtype("float32"))


def random_leaf(
    grid: Int, shape: tuple[int, ...] = (64, 6), group: int = 32, *, scale: float | None = None
) -> Quantized:
    """A packed leaf of random codes and scales; its groups lie along the axis before the last. Nothing is compiled."""
    rng = np.random.default_rng(grid.bits)
    low, high = grid.code_range
    numbers = rng.integers(low, high + 1, shape)
    blocks = (*shape[:-2], shape[-2] // group, shape[-1])
    scales = (
        rng.uniform(0.5, 2, blocks) * 2.0 ** rng.integers(-9, 3, blocks) if scale is None else np.full(blocks, scale)
    )
    zero = None if grid.symmetric else jnp.asarray(rng.integers(0, high + 1, blocks), jnp.float32)
    base = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    codes = jnp.asarray(numbers, jnp.int8) if grid.bits == 8 else Packed.of(jnp.asarray(numbers), grid.bits, base)
    return Quantized(codes, jnp.asarray(scales, jnp.float32), zero, grid, jnp.dtype("float32"))


TRANSFORMS = {
    "int4 in groups": jc.quantize(jc.Int(4), per=jc.Groups(32)),
    "int4 asymmetric": jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32)),
    "int3": jc.quantize(jc.Int(3), per=jc.Groups(64)),
    "int5 asymmetric": jc.quantize(jc.Int(5, symmetric=False), per=jc.Channels()),
    "int2 narrow": jc.quantize(jc.Int(2, narrow=True), per=jc.Channels()),
    "int8": jc.quantize(jc.Int(8), per=jc.Channels()),
    "int8 of one scale": jc.quantize(jc.Int(8), per=jc.Tensor()),
    "int8 asymmetric of one scale": jc.quantize(jc.Int(8, symmetric=False), per=jc.Tensor()),
    "int6 in tiles": jc.quantize(jc.Int(6), per=Tiles((32, 8))),
    "float8": jc.quantize(E4M3, per=jc.Channels()),
    "float8 of one scale": jc.quantize(E4M3, per=jc.Tensor()),
    "float8 in groups": jc.quantize(E4M3, per=jc.Groups(32)),
    "float8 in tiles": jc.quantize(E4M3, per=Tiles((32, 8))),
    "nvfp4": jc.recipes.nvfp4(),
    "mxfp4": jc.recipes.mx(E2M1),
    "mxfp8": jc.recipes.mx(E4M3),
    "int4 masked": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4), per=jc.Groups(32))),
    "int4 asymmetric, masked": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32))),
}
