"""Which leaves of a tree run as factors, and the claims that let them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from jaxcomp.activations.codes import LAYOUT
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.reasons import IN_FLOAT, OF_FACTORS, Record, Why, barred
from jaxcomp.activations.thin_products import ThinOp
from jaxcomp.activations.thin_values import ThinFactors, factors_of, moved
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.factorization.leaves import FactorLeaf
from jaxcomp.trace import nested
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED, JOINS
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location


def stepped_axes(program: Program) -> dict[str, set[int]]:
    """The axes of each leaf that a scan steps over."""
    stepped: dict[str, set[int]] = {}
    for op in program.flow.ops:
        if op.name == "scan":
            parts = nested.scan_parts(op.eqn)
            for tag in op.tags[parts.consts + parts.carry :]:
                if tag.origin is not None:
                    stepped.setdefault(tag.origin.path, set()).update(tag.origin.axes[0])
    return stepped


class FactorLeaves(NamedTuple):
    """The leaves of factors by path: those that run as factors, and why the others are multiplied out."""

    kept: dict[str, ThinFactors]
    thick: dict[str, str]


def kept_factors(program: Program, params: object, rounded: bool) -> FactorLeaves:
    """Which leaves run as factors, and why the other leaves of factors do not.

    ``rounded`` says that gradients are rounded, which needs the dense weight.
    """
    stepped = stepped_axes(program)
    kept: dict[str, ThinFactors] = {}
    thick: dict[str, str] = {}
    for path, leaf in leaves_with_paths(params, is_leaf=is_compressed)[0]:
        found = factors_of(leaf)
        if found is None or not isinstance(leaf, FactorLeaf):
            continue
        over = stepped.get(path, set()) - set(range(found.leaf.stacked))
        if rounded:
            thick[path] = "rounded gradients need the dense weight"
        elif over:
            thick[path] = f"a scan steps over axis {min(over)} of it; decompose it with stacked={min(over) + 1}"
        else:
            kept[path] = found
    return FactorLeaves(kept, thick)


def thinned(p: Planned, factors: FactorLeaves, *, integer: bool, record: Record) -> Planned:
    """A site with the product of factors run thin; ``record`` learns whether it was, and why no more was done."""
    leaf = p.site.leaf
    if leaf is None or (leaf not in factors.kept and leaf not in factors.thick):
        return p
    acts = "exact" if p.act is None else "fake"
    at_best = IN_FLOAT if integer and p.act is not None else None
    around = [name for name in p.site.inside if name in BARRED]
    why = barred(around[0]).reason if around else factors.thick.get(leaf, "")
    if p.site.weight is not None and not p.site.operands[p.site.weight].exact:
        why = why or "the weight is computed from the factors' product"

    def note(found: str) -> None:
        done = acts if found else "factored" if p.act is None else f"{acts}, factored"
        record(p.site.path, done, Why(found, OF_FACTORS) if found else at_best)

    note(why)
    return replace(p, op=ThinOp.of(p.op, note, why))


def thin_products(planned: Iterable[Planned]) -> dict[Location, Claim]:
    """Claims on the products of factors."""
    thin = (p for p in planned if isinstance(p.op, ThinOp) and BARRED.isdisjoint(p.site.inside))
    return {p.site.location: Claim(p.op.bind) for p in thin}


def thin_layouts(program: Program, kept: Mapping[str, ThinFactors]) -> dict[Location, Claim]:
    """Claims on the layout operations between a leaf of factors and its product."""
    found = {}
    for op in program.flow.ops:
        origin = op.tags[0].origin if op.tags and op.name in LAYOUT else None
        if origin is not None and origin.exact and origin.path in kept and BARRED.isdisjoint(op.inside):
            found[op.location] = Claim(partial(moved, op))
    return found


def joins(program: Program, kept: Mapping[str, object]) -> set[Location]:
    """The concatenations that leaves enter which are kept as they are, by path: there they are multiplied out."""
    return {
        op.location
        for op in program.flow.ops
        if op.name in JOINS and any(t.origin is not None and t.origin.path in kept for t in op.tags)
    }
