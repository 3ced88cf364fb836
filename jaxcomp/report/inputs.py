"""Any file of weights that is read here: jaxcomp's own, others' safetensors and GGUF, numpy's, and Flax's msgpack."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from jaxcomp.artifact.container import KEY, opened
from jaxcomp.artifact.disk import FileError, reading_file
from jaxcomp.artifact.files import load_metadata
from jaxcomp.artifact.measuring import load_measured
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Json, PyTree
from jaxcomp.export.compressed_tensors.reading import from_compressed_tensors
from jaxcomp.export.compressed_tensors.writing import CONFIG
from jaxcomp.export.gguf.container import MAGIC
from jaxcomp.export.gguf.reading import read_gguf

KINDS = (
    "a file of jaxcomp.save, safetensors, GGUF, .npz, .npy or .msgpack of Flax, or a folder of the compressed-tensors"
    " layout"
)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file holds.

    Attributes:
      tree: its arrays and compressed leaves.
      kind: which format it has, in words.
      bytes: of the file.
      metadata: what was saved beside the tree.
      stored: the bytes of the file that each leaf takes, by path, where the format says.
    """

    tree: PyTree
    kind: str
    bytes: int
    metadata: Mapping[str, Json] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Weights:
    """Reads a file of weights, or a folder that has a config.json beside them.

    Which format a file has is seen in its first bytes, and of msgpack by its name.

    Nothing in a file is run: pickled objects in numpy's files are refused.

    Raises:
      FileError: there is no such file, it is damaged, or of a format that is not read. The message says which are.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     np.savez(f"{d}/w.npz", kernel=np.ones((2, 3)))
    ...     read(f"{d}/w.npz").tree["kernel"].shape
    (2, 3)
    """
    name = os.fspath(path)
    if (Path(name) / CONFIG).exists():
        with progress("read"):
            return _folder(name)
    with reading_file(name, owner="read"), FileIO(name, "r") as f:
        start = f.read(8) or b""
        size = os.fstat(f.fileno()).st_size
    kinds: list[tuple[bool, Callable[[str, int], Weights]]] = [
        (start[:4] == b"PK\x03\x04", _npz),
        (start[:6] == b"\x93NUMPY", _npy),
        (start[:4] == MAGIC, _gguf),
        (Path(name).suffix == ".msgpack", _msgpack),
        (len(start) == 8 and _next_is_brace(name), _safetensors),
    ]
    reader = next((reader for fits, reader in kinds if fits), None)
    if reader is None:
        raise FileError(f"read: {name!r} is of no format that is read here; give {KINDS}.")
    with progress("read"):
        return reader(name, size)


def _next_is_brace(name: str) -> bool:
    with FileIO(name, "r") as f:
        f.seek(8)
        return f.read(1) == b"{"


def _safetensors(name: str, size: int) -> Weights:
    with reading_file(name, owner="read"), FileIO(name, "r") as f, ThreadPoolExecutor(1) as hashing:
        reader = opened(f, hashing)
        if KEY not in reader.metadata:
            tree = {entry.name: reader.read(i) for i, entry in enumerate(reader.entries)}
            return Weights(tree, "safetensors of another program", size, dict(reader.metadata))
    tree, stored = load_measured(name)
    return Weights(tree, "jaxcomp", size, load_metadata(name), stored)


def _gguf(name: str, size: int) -> Weights:
    tree, metadata = read_gguf(name)
    return Weights(tree, "GGUF", size, {key: _short(value) for key, value in metadata.items()})


def _short(value: object) -> Json:
    """A list of metadata, such as a vocabulary, by its first entries."""
    if not isinstance(value, list | np.ndarray):
        return value if isinstance(value, str | int | float) else str(value)
    first: list[Json] = [*np.asarray(value[:8]).tolist()]
    return first if len(value) <= 8 else [*first, f"... {len(value)} in all"]


def _folder(name: str) -> Weights:
    tree = from_compressed_tensors(name)
    size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    return Weights(tree, "compressed-tensors", size)


def _npz(name: str, size: int) -> Weights:
    try:
        # Opened here: numpy leaves the file open where it is no whole archive.
        with FileIO(name, "r") as f, np.load(f, allow_pickle=False) as held:
            return Weights({key: held[key] for key in held.files}, "numpy's npz", size)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise FileError(f"read: {name!r} is no whole npz file of arrays ({e}); save it again.") from e


def _npy(name: str, size: int) -> Weights:
    try:
        return Weights({Path(name).stem: np.load(name, allow_pickle=False)}, "numpy's npy", size)
    except (ValueError, OSError, EOFError) as e:
        raise FileError(f"read: {name!r} is no whole npy file of an array ({e}); save it again.") from e


def _msgpack(name: str, size: int) -> Weights:
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(Path(name).read_bytes())
    except Exception as e:  # whatever a wrong file makes the reader raise
        raise FileError(f"read: {name!r} is no whole msgpack file of Flax ({e}); save it again.") from e
    return Weights(tree, "Flax's msgpack", size)
