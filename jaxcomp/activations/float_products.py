"""Products of codes in the fake mode: in a float type, scales outside, so that a backend may round what it multiplies.

A TPU rounds the operands of a float32 product to bfloat16, a GPU to the 10 bits of TF32. Codes less their zero point
are integers up to 255, which both leave as they are, and their sums are exact in float32 below 2^24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.codes import Value
from jaxcomp.activations.factors import EXACT, Factor
from jaxcomp.activations.reasons import ALONG_SUM, GROUPED_BATCH_VALUES, LONG_SUM, RAGGED_VALUES, Why
from jaxcomp.core.meshes import backward as under_its_axes
from jaxcomp.core.reductions import nan_in
from jaxcomp.core.roles import CONTRACTED, SPATIAL
from jaxcomp.core.types import DType
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import by_rows, product_of

Operands = tuple[Value, ...]
Pair = tuple[Factor, Factor]


def no_codes(op: Op, a: Factor, b: Factor) -> Why | None:
    """Why the fake mode multiplies values, not codes, in this product; None if it multiplies codes."""
    product = product_of(op.eqn)
    assert product is not None
    for factor, roles in zip((a, b), product.roles, strict=True):
        if any(role in (CONTRACTED, SPATIAL) and n > 1 for n, role in zip(factor.scale.shape, roles, strict=True)):
            return ALONG_SUM
    if op.name == "ragged_dot_general" and by_rows(op.eqn) is None:
        return RAGGED_VALUES
    return GROUPED_BATCH_VALUES if op.eqn.params.get("batch_group_count", 1) != 1 else None


def long_sum(op: Op, a: Factor, b: Factor) -> Why | None:
    """Whether the sums over codes may be rounded in float32; those of float8 numbers are anyhow."""
    product = product_of(op.eqn)
    assert product is not None
    summed = [n for n, role in zip(b.codes.shape, product.roles[1], strict=True) if role in (CONTRACTED, SPATIAL)]
    return LONG_SUM if math.prod(summed) * a.reach * b.reach > EXACT else None


class Form(NamedTuple):
    """How a product is run, and its gradient.

    Attributes:
      multiply: the result in the equation's own type, of two factors.
      single: which of the operands have one scale, that goes outside of the gradient's products.
    """

    multiply: Callable[[Op, Factor, Factor], jax.Array]
    single: tuple[bool, bool]


def float_product(op: Op, form: Form) -> Callable[[jax.Array, jax.Array, Pair, Operands], jax.Array]:
    """``product(x, y, factors, rest)``: of the factors, with the gradient of ``op`` in the values x and y.

    What waits for the backward pass are the codes of an operand with one scale, the values of any other.
    """

    @jax.custom_jvp
    def product(x: jax.Array, y: jax.Array, factors: Pair, rest: Operands) -> jax.Array:
        return form.multiply(op.given(*rest), *factors)

    def rule(tangents: tuple[Any, ...], primals: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        x, y, factors, rest = primals
        result = product(x, y, factors, rest)
        tangent = jnp.zeros_like(result)
        for index, moving in enumerate(tangents[:2]):
            if isinstance(moving, jax.custom_derivatives.SymbolicZero):
                continue
            still, scale = (y, x)[index], None
            if form.single[1 - index]:
                still, scale = apart(factors[1 - index], single=True, dtype=still.dtype)
            moving = times(moving, scale)
            tangent = tangent + op.given(*rest).bind(*((moving, still) if index == 0 else (still, moving)))[0]
        return result, tangent

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        return under_its_axes(rule)(tangents, primals)

    product.defjvp(jvp, symbolic_zeros=True)
    return product


def apart(factor: Factor, *, single: bool, dtype: DType) -> tuple[jax.Array, jax.Array | None]:
    """``value == array * scale`` for an operand with one scale, else the value alone; the array in its type."""
    if not single:
        return factor.value().astype(dtype), None
    numbers = factor.codes.astype(factor.scale.dtype)
    if factor.zero is not None:
        numbers = numbers - spread(factor.zero.astype(numbers.dtype), numbers.shape)
    scale = factor.scale.reshape(-1)[0]
    return numbers.astype(dtype), scale if factor.scale.size == 1 else scale + nan_in(factor.scale)


def times(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """``x`` times one number, computed in the wider of their types; None is 1."""
    return x if scale is None else (x.astype(scale.dtype) * scale).astype(x.dtype)


def value_product(op: Op, a: Factor, b: Factor) -> jax.Array:
    """The product of values at the highest precision, in the equation's own type."""
    x, y = a.value(), b.value()
    params: dict[str, Any] = {"precision": (lax.Precision.HIGHEST,) * 2, "preferred_element_type": x.dtype}
    return op.bind(x, y, **params)[0].astype(result_of(op).dtype)
