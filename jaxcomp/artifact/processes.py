"""Trees that lie on the devices of several processes: gathered a leaf at a time, written by one process for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from io import FileIO
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcomp.artifact.disk import FileError, replacing, spooled
from jaxcomp.artifact.encoding import At, Encoder, spans_processes
from jaxcomp.artifact.streaming import Spool
from jaxcomp.artifact.tensors import Tensor, Tensors
from jaxcomp.core.types import Json, Leaf, PyTree

Write = Callable[[FileIO, list[Tensor], Json], int]
"""Writes the tensors of a file and the tree that holds them; gives its size."""


def spanning(tree: PyTree) -> bool:
    """Whether this process lacks a part of an array of a tree."""
    left = [tree]
    while left:  # not all at once: a file holds dicts whose keys jax cannot sort
        for x in jax.tree.leaves(left.pop(), is_leaf=lambda y: type(y) is dict):
            if type(x) is dict:
                left += x.values()
            elif spans_processes(x):
                return True
    return False


def save_together(path: str | os.PathLike[str], tree: PyTree, write: Write) -> int:
    """The first process writes the file of a tree; all gather one leaf after another for it.

    A host's memory holds one leaf, and so does each device's while that is gathered. Every process must call this with
    the same tree. It ends in all of them when the file is complete, with its size, or with an error.

    Raises:
      FileError: the first process cannot write.
      TypeError, ValueError: as :func:`~jaxcomp.artifact.save`, in every process.
    """
    size, error = 0, None
    with ExitStack() as opened:
        keep = _Kept(path, opened if jax.process_index() == 0 else None)
        encoder = Encoder(Tensors(keep=keep.kept), brought=gathered)
        node = encoder.node(tree, At())  # to the end, whatever becomes of the file: the others wait at every leaf
        error = keep.error
        if jax.process_index() == 0 and error is None:
            try:
                with replacing(path) as f:
                    size = write(f, encoder.out.all, node)
            except FileError as e:
                error = e
    return _agreed(path, size, error)


def gathered(leaf: Leaf) -> Leaf:
    """A leaf on a device of this process, for which all processes must ask; one that lies there stays as it is."""
    return jax.tree.map(_local, leaf)


def _local(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_local(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    if x.is_fully_replicated:
        return x.addressable_data(0)
    return jax.device_put(multihost_utils.process_allgather(x, tiled=True), jax.local_devices()[0])


class _Kept:
    """Tensors that wait on disk in the process that writes them, and nowhere in the others.

    Attributes:
      error: why they could not be kept; from then on none is.
    """

    def __init__(self, path: str | os.PathLike[str], opened: ExitStack | None) -> None:
        self._path = path
        self._spool: Spool | None = None
        self.error: FileError | None = None
        if opened is not None:
            try:
                self._spool = Spool(opened.enter_context(spooled(path)))
            except OSError as e:
                self._failed(e)

    def kept(self, tensor: Tensor) -> Tensor:
        if self._spool is not None and self.error is None:
            try:
                return self._spool.kept(tensor)
            except OSError as e:
                self._failed(e)
        return replace(tensor, blocks=lambda: iter(()))

    def _failed(self, e: OSError) -> None:
        self.error = FileError(f"save: cannot write {os.fspath(self._path)!r}: {e.strerror or e}.")
        self.error.__cause__ = e


def _agreed(path: str | os.PathLike[str], size: int, error: FileError | None) -> int:
    """The size that the first process wrote, in all; also where they wait for it.

    Raises:
      FileError: it could not write.
    """
    own = np.array([error is None, size >> 32, size & 0xFFFFFFFF], np.uint32)
    written, high, low = (int(n) for n in np.asarray(multihost_utils.broadcast_one_to_all(own)))
    if error is not None:
        raise error
    if not written:
        raise FileError(f"save: the first process cannot write {os.fspath(path)!r}; its error says why.")
    return high << 32 | low
