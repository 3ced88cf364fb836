"""Trees larger than memory: their leaves come one after another, and wait on disk until all are known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import FileIO

import numpy as np

from jaxcomp.artifact.disk import write_all
from jaxcomp.artifact.encoding import At, Encoder
from jaxcomp.artifact.tensors import BLOCK, Tensor, Tensors
from jaxcomp.core.types import Json, Leaf

Pairs = Iterator[tuple[str | Sequence[str | int], Leaf]]
"""Paths, "block/kernel" or their keys, and leaves."""


def encode_stream(pairs: Pairs, spool: FileIO) -> tuple[Json, list[Tensor]]:
    """As :func:`~jaxcomp.artifact.encoding.encode_tree` of the nested dicts of these leaves, of which one is held.

    Args:
      pairs: the paths and leaves, in any order.
      spool: a file for the tensors, empty.

    Raises:
      ValueError: a path comes twice, or leads through a leaf.
      TypeError: what is no pair of a path and a leaf, or a leaf that a file cannot hold.
    """
    encoder = Encoder(Tensors(keep=Spool(spool).kept))
    root: dict[str | int, Json] = {}
    for pair in pairs:
        keys, leaf = _checked(pair)
        at, inside = At(), root
        for key in keys[:-1]:
            at, inside = at.child(key), inside.setdefault(key, _Inner())
            if not isinstance(inside, _Inner):
                raise ValueError(f"save: {at.path!r} is a leaf and holds others; each path must be of one leaf.")
        if keys[-1] in inside:
            raise ValueError(f"save: {at.child(keys[-1]).path!r} comes twice; each path must be of one leaf.")
        inside[keys[-1]] = encoder.node(leaf, at.child(keys[-1]))
    return _node(root), encoder.out.all


class _Inner(dict[str | int, Json]):
    """A dict of the tree, in contrast to the JSON of a leaf."""


def _node(inner: dict[str | int, Json]) -> Json:
    return {"dict": [[k, _node(v) if isinstance(v, _Inner) else v] for k, v in inner.items()]}


def _checked(pair: object) -> tuple[Sequence[str | int], Leaf]:
    """The keys and the leaf of a pair."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"save: an iterator must give pairs of a path and a leaf, got {type(pair).__name__}.")
    keys, leaf = pair[0].split("/") if isinstance(pair[0], str) else tuple(pair[0]), pair[1]
    if not keys or not all(type(k) in (str, int) for k in keys):
        raise TypeError(f"save: {pair[0]!r} is no path; give strings as 'block/kernel', or tuples of keys.")
    return keys, leaf


class Spool:
    """Tensors whose bytes wait in a file."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._end = 0

    def kept(self, tensor: Tensor) -> Tensor:
        """The same tensor, whose bytes are in the file."""
        start = self._end
        for piece in tensor.pieces():
            write_all(self._file, memoryview(piece))
            self._end += piece.nbytes
        return replace(tensor, blocks=lambda: self._read(start, start + tensor.nbytes))

    def _read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        for at in range(start, stop, BLOCK):
            yield np.frombuffer(os.pread(self._file.fileno(), min(BLOCK, stop - at), at), np.uint8)
