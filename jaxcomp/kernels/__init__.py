"""Forms in which compressed products run: weights packed for them, ``prepare``, and the products themselves."""

from jaxcomp.kernels.leaves import Prepared
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.prepare import prepare
from jaxcomp.kernels.products import weight_only

__all__ = ["PackedWeight", "Prepared", "prepare", "weight_only"]
