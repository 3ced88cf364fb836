"""A quantized leaf as other formats hold it: a matrix of codes, outputs by inputs, and what each block is scaled by."""

from __future__ import annotations

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
        raise ExportError(
            f"{owner}: {path!r} is {leaf.method}, which the format does not know; quantize it with per=Groups(size),"
            f" Channels() or Tensor(), or write it as floats, by floats={path!r}."
        )
    return small


def coded(leaf: Quantized | Masked, place: Place, path: str, owner: str) -> Coded:
    """A packed leaf as a matrix.

    Raises:
      ExportError: it is none, there.
    """
    if not place.is_matrix:
        raise ExportError(
            f"{owner}: {path!r} of shape {tuple(leaf.shape)} is no matrix of outputs and inputs, and the format"
            f" quantizes these alone; write it as floats, by floats={path!r}."
        )
    q = leaf.values if isinstance(leaf, Masked) else leaf
    codes, shape = host_codes(q.codes), tuple(q.shape)
    scale = np.asarray(dense(q.scale))
    zero = None if q.zero_point is None else np.asarray(q.zero_point).astype(np.uint8)
    if isinstance(leaf, Masked):
        kept = np.asarray(leaf.mask.unpack() if isinstance(leaf.mask, Packed) else leaf.mask)
        none = q.code_of_zero(shape)
        low = q.codes.low if isinstance(q.codes, Packed) else (-128 if q.codes.dtype == jnp.int8 else 0)
        codes = np.where(kept, codes, (np.asarray(none) - low).astype(np.uint8))
        if q.zero_point is None and not q.grid.has_zero:
            raise ExportError(
                f"{owner}: {path!r} is masked on {q.grid.label}, which has no zero; write it as floats, by"
                f" floats={path!r}."
            )
    parts = None
    if isinstance(q.scale, Quantized):
        outer = np.asarray(dense(q.scale.scale))
        if outer.size == 1:
            parts = Parts(q.scale.grid, _merged(host_codes(q.scale.codes), shape, place), float(outer.reshape(())))
    return Coded(
        place.there(codes),
        _merged(scale, shape, place),
        None if zero is None else _merged(zero, shape, place),
        q.grid,
        parts,
    )


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


def leaf_of(x: Coded, place: Place, shape: Shape, *, dtype: DType, scale: Leaf | None = None) -> Quantized:
    """The leaf of a matrix of codes, in an array of this shape.

    Args:
      x: the matrix.
      place: how it lies there.
      shape: of the leaf.
      dtype: of the dense array.
      scale: a leaf of scales, in the shape of the matrix's blocks, where they are no array.
    """
    bits, low = x.grid.bits, _low_of(x.grid)
    codes = place.back(x.codes, shape)
    held = (codes ^ np.uint8(128)).view(np.int8) if bits == 8 and low else codes
    stream = jnp.asarray(held) if bits == 8 else Packed(jnp.asarray(pack_bits_on_host(codes, bits)), bits, low, shape)
    zero = None if x.zero is None else jnp.asarray(_split(x.zero, shape, place).astype(x.scale.dtype))
    given = jnp.asarray(_split(x.scale, shape, place)) if scale is None else _split_leaf(scale, shape, place)
    return Quantized(stream, given, zero, x.grid, jnp.dtype(dtype))


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


def _split_leaf(scale: Leaf, shape: Shape, place: Place) -> Leaf:
    codes = _split(host_codes(scale.codes), shape, place)
    outer = jnp.reshape(scale.scale, (1,) * len(shape))
    return Quantized(jnp.asarray(codes), outer, None, scale.grid, scale.dense_dtype)


def _low_of(grid: Numbers) -> int:
    """The number that code 0 of a grid's stream stands for."""
    reach = grid.code_range
    return -(2 ** (grid.bits - 1)) if reach is not None and reach[0] < 0 else 0
