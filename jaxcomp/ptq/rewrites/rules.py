"""What each primitive does to the factors of its operands: a rule a primitive; what has none keeps them at one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcomp.ptq.rewrites.labels import Block, Factors, Label, common, fronted, tied
from jaxcomp.trace.primitives import COPIES, PASSES, SUMS
from jaxcomp.trace.walk import aval_of, shape_of

Rule = Callable[[Factors, core.JaxprEqn, list[Label]], list[Label]]
RULES: dict[str, Rule] = {}
"""The rule of each known primitive."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of the primitives called ``names``."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def plain(v: core.Var | core.Literal) -> Label:
    """The label of what may not be multiplied."""
    return Label(shape_of(v))


def unknown(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """What goes in may not be multiplied, so that what comes out stays."""
    factors.freeze(*(block for label in ins for block in label.blocks))
    return [plain(v) for v in eqn.outvars]


@rule(*COPIES, *PASSES, "neg", "abs", "real")
def same(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """A positive factor of the operand is one of the result; not of one that is rounded to integers."""
    whole = not all(jnp.issubdtype(aval_of(v).dtype, jnp.inexact) for v in eqn.outvars)
    return unknown(factors, eqn, ins) if whole else ins


@rule(*SUMS, "sub", "max", "min", "rem", "complex", "atan2")
def alike(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Both operands, and the result, have the same factors; an operand that is zero has any."""
    out = tied(factors, ins)
    return [plain(eqn.outvars[0])] if eqn.primitive.name == "atan2" else [out]


@rule("eq", "ne", "ge", "gt", "le", "lt")
def compared(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Which of two is greater does not change where both are multiplied alike, or one is zero."""
    tied(factors, ins)
    return [plain(eqn.outvars[0])]


@rule("sign", "is_finite")
def signs(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """No positive factor changes it."""
    return [plain(eqn.outvars[0])]


@rule("select_n")
def chosen(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """The cases are alike."""
    return [tied(factors, ins[1:])]


@rule("mul", "div")
def multiplied(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """The operands' factors multiply; where both have some along one dimension, those of the left stay one."""
    left, right = ins
    if eqn.primitive.name == "div":
        if right.null:
            return unknown(factors, eqn, ins)
        right = inverse(right)
    if left.null or right.null:
        return [Label(shape_of(eqn.outvars[0]), (), True)]
    if eqn.invars[0] is eqn.invars[1]:
        return unknown(factors, eqn, ins)
    return [product(factors, (left, right), shape_of(eqn.outvars[0]))]


def product(factors: Factors, ins: tuple[Label, Label], shape: tuple[int, ...]) -> Label:
    """The label of a product of two, index by index, of ``shape``."""
    left, right = (replace(label, shape=shape) for label in ins)
    kept = list(right.blocks)
    for block in left.blocks:
        if any(set(block.dims) & set(other.dims) for other in right.blocks):
            factors.freeze(block)
        else:
            kept.append(block)
    return Label(shape, tuple(kept))


def inverse(label: Label) -> Label:
    """The label of the reciprocal."""
    return replace(label, blocks=tuple(replace(block, ids=-block.ids) for block in label.blocks))


@rule("transpose")
def transposed(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Dimensions move."""
    at = {d: i for i, d in enumerate(eqn.params["permutation"])}
    return [ins[0].moved(shape_of(eqn.outvars[0]), at)]


@rule("squeeze")
def squeezed(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Dimensions of one index go."""
    rank = len(ins[0].shape)
    gone = {d % rank for d in eqn.params["dimensions"]}
    at = {d: i for i, d in enumerate(d for d in range(rank) if d not in gone)}
    return [ins[0].moved(shape_of(eqn.outvars[0]), at)]


@rule("broadcast_in_dim")
def broadcast(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Dimensions move; what is repeated has its factor everywhere."""
    return [ins[0].moved(eqn.params["shape"], dict(enumerate(eqn.params["broadcast_dimensions"])))]


@rule("reshape")
def reshaped(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Dimensions that are merged or split have one block together."""
    (x, *_), new = ins, tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in new:
        return unknown(factors, eqn, ins)
    blocks = []
    runs = [(set(old), old, targets) for old, targets in _runs(x.shape, new)]
    wanted = [Label(x.shape, tuple(Block(tuple(old), np.zeros((1,) * len(old), np.int64)) for _, old, _ in runs))]
    for block in common(factors, [x, *wanted])[0].blocks:
        within = [(old, targets) for own, old, targets in runs if own & set(block.dims)]
        olds, news = ([d for pair in within for d in pair[i]] for i in (0, 1))
        ids = block.on(olds) if olds else block.ids.reshape(block.ids.shape[: block.ids.ndim - len(block.dims)])
        front = ids.shape[: ids.ndim - len(olds)]
        full = np.broadcast_to(ids, (*front, *(x.shape[d] for d in olds)))
        if full.any():
            blocks.append(Block(tuple(news), full.reshape(*front, *(new[e] for e in news))))
    return [Label(new, tuple(blocks), x.null)]


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions with equal products; dimensions of one index belong to none."""
    olds = [d for d, n in enumerate(old) if n != 1]
    news = [e for e, n in enumerate(new) if n != 1]
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (m := math.prod(old[d] for d in left)) != (n := math.prod(new[e] for e in right)):
            (left if m < n else right).append((olds if m < n else news).pop(0))
        yield left, right


@rule("slice")
def sliced(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """A part of the factors."""
    p = eqn.params
    strides = p["strides"] or (1,) * len(ins[0].shape)
    cuts = [slice(*bounds) for bounds in zip(p["start_indices"], p["limit_indices"], strides, strict=True)]
    return [_cut(ins[0], cuts)]


def _cut(x: Label, cuts: Sequence[slice]) -> Label:
    shape = tuple(len(range(n)[c]) for n, c in zip(x.shape, cuts, strict=True))
    blocks = []
    for b in x.blocks:
        front = [slice(None)] * (b.ids.ndim - len(b.dims))
        blocks.append(replace(b, ids=b.ids[(*front, *(cuts[d] for d in b.dims))]))
    return Label(shape, tuple(blocks), x.null)


@rule("split")
def parted(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Each piece has its part of the factors."""
    (x,), axis = ins, eqn.params["axis"]
    ends = np.cumsum([0, *eqn.params["sizes"]])
    cuts = [slice(None)] * len(x.shape)
    return [_cut(x, [*cuts[:axis], slice(int(a), int(b)), *cuts[axis + 1 :]]) for a, b in pairwise(ends)]


@rule("rev")
def reversed_(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """The factors turn round."""
    turned = eqn.params["dimensions"]
    return [_cut(ins[0], [slice(None, None, -1 if d in turned else 1) for d in range(len(ins[0].shape))])]


@rule("concatenate")
def joined(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Factors side by side; along the other dimensions all operands have the same."""
    axis, shape = eqn.params["dimension"], shape_of(eqn.outvars[0])
    whole = [replace(x, blocks=tuple(b for b in x.blocks if axis not in b.dims), shape=shape) for x in ins]
    beside = [[b for b in x.blocks if axis in b.dims] for x in ins]
    out = tied(factors, [replace(x, null=x.null and not b) for x, b in zip(whole, beside, strict=True)])
    if not any(beside):
        return [out]
    dims = tuple(sorted({d for blocks in beside for block in blocks for d in block.dims}))
    parts = []
    for x, blocks in zip(ins, beside, strict=True):
        kept = max(blocks, key=lambda block: block.ids.size, default=None)
        factors.freeze(*(block for block in blocks if block is not kept))
        sizes = tuple(x.shape[d] for d in dims)
        ids = np.zeros((1,) * len(dims), np.int64) if kept is None else kept.on(dims)
        parts.append(np.broadcast_to(ids, (*ids.shape[: ids.ndim - len(dims)], *sizes)))
    front = np.broadcast_shapes(*(p.shape[: p.ndim - len(dims)] for p in parts))
    full = [
        np.broadcast_to(
            fronted(p, np.zeros(front + (1,) * len(dims), np.int64), len(dims))[0],
            (*front, *p.shape[p.ndim - len(dims) :]),
        )
        for p in parts
    ]
    return [replace(out, blocks=(*out.blocks, Block(dims, np.concatenate(full, axis=len(front) + dims.index(axis)))))]


@rule("pad")
def padded(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Zeros beside channels have any factor; between those of a padded dimension, and beside what is no zero, none."""
    x, value = ins
    wide = {d for d, config in enumerate(eqn.params["padding_config"]) if tuple(config) != (0, 0, 0)}
    lost = [b for b in x.blocks if wide & set(b.dims) or (wide and not value.null)]
    factors.freeze(*lost)
    return [Label(shape_of(eqn.outvars[0]), tuple(b for b in x.blocks if b not in lost), x.null and value.null)]


@rule("reduce_sum", "reduce_max", "reduce_min")
def reduced(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """What is reduced over may not differ."""
    axes = eqn.params["axes"]
    return [_left(factors, ins[0], set(axes), shape_of(eqn.outvars[0]))]


@rule("argmax", "argmin")
def located(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Where the largest is does not change, if all are multiplied alike."""
    _left(factors, ins[0], set(eqn.params["axes"]), shape_of(eqn.outvars[0]))
    return [plain(eqn.outvars[0])]


def _left(factors: Factors, x: Label, gone: set[int], shape: tuple[int, ...]) -> Label:
    """The label without some dimensions, along which factors stay one."""
    factors.freeze(*(block for block in x.blocks if gone & set(block.dims)))
    kept = tuple(block for block in x.blocks if not gone & set(block.dims))
    at = {d: i for i, d in enumerate(d for d in range(len(x.shape)) if d not in gone)}
    return replace(x, blocks=kept).moved(shape, at)


@rule("cumsum", "cummax", "cummin")
def accumulated(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """As a sum, at each step."""
    return [_still(factors, ins[0], {eqn.params["axis"]}, eqn)]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def pooled(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Along a window factors stay one, as long as its operand is padded by what is smaller than all, or zero."""
    p = eqn.params
    wide = {d for d, n in enumerate(p["window_dimensions"]) if n != 1 or p["window_strides"][d] != 1}
    return [_still(factors, ins[0], wide, eqn)]


def _still(factors: Factors, x: Label, along: set[int], eqn: core.JaxprEqn) -> Label:
    """The label, with factors of one along some dimensions."""
    factors.freeze(*(block for block in x.blocks if along & set(block.dims)))
    kept = tuple(block for block in x.blocks if not along & set(block.dims))
    return Label(shape_of(eqn.outvars[0]), kept, x.null)


@rule("gather")
def looked_up(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Rows of a table: along what is taken whole, the factors are the table's."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, *rest = ins
    factors.freeze(*(block for label in rest for block in label.blocks))
    apart = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept_dims = [d for d in range(len(table.shape)) if d not in apart]
    cut = {d for d in range(len(table.shape)) if sizes[d] != table.shape[d]} | apart
    factors.freeze(*(block for block in table.blocks if cut & set(block.dims)))
    kept = replace(table, blocks=tuple(block for block in table.blocks if not cut & set(block.dims)))
    return [kept.moved(shape_of(eqn.outvars[0]), dict(zip(kept_dims, numbers.offset_dims, strict=True)))]


@rule("dynamic_slice")
def taken(factors: Factors, eqn: core.JaxprEqn, ins: list[Label]) -> list[Label]:
    """Along what is taken whole the factors stay."""
    x, *starts = ins
    factors.freeze(*(block for label in starts for block in label.blocks))
    cut = {d for d, n in enumerate(eqn.params["slice_sizes"]) if n != x.shape[d]}
    return [_still(factors, x, cut, eqn)]
