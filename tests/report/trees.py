"""Small trees for the tests of this room, made without compiling anything: their leaves are built by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.types import Params
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization import Int, Quantized
from jaxcomp.sharing.leaves import Codebook


def before() -> Params:
    """Arrays of numpy."""
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
        "dense": {"kernel": rng.normal(size=(64, 16)).astype(np.float32)},
        "head": {"kernel": rng.laplace(size=(16, 10)).astype(np.float32)},
    }


def quantized(w: np.ndarray, bits: int) -> Quantized:
    """On a symmetric integer grid, one scale a column."""
    scale = np.abs(w).max(tuple(range(w.ndim - 1)), keepdims=True) / (2 ** (bits - 1) - 0.5)
    codes = np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.float32) + 0  # no -0
    return Quantized(jnp.asarray(codes), jnp.asarray(scale.astype(np.float32)), None, Int(bits), jnp.dtype("float32"))


def after() -> Params:
    """A kernel on a grid, one masked and on a grid, one of shared weights; the bias is left."""
    w = before()
    dense = w["dense"]["kernel"]
    mask = np.abs(dense) >= np.median(np.abs(dense))
    head = w["head"]["kernel"]
    table = np.quantile(head, np.linspace(0.05, 0.95, 6)).astype(np.float32)
    codes = np.abs(head[..., None] - table).argmin(-1).astype(np.uint8)
    return {
        "conv": {"kernel": quantized(w["conv"]["kernel"], 8), "bias": w["conv"]["bias"]},
        "dense": {"kernel": Masked(quantized(np.where(mask, dense, 0), 4), jnp.asarray(mask))},
        "head": {"kernel": Codebook(jnp.asarray(table[:, None]), jnp.asarray(codes), None, (1, 1))},
    }


def host(tree: Params) -> Params:
    """The arrays that a tree stands for, by an independent reading of its leaves."""

    def of(x: object) -> np.ndarray:
        if isinstance(x, Masked):
            return np.where(np.asarray(x.mask), of(x.values), np.float32(0))
        if isinstance(x, Quantized):
            return np.asarray(x.codes) * np.asarray(x.scale)
        if isinstance(x, Codebook):
            return np.asarray(x.table)[np.asarray(x.codes), 0]
        return np.asarray(x)

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Masked | Quantized | Codebook))
