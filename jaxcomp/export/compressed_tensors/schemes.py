"""How a matrix of codes is laid out there: which format, which tensors, and what config.json says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxcomp.core.types import DType, Json
from jaxcomp.export.coded import Coded, Parts
from jaxcomp.export.compressed_tensors.packing import global_scale, pairs, words
from jaxcomp.export.errors import ExportError
from jaxcomp.quantization.level_grids import E2M1, E4M3
from jaxcomp.quantization.microscaling import E8M0

MXFP4, MXFP8, NVFP4 = (E2M1, E8M0()), (E4M3, E8M0()), (E2M1, E4M3)
"""The grids of the elements and of the scales."""
GRIDS = (
    "Int(2) to Int(8), symmetric or not, with per=Groups(size), Channels() or Tensor(); Float(4, 3, reserved=1) with"
    " these or Tiles; recipes.nvfp4(); recipes.mx of E2M1 or E4M3"
)
NVFP4_GROUP, MX_GROUP = 16, 32


class Scheme(NamedTuple):
    """One weight in the layout.

    Fields:
      format: its name there.
      weights: the arguments of its quantization, for config.json.
      tensors: by what stands behind the module's name.
    """

    format: str
    weights: dict[str, Json]
    tensors: dict[str, np.ndarray]


def scheme(x: Coded, scale_dtype: DType | None, beside: Json = None) -> Scheme:
    """The layout of a matrix of codes.

    Args:
      x: the matrix.
      scale_dtype: what the scales are rounded to; None keeps their type. Formats with a type of their own keep that.
      beside: the type of the activations that enter, "int" or "float"; None where they are not quantized.

    Raises:
      ExportError: there is none for its grid or blocks; the message goes after the path.
    """
    reach = x.grid.code_range
    if reach is not None and x.grid.bits > 1:
        return _integers(x, scale_dtype, packed=beside != "int")
    grids = (x.grid, x.parts and x.parts.grid)
    make = next((make for wanted, make in _TABLES if grids == wanted), None)
    if make is None:
        raise ExportError(f"is on {x.grid.label}, which compressed-tensors has no format for; it has {GRIDS}.")
    found = make(x, scale_dtype)
    if beside is None:
        return found
    if found.format != "naive-quantized" or beside != "float":
        raise ExportError(f"is on {x.grid.label} with activations of type {beside}, of which the layout has no pair.")
    return found._replace(format="float-quantized")


def _integers(x: Coded, scale_dtype: DType | None, *, packed: bool) -> Scheme:
    rows = x.shape[0]
    if x.blocks[0] not in (1, rows) or (x.blocks[0] == 1 and x.blocks[1] > 1):
        x = x.cut((rows, x.blocks[1]))  # the layout's integers know no blocks of several rows
    bits, strategy = x.grid.bits, _strategy(x)
    weights = _arguments(x, bits, "int", strategy)
    tensors = {"weight_scale": _scales(x, strategy, scale_dtype)}
    if x.zero is not None:
        weights["symmetric"] = False
        tensors["weight_zero_point"] = _signed(x.zero, bits)
        if strategy == "tensor":
            tensors["weight_zero_point"] = tensors["weight_zero_point"].reshape(1)
        elif bits == 4 and rows <= 8:  # the package (0.20.1) cannot read zero points that one row of words holds
            packed = False
        elif packed:
            tensors["weight_zero_point"] = np.ascontiguousarray(words(x.zero.T, bits).T)
    if not packed:
        return Scheme("int-quantized", weights, tensors | {"weight": _signed(x.codes, bits)})
    shape = np.array(x.shape, np.int64)
    return Scheme("pack-quantized", weights, tensors | {"weight_packed": words(x.codes, bits), "weight_shape": shape})


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes from 0 on as integers about 0."""
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _float8(x: Coded, scale_dtype: DType | None) -> Scheme:
    strategy = _strategy(x)
    if strategy == "group" and x.blocks[0] != x.shape[0]:
        x = x.cut((x.shape[0], x.blocks[1]))
    weights = _arguments(x, 8, "float", strategy)
    held = x.codes.view(ml_dtypes.float8_e4m3fn)
    return Scheme("naive-quantized", weights, {"weight": held, "weight_scale": _scales(x, strategy, scale_dtype)})


def _nvfp4(x: Coded, scale_dtype: DType | None) -> Scheme:
    parts = _grouped(x, NVFP4_GROUP)
    divisor = global_scale(parts.outer)
    if divisor is None:
        raise ExportError(f"has {parts.outer} over its scales, for which the layout has no divisor; scale the weights.")
    weights = _arguments(x, 4, "float", "tensor_group") | {"scale_dtype": "torch.float8_e4m3fn"}
    tensors = {
        "weight_packed": pairs(x.codes),
        "weight_scale": parts.codes.view(ml_dtypes.float8_e4m3fn),
        "weight_global_scale": np.array([divisor], np.float32),
    }
    return Scheme("nvfp4-pack-quantized", weights, tensors)


def _mxfp4(x: Coded, scale_dtype: DType | None) -> Scheme:
    codes = _grouped(x, MX_GROUP).codes
    weights = _arguments(x, 4, "float", "group") | {"scale_dtype": "torch.uint8"}
    return Scheme("mxfp4-pack-quantized", weights, {"weight_packed": pairs(x.codes), "weight_scale": codes})


def _mxfp8(x: Coded, scale_dtype: DType | None) -> Scheme:
    codes = _grouped(x, MX_GROUP).codes
    weights = _arguments(x, 8, "float", "group") | {"scale_dtype": "torch.uint8"}
    return Scheme("mxfp8-quantized", weights, {"weight": x.codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": codes})


_TABLES: list[tuple[object, Callable[[Coded, DType | None], Scheme]]] = [
    ((E4M3, None), _float8),
    (NVFP4, _nvfp4),
    (MXFP4, _mxfp4),
    (MXFP8, _mxfp8),
]


def _grouped(x: Coded, size: int) -> Parts:
    """The scales, one for ``size`` inputs."""
    if x.parts is None or x.shape[1] % size or x.blocks != (x.shape[0], x.shape[1] // size):
        raise ExportError(f"has its scales in {_words(x)}, and this format wants per=Groups({size}) along the inputs.")
    return x.parts


def _strategy(x: Coded) -> str:
    (o, i), (rows, _) = x.blocks, x.shape
    if (o, i) == (1, 1):
        return "tensor"
    if o == rows:
        return "channel" if i == 1 else "group"
    return "group" if o == 1 else "block"


def _arguments(x: Coded, bits: int, kind: str, strategy: str) -> dict[str, Json]:
    said: dict[str, Json] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": x.shape[1] // x.blocks[1] if "group" in strategy else None,
        "dynamic": False,
    }
    if strategy == "block":
        said["block_structure"] = [n // b for n, b in zip(x.shape, x.blocks, strict=True)]
    return said


def _scales(x: Coded, strategy: str, dtype: DType | None) -> np.ndarray:
    scale = x.scale.reshape(1) if strategy == "tensor" else x.scale
    if dtype is None or scale.dtype == dtype:
        return scale
    with np.errstate(over="ignore"):
        narrow = scale.astype(dtype)
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    wide = narrow.astype(np.float64)
    if not np.isfinite(wide[np.isfinite(scale)]).all() or (np.abs(wide) < tiny)[scale != 0].any():
        raise ExportError(
            f"has scales from {np.abs(scale).min():.3g} to {np.abs(scale).max():.3g}, beyond the normal numbers of"
            f" {np.dtype(dtype)}; leave scale_dtype out, or take bfloat16."
        )
    return narrow


def _words(x: Coded) -> str:
    (o, i), (rows, columns) = x.blocks, x.shape
    return f"blocks of {rows // o} outputs by {columns // i} inputs"
