"""Where k-means starts: rules that give an ascending table from sorted points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxcomp.core.records import named
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import DType, Key
from jaxcomp.sharing.kmeans.lloyd import respaced
from jaxcomp.sharing.kmeans.optimal import optimal_table
from jaxcomp.sharing.kmeans.points import Points, at_rank
from jaxcomp.sharing.kmeans.windows import windowed

_PIECES = 1 << 13  # of equal numbers of weights, over which a density is estimated
_OPTIMAL_CELLS = 1 << 13


@dataclass(frozen=True)
class Init(Spec):
    """A rule for the table that Lloyd's iterations start from.

    Args:
      name: for messages.
      fn: ``fn(points, clusters, key)`` to an ascending table; inside jit.
      random: whether it draws, and so needs a key.
    """

    name: str
    fn: Callable[[Points, int, Key | None], jax.Array]
    random: bool = False


def _linear(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    low, high = points.values[0], points.values[-1]
    return low + (high - low) * _steps(jnp.arange(clusters), max(clusters - 1, 1), low.dtype)


def _quantile(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    fraction = _steps(jnp.arange(1, clusters + 1), clusters + 1, points.values.dtype)
    last = jnp.maximum(points.total, 1) - 1
    return at_rank(points, jnp.round(fraction * last.astype(fraction.dtype)).astype(jnp.uint32))


def _density(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    fraction = 0.01 + 0.99 * _steps(jnp.arange(clusters), max(clusters - 1, 1), points.values.dtype)
    return _at_fraction(points, fraction)


def _random(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    assert key is not None  # a rule that draws is given one
    drawn = jnp.sort(jax.random.uniform(key, (clusters,), points.values.dtype))
    return points.values[0] + (points.values[-1] - points.values[0]) * drawn


def _plus_plus(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    assert key is not None
    weight = points.counts.astype(points.values.dtype)

    def draw(odds: jax.Array, key: jax.Array) -> jax.Array:
        ends = jnp.cumsum(odds)
        at = jax.random.uniform(key, (), odds.dtype) * ends[-1]
        place = jnp.searchsorted(ends, at, side="right")
        return points.values[jnp.minimum(place, ends.size - 1)]

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, square = carry
        new = draw(weight * square, jax.random.fold_in(key, i))
        return table.at[i].set(new), jnp.minimum(square, (points.values - new) ** 2)

    first = draw(weight, jax.random.fold_in(key, 0))
    start = jnp.full((clusters,), first), (points.values - first) ** 2
    return jnp.sort(jax.lax.fori_loop(1, clusters, add, start)[0])


def _near_optimal(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    return windowed(points, respaced(points, spaced(points, clusters)))


def spaced(points: Points, clusters: int) -> Float[Array, " clusters"]:
    """Entries spaced evenly in the integral of the cube root of the density."""
    ends, grown = _cube_root_mass(points)
    wanted = _steps(2 * jnp.arange(clusters) + 1, 2 * clusters, ends.dtype) * grown[-1]
    return jnp.interp(wanted, grown, ends)


def _optimal(points: Points, clusters: int, key: Key | None) -> Float[Array, " clusters"]:
    ends, grown = _cube_root_mass(points)
    cuts = jnp.interp(
        jnp.arange(1, _OPTIMAL_CELLS).astype(ends.dtype) * (1.0 / _OPTIMAL_CELLS) * grown[-1], grown, ends
    )
    shape = jax.ShapeDtypeStruct((clusters,), points.values.dtype)
    solve = partial(_solve, clusters=clusters)
    return jax.pure_callback(solve, shape, points.values, points.counts, cuts, vmap_method="sequential")


def _solve(values: ArrayLike, counts: ArrayLike, cuts: ArrayLike, *, clusters: int) -> np.ndarray:
    v, n = np.asarray(values, np.float64), np.asarray(counts, np.float64)
    v, n = v[n > 0], n[n > 0]
    if v.size == 0:
        return np.zeros(clusters, np.asarray(values).dtype)
    if v.size > _OPTIMAL_CELLS:
        cell = np.searchsorted(np.asarray(cuts, np.float64), v)
        mass, total = np.bincount(cell, n), np.bincount(cell, n * v)
        v, n = np.asarray(total[mass > 0] / mass[mass > 0], np.float64), np.asarray(mass[mass > 0], np.float64)
    return optimal_table(v, n, clusters).astype(np.asarray(values).dtype)


def _steps(index: jax.Array, parts: int, dtype: DType) -> jax.Array:
    return index.astype(dtype) * (1.0 / parts)


def _at_fraction(points: Points, fraction: jax.Array) -> jax.Array:
    """The values below which these fractions of the weights lie."""
    rank = (fraction * points.total.astype(fraction.dtype)).astype(jnp.uint32)
    return at_rank(points, jnp.minimum(rank, jnp.maximum(points.total, 1) - 1))


def _cube_root_mass(points: Points) -> tuple[jax.Array, jax.Array]:
    """Ends of pieces of equal numbers of weights, and the integral of the cube root of the density up to each.

    A piece of width d and mass m has ``(m / d)**(1/3) d``; m is the same for all.
    """
    size = points.values.size
    pieces = max(min(size, 64), min(size // 4, _PIECES))
    fraction = _steps(jnp.arange(pieces + 1), pieces, points.values.dtype)
    ends = _at_fraction(points, fraction)
    grown = jnp.cumsum(jnp.cbrt(jnp.diff(ends)) ** 2)
    return ends, jnp.concatenate([jnp.zeros(1, grown.dtype), grown])


linear = named("inits.linear", Init("linear", _linear))
"""Evenly spaced from the least to the greatest weight. Source: Han et al. 2015, arXiv:1510.00149, section 3.2."""

density = named("inits.density", Init("density", _density))
"""Where the distribution function reaches evenly spaced levels from 0.01 to 1: most entries where most weights are.

Source: Han et al. 2015, arXiv:1510.00149, section 3.2; the levels are those of the TensorFlow Model Optimization
Toolkit's DENSITY_BASED, which takes the next of 30 even values where this takes the weight itself.
"""

quantile = named("inits.quantile", Init("quantile", _quantile))
"""The quantiles ``i / (clusters + 1)``, i = 1..clusters, each the weight nearest to it in rank.

Source: Wu et al. 2018, PocketFlow, non-uniform quantization, initialization "quantile".
"""

random = named("inits.random", Init("random", _random, random=True))
"""Uniformly drawn between the least and the greatest weight."""

plus_plus = named("inits.plus_plus", Init("plus_plus", _plus_plus, random=True))
"""Weights drawn in proportion to their squared distance from those drawn so far.

Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
"""

near_optimal = named("inits.near_optimal", Init("near_optimal", _near_optimal))
"""Spaced by the cube root of the density, as the best table is when it is large: first of the density that counts show,
then of that which the table's own runs do. Then a dynamic program moves all borders at once, as long as that pays.

Source: Panter and Dite 1951, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels".
"""

optimal = named("inits.optimal", Init("optimal", _optimal))
"""The best table by dynamic programming, on the host (a callback inside jit).

Exact up to 8,192 distinct values. Above, for as many cells, spaced by the cube root of the density.
"""
