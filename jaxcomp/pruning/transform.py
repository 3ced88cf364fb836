"""Pruning: masks over the lowest-scored units, of each leaf or of the whole tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxcomp.core.errors import count_known
from jaxcomp.core.gradients import masked, masked_through
from jaxcomp.core.leaves import Masked, is_compressed
from jaxcomp.core.paths import Where, leaves_with_paths, matrices, some_paths
from jaxcomp.core.slots import Slot, broadcasts, check_finite, rewrite, slots, state_of
from jaxcomp.core.specs import Global, Local
from jaxcomp.core.transform import Transform, by_path
from jaxcomp.core.types import Params, State
from jaxcomp.pruning.masks.nm import n_m_mask
from jaxcomp.pruning.masks.select import groups_of, select, spread, tied
from jaxcomp.pruning.masks.units import alive_units, checked_axis, over_units, unit_scores
from jaxcomp.pruning.scores import Score, as_score, magnitude
from jaxcomp.pruning.specs import (
    ERK,
    NM,
    Amount,
    Block,
    Cut,
    Element,
    Filters,
    Given,
    Gradient,
    Heuristic,
    Scope,
    StraightThrough,
    Structure,
    Tied,
    checked_amount,
)
from jaxcomp.pruning.statistics import for_score

Slots = Mapping[str, Slot]
Stats = Mapping[str, Mapping[str, Any]]


def prune(
    sparsity: Amount | None = None,
    *,
    score: Score | Callable[[jax.Array], jax.Array] = magnitude,
    structure: Structure = Element(),  # noqa: B008 - frozen
    scope: Scope = Local(),  # noqa: B008 - frozen
    gradient: Gradient = Cut(),  # noqa: B008 - frozen
    regrow: bool = True,
    where: Where = matrices,
) -> Transform:
    """Masks the lowest-scored units: exactly ``round(sparsity * units)`` of them, half to even, or a count.

    ``apply`` makes a ``Masked`` leaf of each selected array. ``update`` finds the masks again from the parameters it is
    given, so with a schedule (and :func:`~jaxcomp.gate` for a period) sparsity grows while training, and what grew back
    in importance returns. On a leaf that is masked already, the units are those that survive: 50% and then 50% leave a
    quarter. Of equal scores the earlier leaf and lower index goes first.

    Args:
      sparsity: the fraction of units to prune, in [0, 1); or an int, how many; or a schedule ``step -> fraction`` (any
        optax schedule, or those of :mod:`jaxcomp.pruning.schedules`). None where ``NM`` or ``Given`` say it.
      score: how much an element matters (:mod:`jaxcomp.pruning.scores`), or a function of the weights. One that needs
        statistics (``sensitivity`` needs ``grads=``) masks nothing until its first ``update``.
      structure: what goes as one: ``Element()``, ``NM(n, m)``, ``Block(shape)``, ``Filters(axis)``, ``Tied(axes)``.
      scope: ``Local()``, each leaf by itself; ``Global()``, one threshold for all selected leaves; ``ERK()``,
        ``Heuristic()`` or ``Given(amounts)``, each leaf by itself with its own sparsity.
      gradient: ``Cut()``, or ``StraightThrough()`` to let masked weights go on learning.
      regrow: whether an update may unmask what was masked. Without it a schedule prunes among survivors only.
      where: which leaves.

    Raises:
      ValueError: an amount that is none of these, or a structure or scope that does not go with it; a norm of order
        other than 1 of signed scores; at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, a count above the
        number of units, an axis that a leaf lacks; at ``update``, a statistic that is missing or has no entry for a
        selected leaf; outside jit, a score that is NaN.
      TypeError: a score, structure, scope or gradient that is none.

    >>> t = prune(0.5)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 0., -4.],
           [ 3.,  0.]], dtype=float32)

    Source: Han et al. 2015, arXiv:1506.02626; Zhu and Gupta 2017, arXiv:1710.01878 (gradual); filters after Li et al.
    2016, arXiv:1608.08710; the sources of scores, structures and scopes are with them.
    """
    criterion = as_score(score)
    amount = _checked(sparsity, criterion, structure, scope, gradient)

    def found(params: Params) -> dict[str, Slot]:
        return slots(params, where, "prune")

    def masks(selected: Slots, step: Any, stats: Stats, old: State | None) -> State:
        units = {p: _scores(criterion, structure, slot, step, stats) for p, slot in selected.items()}
        alive = {p: _alive(structure, slot) for p, slot in selected.items()}
        dead = {p: None if regrow or old is None else ~old[p] for p in selected}
        if isinstance(structure, NM):
            return {p: n_m_mask(x, structure, _left(alive[p], dead[p])) for p, x in units.items()}
        shapes = {p: slot.array.shape for p, slot in selected.items()}
        if isinstance(structure, Tied):
            groups = groups_of(structure, shapes)
            scores, left, gone = tied(groups, units, alive, dead)
            amounts = spread(scope, {g: x.shape for g, x in scores.items()}, amount, step)
            kept = select(_normal(criterion, scores), left, gone, amounts)
            return {p: kept[g].reshape(units[p].shape) for g, members in groups.items() for p in members}
        return select(_normal(criterion, units), alive, dead, spread(scope, shapes, amount, step))

    def init(params: Params) -> State:
        selected = found(params)
        check_finite(selected, "prune")
        if not criterion.needs:
            return masks(selected, jnp.int32(0), {}, None)
        like = {p: jax.ShapeDtypeStruct(slot.array.shape, slot.array.dtype) for p, slot in selected.items()}
        stats = dict.fromkeys(criterion.needs, like)
        shapes = jax.eval_shape(lambda stats: masks(selected, jnp.int32(0), stats, None), stats)
        return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        selected = found(params)
        needed = {name: for_score(name, criterion, stats, selected, "prune") for name in criterion.needs}
        return masks(selected, step, needed, state)

    def apply(state: State, params: Params) -> Params:
        through = isinstance(gradient, StraightThrough)
        new = {}
        for path, slot in found(params).items():
            units = state_of(state, path, "prune")
            try:
                new[path] = _masked(slot, units, structure, through)
            except (ValueError, TypeError) as e:
                shape = tuple(slot.array.shape)
                raise ValueError(
                    f"prune: the mask of {path!r} has shape {tuple(units.shape)}, which does not fit {shape}; the"
                    " state was made for another tree: call init with this one."
                ) from e
        return rewrite(params, new)

    return Transform(init, update, apply)


def masked_by(masks: Any) -> Transform:
    """Masks by given booleans, and no others; what ``masks`` has no entry for stays as it is.

    The masks become the state, so they may be loaded, sharded and replaced like any other.

    Args:
      masks: a tree of booleans like the parameters, or a dict by path; each entry broadcasts against its leaf, of the
        same rank. None entries are no entries.

    Raises:
      ValueError: at ``init``, a mask for no leaf, or one that is not of booleans or does not fit its leaf.

    >>> t = masked_by({"kernel": jnp.array([[True], [False]])})
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> t.apply(t.init(params), params)["kernel"].materialize().tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    named = dict(leaves_with_paths(masks)[0])

    def found(params: Params) -> dict[str, Slot]:
        return slots(params, lambda path, leaf: path in named, "masked_by")

    def init(params: Params) -> State:
        selected = found(params)
        for path, mask in named.items():
            if path not in selected:
                raise ValueError(f"masked_by: there is no leaf {path!r}, only {some_paths(selected)}.")
            shape = selected[path].array.shape
            if mask.dtype != jnp.bool_ or not broadcasts(mask.shape, shape):
                raise ValueError(
                    f"masked_by: the mask of {path!r} is {mask.dtype} of shape {mask.shape}, wanted booleans that"
                    f" broadcast to {shape}."
                )
        return {path: jnp.array(mask) for path, mask in named.items()}  # copies: a step may donate its state

    def apply(state: State, params: Params) -> Params:
        new = {p: _masked(slot, state[p], Element(), False) for p, slot in found(params).items()}
        return rewrite(params, new)

    return Transform(init, lambda state, params, *, step, **stats: state, apply)


def is_pruned(tree: Any) -> bool:
    """Whether any leaf is masked: what ``prune`` has been applied to, and ``materialize`` has not.

    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> t = prune(0.5)
    >>> is_pruned(params), is_pruned(t.apply(t.init(params), params))
    (False, True)
    """
    return any(isinstance(x, Masked) for x in jax.tree.leaves(tree, is_leaf=is_compressed))


def _checked(sparsity: Any, criterion: Score, structure: Any, scope: Any, gradient: Any) -> Amount | None:
    """The amount; which structures and scopes say it themselves, and what does not go together."""
    for name, value, kinds in (
        ("structure", structure, Structure),
        ("scope", scope, Scope),
        ("gradient", gradient, Gradient),
    ):
        if not isinstance(value, kinds):
            wanted = ", ".join(k.__name__ for k in get_args(kinds))
            raise TypeError(f"prune: {name} must be one of {wanted}, as in {name}={_example(kinds)}, got {value!r}.")
    if criterion.signed and getattr(structure, "order", 1) != 1:
        raise ValueError(
            f"prune: score {criterion.name!r} may be below zero, which a norm of order {structure.order!r} would hide;"
            " take order=1, the sum."
        )
    says = [x for x in (structure, scope) if isinstance(x, NM | Given)]
    if isinstance(structure, NM) and not isinstance(scope, Local):
        raise ValueError(f"prune: {structure} holds for each group of weights, so it has no scope, got {scope}.")
    if says and sparsity is not None:
        raise ValueError(f"prune: {type(says[0]).__name__} says the sparsity; leave {sparsity!r} out.")
    if says:
        return None
    if isinstance(structure, Tied) and not isinstance(scope, Local | Global):
        raise ValueError(f"prune: {scope} gives each leaf its own sparsity; Tied prunes several alike, take Global.")
    if sparsity is None:
        raise ValueError("prune: wants a sparsity, such as 0.5; only NM and Given say it themselves.")
    amount = checked_amount("prune", sparsity)
    if isinstance(amount, int) and isinstance(scope, ERK | Heuristic):
        raise ValueError(f"prune: {scope} spreads a fraction over the leaves, got the count {amount}.")
    return amount


def _example(kinds: Any) -> str:
    return f"{get_args(kinds)[0].__name__}()"


def _scores(criterion: Score, structure: Structure, slot: Slot, step: Any, stats: Stats) -> jax.Array:
    """Scores of one leaf's units, not yet normalized."""
    try:
        within = _within(structure, slot.path)
        known = {"path": slot.path, "step": step, "structure": within}
        given = {name: by_path[slot.path] for name, by_path in stats.items()}
        scores = criterion.fn(slot.array, **given, **{name: known[name] for name in criterion.takes})
        _check_numbers(criterion, scores)
        if criterion.of_units:
            return scores
        scores = jnp.broadcast_to(scores, slot.array.shape)
        if isinstance(within, NM):
            checked_axis(within.axis, scores.ndim)
            return scores
        return unit_scores(scores, within)
    except ValueError as e:
        raise ValueError(f"prune: {slot.path!r} {e}.") from e


def _check_numbers(criterion: Score, scores: jax.Array) -> None:
    """Raises ValueError where concrete scores are NaN: they would be kept longest."""
    bad = count_known(jnp.isnan, scores)
    if not bad:
        return
    given = f" from the statistic {criterion.needs[0]!r}" if criterion.needs else ""
    raise ValueError(
        f"has {bad} scores of {criterion.name!r} that are NaN{given}, of {scores.size}; mend what made them"
    )


def _within(structure: Structure, path: str) -> Element | NM | Block | Filters:
    """The structure inside one leaf: of a tied one, the slices along the leaf's axis."""
    if not isinstance(structure, Tied):
        return structure
    group = structure.find(path)
    if group is None:
        raise ValueError(f"belongs to no group of {list(structure.axes)}; narrow where, or add a rule")
    return Filters(group[1], structure.order)


def _alive(structure: Structure, slot: Slot) -> jax.Array | None:
    """Which units an earlier mask left, at the units' shape."""
    if slot.mask is None:
        return None
    within = _within(structure, slot.path)
    return slot.full_mask if isinstance(within, NM) else alive_units(slot.mask, within, slot.array.shape)


def _normal(criterion: Score, units: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {p: x if criterion.normalize is None else criterion.normalize(x) for p, x in units.items()}


def _left(alive: jax.Array | None, dead: jax.Array | None) -> jax.Array | None:
    if dead is None:
        return alive
    return ~dead if alive is None else alive & ~dead


def _masked(slot: Slot, units: jax.Array, structure: Structure, through: bool) -> Masked:
    x = slot.array
    mask = over_units(units, structure, x.shape) if isinstance(structure, Block) else units
    mask = mask if slot.mask is None else mask & slot.mask
    return Masked(masked_through(x, mask) if through else masked(x, mask), mask, straight=through)


def prune_n_m(n: int, m: int, axes: Mapping[str, int], *, score: Score = magnitude, **slots: Any) -> Transform:
    """N:M pruning of each leaf along its own axis, such as :func:`contraction_axes` finds it.

    Args:
      n, m: see :class:`~jaxcomp.pruning.specs.NM`.
      axes: by path.
      score: see :func:`~jaxcomp.pruning.transform.prune`.
      slots: its other arguments, such as ``gradient=``.

    >>> t = prune_n_m(2, 4, {"a": 0, "b": 1})
    >>> params = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.arange(8.0).reshape(2, 4)}
    >>> {k: v.mask.tolist() for k, v in t.apply(t.init(params), params).items()}["b"]
    [[False, False, True, True], [False, False, True, True]]
    """
    if not axes:
        raise ValueError("prune_n_m: wants the contraction axis of at least one leaf, got none.")
    table: dict[Where, Transform] = {
        re.escape(path): prune(structure=NM(n, m, axis), score=score, where=re.escape(path), **slots)
        for path, axis in axes.items()
    }
    return by_path(table)
