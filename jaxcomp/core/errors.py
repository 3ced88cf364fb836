"""Checks of values, and errors that name the leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def naming(owner: str, path: str) -> Iterator[None]:
    """Puts the owner and the path before the message of a ValueError that is raised inside.

    >>> with naming("quantize", "Dense_0/kernel"):
    ...     raise ValueError("has no axis 2")
    Traceback (most recent call last):
    ...
    ValueError: quantize: 'Dense_0/kernel' has no axis 2.
    """
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{owner}: {path!r} {e}.") from e
