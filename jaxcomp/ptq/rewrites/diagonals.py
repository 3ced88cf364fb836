"""Diagonals of a program: factors of its channels, and what each multiplies, the function staying the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Params
from jaxcomp.ptq.rewrites.walking import Slice, slices_of
from jaxcomp.trace.program import Program

Vector = NDArray[np.float32]
"""A factor for each channel."""


@dataclass(frozen=True, eq=False)
class Side:
    """What one diagonal does to one leaf.

    Attributes:
      path, axes: ``channel`` runs over these axes of the leaf.
      channel: the channel of the diagonal at each index; -1 where there is none.
      inverse: it is divided by the factors, not multiplied.
      input: a product sums over these axes.
      kernel: a product reads the leaf.
    """

    path: str
    axes: tuple[int, ...]
    channel: NDArray[np.int64]
    inverse: bool
    input: bool
    kernel: bool

    def factors(self, s: Vector, rank: int) -> Vector:
        """What the leaf of ``rank`` axes is multiplied by, where the channels' factors are ``s``."""
        full = np.append(1 / s if self.inverse else s, np.ones(1, s.dtype))[self.channel]
        shape = dict(zip(self.axes, self.channel.shape, strict=True))
        return full.reshape([shape.get(i, 1) for i in range(rank)])

    def gathered(self, values: jax.Array | Vector, size: int) -> Vector:
        """The largest of ``values``, which lie over the side's axes, of each channel; 0 where there is none.

        Raises:
          ValueError: they are of another size.
        """
        if values.size != self.channel.size:
            raise ValueError(
                f"{self.path!r} has {self.channel.size} channels along its axes {self.axes}, and what is known of them"
                f" has shape {tuple(values.shape)}; gather it with these parameters and this function."
            )
        found = np.zeros(size + 1, np.float32)
        np.maximum.at(found, self.channel.reshape(-1), np.asarray(values, np.float32).reshape(-1))
        return found[:size]


@dataclass(frozen=True, eq=False)
class Diagonal:
    """``size`` channels that may each be multiplied by any positive factor, by its sides."""

    size: int
    sides: tuple[Side, ...]

    @cached_property
    def inputs(self) -> tuple[Side, ...]:
        """The sides that are summed over and multiplied: where the channels are consumed."""
        return tuple(s for s in self.sides if s.input and not s.inverse)

    @property
    def outputs(self) -> tuple[Side, ...]:
        """All other sides that are divided: where the channels are made."""
        return tuple(s for s in self.sides if s.inverse)

    def __repr__(self) -> str:
        def words(sides: Sequence[Side]) -> str:
            return ", ".join(f"{s.path}:{','.join(map(str, s.axes))}" for s in sides)

        return f"<{self.size} channels: {words(self.outputs)} -> {words([s for s in self.sides if not s.inverse])}>"

    def applied(self, leaves: Mapping[str, jax.Array], s: Vector) -> dict[str, jax.Array]:
        """The leaves that the diagonal touches, each multiplied by its factors."""
        new: dict[str, jax.Array] = {}
        for side in self.sides:
            leaf = jnp.asarray(new.get(side.path, leaves[side.path]))
            new[side.path] = leaf * side.factors(s, leaf.ndim).astype(leaf.dtype)
        return new


def diagonals_of(program: Program) -> tuple[Diagonal, ...]:
    """The diagonals of a program; channels that touch the same sides of the same leaves are one diagonal."""
    slices = slices_of(program)
    touched: dict[int, list[tuple[int, int]]] = {}
    for i, s in enumerate(slices):
        for name in np.unique(s.ids[s.ids != 0]).tolist():
            touched.setdefault(abs(name), []).append((i, 1 if name > 0 else -1))
    families: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for name, where in touched.items():
        if len(where) > 1:
            turned = -1 if sum(sign for i, sign in where if slices[i].input) < 0 else 1
            families.setdefault(tuple((i, sign * turned) for i, sign in where), []).append(name)
    found = [_diagonal(slices, where, names) for where, names in families.items()]
    return tuple(d for d in found if any(s.inverse for s in d.sides) or any(not s.kernel for s in d.sides))


def _diagonal(slices: Sequence[Slice], where: Sequence[tuple[int, int]], names: Sequence[int]) -> Diagonal:
    order = np.sort(names)
    sides = []
    for i, sign in where:
        s = slices[i]
        at = np.searchsorted(order, np.abs(s.ids)).clip(max=len(order) - 1)
        wanted = (order[at] == np.abs(s.ids)) & (s.ids != 0)
        sides.append(Side(s.path, s.axes, np.where(wanted, at, -1), sign < 0, s.input, s.kernel))
    return Diagonal(len(names), tuple(sides))


def arrays_of(params: Params, owner: str) -> dict[str, jax.Array]:
    """The arrays of a tree by path.

    Raises:
      TypeError: a leaf is compressed already.
    """
    named, _ = leaves_with_paths(params, is_leaf=is_compressed)
    for path, leaf in named:
        if is_compressed(leaf):
            raise TypeError(
                f"{owner}: {path!r} is a {type(leaf).__name__}, whose values can no longer be scaled; rewrite the "
                "parameters first, and compress what comes out."
            )
    return {path: leaf for path, leaf in named if hasattr(leaf, "shape")}


Choice = Callable[[Diagonal, Mapping[str, jax.Array]], Vector | None]
"""The factors of a diagonal, given the leaves as they are; None leaves it."""
