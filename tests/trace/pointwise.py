"""Functions of one number, read off programs and done again by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.trace.pointwise import Pointwise, Reading


def read(fn) -> Pointwise | None:
    """The function that a program of one array is, if it is one."""
    jaxpr = jax.make_jaxpr(fn)(jnp.zeros((2, 3))).jaxpr
    (x,), (y,) = jaxpr.invars, jaxpr.outvars
    reading = Reading(x)
    return reading.of(y) if all(reading.read(eqn) for eqn in jaxpr.eqns) else None


_OTHERS = {"not": jnp.logical_not, "and": jnp.logical_and, "or": jnp.logical_or, "select_n": lax.select_n}
_OTHERS["round"] = jnp.round  # to even


def by_jax(function: Pointwise, x: jax.Array) -> jax.Array:
    """What it gives, step by step."""
    known = [jnp.asarray(x, jnp.float32)]
    for name, operands, number in function:
        given = [known[i] for i in operands]
        if name == "constant":
            known.append(jnp.full_like(known[0], number))
        elif name == "integer_pow":
            known.append(lax.integer_pow(given[0], int(number)))
        else:
            known.append((_OTHERS.get(name) or getattr(lax, name))(*given))
    return known[-1]
