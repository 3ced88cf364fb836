"""LLVM code that finds the pixels of images that an element of a kernel meets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcomp.kernels.llvm_code import Operand, Types, element, loaded

if TYPE_CHECKING:
    from llvmlite import ir


class Pixels:
    """The pixels of images, channels last; and what lies around all of them or around each, a row of channels.

    ``sources`` are ``(windows of an image, elements of the kernel)``, as ``Window.sources`` has them; ``windows`` are
    those of all images.
    """

    def __init__(
        self, b: ir.IRBuilder, kind: ir.Type, given: tuple[Operand, Operand, Operand], windows: ir.Value
    ) -> None:
        self.b, self.t, self.kind, (self.x, self.blank, self.sources) = b, Types(), kind, given
        self.of_image = b.sdiv(self.x.rows, b.sdiv(windows, self.sources.rows))

    def place(self, image: ir.Value, window: ir.Value, tap: ir.Value) -> ir.Value:
        """Where the channels that an element of the kernel meets in a window of an image lie."""
        b, t = self.b, self.t
        source = b.sext(loaded(b, self.sources, b.add(b.mul(window, self.sources.columns), tap), t.i32), t.i64)
        pixel = b.add(b.mul(image, self.of_image), source)
        own = b.select(b.icmp_signed(">", self.blank.rows, t.word(1)), image, t.word(0))
        x, blank = (
            element(b, matrix, b.mul(row, self.x.columns), self.kind)
            for matrix, row in ((self.x, pixel), (self.blank, own))
        )
        return b.select(b.icmp_signed(">=", source, t.word(0)), x, blank)
