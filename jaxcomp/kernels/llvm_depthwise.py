"""The convolution of images of codes by a kernel with one channel a feature on a CPU, in LLVM code: exact sums.

Elements of the kernel meet the pixels where they lie, two at a time: their products are one operation of the processor.
No image is padded, widened or shifted.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_calls import Work, call, features, missing, parts
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, intrinsic, row_of_words
from jaxcomp.kernels.llvm_images import Pixels
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


def llvm_depthwise_sums(x: jax.Array, zero: jax.Array | None, kernel: jax.Array, window: Window) -> jax.Array:
    """The convolution of ``x - zero`` by a kernel that :func:`refusal` lets through; exact.

    Args:
      x: int8 ``(images, *spatial, channels)``, none of them 0.
      zero: int32, one for all or one for each image, ``(images or 1,)``; None for 0.
      kernel: int8 ``(taps, channels)``.
      window: how it goes.

    Returns:
      int32 ``(images, *windows, channels)``.
    """
    shape, channels = x.shape, x.shape[-1]
    offset = jnp.zeros(1, jnp.int32) if zero is None else zero
    filled = max(CHANNELS, channels)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filled - channels)])
    blank = jnp.broadcast_to(offset.astype(jnp.int8)[:, None], (offset.shape[0], filled))
    taps, sources = kernel.shape[0], window.sources(shape[1:-1])
    wide = jnp.pad(kernel, ((0, taps % 2), (0, filled - channels))).astype(jnp.int16)
    pairs = jnp.swapaxes(wide.reshape(-1, 2, filled), 1, 2).reshape(-1, 2 * filled)
    of_all = shape[0] * sources.shape[0]
    tasks = parts(of_all, max(1, TOGETHER // filled))
    work = Work(f"depthwise_{taps}", partial(_summed, taps), 1, by=4)
    result = jax.ShapeDtypeStruct((of_all, filled), jnp.int32)
    y = call(work, result, x, blank, jnp.asarray(sources), pairs, tasks)
    y = y[:, :channels].reshape(window.result(shape, channels))
    if zero is None:
        return y
    share = zero[:, None] * kernel.astype(jnp.int32).sum(0)[None]
    return y - share.reshape(-1, *[1] * (x.ndim - 2), channels)


def _summed(taps: int, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some tasks: windows from one to before another."""
    *given, tasks, out = operands
    windows = _Windows(taps, b, [*given, out])
    with counted(b, first, last) as task:
        begin, end = row_of_words(b, tasks, task, 2)
        with counted(b, begin, end) as window:
            windows.write(window)


class _Windows:
    """Writes the code of one window and all channels."""

    def __init__(self, taps: int, b: ir.IRBuilder, operands: list[Operand]) -> None:
        from llvmlite import ir

        self.taps, self.b, self.t = taps, b, Types()
        self.x, self.blank, self.sources, self.pairs, self.out = operands
        self.pixels = Pixels(b, self.t.i8, (self.x, self.blank, self.sources), self.out.rows)
        self.channels = self.x.columns
        self.wide = ir.VectorType(self.t.i32, CHANNELS // 2)
        self.words = ir.VectorType(ir.IntType(16), CHANNELS)
        self.bytes = ir.VectorType(self.t.i8, CHANNELS)

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
            at = b.select(b.icmp_signed("<", at, most), at, most)
            for half, total in enumerate(self._sums(pixels, at)):
                column = b.add(at, t.word(half * CHANNELS // 2))
                place = element(b, self.out, b.add(b.mul(row, self.channels), column), t.i32)
                b.store(total, place, align=4)

    def _sums(self, pixels: list[ir.Value], at: ir.Value) -> list[ir.Value]:
        """Of a few channels from there on, in two halves."""
        from llvmlite import ir

        b, t = self.b, self.t
        totals = [self.wide(None), self.wide(None)]
        channels = [b.load(b.gep(p, [at], source_etype=t.i8), typ=self.bytes, align=1) for p in pixels]
        for pair in range(-(-self.taps // 2)):
            x, y = channels[2 * pair], channels[min(2 * pair + 1, self.taps - 1)]
            for half in (0, 1):
                first = range(half * CHANNELS // 2, (half + 1) * CHANNELS // 2)
                order = [i for j in first for i in (j, CHANNELS + j)]
                both = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(t.i32, CHANNELS), order))
                index = b.add(
                    b.mul(t.word(pair), self.pairs.columns), b.add(b.mul(at, t.word(2)), t.word(half * CHANNELS))
                )
                place = element(b, self.pairs, index, ir.IntType(16))
                weight = b.load(place, typ=self.words, align=2)
                products = intrinsic(b, "llvm.x86.avx2.pmadd.wd", self.wide, b.sext(both, self.words), weight)
                totals[half] = b.add(totals[half], products)
        return totals
