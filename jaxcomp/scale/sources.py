"""Trees whose leaves are read one by one: of an Orbax checkpoint, or in memory."""

from __future__ import annotations

import os
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from jaxcomp.artifact.disk import FileError, reading_file
from jaxcomp.core.paths import path_keys, path_str
from jaxcomp.core.types import Json, Leaf, PyTree

Keys = tuple[str | int, ...]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
_LOOKED_AT = 1 << 14


class Leaves(Mapping[str, Leaf]):
    """The leaves of a checkpoint by path, each read when it is asked for, and kept by nobody.

    They come in the order of JAX's flattened trees. Derive from it for a format of your own.
    """

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Shapes and types by path, which no values are read for."""

    @property
    @abstractmethod
    def about(self) -> Json:
        """What tells these leaves from others, as JSON: files, their sizes and times."""

    @abstractmethod
    def read(self, path: str) -> Leaf:
        """One leaf."""

    def keys_of(self, path: str) -> Keys:
        """The keys of nested dicts that lead to a leaf."""
        return tuple(path.split("/"))

    def __getitem__(self, path: str) -> Leaf:
        if path not in self.shapes:
            raise KeyError(path)
        return self.read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class TreeLeaves(Leaves):
    """Those of nested dicts in memory, or of any container of named things (``nnx.State``).

    Raises:
      ValueError: a leaf in a list or a tuple, or two leaves of one path.

    >>> TreeLeaves({"a": {"kernel": np.ones((2, 3), np.float32)}}).shapes
    {'a/kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """

    def __init__(self, tree: PyTree) -> None:
        self._leaves: dict[str, Leaf] = {}
        self._keys: dict[str, Keys] = {}
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = path_str(keys)
            _check_keys(keys, path)
            if path in self._leaves:
                raise ValueError(f"compress_file: two leaves are at {path!r}; give each a path of its own.")
            self._leaves[path] = leaf
            named = zip(keys, path_keys(keys), strict=False)  # of an nnx.State's keys the last is in no path
            self._keys[path] = tuple(key.key if isinstance(key, DictKey) else name for key, name in named)
        self._shapes = {p: jax.ShapeDtypeStruct(np.shape(x), _type_of(x)) for p, x in self._leaves.items()}

    @property
    def shapes(self) -> Shapes:
        """Shapes and types by path."""
        return self._shapes

    @property
    def about(self) -> Json:
        """A checksum of the first elements of each leaf."""
        first = (np.asarray(x.reshape(-1)[:_LOOKED_AT]) for x in self._leaves.values() if hasattr(x, "reshape"))
        return [zlib.crc32(np.ascontiguousarray(x).view(np.uint8)) for x in first]

    def read(self, path: str) -> Leaf:
        """The leaf itself."""
        return self._leaves[path]

    def keys_of(self, path: str) -> Keys:
        """The keys of its dicts."""
        return self._keys[path]


class Orbax(Leaves):
    """The arrays of an Orbax checkpoint; see :func:`open_orbax`."""

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._folder, self._ocp = folder, ocp
        with _orbax(folder):
            metadata = ocp.StandardCheckpointer().metadata(folder)
            if getattr(metadata, "item_metadata", metadata) is None:  # which Orbax says by a warning
                raise ValueError("Orbax finds no arrays in it")
        tree = getattr(metadata, "item_metadata", metadata)
        self._tree = getattr(tree, "tree", tree)
        self._shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for keys, leaf in jax.tree_util.tree_leaves_with_path(self._tree):
            _check_keys(keys, path_str(keys))
            self._shapes[path_str(keys)] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)

    @property
    def shapes(self) -> Shapes:
        """Shapes and types by path, from the checkpoint's metadata."""
        return self._shapes

    @property
    def about(self) -> Json:
        """The checkpoint's files, their sizes and times."""
        files = sorted(p for p in self._folder.rglob("*") if p.is_file())
        return [[str(p.relative_to(self._folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]

    def read(self, path: str) -> Leaf:
        """One array, in the host's memory; nothing else is read.

        Raises:
          FileError: it cannot be read.
        """
        ocp = self._ocp
        item = jax.tree_util.tree_map_with_path(
            lambda keys, x: self._shapes[path] if path_str(keys) == path else ocp.PLACEHOLDER, self._tree
        )
        how = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with _orbax(self._folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(self._folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
        return {path_str(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}[path]


@contextmanager
def _orbax(folder: Path) -> Iterator[None]:
    """Raises:
    FileError: Orbax raises, of which there are many kinds, of many lines.
    """
    try:
        yield
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise FileError(f"open_orbax: {str(folder)!r} is damaged or cannot be read ({reason}); get it again.") from e


def open_orbax(folder: str | os.PathLike[str]) -> Orbax:
    """Opens an Orbax checkpoint of one tree, as ``StandardCheckpointer`` and ``PyTreeCheckpointer`` write it.

    Of a ``CheckpointManager``'s step give the folder of the item, "17/default" or "17/params". Needs the package
    ``orbax-checkpoint``.

    Args:
      folder: of the checkpoint.

    Raises:
      FileError: there is no complete checkpoint of a tree.
      ValueError: an array in a list or a tuple.
    """
    where = Path(folder).resolve()
    with reading_file(str(where), owner="open_orbax"):
        where.stat()
        if not (where / "_METADATA").is_file():
            inside = sorted(p.parent.name for p in where.glob("*/_METADATA"))
            raise ValueError(f"holds no checkpoint of a tree{f'; {inside[0]!r} in it does' if inside else ''}")
    return Orbax(where)


def _type_of(x: Leaf) -> np.dtype:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _check_keys(keys: tuple[object, ...], path: str) -> None:
    if not keys or any(isinstance(key, SequenceKey) for key in keys):
        raise ValueError(
            f"compress_file: {path!r} is in a list or a tuple, or alone; a file that is written leaf by leaf holds"
            " nested dicts."
        )
