"""Two trees, leaf by leaf: what each was and is, what it takes in a file, and how far its values moved."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.encoding import encode_tree
from jaxcomp.artifact.files import stored_bytes
from jaxcomp.core.leaves import dense, is_compressed, method_of
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.progress import each
from jaxcomp.core.types import Leaf, PyTree, Shape
from jaxcomp.core.words import shape_words

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Side:
    """One leaf of one tree.

    Attributes:
      method: what it is: "float32", "Masked Quantized int4".
      shape: of the array that it stands for; None of what is no array.
      dtype: of that array; empty of what is no array.
      bytes: what a file holds for it, the header apart.
      zeros: the fraction of its elements that are 0; None of what is no array of numbers, or empty.
    """

    method: str
    shape: Shape | None
    dtype: str
    bytes: int
    zeros: float | None

    @property
    def size(self) -> int:
        """How many elements it has."""
        return 0 if self.shape is None else math.prod(self.shape)

    @property
    def bits(self) -> float | None:
        """Bits of the file for each element; None without elements."""
        return 8 * self.bytes / self.size if self.size else None


@dataclass(frozen=True)
class Change:
    """What became of one leaf.

    Attributes:
      path: of the leaf in both trees.
      before, after: what it was and is; None where a tree has no such leaf.
      same: its values, their type and their shape are the same, bit by bit, however they are stored.
      error: ``‖after - before‖ / ‖before‖``; None where the shapes differ, or nothing was there to compare with.
      largest: the largest magnitude of ``after - before``; None where ``error`` is for the first reason.
    """

    path: str
    before: Side | None
    after: Side | None
    same: bool
    error: float | None = None
    largest: float | None = None

    @property
    def alike(self) -> bool:
        """Whether nothing is to be seen: the same values, stored alike."""
        return self.same and self.before is not None and self.after is not None and self.before == self.after

    @property
    def note(self) -> str:
        """What one should know of it, in a few words; mostly nothing."""
        if self.before is None or self.after is None:
            return "only after" if self.before is None else "only before"
        if self.before.shape != self.after.shape:
            return "was no array" if self.before.shape is None else f"was {shape_words(self.before.shape)}"
        if self.before.dtype != self.after.dtype:
            return "another type"
        if self.same and not self.alike:
            return "stored otherwise"
        if self.error is not None and not math.isfinite(self.error):
            return "not finite" if math.isnan(self.error) else "was all zeros"
        if not self.same and self.largest == 0:
            return "-0 for 0"
        return ""


def changes(before: PyTree, after: PyTree) -> tuple[Change, ...]:
    """What became of each leaf, in the order of ``after``; what only ``before`` has comes last.

    Args:
      before, after: any two trees, with compressed leaves or without; leaves of one path belong together.

    Raises:
      TypeError: a leaf that a file cannot hold. The message names the path.

    >>> w = np.array([[1.0, -2.0], [0.0, 4.0]], np.float32)
    >>> (one,) = changes({"w": w}, {"w": np.where(w == 1, 0, w)})
    >>> one.path, one.same, round(one.error, 4), one.largest, one.after.zeros
    ('w', False, 0.2182, 1.0, 0.5)
    """
    old, new = (dict(leaves_with_paths(tree, is_leaf=is_compressed)[0]) for tree in (before, after))
    paths = [*new, *(path for path in old if path not in new)]
    return tuple(each(partial(_change, old=old, new=new), dict.fromkeys(paths), "compare").values())


def _change(path: str, _: None, *, old: dict[str, Leaf], new: dict[str, Leaf]) -> Change:
    a, b = (_values(path, tree[path]) if path in tree else None for tree in (old, new))
    was, now = (_side(path, tree[path], x) if path in tree else None for tree, x in ((old, a), (new, b)))
    if was is None or now is None:
        return Change(path, was, now, same=False)
    if a is None or b is None:
        return Change(path, was, now, same=_encoded(old[path]) == _encoded(new[path]))
    if a.shape != b.shape:
        return Change(path, was, now, same=False)
    same = a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return Change(path, was, now, same, *_distance(a, b))


def _values(path: str, leaf: Leaf) -> np.ndarray | None:
    """The array of numbers that a leaf stands for, in the host's memory."""
    x = dense(leaf)
    if not hasattr(x, "dtype") or not hasattr(x, "shape") or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise TypeError(f"compare: {path!r} has no values, it is {x!s:.60}; compare arrays, outside jit.")
    return np.asarray(x)


def _side(path: str, leaf: Leaf, x: np.ndarray | None) -> Side:
    try:
        stored = stored_bytes(leaf)
    except TypeError as e:  # which the encoder cannot name the path of: it was given the leaf alone
        raise TypeError(str(e).replace("''", repr(path), 1)) from e
    if x is None:
        plain = leaf is None or isinstance(leaf, str | int | float)
        return Side(repr(leaf) if plain else type(leaf).__name__, None, "", stored, None)
    return Side(method_of(leaf), tuple(x.shape), str(x.dtype), stored, float((x == 0).mean()) if x.size else None)


def _encoded(leaf: Leaf) -> str:
    node, _ = encode_tree(leaf)
    return json.dumps(node, default=lambda t: t.sha256().hex())


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float | None, float | None]:
    """The relative error and the largest difference, summed in float64 a piece at a time."""
    square = reference = largest = 0.0
    flat = [np.ascontiguousarray(x).reshape(-1) for x in (a, b)]
    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, a.size, _CHUNK):
            old, new = (x[start : start + _CHUNK].astype(wide) for x in flat)
            gap = np.abs(new - old)
            square += float(gap @ gap)
            reference += float(np.vdot(old, old).real)
            largest = float(np.fmax(largest, np.max(gap))) if not np.isnan(gap).any() else math.nan
    if math.isnan(square) or math.isnan(reference):
        return math.nan, largest
    if not reference:
        return (math.inf if square else 0.0), largest
    return math.sqrt(square / reference), largest
