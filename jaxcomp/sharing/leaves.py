"""Codebooks: leaves whose elements are entries of a small table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.layouts import Blocks
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed, method_of, pack
from jaxcomp.core.packed import Packed, compressed_leaf, unpacked
from jaxcomp.core.roles import OUTPUT, SINGLE, AxisRoles
from jaxcomp.core.types import DType, Leaf, Params, Shape
from jaxcomp.sharing.kmeans.fit import code_dtype
from jaxcomp.sharing.kmeans.tables import table_index

GRADIENTS = ("straight", "sum", "mean")


class How(NamedTuple):
    """The static part of a look-up; see the fields of :class:`Codebook`."""

    blocks: Blocks
    gradient: str
    zero_first: bool


@compressed_leaf(meta=("blocks", "bucket", "gradient", "zero_first"))
class Codebook(CompressedLeaf):
    """``dense == table[codes, t]``, where t is the number of the element's table.

    Fields:
      table: entries by tables, an array or a leaf that a later transform made of it.
      codes: unsigned integers of the dense shape; after ``pack`` of ``ceil(log2(entries))`` bits.
      weights: what the gradient passes to, while the weights are trained; else None. It does not change the value.
      blocks, bucket: which element has which table, the parts of a :class:`~jaxcomp.core.layouts.Blocks`: each block
        has its own, in C order, or each ``bucket`` elements where that is not 0; static. Of one table they may be left
        out.
      gradient: static. "straight": each weight gets its own gradient, an entry the sum of its members'. "sum", "mean":
        an entry gets the sum or the mean of its members' gradients, and so does each of the members.
      zero_first: whether the first entry is 0 and stays so: neither it nor its members get a gradient; static.
    """

    table: jax.Array | CompressedLeaf
    codes: jax.Array | Packed
    weights: jax.Array | None
    blocks: Shape = ()
    bucket: int = 0
    gradient: str = "straight"
    zero_first: bool = False

    open: ClassVar[tuple[str, ...]] = ("table",)
    made_by: ClassVar[str] = "share"
    coded: ClassVar[str] = "codes"

    def field_roles(self, name: str) -> AxisRoles:
        """Each table may have a scale of its own."""
        return AxisRoles((SINGLE, OUTPUT))

    @property
    def method(self) -> str:  # noqa: D102
        inner = f" {method_of(self.table)}" if is_compressed(self.table) else ""
        return f"Codebook of {self.entries}{inner}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        tables = int(self.table.shape[1])
        said = ("one table" if tables == 1 else f"{tables} tables",)
        return said if isinstance(self.codes, Packed) or self.code_bits == 16 else (*said, "not packed")

    @property
    def entries(self) -> int:
        """How many entries a table has."""
        return int(self.table.shape[0])

    @property
    def code_bits(self) -> int:
        """``ceil(log2(entries))``, or 16 where that is above 8."""
        bits = (self.entries - 1).bit_length()
        return max(bits, 1) if bits <= 8 else 16

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return jnp.dtype(self.table.dtype)

    def materialize(self) -> jax.Array:
        """Looks the codes up."""
        how = How(Blocks(self.blocks, self.bucket), self.gradient, self.zero_first)
        codes = unpacked(self.codes).astype(code_dtype(self.entries))
        return _look_up(how, dense(self.table), codes, self.weights)

    def pack(self) -> Codebook:
        """Codes of ``code_bits`` bits, no weights."""
        codes = self.codes
        if not isinstance(codes, Packed):
            bits = self.code_bits
            codes = codes.astype(jnp.uint16) if bits == 16 else Packed.of(codes, bits, 0)
        return replace(self, table=pack(self.table), codes=codes, weights=None)


def _places(how: How, table: jax.Array, codes: jax.Array) -> jax.Array:
    """Of each element in the flattened table."""
    index = codes.astype(jnp.int32)
    if table.shape[1] == 1:
        return index
    return index * table.shape[1] + table_index(tuple(codes.shape), how.blocks)


_LookUp = tuple[jax.Array, jax.Array, jax.Array | None]
"""The table, the codes and the weights, or their tangents."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _look_up(how: How, table: jax.Array, codes: jax.Array, weights: jax.Array | None) -> jax.Array:
    return table.reshape(-1)[_places(how, table, codes)]


@_look_up.defjvp
def _look_up_jvp(how: How, primals: _LookUp, tangents: _LookUp) -> tuple[jax.Array, jax.Array]:
    """Linear in both tangents, so that the transposed sum over members is JAX's own."""
    table, codes, weights = primals
    of_table, _, of_weights = tangents
    places = _places(how, table, codes)

    def member_sums(x: jax.Array) -> jax.Array:
        return jnp.zeros(table.size, table.dtype).at[places].add(x.astype(table.dtype))

    flat = of_table.reshape(-1)
    if of_weights is not None and how.gradient != "straight":
        flat = flat + member_sums(of_weights)
    if how.gradient == "mean":
        flat = flat / jnp.maximum(member_sums(jnp.ones(codes.shape, table.dtype)), 1)
    tangent = flat[places]
    if of_weights is not None and how.gradient == "straight":
        tangent = tangent + of_weights.astype(table.dtype)
    if how.zero_first:
        tangent = jnp.where(codes == 0, jnp.zeros((), tangent.dtype), tangent)
    return _look_up(how, table, codes, weights), tangent


@compressed_leaf(meta=("axis", "gradient"))
class VectorCodebook(CompressedLeaf):
    """``dense == table[codes]``, each entry d neighbours along ``axis``.

    Fields:
      table: entries by d.
      codes: unsigned integers; the dense shape with ``axis`` d times shorter.
      weights: what the gradient passes to, straight through, while the weights are trained; else None.
      axis: not negative; static.
      gradient: static. "sum", "mean": an entry gets the sum or the mean of its members' gradients.
    """

    table: jax.Array | CompressedLeaf
    codes: jax.Array | Packed
    weights: jax.Array | None
    axis: int
    gradient: str = "sum"

    open: ClassVar[tuple[str, ...]] = ("table",)
    made_by: ClassVar[str] = "share_vectors"

    @property
    def method(self) -> str:  # noqa: D102
        entries, length = self.table.shape
        inner = f" {method_of(self.table)}" if is_compressed(self.table) else ""
        return f"Codebook of {entries} vectors of {length}{inner}"

    def field_roles(self, name: str) -> AxisRoles:
        """Each place of a vector may have a scale of its own."""
        return AxisRoles((SINGLE, OUTPUT))

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        shape = list(self.codes.shape)
        shape[self.axis] *= self.table.shape[1]
        return tuple(shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return jnp.dtype(self.table.dtype)

    def materialize(self) -> jax.Array:
        """Looks the codes up and lays the entries along the axis."""
        table, codes = dense(self.table), unpacked(self.codes).astype(jnp.int32)
        if self.gradient == "mean":
            members = jnp.zeros(table.shape[0], table.dtype).at[codes].add(1)
            table = _shared(table, 1 / jnp.maximum(members, 1)[:, None])
        x = jnp.moveaxis(table[codes], -1, self.axis + 1)
        x = x.reshape(self.shape)
        if self.weights is None:
            return x
        return _straight(x, self.weights)

    def pack(self) -> VectorCodebook:
        """Codes of ``ceil(log2(entries))`` bits, of 16 above 256 entries; no weights."""
        codes, bits = self.codes, max((self.table.shape[0] - 1).bit_length(), 1)
        if not isinstance(codes, Packed):
            codes = codes.astype(jnp.uint16) if bits > 8 else Packed.of(codes, bits, 0)
        return replace(self, table=pack(self.table), codes=codes, weights=None)


@jax.custom_jvp
def _straight(x: jax.Array, weights: jax.Array) -> jax.Array:
    return x


_straight.defjvps(lambda t, out, *_: t, lambda t, out, *_: t.astype(out.dtype))


@jax.custom_jvp
def _shared(table: jax.Array, share: jax.Array) -> jax.Array:
    """The table, whose gradient is multiplied by the share."""
    return table


_shared.defjvps(lambda t, out, table, share: t * share, None)


def trained_tables(tree: Params, gradient: str = "mean") -> tuple[Params, Params]:
    """Makes a tree's tables parameters: ``(trained, fixed)``, two trees that :func:`with_tables` puts together.

    ``trained`` holds the floating arrays, among them the tables, and is what an optimizer trains; ``fixed`` holds the
    codes and whatever else is no floating array. Each has None where the other has a value, so gradients and optimizers
    see floats alone. A table gets the sum or the mean of its members' gradients.

    Args:
      tree: what ``apply`` of a chain with :func:`~jaxcomp.sharing.transform` gave.
      gradient: "sum" or "mean".

    Raises:
      ValueError: another gradient, or no codebook in the tree.

    >>> tree = {"w": Codebook(jnp.array([[1.0], [2.0]]), jnp.array([0, 1, 1], jnp.uint8), None)}
    >>> tables, codes = trained_tables(tree)
    >>> jax.grad(lambda t: dense(with_tables(t, codes)["w"]).sum())(tables)["w"].table.tolist()
    [[1.0], [1.0]]
    """
    if gradient not in GRADIENTS[1:]:
        raise ValueError(f"trained_tables: gradient must be 'sum' or 'mean', got {gradient!r}.")
    tree = jax.tree.map(lambda x: _freed(x, gradient), tree, is_leaf=is_compressed)
    if not any(_holds_table(x) for x in jax.tree.leaves(tree, is_leaf=is_compressed)):
        raise ValueError("trained_tables: the tree has no codebook; give it what apply of share(...) made.")
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    trained = jax.tree.map(lambda x: x if floats(x) else None, tree)
    return trained, jax.tree.map(lambda x: None if floats(x) else x, tree)


def with_tables(trained: Params, fixed: Params) -> Params:
    """The tree that :func:`trained_tables` took apart.

    Args:
      trained: the tables, as the optimizer left them.
      fixed: all else, as :func:`trained_tables` gave it.

    >>> from jaxcomp import share
    >>> params = {"w": jnp.array([[1.0, 1.0], [3.0, 4.0]])}
    >>> shared = share(2).apply(share(2).init(params), params)
    >>> again = with_tables(*trained_tables(shared))
    >>> bool((again["w"].materialize() == shared["w"].materialize()).all())
    True
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda x: x is None)


def _freed(x: Leaf, gradient: str) -> Leaf:
    if isinstance(x, Codebook | VectorCodebook):
        return replace(x, weights=None, gradient=gradient)
    if is_compressed(x):
        inner = {name: _freed(getattr(x, name), gradient) for name in x.open}
        return replace(x, **inner) if inner else x
    return x


def _holds_table(x: Leaf) -> bool:
    return isinstance(x, Codebook | VectorCodebook) or any(_holds_table(getattr(x, n)) for n in getattr(x, "open", ()))
