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
        return nested(
            {name: _leaf({name: x}, _as_it_is(name, x.shape), tuple(x.shape)) for name, x in held.items()}, owner
        )
    leaves = array_leaves(like, owner, is_compressed)
    where = places(leaves, names=names, roles=roles, owner=owner)
    known = {path: where[path].names(tuple(leaf.shape)) for path, leaf in leaves}
    lost = [f"{path!r} as {name!r}" for path, names_ in known.items() for name in names_ if name not in held]
    if lost:
        raise ValueError(f"does not hold {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}; change names=, or like=")
    spare = sorted(set(held).difference(*known.values()))
    if spare:
        said = ", ".join(map(repr, spare[:4])) + ", ..." * (len(spare) > 4)
        raise ValueError(f"holds {said}, which like= has no leaf for; change names=, or like=")
    out = [
        _leaf({name: held[name] for name in known[path]}, where[path], tuple(leaf.shape), path) for path, leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_compressed), out)


def _as_it_is(name: str, shape: Shape) -> Place:
    """Its last axis is the inputs, as in all these formats."""
    return Place(name, tuple(range(len(shape))), max(len(shape) - 1, 0), min(len(shape), 1))


def _leaf(found: Mapping[str, Weight | np.ndarray], place: Place, shape: Shape, path: str = "") -> Leaf:
    """The leaf of a shape, at its place, of the weight there, or of those of its layers."""
    wanted = place.shape(place.one(shape))
    for name, x in found.items():
        if path and tuple(x.shape) != wanted:
            raise ValueError(
                f"holds {name!r} of shape {tuple(x.shape)}, and {path!r} of shape {shape} wants it as {wanted}; change"
                " like=, or pass roles="
            )
    arrays = [x for x in found.values() if isinstance(x, np.ndarray)]
    weights = [x for x in found.values() if isinstance(x, Weight)]
    if not weights:
        back = [place.back(x, place.one(shape)) for x in arrays]
        whole = np.stack(back) if place.layered else back[0]
        # One that jax would narrow, of 64 bits while x64 is off, stays numpy's.
        return jnp.asarray(whole) if jax.dtypes.canonicalize_dtype(whole.dtype) == whole.dtype else whole
    if arrays:
        raise ValueError(f"holds {place.name!r} quantized and not, by layers; read it without like=")
    return leaf_of([x.coded for x in weights], place, shape, weights[0].dtype)
