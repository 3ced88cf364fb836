"""One weight of the layout, checked: codes, scales and zero points as a leaf holds them."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcomp.core.types import Json, Shape
from jaxcomp.export.coded import Coded, Parts
from jaxcomp.export.compressed_tensors.packing import codes_of, codes_of_lanes, factor_of, unpaired
from jaxcomp.export.compressed_tensors.schemes import MX_GROUP, MXFP4, MXFP8, NVFP4, NVFP4_GROUP
from jaxcomp.export.filling import Weight
from jaxcomp.quantization.grids import Grid, Int, ScaleGrid
from jaxcomp.quantization.level_grids import E4M3

FORMATS = (
    "pack-quantized, int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized and"
    " mxfp8-quantized"
)
_SCALES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
Tensors = Mapping[str, np.ndarray]


def weight_of(
    parts: Tensors, said: tuple[Mapping[str, Json], str], version: tuple[int, int] | None
) -> Weight | np.ndarray:
    """The weight of a module.

    Args:
      parts: its tensors, by what stands behind the module's name.
      said: the arguments of its quantization, and the format.
      version: of the package that wrote it.

    Raises:
      ValueError: they do not fit each other, or are not known; the message goes after the module's name.
    """
    arguments, form = said
    if "weight_g_idx" in parts:
        raise ValueError("has its inputs in another order (weight_g_idx), which a leaf cannot say; save it without")
    kind, bits = arguments.get("type", "int"), arguments.get("num_bits", 8)
    if form == "nvfp4-pack-quantized":
        return _nvfp4(parts)
    if form in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        return _mx(parts, MXFP4 if form.startswith("mxfp4") else MXFP8)
    if form == "pack-quantized" and kind == "int" and type(bits) is int and 2 <= bits <= 8:
        return _integers(_packed(parts, bits, version), parts, arguments, bits)
    plain = form in ("int-quantized", "naive-quantized", "float-quantized")
    if plain and kind == "int" and type(bits) is int and 2 <= bits <= 8:
        return _integers(_bytes(parts, bits), parts, arguments, bits)
    if plain and kind == "float" and bits == 8:
        codes = _part(parts, "weight", (np.dtype(ml_dtypes.float8_e4m3fn),)).view(np.uint8)
        if ((codes & 127) == 127).any():
            raise ValueError("holds weights that are NaN")
        return _scaled(codes, parts, arguments, E4M3, None)
    raise ValueError(f"is of format {form!r}, type {kind!r} and {bits!r} bits; what is read are {FORMATS}")


def _part(parts: Tensors, name: str, dtypes: tuple[np.dtype, ...], axes: int | None = 2) -> np.ndarray:
    if name not in parts:
        raise ValueError(f"has no {name}")
    x = parts[name]
    if not x.size:
        raise ValueError(f"has a {name} of shape {x.shape}, which holds nothing")
    if x.dtype not in dtypes or (axes is not None and x.ndim != axes):
        raise ValueError(f"has a {name} of type {x.dtype} and shape {x.shape}; wanted is {dtypes[0]} of {axes} axes")
    return x


def _packed(parts: Tensors, bits: int, version: tuple[int, int] | None) -> np.ndarray:
    held = _part(parts, "weight_packed", (np.dtype(np.int32),))
    shape = _part(parts, "weight_shape", (np.dtype(np.int64), np.dtype(np.int32)), 1)
    rows, columns = (int(n) for n in shape) if shape.size == 2 else (-1, -1)
    dense, lanes = -(-columns * bits // 32), -(-columns // (32 // bits))
    if rows != held.shape[0] or columns < 1 or held.shape[1] not in (dense, lanes):
        raise ValueError(f"has a weight_shape of {shape.tolist()[:4]}, and weight_packed is of shape {held.shape}")
    old = held.shape[1] != dense or (dense == lanes and version is not None and version < (0, 18))
    return (codes_of_lanes if old else codes_of)(held, bits, columns)


def _bytes(parts: Tensors, bits: int) -> np.ndarray:
    held = _part(parts, "weight", (np.dtype(np.int8),))
    half = 2 ** (bits - 1)
    if held.size and not -half <= held.min() <= held.max() < half:
        raise ValueError(f"has codes from {held.min()} to {held.max()}, beyond those of {bits} bits")
    return (held.astype(np.int16) + half).astype(np.uint8)


def _integers(codes: np.ndarray, parts: Tensors, said: Mapping[str, Json], bits: int) -> Weight | np.ndarray:
    if said.get("symmetric", True) is not False:
        given = parts.get("weight_zero_point")
        if given is not None and given.astype(np.float32).any():
            raise ValueError("has zero points though it is symmetric")
        return _scaled(codes, parts, said, Int(bits), None)
    zero, half = _part(parts, "weight_zero_point", (np.dtype(np.int8), np.dtype(np.int32)), None), 2 ** (bits - 1)
    if zero.dtype == np.int8:
        if zero.size and not -half <= zero.min() <= zero.max() < half:
            raise ValueError(f"has zero points from {zero.min()} to {zero.max()}, beyond those of {bits} bits")
        return _scaled(codes, parts, said, Int(bits, symmetric=False), (zero.astype(np.int16) + half).astype(np.uint8))
    if zero.ndim != 2 or zero.shape[0] != -(-len(codes) * bits // 32):
        raise ValueError(f"has packed zero points of shape {zero.shape} for {len(codes)} outputs")
    unpacked = codes_of(np.ascontiguousarray(zero.T), bits, len(codes)).T
    return _scaled(codes, parts, said, Int(bits, symmetric=False), np.ascontiguousarray(unpacked))


def _scaled(
    codes: np.ndarray, parts: Tensors, said: Mapping[str, Json], grid: Grid, zero: np.ndarray | None
) -> Weight | np.ndarray:
    scale = _part(parts, "weight_scale", _SCALES, None)
    blocks = _blocks(codes.shape, scale.shape, said)
    if zero is not None:
        if zero.size != scale.size:
            raise ValueError(f"has {zero.size} zero points and {scale.size} scales")
        zero = zero.reshape(blocks)
    dtype, scale = scale.dtype, scale.reshape(blocks).astype(np.float32)  # a product of theirs is exact in float32
    if any(n % b for n, b in zip(codes.shape, blocks, strict=True)):
        return _dense(codes, scale, said.get("block_structure"), grid).astype(dtype)
    return Weight(Coded(codes, scale, zero, grid), codes.shape, jnp.dtype(dtype))


def _blocks(shape: Shape, scales: Shape, said: Mapping[str, Json]) -> Shape:
    """How the scales cut the matrix; checked against what is said of it."""
    rows, columns = shape
    strategy, size, sides = said.get("strategy"), said.get("group_size"), said.get("block_structure")
    wanted: Shape | None = None
    if strategy == "tensor":
        wanted = (1, 1)
    elif strategy == "channel":
        wanted = (rows, 1)
    elif strategy == "group" and type(size) is int and size > 0 and columns % size == 0:
        wanted = (rows, columns // size)
    elif strategy == "block" and isinstance(sides, list) and [type(n) is int and n > 0 for n in sides] == [True, True]:
        wanted = (-(-rows // sides[0]), -(-columns // sides[1]))
    if wanted is None or int(np.prod(scales)) != int(np.prod(wanted)):
        raise ValueError(
            f"is quantized by {strategy!r} (group_size {size}, block_structure {sides}), of which {scales} scales for a"
            f" matrix of {shape} are not"
        )
    return wanted


def _dense(codes: np.ndarray, scale: np.ndarray, sides: Json, grid: Grid) -> np.ndarray:
    """Blocks whose last one is cut off by the matrix's end: no leaf has such, so this is the array that they make."""
    if grid != E4M3:
        raise ValueError(f"is on {grid.label} in blocks of {sides}, which do not divide a matrix of {codes.shape}")
    wide = np.repeat(np.repeat(scale, sides[0], 0), sides[1], 1)[: codes.shape[0], : codes.shape[1]]
    return codes.view(ml_dtypes.float8_e4m3fn).astype(scale.dtype) * wide


def _nvfp4(parts: Tensors) -> Weight:
    codes, scale = _float4(parts, np.dtype(ml_dtypes.float8_e4m3fn), NVFP4_GROUP)
    divisor = _part(parts, "weight_global_scale", (np.dtype(np.float32),), None)
    factor = factor_of(float(divisor.reshape(()))) if divisor.size == 1 and np.isfinite(divisor).all() else None
    if factor is None or not divisor.all():
        raise ValueError(f"has a weight_global_scale of {divisor.reshape(-1)[:4].tolist()}")
    if ((scale & 127) == 127).any():
        raise ValueError("has scales that are NaN")
    coded = Coded(codes, scale, None, NVFP4[0], Parts(NVFP4[1], scale, float(factor)))
    return Weight(coded, codes.shape, jnp.dtype(jnp.bfloat16))


def _mx(parts: Tensors, grids: tuple[Grid, ScaleGrid]) -> Weight:
    if grids == MXFP4:
        codes, scale = _float4(parts, np.dtype(np.uint8), MX_GROUP)
    else:
        codes = _part(parts, "weight", (np.dtype(ml_dtypes.float8_e4m3fn),)).view(np.uint8)
        scale = _group_scales(parts, np.dtype(np.uint8), codes.shape, MX_GROUP)
    if scale.size and not 27 <= scale.min() <= scale.max() < 255:
        raise ValueError(f"has scales of 2**{int(scale.min()) - 127}, below 2**-100, or NaN")
    return Weight(
        Coded(codes, scale, None, grids[0], Parts(grids[1], scale, 1.0)), codes.shape, jnp.dtype(jnp.bfloat16)
    )


def _float4(parts: Tensors, dtype: np.dtype, size: int) -> tuple[np.ndarray, np.ndarray]:
    codes = unpaired(_part(parts, "weight_packed", (np.dtype(np.uint8),)))
    return codes, _group_scales(parts, dtype, codes.shape, size)


def _group_scales(parts: Tensors, dtype: np.dtype, shape: Shape, size: int) -> np.ndarray:
    scale = _part(parts, "weight_scale", (dtype,))
    if shape[1] % size or scale.shape != (shape[0], shape[1] // size):
        raise ValueError(f"has scales of shape {scale.shape} for a matrix of {shape}, in groups of {size}")
    return scale.view(np.uint8)
