"""Compressed leaves: frozen pytree dataclasses that stand where an array stood and know how to become it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.arraylike import ArrayLike
from jaxcomp.core.errors import naming
from jaxcomp.core.paths import path_str
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import AxisRoles
from jaxcomp.core.types import DType, Leaf, PyTree, Shape
from jaxcomp.core.words import LOOKED_AT, bytes_of, on_hand, percent_words, shape_words


class CompressedLeaf(ArrayLike, ABC):
    """What every compressed leaf offers.

    A subclass is made with :func:`~jaxcomp.core.packed.compressed_leaf` and states its invariant in its docstring.

    Class attributes:
      open: the fields that later transforms in a chain may rewrite; none means that the leaf is closed.
      made_by: the transform that makes it, for error messages.
      coded: the field that holds one integer code for each element of the dense array, if there is one: a file then
        stores only the codes that a mask keeps.
      data_fields, meta_fields: names of the fields that are children and of the static ones.
    """

    open: ClassVar[tuple[str, ...]] = ()
    made_by: ClassVar[str] = ""
    coded: ClassVar[str] = ""
    data_fields: ClassVar[tuple[str, ...]] = ()
    meta_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def code_bits(self) -> int:
        """Bits of a code of the ``coded`` field; 0 where there is none."""
        return 0

    def code_of_zero(self, shape: Shape) -> int | jax.Array:
        """The packed code of the value 0: a number, or an array of codes of the dense ``shape``."""
        return 0

    def field_roles(self, name: str) -> AxisRoles | None:
        """What the axes of an open field do; None where the field stands for the whole array, axis by axis."""
        return None

    @property
    def method(self) -> str:
        """What was done, in words: "Quantized int4"."""
        return type(self).__name__

    def details(self) -> tuple[str, ...]:
        """What a repr says beside method, shape and bytes: "groups of 128"."""
        return ()

    def zeros_at(self) -> np.ndarray | None:
        """Which elements are 0, by numpy, where the values are few and known here; else None."""
        return None

    def zeros_seen(self) -> float | None:
        """The fraction of elements that are 0, where the values are few and known here; else None."""
        at = self.zeros_at() if 0 < self.size <= LOOKED_AT else None
        return None if at is None else float(at.mean())

    def __repr__(self) -> str:
        """One line; on tracers, shapes and the placeholders that trees are mapped with too."""
        try:
            return _line(self)
        except Exception:  # fields may be anything while a tree is taken apart
            shown = ", ".join(f"{name}={getattr(self, name, None)!r}" for name in self.data_fields)
            return f"{type(self).__name__}({shown})"

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """The shape of the array that this leaf stands for."""

    @property
    @abstractmethod
    def dtype(self) -> DType:
        """The type of the array that this leaf stands for."""

    @property
    def ndim(self) -> int:
        """The rank of the array that this leaf stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many entries the array has that this leaf stands for."""
        return int(np.prod(self.shape, dtype=np.int64))

    def with_fields(self, fields: Mapping[str, Leaf]) -> Self:
        """The same leaf with some of its fields replaced."""
        own = {name: getattr(self, name) for name in (*self.data_fields, *self.meta_fields)}
        return type(self)(**{**own, **fields})

    @abstractmethod
    def materialize(self) -> jax.Array:
        """The array that this leaf stands for."""

    def __jax_array__(self) -> jax.Array:
        array: jax.Array = dense(self)
        return array

    @abstractmethod
    def pack(self) -> CompressedLeaf:
        """The same leaf in its smallest storage; ``materialize`` gives the same bits."""


def method_of(leaf: Leaf) -> str:
    """What was done to a leaf, in words; of an array its type.

    >>> from jaxcomp.core.wrappers import Masked
    >>> method_of(jnp.zeros(2)), method_of(Masked(jnp.zeros(2), jnp.zeros(2, bool)))
    ('float32', 'Masked float32')
    """
    return leaf.method if isinstance(leaf, CompressedLeaf) else str(getattr(leaf, "dtype", type(leaf).__name__))


def none_at(x: object) -> np.ndarray | None:
    """Where a small array whose values are known here is 0; else None."""
    values = on_hand(x)
    return None if values is None else values == 0


def _line(leaf: CompressedLeaf) -> str:
    zeros = leaf.zeros_seen()
    parts = [leaf.method, shape_words(leaf.shape), *leaf.details()]
    if leaf.size:
        parts.append(f"{bytes_of(leaf) / leaf.size:.3g} B/weight")
    if zeros is not None:
        parts.append(f"{percent_words(zeros)} zeros")
    return "<" + ", ".join(parts) + ">"


def is_compressed(x: object) -> bool:
    """Whether ``x`` is a compressed leaf; the ``is_leaf`` of a tree that holds some.

    >>> from jaxcomp import prune
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> [is_compressed(x) for x in (params["kernel"], prune(0.5).apply(prune(0.5).init(params), params)["kernel"])]
    [False, True]
    """
    return isinstance(x, CompressedLeaf)


def dense(x: Leaf) -> Leaf:
    """One leaf as an array.

    Args:
      x: a compressed leaf, or anything else, which is given back as it is.

    >>> from jaxcomp import Int, Tensor, quantize
    >>> w = {"w": jnp.array([[-1.5, 1.0]])}
    >>> dense(quantize(Int(2, narrow=True), per=Tensor()).apply((), w)["w"])
    Array([[-1.5,  1.5]], dtype=float32)
    """
    return _dense(x) if isinstance(x, CompressedLeaf) else x


@on_any_mesh
@partial(jax.jit, inline=True)  # one program a leaf where nobody else compiles one
def _dense(x: CompressedLeaf) -> jax.Array:
    return x.materialize()


def materialize(tree: PyTree) -> PyTree:
    """The tree with every compressed leaf turned back into an array; other leaves are the same objects.

    >>> from jaxcomp.core.wrappers import Masked
    >>> materialize({"w": Masked(jnp.array([1.0, 2.0]), jnp.array([True, False]))})
    {'w': Array([1., 0.], dtype=float32)}
    """
    return jax.tree.map(dense, tree, is_leaf=is_compressed)


def pack(tree: PyTree) -> PyTree:
    """The tree with every compressed leaf in its smallest storage, ``materialize(pack(t)) == materialize(t)`` bitwise.

    Raises:
      ValueError: outside jit, a leaf whose quantized values are NaN; the message names the path.

    >>> from jaxcomp.quantization import Int, Quantized
    >>> q = Quantized(jnp.array([-8.0, 7.0, 1.0]), jnp.array([0.5]), None, Int(4), jnp.dtype("float32"))
    >>> pack(q).codes.data.size, materialize(pack(q))
    (2, Array([-4. ,  3.5,  0.5], dtype=float32))
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _packed(path_str(path), x), tree, is_leaf=is_compressed)


def _packed(path: str, leaf: Leaf) -> Leaf:
    if not isinstance(leaf, CompressedLeaf):
        return leaf
    with naming("pack", path) if path else nullcontext():
        return _small(leaf)


@on_any_mesh
def _small(leaf: CompressedLeaf) -> Leaf:
    return leaf.pack()


def nbytes(tree: PyTree) -> int:
    """Bytes of the arrays of a tree, compressed leaves as they are stored now (see :func:`pack`).

    Of tracers and ``jax.ShapeDtypeStruct`` it is what the arrays would take that they stand for.

    >>> nbytes({"w": jnp.zeros((3, 4))}), nbytes({"w": jax.ShapeDtypeStruct((3, 4), "float32")})
    (48, 48)
    """
    return bytes_of(tree)


def zeros_counted(tree: PyTree) -> tuple[int, int]:
    """How many entries of the materialized float arrays are zero, and how many there are.

    Args:
      tree: arrays and compressed leaves, in any containers.

    >>> zeros_counted({"kernel": jnp.array([0.0, 1.0, 2.0]), "bias": jnp.zeros(1)})
    (2, 4)
    """
    arrays = [
        x for x in jax.tree.leaves(materialize(tree)) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum(int((np.asarray(x) == 0).sum()) for x in arrays), sum(x.size for x in arrays)
