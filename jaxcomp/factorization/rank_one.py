"""Iterative rank-one decomposition: the residual's dominant term, then a refit of all terms. Arrays in, factors out.

A tensor of N axes is a sum of ``R`` outer products of N vectors; factor k holds those of axis k as its columns.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.factorization.decompositions import HIGHEST, matmul, normalized

RIDGE = 1e-6
"""Added to the unit diagonal of the normal equations; terms that nearly coincide stay bounded."""

Factors = tuple[Float[Array, "_ r"], ...]


def joined(factors: Factors) -> Float[Array, ...]:
    """The tensor that is the sum of the outer products.

    >>> joined((jnp.ones((2, 1)), 3 * jnp.ones((4, 1)))).shape
    (2, 4)
    """
    shape = tuple(f.shape[0] for f in factors)
    return matmul(khatri_rao(factors[:-1]), factors[-1].T).reshape(shape)


def khatri_rao(factors: Factors) -> Float[Array, "n r"]:
    """The columnwise Kronecker product: column r is the flattened outer product of the factors' columns r."""
    out = factors[0]
    for f in factors[1:]:
        out = (out[:, None, :] * f[None, :, :]).reshape(-1, f.shape[1])
    return out


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The vector over its length; zeros stay."""
    length = jnp.sqrt(jnp.sum(x * x))
    return x * jnp.where(length > 0, 1.0 / jnp.where(length > 0, length, 1.0), 0.0)


def _start(n: int, dtype: jnp.dtype) -> jax.Array:
    """A fixed vector without a pattern: only a residual made for it is orthogonal to it."""
    return jnp.asarray(np.cos(np.arange(1, n + 1, dtype=np.float64) ** 2), dtype)


def power_iteration(m: Float[Array, "rows cols"], steps: int) -> tuple[Float[Array, " rows"], Float[Array, " cols"]]:
    """The dominant term ``x yᵀ`` of a matrix, ``x`` of unit length; it stops early where nothing moves any more."""
    still = float(jnp.finfo(m.dtype).eps) ** 2

    def moves(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, change = carry
        return (count < steps) & (change > still)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, y, _ = carry
        new = _unit(jnp.dot(_unit(jnp.dot(m, y, precision=HIGHEST)), m, precision=HIGHEST))
        return count + 1, new, jnp.sum((new - y) ** 2)

    first = _unit(jnp.dot(_start(m.shape[0], m.dtype), m, precision=HIGHEST))
    _, y, _ = jax.lax.while_loop(moves, step, (jnp.int32(0), first, jnp.ones((), m.dtype)))
    x = _unit(jnp.dot(m, y, precision=HIGHEST))
    return x, jnp.dot(x, m, precision=HIGHEST)


def dominant(t: Float[Array, ...], steps: int) -> tuple[Float[Array, " _"], ...]:
    """The dominant rank-one term of a tensor: a vector for each axis, all but the last of unit length.

    One axis after another by power iteration on what the axes before it leave, then ``steps`` rounds of the
    higher-order power method where there are more than two axes.

    Source: De Lathauwer et al. 2000, doi:10.1137/S0895479898346995 (the higher-order power method).
    """
    vectors: list[jax.Array] = []
    rest = t
    while rest.ndim > 1:
        x, y = power_iteration(rest.reshape(rest.shape[0], -1), steps)
        vectors.append(x)
        rest = y.reshape(rest.shape[1:])
    vectors.append(rest)
    if t.ndim == 2:
        return tuple(vectors)

    def step(_: object, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        now = list(found)
        for axis in range(t.ndim):
            x = _along(t, now, axis)
            now[axis] = x if axis == t.ndim - 1 else _unit(x)
        return tuple(now)

    units = (*vectors[:-1], vectors[-1])
    return jax.lax.fori_loop(0, steps, step, units)


def _along(t: jax.Array, vectors: list[jax.Array], axis: int) -> jax.Array:
    """The tensor contracted with unit vectors along every axis but one."""
    for other in range(t.ndim - 1, -1, -1):
        if other != axis:
            x = vectors[other]
            t = jnp.tensordot(t, _unit(x), ((other,), (0,)), precision=HIGHEST)
    return t


def least_squares_sweep(t: Float[Array, ...], factors: Factors, active: Float[Array, " r"]) -> Factors:
    """Fits each factor in turn to the tensor, the others fixed; columns that are not active stay zero."""
    now = list(factors)
    for axis in range(t.ndim):
        others = [f for k, f in enumerate(now) if k != axis]
        gram = jnp.diag(1 - active + RIDGE)
        gram = gram + _product([matmul(f.T, f) for f in others])
        wide = jnp.moveaxis(t, axis, 0).reshape(t.shape[axis], -1)
        right = matmul(khatri_rao(tuple(others)).T, wide.T)
        found = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), right).T * active[None]
        now[axis] = found if axis == t.ndim - 1 else jax.vmap(_unit, 1, 1)(found)
    return tuple(now)


def _product(grams: list[jax.Array]) -> jax.Array:
    out = grams[0]
    for g in grams[1:]:
        out = out * g
    return out


@partial(jax.jit, static_argnames=("rank", "steps", "refits", "sweeps"))
def deflate(
    t: Float[Array, ...], *, rank: int, steps: int, refits: int, sweeps: int = 0
) -> tuple[Factors, Float[Array, " rank"]]:
    """``rank`` terms found one by one, and what part of the squared norm is lost after each.

    After each term, ``refits`` sweeps adjust all terms so far; at the end ``sweeps`` more. A term or a sweep that does
    not lower the error (all is found up to rounding) is not taken, so the error never rises.

    Args:
      t: a tensor of two or more axes.
      rank: how many terms.
      steps: power iterations for each.
      refits: sweeps of alternating least squares after each.
      sweeps: of alternating least squares at the end.

    Returns:
      Factors, all but the last of unit columns, of ``t`` over its largest magnitude; and the errors.
    """
    t = normalized(t)
    total = jnp.sum(t * t)
    scale = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)

    def lost(factors: Factors) -> jax.Array:
        return jnp.sum((t - joined(factors)) ** 2) * scale

    def better(new: Factors, old: Factors, error: jax.Array) -> tuple[Factors, jax.Array]:
        now = lost(new)
        taken = now < error
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old), jnp.where(taken, now, error)

    def refit(factors: Factors, error: jax.Array, active: jax.Array, times: int) -> tuple[Factors, jax.Array]:
        def body(_: object, carry: tuple[Factors, jax.Array]) -> tuple[Factors, jax.Array]:
            return better(least_squares_sweep(t, carry[0], active), *carry)

        return jax.lax.fori_loop(0, times, body, (factors, error))

    def term(k: jax.Array, carry: tuple[Factors, jax.Array, jax.Array]) -> tuple[Factors, jax.Array, jax.Array]:
        factors, error, errors = carry
        found = dominant(t - joined(factors), steps)
        new = tuple(f.at[:, k].set(x) for f, x in zip(factors, found, strict=True))
        factors, error = better(new, factors, error)
        active = (jnp.arange(rank) <= k) & (jnp.sum(factors[-1] ** 2, 0) > 0)
        factors, error = refit(factors, error, active.astype(t.dtype), refits)
        return factors, error, errors.at[k].set(error)

    empty = tuple(jnp.zeros((n, rank), t.dtype) for n in t.shape)
    one = (total * scale).astype(t.dtype)
    factors, error, errors = jax.lax.fori_loop(0, rank, term, (empty, one, jnp.zeros(rank, t.dtype)))
    active = (jnp.sum(factors[-1] ** 2, 0) > 0).astype(t.dtype)
    return refit(factors, error, active, sweeps)[0], errors
