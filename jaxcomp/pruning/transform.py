"""Pruning: masks over the lowest-scored units, of each leaf or of the whole tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from jaxcomp.core.gates import all_finite, cond
from jaxcomp.core.gradients import masked, masked_through
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.meshes import here
from jaxcomp.core.paths import Where, leaves_with_paths, some_paths
from jaxcomp.core.records import recorded
from jaxcomp.core.roles import Roles, checked_roles, selecting
from jaxcomp.core.slots import Slot, broadcasts, check_finite, replace_slots, slots, state_of
from jaxcomp.core.specs import Global, Local
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, PyTree, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.pruning.criterion import Criterion, Masks
from jaxcomp.pruning.masks.units import over_units
from jaxcomp.pruning.scores import Score, as_score, magnitude
from jaxcomp.pruning.specs import (
    ERK,
    NM,
    Amount,
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
    Units,
    checked_amount,
)
from jaxcomp.pruning.statistics import check_any_finite, for_score


@recorded
def prune(
    sparsity: Amount | None = None,
    *,
    score: Score | Callable[[jax.Array], jax.Array] = magnitude,
    structure: Structure = Element(),  # noqa: B008 - frozen
    scope: Scope = Local(),  # noqa: B008 - frozen
    gradient: Gradient = Cut(),  # noqa: B008 - frozen
    regrow: bool = True,
    roles: Roles | None = None,
    where: Where | None = None,
) -> Transform:
    """Masks the lowest-scored units: ``sparsity * units`` of them, rounded half to even, or a count.

    The sparsity is the decimal that was written: 0.1 of 5 is a half, and so 0. A schedule's, in float32, is the decimal
    of at most six places next to it (:func:`~jaxcomp.pruning.masks.thresholds.fraction_of`).

    ``apply`` makes a ``Masked`` leaf of each selected array. ``update`` finds the masks again from the parameters it is
    given, so with a schedule (and :func:`~jaxcomp.gate` for a period) sparsity grows while training, and what grew back
    in importance returns. An update whose statistics are not all finite, as those of a step that loss scaling skips,
    changes nothing. On a leaf that is masked already, the units are those that survive: 50% and then 50% leave a
    quarter. Of equal scores the earlier leaf and lower index goes first.

    Args:
      sparsity: the fraction of units to prune, in [0, 1); or an int, how many; or a schedule ``step -> fraction`` (any
        optax schedule, or those of :mod:`jaxcomp.pruning.schedules`). None where ``NM`` or ``Given`` say it. Warned of
        are an int that may be meant as percent, and what is selected but left whole.
      score: how much an element matters (:mod:`jaxcomp.pruning.scores`), or a function of the weights. One that needs
        statistics (``sensitivity`` needs ``grads=``) masks nothing until its first ``update``.
      structure: what goes as one: ``Element()``, ``NM(n, m)``, ``Block(shape)``, ``Filters()``, ``Tied(axes)``.
      scope: ``Local()``, each leaf by itself; ``Global()``, one threshold for all selected leaves; ``ERK()``,
        ``Heuristic()`` or ``Given(amounts)``, each leaf by itself with its own sparsity.
      gradient: ``Cut()``, or ``StraightThrough()`` to let masked weights go on learning.
      regrow: whether an update may unmask what was masked. Without it a schedule prunes among survivors only.
      roles: what the program does with each axis, ``jaxcomp.roles(fn)(params, *args)``, by which ``NM`` and ``Filters``
        find theirs; None: a matrix's name and a convolution's settle them (:func:`~jaxcomp.core.roles.settled`).
      where: which leaves; by default those that ``roles`` names, or without roles all matrices.

    Raises:
      ValueError: an amount that is none of these, or a structure or scope that does not go with it; a norm of order
        other than 1 of signed scores; at ``init``, what :func:`~jaxcomp.core.slots.slots` raises, a count above the
        number of units, an axis that a leaf lacks or that nothing settles; at ``update``, a statistic that is missing
        or has no entry for a selected leaf; outside jit, a score that is NaN.
      TypeError: a score, structure, scope or gradient that is none; roles of another kind.

    >>> t = prune(0.5)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 0., -4.],
           [ 3.,  0.]], dtype=float32)

    Source: Han et al. 2015, arXiv:1506.02626; Zhu and Gupta 2017, arXiv:1710.01878 (gradual); filters after Li et al.
    2016, arXiv:1608.08710; the sources of scores, structures and scopes are with them.
    """
    criterion = criterion_of(
        sparsity, score=score, structure=structure, scope=scope, gradient=gradient, regrow=regrow, roles=roles
    )
    score, rule = criterion.score, selecting(where, roles)

    def found(params: Params) -> dict[str, Slot]:
        return slots(params, rule, "prune")

    def init(params: Params) -> Masks:
        selected = found(params)
        check_finite(selected, "prune")
        return criterion.first(selected)

    def update(state: Masks, params: Params, *, step: Step, **stats: PyTree) -> Masks:
        selected = found(params)
        needed = {name: for_score(name, score, stats, selected=selected, owner="prune") for name in score.needs}
        fine = all_finite([stats[name] for name in needed])
        check_any_finite(fine, needed, state)
        return cond(fine, lambda: criterion.masks(selected, step, needed, state), lambda: dict(state))

    def apply(state: Masks, params: Params) -> Params:
        through = isinstance(gradient, StraightThrough)
        new = {}
        for path, slot in found(params).items():
            units = state_of(state, path, "prune")
            new[path] = _masked("prune", slot, units, structure=structure, through=through)
        return replace_slots(params, new)

    return Transform(init, update, apply)


def criterion_of(
    sparsity: Amount | None = None,
    *,
    score: Score | Callable[[jax.Array], jax.Array] = magnitude,
    structure: Structure = Element(),  # noqa: B008 - frozen
    scope: Scope = Local(),  # noqa: B008 - frozen
    gradient: Gradient = Cut(),  # noqa: B008 - frozen
    regrow: bool = True,
    roles: Roles | None = None,
) -> Criterion:
    """By what :func:`prune` of these arguments finds its masks; its errors.

    >>> criterion_of(0.5, scope=Global()).scope
    Global()
    """
    score = as_score(score)
    amount = _checked(sparsity, score, structure, scope, gradient)
    return Criterion(score, structure, scope, amount, regrow, checked_roles("prune", roles))


@recorded
def masked_by(masks: PyTree) -> Transform:
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

    def init(params: Params) -> Masks:
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
        return {path: jnp.array(here(mask)) for path, mask in named.items()}  # copies: a step may donate its state

    def apply(state: Masks, params: Params) -> Params:
        new = {p: _masked("masked_by", slot, state[p]) for p, slot in found(params).items()}
        return replace_slots(params, new)

    return Transform(init, lambda state, params, *, step, **stats: state, apply)


def is_pruned(tree: PyTree) -> bool:
    """Whether any leaf is masked: what ``prune`` has been applied to, and ``materialize`` has not.

    Args:
      tree: arrays and leaves, in any containers.

    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> t = prune(0.5)
    >>> is_pruned(params), is_pruned(t.apply(t.init(params), params))
    (False, True)
    """
    return any(isinstance(x, Masked) for x in jax.tree.leaves(tree, is_leaf=is_compressed))


def _checked(
    sparsity: Amount | None, score: Score, structure: Structure, scope: Scope, gradient: Gradient
) -> Amount | None:
    """The amount; which structures and scopes say it themselves, and what does not go together."""
    for name, value, kinds in (
        ("structure", structure, Structure),
        ("scope", scope, Scope),
        ("gradient", gradient, Gradient),
    ):
        if not isinstance(value, kinds):
            known = [c for k in get_args(kinds) for c in (k.__subclasses__() if k is Units else [k])]
            wanted = ", ".join(c.__name__ for c in known)
            raise TypeError(
                f"prune: {name} must be one of {wanted}, as in {name}={known[0].__name__}(), got {value!r}."
            )
    if score.signed and isinstance(structure, Filters | Tied) and structure.order != 1:
        raise ValueError(
            f"prune: score {score.name!r} may be below zero, which a norm of order {structure.order!r} would hide;"
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


def _masked(
    owner: str,
    slot: Slot,
    units: jax.Array,
    *,
    structure: Structure = Element(),  # noqa: B008 - frozen
    through: bool = False,
) -> Masked:
    """The slot's array under the mask of its units, and what an earlier mask left."""
    x = slot.array
    try:
        mask = over_units(structure, units, x.shape)
        mask = mask if slot.mask is None else mask & slot.mask
        return Masked(masked_through(x, mask) if through else masked(x, mask), mask, straight=through)
    except (ValueError, TypeError) as e:
        raise ValueError(
            f"{owner}: the mask of {slot.path!r} has shape {tuple(units.shape)}, which does not fit {tuple(x.shape)};"
            " the state was made for another tree: call init with this one."
        ) from e
