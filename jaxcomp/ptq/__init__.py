"""Post-training compression: parameters to parameters, given what enters the layers, without labels."""

from jaxcomp.ptq.rewrites import (
    Corrected,
    NotKept,
    Rewritten,
    awq,
    correct_bias,
    equalize,
    input_peaks,
    rotate,
    smooth,
    with_factors,
)
from jaxcomp.ptq.second_order import gptq, sparsegpt
from jaxcomp.ptq.sequential import sequentially

__all__ = [
    "Corrected",
    "NotKept",
    "Rewritten",
    "awq",
    "correct_bias",
    "equalize",
    "gptq",
    "input_peaks",
    "rotate",
    "sequentially",
    "smooth",
    "sparsegpt",
    "with_factors",
]
