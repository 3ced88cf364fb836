"""Trees as JSON and named tensors, and back. Knows leaves, not files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.leaves import CompressedLeaf, Masked, Packed, Quantized, Switch, is_compressed, pack
from jaxcomp.numerics.packing import packed_size
from jaxcomp.paths import leaves_with_paths
from jaxcomp.specs import LOG, Companded, Compander, Grid, Int

Json = Any
Tensors = dict[str, np.ndarray]


def encode_tree(tree: Any) -> tuple[Json, Tensors]:
    """A packed tree as JSON that refers to tensors by name.

    Dicts, lists, tuples and None keep their kind. Any other container (``nnx.State``, an Equinox module) becomes nested
    dicts by path; ``load(..., like=)`` gives it back.

    Raises:
      TypeError: a leaf that is no array, number or string. The message names the path.
    """
    tensors: Tensors = {}
    return _encode_node(tree, "", tensors), tensors


def decode_tree(node: Json, tensors: Mapping[str, np.ndarray], companders: Iterable[Compander]) -> Any:
    """The inverse of :func:`encode_tree`; arrays come back as jax arrays."""
    known = {c.name: c for c in (LOG, *companders)}
    return _decode_node(node, tensors, known)


def _encode_node(x: Any, path: str, out: Tensors) -> Json:
    if is_compressed(x):
        return _encode_leaf(pack(x), path, out)
    if isinstance(x, Mapping) and not _is_custom(x):
        items = [[k, _encode_node(v, _join(path, k), out)] for k, v in x.items()]
        bad = [k for k, _ in items if not isinstance(k, str | int)]
        if bad:
            raise TypeError(f"save: {path!r} has the key {bad[0]!r}; keys must be strings or integers.")
        return {"dict": items}
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
        return {"sparse": path, "shape": host.shape}
    out[path] = host
    return {"array": path}


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
        case Switch():
            raise TypeError(f"save: {path!r} is a gated leaf that did not pack.")
        case CompressedLeaf():
            raise TypeError(f"save: {path!r} is a {type(x).__name__}, which files do not hold.")
    return _encode_node(x, path, out)


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
        values = _encode_quantized(x.values, path, out, full)
    elif is_compressed(x.values):
        raise TypeError(f"save: {path!r} masks a {type(x.values).__name__}, which files do not hold.")
    else:
        out[path] = _host(x.values, path)[full]
        values = {"array": path}
    return {"masked": values, "mask": f"{path}.mask", "mask_shape": mask.shape, "shape": x.shape}


def _encode_quantized(x: Quantized, path: str, out: Tensors, kept: np.ndarray | None) -> Json:
    codes = np.asarray(x.codes.unpack() if isinstance(x.codes, Packed) else x.codes)
    flat = codes.reshape(-1) if kept is None else codes[kept]
    out[path] = flat if x.grid.bits == 8 else np.asarray(Packed.of(jnp.asarray(flat), x.grid.bits, _low(x.grid)).data)
    out[f"{path}.scale"] = _host(x.scale, path)
    node = {"quantized": path, "shape": x.shape, "grid": _encode_grid(x.grid), "dtype": str(jnp.dtype(x.dtype))}
    if x.zero_point is not None:
        out[f"{path}.zero"] = _host(x.zero_point, path)
    return node


def _low(grid: Grid) -> int:
    return 0 if grid.code_range[0] == 0 else -(2 ** (grid.bits - 1))


def _encode_grid(grid: Grid) -> Json:
    if isinstance(grid, Companded):
        return {"companded": grid.bits, "compander": grid.compander.name}
    return {"int": grid.bits, "group": grid.group, "symmetric": grid.symmetric, "narrow": grid.narrow}


def _decode_grid(node: Json, companders: Mapping[str, Compander]) -> Grid:
    if "int" in node:
        return Int(node["int"], group=node["group"], symmetric=node["symmetric"], narrow=node["narrow"])
    name = node["compander"]
    if name not in companders:
        raise ValueError(f"is companded by {name!r}, which is not known here; call load(path, companders=[...])")
    return Companded(node["companded"], companders[name])


def _decode_node(node: Json, tensors: Mapping[str, np.ndarray], companders: Mapping[str, Compander]) -> Any:
    def again(inner: Json) -> Any:
        return _decode_node(inner, tensors, companders)

    decoders: dict[str, Callable[[], Any]] = {
        "dict": lambda: {k: again(v) for k, v in node["dict"]},
        "list": lambda: [again(v) for v in node["list"]],
        "tuple": lambda: tuple(again(v) for v in node["tuple"]),
        "value": lambda: node["value"],
        "array": lambda: jnp.asarray(tensors[node["array"]]),
        "sparse": lambda: _decode_sparse(node, tensors),
        "quantized": lambda: _decode_quantized(node, tensors, companders, None),
        "masked": lambda: _decode_masked(node, tensors, companders),
    }
    return decoders[next(k for k in node if k in decoders)]()


def _decode_sparse(node: Json, tensors: Mapping[str, np.ndarray]) -> jax.Array:
    shape, values = tuple(node["shape"]), tensors[node["sparse"]]
    dense = np.zeros(shape, values.dtype)
    dense[_unbitmap(tensors[f"{node['sparse']}.mask"], shape)] = values
    return jnp.asarray(dense)


def _decode_masked(node: Json, tensors: Mapping[str, np.ndarray], companders: Mapping[str, Compander]) -> Masked:
    mask = _unbitmap(tensors[node["mask"]], tuple(node["mask_shape"]))
    full = np.broadcast_to(mask, tuple(node["shape"]))
    inner = node["masked"]
    values: Any
    if "quantized" in inner:
        values = _decode_quantized(inner, tensors, companders, full)
    else:
        kept = tensors[inner["array"]]
        dense = np.zeros(full.shape, kept.dtype)
        dense[full] = kept
        values = jnp.asarray(dense)
    return Masked(values, Packed.of(jnp.asarray(mask), 1, 0))


def _decode_quantized(
    node: Json, tensors: Mapping[str, np.ndarray], companders: Mapping[str, Compander], kept: np.ndarray | None
) -> Quantized:
    name, shape = node["quantized"], tuple(node["shape"])
    try:
        grid = _decode_grid(node["grid"], companders)
    except ValueError as e:
        raise ValueError(f"{name!r} {e}") from e
    scale, zero = tensors[f"{name}.scale"], tensors.get(f"{name}.zero")
    count = int(np.prod(shape, dtype=np.int64)) if kept is None else int(kept.sum())
    stored = tensors[name]
    if grid.bits != 8:
        stored = np.asarray(Packed(jnp.asarray(stored), grid.bits, _low(grid), (count,)).unpack())
    codes = stored.reshape(shape) if kept is None else _scatter(stored, kept, zero)
    leaf = Quantized(
        jnp.asarray(codes),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero),
        grid,
        jnp.dtype(node["dtype"]),
    )
    return leaf.pack()


def _scatter(stored: np.ndarray, kept: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """Codes at the kept places, the code of zero elsewhere."""
    codes = np.zeros(kept.shape, stored.dtype)
    if zero is not None:
        spread = zero
        for axis, (b, n) in enumerate(zip(zero.shape, kept.shape, strict=True)):
            spread = np.repeat(spread, n // b, axis=axis)
        codes[...] = spread.astype(stored.dtype)
    codes[kept] = stored
    return codes
