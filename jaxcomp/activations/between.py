"""What stands between the products of a prepared tree, and attention, where nothing else is asked of the equations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import jax

from jaxcomp.activations.attention import attentions
from jaxcomp.activations.execution import Around
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.rounded_attention import ONE_PASS, rounded_attention
from jaxcomp.activations.row_functions import row_functions
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.levels import levels_of
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, Value


def claims_between(
    program: Program,
    planned: Iterable[Planned],
    claimed: Collection[Location],
    around: Around,
    to_array: Callable[[Value], jax.Array],
) -> dict[Location, Claim]:
    """Claims on attention and functions of rows of a program.

    Args:
      program: it.
      planned: its sites.
      claimed: equations of which something else is asked.
      around: what the claims of sites have in common; its record learns of attention.
      to_array: gives a value as an array.
    """
    sites, levels = {p.site.location: p for p in planned}, levels_of(program)
    found = []
    for one in attentions(sites, levels, integer=around.mode.integer):
        first, last = (sites[op.location] for op in (one.ops[0], one.ops[-1]))
        others = [op for op in one.ops if op.location in claimed]
        if first.act is None is last.act and not others:
            found.append(one)
            for p in (first, last):
                around.record(p.site.path, "exact", p.why, ONE_PASS)
        elif others == [first.op, last.op] and (rounded := rounded_attention(one, first, last, around)) is not None:
            found.append(rounded)
    taken = {*claimed, *(op.location for one in found for op in one.ops)} - sites.keys() | around.made.links.keys()
    found += row_functions(sites, levels, taken, integer=around.mode.integer)
    return {at: claim for region in found for at, claim in region.claims(to_array, around.made).items()}
