"""Pruning: scores, structures, scopes and schedules as slots of one verb, and sparse training from the start."""

from jaxcomp.pruning.masks.nm import is_n_m
from jaxcomp.pruning.schedules import PruningSchedule, alternating, constant, cubic, iterative, polynomial
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
from jaxcomp.pruning.sparse_training import regrow, rigl, sparse_evolution
from jaxcomp.pruning.specs import ERK, NM, Block, Cut, Element, Filters, Given, Heuristic, StraightThrough, Tied, Units
from jaxcomp.pruning.statistics import accumulate
from jaxcomp.pruning.transform import is_pruned, masked_by, prune
from jaxcomp.pruning.unmasking import from_zero

__all__ = [
    "ERK",
    "NM",
    "Block",
    "Cut",
    "Element",
    "Filters",
    "Given",
    "Heuristic",
    "PruningSchedule",
    "Score",
    "StraightThrough",
    "Tied",
    "Units",
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
    "random_score",
    "redundancy",
    "regrow",
    "rigl",
    "sensitivity",
    "sparse_evolution",
    "taylor",
    "wanda",
]
