"""Named weights of a file as a tree: nested dicts, or the structure of a tree that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import DType, Leaf, PyTree, Shape
from jaxcomp.export.coded import Coded, leaf_of
from jaxcomp.export.names import Names, Place, array_leaves, nested, places
from jaxcomp.quantization.leaves import Quantized


@dataclass(frozen=True)
class Weight:
    """A quantized weight of a file.

    Fields:
      coded: its rows, a matrix.
      shape: as it lies in the file.
      dtype: of the dense array.
    """

    coded: Coded
    shape: Shape
    dtype: DType

    def leaf(self, place: Place, shape: Shape) -> Quantized:
        """The leaf of a shape, at its place."""
        x, scale = self.coded, None
        if x.parts is not None:
            outer = jnp.full((1, 1), x.parts.outer, jnp.float32)
            scale = Quantized(jnp.asarray(x.parts.codes), outer, None, x.parts.grid, jnp.dtype(jnp.float32))
        return leaf_of(x, place, shape, dtype=self.dtype, scale=scale)


def filled(
    held: Mapping[str, Weight | np.ndarray],
    like: PyTree | None,
    *,
    names: Names | None,
    roles: Roles | None,
    owner: str,
) -> PyTree:
    """The tree.

    Raises:
      ValueError: the names and shapes are not those that ``like`` wants; the message goes after the file's name.
    """
    if like is None:
        return nested({name: _leaf(x, _as_it_is(name, x.shape), x.shape) for name, x in held.items()}, owner)
    leaves = array_leaves(like, owner, is_compressed)
    where = places(leaves, names=names, roles=roles, owner=owner)
    lost = [f"{path!r} as {where[path].name!r}" for path, _ in leaves if where[path].name not in held]
    if lost:
        raise ValueError(f"does not hold {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}; change names=, or like=")
    spare = sorted(set(held) - {place.name for place in where.values()})
    if spare:
        said = ", ".join(map(repr, spare[:4])) + ", ..." * (len(spare) > 4)
        raise ValueError(f"holds {said}, which like= has no leaf for; change names=, or like=")
    out = []
    for path, leaf in leaves:
        x, place, shape = held[where[path].name], where[path], tuple(leaf.shape)
        if tuple(x.shape) != place.shape(shape):
            raise ValueError(
                f"holds {place.name!r} of shape {tuple(x.shape)}, and {path!r} of shape {shape} wants it as"
                f" {place.shape(shape)}; change like=, or pass roles="
            )
        out.append(_leaf(x, place, shape))
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_compressed), out)


def _as_it_is(name: str, shape: Shape) -> Place:
    """Its last axis is the inputs, as in all these formats."""
    return Place(name, tuple(range(len(shape))), max(len(shape) - 1, 0), min(len(shape), 1))


def _leaf(x: Weight | np.ndarray, place: Place, shape: Shape) -> Leaf:
    return jnp.asarray(place.back(x, shape)) if isinstance(x, np.ndarray) else x.leaf(place, shape)
