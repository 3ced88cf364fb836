"""``Plan``: which option each unit takes; to read, to change, to save and to apply."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxcomp.artifact.files import write_atomically
from jaxcomp.core.paths import Where, some_paths
from jaxcomp.core.plain import Plain
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.transform import Transform, by_path, identity
from jaxcomp.search.options import Option, Table

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """One option for each unit of a table; ``print`` it, change it, save it, and apply ``plan.transform``.

    Args:
      table: what was chosen from.
      choice: the label of the option of each unit.
      budgets: under which it was chosen.
      bound: what no choice within the budgets can be below, in what was minimized; NaN where nobody asked.
      minimize: what that was.

    Raises:
      ValueError: a unit without a choice, or a choice that is no option; the message names both.
    """

    table: Table
    choice: Mapping[str, str]
    budgets: Mapping[str, float]
    bound: float = math.nan
    minimize: str = "loss"

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.table]
        if missing := [name for name in names if name not in self.choice]:
            raise ValueError(f"Plan: {some_paths(missing)} has no choice; give every unit a label.")
        for name, label in self.choice.items():
            self.table[name].option(label)

    @property
    def options(self) -> dict[str, Option]:
        """The chosen option of each unit."""
        return {unit.name: unit.option(self.choice[unit.name]) for unit in self.table}

    @property
    def costs(self) -> dict[str, float]:
        """The sum of each cost over the units."""
        chosen = self.options.values()
        return {name: math.fsum(o.costs.get(name, 0.0) for o in chosen) for name in self.table.costs}

    @property
    def loss(self) -> float:
        """The sum of the losses, as measured one by one."""
        return math.fsum(o.loss for o in self.options.values())

    @property
    def gap(self) -> float:
        """How far what was minimized may be above the least possible: 0 where that was proved."""
        return (self.loss if self.minimize == "loss" else self.costs[self.minimize]) - self.bound

    @property
    def broken(self) -> tuple[str, ...]:
        """In words, the ties that the choice does not keep and the budgets that it exceeds; as after a change."""
        found, said = [], dict[str, tuple[str, str]]()
        for name, option in self.options.items():
            for tie, level in option.ties.items():
                first = said.setdefault(tie, (name, level))
                if first[1] != level:
                    found.append(f"{tie}: {first[0]!r} says {first[1]!r}, {name!r} says {level!r}")
        sums = {**self.costs, "loss": self.loss}
        found += [f"{sums[k]:,.10g} {k} of {limit:,.10g}" for k, limit in self.budgets.items() if sums[k] > limit]
        return tuple(found)

    @property
    def transform(self) -> Transform:
        """What makes of parameters what was chosen: a table of paths, so that one reads it in a run's config."""
        made: dict[Where, Transform] = {
            re.escape(path): option.make
            for unit, option in zip(self.table, self.options.values(), strict=True)
            for path in unit.leaves
            if repr(option.make) != repr(identity())
        }
        return by_path(made) if made else identity()

    def changed(self, choice: Mapping[str, str]) -> Plan:
        """The plan with other choices for some units; nothing is claimed to be the best any more.

        Raises:
          ValueError: an unknown unit or label.
        """
        return replace(self, choice={**self.choice, **choice}, bound=math.nan)

    def cells(self) -> list[tuple[str, ...]]:
        """The plan in words: its head, a row a unit, the sums."""
        costs = self.table.costs
        rows = [
            (name, o.label, *(f"{o.costs.get(c, 0):,.6g}" for c in costs), f"{o.loss:.4g}")
            for name, o in self.options.items()
        ]
        sums = ("total", "", *(f"{x:,.10g}" for x in self.costs.values()), f"{self.loss:.4g}")
        return [("unit", "choice", *costs, "loss"), *rows, sums]

    def __repr__(self) -> str:
        lines = [columns(self.cells(), "ll" + "r" * (len(self.table.costs) + 1))]
        return "\n".join(lines + [f"exceeds: {words}" for words in self.broken])

    def _repr_html_(self) -> str:
        return html_table(self.cells(), "ll" + "r" * (len(self.table.costs) + 1), sums=True)

    def to_plain(self) -> dict[str, Plain]:
        """The plan as JSON holds it: the choice first, to be edited; the table behind it.

        Raises:
          TypeError: an option whose transform holds a function of one's own.
        """
        return {
            "version": _VERSION,
            "choice": dict(self.choice),
            "budgets": dict(self.budgets),
            "minimize": self.minimize,
            "bound": self.bound if math.isfinite(self.bound) else None,
            "table": self.table.to_plain(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all.

        Raises:
          TypeError: as of :meth:`to_plain`.
          FileError: it cannot be written.
        """
        write_atomically(path, json.dumps(self.to_plain(), indent=1).encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """The inverse of :meth:`save`, also of a file whose choices were edited.

        Raises:
          ValueError: no plan, or a choice that is no option; the message names the file.
        """
        try:
            return Plan.from_plain(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as e:
            raise ValueError(f"{os.fspath(path)} is no JSON: {e}; mend it, or delete it to decide anew.") from e
        except ValueError as e:
            raise ValueError(f"{os.fspath(path)}: {e}") from e

    @staticmethod
    def from_plain(data: object) -> Plan:
        """The inverse of :meth:`to_plain`.

        Raises:
          ValueError: data that it did not write.
        """
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise ValueError(f"this is no plan of jaxcomp.search, version {_VERSION}.")
        try:
            table, choice = Table.from_plain(data["table"]), {str(k): str(v) for k, v in data["choice"].items()}
            bound = math.nan if data["bound"] is None else float(data["bound"])
            was = Plan(table, choice, dict(data["budgets"]), bound=bound, minimize=str(data["minimize"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"this is no plan of jaxcomp.search: {e!r}.") from e
        return was if was.gap >= 0 or math.isnan(was.gap) else replace(was, bound=math.nan)
