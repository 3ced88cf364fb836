"""Codes of a weight on their way through a program: layout operations move codes and scales alike."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.reasons import TO_INT, Why
from jaxcomp.core.gradients import masked_through
from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import unpacked
from jaxcomp.core.types import DType, Leaf, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.learned import Learned
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import dequantize, in_type, spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED, CUTS, JOINS, RELAID, UNCHANGED
from jaxcomp.trace.program import Program
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import Location


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero"], meta_fields=["dtype", "reach"])
@dataclass(frozen=True)
class Codes:
    """``dense == (codes - zero) * scale``, with codes in the range of int8, or float8 ones and no zero.

    Attributes:
      codes: of the dense shape: int8 or float8, or a float type while training, so that gradients pass.
      scale: of the dense rank; each dimension divides the dense one.
      zero: integers in the scale's type and shape, or None for 0.
      dtype: the dense array's type, static.
      reach: the largest ``|codes - zero|``, static; 0 for float8.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    dtype: DType
    reach: int

    def dense(self) -> jax.Array:
        """The array that the codes stand for."""
        return _dense(self)


@jax.jit
def _dense(box: Codes) -> jax.Array:
    return in_type(dequantize(box.codes, box.scale, box.zero), box.scale, box.dtype)


Value = jax.Array | Codes
"""What stands in a program where a leaf that may have codes came by."""


def array_of(value: Value) -> jax.Array:
    """The array that a value is, or that its codes stand for."""
    return value.dense() if isinstance(value, Codes) else value


def codes_of(leaf: CompressedLeaf, stepped: frozenset[int] = frozenset()) -> Codes | Why:
    """The codes of a compressed leaf, or why it has none; ``stepped`` are axes that a scan steps over.

    The codes of other grids than Int index levels that are no integers: such weights run in fake mode.

    Codes of an asymmetric 8-bit grid are shifted by 128, for a product of int8 by int8 is the fast one.
    """
    leaf = leaf.in_training() if isinstance(leaf, Learned) else leaf
    mask, inner = (leaf.mask, leaf.values) if isinstance(leaf, Masked) else (None, leaf)
    if not isinstance(inner, Quantized):
        return Why(f"the weight is a {type(inner).__name__}, not integer codes", TO_INT)
    if inner.grid.code_range is None:
        return Why(f"{type(inner.grid).__name__} codes are not proportional to the weight", TO_INT)
    low, high = inner.grid.code_range
    shift = 128 if high > 127 else 0
    codes = inner.numbers()
    codes = (codes.astype(jnp.int32) - shift).astype(jnp.int8) if inner.packed else codes - shift
    zero = None if inner.zero_point is None else inner.zero_point - shift
    if mask is not None:
        nothing = jnp.zeros((), codes.dtype) if zero is None else spread(zero, codes.shape).astype(codes.dtype)
        inside = unpacked(mask)
        through = isinstance(leaf, Masked) and leaf.straight
        codes = nothing + masked_through(codes - nothing, inside) if through else jnp.where(inside, codes, nothing)
    box = Codes(codes, dense(inner.scale), zero, inner.dtype, high - low if zero is not None else max(-low, high))
    return _on_scales(box, lambda v: filled(v, codes.shape, stepped)) if stepped else box


FLOAT8 = frozenset({jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)})


def of_float8(leaf: Leaf) -> Codes | None:
    """A leaf that is a float8 array as codes with scale 1; None of any other."""
    if getattr(leaf, "dtype", None) not in FLOAT8:
        return None
    return Codes(leaf, jnp.ones((1,) * leaf.ndim, jnp.float32), None, leaf.dtype, 0)


def filled(v: jax.Array, shape: Shape, axes: frozenset[int]) -> jax.Array:
    """A scale made full along ``axes``."""
    target = [shape[i] if i in axes else b for i, b in enumerate(v.shape)]
    repeats = [n // b if b != 1 else 1 for n, b in zip(target, v.shape, strict=True)]
    for axis, times in enumerate(repeats):
        v = jnp.repeat(v, times, axis) if times > 1 else v
    return jnp.broadcast_to(v, target)


def _on_scales(box: Codes, move: Callable[[jax.Array], jax.Array], codes: jax.Array | None = None) -> Codes:
    zero = None if box.zero is None else move(box.zero)
    return replace(box, codes=box.codes if codes is None else codes, scale=move(box.scale), zero=zero)


def moved(op: Op, value: Value, *rest: jax.Array) -> Sequence[Value]:
    """The results of a layout operation on a value that may be codes; ``rest`` are its other operands."""
    if not isinstance(value, Codes):
        return op.bind(value, *rest)
    if op.name == "convert_element_type":
        to = op.eqn.params["new_dtype"]
        return [replace(value, dtype=to)] if jnp.issubdtype(to, jnp.floating) else op.bind(value.dense())
    rule = _RULES.get(op.name)
    if rule is not None:
        (codes,) = op.bind(value.codes, *rest)
        return [_on_scales(value, lambda v: rule(op, v), codes)]
    full = _on_scales(value, lambda v: _only_full(v, value.codes.shape))
    parts = op.bind(full.codes, *rest)
    scales = _cut(op, full.scale, rest)
    zeros = [None] * len(parts) if full.zero is None else _cut(op, full.zero, rest)
    return [replace(full, codes=c, scale=s, zero=z) for c, s, z in zip(parts, scales, zeros, strict=True)]


def joined(op: Op, *values: Value) -> Sequence[Value]:
    """The result of a concatenation or a stack, in codes where all operands are; each keeps its own scales."""
    boxes = [v for v in values if isinstance(v, Codes)]
    alike = len({(box.zero is None, box.dtype, box.codes.dtype) for box in boxes}) == 1
    if len(boxes) < len(values) or not alike:
        return op.bind(*map(array_of, values))
    axis = op.eqn.params.get("dimension")  # a stack has none: its axis is new

    def join(parts: list[jax.Array]) -> jax.Array:
        return jnp.stack(parts, op.eqn.params["axis"]) if axis is None else lax.concatenate(parts, axis)

    wide = {i for i in range(boxes[0].codes.ndim) if i == axis or any(box.scale.shape[i] != 1 for box in boxes)}
    full = [_on_scales(box, partial(filled, shape=box.codes.shape, axes=frozenset(wide))) for box in boxes]
    zero = None if full[0].zero is None else join([box.zero for box in full if box.zero is not None])
    (codes,) = op.bind(*(box.codes for box in full))
    scale = join([box.scale for box in full])
    return [Codes(codes, scale, zero, boxes[0].dtype, max(box.reach for box in boxes))]


def passing(
    program: Program,
    paths: Container[str],
    move: Callable[..., Sequence[object]],
    as_value: Callable[[Any], Value],
) -> dict[Location, Claim]:
    """Claims on the layout operations between leaves that something else stands for and their products.

    Args:
      program: whose operations they are.
      paths: of the leaves.
      move: ``move(op, value, *rest)``, the results of an operation on what stands for a leaf.
      as_value: from that to what :func:`joined` takes.
    """

    def join(op: Op, *values: object) -> Sequence[Value]:
        return joined(op, *map(as_value, values))

    found = {}
    for op in program.flow.ops:
        origins = [tag.origin for tag in op.tags if tag.origin is not None]
        mine = any(origin.path in paths and origin.exact for origin in origins)
        if mine and BARRED.isdisjoint(op.inside) and (op.name in LAYOUT or op.name in JOINS):
            found[op.location] = Claim(partial(move if op.name in LAYOUT else join, op))
    return found


def _same(op: Op, v: jax.Array) -> jax.Array:
    return v


def _transpose(op: Op, v: jax.Array) -> jax.Array:
    return jnp.transpose(v, op.eqn.params["permutation"])


def _squeeze(op: Op, v: jax.Array) -> jax.Array:
    return jnp.squeeze(v, op.eqn.params["dimensions"])


def _broadcast(op: Op, v: jax.Array) -> jax.Array:
    """New axes, and axes of one element made wide, share their scale."""
    positions = op.eqn.params["broadcast_dimensions"]
    shape = [1] * len(op.eqn.params["shape"])
    for i, position in enumerate(positions):
        shape[position] = v.shape[i]
    return lax.broadcast_in_dim(v, shape, positions)


def _reshape(op: Op, v: jax.Array) -> jax.Array:
    """Axes that share one scale keep it; others that merge or split get a scale for each index."""
    old, new = op.shapes[0], tuple(op.eqn.params["new_sizes"])
    whole = Origin("", old, "", tuple((i,) for i in range(len(old)))).reshaped(old, new)
    middle, target = list(v.shape), [1] * len(new)
    for j, sources in enumerate(whole.axes):
        if all(v.shape[i] == 1 for i in sources):
            continue
        if len(sources) == 1 and new[j] == old[sources[0]]:
            target[j] = v.shape[sources[0]]
            continue
        target[j] = new[j]
        for i in sources:
            middle[i] = old[i]
    return filled(v, old, frozenset(i for i, m in enumerate(middle) if m != v.shape[i])).reshape(target)


_RULES: dict[str, Callable[[Op, jax.Array], jax.Array]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    **dict.fromkeys(UNCHANGED, _same),
}
LAYOUT = RELAID | UNCHANGED | CUTS | {"convert_element_type"}
"""The operations through which codes pass."""


def _only_full(v: jax.Array, shape: Shape) -> jax.Array:
    """A scale whose axes are whole or 1: groups are spread, for a cut may go through one."""
    return filled(v, shape, frozenset(i for i, b in enumerate(v.shape) if b not in (1, shape[i])))


def _cut(op: Op, v: jax.Array, rest: tuple[jax.Array, ...]) -> list[jax.Array]:
    """What the operation takes of a scale; all of an axis along which the scale is one."""
    p, one = op.eqn.params, [i for i, b in enumerate(v.shape) if b == 1]
    match op.name:
        case "rev":
            return [lax.rev(v, p["dimensions"])]
        case "split":
            return [v] * len(p["sizes"]) if p["axis"] in one else list(lax.split(v, p["sizes"], p["axis"]))
        case "tile":
            return [jnp.tile(v, [1 if i in one else times for i, times in enumerate(p["reps"])])]
        case "unstack":
            pieces = jnp.unstack(v, axis=p["axis"])
            return list(pieces) * (len(op.eqn.outvars) if p["axis"] in one else 1)
        case "dynamic_slice":
            sizes = [1 if i in one else n for i, n in enumerate(p["slice_sizes"])]
            starts = [jnp.zeros_like(start) if i in one else start for i, start in enumerate(rest)]
            return [lax.dynamic_slice(v, starts, sizes)]
    begin = [0 if i in one else b for i, b in enumerate(p["start_indices"])]
    end = [1 if i in one else e for i, e in enumerate(p["limit_indices"])]
    return [lax.slice(v, begin, end, p["strides"])]
