"""Lookups in tables of codes: only the rows that are taken are unpacked and dequantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.codes import LAYOUT, Codes, Value
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.prepared import Carried
from jaxcomp.activations.reasons import Record
from jaxcomp.activations.thin_claims import stepped_axes
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import DType, Leaf, Params, Shape
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import dequantize, in_type, spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, shape_of


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Table:
    """A packed leaf on its way to the lookups in it, which take rows of its codes as they are stored.

    Attributes:
      leaf: of any grid; a row's codes fill whole bytes.
      dtype: what the table was cast to on the way, static.
    """

    leaf: Quantized
    dtype: DType

    def dense(self) -> jax.Array:
        """The array that it stands for."""
        return dense(self.leaf).astype(self.dtype)


def tables(program: Program, planned: Iterable[Planned], params: Params) -> dict[str, Table]:
    """The leaves that are looked up, and whose codes enter no product and no scan's steps, by path."""
    planned = tuple(planned)
    entering = {path for p in planned if p.act is not None for o in p.site.operands for path in (o.leaf, *o.params)}
    wanted = {p.site.leaf for p in planned if _takes_rows(p)} - entering - set(stepped_axes(program))
    named = leaves_with_paths(params, is_leaf=is_compressed)[0]
    return {path: Table(leaf, leaf.dtype) for path, leaf in named if path in wanted and _has_rows(leaf)}


def table_claims(program: Program, found: Mapping[str, Table]) -> dict[Location, Claim]:
    """Claims on what lies between these tables and the lookups in them."""
    claims = {}
    for op in program.flow.ops if found else ():
        origin = op.tags[0].origin if op.tags and op.name in LAYOUT else None
        if origin is not None and origin.exact and origin.path in found and BARRED.isdisjoint(op.inside):
            claims[op.location] = Claim(partial(_cast, op))
    return claims


def lookup(planned: Planned, record: Record) -> Callable[..., list[jax.Array]]:
    """How a lookup is run on what its table is; ``record`` learns that rows of codes were taken."""

    def run(table: Value | Table | Carried, *rest: jax.Array) -> list[jax.Array]:
        if not isinstance(table, Codes | Table | Carried):
            return planned.op.bind(table, *rest)
        taken = _Rows(planned.op, rest)
        found = taken.of_codes(table) if isinstance(table, Codes) else taken.of_packed(table)
        if found is None:
            return planned.op.bind(table.dense(), *rest)
        record(planned.site.path, "lookup", None)
        return [taken.filled(found.astype(table.dtype))]

    return run


def _takes_rows(p: Planned) -> bool:
    """Whether a site is a lookup that can be claimed, of whole rows along the table's last axis."""
    if p.site.kind != "embed" or not p.site.operands[0].exact or not BARRED.isdisjoint(p.site.inside):
        return False
    return p.site.operands[0].roles[-1] == "output" and _Rows(p.op).ends_in_last


def _has_rows(leaf: Leaf) -> bool:
    """Whether a row of codes can be read without its neighbours."""
    if not isinstance(leaf, Quantized) or not leaf.packed:
        return False
    return not isinstance(leaf.codes, Packed) or leaf.shape[-1] * leaf.codes.bits % 8 == 0


def _cast(op: Op, value: Table | jax.Array, *rest: jax.Array) -> list[Table] | list[jax.Array]:
    """A table that is cast stays one; what else is done to it is done to the array."""
    if not isinstance(value, Table):
        return op.bind(value, *rest)
    if op.name == "convert_element_type" and jnp.issubdtype(op.eqn.params["new_dtype"], jnp.floating):
        return [replace(value, dtype=op.eqn.params["new_dtype"])]
    return op.bind(value.dense(), *rest)


@dataclass(frozen=True)
class _Rows:
    """A lookup, as it is done in the parts of a leaf: codes, scales and zero points that blocks share."""

    op: Op
    rest: tuple[jax.Array, ...] = ()

    @property
    def numbered(self) -> frozenset[int]:
        """The axes of which a lookup takes one index: the others it takes whole."""
        numbers, sizes = self.op.eqn.params["dimension_numbers"], self.op.eqn.params["slice_sizes"]
        return frozenset(
            i
            for i, n in enumerate(sizes)
            if i in numbers.operand_batching_dims or (i in numbers.start_index_map and n == 1)
        )

    @property
    def ends_in_last(self) -> bool:
        """Whether the table's last axis is the result's."""
        return self._axes[-1:] == (len(self._shape) - 1,)

    @property
    def _shape(self) -> Shape:
        return shape_of(self.op.eqn.outvars[0])

    @property
    def _axes(self) -> tuple[int, ...]:
        """Where the axes that the result keeps of the table are in it."""
        return tuple(self.op.eqn.params["dimension_numbers"].offset_dims)

    def of(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """The rows of an array that is of the table's size along what is numbered, whatever it is along other axes."""
        sizes = tuple(1 if i in self.numbered else n for i, n in enumerate(x.shape))
        fills = {"fill_value": fill} if self._fills else {}
        return self.op.bind(x, *self.rest, slice_sizes=sizes, **fills)[0]

    def of_blocks(self, v: jax.Array, shape: Shape) -> jax.Array:
        """The rows of what blocks share; what all rows share is not looked up, and so never spread over them."""
        if all(v.shape[i] == 1 for i in self.numbered):
            numbers = self.op.eqn.params["dimension_numbers"]
            gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
            kept = [n for i, n in enumerate(v.shape) if i not in gone]
            out = [1] * len(self._shape)
            for axis, n in zip(self._axes, kept, strict=True):
                out[axis] = n
            return v.reshape(out)
        whole = tuple(shape[i] if i in self.numbered else n for i, n in enumerate(v.shape))
        return self.of(jnp.broadcast_to(spread(v, whole), whole))

    def of_codes(self, box: Codes) -> jax.Array:
        """The rows of a table of codes, dequantized."""
        codes, shape = self.of(box.codes), box.codes.shape
        scale = self.of_blocks(box.scale, shape)
        zero = None if box.zero is None else self.of_blocks(box.zero, shape)
        return in_type(dequantize(codes, scale, zero), scale, box.dtype)

    def of_packed(self, table: Table | Carried) -> jax.Array | None:
        """The rows of a packed table, dequantized; None where a prepared one does not lie by rows."""
        if isinstance(table, Table):
            return dense(self.of_leaf(table.leaf))
        by_rows = table.leaf_axes == ((), (0,), (1,)) and all(op.name == "convert_element_type" for op in table.moves)
        return jax.tree.map(self.of, table.weight).dense() if by_rows and self.ends_in_last else None

    def of_leaf(self, leaf: Quantized) -> Quantized:
        """The rows of a packed leaf, which are one."""
        scale, zero = leaf.scale, leaf.zero_point
        if isinstance(scale, Quantized) and any(scale.shape[i] != 1 for i in self.numbered) and _has_rows(scale):
            scale = self.of_leaf(scale)
        else:
            scale = self.of_blocks(dense(scale), leaf.shape)
        zero = None if zero is None else self.of_blocks(zero, leaf.shape)
        if not isinstance(leaf.codes, Packed):
            return replace(leaf, codes=self.of(leaf.codes), scale=scale, zero_point=zero)
        bits, low, width = leaf.codes.bits, leaf.codes.low, leaf.shape[-1]
        data = self.of(leaf.codes.data.reshape(*leaf.shape[:-1], width * bits // 8))
        codes = Packed(data.reshape(-1), bits, low, (*data.shape[:-1], width))
        return replace(leaf, codes=codes, scale=scale, zero_point=zero)

    def filled(self, x: jax.Array) -> jax.Array:
        """``x`` with what the lookup fills in out of bounds."""
        if not self._fills:
            return x
        table = tuple(n if i in self.numbered else 1 for i, n in enumerate(self.op.shapes[0]))
        inside = self.of(jnp.ones(table, jnp.int8)) == 1
        fill = self.op.eqn.params["fill_value"]
        return jnp.where(inside, x, jnp.asarray(jnp.nan if fill is None else fill, x.dtype))

    @property
    def _fills(self) -> bool:
        return bool(self.op.eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP)
