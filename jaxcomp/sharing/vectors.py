"""Vector codebooks: neighbours along an axis are replaced together by the nearest entry of a table of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.errors import naming
from jaxcomp.core.meshes import after
from jaxcomp.core.paths import Where, key_of_leaf
from jaxcomp.core.progress import each
from jaxcomp.core.records import recorded
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots, state_of
from jaxcomp.core.specs import check_key, is_integer
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Key, Leaf, Params, State, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.sharing.kmeans.vectors import fit_vectors, nearest_vectors, refit_vectors
from jaxcomp.sharing.leaves import VectorCodebook
from jaxcomp.sharing.transform import MAX_CLUSTERS

OWNER = "share_vectors"


@recorded
def share_vectors(
    clusters: int,
    *,
    size: int,
    key: Key,
    axis: int | None = None,
    roles: Roles | None = None,
    iterations: int = 25,
    where: Where | None = None,
) -> Transform:
    """Cuts ``axis`` into vectors of ``size`` neighbours and leaves at most ``clusters`` different ones in each leaf.

    ``apply`` makes a ``VectorCodebook`` leaf; the gradient passes straight to the weights. ``update`` goes on with
    k-means from the last table. A mask of an earlier ``prune`` stays on top, and its zeros take part as zeros.

    Args:
      clusters: entries of a table, 2..65536.
      size: of a vector; it divides the axis.
      key: for the first table, drawn by k-means++ from a key of each leaf's own, whatever else is in the tree.
      axis: the default is the last axis that products sum over, a convolution's window apart.
      roles: from :func:`jaxcomp.roles`, where no axis is named. Without it, what path and rank settle.
      iterations: Lloyd's iterations at ``init``; an ``update`` makes one.
      where: which leaves; by default the matrices that roles name, or all matrices.

    Raises:
      TypeError: roles of another kind.
      ValueError: clusters out of range or a missing key; at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, an
        axis that a leaf does not have, that is not known, or that ``size`` does not divide, and fewer vectors than
        clusters.

    >>> t = share_vectors(2, size=2, key=jax.random.key(0))
    >>> params = {"kernel": jnp.array([[0.0, 4.0], [1.0, 4.0], [4.0, 0.0], [4.0, 1.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize().tolist()
    [[0.0, 4.0], [1.0, 4.0], [4.0, 0.0], [4.0, 1.0]]

    Source: Gong et al. 2014, arXiv:1412.6115, section 3.3 (product quantization, here one table for all sub-spaces).
    """
    _check(clusters=clusters, size=size, key=key, axis=axis)
    rule = selecting(where, checked_roles(OWNER, roles))

    def cut(params: Params) -> dict[str, _Vectors]:
        found = slots(params, rule, OWNER)
        return {
            path: _cut(slot, _axis(slot, axis, roles), size=size, clusters=clusters) for path, slot in found.items()
        }

    def init(params: Params) -> State:
        every = cut(params)
        check_finite({path: one.slot for path, one in every.items()}, OWNER)

        tables: State = {}

        def fitted(path: str, one: _Vectors) -> jax.Array:
            rows, own = one.rows(tables), key_of_leaf(key, path)
            tables[path] = fit_vectors(rows, clusters=clusters, key=own, iterations=iterations)
            return tables[path]

        return each(fitted, every, f"{OWNER}: k-means")

    def update(state: State, params: Params, *, step: Step, **stats: Any) -> State:
        return _refitted(cut(params), state)

    def apply(state: State, params: Params) -> Params:
        return replace_slots(params, _leaves(cut(params), state))

    return Transform(init, update, apply)


class _Vectors(NamedTuple):
    """A slot, of which ``size`` neighbours along an axis are a vector."""

    slot: Slot
    size: int
    axis: int

    def rows(self, made: Mapping[str, jax.Array]) -> jax.Array:
        """The vectors, a row each; a mesh lays them in a row one leaf after another, each when ``made`` is there."""
        x, size, axis, shape = after(self.slot.array, made), self.size, self.axis, tuple(self.slot.array.shape)
        x = x if self.slot.mask is None else jnp.where(self.slot.mask, x, jnp.zeros((), x.dtype))
        split = x.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        return jnp.moveaxis(split, axis + 1, -1).reshape(-1, size).astype(compute_dtype(x.dtype))

    def codes(self, table: jax.Array, made: Mapping[str, jax.Array]) -> jax.Array:
        """The nearest entry of each vector."""
        rows = jax.lax.stop_gradient(self.rows(made))
        shape = list(self.slot.array.shape)
        shape[self.axis] //= self.size
        own = table.astype(self.slot.array.dtype).astype(rows.dtype)
        return nearest_vectors(rows, own).reshape(shape)

    def leaf(self, table: jax.Array, codes: jax.Array) -> VectorCodebook | Masked:
        leaf = VectorCodebook(table.astype(self.slot.array.dtype), codes, self.slot.array, self.axis)
        return leaf if self.slot.mask is None else Masked(leaf, self.slot.mask)


def _refitted(every: Mapping[str, _Vectors], state: State) -> State:
    tables: State = {}
    for path, one in every.items():
        tables[path] = refit_vectors(one.rows(tables), state_of(state, path, OWNER), 1)
    return tables


def _leaves(every: Mapping[str, _Vectors], state: State) -> dict[str, Leaf]:
    codes: dict[str, jax.Array] = {}
    new: dict[str, Leaf] = {}
    for path, one in every.items():
        table = state_of(state, path, OWNER)
        codes[path] = one.codes(table, codes)
        new[path] = one.leaf(table, codes[path])
    return new


def _cut(slot: Slot, axis: int, *, size: int, clusters: int) -> _Vectors:
    shape = tuple(slot.array.shape)
    with naming(OWNER, slot.path):
        if shape[axis] % size:
            raise ValueError(
                f"has {shape[axis]} elements along axis {axis} of shape {shape}, which vectors of {size} do not divide;"
                " take a divisor, another axis, or leave this leaf out by a rule"
            )
        if math.prod(shape) // size < clusters:
            raise ValueError(
                f"has {math.prod(shape) // size} vectors of {size}, fewer than {clusters} clusters; take fewer"
                " clusters, shorter vectors, or leave it out by a rule"
            )
    return _Vectors(slot, size, axis)


def _axis(slot: Slot, axis: int | None, roles: Roles | None) -> int:
    """The axis that is cut, not negative."""
    shape = tuple(slot.array.shape)
    with naming(OWNER, slot.path):
        if axis is None:
            own = slot.axes(roles)
            if not own.inputs:
                raise ValueError(
                    f"has shape {shape}, and no product sums over an axis of it ({', '.join(own.names)}); name the"
                    " axis, as in axis=-2, or leave it out by a rule"
                )
            return own.inputs[-1]
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"has shape {shape} and no axis {axis}; name one in {-len(shape)}..{len(shape) - 1}")
        return axis % len(shape)


def _check(*, clusters: object, size: object, key: object, axis: object) -> None:
    if not is_integer(clusters) or not 2 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"{OWNER}: clusters must be an integer in 2..{MAX_CLUSTERS}, got {clusters!r}.")
    if not is_integer(size) or size < 1:
        raise ValueError(f"{OWNER}: size must be a positive integer, got {size!r}.")
    if axis is not None and not is_integer(axis):
        raise ValueError(f"{OWNER}: axis must be an integer, or None for the one that products sum over, got {axis!r}.")
    if key is None:
        raise ValueError(f"{OWNER}: the first table is drawn: {OWNER}(..., key=jax.random.key(0)).")
    check_key(OWNER, key)
