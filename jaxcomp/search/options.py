"""What a network's parts may become, what each choice costs and what it loses: the table that is decided over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxcomp.core.paths import some_paths
from jaxcomp.core.plain import Plain, from_plain, to_plain
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.transform import Transform, checked_transform, identity


@dataclass(frozen=True)
class Option:
    """One thing that a unit may become.

    Args:
      label: for tables and plans, alone in its unit: "int4", "rank 8", "int4 50%".
      make: what makes it of the unit's leaves; :func:`~jaxcomp.core.transform.identity` leaves them.
      costs: by name, such as "bytes", "macs", "bops": what a network takes is the sum over its units.
      loss: what the network loses by it alone, in whatever was measured; NaN as long as nothing was, and infinite
        where nothing would be left of the network: it is never chosen.
      ties: decisions that it shares with options of other units, by name: of two units that name the same tie, options
        are chosen that say the same of it. ``{"stage 1": "int4"}`` ties the bits of residual layers, and
        ``{"channels 3": "50%"}`` the widths of layers on both sides of a group of channels.

    Raises:
      ValueError: no label, or a cost that is negative or not finite.
    """

    label: str
    make: Transform = field(default_factory=identity)
    costs: Mapping[str, float] = field(default_factory=dict)
    loss: float = math.nan
    ties: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_transform("Option", self.make)
        if not self.label:
            raise ValueError("Option: a label names it in tables and plans, got ''.")
        for name, cost in self.costs.items():
            if not (cost >= 0 and math.isfinite(cost)):
                raise ValueError(f"Option: {self.label!r} costs {cost!r} {name}; wanted a finite number, 0 or more.")

    @property
    def measured(self) -> bool:
        """Whether its loss is known."""
        return not math.isnan(self.loss)


@dataclass(frozen=True)
class Unit:
    """Leaves that one decision is about, and what they may become.

    Args:
      name: alone in its table; of one leaf its path.
      leaves: their paths; none for what is no parameter, as a decision on how many channels stay.
      options: one of them is chosen.

    Raises:
      ValueError: no options, two of one label, or options that name other costs or ties than the first.
    """

    name: str
    leaves: tuple[str, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"Unit: {self.name!r} has no options; one of them may leave it as it is.")
        labels = [option.label for option in self.options]
        if len(set(labels)) != len(labels):
            raise ValueError(f"Unit: {self.name!r} has two options of one label; the labels are {some_paths(labels)}.")
        for option in self.options:
            if set(option.costs) != set(self.options[0].costs):
                raise ValueError(
                    f"Unit: {self.name!r} costs {sorted(self.options[0].costs)} as {labels[0]!r} and"
                    f" {sorted(option.costs)} as {option.label!r}; say the same costs of all options."
                )
            if set(option.ties) != set(self.options[0].ties):
                raise ValueError(
                    f"Unit: {self.name!r} is tied by {sorted(self.options[0].ties)} as {labels[0]!r} and by"
                    f" {sorted(option.ties)} as {option.label!r}; say the same ties of all options."
                )

    def option(self, label: str) -> Option:
        """The option of this label.

        Raises:
          ValueError: there is none; the labels are named.
        """
        for option in self.options:
            if option.label == label:
                return option
        labels = some_paths(option.label for option in self.options)
        raise ValueError(f"{self.name!r} has no option {label!r}; its options are {labels}.")


@dataclass(frozen=True)
class Table:
    """All units with their options; ``print`` it, or leave it at the end of a notebook's cell.

    Args:
      units: in the order of the program.
      what: what the losses are: "KL of the outputs".

    Raises:
      ValueError: two units of one name, a leaf of two units, or no unit.

    >>> small, large = Option("int4", costs={"bytes": 4.0}, loss=0.1), Option("int8", costs={"bytes": 8.0}, loss=0.0)
    >>> Table((Unit("a", ("a",), (small, large)),))
    unit  option  bytes  loss
    a     int4        4   0.1
    a     int8        8     0
    """

    units: tuple[Unit, ...]
    what: str = "loss"

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        leaves = [path for unit in self.units for path in unit.leaves]
        for things, kind in ((names, "units"), (leaves, "leaves")):
            twice = sorted({x for x in things if things.count(x) > 1})
            if twice:
                raise ValueError(f"Table: {some_paths(twice)} stand twice among the {kind}; decide on each once.")
        if not names:
            raise ValueError("Table: there is no unit to decide on.")

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, name: str) -> Unit:
        for unit in self.units:
            if unit.name == name:
                return unit
        raise ValueError(f"there is no unit {name!r}; the units are {some_paths(u.name for u in self.units)}.")

    @property
    def costs(self) -> tuple[str, ...]:
        """The names of the costs that some unit has."""
        return tuple(dict.fromkeys(name for unit in self.units for name in unit.options[0].costs))

    def with_losses(self, losses: Mapping[tuple[str, str], float], what: str = "") -> Table:
        """The table with the losses of options by ``(unit, label)``; the others keep theirs."""

        def filled(unit: Unit) -> Unit:
            found = (losses.get((unit.name, o.label), o.loss) for o in unit.options)
            options = tuple(replace(o, loss=float(x)) for o, x in zip(unit.options, found, strict=True))
            return replace(unit, options=options)

        return Table(tuple(map(filled, self.units)), what or self.what)

    def map_options(self, change: Callable[[Unit, Option], Option]) -> Table:
        """The table with each option changed."""
        units = (replace(u, options=tuple(change(u, o) for o in u.options)) for u in self.units)
        return Table(tuple(units), self.what)

    def cells(self) -> list[tuple[str, ...]]:
        """The table in words: its head, a row an option."""
        rows = [
            (
                u.name,
                o.label,
                *(f"{o.costs.get(c, 0):,.6g}" for c in self.costs),
                "" if not o.measured else f"{o.loss:.4g}",
            )
            for u in self.units
            for o in u.options
        ]
        return [("unit", "option", *self.costs, "loss"), *rows]

    def __repr__(self) -> str:
        return columns(self.cells(), "ll" + "r" * (len(self.costs) + 1))

    def _repr_html_(self) -> str:
        return html_table(self.cells(), "ll" + "r" * (len(self.costs) + 1))

    def to_plain(self) -> dict[str, Plain]:
        """The table as JSON holds it.

        Raises:
          TypeError: an option whose transform holds a function of one's own.
        """
        return {"what": self.what, "units": [_unit_as_plain(unit) for unit in self.units]}

    @staticmethod
    def from_plain(data: Mapping[str, Plain]) -> Table:
        """The inverse of :meth:`to_plain`.

        Raises:
          ValueError: data that it did not write.

        >>> import json
        >>> table = Table((Unit("a", ("a",), (Option("as it is", costs={"bytes": 8.0}, loss=0.0),)),))
        >>> Table.from_plain(json.loads(json.dumps(table.to_plain())))["a"].options[0].costs
        {'bytes': 8.0}
        """
        try:
            return Table(tuple(map(_unit_of_plain, _rows(data["units"]))), str(data["what"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"this is no table that jaxcomp.search wrote: {e!r}.") from e


def _unit_as_plain(unit: Unit) -> dict[str, Plain]:
    options: list[Plain] = [
        {
            "label": o.label,
            "make": to_plain(o.make, f"{unit.name}: {o.label}"),
            "costs": dict(o.costs),
            "loss": o.loss if math.isfinite(o.loss) else repr(o.loss),
            "ties": dict(o.ties),
        }
        for o in unit.options
    ]
    return {"name": unit.name, "leaves": list(unit.leaves), "options": options}


def _unit_of_plain(data: Mapping[str, Any]) -> Unit:
    options = tuple(
        Option(
            row["label"],
            checked_transform("Table", from_plain(row["make"])),
            dict(row["costs"]),
            float(row["loss"]),
            dict(row["ties"]),
        )
        for row in _rows(data["options"])
    )
    return Unit(data["name"], tuple(data["leaves"]), options)


def _rows(data: object) -> list[Mapping[str, Any]]:
    if not isinstance(data, list):
        raise TypeError(f"wanted a list, got {type(data).__name__}")
    return data
