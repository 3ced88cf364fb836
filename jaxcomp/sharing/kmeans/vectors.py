"""k-means of vectors: distances by matrix products, in chunks. Arrays in, arrays out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxcomp.core.types import Key
from jaxcomp.sharing.kmeans.fit import code_dtype

_CHUNK = 1 << 12


def nearest_vectors(x: Float[Array, "n d"], table: Float[Array, "k d"]) -> Integer[Array, " n"]:
    """The index of the nearest entry, by ``|c|² - 2 x·c``; of equally near ones the first.

    >>> nearest_vectors(jnp.array([[1.0, 1.0], [4.0, 5.0]]), jnp.array([[0.0, 0.0], [5.0, 5.0]]))
    Array([0, 1], dtype=uint8)
    """
    square = jnp.sum(table * table, axis=1)

    def chunk(rows: jax.Array) -> jax.Array:
        product = jnp.matmul(rows, table.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(square[None] - 2.0 * product, axis=1).astype(code_dtype(table.shape[0]))

    if x.shape[0] <= _CHUNK:
        return chunk(x)
    rows = jnp.pad(x, ((0, -x.shape[0] % _CHUNK), (0, 0))).reshape(-1, _CHUNK, x.shape[1])
    return jax.lax.map(chunk, rows).reshape(-1)[: x.shape[0]]


@partial(jax.jit, static_argnames=("iterations",))
def refit_vectors(x: Float[Array, "n d"], table: Float[Array, "k d"], iterations: int) -> Float[Array, "k d"]:
    """Lloyd's iterations; an entry that no vector is nearest to stays."""

    def step(_: jax.Array, table: jax.Array) -> jax.Array:
        codes = nearest_vectors(x, table).astype(jnp.int32)
        count = jnp.zeros(table.shape[0], x.dtype).at[codes].add(1.0)[:, None]
        return jnp.where(count > 0, jnp.zeros_like(table).at[codes].add(x) / jnp.maximum(count, 1), table)

    return jax.lax.fori_loop(0, iterations, step, table)


@partial(jax.jit, static_argnames=("clusters", "iterations"))
def fit_vectors(x: Float[Array, "n d"], *, clusters: int, key: Key, iterations: int) -> Float[Array, "clusters d"]:
    """A table from k-means++ and Lloyd's iterations.

    Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """

    def draw(odds: jax.Array, key: jax.Array) -> jax.Array:
        ends = jnp.cumsum(odds)
        place = jnp.searchsorted(ends, jax.random.uniform(key, (), odds.dtype) * ends[-1], side="right")
        return x[jnp.minimum(place, x.shape[0] - 1)]

    def away(entry: jax.Array) -> jax.Array:
        return jnp.sum((x - entry[None]) ** 2, axis=1)

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, square = carry
        new = draw(square, jax.random.fold_in(key, i))
        return table.at[i].set(new), jnp.minimum(square, away(new))

    first = draw(jnp.ones(x.shape[0], x.dtype), jax.random.fold_in(key, 0))
    start = jnp.tile(first[None], (clusters, 1)), away(first)
    return refit_vectors(x, jax.lax.fori_loop(1, clusters, add, start)[0], iterations)
