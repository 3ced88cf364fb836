"""The convolution of images of codes by a kernel with one channel a feature on a CPU, in LLVM code: exact sums.

Elements of the kernel meet the pixels where they lie, two at a time, or four where the processor has dot products of
bytes (VNNI): their products are one operation. No image is padded, widened or shifted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.llvm_calls import Work, call, dots, features, missing, parts
from jaxcomp.kernels.llvm_code import Operand, Types, behind, beside, counted, element, intrinsic, least, row_of_words
from jaxcomp.kernels.llvm_images import Pixels
from jaxcomp.kernels.llvm_numbers import constant, dot
from jaxcomp.kernels.llvm_results import AS_SUMS, Kept, Requantized, Results
from jaxcomp.kernels.windows import Window

if TYPE_CHECKING:
    from llvmlite import ir

CHANNELS = 16
"""That are summed together."""
TAPS = 64
"""Elements of a kernel at most: all stand in the code."""
TOGETHER = 2**14
"""Sums that a thread makes at a time, about."""


def refusal(kernel: Shape, groups: int) -> str | None:
    """Why no images in codes meet such code of a kernel on the machine that is here; None if they do.

    Args:
      kernel: its shape, ``(taps, channels of a group, features)``.
      groups: of features.
    """
    if why := missing():
        return why
    if "avx2" not in features():
        return "it is written for processors with AVX2"
    taps, channels, made = kernel
    if channels != 1 or made != groups:
        return f"it takes a channel a feature, and {groups} groups have {channels}, {made} features in all"
    return None if 0 < taps <= TAPS else f"it takes kernels of {TAPS} elements, and there are {taps}"


def llvm_depthwise_sums(
    x: jax.Array, zero: jax.Array | None, kernel: jax.Array, window: Window, to: Requantized | None = None
) -> jax.Array:
    """The convolution of ``x - zero`` by a kernel that :func:`refusal` lets through; exact.

    Args:
      x: int8 ``(images, *spatial, channels)``, none of them 0.
      zero: int32, one for all or one for each image, ``(images or 1,)``; None for 0.
      kernel: int8 ``(taps, channels)``.
      window: how it goes.
      to: what the sums become; ``zero`` is then one for all.

    Returns:
      int32 ``(images, *windows, channels)``, or int8 codes.
    """
    shape, channels = x.shape, x.shape[-1]
    offset = jnp.zeros(1, jnp.int32) if zero is None else zero
    filled = max(CHANNELS, channels)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filled - channels)])
    blank = jnp.broadcast_to(offset.astype(jnp.int8)[:, None], (offset.shape[0], filled))
    taps, sources = kernel.shape[0], window.sources(shape[1:-1])
    kind, lanes = (_Dots, dots() // 4) if dots() else (_Words, CHANNELS // 2)
    some = kind.together
    wide = jnp.pad(kernel, ((0, -taps % some), (0, filled - channels)))
    weights = jnp.swapaxes(wide.reshape(-1, some, filled), 1, 2).reshape(-1, some * filled).astype(kind.dtype)
    of_all = shape[0] * sources.shape[0]
    tasks = parts(of_all, max(1, TOGETHER // filled))
    off = (offset + kind.more)[:, None] * kernel.astype(jnp.int32).sum(0)[None]
    results = AS_SUMS if to is None else to.written(off[0], filled)
    chunk = partial(_summed, kind, lanes, taps, results.kept)
    work = Work(f"depthwise{kind.__name__}_{lanes}_{taps}{results.kept.name}", chunk, 1, by=4)
    result = jax.ShapeDtypeStruct((of_all, filled), results.kept.dtype)
    y = call(work, result, x, blank, jnp.asarray(sources), weights, tasks, *results.operands)
    y = y[:, :channels].reshape(window.result(shape, channels))
    return y if to or (zero is None and not kind.more) else y - off.reshape(-1, *[1] * (x.ndim - 2), channels)


def _summed(
    kind: type[_Windows],
    lanes: int,
    taps: int,
    kept: Kept,
    b: ir.IRBuilder,
    operands: list[Operand],
    first: ir.Value,
    last: ir.Value,
) -> None:
    """Some tasks: windows from one to before another."""
    x, blank, sources, weights, tasks, *results = operands
    windows = kind(lanes, taps, b, [x, blank, sources, weights], Results(b, results, lanes, kept))
    with counted(b, first, last) as task:
        begin, end = row_of_words(b, tasks, task, 2)
        with counted(b, begin, end) as window:
            windows.write(window)


class _Windows(ABC):
    """Writes the code of one window and all channels.

    Attributes:
      together: elements of the kernel whose products are one operation.
      dtype: of weights.
      more: what codes of images are more when they are multiplied.
    """

    together: ClassVar[int]
    dtype: ClassVar[DType]
    more: ClassVar[int]

    def __init__(self, lanes: int, taps: int, b: ir.IRBuilder, operands: list[Operand], results: Results) -> None:
        from llvmlite import ir

        self.lanes, self.taps, self.b, self.t = lanes, taps, b, Types()
        self.x, self.blank, self.sources, self.weights = operands
        self.results = results
        self.pixels = Pixels(b, self.t.i8, (self.x, self.blank, self.sources), results.out.rows)
        self.channels = self.x.columns
        self.wide, self.bytes = ir.VectorType(self.t.i32, lanes), ir.VectorType(self.t.i8, CHANNELS)

    def write(self, row: ir.Value) -> None:
        """All sums of a row of the result."""
        b, t = self.b, self.t
        image = b.sdiv(row, self.sources.rows)
        window = b.sub(row, b.mul(image, self.sources.rows))
        pixels = [self.pixels.place(image, window, self.t.word(tap)) for tap in range(self.taps)]
        most = b.sub(self.channels, t.word(CHANNELS))
        count = b.sdiv(b.add(self.channels, t.word(CHANNELS - 1)), t.word(CHANNELS))
        with counted(b, t.word(0), count) as number:
            at = b.mul(number, t.word(CHANNELS))
            at = least(b, at, most)
            for part, total in enumerate(self._sums(pixels, at)):
                column = b.add(at, t.word(part * self.lanes))
                self.results.write(total, self.results.of_features(column), [], (row, column))

    def _sums(self, pixels: list[ir.Value], at: ir.Value) -> list[ir.Value]:
        """Of a few channels from there on, by vectors."""
        from llvmlite import ir

        b, t = self.b, self.t
        totals: list[ir.Value] = [self.wide(None)] * (CHANNELS // self.lanes)
        channels = [b.load(behind(b, p, at), typ=self.bytes, align=1) for p in pixels]
        for group, first in enumerate(range(0, self.taps, self.together)):
            some = [channels[min(first + i, self.taps - 1)] for i in range(self.together)]
            while len(some) > 1:
                some = [beside(b, x, y) for x, y in zip(some[::2], some[1::2], strict=True)]
            row = b.mul(t.word(group), self.weights.columns)
            for part, total in enumerate(totals):
                start = part * self.lanes
                order = [i * CHANNELS + start + j for j in range(self.lanes) for i in range(self.together)]
                codes = b.shuffle_vector(some[0], some[0], ir.Constant(ir.VectorType(t.i32, len(order)), order))
                index = b.add(row, b.mul(b.add(at, t.word(start)), t.word(self.together)))
                totals[part] = self._added(total, codes, index)
        return totals

    @abstractmethod
    def _added(self, total: ir.Value, codes: ir.Value, index: ir.Value) -> ir.Value:
        """The total with the products of codes and the weights from an index on."""


class _Words(_Windows):
    """Of two elements, in words."""

    together, dtype, more = 2, jnp.dtype(jnp.int16), 0

    def _added(self, total: ir.Value, codes: ir.Value, index: ir.Value) -> ir.Value:
        from llvmlite import ir

        b, words = self.b, ir.VectorType(ir.IntType(16), codes.type.count)
        weights = b.load(element(b, self.weights, index, words.element), typ=words, align=2)
        return b.add(total, intrinsic(b, "llvm.x86.avx2.pmadd.wd", self.wide, b.sext(codes, words), weights))


class _Dots(_Windows):
    """Of four elements, by the processor's dot products of bytes, of which the first are from 0 on."""

    together, dtype, more = 4, jnp.dtype(jnp.int8), 128

    def _added(self, total: ir.Value, codes: ir.Value, index: ir.Value) -> ir.Value:
        b, shifted = self.b, self.b.xor(codes, constant(codes.type, 128))
        weights = b.load(element(b, self.weights, index, self.t.i8), typ=codes.type, align=1)
        return dot(b, total, b.bitcast(shifted, self.wide), b.bitcast(weights, self.wide))
