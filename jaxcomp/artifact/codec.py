"""Trees as JSON and named tensors, and back. Knows leaves, not files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.leaves import CompressedLeaf, Masked, Packed, Quantized, is_compressed, pack
from jaxcomp.numerics.packing import packed_size
from jaxcomp.paths import leaves_with_paths
from jaxcomp.specs import LOG, Companded, Compander, Grid, Int

Json = Any
Tensors = dict[str, np.ndarray]


def encode_tree(tree: Any) -> tuple[Json, Tensors]:
    """A packed tree as JSON, and its tensors by path ("kernel", and "kernel.scale" for a part of a leaf).

    Dicts, lists, tuples and None keep their kind. Any other container (``nnx.State``, an Equinox module) becomes nested
    dicts by path; ``load(..., like=)`` gives it back.

    Raises:
      TypeError: a leaf that is no array, number or string. The message names the path.
    """
    tensors: Tensors = {}
    return _encode_node(tree, "", tensors), tensors


def decode_tree(node: Json, tensors: Mapping[str, np.ndarray], companders: Iterable[Compander]) -> Any:
    """The inverse of :func:`encode_tree`; arrays come back as jax arrays."""
    return _Decoder(tensors, {c.name: c for c in (LOG, *companders)}).node(node, "")


def _encode_node(x: Any, path: str, out: Tensors) -> Json:
    if is_compressed(x):
        return _encode_leaf(pack(x), path, out)
    if isinstance(x, Mapping) and not _is_custom(x):
        bad = [k for k in x if not isinstance(k, str | int) or isinstance(k, bool)]
        if bad:
            raise TypeError(f"save: {path!r} has the key {bad[0]!r}; keys must be strings or integers.")
        return {"dict": [[k, _encode_node(v, _join(path, k), out)] for k, v in x.items()]}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_encode_node(v, _join(path, i), out) for i, v in enumerate(x)]}
    if x is None or isinstance(x, bool | int | float | str):
        return {"value": x}
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return _encode_array(x, path, out)
    return _encode_custom(x, path, out)


def _is_custom(x: Mapping[Any, Any]) -> bool:
    """A mapping whose values are not its pytree children, such as ``nnx.State`` over variables."""
    return type(x).__module__.startswith("flax.nnx")


def _encode_custom(x: Any, path: str, out: Tensors) -> Json:
    named, _ = leaves_with_paths(x, is_leaf=is_compressed)
    if len(named) == 1 and named[0][1] is x:
        raise TypeError(
            f"save: {path!r} is {type(x).__name__}, which a file of weights cannot hold; keep arrays only, such as"
            " equinox.filter(model, equinox.is_array)."
        )
    nested: dict[str, Any] = {}
    for leaf_path, leaf in named:
        *parents, last = leaf_path.split("/")
        inner = nested
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return _encode_node(nested, path, out)


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _host(x: Any, path: str) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"save: {path!r} is a tracer; save outside jit.")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"save: {path!r} is of type {x.dtype}; save jax.random.key_data(key) instead.")
    return np.ascontiguousarray(np.asarray(x)).reshape(x.shape)


def _encode_array(x: Any, path: str, out: Tensors) -> Json:
    host = _host(x, path)
    kept = _nonzero_bits(host)
    count = int(kept.sum())
    if host.size and packed_size(host.size, 1) + count * host.itemsize < host.nbytes * 0.98:
        out[f"{path}.mask"] = _bitmap(kept)
        out[path] = host[kept]
        return {"sparse": host.shape}
    out[path] = host
    return "array"


def _nonzero_bits(x: np.ndarray) -> np.ndarray:
    """Where any bit is set: -0.0 counts as nonzero, so that it survives."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(x.itemsize)
    return np.ones(x.shape, bool) if unsigned is None else x.view(unsigned) != 0


def _bitmap(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask.reshape(-1), bitorder="little")


def _unbitmap(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    return np.unpackbits(data, count=count, bitorder="little").astype(bool).reshape(shape)


def _encode_leaf(x: Any, path: str, out: Tensors) -> Json:
    match x:
        case Quantized():
            return _encode_quantized(x, path, out, None)
        case Masked():
            return _encode_masked(x, path, out)
        case CompressedLeaf():
            raise TypeError(f"save: {path!r} is a {type(x).__name__}, which files do not hold.")
    return _encode_node(x, path, out)  # a gate that never opened packs as what was there before


def _encode_masked(x: Masked, path: str, out: Tensors) -> Json:
    """Bitmap and survivors; or the values alone where the bitmap would not pay, and then they load without a mask."""
    mask = np.asarray(x.mask.unpack())
    full = np.broadcast_to(mask, x.shape)
    bits = x.values.grid.bits if isinstance(x.values, Quantized) else 8 * jnp.dtype(x.dtype).itemsize
    sparse_bytes = packed_size(mask.size, 1) + packed_size(int(full.sum()), bits)
    if sparse_bytes >= packed_size(full.size, bits):
        return _encode_node(x.values, path, out)
    out[f"{path}.mask"] = _bitmap(mask)
    if isinstance(x.values, Quantized):
        return {"masked": _encode_quantized(x.values, path, out, full), "mask": mask.shape}
    if is_compressed(x.values):
        raise TypeError(f"save: {path!r} masks a {type(x.values).__name__}, which files do not hold.")
    out[path] = _host(x.values, path)[full]
    return {"masked": {"shape": x.shape}, "mask": mask.shape}


def _encode_quantized(x: Quantized, path: str, out: Tensors, kept: np.ndarray | None) -> Json:
    codes = np.asarray(x.codes.unpack() if isinstance(x.codes, Packed) else x.codes)
    flat = codes.reshape(-1) if kept is None else codes[kept]
    out[path] = flat if x.grid.bits == 8 else np.asarray(Packed.of(jnp.asarray(flat), x.grid.bits, x.grid.low).data)
    out[f"{path}.scale"] = _host(x.scale, path)
    if x.zero_point is not None:
        out[f"{path}.zero"] = _host(x.zero_point, path)
    return {"quantized": _encode_grid(x.grid), "shape": x.shape, "dtype": str(jnp.dtype(x.dtype))}


def _encode_grid(grid: Grid) -> Json:
    if isinstance(grid, Companded):
        return {"companded": grid.bits, "compander": grid.compander.name}
    given = {"int": grid.bits, "group": grid.group, "symmetric": grid.symmetric, "narrow": grid.narrow}
    return {k: v for k, v in given.items() if k == "int" or v != getattr(Int(), k)}


@dataclass(frozen=True)
class _Decoder:
    """Reads nodes; a node's tensors are named by its path."""

    tensors: Mapping[str, np.ndarray]
    companders: Mapping[str, Compander]

    def node(self, node: Json, path: str) -> Any:
        if node == "array":
            return jnp.asarray(self.tensors[path])
        decoders: dict[str, Callable[[], Any]] = {
            "dict": lambda: {k: self.node(v, _join(path, k)) for k, v in node["dict"]},
            "list": lambda: [self.node(v, _join(path, i)) for i, v in enumerate(node["list"])],
            "tuple": lambda: tuple(self.node(v, _join(path, i)) for i, v in enumerate(node["tuple"])),
            "value": lambda: node["value"],
            "sparse": lambda: self._spread(path, self._mask(path, node["sparse"]), None),
            "quantized": lambda: self._quantized(node, path, None),
            "masked": lambda: self._masked(node, path),
        }
        return decoders[next(k for k in decoders if k in node)]()

    def _mask(self, path: str, shape: list[int]) -> np.ndarray:
        return _unbitmap(self.tensors[f"{path}.mask"], tuple(shape))

    def _spread(self, path: str, kept: np.ndarray, zero: np.ndarray | None) -> jax.Array:
        return jnp.asarray(_scatter(self.tensors[path], kept, zero))

    def _masked(self, node: Json, path: str) -> Masked:
        mask = self._mask(path, node["mask"])
        inner = node["masked"]
        full = np.broadcast_to(mask, tuple(inner["shape"]))
        values: Any = self._quantized(inner, path, full) if "quantized" in inner else self._spread(path, full, None)
        return Masked(values, Packed.of(jnp.asarray(mask), 1, 0))

    def _quantized(self, node: Json, path: str, kept: np.ndarray | None) -> Quantized:
        grid, shape = self._grid(node["quantized"], path), tuple(node["shape"])
        zero = self.tensors.get(f"{path}.zero")
        count = int(np.prod(shape, dtype=np.int64)) if kept is None else int(kept.sum())
        codes = self.tensors[path]
        if grid.bits != 8:
            codes = np.asarray(Packed(jnp.asarray(codes), grid.bits, grid.low, (count,)).unpack())
        codes = codes.reshape(shape) if kept is None else _scatter(codes, kept, zero)
        zero_point = None if zero is None else jnp.asarray(zero)
        scale = jnp.asarray(self.tensors[f"{path}.scale"])
        return Quantized(jnp.asarray(codes), scale, zero_point, grid, jnp.dtype(node["dtype"])).pack()

    def _grid(self, node: Json, path: str) -> Grid:
        if "int" in node:
            rest = {k: v for k, v in node.items() if k != "int"}
            return Int(node["int"], **rest)
        name = node["compander"]
        if name not in self.companders:
            raise ValueError(f"{path!r} is companded by {name!r}, which is not known here; name it in companders=[...]")
        return Companded(node["companded"], self.companders[name])


def _scatter(stored: np.ndarray, kept: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """Values at the kept places, zero (or its code) elsewhere."""
    out = np.zeros(kept.shape, stored.dtype)
    if zero is not None:
        for axis, (b, n) in enumerate(zip(zero.shape, kept.shape, strict=True)):
            zero = np.repeat(zero, n // b, axis=axis)
        out[...] = zero.astype(stored.dtype)
    out[kept] = stored
    return out
