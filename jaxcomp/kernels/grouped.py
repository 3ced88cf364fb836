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
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.meshes import spread
from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.lowering import is_kept, is_parted
from jaxcomp.trace import nested
from jaxcomp.trace.evaluator import rewrite
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.walk import Value

CONVOLUTION = "conv_general_dilated"
CHANNELS, TERMS = 8, 256
"""Groups of at most so many channels are sums of shifted images, of at most so many."""
PLANES = 4
"""Groups of one channel and at most so many features get the gradient of the kernel plane by plane."""


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
    fast = op.eqn.params["feature_group_count"] > 1 and _few(op.shapes[1], op.eqn.params)
    return "shifts on cpu, own on cuda, rocm and tpu" if fast else ""


def _few(kernel: Shape, params: Mapping[str, Any]) -> bool:
    """Whether a convolution is a sum of few shifted images."""
    outputs, inputs, *_ = params["dimension_numbers"].rhs_spec
    return kernel[inputs] <= CHANNELS and math.prod(kernel) // max(kernel[outputs], 1) <= TERMS


def bind(eqn: core.JaxprEqn, values: Sequence[Value], params: Mapping[str, object]) -> list[jax.Array]:
    """A convolution with some of its parameters replaced: the primitive of this module if it has groups of floats."""
    given: dict[str, Any] = {**eqn.params, **params}
    floats = all(isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating) for v in values)
    groups = given["feature_group_count"] > 1 and given["batch_group_count"] == 1
    if not floats or not groups or spread(values):
        return nested.bind(eqn, values, params)
    return [_convolution.bind(*values, **given)]


# ---- the forms of a CPU


def shifted(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """The convolution as a sum over the elements of the kernel and the channels of a group, in the type of sums."""
    numbers, groups, dtype = params["dimension_numbers"], params["feature_group_count"], _summed(x, params)
    count, own = x.shape[numbers.lhs_spec[0]], kernel.shape[numbers.rhs_spec[1]]
    weights = _by_elements(kernel, groups, params).astype(dtype)
    total: jax.Array | None = None
    x = lax.optimization_barrier(x.astype(dtype))  # or XLA makes it anew for each element
    for element, image in enumerate(_shifts(x, kernel.shape, params)):
        parts = image.reshape(*image.shape[:-1], groups, own)
        for channel in range(own):
            weight = weights[element, channel].reshape(*[1] * (image.ndim - 1), groups, -1)
            term = parts[..., channel, None] * weight
            total = term if total is None else total + term
    assert total is not None
    y = total.reshape(count, *total.shape[1 : image.ndim - 1], -1)
    return jnp.transpose(y, np.argsort(_channels_last(numbers.out_spec)).tolist())


def _shifts(x: jax.Array, kernel: Shape, params: dict[str, Any]) -> list[jax.Array]:
    """For each element of the kernel what it meets: ``(images, *windows, channels)``."""
    numbers = params["dimension_numbers"]
    x = jnp.transpose(x, _channels_last(numbers.lhs_spec))
    edges = [(low, high, hole - 1) for (low, high), hole in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    sizes, steps, strides = [kernel[i] for i in numbers.rhs_spec[2:]], params["rhs_dilation"], params["window_strides"]
    reach = [(n - 1) * step for n, step in zip(sizes, steps, strict=True)]
    spans = [n - r for n, r in zip(x.shape[1:-1], reach, strict=True)]
    found = []
    for at in product(*map(range, sizes)):
        first = [i * step for i, step in zip(at, steps, strict=True)]
        last = [a + span for a, span in zip(first, spans, strict=True)]
        found.append(lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1)))
    return found


def _by_elements(kernel: jax.Array, groups: int, params: dict[str, Any]) -> jax.Array:
    """``(elements, channels of a group, groups, features of a group)``."""
    outputs, inputs, *elements = params["dimension_numbers"].rhs_spec
    by = jnp.transpose(kernel, (*elements, inputs, outputs))
    return by.reshape(-1, kernel.shape[inputs], groups, kernel.shape[outputs] // groups)


def kernel_gradient(x: jax.Array, g: jax.Array, *, kernel: Shape, **params: Any) -> jax.Array:
    """Of the kernel, whose shape is given: image after image, which a cache holds; in the type of sums."""
    numbers, groups, dtype = params["dimension_numbers"], params["feature_group_count"], _summed(x, params)
    outputs, inputs, *elements = numbers.rhs_spec
    own, made = kernel[inputs], kernel[outputs] // groups
    x, g = (jnp.transpose(v, _channels_last(spec)) for v, spec in ((x, numbers.lhs_spec), (g, numbers.out_spec)))
    last = {**params, "dimension_numbers": _last(numbers, len(elements))}

    def added(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        image, result = (v[None].astype(dtype) for v in one)
        result = result.reshape(-1, groups, made)
        parts = [v.reshape(-1, groups, own) for v in _shifts(image, kernel_last, last)]
        if own == 1 and made <= PLANES:
            sums = [jnp.stack([(v[..., 0] * result[..., i]).sum(0) for i in range(made)], -1)[None] for v in parts]
        else:
            across = jnp.swapaxes(result, 0, 1)
            sums = [jnp.einsum("gpc,gpm->cgm", jnp.swapaxes(v, 0, 1), across) for v in parts]
        return total + jnp.stack(sums), None

    kernel_last = (*(kernel[i] for i in elements), own, kernel[outputs])
    start = jnp.zeros((math.prod(kernel_last[:-2]), own, groups, made), dtype)
    total = lax.scan(added, start, (x, g))[0].reshape(kernel_last)
    return jnp.transpose(total, np.argsort((*elements, inputs, outputs)).tolist())


def _channels_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that has images first and channels last."""
    return spec[0], *spec[2:], spec[1]


def _last(numbers: lax.ConvDimensionNumbers, rank: int) -> lax.ConvDimensionNumbers:
    """Those of images and a kernel with channels last."""
    spatial = tuple(range(1, rank + 1))
    images, kernel = (0, rank + 1, *spatial), (rank + 1, rank, *range(rank))
    return lax.ConvDimensionNumbers(images, kernel, images)


def _summed(x: jax.Array, params: dict[str, Any]) -> DType:
    return compute_dtype(params["preferred_element_type"] or x.dtype)


# ---- the primitives


def _own(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """JAX's own convolution."""
    return lax.conv_general_dilated_p.bind(x, kernel, **params)


def _for_cpu(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    there = x.size and kernel.size and jax.eval_shape(partial(_own, **params), x, kernel).size
    run = shifted if there and _few(kernel.shape, params) else _own
    return run(x, kernel, **params).astype(params["preferred_element_type"] or x.dtype)


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

    def lower(ctx: mlir.LoweringRuleContext, *values: object, **params: Any) -> Any:
        run = own if is_kept(ctx) or is_parted(ctx) else cpu
        return mlir.lower_fun(partial(run, **params), multiple_results=False)(ctx, *values)

    primitive.def_impl(lambda *values, **params: jitted(**params)(*values))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(own, multiple_results=False))
    mlir.register_lowering(primitive, lower, platform="cpu")


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
