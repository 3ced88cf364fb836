"""Plans made real: which channels stay, the small function, its leaves, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxcomp.artifact.files import file_size
from jaxcomp.core.leaves import pack
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Params, PyTree
from jaxcomp.search.channels import Widths, unit_name, with_channels
from jaxcomp.search.judging import Judge
from jaxcomp.search.menus import Choosing
from jaxcomp.search.options import Table
from jaxcomp.search.plans import Plan
from jaxcomp.structure.groups import channel_groups
from jaxcomp.structure.plans import Plan as Kept
from jaxcomp.structure.plans import mask
from jaxcomp.structure.shrinking import shrink

Fn = Callable[..., PyTree]


@dataclass
class Built:
    """A plan made real.

    Attributes:
      plan: what was decided.
      kept: which channels stay; None where all do.
      fn: the function at these widths.
      params: what it takes, not compressed.
      leaves: the same compressed and packed.
      costs: of it all; the bytes are those of the file.
    """

    plan: Plan
    kept: Kept | None
    fn: Fn
    params: Params
    leaves: Params
    costs: dict[str, float]


@dataclass
class Builder:
    """What makes plans real, of one network.

    Attributes:
      fn: the function.
      menus: its units and options.
      judge: of the distance from it.
      widths: which channels may go; found when they are first needed.
      original: what it takes as it is.
    """

    fn: Fn
    menus: Choosing
    judge: Judge
    widths: Widths | None = None
    original: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = [self.menus.costs(self.menus.made_plain(name)) for name in self.menus.units]
        plain.append(dict(self.menus.rest().options[0].costs))
        self.original = {name: sum(costs[name] for costs in plain) for name in plain[0]}
        self.original["bytes"] = float(file_size(self.menus.params))

    def with_channels(self, table: Table, levels: Sequence[float]) -> Table:
        """The table with decisions on channels."""
        groups = channel_groups(self.fn)(self.menus.params, *self.judge.batches[0])
        if not len(groups):
            return table
        self.widths = Widths.of(groups, self.menus.params, levels=levels)
        with progress("compress: measuring channels", len(groups) * len(levels)) as advance:
            return with_channels(table, self.widths, self.menus.params, judge=self.judge, done=advance)

    def built(self, plan: Plan) -> Built:
        """The leaves of a plan, packed, at the widths that it has."""
        kept = self.kept(plan)
        if kept is not None and all(k == g.units for k, g in zip(kept.counts, kept.groups, strict=True)):
            kept = None
        fn = self.fn if kept is None else shrink(self.fn, kept)
        params = self.menus.params if kept is None else kept.take(self.menus.params)
        transform = plan.transform
        leaves = pack(transform.apply(transform.init(params), params))
        return Built(plan, kept, fn, params, leaves, self.costs(plan, leaves))

    def kept(self, plan: Plan) -> Kept | None:
        """The channels that stay; None where the plan decides on none."""
        numbers = [g for g in range(len(plan.table)) if any(unit.name == unit_name(g) for unit in plan.table)]
        if not numbers:
            return None
        if self.widths is None:  # a plan of an earlier call
            groups = channel_groups(self.fn)(self.menus.params, *self.judge.batches[0])
            levels = {float(option.label) for g in numbers for option in plan.table[unit_name(g)].options} | {1.0}
            self.widths = Widths.of(groups, self.menus.params, levels=sorted(levels))
        return self.widths.chosen(plan.choice)

    def costs(self, plan: Plan, leaves: Params) -> dict[str, float]:
        """The sums of the plan, and of the bytes what the file has."""
        return {**plan.costs, "bytes": float(file_size(leaves, coding=self.menus.terms.coding))}

    def distance(self, plan: Plan) -> float:
        """Of the whole plan on the calibration data; channels that go are masked: the same, and compiled already."""
        kept, transform = self.kept(plan), plan.transform
        params = self.menus.params if kept is None else mask(kept)(self.menus.params)
        return self.judge(transform.apply(transform.init(params), params))
