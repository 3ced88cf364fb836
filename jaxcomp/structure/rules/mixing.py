"""Rules of what mixes whole dimensions: decompositions, transforms, general reductions, products in ragged groups."""

from __future__ import annotations

from jax.extend import core

from jaxcomp.structure.atoms import FREE, Label, fixed
from jaxcomp.structure.labelling import Result, Walk, out_shape, rule, unknown
from jaxcomp.structure.rules.math import dotted, varied
from jaxcomp.trace.products import dot_numbers
from jaxcomp.trace.walk import aval_of, shape_of

MIXED = "every index of the result is made from all of it"
RAGGED = "it is cut into groups whose lengths are computed"
MATRICES = """cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu ormqr qr schur svd
symmetric_product triangular_solve tridiagonal"""


@rule(*MATRICES.split())
def decomposition(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The last two dimensions of each operand are mixed; those before are batches."""
    return _batched(walk, eqn, ins, len(ins[0].shape) - 2)


@rule("tridiagonal_solve", "lu_pivots_to_permutation")
def of_vectors(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """As a decomposition, where the first operand holds a vector for each matrix."""
    return _batched(walk, eqn, ins, len(ins[0].shape) - 1)


@rule("fft")
def fft(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The dimensions that are transformed are mixed."""
    return _batched(walk, eqn, ins, len(ins[0].shape) - len(eqn.params["fft_lengths"]))


def _batched(walk: Walk, eqn: core.JaxprEqn, ins: list[Label], batch: int) -> Result:
    dims = [walk.join(*(i.dims[d] for i in ins)) for d in range(batch)]
    rest = [d for i in ins for d in i.dims[batch:]]
    walk.freeze(*rest, why=MIXED)
    outs = []
    for v in eqn.outvars:
        shape = shape_of(v)
        mixed = [walk.still(n, rest, why=MIXED) for n in shape[batch:]]
        outs.append(Label(shape, (*map(varied, dims), *mixed), (False,) * len(shape)))
    return [i.with_dims([*dims, *i.dims[batch:]]) for i in ins], outs


@rule("reduce")
def reduce(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What any reduction runs over stays; the operands' other dimensions go together."""
    axes, n = eqn.params["dimensions"], len(eqn.outvars)
    dims = [walk.join(*(i.dims[d] for i in ins[:n])) for d in range(len(ins[0].shape))]
    walk.freeze(*(dims[d] for d in axes), why=MIXED)
    left = [d for d in range(len(dims)) if d not in axes]
    out = Label(out_shape(eqn), tuple(varied(dims[d]) for d in left), (False,) * len(left))
    return [*(i.with_dims(dims) for i in ins[:n]), *ins[n:]], [out] * n


@rule("approx_top_k")
def approx_top_k(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What the largest are taken of stays."""
    (x,), axis = ins, eqn.params["reduction_dimension"] % len(ins[0].shape)
    walk.freeze(x.dims[axis], why=MIXED)
    outs = []
    for v in eqn.outvars:
        shape = tuple(aval_of(v).shape)
        dims = [walk.still(shape[d], [e], why=MIXED) if d == axis else varied(e) for d, e in enumerate(x.dims)]
        outs.append(Label(shape, tuple(dims), (False,) * len(dims)))
    return ins, outs


@rule("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A dot of each group's rows with its own matrix: rows and groups stay, the others are a dot's."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, _), (lb, _) = numbers.dot_dimension_numbers
    (rows,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    left, right, *sizes = ins
    if rows in (*lb, *lc) or lb:
        return unknown(walk, eqn, ins)
    walk.freeze(left.dims[rows], *(right.dims[g] for g in groups), why=RAGGED)
    walk.freeze(*(d for s in sizes for d in s.dims), why=RAGGED)
    uses, outs = dotted(walk, eqn, (left, right), dot_numbers(eqn), groups)
    return [*uses, *sizes], outs


@rule("empty", "platform_index", "create_token", "after_all", "dce_sink", "debug_callback", "debug_print")
def from_nothing(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """What is made of no array has no channels; what gives nothing back, as a print, sees what is left of its own."""
    return ins, [fixed(shape_of(v), FREE) for v in eqn.outvars]
