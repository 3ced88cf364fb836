"""Products of float activations and a packed weight, in plain jax.numpy: oracle and fallback of every kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType
from jaxcomp.kernels.packing import PackedWeight


def weight_only(x: jax.Array, w: PackedWeight, *, dtype: DType | None = None) -> jax.Array:
    """``x @ dense(w).T``, with sums in float32.

    Args:
      x: ``(..., length)``, float.
      w: ``(features, length)``.
      dtype: of the result ``(..., features)``; that of ``x`` if None.
    """
    out = jnp.matmul(x, w.dense().T, preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)
