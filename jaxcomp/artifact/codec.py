"""Trees as JSON and named tensors, and back. Knows leaves, not files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.bitmaps import bitmap, nonzero_bits, scatter, unbitmap
from jaxcomp.artifact.older import RETIRED, of_today
from jaxcomp.core.bits import packed_size
from jaxcomp.core.errors import naming
from jaxcomp.core.leaves import CompressedLeaf, Masked, Packed, dense, is_compressed, pack, unpacked
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import Leaf, PyTree, Shape
from jaxcomp.quantization.companding import LOG, Compander

Json = Any
"""What JSON holds: nested lists and dicts of strings, numbers, booleans and None."""
Tensors = Mapping[str, np.ndarray]
"""A file's tensors by name."""
Out = dict[str, np.ndarray]
"""Those gathered so far; encoding adds to them."""


def encode_tree(tree: PyTree) -> tuple[Json, Out]:
    """A packed tree as JSON, and its tensors by path ("kernel", and "kernel.scale" for a part of a leaf).

    Dicts, lists, tuples and None keep their kind. Any other container (``nnx.State``, an Equinox module) becomes nested
    dicts by path; ``load(..., like=)`` gives it back.

    Raises:
      TypeError: a leaf that is no array, number or string. The message names the path.
    """
    tensors: Out = {}
    return _encode_node(tree, "", tensors), tensors


def decode_tree(node: Json, tensors: Tensors, companders: Iterable[Compander]) -> PyTree:
    """The inverse of :func:`encode_tree`; arrays come back as jax arrays."""
    return _Decoder(tensors, {c.name: c for c in (LOG, *companders)}).node(node, "")


def _encode_node(x: PyTree, path: str, out: Out) -> Json:
    if is_compressed(x):
        with naming("save", path):
            packed = pack(x)
        return _encode_leaf(packed, path, out)
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


def _is_custom(x: Mapping[str | int, PyTree]) -> bool:
    """A mapping whose values are not its pytree children, such as ``nnx.State`` over variables."""
    return type(x).__module__.startswith("flax.nnx")


def _encode_custom(x: PyTree, path: str, out: Out) -> Json:
    named, _ = leaves_with_paths(x, is_leaf=is_compressed)
    if len(named) == 1 and named[0][1] is x:
        raise TypeError(
            f"save: {path!r} is {type(x).__name__}, which a file of weights cannot hold; keep arrays only, such as"
            " equinox.filter(model, equinox.is_array)."
        )
    nested: dict[str, PyTree] = {}
    for leaf_path, leaf in named:
        *parents, last = leaf_path.split("/")
        inner = nested
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return _encode_node(nested, path, out)


def _join(path: str, key: str | int) -> str:
    return f"{path}/{key}" if path else str(key)


def _host(x: jax.Array | np.ndarray, path: str) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"save: {path!r} is a tracer; save outside jit.")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"save: {path!r} is of type {x.dtype}; save jax.random.key_data(key) instead.")
    return np.ascontiguousarray(np.asarray(x)).reshape(x.shape)


def _encode_array(x: jax.Array | np.ndarray, path: str, out: Out) -> Json:
    host = _host(x, path)
    kept = nonzero_bits(host)
    count = int(kept.sum())
    if host.size and packed_size(host.size, 1) + count * host.itemsize < host.nbytes * 0.98:
        out[f"{path}.mask"] = bitmap(kept)
        out[path] = host[kept]
        return {"sparse": host.shape}
    out[path] = host
    return "array"


def _encode_leaf(x: Leaf, path: str, out: Out) -> Json:
    if isinstance(x, Masked):
        return _encode_masked(x, path, out)
    if isinstance(x, CompressedLeaf):
        return _encode_fields(x, path, out, None)
    return _encode_node(x, path, out)  # a gate that never opened packs as what was there before


def _encode_masked(x: Masked, path: str, out: Out) -> Json:
    """Bitmap and survivors; or the values alone where the bitmap would not pay, and then they load without a mask."""
    values = x.values
    mask = np.asarray(unpacked(x.mask))
    kept = np.broadcast_to(mask, x.shape)
    whole = is_compressed(values) and not values.coded
    bits = values.code_bits if is_compressed(values) and values.coded else 8 * jnp.dtype(x.dtype).itemsize
    full_bytes, kept_bytes = packed_size(kept.size, bits), packed_size(int(kept.sum()), bits)
    pays = packed_size(mask.size, 1) + kept_bytes < full_bytes and not whole
    if not pays and not np.asarray(dense(values))[~kept].any():
        return _encode_node(values, path, out)
    out[f"{path}.mask"] = bitmap(mask)
    if whole:
        inner = _encode_node(values, path, out)
    elif is_compressed(values):
        inner = {"survivors": _encode_fields(values, path, out, kept)["leaf"]}
    else:
        inner, out[path] = "survivors", _host(values, path)[kept]
    node = {"masked": inner, "mask": mask.shape}
    return node if mask.shape == x.shape else {**node, "shape": x.shape}


def _encode_fields(x: CompressedLeaf, path: str, out: Out, kept: np.ndarray | None) -> Json:
    """Any leaf by its fields; those that are plain arrays or None are not described, only stored or left out.

    Of the coded field, only the codes of the ``kept`` elements are stored.
    """
    data, meta = {}, {}
    for name in x.data_fields:
        value, at = getattr(x, name), _field_path(type(x), name, path)
        if name == x.coded and kept is not None:
            value = _codes_kept(value, kept)
        if value is None:
            continue
        if isinstance(value, Packed):
            out[at] = _host(value.data, at)
            data[name] = {"packed": [value.bits, value.low, value.shape]}
        elif is_compressed(value):
            data[name] = _encode_leaf(value, at, out)
        else:
            out[at] = _host(value, at)
    for name in x.meta_fields:
        meta[name] = _encode_static(getattr(x, name), path)
    return {"leaf": [type(x).__name__, meta, data] if data else [type(x).__name__, meta]}


def _field_path(cls: type[CompressedLeaf], name: str, path: str) -> str:
    return path if name == cls.coded else f"{path}.{name}"


def _codes_kept(codes: jax.Array | Packed, kept: np.ndarray) -> np.ndarray | Packed:
    if isinstance(codes, Packed):
        return Packed.of(jnp.asarray(np.asarray(codes.unpack())[kept]), codes.bits, codes.low)
    return np.asarray(codes)[kept]


def _encode_static(value: Any, path: str) -> Json:
    """A leaf's static field: JSON's own scalars as they are; a tuple, a type, a spec and a compander by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_encode_static(v, path) for v in value]
    if isinstance(value, Compander):
        return {"compander": value.name}
    if isinstance(value, Spec) and is_dataclass(value):
        changed = [f for f in fields(value) if f.default is MISSING or getattr(value, f.name) != f.default]
        return {"spec": [type(value).__name__, {f.name: _encode_static(getattr(value, f.name), path) for f in changed}]}
    try:
        return {"dtype": str(jnp.dtype(value))}
    except TypeError:
        raise TypeError(
            f"save: {path!r} has a static field of {type(value).__name__}, which files do not hold."
        ) from None


@dataclass(frozen=True)
class _Decoder:
    """Reads nodes; a node's tensors are named by its path."""

    tensors: Tensors
    companders: Mapping[str, Compander]

    def node(self, node: Json, path: str) -> PyTree:
        if node == "array":
            return jnp.asarray(self.tensors[path])
        decoders: dict[str, Callable[[], PyTree]] = {
            "dict": lambda: {k: self.node(v, _join(path, k)) for k, v in node["dict"]},
            "list": lambda: [self.node(v, _join(path, i)) for i, v in enumerate(node["list"])],
            "tuple": lambda: tuple(self.node(v, _join(path, i)) for i, v in enumerate(node["tuple"])),
            "value": lambda: node["value"],
            "sparse": lambda: self._spread(path, self._mask(path, node["sparse"])),
            "leaf": lambda: self._leaf(node["leaf"], path),
            "masked": lambda: self._masked(node, path),
        }
        return decoders[next(k for k in decoders if k in node)]()

    def _mask(self, path: str, shape: list[int]) -> np.ndarray:
        return unbitmap(self.tensors[f"{path}.mask"], tuple(shape))

    def _spread(self, path: str, kept: np.ndarray) -> jax.Array:
        return jnp.asarray(scatter(self.tensors[path], kept, 0))

    def _masked(self, node: Json, path: str) -> Masked:
        mask = self._mask(path, node["mask"])
        kept = np.broadcast_to(mask, tuple(node.get("shape", node["mask"])))
        inner = node["masked"]
        if inner == "survivors":
            values: Leaf = self._spread(path, kept)
        else:
            values = self._leaf(inner["survivors"], path, kept) if "survivors" in inner else self.node(inner, path)
        return Masked(values, Packed.of(jnp.asarray(mask), 1, 0))

    def _leaf(self, node: Json, path: str, kept: np.ndarray | None = None) -> CompressedLeaf:
        """A leaf from its fields; where ``kept`` is given, the coded field holds the codes of those elements alone."""
        name, meta, *rest = node
        data = rest[0] if rest else {}
        cls = _known(CompressedLeaf, name, path)
        values = {f: self._field(data.get(f), _field_path(cls, f, path)) for f in cls.data_fields}

        def shape() -> Shape:
            return kept.shape if kept is not None else tuple(getattr(values[cls.coded], "shape", ()))

        static = of_today(name, {k: self._static(v, path) for k, v in meta.items()}, shape)
        leaf = cls(**static, **values)
        return leaf if kept is None else _with_all_codes(leaf, kept)

    def _field(self, node: Json, at: str) -> Leaf | Packed | None:
        if node is None:
            return jnp.asarray(self.tensors[at]) if at in self.tensors else None
        if "packed" in node:
            bits, low, shape = node["packed"]
            return Packed(jnp.asarray(self.tensors[at]), bits, low, tuple(shape))
        return self.node(node, at)

    def _static(self, value: Json, path: str) -> object:
        if isinstance(value, list):
            return tuple(self._static(v, path) for v in value)
        if not isinstance(value, dict):
            return value
        if "dtype" in value:
            return jnp.dtype(value["dtype"])
        if "compander" in value:
            return self._compander(value["compander"], path)
        name, given = value["spec"]
        kept = {k: self._static(v, path) for k, v in given.items() if (name, k) not in RETIRED}
        return _known(Spec, name, path)(**kept)

    def _compander(self, name: str, path: str) -> Compander:
        if name not in self.companders:
            raise ValueError(f"{path!r} is companded by {name!r}, which is not known here; name it in companders=[...]")
        return self.companders[name]


def _known(base: type, name: str, path: str) -> Any:
    """The class of this name among the subclasses of ``base``."""
    left: list[type] = base.__subclasses__()
    while left:
        cls = left.pop()
        if cls.__name__ == name:
            return cls
        left += cls.__subclasses__()
    raise ValueError(f"{path!r} is made of {name!r}, which is not known here; import the module that defines it")


def _with_all_codes(leaf: Leaf, kept: np.ndarray) -> CompressedLeaf:
    codes = getattr(leaf, leaf.coded)
    zero = np.asarray(leaf.code_of_zero(kept.shape))
    full = jnp.asarray(scatter(np.asarray(unpacked(codes)), kept, zero))
    new = Packed.of(full, codes.bits, codes.low) if isinstance(codes, Packed) else full
    return replace(leaf, **{leaf.coded: new})
