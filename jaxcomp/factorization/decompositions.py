"""Matrices and kernels of low rank: truncated SVD, Tucker-2, and the weighting of inputs. Arrays in, factors out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
DAMPING = 1e-3
"""What a moment's diagonal gets, as a part of its mean, so that inputs never seen keep a small weight."""


def matmul(a: Float[Array, "*b m k"], b: Float[Array, "*b k n"]) -> Float[Array, "*b m n"]:
    """``a @ b`` with all bits of float32, on accelerators too."""
    return jnp.matmul(a, b, precision=HIGHEST)


def normalized(w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``w`` over its largest magnitude, so that squares neither overflow nor vanish; zeros stay."""
    top = jnp.max(jnp.abs(w))
    fits = top > jnp.finfo(w.dtype).tiny
    return jnp.where(fits, w * (1.0 / jnp.where(fits, top, jnp.ones_like(top))), jnp.zeros_like(w))


def right_rows(m: Float[Array, "rows cols"], rank: int) -> Float[Array, "rank cols"]:
    """The first right singular vectors, as orthonormal rows ``v``: ``m @ v.T @ v`` is the truncated SVD.

    >>> right_rows(jnp.array([[3.0, 0.0], [0.0, 1.0]]), 1).shape
    (1, 2)
    """
    return jnp.linalg.svd(normalized(m), full_matrices=False)[2][:rank]


def energies(m: Float[Array, "rows cols"]) -> Float[Array, " k"]:
    """The squared singular values, as parts of their sum; zeros of a zero matrix."""
    squares = jnp.linalg.svd(normalized(m), full_matrices=False, compute_uv=False) ** 2
    total = jnp.sum(squares)
    return jnp.where(total > 0, squares / jnp.where(total > 0, total, jnp.ones_like(total)), jnp.zeros_like(squares))


def _leading(gram: Float[Array, "n n"], rank: int) -> Float[Array, "n rank"]:
    """Eigenvectors of the largest eigenvalues, the largest first."""
    return jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def feature_grams(t: Float[Array, "s i o"]) -> tuple[Float[Array, "i i"], Float[Array, "o o"]]:
    """The Gram matrices of both feature axes of a kernel."""
    return (
        jnp.einsum("sio,sjo->ij", t, t, precision=HIGHEST),
        jnp.einsum("sio,sip->op", t, t, precision=HIGHEST),
    )


def tucker2(
    t: Float[Array, "s i o"], ranks: tuple[int, int], sweeps: int
) -> tuple[Float[Array, "i a"], Float[Array, "b o"]]:
    """Orthonormal ``u`` and ``v`` for which ``u uᵀ t[s] vᵀ v`` is near ``t[s]``: HOSVD, then HOOI.

    The core that goes with them is ``core[s] = uᵀ t[s] vᵀ``.

    Args:
      t: the kernel, taps flattened.
      ranks: of the input and output features.
      sweeps: of orthogonal iteration.
    """
    t = normalized(t)
    start = tuple(_leading(gram, rank) for gram, rank in zip(feature_grams(t), ranks, strict=True))

    def sweep(_: object, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, out = factors
        inner = _leading(feature_grams(jnp.einsum("sio,ob->sib", t, out, precision=HIGHEST))[0], ranks[0])
        outer = _leading(feature_grams(jnp.einsum("sio,ia->sao", t, inner, precision=HIGHEST))[1], ranks[1])
        return inner, outer

    u, v = jax.lax.fori_loop(0, sweeps, sweep, start)
    return u, v.T


def moment_root(moment: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """The symmetric root ``s`` of a damped second moment of inputs, and its inverse.

    ``‖s (W - W')‖²`` is then the mean squared error of ``x @ W'`` over the inputs, up to a factor and the damping.

    Args:
      moment: ``Σ xᵀ x``.
    """
    size = moment.shape[0]
    mean = jnp.maximum(jnp.trace(moment) / size, jnp.finfo(moment.dtype).tiny)
    values, vectors = jnp.linalg.eigh(moment * (1.0 / mean))
    roots = jnp.sqrt(jnp.maximum(values, 0.0) + DAMPING)
    return matmul(vectors * roots[None], vectors.T), matmul(vectors * (1.0 / roots)[None], vectors.T)
