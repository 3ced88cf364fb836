"""Pruning: masks over the lowest-scored elements or filters, of each leaf or of the whole tree."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomp.leaves import Masked
from jaxcomp.masks.scores import Score, magnitude
from jaxcomp.masks.structures import alive_units, full_mask, unit_scores
from jaxcomp.masks.thresholds import MAX_COUNT, fraction_of, order_keys, smallest
from jaxcomp.paths import Where, leaves_with_paths, matrices, some_paths
from jaxcomp.slots import Slot, check_finite, rewrite, slots
from jaxcomp.specs import Element, Local, Scope, Structure
from jaxcomp.transform import Params, State, Transform

Sparsity = float | Callable[[Any], Any]


def prune(
    sparsity: Sparsity,
    *,
    score: Score = magnitude,
    structure: Structure = Element(),  # noqa: B008 - frozen
    scope: Scope = Local(),  # noqa: B008 - frozen
    where: Where = matrices,
) -> Transform:
    """Masks the lowest-scored units: exactly ``round(sparsity * units)`` of them, half to even.

    ``apply`` makes a ``Masked`` leaf of each selected array; no gradient reaches what is masked. ``update`` finds the
    masks again from the parameters it is given, so with a schedule (and :func:`~jaxcomp.gate` for a period) sparsity
    grows while training, and what grew back in importance returns. On a leaf that is masked already, the units are
    those that survive: 50% and then 50% leave a quarter. Of equal scores the earlier leaf and lower index goes first.

    Args:
      sparsity: the fraction of units to prune, in [0, 1), or a schedule ``step -> fraction`` (any optax schedule).
      score: elementwise score; one that needs statistics (``sensitivity`` needs ``grads=``) masks nothing until its
        first ``update``.
      structure: ``Element()`` or ``Filters(axis)``.
      scope: ``Local()``, each leaf by itself, or ``Global()``, one threshold for all selected leaves.
      where: which leaves.

    Raises:
      ValueError: a sparsity outside [0, 1); at ``init``, what :func:`~jaxcomp.slots.slots` raises; at ``update``, a
        statistic that is missing or has no entry for a selected leaf.

    >>> t = prune(0.5)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> t.apply(t.init(params), params)["kernel"].materialize()
    Array([[ 0., -4.],
           [ 3.,  0.]], dtype=float32)

    Source: Han et al. 2015, arXiv:1506.02626; Zhu and Gupta 2017, arXiv:1710.01878 (gradual); filters after Li et al.
    2016, arXiv:1608.08710.
    """
    if not callable(sparsity):
        sparsity = checked_sparsity(sparsity)

    def found(params: Params) -> dict[str, Slot]:
        return slots(params, where, "prune")

    def masks(selected: dict[str, Slot], step: Any, stats: dict[str, dict[str, Any]]) -> State:
        units, alive = {}, {}
        for path, slot in selected.items():
            try:
                scores = score.fn(slot.array, **{name: by_path[path] for name, by_path in stats.items()})
                units[path] = unit_scores(scores, structure)
                alive[path] = alive_units(slot.mask, structure, slot.array.ndim)
            except ValueError as e:
                raise ValueError(f"prune: {path!r} {e}.") from e
        fraction = sparsity(step) if callable(sparsity) else sparsity
        groups = [[p] for p in selected] if isinstance(scope, Local) else [list(selected)]
        return {p: m for group in groups for p, m in _keep(group, units, alive, fraction).items()}

    def init(params: Params) -> State:
        selected = found(params)
        check_finite(selected, "prune")
        if score.needs:
            return {path: jnp.ones(_unit_shape(slot, structure), bool) for path, slot in selected.items()}
        return masks(selected, jnp.int32(0), {})

    def update(state: State, params: Params, *, step: Any, **stats: Any) -> State:
        selected = found(params)
        needed = {name: _statistic(name, score, stats, selected) for name in score.needs}
        return masks(selected, step, needed)

    def apply(state: State, params: Params) -> Params:
        new = {}
        for path, slot in found(params).items():
            x = slot.array
            mask = state[path] if slot.mask is None else state[path] & slot.mask
            new[path] = Masked(jnp.where(mask, x, jnp.zeros((), x.dtype)), mask)
        return rewrite(params, new)

    return Transform(init, update, apply)


def checked_sparsity(sparsity: Any) -> float:
    """A constant sparsity as a float.

    Raises:
      ValueError: it is not a number in [0, 1).
    """
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool) or not 0 <= float(sparsity) < 1:
        raise ValueError(f"prune: sparsity must be a number in [0, 1) or a schedule, got {sparsity!r}.")
    return float(sparsity)


def cubic(final: float, *, begin: int = 0, end: int, initial: float = 0.0) -> Callable[[Any], Any]:
    """The gradual schedule ``final + (initial - final) (1 - (step - begin) / (end - begin))**3``, flat outside.

    Built on ``optax.polynomial_schedule``.

    >>> s = cubic(0.8, begin=100, end=200)
    >>> float(s(0)), round(float(s(150)), 4), round(float(s(999)), 4)
    (0.0, 0.7, 0.8)

    Raises:
      ValueError: a sparsity outside [0, 1), or an end that is not after the beginning.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1.
    """
    checked_sparsity(final), checked_sparsity(initial)
    if end <= begin:
        raise ValueError(f"cubic: end must be after begin, got begin={begin}, end={end}.")
    return optax.polynomial_schedule(initial, final, power=3, transition_steps=end - begin, transition_begin=begin)


def _unit_shape(slot: Slot, structure: Structure) -> tuple[int, ...]:
    shape = jax.ShapeDtypeStruct(slot.array.shape, slot.array.dtype)
    return jax.eval_shape(lambda x: unit_scores(x, structure), shape).shape


def _keep(
    paths: list[str], units: dict[str, jax.Array], alive: dict[str, jax.Array | None], fraction: Any
) -> dict[str, jax.Array]:
    """Masks that keep all but the lowest ``fraction`` of the units of these leaves together."""
    size = sum(units[p].size for p in paths)
    if size > MAX_COUNT:
        raise ValueError(
            f"prune: one threshold over {size} units; at most {MAX_COUNT} are counted, split them by rules."
        )
    masked = [(alive[p], units[p].shape) for p in paths]
    eligible = [None if mask is None else full_mask(mask, shape) for mask, shape in masked]
    total = sum((jnp.sum(e, dtype=jnp.uint32) for e in eligible if e is not None), jnp.uint32(0))
    total = total + sum(units[p].size for p, e in zip(paths, eligible, strict=True) if e is None)
    pruned = smallest([order_keys(units[p]) for p in paths], eligible, fraction_of(total, fraction))
    keep = (~m if e is None else e & ~m for m, e in zip(pruned, eligible, strict=True))
    return dict(zip(paths, keep, strict=True))


def _statistic(name: str, score: Score, stats: dict[str, Any], selected: dict[str, Slot]) -> dict[str, Any]:
    """A statistic's leaves by slot path."""
    if name not in stats:
        raise ValueError(f"prune: score {score.name!r} needs the statistic {name!r}; call update(..., {name}=tree).")
    leaves = dict(leaves_with_paths(stats[name])[0])
    for path, slot in selected.items():
        if path not in leaves:
            raise ValueError(
                f"prune: the statistic {name!r} has no entry for {path!r}, only {some_paths(leaves)}; it wants a tree"
                " like the parameters, and prune before what factors them."
            )
        if leaves[path].shape != slot.array.shape:
            raise ValueError(
                f"prune: the statistic {name!r} has shape {leaves[path].shape} at {path!r}, wanted {slot.array.shape}."
            )
    return {path: leaves[path] for path in selected}
