"""A weight of which most is zero: the other numbers and their positions, feature by feature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.types import DType, Shape
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.numerics.affine import in_type

SHORT = 1 << 16
"""Positions up to here are uint16."""
MOST = 2**31 - 1
"""So many numbers can be counted."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kept", "index", "starts", "scale"],
    meta_fields=["grid", "length", "dtype"],
)
@dataclass(frozen=True)
class SparseWeight:
    """``dense[n, index[k]] == kept[k] * scale[n, 0]`` for ``starts[n] <= k < starts[n + 1]``, and 0 elsewhere.

    Stacked weights have leading axes in front of each of these; those that keep fewer numbers are padded behind them.

    Attributes:
      kept: of the dense type, or int8 codes of a symmetric grid; ``(*lead, numbers)``.
      index: where along the contracted axis each lies, ascending in a feature: uint16, or int32 on axes longer than
        65,536; ``(*lead, numbers)``.
      starts: the first number of each feature, and how many there are in all: int32, ``(*lead, features + 1)``.
      scale: of codes, in the type of computing: ``(*lead, features, 1)``; None where numbers are the values.
      grid: what codes stand for, or None, static.
      length: of the contracted axis, static.
      dtype: the dense array's type, static.
    """

    kept: jax.Array
    index: jax.Array
    starts: jax.Array
    scale: jax.Array | None
    grid: Numbers | None
    length: int
    dtype: DType

    @property
    def shape(self) -> Shape:
        """``(*lead, features, length)``."""
        return (*self.starts.shape[:-1], self.starts.shape[-1] - 1, self.length)

    @property
    def lead(self) -> int:
        """How many axes weights are stacked along."""
        return self.kept.ndim - 1

    @property
    def computed(self) -> DType:
        """The type of sums."""
        return compute_dtype(self.dtype) if self.scale is None else self.scale.dtype

    def numbers(self) -> jax.Array:
        """``(*lead, features, length)``: the numbers where they belong, zeros elsewhere."""

        def spread(kept: jax.Array, index: jax.Array, starts: jax.Array) -> jax.Array:
            feature = jnp.searchsorted(starts, jnp.arange(kept.shape[0]), side="right") - 1
            return jnp.zeros(self.shape[-2:], kept.dtype).at[feature, index].set(kept, mode="drop")  # and the padding

        for _ in range(self.lead):
            spread = jax.vmap(spread)
        return spread(self.kept, self.index, self.starts)

    def values(self) -> jax.Array:
        """The weight in the type of sums."""
        x = self.numbers().astype(self.computed)
        return x if self.scale is None else x * self.scale

    def dense(self) -> jax.Array:
        """The weight: the same bits that the leaf it was made of gives."""
        return self.numbers() if self.scale is None else in_type(self.values(), self.scale, self.dtype)


def sparse_parts(dense: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers where matrices are not 0, their positions and where features start.

    Args:
      dense: ``(*lead, features, length)``; a zero with a sign is kept, for it is not the same bits.
      numbers: of the same shape, what to keep of each.

    >>> x = np.array([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]])
    >>> [v.tolist() for v in sparse_parts(x, x)]
    [[2.0, 1.0, 3.0], [1, 0, 1], [0, 1, 1, 3]]
    """
    *lead, features, length = dense.shape
    at = ((dense != 0) | np.signbit(dense)).reshape(-1, features, length)
    by_feature = np.cumsum(at.sum(2, dtype=np.int64), 1)
    most = int(by_feature[:, -1].max(initial=0))
    kept = np.zeros((len(at), most), numbers.dtype)
    index = np.zeros((len(at), most), np.uint16 if length <= SHORT else np.int32)
    for i, matrix in enumerate(numbers.reshape(at.shape)):
        kept[i, : by_feature[i, -1]] = matrix[at[i]]
        index[i, : by_feature[i, -1]] = np.nonzero(at[i])[1]
    starts = np.pad(by_feature, ((0, 0), (1, 0))).astype(np.int32)
    found = (kept, index, starts)
    return tuple(v.reshape(*lead, v.shape[-1]) for v in found)  # type: ignore[return-value]
