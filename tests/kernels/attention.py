"""Attention to a cache by numpy, query by query."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.kernels import KVCache

DENSE = jax.jit(lambda rows: rows.materialize())


class Seen(NamedTuple):
    """What the oracle is told of the queries."""

    start: Any
    causal: bool = True
    window: int | None = None
    mask: Any = None


def oracle(cache: KVCache, q: jax.Array, seen: Seen) -> np.ndarray:
    """Softmax attention in long double on what the cache stands for, query by query."""
    keys, values = (np.asarray(DENSE(x), np.longdouble) for x in (cache.keys, cache.values))
    batch, count, heads, width = q.shape
    start = np.broadcast_to(np.asarray(seen.start), (batch,))
    out = np.zeros((batch, count, heads, values.shape[-1]), np.longdouble)
    for b, i, h in np.ndindex(batch, count, heads):
        last = int(start[b]) + i if seen.causal else int(start[b]) - 1
        at = [t for t in range(last + 1) if seen.window is None or t > last - seen.window]
        at = [t for t in at if seen.mask is None or np.broadcast_to(seen.mask, (batch, count, keys.shape[2]))[b, i, t]]
        if at:
            shared = h // (heads // keys.shape[1])
            scores = keys[b, shared, at] @ np.asarray(q[b, i, h], np.longdouble) / np.sqrt(np.longdouble(width))
            p = np.exp(scores - scores.max())
            out[b, i, h] = p / p.sum() @ values[b, shared, at]
    return out
