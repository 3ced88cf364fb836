"""What dots, ragged dots, convolutions and lookups do with each axis of their operands, and how much they multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.roles import BATCH, CONTRACTED, INDEXED, MIXED, OUTPUT, SINGLE, SPATIAL, STACKED
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import shape_of

DotNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""The axes that a dot sums over and those that its operands share, of the left and of the right."""


class Product(NamedTuple):
    """An equation that multiplies or looks up.

    Attributes:
      kind: "dot", "ragged" (rows, each by the matrix of its group: a mixture of experts), "conv" or "embed".
      roles: for each operand, the role of each of its axes: "contracted" (summed over), "output" (free, it reappears
        in the result), "batch" (shared by both operands, or the groups of a ragged dot), "spatial" (of a convolution),
        "indexed" (of a lookup).
      macs: multiply-accumulates of one run.
      groups: feature groups of a convolution, else 1.
    """

    kind: str
    roles: tuple[tuple[str, ...], ...]
    macs: int
    groups: int = 1


def product_of(eqn: core.JaxprEqn) -> Product | None:
    """What the equation does if it is a dot, a convolution or a row lookup; None for any other."""
    reader = _READERS.get(eqn.primitive.name)
    return reader(eqn) if reader else None


def dot_numbers(eqn: core.JaxprEqn) -> DotNumbers:
    """The axes that a dot, or a ragged one, sums over and shares."""
    p = eqn.params
    ragged = p.get("ragged_dot_dimension_numbers")
    numbers: DotNumbers = p["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
    return numbers


def dot_axes(eqn: core.JaxprEqn, side: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of an operand of a dot: those that both share, those that it keeps, those that are summed over."""
    return axes_by_use(dot_numbers(eqn), side, len(shape_of(eqn.invars[side])))


def axes_by_use(numbers: DotNumbers, side: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """:func:`dot_axes` of a dot of these numbers, whose operand has so many axes."""
    summed, shared = (axes[side] for axes in numbers)
    kept = tuple(i for i in range(rank) if i not in summed and i not in shared)
    return tuple(shared), kept, tuple(summed)


class ByRows(NamedTuple):
    """A ragged dot of a matrix's rows, each by one group's matrix: the axes that it sums over, and that of the groups.

    Its result is (rows, features), and 0 in rows beyond the last group.
    """

    left: int
    right: int
    group: int


def by_rows(eqn: core.JaxprEqn) -> ByRows | None:
    """How a ragged dot goes by rows; None if it does not: if it sums over the groups, or is batched."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lhs, rhs), batch = numbers.dot_dimension_numbers
    ranks = [len(shape_of(v)) for v in eqn.invars[:2]]
    if ranks != [2, 3] or len(lhs) != 1 or any(map(len, batch)) or len(numbers.rhs_group_dimensions) != 1:
        return None
    return ByRows(lhs[0], rhs[0], numbers.rhs_group_dimensions[0])


def groups_of(sizes: jax.Array, rows: int) -> jax.Array:
    """The group of each row, given the groups' sizes; beyond the last group, their number.

    >>> groups_of(jax.numpy.array([2, 0, 1]), 4).tolist()
    [0, 0, 2, 3]
    """
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


def _dot(eqn: core.JaxprEqn) -> Product:
    return _dotted(eqn, "dot", ())


def _ragged(eqn: core.JaxprEqn) -> Product:
    """Each row meets one group's matrix, so the groups multiply no more than one matrix does."""
    return _dotted(eqn, "ragged", eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions)


def _dotted(eqn: core.JaxprEqn, kind: str, groups: Sequence[int]) -> Product:
    contract, batch = dot_numbers(eqn)
    shapes = [shape_of(v) for v in eqn.invars[:2]]
    shared = (batch[0], (*batch[1], *groups))
    roles = tuple(
        tuple(CONTRACTED if i in contract[side] else BATCH if i in shared[side] else OUTPUT for i in range(len(shape)))
        for side, shape in enumerate(shapes)
    )
    kept = math.prod(size for size, role in zip(shapes[1], roles[1], strict=True) if role == OUTPUT)
    return Product(kind, roles, math.prod(shapes[0]) * kept)


def _conv(eqn: core.JaxprEqn) -> Product:
    """MACs count taps on padding, as is customary; of a dilated (transposed) input only taps on its elements."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    image, kernel, out = shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), shape_of(eqn.outvars[0])
    lhs_roles = _placed(len(out), numbers.lhs_spec, (OUTPUT, CONTRACTED))
    rhs_roles = _placed(len(out), numbers.rhs_spec, (OUTPUT, CONTRACTED))
    taps = 1
    for i, (n, k, o) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        hole = p["lhs_dilation"][i]
        if hole == 1:
            taps *= out[o] * kernel[k]
            continue
        starts = range(
            -p["padding"][i][0], out[o] * p["window_strides"][i] - p["padding"][i][0], p["window_strides"][i]
        )
        at = (start + t * p["rhs_dilation"][i] for start in starts for t in range(kernel[k]))
        taps *= sum(position % hole == 0 and 0 <= position < image[n] * hole for position in at)
    features = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    macs = features * kernel[numbers.rhs_spec[1]] * taps
    return Product("conv", (lhs_roles, rhs_roles), macs, p["feature_group_count"])


def _placed(rank: int, spec: Sequence[int], first_two: tuple[str, str]) -> tuple[str, ...]:
    roles = [SPATIAL] * rank
    for axis, role in zip(spec[:2], first_two, strict=True):
        roles[axis] = role
    return tuple(roles)


def _lookup(eqn: core.JaxprEqn) -> Product | None:
    """A gather that takes whole rows of a table; rows may be numbered by several axes, as relative positions are."""
    table, numbers = shape_of(eqn.invars[0]), eqn.params["dimension_numbers"]
    sizes, tables = eqn.params["slice_sizes"], numbers.operand_batching_dims
    rows = [i for i in numbers.start_index_map if sizes[i] == 1]
    roles = tuple(INDEXED if i in rows else BATCH if i in tables else OUTPUT for i in range(len(table)))
    wanted = tuple(n if role == OUTPUT else 1 for n, role in zip(table, roles, strict=True))
    return Product("embed", (roles,), 0) if len(table) > 1 and rows and tuple(sizes) == wanted else None


def is_row(eqn: core.JaxprEqn) -> bool:
    """Whether a gather takes one index of some axes and all of the others, so that it is a slice."""
    numbers = eqn.params["dimension_numbers"]
    alone = shape_of(eqn.invars[1]) == (len(numbers.start_index_map),) and not numbers.operand_batching_dims
    return alone and _lookup(eqn) is not None


_READERS: dict[str, Callable[[core.JaxprEqn], Product | None]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "gather": _lookup,
}


def leaf_roles(origin: Origin, roles: Sequence[str]) -> tuple[str, ...]:
    """The role of each of a leaf's own axes, given the roles of the axes of a view of it.

    "stacked" where the view is one slice along the axis, "mixed" where a split axis has several roles, "single" for
    an axis of one element that is not in the view.
    """
    found: list[set[str]] = [set() for _ in origin.shape]
    for axes, role in zip(origin.axes, roles, strict=True):
        for a in axes:
            found[a].add(role)
    return tuple(
        STACKED if a in origin.stacked and not names else MIXED if len(names) > 1 else next(iter(names), SINGLE)
        for a, names in enumerate(found)
    )
