"""Which affine chains are folded, and where their biases go; and why others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxcomp.core.paths import some_paths
from jaxcomp.core.types import Shape
from jaxcomp.trace import nested
from jaxcomp.trace.chains import Chain, Step, Unfolded, find_chains
from jaxcomp.trace.program import Program
from jaxcomp.trace.tags import Tag
from jaxcomp.trace.walk import Location


class Fold(NamedTuple):
    """What became of one site: its ``path``, the leaf that now holds the ``bias``, and the leaves that are ``gone``."""

    path: str
    bias: str | None
    gone: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A chain that is folded, and what becomes of its leaves."""

    chain: Chain
    fold: Fold


def plan_folds(program: Program) -> tuple[tuple[Planned, ...], tuple[Unfolded, ...]]:
    """The chains that can be folded, and where their biases go; and what is left."""
    uses = _uses(program)
    found = find_chains(program)
    left = list(found.left)
    chains = [c for c in found.chains if uses.get(c.site.leaf or "") == [c.site.location]]
    left += [Unfolded(c.site.path, "its kernel is used at another place too") for c in found.chains if c not in chains]
    shapes = {p: tuple(a.shape) for p, a in zip(program.param_paths, program.jaxpr.in_avals, strict=False)}
    while True:
        planned = _assigned(chains, uses, shapes)
        if len(planned) == len(chains):
            return tuple(planned), tuple(left)
        kept = [p.chain for p in planned]
        left += [Unfolded(c.site.path, _homeless(c)) for c in chains if c not in kept]
        chains = kept


def _homeless(chain: Chain) -> str:
    leaves = some_paths(sorted(chain.params)) or "no leaves"
    return f"its bias of shape {chain.shape} has no home: none of {leaves} has its size and serves this product alone"


def _assigned(chains: Sequence[Chain], uses: dict[str, list[Location]], shapes: dict[str, Shape]) -> list[Planned]:
    """Gives each chain a leaf for its bias; chains that need one and find none are left out."""
    folded = {step.op.location for chain in chains for step in chain.steps if not step.moves}
    taken: set[str] = set()
    planned = []
    for chain in chains:
        free = [p for step in chain.steps for p in _leaves(step) if set(uses.get(p, ())) <= folded and p not in taken]
        fitting = [path for path in free if _holds(shapes[path], chain)]
        if not fitting and _shifts(chain):
            continue
        bias = fitting[-1] if _shifts(chain) else None
        taken |= set(free)
        gone = tuple(dict.fromkeys(path for path in free if path != bias))
        planned.append(Planned(chain, Fold(chain.site.path, bias, gone)))
    return planned


def _holds(shape: Shape, chain: Chain) -> bool:
    """Whether a leaf of ``shape`` can hold the chain's bias: it has its layers in front, and as many elements."""
    layers = chain.site.layer_steps
    return shape[: len(layers)] == layers and math.prod(shape) == math.prod(chain.shape)


def _leaves(step: Step) -> list[str]:
    return sorted(frozenset().union(*(tag.params for tag in step.op.tags)))


def _shifts(chain: Chain) -> bool:
    return any(step.op.name in {"add", "sub"} for step in chain.steps)


def _uses(program: Program) -> dict[str, list[Location]]:
    """Where each leaf, or what is made of leaves alone, meets a value that is not; ``()`` for the result."""
    uses: dict[str, list[Location]] = {}

    def used(tags: Sequence[Tag], at: Location) -> None:
        for path in {p for tag in tags for p in tag.params | ({tag.origin.path} if tag.origin else set())}:
            uses.setdefault(path, []).append(at)

    for op in program.flow.ops:
        if op.name == "scan":
            parts = nested.scan_parts(op.eqn)
            used(op.tags[parts.consts : parts.consts + parts.carry], op.location)
        elif op.name in {"while", "cond"} or (not nested.is_open(op.eqn) and any(tag.args for tag in op.tags)):
            used(op.tags, op.location)
    used(program.flow.out_tags, ())
    return uses
