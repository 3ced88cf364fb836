"""Leaves that wrap another: a mask over it, and a switch between two."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.gradients import masked, masked_through
from jaxcomp.core.leaves import CompressedLeaf, dense, method_of, none_at, pack
from jaxcomp.core.packed import Packed, compressed_leaf, unpacked
from jaxcomp.core.types import DType, Leaf, Shape


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
        inner = self.values.zeros_at() if isinstance(self.values, CompressedLeaf) else none_at(self.values)
        cut = none_at(self.mask.on_host() if isinstance(self.mask, Packed) else self.mask)
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
