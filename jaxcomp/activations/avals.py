"""Shapes and types of an equation's operands and results, which JAX's own annotations leave open."""

from __future__ import annotations

import jax

from jaxcomp.trace.flow import Op


def operands_of(op: Op) -> list[jax.ShapeDtypeStruct]:
    """Each operand as the equation was traced."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in op.eqn.invars]  # type: ignore[attr-defined]


def result_of(op: Op) -> jax.ShapeDtypeStruct:
    """The first result as the equation was traced."""
    aval = op.eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)  # type: ignore[attr-defined]
