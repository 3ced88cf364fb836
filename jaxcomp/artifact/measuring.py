"""What each leaf takes of a file, and what it could take at best."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from jaxcomp.artifact.coding.ans import entropy
from jaxcomp.artifact.container import Reader
from jaxcomp.artifact.decoding import decode_tree
from jaxcomp.artifact.encoding import host_array
from jaxcomp.artifact.files import decoded, reading
from jaxcomp.artifact.limits import Budget
from jaxcomp.artifact.masking import Kept
from jaxcomp.core.bits import spread_out
from jaxcomp.core.leaves import CompressedLeaf, is_compressed, pack
from jaxcomp.core.packed import Packed
from jaxcomp.core.types import Leaf, PyTree
from jaxcomp.core.wrappers import Masked


def load_measured(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, int]]:
    """What :func:`~jaxcomp.artifact.load` gives, and the bytes of the file that each leaf was read from.

    A tensor that several leaves share counts for the first of them; the header counts for none.

    Args:
      path: the file.

    Raises:
      FileError: as :func:`~jaxcomp.artifact.load`.

    >>> import tempfile
    >>> from jaxcomp.artifact import save
    >>> with tempfile.TemporaryDirectory() as d:
    ...     _ = save(f"{d}/w.safetensors", {"a": np.ones(9), "b": np.arange(3, dtype=np.int8)})
    ...     load_measured(f"{d}/w.safetensors")[1]
    {'a': 72, 'b': 3}
    """
    with reading(path) as (reader, described):
        source = _Noting(reader)
        tree = decoded(reader, lambda: decode_tree(described["tree"], source), whole=True)
        return tree, source.bytes


@dataclass(frozen=True)
class _Noting:
    """A reader that notes for which leaf it read how many bytes."""

    reader: Reader
    bytes: dict[str, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.reader.size

    @property
    def budget(self) -> Budget:
        return self.reader.budget

    def read(self, number: int, path: str) -> np.ndarray:
        data = self.reader.read(number, path)
        entry = self.reader.entry(number)
        self.bytes[path] = self.bytes.get(path, 0) + (0 if number in self._seen else entry.stop - entry.start)
        self._seen.add(number)
        return data


def entropy_of(leaf: Leaf) -> float | None:
    """The bits of a leaf's codes at their empirical entropy of order 0, and of its mask at its own.

    What does not depend on the elements, such as scales and tables, is left out. A file is near this with
    ``coding="ans"``; below it only where neighbouring codes say something of each other.

    Args:
      leaf: an array or a compressed leaf, whose values are known.

    Returns:
      bits of all elements together, or None for what has no codes.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> t = jc.quantize(jc.Int(2), per=jc.Tensor())
    >>> entropy_of(t.apply((), {"w": jnp.array([[-1.0, 1.0, 1.0, -1.0]])})["w"]), entropy_of(jnp.ones(4))
    (4.0, None)

    Source: Shannon 1948, "A mathematical theory of communication".
    """
    packed = pack(leaf) if is_compressed(leaf) else leaf
    if not isinstance(packed, Masked):
        return _of_codes(packed, None)
    mask = packed.mask
    assert isinstance(mask, Packed)
    small = Kept(host_array(mask.data, ""), tuple(mask.shape))
    inner = _of_codes(packed.values, Kept.of(small.bits, small.shape, packed.shape))
    return None if inner is None else inner + entropy([small.count(), small.size - small.count()])


def _of_codes(leaf: Leaf, kept: Kept | None) -> float | None:
    if not isinstance(leaf, CompressedLeaf) or not leaf.coded:
        return None
    codes = getattr(leaf, leaf.coded)
    if isinstance(codes, Packed):
        flat = spread_out(host_array(codes.data, ""), codes.bits, int(np.prod(codes.shape, dtype=np.int64)))
    else:
        flat = host_array(codes, "").reshape(-1)
    if kept is not None:
        flat = flat[np.unpackbits(kept.bits, count=kept.size, bitorder="little").view(bool)]
    return entropy(np.unique(flat, return_counts=True)[1] if flat.dtype != np.uint8 else np.bincount(flat))
