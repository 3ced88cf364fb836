"""Activations onto their grids: codes, scale and zero point of one value, with the gradient that the rule asks for."""

from __future__ import annotations

from functools import partial, singledispatch
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.specs import LSQ, PACT, Act, ActLayout, ActSpec, Float8, RangeKind, Static
from jaxcomp.core.barriers import made_once
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.gradients import scale_gradient, straight_through
from jaxcomp.core.roles import AxisRoles
from jaxcomp.core.types import DType, Shape
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.numerics.affine import by_factors, dequantize, factors_of, spread
from jaxcomp.quantization.numerics.ranges import Ends, absmax_range
from jaxcomp.quantization.numerics.rounding import HALF_CELL, round_between, round_ste
from jaxcomp.trace.ranges import Range


class Coded(NamedTuple):
    """``value == numbers * scale`` and ``codes == numbers + zero``, all integers in a float type; no zero means 0."""

    numbers: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Steps(NamedTuple):
    """A grid: its scale and zero point, no zero means 0; and the two factors that stand for a division by the scale."""

    scale: jax.Array
    zero: jax.Array | None
    less: jax.Array
    reciprocal: jax.Array


class Rounded(NamedTuple):
    """A value on its grid, ``value == numbers * scale``; the gradient flows through the value, and so the numbers.

    The numbers, in the value's own type, are integers (float8 numbers of a Float8), so a backend that rounds what it
    multiplies leaves them as they are.
    """

    value: jax.Array
    numbers: jax.Array
    scale: jax.Array


Names = tuple[str, ...]
"""What a site does with each axis of an operand, as ``Operand.roles`` has it."""


class Entry(NamedTuple):
    """How a value enters its site: what the site does with each axis, and the range, two scalars; None is its own."""

    roles: Names
    given: Range | None = None


def scale_blocks(shape: Shape, roles: Names, per: ActLayout) -> Shape:
    """The shape of the scale of an operand whose axes have these ``roles``; groups divide what they lie along.

    >>> from jaxcomp.core.layouts import Groups
    >>> scale_blocks((2, 5, 8), ("batch", "output", "contracted"), Groups(4))
    (2, 5, 2)
    """
    return per.layout(shape, lambda: AxisRoles(roles)).shape


def encode(x: jax.Array, act: Act, at: Entry) -> Coded:
    """An activation in steps of its grid, ``clip(round(x / scale), low - zero, high - zero)``.

    The gradient is straight through and cut outside the range. ONNX's QuantizeLinear rounds so too: before it adds the
    zero point.

    Args:
      x: the value.
      act: the rule.
      at: the axes' roles, and the range where the rule takes one from outside.
    """
    return coded(x, act, steps_of(x, act, at))


def steps_of(x: jax.Array, act: Act, at: Entry) -> Steps:
    """The steps that an activation is put in; arguments as of :func:`encode`."""
    if not x.size:
        one = jnp.ones((1,) * x.ndim, compute_dtype(x.dtype))
        return Steps(one, None if act.symmetric else jnp.zeros_like(one), one, one)
    if at.given is not None and isinstance(act.range, Static):
        return _static_steps(x, act, at.given)
    if at.given is None:
        scale, zero = act.grid.scale_of(*_own_ends(x, scale_blocks(x.shape, at.roles, act.per), act.symmetric))
    else:
        ends = Range(*(jnp.asarray(end, compute_dtype(x.dtype)) for end in at.given))
        scale, zero = grid_of_range(_trained(act.range, ends, x.size * act.grid.code_range[1]), act.grid)
        scale, zero = (v.reshape((1,) * x.ndim) for v in (scale, zero))
    if at.given is not None or not act.symmetric:  # or the extremes are the range's own, and no code lies beyond them
        scale = _in_type(scale, _reach(act.grid, zero), x.dtype)
    if at.given is not None:  # or XLA on CPU finds the scale anew for each element
        scale, zero = jax.lax.optimization_barrier((scale, zero))
    return Steps(scale, None if act.symmetric else zero, *factors_of(scale))


def _static_steps(x: jax.Array, act: Act, given: Range) -> Steps:
    """:func:`steps_of` a range that learns nothing.

    All that is to be known of the grid is made at once and lies in one array: XLA on CPU runs one small program for it,
    not four, and a deep network has as many of them as activations.
    """
    ends = jax.lax.stop_gradient(Range(*(jnp.asarray(end, compute_dtype(x.dtype)) for end in given)))
    scale, zero = grid_of_range(ends, act.grid)
    scale = _in_type(scale, _reach(act.grid, zero), x.dtype)
    known = jax.lax.optimization_barrier(jnp.stack([scale, zero, *factors_of(scale)]))
    scale, zero, *factors = (known[i].reshape((1,) * x.ndim) for i in range(4))
    return Steps(scale, None if act.symmetric else zero, *factors)


def coded(x: jax.Array, act: Act, steps: Steps) -> Coded:
    """The codes of an activation in these steps."""
    low, high = act.grid.code_range
    apart = spread(jnp.zeros_like(steps.scale) if steps.zero is None else steps.zero, x.shape)
    numbers = round_between(by_factors(x, steps.less, steps.reciprocal), low - apart, high - apart)
    return Coded(numbers, steps.scale, steps.zero)


def _own_ends(x: jax.Array, blocks: Shape, symmetric: bool) -> Ends:
    """The extremes of each block of a value."""
    return absmax_range(jax.lax.stop_gradient(x).astype(compute_dtype(x.dtype)), blocks, symmetric)


def _reach(grid: Int, zero: jax.Array | None) -> jax.Array | float:
    """How many steps from 0 the codes go."""
    low, high = grid.code_range
    return -low if grid.symmetric or zero is None else jnp.maximum(zero, high - zero)


def _in_type(scale: jax.Array, reach: jax.Array | float, dtype: DType) -> jax.Array:
    """The scale, made so small near the end of a type that no code stands for an infinity; NaN and infinity stay."""
    most = min(float(jnp.finfo(dtype).max), float(jnp.finfo(scale.dtype).max)) * (1 - 2.0**-20)
    return jnp.where(scale < jnp.inf, jnp.minimum(scale, most / jax.lax.stop_gradient(reach)), scale)


def float8_codes(x: jax.Array, act: Float8, at: Entry) -> tuple[jax.Array, jax.Array]:
    """Float8 codes and scale of an activation; arguments as of :func:`encode`. No gradient flows."""
    dtype, x = x.dtype, jax.lax.stop_gradient(x).astype(compute_dtype(x.dtype))
    if not x.size:
        end = jnp.zeros((1,) * x.ndim, x.dtype)
    elif at.given is None:
        end, _ = _own_ends(x, scale_blocks(x.shape, at.roles, act.per), True)
    else:
        low, high = (jax.lax.stop_gradient(jnp.asarray(v, x.dtype)) for v in at.given)
        end = jnp.maximum(-low, high).reshape((1,) * x.ndim)
    scale = _in_type(_positive(end * (1.0 / act.top)), act.top, dtype)
    return jnp.clip(x * spread(1.0 / scale, x.shape), -act.top, act.top).astype(act.dtype), scale


def fake_quantize(x: jax.Array, act: ActSpec, at: Entry) -> Rounded:
    """The value rounded to its grid, in its own type; arguments as of :func:`encode`.

    >>> x, at = jnp.array([-1.0, 0.4, 9.0]), Entry(("output",), Range(jnp.float32(0), jnp.float32(6)))
    >>> found = fake_quantize(x, Act(2, range=LSQ()), at)
    >>> found.value.tolist(), found.numbers.tolist(), found.scale.tolist()
    ([0.0, 0.0, 6.0], [0.0, 0.0, 3.0], [2.0])
    """
    return _fake(x, at.given, act=act, roles=at.roles)


@partial(jax.jit, static_argnames=("act", "roles"))
def _fake(x: jax.Array, given: Range | None, *, act: ActSpec, roles: Names) -> Rounded:
    """:func:`fake_quantize`, traced once for all values that are alike."""
    at = Entry(roles, given)
    if isinstance(act, Float8):
        return _fake_float8(x, act, at)
    coded, value = _rounded(act.range, x, act, at)
    return _as_numbers(value, *jax.lax.stop_gradient((coded.numbers, coded.scale)))


def _fake_float8(x: jax.Array, act: Float8, at: Entry) -> Rounded:
    codes, scale = float8_codes(x, act, at)
    end = spread(scale, x.shape) * (act.top * (1 + 2.0**-10))  # what rounds to the top without being clipped learns
    passing = jnp.where(jnp.abs(x) <= end.astype(x.dtype), x, jax.lax.stop_gradient(x))
    value = straight_through(passing, dequantize(codes, scale).astype(x.dtype))
    return _as_numbers(value, codes, scale)


def _as_numbers(value: jax.Array, numbers: jax.Array, scale: jax.Array) -> Rounded:
    steps = value.astype(scale.dtype) * spread(1.0 / scale, value.shape)
    return Rounded(value, straight_through(steps.astype(value.dtype), numbers.astype(value.dtype)), scale)


@singledispatch
def _rounded(source: RangeKind, x: jax.Array, act: Act, at: Entry) -> tuple[Coded, jax.Array]:
    """The codes, and what they stand for with the gradient that the kind of range gives it."""
    # One mask at most is kept for the gradient: every array that waits for the backward pass is written and read.
    coded = encode(jax.lax.stop_gradient(x), act, at)
    value = _value(coded, x)
    return coded, straight_through(x if at.given is None else _within(x, coded, act.grid), value)


@_rounded.register(LSQ)
def _(source: LSQ, x: jax.Array, act: Act, at: Entry) -> tuple[Coded, jax.Array]:
    coded = encode(x, act, at)
    return coded, _value(coded, x)


@_rounded.register(PACT)
def _(source: PACT, x: jax.Array, act: Act, at: Entry) -> tuple[Coded, jax.Array]:
    assert at.given is not None
    high = jnp.asarray(at.given.high, x.dtype)
    clipped = jnp.where(x < high, jnp.maximum(x, jnp.zeros((), x.dtype)), high)
    coded = encode(jax.lax.stop_gradient(x), act, at._replace(given=jax.lax.stop_gradient(at.given)))
    return coded, straight_through(clipped, _value(coded, x))


def _value(coded: Coded, like: jax.Array) -> jax.Array:
    """What the codes stand for, in the type of the value that they were made of.

    Or XLA on CPU computes it, and all that led to it, anew inside the transposed copy that a kernel's gradient reads:
    ResNet-18's step is a tenth faster for it.
    """
    return made_once(dequantize(coded.numbers, coded.scale).astype(like.dtype))


def _within(x: jax.Array, coded: Coded, grid: Int) -> jax.Array:
    """``x``, through which a gradient passes where no code is clipped.

    The ends are compared in the units of ``x``: two comparisons an element, no more arithmetic.
    """
    low, high = grid.code_range
    zero = jnp.zeros_like(coded.scale) if coded.zero is None else coded.zero
    fixed = jax.lax.stop_gradient(x)
    wide = fixed.astype(coded.scale.dtype)
    inside = (wide >= (low - HALF_CELL - zero) * coded.scale) & (wide <= (high + HALF_CELL - zero) * coded.scale)
    return jnp.where(inside, x, fixed)


def grid_of_range(given: Range, grid: Int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of a grid that covers a range and 0; differentiable in the range's ends.

    An end that is NaN makes the scale NaN, and with it all that is put on the grid.
    """
    low = jnp.where(given.low > 0, jnp.zeros_like(given.low), given.low)  # an end at 0 still learns
    high = jnp.where(given.high < 0, jnp.zeros_like(given.high), given.high)
    _, top = grid.code_range
    if grid.symmetric:
        scale = _positive(jnp.maximum(-low, high) * (1.0 / (top + 0.5)))
        return scale, jnp.zeros_like(scale)
    scale = _positive(high * (1.0 / top) - low * (1.0 / top))
    return scale, round_ste(-low / scale, 0, top)


def _positive(scale: jax.Array) -> jax.Array:
    """A range of width 0 gets scale 1; NaN stays."""
    return jnp.where(scale <= 0, jnp.ones_like(scale), jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))


@singledispatch
def _trained(source: RangeKind, given: Range, weight: int) -> Range:
    """The range with the gradient that its kind gives it; ``weight`` is the value's size times its largest code.

    In a program that is exported for any batch the size is an expression, which only LSQ asks the value of.
    """
    return jax.lax.stop_gradient(given)


@_trained.register(LSQ)
def _(source: LSQ, given: Range, weight: int) -> Range:
    factor = weight**-0.5 if isinstance(weight, int) else jax.lax.rsqrt(jnp.asarray(weight, jnp.float32))
    return Range(*(scale_gradient(end, factor) for end in given))


@_trained.register(PACT)
def _(source: PACT, given: Range, weight: int) -> Range:
    low = jnp.where(jnp.isnan(given.low), given.low, jnp.zeros_like(given.low))
    return jax.lax.stop_gradient(Range(low, given.high))
