"""What each primitive is in operators of ONNX, by kinds of primitives."""

from jaxcomp.export.onnx.rules import contractions, elementwise, layout, reductions

__all__ = ["MODULES"]

MODULES = (contractions, elementwise, layout, reductions)
"""The modules that fill the table of rules when they are imported."""
