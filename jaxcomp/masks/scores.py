"""Scores: how much an element matters. The lowest are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Score:
    """An elementwise score and the statistics it needs.

    Args:
      name: for messages.
      fn: ``fn(w, **{name: statistic of w's shape})`` to scores of w's shape; a larger one is kept longer.
      needs: names of the statistics, which are passed to ``update`` as trees like the parameters.
    """

    name: str
    fn: Callable[..., jax.Array]
    needs: tuple[str, ...] = ()


def _magnitude(w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.abs(w)


def _sensitivity(w: Float[Array, "*shape"], grads: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.abs(grads)


def _taylor(w: Float[Array, "*shape"], grads: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.abs(grads * w)


magnitude = Score("magnitude", _magnitude)
"""``|w|``: l1 pruning. Source: Han et al. 2015, arXiv:1506.02626."""

sensitivity = Score("sensitivity", _sensitivity, ("grads",))
"""``|∂L/∂w|``: what moves the loss least goes first. Source: Mozer and Smolensky 1988 (skeletonization)."""

taylor = Score("taylor", _taylor, ("grads",))
"""``|w · ∂L/∂w|``: first-order change of the loss when w goes. Source: Molchanov et al. 2016, arXiv:1611.06440."""
