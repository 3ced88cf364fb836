"""Training all widths at once: the sandwich rule, the widest teaching the others."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.specs import check_key, is_integer
from jaxcomp.core.types import Key, Leaf, Params, PyTree
from jaxcomp.distill.losses import soft_targets
from jaxcomp.search.supernet.widths import Supernet
from jaxcomp.trace.walk import Fn

Step = Callable[..., tuple[jax.Array, Params]]
"""``step(params, key, *batch) -> (losses, gradients)``."""


def sandwich(
    net: Supernet,
    fn: Fn,
    loss: Callable[..., jax.Array],
    *,
    random: int = 2,
    distill: Callable[[PyTree, PyTree], jax.Array] = soft_targets,
    inputs: int = 1,
) -> Step:
    """The gradients of a step that trains all widths: the widest by the loss, the others by what the widest says.

    ``step(params, key, *batch)`` gives the losses, of the widest, the narrowest and the random widths, in this order,
    and the sum of their gradients, for any optimizer. Called as it is, it runs two compiled programs, the second for
    each width in turn, so that it takes the memory of one width; in ``jit`` all widths become one program.

    Args:
      net: the widths.
      fn: ``fn(params, *inputs)``: the outputs as in training. Of batch norm these are made with the batch's statistics;
        running ones fit no width and are made anew by ``recalibrated``.
      loss: ``loss(outputs, *batch)`` of the widest: by labels, or by a teacher's outputs that the batch holds.
      random: how many random widths a step has.
      distill: ``distill(outputs, of_the_widest)`` of the others; no gradient goes through the second.
      inputs: how many of a batch's first entries the function takes.

    Raises:
      ValueError: fewer than no random width, or inputs; when called, a key that is not one, or a batch too short.

    >>> import optax
    >>> from jaxcomp.search import slimmable
    >>> from jaxcomp.structure import channel_groups
    >>> def mlp(p, x):
    ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> x, labels = jnp.ones((4, 3)), jnp.array([0, 1, 0, 0])
    >>> net = slimmable(channel_groups(mlp)(params, x), params)
    >>> def loss(logits, x, labels):
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    >>> step, tx = sandwich(net, mlp, loss), optax.sgd(1e-2)
    >>> losses, gradients = step(params, jax.random.key(0), x, labels)
    >>> updates, state = tx.update(gradients, tx.init(params))
    >>> losses.shape, optax.apply_updates(params, updates)["up"].shape
    ((4,), (3, 8))

    Source: Yu and Huang 2019 (US-Nets), arXiv:1903.05134, algorithm 1. Deviations: each group has a width of its own,
    drawn as ``Supernet.drawn`` says.
    """
    if not is_integer(random) or random < 0 or not is_integer(inputs) or inputs < 1:
        raise ValueError(
            f"sandwich: random must be an integer, 0 or more, and inputs 1 or more, got {random!r}, {inputs!r}."
        )

    widest, narrower = _by_the_loss(fn, loss, inputs), _by_the_widest(net, fn, distill)

    @jax.jit
    def widths(key: Key) -> list[jax.Array]:
        return [jnp.asarray(net.narrowest), *(net.drawn(k) for k in jax.random.split(key, random))]

    def step(params: Params, key: Key, *batch: PyTree) -> tuple[jax.Array, Params]:
        check_key("sandwich", key)
        if len(batch) < inputs:
            raise ValueError(f"sandwich: a batch of {len(batch)} entries has no {inputs} inputs of the function.")
        (first, outputs), gradients = widest(params, batch)
        losses = [first]
        for counts in widths(key):
            value, more = narrower(params, counts, outputs, batch[:inputs])
            losses.append(value)
            gradients = jax.tree.map(_sum, gradients, more)
        return jnp.stack(losses), gradients

    return step


def _by_the_loss(fn: Fn, loss: Callable[..., jax.Array], inputs: int) -> Callable[..., PyTree]:
    """The loss and the outputs at full width, and the gradients."""

    @jax.jit
    def widest(params: Params, batch: tuple[PyTree, ...]) -> PyTree:
        def told(params: Params) -> tuple[jax.Array, PyTree]:
            outputs = fn(params, *batch[:inputs])
            return loss(outputs, *batch), outputs

        return jax.value_and_grad(told, has_aux=True, allow_int=True)(params)

    return widest


def _by_the_widest(net: Supernet, fn: Fn, distill: Callable[[PyTree, PyTree], jax.Array]) -> Callable[..., PyTree]:
    """The distance from given outputs at any widths, and the gradients."""

    @jax.jit
    def narrower(params: Params, counts: jax.Array, wanted: PyTree, given: tuple[PyTree, ...]) -> PyTree:
        def taught(params: Params) -> jax.Array:
            return distill(fn(net.masked(params, counts), *given), jax.lax.stop_gradient(wanted))

        return jax.value_and_grad(taught, allow_int=True)(params)

    return narrower


def _sum(a: Leaf, b: Leaf) -> Leaf:
    """Of two gradients; those of integers are none, and stay so."""
    return a if isinstance(a, np.ndarray) or a.dtype == jax.dtypes.float0 else a + b
