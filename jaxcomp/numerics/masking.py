"""Masking of arrays, with and without a gradient to what is masked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked(x: Float[Array, "*shape"], mask: Bool[Array, "*broadcast"]) -> Float[Array, "*shape"]:
    """``x`` where the mask is True, else 0; no gradient reaches what is masked."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


@jax.custom_jvp
def masked_through(x: Float[Array, "*shape"], mask: Bool[Array, "*broadcast"]) -> Float[Array, "*shape"]:
    """As :func:`masked`, the same bits; but the gradient passes as if nothing were masked.

    >>> jax.grad(lambda x: masked_through(x, jnp.array([True, False])) @ jnp.array([2.0, 3.0]))(jnp.ones(2)).tolist()
    [2.0, 3.0]

    Source: the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.
    """
    return masked(x, mask)


@masked_through.defjvp
def _pass(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
    return masked(*primals), tangents[0]
