"""The convolution of floats and a sparse kernel on a CPU: each number that is kept meets a run of its channel's plane.

As in the sparse convolutions of Elsen et al., Fast Sparse ConvNets (2020), channels lie apart, and a number is read
once and multiplied by a vector of windows; unlike there, kernels are of any size, for what an element of a kernel meets
is one run of a plane (:class:`~jaxcomp.kernels.windows.Planes`). Images come and results go with channels last: both
are turned here, 8 by 8 numbers at a time, for XLA's own transpositions take as long as the product.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_calls import Work, call
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, everywhere, least, loaded, turned
from jaxcomp.kernels.llvm_kept import Kept
from jaxcomp.kernels.sparse import SparseWeight
from jaxcomp.kernels.windows import Planes, Window

if TYPE_CHECKING:
    from llvmlite import ir

PANELS = (8, 16, 24, 32, 48, 64)
"""Steps that are summed together."""
FEATURES = 16
"""What a thread makes at a time: so many features."""
TURNED = 8
"""Numbers along each side of what is turned."""
STEPS = 256
"""And of the planes so many steps, about."""
MOST = 2**31 - 1
"""Positions in planes are int32."""


def refusal(shape: Shape, window: Window) -> str | None:
    """Why no images of this shape can be convolved, by any kernel; None if they can."""
    if not all(isinstance(n, int) for n in shape):
        return "the images are any number, and it counts them"
    size = Planes(window, shape).size
    return None if size <= MOST else f"the images are {size} numbers with their margins, and it counts to {MOST}"


def llvm_convolution(x: jax.Array, w: SparseWeight, window: Window) -> jax.Array:
    """The convolution by ``values(w)`` with sums in float32.

    Args:
      x: ``(images, *spatial, channels)``.
      w: ``(features, length)``, that ``llvm_sparse.refusal`` lets through; along ``length`` the elements of the kernel
        before the channels of a group.
      window: how it goes.

    Returns:
      ``(images, *windows, features)``, float32.
    """
    planes, features = Planes(window, x.shape), w.shape[0]
    panel = min(PANELS, key=lambda size: -(-planes.span // size) * (size + _OVERHEAD))
    flat = jnp.pad(x.astype(jnp.float32).reshape(-1, planes.channels), ((0, 0), (0, -planes.channels % TURNED)))
    sources = planes.sources().reshape(-1, TURNED)
    # A panel may read beyond the last plane, for steps that are no window.
    rows = flat.shape[1] * planes.phases + -(-panel // planes.length)
    fill = Work("planes", _filled, STEPS // TURNED, by=1)
    laid = call(fill, jax.ShapeDtypeStruct((rows, planes.length), jnp.float32), flat, sources)

    kept = Kept.of(w)
    targets, whole = planes.targets(panel), -(-features // TURNED) * TURNED
    tasks = _tasks(features, targets.shape[0], max(1, STEPS // panel))
    work = Work(f"convolution_{kept}_{panel}", partial(_summed, panel, kept), 1, by=7)
    windows = planes.images * math.prod(planes.windows)
    result = jax.ShapeDtypeStruct((windows, whole), jnp.float32)
    offsets, bases = (jnp.asarray(v)[None] for v in (planes.offsets(), planes.bases(features)))
    y = call(work, result, laid, *kept.operands(w), offsets, bases, targets, tasks)
    y = y[:, :features] if w.scale is None else y[:, :features] * w.scale.T
    return y.reshape(window.result(x.shape, features))


_OVERHEAD = 12
"""What a panel costs beside its steps, in steps."""


def _tasks(features: int, panels: int, most: int) -> jax.Array:
    """What threads make: the first feature, the first panel, and the one behind the last."""
    found = [
        (feature, panel, min(panel + most, panels))
        for panel in range(0, panels, most)
        for feature in range(0, features, FEATURES)
    ]
    return jnp.asarray(np.array(found, np.int32))


def _filled(b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some steps of the planes of all channels: from images with channels last, each step's element in ``sources``."""
    from llvmlite import ir

    x, sources, out = operands
    t, wide = Types(), ir.VectorType(Types().f32, TURNED)
    planes = b.sdiv(b.mul(sources.rows, t.word(TURNED)), out.columns)  # a channel's
    zeros = _zeros(b, wide)
    with counted(b, first, last) as row:
        step = b.mul(row, t.word(TURNED))
        read = [loaded(b, sources, b.add(step, t.word(i)), t.i32) for i in range(TURNED)]
        with counted(b, t.word(0), b.sdiv(x.columns, t.word(TURNED))) as part:
            channel = b.mul(part, t.word(TURNED))
            numbers = []
            for at in read:
                place = element(b, x, b.add(b.mul(b.sext(at, t.i64), x.columns), channel), t.f32)
                there = b.select(b.icmp_signed(">=", at, t.i32(0)), place, zeros)
                numbers.append(b.load(there, typ=wide, align=4))
            for i, vector in enumerate(turned(b, numbers)):
                plane = b.mul(b.mul(b.add(channel, t.word(i)), planes), out.columns)
                b.store(vector, element(b, out, b.add(plane, step), t.f32), align=4)


def _summed(panel: int, kept: Kept, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some tasks: sums of a few features and panels, turned to features last where they are windows."""
    x, *numbers, offsets, bases, targets, tasks, out = operands
    t, features = Types(), bases.columns
    with b.goto_entry_block():
        block = Operand(b.ptrtoint(b.alloca(t.f32, FEATURES * panel), t.i64), t.word(FEATURES), t.word(panel))
    with counted(b, first, last) as task:
        low, start, stop = (
            b.sext(loaded(b, tasks, b.add(b.mul(task, t.word(3)), t.word(i)), t.i32), t.i64) for i in range(3)
        )
        high = b.add(low, t.word(FEATURES))
        high = least(b, high, features)
        with counted(b, start, stop) as number:
            with counted(b, low, high) as feature:
                at = b.add(b.sext(loaded(b, bases, feature, t.i32), t.i64), b.mul(number, t.word(panel)))
                sums = _Sums(b, panel)
                with kept.each(b, numbers, feature) as (position, value):
                    run = b.add(at, b.sext(loaded(b, offsets, position, t.i32), t.i64))
                    sums.add(value, element(b, x, run, t.f32))
                sums.store(element(b, block, b.mul(b.sub(feature, low), t.word(panel)), t.f32))
            parts = b.sdiv(b.add(b.sub(high, low), t.word(TURNED - 1)), t.word(TURNED))
            with counted(b, t.word(0), parts) as part:
                _put(b, panel, block, part, (targets, number), (out, low))


def _put(
    b: ir.IRBuilder,
    panel: int,
    block: Operand,
    part: ir.Value,
    to: tuple[Operand, ir.Value],
    result: tuple[Operand, ir.Value],
) -> None:
    """Eight features of a block, steps of a panel, to the windows of the result that these steps are."""
    from llvmlite import ir

    t, wide, (targets, number), (out, low) = Types(), ir.VectorType(Types().f32, TURNED), to, result
    nowhere, row = _zeros(b, wide), b.mul(part, t.word(TURNED))
    with counted(b, t.word(0), t.word(panel // TURNED)) as some:
        step = b.mul(some, t.word(TURNED))
        numbers = [
            b.load(
                element(b, block, b.add(b.mul(b.add(row, t.word(i)), t.word(panel)), step), t.f32), typ=wide, align=4
            )
            for i in range(TURNED)
        ]
        first = b.add(b.mul(number, t.word(panel)), step)
        for i, vector in enumerate(turned(b, numbers)):
            window = loaded(b, targets, b.add(first, t.word(i)), t.i32)
            place = b.add(b.add(b.mul(b.sext(window, t.i64), out.columns), low), row)
            there = b.select(b.icmp_signed(">=", window, t.i32(0)), element(b, out, place, t.f32), nowhere)
            b.store(vector, there, align=4)


class _Sums:
    """Sums of a panel, in vectors."""

    def __init__(self, b: ir.IRBuilder, panel: int) -> None:
        from llvmlite import ir

        self.b, self.width = b, 8 if panel % 16 else 16
        self.kind = ir.VectorType(Types().f32, self.width)
        with b.goto_entry_block():
            self.totals = [b.alloca(self.kind) for _ in range(panel // self.width)]
        for total in self.totals:
            b.store(ir.Constant(self.kind, None), total)

    def add(self, number: ir.Value, run: ir.Value) -> None:
        """A number times what begins there."""
        b, wide = self.b, everywhere(self.b, number, self.width)
        for i, total in enumerate(self.totals):
            x = b.load(self._at(run, i), typ=self.kind, align=4)
            product = b.fmul(wide, x, flags=("contract",))
            b.store(b.fadd(b.load(total, typ=self.kind), product, flags=("contract",)), total)

    def store(self, place: ir.Value) -> None:
        """Writes the sums."""
        for i, total in enumerate(self.totals):
            self.b.store(self.b.load(total, typ=self.kind), self._at(place, i), align=4)

    def _at(self, place: ir.Value, i: int) -> ir.Value:
        return self.b.gep(place, [Types().word(i * self.width)], source_etype=Types().f32)


def _zeros(b: ir.IRBuilder, wide: ir.Type) -> ir.Value:
    """A place of zeros, which also takes what belongs nowhere."""
    from llvmlite import ir

    with b.goto_entry_block():
        place = b.alloca(wide)
        b.store(ir.Constant(wide, None), place)
    return place
