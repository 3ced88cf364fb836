"""The windows of a convolution: where a kernel's numbers meet an image, as positions in planes of its channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.types import Shape
from jaxcomp.trace.flow import Op
from jaxcomp.trace.walk import shape_of


@dataclass(frozen=True)
class Window:
    """How a convolution of images ``(images, *spatial, channels)`` goes, an element of each for each spatial axis.

    Attributes:
      kernel: elements of the kernel.
      strides: steps between windows.
      padding: zeros before and behind; fewer than none cut.
      dilation: steps between elements of the kernel.
      base: steps between elements of the image, zeros between them.
      groups: of features, each of its own channels.
    """

    kernel: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    base: Shape
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether each window is the pixel of its own number."""
        ones = {*self.kernel, *self.strides, *self.base}
        return ones <= {1} and all(pair == (0, 0) for pair in self.padding)

    def windows(self, spatial: Sequence[int]) -> Shape:
        """How many windows an image has along each axis."""
        found = []
        each = self.kernel, self.strides, self.padding, self.dilation, self.base
        for n, k, s, (low, high), d, b in zip(spatial, *each, strict=True):
            padded = ((n - 1) * b + 1 if n else 0) + low + high
            found.append(max(0, (padded - (k - 1) * d - 1) // s + 1))
        return tuple(found)

    def result(self, shape: Shape, features: int) -> Shape:
        """Of images of this shape."""
        return (shape[0], *self.windows(shape[1:-1]), features)

    def sources(self, spatial: Sequence[int]) -> np.ndarray:
        """``(windows, taps)``: which pixel of an image each element of the kernel meets, -1 for a zero; int32.

        >>> Window((3,), strides=(2,), padding=((1, 1),), dilation=(1,), base=(1,), groups=1).sources([4]).tolist()
        [[-1, 0, 1], [1, 2, 3]]
        """
        rank, windows = len(self.kernel), self.windows(spatial)
        found, there = np.zeros([1] * 2 * rank, np.int32), np.ones([1] * 2 * rank, bool)
        for axis, n in enumerate(spatial):
            base, low, taps = self.base[axis], self.padding[axis][0], np.arange(self.kernel[axis]) * self.dilation[axis]
            at = np.add.outer(np.arange(windows[axis]) * self.strides[axis] - low, taps)
            shape = [1] * 2 * rank
            shape[axis], shape[rank + axis] = at.shape
            met = ((at >= 0) & (at % base == 0) & (at // base < n)).reshape(shape)
            found, there = found * n + (at // base).reshape(shape), there & met
        return np.where(there, found, -1).astype(np.int32).reshape(math.prod(windows), math.prod(self.kernel))

    def convolved(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution by a dense kernel ``(features, length)``, its elements before the channels of a group."""
        axes = "".join(chr(ord("a") + i) for i in range(len(self.kernel)))
        return lax.conv_general_dilated(
            x,
            kernel.reshape(kernel.shape[0], *self.kernel, -1),
            self.strides,
            self.padding,
            self.base,
            self.dilation,
            (f"N{axes}C", f"O{axes}I", f"N{axes}C"),
            feature_group_count=self.groups,
            preferred_element_type=kernel.dtype,
        )


def window_of(op: Op) -> Window:
    """The windows of a convolution in a program."""
    p = op.eqn.params
    shape = shape_of(op.eqn.invars[1])
    return Window(
        kernel=tuple(shape[i] for i in p["dimension_numbers"].rhs_spec[2:]),
        strides=tuple(p["window_strides"]),
        padding=tuple(tuple(pair) for pair in p["padding"]),
        dilation=tuple(p["rhs_dilation"]),
        base=tuple(p["lhs_dilation"]),
        groups=p["feature_group_count"],
    )


class Planes:
    """Images as planes ``(channels, phases, images, *steps)``: what windows of a kernel's element read lies in one row.

    An element of a kernel meets, window after window, every ``stride``-th number of an image: those are a phase of it.
    Along each axis a plane has a step for each window, and as many more as the kernel reaches beyond; so the numbers
    that an element meets are one run of a plane, which begins at its offset. Steps behind the last window of an axis
    belong to no window. The zeros behind a line are those before the next, where a kernel has both.

    Attributes:
      length: of a plane, a multiple of 8: images and their steps, and zeros.
      phases: how many planes a channel has.
      span: the last window is the one before this step.
    """

    def __init__(self, window: Window, shape: Shape) -> None:
        self.window, self.images, self.spatial, self.channels = window, shape[0], shape[1:-1], shape[-1]
        self.windows = window.windows(self.spatial)
        reach = [range(0, (k - 1) * d + 1, d) for k, d in zip(window.kernel, window.dilation, strict=True)]
        self._taps = [[divmod(at, s) for at in each] for each, s in zip(reach, window.strides, strict=True)]
        self._read = [self._along(axis) for axis in range(len(self.spatial))]
        self.phases, self.steps = (math.prod(v.shape[0] for v in self._read), tuple(v.shape[1] for v in self._read))
        self._far = np.array([math.prod(self.steps[axis + 1 :]) for axis in range(len(self.steps))])
        image, last = math.prod(self.steps), np.array(self.windows) - 1
        self.span = (self.images - 1) * image + int(last @ self._far) + 1
        beyond = int(np.array([taps[-1][0] for taps in self._taps]) @ self._far)
        self.length = -(-max(self.images * image, self.span + beyond) // 8) * 8

    def _along(self, axis: int) -> np.ndarray:
        """``(phases, steps)`` of one axis: the element of the image, times its distance; -1 for zeros."""
        taps, windows, size = self._taps[axis], self.windows[axis], self.spatial[axis]
        steps, low, base = windows + taps[-1][0], self.window.padding[axis][0], self.window.base[axis]
        at = np.add.outer(self._phases(axis), np.arange(steps) * self.window.strides[axis]) - low
        there = (at >= 0) & (at % base == 0) & (at // base < size)
        used = np.flatnonzero(there.any(0))
        before, behind = (int(used[0]), steps - 1 - int(used[-1])) if used.size else (steps, steps)
        shared = min(before, behind, taps[-1][0])  # the zeros behind a line are those before the next
        found = np.where(there, at // base * math.prod(self.spatial[axis + 1 :]), -1)
        return found[:, : steps - shared]

    def _phases(self, axis: int) -> list[int]:
        return sorted({phase for _, phase in self._taps[axis]})

    @property
    def size(self) -> int:
        """Numbers of all planes."""
        return self.channels * self.phases * self.length

    def offsets(self) -> np.ndarray:
        """``(length,)`` of a feature: where what an element of its kernel meets begins, in planes of its group."""
        of_channels = np.arange(self.channels // self.window.groups) * self.phases
        every = [self._phases(axis) for axis in range(len(self.steps))]
        found = []
        for taps in product(*self._taps):
            own = [phases.index(phase) for phases, (_, phase) in zip(every, taps, strict=True)]
            phase = np.ravel_multi_index(own, [len(phases) for phases in every])
            shift = np.array([step for step, _ in taps]) @ self._far
            found.append((of_channels + phase) * self.length + shift)
        return np.concatenate(found).astype(np.int32)

    def bases(self, features: int) -> np.ndarray:
        """``(features,)``: where the planes of each feature's group begin."""
        group = np.arange(features) * self.window.groups // features
        return (group * (self.channels // self.window.groups) * self.phases * self.length).astype(np.int32)

    def sources(self) -> jax.Array:
        """``(phases * length,)``: which element of the images each number of a plane is, -1 for zeros."""
        found = self._of_images(self._read, math.prod(self.spatial))
        return jnp.pad(found, ((0, 0), (0, self.length - found.shape[1])), constant_values=-1).reshape(-1)

    def targets(self, panel: int) -> jax.Array:
        """``(panels, panel)``: which window each step up to the last one's is, -1 for none."""
        along = []
        for axis, (steps, windows) in enumerate(zip(self.steps, self.windows, strict=True)):
            at = np.arange(steps)[None]
            along.append(np.where(at < windows, at * math.prod(self.windows[axis + 1 :]), -1))
        found = self._of_images(along, math.prod(self.windows))[0, : self.span]
        return jnp.pad(found, (0, -self.span % panel), constant_values=-1).reshape(-1, panel)

    def _of_images(self, along: list[np.ndarray], size: int) -> jax.Array:
        """``(phases, images * steps)``: sums of what there is along each axis, an image ``size`` behind the one before.

        One image is a constant of the program, and the others follow from it.
        """
        rank, total, there = len(along), np.zeros(1, np.int64), np.ones(1, bool)
        for axis, one in enumerate(along):
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = one.shape
            total, there = total + one.reshape(shape), there & (one.reshape(shape) >= 0)
        steps = math.prod(one.shape[1] for one in along)
        first = jnp.asarray(np.where(there, total, -1).astype(np.int32).reshape(-1, 1, steps))
        images = jnp.arange(self.images, dtype=jnp.int32).reshape(1, -1, 1) * size
        return jnp.where(first < 0, -1, first + images).reshape(first.shape[0], -1)


def channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """The order of an operand's axes, as a convolution numbers them, that has images first and channels last."""
    return spec[0], *spec[2:], spec[1]
