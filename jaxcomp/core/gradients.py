"""Masking of arrays, with and without a gradient to what is masked."""

from __future__ import annotations

from functools import partial
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


@jax.custom_jvp
def straight_through(
    x: Float[Array, "*shape"], value: Float[Array, "*shape"], inside: Bool[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    """``value``, whose gradient is that of ``x`` where ``inside`` (None is everywhere), else 0.

    >>> jax.grad(lambda x: straight_through(x, jnp.round(x), x < 2).sum())(jnp.array([0.4, 2.5]))
    Array([1., 0.], dtype=float32)
    """
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (_, value, inside), (t, _, _) = primals, tangents
    return value, t if inside is None else jnp.where(inside, t, jnp.zeros_like(t))


@jax.custom_jvp
def clip_through(x: Float[Array, "*shape"], end: Float[Array, "*broadcast"]) -> Float[Array, "*shape"]:
    """``clip(x, -end, end)``, whose gradient is that of ``x`` everywhere.

    >>> jax.grad(lambda x: clip_through(x, jnp.ones(1)).sum())(jnp.array([0.4, 2.5])).tolist()
    [1.0, 1.0]
    """
    return jnp.clip(x, -end, end)


@clip_through.defjvp
def _clip_through_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple:
    return clip_through(*primals), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """``x``, whose gradient is ``factor`` times what comes.

    >>> jax.grad(lambda x: 3 * scale_gradient(x, 0.5))(jnp.float32(1))
    Array(1.5, dtype=float32)

    Source: Esser et al. 2020, arXiv:1902.08153, appendix A.
    """
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(factor: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[0] * factor
