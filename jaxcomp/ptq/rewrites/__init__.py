"""Rewrites that keep the function: scales moved between layers, residual streams rotated; and biases mended."""

from jaxcomp.ptq.rewrites.awq import awq
from jaxcomp.ptq.rewrites.biases import Corrected, correct_bias
from jaxcomp.ptq.rewrites.equalizing import equalize
from jaxcomp.ptq.rewrites.inputs import input_peaks, with_factors
from jaxcomp.ptq.rewrites.results import Left, NotKept, Rewritten
from jaxcomp.ptq.rewrites.rotation import rotate
from jaxcomp.ptq.rewrites.smoothing import smooth

__all__ = [
    "Corrected",
    "Left",
    "NotKept",
    "Rewritten",
    "awq",
    "correct_bias",
    "equalize",
    "input_peaks",
    "rotate",
    "smooth",
    "with_factors",
]
