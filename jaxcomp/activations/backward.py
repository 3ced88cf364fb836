"""Gradients of products on codes, and gradients that are themselves products on rounded codes.

The two products of a gradient are found by transposing the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.avals import operands_of, result_of
from jaxcomp.activations.codes import Value
from jaxcomp.activations.convolutions import convolution_of_gradient
from jaxcomp.activations.encoded import nan_rows
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.fake import Names, scale_blocks
from jaxcomp.activations.float_products import Form, apart, times
from jaxcomp.activations.integer_products import integer_product, refusal
from jaxcomp.activations.specs import Backward
from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.layouts import Tokens
from jaxcomp.core.meshes import backward as under_its_axes
from jaxcomp.core.meshes import here
from jaxcomp.core.noise import bits
from jaxcomp.core.types import Key, PyTree
from jaxcomp.quantization.numerics.affine import block_absmax, dequantize, in_steps
from jaxcomp.quantization.numerics.rounding import nearest
from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.products import product_of
from jaxcomp.trace.ranges import Range

_NOISE_BITS = 16

Operands = tuple[Value, ...]
Ranges = dict[int, Range]
Pair = tuple[Factor, Factor]
Kept = tuple[Callable[[tuple[jax.Array, jax.Array]], tuple[PyTree, PyTree]], Key | None, Pair, Operands]
"""What waits for the backward pass of a product on codes: how operands' gradients are pulled back, codes, the rest."""
Drawn = tuple[Key | None, jax.Array, jax.Array, Operands]
"""What waits for that of a product of values: the key, the two values, and the operands after them."""
Values = tuple[jax.Array, jax.Array, jax.Array]
"""Both operands of a product, and the gradient of its result."""


class Gradients(NamedTuple):
    """How gradients are rounded in one call: the spec, if they are, and the key where it is stochastic."""

    spec: Backward | None = None
    key: Key | None = None

    def key_of(self, index: int, op: Op) -> Key | None:
        """The key of the site with this index; one for each step of the layer scans around it."""
        if self.key is None:
            return None
        key = jax.random.fold_in(self.key, index)
        return jax.random.split(key, op.layer_steps) if op.layer_steps else key


def checked_key(owner: str, spec: Backward, args: tuple[object, ...]) -> Key | None:
    """The key at the head of the arguments.

    Raises:
      TypeError: something else stands there.
    """
    key = args[0] if args else "nothing"
    if key is None and not spec.stochastic:
        return None
    if not spec.stochastic or not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        wanted = "jax.random.key(...)" if spec.stochastic else "None, for nothing is stochastic"
        found = key if isinstance(key, str) else type(key).__name__
        raise TypeError(
            f"{owner}: with backward={spec!r} call q(params, ranges, key, *args); the key must be {wanted}, got "
            f"{found}."
        )
    return key


def product_with_gradient(
    op: Op, spec: Backward | None, rounded: Callable[..., tuple[jax.Array, jax.Array]], form: Form
) -> Callable[..., jax.Array]:
    """``product(operands, ranges, key, factors)``: on codes, with the gradient of ``op`` on the values they stand for.

    Only reverse-mode differentiation goes through it. What waits for the backward pass are the codes, a byte each.

    Args:
      op: the equation.
      spec: how the gradient is rounded, if at all.
      rounded: gives the two values from ``(operands, ranges)``, and with them the gradient in both.
      form: of the product on codes.
    """
    dtypes = [operand.dtype for operand in operands_of(op)[:2]]

    @jax.custom_vjp
    def product(operands: Operands, ranges: Ranges, key: Key | None, factors: Pair) -> jax.Array:
        return form.multiply(op.given(*operands[2:]), *factors)

    def forward(operands: Operands, ranges: Ranges, key: Key | None, factors: Pair) -> tuple[jax.Array, Kept]:
        _, pull = jax.vjp(rounded, operands, ranges)
        return form.multiply(op.given(*operands[2:]), *factors), (pull, key, factors, operands[2:])

    def backward(kept: Kept, g: jax.Array) -> tuple[PyTree, PyTree, None, None]:
        pull, key, factors, rest = kept
        # Or XLA makes the values while it goes forward, and all of them wait.
        factors, g = jax.lax.optimization_barrier((factors, g))
        every = zip(factors, form.single, dtypes, strict=True)
        (a, outer_a), (b, outer_b) = (apart(f, single=single, dtype=dtype) for f, single, dtype in every)
        of_a, of_b = _both(op.given(*rest), (a, b, g), Gradients(spec, key))
        return *pull((times(of_a, outer_b), times(of_b, outer_a))), None, None

    product.defvjp(forward, under_its_axes(backward))
    return product


def with_rounded_gradient(op: Op, spec: Backward) -> Callable[[Key | None, jax.Array, jax.Array, Operands], jax.Array]:
    """``product(key, a, b, rest)``: the equation's result, whose gradients in ``a`` and ``b`` are products of codes.

    Only reverse-mode differentiation goes through it.
    """

    @jax.custom_vjp
    def product(key: Key | None, a: jax.Array, b: jax.Array, rest: Operands) -> jax.Array:
        return op.bind(a, b, *rest)[0]

    def forward(key: Key | None, a: jax.Array, b: jax.Array, rest: Operands) -> tuple[jax.Array, Drawn]:
        return op.bind(a, b, *rest)[0], (key, a, b, rest)

    def backward(kept: Drawn, g: jax.Array) -> tuple[None, jax.Array, jax.Array, None]:
        key, a, b, rest = kept
        return None, *_both(op.given(*rest), (a, b, g), Gradients(spec, key)), None

    product.defvjp(forward, under_its_axes(backward))
    return product


def _both(op: Op, values: Values, how: Gradients) -> tuple[jax.Array, jax.Array]:
    """The gradients of both operands."""
    keys = [None, None] if how.key is None else list(_stepped(how.key, op, values[2]))
    return _pulled(op, 0, values, Gradients(how.spec, keys[0])), _pulled(op, 1, values, Gradients(how.spec, keys[1]))


def _stepped(key: jax.Array, op: Op, g: jax.Array) -> jax.Array:
    """Two keys; inside a loop that shares one key over its steps, of other noise for each other gradient.

    The salt is a sum of bit patterns, exact in any order: a repeated key would tie the roundings of successive steps
    together, and their expectation would no longer be the gradient.
    """
    if any(not loop.layers for loop in op.loops):
        bits = jax.lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32)
        key = jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.split(key)


def _pulled(op: Op, index: int, values: Values, how: Gradients) -> jax.Array:
    """The gradient of operand ``index``: the transposed product of ``g`` and the other operand, on codes if asked."""
    like, other, g = values[index], values[1 - index], values[2]
    spec, key = how

    def transposed(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        fixed, cotangent = pair

        def linear(v: jax.Array) -> jax.Array:
            return op.bind(*((v, fixed) if index == 0 else (fixed, v)))[0]

        return jax.linear_transpose(linear, jax.ShapeDtypeStruct(like.shape, like.dtype))(cotangent)[0]

    if spec is None:
        return here(transposed((other, g)))

    def rounding(inner: Op) -> Claim | None:
        return None if product_of(inner.eqn) is None else Claim(partial(_product, inner, spec, key))

    return here(rewrite(transposed, rounding)((other, g)))


def _product(op: Op, spec: Backward, key: Key | None, *values: jax.Array) -> list[jax.Array]:
    """A dot or convolution of two values on codes."""
    product, op, values = product_of(op.eqn), op.given(*values[2:]), values[:2]
    assert product is not None
    keys = [None, None] if key is None else list(jax.random.split(key))
    a, b = (_rounded(x, roles, Gradients(spec, k)) for x, roles, k in zip(values, product.roles, keys, strict=True))

    if refusal(op, a, b) is not None:
        return op.bind(*(dequantize(f.codes, f.scale).astype(x.dtype) for f, x in zip((a, b), values, strict=True)))
    if product.kind == "conv":
        return [convolution_of_gradient(op, a, b).astype(result_of(op).dtype)]
    return [integer_product(op, a, b)]


def _rounded(x: jax.Array, roles: Names, how: Gradients) -> Factor:
    """Codes with a scale for each index that is not summed over; a scale that is no number makes the result none."""
    assert how.spec is not None
    _, top = how.spec.grid.code_range
    x = x.astype(compute_dtype(x.dtype))
    blocks = scale_blocks(x.shape, roles, Tokens())
    end = block_absmax(x, blocks) * (1.0 / top) if x.size else jnp.zeros((1,) * x.ndim, x.dtype)
    scale = jnp.where(end == 0, jnp.ones_like(end), jnp.maximum(end, jnp.finfo(x.dtype).tiny)) + nan_rows(x, roles)
    # The clip changes nothing but keeps the product apart from the difference below, in jit as in eager.
    steps = jnp.clip(in_steps(x, scale), -top, top)
    codes = nearest(steps)
    if how.key is not None:
        codes = jnp.floor(steps)
        noise = (bits(how.key, x.shape) >> (32 - _NOISE_BITS)).astype(jnp.int32).astype(x.dtype)
        codes = codes + (noise + 0.5 < (steps - codes) * 2.0**_NOISE_BITS).astype(x.dtype)
    return Factor(codes.astype(jnp.int8), scale, None, top)
