"""Convolutions with feature groups as sums of shifted images, and the gradients of their kernels.

``params`` are those of JAX's primitive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.windows import channels_last

CHANNELS, TERMS = 8, 256
"""Groups of at most so many channels are sums of shifted images, of at most so many."""
PLANES = 4
"""Groups of one channel and at most so many features get the gradient of the kernel plane by plane."""


def few_shifts(kernel: Shape, params: Mapping[str, Any]) -> bool:
    """Whether the convolution by a kernel of this shape is a sum of few shifted images."""
    outputs, inputs, *_ = params["dimension_numbers"].rhs_spec
    return kernel[inputs] <= CHANNELS and math.prod(kernel) // max(kernel[outputs], 1) <= TERMS


def shifted(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """The convolution as a sum over the elements of the kernel and the channels of a group, in the type of sums."""
    numbers, groups, dtype = params["dimension_numbers"], params["feature_group_count"], _type_of_sums(x, params)
    count, own = x.shape[numbers.lhs_spec[0]], kernel.shape[numbers.rhs_spec[1]]
    weights = _by_elements(kernel, groups, params).astype(dtype)
    total: jax.Array | None = None
    x = lax.optimization_barrier(x.astype(dtype))  # or XLA makes it anew for each element
    x, sizes = jnp.transpose(x, channels_last(numbers.lhs_spec)), [kernel.shape[i] for i in numbers.rhs_spec[2:]]
    for element, image in enumerate(_shifts(x, sizes, params)):
        parts = image.reshape(*image.shape[:-1], groups, own)
        for channel in range(own):
            weight = weights[element, channel].reshape(*[1] * (image.ndim - 1), groups, -1)
            term = parts[..., channel, None] * weight
            total = term if total is None else total + term
    assert total is not None
    y = total.reshape(count, *total.shape[1 : image.ndim - 1], -1)
    return jnp.transpose(y, np.argsort(channels_last(numbers.out_spec)).tolist())


def _shifts(x: jax.Array, sizes: Sequence[int], params: dict[str, Any]) -> list[jax.Array]:
    """What each element of a kernel of these sizes meets, ``(images, *windows, channels)``, of images as they lie."""
    edges = [(low, high, hole - 1) for (low, high), hole in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    steps, strides = params["rhs_dilation"], params["window_strides"]
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
    numbers, groups, dtype = params["dimension_numbers"], params["feature_group_count"], _type_of_sums(x, params)
    outputs, inputs, *elements = numbers.rhs_spec
    own, made, sizes = kernel[inputs], kernel[outputs] // groups, [kernel[i] for i in elements]
    x, g = (jnp.transpose(v, channels_last(spec)) for v, spec in ((x, numbers.lhs_spec), (g, numbers.out_spec)))

    def added(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        image, result = (v[None].astype(dtype) for v in one)
        result = result.reshape(-1, groups, made)
        parts = [v.reshape(-1, groups, own) for v in _shifts(image, sizes, params)]
        if own == 1 and made <= PLANES:
            sums = [jnp.stack([(v[..., 0] * result[..., i]).sum(0) for i in range(made)], -1)[None] for v in parts]
        else:
            across = jnp.swapaxes(result, 0, 1)
            sums = [jnp.einsum("gpc,gpm->cgm", jnp.swapaxes(v, 0, 1), across) for v in parts]
        return total + jnp.stack(sums), None

    start = jnp.zeros((math.prod(sizes), own, groups, made), dtype)
    total = lax.scan(added, start, (x, g))[0].reshape(*sizes, own, kernel[outputs])
    return jnp.transpose(total, np.argsort((*elements, inputs, outputs)).tolist())


def _type_of_sums(x: jax.Array, params: dict[str, Any]) -> DType:
    return compute_dtype(params["preferred_element_type"] or x.dtype)
