"""The transformer of ``growth`` rounded by hand, with nothing that is not needed: what rounding costs a compiler.

Weights in 8 bits with a scale a column, operands of all ten products in 8 bits by ranges that are given, gradients
straight through where nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PRODUCTS = 10
"""Operands that are rounded beside weights, in their order: three inputs, four of attention, three more inputs."""


@jax.custom_vjp
def act(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """An activation rounded to integers from ``-zero`` to ``255 - zero``, times the scale."""
    return jnp.round(jnp.clip(x / scale, -zero, 255 - zero)) * scale


def _forward(x: jax.Array, scale: jax.Array, zero: jax.Array) -> Any:
    return act(x, scale, zero), (x, scale, zero)


def _backward(kept: Any, g: jax.Array) -> Any:
    x, scale, zero = kept
    return jnp.where((x >= (-0.5 - zero) * scale) & (x <= (255.5 - zero) * scale), g, 0), None, None


act.defvjp(_forward, _backward)


@jax.custom_vjp
def weight(w: jax.Array) -> jax.Array:
    """A kernel on 8 bits, a scale a column."""
    scale = jnp.max(jnp.abs(w), 0, keepdims=True) / 127
    return jnp.round(w / scale) * scale


weight.defvjp(lambda w: (weight(w), None), lambda _, g: (g,))


def block(p: Any, ranges: jax.Array, h: jax.Array) -> jax.Array:
    """``growth.block`` with its operands rounded; ``ranges`` are ten scales and ten zero points."""
    a = lambda x, i: act(x, ranges[i], ranges[PRODUCTS + i])  # noqa: E731
    w = lambda *names: weight(p[names[0]][names[1]]["kernel"] if names[1:] else p[names[0]]["kernel"])  # noqa: E731
    n = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    q, k, v = (a(n, i) @ w("attn", x) for i, x in enumerate("qkv"))
    seen = jax.nn.softmax(a(q, 3) @ a(k, 4).swapaxes(-1, -2) * h.shape[-1] ** -0.5, -1)
    h = h + a(a(seen, 5) @ a(v, 6), 7) @ w("attn", "o")
    return h + a(jax.nn.gelu(a(h, 8) @ w("up")), 9) @ w("down")


def scanned(layers: int) -> tuple[Callable[..., jax.Array], jax.ShapeDtypeStruct]:
    """The network of stacked layers, of parameters, ranges and an input; and the ranges' shape."""

    def run(p: Any, ranges: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, given: (block(*given, h), None), x, (p["layers"], ranges))[0]

    return run, jax.ShapeDtypeStruct((layers, 2 * PRODUCTS), jnp.float32)
