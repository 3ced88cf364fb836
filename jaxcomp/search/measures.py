"""What a network loses by a change, read off its outputs: divergence of predictions, noise, a loss of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.paths import is_float_array
from jaxcomp.core.records import named
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import PyTree


@dataclass(frozen=True)
class Measure(Spec):
    """How far outputs are from those of the network as it was; smaller is better, and 0 where nothing changed.

    Args:
      name: for tables.
      of: ``of(outputs, reference, batch)`` to a batch's means, a few numbers; ``batch`` are the arguments behind the
        parameters.
      value: from the means over all batches to the measure.
    """

    name: str
    of: Callable[[PyTree, PyTree, tuple[PyTree, ...]], Sequence[jax.Array]]
    value: Callable[..., float]


def _first(x: float) -> float:
    return x


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return noise / signal if signal else math.inf


def _kl(outputs: PyTree, reference: PyTree, batch: tuple[PyTree, ...]) -> Sequence[jax.Array]:
    if not hasattr(reference, "shape") or not reference.ndim or not is_float_array(reference):
        raise ValueError(
            "kl: the outputs are no one array of logits; make fn give the logits alone, or take another measure."
        )
    was, now = (jax.nn.log_softmax(_wide(x), axis=-1) for x in (reference, outputs))
    return (jnp.mean(optax.losses.kl_divergence_with_log_targets(now, was)),)


def _noise(outputs: PyTree, reference: PyTree, batch: tuple[PyTree, ...]) -> Sequence[jax.Array]:
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(reference), strict=True)
    wide = [(_wide(a), _wide(b)) for a, b in pairs if is_float_array(b)]
    if not wide:
        raise ValueError("noise: the outputs hold no floating array; make fn give what is to stay as it was.")
    changes, squares = [jnp.mean((a - b) ** 2) for a, b in wide], [jnp.mean(b**2) for _, b in wide]
    return jnp.sum(jnp.stack(changes)), jnp.sum(jnp.stack(squares))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


kl = named("measures.kl", Measure("kl", _kl, _first))
"""``KL(softmax(reference) || softmax(outputs))`` over the last axis, a mean over all rows, in nats: no labels."""

noise = named("measures.noise", Measure("noise", _noise, _ratio))
"""The outputs' squared change over their squares: 1 over the signal to noise ratio. Of several arrays the sums."""


def change_of(loss: Callable[..., jax.Array], name: str = "loss") -> Measure:
    """How much a loss of the outputs grows; it may fall, and be negative.

    Args:
      loss: ``loss(outputs, *batch)``, a scalar, the mean over a batch's examples.
      name: for tables.

    >>> squared = change_of(lambda out, x, y: jnp.mean((out - y) ** 2))
    >>> squared.of(jnp.ones(2), jnp.zeros(2), (None, jnp.zeros(2)))
    (Array(1., dtype=float32),)
    """

    def of(outputs: PyTree, reference: PyTree, batch: tuple[PyTree, ...]) -> Sequence[jax.Array]:
        return (loss(outputs, *batch) - loss(reference, *batch),)

    return Measure(name, of, _first)


def decibels(noise: float) -> float:
    """The signal to quantization noise ratio (SQNR) in decibels, of what the measure ``noise`` gave.

    >>> decibels(0.01)
    20.0
    """
    return math.inf if noise == 0 else -10 * math.log10(noise)
