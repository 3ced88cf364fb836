"""Rules of arithmetic: elementwise functions, dots, convolutions, reductions and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax.extend import core

from jaxcomp.structure.atoms import FREE, FROZEN, UNIFORM, Dim, Label, arrays, fixed
from jaxcomp.structure.labelling import ONE, Result, Walk, out_shape, rule, unknown
from jaxcomp.trace.primitives import COPIES, ELEMENTWISE, PASSES, ZERO_ALL, ZERO_ANY, ZERO_FIRST
from jaxcomp.trace.products import DotNumbers, dot_numbers
from jaxcomp.trace.walk import aval_of

NOT_ZERO = "it is summed over, and neither factor is zero there when its parameters are"
RUNS_OVER = "this runs over all of it, and one index fewer changes what the others give"
IN_GROUP = "it lies within one group of a grouped convolution"


def _zero(eqn: core.JaxprEqn, zeros: Sequence[bool], ins: Sequence[Label]) -> bool:
    """Whether an elementwise result is zero, given which operands are."""
    name = eqn.primitive.name
    known = [None if i.value is None or i.value.ndim or i.value.dtype.kind == "c" else float(i.value) for i in ins]
    if name in ("max", "min") and zeros[0] != zeros[1]:
        other = known[1] if zeros[0] else known[0]
        return other is not None and (other <= 0 if name == "max" else other >= 0)
    if name == "clamp":
        low, high = known[0], known[2]
        return zeros[1] and low is not None and high is not None and low <= 0 <= high
    if name == "select_n":
        return all(zeros[1:])
    if name == "integer_pow":
        return zeros[0] and eqn.params["y"] > 0
    if name == "pow":
        return zeros[0] and known[1] is not None and known[1] > 0
    if name in ZERO_ALL:
        return all(zeros)
    return any(zeros) if name in ZERO_ANY else (name in ZERO_FIRST or name in COPIES) and zeros[0]


@rule(*COPIES, *ELEMENTWISE)
def elementwise(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Atoms of equal positions are one; a dimension of one broadcasts, and scalars go with anything."""
    shape = out_shape(eqn)
    if any(i.shape and len(i.shape) != len(shape) for i in ins):
        return unknown(walk, eqn, ins)
    if any(m not in (1, n) for i in ins if i.shape for m, n in zip(i.shape, shape, strict=True)):
        return unknown(walk, eqn, ins)
    dims: list[Dim] = []
    for d, n in enumerate(shape):
        walk.freeze(*(i.dims[d] for i in ins if i.shape and i.shape[d] != n), why=ONE)
        dims.append(walk.join(*(i.dims[d] for i in ins if i.shape and i.shape[d] == n)))
    uses = [
        i.with_dims([dims[d] if m == shape[d] else i.dims[d] for d, m in enumerate(i.shape)] if i.shape else ())
        for i in ins
    ]
    zero = tuple(
        _zero(eqn, [i.zero_at(d) if i.shape and i.shape[d] == n else i.null for i in ins], ins)
        for d, n in enumerate(shape)
    )
    null = _zero(eqn, [i.null for i in ins], ins)
    sums = ins[0].sums if eqn.primitive.name in COPIES else None
    _find_mean(walk, eqn, ins)
    return uses, [Label(tuple(shape), tuple(dims), zero, null, None, sums)]


def _find_mean(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> None:
    """Freezes channels over which a mean is taken: a sum over n of them, divided by n."""
    if walk.through_means or eqn.primitive.name not in ("div", "mul"):
        return
    for total, by in ((ins[0], ins[-1]), (ins[-1], ins[0])):
        if total.sums is None or by.value is None or by.value.ndim:
            continue
        count, summed = total.sums
        if eqn.primitive.name == "div" and by is ins[-1]:
            is_mean = bool(np.isclose(float(by.value), count)) or bool(np.isclose(float(by.value), count - 1))
        else:
            is_mean = eqn.primitive.name == "mul" and bool(np.isclose(float(by.value) * count, 1.0, rtol=1e-3))
        if is_mean:
            walk.freeze(*summed, why="a mean runs over it; through_means=True lets it go")


@rule(*PASSES)
def same(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Each result is its operand."""
    return ins, ins


@rule("dot_general")
def dot_general(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Contracted and batch dimensions pair up; a contraction is exact where either side is zero when masked."""
    return dotted(walk, eqn, ins, dot_numbers(eqn))


def dotted(
    walk: Walk, eqn: core.JaxprEqn, ins: Sequence[Label], numbers: DotNumbers, groups: Sequence[int] = ()
) -> tuple[list[Label], list[Label]]:
    """Of a dot, and of one whose right operand has a matrix for each of some ``groups``."""
    (lc, rc), (lb, rb) = numbers
    left, right = ins
    ldims, rdims = list(left.dims), list(right.dims)
    for i, j in zip((*lb, *lc), (*rb, *rc), strict=True):
        ldims[i] = rdims[j] = walk.join(left.dims[i], right.dims[j])
    for i, j in zip(lc, rc, strict=True):
        if not (left.zero_at(i) or right.zero_at(j)):
            walk.freeze(ldims[i], why=NOT_ZERO)
    lfree = [i for i in range(len(ldims)) if i not in (*lb, *lc)]
    rfree = [j for j in range(len(rdims)) if j not in (*rb, *rc, *groups)]
    walk.count((*left.shape, *(right.shape[j] for j in rfree)), (*ldims, *(rdims[j] for j in rfree)))
    dims = [*(ldims[i] for i in (*lb, *lfree)), *(rdims[j] for j in rfree)]
    zero = [
        *(left.zero_at(i) or right.zero_at(j) for i, j in zip(lb, rb, strict=True)),
        *(left.zero_at(i) for i in lfree),
        *(right.zero_at(j) for j in rfree),
    ]
    out = Label(out_shape(eqn), tuple(map(varied, dims)), tuple(zero), left.null or right.null)
    return [left.with_dims(ldims), right.with_dims(rdims)], [out]


def varied(dim: Dim) -> Dim:
    """A dimension after values at its indices became different ones."""
    return FREE if dim is UNIFORM else dim


@rule("conv_general_dilated")
def conv(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Input features pair with the kernel's; of a grouped conv whole groups are the units."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, feature, *space), (kout, kin, *kspace) = numbers.lhs_spec, numbers.rhs_spec
    x, kernel = ins
    if eqn.params["batch_group_count"] != 1:
        return unknown(walk, eqn, ins)
    xdims, kdims = list(x.dims), list(kernel.dims)
    walk.freeze(*(x.dims[d] for d in space), *(kernel.dims[d] for d in kspace), why="a convolution slides over it")
    for d in kspace:
        kdims[d] = FROZEN
    if groups == 1:
        xdims[feature] = kdims[kin] = walk.join(x.dims[feature], kernel.dims[kin])
        if not (x.zero_at(feature) or kernel.zero_at(kin)):
            walk.freeze(xdims[feature], why=NOT_ZERO)
    else:
        _tie_groups(walk, (xdims, feature, x.shape[feature]), (kdims, kout, kernel.shape[kout]), groups)
        walk.freeze(kdims[kin], why=IN_GROUP)
        kdims[kin] = FROZEN
    out_numbers = numbers.out_spec
    shape = out_shape(eqn)
    dims: list[Dim] = [FROZEN] * len(shape)
    dims[out_numbers[0]], dims[out_numbers[1]] = varied(xdims[batch]), varied(kdims[kout])
    zero = [False] * len(shape)
    zero[out_numbers[0]] = x.zero_at(batch)
    zero[out_numbers[1]] = kernel.zero_at(kout)
    walk.count((*shape, *(kernel.shape[d] for d in (kin, *kspace))), (*dims, *(kdims[d] for d in (kin, *kspace))))
    out = Label(shape, tuple(dims), tuple(zero), x.null or kernel.null)
    return [x.with_dims(xdims), kernel.with_dims(kdims)], [out]


def _tie_groups(walk: Walk, x: tuple[list[Dim], int, int], kernel: tuple[list[Dim], int, int], groups: int) -> None:
    """Unites each group's input features with its kernel's output features."""
    sides = (x, kernel)
    if all(not isinstance(dims[d], np.ndarray) for dims, d, _ in sides):
        return
    if any(dims[d] is FROZEN for dims, d, _ in sides):
        walk.freeze(*(dims[d] for dims, d, _ in sides), why="it is in groups with features that stay")
        for dims, d, _ in sides:
            dims[d] = FROZEN
        return
    for dims, d, n in sides:
        if not isinstance(dims[d], np.ndarray):
            dims[d] = walk.atoms.fresh(n)
            walk.mark(dims[d])
        rows = dims[d].reshape(groups, -1)  # type: ignore[union-attr]
        walk.atoms.union(rows, rows[:, :1])
    walk.atoms.union(*(dims[d].reshape(groups, -1)[:, 0] for dims, d, _ in sides))  # type: ignore[union-attr]


@rule("reduce_sum")
def reduce_sum(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A sum leaves out what is zero when masked; other channels it runs over stay."""
    (x,), axes = ins, eqn.params["axes"]
    for d in axes:
        if not x.zero_at(d):
            walk.freeze(x.dims[d], why=NOT_ZERO)
    count = int(np.prod([x.shape[d] for d in axes]))
    out = _without(x, axes)
    summed = tuple(arrays([x.dims[d] for d in axes]))
    return ins, [replace(out, sums=(count, summed) if summed else None)]


@rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
def reduce_other(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What a maximum or a product runs over stays."""
    (x,), axes = ins, eqn.params["axes"]
    walk.freeze(*(x.dims[d] for d in axes), why=RUNS_OVER)
    out = _without(x, axes)
    if eqn.primitive.name in ("argmax", "argmin"):
        out = replace(out, zero=(False,) * len(out.shape), null=False)
    return ins, [out]


def _without(x: Label, axes: Sequence[int]) -> Label:
    return replace(x.select([d for d in range(len(x.shape)) if d not in axes]), sums=None)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What a running sum runs over stays."""
    (x,), d = ins, eqn.params["axis"]
    walk.freeze(x.dims[d], why=RUNS_OVER)
    dims = (*x.dims[:d], varied(x.dims[d]), *x.dims[d + 1 :])
    zero = x.zero if eqn.primitive.name != "cumlogsumexp" else (False,) * len(dims)
    return ins, [Label(x.shape, dims, zero)]


@rule("sort")
def sort(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What is sorted stays; the operands' other dimensions go together."""
    d = eqn.params["dimension"]
    dims = [walk.join(*(i.dims[e] for i in ins)) for e in range(len(ins[0].shape))]
    walk.freeze(dims[d], why=RUNS_OVER)
    dims = [varied(e) for e in dims]
    return [i.with_dims(dims) for i in ins], [Label(i.shape, tuple(dims), (False,) * len(dims)) for i in ins]


@rule("top_k")
def top_k(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What the largest are taken of stays."""
    (x,) = ins
    axis = eqn.params.get("axis", -1) % len(x.shape)
    walk.freeze(x.dims[axis], why=RUNS_OVER)
    k = eqn.params["k"]
    dims = [walk.still(k, [e], why=RUNS_OVER) if d == axis else e for d, e in enumerate(x.dims)]
    return ins, [Label(aval_of(v).shape, tuple(dims), (False,) * len(dims)) for v in eqn.outvars]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")
def window(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A pool passes the dimensions whose window is one; what its windows run over stays."""
    x, p = ins[0], eqn.params
    if len(eqn.outvars) != 1:
        return unknown(walk, eqn, ins)
    trivial = [
        size == stride == 1 and tuple(pad) == (0, 0)
        for size, stride, pad in zip(p["window_dimensions"], p["window_strides"], p["padding"], strict=True)
    ]
    walk.freeze(*(d for d, ok in zip(x.dims, trivial, strict=True) if not ok), why=RUNS_OVER)
    dims = [
        d if ok else walk.still(n, [d], why=RUNS_OVER) for d, ok, n in zip(x.dims, trivial, out_shape(eqn), strict=True)
    ]
    zero = (False,) * len(dims) if eqn.primitive.name == "reduce_window" else x.zero
    return ins, [Label(out_shape(eqn), tuple(dims), zero)]


@rule("random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_clone",
      "threefry2x32", "rng_bit_generator", "rng_uniform")  # fmt: skip
def random(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """Random numbers are drawn at full size and sliced where they are used, so masks stay those of the full network."""
    for i in ins:
        walk.freeze(*i.dims, why="random numbers are drawn from it")
    return ins, [fixed(aval_of(v).shape, FREE) for v in eqn.outvars]
