"""Factors of a weight on their way through a program: what layout operations make of them without multiplying."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.avals import result_of
from jaxcomp.core.types import DType, Leaf
from jaxcomp.factorization.leaves import FactorLeaf, LowRank
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import is_row


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["order", "dtype"])
@dataclass(frozen=True)
class ThinFactors:
    """A leaf of factors, moved and cast: the value is the dense leaf in another order of axes.

    Attributes:
      leaf: its factors are arrays.
      order: for each axis after the stacked ones, which of the leaf's it is; None for the leaf's own order.
      dtype: the value's type, static.
    """

    leaf: FactorLeaf
    order: tuple[int, ...] | None
    dtype: DType

    @property
    def own(self) -> tuple[int, ...]:
        """The order, written out."""
        return tuple(range(self.leaf.ndim - self.leaf.stacked)) if self.order is None else self.order

    def leaf_axis(self, axis: int) -> int:
        """Which of the leaf's axes one of the value's is."""
        s = self.leaf.stacked
        return axis if axis < s else s + self.own[axis - s]

    def placed(self, axis: int) -> tuple[int | None, int | None]:
        """Where an own axis of a leaf that is a matrix lies in ``u``, and in ``v``; None where it is not."""
        assert isinstance(self.leaf, LowRank)
        rows = self.leaf.stacked + self.leaf.row_axes
        return (axis, None) if axis < rows else (None, axis - rows + self.leaf.stacked + 1)

    def dense(self) -> jax.Array:
        """The array that the factors stand for."""
        s = self.leaf.stacked
        full = self.leaf.materialize().astype(self.dtype)
        return full if self.order is None else jnp.transpose(full, [*range(s), *(s + i for i in self.order)])

    def cast(self, x: jax.Array) -> jax.Array:
        """A factor in the value's type."""
        return x.astype(self.dtype)


ThinValue = jax.Array | ThinFactors
"""What stands in a program where a leaf of factors came by."""


def factors_of(leaf: Leaf) -> ThinFactors | None:
    """A compressed leaf as factors, or None if it has none."""
    return ThinFactors(leaf.arrays(), None, leaf.dtype) if isinstance(leaf, FactorLeaf) else None


def moved(op: Op, value: ThinValue, *rest: jax.Array) -> Sequence[ThinValue]:
    """The results of a layout operation on a value that may be factors; what they cannot follow multiplies them out."""
    if not isinstance(value, ThinFactors):
        return op.bind(value, *rest)
    p = op.eqn.params
    found: Sequence[ThinFactors | None] = [None]
    match op.name:
        case "convert_element_type":
            found = [replace(value, dtype=p["new_dtype"]) if jnp.issubdtype(p["new_dtype"], jnp.floating) else None]
        case "copy" | "copy_p" | "name" | "stop_gradient":
            found = [replace(value, leaf=value.leaf.mapped(lambda x: op.bind(x)[0]))]
        case "transpose":
            found = [_transposed(value, p["permutation"])]
        case "squeeze":
            found = [_squeezed(value, p["dimensions"])]
        case "reshape":
            found = [_reshaped(value, result_of(op).shape)]
        case "slice" | "dynamic_slice" | "split" | "unstack" | "rev":
            found = _taken(op, value, rest)
    kept = [v for v in found if v is not None]
    return kept if len(kept) == len(op.eqn.outvars) else op.bind(value.dense(), *rest)


def _transposed(value: ThinFactors, permutation: Sequence[int]) -> ThinFactors | None:
    """Stacked axes stay in front, where a scan finds them."""
    s = value.leaf.stacked
    if list(permutation[:s]) != list(range(s)):
        return None
    return replace(value, order=tuple(value.own[i - s] for i in permutation[s:]))


def _reshaped(value: ThinFactors, shape: tuple[int, ...]) -> ThinFactors | None:
    """Rows stay rows and columns columns; stacked axes of one element may go."""
    leaf, s = value.leaf, value.leaf.stacked
    front, gone = leaf.shape[:s], 0
    if s and shape[:s] != front and all(n == 1 for n in front):
        gone = s
    own, kept = shape[s - gone :], front[gone:]
    if gone and own == tuple(leaf.shape[s + i] for i in value.own):
        squeezed = leaf.mapped(lambda x: x.reshape(x.shape[s:]))
        return replace(value, leaf=squeezed)
    if gone or shape[: len(kept)] != kept or not isinstance(leaf, LowRank) or value.order is not None:
        return None
    rows = math.prod(leaf.u.shape[s:-1])
    for k in range(1, len(own)):
        if math.prod(own[:k]) == rows:
            u = leaf.u.reshape(*front, *own[:k], leaf.u.shape[-1])
            v = leaf.v.reshape(*front, leaf.v.shape[s], *own[k:])
            return replace(value, leaf=LowRank(u, v, k))
    return None


def _squeezed(value: ThinFactors, axes: Sequence[int]) -> ThinFactors | None:
    """Axes of one element go from the factors that have them; a matrix keeps a row axis and a column axis at least."""
    for axis in sorted(axes, reverse=True):
        leaf, at = value.leaf, value.leaf_axis(axis)
        if at >= leaf.stacked and not isinstance(leaf, LowRank):
            return None
        if at < leaf.stacked:
            value = replace(value, leaf=leaf.mapped(partial(jnp.squeeze, axis=at)))
            continue
        assert isinstance(leaf, LowRank)
        u, v = value.placed(at)
        rows = leaf.row_axes - (u is not None)
        if rows == 0 or (v is not None and leaf.v.ndim == leaf.stacked + 2):
            return None
        smaller = LowRank(
            leaf.u if u is None else jnp.squeeze(leaf.u, u),
            leaf.v if v is None else jnp.squeeze(leaf.v, v),
            rows,
            leaf.outputs_first,
        )
        gone = at - leaf.stacked
        order = None if value.order is None else tuple(i - (i > gone) for i in value.order if i != gone)
        value = replace(value, leaf=smaller, order=order)
    return value


Cut = Callable[[jax.Array, int], jax.Array]
"""Takes a part along one axis of an array."""


def _along(take: Cut, axis: int, x: jax.Array) -> jax.Array:
    return take(x, axis)


def cut(value: ThinFactors, cuts: Mapping[int, Cut]) -> ThinFactors | None:
    """A part of the value: each of ``cuts``, by the value's axis, is made in every factor that has the axis."""
    for axis, take in cuts.items():
        at, leaf = value.leaf_axis(axis), value.leaf
        if at < leaf.stacked:
            value = replace(value, leaf=leaf.mapped(partial(_along, take, at)))
        elif isinstance(leaf, LowRank):
            u, v = value.placed(at)
            new = {"u": leaf.u if u is None else take(leaf.u, u), "v": leaf.v if v is None else take(leaf.v, v)}
            value = replace(value, leaf=leaf.with_fields(new))
        else:
            return None
    return value


def _taken(op: Op, value: ThinFactors, rest: Sequence[jax.Array]) -> list[ThinFactors | None]:
    """What slices, splits and the like take, one for each result."""
    p, shape = op.eqn.params, op.shapes[0]

    def part(first: int, end: int, step: int = 1) -> Cut:
        return lambda x, axis: lax.slice_in_dim(x, first, end, step, axis)

    match op.name:
        case "rev":
            return [cut(value, dict.fromkeys(p["dimensions"], lambda x, axis: lax.rev(x, (axis,))))]
        case "split":
            ends = [sum(p["sizes"][: i + 1]) for i in range(len(p["sizes"]))]
            return [cut(value, {p["axis"]: part(e - n, e)}) for n, e in zip(p["sizes"], ends, strict=True)]
        case "unstack":
            ones = [cut(value, {p["axis"]: part(i, i + 1)}) for i in range(shape[p["axis"]])]
            return [None if one is None else _squeezed(one, (p["axis"],)) for one in ones]
        case "dynamic_slice":
            sizes = p["slice_sizes"]
            starts = {i: start for i, start in enumerate(rest[: len(shape)]) if sizes[i] != shape[i]}

            def from_start(start: jax.Array, size: int) -> Cut:
                return lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)

            return [cut(value, {i: from_start(start, sizes[i]) for i, start in starts.items()})]
    strides = p["strides"] or (1,) * len(shape)
    along = zip(p["start_indices"], p["limit_indices"], strides, shape, strict=True)
    return [cut(value, {i: part(b, e, step) for i, (b, e, step, n) in enumerate(along) if (b, e, step) != (0, n, 1)})]


def row_of(op: Op, value: ThinFactors, index: jax.Array) -> ThinFactors | None:
    """What a lookup of a single index takes, as factors."""
    numbers, p = op.eqn.params["dimension_numbers"], op.eqn.params
    if index.shape != (1,) or len(numbers.start_index_map) != 1 or not is_row(op.eqn):
        return None
    ((axis,), mode) = numbers.start_index_map, p["mode"]
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    how = "fill" if fills else "promise_in_bounds" if mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS else "clip"
    take = partial(jnp.take, mode=how, fill_value=p["fill_value"] if fills else None)
    one = cut(value, {axis: lambda x, at: take(x, index, at)})
    return one if one is None or not numbers.collapsed_slice_dims else _squeezed(one, numbers.collapsed_slice_dims)
