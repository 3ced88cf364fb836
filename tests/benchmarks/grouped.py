"""Grouped and depthwise convolutions on a CPU over JAX's own: layers, their gradients, and a MobileNetV2.

``python -m tests.benchmarks grouped``, under ``taskset -c 0`` for one core. Ours are what ``quantize_function(fn, {})``
runs. onnxruntime's float32 is beside the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxcomp as jc
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.sparse import in_onnxruntime
from tests.benchmarks.timing import Report

OWN, AGAIN, OURS = "JAX's own", "JAX's own again (control)", "ours"
ONNX = "onnxruntime"


class Layer(NamedTuple):
    """A convolution of square images."""

    images: int
    size: int
    channels: int
    of_a_group: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        kind = "depthwise" if self.of_a_group == 1 else f"groups of {self.of_a_group}"
        shape = f"{self.images} x {self.size}x{self.size}x{self.channels}"
        return f"{shape}, {self.kernel}x{self.kernel}, steps of {self.stride}, {kind}"

    def fn(self, p: Any, x: jax.Array) -> jax.Array:
        """The layer."""
        groups, numbers = self.channels // self.of_a_group, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (self.stride,) * 2, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def operands(self) -> tuple[Any, jax.Array]:
        """Random ones."""
        shape = (self.kernel, self.kernel, self.of_a_group, self.channels)
        x = jax.random.normal(jax.random.key(1), (self.images, self.size, self.size, self.channels))
        return {"w": jax.random.normal(jax.random.key(0), shape)}, x


LAYERS = (
    Layer(1, 28, 192, 1, 3, 1),
    Layer(8, 28, 192, 1, 3, 1),
    Layer(8, 14, 384, 1, 5, 2),
    Layer(8, 28, 192, 8, 3, 1),
)
TOY = (Layer(2, 6, 8, 1, 3, 1),)


class Inverted(nn.Module):
    """A block of MobileNetV2: wide inside, a depthwise convolution between two of one element. arXiv:1801.04381."""

    features: int
    stride: int
    expansion: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output."""
        inner = x.shape[-1] * self.expansion
        y = x if self.expansion == 1 else self.activation(_normed(train, nn.Conv(inner, (1, 1), use_bias=False)(x)))
        y = nn.Conv(inner, (3, 3), self.stride, feature_group_count=inner, use_bias=False)(y)
        y = self.activation(_normed(train, y))
        y = _normed(train, nn.Conv(self.features, (1, 1), use_bias=False)(y))
        return x + y if x.shape == y.shape else y


def _normed(train: bool, x: jax.Array) -> jax.Array:
    return nn.BatchNorm(not train)(x)


class MobileNetV2(nn.Module):
    """Its blocks: expansion, features, repetitions, stride; and the function between."""

    blocks: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    activation: Callable[[jax.Array], jax.Array] = nn.relu6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits of 1,000 classes."""
        x = self.activation(_normed(train, nn.Conv(32, (3, 3), 2, use_bias=False)(x)))
        for expansion, features, count, stride in self.blocks:
            for i in range(count):
                x = Inverted(features, 1 if i else stride, expansion, self.activation)(x, train)
        x = self.activation(_normed(train, nn.Conv(1280, (1, 1), use_bias=False)(x)))
        return nn.Dense(1000)(x.mean((1, 2)))


def run(*, toy: bool = False) -> Iterator[Report]:
    """Layers, then the network."""
    setting = Setting.lasting(3600, toy=toy)
    for layer in setting.pick(LAYERS, TOY):
        p, x = layer.operands()
        yield compared(setting, str(layer), layer.fn, p, x)
        yield compared(setting, f"{layer}, gradients", layer.fn, p, x, gradient)
    yield from network(setting)


def network(setting: Setting) -> Iterator[Report]:
    """MobileNetV2 on an image, batch norm folded; its training step."""
    model, size = MobileNetV2(), setting.pick(224, 32)
    x = jax.random.normal(jax.random.key(1), (setting.pick(4, 2), size, size, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    folded = jc.fold_batch_norm(lambda p, x: model.apply(p, x))(variables, x[:1])
    with TemporaryDirectory() as folder:
        peers = {ONNX: partial(in_onnxruntime, Path(folder), folded.fn, folded.params, x[:1])}
        yield compared(setting, f"MobileNetV2, {size}x{size}", folded.fn, folded.params, x[:1], peers=peers)

    def trained(p: Any, x: jax.Array) -> jax.Array:
        return model.apply(p, x, train=True, mutable=["batch_stats"])[0]

    yield compared(
        setting, f"MobileNetV2, {len(x)} images, gradients of a training step", trained, variables, x, gradient
    )


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of the squares, in parameters and images."""
    return jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2), (0, 1))


def compared(
    setting: Setting,
    title: str,
    fn: Callable[..., Any],
    params: Any,
    x: jax.Array,
    wrap: Wrap = lambda fn: fn,
    peers: dict[str, Callable[[], Call]] | None = None,
) -> Report:
    """Ours over JAX's own."""

    def ours(p: Any, x: jax.Array) -> jax.Array:
        return jc.quantize_function(fn, {})(p, None, x)

    makers: dict[str, Callable[[], Call]] = {n: partial(Compiled, wrap(fn), params, x) for n in (OWN, AGAIN)}
    makers |= {OURS: partial(Compiled, wrap(ours), params, x), **(peers or {})}
    ran = run_cases(makers, setting, inner=1, rounds=setting.pick(7, 2))
    return ran.report(title, [ran.speed(name, OWN) for name in makers if name != OWN], OWN)
