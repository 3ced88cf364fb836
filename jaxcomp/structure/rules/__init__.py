"""How each primitive ties the channels of what goes in to those of what comes out, by kinds of primitives."""

from jaxcomp.structure.rules import control, index, layout, math

__all__ = ["control", "index", "layout", "math"]
