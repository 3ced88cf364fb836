"""Convolutions of activations in int8 by prepared kernels, as their bytes lie, where a CPU has code for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from jaxcomp.kernels.llvm_panels import FEW, llvm_panel_sums, refusal_of_codes
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.windows import Window, channels_last, window_of
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import CODED_CONVOLUTION


def panel_pair(given: object, pair: tuple[Factor, Factor]) -> tuple[Factor, Factor] | None:
    """The factors of a convolution with its kernel as it lies, or None where its operands are not what that is for."""
    w, (x, kernel) = given.weight if isinstance(given, Carried) else None, pair
    if not isinstance(w, PanelWeight) or w.lead or x.codes.dtype != jnp.int8:
        return None
    return x, laid_factor(kernel, w)


def panel_forms(op: Op, kernel: Factor) -> str:
    """The forms of their product by backend, in words; of any number of images those of many."""
    sizes = [n if isinstance(n, int) else FEW for n in result_of(op).shape]
    own = refusal_of_codes(_windows(sizes, _laid(kernel)))
    return "own" if own else "integers on cpu, own on cuda, rocm and tpu"


def _laid(kernel: Factor) -> PanelWeight:
    """The kernel as it lies."""
    assert isinstance(kernel, LaidFactor)
    assert isinstance(kernel.weight, PanelWeight)
    return kernel.weight


def _windows(result: Sequence[int], w: PanelWeight) -> int:
    """How many windows a result of this shape has."""
    return math.prod(result) // max(1, w.features)


class _Given(NamedTuple):
    """What is convolved: both factors, the kernel as it lies, and what sums are multiplied by."""

    x: Factor
    kernel: Factor
    weight: PanelWeight
    scale: jax.Array


class _How(NamedTuple):
    """What a convolution knows beside arrays: how it goes, and the order of axes of images and of the result."""

    window: Window
    images: tuple[int, ...]
    result: tuple[int, ...]


def panel_product(op: Op, x: Factor, kernel: Factor) -> jax.Array:
    """The result of a convolution by a kernel of :func:`panel_pair`, in the equation's own type."""
    plain, numbers = Factor(kernel.codes, kernel.scale, None, kernel.reach), op.eqn.params["dimension_numbers"]
    given = _Given(x, plain, _laid(kernel), scale_of(op, x, plain))
    leaves, tree = jax.tree.flatten(given)
    if explicit_mesh(leaves) is not None:
        return integer_product(op, x, plain)

    def own(*leaves: jax.Array) -> list[jax.Array]:
        given: _Given = jax.tree.unflatten(tree, leaves)
        return [convolution(op, given.x, given.kernel)]

    how = _How(window_of(op), channels_last(numbers.lhs_spec), channels_last(numbers.out_spec))
    (y,) = _primitive.bind(*leaves, jaxpr=jax.make_jaxpr(own)(*leaves), tree=tree, how=how)
    return y.astype(result_of(op).dtype)


def _for_cpu(*leaves: jax.Array, tree: PyTree, how: _How, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    x, _, weight, scale = jax.tree.unflatten(tree, leaves)
    windows = _windows(jaxpr.out_avals[0].shape, weight)
    if not windows or not x.codes.size or refusal_of_codes(windows):
        return run_call(*leaves, jaxpr=jaxpr)
    zero = None if x.zero is None else x.zero.reshape(-1)
    sums = llvm_panel_sums(jnp.transpose(x.codes, how.images), zero, weight, how.window)
    return [jnp.transpose(sums, np.argsort(how.result).tolist()).astype(scale.dtype) * scale]


_primitive = call_in_one_piece(CODED_CONVOLUTION, _for_cpu)
