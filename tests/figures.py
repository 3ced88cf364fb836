"""What recorded figures of other tools are about: seeded arrays, and masks as hexadecimal digits, a bit a weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = normal(8, 12)
TIES = np.round(W * 2) / 2


def digits(mask: Any) -> str:
    """The bits in C order, the last byte filled up with zeros."""
    return np.packbits(np.asarray(mask, bool)).tobytes().hex()


def masks(t: jc.Transform, params: dict, step: int | None = None, **stats: Any) -> dict[str, np.ndarray]:
    """The masks of ``init``, or of an update where a step or statistics are given, at full shape."""
    params = jax.tree.map(jnp.asarray, params)
    state = t.init(params)
    if step is not None or stats:
        state = t.update(state, params, step=jnp.int32(step or 0), **jax.tree.map(jnp.asarray, stats))
    seen = jax.tree.leaves(t.apply(state, params), is_leaf=is_compressed)
    return {k: np.broadcast_to(np.asarray(x.mask), x.shape) for k, x in zip(sorted(params), seen, strict=True)}


def mask(t: jc.Transform, w: np.ndarray, step: int | None = None, **stats: Any) -> np.ndarray:
    return masks(t, {"kernel": w}, step, **{name: {"kernel": x} for name, x in stats.items()})["kernel"]
