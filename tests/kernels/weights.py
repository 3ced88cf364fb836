"""Packed weights of random codes beside the matrix that they stand for, made by numpy alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.kernels.packing import FIELDS, PackedWeight
from jaxcomp.quantization.grids import Int


class Case(NamedTuple):
    """A weight ``(features, length)`` and so many rows of activations."""

    rows: int
    features: int
    length: int
    bits: int
    group: int | None = None
    block: int = 128
    zero: bool = False


def packed(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Codes ``(features, length)`` from 0 on as bytes, code by code, as ``PackedWeight`` says."""
    features, length = codes.shape
    count = -(-length // block)
    out = np.zeros((features, count, block * bits // 8), np.uint8)
    for k in range(length):
        at, j = divmod(k, block)
        first = place = 0
        for width in FIELDS[bits]:
            size = block * width // 8
            field = (codes[:, k] >> place) & (2**width - 1)
            out[:, at, first + j % size] |= (field << (width * (j // size))).astype(np.uint8)
            first, place = first + size, place + width
    return out.reshape(features, -1)


def weight_of(case: Case, seed: int = 0) -> tuple[PackedWeight, np.ndarray]:
    """A weight, and its dense matrix in float64. Scales are powers of two, so that what is exact stays exact."""
    rng = np.random.default_rng(seed)
    half, group = 2 ** (case.bits - 1), case.group or case.length
    numbers = rng.integers(-half, half, (case.features, case.length))
    groups = -(-case.length // group)
    scale = 2.0 ** rng.integers(-3, 3, (case.features, groups))
    zero = rng.integers(-half, half, (case.features, groups)) if case.zero else np.zeros((case.features, groups), int)
    full = [np.repeat(v, group, 1)[:, : case.length] for v in (scale, zero)]
    codes = packed(numbers + half, case.bits, case.block)
    if case.bits == 8:
        codes = (codes ^ 128).view(np.int8)  # padded with -128, which no product may see
    w = PackedWeight(
        codes=jnp.asarray(codes),
        scale=jnp.asarray(scale, jnp.float32),
        zero=jnp.asarray(zero, jnp.float32) if case.zero else None,
        grid=Int(case.bits, symmetric=not case.zero),
        length=case.length,
        group=group,
        block=case.block,
        dtype=jnp.dtype(jnp.float32),
    )
    return w, (numbers - full[1]) * full[0]


def activations(case: Case, dtype: type, *, whole: bool = False, seed: int = 1) -> jnp.ndarray:
    """``(rows, length)``; small integers where sums are to be exact."""
    rng = np.random.default_rng(seed)
    shape = (case.rows, case.length)
    return jnp.asarray(rng.integers(-3, 4, shape) if whole else rng.normal(size=shape), dtype)


def square(bits: int, side: int) -> PackedWeight:
    """A random weight as ``prepare`` lays it out: 4 bits in groups of 128, 8 with a scale a feature."""
    key = jax.random.key(bits)
    codes = jax.random.bits(key, (side, side * bits // 8), jnp.uint8)
    groups = side // 128 if bits < 8 else 1
    return PackedWeight(
        codes=codes if bits < 8 else codes.view(jnp.int8),
        scale=jnp.full((side, groups), 1e-3),
        zero=None,
        grid=Int(bits),
        length=side,
        group=side // groups,
        block=128,
        dtype=jnp.dtype(jnp.bfloat16),
    )
