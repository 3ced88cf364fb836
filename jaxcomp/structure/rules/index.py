"""Rules of indexing: gathers, scatters, and slices at a computed place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.structure.atoms import FREE, FROZEN, Dim, Label, weakest
from jaxcomp.structure.labelling import Result, Walk, out_shape, rule
from jaxcomp.structure.rules.layout import cut

COMPUTED = "it is indexed by what is computed, so any index may be asked for"
WRITTEN = "a part of it is written in place"


@rule("dynamic_slice")
def dynamic_slice(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A slice at a known place takes a part of the atoms; at an unknown one the dimension stays."""
    x, starts, sizes = ins[0], ins[1:], eqn.params["slice_sizes"]
    dims: list[Dim] = []
    for d, n, size, start in zip(x.dims, x.shape, sizes, starts, strict=True):
        at = clamp_start(start, n, size)
        if isinstance(d, np.ndarray) and at is None:
            walk.freeze(d, why=COMPUTED)
        dims.append(d if at is None and not isinstance(d, np.ndarray) else _part(walk, d, n, at, size))
    return ins, [replace(x, shape=tuple(sizes), dims=tuple(dims), value=None, sums=None)]


def _part(walk: Walk, dim: Dim, n: int, at: int | None, size: int) -> Dim:
    return FROZEN if at is None else cut(walk, dim, n, slice(at, at + size))


def clamp_start(start: Label, n: int, size: int) -> int | None:
    """Where a dynamic slice of ``size`` out of ``n`` begins, if that is known."""
    if size == n:
        return 0
    return None if start.value is None else min(max(int(start.value), 0), n - size)


@rule("dynamic_update_slice")
def dynamic_update_slice(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Dimensions written whole go together; the others stay."""
    x, update = ins[:2]
    dims, used = list(x.dims), list(update.dims)
    for d, (n, size) in enumerate(zip(x.shape, update.shape, strict=True)):
        if n == size:
            dims[d] = used[d] = walk.join(x.dims[d], update.dims[d])
        else:
            walk.freeze(x.dims[d], update.dims[d], why=WRITTEN)
            dims[d] = weakest((FREE, x.dims[d], update.dims[d]))
    zero = tuple(x.zero_at(d) and update.zero_at(d) for d in range(len(dims)))
    out = Label(x.shape, tuple(dims), zero, x.null and update.null)
    return [x.with_dims(dims), update.with_dims(used), *ins[2:]], [out]


def constant_take(eqn: core.JaxprEqn, x: Label, index: Label) -> tuple[int, NDArray[np.int64]] | None:
    """The dimension that a gather indexes and the known indices, if it is ``take(x, indices, axis)``."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if index.value is None or len(index.shape) != 2 or len(numbers.start_index_map) != 1:
        return None
    (d,) = numbers.start_index_map
    others = [n == m for e, (n, m) in enumerate(zip(sizes, x.shape, strict=True)) if e != d]
    if tuple(numbers.collapsed_slice_dims) != (d,) or numbers.operand_batching_dims or not all(others):
        return None
    at = index.value[:, 0].astype(np.int64)
    return (d, at) if ((at >= 0) & (at < x.shape[d])).all() else None


@rule("gather")
def gather(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Known indices take atoms; unknown ones freeze what they index and pass the rest (an embedding's features)."""
    x, index = ins
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], out_shape(eqn)
    taken = constant_take(eqn, x, index)
    offset = [d for d in range(len(x.shape)) if d not in numbers.collapsed_slice_dims + numbers.operand_batching_dims]
    batch = [e for e in range(len(shape)) if e not in numbers.offset_dims]
    dims: list[Dim] = [FROZEN] * len(shape)
    zero = [False] * len(shape)
    for d, e in zip(offset, numbers.offset_dims, strict=True):
        if sizes[d] == x.shape[d]:
            dims[e], zero[e] = x.dims[d], x.zero[d]
        else:
            walk.freeze(x.dims[d], why=COMPUTED)
            dims[e] = weakest((FREE, x.dims[d], *index.dims))
    used = list(index.dims)
    for e, d in zip(batch, range(len(index.shape) - 1), strict=True):
        dims[e] = index.dims[d]
    for d, e in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        walk.freeze(x.dims[d], index.dims[e], why=COMPUTED)
    for d in numbers.collapsed_slice_dims:
        if taken is not None and isinstance(x.dims[d], np.ndarray):
            walk.mark(x.dims[d])
            dims[batch[0]], zero[batch[0]] = x.dims[d][taken[1]], x.zero[d]
        else:
            walk.freeze(x.dims[d], why=COMPUTED)
    return [x, index.with_dims(used)], [Label(tuple(shape), tuple(dims), tuple(zero), x.null)]


@rule(
    *(f"scatter{kind}" for kind in ("", "-add", "_add", "-sub", "_sub", "-mul", "_mul", "-min", "_min", "-max", "_max"))
)
def scatter(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Dimensions written whole go together; those that are indexed stay."""
    x, index, updates = ins
    numbers = eqn.params["dimension_numbers"]
    windows = [d for d in range(len(x.shape)) if d not in numbers.inserted_window_dims + numbers.operand_batching_dims]
    dims, used = list(x.dims), list(updates.dims)
    whole = {}
    for d, e in zip(windows, numbers.update_window_dims, strict=True):
        if x.shape[d] == updates.shape[e]:
            dims[d] = used[e] = walk.join(x.dims[d], updates.dims[e])
            whole[d] = e
    for d in range(len(dims)):
        if d not in whole:
            walk.freeze(x.dims[d], why=WRITTEN)
            dims[d] = weakest((FREE, x.dims[d]))
    part = [updates.dims[e] for e in range(len(used)) if e not in whole.values()]
    walk.freeze(*part, *index.dims, why=WRITTEN)
    if any(d is FROZEN for d in (*updates.dims, *index.dims)):
        dims = [d if isinstance(d, np.ndarray) else FROZEN for d in dims]
    zero = tuple(d in whole and x.zero_at(d) and updates.zero_at(whole[d]) for d in range(len(dims)))
    return [x.with_dims(dims), index, updates.with_dims(used)], [Label(x.shape, tuple(dims), zero)]
