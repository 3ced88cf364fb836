"""Statistics over many steps, for scores that need them: running sums and means beside a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.core.errors import count_known
from jaxcomp.core.gates import all_finite
from jaxcomp.core.paths import Where, leaves_with_paths, matrices, some_paths
from jaxcomp.core.records import named, recorded
from jaxcomp.core.slots import Slot, broadcasts, slots
from jaxcomp.core.specs import Spec, is_number
from jaxcomp.core.transform import Transform, checked_transform
from jaxcomp.core.types import Params, PyTree, State, Stats, Step
from jaxcomp.pruning.scores import Score


@dataclass(frozen=True)
class Running(Spec):
    """A statistic that is gathered step by step from the weights and their gradients.

    Args:
      name: under which scores ask for it.
      of: ``of(w, grads)`` to one step's share, elementwise, in float32.
      decay: None for the sum of all steps; else the weight of the past in a moving average, in [0, 1), corrected for
        its start from zero.

    Raises:
      ValueError: a decay outside [0, 1).
    """

    name: str
    of: Callable[[jax.Array, jax.Array], jax.Array]
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(f"Running: decay must be in [0, 1) or None, got {self.decay!r}.")


movement = named("statistics.movement", Running("movement", lambda w, grads: -w * grads))
"""The sum of ``-w ∂L/∂w``, for the score ``movement``."""

fisher = named("statistics.fisher", Running("fisher", lambda w, grads: grads * grads, decay=0.99))
"""A moving average of squared gradients, for the score ``fisher``: the diagonal Fisher information up to the square of
batch means (exact for batches of one)."""


class RunningState(NamedTuple):
    """How many steps were gathered, what they gave by path, and the state behind it."""

    gathered: jax.Array
    values: dict[str, jax.Array]
    inner: State


@recorded
def accumulate(transform: Transform, *statistics: Running, where: Where = matrices) -> Transform:
    """Hands ``transform`` statistics that it gathers from ``grads=`` at every update; all others pass through.

    Around a gate it gathers at every step, also while the gate sleeps:
    ``accumulate(gate(prune(0.5, score=movement), every(100)), statistics.movement)``. A step whose gradients are not
    all finite, which loss scaling skips, gives nothing; before the first other one the statistics are NaN.

    Args:
      transform: what needs them.
      statistics: what to gather, such as ``movement`` and ``fisher`` of this module.
      where: for which leaves.

    Raises:
      TypeError: no transform.
      ValueError: at ``init``, what :func:`~jaxcomp.core.slots.slots` raises; at ``update``, no ``grads=``, or none for
        a leaf.

    >>> from jaxcomp.pruning.transform import prune
    >>> from jaxcomp.pruning import scores
    >>> t = accumulate(prune(0.5, score=scores.movement), movement)
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> state = t.update(t.init(params), params, step=0, grads={"kernel": jnp.array([[1.0, -1.0]])})
    >>> t.apply(state, params)["kernel"].materialize().tolist()
    [[0.0, 2.0]]
    """
    checked_transform("accumulate", transform)

    def weights(params: Params) -> dict[str, jax.Array]:
        return {path: slot.array for path, slot in slots(params, where, "accumulate").items()}

    def init(params: Params) -> RunningState:
        found = weights(params)
        zeros = {f"{s.name}:{p}": jnp.zeros(w.shape, jnp.float32) for s in statistics for p, w in found.items()}
        return RunningState(jnp.zeros((), jnp.int32), zeros, transform.init(params))

    def update(state: RunningState, params: Params, *, step: Step, **stats: PyTree) -> RunningState:
        if stats.get("grads") is None:
            raise ValueError("accumulate: wants the gradients; call update(..., grads=tree).")
        grads = dict(leaves_with_paths(stats["grads"])[0])
        fine = jnp.asarray(all_finite(stats["grads"]))
        count = jnp.where(fine, optax.safe_increment(state.gathered), state.gathered)
        values = dict(state.values)
        made: dict[str, dict[str, jax.Array]] = {}
        for s in statistics:
            made[s.name] = {}
            for path, w in weights(params).items():
                if path not in grads:
                    raise ValueError(f"accumulate: grads has no entry for {path!r}, only {some_paths(grads)}.")
                new = s.of(w.astype(jnp.float32), grads[path].astype(jnp.float32))
                key = f"{s.name}:{path}"
                values[key] = jnp.where(fine, _next(values[key], new, s.decay), values[key])
                made[s.name][path] = _so_far(values[key], s.decay, count)
        inner = transform.update(state.inner, params, step=step, **{**stats, **made})
        return RunningState(count, values, inner)

    return Transform(init, update, lambda state, params: transform.apply(state.inner, params))


def for_score(
    name: str, score: Score, stats: Stats, *, selected: Mapping[str, Slot], owner: str, hint: str = ""
) -> dict[str, jax.Array]:
    """The statistic that a score needs, by slot path: of the slot's shape, or 1 along some axes.

    Args:
      name: of the statistic.
      score: who needs it.
      stats: what ``update`` was given.
      selected: the slots, by path.
      owner: the transform's name, for messages.
      hint: where such a statistic comes from, for messages; by default the score's maker.

    Raises:
      ValueError: it is missing, lacks a path, or does not fit there.
    """
    maker = hint or (f" It is made by {score.maker}." if score.maker else "")
    if stats.get(name) is None:
        raise ValueError(
            f"{owner}: score {score.name!r} needs the statistic {name!r}; call update(..., {name}=tree).{maker}"
        )
    leaves = dict(leaves_with_paths(stats[name])[0])
    for path, slot in selected.items():
        wanted = tuple(slot.array.shape)
        if path not in leaves:
            raise ValueError(
                f"{owner}: the statistic {name!r} has no entry for {path!r}, only {some_paths(leaves)}; it wants a tree"
                f" like the parameters, and {owner} before what factors them.{maker}"
            )
        if not broadcasts(tuple(leaves[path].shape), wanted):
            raise ValueError(
                f"{owner}: the statistic {name!r} has shape {leaves[path].shape} at {path!r}, wanted {wanted}"
                " or 1 along some axes."
            )
    return {path: leaves[path] for path in selected}


def check_any_finite(
    fine: jax.Array | np.bool_, needed: Mapping[str, Mapping[str, jax.Array]], masks: Mapping[str, jax.Array]
) -> None:
    """Checks what an update outside jit, whose statistics are not finite, leaves behind.

    Args:
      fine: whether they are.
      needed: statistics by name, each by path.
      masks: those before.

    Raises:
      ValueError: nothing is masked yet, so no update before had statistics that say what to mask.
    """
    if isinstance(fine, jax.core.Tracer) or fine or any(count_known(jnp.logical_not, m) for m in masks.values()):
        return
    bad = {(name, p): count_known(lambda x: ~jnp.isfinite(x), x) for name, by in needed.items() for p, x in by.items()}
    name, path = next((place for place, count in bad.items() if count), next(iter(bad)))
    raise ValueError(
        f"prune: the statistic {name!r} has {bad[name, path]} values that are not finite at {path!r}, and nothing is"
        " masked yet; give an update that is finite first, or leave update out where the training step is skipped."
    )


def _next(old: jax.Array, new: jax.Array, decay: float | None) -> jax.Array:
    if decay is None:
        return old + _rounded(new)
    return _rounded(old * decay) + _rounded(new * (1 - decay))


def _rounded(product: jax.Array) -> jax.Array:
    """A clip that changes no finite value keeps a product and a sum two roundings, in jit as in eager."""
    most = float(jnp.finfo(jnp.float32).max)
    return jnp.clip(product, -most, most)


def _so_far(value: jax.Array, decay: float | None, count: jax.Array) -> jax.Array:
    """The statistic of all steps so far, whose weights together are ``1 - decay**count``; NaN where there are none."""
    if decay is not None:
        value = value / (1 - jnp.float32(decay) ** count.astype(jnp.float32))
    return jnp.where(count > 0, value, jnp.full_like(value, jnp.nan))
