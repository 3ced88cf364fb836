"""Where arrays live: one mesh over the devices of all processes, batches split over it, everything else on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.data.sets import Split

T = TypeVar("T")
Fed = tuple[jax.Array, jax.Array, jax.Array | None]
"""Images, labels, and which of them the batch is: all of them where that is None."""


class Mesh(NamedTuple):
    """Batches are split over all devices, everything else is on each."""

    split: NamedSharding
    copied: NamedSharding
    devices: int

    @property
    def alone(self) -> bool:
        """Whether this process holds all devices."""
        return self.split.is_fully_addressable

    @property
    def source(self) -> NamedSharding:
        """How the images and labels lie that :meth:`feed` gives."""
        return self.copied if self.alone else self.split

    def place(self, x: np.ndarray, rows: np.ndarray | None = None) -> jax.Array:
        """``x``, or ``x[rows]``, split: a process reads the part of its own devices, of what is the same in all."""

        def part(own: tuple[slice, ...] | None) -> np.ndarray:
            at = own[0] if own else slice(None)
            return x[at] if rows is None else x[rows[at]]

        shape = x.shape if rows is None else (len(rows), *x.shape[1:])
        return jax.make_array_from_callback(shape, self.split, part)

    def copy(self, tree: T) -> T:
        """A tree on all devices; each process gives the same values, which is not looked at here."""
        if self.alone:
            return jax.device_put(tree, self.copied)

        def everywhere(x: jax.Array) -> jax.Array:
            value = np.asarray(x)
            return jax.make_array_from_callback(value.shape, self.copied, lambda own: value[own])

        return jax.tree.map(everywhere, tree)

    def own(self, tree: T) -> T:
        """A tree of :meth:`copy` as arrays of this process alone: what is done with them, the others do not join."""
        return tree if self.alone else jax.tree.map(lambda x: x.addressable_data(0), tree)

    def feed(self, split: Split) -> Callable[[np.ndarray], Fed]:
        """From the indices of a batch to what the step takes.

        One process puts the whole split on its devices, once; of several, each puts there its share of each batch.
        """
        if self.alone:
            images, labels = jax.device_put((split.images, split.labels), self.copied)
            return lambda indices: (images, labels, self.place(indices))
        return lambda indices: (self.place(split.images, indices), self.place(split.labels, indices), None)


def data_mesh() -> Mesh:
    """All devices of all processes in one data-parallel axis."""
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return Mesh(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()), len(devices))
