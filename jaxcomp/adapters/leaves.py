"""The leaf of an adapted parameter: what is frozen, and the factors that learn beside it."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed, method_of, pack
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import DType, Leaf, Params


@compressed_leaf(meta=("scaling",))
class Adapted(CompressedLeaf):
    """``dense == base + scaling * delta``, and no gradient reaches the base.

    Fields:
      base: the frozen weights, an array or any compressed leaf.
      delta: what learns, of the same shape; the ``LowRank`` factors of LoRA.
      scaling: a number, static; LoRA's α / r.
    """

    base: Leaf
    delta: Leaf
    scaling: float = 1.0

    open: ClassVar[tuple[str, ...]] = ("delta",)
    made_by: ClassVar[str] = "adapt"

    @property
    def method(self) -> str:  # noqa: D102
        return f"Adapted {method_of(self.base)} by {method_of(self.delta)}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return self.base.details() if isinstance(self.base, CompressedLeaf) else ()

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.base.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return jnp.dtype(self.base.dtype)

    def materialize(self) -> jax.Array:
        """The sum, computed in float32 (or float64) and then cast."""
        wide = compute_dtype(self.dtype)
        base = dense(jax.lax.stop_gradient(self.base)).astype(wide)
        return (base + dense(self.delta).astype(wide) * self.scaling).astype(self.dtype)

    def pack(self) -> Adapted:
        """The same leaf, its base and its factors packed."""
        return Adapted(pack(self.base), pack(self.delta), self.scaling)


def adapted_leaves(params: Params, owner: str) -> dict[str, Adapted]:
    """The adapted leaves by path.

    Raises:
      ValueError: there is none.
    """
    named, _ = leaves_with_paths(params, is_leaf=is_compressed)
    found = {path: leaf for path, leaf in named if isinstance(leaf, Adapted)}
    if not found:
        raise ValueError(f"{owner}: the tree has no adapted leaf; give it what adapt made.")
    return found
