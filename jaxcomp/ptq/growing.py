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

Layer = tuple[int, ...]


class Growing:
    """A parameter tree of which more and more is compressed: leaves as they were given, and what they are now.

    Args:
      params: arrays and compressed leaves.

    Attributes:
      compressed: paths of the leaves that were given compressed.
    """

    def __init__(self, params: Params) -> None:
        named, self._treedef = leaves_with_paths(params, is_leaf=is_compressed)
        self._given = dict(named)
        self._now = {path: dense(leaf) for path, leaf in named}
        self._exact = dict(self._now)
        self._made: dict[str, dict[Layer, Leaf]] = {}
        self.compressed = frozenset(path for path, leaf in named if is_compressed(leaf))

    def dense(self) -> Params:
        """The tree of arrays, as it is now."""
        return self._treedef.unflatten(list(self._now.values()))

    def arrays(self, paths: Sequence[str], *, exact: bool = False) -> tuple[jax.Array, ...]:
        """Some leaves, dense: as they are now, or as they were in the float network."""
        return tuple((self._exact if exact else self._now)[path] for path in paths)

    def given(self, path: str, layer: Layer) -> Leaf:
        """One layer of a leaf as it was given; what its layers share stays."""
        return jax.tree.map(
            lambda x: x[tuple(min(i, n - 1) for i, n in zip(layer, x.shape, strict=False))], self._given[path]
        )

    def now(self, path: str, layer: Layer) -> jax.Array:
        """One layer of a leaf as it is now, dense."""
        return self._now[path][layer]

    def take(self, path: str, layer: Layer, new: Leaf) -> None:
        """Puts a leaf, or one layer of it, in the place of the one there."""
        self._now[path] = self._now[path].at[layer].set(dense(new)) if layer else dense(new)
        self._made.setdefault(path, {})[layer] = new

    def move(self, path: str, by: NDArray[np.float64], layer: Layer) -> None:
        """Adds to an array, or to one layer of it."""
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
