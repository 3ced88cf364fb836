"""Trees as JSON and tensors. Knows leaves, not files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.artifact.masking import Kept, bitmap, nonzero_bits, part_of, part_of_stream, stream_of
from jaxcomp.artifact.masks import Smallest, pattern_codes
from jaxcomp.artifact.statics import BRANCHES, OTHERS, VALUES, class_name, encode_fields, encode_static, number
from jaxcomp.artifact.tensors import NAMES, Tensor, Tensors
from jaxcomp.core.bits import bits_of, pack_bits_on_host, packed_size
from jaxcomp.core.errors import naming
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed, pack
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import path_keys
from jaxcomp.core.types import Json, Leaf, PyTree
from jaxcomp.core.wrappers import Masked

MAX_DEPTH = 100
"""How deep a tree in a file may be."""


@dataclass(frozen=True)
class At:
    """Where a node is: its path, and how many nodes are above it."""

    path: str = ""
    depth: int = 0

    def __post_init__(self) -> None:
        if self.depth > MAX_DEPTH:
            raise TypeError(f"save: the tree is nested more than {MAX_DEPTH} deep at {self.path!r}; make it flatter.")

    def child(self, key: str | int) -> At:
        """Of an entry of this node."""
        return At(f"{self.path}/{key}" if self.depth else str(key), self.depth + 1)

    def field(self, name: str) -> At:
        """Of a part of this leaf."""
        return At(f"{self.path}.{name}", self.depth + 1)


def encode_tree(tree: PyTree) -> tuple[Json, list[Tensor]]:
    """A tree as JSON in which tensors stand where a file has their numbers, and the tensors.

    Tensors are called by path, "kernel", and "kernel.scale" for a part of a leaf, for other readers of the file; what
    belongs where the JSON alone says. Dicts, lists, tuples, None and the classes of ``BRANCHES`` and ``VALUES`` keep
    their kind. Any other container (``nnx.State``, an Equinox module) becomes a dict; ``load(..., like=)`` gives it
    back.

    Raises:
      TypeError: a leaf that a file cannot hold. The message names the path.
      ValueError: a leaf that cannot be packed.
    """
    encoder = Encoder(Tensors())
    return encoder.node(tree, At()), encoder.out.all


@dataclass(frozen=True)
class Encoder:
    """Makes nodes, and gathers their tensors.

    Fields:
      out: where the tensors go.
      brought: gives a leaf on a device of this process.
    """

    out: Tensors
    brought: Callable[[Leaf], Leaf] = lambda leaf: leaf

    def node(self, x: PyTree, at: At) -> Json:
        """One node and all below it."""
        if is_compressed(x):
            with naming("save", at.path):
                packed = pack(self.brought(x))
            return self.leaf(packed, at)
        if x is None or type(x) in (bool, str):
            return {"value": x}
        if type(x) in (int, float):
            return {"value": number(x)}
        if hasattr(x, "dtype") and hasattr(x, "shape"):
            return self.array(self.brought(x), at)
        if type(x) in (list, tuple):
            return {type(x).__name__: [self.node(v, at.child(i)) for i, v in enumerate(x)]}
        name = type(x).__name__
        if BRANCHES.get(name) is type(x):
            return {"branch": [name, [[f, self.node(getattr(x, f), at.child(f))] for f in _fields_of(x)]]}
        if VALUES.get(name) is type(x):
            return {"object": [name, encode_fields(x, at.path, partial(self.out.add_array, at.path))]}
        items = self._items(x, at)
        return {"dict": [[k, self.node(v, at.child(k))] for k, v in items]}

    def _items(self, x: PyTree, at: At) -> list[tuple[str | int, PyTree]]:
        """Of a mapping its own, of any other container what jax sees in it."""
        if isinstance(x, Mapping) and not _is_custom(x):
            return [(_key(k, at.path), _without_value(v)) for k, v in x.items()]
        named, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
        if len(named) == 1 and named[0][0] == ():
            raise TypeError(
                f"save: {at.path!r} is {type(x).__name__}, which a file of weights cannot hold; keep arrays only, such"
                " as equinox.filter(model, equinox.is_array)."
            )
        in_dict = lambda keys: isinstance(keys[0], jax.tree_util.DictKey)  # noqa: E731
        return [(_key_of(keys), _without_value(v) if in_dict(keys) else v) for keys, v in named]

    # Arrays

    def array(self, x: PyTree, at: At) -> Json:
        """An array of jax, a random key, or an array or a scalar of numpy."""
        if isinstance(x, jax.core.Tracer):
            raise TypeError(f"save: {at.path!r} is a tracer; save outside jit.")
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(x)
            if not isinstance(impl, str):
                raise TypeError(f"save: {at.path!r} is a key of a kind without a name; save jax.random.key_data(key).")
            return {"key": [impl, self.host(host_array(jax.random.key_data(x), at.path), at)]}
        host = host_array(x, at.path)
        if isinstance(x, jax.Array):
            return self.host(host, at)
        return {"scalar" if isinstance(x, np.generic) else "numpy": self.host(host, at)}

    def host(self, x: np.ndarray, at: At) -> Json:
        """Its tensor; a bitmap and the entries that are not zero where that is smaller; or another type's tensor."""
        if x.dtype in OTHERS:
            return {"typed": [x.dtype.name, list(x.shape), self._stored_as(x, at)]}
        _check_type(x, at)
        words = nonzero_bits(x)
        count = int(np.count_nonzero(words))
        if not x.size or packed_size(x.size, 1) + count * x.itemsize >= x.nbytes * 0.98:
            return self.out.add_array(at.path, x)
        nonzero = part_of(words)
        kept = Kept(np.concatenate([*bitmap(lambda start, stop: nonzero(start, stop) != 0, x.size)]), x.shape)
        mask = self.mask(kept, Smallest.of(kept), at)
        values = self.out.add(at.path, x.dtype, (count,), lambda: kept.take(part_of(x)))
        return {"sparse": [list(x.shape), mask, values]}

    def _stored_as(self, x: np.ndarray, at: At) -> Tensor:
        """An array of a type that safetensors does not have: its parts, its bits in a stream, or its bytes."""
        if x.dtype.kind == "c":
            return self.out.add_array(at.path, x.reshape(-1).view(f"<f{x.itemsize // 2}"))
        bits = bits_of(x.dtype)
        codes = x.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1)
        return self.out.add_array(at.path, pack_bits_on_host(codes, bits))

    # Leaves

    def leaf(self, x: Leaf, at: At) -> Json:
        """A packed leaf."""
        if isinstance(x, Masked):
            return self.masked(x, at)
        if isinstance(x, CompressedLeaf):
            return {"leaf": self.body(x, at, None)}
        return self.node(x, at)  # a gate that never opened packs as what was there before

    def masked(self, x: Masked, at: At) -> Json:
        """Bitmap and survivors; or the values alone where the bitmap would not pay, and then they load without it."""
        values, mask = x.values, x.mask
        assert isinstance(mask, Packed)
        stream = host_array(mask.data, at.path)
        small = Kept(stream, tuple(mask.shape))
        kept, form = Kept.of(stream, small.shape, x.shape), Smallest.of(small)
        coded = is_compressed(values) and bool(values.coded)
        bits = values.code_bits if coded else 8 * jnp.dtype(x.dtype).itemsize
        count, whole = kept.count(), is_compressed(values) and not coded
        pays = form.nbytes + packed_size(count, bits) < packed_size(kept.size, bits) and not whole
        if not pays and not self._hides(values, kept, at):
            return self.node(values, at)
        if whole:
            inner = self.node(values, at)
        elif coded:
            inner = {"survivors": self.body(values, at, kept)}
        else:
            host = host_array(values, at.path)
            if host.dtype not in NAMES:
                raise TypeError(f"save: {at.path!r} is of type {host.dtype}, which a masked leaf in a file is not.")
            inner = {"survivors": self.out.add(at.path, host.dtype, (count,), lambda: kept.take(part_of(host)))}
        node = {"masked": inner, "mask": [list(small.shape), self.mask(small, form, at)]}
        return node if small.shape == x.shape else {**node, "shape": list(x.shape)}

    def mask(self, kept: Kept, form: Smallest, at: At) -> Json:
        """A mask in its smallest form."""
        name = f"{at.path}.mask"
        if form.distances is not None:
            return {"distances": self.out.add_array(name, form.distances)}
        p = form.patterns
        if p is None:
            return self.out.add_array(name, kept.bits)
        shape = (packed_size(kept.size // p.group, p.bits),)
        codes = self.out.add(name, np.dtype(np.uint8), shape, lambda: pattern_codes(kept, p))
        return {"patterns": [p.group, p.inner, p.bits, self.out.add_array(f"{name}.table", p.table), codes]}

    def _hides(self, values: Leaf, kept: Kept, at: At) -> bool:
        """Whether the mask turns into 0 what is not 0."""
        hidden = Kept(~kept.bits, kept.shape)
        return any(bool(x.any()) for x in hidden.take(part_of(host_array(dense(values), at.path))))

    def body(self, x: CompressedLeaf, at: At, kept: Kept | None) -> list[Json]:
        """Any leaf by its class and fields; of the coded one, only the codes that are ``kept``."""
        data = {}
        for name in x.data_fields:
            value, inside = getattr(x, name), at if name == x.coded else at.field(name)
            if value is None:
                continue
            if name == x.coded and kept is not None:
                data[name] = self._survivors(value, inside, kept)
            elif isinstance(value, Packed):
                data[name] = self._packed(value, inside)
            elif is_compressed(value):
                data[name] = self.leaf(value, inside)
            else:
                data[name] = self._plain(value, inside)
        add = partial(self.out.add_array, at.path)
        meta = {name: encode_static(getattr(x, name), at.path, add) for name in x.meta_fields}
        return [class_name(type(x), CompressedLeaf, at.path), meta, data]

    def _plain(self, value: Leaf, at: At) -> Json:
        host = host_array(value, at.path)
        if host.dtype in OTHERS:
            return self.host(host, at)
        _check_type(host, at)
        return self.out.add_array(at.path, host)

    def _packed(self, value: Packed, at: At) -> Json:
        tensor = self.out.add_array(at.path, host_array(value.data, at.path))
        return {"packed": [value.bits, value.low, list(value.shape), tensor]}

    def _survivors(self, value: Leaf | Packed, at: At, kept: Kept) -> Json:
        count = kept.count()
        if not isinstance(value, Packed):
            host = host_array(value, at.path)
            return self.out.add(at.path, host.dtype, (count,), lambda: kept.take(part_of(host)))
        codes = part_of_stream(host_array(value.data, at.path), value.bits)
        shape = (packed_size(count, value.bits),)
        stream = lambda: stream_of(kept.take(codes), value.bits)  # noqa: E731
        tensor = self.out.add(at.path, np.dtype(np.uint8), shape, stream)
        return {"packed": [value.bits, value.low, [count], tensor]}


def _check_type(x: np.ndarray, at: At) -> None:
    if x.dtype not in NAMES:
        raise TypeError(f"save: {at.path!r} is of type {x.dtype}, which files do not hold.")


def host_array(x: Leaf, path: str) -> np.ndarray:
    """The values in the host's memory, in C order and little-endian.

    Raises:
      TypeError: they are not known, or of a class that stands for more than they are. The message names the path.
      ValueError: other processes hold a part of them.
    """
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"save: {path!r} is a tracer; save outside jit.")
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"save: {path!r} is of type {x.dtype}; save jax.random.key_data(key) instead.")
    if not isinstance(x, jax.Array | np.generic) and type(x) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"save: {path!r} is {type(x).__name__}, which a file of weights cannot hold; keep arrays only, of jax or"
            " plain ones of numpy."
        )
    if spans_processes(x):
        raise ValueError(
            f"save: {path!r} of shape {x.shape} lies on the devices of {len({d.process_index for d in x.devices()})}"
            " processes, and this one has a part of it; give save the tree itself, in every process, or"
            " jax.experimental.multihost_utils.process_allgather(leaf, tiled=True)."
        )
    host = np.asarray(x)
    if host.dtype.kind in "iufc" and not host.dtype.isnative:
        host = host.astype(host.dtype.newbyteorder("="))
    return np.ascontiguousarray(host).reshape(host.shape)


def spans_processes(x: Leaf) -> bool:
    """Whether this process lacks a part of an array."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return known and not x.is_fully_addressable and not x.is_fully_replicated


def _is_custom(x: Mapping[str | int, PyTree]) -> bool:
    """A mapping whose values are not its pytree children, such as ``nnx.State`` over variables."""
    return type(x).__module__.startswith("flax.nnx")


def _key(key: object, path: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"save: {path!r} has the key {key!r}; keys must be strings or integers.")
    return key  # type: ignore[return-value]


def _key_of(keys: tuple[object, ...]) -> str | int:
    """The name of one child, an integer where it is a place."""
    (key,) = keys
    place = getattr(key, "idx", getattr(key, "key", None))
    return place if type(place) is int else path_keys(keys)[0]


def _without_value(x: PyTree) -> PyTree:
    """What a variable of NNX holds: a container of one child called ``value``, which paths leave out, too."""
    if is_compressed(x) or type(x) in (dict, list, tuple):
        return x
    named, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    alone = len(named) == 1 and named[0][0] == (jax.tree_util.GetAttrKey("value"),)
    return named[0][1] if alone else x


def _fields_of(x: PyTree) -> tuple[str, ...]:
    return x._fields if hasattr(x, "_fields") else tuple(f.name for f in fields(x))
