"""Convolutions of activations in int8 where a CPU has code for them: by prepared kernels as they lie, and depthwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
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
from jaxcomp.kernels.llvm_results import Requantized
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


class _How(NamedTuple):
    """What a convolution knows beside arrays: how it goes, and the order of axes of images, kernel and result."""

    window: Window
    images: tuple[int, ...]
    kernel: tuple[int, ...]
    result: tuple[int, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["x", "kernel", "scale"], meta_fields=["how"])
@dataclass(frozen=True)
class Convolved:
    """A convolution of codes on a CPU.

    Attributes:
      x: the images.
      kernel: as it lies if it is prepared, else its codes.
      scale: what sums are multiplied by, in the result's axes.
      how: it goes, static.
    """

    x: Factor
    kernel: PanelWeight | jax.Array
    scale: jax.Array
    how: _How

    @property
    def refusal(self) -> str | None:
        """Why there is no code for it here; None if there is: a kernel that is not prepared has been asked before."""
        return llvm_panels.refusal_of_codes() if isinstance(self.kernel, PanelWeight) else None

    def sums(self, to: Requantized | None = None) -> jax.Array:
        """int32 in the result's axes; or int8, the codes that they become, of images that share their zero point."""
        how, zero = self.how, None if self.x.zero is None else self.x.zero.reshape(-1)
        images = jnp.transpose(self.x.codes, how.images)
        if isinstance(self.kernel, PanelWeight):
            y = llvm_panels.llvm_panel_sums(images, zero, self.kernel, how.window, to)
        else:  # a channel of a feature's own, last: features first become columns
            by_taps = jnp.transpose(self.kernel, how.kernel).reshape(images.shape[-1], -1).T
            y = llvm_depthwise.llvm_depthwise_sums(images, zero, by_taps, how.window, to)
        return jnp.transpose(y, np.argsort(how.result).tolist())


def convolved(op: Op, x: Factor, kernel: Factor) -> Convolved:
    """The convolution of a :func:`coded_pair`."""
    numbers = op.eqn.params["dimension_numbers"]
    orders = (channels_last(spec) for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
    w = kernel.weight if isinstance(kernel, LaidFactor) else kernel.codes
    assert isinstance(w, PanelWeight | jax.Array)
    return Convolved(x, w, scale_of(op, x, kernel), _How(window_of(op), *orders))


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
    given: Convolved = jax.tree.unflatten(tree, leaves)[0]
    size = math.prod(jaxpr.out_avals[0].shape)
    if not size or not given.x.codes.size or given.refusal:
        return run_call(*leaves, jaxpr=jaxpr)
    return [given.sums().astype(given.scale.dtype) * given.scale]


_primitive = call_in_one_piece(CODED_CONVOLUTION, _for_cpu)
