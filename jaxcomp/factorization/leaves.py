"""Leaves of factors: what a dense array of low rank is stored as, trained as, and run as.

Axes in front that every factor shares hold layers that a scan has stacked; each layer is a product of its own slices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import CompressedLeaf, dense, method_of, pack
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.roles import CONTRACTED, OUTPUT, SPATIAL, STACKED, AxisRoles
from jaxcomp.core.types import DType, Leaf
from jaxcomp.factorization.decompositions import HIGHEST, matmul


class FactorLeaf(CompressedLeaf):
    """A leaf that is a product of smaller arrays, each of them open to later transforms.

    The product is computed in float32 (or float64) with all its bits, and then cast.
    """

    made_by: ClassVar[str] = "low_rank"

    @property
    def factors(self) -> tuple[Leaf, ...]:
        """The factors as they are stored."""
        return tuple(getattr(self, name) for name in self.data_fields)

    def field_roles(self, name: str) -> AxisRoles:
        """Stacked layers in front, taps, then features: those that a product sums over, then those that it keeps."""
        front, own = (STACKED,) * self.stacked, getattr(self, name).ndim - self.stacked
        if name in ("taps", "rows", "cols"):
            return AxisRoles((*front, *(SPATIAL,) * (own - 1), OUTPUT))
        return AxisRoles((*front, *(SPATIAL,) * (own - 2), CONTRACTED, OUTPUT))

    @property
    def stacked(self) -> int:
        """How many axes in front hold stacked layers."""
        return int(self.factors[0].ndim - 2)

    @property
    def method(self) -> str:  # noqa: D102
        inner = " and ".join(sorted({method_of(x) for x in self.factors}))
        return f"{type(self).__name__} of rank {self.rank} {inner}"

    @property
    def rank(self) -> int | tuple[int, int]:
        """How many terms the product has."""
        return int(self.factors[0].shape[-1])

    @property
    def dtype(self) -> DType:  # noqa: D102
        return jnp.dtype(self.factors[0].dtype)

    @abstractmethod
    def product(self) -> jax.Array:
        """The dense array of factors that are arrays of the computing type."""

    def arrays(self) -> FactorLeaf:
        """The same leaf with every factor an array."""
        return self.mapped(dense)

    def mapped(self, fn: Callable[[Leaf], Leaf]) -> FactorLeaf:
        """The same leaf with ``fn`` of every factor."""
        new = {name: fn(getattr(self, name)) for name in self.data_fields}
        return type(self)(**new, **{name: getattr(self, name) for name in self.meta_fields})

    def materialize(self) -> jax.Array:
        """Multiplies the factors."""
        dtype = self.dtype
        wide = compute_dtype(dtype)
        return self.mapped(lambda x: dense(x).astype(wide)).product().astype(dtype)

    def pack(self) -> FactorLeaf:
        """The same leaf with its factors packed."""
        return self.mapped(pack)


def _flat_product(left: jax.Array, right: jax.Array, stacked: int, inner: int) -> jax.Array:
    """``left @ right`` over the rank, with the axes between ``stacked`` and the last ``inner`` of ``left`` as rows."""
    front, rank = left.shape[:stacked], left.shape[-1]
    rows = math.prod(left.shape[stacked:-1])
    a, b = left.reshape(*front, rows, rank), right.reshape(*front, rank, -1)
    return matmul(a, b).reshape(*left.shape[:-1], *right.shape[right.ndim - inner :])


@compressed_leaf(meta=("row_axes", "outputs_first"))
class LowRank(FactorLeaf):
    """``dense == tensordot(u, v, 1)``: a matrix ``u @ v`` whose rows and columns may be several axes.

    Fields:
      u: (*stacked, *rows, r).
      v: (*stacked, r, *cols).
      row_axes: how many axes the rows are, static; the dense shape is (*stacked, *rows, *cols).
      outputs_first: whether products sum over the columns and keep the rows, as of Equinox's (out, in); static, and of
        no influence on the value.

    >>> leaf = LowRank(jnp.ones((3, 3, 8, 2)), jnp.ones((2, 16)), 3)
    >>> leaf.shape, leaf.rank, float(leaf.materialize()[0, 0, 0, 0])
    ((3, 3, 8, 16), 2, 2.0)
    """

    u: Leaf
    v: Leaf
    row_axes: int = 1
    outputs_first: bool = False

    open: ClassVar[tuple[str, ...]] = ("u", "v")

    @property
    def stacked(self) -> int:
        """How many axes in front hold stacked layers."""
        return int(self.u.ndim - 1 - self.row_axes)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (*self.u.shape[:-1], *self.v.shape[self.stacked + 1 :])

    def field_roles(self, name: str) -> AxisRoles:  # noqa: D102
        # A product meets the inputs' factor first: the rank is what that one gives, and what the other one sums over.
        rows, cols = (OUTPUT, CONTRACTED) if self.outputs_first else (CONTRACTED, OUTPUT)
        front = (STACKED,) * self.stacked
        if name == "u":
            return AxisRoles((*front, *(rows,) * self.row_axes, cols))
        return AxisRoles((*front, rows, *(cols,) * (self.v.ndim - self.stacked - 1)))

    def product(self) -> jax.Array:  # noqa: D102
        return _flat_product(self.u, self.v, self.stacked, self.v.ndim - self.stacked - 1)


@compressed_leaf()
class Tucker(FactorLeaf):
    """``dense[*s, i, o] == Σ_ab u[i, a] core[*s, a, b] v[b, o]``: a convolution between two 1x1 convolutions.

    Fields:
      u: (*stacked, I, a).
      core: (*stacked, *spatial, a, b).
      v: (*stacked, b, O).
    """

    u: Leaf
    core: Leaf
    v: Leaf

    open: ClassVar[tuple[str, ...]] = ("u", "core", "v")

    @property
    def rank(self) -> tuple[int, int]:
        """The ranks of the input and the output features."""
        return int(self.core.shape[-2]), int(self.core.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (*self.core.shape[:-2], self.u.shape[-2], self.v.shape[-1])

    def product(self) -> jax.Array:  # noqa: D102
        inner = _flat_product(self.core, self.v, self.stacked, 1)
        front, size = inner.shape[: self.stacked], inner.shape[-2:]
        taps = inner.reshape(*front, -1, *size)
        out = jnp.einsum("...ia,...sao->...sio", self.u, taps, precision=HIGHEST)
        return out.reshape(self.shape)


@compressed_leaf()
class Depthwise(FactorLeaf):
    """``dense[*s, i, o] == Σ_r taps[*s, r] u[i, r] v[r, o]``: a depthwise convolution between two 1x1 convolutions.

    Fields:
      u: (*stacked, I, r).
      taps: (*stacked, *spatial, r).
      v: (*stacked, r, O).
    """

    u: Leaf
    taps: Leaf
    v: Leaf

    open: ClassVar[tuple[str, ...]] = ("u", "taps", "v")

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (*self.taps.shape[:-1], self.u.shape[-2], self.v.shape[-1])

    def product(self) -> jax.Array:  # noqa: D102
        return _kernel(self.u, self.taps, self.v, self.stacked)


@compressed_leaf()
class Separable(FactorLeaf):
    """``dense[h, w, i, o] == Σ_r rows[h, r] cols[w, r] u[i, r] v[r, o]``: the taps of :class:`Depthwise` split too.

    Fields:
      u: (*stacked, I, r).
      rows: (*stacked, H, r).
      cols: (*stacked, W, r).
      v: (*stacked, r, O).
    """

    u: Leaf
    rows: Leaf
    cols: Leaf
    v: Leaf

    open: ClassVar[tuple[str, ...]] = ("u", "rows", "cols", "v")

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return (*self.rows.shape[:-1], self.cols.shape[-2], self.u.shape[-2], self.v.shape[-1])

    def product(self) -> jax.Array:  # noqa: D102
        taps = self.rows[..., :, None, :] * self.cols[..., None, :, :]
        return _kernel(self.u, taps, self.v, self.stacked)


def _kernel(u: jax.Array, taps: jax.Array, v: jax.Array, stacked: int) -> jax.Array:
    front, rank = u.shape[:stacked], u.shape[-1]
    spatial = taps.shape[stacked:-1]
    inputs = u.reshape(*front, *[1] * len(spatial), u.shape[-2], rank)
    return _flat_product(taps[..., None, :] * inputs, v, stacked, 1)


def balanced(leaf: FactorLeaf) -> FactorLeaf:
    """The same product with each term's size shared evenly among its factors, which suits training; not for Tucker.

    A term of which a factor is zero stays as it is: the others keep a gradient alive.
    """
    if isinstance(leaf, Tucker):
        return leaf
    stacked = leaf.stacked
    wide = [dense(x).astype(compute_dtype(leaf.dtype)) for x in leaf.factors]
    last = len(wide) - 1
    terms = [jnp.moveaxis(x, stacked, -1) if k == last else x for k, x in enumerate(wide)]
    lengths = [jnp.sqrt(jnp.sum(t * t, axis=tuple(range(stacked, t.ndim - 1)))) for t in terms]
    alive = jnp.stack(lengths).min(0) > 0
    logs = [jnp.log(jnp.where(alive, n, jnp.ones_like(n))) for n in lengths]
    mean = sum(logs[1:], logs[0]) * (1.0 / len(logs))
    scales = [jnp.exp(mean - log) for log in logs]
    new = []
    for k, (t, scale) in enumerate(zip(terms, scales, strict=True)):
        out = t * scale.reshape(*scale.shape[:-1], *[1] * (t.ndim - scale.ndim), scale.shape[-1])
        new.append((jnp.moveaxis(out, -1, stacked) if k == last else out).astype(leaf.dtype))
    fields = dict(zip(leaf.data_fields, new, strict=True))
    return type(leaf)(**fields, **{name: getattr(leaf, name) for name in leaf.meta_fields})
