"""Prepared weights on their way through a program, and the products that read them as they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations import codes as as_arrays
from jaxcomp.activations.avals import result_of
from jaxcomp.activations.codes import Codes, Value, passing
from jaxcomp.activations.planning import OWNER, Planned
from jaxcomp.activations.reasons import Record
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Params, Shape
from jaxcomp.kernels.forms import Images, Weight, forms_of, runs_in_turn
from jaxcomp.kernels.leaves import Axes, Laid, restored, scale_shape, without_first
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.prepare import check_layout, site_axes, wanted_axes
from jaxcomp.kernels.products import Matrix, convolution, weight_only
from jaxcomp.kernels.windows import Window, channels_last, window_of
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.products import dot_axes
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location


@partial(
    jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["leaf_shape", "leaf_axes", "dtype", "moves"]
)
@dataclass(frozen=True)
class Carried:
    """A prepared weight where an array stood: the array is ``weight`` in its leaf's axes after the ``moves``.

    Attributes:
      weight: as it lies; a scan slices its leading axes.
      leaf_shape, leaf_axes: of the leaf, whole.
      dtype: of the array here, after casts.
      moves: the layout operations that it came through.
    """

    weight: Weight
    leaf_shape: Shape
    leaf_axes: Axes
    dtype: jnp.dtype
    moves: tuple[Op, ...] = ()

    def dense(self) -> jax.Array:
        """The array here."""
        shape, axes = self._here()
        x = restored(self.weight.dense(), shape, axes)
        for op in self.moves:
            (x,) = op.bind(x)
        return x

    def codes(self) -> Codes | jax.Array:
        """The array here in codes; as it is where the codes name levels."""
        w, grid = self.weight, self.weight.grid
        if grid is None or grid.code_range is None:
            return self.dense()
        shape, axes = self._here()
        group, offset = (w.group, w.zero) if isinstance(w, PackedWeight) else (w.length, None)
        scales = scale_shape(shape, axes, group)
        numbers = restored(w.numbers(), shape, axes)
        scale, zero = (None if v is None else restored(v, scales, axes) for v in (w.scale, offset))
        low, high = grid.code_range
        assert scale is not None
        box = Codes(numbers, scale, zero, w.dtype, high - low if zero is not None else max(-low, high))
        for op in self.moves:
            (moved,) = as_arrays.moved(op, box)
            if not isinstance(moved, Codes):
                return self.dense()
            box = moved
        return box

    def _here(self) -> tuple[Shape, Axes]:
        """The shape and the axes of the leaf, or of the slice of it that a scan has made."""
        shape, axes = self.leaf_shape, self.leaf_axes
        for _ in range(len(axes[0]) - self.weight.lead):
            shape, axes = without_first(shape, axes)
        return shape, axes


def carried(leaf: Laid) -> Carried:
    """A prepared leaf as a value of the program."""
    return Carried(leaf.weight, leaf.shape, leaf.axes, leaf.dtype)


def in_arrays(value: Value | Carried) -> Value:
    """What a product on codes takes where a prepared weight came by; other values are the same."""
    return value.codes() if isinstance(value, Carried) else value


def checked(program: Program, params: Params) -> dict[str, Laid]:
    """The prepared leaves of a tree, by path.

    Raises:
      ValueError: one is prepared for products that this program has not.
    """
    found = {p: x for p, x in leaves_with_paths(params, is_leaf=is_compressed)[0] if isinstance(x, Laid)}
    wanted = wanted_axes(program) if found else {}
    for path, leaf in found.items():
        check_layout(OWNER, path, leaf, wanted.get(path, []))
    return found


_KEEP = frozenset({"reshape", "squeeze", "transpose", "copy", "copy_p", "name", "stop_gradient"})
"""Layout operations after which a site still finds its weight as it lies."""


def layout_claims(program: Program, leaves: Mapping[str, Laid]) -> dict[Location, Claim]:
    """Claims on the layout operations between a prepared leaf and its products."""
    return passing(program, leaves, _moved, in_arrays)


def _moved(op: Op, value: Value | Carried, *rest: jax.Array) -> Sequence[Value | Carried]:
    if not isinstance(value, Carried):
        return as_arrays.moved(op, value, *rest)
    cast = op.name == "convert_element_type" and jnp.issubdtype(op.eqn.params["new_dtype"], jnp.floating)
    if not cast and op.name not in _KEEP:
        return as_arrays.moved(op, in_arrays(value), *rest)
    dtype = op.eqn.params["new_dtype"] if cast else value.dtype
    return [replace(value, moves=(*value.moves, op), dtype=dtype)]


def product_claim(planned: Planned, leaves: Mapping[str, Laid], record: Record) -> Claim | None:
    """A claim on a product whose activations stay as they are and whose weight is prepared."""
    leaf = leaves.get(planned.site.leaf or "")
    if leaf is None or not BARRED.isdisjoint(planned.site.inside):
        return None
    here = site_axes(planned.site, planned.op) == leaf.axes
    return Claim(_on_bytes(planned, record) if here else _on_arrays(planned))


def _on_arrays(planned: Planned) -> Callable[..., Sequence[jax.Array]]:
    def run(*values: object) -> Sequence[jax.Array]:
        return planned.op.bind(*(v.dense() if isinstance(v, Carried | Codes) else v for v in values))

    return run


def _on_bytes(planned: Planned, record: Record) -> Callable[..., Sequence[jax.Array]]:
    op, side = planned.op, planned.site.weight
    assert side is not None

    def run(*values: object) -> Sequence[jax.Array]:
        value, x = values[side], values[1 - side]
        if not isinstance(value, Carried) or not isinstance(x, jax.Array):
            return _on_arrays(planned)(*values)
        if planned.site.kind == "conv":
            return [_convolved(planned, x, value.weight, record)]
        rows = in_rows(op, side, x)
        if isinstance(value.weight, PanelWeight):
            return [in_result(op, side, _by_panels(planned, rows, value.weight, record))]
        record(planned.site.path, "weight-only", None, forms_of(rows.shape[1], x.dtype, value.weight))
        return [in_result(op, side, product_of_rows(rows, value.weight, result_of(op).dtype))]

    return run


def _convolved(planned: Planned, x: jax.Array, w: Weight, record: Record) -> jax.Array:
    op, numbers = planned.op, planned.op.eqn.params["dimension_numbers"]
    assert not isinstance(w, PackedWeight)
    images = jnp.transpose(x, channels_last(numbers.lhs_spec))
    window, result = window_of(op), result_of(op)
    given = Images(images.shape, window)
    record(planned.site.path, "weight-only", None, forms_of(given.windows, x.dtype, w, given))
    y = convolution(images, w, window, dtype=result.dtype)
    return jnp.transpose(y, np.argsort(channels_last(numbers.out_spec)).tolist())


def _by_panels(planned: Planned, rows: jax.Array, w: PanelWeight, record: Record) -> jax.Array:
    """``(1, rows, features)``: a dot as a convolution, each row an image of one pixel."""
    images, dtype = rows.reshape(-1, 1, w.length), result_of(planned.op).dtype
    window = Window(kernel=(1,), strides=(1,), padding=((0, 0),), dilation=(1,), base=(1,), groups=1)
    given = Images(images.shape, window)
    record(planned.site.path, "weight-only", None, forms_of(given.windows, rows.dtype, w, given))
    return convolution(images, w, window, dtype=dtype).reshape(1, images.shape[0], w.features)


def in_rows(op: Op, side: int, x: jax.Array) -> jax.Array:
    """The operand of a dot beside the one on ``side`` as ``(shared, rows, length)``; its axes may be 1 where it is."""
    parts = dot_axes(op.eqn, 1 - side)
    sizes = [math.prod(x.shape[i] for i in part) for part in parts]
    return jnp.transpose(x, [axis for part in parts for axis in part]).reshape(sizes)


def row_count(op: Op, side: int, shape: Shape) -> int:
    """How many rows an operand of this shape has there."""
    return math.prod(shape[i] for i in dot_axes(op.eqn, 1 - side)[1])


def in_result(op: Op, side: int, y: jax.Array) -> jax.Array:
    """``(shared, rows, features)`` as the result of a dot whose weight is on ``side``."""
    return (y if side == 1 else jnp.swapaxes(y, -1, -2)).reshape(result_of(op).shape)


def product_of_rows(x: jax.Array, w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """``(shared, rows, features)`` of activations ``(shared, rows, length)``."""
    run = partial(weight_only, dtype=dtype)
    if not w.lead:
        return run(x[0], w)[None]
    apart = jax.tree.map(lambda v: v.reshape(-1, *v.shape[w.lead :]), w)
    at_once = jax.vmap(run)
    if not runs_in_turn(x.shape[1], x.dtype, w):
        return at_once(x, apart)

    def in_turn(x: jax.Array, w: Matrix) -> jax.Array:
        """For kernels, which take one matrix."""
        return jax.lax.map(lambda both: run(*both), (x, w))

    result: jax.Array = jax.lax.platform_dependent(x, apart, cpu=in_turn, default=at_once)
    return result
