"""Writes a tree as a GGUF file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

import numpy as np

from jaxcomp.artifact.disk import replacing
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import PyTree, Shape
from jaxcomp.export.coded import Coded, coded, prepared
from jaxcomp.export.errors import ExportError
from jaxcomp.export.gguf.blocks import KINDS, PLAIN, block_bytes, kind_of
from jaxcomp.export.gguf.container import MAX_DIMS, MAX_NAME, Value, value_bytes, write
from jaxcomp.export.names import Names, array_leaves, places

OWNER = "to_gguf"
_NUMBERS = {dtype: number for number, dtype in PLAIN.items()}
_FILE_TYPES = {0: 0, 1: 1, 30: 32, **{kind.number: kind.file_type for kind in KINDS.values()}}
"""What "general.file_type" says of a file by the type of most of its weights."""


def to_gguf(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    architecture: str = "jaxcomp",
    metadata: Mapping[str, Value] | None = None,
    names: Names | None = None,
    roles: Roles | None = None,
    floats: Where | None = None,
) -> int:
    """Writes a tree as one GGUF file, the quantized leaves in blocks of their own codes.

    ``Int(8)`` becomes Q8_0, ``Int(4)`` Q4_0, ``Int(4, symmetric=False)`` Q4_1, ``Int(5)`` Q5_0 and ``recipes.mx(E2M1)``
    MXFP4, wherever each 32 neighbouring inputs share a scale: ``per=Groups(32)`` or a multiple of it, ``Channels()``,
    ``Tensor()``. Codes are written as they are. Scales are float16 in the file: a reader computes
    ``(code - zero_point) * float16(scale)``, in float32, to the bit. In Q4_1 a scale is rounded to 7 to 11 bits, so
    that its product with the zero point is a float16 too and zeros stay zero.

    Args:
      path: of the file.
      tree: arrays and compressed leaves, by path.
      architecture: what "general.architecture" says, such as "llama".
      metadata: further entries, by key: booleans, integers (uint32 where they fit, else int32 or wider), floats
        (float32), strings, lists of one of these, and numpy's numbers as the type that they are.
      names: of the tensors, by path: ``{r"blocks/(\\d+)/query/kernel": r"blk.\\1.attn_q.weight"}``, an ordered table of
        regular expressions, or a function. What no rule matches is called as its path, with dots.
      roles: what the axes do, as ``jaxcomp.roles(fn)(params, *args)`` reads off the program; needed for kernels of
        more than two axes that are no convolution's.
      floats: which leaves are written as floats though they are compressed.

    Returns:
      Bytes of the file.

    Raises:
      ExportError: a leaf that the format has nothing for (the message says which grids it has), scales that float16
        cannot say, a name that is too long, or metadata that are none.
      FileError: it cannot be written; the old file is as it was.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> params = {"mlp": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    >>> small = jc.quantize(jc.Int(8), per=jc.Groups(32)).apply((), params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = jc.export.to_gguf(f"{folder}/net.gguf", small)
    ...     print(jc.export.from_gguf(f"{folder}/net.gguf")["mlp"]["weight"])
    <Quantized int8, 8x64, groups of 32, 1.12 B/weight, 0% zeros>

    Source: the GGUF specification, version 3; blocks as ggml-common.h defines them.
    """
    leaves = array_leaves(tree, OWNER, is_compressed)
    where = places(leaves, names=names, roles=roles, owner=OWNER)
    tensors: list[tuple[str, Shape, int, np.ndarray]] = []
    weights: Counter[int] = Counter()
    for key, leaf in leaves:
        place, whole = where[key], tuple(leaf.shape)
        small = prepared(leaf, key, floats=floats, owner=OWNER)
        if is_compressed(small):
            entries = [_blocks(x, key) for x in coded(small, place, key, OWNER)]
        else:
            entries = [_plain(place.there(x), key) for x in place.layers(np.asarray(small))]
        for name, entry in zip(place.names(whole), entries, strict=True):
            _check(name, entry[0], key)
            tensors.append((name, *entry))
            weights[entry[1]] += int(np.prod(entry[0]))
    said = _metadata(architecture, weights, metadata or {})
    with replacing(path, owner=OWNER) as f:
        return write(f, said, tensors)


def _blocks(x: Coded, path: str) -> tuple[Shape, int, np.ndarray]:
    try:
        kind = kind_of(x)
        return x.shape, kind.number, block_bytes(x, kind)
    except ExportError as e:
        raise ExportError(f"{OWNER}: {path!r} {e} floats={path!r} writes it as floats.") from None


def _plain(x: np.ndarray, path: str) -> tuple[Shape, int, np.ndarray]:
    if x.dtype not in _NUMBERS:
        raise ExportError(f"{OWNER}: {path!r} is of type {x.dtype}, which GGUF has no name for; cast it first.")
    return tuple(x.shape), _NUMBERS[x.dtype], x


def _check(name: str, shape: Shape, path: str) -> None:
    if len(name.encode()) > MAX_NAME:
        raise ExportError(
            f"{OWNER}: {path!r} is called {name!r}, which is longer than the {MAX_NAME} bytes that a name has in GGUF;"
            " give it a shorter one in names=."
        )
    if len(shape) > MAX_DIMS:
        raise ExportError(f"{OWNER}: {path!r} has {len(shape)} axes, and a tensor of GGUF at most {MAX_DIMS}.")


def _metadata(architecture: str, weights: Counter[int], given: Mapping[str, Value]) -> dict[str, object]:
    said: dict[str, object] = {"general.architecture": architecture}
    if set(weights) & set(KINDS):
        said["general.quantization_version"] = 2
    most = weights.most_common(1)
    if most and most[0][0] in _FILE_TYPES:
        said["general.file_type"] = _FILE_TYPES[most[0][0]]
    said |= given
    for key, value in said.items():
        try:
            value_bytes(value)
        except (TypeError, ValueError, OverflowError) as e:
            raise ExportError(f"{OWNER}: the metadata {key!r} cannot be written: {e}.") from None
    return said
