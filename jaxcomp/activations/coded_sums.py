"""Products of activations in int8 for which a CPU has code that may write codes: their sums, and what these meet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.avals import result_of
from jaxcomp.activations.convolutions import placed
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.packed_products import LaidFactor
from jaxcomp.core.types import Shape
from jaxcomp.kernels import llvm_depthwise, llvm_panels
from jaxcomp.kernels.llvm_results import Requantized
from jaxcomp.kernels.panels import PanelWeight
from jaxcomp.kernels.windows import Window, channels_last, window_of
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.products import axes_by_use
from jaxcomp.trace.walk import shape_of

Axes = tuple[int, ...]


class _How(NamedTuple):
    """What a product knows beside arrays.

    Attributes:
      window: how the convolution goes that it is.
      images: the order of the operand's axes that has images first and channels last.
      rows: whether an image is all rows of a dot.
      kernel: that of a kernel that is not prepared.
      result: that of the result.
      shape: of the result.
      features: its axes that are the features.
    """

    window: Window
    images: Axes
    rows: bool
    kernel: Axes
    result: Axes
    shape: Shape
    features: Axes


@partial(jax.tree_util.register_dataclass, data_fields=["x", "kernel", "by_row", "by_feature"], meta_fields=["how"])
@dataclass(frozen=True)
class CodedSums:
    """A product of codes on a CPU.

    Attributes:
      x: the activation.
      kernel: as it lies if it is prepared, else its codes.
      by_row: what sums are multiplied by for each image or row, in the result's axes: one number, or NaN.
      by_feature: and for each feature, ``(features,)``.
      how: it goes, static.
    """

    x: Factor
    kernel: PanelWeight | jax.Array
    by_row: jax.Array
    by_feature: jax.Array
    how: _How

    @property
    def refusal(self) -> str | None:
        """Why there is no code for it here; None if there is: a kernel that is not prepared has been asked before."""
        return llvm_panels.refusal_of_codes() if isinstance(self.kernel, PanelWeight) else None

    @property
    def scale(self) -> jax.Array:
        """What sums are multiplied by."""
        return self.by_row * self.placed(self.by_feature)

    def placed(self, by_feature: jax.Array) -> jax.Array:
        """A number for each feature in the result's axes."""
        return by_feature.reshape([n if i in self.how.features else 1 for i, n in enumerate(self.how.shape)])

    def sums(self, to: Requantized | None = None) -> jax.Array:
        """int32 in the result's axes; or int8, the codes that they become, of an activation of one zero point."""
        how, zero = self.how, None if self.x.zero is None else self.x.zero.reshape(-1)
        images = jnp.transpose(self.x.codes, how.images)
        if isinstance(self.kernel, PanelWeight):
            images = images.reshape(1, -1, self.kernel.channels) if how.rows else images
            y = llvm_panels.llvm_panel_sums(images, zero, self.kernel, how.window, to)
        else:  # a channel of a feature's own, last: features first become columns
            by_taps = jnp.transpose(self.kernel, how.kernel).reshape(images.shape[-1], -1).T
            y = llvm_depthwise.llvm_depthwise_sums(images, zero, by_taps, how.window, to)
        return jnp.transpose(y.reshape([how.shape[i] for i in how.result]), np.argsort(how.result).tolist())


def convolved(op: Op, x: Factor, kernel: Factor) -> CodedSums:
    """The convolution of a :func:`~jaxcomp.activations.coded_convolutions.coded_pair`."""
    numbers, shape = op.eqn.params["dimension_numbers"], result_of(op).shape
    images, of_kernel, result = (channels_last(s) for s in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
    axis = numbers.out_spec[1]
    how = _How(window_of(op), images, False, of_kernel, result, shape, (axis,))
    by_row = placed(op, 0, x.scale, x.codes.shape)
    scale = jnp.broadcast_to(placed(op, 1, kernel.scale, kernel.codes.shape).reshape(-1), (shape[axis],))
    w = kernel.weight if isinstance(kernel, LaidFactor) else kernel.codes
    assert isinstance(w, PanelWeight | jax.Array)
    return CodedSums(x, w, by_row, scale, how)


def multiplied(op: Op, x: Factor, weight: Factor) -> CodedSums | None:
    """The dot by a prepared weight of one scale for what is summed over; None of any other."""
    w, numbers = weight.weight if isinstance(weight, LaidFactor) else None, op.eqn.params["dimension_numbers"]
    if not isinstance(w, PanelWeight) or w.lead or numbers[1] != ((), ()):
        return None
    _, kept, summed = axes_by_use(numbers, 0, x.codes.ndim)
    if any(x.scale.shape[i] != 1 for i in summed):
        return None
    shape, order = result_of(op).shape, (*kept, *summed)
    features = tuple(range(len(kept), len(shape)))
    by_row = jnp.transpose(spread(x.scale, x.codes.shape), order)
    by_row = by_row.reshape(*by_row.shape[: len(kept)], *[1] * len(features))
    how = _How(_EACH, order, True, (), tuple(range(len(shape))), shape, features)
    return CodedSums(x, w, by_row, w.scale.reshape(-1), how)


_EACH = Window((1,), (1,), ((0, 0),), (1,), (1,), 1)
"""A dot is a convolution of rows, each of which is a pixel."""


def features_of(op: Op) -> Axes:
    """The axes of the result of a dot or convolution that its right operand gives it."""
    numbers = op.eqn.params["dimension_numbers"]
    if op.name == "conv_general_dilated":
        return (numbers.out_spec[1],)
    (y,), (_, weight, *_) = op.eqn.outvars, op.eqn.invars
    rank, (_, kept, _) = len(shape_of(y)), axes_by_use(numbers, 1, len(shape_of(weight)))
    return tuple(range(rank - len(kept), rank))
