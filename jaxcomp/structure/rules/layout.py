"""Rules of layout: transposes, reshapes, broadcasts, slices, concatenations, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.structure.atoms import FREE, FROZEN, UNIFORM, Dim, Label, arrays, fixed, weakest
from jaxcomp.structure.labelling import Result, Walk, out_shape, rule, unknown
from jaxcomp.trace.primitives import COPIES
from jaxcomp.trace.walk import aval_of

_TAKES_APART = frozenset({"slice", "split", "squeeze", "dynamic_slice", "gather", "unstack"})
_MOVES = COPIES | {"transpose"}


@rule("transpose")
def transpose(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Dimensions move with their atoms."""
    return ins, [ins[0].select(eqn.params["permutation"])]


@rule("squeeze")
def squeeze(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A dropped dimension's only index stays."""
    (x,) = ins
    dropped = [d % len(x.shape) for d in eqn.params["dimensions"]]
    walk.freeze(*(x.dims[d] for d in dropped))
    return ins, [x.select([d for d in range(len(x.shape)) if d not in dropped])]


@rule("broadcast_in_dim")
def broadcast_in_dim(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """New and stretched dimensions are uniform, the others keep their atoms."""
    x, shape = ins[0], eqn.params["shape"]
    dims: list[Dim] = [UNIFORM] * len(shape)
    zero = [False] * len(shape)
    for d, e in enumerate(eqn.params["broadcast_dimensions"]):
        if x.shape[d] == shape[e]:
            dims[e], zero[e] = x.dims[d], x.zero[d]
        else:
            walk.freeze(x.dims[d])
    return ins, [Label(tuple(shape), tuple(dims), tuple(zero), x.null, None, x.sums)]


@rule("rev")
def rev(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Reversed dimensions have their atoms reversed."""
    (x,), axes = ins, eqn.params["dimensions"]
    dims = [d[::-1] if e in axes and isinstance(d, np.ndarray) else d for e, d in enumerate(x.dims)]
    walk.mark(*(x.dims[e] for e in axes))
    return ins, [x.with_dims(dims)]


@rule("slice")
def slice_(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A slice takes a part of the atoms."""
    (x,), p = ins, eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    dims = [cut(walk, d, n, slice(*b)) for d, n, b in zip(x.dims, x.shape, bounds, strict=True)]
    return ins, [replace(x, shape=out_shape(eqn), dims=tuple(dims), value=None, sums=None)]


def cut(walk: Walk, dim: Dim, n: int, part: slice) -> Dim:
    """A part of a dimension of ``n``."""
    if not isinstance(dim, np.ndarray) or range(n)[part] == range(n):
        return dim
    walk.mark(dim)
    return dim[part]


@rule("split")
def split(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Each piece has its part of the atoms."""
    (x,), axis = ins, eqn.params["axis"]
    stops = np.cumsum([int(n) for n in eqn.params["sizes"]])
    outs = []
    for start, stop in zip((0, *stops[:-1]), stops, strict=True):
        piece = cut(walk, x.dims[axis], x.shape[axis], slice(int(start), int(stop)))
        shape = (*x.shape[:axis], int(stop - start), *x.shape[axis + 1 :])
        outs.append(Label(shape, (*x.dims[:axis], piece, *x.dims[axis + 1 :]), x.zero, x.null))
    return ins, outs


@rule("concatenate")
def concatenate(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Atoms side by side; the operands' other dimensions go together."""
    axis = eqn.params["dimension"]
    dims = [FREE if d == axis else walk.join(*(i.dims[d] for i in ins)) for d in range(len(ins[0].shape))]
    parts = [i.dims[axis] for i in ins]
    if arrays(parts):
        parts = [materialize(walk, i.dims[axis], i.shape[axis]) for i in ins]
        walk.mark(*parts)
        dims[axis] = np.concatenate(arrays(parts))
    else:
        kind = weakest(parts)
        dims[axis] = FREE if kind is UNIFORM else kind
    uses = [i.with_dims([*dims[:axis], part, *dims[axis + 1 :]]) for i, part in zip(ins, parts, strict=True)]
    zero = tuple(all(i.zero_at(d) for i in ins) for d in range(len(dims)))
    return uses, [Label(out_shape(eqn), tuple(dims), zero, all(i.null for i in ins))]


def materialize(walk: Walk, dim: Dim, n: int) -> NDArray[np.int64]:
    """Atoms for a dimension that may have none."""
    if isinstance(dim, np.ndarray):
        return dim
    return np.zeros(n, np.int64) if dim is FROZEN else walk.atoms.fresh(n)


@rule("pad")
def pad(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Padding adds indices that go with whatever they meet."""
    x, value = ins
    dims: list[Dim] = []
    for d, (low, high, interior) in zip(x.dims, eqn.params["padding_config"], strict=True):
        if not isinstance(d, np.ndarray) or (low, high, interior) == (0, 0, 0):
            dims.append(d if (low, high, interior) == (0, 0, 0) or d is FROZEN else FREE)
        elif interior or low < 0 or high < 0:
            walk.freeze(d)
            dims.append(FROZEN)
        else:
            walk.mark(d)
            dims.append(np.concatenate([walk.atoms.fresh(low), d, walk.atoms.fresh(high)]))
    padded = [any(c) for c in eqn.params["padding_config"]]
    plain = not any(padded)
    zero = tuple(z and (value.null or plain) for z in x.zero)
    return ins, [Label(out_shape(eqn), tuple(dims), zero, x.null and value.null)]


@rule("iota")
def iota(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Counted at full size and sliced where it meets channels."""
    return ins, [fixed(eqn.params["shape"], FREE)]


@rule("reshape")
def reshape(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A merged dimension repeats its channels' atoms; a split one unites what shares its unit's index."""
    x, shape = ins[0], tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return unknown(walk, eqn, ins)
    walk.freeze(*(d for d, n in zip(x.dims, x.shape, strict=True) if n == 1))
    dims: list[Dim] = [UNIFORM] * len(shape)
    zero = [False] * len(shape)
    for old, new in _blocks(x.shape, shape):
        channels = [d for d in old if isinstance(x.dims[d], np.ndarray)]
        if not channels:
            kind = weakest([x.dims[d] for d in old])
            for e in new:
                dims[e] = kind
            continue
        walk.freeze(*(x.dims[d] for d in channels[1:]))
        flat = _flatten(x, old, channels[0])
        unit = _unit_axis(walk, eqn, flat, new) if len(new) > 1 else 0
        rows = np.moveaxis(flat.reshape([shape[e] for e in new]), unit, 0).reshape(shape[new[unit]], -1)
        walk.atoms.union(rows, rows[:, :1])
        for k, e in enumerate(new):
            dims[e] = FROZEN if len(new) > 1 and k != unit else rows[:, 0] if len(new) > 1 else flat
            zero[e] = x.zero[channels[0]]
    return ins, [Label(shape, tuple(dims), tuple(zero), x.null, None, x.sums)]


def _flatten(x: Label, old: Sequence[int], channel: int) -> NDArray[np.int64]:
    """The atoms of merged dimensions of which one has channels."""
    at = old.index(channel)
    sizes = [x.shape[d] for d in old]
    column = np.expand_dims(arrays([x.dims[channel]])[0], tuple(k for k in range(len(old)) if k != at))
    return np.broadcast_to(column, sizes).reshape(-1)


def _unit_axis(walk: Walk, eqn: core.JaxprEqn, flat: NDArray[np.int64], new: Sequence[int]) -> int:
    """Which dimension of a split one holds the units: the one that already does, or the first not taken apart."""
    shape = eqn.params["new_sizes"]
    grid = walk.atoms.find(flat).reshape([shape[e] for e in new])
    for k in range(len(new)):
        rows = np.moveaxis(grid, k, 0).reshape(grid.shape[k], -1)
        if (rows == rows[:, :1]).all():
            return k
    apart = _taken_apart(walk.jaxprs[-1], eqn.outvars[0], list(range(len(shape))))
    return next((k for k, e in enumerate(new) if e not in apart), 0)


def _taken_apart(jaxpr: core.Jaxpr, var: core.Var, axes: list[int]) -> set[int]:
    """The dimensions of ``var`` that the program slices to one index, as the 3 of a fused query/key/value."""
    found: set[int] = set()
    for user in jaxpr.eqns:
        if not any(v is var for v in user.invars):
            continue
        if user.primitive.name in _MOVES:
            order = user.params.get("permutation", range(len(axes)))
            found |= _taken_apart(jaxpr, user.outvars[0], [axes[d] for d in order])
        elif user.primitive.name in _TAKES_APART:
            sizes = user.params.get("slice_sizes", out_shape(user))
            if len(sizes) == len(axes):
                found |= {a for a, n, full in zip(axes, sizes, aval_of(var).shape, strict=True) if n == 1 < full}
    return found


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions with equal products; dimensions of one belong to none."""
    olds = [d for d, n in enumerate(old) if n != 1]
    news = [e for e, n in enumerate(new) if n != 1]
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        m, n = old[left[0]], new[right[0]]
        while m != n:
            if m < n:
                left.append(olds.pop(0))
                m *= old[left[-1]]
            else:
                right.append(news.pop(0))
                n *= new[right[-1]]
        yield left, right
