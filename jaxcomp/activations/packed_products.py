"""Products of activations in int8 and packed weights, as their bytes lie: no code is unpacked into memory.

Each group's sums of products of codes meet its scale. Where a backend has no form that sums integers, codes are
multiplied as floats: a group's sums are below 2^24, which float32 holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.factors import EXACT, Factor
from jaxcomp.activations.prepared import Carried, in_result, in_rows, product_of_rows, row_count
from jaxcomp.kernels.blocks import MANY, shape_class
from jaxcomp.kernels.forms import Weight, forms_of
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import dot_numbers


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero", "weight"], meta_fields=["reach"])
@dataclass(frozen=True, kw_only=True)
class LaidFactor(Factor):
    """A factor that is a prepared weight, too; its codes are made where they are read, as a gradient does."""

    weight: Weight


def laid_factor(f: Factor, w: Weight) -> LaidFactor:
    """The factor of a weight and that as it lies."""
    return LaidFactor(codes=f.codes, scale=f.scale, zero=f.zero, reach=f.reach, weight=w)


def packed_pair(op: Op, side: int, given: object, pair: tuple[Factor, Factor]) -> tuple[Factor, Factor] | None:
    """The factors of a dot with the weight on ``side`` as it lies, or None where the product of codes is the better."""
    w, x = given.weight if isinstance(given, Carried) else None, pair[1 - side]
    if not isinstance(w, PackedWeight) or not w.is_integer or x.codes.dtype != jnp.int8:
        return None
    contract, groups = dot_numbers(op.eqn)[0][1 - side], w.scale.shape[-1]
    if any(x.scale.shape[i] != 1 for i in contract):
        return None
    if w.bits == 8 and groups == 1:
        if shape_class(row_count(op, side, x.codes.shape)) == MANY:
            return None  # XLA's own product is as fast
    elif 2**w.bits * x.reach * (w.length if groups == 1 else w.group) >= EXACT:
        return None
    packed = laid_factor(pair[side], w)
    return (x, packed) if side == 1 else (packed, x)


def packed_forms(op: Op, a: Factor, b: Factor) -> str:
    """The forms of their product by backend, in words."""
    side, x, w = _parts(a, b)
    return forms_of(row_count(op, side, x.codes.shape), jnp.dtype(jnp.int8 if x.zero is None else jnp.int16), w)


def _parts(a: Factor, b: Factor) -> tuple[int, Factor, PackedWeight]:
    """The side of the packed factor, the other one, and the weight."""
    side, x, packed = (1, a, b) if isinstance(b, LaidFactor) else (0, b, a)
    assert isinstance(packed, LaidFactor)
    assert isinstance(packed.weight, PackedWeight)
    return side, x, packed.weight


def _numbers(x: Factor) -> jax.Array:
    """What the scales multiply: int8, or int16 where codes have a zero point."""
    if x.zero is None:
        return x.codes
    return x.codes.astype(jnp.int16) - jnp.broadcast_to(x.zero, x.scale.shape).astype(jnp.int16)


def packed_product(op: Op, a: Factor, b: Factor) -> jax.Array:
    """The result of a dot of two factors, one of them packed, in the equation's own type.

    A weight with one scale a feature gives the bits of the product of codes: sums meet both scales at once.
    """
    side, x, w = _parts(a, b)
    contract = dot_numbers(op.eqn)[0][1 - side]
    shape = tuple(1 if i in contract else n for i, n in enumerate(x.codes.shape))
    scale = in_rows(op, side, jnp.broadcast_to(x.scale, shape)).astype(w.scale.dtype)
    if w.scale.shape[-1] == 1:
        scale = scale * w.scale.reshape(-1, 1, w.shape[-2])
        w = replace(w, scale=jnp.ones_like(w.scale))
    y = product_of_rows(in_rows(op, side, _numbers(x)), w, w.scale.dtype) * scale
    return in_result(op, side, y).astype(result_of(op).dtype)
