"""Pruning: scores, structures, scopes and schedules as slots of one verb, and sparse training from the start."""

from jaxcomp.pruning.masks.nm import is_n_m
from jaxcomp.pruning.schedules import alternating, constant, cubic, iterative, polynomial
from jaxcomp.pruning.scores import (
    Score,
    fisher,
    importance,
    lamp,
    magnitude,
    movement,
    norm,
    random_score,
    redundancy,
    sensitivity,
    taylor,
    wanda,
)
from jaxcomp.pruning.sparse_training import from_zero, regrow, rigl, sparse_evolution
from jaxcomp.pruning.specs import ERK, NM, Block, Cut, Element, Filters, Given, Heuristic, StraightThrough, Tied
from jaxcomp.pruning.statistics import accumulate
from jaxcomp.pruning.transform import is_pruned, masked_by, prune, prune_n_m

__all__ = [
    "ERK",
    "NM",
    "Block",
    "Cut",
    "Element",
    "Filters",
    "Given",
    "Heuristic",
    "Score",
    "StraightThrough",
    "Tied",
    "accumulate",
    "alternating",
    "constant",
    "cubic",
    "fisher",
    "from_zero",
    "importance",
    "is_n_m",
    "is_pruned",
    "iterative",
    "lamp",
    "magnitude",
    "masked_by",
    "movement",
    "norm",
    "polynomial",
    "prune",
    "prune_n_m",
    "random_score",
    "redundancy",
    "regrow",
    "rigl",
    "sensitivity",
    "sparse_evolution",
    "taylor",
    "wanda",
]
