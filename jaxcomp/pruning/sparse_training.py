"""Sparse training: a fixed number of active weights, some of which are dropped and as many grown at each update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.bits import order_keys
from jaxcomp.core.gates import all_finite, cond, every, when
from jaxcomp.core.optimizers import MaskState
from jaxcomp.core.paths import Where, key_of_leaf, matrices
from jaxcomp.core.records import recorded
from jaxcomp.core.slots import Slot, check_finite, replace_slots, slots, state_of
from jaxcomp.core.specs import check_key, is_integer, is_number
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Key, Params, PyTree, Stats, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.pruning.active import Sparsity, active_counts, checked_sparsity
from jaxcomp.pruning.masks.growth import drop_and_grow, first_mask, random_order
from jaxcomp.pruning.masks.thresholds import fraction_of
from jaxcomp.pruning.notices import of_moves
from jaxcomp.pruning.scores import Score, magnitude, sensitivity
from jaxcomp.pruning.statistics import for_score

Fraction = float | Callable[[Step], float | jax.Array]
DENSE = " Gradients are those of dense_value_and_grad."


@recorded
def regrow(
    sparsity: Sparsity,
    *,
    key: Key | None = None,
    grow: Score | None = None,
    drop: Score = magnitude,
    fraction: Fraction = 0.3,
    initial: Score | None = None,
    where: Where = matrices,
) -> Transform:
    """Masks all but a fixed number of weights; at every update the weakest active ones give way to as many others.

    Of a leaf of n weights exactly ``k = max(1, n - round(sparsity * n))`` are active, always. An ``update`` drops
    the ``round(fraction(step) * k)`` active weights of lowest ``drop`` score, then activates as many of highest
    ``grow`` score among all that are inactive after the drop; one that comes back in the same update has never left.
    ``apply`` makes a ``Masked`` leaf, so no gradient reaches an inactive weight. The masks move every 100 steps with
    ``when(regrow(...), every(100))``, and never with ``when(regrow(...), never)``, which is static sparse training.
    An update whose statistics are not all finite, as those of a step that loss scaling skips, moves nothing.

    Two things belong into the training step, for ``update`` sees neither the loss nor the optimizer:
    :func:`~jaxcomp.core.optimizers.dense_value_and_grad` gives the gradient of inactive weights too, by which
    :func:`rigl` grows, and :func:`~jaxcomp.core.optimizers.reset_regrown` starts what was grown at zero. ``wrap_optax``
    does both by itself.

    Args:
      sparsity: the inactive fraction, in [0, 1), of every selected leaf; or a table of such fractions by rule, first
        match wins (as ERK's by path), where a selected leaf that no rule matches stays dense.
      key: a scalar key, for what is drawn: the first masks, the growth. A draw depends on the key, the leaf's path and
        the step, so one key serves any number of leaves and is not used up.
      grow: whose highest are grown, such as ``sensitivity``; None grows at random.
      drop: whose lowest are dropped.
      fraction: of the active weights, in [0, 1]: a number, or a schedule of the step.
      initial: whose highest are active at first, such as ``magnitude``; None draws them.
      where: which leaves.

    Raises:
      ValueError: a sparsity or fraction out of range; no key where something is drawn; at ``init``, what
        :func:`~jaxcomp.core.slots.slots` raises, a rule that matches nothing, a leaf that is masked already; at
        ``update``, a statistic that is missing or does not fit and, outside jit, gradients that are all zero where
        masks are.

    A training step, by RigL:

    >>> import optax
    >>> from jaxcomp import materialize
    >>> from jaxcomp.core import dense_value_and_grad, reset_regrown
    >>> compress = rigl(0.5, key=jax.random.key(0), period=2, stop=8)
    >>> tx = optax.sgd(0.1, momentum=0.9)
    >>> def loss(weights, x, y):
    ...     return jnp.mean((x @ weights["kernel"] - y) ** 2)
    >>> def train_step(step, params, opt_state, state, x, y):
    ...     value, grads, dense = dense_value_and_grad(compress, loss)(state, params, x, y)
    ...     updates, opt_state = tx.update(grads, opt_state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     new = compress.update(state, params, step=step, grads=dense)
    ...     params, opt_state = reset_regrown(state, new, params, opt_state)
    ...     return params, opt_state, new, value
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> opt_state, state = tx.init(params), compress.init(params)
    >>> x, y = jax.random.normal(jax.random.key(1), (16, 4)), jnp.zeros((16, 2))
    >>> for step in range(3):
    ...     params, opt_state, state, value = jax.jit(train_step)(step, params, opt_state, state, x, y)
    >>> int((materialize(compress.apply(state, params))["kernel"] != 0).sum()) <= 4
    True

    Source: Mocanu et al. 2018, arXiv:1707.04780 (SET); Evci et al. 2019, arXiv:1911.11134 (RigL). SET drops of positive
    and of negative weights those next to zero, by themselves; here, as in RigL, all go by magnitude together. RigL
    skips the gradient step where masks move; here both happen.
    """
    sparsity = checked_sparsity(sparsity)
    moves = _Moves(_checked_draw(key, initial, grow), initial, drop, grow, _checked_fraction(fraction))
    needed = {name: score for score in (drop, grow) if score is not None for name in score.needs}

    def selected(params: Params) -> tuple[dict[str, Slot], dict[str, int]]:
        found = slots(params, where, "regrow")
        active = active_counts(found, sparsity)
        return {path: found[path] for path in active}, active

    def init(params: Params) -> MaskState:
        found, active = selected(params)
        check_finite(found, "regrow")
        if not callable(fraction):
            of_moves(active, fraction)
        return MaskState({path: first_mask(moves.first(slot), active[path]) for path, slot in found.items()})

    def update(state: MaskState, params: Params, *, step: Step, **stats: PyTree) -> MaskState:
        found, _ = selected(params)
        asked = partial(for_score, stats=stats, selected=found, owner="regrow", hint=DENSE)
        leaves = {name: asked(name, score) for name, score in needed.items()}
        old = {path: state_of(state.masks, path, "regrow") for path in found}
        fine = all_finite([stats[name] for name in needed])
        return MaskState(cond(fine, lambda: moves.all_moved(found, old, jnp.asarray(step), leaves), lambda: old))

    def apply(state: MaskState, params: Params) -> Params:
        found, _ = selected(params)
        new = {path: _masked(slot, state_of(state.masks, path, "regrow")) for path, slot in found.items()}
        return replace_slots(params, new)

    return Transform(init, update, apply)


@recorded
def rigl(
    sparsity: Sparsity, *, key: Key, period: int, stop: int, fraction: float = 0.3, where: Where = matrices
) -> Transform:
    """Grows where the gradient is largest, from random masks, by a share that falls as a cosine to zero at ``stop``.

    Its ``update`` wants ``grads=`` of the materialized weights: see
    :func:`~jaxcomp.core.optimizers.dense_value_and_grad`.

    Args:
      sparsity: a fraction, or a distribution such as ``ERK``, as in :func:`regrow`.
      key: of the first masks.
      period: steps between two moves.
      stop: the step from which on masks stay.
      fraction: of the active weights that move, at first.
      where: which leaves.

    Raises:
      ValueError: a stop that is no later than the first move, a fraction outside [0, 1], or as of :func:`regrow`.

    >>> rigl(0.9, key=jax.random.key(0), period=100, stop=7500).init({"w": jnp.ones((8, 5))}).masks["w"].sum()
    Array(4, dtype=int32)

    Source: Evci et al. 2019, arXiv:1911.11134.
    """
    if not is_integer(stop) or stop < 1:
        raise ValueError(f"rigl: stop must be a positive integer, the step at which it ends, got {stop!r}.")
    if is_integer(period) and stop <= period:
        raise ValueError(
            f"rigl: masks move first at step {period}, the period, and no more from stop={stop} on, so they never"
            " would; take a later stop, or when(regrow(...), never) for masks that stay."
        )
    cosine = optax.cosine_decay_schedule(_checked_share("rigl", fraction, "a number in [0, 1]"), stop)

    def share(step: Step) -> jax.Array:
        return cosine(jnp.asarray(step, jnp.float32))  # which divides the step by ``stop``

    moved = regrow(sparsity, key=key, grow=sensitivity, fraction=share, where=where)
    return when(moved, every(period, start=period, stop=stop))


@recorded
def sparse_evolution(
    sparsity: Sparsity,
    *,
    key: Key,
    period: int,
    stop: int | None = None,
    fraction: Fraction = 0.3,
    where: Where = matrices,
) -> Transform:
    """Grows at random, from random masks (SET).

    Args:
      sparsity, key, period, where: as in :func:`rigl`.
      stop: the step from which on masks stay; None is never.
      fraction: of the active weights that move: a number, or a function of the step.

    >>> sparse_evolution(0.9, key=jax.random.key(0), period=100).init({"w": jnp.ones((8, 5))}).masks["w"].sum()
    Array(4, dtype=int32)

    Source: Mocanu et al. 2018, arXiv:1707.04780.
    """
    return when(regrow(sparsity, key=key, fraction=fraction, where=where), every(period, start=period, stop=stop))


@dataclass(frozen=True)
class _Moves:
    """What is active at first, dropped and grown of one leaf; ``key`` is None where nothing is drawn."""

    key: Key | None
    initial: Score | None
    drop: Score
    grow: Score | None
    fraction: Fraction

    def first(self, slot: Slot) -> jax.Array:
        """The order of the leaf's weights, of which the first ones are active at ``init``."""
        return self.drawn(slot) if self.initial is None else ~order_keys(self.initial.fn(slot.array))

    def all_moved(
        self, found: Mapping[str, Slot], old: Mapping[str, jax.Array], step: jax.Array, stats: Stats
    ) -> dict[str, jax.Array]:
        """The masks after an update, by path, of statistics by name and path."""
        masks = {}
        for path, slot in found.items():
            own = {name: by_path[path] for name, by_path in stats.items()}
            masks[path] = self.moved(slot, old[path], step, own)
        return masks

    def moved(self, slot: Slot, mask: jax.Array, step: jax.Array, stats: Mapping[str, jax.Array]) -> jax.Array:
        """The leaf's mask after an update."""
        share = _clipped(self.fraction(step)) if callable(self.fraction) else float(self.fraction)
        count = fraction_of(jnp.sum(mask, dtype=jnp.uint32), share)
        drop_order = order_keys(_scores(self.drop, slot.array, stats))
        if self.grow is None:
            grow_order = self.drawn(slot, step)
        else:
            _check_dense(slot.path, mask, {name: stats[name] for name in self.grow.needs})
            grow_order = ~order_keys(_scores(self.grow, slot.array, stats))
        return drop_and_grow(mask, drop_order, grow_order, count)

    def drawn(self, slot: Slot, step: jax.Array | None = None) -> jax.Array:
        """A random order of the leaf's own, for its first mask or for a step, whatever other leaves there are."""
        first, later = jax.random.split(key_of_leaf(cast(Key, self.key), slot.path))
        return random_order(first if step is None else jax.random.fold_in(later, step), slot.array.shape)


def _checked_draw(key: Key | None, initial: Score | None, grow: Score | None) -> Key | None:
    if initial is not None and initial.needs:
        raise ValueError(f"regrow: initial score {initial.name!r} needs {initial.needs[0]!r}; init has no statistics.")
    if initial is not None and grow is not None:
        return None
    if key is None:
        raise ValueError("regrow: first masks and growth are drawn, which wants a key: key=jax.random.key(0).")
    check_key("regrow", key)
    return key


def _checked_fraction(fraction: Fraction) -> Fraction:
    return fraction if callable(fraction) else _checked_share("regrow", fraction, "a number in [0, 1] or a schedule")


def _checked_share(owner: str, share: object, wanted: str) -> float:
    if is_number(share) and 0 <= share <= 1:
        return float(share)
    raise ValueError(f"{owner}: fraction must be {wanted}, got {share!r}.")


def _masked(slot: Slot, mask: jax.Array) -> Masked:
    return Masked(jnp.where(mask, slot.array, jnp.zeros((), slot.array.dtype)), mask)


def _clipped(share: float | jax.Array) -> jax.Array:
    return jnp.clip(jnp.asarray(share, jnp.float32), 0.0, 1.0)


def _scores(score: Score, w: jax.Array, stats: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.broadcast_to(score.fn(w, **{name: stats[name] for name in score.needs}), w.shape)


def _check_dense(path: str, mask: jax.Array, stats: Mapping[str, jax.Array]) -> None:
    """Outside jit: gradients that a mask has cut say nothing about what to grow."""
    for name, g in stats.items():
        if any(isinstance(x, jax.core.Tracer) for x in (mask, g)) or bool(jnp.all(mask)):
            continue
        if not bool(jnp.any((g != 0) & ~mask)):
            raise ValueError(
                f"regrow: {name!r} is zero wherever {path!r} is masked, so growth would be blind; pass the gradient of"
                " the materialized weights, the third that dense_value_and_grad gives."
            )
