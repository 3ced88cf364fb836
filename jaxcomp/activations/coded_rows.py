"""Activations whose rows have ranges of their own, in codes: on a CPU found and rounded in one pass over them.

What makes them, if it is a function of rows that nothing else reads, is in that pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.fake import Entry, Names, Steps, scale_blocks, steps_of
from jaxcomp.activations.specs import Act
from jaxcomp.core.layouts import Tokens
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_rounding import Ends
from jaxcomp.kernels.llvm_rows import How, llvm_row_numbers, refusal
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.row_passes import CODES
from jaxcomp.quantization.numerics.affine import by_factors
from jaxcomp.quantization.numerics.rounding import round_between
from jaxcomp.trace.pointwise import Pointwise, Step
from jaxcomp.trace.primitives import ROUNDING_ROWS
from jaxcomp.trace.rowwise import RowReading, step_varies


@partial(jax.tree_util.register_dataclass, data_fields=["given"], meta_fields=["how"])
@dataclass(frozen=True)
class OfRows:
    """A value that is a function of rows, which its roundings alone read.

    Attributes:
      given: the rows, and what meets them.
      how: the function, static.
    """

    given: tuple[jax.Array, ...]
    how: How


class InCodes(NamedTuple):
    """Codes, and the scale of each row and its zero point in them; no zero means 0."""

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


def has_rows(act: Act, shape: Shape, roles: Names) -> bool:
    """Whether each row of an activation, along its last axis, has a range of its own."""
    return len(shape) > 1 and isinstance(act.per, Tokens) and scale_blocks(shape, roles, act.per) == (*shape[:-1], 1)


def coded_rows(
    x: jax.Array, act: Act, ends: Ends, plain: Callable[[jax.Array], InCodes], made: OfRows | None
) -> InCodes:
    """A value of such rows in codes, and how it is made, if that is known.

    Args:
      x: it.
      act: the rule.
      ends: of its codes.
      plain: the same, in JAX's own operations.
      made: how it is made.
    """
    given = () if made is None else made.given
    if explicit_mesh((x, *given)) is not None:
        return plain(x)

    def own(x: jax.Array, *_: jax.Array) -> list[jax.Array]:
        return [v for v in plain(x) if v is not None]

    how = None if made is None else made.how
    jaxpr = jax.make_jaxpr(own)(x, *given)
    codes, scale, *zero = _primitive.bind(x, *given, jaxpr=jaxpr, act=act, ends=ends, how=how)
    return InCodes(codes, scale, zero[0] if zero else None)


def _for_cpu(
    x: jax.Array, *given: jax.Array, jaxpr: ClosedJaxpr, act: Act, ends: Ends, how: How | None
) -> list[jax.Array]:
    first = How(x.shape, (), (True,), ()) if how is None else how
    if x.dtype != jnp.float32 or refusal(first):
        return run_call(x, *given, jaxpr=jaxpr)
    grid = _grid(act, ends, x.shape[-1])
    rows, *beside = given if given else (x,)
    function, varying = behind(first.function, first.varying, grid.function)
    made = first._replace(function=function, varying=varying)
    codes, numbers = llvm_row_numbers(made, _shifted(first.function, grid.numbers), rows, *beside)
    scale, *zero = (numbers[..., i : i + 1] for i in range(len(grid.numbers)))
    return [codes, scale, *(v.astype(jnp.int32) for v in zero)]


_ROWS = Entry(("output", "contracted"))


class _Grid(NamedTuple):
    """How a row is rounded: a function that ends in codes, and the values that are its scale and its zero point."""

    function: Pointwise
    numbers: tuple[int, ...]


@cache
def _grid(act: Act, ends: Ends, length: int) -> _Grid:
    """Read off the equations that find a row's scale and zero point."""

    @jax.jit
    def known(x: jax.Array) -> tuple[jax.Array, ...]:
        steps = steps_of(x, act, _ROWS)
        zero = () if steps.zero is None else (steps.zero - ends.shift, steps.zero)
        return steps.scale, steps.less, steps.reciprocal, *zero

    (eqn,) = jax.make_jaxpr(known)(jax.ShapeDtypeStruct((2, length), jnp.float32)).jaxpr.eqns
    found = [*map(_read(eqn).of, eqn.outvars)]
    scale, less, reciprocal, *zero = map(len, found)
    function = [*max(found, key=len)]

    def constant(number: int) -> int:
        function.append(Step("constant", (), float(number)))
        return len(function)

    given = zero[-1] if zero else constant(0), less, reciprocal, *map(constant, ends)
    return _Grid((*function, Step(CODES, (0, *given))), (scale, *zero[:1]))


@cache
def rounded_rows(act: Act, length: int) -> tuple[Pointwise, tuple[int, ...]]:
    """A function of a row of so many numbers: what they are on their grid.

    Returns:
      it, and which numbers of :func:`grid_numbers` meet it; none where each row has a grid of its own.
    """

    @jax.jit
    def known(x: jax.Array, *grid: jax.Array) -> tuple[jax.Array, ...]:
        scale, *others = grid or grid_numbers(steps_of(x, act, _ROWS), act)
        less, reciprocal, low, high = others
        return (round_between(by_factors(x, less, reciprocal), low, high) * scale,)

    grid = [jax.ShapeDtypeStruct((1, 1), jnp.float32)] * (5 if act.needs_range else 0)
    jaxpr = jax.make_jaxpr(known)(jax.ShapeDtypeStruct((2, length), jnp.float32), *grid).jaxpr
    (eqn,) = jaxpr.eqns
    reading = _read(eqn)
    return reading.of(eqn.outvars[0]), tuple(jaxpr.invars.index(one.value) - 1 for one in reading.beside)


def grid_numbers(steps: Steps, act: Act) -> list[jax.Array]:
    """Of a grid the scale, the two factors that stand for a division by it, and the ends in steps from 0."""
    zero = jnp.zeros_like(steps.scale) if steps.zero is None else steps.zero
    return [steps.scale, steps.less, steps.reciprocal, *(end - zero for end in act.grid.code_range)]


def _read(eqn: core.JaxprEqn) -> RowReading:
    """What a call is of the rows of its first operand."""
    number = eqn.invars[0]
    assert isinstance(number, core.Var)
    reading = RowReading(number)
    is_read = reading.read(eqn)
    assert is_read
    return reading


def _shifted(first: Pointwise, places: tuple[int, ...]) -> tuple[int, ...]:
    """Which values of two functions, one behind the other, values of the second are."""
    return tuple(i + len(first) for i in places)


def behind(first: Pointwise, varying: Sequence[bool], second: Pointwise) -> tuple[Pointwise, tuple[bool, ...]]:
    """A function of what another gives, and which of its values vary along a row; what it reads beside does not."""
    function, known = [*first], [*varying]
    for step in second:
        step = step._replace(operands=_shifted(first, step.operands))
        function.append(step)
        known.append(step_varies(step, known))
    return tuple(function), tuple(known)


_primitive = call_in_one_piece(ROUNDING_ROWS, _for_cpu)
