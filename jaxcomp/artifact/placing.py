"""Leaves of a file on the devices that they are for: each goes there when it was read, and is whole on none of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import path_str
from jaxcomp.core.placement import Laid, layout
from jaxcomp.core.types import Leaf, PyTree, Shape


class Placed:
    """Puts leaves where a tree of shardings says.

    An array of a compressed leaf lies as the leaf: split where its axes are the leaf's, as a scale's are, and whole
    otherwise; a stream of codes, which has one axis, is split over all that the leaf is split over.

    Args:
      shardings: one for all, or a tree of them by the paths of leaves, or of what is above them.
    """

    def __init__(self, shardings: PyTree) -> None:
        named, _ = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=lambda s: isinstance(s, Sharding))
        self._all = {path_str(path): s for path, s in named}
        for path, s in self._all.items():
            if not isinstance(s, Sharding):
                raise TypeError(f"load: sharding= holds {s!r} at {path!r}; it must be shardings of jax.")

    def __call__(self, path: str, leaf: Leaf) -> Leaf:
        """The leaf on its devices.

        Raises:
          ValueError: there is no sharding for it, or it cannot lie so; the message names the path.
        """
        sharding = self._of(path)
        if not is_compressed(leaf):
            return _put(leaf, _fitting(sharding, np.shape(leaf), path))
        flat, treedef = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x: isinstance(x, Packed))
        return jax.tree.unflatten(treedef, [_field(x, path_str(p), (path, leaf.shape, sharding)) for p, x in flat])

    def check(self, paths: Iterable[str]) -> None:
        """Raises ValueError where a sharding is for none of the leaves at these paths."""
        above = {path[:n] for path in paths for n in (0, len(path), *(m.start() for m in re.finditer("/", path)))}
        missing = sorted(self._all.keys() - above)
        if missing:
            raise ValueError(f"holds nothing at {missing[0]!r}, for which there is a sharding")

    def _of(self, path: str) -> Sharding:
        steps = path.split("/")
        for n in range(len(steps), -1, -1):
            above = "/".join(steps[:n])
            if above in self._all:
                return self._all[above]
        raise ValueError(f"holds {path!r}, for which there is no sharding")


def _field(x: Any, name: str, of: tuple[str, Shape, Sharding]) -> Any:
    """One array of a compressed leaf."""
    path, shape, sharding = of
    stream = isinstance(x, Packed)
    data = x.data if stream else x
    if isinstance(sharding, NamedSharding):
        axes = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
        _fitting(sharding, shape, path)
        if stream:
            wanted: tuple[Any, ...] = (tuple(a for names in axes for a in _names(names)) or None,)
        else:
            wanted = tuple(layout((path, name), np.shape(data), [Laid((path,), shape, axes)]))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*wanted), memory_kind=sharding.memory_kind)
        if not _fits(sharding, np.shape(data)):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    placed = _put(data, _fitting(sharding, np.shape(data), path))
    return Packed(placed, x.bits, x.low, x.shape) if stream else placed


def _names(axis: Any) -> tuple[Any, ...]:
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def _fits(sharding: Sharding, shape: Shape) -> bool:
    try:
        sharding.shard_shape(shape)
    except (IndexError, ValueError):  # fewer axes than it splits, or of a length that it does not divide
        return False
    return True


def _fitting(sharding: Sharding, shape: Shape, path: str) -> Sharding:
    if _fits(sharding, shape):
        return sharding
    raise ValueError(f"holds {path!r} of shape {tuple(shape)}, which cannot lie as {sharding}")


def _put(x: Any, sharding: Sharding) -> Any:
    if isinstance(x, jax.Array):  # a key
        return jax.device_put(x, sharding)
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x  # jax would narrow it
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
