"""Quantization: grids, ranges, rounding and what shares a scale as slots of one verb; learned quantizers."""

from jaxcomp.quantization.grids import LOG, Companded, Compander, Int, Log
from jaxcomp.quantization.learned import Learned, learned
from jaxcomp.quantization.leaves import Folded, Quantized
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, APoT, Float, Levels, PoT
from jaxcomp.quantization.microscaling import E8M0, Blocked
from jaxcomp.quantization.scales import MSE, AbsMax, Fixed, MeanAbs, Nearest, Percentile, Stochastic
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
    "Int",
    "Learned",
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
