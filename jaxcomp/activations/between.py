"""What stands between the products of a prepared tree, and attention, where nothing else is asked of the equations."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from jaxcomp.activations.attention import attentions
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.reasons import Record
from jaxcomp.activations.regions import Region
from jaxcomp.activations.row_functions import row_functions
from jaxcomp.trace.levels import levels_of
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location

ONE_PASS = "one pass on cpu"
"""How the products of attention run, in a report."""


def regions_of(
    program: Program,
    planned: Iterable[Planned],
    claimed: Collection[Location],
    links: Collection[Location],
    record: Record,
) -> list[Region]:
    """Attention and functions of rows of a program.

    Args:
      program: it.
      planned: its sites.
      claimed: equations of which something else is asked.
      links: products whose results become codes where they are made.
      record: learns of attention.
    """
    sites, levels = {p.site.location: p for p in planned}, levels_of(program)
    found = [one for one in attentions(sites, levels) if not any(op.location in claimed for op in one.ops)]
    for one in found:
        for op in (one.ops[0], one.ops[-1]):
            record(sites[op.location].site.path, "exact", sites[op.location].why, ONE_PASS)
    taken = {*claimed, *(op.location for one in found for op in one.ops)} - sites.keys() | {*links}
    return [*found, *row_functions(sites, levels, taken)]
