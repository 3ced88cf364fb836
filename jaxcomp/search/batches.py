"""What part each batch of calibration has in a mean."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcomp.core.batches import Batch, no_batch


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
        raise no_batch(owner)
    lengths = [_length(batch) for batch in batches]
    if not all(lengths):
        return [1 / len(batches)] * len(batches)
    return [n / sum(lengths) for n in lengths]


def _length(batch: Batch) -> int:
    """The length of the first axis that all arrays have; 0 where they disagree."""
    found = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    return found.pop() if len(found) == 1 else 0
