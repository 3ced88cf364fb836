"""Forms in which compressed products run: weights packed for them, ``prepare``, and the products themselves."""

from jaxcomp.kernels.cache import KVCache, kv_cache
from jaxcomp.kernels.leaves import Prepared
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.prepare import prepare
from jaxcomp.kernels.products import weight_only

__all__ = ["KVCache", "PackedWeight", "Prepared", "kv_cache", "prepare", "weight_only"]
