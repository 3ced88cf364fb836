"""One set of weights for networks of many widths: trained together, then searched for the best within a budget."""

from jaxcomp.search.supernet.searching import Narrowed, narrow
from jaxcomp.search.supernet.statistics import recalibrated
from jaxcomp.search.supernet.training import sandwich
from jaxcomp.search.supernet.widths import Supernet, slimmable

__all__ = ["Narrowed", "Supernet", "narrow", "recalibrated", "sandwich", "slimmable"]
