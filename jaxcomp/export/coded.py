"""A quantized leaf as other formats hold it: a matrix of codes, outputs by inputs, and what each block is scaled by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import pack_bits_on_host, spread_out
from jaxcomp.core.leaves import dense, is_compressed, pack
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import Where, matches
from jaxcomp.core.types import DType, Leaf, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.export.errors import ExportError
from jaxcomp.export.names import Place
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.leaves import Quantized


class Parts(NamedTuple):
    """Scales on a grid of their own: their codes, in the shape of the scales, and the one number over all of them."""

    grid: Numbers
    codes: np.ndarray
    outer: float


@dataclass(frozen=True, eq=False)
class Coded:
    """``dense == (codes + low - zero) * scale``, block by block, for a grid of integers; tables name theirs by codes.

    Fields:
      codes: what the leaf's stream of bits holds, from 0 on: uint8, (outputs, inputs).
      scale: float, of two axes, each a divisor of the codes'.
      zero: of the same codes, in the scale's shape, or None.
      grid: of the numbers.
      parts: of scales that lie on a grid of their own.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    grid: Numbers
    parts: Parts | None = None

    @property
    def shape(self) -> Shape:
        """Outputs and inputs."""
        return tuple(self.codes.shape)

    @property
    def blocks(self) -> Shape:
        """How many scales there are along each of them."""
        return tuple(self.scale.shape)

    def cut(self, blocks: Shape) -> Coded:
        """The same with so many blocks, each within one of before: scales are repeated."""
        zero = None if self.zero is None else repeated_to(self.zero, blocks)
        parts = None if self.parts is None else self.parts._replace(codes=repeated_to(self.parts.codes, blocks))
        return replace(self, scale=repeated_to(self.scale, blocks), zero=zero, parts=parts)


def repeated_to(x: np.ndarray, blocks: Shape) -> np.ndarray:
    """Each entry for each of the smaller blocks within its own.

    >>> repeated_to(np.array([[1, 2]]), (1, 4))
    array([[1, 1, 2, 2]])
    """
    for axis, n in enumerate(blocks):
        if x.shape[axis] != n:
            x = np.repeat(x, n // x.shape[axis], axis)
    return x


def prepared(leaf: Leaf, path: str, *, floats: Where | None, owner: str) -> Leaf:
    """A leaf packed, or as an array where it is no compressed one, is masked floats, or ``floats`` selects it.

    Raises:
      ExportError: it is compressed in a way that the format does not know.
    """
    if not is_compressed(leaf):
        return leaf
    if floats is not None and matches(floats, path, leaf):
        return dense(leaf)
    small = pack({path: leaf})[path]
    inner = small.values if isinstance(small, Masked) else small
    if not is_compressed(inner):
        return dense(small)
    if not isinstance(inner, Quantized):
        said = ", ".join([leaf.method, *leaf.details()])
        raise ExportError(
            f"{owner}: {path!r} is {said}, which the format does not know; quantize it with per=Groups(size),"
            f" Channels() or Tensor(), or write it as floats, by floats={path!r}."
        )
    return small


def coded(leaf: Quantized | Masked, place: Place, path: str, owner: str) -> list[Coded]:
    """A packed leaf as a matrix, or as one for each of its layers.

    Raises:
      ExportError: it is none, there.
    """
    q, shape = leaf.values if isinstance(leaf, Masked) else leaf, tuple(leaf.shape)
    if not place.is_matrix:
        raise ExportError(
            f"{owner}: {path!r} of shape {shape} is no matrix of outputs and inputs, and the format quantizes these"
            f" alone; write it as floats, by floats={path!r}."
        )
    if isinstance(leaf, Masked) and q.zero_point is None and not q.grid.has_zero:
        raise ExportError(
            f"{owner}: {path!r} is masked on {q.grid.label}, which has no zero; write it as floats, by floats={path!r}."
        )
    codes = host_codes(q.codes)
    if isinstance(leaf, Masked):
        kept = np.asarray(leaf.mask.unpack() if isinstance(leaf.mask, Packed) else leaf.mask)
        codes = np.where(kept, codes, (np.asarray(q.code_of_zero(shape)) - _low_of(q.grid)).astype(np.uint8))
    count = shape[0] if place.layered else 1

    def merged(x: np.ndarray) -> list[np.ndarray]:
        wide = np.repeat(x, count // len(x), 0) if place.layered else x
        return [_merged(one, place.one(shape), place) for one in place.layers(wide)]

    scales, none = merged(np.asarray(dense(q.scale))), [None] * count
    zeros = none if q.zero_point is None else merged(np.asarray(q.zero_point).astype(np.uint8))
    parts: Sequence[Parts | None] = none
    if isinstance(q.scale, Quantized):
        outer = np.asarray(dense(q.scale.scale)).reshape(-1)
        if outer.size in (1, count):
            found = zip(merged(host_codes(q.scale.codes)), np.broadcast_to(outer, (count,)), strict=True)
            parts = [Parts(q.scale.grid, x, float(over)) for x, over in found]
    held = [place.there(one) for one in place.layers(codes)]
    return [Coded(*one[:3], q.grid, one[3]) for one in zip(held, scales, zeros, parts, strict=True)]


def host_codes(codes: Packed | object) -> np.ndarray:
    """The codes of a packed leaf as they are in its stream, from 0 on.

    >>> host_codes(Packed.of(jnp.array([[-8, 7]]), 4, -8)), host_codes(jnp.array([-128, 127], jnp.int8))
    (array([[ 0, 15]], dtype=uint8), array([  0, 255], dtype=uint8))
    """
    if isinstance(codes, Packed):
        count = int(np.prod(codes.shape, dtype=np.int64))
        return spread_out(np.asarray(codes.data), codes.bits, count).reshape(codes.shape)
    held = np.asarray(codes)
    return held.view(np.uint8) ^ np.uint8(128) if held.dtype == np.int8 else held


def _merged(scale: np.ndarray, shape: Shape, place: Place) -> np.ndarray:
    """What serves a block of an array, for the matrix that the array is there; repeated where it must be."""
    sizes, x = [shape[i] for i in place.order], scale.transpose(place.order)
    for first, count in ((place.outputs, place.inputs), (0, place.outputs)):
        for axis in range(first + count - 2, first - 1, -1):  # with the axis behind it, which is merged already
            if x.shape[axis + 1] != 1 and x.shape[axis] != sizes[axis]:
                x = np.repeat(x, sizes[axis] // x.shape[axis], axis)
            x = x.reshape([*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]])
    return np.ascontiguousarray(x)


def leaf_of(layers: Sequence[Coded], place: Place, shape: Shape, dtype: DType) -> Quantized:
    """The leaf of a matrix of codes, or of those of its layers, in an array of this shape.

    Raises:
      ValueError: the layers are not quantized alike; the message goes after the file's name.
    """
    first, one = layers[0], place.one(shape)
    if any((x.grid, x.blocks, x.zero is None) != (first.grid, first.blocks, first.zero is None) for x in layers):
        raise ValueError(f"holds {place.name!r} quantized in several ways; read it without like=")

    def stacked(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts) if place.layered else parts[0]

    bits, low = first.grid.bits, _low_of(first.grid)
    codes = stacked([place.back(x.codes, one) for x in layers])
    held = (codes ^ np.uint8(128)).view(np.int8) if bits == 8 and low else codes
    stream = jnp.asarray(held) if bits == 8 else Packed(jnp.asarray(pack_bits_on_host(codes, bits)), bits, low, shape)
    zeros = [x.zero for x in layers if x.zero is not None]
    zero = jnp.asarray(stacked([_split(x, one, place) for x in zeros]), jnp.float32) if zeros else None
    own = [x.parts for x in layers if x.parts is not None]
    if not own:
        scale: Leaf = jnp.asarray(stacked([_split(x.scale, one, place) for x in layers]))
    else:
        part = jnp.asarray(stacked([_split(x.codes, one, place) for x in own]))
        outer = jnp.asarray(np.reshape([x.outer for x in own], (-1, *[1] * (len(shape) - 1))), jnp.float32)
        scale = Quantized(part, outer, None, own[0].grid, jnp.dtype(jnp.float32))
    return Quantized(stream, scale, zero, first.grid, jnp.dtype(dtype))


def _split(scale: np.ndarray, shape: Shape, place: Place) -> np.ndarray:
    """The inverse of :func:`_merged`; repeated where blocks do not follow the axes."""
    lying: list[int] = []
    for part, n in ((range(place.outputs), 0), (range(place.outputs, len(place.order)), 1)):
        sizes, left, blocks = [shape[place.order[i]] for i in part], scale.shape[n], []
        for size in sizes:
            step = size if left % size == 0 else left if size % left == 0 else 0
            blocks.append(step)
            left = left // step if step else 0
            if not step:
                break
        if left != 1:
            blocks = sizes
            scale = repeated_to(scale, tuple(int(np.prod(sizes)) if i == n else m for i, m in enumerate(scale.shape)))
        lying += blocks
    return np.ascontiguousarray(scale.reshape(lying).transpose(np.argsort(place.order)))


def _low_of(grid: Numbers) -> int:
    """The number that code 0 of a grid's stream stands for."""
    reach = grid.code_range
    return -(2 ** (grid.bits - 1)) if reach is not None and reach[0] < 0 else 0
