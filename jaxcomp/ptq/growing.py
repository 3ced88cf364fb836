"""A tree whose leaves are compressed one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params
from jaxcomp.trace.program import shape_like
from jaxcomp.trace.unrolling import Slices, layer_of

Layer = tuple[int, ...]


class Growing:
    """A parameter tree of which more and more is compressed: leaves as they were given, and what they are now.

    A name is a leaf's path, or of a leaf whose layers are apart the path and the number of one, "layers/kernel/3".

    Args:
      params: arrays and compressed leaves.
      apart: the leaves whose layers are apart, by path, and how many these are.

    Attributes:
      compressed: names of the leaves that were given compressed.
    """

    def __init__(self, params: Params, apart: Mapping[str, int]) -> None:
        named, self._treedef = leaves_with_paths(params, is_leaf=is_compressed)
        self._given = dict(named)
        self._now = {path: dense(leaf) for path, leaf in named}
        self._exact = dict(self._now)
        self._made: dict[str, dict[Layer, Leaf]] = {}
        self._apart = apart
        self._places = {f"{path}/{i}": (path, (i,)) for path, n in apart.items() for i in range(n)}
        self.compressed = frozenset(name for path, leaf in named if is_compressed(leaf) for name in self.names(path))

    def names(self, path: str) -> list[str]:
        """Of a leaf."""
        return [f"{path}/{i}" for i in range(self._apart[path])] if path in self._apart else [path]

    def place(self, name: str, layer: Layer = ()) -> tuple[str, Layer]:
        """The path of a leaf, and where in it a layer of what has this name is."""
        path, outer = self._places.get(name, (name, ()))
        return path, (*outer, *layer)

    def shapes(self) -> Params:
        """The tree that is run, of shapes: layers that are apart are :class:`~jaxcomp.trace.unrolling.Slices`."""

        def shape(path: str, x: jax.Array) -> Leaf:
            whole = shape_like(x)
            if path not in self._apart:
                return whole
            return Slices([jax.ShapeDtypeStruct(whole.shape[1:], whole.dtype)] * self._apart[path])

        return self._treedef.unflatten([shape(path, x) for path, x in self._now.items()])

    def arrays(self, names: Sequence[str], *, exact: bool = False) -> tuple[jax.Array, ...]:
        """Some leaves, dense: as they are now, or as they were in the float network."""
        where = self._exact if exact else self._now
        return tuple(where[path][layer] if layer else where[path] for path, layer in map(self.place, names))

    def given(self, name: str, layer: Layer) -> Leaf:
        """One layer of a leaf as it was given; what its layers share stays."""
        path, layer = self.place(name, layer)
        return layer_of(self._given[path], layer)

    def now(self, name: str, layer: Layer) -> jax.Array:
        """One layer of a leaf as it is now, dense."""
        path, layer = self.place(name, layer)
        return self._now[path][layer]

    def take(self, name: str, layer: Layer, new: Leaf) -> None:
        """Puts a leaf, or one layer of it, in the place of the one there."""
        path, layer = self.place(name, layer)
        self._now[path] = self._now[path].at[layer].set(dense(new)) if layer else dense(new)
        self._made.setdefault(path, {})[layer] = new

    def move(self, name: str, by: NDArray[np.float64], layer: Layer) -> None:
        """Adds to an array, or to one layer of it."""
        path, layer = self.place(name, layer)
        now = self._now[path]
        part = now[layer]
        new = (part + jnp.asarray(by.reshape(part.shape), part.dtype)).astype(now.dtype)
        self._now[path] = self._given[path] = now.at[layer].set(new) if layer else new

    def whole(self) -> Params:
        """The tree, its new leaves in their places."""
        made = {path: _whole(layers) for path, layers in self._made.items()}
        return self._treedef.unflatten([made.get(path, leaf) for path, leaf in self._given.items()])


def _whole(made: Mapping[Layer, Leaf]) -> Leaf:
    """The layers of a leaf as one."""
    if () in made:
        return made[()]
    sizes = tuple(max(i) + 1 for i in zip(*made, strict=True))
    return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*sizes, *xs[0].shape), *made.values())
