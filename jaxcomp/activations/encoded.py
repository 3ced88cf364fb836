"""Activations in codes, as products of codes take them: int8 or float8, and a scale that is NaN where the value was."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.chained import Chained
from jaxcomp.activations.coded_rows import InCodes, OfRows, coded_rows, has_rows
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.fake import Entry, Names, Steps, coded, float8_codes, scale_blocks, steps_of
from jaxcomp.activations.specs import Act, ActSpec, Float8
from jaxcomp.core.barriers import made_once
from jaxcomp.core.layouts import Tokens
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.reductions import nan_in
from jaxcomp.core.types import PyTree, Shape
from jaxcomp.kernels.llvm_results import Requantized
from jaxcomp.kernels.llvm_rounding import Ends, llvm_codes, refusal
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.quantization.numerics.affine import block_reduce, spread
from jaxcomp.quantization.numerics.rounding import WHOLE
from jaxcomp.trace.pointwise import Pointwise, gives_numbers
from jaxcomp.trace.primitives import ROUNDING
from jaxcomp.trace.ranges import Range


def small_integers(numbers: jax.Array, offset: jax.Array) -> jax.Array:
    """``numbers + offset`` as int8, integers in a float type of which the result is in range; NaN gives any code.

    By the bits of float32: XLA on CPU converts one number after the other, and looks at each for NaN and the ends.
    """
    if numbers.dtype != jnp.float32:
        return (numbers + spread(offset, numbers.shape)).astype(jnp.int8)
    whole = numbers + spread(offset + jnp.float32(WHOLE), numbers.shape)
    bits = lax.bitcast_convert_type(whole, jnp.int32) - int(np.float32(WHOLE).view(np.int32))
    return bits.astype(jnp.int8)


def nan_rows(x: jax.Array, roles: Names) -> jax.Array:
    """NaN for each index that a product does not sum over where the value has one, else 0: codes hold no NaN."""
    return nan_in(x, lambda v: block_reduce(v, _rows(x, roles), jnp.sum))


def _rows(x: jax.Array, roles: Names) -> Shape:
    """The shape of something for each index that a product does not sum over."""
    return scale_blocks(x.shape, roles, Tokens())


def reach_of(act: ActSpec) -> int:
    """How far codes are from their zero at most; 0 of float8."""
    if isinstance(act, Float8):
        return 0
    low, high = act.grid.code_range
    return max(-low, high) if act.symmetric else high - low


def encoded(value: jax.Array, act: ActSpec, at: Entry, made: Chained | OfRows | None = None) -> Factor:
    """An activation in codes, and how it is made, if that is known; no gradient flows."""
    return _encoded(value, at.given, made, act=act, roles=at.roles)


@partial(jax.jit, static_argnames=("act", "roles"))
def _encoded(
    value: jax.Array, given: Range | None, made: Chained | OfRows | None, *, act: ActSpec, roles: Names
) -> Factor:
    """:func:`encoded`, traced once for all values that are alike."""
    value, given, made = lax.stop_gradient((value, given, made))
    at = Entry(roles, given)
    if isinstance(act, Float8):
        return Factor(*float8_codes(value, act, at), None, 0)
    plain = partial(_in_steps, act=act, at=at, made=made if isinstance(made, Chained) else None)
    if given is None and value.size and has_rows(act, value.shape, roles):
        found = coded_rows(value, act, _ends(act), plain, made if isinstance(made, OfRows) else None)
    else:
        found = plain(value)
    return Factor(*found, reach_of(act))


def _in_steps(value: jax.Array, act: Act, at: Entry, made: Chained | None) -> InCodes:
    """A value in the steps that its rule gives it."""
    x = made_once(value)  # for its codes, and in search of NaN
    steps = steps_of(x, act, at)
    codes, lost = _codes_and_nan(_Given(x, steps, made), act, at.roles)
    scale, lost = steps.scale, lost.astype(steps.scale.dtype)
    scale = spread(scale, tuple(n if m == 1 else m if n == 1 else max(m, n) for m, n in _sizes(scale, lost))) + lost
    return InCodes(codes, scale, None if steps.zero is None else (steps.zero - _ends(act).shift).astype(jnp.int32))


def _ends(act: Act) -> Ends:
    """Codes are kept so much less that they are int8, for int8 by int8 is the fast product."""
    low, high = act.grid.code_range
    return Ends(low, high, 128 if high > 127 else 0)


def _sizes(a: jax.Array, b: jax.Array) -> list[tuple[int, int]]:
    """Of each axis the two sizes, either of which may be an expression of a program for any batch."""
    return list(zip(a.shape, b.shape, strict=True))


class _How(NamedTuple):
    """The ends of the codes, the shape of what NaN is looked for in, and that of the activation."""

    ends: Ends
    rows: Shape
    shape: Shape


class _Given(NamedTuple):
    """An activation, the steps that it is put in, and how it is made, if that is known."""

    x: jax.Array
    steps: Steps
    made: Chained | None


def _codes_and_nan(given: _Given, act: Act, roles: Names) -> tuple[jax.Array, jax.Array]:
    """Both in one piece."""
    leaves, tree = jax.tree.flatten(given)

    def own(*leaves: jax.Array) -> list[jax.Array]:
        x, steps, _ = jax.tree.unflatten(tree, leaves)
        numbers, scale, zero = coded(x, act, steps)
        codes = small_integers(numbers, jnp.zeros_like(scale) if zero is None else zero - _ends(act).shift)
        return [codes, nan_rows(x, roles)]

    if explicit_mesh(leaves) is not None:
        codes, lost = own(*leaves)
    else:
        how = _How(_ends(act), _rows(given.x, roles), given.x.shape)
        codes, lost = _primitive.bind(*leaves, jaxpr=jax.make_jaxpr(own)(*leaves), tree=tree, how=how)
    return codes, lost


def _for_cpu(*leaves: jax.Array, tree: PyTree, how: _How, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    x, steps, made = jax.tree.unflatten(tree, leaves)
    if made is not None and not _unfusable(made, steps, how):
        return _from_sums(made, steps, how)
    floats = x.dtype == steps.scale.dtype == jnp.float32
    if not floats or not x.size or refusal(x.shape, steps.scale.shape, how.rows):
        return run_call(*leaves, jaxpr=jaxpr)
    zero = jnp.zeros_like(steps.scale) if steps.zero is None else steps.zero
    return list(llvm_codes(x, jnp.stack([zero, steps.less, steps.reciprocal]), how.rows, how.ends))


def _unfusable(made: Chained, steps: Steps, how: _How) -> str | None:
    """Why codes are not made right from the sums of a convolution; None if they are."""
    shape, sums = how.shape, made.sums
    if not all(isinstance(n, int) for n in shape) or not math.prod((*shape, *sums.x.codes.shape)):
        return "there is nothing to round, or it is any number"
    if steps.scale.size != 1 or not steps.scale.dtype == sums.by_row.dtype == sums.by_feature.dtype == jnp.float32:
        return "the grid is not one, or not of float32"
    if sums.x.zero is not None and sums.x.zero.size != 1:
        return "rows have zero points of their own"
    sizes = enumerate(zip(how.rows, sums.by_row.shape, strict=True))
    if any(n != 1 == m for i, (n, m) in sizes if i not in sums.how.features):
        return "NaN is looked for within an image"
    return sums.refusal


def _from_sums(made: Chained, steps: Steps, how: _How) -> list[jax.Array]:
    """Codes, and NaN where the scale of a row, the scale or the bias of a feature make it: sums have none."""
    sums, scale = made.sums, made.sums.by_feature
    bias = jnp.zeros_like(scale) if made.bias is None else made.bias
    zero = jnp.zeros_like(steps.scale) if steps.zero is None else steps.zero
    ends = how.ends
    grid = zero, steps.less, steps.reciprocal, made.then, (ends.low, ends.high), ends.shift
    # Rows have one scale, or NaN.
    codes = sums.sums(Requantized(jnp.nanmin(sums.by_row) * scale, bias, *grid))
    lost = [
        jnp.where(jnp.isfinite(v), 0.0, jnp.nan)
        for v in (sums.by_row, sums.placed(scale), sums.placed(_finite(bias, made.then)))
    ]
    found = (v.sum([i for i, n in enumerate(how.rows) if n == 1 < v.shape[i]], keepdims=True) for v in lost)
    return [codes, jnp.broadcast_to(sum(found), how.rows)]


def _finite(bias: jax.Array, then: Pointwise) -> jax.Array:
    """A finite number for each bias, or NaN where the function gives it: an infinite bias may be cut off on its way."""
    high, low = (0.0 if gives_numbers(then, (end, end)) else math.nan for end in (math.inf, -math.inf))
    return jnp.where(jnp.isinf(bias), jnp.where(bias > 0, high, low), bias)


_primitive = call_in_one_piece(ROUNDING, _for_cpu)
