"""Judging a network on a split, and the mean gradient that sensitivity pruning reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.types import Params, PyTree
from train.data.sets import Split
from train.loop.processes import Processes, share_of
from train.loop.step import Gradient, Predict

BATCH = 500


def accuracy(
    predict: Predict, params: Params, batch_stats: PyTree, split: Split, processes: Processes | None = None
) -> float:
    """Fraction of the whole split that is classified correctly; the last batch is padded, so one shape is compiled.

    Batches are dealt out to the processes, each of which has the variables: each batch gives what one process gives.
    """
    right, processes = 0, processes or Processes()
    for start in share_of(range(0, len(split), BATCH), processes):
        images, labels = split.images[start : start + BATCH], split.labels[start : start + BATCH]
        padding = [(0, BATCH - len(images))] + [(0, 0)] * (images.ndim - 1)
        classes = np.asarray(predict(params, batch_stats, np.pad(images, padding)))[: len(labels)]
        right += int((classes == labels).sum())
    return processes.total(right) / len(split)


def mean_abs_gradient(
    gradient: Gradient, params: Params, batch_stats: PyTree, split: Split, *, most: int = 5000
) -> Params:
    """The mean over batches of |∂loss/∂params|, from the first ``most`` examples of a split."""
    size = min(BATCH, len(split))
    starts = range(0, min(most, len(split)) - size + 1, size)
    total = jax.tree.map(jnp.zeros_like, params)
    for s in starts:
        g = gradient(params, batch_stats, split.images[s : s + size], split.labels[s : s + size])
        total = jax.tree.map(jnp.add, total, g)
    return jax.tree.map(lambda t: t / len(starts), total)
