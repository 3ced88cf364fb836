"""Convolutions of activations in int8 where a CPU has code for them: by prepared kernels as they lie, and depthwise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.coded_sums import CodedSums, convolved
from jaxcomp.activations.convolutions import convolution
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.integer_products import integer_product
from jaxcomp.activations.packed_products import laid_factor
from jaxcomp.activations.prepared import Carried
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import PyTree
from jaxcomp.kernels import llvm_depthwise
from jaxcomp.kernels.lowering import call_in_one_piece, run_call
from jaxcomp.kernels.panels import PanelWeight
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


def coded_convolution(op: Op, x: Factor, kernel: Factor) -> jax.Array:
    """The result of a convolution of a :func:`coded_pair`, in the equation's own type."""
    plain = Factor(kernel.codes, kernel.scale, None, kernel.reach)
    leaves, tree = jax.tree.flatten((convolved(op, x, kernel), plain))
    if explicit_mesh(leaves) is not None:
        return integer_product(op, x, plain)

    def own(*leaves: jax.Array) -> list[jax.Array]:
        given, plain = jax.tree.unflatten(tree, leaves)
        return [convolution(op, given.x, plain)]

    (y,) = _primitive.bind(*leaves, jaxpr=jax.make_jaxpr(own)(*leaves), tree=tree)
    return y.astype(result_of(op).dtype)


def _for_cpu(*leaves: jax.Array, tree: PyTree, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    given: CodedSums = jax.tree.unflatten(tree, leaves)[0]
    size = math.prod(jaxpr.out_avals[0].shape)
    if not size or not given.x.codes.size or given.refusal:
        return run_call(*leaves, jaxpr=jaxpr)
    return [given.sums().astype(given.scale.dtype) * given.scale]


_primitive = call_in_one_piece(CODED_CONVOLUTION, _for_cpu)
