"""Pruning masks of arrays: scores, thresholds, structures. No tree is known here."""

from jaxcomp.pruning.masks.densities import erk, heuristic
from jaxcomp.pruning.masks.growth import drop_and_grow, first_mask
from jaxcomp.pruning.masks.nm import is_n_m, n_m_mask
from jaxcomp.pruning.masks.select import select
from jaxcomp.pruning.masks.thresholds import fraction_of, smallest
from jaxcomp.pruning.masks.units import alive_units, over_units, unit_scores

__all__ = [
    "alive_units",
    "drop_and_grow",
    "erk",
    "first_mask",
    "fraction_of",
    "heuristic",
    "is_n_m",
    "n_m_mask",
    "over_units",
    "select",
    "smallest",
    "unit_scores",
]
