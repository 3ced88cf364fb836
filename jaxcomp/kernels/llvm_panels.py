"""The convolution of images by a kernel in panels on a CPU, in LLVM code: of codes sums of products of integers.

No window is gathered: an element of the kernel meets the channels of one pixel where they lie, as in the indirect
convolutions of Dukhan, The Indirect Convolution Algorithm (2019). A few windows meet a panel of features at once, four
bytes or two words of a window at all of them; what is multiplied is read once for all windows and all features of that.
Dot products of bytes (VNNI) or tiles of them (AMX) are used where a processor has them. On others products of bytes are
added up by two, in 16 bits as often as these hold them; weights of 7 and 8 bits meet words. Images of floats meet the
numbers as floats, made where they are met.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.kernels import llvm_amx
from jaxcomp.kernels.llvm_calls import Work, call, dots, features, missing
from jaxcomp.kernels.llvm_code import Operand, Types, behind, counted, element, least, row_of_words
from jaxcomp.kernels.llvm_images import Pixels
from jaxcomp.kernels.llvm_panel_floats import Floats, ManyFloats
from jaxcomp.kernels.llvm_panel_sums import VECTOR, Bytes, Dots, Given, Sums, Words
from jaxcomp.kernels.llvm_results import AS_SUMS, Kept, Requantized, Results, Written
from jaxcomp.kernels.panels import DEEP, FEATURES, PanelWeight, unit
from jaxcomp.kernels.windows import Window

if TYPE_CHECKING:
    from llvmlite import ir


class Kind(NamedTuple):
    """Of sums: which code, of how many bits, in vectors of how many."""

    code: type[Sums | ManyFloats]
    bits: int
    lanes: int


BYTES_UP_TO = 6
"""Bits of numbers of which 16 bits hold the sums of some pairs of products with bytes."""
MANY = 96
"""Windows that a thread takes at a time, by one panel."""
FEW = 64
"""Windows of floats up to which they meet numbers as these are unpacked."""


def refusal(w: PanelWeight) -> str | None:
    """Why images of floats meet no such code of a kernel on the machine that is here; None if they do."""
    if w.lead:
        return f"the kernel is a stack of shape {w.shape}, and the code takes one"
    if w.computed != jnp.float32:
        return f"its sums are in float32, and the kernel's are {w.computed}"
    return missing()


def refusal_of_codes() -> str | None:
    """Why images in codes meet no such code on the machine that is here; None if they do."""
    if why := missing():
        return why
    return None if "avx2" in features() else "it is written for processors with AVX2"


def forms_of_codes() -> str:
    """The forms of products of codes that are this code on a CPU, by backend, in words."""
    return "own" if refusal_of_codes() else "integers on cpu, own on cuda, rocm and tpu"


def llvm_panel_sums(
    x: jax.Array, zero: jax.Array | None, w: PanelWeight, window: Window, to: Requantized | None = None
) -> jax.Array:
    """The convolution of ``x - zero`` by ``numbers(w)``, exact while it is within int32.

    Args:
      x: int8 ``(images, *spatial, channels)``.
      zero: int32, one for all or one for each image, ``(images or 1,)``; None for 0.
      w: of that many channels.
      window: how it goes, of one group.
      to: what the sums become; ``zero`` is then one for all.

    Returns:
      int32 ``(images, *windows, features)``, or int8 codes.
    """
    offset, more = jnp.zeros(1, jnp.int32) if zero is None else zero, more_of(w.bits, _windows(x, window))
    blank = jnp.broadcast_to(offset.astype(jnp.int8)[:, None], (offset.shape[0], w.filled))
    off = (offset + more)[:, None] * w.totals[None]
    results = AS_SUMS if to is None else to.written(off[0], w.codes.shape[0] * FEATURES)
    sums = partial(sums_of_codes, w.bits, results=results, pointwise=window.pointwise)
    y = _called(sums, x, blank, w, window)
    if to or (zero is None and not more):
        return y
    return y - off.reshape(-1, *[1] * (x.ndim - 2), w.features)


def llvm_panel_product(x: jax.Array, w: PanelWeight, window: Window) -> jax.Array:
    """The convolution by ``values(w)`` with sums in float32.

    Args:
      x: ``(images, *spatial, channels)``, float.
      w: of that many channels, that :func:`refusal` lets through.
      window: how it goes, of one group.

    Returns:
      ``(images, *windows, features)``, float32.
    """
    many = _windows(x, window) > FEW
    kind = Kind(ManyFloats if many else Floats, w.bits, FEATURES if "avx512f" in features() else VECTOR)
    blank = jnp.zeros((1, w.filled), jnp.float32)
    y = _called(partial(panel_sums, kind), x.astype(jnp.float32), blank, w, window)
    return y * w.scale.reshape(*[1] * (x.ndim - 1), w.features)


def _windows(x: jax.Array, window: Window) -> int:
    """Of all images."""
    return math.prod(window.result(x.shape, 1))


def _called(
    sums: Callable[[*Given], jax.Array], x: jax.Array, blank: jax.Array, w: PanelWeight, window: Window
) -> jax.Array:
    """``(images, *windows, features)``; ``blank`` is what lies around all images, or around each."""
    images, *spatial, channels = x.shape
    x, sources = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.filled - channels)]), window.sources(spatial)
    of_all, panels = images * sources.shape[0], w.codes.shape[0]
    y = sums(x, (blank, jnp.asarray(sources)), w.codes, (1, of_all, panels))
    return y[:, : w.features].reshape(window.result((images, *spatial, channels), w.features))


def sums_of_codes(bits: int, *given: *Given, results: Written = AS_SUMS, pointwise: bool = False) -> jax.Array:
    """The sums of products of codes, :func:`more_of` added to each, and panels, as this processor makes them fastest.

    Args:
      bits: of the panels' numbers.
      given: as :func:`panel_sums` takes them, images and what lies around them int8.
      results: how they are written.
      pointwise: whether each window is the pixel of its own number, all of it.

    Returns:
      int32 ``(matrices * windows, 16 panels)``, exact while within int32; or codes of them.
    """
    x, (blank, sources), codes, wanted = given
    if not llvm_amx.refusal(wanted[1]):
        return llvm_amx.amx_sums(bits, *given, results=results, pointwise=pointwise)
    kind = _kind(bits)
    if kind.code is Words:
        x, blank = x.astype(jnp.int16), blank.astype(jnp.int16)
    else:
        x, blank = (jax.lax.bitcast_convert_type(v, jnp.uint8) ^ jnp.uint8(128) for v in (x, blank))
    return panel_sums(kind, x, (blank, sources), codes, wanted, results=results)


def more_of(bits: int, windows: int) -> int:
    """What codes are more where so many windows of them meet panels, for the instructions of this processor."""
    return 0 if not llvm_amx.refusal(windows) or _kind(bits).code is Words else 128


def _kind(bits: int) -> Kind:
    """Of sums, by what this processor can do."""
    if lanes := dots() // DEEP:
        return Kind(Dots, bits, lanes)
    return Kind(Words if bits > BYTES_UP_TO else Bytes, bits, VECTOR)


def panel_sums(kind: Kind, *given: *Given, results: Written = AS_SUMS) -> jax.Array:
    """The sums of a kind, ``(matrices * windows, 16 panels)``, of windows and panels; or codes of them."""
    x, around, codes, (batch, windows, panels) = given
    at_once = kind.code.panels(kind.lanes)
    parts, sides = -(-windows // MANY), -(-panels // at_once)
    number = jnp.arange(batch * parts * sides, dtype=jnp.int32)
    one, part, side = number // (parts * sides), number // sides % parts, number % sides
    first, stop = one * windows + part * MANY, (one + 1) * windows
    tasks = jnp.stack([one * panels + side * at_once, first, jnp.minimum(first + MANY, stop)], 1)
    name = f"panels_{kind.code.__name__}_{kind.bits}_{kind.lanes}{results.kept.name}"
    result = jax.ShapeDtypeStruct((batch * windows, panels * FEATURES), results.dtype(kind.code.dtype))
    work = Work(name, partial(_panels, kind, results.kept), 1, by=4)
    return call(work, result, x, *around, codes, tasks, *results.operands)


class _At(NamedTuple):
    """A window: its row among all, its image, and its row among the image's."""

    row: ir.Value
    image: ir.Value
    window: ir.Value


def _panels(kind: Kind, kept: Kept, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some tasks: a panel of features, and the windows from one to before another."""
    x, blank, sources, codes, tasks, *results = operands
    sums = kind.code(kind.bits, kind.lanes, b)
    group = _Group(sums, b, [x, blank, sources, codes], Results(b, results, sums.lanes, kept))
    with counted(b, first, last) as task:
        group.write_all(*row_of_words(b, tasks, task, 3))


class _Group:
    """Writes the code of a few windows by one panel."""

    def __init__(self, sums: Sums | ManyFloats, b: ir.IRBuilder, operands: list[Operand], results: Results) -> None:
        self.sums, self.b, self.t = sums, b, Types()
        self.x, self.blank, self.sources, self.codes = operands
        self.results, self.out = results, results.out
        self.pixels = Pixels(b, sums.kind, (self.x, self.blank, self.sources), self.out.rows)
        self.blocks = b.sdiv(self.x.columns, self.t.word(unit(sums.bits)))

    def write_all(self, panel: ir.Value, start: ir.Value, stop: ir.Value) -> None:
        """The sums of windows from one to before another."""
        b, t, sums = self.b, self.t, self.sums
        count = b.sdiv(b.add(b.sub(stop, start), t.word(sums.rows - 1)), t.word(sums.rows))
        panels = self._panels(panel)
        codes = [element(b, self.codes, b.mul(one, self.codes.columns), t.i8) for one in panels]
        size = b.mul(self.blocks, t.word(sums.size))
        if isinstance(sums, ManyFloats):
            # The numbers of a piece of the channels become floats once for all windows.
            with counted(b, t.word(0), self.sources.columns) as tap, sums.pieces(self.blocks) as (begin, end):
                here = [behind(b, place, b.mul(tap, size)) for place in codes]
                channel = sums.unpacked(here, begin, end)
                fresh = b.icmp_signed("==", b.add(tap, begin), t.word(0))
                with counted(b, t.word(0), count) as number:
                    rows = self._rows(b.add(start, b.mul(number, t.word(sums.rows))), stop)
                    places = [self._places(panels, row) for row in rows]
                    sums.add_up([self.pixels.place(row.image, row.window, tap) for row in rows], channel, places, fresh)
            return
        with counted(b, t.word(0), count) as number:
            rows = self._rows(b.add(start, b.mul(number, t.word(sums.rows))), stop)
            sums.begin()
            with counted(b, t.word(0), self.sources.columns) as tap:
                pixels = [self.pixels.place(row.image, row.window, tap) for row in rows]
                here = behind(b, codes[0], b.mul(tap, size))
                with sums.each(self.blocks) as block:
                    sums.add(block, here, pixels)
            columns = self._columns(panels)
            needed = [self.results.of_features(column) for column in columns]
            for i, row in enumerate(rows):
                of_row = self.results.of_row(row.row)
                for total, of_features, column in zip(sums.ended(i), needed, columns, strict=True):
                    self.results.write(total, of_features, of_row, (row.row, column))

    def _panels(self, panel: ir.Value) -> list[ir.Value]:
        """Those that windows meet at once: the last of a matrix again where there are no more."""
        b, t, across = self.b, self.t, self._across()
        last = b.sub(b.mul(b.add(b.sdiv(panel, across), t.word(1)), across), t.word(1))
        found = [b.add(panel, t.word(i)) for i in range(self.sums.panels(self.sums.lanes))]
        return [panel, *(least(b, one, last) for one in found[1:])]

    def _across(self) -> ir.Value:
        """Panels of a matrix."""
        return self.b.sdiv(self.out.columns, self.t.word(FEATURES))

    def _columns(self, panels: list[ir.Value]) -> list[ir.Value]:
        """The first column of each vector of a window's sums."""
        b, t = self.b, self.t
        starts = [b.mul(b.srem(panel, self._across()), t.word(FEATURES)) for panel in panels]
        return [b.add(start, t.word(i)) for start in starts for i in range(0, FEATURES, self.sums.lanes)]

    def _places(self, panels: list[ir.Value], row: _At) -> list[ir.Value]:
        """Where the sums of a window are, by vectors."""
        b, start = self.b, self.b.mul(row.row, self.out.columns)
        return [element(b, self.out, b.add(start, column), self.t.i32) for column in self._columns(panels)]

    def _rows(self, first: ir.Value, stop: ir.Value) -> list[_At]:
        b, t, windows = self.b, self.t, self.sources.rows
        image = b.sdiv(first, windows)
        found = [_At(first, image, b.sub(first, b.mul(image, windows)))]
        for _ in range(self.sums.rows - 1):
            at = found[-1]
            row, window = b.add(at.row, t.word(1)), b.add(at.window, t.word(1))
            over = b.icmp_signed("==", window, windows)
            after = _At(row, b.add(at.image, b.zext(over, t.i64)), b.select(over, t.word(0), window))
            there = b.icmp_signed("<", row, stop)
            found.append(_At(*(b.select(there, new, old) for new, old in zip(after, at, strict=True))))
        return found
