"""Batches of calibration: what a function takes behind its parameters, and what part each has in a mean."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcomp.core.types import PyTree

Batch = tuple[PyTree, ...]
"""The arguments behind the parameters."""


def as_batch(batch: PyTree) -> Batch:
    """A batch as the arguments behind the parameters: a tuple is all of them, anything else the only one.

    >>> as_batch(3), as_batch((3, 4))
    ((3,), (3, 4))
    """
    return batch if type(batch) is tuple else (batch,)


def parts_of(owner: str, batches: Sequence[Batch]) -> list[float]:
    """What part each batch has in a mean over examples.

    That is by the length of its arrays' first axis where they agree on one, in every batch; or else all have alike.

    Raises:
      ValueError: no batch.

    >>> parts_of("f", [(jnp.zeros((3, 2)), jnp.zeros(3)), (jnp.zeros((1, 2)), jnp.zeros(1))])
    [0.75, 0.25]
    >>> parts_of("f", [(jnp.zeros((3, 2)), 1.0), (jnp.zeros((1, 2)), 1.0)])
    [0.5, 0.5]
    """
    if not batches:
        raise ValueError(f"{owner}: there is no batch; give one or more of the arguments behind the parameters.")
    lengths = [_length(batch) for batch in batches]
    if not all(lengths):
        return [1 / len(batches)] * len(batches)
    return [n / sum(lengths) for n in lengths]


def _length(batch: Batch) -> int:
    """The length of the first axis that all arrays have; 0 where they disagree."""
    found = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    return found.pop() if len(found) == 1 else 0
