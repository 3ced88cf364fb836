"""Dots of codes: int8 by int8 into int32, float8 by float8 into float32, the contracted axis last in both; one rescale.

XLA on GPU multiplies int8 at full speed only where the contracted axis is the last of both operands; and it keeps the
rescale in the product's kernel only where integers are corrected as integers, before they become floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.types import DType


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero", "sums"], meta_fields=[])
@dataclass(frozen=True)
class CodedMatrix:
    """``dense[n, k] == (codes[n, k] - zero[n]) * scale[n]``, ready to be multiplied.

    Attributes:
      codes: ``(features, length)``, int8, or float8.
      scale: ``(features,)`` or ``(1,)``, float.
      zero: int32, of the scale's shape, or None for 0.
      sums: ``(features,)``, int32, of ``codes - zero`` over the contracted axis: what a zero point of the activations
        is multiplied by. None of float8.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    sums: jax.Array | None


def coded_matrix(codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> CodedMatrix:
    """A weight with what zero points need of it, summed once.

    Args:
      codes: ``(features, length)``, int8, or float8 without a zero point.
      scale: ``(features,)`` or ``(1,)``.
      zero: integers of the scale's shape, or None for 0.

    >>> coded_matrix(jnp.array([[1, 2], [3, -4]], jnp.int8), jnp.ones(2), jnp.array([1, 0])).sums.tolist()
    [1, -1]
    """
    if codes.dtype != jnp.int8:
        return CodedMatrix(codes, scale, None, None)
    zero = None if zero is None else zero.astype(jnp.int32)
    sums = jnp.sum(codes, axis=1, dtype=jnp.int32)
    return CodedMatrix(codes, scale, zero, sums if zero is None else sums - codes.shape[1] * zero)


def folded(w: CodedMatrix, zero: jax.Array) -> jax.Array:
    """What a zero point of the activations, known when the weight is prepared, takes from the sums: ``(features,)``.

    >>> folded(coded_matrix(jnp.array([[1, 2], [3, -4]], jnp.int8), jnp.ones(2)), jnp.int32(5)).tolist()
    [15, -5]
    """
    assert w.sums is not None
    return zero.astype(jnp.int32) * w.sums


def coded_dot(
    x: jax.Array,
    w: CodedMatrix,
    *,
    scale: jax.Array,
    zero: jax.Array | None = None,
    offset: jax.Array | None = None,
    dtype: DType | None = None,
) -> jax.Array:
    """``Σ_k (x - zero) scale * dense[n, k]``: the sums are exact, one multiplication rounds, one cast to the result.

    Args:
      x: ``(..., length)``, int8 beside int8, or float8 beside float8.
      w: the weight.
      scale: of ``x``: ``()``, or ``(..., 1)`` where each token has its own.
      zero: of ``x``, int32, of the scale's shape; None for 0, or where ``offset`` says it.
      offset: what :func:`folded` made of a zero point that was known before.
      dtype: of the result ``(..., features)``; float32 if None.

    >>> w = coded_matrix(jnp.array([[1, 2], [3, -4]], jnp.int8), jnp.array([0.5, 1.0]), jnp.array([1, 0]))
    >>> coded_dot(jnp.array([3, 7], jnp.int8), w, scale=jnp.float32(2), zero=jnp.int32(2)).tolist()
    [5.0, -34.0]
    """

    def wide(v: jax.Array) -> jax.Array:
        """Of the features, in the result's axes."""
        return v.reshape((1,) * (x.ndim - 1) + v.shape)

    integers = w.codes.dtype == jnp.int8
    last = ((x.ndim - 1,), (1,)), ((), ())
    sums = lax.dot_general(x, w.codes, last, preferred_element_type=jnp.int32 if integers else jnp.float32)
    if offset is not None:
        sums = sums - wide(offset)
    if zero is not None:
        assert w.sums is not None
        sums = sums - zero * wide(w.sums)
    if w.zero is not None:
        sums = sums - wide(w.zero) * jnp.sum(x, axis=-1, dtype=jnp.int32, keepdims=True)
    return (sums.astype(jnp.float32) * (scale * wide(w.scale)).astype(jnp.float32)).astype(dtype or jnp.float32)
