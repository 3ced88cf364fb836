"""A quantized leaf laid out for the site that multiplies it."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import compressed_leaf, unpacked
from jaxcomp.core.types import DType, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.kernels.packing import PackedWeight, pack_blocks
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.sparse import SparseWeight
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import spread

BLOCK = 128
"""How many codes along the contracted axis are packed together; fewer where the axis is shorter."""
LEAST_GROUP = 8
"""Scales that serve fewer elements along the contracted axis than this weigh as much as the codes."""

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""A leaf's own axes as a site uses them: those that both operands share, or that a scan steps over; those that the
product keeps; those that it sums over, in the order in which the other operand has them."""


class Laid(CompressedLeaf):
    """A leaf laid out for the site that multiplies it.

    ``dense``, its axes in the order of ``axes`` and merged to ``(*lead, features, length)``, is ``weight.dense()``.

    Fields of all:
      dense_dtype, dense_shape: of the array, static.
      axes: how its axes lie, static, see :data:`Axes`.
      site: the path of the site that it was laid out for, static.
    """

    dense_dtype: DType
    dense_shape: Shape
    axes: Axes
    site: str

    made_by: ClassVar[str] = "prepare"

    @property
    @abstractmethod
    def weight(self) -> PackedWeight | SparseWeight | PanelWeight:
        """As kernels take it."""

    @property
    def shape(self) -> Shape:  # noqa: D102
        return self.dense_shape

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.dense_dtype

    def materialize(self) -> jax.Array:
        """The array, bit for bit that of the leaf it was made of."""
        return restored(self.weight.dense(), self.dense_shape, self.axes)

    def pack(self) -> Self:
        """Itself: it is packed."""
        return self


@compressed_leaf(meta=("grid", "length", "group", "block", "dense_dtype", "dense_shape", "axes", "site"))
class Prepared(Laid):
    """Codes in bytes in the order in which kernels read them.

    Fields:
      codes, scale, zero, grid, length, group, block: see :class:`~jaxcomp.kernels.packing.PackedWeight`.
      dense_dtype, dense_shape, axes, site: see :class:`Laid`.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    grid: Numbers
    length: int
    group: int
    block: int
    dense_dtype: DType
    dense_shape: Shape
    axes: Axes
    site: str

    @property
    def method(self) -> str:  # noqa: D102
        return f"Prepared {self.grid.label}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return (f"groups of {self.group}",) if self.group < self.length else ()

    @property
    def code_bits(self) -> int:  # noqa: D102
        return self.grid.bits

    @property
    def weight(self) -> PackedWeight:
        """The codes as kernels take them."""
        return PackedWeight(
            self.codes, self.scale, self.zero, self.grid, self.length, self.group, self.block, self.dense_dtype
        )


def restored(x: jax.Array, shape: Shape, axes: Axes) -> jax.Array:
    """``(*lead, features, length)`` as the array of a leaf of this ``shape``, the inverse of :func:`laid_out`."""
    order = [axis for part in axes for axis in part]
    return jnp.transpose(x.reshape([shape[i] for i in order]), np.argsort(order).tolist())


def prepared(leaf: CompressedLeaf, axes: Axes, site: str) -> Prepared | str:
    """A quantized leaf, masked or not, laid out for a site, or why it cannot be."""
    why = no_codes(leaf)
    if why:
        return why
    mask, inner = (leaf.mask, leaf.values) if isinstance(leaf, Masked) else (None, leaf)
    assert isinstance(inner, Quantized)
    inner = inner.pack()
    stored = raw_codes(inner, None if mask is None else unpacked(mask))
    summed = axes[2]
    sizes = [inner.shape[i] for i in summed]
    length = math.prod(sizes)
    group, blocks = _groups(sizes, [dense(inner.scale).shape[i] for i in summed])
    if group < min(LEAST_GROUP, length):
        return f"its scales serve {group} elements along what is summed, {LEAST_GROUP} are wanted"
    block = min(BLOCK, -(-max(length, 1) // 8) * 8)

    def of_groups(v: jax.Array) -> jax.Array:
        """Of a scale's shape, in that of the packed weight's: ``(*lead, features, groups)``."""
        shape = list(inner.shape)
        for i, count in zip(summed, blocks, strict=True):
            shape[i] = count
        return laid_out(_stretched(v, tuple(shape)), axes)

    codes = laid_out(stored, axes)
    zero, half = inner.zero_point, 2 ** (inner.grid.bits - 1)
    return Prepared(
        codes=_whole_bytes(codes, inner.grid, block),
        scale=of_groups(dense(inner.scale)),
        zero=None if zero is None else of_groups(zero - half),
        grid=inner.grid,
        length=length,
        group=group,
        block=block,
        dense_dtype=inner.dtype,
        dense_shape=inner.shape,
        axes=axes,
        site=site,
    )


def no_codes(leaf: CompressedLeaf) -> str:
    """Why a leaf has no codes that are its values but for scale and zero point; empty where it has."""
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    if not isinstance(inner, Quantized):
        kind = f"a {type(inner).__name__}" if isinstance(inner, CompressedLeaf) else "floats under a mask"
        return f"it is {kind}, not codes with a scale"
    if not inner.grid.proportional or inner.grid.bits < 2:
        return f"a weight on {inner.grid!r} is not its codes times a scale"
    if isinstance(leaf, Masked) and not inner.grid.has_zero:
        return f"{inner.grid!r} has no zero for what the mask hides"
    return "" if inner.size else "it is empty"


def raw_codes(leaf: Quantized, mask: jax.Array | None) -> jax.Array:
    """Codes from 0 on of a packed leaf, uint8, with that of 0 where the mask hides."""
    codes = unpacked(leaf.codes)
    lowest = leaf.grid.code_range is not None and leaf.grid.code_range[0] != 0
    raw = codes.astype(jnp.int32) + 2 ** (leaf.grid.bits - 1) if lowest else codes
    if mask is not None:
        nothing = leaf.code_of_zero(leaf.shape)
        hidden = jnp.broadcast_to(jnp.asarray(nothing), leaf.shape).astype(raw.dtype)
        raw = jnp.where(mask, raw, hidden + (2 ** (leaf.grid.bits - 1) if lowest else 0))
    return raw.astype(jnp.uint8)


def _whole_bytes(raw: jax.Array, grid: Numbers, block: int) -> jax.Array:
    packed = pack_blocks(raw, grid.bits, block)
    if grid.bits < 8 or grid.code_range is None:
        return packed
    return jax.lax.bitcast_convert_type(packed ^ jnp.uint8(128), jnp.int8)


def _groups(sizes: list[int], blocks: list[int]) -> tuple[int, list[int]]:
    """How many neighbours of the merged axes share a scale, and how many scales each axis then has."""
    group, counts = 1, list(sizes)
    for i in reversed(range(len(sizes))):
        counts[i] = blocks[i]
        group *= sizes[i] // max(blocks[i], 1)
        if blocks[i] != 1:
            break
    return group, counts


def _stretched(v: jax.Array, shape: Shape) -> jax.Array:
    """A scale in a shape of more blocks."""
    return jnp.broadcast_to(spread(v, shape), shape)


def laid_out(v: jax.Array, axes: Axes) -> jax.Array:
    """``(*lead, features, summed)`` of an array with a leaf's axes."""
    lead, kept, summed = axes
    moved = jnp.transpose(v, [*lead, *kept, *summed])
    sizes = [math.prod(v.shape[i] for i in part) for part in (kept, summed)]
    return moved.reshape([*(v.shape[i] for i in lead), *sizes])


def scale_shape(shape: Shape, axes: Axes, group: int) -> Shape:
    """The shape of the scale of a leaf of this ``shape`` as arrays have it: one number a block of each axis."""
    out, left = list(shape), group
    for i in reversed(axes[2]):
        taken = math.gcd(left, shape[i]) if left > 1 else 1
        out[i], left = shape[i] // taken, left // taken
    return tuple(out)


def without_first(shape: Shape, axes: Axes) -> tuple[Shape, Axes]:
    """A leaf's shape and axes after a scan has stepped over the first axis that the weight has."""
    gone, *lead = axes[0]

    def left(part: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - (i > gone) for i in part)

    return tuple(n for i, n in enumerate(shape) if i != gone), (left(tuple(lead)), left(axes[1]), left(axes[2]))
