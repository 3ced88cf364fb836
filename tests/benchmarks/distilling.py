"""What a compressed sentence encoder still trains, taught by the float one on prose without labels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.distill import Match, distilled
from jaxcomp.quantization import Learned, Quantized

Batch = tuple[np.ndarray, np.ndarray]
Fn = Callable[..., jax.Array]


class Lesson(NamedTuple):
    """Batches of ids and masks, one a step and the last to judge, without padding; how fast; do all layers teach?"""

    batches: Sequence[Batch]
    rate: float
    inside: bool = True


def relative(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Squared error over the teacher's square."""
    return jnp.mean((student - teacher) ** 2) / jnp.mean(teacher**2)


def away(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """One less the cosine of the sentences' means over their tokens."""
    a, b = student.mean(1), teacher.mean(1)
    return 1 - jnp.mean(jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1))


def terms(layers: int) -> dict[str, Match]:
    """The states of all tokens, also those between so many layers, and the sentence's embedding."""
    inside = {f"layer {i}": Match(relative, at=f"layers/{i}/query/kernel:in", weight=0.5) for i in range(1, layers)}
    return {"tokens": Match(relative), "sentence": Match(away, weight=5.0), **inside}


def learning(params: Any) -> Any:
    """The tree with quantized leaves as learned ones, of the same values: weights, scales and offsets are trained."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        assert isinstance(leaf.grid, jc.Int)
        offset = None if leaf.zero_point is None else -leaf.zero_point * leaf.scale
        return Learned(jc.materialize(leaf), leaf.scale, offset, leaf.grid)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Quantized))


def taught(student: Fn, teacher: Fn, params: Any, known: Any, lesson: Lesson) -> Any:
    """``params`` of the student, its floats trained towards what the teacher gives with ``known``.

    Masks hold, and codes follow their weights; word tables stay.
    """
    said = distilled(student, teacher, terms(len(known["layers"]) if lesson.inside else 0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    every = [x for _, x in leaves]
    free = [
        i
        for i, (path, x) in enumerate(leaves)
        if jnp.issubdtype(x.dtype, jnp.floating) and getattr(path[-1], "key", "") not in ("word", "position", "type")
    ]
    *batches, last = lesson.batches
    steps = len(batches)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, lesson.rate, steps // 8, steps)),
    )

    def loss(values: list[jax.Array], known: Any, batch: Batch) -> jax.Array:
        whole = list(every)
        for i, value in zip(free, values, strict=True):
            whole[i] = value
        return said.loss(jax.tree.unflatten(tree, whole), known, *batch).loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(values: list[jax.Array], state: Any, known: Any, batch: Batch) -> Any:
        value, grads = jax.value_and_grad(loss)(values, known, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(values, updates), state, value

    values, shown = [jnp.array(every[i]) for i in free], jax.jit(loss)
    state = optimizer.init(values)
    for number, batch in enumerate(batches):
        if number % 20 == 0:
            held = float(shown(values, known, last))
            print(f"  step {number} of {steps}: loss {held:.4f} of a batch apart", file=sys.stderr, flush=True)
        values, state, _ = step(values, state, known, batch)
    for i, value in zip(free, values, strict=True):
        every[i] = value
    return jax.tree.unflatten(tree, every)
