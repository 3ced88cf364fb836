"""Save and load a compressed tree: one safetensors file, whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO

from jaxcomp.artifact.coding.blocks import Coding, check, encode
from jaxcomp.artifact.container import FORMAT_VERSION, KEY, Reader, opened
from jaxcomp.artifact.decoding import decode_tree
from jaxcomp.artifact.disk import Counted, reading_file, replacing, spooled, write_all
from jaxcomp.artifact.encoding import encode_tree
from jaxcomp.artifact.limits import parsed
from jaxcomp.artifact.matching import shaped_like
from jaxcomp.artifact.older import renewed
from jaxcomp.artifact.pieces import checked
from jaxcomp.artifact.placing import Placed
from jaxcomp.artifact.processes import save_together, spanning
from jaxcomp.artifact.selecting import Only, chosen, leaves_of
from jaxcomp.artifact.shapes import encode_shapes, of_shapes
from jaxcomp.artifact.statics import known_at
from jaxcomp.artifact.streaming import encode_stream
from jaxcomp.artifact.writing import Layout, by_alignment, compact_layout, plain_header, write_plain
from jaxcomp.core.leaves import CompressedLeaf
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Json, Leaf, PyTree
from jaxcomp.quantization.companding import Compander


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    metadata: Mapping[str, Json] | None = None,
    coding: Coding | None = None,
) -> int:
    """Writes a tree in its smallest storage; returns the file's size in bytes.

    Compressed leaves are packed first. A masked leaf is stored as a bitmap and its survivors where that is smaller than
    all its values (else as those, without the mask), and so is an array with many zeros. Equal tensors, such as the one
    table of several codebooks, are stored once. The file appears under its name only when it is complete and on disk.
    Where arrays span processes, all of them call this with the same tree and gather it leaf by leaf; the first one
    writes, and the call ends when the file is there.

    Args:
      path: where; the folder must exist.
      tree: dicts, lists, tuples, ``nnx.State``, Equinox arrays: any pytree of arrays of jax and numpy, random keys,
        numbers, strings, compressed leaves, ranges of activations, and plans of :mod:`jaxcomp.structure`. Or an
        iterator of paths, "block/kernel", and leaves, for trees larger than memory: one leaf is held at a time, and
        the folder needs room for two files.
      metadata: anything that JSON holds; :func:`load_metadata` reads it.
      coding: None writes tensors as they are, which every reader of safetensors opens; "zstd" codes them fast, "ans"
        small, each tensor where it pays (extra ``coding``).

    Raises:
      FileError: the file cannot be written; nothing is left behind.
      ImportError: what codes is not installed; the message names the extra.
      TypeError: a leaf that a file cannot hold, or a key of a dict that is no string or integer. The message names the
        path.
      ValueError: metadata that JSON does not hold, another coding, or an iterator's leaf that spans processes.

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
    about, layout = _checked_metadata(metadata), _layout(coding)
    if not isinstance(tree, Iterator) and spanning(tree):
        quiet = lambda f, tensors, node: layout(f, tensors, {"tree": node, "metadata": about}, lambda done: None)  # noqa: E731
        return save_together(path, tree, quiet)
    with replacing(path) as f, spooled(path) as spool:
        with progress("save: packing"):
            node, tensors = encode_stream(tree, spool) if isinstance(tree, Iterator) else encode_tree(tree)
        said = {"tree": node, "metadata": about}
        with progress("save: writing", sum(t.nbytes for t in tensors)) as advance:
            return layout(f, tensors, said, advance)


def _layout(coding: Coding | None) -> Layout:
    if coding is None:
        return write_plain
    check(coding, owner="save")
    return compact_layout(lambda tensor: encode(tensor, coding))


def file_size(tree: PyTree, *, metadata: Mapping[str, Json] | None = None, coding: Coding | None = None) -> int:
    """The bytes of the file that :func:`save` would write; nothing is written.

    Args:
      tree, metadata, coding: as :func:`save` has them; or leaves are ``jax.ShapeDtypeStruct``, of arrays that are taken
        to differ from each other and to have few zeros.

    Raises:
      TypeError, ValueError: as :func:`save`; of shapes also a masked leaf or a coding, whose sizes are in the values.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as d:
    ...     save(f"{d}/w.safetensors", {"w": np.ones(9)}) == file_size({"w": np.ones(9)})
    True
    """
    if coding is not None and of_shapes(tree):
        raise ValueError(
            "file_size: what a code takes is in the values, not in their shapes; give arrays, or coding=None."
        )
    node, tensors = encode_shapes(tree) if of_shapes(tree) else encode_tree(tree)
    said = {"tree": node, "metadata": _checked_metadata(metadata)}
    if coding is not None:
        return _layout(coding)(Counted(), tensors, said, lambda written: None)
    return 8 + len(plain_header(by_alignment(tensors), said)[0]) + sum(t.nbytes for t in tensors)


def stored_bytes(leaf: Leaf) -> int:
    """The bytes that a file holds for one leaf, the header apart; what several leaves share counts for each.

    Args:
      leaf: an array or a compressed leaf, or one of ``jax.ShapeDtypeStruct``.

    Raises:
      TypeError, ValueError: as :func:`file_size`.

    >>> import jax, numpy as np
    >>> stored_bytes(np.ones((4, 4), np.float32)), stored_bytes(jax.ShapeDtypeStruct((4, 4), np.float32))
    (64, 64)
    """
    return sum(t.nbytes for t in (encode_shapes(leaf) if of_shapes(leaf) else encode_tree(leaf))[1])


def _checked_metadata(metadata: Mapping[str, Json] | None) -> dict[str, Json]:
    about = dict(metadata or {})
    try:
        again = json.loads(json.dumps(about, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"save: the metadata are not what JSON holds ({e}).") from e
    if again.keys() != about.keys():
        raise ValueError(f"save: the keys of metadata must be strings, got {list(about)!r}.")
    return about


def load(
    path: str | os.PathLike[str],
    *,
    like: PyTree = None,
    only: Only | None = None,
    sharding: PyTree = None,
    companders: Iterable[Compander] = (),
    limit: int | None = None,
) -> PyTree:
    """Reads what :func:`save` wrote: the whole tree with its compressed leaves, packed, or an error.

    Args:
      path: the file.
      like: a tree of the same paths, shapes and types (arrays or ``jax.ShapeDtypeStruct``) whose containers the result
        takes.
      only: which leaves are read: a path, a regular expression that matches whole paths, or a predicate of a path. What
        is not read is left out of dicts, is None in lists and tuples, and is not checked.
      sharding: where arrays are put, leaf by leaf: a sharding of jax, or a tree of them by paths. The arrays of a
        compressed leaf lie as the leaf does, where they have its axes. Arrays of numpy become those of jax.
      companders: the pairs of companded leaves that are not built in.
      limit: the bytes of memory that the tree may take, for files that say more than they hold; None is 1 GiB, or a
        hundred times the file's size where that is more.

    Raises:
      FileError: the file is missing, truncated, edited, of another program, or of a newer version; or ``like`` is
        another tree. Never a partial tree.
    """
    companders = list(companders)
    place = None if sharding is None else Placed(sharding)
    with reading(path, limit) as (reader, described), progress("load"):

        def decode() -> PyTree:
            node = described["tree"] if only is None else chosen(described["tree"], only)
            if place is not None:
                place.check(path for path, _ in leaves_of(node))
            return decode_tree(node, reader, companders, place=place)

        tree = decoded(reader, decode, whole=only is None)
        return tree if like is None else shaped_like(tree, like)


def decoded(reader: Reader, decode: Callable[[], PyTree], *, whole: bool) -> PyTree:
    """What ``decode`` makes of what it reads, checked; a wrong checksum is said before what it led to.

    Raises:
      ValueError: as :meth:`Reader.finish`, or whatever a wrong file makes Python raise.
    """
    try:
        tree = decode()
    except Exception as e:
        reader.finish(whole=whole)
        raise _as_value_error(e) from e
    reader.finish(whole=whole)
    return tree


def _as_value_error(e: Exception) -> ValueError:
    """Whatever a wrong file makes Python raise, in words."""
    return e if isinstance(e, ValueError) else ValueError(f"says what cannot be ({e!r})")


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Json]:
    """The metadata that :func:`save` was given.

    Args:
      path: of the file.

    Raises:
      FileError: as :func:`load`.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = save(f"{d}/w.safetensors", {"w": np.ones(9)}, metadata={"accuracy": 0.99})
    ...     load_metadata(f"{d}/w.safetensors")
    {'accuracy': 0.99}
    """
    with reading(path) as (_, described):
        return described["metadata"]


@contextmanager
def reading(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[tuple[Reader, dict[str, Json]]]:
    """The file open, and what it says of its tree, in today's words. Every ValueError inside becomes a FileError."""
    name = os.fspath(path)
    with reading_file(name), FileIO(name, "r") as f, ThreadPoolExecutor(1) as hashing:
        reader = opened(f, hashing, limit)
        try:
            found = _described_by(reader)
        except Exception as e:
            raise _as_value_error(e) from e
        yield found


def _described_by(reader: Reader) -> tuple[Reader, dict[str, Json]]:
    """What a file says of its tree, and what reads its tensors.

    Raises:
      ValueError: it is of another program, of a newer version, or damaged.
    """
    if KEY not in reader.metadata:
        raise ValueError(
            "is a safetensors file, but not one that jaxcomp.save wrote; safetensors itself reads its arrays"
        )
    described = parsed(reader.metadata[KEY], "has a damaged header; get the file again")
    version = described.get("version") if isinstance(described, dict) else None
    if type(version) is not int:
        raise ValueError("has a damaged header; get the file again")
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"has format version {version}, this jaxcomp reads 1 to {FORMAT_VERSION}; use the jaxcomp that wrote it, or"
            " a newer one"
        )
    if version < FORMAT_VERSION:
        return reader, renewed(described, reader, _fields_of)
    reader, described = checked(reader, described)
    missing = [key for key in ("tree", "metadata") if key not in described]
    if missing:
        raise ValueError(f"has a damaged header, which lacks {missing[0]!r}; get the file again")
    if described.get("needs"):
        raise ValueError(f"needs {described['needs']}, which this jaxcomp does not know; use a newer one")
    return reader, described


def _fields_of(name: str, path: str) -> dict[str, bool]:
    """The children of a leaf's class, and whether they are its codes."""
    cls = known_at(CompressedLeaf, name, path)
    return {f: f == cls.coded for f in cls.data_fields}


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is either the old one or the complete new one, whenever the process or the machine stops.

    Raises:
      FileError: it cannot be written; the old file is as it was and nothing else is left.
    """
    with replacing(path) as f:
        write_all(f, data)
