"""Checks of values, and errors that name the leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def count_known(test: Callable[[jax.Array], jax.Array], x: Any) -> int:
    """How many elements of an array the test finds; 0 where the values are not known, as inside jit or of a shape.

    >>> x = jnp.array([1.0, jnp.nan])
    >>> count_known(jnp.isnan, x), count_known(jnp.isnan, jax.eval_shape(jnp.abs, x))
    (1, 0)
    """
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return 0
    with jax.ensure_compile_time_eval():  # a constant inside jit has values too
        return int(jnp.sum(test(jnp.asarray(x))))
