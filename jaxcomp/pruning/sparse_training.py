"""Dynamic sparse training: a fixed number of active weights, some of which are dropped and grown while it trains."""

from __future__ import annotations

import numbers
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.bits import order_keys
from jaxcomp.core.gates import Due, cond, every
from jaxcomp.core.leaves import Masked, is_compressed, unpacked
from jaxcomp.core.optimizers import MaskState
from jaxcomp.core.paths import Where, describe, leaves_with_paths, matches, matrices, some_paths
from jaxcomp.core.slots import Slot, check_finite, rewrite, slots, state_of
from jaxcomp.core.specs import check_key, is_integer
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, State
from jaxcomp.pruning.masks.growth import drop_and_grow, first_mask, random_order
from jaxcomp.pruning.masks.thresholds import MAX_COUNT, fraction_of
from jaxcomp.pruning.scores import Score, magnitude, sensitivity
from jaxcomp.pruning.statistics import for_score

Fraction = float | Callable[[Any], Any]
Sparsity = float | Mapping[Where, float]
DENSE = " Gradients are those of dense_value_and_grad."


def regrow(
    sparsity: Sparsity,
    *,
    key: jax.Array | None = None,
    grow: Score | None = None,
    drop: Score = magnitude,
    fraction: Fraction = 0.3,
    due: Due | None = None,
    initial: Score | None = None,
    where: Where = matrices,
) -> Transform:
    """Masks all but a fixed number of weights; at due steps the weakest active ones give way to as many others.

    Of a leaf of n weights exactly ``k = max(1, n - round(sparsity * n))`` are active, always. A due ``update`` drops
    the ``round(fraction(step) * k)`` active weights of lowest ``drop`` score, then activates as many of highest
    ``grow`` score among all that are inactive after the drop; one that comes back in the same update has never left.
    Between due steps nothing is computed. ``apply`` makes a ``Masked`` leaf, so no gradient reaches an inactive weight.

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
      due: when, such as ``every(100, start=100, stop=7500)``; None never, which is static sparse training.
      initial: whose highest are active at first, such as ``magnitude``; None draws them.
      where: which leaves.

    Raises:
      ValueError: a sparsity or fraction out of range; no key where something is drawn; at ``init``, what
        :func:`~jaxcomp.core.slots.slots` raises, a rule that matches nothing, a leaf that is masked already; at
        ``update``, a statistic that is missing or does not fit and, outside jit, gradients that are all zero where
        masks are.

    A training step, by RigL:

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
    table = _checked_table(sparsity)
    _check_fraction(fraction)
    if initial is None or (grow is None and due is not None):
        _check_key(key)
    if initial is not None and initial.needs:
        raise ValueError(f"regrow: initial score {initial.name!r} needs {initial.needs[0]!r}; init has no statistics.")
    needed = {name: score for score in (drop, grow) if score is not None for name in score.needs}

    def selected(params: Params) -> tuple[dict[str, Slot], dict[str, int]]:
        found = slots(params, where, "regrow")
        active = _active(found, table)
        return {path: found[path] for path in active}, active

    def init(params: Params) -> State:
        found, active = selected(params)
        check_finite(found, "regrow")
        masks = {}
        for path, slot in found.items():
            w = slot.array
            order = _drawn(key, path, w.shape) if initial is None else ~order_keys(initial.fn(w))
            masks[path] = first_mask(order, active[path])
        return MaskState(masks)

    def moved(state: MaskState, found: dict[str, Slot], step: jax.Array, stats: dict[str, dict[str, Any]]) -> State:
        share = _clipped(fraction(step)) if callable(fraction) else float(fraction)
        masks = {}
        for path, mask in state.masks.items():
            w, own = found[path].array, {name: leaves[path] for name, leaves in stats.items()}
            count = fraction_of(jnp.sum(mask, dtype=jnp.uint32), share)
            drop_order = order_keys(_scores(drop, w, own))
            if grow is None:
                grow_order = _drawn(key, path, w.shape, step)
            else:
                _check_dense(path, mask, {name: own[name] for name in grow.needs})
                grow_order = ~order_keys(_scores(grow, w, own))
            masks[path] = drop_and_grow(mask, drop_order, grow_order, count)
        return MaskState(masks)

    def update(state: MaskState, params: Params, *, step: Any, **stats: Any) -> State:
        if due is None:
            return state
        found, _ = selected(params)
        leaves = {name: for_score(name, score, stats, found, "regrow", DENSE) for name, score in needed.items()}
        now = jnp.asarray(step)
        return cond(due(now), lambda: moved(state, found, now, leaves), lambda: state)

    def apply(state: MaskState, params: Params) -> Params:
        new = {}
        for path, slot in selected(params)[0].items():
            x, mask = slot.array, state_of(state.masks, path, "regrow")
            new[path] = Masked(jnp.where(mask, x, jnp.zeros((), x.dtype)), mask)
        return rewrite(params, new)

    return Transform(init, update, apply)


def rigl(
    sparsity: Sparsity, *, key: jax.Array, period: int, stop: int, fraction: float = 0.3, where: Where = matrices
) -> Transform:
    """Grows where the gradient is largest, from random masks, by a share that falls as a cosine to zero at ``stop``.

    Its ``update`` wants ``grads=`` of the materialized weights: see
    :func:`~jaxcomp.core.optimizers.dense_value_and_grad`.

    >>> rigl(0.9, key=jax.random.key(0), period=100, stop=7500).init({"w": jnp.ones((8, 5))}).masks["w"].sum()
    Array(4, dtype=int32)

    Source: Evci et al. 2019, arXiv:1911.11134.
    """
    _check_fraction(fraction)
    if not is_integer(stop) or stop < 1:
        raise ValueError(f"rigl: stop must be a positive integer, the step at which it ends, got {stop!r}.")
    cosine = optax.cosine_decay_schedule(fraction, stop)
    due = every(period, start=period, stop=stop)

    def share(step: Any) -> Any:
        return cosine(jnp.asarray(step, jnp.float32))  # which divides the step by ``stop``

    return regrow(sparsity, key=key, grow=sensitivity, fraction=share, due=due, where=where)


def sparse_evolution(
    sparsity: Sparsity,
    *,
    key: jax.Array,
    period: int,
    stop: int | None = None,
    fraction: Fraction = 0.3,
    where: Where = matrices,
) -> Transform:
    """Grows at random, from random masks (SET).

    >>> sparse_evolution(0.9, key=jax.random.key(0), period=100).init({"w": jnp.ones((8, 5))}).masks["w"].sum()
    Array(4, dtype=int32)

    Source: Mocanu et al. 2018, arXiv:1707.04780.
    """
    return regrow(sparsity, key=key, fraction=fraction, due=every(period, start=period, stop=stop), where=where)


class FromZero(NamedTuple):
    """What is unmasked, and the state behind it."""

    masks: MaskState
    inner: State


def from_zero(transform: Transform) -> Transform:
    """What an update of ``transform`` unmasks starts at zero, without moments, instead of from where it was masked.

    It keeps the masks that ``transform`` puts on whole parameters; :func:`~jaxcomp.core.optimizers.reset_regrown` after
    each ``update``, or ``wrap_optax``, does the rest.

    Args:
      transform: one that masks and may unmask, such as a pruning plan or a chain with one.

    Raises:
      ValueError: at ``init``, it masks no parameter.

    AC/DC, whose dense phases go on from the sparse weights:

    >>> from jaxcomp.pruning.transform import prune
    >>> from jaxcomp.pruning.schedules import alternating
    >>> from jaxcomp.core.optimizers import wrap_optax
    >>> plan = alternating(0.5, dense=1, sparse=1)
    >>> tx = wrap_optax(optax.sgd(0.1), from_zero(plan.gate(prune(plan))))
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> state, seen = tx.init(params), []
    >>> for step in range(4):
    ...     updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     seen += params["kernel"].tolist()
    >>> seen
    [[1.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]

    Source: Peste et al. 2021 (AC/DC), arXiv:2106.12379, section 3.
    """

    def seen(inner: State, params: Params) -> FromZero:
        named, _ = leaves_with_paths(transform.apply(inner, params), is_leaf=is_compressed)
        masks = {p: jnp.broadcast_to(unpacked(x.mask), x.shape) for p, x in named if isinstance(x, Masked)}
        return FromZero(MaskState(masks), inner)

    def init(params: Params) -> State:
        state = seen(transform.init(params), params)
        if not state.masks.masks:
            raise ValueError("from_zero: the transform masks no parameter; give it a prune, or a chain with one.")
        return state

    def update(state: FromZero, params: Params, *, step: Any, **stats: Any) -> State:
        return seen(transform.update(state.inner, params, step=step, **stats), params)

    return Transform(init, update, lambda state, params: transform.apply(state.inner, params))


def _checked_table(sparsity: Any) -> float | dict[Where, float]:
    """The sparsity, or the table of them, in range."""
    if isinstance(sparsity, Mapping):
        return {rule: float(_checked_sparsity(s)) for rule, s in sparsity.items()}
    return float(_checked_sparsity(sparsity))


def _checked_sparsity(s: Any) -> Any:
    if not isinstance(s, numbers.Real) or isinstance(s, bool) or not 0 <= float(s) < 1:
        raise ValueError(f"regrow: sparsity must be a number in [0, 1), or a table of such by rule, got {s!r}.")
    return s


def _check_fraction(fraction: Any) -> None:
    if callable(fraction):
        return
    if not isinstance(fraction, numbers.Real) or isinstance(fraction, bool) or not 0 <= float(fraction) <= 1:
        raise ValueError(f"regrow: fraction must be a number in [0, 1] or a schedule, got {fraction!r}.")


def _check_key(key: Any) -> None:
    if key is None:
        raise ValueError("regrow: first masks and growth are drawn, which wants a key: key=jax.random.key(0).")
    check_key("regrow", key)


def _drawn(key: Any, path: str, shape: tuple[int, ...], step: jax.Array | None = None) -> jax.Array:
    """A random order of a leaf's own, for its first mask or for a step, whatever other leaves there are."""
    first, later = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())))
    return random_order(first if step is None else jax.random.fold_in(later, step), shape)


def _active(found: Mapping[str, Slot], table: float | dict[Where, float]) -> dict[str, int]:
    """How many weights of each leaf are active; leaves that a table does not name are left out."""
    shares = dict.fromkeys(found, table) if isinstance(table, float) else _looked_up(found, table)
    active = {}
    for path, share in shares.items():
        size = found[path].array.size
        if found[path].mask is not None:
            raise ValueError(
                f"regrow: {path!r} is masked already; put regrow before prune, or leave the leaf out by a rule."
            )
        if size > MAX_COUNT:
            raise ValueError(f"regrow: {path!r} has {size} weights; at most {MAX_COUNT} are counted.")
        active[path] = max(1, size - round(share * size))
    return active


def _looked_up(found: Mapping[str, Slot], table: dict[Where, float]) -> dict[str, float]:
    """The table's sparsity of each leaf that it names, by its path or by the first rule that matches."""
    rules = {p: next((r for r in table if r == p or matches(r, p, slot.array)), None) for p, slot in found.items()}
    unused = [rule for rule in table if rule not in rules.values()]
    if unused:
        raise ValueError(
            f"regrow: rule {describe(unused[0])} of the table matches nothing that an earlier rule did not take; the"
            f" selected paths are {some_paths(found)}."
        )
    return {path: table[rule] for path, rule in rules.items() if rule is not None}


def _clipped(share: Any) -> jax.Array:
    return jnp.clip(jnp.asarray(share, jnp.float32), 0.0, 1.0)


def _scores(score: Score, w: jax.Array, stats: dict[str, Any]) -> jax.Array:
    return jnp.broadcast_to(score.fn(w, **{name: stats[name] for name in score.needs}), w.shape)


def _check_dense(path: str, mask: jax.Array, stats: dict[str, Any]) -> None:
    """Outside jit: gradients that a mask has cut say nothing about what to grow."""
    for name, g in stats.items():
        if any(isinstance(x, jax.core.Tracer) for x in (mask, g)) or bool(jnp.all(mask)):
            continue
        if not bool(jnp.any((g != 0) & ~mask)):
            raise ValueError(
                f"regrow: {name!r} is zero wherever {path!r} is masked, so growth would be blind; pass the gradient of"
                " the materialized weights, the third that dense_value_and_grad gives."
            )
