"""What each primitive is in operators of ONNX, by kinds of primitives."""

from jaxcomp.export.onnx.rules import (
    casts,
    contractions,
    control,
    convolutions,
    elementwise,
    indexing,
    integers,
    layout,
    movement,
    reductions,
    sorting,
    updates,
    windows,
)

__all__ = ["MODULES"]

MODULES = (
    casts,
    contractions,
    control,
    convolutions,
    elementwise,
    indexing,
    integers,
    layout,
    movement,
    reductions,
    sorting,
    updates,
    windows,
)
"""The modules that fill the table of rules when they are imported."""
