"""Quantization: grids, ranges, rounding and what shares a scale as slots of one verb; learned quantizers."""

from jaxcomp.quantization.companding import LOG, Companded, Compander, Log
from jaxcomp.quantization.grids import Grid, Int
from jaxcomp.quantization.learned import Learned, learned
from jaxcomp.quantization.leaves import Folded, Quantized
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2, Float, LevelGrid, Levels
from jaxcomp.quantization.microscaling import E8M0, Blocked
from jaxcomp.quantization.scales import MSE, AbsMax, Fixed, MeanAbs, Nearest, Percentile, Stochastic
from jaxcomp.quantization.tables import NF4, APoT, PoT
from jaxcomp.quantization.transform import quantize

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E8M0",
    "LOG",
    "MSE",
    "NF4",
    "APoT",
    "AbsMax",
    "Blocked",
    "Companded",
    "Compander",
    "Fixed",
    "Float",
    "Folded",
    "Grid",
    "Int",
    "Learned",
    "LevelGrid",
    "Levels",
    "Log",
    "MeanAbs",
    "Nearest",
    "Percentile",
    "PoT",
    "Quantized",
    "Stochastic",
    "learned",
    "quantize",
]
