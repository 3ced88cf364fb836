"""Save and load a compressed tree: one safetensors file, whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxcomp.artifact.codec import Json, Tensors, decode_tree, encode_tree
from jaxcomp.artifact.duplicates import all_named, held_once
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import PyTree
from jaxcomp.quantization.companding import Compander

FORMAT_VERSION = 2  # written only where tensors are equal: a file without a reference is of version 1
_KEY = "jaxcomp"

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}


class FileError(ValueError):
    """A file that cannot be read as a compressed tree, or written."""


def save(path: str | os.PathLike[str], tree: PyTree, *, metadata: Mapping[str, Json] | None = None) -> int:
    """Writes a tree in its smallest storage; returns the file's size in bytes.

    Compressed leaves are packed first. A masked leaf is stored as a bitmap and its survivors where that is smaller than
    all its values (else as those, without the mask), and so is an array with many zeros. Equal tensors, such as the one
    table of several codebooks, are stored once. The file appears under its name only when it is complete and on disk.

    Args:
      path: where; the folder must exist.
      tree: dicts, lists, tuples, ``nnx.State``, Equinox arrays: any pytree of arrays, numbers, strings and compressed
        leaves.
      metadata: anything that JSON holds; :func:`load_metadata` reads it.

    Raises:
      FileError: the file cannot be written; nothing is left behind.
      TypeError: a leaf that a file cannot hold. The message names the path.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxcomp import Int, materialize, quantize
    >>> w = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
    >>> with tempfile.TemporaryDirectory() as d:
    ...     size = save(f"{d}/w.safetensors", quantize(Int(4)).apply((), w))
    ...     again = materialize(load(f"{d}/w.safetensors"))
    >>> size < 4096 * 4 / 5, bool((again["kernel"] == materialize(quantize(Int(4)).apply((), w))["kernel"]).all())
    (True, True)

    Source: the safetensors format, version 0.x; codes and masks are little-endian bit streams.
    """
    node, tensors = encode_tree(tree)
    for name, x in tensors.items():
        if x.dtype not in _NAMES:
            raise TypeError(f"save: {name!r} is of type {x.dtype}, which safetensors does not hold.")
    tensors, same = held_once(tensors)
    described = {"version": FORMAT_VERSION if same else 1, "tree": node, "metadata": dict(metadata or {})}
    if same:
        described["same"] = same
    described["sha256"] = _digest(described, tensors)
    header = {_KEY: _text(described)}  # one entry: the library writes several in any order
    data = safetensors.numpy.save(tensors, metadata=header)
    write_atomically(path, data)
    return len(data)


def load(path: str | os.PathLike[str], *, like: PyTree = None, companders: Iterable[Compander] = ()) -> PyTree:
    """Reads what :func:`save` wrote: the whole tree with its compressed leaves, packed, or an error.

    Args:
      path: the file.
      like: a tree of the same paths and shapes (arrays or ``jax.ShapeDtypeStruct``) whose containers the result takes.
      companders: the pairs of companded leaves that are not built in.

    Raises:
      FileError: the file is missing, truncated, edited, of another program, or of a newer version; or ``like`` is
        another tree. Never a partial tree.
    """
    described, tensors = _read(path)
    try:
        tree = decode_tree(described["tree"], all_named(tensors, described.get("same", {})), companders)
    except ValueError as e:
        raise FileError(f"load: {os.fspath(path)!r}: {e}.") from e
    return tree if like is None else _shaped_like(tree, like, path)


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Json]:
    """The metadata that :func:`save` was given. Raises :class:`FileError` as :func:`load` does."""
    return _read(path)[0]["metadata"]


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is either the old one or the complete new one, whenever the process or the machine stops.

    Raises:
      FileError: it cannot be written; the old file is as it was and nothing else is left.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as e:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise FileError(f"save: cannot write {os.fspath(path)!r}: {e.strerror or e}.") from e


def _text(described: Json) -> str:
    return json.dumps(described, separators=(",", ":"), allow_nan=False)


def _digest(described: Json, tensors: Tensors) -> str:
    """Of everything that the file says, but the digest itself."""
    sha = hashlib.sha256(_text({k: v for k, v in described.items() if k != "sha256"}).encode())
    for name in sorted(tensors):
        x = tensors[name]
        sha.update(f"\n{name} {_NAMES[x.dtype]} {list(x.shape)}\n".encode())
        sha.update(x.tobytes())
    return sha.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise FileError(f"load: cannot read {name!r}: {e.strerror or e}.") from e
    header = _header(data, name)
    if _KEY not in header:
        raise FileError(f"load: {name!r} is a safetensors file, but not one that jaxcomp.save wrote.")
    try:
        described = json.loads(header[_KEY])
        version = described["version"]
    except (ValueError, KeyError, TypeError) as e:
        raise FileError(f"load: {name!r} has a damaged header; get the file again.") from e
    if version not in range(1, FORMAT_VERSION + 1):
        raise FileError(
            f"load: {name!r} has format version {version}, this jaxcomp reads 1 to {FORMAT_VERSION}; use the jaxcomp"
            " that wrote it, or a newer one."
        )
    tensors = _tensors(data, name)
    if described.get("sha256") != _digest(described, tensors):
        raise FileError(f"load: {name!r} does not match its checksum: it was damaged or edited; get the file again.")
    return described, tensors


def _header(data: bytes, name: str) -> dict[str, str]:
    """The metadata of a safetensors header; the library checks the rest."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if len(data) >= 8 + length > 8 else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise FileError(f"load: {name!r} is truncated or not a safetensors file.")
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _tensors(data: bytes, name: str) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as e:
        raise FileError(f"load: {name!r} is truncated or damaged ({e}).") from e
    out = {}
    for key, info in entries:
        if info["dtype"] not in _DTYPES:
            raise FileError(f"load: {name!r} holds {key!r} of type {info['dtype']}, which is not known.")
        out[key] = np.frombuffer(info["data"], _DTYPES[info["dtype"]]).reshape(info["shape"])
    return out


def _shaped_like(tree: PyTree, like: PyTree, path: str | os.PathLike[str]) -> PyTree:
    name = os.fspath(path)
    found = dict(leaves_with_paths(tree, is_leaf=is_compressed)[0])
    wanted, treedef = leaves_with_paths(like, is_leaf=is_compressed)
    missing = [p for p, _ in wanted if p not in found]
    extra = sorted(set(found) - {p for p, _ in wanted})
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the tree does not"
        raise FileError(f"load: {name!r} {what}; it is of another model than the tree given as like=.")
    for p, leaf in wanted:
        if hasattr(leaf, "shape") and tuple(leaf.shape) != tuple(
            jax.numpy.shape(found[p]) if not is_compressed(found[p]) else found[p].shape
        ):
            raise FileError(f"load: {name!r} holds {p!r} of shape {tuple(found[p].shape)}, wanted {tuple(leaf.shape)}.")
    return treedef.unflatten([found[p] for p, _ in wanted])
