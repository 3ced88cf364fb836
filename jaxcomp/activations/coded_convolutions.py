"""Convolutions of activations in int8 where a CPU has code for them: by prepared kernels as they lie, and depthwise."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.convolutions import convolution, scale_of
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.integer_products import integer_product
from jaxcomp.activations.packed_products import LaidFactor, laid_factor
from jaxcomp.activations.prepared import Carried
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import PyTree
from jaxcomp.kernels import llvm_depthwise, llvm_panels
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.windows import Window, channels_last, window_of
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import CODED_CONVOLUTION


def coded_pair(op: Op, given: object, pair: tuple[Factor, Factor]) -> tuple[Factor, Factor] | None:
    """The factors of a convolution that :func:`coded_convolution` runs, or None where there is no such code for it.

    Args:
      op: the convolution, which runs on integers.
      given: its kernel, as it came.
      pair: images and kernel.
    """
    w, (x, kernel) = given.weight if isinstance(given, Carried) else None, pair
    if x.codes.dtype != jnp.int8:
        return None
    if isinstance(w, PanelWeight):
        return None if w.lead else (x, laid_factor(kernel, w))
    features, channels, *elements = (kernel.codes.shape[i] for i in op.eqn.params["dimension_numbers"].rhs_spec)
    shape = math.prod(elements), channels, features
    return None if llvm_depthwise.refusal(shape, op.eqn.params["feature_group_count"]) else pair


def _laid(kernel: Factor) -> PanelWeight | None:
    """The kernel as it lies; None of one that is not prepared."""
    w = kernel.weight if isinstance(kernel, LaidFactor) else None
    assert w is None or isinstance(w, PanelWeight)
    return w


class _Given(NamedTuple):
    """What is convolved: both factors, the kernel as it lies if it is prepared, and what sums are multiplied by."""

    x: Factor
    kernel: Factor
    weight: PanelWeight | None
    scale: jax.Array


class _How(NamedTuple):
    """What a convolution knows beside arrays: how it goes, and the order of axes of images, kernel and result."""

    window: Window
    images: tuple[int, ...]
    kernel: tuple[int, ...]
    result: tuple[int, ...]


def coded_convolution(op: Op, x: Factor, kernel: Factor) -> jax.Array:
    """The result of a convolution of a :func:`coded_pair`, in the equation's own type."""
    plain, numbers = Factor(kernel.codes, kernel.scale, None, kernel.reach), op.eqn.params["dimension_numbers"]
    given = _Given(x, plain, _laid(kernel), scale_of(op, x, plain))
    leaves, tree = jax.tree.flatten(given)
    if explicit_mesh(leaves) is not None:
        return integer_product(op, x, plain)

    def own(*leaves: jax.Array) -> list[jax.Array]:
        given: _Given = jax.tree.unflatten(tree, leaves)
        return [convolution(op, given.x, given.kernel)]

    orders = (channels_last(spec) for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
    how = _How(window_of(op), *orders)
    (y,) = _primitive.bind(*leaves, jaxpr=jax.make_jaxpr(own)(*leaves), tree=tree, how=how)
    return y.astype(result_of(op).dtype)


def _for_cpu(*leaves: jax.Array, tree: PyTree, how: _How, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    given: _Given = jax.tree.unflatten(tree, leaves)
    x, kernel, w, scale = given
    size = math.prod(jaxpr.out_avals[0].shape)
    if not size or not x.codes.size or (w is not None and llvm_panels.refusal_of_codes()):
        return run_call(*leaves, jaxpr=jaxpr)
    zero, images = None if x.zero is None else x.zero.reshape(-1), jnp.transpose(x.codes, how.images)
    if w is None:  # a channel of a feature's own, last: features first become columns
        by_taps = jnp.transpose(kernel.codes, how.kernel).reshape(images.shape[-1], -1).T
        sums = llvm_depthwise.llvm_depthwise_sums(images, zero, by_taps, how.window)
    else:
        sums = llvm_panels.llvm_panel_sums(images, zero, w, how.window)
    return [jnp.transpose(sums, np.argsort(how.result).tolist()).astype(scale.dtype) * scale]


_primitive = call_in_one_piece(CODED_CONVOLUTION, _for_cpu)
