"""Products of factors that never multiply them out.

A dot becomes two thin dots, a convolution a chain of convolutions, a lookup a lookup in the thin table and a dot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.thin_values import ThinFactors, ThinValue, row_of
from jaxcomp.factorization.leaves import Depthwise, LowRank, Separable, Tucker
from jaxcomp.kernels import grouped
from jaxcomp.trace import nested
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import by_rows
from jaxcomp.trace.walk import Value

Labels = list[int]


@dataclass(frozen=True, eq=False)
class ThinOp(Op):
    """An equation that runs on factors as they are, where it can.

    Attributes:
      note: called with why it could not, or with nothing.
      why: why the factors do not come here; for the note.
    """

    note: Callable[[str], None] = field(default=lambda why: None)
    why: str = ""

    @staticmethod
    def of(op: Op, note: Callable[[str], None], why: str) -> ThinOp:
        """The same equation in the same place."""
        return ThinOp(op.eqn, op.location, op.tags, op.scope, op.loops, op.inside, op.rest, note, why)

    def bind(self, *values: Value, **params: object) -> list[jax.Array]:
        """Runs the equation, on thin factors if one operand is some."""
        values = (*values, *self.rest)
        thick = [i for i, v in enumerate(values) if isinstance(v, ThinFactors)]
        if len(thick) != 1:
            self.note(self.why or "it was multiplied out on the way, by an operation that factors cannot follow")
            return nested.bind(self.eqn, [v.dense() if isinstance(v, ThinFactors) else v for v in values], params)
        found = thin_product(self, thick[0], cast(Sequence[ThinValue], values))
        if isinstance(found, str):
            self.note(found)
            return nested.bind(self.eqn, [v.dense() if isinstance(v, ThinFactors) else v for v in values], params)
        self.note("")
        return [cast(jax.Array, found)]  # or factors, of a row in front of a matrix


def thin_product(op: Op, index: int, values: Sequence[ThinValue]) -> ThinValue | str:
    """The result of a product whose operand ``index`` is factors, or why they must be multiplied out."""
    rules: dict[str, Callable[..., ThinValue | str]]
    rules = {
        "dot_general": _dot,
        "ragged_dot_general": _ragged,
        "conv_general_dilated": _conv,
        "gather": _lookup,
    }
    w = values[index]
    assert isinstance(w, ThinFactors)
    found = rules[op.name](
        op, index, w, *(v for i, v in enumerate(values) if i != index and not isinstance(v, ThinFactors))
    )
    return found if isinstance(found, str | ThinFactors) else found.astype(result_of(op).dtype)


def _einsum(op: Op, a: jax.Array, a_axes: Labels, b: jax.Array, b_axes: Labels, out: Labels) -> jax.Array:
    p = op.eqn.params
    kind = p["preferred_element_type"]
    return jnp.einsum(a, a_axes, b, b_axes, out, precision=p["precision"], preferred_element_type=kind)


def _dot(op: Op, index: int, w: ThinFactors, x: jax.Array) -> jax.Array | str:
    if not isinstance(w.leaf, LowRank):
        return f"a dot needs a matrix of low rank, not the factors of a {type(w.leaf).__name__} kernel"
    s, rows = w.leaf.stacked, w.leaf.row_axes
    n = w.leaf.ndim
    rank = n + x.ndim
    left, right = [*range(s + rows), rank], [*range(s), rank, *range(s + rows, n)]
    view = [*range(s), *(s + i for i in w.own)]
    summed, batch = op.eqn.params["dimension_numbers"]
    pairs = {x_axis: view[w_axis] for x_axis, w_axis in zip(summed[1 - index], summed[index], strict=True)}
    shared = {x_axis: view[w_axis] for x_axis, w_axis in zip(batch[1 - index], batch[index], strict=True)}
    gone = set(pairs.values())
    if gone <= set(range(s, s + rows)):
        (first, first_axes), (second, second_axes) = (w.leaf.u, left), (w.leaf.v, right)
    elif gone <= set(range(s + rows, n)):
        (first, first_axes), (second, second_axes) = (w.leaf.v, right), (w.leaf.u, left)
    else:
        return "it sums over rows and columns of the factors at once; decompose with other cols"
    x_axes = [pairs[i] if i in pairs else shared[i] if i in shared else n + i for i in range(x.ndim)]
    x_free = [n + i for i in range(x.ndim) if i not in pairs and i not in shared]
    w_free = [a for a in view if a not in gone and a not in shared.values()]
    lead = [view[a] for a in batch[index]]
    out = [*lead, *(w_free if index == 0 else x_free), *(x_free if index == 0 else w_free)]
    middle = [a for a in dict.fromkeys([*x_axes, *first_axes]) if a not in gone]
    inner = _einsum(op, x, x_axes, w.cast(first), first_axes, middle).astype(x.dtype)
    return _einsum(op, inner, middle, w.cast(second), second_axes, out)


def _ragged(op: Op, index: int, w: ThinFactors, x: jax.Array, sizes: jax.Array) -> jax.Array | str:
    """Two ragged dots in the same groups."""
    at, leaf = by_rows(op.eqn), w.leaf
    shapes = [] if not isinstance(leaf, LowRank) else [leaf.stacked, leaf.row_axes, leaf.v.ndim]
    if at is None or index != 1 or at.group != 0 or shapes != [1, 1, 3]:
        return "a ragged dot needs a matrix of low rank for each group in front"
    assert isinstance(leaf, LowRank)
    by_rank = [(leaf.u, 1), (leaf.v, 2)]  # each factor, and its own axis; the other one is the rank
    if w.own[at.right - 1] == 1:
        by_rank.reverse()

    def product(x: jax.Array, lhs: int, factor: jax.Array, rhs: int) -> jax.Array:
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())),
            lhs_ragged_dimensions=(1 - lhs,),
            rhs_group_dimensions=(0,),
        )
        changed = {"ragged_dot_dimension_numbers": numbers}
        return nested.bind(op.eqn, (x, w.cast(factor), sizes), changed)[0].astype(x.dtype)

    (first, own), (second, other) = by_rank
    return product(product(x, at.left, first, own), 1, second, 3 - other)


def _conv(op: Op, index: int, w: ThinFactors, x: jax.Array) -> jax.Array | str:
    p, numbers = op.eqn.params, op.eqn.params["dimension_numbers"]
    if index != 1:
        return "the factors are the image of a convolution, not its kernel"
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return "the convolution is grouped"
    leaf = w.leaf
    if leaf.stacked:
        return "the kernel is a stack of layers"
    if isinstance(leaf, LowRank):
        return _conv_of_matrix(op, x, w)
    if not isinstance(leaf, Tucker | Depthwise | Separable):
        return f"no chain of convolutions is known for {type(leaf).__name__}"
    features, out = numbers.lhs_spec[1], numbers.out_spec[1]
    narrow = _on_features(op, x, features, w.cast(leaf.u))
    match leaf:
        case Tucker():
            inner = _bind(op, narrow, _laid(w, leaf.core))
        case Depthwise():
            inner = _bind(op, narrow, _laid(w, leaf.taps[..., None, :]), feature_group_count=leaf.rank)
        case Separable():
            inner = _separable(op, narrow, w)
    return _on_features(op, inner, out, w.cast(leaf.v))


def _conv_of_matrix(op: Op, x: jax.Array, w: ThinFactors) -> jax.Array | str:
    """A convolution into the rank, then a 1x1 one, where one factor has the output features alone."""
    leaf = w.leaf
    assert isinstance(leaf, LowRank)
    numbers = op.eqn.params["dimension_numbers"]
    features = w.own[numbers.rhs_spec[0]]
    rows = list(range(leaf.row_axes))
    cols = list(range(leaf.row_axes, leaf.ndim))
    if cols == [features]:
        down, axes, up = leaf.u, [*rows, features], leaf.v
    elif rows == [features]:
        down, axes, up = leaf.v, [features, *cols], leaf.u.T
    else:
        return "neither factor has the output features alone; decompose with other cols"
    kernel = jnp.transpose(w.cast(down), [axes.index(a) for a in w.own])
    return _on_features(op, _bind(op, x, kernel), numbers.out_spec[1], w.cast(up))


def _laid(w: ThinFactors, kernel: jax.Array) -> jax.Array:
    """A small kernel in the order of the value's axes."""
    return w.cast(kernel if w.order is None else jnp.transpose(kernel, w.order))


def _bind(op: Op, x: jax.Array, kernel: jax.Array, **params: object) -> jax.Array:
    return grouped.bind(op.eqn, (x, kernel), params)[0].astype(x.dtype)


def _on_features(op: Op, x: jax.Array, axis: int, m: jax.Array) -> jax.Array:
    """A 1x1 convolution: ``m`` on the feature axis."""
    axes = list(range(x.ndim))
    out = [x.ndim if a == axis else a for a in axes]
    return _einsum(op, x, axes, m, [axis, x.ndim], out).astype(x.dtype)


def _separable(op: Op, x: jax.Array, w: ThinFactors) -> jax.Array:
    """Two depthwise convolutions, each with the stride, padding and holes of its own axis."""
    leaf = w.leaf
    assert isinstance(leaf, Separable)
    spatial = [w.own[a] for a in op.eqn.params["dimension_numbers"].rhs_spec[2:]]
    taps = leaf.rows[:, None, None, :], leaf.cols[None, :, None, :]
    for leaf_axis, kernel in enumerate(taps):
        at = spatial.index(leaf_axis)
        own = {
            name: tuple(v if i == at else none for i, v in enumerate(op.eqn.params[name]))
            for name, none in (("window_strides", 1), ("padding", (0, 0)), ("lhs_dilation", 1), ("rhs_dilation", 1))
        }
        x = _bind(op, x, _laid(w, kernel), feature_group_count=leaf.rank, **own)
    return x


NO_ROWS = "the lookup is not of whole rows of the factors"


def _lookup(op: Op, index: int, table: ThinFactors, *rest: jax.Array) -> ThinValue | str:
    """Rows of the thin table, then a dot; of a single row in front of a matrix, that matrix's factors."""
    one = row_of(op, table, *rest)
    if one is not None:
        return one
    numbers, leaf = op.eqn.params["dimension_numbers"], table.leaf
    out = result_of(op)
    cols = leaf.ndim - 1
    if not isinstance(leaf, LowRank):
        return NO_ROWS
    plain = leaf.stacked == 0 and leaf.row_axes == 1 and table.order is None
    last = tuple(range(len(out.shape) - cols, len(out.shape)))
    if not plain or numbers.collapsed_slice_dims != (0,) or tuple(numbers.offset_dims) != last:
        return NO_ROWS
    thin = numbers._replace(offset_dims=last[:1])
    sizes = (1, leaf.u.shape[-1])
    (found,) = nested.bind(op.eqn, (table.cast(leaf.u), *rest), {"dimension_numbers": thin, "slice_sizes": sizes})
    return jnp.tensordot(found, table.cast(leaf.v), 1)
