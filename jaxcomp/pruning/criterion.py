"""Which units of a tree's slots stay: their scores, what an earlier mask left of them, and how many go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_index

from jaxcomp.core.errors import count_known, naming
from jaxcomp.core.roles import AxisRoles, Roles
from jaxcomp.core.slots import Slot
from jaxcomp.core.types import Shape, Step
from jaxcomp.pruning import notices
from jaxcomp.pruning.masks.nm import n_m_mask
from jaxcomp.pruning.masks.select import Maybe, amounts_of, groups_of, select, tied
from jaxcomp.pruning.masks.units import alive_units, unit_scores
from jaxcomp.pruning.scores import Score
from jaxcomp.pruning.specs import NM, Amount, Filters, Scope, Structure, Tied, Units

Slots = Mapping[str, Slot]
Masks = dict[str, jax.Array]
ByName = Mapping[str, Mapping[str, jax.Array]]
"""Statistics by name, each by the path of its slot."""


@dataclass(frozen=True)
class Criterion:
    """By what the masks of a tree are found; its fields are arguments of :func:`~jaxcomp.pruning.transform.prune`."""

    score: Score
    structure: Structure
    scope: Scope
    amount: Amount | None
    regrow: bool
    roles: Roles | None

    def first(self, selected: Slots) -> Masks:
        """The masks at ``init``; all True where the score needs statistics, which there are none of yet."""
        if not self.score.needs:
            return self.masks(selected, jnp.int32(0), {}, None)
        like = {p: jax.ShapeDtypeStruct(slot.array.shape, slot.array.dtype) for p, slot in selected.items()}
        stats = dict.fromkeys(self.score.needs, like)
        shapes = jax.eval_shape(lambda stats: self.masks(selected, jnp.int32(0), stats, None), stats)
        return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def masks(self, selected: Slots, step: Step, stats: ByName, old: Masks | None) -> Masks:
        """The masks of units at a step, by slot path.

        Args:
          selected: the slots.
          step: at which a schedule is read.
          stats: what the score needs.
          old: the masks before, or None.

        Raises:
          ValueError: an axis that a leaf lacks or that its roles do not settle, scores that are NaN, a count above the
            number of units. The message names the path.
        """
        inside = {p: settled(self.structure, slot, self.roles) for p, slot in selected.items()}
        units, alive = self._scored(inside, selected, step, stats=stats)
        dead = {p: None if self.regrow or old is None else ~old[p] for p in selected}
        patterns = {p: s for p, s in inside.items() if isinstance(s, NM)}
        shapes = {p: slot.array.shape for p, slot in selected.items()}
        if patterns:
            if old is None:
                notices.of_patterns(patterns, shapes)
            return {p: n_m_mask(units[p], s, _left(alive[p], dead[p])) for p, s in patterns.items()}
        if isinstance(self.structure, Tied):
            groups = groups_of(self.structure, shapes)
            scores, left, gone = tied(groups, units, alive, dead)
            of = {g: x.shape for g, x in scores.items()}
            kept = self._select(scores, left, gone, shapes=of, step=step, first=old is None)
            return {p: kept[g].reshape(units[p].shape) for g, members in groups.items() for p in members}
        return self._select(units, alive, dead, shapes=shapes, step=step, first=old is None)

    def scored(self, selected: Slots, step: Step, stats: ByName) -> tuple[Masks, Maybe]:
        """The scores of units by slot path, not yet normalized, and which units an earlier mask left, or None.

        Arguments and errors are those of :meth:`masks`.
        """
        inside = {p: settled(self.structure, slot, self.roles) for p, slot in selected.items()}
        return self._scored(inside, selected, step, stats=stats)

    def _scored(
        self, inside: Mapping[str, Units | NM], selected: Slots, step: Step, *, stats: ByName
    ) -> tuple[Masks, Maybe]:
        units = {p: self._scores(inside[p], slot, step, stats) for p, slot in selected.items()}
        return units, {p: _alive(inside[p], slot) for p, slot in selected.items()}

    def _select(
        self, units: Masks, alive: Maybe, dead: Maybe, *, shapes: Mapping[str, Shape], step: Step, first: bool
    ) -> Masks:
        normal = self.score.normalize
        scores = units if normal is None else {name: normal(x) for name, x in units.items()}
        amounts = amounts_of(self.scope, shapes, self.amount, step)
        if first:
            notices.of_amounts(amounts, scores)
        return select(scores, alive, dead, amounts)

    def _scores(self, inside: Units | NM, slot: Slot, step: Step, stats: ByName) -> jax.Array:
        """Scores of one leaf's units, not yet normalized."""
        with naming("prune", slot.path):
            known = {"path": slot.path, "step": step, "structure": inside}
            given = {name: by_path[slot.path] for name, by_path in stats.items()}
            scores = self.score.fn(slot.array, **given, **{name: known[name] for name in self.score.takes})
            _check_numbers(self.score, scores)
            if self.score.of_units:
                return scores
            scores = jnp.broadcast_to(scores, slot.array.shape)
            return scores if isinstance(inside, NM) else unit_scores(inside, scores)


def settled(structure: Structure, slot: Slot, roles: Roles | None) -> Units | NM:
    """The structure inside one leaf, with axes: its own, or what the leaf's roles say; of a tied one, the slices.

    Raises:
      ValueError: nothing says them; the leaf has no such axis; no group of ``Tied`` is its own.
    """
    with naming("prune", slot.path):
        match structure:
            case Tied():
                group = structure.find(slot.path)
                if group is None:
                    raise ValueError(f"belongs to no group of {list(structure.axes)}; narrow where, or add a rule")
                return Filters(group[1], structure.order)
            case NM():
                axis = _last_input(structure, slot.axes(roles)) if structure.axis is None else structure.axis
                return replace(structure, axis=normalize_axis_index(axis, len(slot.array.shape)))
            case Filters(axis=None):
                return replace(structure, axis=_own(structure, slot.axes(roles)))
        return structure


def _last_input(structure: NM, roles: AxisRoles) -> int:
    if not roles.inputs:
        raise ValueError(
            f"has no axis that a product sums over ({', '.join(roles.names)}); name one, as in NM({structure.n},"
            f" {structure.m}, axis), or leave it out by a rule"
        )
    return roles.inputs[-1]


def _own(structure: Filters, roles: AxisRoles) -> tuple[int, ...]:
    if not roles.channels:
        raise ValueError(
            f"has no axis that products keep ({', '.join(roles.names)}), and so no filters; name an axis, as in"
            " Filters(axis), or leave it out by a rule"
        )
    return roles.channels


def _check_numbers(score: Score, scores: jax.Array) -> None:
    """Raises ValueError where concrete scores are NaN: they would be kept longest."""
    bad = count_known(jnp.isnan, scores)
    if bad:
        given = f" from the statistic {score.needs[0]!r}" if score.needs else ""
        raise ValueError(
            f"has {bad} scores of {score.name!r} that are NaN{given}, of {scores.size}; mend what made them"
        )


def _alive(inside: Units | NM, slot: Slot) -> jax.Array | None:
    """Which units an earlier mask left, at the units' shape."""
    if slot.mask is None:
        return None
    return slot.full_mask if isinstance(inside, NM) else alive_units(inside, slot.mask, slot.array.shape)


def _left(alive: jax.Array | None, dead: jax.Array | None) -> jax.Array | None:
    if dead is None:
        return alive
    return ~dead if alive is None else alive & ~dead
