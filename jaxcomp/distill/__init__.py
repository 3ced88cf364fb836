"""Distillation: a student that learns from a teacher, by its results and by what goes on inside both."""

from jaxcomp.distill.capture import Captured, capture, points
from jaxcomp.distill.losses import (
    angles,
    attention_maps,
    attention_transfer,
    distances,
    hint,
    similarity,
    soft_targets,
)
from jaxcomp.distill.recipes import Distilled, Match, Taught, distilled

__all__ = [
    "Captured",
    "Distilled",
    "Match",
    "Taught",
    "angles",
    "attention_maps",
    "attention_transfer",
    "capture",
    "distances",
    "distilled",
    "hint",
    "points",
    "similarity",
    "soft_targets",
]
