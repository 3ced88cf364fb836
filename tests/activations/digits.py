"""A small network that learns handwritten digits, by a quantized function that a test gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from sklearn.datasets import load_digits


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x)).reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


def learned(
    forward: Callable[..., jax.Array], observe: Callable[..., Any] = lambda params, images: None
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Five epochs of ``forward(params, observed, key, images)``; ``observe(params, images)`` begins each.

    Returns:
      The parameters, what was observed last, and images and labels that were held out.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    params, optimizer = Net().init(jax.random.key(1), images[:1]), optax.adam(3e-3)

    def loss(params, observed, key, x, y):
        logits = forward(params, observed, key, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def epoch(params, opt_state, observed, key):
        def step(state, at):
            params, opt_state = state
            grads = jax.grad(loss)(params, observed, jax.random.fold_in(key, at[0]), images[at], labels[at])
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        order = jax.random.permutation(key, 1400)[:1376].reshape(-1, 32)
        return lax.scan(step, (params, opt_state), order)[0]

    opt_state, observed = optimizer.init(params), None
    for i in range(5):
        observed = observe(params, images[:64])
        params, opt_state = epoch(params, opt_state, observed, jax.random.key(i))
    return params, observed, images[1400:], labels[1400:]
