"""Vector codebooks: neighbours along an axis are replaced together by the nearest entry of a table of vectors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import Masked
from jaxcomp.core.paths import Where, matrices
from jaxcomp.core.slots import Slot, check_finite, rewrite, slots, state_of
from jaxcomp.core.specs import check_key, is_integer
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, State
from jaxcomp.sharing.kmeans.vectors import fit_vectors, nearest_vectors, refit_vectors
from jaxcomp.sharing.leaves import VectorCodebook
from jaxcomp.sharing.transform import MAX_CLUSTERS


def share_vectors(
    clusters: int, *, size: int, key: Any, axis: int = -2, iterations: int = 25, where: Where = matrices
) -> Transform:
    """Cuts ``axis`` into vectors of ``size`` neighbours and leaves at most ``clusters`` different ones in each leaf.

    ``apply`` makes a ``VectorCodebook`` leaf; the gradient passes straight to the weights. ``update`` goes on with
    k-means from the last table. A mask of an earlier ``prune`` stays on top, and its zeros take part as zeros.

    Args:
      clusters: entries of a table, 2..65536.
      size: of a vector; it divides the axis.
      key: for the first table, drawn by k-means++.
      axis: the default is the input features of a Flax kernel.
      iterations: Lloyd's iterations at ``init``; an ``update`` makes one.
      where: which leaves.

    Raises:
      ValueError: clusters out of range or a missing key; at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, an
        axis that a leaf does not have or that ``size`` does not divide, fewer vectors than clusters.

    >>> t = share_vectors(2, size=2, key=jax.random.key(0))
    >>> params = {"kernel": jnp.array([[0.0, 4.0], [1.0, 4.0], [4.0, 0.0], [4.0, 1.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize().tolist()
    [[0.0, 4.0], [1.0, 4.0], [4.0, 0.0], [4.0, 1.0]]

    Source: Gong et al. 2014, arXiv:1412.6115, section 3.3 (product quantization, here one table for all sub-spaces).
    """
    if not is_integer(clusters) or not 2 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"share_vectors: clusters must be an integer in 2..{MAX_CLUSTERS}, got {clusters!r}.")
    if not is_integer(size) or size < 1:
        raise ValueError(f"share_vectors: size must be a positive integer, got {size!r}.")
    if key is None:
        raise ValueError("share_vectors: the first table is drawn: share_vectors(..., key=jax.random.key(0)).")
    check_key("share_vectors", key)

    def vectors(path: str, slot: Slot) -> tuple[jax.Array, int]:
        """The vectors as rows, and the axis, not negative."""
        x = slot.array if slot.mask is None else jnp.where(slot.mask, slot.array, jnp.zeros((), slot.array.dtype))
        own = _checked_axis(path, x.shape, axis, size, clusters)
        split = x.reshape(*x.shape[:own], x.shape[own] // size, size, *x.shape[own + 1 :])
        return jnp.moveaxis(split, own + 1, -1).reshape(-1, size).astype(compute_dtype(x.dtype)), own

    def init(params: Params) -> State:
        found = slots(params, where, "share_vectors")
        check_finite(found, "share_vectors")
        of = {path: vectors(path, slot)[0] for path, slot in found.items()}
        keys = {path: jax.random.fold_in(key, i) for i, path in enumerate(of)}
        return {p: fit_vectors(x, clusters=clusters, key=keys[p], iterations=iterations) for p, x in of.items()}

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        found = slots(params, where, "share_vectors")
        return {path: refit_vectors(vectors(path, slot)[0], state[path], 1) for path, slot in found.items()}

    def apply(state: State, params: Params) -> Params:
        new = {}
        for path, slot in slots(params, where, "share_vectors").items():
            rows, own = vectors(path, slot)
            table = state_of(state, path, "share_vectors").astype(slot.array.dtype)
            shape = list(slot.array.shape)
            shape[own] //= size
            codes = nearest_vectors(rows, table.astype(rows.dtype)).reshape(shape)
            leaf = VectorCodebook(table, codes, slot.array, own)
            new[path] = leaf if slot.mask is None else Masked(leaf, slot.mask)
        return rewrite(params, new)

    return Transform(init, update, apply)


def _checked_axis(path: str, shape: tuple[int, ...], axis: int, size: int, clusters: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"share_vectors: {path!r} has shape {shape} and no axis {axis}.")
    own = axis % len(shape)
    if shape[own] % size:
        raise ValueError(
            f"share_vectors: {path!r} has {shape[own]} elements along axis {axis}, which vectors of {size} do not"
            " divide; take a divisor, another axis, or leave this leaf out by a rule."
        )
    count = math.prod(shape) // size
    if count < clusters:
        raise ValueError(f"share_vectors: {path!r} has {count} vectors of {size}, fewer than {clusters} clusters.")
    return own
