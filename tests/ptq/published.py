"""GPTQ and SparseGPT as published, in float64 numpy: the inverse of the moments, a row after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def int_codes(steps: Array, low: int, high: int) -> Array:
    """To nearest, halves towards zero."""
    return np.clip(np.sign(steps) * np.ceil(np.abs(steps) - 0.5), low, high)


def factor_of_inverse(h: Array, damping: float) -> Array:
    """The upper ``u`` with ``uᵀ u`` the inverse of the damped moments."""
    h = np.asarray(h, np.float64)
    damped = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(w: Array, h: Array, scale: Array, *, ends: tuple[int, int], damping: float = 0.01) -> Array:
    """Codes; rows of ``w`` are inputs, ``scale`` has a number a weight."""
    w, u = np.array(w, np.float64), factor_of_inverse(h, damping)
    codes = np.zeros_like(w)
    for i in range(len(w)):
        codes[i] = int_codes(w[i] / scale[i], *ends)
        w[i:] -= u[i, i:, None] * (w[i] - codes[i] * scale[i]) / u[i, i]
    return codes


def gptq_of_groups(w: Array, h: Array, group: int, *, ends: tuple[int, int]) -> tuple[Array, Array]:
    """Codes, and scales found in the weights as they are when their group is reached."""
    w, u = np.array(w, np.float64), factor_of_inverse(h, 0.01)
    codes, scales = np.zeros_like(w), []
    for i in range(len(w)):
        if i % group == 0:
            scales.append(np.abs(w[i : i + group]).max(0) / (ends[1] + 0.5))
        codes[i] = int_codes(w[i] / scales[-1], *ends)
        w[i:] -= u[i, i:, None] * (w[i] - codes[i] * scales[-1]) / u[i, i]
    return codes, np.stack(scales)


def sparsegpt(w: Array, h: Array, *, block: int, fraction: float = 0.0, n_m: tuple[int, int] = (0, 0)) -> Array:
    """The weights that are left, without a grid."""
    w, u = np.array(w, np.float64), factor_of_inverse(h, 0.01)
    pivots, (n, m) = np.diag(u)[:, None], n_m
    kept = np.ones(w.shape, bool)
    for i in range(len(w)):
        if m and i % m == 0:
            scores = (w[i : i + m] / pivots[i : i + m]) ** 2
            kept[i : i + m] = np.argsort(np.argsort(scores, axis=0, kind="stable"), axis=0) >= m - n
        if not m and i % block == 0:
            scores = (w[i : i + block] / pivots[i : i + block]) ** 2
            gone = np.argsort(scores, axis=None, kind="stable")[: round(scores.size * fraction)]
            kept[i : i + block].reshape(-1)[gone] = False
        value = np.where(kept[i], w[i], 0)
        error = (w[i] - value) / u[i, i]
        w[i] = value
        w[i + 1 :] -= u[i, i + 1 :, None] * error
    return w
