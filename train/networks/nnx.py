"""ResNet-18 in NNX, the same network as :class:`train.networks.linen.ResNet18`, with the same names of parameters.

A rule such as ``block_.*/conv_1/kernel`` selects the same weights in both.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from train.networks.linen import HE
from train.networks.widths import Shapes, Widths, resnet18_plan


def _conv(given: int, features: int, kernel: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    size, padding = (kernel, kernel), kernel // 2
    return nnx.Conv(
        given, features, size, stride, padding=padding, use_bias=False, kernel_init=HE, dtype=dtype, rngs=rngs
    )


def _norm(features: int, *, dtype: DTypeLike, rngs: nnx.Rngs, zero: bool = False) -> nnx.BatchNorm:
    scale_init = nnx.initializers.zeros if zero else nnx.initializers.ones
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, scale_init=scale_init, dtype=dtype, rngs=rngs)


class BasicBlock(nnx.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``; see :class:`train.networks.linen.BasicBlock`."""

    def __init__(self, given: int, inner: int, outer: int, stride: int = 1, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv_1 = _conv(given, inner, 3, stride, dtype=dtype, rngs=rngs)
        self.norm_1 = _norm(inner, dtype=dtype, rngs=rngs)
        self.conv_2 = _conv(inner, outer, 3, 1, dtype=dtype, rngs=rngs)
        self.norm_2 = _norm(outer, dtype=dtype, rngs=rngs, zero=True)
        self.strides = stride != 1
        if self.strides:
            self.projection = _conv(given, outer, 1, stride, dtype=dtype, rngs=rngs)
            self.projection_norm = _norm(outer, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 outer"]:
        """The block's output."""
        y = nnx.relu(self.norm_1(self.conv_1(x), use_running_average=not train))
        y = self.norm_2(self.conv_2(y), use_running_average=not train)
        if self.strides:
            x = self.projection_norm(self.projection(x), use_running_average=not train)
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    """ResNet-18 for small images of ``channels`` channels; see :class:`train.networks.linen.ResNet18`.

    Raises:
      ValueError: ``widths`` are not those of a ResNet-18 (see :func:`train.networks.widths.resnet18_plan`).
    """

    def __init__(
        self,
        width: int = 64,
        num_classes: int = 10,
        *,
        channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        widths: Widths | Shapes | None = None,
        rngs: nnx.Rngs,
    ):
        stem, plan = resnet18_plan(width, widths)
        self.dtype = dtype
        self.stem = _conv(channels, stem, 3, 1, dtype=dtype, rngs=rngs)
        self.stem_norm = _norm(stem, dtype=dtype, rngs=rngs)
        self.depth, given = len(plan), stem
        for i, (inner, outer, stride) in enumerate(plan):
            setattr(self, f"block_{i}", BasicBlock(given, inner, outer, stride, dtype=dtype, rngs=rngs))
            given = outer
        self.head = nnx.Linear(given, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n classes"]:
        """Logits; ``train`` takes the batch's statistics in batch norm and updates the running ones."""
        x = nnx.relu(self.stem_norm(self.stem(x.astype(self.dtype)), use_running_average=not train))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x, train)
        return self.head(x.astype(jnp.float32).mean((1, 2)))
