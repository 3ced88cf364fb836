"""How a scope spreads one sparsity over leaves of different sizes. Shapes in, fractions out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.specs import written
from jaxcomp.pruning.specs import ERK, Heuristic

Shapes = Mapping[str, tuple[int, ...]]
Values = np.ndarray | jax.Array
Fraction = float | jax.Array


def erk(shapes: Shapes, sparsity: Fraction, spec: ERK = ERK()) -> dict[str, Fraction]:  # noqa: B008 - frozen
    """The Erdős–Rényi-Kernel sparsities, see :class:`~jaxcomp.pruning.specs.ERK`.

    Args:
      shapes: of the leaves, by name.
      sparsity: of all together; a float, or a traced scalar.
      spec: the power.

    >>> {k: round(v, 4) for k, v in erk({"small": (4, 4), "large": (100, 100)}, 0.9).items()}
    {'small': 0.0, 'large': 0.9014}
    """
    sizes = np.array([np.prod(s, dtype=np.float64) for s in shapes.values()])
    raw = np.array([sum(s) for s in shapes.values()]) / sizes
    xp = _numpy_for(sparsity)
    ones = sizes.sum() - _whole_zeros(sizes, sparsity)
    densities = _filled(raw**spec.power, sizes, total=ones, most=1.0, xp=xp)
    return _named(shapes, 1 - densities)


def heuristic(shapes: Shapes, sparsity: Fraction, spec: Heuristic = Heuristic()) -> dict[str, Fraction]:  # noqa: B008
    """The sparsities that grow with the leaf's logarithm, see :class:`~jaxcomp.pruning.specs.Heuristic`.

    >>> {k: round(v, 3) for k, v in heuristic({"small": (10, 10), "large": (100, 100)}, 0.5).items()}
    {'small': 0.251, 'large': 0.502}

    Raises:
      ValueError: a sparsity above the limit.
    """
    sizes = np.array([np.prod(s, dtype=np.float64) for s in shapes.values()])
    xp = _numpy_for(sparsity)
    if xp is np and sparsity > spec.most:
        raise ValueError(f"Heuristic: no leaf may be sparser than most={spec.most}, got sparsity {sparsity}.")
    raw = np.log(np.maximum(sizes, 2))  # one element has no logarithm to be sparse by
    wanted = xp.minimum(sparsity, spec.most) * sizes.sum()
    return _named(shapes, _filled(raw, sizes, total=wanted, most=spec.most, xp=xp))


def _whole_zeros(sizes: np.ndarray, sparsity: Fraction) -> Fraction:
    """How many whole zeros all leaves have; of a number exactly, since 0.29 * 100 in floats is below 29."""
    if isinstance(sparsity, jax.Array):
        return jnp.floor(sparsity * jnp.asarray(sizes, jnp.float32)).sum()
    return float(sum(math.floor(written(sparsity) * int(size)) for size in sizes))


def _filled(raw: np.ndarray, sizes: np.ndarray, *, total: Fraction, most: float, xp: ModuleType) -> Values:
    """``min(most, scale * raw)`` with the scale at which ``sum(sizes * that) == total``.

    The k entries of the largest raw values are at the limit; k is the smallest for which all others stay below it.
    One entry more at the limit only raises the scale, so one pass over k finds what capping round by round would.
    """
    order = np.argsort(-raw, kind="stable")
    raw_sum = (raw * sizes)[order][::-1].cumsum()[::-1]
    capped = np.concatenate([[0.0], (most * sizes)[order].cumsum()[:-1]])
    scale = (total - _as(xp, capped)) / _as(xp, raw_sum)
    fits = scale * _as(xp, raw[order]) <= most
    k = xp.argmax(fits)
    chosen = xp.where(xp.any(fits), scale[k], xp.inf)
    return xp.clip(chosen * _as(xp, raw), 0.0, most)


def _numpy_for(sparsity: Fraction) -> ModuleType:
    """NumPy, and so float64, for a number; jax.numpy for an array of jax's."""
    return jnp if isinstance(sparsity, jax.Array) else np


def _as(xp: ModuleType, x: np.ndarray) -> Values:
    return x if xp is np else jnp.asarray(x, jnp.float32)


def _named(shapes: Shapes, values: Values) -> dict[str, Fraction]:
    """Python's floats where the values are NumPy's."""
    return dict(zip(shapes, values.tolist() if isinstance(values, np.ndarray) else list(values), strict=True))
