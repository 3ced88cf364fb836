"""Gradients of products on codes, and gradients that are themselves products on rounded codes.

The two products of a gradient are found by transposing the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.fake import scale_blocks
from jaxcomp.activations.integer_products import Factor, integer_product, refusal
from jaxcomp.activations.specs import Act, Backward, Dynamic, PerToken
from jaxcomp.core.bits import compute_dtype
from jaxcomp.quantization.numerics.affine import block_absmax, dequantize, spread
from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.products import product_of

_PER_INDEX = Act(range=Dynamic(), per=PerToken())
_NOISE_BITS = 16


class Gradients(NamedTuple):
    """How gradients are rounded in one call: the spec, if they are, and the key where it is stochastic."""

    spec: Backward | None = None
    key: jax.Array | None = None

    def key_of(self, index: int, op: Op) -> jax.Array | None:
        """The key of the site with this index; one for each step of the layer scans around it."""
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, index)
        return jax.random.split(key, op.layer_steps) if op.layer_steps else key


def checked_key(owner: str, spec: Backward, args: tuple[Any, ...]) -> jax.Array | None:
    """The key at the head of the arguments.

    Raises:
      TypeError: something else stands there.
    """
    key: Any = args[0] if args else "nothing"
    if key is None and not spec.stochastic:
        return None
    if not spec.stochastic or not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        wanted = "jax.random.key(...)" if spec.stochastic else "None, for nothing is stochastic"
        found = key if isinstance(key, str) else type(key).__name__
        raise TypeError(
            f"{owner}: with backward={spec!r} call q(params, ranges, key, *args); the key must be {wanted}, got "
            f"{found}."
        )
    return key


def integer_product_with_gradient(
    op: Op, spec: Backward | None, rounded: Callable[..., tuple[jax.Array, jax.Array]]
) -> Callable[..., jax.Array]:
    """``product(operands, ranges, key, factors)``: on codes, with the gradient of ``op`` on the values they stand for.

    Only reverse-mode differentiation goes through it. What waits for the backward pass are the codes, a byte each.

    Args:
      op: the equation.
      spec: how the gradient is rounded, if at all.
      rounded: gives the two values from ``(operands, ranges)``, and with them the gradient in both.
    """
    avals: list[Any] = [var.aval for var in op.eqn.invars]
    dtypes = [aval.dtype for aval in avals]

    @jax.custom_vjp
    def product(operands: Any, ranges: Any, key: Any, factors: tuple[Factor, Factor]) -> jax.Array:
        return integer_product(op, *factors)

    def forward(operands: Any, ranges: Any, key: Any, factors: tuple[Factor, Factor]) -> tuple[jax.Array, Any]:
        _, pull = jax.vjp(rounded, operands, ranges)
        return integer_product(op, *factors), (pull, key, factors)

    def backward(kept: Any, g: jax.Array) -> tuple[Any, Any, None, None]:
        pull, key, factors = kept
        # Or XLA makes the values while it goes forward, and all of them wait.
        factors, g = jax.lax.optimization_barrier((factors, g))
        a, b = (f.value().astype(dtype) for f, dtype in zip(factors, dtypes, strict=True))
        return *pull(_both(op, spec, key, a, b, g)), None, None

    product.defvjp(forward, backward)
    return product


def with_rounded_gradient(op: Op, spec: Backward) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """``product(key, a, b)``: the equation's result, whose gradients in ``a`` and ``b`` are products of rounded codes.

    Only reverse-mode differentiation goes through it.
    """

    @jax.custom_vjp
    def product(key: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return op.bind(a, b)[0]

    def forward(key: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
        return op.bind(a, b)[0], (key, a, b)

    def backward(kept: Any, g: jax.Array) -> tuple[None, jax.Array, jax.Array]:
        key, a, b = kept
        return None, *_both(op, spec, key, a, b, g)

    product.defvjp(forward, backward)
    return product


def _both(
    op: Op, spec: Backward | None, key: jax.Array | None, a: jax.Array, b: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of both operands."""
    keys = [None, None] if key is None else list(_stepped(key, op, g))
    return _pulled(op, 0, a, b, g, spec, keys[0]), _pulled(op, 1, b, a, g, spec, keys[1])


def _stepped(key: jax.Array, op: Op, g: jax.Array) -> jax.Array:
    """Two keys; inside a loop that shares one key over its steps, of other noise for each other gradient.

    The salt is a sum of bit patterns, exact in any order: a repeated key would tie the roundings of successive steps
    together, and their expectation would no longer be the gradient.
    """
    if any(not loop.layers for loop in op.loops):
        bits = jax.lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32)
        key = jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.split(key)


def _pulled(
    op: Op, index: int, like: jax.Array, other: jax.Array, g: jax.Array, spec: Backward | None, key: jax.Array | None
) -> jax.Array:
    """The gradient of operand ``index``: the transposed product of ``g`` and the other operand, on codes if asked."""

    def transposed(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
        fixed, cotangent = factors

        def linear(v: jax.Array) -> jax.Array:
            return op.bind(*((v, fixed) if index == 0 else (fixed, v)))[0]

        return jax.linear_transpose(linear, jax.ShapeDtypeStruct(like.shape, like.dtype))(cotangent)[0]

    if spec is None:
        return transposed((other, g))

    def rounding(inner: Op) -> Claim | None:
        return None if product_of(inner.eqn) is None else Claim(partial(_product, inner, spec, key))

    return rewrite(transposed, rounding)((other, g))


def _product(op: Op, spec: Backward, key: jax.Array | None, *values: jax.Array) -> list[jax.Array]:
    """A dot or convolution of two values on codes."""
    product = product_of(op.eqn)
    assert product is not None
    keys = [None, None] if key is None else list(jax.random.split(key))
    a, b = (_rounded(x, roles, spec, k) for x, roles, k in zip(values, product.roles, keys, strict=True))

    # XLA on CPU has a fast int8 convolution for the layouts of a forward pass alone.
    slow = product.kind == "conv" and jax.default_backend() == "cpu"
    if slow or refusal(op, a, b):
        return op.bind(*(dequantize(f.codes, f.scale).astype(x.dtype) for f, x in zip((a, b), values, strict=True)))
    return [integer_product(op, a, b)]


def _rounded(x: jax.Array, roles: tuple[str, ...], spec: Backward, key: jax.Array | None) -> Factor:
    """Codes with a scale for each index that is not summed over; a scale that is no number makes the result none."""
    _, top = spec.grid.code_range
    x = x.astype(compute_dtype(x.dtype))
    largest = block_absmax(x, scale_blocks(x.shape, roles, _PER_INDEX)) * (1.0 / top)
    scale = jnp.where(largest == 0, jnp.ones_like(largest), jnp.maximum(largest, jnp.finfo(x.dtype).tiny))
    # The clip changes nothing but keeps the product apart from the difference below, in jit as in eager.
    steps = jnp.clip(x * spread(1.0 / scale, x.shape), -top, top)
    codes = jnp.round(steps)
    if key is not None:
        codes = jnp.floor(steps)
        noise = jax.random.bits(key, x.shape, jnp.uint16).astype(x.dtype)
        codes = codes + (noise + 0.5 < (steps - codes) * 2.0**_NOISE_BITS).astype(x.dtype)
    return Factor(codes.astype(jnp.int8), scale, None, top)
