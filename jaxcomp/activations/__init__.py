"""Quantized activations: ``quantize_function``, what its rules say, and the report of what it does."""

from jaxcomp.activations.coverage import Coverage, Covered, coverage
from jaxcomp.activations.demands import NotOnIntegers
from jaxcomp.activations.function import factored, quantize_function
from jaxcomp.activations.planning import PoorRange, Rules, ranges_of
from jaxcomp.activations.specs import LSQ, PACT, Act, Backward, Dynamic, Float8, Static

__all__ = [
    "LSQ",
    "PACT",
    "Act",
    "Backward",
    "Coverage",
    "Covered",
    "Dynamic",
    "Float8",
    "NotOnIntegers",
    "PoorRange",
    "Rules",
    "Static",
    "coverage",
    "factored",
    "quantize_function",
    "ranges_of",
]
