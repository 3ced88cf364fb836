"""Trees from JSON and tensors: the inverse of ``encoding``. Everything that the JSON claims is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.arrays import Arrays, Source, number_of
from jaxcomp.artifact.encoding import MAX_DEPTH
from jaxcomp.artifact.limits import shape_of
from jaxcomp.artifact.masking import Kept, Part, constant, gathered, part_of, part_of_stream
from jaxcomp.artifact.older import of_today
from jaxcomp.artifact.statics import BRANCHES, VALUES, Statics, known_at, number_again
from jaxcomp.core.bits import packed_size
from jaxcomp.core.leaves import CompressedLeaf
from jaxcomp.core.packed import Packed
from jaxcomp.core.types import Json, Leaf, PyTree, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.companding import LOG, Compander

Place = Callable[[str, Leaf], Leaf]
"""Puts the arrays of a leaf where they shall lie."""


def decode_tree(
    node: Json,
    source: Source,
    companders: Iterable[Compander] = (),
    *,
    place: Place | None = None,
    at: str = "",
) -> PyTree:
    """The tree that :func:`~jaxcomp.artifact.encoding.encode_tree` said in JSON.

    Arrays of numpy come back as such, those of jax as jax arrays; one that jax would narrow (64 bits while x64 is off)
    stays one of numpy.

    Args:
      node: the JSON.
      source: of the tensors.
      companders: that are not built in.
      place: takes each leaf's path and the leaf on host arrays; None hands them to jax as they are.
      at: the path of the node.

    Raises:
      ValueError: the JSON says what cannot be; the message names the path.
    """
    statics = Statics({c.name: c for c in (LOG, *companders)}, lambda n, path: source.read(number_of(n), path))
    arrays = Arrays(source, stay=place is not None)
    return _Decoder(arrays, statics, place).node(node, at, at.count("/") + 1 if at else 0)


@dataclass(frozen=True)
class _Decoder:
    arrays: Arrays
    statics: Statics
    place: Place | None

    def node(self, node: Json, path: str, depth: int) -> PyTree:
        """One node and all below it; an error names the path of the innermost node that it is of."""
        try:
            return self.made_of(node, path, depth)
        except _NamedError:
            raise
        except Exception as e:  # whatever a wrong file makes Python raise
            raise _named_error(e, path) from e

    def made_of(self, node: Json, path: str, depth: int) -> PyTree:
        """The same, with whatever error it raises."""
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"{path!r} is nested more than {MAX_DEPTH} deep")
        inside = lambda key, v: self.node(v, f"{path}/{key}" if depth else str(key), depth + 1)  # noqa: E731
        kinds: dict[str, Callable[[Json], PyTree]] = {
            "dict": lambda items: _dict([(k, inside(k, v)) for k, v in items], path),
            "list": lambda items: [inside(i, v) for i, v in enumerate(items)],
            "tuple": lambda items: tuple(inside(i, v) for i, v in enumerate(items)),
            "branch": lambda body: _named(BRANCHES, body[0], path)(**{k: inside(k, v) for k, v in body[1]}),
            "value": lambda value: number_again(value) if isinstance(value, dict) else value,
            "numpy": lambda inner: self._placed(self.arrays.host(inner, path), path),
            "scalar": lambda inner: self.arrays.host(inner, path)[()],
            "object": lambda body: self.statics.record([_named(VALUES, body[0], path).__name__, body[1]], path),
        }
        kind = next((k for k in kinds if k in node), None) if isinstance(node, dict) else None
        if kind is not None:
            return kinds[kind](node[kind])
        return self._placed(self.leaf_of(node, path, depth), path)

    def _placed(self, leaf: Leaf, path: str) -> Leaf:
        return leaf if self.place is None else self.place(path, leaf)

    def leaf_of(self, node: Json, path: str, depth: int) -> Leaf:
        """A node that is one leaf of arrays of jax."""
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"{path!r} is nested more than {MAX_DEPTH} deep")
        if type(node) is int:
            return self.arrays.array(node, path)
        if not isinstance(node, dict) or not node:
            raise ValueError(f"{path!r} is described by {str(node)[:40]!r}, which says nothing")
        kinds: dict[str, Callable[[Json], Leaf]] = {
            "sparse": lambda _: self.arrays.put(self.arrays.host(node, path)),
            "typed": lambda _: self.arrays.put(self.arrays.host(node, path)),
            "key": lambda body: jax.random.wrap_key_data(
                jnp.asarray(self.arrays.host(body[1], path)), impl=str(body[0])
            ),
            "leaf": lambda body: self.leaf(body, path, depth),
            "masked": lambda _: self.masked(node, path, depth),
        }
        kind = next((k for k in kinds if k in node), None)
        if kind is None:
            raise ValueError(f"{path!r} is of kind {next(iter(node))!r}, which is not known here")
        return kinds[kind](node[kind])

    def masked(self, node: Json, path: str, depth: int) -> Masked:
        """A masked leaf."""
        small = shape_of(node["mask"][0], path)
        shape = shape_of(node["shape"], path) if "shape" in node else small
        mask = self.arrays.kept(node["mask"][1], small, path)
        try:
            fits = np.broadcast_shapes(small, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{path!r} has a mask of shape {small}, which does not broadcast to {shape}")
        if small != shape:
            self.arrays.source.budget.take(math.prod(shape), path)
        kept, inner = Kept.of(mask.bits, small, shape), node["masked"]
        if not isinstance(inner, dict) or "survivors" not in inner:
            values = self.leaf_of(inner, path, depth + 1)
        elif type(inner["survivors"]) is int:
            values = self.arrays.put(self.arrays.spread(self.arrays.read(inner["survivors"], path), kept, path))
        else:
            values = self.leaf(inner["survivors"], path, depth, kept)
        return Masked(values, Packed(self.arrays.put(mask.bits), 1, 0, small))

    def leaf(self, body: Json, path: str, depth: int, kept: Kept | None = None) -> CompressedLeaf:
        """A leaf from its fields; where ``kept`` is given, the coded field holds the codes of those elements alone."""
        name, meta, data = body
        cls = known_at(CompressedLeaf, name, path)
        unknown = [*(set(data) - set(cls.data_fields))]
        if unknown or (kept is not None and cls.coded not in data):
            raise ValueError(f"{path!r} is a {name} with the parts {', '.join(data)}, which this jaxcomp's is not")
        values = {f: self._field(data[f], path, depth) if f in data else None for f in cls.data_fields}

        def shape() -> Shape:
            return kept.shape if kept is not None else tuple(getattr(values[cls.coded], "shape", ()))

        static = of_today(name, {k: self.statics.read(v, path) for k, v in meta.items()}, shape)
        try:
            leaf = cls(**static, **values)
        except TypeError as e:
            raise ValueError(f"{path!r} is no {name} as this jaxcomp has it ({e})") from e
        return leaf if kept is None else self._with_all_codes(leaf, kept, path)

    def _field(self, node: Json, path: str, depth: int) -> Leaf | Packed:
        if not isinstance(node, dict) or "packed" not in node:
            return self.leaf_of(node, path, depth + 1)
        bits, low, shape, number = node["packed"]
        data, shape = self.arrays.array(number, path), shape_of(shape, path)
        good = isinstance(bits, int) and 1 <= bits <= 8 and isinstance(low, int) and -128 <= low <= 0
        if not good or data.dtype != np.uint8 or data.shape != (packed_size(math.prod(shape), bits),):
            raise ValueError(f"{path!r} has codes of {bits} bits and shape {shape} in {data.nbytes} bytes")
        return Packed(data, bits, low, shape)

    def _with_all_codes(self, leaf: Any, kept: Kept, path: str) -> CompressedLeaf:
        """The leaf with the code of zero where nothing is kept."""
        codes = getattr(leaf, leaf.coded)
        packed = isinstance(codes, Packed)
        stored = np.asarray(codes.data if packed else codes)
        found = codes.shape if packed else stored.shape
        if found != (kept.count(),):
            raise ValueError(f"{path!r} has {found} codes where its mask keeps {kept.count()}")
        size = packed_size(kept.size, codes.bits) if packed else kept.size
        self.arrays.source.budget.take(size * stored.itemsize, path)
        low, dtype = (codes.low, np.dtype(np.uint8)) if packed else (0, stored.dtype)
        zero = leaf.code_of_zero(kept.shape)
        rest = constant(int(zero) - low, dtype) if isinstance(zero, int) else _codes_of(np.asarray(zero), low, dtype)
        if not packed:
            full = gathered(kept.put(part_of(stored), rest), dtype, kept.size).reshape(kept.shape)
            return replace(leaf, **{leaf.coded: self.arrays.put(full)})
        chunks = kept.put(part_of_stream(stored, codes.bits), rest, bits=codes.bits)
        data = gathered(chunks, dtype, size)
        return replace(leaf, **{leaf.coded: Packed(self.arrays.put(data), codes.bits, low, kept.shape)})


class _NamedError(ValueError):
    """One that names the path."""


def _named_error(e: Exception, path: str) -> _NamedError:
    if isinstance(e, ValueError) and repr(path) in str(e):
        return _NamedError(str(e))
    return _NamedError(f"holds {path!r}, which cannot be: {str(e) if isinstance(e, ValueError) else repr(e)}")


def _codes_of(zero: np.ndarray, low: int, dtype: np.dtype) -> Part:
    part = part_of(zero)
    return lambda start, stop: (part(start, stop).astype(np.int32) - low).astype(dtype)


def _dict(items: list[tuple[Any, PyTree]], path: str) -> dict[Any, PyTree]:
    made = {k: v for k, v in items if type(k) in (str, int)}
    if len(made) != len(items):
        raise ValueError(f"{path!r} has a key twice, or one that is no string or integer")
    return made


def _named(table: dict[str, Any], name: Json, path: str) -> Any:
    if name not in table:
        raise ValueError(f"{path!r} is made of {name!r}, which is not known here")
    return table[name]
