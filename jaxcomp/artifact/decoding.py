"""Trees from JSON and tensors: the inverse of ``encoding``. Everything that the JSON claims is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.encoding import MAX_DEPTH, bits_of
from jaxcomp.artifact.limits import Budget, shape_of
from jaxcomp.artifact.masking import Kept, Part, constant, gathered, part_of, part_of_stream
from jaxcomp.artifact.masks import bits_of_form
from jaxcomp.artifact.older import of_today
from jaxcomp.artifact.statics import BRANCHES, OTHERS, VALUES, Statics, dtype_named, known_at, number_again
from jaxcomp.core.bits import aligned, packed_size, spread_out
from jaxcomp.core.leaves import CompressedLeaf
from jaxcomp.core.packed import Packed
from jaxcomp.core.types import Json, Leaf, PyTree, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.companding import LOG, Compander


class Source(Protocol):
    """Where tensors are read from."""

    @property
    def budget(self) -> Budget:
        """What the tree may take in memory."""

    def read(self, number: int, path: str) -> np.ndarray:
        """One tensor for the leaf at this path, in memory that nobody else writes to."""


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
    statics = Statics({c.name: c for c in (LOG, *companders)}, lambda n, path: source.read(_number(n), path))
    return _Decoder(source, statics, place).node(node, at, at.count("/") + 1 if at else 0)


@dataclass(frozen=True)
class _Decoder:
    source: Source
    statics: Statics
    place: Place | None
    made: dict[int, Leaf] = field(default_factory=dict)

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
            "numpy": lambda inner: self._placed(self.host(inner, path), path),
            "scalar": lambda inner: self.host(inner, path)[()],
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
            return self.array(node, path)
        if not isinstance(node, dict) or not node:
            raise ValueError(f"{path!r} is described by {str(node)[:40]!r}, which says nothing")
        kinds: dict[str, Callable[[Json], Leaf]] = {
            "sparse": lambda _: self._put(self.host(node, path)),
            "typed": lambda _: self._put(self.host(node, path)),
            "key": lambda body: jax.random.wrap_key_data(jnp.asarray(self.host(body[1], path)), impl=str(body[0])),
            "leaf": lambda body: self.leaf(body, path, depth),
            "masked": lambda _: self.masked(node, path, depth),
        }
        kind = next((k for k in kinds if k in node), None)
        if kind is None:
            raise ValueError(f"{path!r} is of kind {next(iter(node))!r}, which is not known here")
        return kinds[kind](node[kind])

    # Arrays

    def array(self, number: int, path: str) -> Leaf:
        """A tensor as an array of jax; the same one for all that refer to it."""
        if self.place is not None:
            return self._read(number, path)  # kept for no other leaf: a tree may be larger than the host's memory
        if number not in self.made:
            self.made[number] = self._put(self._read(number, path))
        return self.made[number]

    def _read(self, number: Json, path: str) -> np.ndarray:
        return self.source.read(_number(number), path)

    def _put(self, x: np.ndarray) -> Leaf:
        """Handed over to jax without a copy where that is possible; jax would narrow a type that it does not have."""
        stays = self.place is not None or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        return x if stays else jax.device_put(x)

    def host(self, node: Json, path: str) -> np.ndarray:
        """An array in the host's memory."""
        if type(node) is int:
            return self._read(node, path)
        if "typed" in node:
            name, shape, number = node["typed"]
            dtype, shape = dtype_named(name), shape_of(shape, path)
            self.source.budget.take(math.prod(shape) * dtype.itemsize, path)
            return _typed(dtype, shape, self._read(number, path), path)
        shape, mask, number = node["sparse"]
        return self._spread(self._read(number, path), self.kept(mask, shape_of(shape, path), path), path)

    def _spread(self, stored: np.ndarray, kept: Kept, path: str) -> np.ndarray:
        """The entries at the kept places, zeros elsewhere."""
        if stored.shape != (kept.count(),):
            raise ValueError(f"{path!r} has entries of shape {stored.shape} where its mask keeps {kept.count()}")
        self.source.budget.take(kept.size * stored.itemsize, path)
        chunks = kept.put(part_of(stored), constant(0, stored.dtype))
        return gathered(chunks, stored.dtype, kept.size).reshape(kept.shape)

    def kept(self, node: Json, shape: Shape, path: str) -> Kept:
        """A mask of this shape."""
        size = math.prod(shape)
        if isinstance(node, dict):
            self.source.budget.take(packed_size(size, 1), path)
            return Kept(bits_of_form(node, size, lambda number: self._read(number, path), path), shape)
        bits = self._read(node, path)
        if bits.dtype != np.uint8 or bits.shape != (packed_size(size, 1),):
            raise ValueError(f"{path!r} has a mask of shape {shape} in {bits.nbytes} bytes of type {bits.dtype}")
        return Kept(bits, shape)

    # Leaves

    def masked(self, node: Json, path: str, depth: int) -> Masked:
        """A masked leaf."""
        small = shape_of(node["mask"][0], path)
        shape = shape_of(node["shape"], path) if "shape" in node else small
        mask = self.kept(node["mask"][1], small, path)
        try:
            fits = np.broadcast_shapes(small, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{path!r} has a mask of shape {small}, which does not broadcast to {shape}")
        if small != shape:
            self.source.budget.take(math.prod(shape), path)
        kept, inner = Kept.of(mask.bits, small, shape), node["masked"]
        if not isinstance(inner, dict) or "survivors" not in inner:
            values = self.leaf_of(inner, path, depth + 1)
        elif type(inner["survivors"]) is int:
            values = self._put(self._spread(self._read(inner["survivors"], path), kept, path))
        else:
            values = self.leaf(inner["survivors"], path, depth, kept)
        return Masked(values, Packed(self._put(mask.bits), 1, 0, small))

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
        data, shape = self.array(number, path), shape_of(shape, path)
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
        self.source.budget.take(size * stored.itemsize, path)
        low, dtype = (codes.low, np.dtype(np.uint8)) if packed else (0, stored.dtype)
        zero = leaf.code_of_zero(kept.shape)
        rest = constant(int(zero) - low, dtype) if isinstance(zero, int) else _codes_of(np.asarray(zero), low, dtype)
        if not packed:
            full = gathered(kept.put(part_of(stored), rest), dtype, kept.size).reshape(kept.shape)
            return replace(leaf, **{leaf.coded: self._put(full)})
        chunks = kept.put(part_of_stream(stored, codes.bits), rest, bits=codes.bits)
        data = gathered(chunks, dtype, size)
        return replace(leaf, **{leaf.coded: Packed(self._put(data), codes.bits, low, kept.shape)})


class _NamedError(ValueError):
    """One that names the path."""


def _named_error(e: Exception, path: str) -> _NamedError:
    if isinstance(e, ValueError) and repr(path) in str(e):
        return _NamedError(str(e))
    return _NamedError(f"holds {path!r}, which cannot be: {str(e) if isinstance(e, ValueError) else repr(e)}")


def _codes_of(zero: np.ndarray, low: int, dtype: np.dtype) -> Part:
    part = part_of(zero)
    return lambda start, stop: (part(start, stop).astype(np.int32) - low).astype(dtype)


def _typed(dtype: np.dtype, shape: Shape, stored: np.ndarray, path: str) -> np.ndarray:
    """An array of a type that safetensors does not have."""
    if dtype not in OTHERS:
        raise ValueError(f"{path!r} is said to be of type {dtype}, which files hold as it is")
    size = math.prod(shape)
    if dtype.kind == "c":
        wanted, parts = (2 * size,), np.dtype(f"<f{dtype.itemsize // 2}")
    else:
        wanted, parts = (packed_size(size, bits_of(dtype)),), np.dtype(np.uint8)
    if stored.shape != wanted or stored.dtype != parts:
        raise ValueError(f"{path!r} of type {dtype} and shape {shape} has {stored.nbytes} bytes")
    if dtype.kind == "c":
        return stored.view(dtype).reshape(shape)
    bits = bits_of(dtype)
    out = aligned(size)
    out[:] = spread_out(stored, bits, size)
    return out.view(dtype).reshape(shape)


def _number(number: Json) -> int:
    if type(number) is not int:
        raise ValueError(f"{str(number)[:40]!r} stands where a tensor's number is wanted")
    return number


def _dict(items: list[tuple[Any, PyTree]], path: str) -> dict[Any, PyTree]:
    made = {k: v for k, v in items if type(k) in (str, int)}
    if len(made) != len(items):
        raise ValueError(f"{path!r} has a key twice, or one that is no string or integer")
    return made


def _named(table: dict[str, Any], name: Json, path: str) -> Any:
    if name not in table:
        raise ValueError(f"{path!r} is made of {name!r}, which is not known here")
    return table[name]
