"""What dots, convolutions and lookups do with each axis of their operands, and how much they multiply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from jaxcomp.core.roles import BATCH, CONTRACTED, INDEXED, MIXED, OUTPUT, SINGLE, SPATIAL, STACKED
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import shape_of


class Product(NamedTuple):
    """An equation that multiplies or looks up.

    Attributes:
      kind: "dot", "conv" or "embed".
      roles: for each operand, the role of each of its axes: "contracted" (summed over), "output" (free, it reappears
        in the result), "batch" (shared by both operands), "spatial" (of a convolution), "indexed" (of a lookup).
      macs: multiply-accumulates of one run.
      groups: feature groups of a convolution, else 1.
    """

    kind: str
    roles: tuple[tuple[str, ...], ...]
    macs: int
    groups: int = 1


def product_of(eqn: core.JaxprEqn) -> Product | None:
    """What the equation does if it is a dot, a convolution or a row lookup; None for any other."""
    reader = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _lookup}.get(eqn.primitive.name)
    return reader(eqn) if reader else None


def _dot(eqn: core.JaxprEqn) -> Product:
    lhs, rhs = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    contract, batch = eqn.params["dimension_numbers"]
    roles = tuple(
        tuple(CONTRACTED if i in contract[side] else BATCH if i in batch[side] else OUTPUT for i in range(len(shape)))
        for side, shape in enumerate((lhs, rhs))
    )
    rows = math.prod(size for size, role in zip(rhs, roles[1], strict=True) if role == OUTPUT)
    return Product("dot", roles, math.prod(lhs) * rows)


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
    """A gather that takes whole rows of a table of two or more axes."""
    table = shape_of(eqn.invars[0])
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    if len(table) < 2 or len(numbers.start_index_map) != 1:
        return None
    (row,) = numbers.start_index_map
    whole = all(size == full for i, (size, full) in enumerate(zip(sizes, table, strict=True)) if i != row)
    if sizes[row] != 1 or not whole:
        return None
    return Product("embed", (tuple(INDEXED if i == row else OUTPUT for i in range(len(table))),), 0)


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
