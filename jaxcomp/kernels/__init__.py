"""Forms in which compressed products run: weights packed for them, ``prepare``, and the products themselves."""

from jaxcomp.kernels.cache import KVCache, kv_cache
from jaxcomp.kernels.leaves import Prepared
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.panel_leaves import PreparedPanels
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.prepare import prepare
from jaxcomp.kernels.products import weight_only
from jaxcomp.kernels.sparse import SparseWeight
from jaxcomp.kernels.sparse_leaves import PreparedSparse

__all__ = [
    "KVCache",
    "PackedWeight",
    "PanelWeight",
    "Prepared",
    "PreparedPanels",
    "PreparedSparse",
    "SparseWeight",
    "kv_cache",
    "prepare",
    "weight_only",
]
