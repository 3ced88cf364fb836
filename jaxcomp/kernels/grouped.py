"""Convolutions with feature groups, depthwise ones among them, in a form that a CPU runs fast.

XLA on CPU has none (jax 0.10 to 0.12): a depthwise 3x3 of 28x28x192 takes 5.5 ms on a core, 40 times what the sum of
nine shifted images takes, each times its element of the kernel; the gradient of a grouped kernel takes seconds. The
primitives here are JAX's own convolution and its gradient in the kernel but for how they are lowered for a CPU;
programs that are kept, and other backends, hold JAX's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jaxcomp.core.meshes import spread
from jaxcomp.core.types import Shape
from jaxcomp.kernels.lowering import lower_by
from jaxcomp.kernels.shifts import TERMS, few_shifts, kernel_gradient, shifted
from jaxcomp.trace import nested
from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.walk import Value

CONVOLUTION = "conv_general_dilated"


class GroupedOp(Op):
    """A convolution that is bound as :func:`bind` does."""

    def bind(self, *values: Value, **params: object) -> list[jax.Array]:
        """As :meth:`Op.bind <jaxcomp.trace.flow.Op.bind>`."""
        return bind(self.eqn, (*values, *self.rest), params)


def grouped(op: Op) -> Op:
    """The equation, and if it is a convolution one that is bound as :func:`bind` does."""
    return GroupedOp(**{f.name: getattr(op, f.name) for f in fields(op)}) if op.name == CONVOLUTION else op


def form_of(op: Op) -> str:
    """The forms of a convolution that is bound so by backend, in words; empty where it has JAX's own everywhere."""
    fast = op.eqn.params["feature_group_count"] > 1 and few_shifts(op.shapes[1], op.eqn.params)
    return "shifts on cpu, own on cuda, rocm and tpu" if fast else ""


def bind(eqn: core.JaxprEqn, values: Sequence[Value], params: Mapping[str, object]) -> list[jax.Array]:
    """A convolution with some of its parameters replaced: the primitive of this module if it has groups of floats."""
    given: dict[str, Any] = {**eqn.params, **params}
    floats = all(isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating) for v in values)
    groups = given["feature_group_count"] > 1 and given["batch_group_count"] == 1
    if not floats or not groups or spread(values):
        return nested.bind(eqn, values, params)
    return [_convolution.bind(*values, **given)]


def _own(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """JAX's own convolution."""
    return lax.conv_general_dilated_p.bind(x, kernel, **params)


def _for_cpu(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    there = x.size and kernel.size and jax.eval_shape(partial(_own, **params), x, kernel).size
    if not there or not few_shifts(kernel.shape, params):
        return _own(x, kernel, **params).astype(params["preferred_element_type"] or x.dtype)
    # Once: XLA would cut a kernel out of its packed bytes anew for each window that it meets.
    return shifted(x, lax.optimization_barrier(kernel), **params).astype(params["preferred_element_type"] or x.dtype)


def _own_gradient(x: jax.Array, g: jax.Array, *, kernel: Shape, **params: Any) -> jax.Array:
    like = jax.ShapeDtypeStruct(kernel, x.dtype)
    return jax.linear_transpose(lambda k: _own(x, k, **params), like)(g)[0]


def _gradient_for_cpu(x: jax.Array, g: jax.Array, *, kernel: Shape, **params: Any) -> jax.Array:
    few = x.size and g.size and math.prod(kernel[i] for i in params["dimension_numbers"].rhs_spec[2:]) <= TERMS
    return (kernel_gradient if few else _own_gradient)(x, g, kernel=kernel, **params).astype(x.dtype)


def _turned(g: jax.Array, kernel: jax.Array, *, images: Shape, **params: Any) -> jax.Array:
    """The gradient of the convolution in images of this shape."""
    like = jax.ShapeDtypeStruct(images, kernel.dtype)

    def transposed(values: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.linear_transpose(lambda x: _own(x, values[1], **params), like)(values[0])[0]

    return rewrite(transposed, _by_groups)((g, kernel))


def _by_groups(op: Op) -> Claim | None:
    return Claim(grouped(op).bind) if op.name == CONVOLUTION else None


_convolution, _gradient = Primitive(CONVOLUTION), Primitive("grouped_kernel_gradient")


def _defined(primitive: Primitive, own: Callable[..., jax.Array], cpu: Callable[..., jax.Array]) -> None:
    """What a primitive is, in terms of JAX's convolution and in its form for a CPU."""

    @cache
    def jitted(**params: Any) -> Callable[..., jax.Array]:
        return jax.jit(partial(primitive.bind, **params))

    def abstract(*avals: jax.core.ShapedArray, **params: Any) -> jax.core.ShapedArray:
        found = jax.eval_shape(partial(own, **params), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
        return jax.core.ShapedArray(found.shape, found.dtype)

    primitive.def_impl(lambda *values, **params: jitted(**params)(*values))
    primitive.def_abstract_eval(abstract)
    lower_by(primitive, own, cpu)


_defined(_convolution, _own, _for_cpu)
_defined(_gradient, _own_gradient, _gradient_for_cpu)
ad.defbilinear(
    _convolution,
    lambda g, x, kernel, **params: _turned(g, kernel, images=x.aval.shape, **params),
    lambda g, x, kernel, **params: _gradient.bind(x, g, kernel=kernel.aval.shape, **params),
)
ad.defbilinear(
    _gradient,
    lambda k, x, g, *, kernel, **params: _turned(g, k, images=x.aval.shape, **params),
    lambda k, x, g, *, kernel, **params: _convolution.bind(x, k, **params),
)


def _convolutions(values: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    """As JAX's own are batched."""
    run = jax.vmap(partial(_own, **params), tuple(axes))
    return rewrite(lambda values: run(*values), _by_groups)(tuple(values)), 0


def _gradients(values: Any, axes: Any, *, kernel: Shape, **params: Any) -> tuple[jax.Array, int]:
    """As more groups."""
    numbers = params["dimension_numbers"]
    size = next(v.shape[axis] for v, axis in zip(values, axes, strict=True) if axis is not None)
    wide = []
    for v, axis, spec in zip(values, axes, (numbers.lhs_spec, numbers.out_spec), strict=True):
        at = spec[1]
        whole = jnp.stack([v] * size, at) if axis is None else jnp.moveaxis(v, axis, at)
        shape = [*whole.shape[:at], -1, *whole.shape[at + 2 :]]
        wide.append(whole.reshape(shape))
    at, count = numbers.rhs_spec[0], params["feature_group_count"] * size
    more = tuple(n * size if i == at else n for i, n in enumerate(kernel))
    made = _gradient.bind(*wide, kernel=more, **{**params, "feature_group_count": count})
    return made.reshape(*kernel[:at], size, *kernel[at:]), at


batching.primitive_batchers[_convolution] = _convolutions
batching.primitive_batchers[_gradient] = _gradients
