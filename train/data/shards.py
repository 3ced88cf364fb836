"""Who holds which examples in a simulated federation, and in which order a client sees its own."""

from __future__ import annotations

import numpy as np

from train.data.order import permutation

_ATTEMPTS = 100


def iid_shards(count: int, clients: int, *, seed: int) -> list[np.ndarray]:
    """``range(count)`` dealt out at random; the sizes differ by at most one.

    >>> sorted(len(s) for s in iid_shards(10, 3, seed=0))
    [3, 3, 4]

    Raises:
      ValueError: fewer examples than clients.
    """
    _check(count, clients)
    return np.array_split(_shuffled(np.arange(count), seed), clients)


def dirichlet_shards(labels: np.ndarray, clients: int, *, alpha: float, seed: int, least: int = 1) -> list[np.ndarray]:
    """Each class dealt out in proportions drawn from a Dirichlet distribution: few classes a client if alpha is small.

    Drawn again until every client has at least ``least`` examples.

    Raises:
      ValueError: alpha is not positive, fewer examples than clients, or no draw in a hundred leaves nobody out.

    Source: Yurochkin et al. 2019, arXiv:1905.12022, section 4.
    """
    _check(len(labels), clients)
    if not alpha > 0:
        raise ValueError(f"dirichlet_shards: alpha must be positive, got {alpha!r}.")
    rng = np.random.default_rng(np.random.SeedSequence((seed, 1)))
    for _ in range(_ATTEMPTS):
        shards: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in np.unique(labels):
            members = _shuffled(np.flatnonzero(labels == c), seed, int(c))
            cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(int)
            for shard, part in zip(shards, np.split(members, cuts), strict=True):
                shard.append(part)
        joined = [np.concatenate(parts) for parts in shards]
        if min(map(len, joined)) >= least:
            return joined
    raise ValueError(
        f"dirichlet_shards: with alpha={alpha} some of {clients} clients always get fewer than {least} examples; take a"
        " larger alpha or fewer clients."
    )


def client_batches(shard: np.ndarray, steps: int, batch: int, *, entropy: tuple[int, ...]) -> np.ndarray:
    """Indices of shape (steps, batch): the shard in an order drawn from ``entropy``, over again where too short."""
    return np.resize(_shuffled(shard, *entropy), (steps, batch)).astype(np.int32)


def _check(count: int, clients: int) -> None:
    if not 1 <= clients <= count:
        raise ValueError(f"shards: clients must be in 1..{count}, the number of examples, got {clients}.")


def _shuffled(x: np.ndarray, *entropy: int) -> np.ndarray:
    return x[permutation(len(x), *entropy)]
