"""Checkpoints whose leaves are read one by one: safetensors in shards, an Orbax checkpoint, a tree in memory."""

from __future__ import annotations

import json
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from jaxcomp.artifact.disk import reading_file
from jaxcomp.artifact.limits import MAX_HEADER
from jaxcomp.artifact.tensors import DTYPES
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


class Safetensors(Leaves):
    """The tensors of safetensors files; see :func:`open_safetensors`."""

    def __init__(self, files: list[Path], rename: Callable[[str], str]) -> None:
        found: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
        for file in files:
            with reading_file(str(file), owner="open_safetensors"):
                for name, entry in _entries(file):
                    path = rename(name)
                    if path in found:
                        raise ValueError(f"holds {path!r}, which {found[path][0].name!r} holds, too; rename one")
                    found[path] = (file, *entry)
        self._files = files
        self._found = {path: found[path] for path in sorted(found, key=lambda p: p.split("/"))}
        self._shapes = {p: jax.ShapeDtypeStruct(s, d) for p, (_, d, s, _) in self._found.items()}

    @property
    def shapes(self) -> Shapes:
        """Shapes and types by path, from the headers."""
        return self._shapes

    @property
    def about(self) -> Json:
        """The files' names, sizes and times."""
        stats = ((f.name, f.stat()) for f in self._files)
        return [[name, s.st_size, s.st_mtime_ns] for name, s in stats]

    def read(self, path: str) -> Leaf:
        """One tensor: its bytes, and no others, are read.

        Raises:
          FileError: they cannot be read, or the file ends before them.
        """
        file, dtype, shape, start = self._found[path]
        with reading_file(str(file), owner="open_safetensors"), file.open("rb") as f:
            f.seek(start)
            data = np.empty(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, np.uint8)
            if f.readinto(memoryview(data)) != data.nbytes:
                raise ValueError(f"ends before {path!r} does; get it again")
        return data.view(dtype).reshape(shape)


def open_safetensors(path: str | os.PathLike[str], *, rename: Callable[[str], str] | None = None) -> Safetensors:
    """Opens a checkpoint in safetensors files without reading its values.

    Args:
      path: a file; a folder of shards; or their ``model.safetensors.index.json``, of which every file must be there.
      rename: from a tensor's name to its path, "block/kernel"; None makes "/" of the names' dots, and two tensors of
        one path are an error.

    Raises:
      FileError: a file is missing or no safetensors file, or the index names a tensor that its file does not hold.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as d:
    ...     save_file({"up.kernel": np.ones((2, 3), np.float32)}, f"{d}/model.safetensors")
    ...     leaves = open_safetensors(d)
    ...     leaves.shapes, float(leaves["up/kernel"].sum())
    ({'up/kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}, 6.0)
    """
    where, named = Path(path), {}
    name = rename or (lambda name: name.replace(".", "/"))
    with reading_file(str(where), owner="open_safetensors"):
        if where.is_dir():
            indexes = sorted(where.glob("*.safetensors.index.json"))
            if len(indexes) == 1:
                where = indexes[0]
        if where.suffix == ".json":
            named = json.loads(where.read_text())["weight_map"]
            files = sorted({where.parent / file for file in named.values()})
        else:
            files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
        if not files:
            raise ValueError("holds no *.safetensors file")
        found = Safetensors(files, name)
        missing = [tensor for tensor in named if name(tensor) not in found]
        if missing:
            raise ValueError(f"names {missing[0]!r}, which {named[missing[0]]!r} does not hold; get the file again")
    return found


def _entries(file: Path) -> Iterator[tuple[str, tuple[np.dtype, tuple[int, ...], int]]]:
    """Names, types, shapes and places of a file's tensors.

    Raises:
      ValueError: it is no safetensors file, is cut, or holds a type that jaxcomp does not know.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError("is no safetensors file, or is cut; get it again")
        header = json.loads(f.read(length))
    for name, said in header.items():
        if name == "__metadata__":
            continue
        if said["dtype"] not in DTYPES:
            raise ValueError(f"holds {name!r} of type {said['dtype']}, which is none of {', '.join(DTYPES)}")
        dtype, shape, (start, stop) = DTYPES[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
        if stop - start != int(np.prod(shape, dtype=object)) * dtype.itemsize or 8 + length + stop > size:
            raise ValueError(f"ends before {name!r} does, or says what cannot be; get it again")
        yield name, (dtype, shape, 8 + length + start)


class Orbax(Leaves):
    """The arrays of an Orbax checkpoint; see :func:`open_orbax`."""

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._folder, self._ocp = folder, ocp
        metadata = ocp.StandardCheckpointer().metadata(folder)
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
        """One array, in the host's memory; nothing else is read."""
        ocp = self._ocp
        item = jax.tree_util.tree_map_with_path(
            lambda keys, x: self._shapes[path] if path_str(keys) == path else ocp.PLACEHOLDER, self._tree
        )
        how = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(self._folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
        return {path_str(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}[path]


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
