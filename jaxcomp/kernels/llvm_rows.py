"""Functions of rows on a CPU in one pass over memory: layer norms with what is added before, GELU with its bias.

They give floats, or codes on a grid that each row has for itself: the range of what is rounded is found on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_beside import Numbers, laid_beside
from jaxcomp.kernels.llvm_calls import Work, call_for, digest, features, missing
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, counted, element, everywhere
from jaxcomp.kernels.llvm_rowwise import Row, write_passes
from jaxcomp.kernels.row_passes import CODES, Passes
from jaxcomp.trace.pointwise import Pointwise
from jaxcomp.trace.rowwise import Axes

if TYPE_CHECKING:
    from llvmlite import ir

ROWS = 32
"""That a thread takes at a time."""
TOGETHER = 2
"""That are gone over at once."""
SHORTEST = 8
"""Row that pays."""


class How(NamedTuple):
    """What is made of rows.

    Attributes:
      shape: of their value, and of the result: rows lie along the last axis.
      function: of a row; one that ends in ``CODES`` gives int8.
      varying: for each of its values whether it varies along a row.
      beside: for each axis of the shape that of the values that meet the rows.
    """

    shape: Shape
    function: Pointwise
    varying: tuple[bool, ...]
    beside: tuple[Axes, ...]


def refusal(how: How) -> str | None:
    """Why there is no such code here; None if there is."""
    if why := missing():
        return why
    if not all(isinstance(n, int) and n > 0 for n in how.shape):
        return "there are no rows, or any number of them"
    return None if how.shape[-1] >= SHORTEST else f"rows are of {SHORTEST} numbers and more, and have {how.shape[-1]}"


def llvm_rows(how: How, x: jax.Array, *beside: jax.Array) -> jax.Array:
    """What is made of the rows of float32 numbers; what meets them is float32 or booleans."""
    (result,) = _made(how, (), x, *beside)
    return result


def llvm_row_numbers(how: How, numbers: Sequence[int], x: jax.Array, *beside: jax.Array) -> Sequence[jax.Array]:
    """The same, and some steps' numbers of each row, float32 ``(*shape[:-1], numbers)``."""
    result, found = _made(how, tuple(numbers), x, *beside)
    return result, found.reshape(*how.shape[:-1], len(numbers))


def _made(how: How, numbers: tuple[int, ...], x: jax.Array, *beside: jax.Array) -> list[jax.Array]:
    *lead, length = how.shape
    met, kinds = [], []
    for value, axes in zip(beside, how.beside, strict=True):
        y = laid_beside(value, axes, len(lead))
        step, count = _turns(y.shape[:-1], lead)
        y = y if count else jnp.broadcast_to(y, (*lead, y.shape[-1]))
        met.append(y.reshape(-1, y.shape[-1]))
        kinds.append(_Met(step, 0 if step * count == math.prod(lead) else count, y.dtype == jnp.bool_))
    lanes = 16 if "avx512f" in features() else 8
    code = _Rows(length, how.function, how.varying, tuple(kinds), lanes, numbers)
    name, count = f"rows{'_of_codes' if code.coded else ''}_{digest(code)}", math.prod(lead)
    results = [jax.ShapeDtypeStruct((count, length), jnp.int8 if code.coded else jnp.float32)]
    if numbers:
        results.append(jax.ShapeDtypeStruct((count, len(numbers)), jnp.float32))
    work = Work(name, partial(_chunk, code), ROWS, by=0, results=len(results))
    made, *others = call_for(work, results, x.reshape(count, length), *met)
    return [made.reshape(how.shape), *others]


def _turns(shape: Shape, lead: Sequence[int]) -> tuple[int, int]:
    """How many rows meet the same number one after the other, and how many numbers come in turn; or 0 of them.

    >>> _turns((2, 1, 1), (2, 3, 4)), _turns((1, 3, 4), (2, 3, 4)), _turns((1, 1, 1), (2, 3, 4))
    ((12, 2), (1, 12), (1, 1))
    >>> _turns((2, 1, 4), (2, 3, 4))
    (1, 0)
    """
    wide = [i for i, n in enumerate(shape) if n != 1]
    if not wide:
        return 1, 1
    some = slice(wide[0], wide[-1] + 1)
    if tuple(shape[some]) != tuple(lead[some]):
        return 1, 0
    return math.prod(lead[wide[-1] + 1 :]), math.prod(lead[some])


class _Met(NamedTuple):
    """A value that meets rows: so many after one another the same row of it, so many rows in turn; 0 is all of them."""

    step: int
    turns: int
    boolean: bool


class _Rows(NamedTuple):
    """What the code depends on."""

    length: int
    function: Pointwise
    varying: tuple[bool, ...]
    beside: tuple[_Met, ...]
    lanes: int
    numbers: tuple[int, ...]

    @property
    def coded(self) -> bool:
        """Whether they become codes."""
        return bool(self.function) and self.function[-1].name == CODES


def _chunk(code: _Rows, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """The rows from one to before another."""
    t, passes = Types(), Passes(code.function, code.varying, given=True, numbers=code.numbers)
    x, *beside = operands
    kept = [beside.pop()] if code.numbers else []
    w, padded = Writer(b, t), -(-code.length // code.lanes) * code.lanes
    room = w.libc("malloc", t.i64, t.word(4 * TOGETHER * passes.slots * padded))
    count = b.sdiv(b.add(b.sub(last, first), t.word(TOGETHER - 1)), t.word(TOGETHER))
    with counted(b, t.word(0), count) as group:
        rows, places = [], []
        for i in range(TOGETHER):
            at = b.add(first, b.add(b.mul(group, t.word(TOGETHER)), t.word(i)))
            at = b.select(b.icmp_signed("<", at, last), at, b.sub(last, t.word(1)))  # the last one again
            own = b.add(room, t.word(4 * i * passes.slots * padded))
            rows.append(_row(code, b, passes, at, [x, *beside], own))
            places.append(b.mul(at, t.word(len(code.numbers))))
        for place, numbers in zip(places, write_passes(b, passes, rows), strict=True):
            for found in kept:
                for i, number in enumerate(numbers):
                    b.store(number, element(b, found, b.add(place, t.word(i)), t.f32))
    w.libc("free", t.void, room)


def _row(code: _Rows, b: ir.IRBuilder, passes: Passes, at: ir.Value, operands: list[Operand], room: ir.Value) -> Row:
    """A row: its first slot is what is given, and that of the function the result; between are some of its own."""
    t, lanes = Types(), code.lanes
    x, *beside, out = operands
    start, padded = b.mul(at, t.word(code.length)), -(-code.length // lanes) * lanes
    places = {slot: Numbers(b, room).behind(t.word(slot * padded)) for slot in range(passes.slots)}
    places |= {0: Numbers(b, x.data).behind(start), passes.result: Numbers(b, out.data, code.coded).behind(start)}

    def read(slot: int, place: ir.Value, there: int) -> ir.Value:
        return places[slot].vector(place, lanes, there)

    def write(slot: int, place: ir.Value, there: int, value: ir.Value) -> None:
        places[slot].store(place, value, there)

    def load(which: int, place: ir.Value | None, there: int) -> ir.Value:
        (step, turns, boolean), operand = code.beside[which], beside[which]
        row = b.sdiv(at, t.word(step))
        row = b.srem(row, t.word(turns)) if turns else row
        numbers = Numbers(b, operand.data, boolean).behind(b.mul(row, operand.columns))
        return everywhere(b, numbers.number(t.word(0)), lanes) if place is None else numbers.vector(place, lanes, there)

    return Row(code.length, lanes, read, write, load)
