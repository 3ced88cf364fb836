"""Checkpoints in safetensors files, of which each tensor is read when it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import jax
import numpy as np

from jaxcomp.artifact.container import KEY, Entry, header_of
from jaxcomp.artifact.disk import reading_file
from jaxcomp.artifact.limits import parsed
from jaxcomp.core.types import Json, Leaf
from jaxcomp.scale.sources import Leaves, Shapes

_SHARD = re.compile(r"(.*)-(0*[1-9]\d*)-of-(\d+)\.safetensors", re.DOTALL)


class Safetensors(Leaves):
    """The tensors of safetensors files; see :func:`open_safetensors`."""

    def __init__(self, files: list[Path], rename: Callable[[str], str]) -> None:
        found: dict[str, tuple[Path, Entry]] = {}
        for file in files:
            with reading_file(str(file), owner="open_safetensors"):
                for entry in _entries(file):
                    path = rename(entry.name)
                    if not isinstance(path, str):
                        raise TypeError(f"open_safetensors: rename gives {path!r} for {entry.name!r}; give a path.")
                    if path in found:
                        other = f"{found[path][1].name!r} of {found[path][0].name!r}"
                        raise ValueError(f"holds {entry.name!r}, whose path {path!r} {other} has, too; rename one")
                    found[path] = file, entry
        self._files = files
        self._found = {path: found[path] for path in sorted(found, key=lambda p: p.split("/"))}
        self._shapes = {p: jax.ShapeDtypeStruct(e.shape, e.dtype) for p, (_, e) in self._found.items()}

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
        file, entry = self._found[path]
        with reading_file(str(file), owner="open_safetensors"), file.open("rb") as f:
            f.seek(entry.start)
            data = np.empty(entry.nbytes, np.uint8)
            if f.readinto(memoryview(data)) != data.nbytes:
                raise ValueError(f"ends before {path!r} does; get it again")
        return data.view(entry.dtype).reshape(entry.shape)


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
    where = Path(path)
    name = rename or (lambda name: name.replace(".", "/"))
    with reading_file(str(where), owner="open_safetensors"):
        files, named = _shards(where)
        found = Safetensors(files, name)
        missing = [tensor for tensor in named if name(tensor) not in found]
        if missing:
            raise ValueError(f"names {missing[0]!r}, which {named[missing[0]]!r} does not hold; get the file again")
    return found


def _shards(where: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files of a checkpoint, and by its index, where there is one, the file of each tensor.

    Raises:
      OSError, ValueError: they cannot be read, or the index is none.
    """
    if where.is_dir():
        indexes = sorted(where.glob("*.safetensors.index.json"))
        if len(indexes) > 1:
            raise ValueError(f"holds {len(indexes)} indexes; give one, {indexes[0].name!r} say")
        where = indexes[0] if indexes else where
    if where.suffix != ".json":
        files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
        if not files:
            raise ValueError("holds no *.safetensors file")
        if where.is_dir():
            _check_numbers({file.name for file in files})
        return files, {}
    said = parsed(where.read_bytes(), f"has a damaged index, {where.name!r}; get it again")
    named = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(x, str) for x in named.values()):
        raise ValueError(f"has an index, {where.name!r}, whose weight_map does not name a file for each tensor")
    return sorted({where.parent / file for file in named.values()}), named


def _check_numbers(names: set[str]) -> None:
    """Raises:
    ValueError: shards are numbered, "model-00001-of-00003.safetensors", and one of them is not there.
    """
    for name in sorted(names):
        if found := _SHARD.fullmatch(name):
            before, number, count = found.groups()
            every = (f"{before}-{i:0{len(number)}}-of-{count}.safetensors" for i in range(1, int(count) + 1))
            if missing := next((other for other in every if other not in names), None):
                raise ValueError(f"holds {name!r} and no {missing!r}; get that file, too")


def _entries(file: Path) -> Iterator[Entry]:
    """The tensors of a file.

    Raises:
      ValueError: it is no safetensors file, is cut, holds a type that jaxcomp does not know, or is one of ours.
    """
    with FileIO(file) as f:
        found = header_of(f)
    if KEY in found.metadata:  # equal tensors are there once, zeros left out, codes packed
        raise ValueError("is a file of jc.save, which jc.load reads; give compress_file the tree that it gives")
    yield from found.entries
