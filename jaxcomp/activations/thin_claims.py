"""Which leaves of a tree run as factors, and the claims that let them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from jaxcomp.activations.codes import LAYOUT
from jaxcomp.activations.execution import Record
from jaxcomp.activations.planning import BARRED, Planned
from jaxcomp.activations.thin_products import Factors, ThinOp, factors_of, moved
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.factorization.leaves import FactorLeaf
from jaxcomp.trace import nested
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location

IN_FLOAT = "its factors run in float"
"""Why a product of factors is not run on integers."""


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


def kept_factors(program: Program, params: object, rounded: bool) -> tuple[dict[str, Factors], dict[str, str]]:
    """The leaves that run as factors, by path, and why the other leaves of factors do not.

    ``rounded`` says that gradients are rounded, which needs the dense weight.
    """
    stepped = stepped_axes(program)
    kept, thick = {}, {}
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
    return kept, thick


def thinned(
    planned: Iterable[Planned], kept: Mapping[str, Factors], thick: Mapping[str, str], integer: bool, record: Record
) -> tuple[Planned, ...]:
    """The plan with the products of factors run thin; ``record`` learns which were, and why others were not."""
    return tuple(_thin(p, kept, thick, IN_FLOAT if integer and p.act is not None else "", record) for p in planned)


def _thin(p: Planned, kept: Mapping[str, Factors], thick: Mapping[str, str], at_best: str, record: Record) -> Planned:
    leaf = p.site.leaf
    if leaf is None or (leaf not in kept and leaf not in thick):
        return p
    acts = "exact" if p.act is None else "fake"
    barred = [name for name in p.site.inside if name in BARRED]
    why = f"it is inside a {barred[0]}, where nothing is rewritten" if barred else thick.get(leaf, "")
    if p.site.weight is not None and not p.site.operands[p.site.weight].exact:
        why = why or "the weight is computed from the factors' product"

    def note(found: str) -> None:
        done = acts if found else "factored" if p.act is None else f"{acts}, factored"
        record(p.site.path, done, found or at_best)

    note(why)
    return replace(p, op=ThinOp.of(p.op, note, why))


def thin_products(planned: Iterable[Planned]) -> dict[Location, Claim]:
    """Claims on the products of factors."""
    thin = (p for p in planned if isinstance(p.op, ThinOp) and BARRED.isdisjoint(p.site.inside))
    return {p.site.location: Claim(p.op.bind) for p in thin}


def thin_layouts(program: Program, kept: Mapping[str, Factors]) -> dict[Location, Claim]:
    """Claims on the layout operations between a leaf of factors and its product."""
    found = {}
    for op in program.flow.ops:
        origin = op.tags[0].origin if op.tags and op.name in LAYOUT else None
        if origin is not None and origin.exact and origin.path in kept and BARRED.isdisjoint(op.inside):
            found[op.location] = Claim(partial(moved, op))
    return found


def joins(program: Program, kept: Mapping[str, Factors]) -> set[Location]:
    """The concatenations that factors enter, which multiply them out."""
    return {
        op.location
        for op in program.flow.ops
        if op.name == "concatenate" and any(t.origin is not None and t.origin.path in kept for t in op.tags)
    }
