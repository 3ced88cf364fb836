"""Convolutions of codes, each backend in the form that it runs fast, or at all; chosen when a program is lowered.

What a backend asks for:

- XLA on CPU has a fast int8 convolution from 17 channels on, for two spatial axes, and none where a group has one or
  two channels. Milliseconds on one core, jax 0.12, 3x3: 16 by 16 channels 6.2, with 32 features 0.5; 9 taps along one
  axis, 128 channels 818, with an axis of 1 before it 6; depthwise 240, of the same codes in float32 49, in the form of
  ``kernels.grouped`` 2.
- cuDNN has one for sums that become float32 right away, of one group, without dilation. What it lacks runs on codes in
  bfloat16 with sums in float32; XLA on GPU widens the operands of such a convolution to float32, in which a GPU rounds
  them to TF32: both hold codes exactly.
- A TPU convolves integers as it does floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.activations.factors import EXACT, Factor, total
from jaxcomp.core.types import DType, Shape
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op

NARROW, WIDE = 17, 32
"""On CPU, convolutions with fewer channels than this, in and out, get features of zeros up to that many."""

THIN = 2
"""On CPU, a group of so many channels is convolved in float32."""


class Form(NamedTuple):
    """How codes are convolved.

    Attributes:
      floats: the float type in which codes are multiplied, zero points taken off before; None for the codes' own type.
      early: whether the sums become floats before the zero point's share is taken off: of sums of 2**24 and more their
        last bits are lost, as in any sum of floats.
      features: how many features the kernel gets.
    """

    floats: DType | None
    early: bool
    features: int


def convolution(op: Op, x: Factor, kernel: Factor) -> jax.Array:
    """The result of a convolution on codes, in the scales' type; the kernel has no zero point."""
    return _chosen(op, (x, kernel), {"cpu": _for_cpu(op, x, kernel), "cuda": _for_cuda(op, x, kernel)})


def convolution_of_gradient(op: Op, a: Factor, b: Factor) -> jax.Array:
    """The same where a gradient is pulled back, in layouts for which neither CPU nor cuDNN has one of int8."""
    plain = _plain(op, a, b)
    cpu, cuda = (plain._replace(floats=jnp.dtype(dtype)) for dtype in (a.scale.dtype, _holding(a)))
    return _chosen(op, (a, b), {"cpu": cpu, "cuda": cuda})


def _chosen(op: Op, factors: tuple[Factor, Factor], special: dict[str, Form]) -> jax.Array:
    default = _plain(op, *factors)
    if set(special.values()) == {default}:
        return _run(op, default, *factors)
    runs = {name: partial(_run, op, form) for name, form in special.items()}
    result: jax.Array = lax.platform_dependent(*factors, **runs, default=partial(_run, op, default))
    return result


def _plain(op: Op, x: Factor, kernel: Factor) -> Form:
    """The codes as they are, in integers up to the rescale; sooner in floats where that is the same."""
    features = kernel.codes.shape[op.eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = kernel.codes.size // max(features, 1)
    return Form(None, x.zero is None or taps * 128 * kernel.reach < EXACT, features)


def _for_cpu(op: Op, x: Factor, kernel: Factor) -> Form:
    plain, p = _plain(op, x, kernel), op.eqn.params
    inputs = kernel.codes.shape[p["dimension_numbers"].rhs_spec[1]]
    if kernel.codes.dtype != jnp.int8:
        return plain
    if p["feature_group_count"] == 1:
        return plain._replace(features=WIDE) if max(inputs, plain.features) < NARROW else plain
    taps = kernel.codes.size // max(plain.features, 1)
    exact = taps * x.reach * kernel.reach < EXACT
    return Form(x.scale.dtype, True, plain.features) if inputs <= THIN and exact else plain


def _for_cuda(op: Op, x: Factor, kernel: Factor) -> Form:
    plain, p = _plain(op, x, kernel), op.eqn.params
    if x.reach and x.codes.dtype != jnp.int8:
        return plain
    dilated = {*p["lhs_dilation"], *p["rhs_dilation"]} - {1}
    lacking = p["feature_group_count"] > 1 or dilated or len(p["padding"]) > 2
    if lacking or kernel.codes.dtype != jnp.int8 or x.scale.dtype != jnp.float32:
        return Form(_holding(x), True, plain.features)
    return plain._replace(early=True)


def _holding(x: Factor) -> DType:
    """A float type that holds the differences of codes, and products of it are summed in the scale's."""
    return jnp.dtype(jnp.bfloat16 if x.scale.dtype == jnp.float32 else x.scale.dtype)


def _run(op: Op, form: Form, x: Factor, kernel: Factor) -> jax.Array:
    """``Σ (a - za) sa b sb == sa sb (Σ a b - za Σ b)``."""
    numbers = op.eqn.params["dimension_numbers"]
    scale = placed(op, 0, x.scale, x.codes.shape) * placed(op, 1, kernel.scale, kernel.codes.shape)
    if form.floats is not None:
        x = Factor(_differences(x).astype(form.floats), x.scale, None, x.reach)
        kernel = Factor(kernel.codes.astype(form.floats), kernel.scale, None, kernel.reach)
    sums = _sums(op, form, x, kernel)
    if x.zero is not None:
        totals = total(kernel.codes, tuple(numbers.rhs_spec[1:]))
        share = placed(op, 0, x.zero, x.codes.shape) * placed(op, 1, totals, kernel.codes.shape)
        sums = sums - share.astype(sums.dtype)
    return sums.astype(scale.dtype) * scale


def placed(op: Op, side: int, v: jax.Array, shape: Shape) -> jax.Array:
    """What an operand of this shape has one of an image, or of a feature, in the result's axes."""
    numbers, v = op.eqn.params["dimension_numbers"], spread(v, shape)
    sizes = [1] * v.ndim
    sizes[numbers.out_spec[side]] = v.shape[(numbers.lhs_spec, numbers.rhs_spec)[side][0]]
    return v.reshape(sizes)


def _differences(x: Factor) -> jax.Array:
    """``codes - zero``, integers up to 255."""
    return x.codes if x.zero is None else x.codes.astype(jnp.int32) - spread(x.zero, x.codes.shape)


def _sums(op: Op, form: Form, x: Factor, kernel: Factor) -> jax.Array:
    """Products of codes summed, in the scale's type where the form says so."""
    p, numbers, codes, weight = op.eqn.params, op.eqn.params["dimension_numbers"], x.codes, kernel.codes
    changed: dict[str, Any] = {"preferred_element_type": x.sum_type}
    if form.floats == jnp.bfloat16:
        changed["precision"] = None  # all hold the codes
    if x.zero is not None:
        # What a convolution pads with is the code 0, which is not the value 0 here: pad by hand, holes too.
        edges = [(0, 0, 0)] * codes.ndim
        for axis, (low, high), hole in zip(numbers.lhs_spec[2:], p["padding"], p["lhs_dilation"], strict=True):
            edges[axis] = (low, high, hole - 1)
        codes, flat = _padded(x, edges), len(p["padding"])
        changed |= {"padding": ((0, 0),) * flat, "lhs_dilation": (1,) * flat}
    features = weight.shape[numbers.rhs_spec[0]]
    if form.features != features:
        edges = [(0, 0, 0)] * weight.ndim
        edges[numbers.rhs_spec[0]] = (0, form.features - features, 0)
        weight = lax.pad(weight, jnp.zeros((), weight.dtype), edges)
    run = _along_one if weight.ndim == 3 and weight.dtype == jnp.int8 else _as_it_is
    sums = run(op, (codes, weight), changed, x.scale.dtype if form.early else x.sum_type)
    return lax.slice_in_dim(sums, 0, features, axis=numbers.out_spec[1])


def _as_it_is(op: Op, codes: tuple[jax.Array, jax.Array], changed: dict[str, Any], dtype: DType) -> jax.Array:
    return op.bind(*codes, **changed)[0].astype(dtype)


def _along_one(op: Op, codes: tuple[jax.Array, jax.Array], changed: dict[str, Any], dtype: DType) -> jax.Array:
    """A convolution along one axis, with an axis of 1 before it."""
    p = {**op.eqn.params, **changed}
    specs = tuple(p["dimension_numbers"])

    def with_axis(spec: Sequence[int]) -> tuple[int, ...]:
        at = spec[2]
        first, second = (i + (i >= at) for i in spec[:2])
        return first, second, at, at + 1

    changed |= {
        "dimension_numbers": lax.ConvDimensionNumbers(*map(with_axis, specs)),
        "padding": ((0, 0), *p["padding"]),
    }
    changed |= {name: (1, *p[name]) for name in ("window_strides", "lhs_dilation", "rhs_dilation")}
    wide = (jnp.expand_dims(v, spec[2]) for v, spec in zip(codes, specs, strict=False))
    return jnp.squeeze(op.bind(*wide, **changed)[0].astype(dtype), specs[2][2])


def _padded(x: Factor, edges: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Codes padded with the zero point; one zero point for each image at most."""
    assert x.zero is not None
    if x.zero.size == 1:
        return lax.pad(x.codes, x.zero.reshape(()).astype(jnp.int8), edges)
    inside = lax.pad(jnp.ones(x.codes.shape, bool), jnp.zeros((), bool), edges)
    return jnp.where(inside, lax.pad(x.codes, jnp.int8(0), edges), x.zero.astype(jnp.int8))
