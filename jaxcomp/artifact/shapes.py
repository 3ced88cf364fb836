"""The nodes and tensors of a tree of which only shapes are known: sizes without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxcomp.artifact.encoding import At, Encoder
from jaxcomp.artifact.statics import OTHERS
from jaxcomp.artifact.tensors import NAMES, Tensor, Tensors
from jaxcomp.core.bits import bits_of, packed_size
from jaxcomp.core.leaves import is_compressed, pack
from jaxcomp.core.packed import Packed
from jaxcomp.core.types import Json, Leaf, PyTree, Shape
from jaxcomp.core.wrappers import Masked


def of_shapes(tree: PyTree) -> bool:
    """Whether some array of the tree is a ``jax.ShapeDtypeStruct``.

    >>> of_shapes({"w": jax.ShapeDtypeStruct((2,), "float32")}), of_shapes({"w": np.ones(2)})
    (True, False)
    """
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def encode_shapes(tree: PyTree) -> tuple[Json, list[Tensor]]:
    """As :func:`~jaxcomp.artifact.encoding.encode_tree`, with tensors that have no bytes.

    Raises:
      TypeError, ValueError: as there; or a masked leaf, of which the shape does not say how much its mask keeps.
    """
    encoder = _Shapes(_Sizes())
    return encoder.node(tree, At()), encoder.out.all


class _Sizes(Tensors):
    def add(self, name: str, dtype: np.dtype, shape: Shape, blocks: Callable[[], Iterator[np.ndarray]]) -> Tensor:
        new = Tensor(self._free(name), dtype, shape, blocks)
        self.all.append(new)
        self._names.add(new.name)
        return new


class _Shapes(Encoder):
    def node(self, x: PyTree, at: At) -> Json:
        if is_compressed(x):
            return self.leaf(jax.eval_shape(pack, x), at)
        return super().node(x, at)

    def array(self, x: PyTree, at: At) -> Json:
        return self._sized(x, at) if isinstance(x, jax.ShapeDtypeStruct) else super().array(x, at)

    def masked(self, x: Masked, at: At) -> Json:
        raise ValueError(
            f"file_size: {at.path!r} is masked, and its shape does not say how much its mask keeps; give arrays, or"
            " take the size without the mask."
        )

    def _plain(self, value: Leaf, at: At) -> Json:
        return self._sized(value, at)

    def _packed(self, value: Packed, at: At) -> Json:
        return {"packed": [value.bits, value.low, list(value.shape), self._sized(value.data, at)]}

    def _sized(self, x: Leaf, at: At) -> Json:
        dtype, shape = np.dtype(x.dtype), tuple(x.shape)
        none = lambda: iter(())  # noqa: E731
        if dtype in NAMES:
            return self.out.add(at.path, dtype, shape, none)
        if dtype not in OTHERS:
            raise TypeError(f"file_size: {at.path!r} is of type {dtype}, which files do not hold.")
        size = int(np.prod(shape, dtype=object))
        if dtype.kind == "c":
            tensor = self.out.add(at.path, np.dtype(f"<f{dtype.itemsize // 2}"), (2 * size,), none)
        else:
            tensor = self.out.add(at.path, np.dtype(np.uint8), (packed_size(size, bits_of(dtype)),), none)
        return {"typed": [dtype.name, list(shape), tensor]}
