"""A file whose leaves are read one by one, when they are asked for."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import numpy as np

from jaxcomp.artifact.decoding import decode_tree
from jaxcomp.artifact.disk import reading_file
from jaxcomp.artifact.files import decoded, reading
from jaxcomp.artifact.selecting import leaves_of
from jaxcomp.core.types import Json, Leaf
from jaxcomp.quantization.companding import Compander


class OpenTree(Mapping[str, Leaf]):
    """The leaves of an open file by path; see :func:`open_tree`.

    Attributes:
      metadata: what :func:`~jaxcomp.artifact.save` was given.
    """

    def __init__(self, path: str | os.PathLike[str], companders: Iterable[Compander], limit: int | None) -> None:
        self._name, self._companders, self._limit = os.fspath(path), list(companders), limit
        with ExitStack() as stack:
            self._reader, described = stack.enter_context(reading(path, limit))
            with reading_file(self._name):
                self._nodes = decoded(self._reader, lambda: _by_path(described["tree"]), whole=False)
            self._closing = stack.pop_all()
        self.metadata: Mapping[str, Json] = described["metadata"]
        self._map: np.ndarray | None = None

    def __getitem__(self, path: str) -> Leaf:
        """Reads one leaf, and checks it; nothing else of the file is read.

        Raises:
          KeyError: there is no leaf at this path.
          FileError: its bytes do not match their checksums, or say what cannot be.
        """
        node = self._node(path)
        reader = self._reader.again(self._limit)
        with reading_file(self._name):
            return decoded(reader, lambda: decode_tree(node, reader, self._companders, at=path), whole=False)

    def mapped(self, path: str) -> np.ndarray:
        """An array as a view of the file: its pages come and go as memory allows, and no one may write to it.

        A file that is cut while it is mapped ends the process; :func:`~jaxcomp.artifact.save` never does that.

        Raises:
          KeyError: there is no leaf at this path.
          FileError: it does not match its checksum.
          TypeError: it is stored otherwise than as it is: compressed, coded, or with its zeros left out.
        """
        node = self._node(path)
        number = node["numpy"] if isinstance(node, dict) and "numpy" in node else node
        if type(number) is not int or self._reader.entry(number).code is not None:
            raise TypeError(f"mapped: {path!r} is not stored as it is; read it with tree[{path!r}].")
        if self._map is None:
            room = mmap.mmap(self._reader.file.fileno(), 0, prot=mmap.PROT_READ)
            self._map = np.frombuffer(room, np.uint8)
        reader, data = self._reader.again(self._limit), self._map
        with reading_file(self._name):
            return decoded(reader, lambda: reader.view(number, data, path), whole=False)

    def _node(self, path: str) -> Json:
        if self._reader.file.closed:
            raise ValueError(f"{self!r} was closed; read its leaves before that.")
        return self._nodes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"<OpenTree of {self._name!r}, {len(self)} leaves>"

    def close(self) -> None:
        """Closes the file; views of it stay."""
        self._closing.close()

    def __enter__(self) -> OpenTree:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _by_path(tree: Json) -> dict[str, Json]:
    nodes: dict[str, Json] = {}
    for path, node in leaves_of(tree):
        if path in nodes:
            raise ValueError(f"holds two leaves at {path!r}, which paths cannot tell apart; load it")
        nodes[path] = node
    return nodes


def open_tree(
    path: str | os.PathLike[str], *, companders: Iterable[Compander] = (), limit: int | None = None
) -> OpenTree:
    """Opens a file of :func:`~jaxcomp.artifact.save` without reading its leaves: a mapping from paths to leaves.

    The header is read and checked; each leaf is when it is asked for. Files of versions 1 to 3, which have one checksum
    for all, are read once. The file stays open, so that another one that is saved under its name meanwhile is not mixed
    with it.

    Args:
      path: the file.
      companders: the pairs of companded leaves that are not built in.
      limit: the bytes of memory that a leaf may take; None is 1 GiB, or a hundred times the file's size.

    Raises:
      FileError: as :func:`~jaxcomp.artifact.load`.

    >>> import tempfile
    >>> from jaxcomp.artifact import save
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = save(f"{d}/w.safetensors", {"a": np.ones(9), "b": {"c": np.arange(3), "d": 7}})
    ...     with open_tree(f"{d}/w.safetensors") as tree:
    ...         list(tree), tree["b/c"], tree.mapped("a").sum()
    (['a', 'b/c', 'b/d'], array([0, 1, 2]), np.float64(9.0))
    """
    return OpenTree(path, companders, limit)
