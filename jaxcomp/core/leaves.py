"""Compressed leaves: frozen pytree dataclasses that stand where an array stood and know how to become it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import in_host_memory, pack_bits, pack_bits_on_host, put_beside, spread_out, unpack_bits
from jaxcomp.core.errors import naming
from jaxcomp.core.gradients import masked, masked_through
from jaxcomp.core.paths import path_str
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.roles import AxisRoles
from jaxcomp.core.types import DType, Leaf, PyTree, Shape
from jaxcomp.core.words import LOOKED_AT, bytes_of, on_hand, percent_words, shape_words

Cls = TypeVar("Cls", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def compressed_leaf(*, meta: tuple[str, ...] = ()) -> Callable[[Cls], Cls]:
    """Class decorator: a frozen dataclass registered as a pytree, with the ``meta`` fields static."""

    def decorate(cls: Any) -> Any:
        cls = dataclass(frozen=True, eq=False, repr=False)(cls)
        data = [f.name for f in fields(cls) if f.name not in meta]
        cls.data_fields, cls.meta_fields = tuple(data), meta
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return decorate


@compressed_leaf(meta=("bits", "low", "shape"))
class Packed:
    """Integers of ``bits`` bits in a byte stream: ``value == stream code + low``; one bit and low 0 is a boolean.

    Fields:
      data: uint8 of ``ceil(size * bits / 8)`` bytes, the low bits first, C order.
      bits, low, shape: static.
    """

    data: jax.Array
    bits: int
    low: int
    shape: Shape

    @staticmethod
    def of(values: jax.Array, bits: int, low: int) -> Packed:
        """Packs integers in ``[low, low + 2**bits)``, held in any type."""
        host = in_host_memory(values)
        if host is not None:
            return Packed(put_beside(pack_bits_on_host(host, bits, low), values), bits, low, tuple(values.shape))
        return Packed(_stream_of(values, bits, low), bits, low, tuple(values.shape))

    def __repr__(self) -> str:
        return f"<Packed, {self.bits} bits, {shape_words(self.shape)}>"

    def on_host(self) -> np.ndarray | None:
        """The integers, by numpy, where they are few and known here; else None."""
        data, count = on_hand(self.data), int(np.prod(self.shape, dtype=np.int64))
        if data is None:
            return None
        return (spread_out(data, self.bits, count).astype(np.int16) + self.low).reshape(self.shape)

    def unpack(self) -> jax.Array:
        """The integers as int8 or uint8, or the booleans."""
        if self.bits == 1:
            return self._stream(jnp.uint8).astype(bool)
        return self.wide().astype(jnp.int8 if self.low < 0 else jnp.uint8)

    def wide(self) -> jax.Array:
        """The integers as int32, for arithmetic: each narrower type on the way to a float is one more conversion."""
        return self._stream(jnp.int32) + self.low

    def _stream(self, dtype: DType) -> jax.Array:
        count = int(np.prod(self.shape, dtype=np.int64))
        return unpack_bits(self.data, self.bits, count, dtype).reshape(self.shape)


# One program an array where nobody else compiles one; inside jit it is inlined.
@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _stream_of(values: jax.Array, bits: int, low: int) -> jax.Array:
    return pack_bits((values.astype(jnp.int32) - low).astype(jnp.uint8), bits)


def unpacked(x: jax.Array | Packed) -> jax.Array:
    """``x``, unpacked if it is :class:`Packed`."""
    return x.unpack() if isinstance(x, Packed) else x


class CompressedLeaf(ABC):
    """What every compressed leaf offers.

    A subclass is made with :func:`compressed_leaf` and states its invariant in its docstring.

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

    @abstractmethod
    def pack(self) -> CompressedLeaf:
        """The same leaf in its smallest storage; ``materialize`` gives the same bits."""


def method_of(leaf: Leaf) -> str:
    """What was done to a leaf, in words; of an array its type.

    >>> method_of(jnp.zeros(2)), method_of(Masked(jnp.zeros(2), jnp.zeros(2, bool)))
    ('float32', 'Masked float32')
    """
    return leaf.method if isinstance(leaf, CompressedLeaf) else str(getattr(leaf, "dtype", type(leaf).__name__))


def _none_at(x: object) -> np.ndarray | None:
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
    """Whether ``x`` is a compressed leaf; the ``is_leaf`` of a tree that holds some."""
    return isinstance(x, CompressedLeaf)


def dense(x: Leaf) -> Leaf:
    """One leaf as an array."""
    return _dense(x) if isinstance(x, CompressedLeaf) else x


@on_any_mesh
@partial(jax.jit, inline=True)  # one program a leaf where nobody else compiles one
def _dense(x: CompressedLeaf) -> jax.Array:
    return x.materialize()


@compressed_leaf(meta=("straight",))
class Masked(CompressedLeaf):
    """``dense == where(mask, values, 0)``, and ``values`` holds zeros (or their code) where the mask is False.

    Fields:
      values: an array, or a leaf that a later transform made of it.
      mask: booleans of the values' rank that broadcast against them (a filter's mask is stored once a filter).
      straight: the gradient passes the mask on its way to the values; static, and False once packed.
    """

    values: Leaf
    mask: jax.Array | Packed
    straight: bool = False

    open: ClassVar[tuple[str, ...]] = ("values",)
    made_by: ClassVar[str] = "prune"

    @property
    def method(self) -> str:  # noqa: D102
        return f"Masked {method_of(self.values)}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return self.values.details() if isinstance(self.values, CompressedLeaf) else ()

    def zeros_at(self) -> np.ndarray | None:  # noqa: D102
        inner = self.values.zeros_at() if isinstance(self.values, CompressedLeaf) else _none_at(self.values)
        cut = _none_at(self.mask.on_host() if isinstance(self.mask, Packed) else self.mask)
        return None if inner is None or cut is None else inner | cut  # a grid may have no zero of its own

    @property
    def shape(self) -> Shape:  # noqa: D102
        return tuple(self.values.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.values.dtype

    def materialize(self) -> jax.Array:
        """The values where the mask is True, zeros elsewhere."""
        values, mask = dense(self.values), unpacked(self.mask)
        return masked_through(values, mask) if self.straight else masked(values, mask)

    def pack(self) -> Masked:
        """A bit a mask entry, the values packed."""
        mask = self.mask if isinstance(self.mask, Packed) else Packed.of(self.mask, 1, 0)
        return Masked(pack(self.values), mask)


@compressed_leaf()
class Switch(CompressedLeaf):
    """``dense == on if active else off``: what a gated transform makes before one knows whether its time has come.

    Fields:
      active: a boolean scalar.
      on: the leaf as the transform makes it.
      off: the leaf as it was.
    """

    active: jax.Array
    on: Leaf
    off: Leaf

    made_by: ClassVar[str] = "gate"

    @property
    def method(self) -> str:  # noqa: D102
        return f"Switch {method_of(self.on)} or {method_of(self.off)}"

    @property
    def shape(self) -> Shape:  # noqa: D102
        return tuple(self.on.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.off.dtype

    def materialize(self) -> jax.Array:
        """Selects between the two."""
        return jnp.where(self.active, dense(self.on), dense(self.off))

    def pack(self) -> Leaf:
        """Packs the one that is active.

        Raises:
          TypeError: inside jit, where it is not known which one that is.
        """
        if isinstance(self.active, jax.core.Tracer):
            raise TypeError(
                "pack: a gated leaf cannot be packed inside jit, where its gate is not known; pack outside."
            )
        return pack(self.on if bool(self.active) else self.off)


def materialize(tree: PyTree) -> PyTree:
    """The tree with every compressed leaf turned back into an array; other leaves are the same objects.

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

    >>> nbytes({"w": jnp.zeros((3, 4))})
    48
    """
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def zeros_counted(tree: PyTree) -> tuple[int, int]:
    """How many entries of the materialized float arrays are zero, and how many there are."""
    arrays = [
        x for x in jax.tree.leaves(materialize(tree)) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum(int((np.asarray(x) == 0).sum()) for x in arrays), sum(x.size for x in arrays)
