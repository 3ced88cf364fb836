"""A leaf that is mostly zero, laid out for the site that multiplies it: its other numbers and where they lie."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import compressed_leaf, unpacked
from jaxcomp.core.types import DType, Shape
from jaxcomp.core.wrappers import Masked
from jaxcomp.kernels.leaves import Axes, Laid, laid_out
from jaxcomp.kernels.sparse import MOST, SparseWeight, sparse_parts
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.numerics.affine import spread


@compressed_leaf(meta=("grid", "length", "dense_dtype", "dense_shape", "axes", "site"))
class PreparedSparse(Laid):
    """The numbers that are not zero, and where they lie.

    Fields:
      kept, index, starts, scale, grid, length: see :class:`~jaxcomp.kernels.sparse.SparseWeight`.
      dense_dtype, dense_shape, axes, site: see :class:`~jaxcomp.kernels.leaves.Laid`.
    """

    kept: jax.Array
    index: jax.Array
    starts: jax.Array
    scale: jax.Array | None
    grid: Numbers | None
    length: int
    dense_dtype: DType
    dense_shape: Shape
    axes: Axes
    site: str

    @property
    def method(self) -> str:  # noqa: D102
        return f"PreparedSparse {self.kept.dtype if self.grid is None else self.grid.label}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return (f"{self.kept.size / self.size:.1%} kept",)

    @property
    def weight(self) -> SparseWeight:
        """The numbers as kernels take them."""
        return SparseWeight(self.kept, self.index, self.starts, self.scale, self.grid, self.length, self.dense_dtype)


def prepared_sparse(leaf: CompressedLeaf, axes: Axes, site: str, least: float) -> PreparedSparse | str:
    """A leaf of which at least that part is zero as numbers and positions, or why it is not."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaf)):
        return "which of its elements are zero is not known inside jit; prepare outside"
    length, packed = math.prod(leaf.shape[i] for i in axes[2]), leaf.pack()
    if not leaf.size:
        return "it is empty"
    values = np.asarray(laid_out(packed.materialize(), axes))
    zeros = 1 - np.count_nonzero(values) / values.size
    if zeros < least:
        return f"{zeros:.1%} of it is zero, {least:.1%} are wanted"
    if values.size - zeros * values.size > MOST:
        return f"more than {MOST} of its numbers are not zero"
    coded = _codes_by_feature(packed, axes)
    numbers, scale, grid = (values, None, None) if coded is None else coded
    kept, index, starts = (jnp.asarray(v) for v in sparse_parts(values, numbers))
    return PreparedSparse(kept, index, starts, scale, grid, length, leaf.dtype, leaf.shape, axes, site)


def _codes_by_feature(leaf: CompressedLeaf, axes: Axes) -> tuple[np.ndarray, jax.Array, Numbers] | None:
    """The int8 codes ``(*lead, features, length)`` of a leaf whose scales are its features', those, and the grid."""
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    if not isinstance(inner, Quantized) or not inner.grid.proportional or inner.grid.code_range is None:
        return None
    scale = dense(inner.scale)
    if inner.zero_point is not None or inner.grid.code_range[0] == 0 or any(scale.shape[i] != 1 for i in axes[2]):
        return None
    shape = tuple(1 if i in axes[2] else n for i, n in enumerate(inner.shape))
    by_feature = jnp.broadcast_to(spread(scale, shape), shape)
    return np.asarray(laid_out(unpacked(inner.codes), axes)), laid_out(by_feature, axes), inner.grid
