"""Update compression inside an optax chain: what the optimizer sees is what came over the wire."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.gates import all_finite
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Params, PyTree, State
from jaxcomp.federated.base import Compressor, Update, combine_stacked, kept_unless


class CompressState(NamedTuple):
    """What :func:`compress_updates` keeps: the step, its key, and the compressor's state."""

    step: jax.Array
    key: jax.Array
    inner: State


def compress_updates(
    compressor: Compressor, *, key: jax.Array, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates by what is decoded of their message; with an axis, of all messages along it combined.

    Without an axis it shows what compression does to one process's training (put it before the optimizer). With one,
    inside ``shard_map``, ``pmap`` or ``vmap``, each device encodes its own gradients, the messages (packed bytes, not
    gradients) are gathered, and every device decodes the same mean: gradient compression of data-parallel training.
    Where what is decoded is not finite, which a loop skips, what the compressor remembers stays as it was, on all
    devices. With ``optax.MultiSteps`` outside it sends once for k micro-steps, inside at each.

    Args:
      compressor: what.
      key: the randomness of all steps, the same on all devices; each step and device draws from its own part.
      axis_name: the axis of the devices.

    >>> from jaxcomp.federated import error_feedback, topk
    >>> tx = optax.chain(compress_updates(error_feedback(topk(0.5)), key=jax.random.key(0)), optax.sgd(1.0))
    >>> params = {"w": jnp.array([0.0, 0.0])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([3.0, 2.0])}, state)
    >>> updates["w"]
    Array([-3., -0.], dtype=float32)
    >>> tx.update({"w": jnp.array([3.0, 2.0])}, state)[0]["w"]
    Array([-0., -4.], dtype=float32)
    """

    def init(params: Params) -> CompressState:
        own = jax.random.clone(key)  # a step may donate its state
        return CompressState(jnp.zeros((), jnp.int32), own, compressor.init(params))

    def update(
        updates: Update, state: CompressState, params: Params | None = None, **extra: PyTree
    ) -> tuple[Update, CompressState]:
        shared = jax.random.fold_in(state.key, state.step)
        own = shared if axis_name is None else jax.random.fold_in(shared, jax.lax.axis_index(axis_name))
        message, inner = compressor.encode(state.inner, updates, key=jax.random.fold_in(own, 1), shared=shared)
        if axis_name is not None:
            message = combine_stacked(jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name), message))
        decoded = compressor.decode(message)
        return decoded, CompressState(state.step + 1, state.key, kept_unless(all_finite(decoded), inner, state.inner))

    return optax.GradientTransformationExtraArgs(on_any_mesh(init), on_any_mesh(update))
