"""Rules of layout: transposes, reshapes, broadcasts, slices, concatenations, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.structure.atoms import FREE, FROZEN, UNIFORM, Dim, Label, arrays, fixed, weakest
from jaxcomp.structure.labelling import ONE, Result, Walk, out_shape, rule, unknown


@rule("transpose")
def transpose(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Dimensions move with their atoms."""
    return ins, [ins[0].select(eqn.params["permutation"])]


@rule("squeeze")
def squeeze(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A dropped dimension's only index stays."""
    (x,) = ins
    dropped = [d % len(x.shape) for d in eqn.params["dimensions"]]
    walk.freeze(*(x.dims[d] for d in dropped), why=ONE)
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
            walk.freeze(x.dims[d], why=ONE)
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


@rule("stack")
def stack(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The operands' dimensions go together; the new one has an index for each operand."""
    axis = eqn.params["axis"]
    dims = [walk.join(*(i.dims[d] for i in ins)) for d in range(len(ins[0].shape))]
    zero = [all(i.zero_at(d) for i in ins) for d in range(len(dims))]
    made = [FREE if d is UNIFORM else d for d in dims]
    new = FROZEN if arrays(dims) or FROZEN in dims else FREE
    out = Label(
        out_shape(eqn), (*made[:axis], new, *made[axis:]), (*zero[:axis], False, *zero[axis:]), all(i.null for i in ins)
    )
    return [i.with_dims(dims) for i in ins], [out]


@rule("unstack")
def unstack(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The dimension taken apart stays; each piece has the others."""
    (x,), axis = ins, eqn.params["axis"]
    walk.freeze(x.dims[axis], why="each of its indices is taken apart from the others")
    return ins, [x.select([d for d in range(len(x.shape)) if d != axis])] * len(eqn.outvars)


@rule("tile")
def tile(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A repeated dimension has its atoms several times; one index repeated is uniform."""
    (x,), reps = ins, eqn.params["reps"]
    dims: list[Dim] = []
    for d, n, times in zip(x.dims, x.shape, reps, strict=True):
        if n == 1 and times > 1:
            walk.freeze(d, why=ONE)
            dims.append(UNIFORM)
            continue
        if isinstance(d, np.ndarray) and times > 1:
            walk.mark(d)
        dims.append(np.tile(d, times) if isinstance(d, np.ndarray) else d)
    return ins, [Label(out_shape(eqn), tuple(dims), x.zero, x.null)]


def materialize(walk: Walk, dim: Dim, n: int) -> NDArray[np.int64]:
    """Atoms for a dimension that may have none."""
    if isinstance(dim, np.ndarray):
        return dim
    new = walk.atoms.fresh(n)
    if dim is FROZEN:
        walk.freeze(new, why="it lies beside a dimension that stays")
    return new


@rule("pad")
def pad(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Padding adds indices that go with whatever they meet."""
    x, value = ins
    dims: list[Dim] = []
    for d, (low, high, interior) in zip(x.dims, eqn.params["padding_config"], strict=True):
        if not isinstance(d, np.ndarray) or (low, high, interior) == (0, 0, 0):
            dims.append(d if (low, high, interior) == (0, 0, 0) or d is FROZEN else FREE)
        elif interior or low < 0 or high < 0:
            walk.freeze(d, why="padding takes indices away, or puts some between others")
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
    """A merged dimension has its channels' atoms; of those merged, as of those split, one holds the units."""
    x, shape = ins[0], tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return unknown(walk, eqn, ins)
    walk.freeze(*(d for d, n in zip(x.dims, x.shape, strict=True) if n == 1), why=ONE)
    dims: list[Dim] = [UNIFORM] * len(shape)
    zero = [False] * len(shape)
    for old, new in _blocks(x.shape, shape):
        channels = _channels(walk, x, old)
        if channels:
            made = _split(walk, _merged(walk, x, old, channels), [shape[e] for e in new])
        else:
            made = [weakest([x.dims[d] for d in old])] * len(new)
        for e, dim in zip(new, made, strict=True):
            dims[e], zero[e] = dim, all(x.zero[d] for d in channels)
    return ins, [Label(shape, tuple(dims), tuple(zero), x.null, None, x.sums)]


def _channels(walk: Walk, x: Label, old: Sequence[int]) -> list[int]:
    """Those of the dimensions of which something may go; else the first that has atoms, whose reason to stay counts."""
    with_atoms = [d for d in old if isinstance(x.dims[d], np.ndarray)]
    return [d for d in with_atoms if walk.atoms.find(arrays([x.dims[d]])[0]).any()] or with_atoms[:1]


def _merged(walk: Walk, x: Label, old: Sequence[int], channels: Sequence[int]) -> NDArray[np.int64]:
    """The atoms of merged dimensions: one's, repeated, or new ones that go with one's."""
    sizes = [x.shape[d] for d in old]
    if len(channels) > 1:
        flat = walk.atoms.fresh(math.prod(sizes))
        walk.regrid(flat, sizes, [x.dims[d] if d in channels else FROZEN for d in old])
        return flat
    column = np.expand_dims(arrays([x.dims[channels[0]]])[0], tuple(k for k, d in enumerate(old) if d not in channels))
    return np.broadcast_to(column, sizes).reshape(-1)


def _split(walk: Walk, flat: NDArray[np.int64], sizes: Sequence[int]) -> list[Dim]:
    """The atoms of the dimensions that one is split into."""
    if len(sizes) == 1:
        return [flat]
    axes: list[Dim] = [walk.atoms.fresh(n) for n in sizes]
    walk.regrid(flat, sizes, axes)
    return axes


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
