"""Reads a GGUF file as a tree."""

from __future__ import annotations

import os
from io import FileIO

import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.disk import reading_file
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import PyTree
from jaxcomp.export.filling import Weight, filled
from jaxcomp.export.gguf.blocks import BLOCK, KINDS, PLAIN, Kind, from_bytes
from jaxcomp.export.gguf.container import Header, Info, header
from jaxcomp.export.names import Names

OWNER = "from_gguf"


def from_gguf(
    path: str | os.PathLike[str],
    *,
    like: PyTree | None = None,
    names: Names | None = None,
    roles: Roles | None = None,
) -> PyTree:
    """Reads a GGUF file: Q8_0, Q4_0, Q5_0, MXFP4 and such Q4_1 as ``to_gguf`` writes as ``Quantized`` leaves.

    Exact: ``materialize`` gives what the package gguf dequantizes, bit for bit. Blocks that no leaf has, such as
    K-quants and any other Q4_1, come as the float32 arrays that they are; the package gguf dequantizes them.

    Args:
      path: of the file.
      like: a tree of arrays or their shapes, whose structure is filled; None makes nested dicts of the names, split at
        their dots, with matrices as the file has them, outputs first.
      names, roles: as of ``to_gguf``, by the paths of ``like``.

    Raises:
      FileError: no such file, a damaged one, a type that nothing here dequantizes, or not the weights that ``like``
        wants.
      ImportError: the file needs the package gguf, which is not there.

    >>> from_gguf("nowhere.gguf")
    Traceback (most recent call last):
    ...
    jaxcomp.artifact.disk.FileError: from_gguf: cannot read 'nowhere.gguf': No such file or directory.
    """
    return read_gguf(path, like=like, names=names, roles=roles)[0]


def read_gguf(
    path: str | os.PathLike[str],
    *,
    like: PyTree | None = None,
    names: Names | None = None,
    roles: Roles | None = None,
) -> tuple[PyTree, dict[str, object]]:
    """The tree of :func:`from_gguf`, and the file's metadata.

    Raises:
      FileError, ImportError: as there.
    """
    name = os.fspath(path)
    with reading_file(name, owner=OWNER):
        with FileIO(name, "r") as f:
            size = os.fstat(f.fileno()).st_size
            head = header(f, size)
            sizes = [_size(info) for info in head.tensors]
            _check_layout(head, sizes, size)
            held = {
                info.name: _tensor(info, head.read(f, info, n)) for info, n in zip(head.tensors, sizes, strict=True)
            }
        return filled(held, like, names=names, roles=roles, owner=OWNER), head.metadata


def _size(info: Info) -> int:
    """Bytes of a tensor."""
    count = 1
    for n in info.shape:
        count *= n
    if info.kind in PLAIN:
        return count * PLAIN[info.kind].itemsize
    block, size = (BLOCK, KINDS[info.kind].size) if info.kind in KINDS else _foreign(info)
    if not info.shape or info.shape[-1] % block:
        raise ValueError(f"is damaged: {info.name!r} of shape {info.shape} is in blocks of {block}")
    return count // block * size


def _foreign(info: Info) -> tuple[int, int]:
    """Weights and bytes of a block of a type that the package gguf knows."""
    gguf = _package(info)
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
    except (ValueError, KeyError):
        raise ValueError(f"holds {info.name!r} of type {info.kind}, which is not known") from None
    return int(block), int(size)


def _package(info: Info):  # type: ignore[no-untyped-def]
    try:
        import gguf
    except ImportError as e:
        raise ImportError(
            f"{OWNER}: {info.name!r} is of type {info.kind}, which the package gguf dequantizes; install it, as in"
            ' pip install "jaxcomp[export]".'
        ) from e
    return gguf


def _check_layout(head: Header, sizes: list[int], room: int) -> None:
    """Whether all tensors are in the file, and none lies over another."""
    end, before = head.start, ""
    for info, n in sorted(zip(head.tensors, sizes, strict=True), key=lambda pair: pair[0].offset):
        at = head.start + info.offset
        if at + n > room:
            raise ValueError(f"is truncated or damaged: {info.name!r} ends at byte {at + n} of {room}")
        if at < end and n:
            raise ValueError(f"is damaged: {info.name!r} at byte {at} lies over {before!r}")
        end, before = at + n, info.name


def _tensor(info: Info, data: np.ndarray) -> Weight | np.ndarray:
    if info.kind in PLAIN:
        return data.view(PLAIN[info.kind]).reshape(info.shape)
    if not data.size:
        return np.zeros(info.shape, np.float32)
    if info.kind in KINDS:
        return _blocks(info, data, KINDS[info.kind])
    gguf = _package(info)
    try:
        found = gguf.dequantize(data.reshape(*info.shape[:-1], -1), gguf.GGMLQuantizationType(info.kind))
    except NotImplementedError:
        raise ValueError(
            f"holds {info.name!r} of type {info.kind}, which the package gguf does not dequantize"
        ) from None
    return np.asarray(found, np.float32).reshape(info.shape)


def _blocks(info: Info, data: np.ndarray, kind: Kind) -> Weight | np.ndarray:
    found = from_bytes(data, kind, info.shape[-1])
    if isinstance(found, np.ndarray):
        return found.reshape(info.shape)
    return Weight(found, info.shape, jnp.dtype(jnp.float32))
