"""Which example comes when: pure functions of seeds, by a stream of random words that numpy keeps fixed for ever."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def hold_out(labels: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices ``(rest, held)``: of each class, ``round(share * its size)`` examples drawn by ``seed`` are held.

    >>> rest, held = hold_out(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(rest), len(held)
    (6, 2)

    Raises:
      ValueError: ``share`` is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"hold_out: share must be in 0..1, got {share}")
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        (members,) = np.nonzero(labels == c)
        order = permutation(len(members), seed, int(c))
        held[members[order[: round(share * len(members))]]] = True
    return np.nonzero(~held)[0], np.nonzero(held)[0]


def permutation(n: int, *entropy: int) -> np.ndarray:
    """A permutation of 0..n-1 drawn from the integers ``entropy``, each at least 0.

    It sorts the raw words of a counter-based generator: numpy keeps that stream fixed for ever, but not the
    output of ``Generator.permutation`` (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(words, kind="stable")


def epoch_batches(seed: int, epoch: int, n: int, batch: int) -> Int[np.ndarray, "batches batch"]:
    """Indices of the batches of one epoch: ``range(n)`` shuffled and cut into rows of ``batch``, the rest dropped.

    A pure function of its arguments: a run that resumes in any step of any epoch sees the batches that it would
    have seen. Over the epochs, what is dropped differs.

    >>> epoch_batches(0, 1, 10, 4).shape
    (2, 4)

    Raises:
      ValueError: ``seed`` or ``epoch`` is negative, or a batch is larger than the split.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"epoch_batches: seed and epoch must be at least 0, got {seed} and {epoch}")
    if not 1 <= batch <= n:
        raise ValueError(f"epoch_batches: batch must be in 1..{n}, the size of the split, got {batch}")
    order = permutation(n, seed, epoch).astype(np.int32)
    return order[: n // batch * batch].reshape(-1, batch)
