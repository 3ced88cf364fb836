"""What XLA on CPU shall make once; the other compilers are left to fuse as they like."""

from __future__ import annotations

from typing import TypeVar

import jax

T = TypeVar("T")


def made_once(value: T) -> T:
    """The value, which XLA on CPU makes once for all that read it; accelerators fuse it into each.

    Which of the two is settled when a program is lowered: one exported for a GPU from a machine without one has no
    barrier, and one that runs on the CPU beside a GPU has it. Of a tree, nothing is made from any part before all are
    there; a part that nobody reads is left out.

    >>> import jax.numpy as jnp
    >>> made_once(jnp.arange(3))
    Array([0, 1, 2], dtype=int32)
    """
    made: T = jax.lax.platform_dependent(value, cpu=_barred, default=_same)
    return made


def _barred(value: T) -> T:
    barred: T = jax.lax.optimization_barrier(value)
    return barred


def _same(value: T) -> T:
    return value
