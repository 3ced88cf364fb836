"""Channels that go, as decisions beside all others: each group has levels, and ties them to the leaves it touches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxcomp.core.types import Params
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.structure.groups import Groups
from jaxcomp.structure.plans import Plan as Kept
from jaxcomp.structure.plans import mask
from jaxcomp.structure.scores import UnitScore, l2

LEVELS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""The parts of each group's units that may stay."""


@dataclass(frozen=True)
class Widths:
    """What may stay of each group of channels.

    Attributes:
      groups: of the program.
      levels: by the group's number, of each label the units that stay.
    """

    groups: Groups
    levels: tuple[Mapping[str, np.ndarray], ...]

    @staticmethod
    def of(groups: Groups, params: Params, *, levels: Sequence[float], score: UnitScore | None = None) -> Widths:
        """The units of the highest scores at each level.

        Raises:
          ValueError: a level outside (0, 1], or none that keeps all.
        """
        if 1.0 not in levels or not all(0 < x <= 1 for x in levels):
            raise ValueError(f"compress: levels of channels are parts in (0, 1] with 1 among them, got {levels!r}.")
        found = []
        for group, scores in zip(groups, (score or l2())(groups, params), strict=True):
            order = np.argsort(-scores, axis=-1, kind="stable")
            counts = {f"{x:.4g}": max(1, round(x * group.units)) for x in sorted(levels, reverse=True)}
            found.append({label: np.sort(order[..., :count], axis=-1) for label, count in counts.items()})
        return Widths(groups, tuple(found))

    def kept(self, labels: Mapping[int, str]) -> Kept:
        """The plan of structure; groups without a label stay whole."""
        return Kept(self.groups, tuple(levels[labels.get(g, "1")] for g, levels in enumerate(self.levels)))

    def chosen(self, choice: Mapping[str, str]) -> Kept:
        """The plan of structure of a plan's choice."""
        return self.kept({g: choice[unit_name(g)] for g in range(len(self.levels)) if unit_name(g) in choice})


def unit_name(group: int) -> str:
    """What the decision on a group of channels is called."""
    return f"channels {group}"


def with_channels(
    table: Table, widths: Widths, params: Params, *, judge: Callable[[Params], float], done: Callable[[float], object]
) -> Table:
    """The table with a unit for each group of channels, tied to the units whose leaves it touches.

    What a group loses at a level is measured with its other units masked. What leaves then cost is taken as the product
    of what stays of each axis, of tied ones in the mean over their parameters, and what they lose by rounding as if all
    of them stayed.
    """
    whole = {path: math.prod(shape) for path, shape in widths.groups.shapes.items()}
    parts: list[dict[str, Mapping[str, float]]] = []
    units = []
    for g, levels in enumerate(widths.levels):
        parts.append({})
        options = []
        for label in levels:
            kept = widths.kept({g: label})
            stays = {path: math.prod(shape) / whole[path] for path, shape in kept.widths.items() if whole[path]}
            parts[g][label] = stays
            loss = 0.0 if label == "1" else judge(mask(kept)(params))
            options.append(Option(label, loss=loss, ties={unit_name(g): label}))
            done(1)
        units.append(Unit(unit_name(g), (), tuple(options)))
    return Table((*units, *(_tied(unit, widths, parts) for unit in table)), table.what)


def _tied(unit: Unit, widths: Widths, parts: Sequence[Mapping[str, Mapping[str, float]]]) -> Unit:
    """The unit with its options at all levels of the groups that touch one of its leaves."""
    if not unit.leaves:
        return unit
    touching = [g for g, group in enumerate(widths.groups) if set(unit.leaves) & set(group.paths)]
    sizes = {path: math.prod(widths.groups.shapes[path]) for path in unit.leaves}
    options = []
    for option in unit.options:
        for labels in itertools.product(*(widths.levels[g] for g in touching)):
            here = [parts[g][label] for g, label in zip(touching, labels, strict=True)]
            part = math.fsum(n * math.prod(stays.get(path, 1.0) for stays in here) for path, n in sizes.items())
            part /= sum(sizes.values()) or 1
            costs = {name: cost * part for name, cost in option.costs.items()}
            ties = {unit_name(g): label for g, label in zip(touching, labels, strict=True)}
            name = option.label + "".join(f" | {label}" for label in labels)
            options.append(replace(option, label=name, costs=costs, ties={**option.ties, **ties}))
    return replace(unit, options=tuple(options))


def undominated(table: Table) -> Table:
    """The table without options that another of their unit beats or equals in every cost and in loss."""

    def left(unit: Unit) -> Unit:
        kept: list[Option] = []
        for option in sorted(unit.options, key=lambda o: (*o.costs.values(), o.loss)):
            if not any(_beats(other, option) for other in kept):
                kept = [other for other in kept if not _beats(option, other)] + [option]
        return replace(unit, options=tuple(o for o in unit.options if o in kept))

    return Table(tuple(left(unit) for unit in table), table.what)


def _beats(a: Option, b: Option) -> bool:
    if dict(a.ties) != dict(b.ties):
        return False
    return a.loss <= b.loss and all(a.costs[name] <= b.costs[name] for name in b.costs)
