"""Heads of attention in floats: where they lie, and in LLVM code keys and values laid out for many queries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_beside import Numbers
from jaxcomp.kernels.llvm_code import Types, counted, least, turned
from jaxcomp.kernels.llvm_numbers import constant, fma
from jaxcomp.trace.pointwise import Pointwise

if TYPE_CHECKING:
    from llvmlite import ir

QUERIES = 256
"""Queries of a head for which its keys and values are laid out."""

Strides = tuple[int, ...]
"""Numbers from one index of each axis of the scores to the next."""


class Place(NamedTuple):
    """Steps along the axes of the scores, and from one feature to the next."""

    along: Strides
    width: int


class Heads(NamedTuple):
    """What the code depends on.

    Attributes:
      sizes: of the scores.
      keys, queries: the axes of the scores that these are; along the others are heads.
      widths: of keys and of values.
      q, k, v, result: where they are.
      beside: of the values that meet the scores the steps, and whether they are booleans.
      function: what is made of the scores.
      varying: for each of its values whether it varies along a row.
      lanes: numbers of a vector.
      several: vectors of keys that queries meet at once.
      most: vectors of values, at most.
    """

    sizes: Shape
    keys: int
    queries: int
    widths: tuple[int, int]
    q: Place
    k: Place
    v: Place
    result: Place
    beside: tuple[tuple[Strides, bool], ...]
    function: Pointwise
    varying: tuple[bool, ...]
    lanes: int
    several: int
    most: int

    @property
    def blocks(self) -> int:
        """Parts of the queries of a head."""
        return -(-self.sizes[self.queries] // QUERIES)

    @property
    def chunks(self) -> int:
        """Such parts, of all heads."""
        return self.blocks * math.prod(n for i, n in enumerate(self.sizes) if i not in (self.keys, self.queries))


class Laid:
    """Keys and values of a head in memory of their own.

    Panels of keys are some vectors of them for each feature of theirs. Values lie one after the other; of those of each
    panel it is known what the weight 0 makes of them: 0, unless one is no finite number.

    Args:
      code: what is known of them.
      b: the code that is written.

    Attributes:
      panel, panels: keys of a panel, and how many there are.
      padded: keys that have room.
      keys, values, unseen: where they are, once they are laid out.
    """

    keys: Numbers
    values: Numbers
    unseen: Numbers

    def __init__(self, code: Heads, b: ir.IRBuilder) -> None:
        self.code, self.b, self.t = code, b, Types()
        self.length, self.lanes, self.panel = code.sizes[code.keys], code.lanes, code.several * code.lanes
        self.panels = -(-self.length // self.panel)
        self.padded = self.panels * self.panel

    @property
    def room(self) -> int:
        """Numbers that they take."""
        return self.padded * sum(self.code.widths) + self.panels * self.code.widths[1]

    def lay(self, room: Numbers, keys: Numbers, values: Numbers) -> None:
        """Lays them out there."""
        self.keys = room
        self.values = self.keys.behind(self.t.word(self.padded * self.code.widths[0]))
        self.unseen = self.values.behind(self.t.word(self.padded * self.code.widths[1]))
        self._lay_keys(keys)
        self._lay_values(values)

    def of(self, panel: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first key of a panel, and the one behind its last."""
        first = self.b.mul(panel, self.t.word(self.panel))
        return first, least(self.b, self.b.add(first, self.t.word(self.panel)), self.t.word(self.length))

    def _lay_keys(self, given: Numbers) -> None:
        """The last key stands for those beyond."""
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        step, last = t.word(code.k.along[code.keys]), t.word(self.length - 1)
        with counted(b, t.word(0), t.word(self.padded // lanes)) as group:
            panel, place = (f(group, t.word(code.several)) for f in (b.sdiv, b.srem))
            to = b.add(b.mul(panel, t.word(code.widths[0] * self.panel)), b.mul(place, t.word(lanes)))
            first = b.mul(group, t.word(lanes))
            keys = [b.mul(least(b, b.add(first, t.word(i)), last), step) for i in range(lanes)]
            with counted(b, t.word(0), t.word(code.widths[0] // lanes)) as part:
                at = b.mul(part, t.word(lanes))
                square = turned(b, [given.vector(b.add(key, at), lanes, lanes) for key in keys])
                for i, column in enumerate(square):
                    index = b.add(to, b.mul(b.add(at, t.word(i)), t.word(self.panel)))
                    self.keys.store(index, column, lanes)

    def _lay_values(self, given: Numbers) -> None:
        from llvmlite import ir

        b, t, code, lanes, width = self.b, self.t, self.code, self.lanes, self.code.widths[1]
        kind = ir.VectorType(t.f32, lanes)
        with b.goto_entry_block():
            unseen = [b.alloca(kind) for _ in range(width // lanes)]
        with counted(b, t.word(0), t.word(self.panels)) as panel:
            for place in unseen:
                b.store(kind(None), place)
            with counted(b, *self.of(panel)) as key:
                where, to = b.mul(key, t.word(code.v.along[code.keys])), b.mul(key, t.word(width))
                for i, place in enumerate(unseen):
                    value = given.vector(b.add(where, t.word(i * lanes)), lanes, lanes)
                    self.values.store(b.add(to, t.word(i * lanes)), value, lanes)
                    b.store(fma(b, value, constant(kind, 0.0), b.load(place, typ=kind)), place)
            for i, place in enumerate(unseen):
                index = b.add(b.mul(panel, t.word(width)), t.word(i * lanes))
                self.unseen.store(index, b.load(place, typ=kind), lanes)
