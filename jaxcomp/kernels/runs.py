"""Where a kernel finds the codes of a packed block: runs of neighbours that lie in neighbouring bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.kernels.packing import FIELDS, PackedWeight

V = TypeVar("V")
Ref = Any
"""What a kernel reads and writes; jax has no public type for it."""


class Part(NamedTuple):
    """A field of the codes of a run.

    Attributes:
      offset: the first of its bytes in the block; each byte holds the field of one code of the run.
      shift: the field's lowest bit in the byte.
      width: bits of the field.
      place: the field's lowest bit in the code.
    """

    offset: int
    shift: int
    width: int
    place: int


class Run(NamedTuple):
    """Neighbouring codes of a block that share their scales.

    Attributes:
      start: the first code's place in the block.
      parts: the fields that make a code.
    """

    start: int
    parts: tuple[Part, ...]


class Reading(NamedTuple):
    """How the blocks of a weight are read, run by run.

    Attributes:
      bits: of a code.
      block: codes packed together.
      size: bytes of a block.
      group: codes that share a scale, or None where all along the contracted axis do.
      groups: how many scales there are along it.
      length: codes of a run.
      runs: of a block; those that read the same bytes stand beside each other.
    """

    bits: int
    block: int
    size: int
    group: int | None
    groups: int
    length: int
    runs: tuple[Run, ...]

    def by_scale(self) -> list[tuple[int, list[Run]]]:
        """The runs of a block by what scales them, as :meth:`group_of` takes it."""
        keys: dict[int, list[Run]] = {}
        for run in self.runs:
            keys.setdefault(0 if self.group is None else run.start // math.gcd(self.group, self.block), []).append(run)
        return list(keys.items())

    def group_of(self, at: jax.Array, key: int) -> jax.Array | int:
        """The index of the scales with this key in block ``at``; of the last ones where all is padding."""
        if self.group is None:
            return 0
        unit = math.gcd(self.group, self.block)
        index = at * (self.block // unit) + key
        return jnp.minimum(lax.div(index, jnp.int32(self.group // unit)), self.groups - 1)

    def numbers(self, run: Run, load: Callable[[int], jax.Array]) -> jax.Array:
        """The integers of a run, int32; ``load(offset)`` gives the ``length`` bytes from there on, int32."""
        if self.bits == 8:
            return load(run.parts[0].offset)
        code = jnp.int32(0)
        for part in run.parts:
            code = code | (((load(part.offset) >> part.shift) & (2**part.width - 1)) << part.place)
        return code - 2 ** (self.bits - 1)


def reading(w: PackedWeight, most: int = 128) -> Reading:
    """How a kernel reads a weight of an integer grid, in runs of a power of two of codes, ``most`` at most.

    >>> from jaxcomp.quantization.grids import Int
    >>> codes, scale = jnp.zeros((8, 64), jnp.uint8), jnp.ones((8, 1))
    >>> read = reading(PackedWeight(codes, scale, None, Int(4), 128, 128, 128, jnp.dtype("float32")))
    >>> read.length, [(run.start, run.parts[0].offset, run.parts[0].shift) for run in read.runs]
    (64, [(0, 0, 0), (64, 0, 4)])
    """
    group = w.group if w.scale.shape[-1] > 1 else None
    length = w.block * math.gcd(*FIELDS[w.bits]) // 8
    length = math.gcd(most, length if group is None else math.gcd(length, group))
    runs = runs_of(w.bits, w.block, length)
    assert runs is not None
    return Reading(w.bits, w.block, w.block * w.bits // 8, group, w.scale.shape[-1], length, runs)


def runs_of(bits: int, block: int, length: int) -> tuple[Run, ...] | None:
    """The runs of so many codes of a packed block, those of the same bytes beside each other; None if it has none.

    >>> runs = runs_of(4, 16, 8)
    >>> [(run.start, run.parts[0].offset, run.parts[0].shift) for run in runs]
    [(0, 0, 0), (8, 0, 4)]
    """
    if (block * math.gcd(*FIELDS[bits]) // 8) % length:
        return None
    runs = (Run(start, _parts(bits, block, start)) for start in range(0, block, length))
    return tuple(sorted(runs, key=lambda run: (run.parts[0].offset, run.start)))


def _parts(bits: int, block: int, start: int) -> tuple[Part, ...]:
    parts, first, place = [], 0, 0
    for width in FIELDS[bits]:
        size = block * width // 8
        parts.append(Part(first + start % size, width * (start // size), width, place))
        first, place = first + size, place + width
    return tuple(parts)


def matrix_of_integers(w: PackedWeight) -> str | None:
    """Why a weight is no matrix of integers, as kernels take it; None if it is one."""
    if w.codes.ndim != 2:
        return f"the weight is a stack of shape {w.shape}, and the kernel takes one matrix"
    if not w.is_integer:
        return f"{type(w.grid).__name__} codes name levels, and the kernel multiplies integers"
    return None


def short_runs(w: PackedWeight, least: int) -> str | None:
    """Why the runs of a weight are too short for a kernel; None if they are not."""
    if (length := reading(w).length) >= least:
        return None
    return (
        f"only {length} neighbours share bytes and scales ({w.bits} bits, blocks of {w.block}, groups of {w.group}),"
        f" and the kernel takes {least} at least"
    )


def once(load: Callable[[int], V]) -> Callable[[int], V]:
    """``load``, called once for each offset: what two runs read is held."""
    held: dict[int, V] = {}

    def loaded(offset: int) -> V:
        if offset not in held:
            held[offset] = load(offset)
        return held[offset]

    return loaded
