"""Forms in which compressed products run: weights packed for them, and the products. Arrays in, arrays out."""

from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.weight_only import weight_only

__all__ = ["PackedWeight", "weight_only"]
