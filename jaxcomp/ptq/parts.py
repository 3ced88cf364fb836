"""A network as parts that follow each other, so that each is run only while its own leaves are compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from jaxcomp.core.batches import Batch
from jaxcomp.core.roles import STACKED
from jaxcomp.core.types import PyTree, Shape
from jaxcomp.ptq.growing import Growing
from jaxcomp.ptq.targets import Exact, Given, Target, gaps, targets_of
from jaxcomp.trace.cut_specs import Cuts, Scopes
from jaxcomp.trace.cuts import Block, Blocks, Values, arrays_in, cut
from jaxcomp.trace.program import Program, kind_of
from jaxcomp.trace.rows import chosen_moments
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Fn, Location

GAP = "gap of "
"""In front of a leaf's name: its :class:`~jaxcomp.ptq.targets.Gap` beside its moments."""
_WHOLE = Scopes("")


class Stage(NamedTuple):
    """What is compressed at a time.

    Fields:
      names: of leaves that multiply the same value: their numbers in the block.
      layer: the index of the layer in a scan over stacked ones; () outside.
    """

    names: tuple[str, ...]
    layer: tuple[int, ...] = ()


class Case(NamedTuple):
    """Where a batch stands: what enters the next block in the float network and in this one, and what it reads besides.

    Fields:
      exact: None where no float network runs beside.
    """

    exact: Values | None
    now: Values
    rest: Values


class Part(NamedTuple):
    """A block, and what is compressed in it.

    Fields:
      blocks: for each batch, at its shapes.
      held: numbers of the leaves that stay as they are, though they be biases.
      stages: in the program's order.
    """

    blocks: tuple[Block, ...]
    held: frozenset[str]
    stages: tuple[Stage, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the leaves, by number."""
        return self.blocks[0].paths

    @property
    def known(self) -> tuple[str, ...]:
        """Numbers of the leaves that are compressed."""
        return tuple(sorted({name for stage in self.stages for name in stage.names}))


class Asked(NamedTuple):
    """What is to be compressed.

    Fields:
      known: names of leaves.
      tree: where they are.
      more: names of those that stay as they are, though they be biases, beside the ones that are compressed already.
    """

    known: frozenset[str]
    tree: Growing
    more: frozenset[str] = frozenset()


def passes_of(fn: Fn, batches: Sequence[Batch], asked: Asked, cuts: Cuts) -> list[list[Part]]:
    """The runs of the network, each from its beginning, as parts in order; the last is the last with something to do.

    A leaf that several blocks read is compressed in a run of its own, first and by the whole network, as what it gives
    to all of them counts. Where batches of other shapes give other blocks, all leaves are.
    """
    kinds, params = [kind_of(batch) for batch in batches], asked.tree.shapes()
    first = dict(zip(reversed(kinds), reversed(batches), strict=True))

    def blocks(cuts: Cuts) -> dict[Hashable, Blocks]:
        return {kind: cut(fn, cuts)(params, *batch) for kind, batch in first.items()}

    def part(found: Mapping[Hashable, Blocks], n: int, asked: Asked) -> Part:
        each = tuple(found[kind][n] for kind in kinds)
        number = {name: str(i) for i, name in enumerate(each[0].paths)}
        every = asked.known, asked.tree.compressed | asked.more
        known, held = ({number[name] for name in some if name in number} for some in every)
        layers = {i: asked.tree.place(name)[1] for name, i in number.items()}
        return Part(each, frozenset(held), _stages(each[0].program, known, layers))

    found = blocks(cuts)
    orders = [[block.paths for block in some] for some in found.values()]
    uses = Counter(path for paths in orders[0] for path in paths)
    several = frozenset(path for path, n in uses.items() if n > 1)
    if any(order != orders[0] for order in orders):
        several = asked.known
    passes = []
    if several & asked.known:
        passes.append([part(blocks(_WHOLE), 0, asked._replace(known=several & asked.known))])
    if asked.known - several:
        left = asked._replace(known=asked.known - several, more=several)
        parts = [part(found, n, left) for n in range(len(orders[0]))]
        last = max(n for n, one in enumerate(parts) if one.stages)
        passes.append(parts[: last + 1])
    return passes


def begun(batches: Sequence[Batch], *, beside: bool) -> list[Case]:
    """All batches in front of the first block; ``rest`` is every array."""
    return [Case(() if beside else None, (), tuple(arrays_in(batch))) for batch in batches]


class Alike:
    """What is compiled for blocks of one program with the same to do.

    Args:
      part: of it.
      block: one of the part's.
      how: what leaves make up for, or None.

    Attributes:
      targets: of the leaves that have some, by number.
    """

    def __init__(self, part: Part, block: Block, how: Exact | None) -> None:
        self.targets: dict[str, list[Target]] = {}
        known = frozenset(part.known)
        gather = chosen_moments(block.between, lambda path, _: path in known)
        if how is not None:
            wanted = sorted(known - part.held)
            self.targets = targets_of(block.program, part.held, wanted, how)
            beside = gaps(block.between, part.held, list(self.targets), how=how)

        def look(chosen: Mapping[str, jax.Array], exact: Given, now: Given) -> dict[str, PyTree]:
            seen: dict[str, PyTree] = {**gather(chosen, *now)}
            if self.targets:
                found = beside({name: chosen[name] for name in self.targets}, exact, now)
                seen |= {GAP + name: gap for name, gap in found.items()}
            return seen

        self.give = jax.jit(block.between)
        self.look: Callable[..., dict[str, PyTree]] = jax.jit(look)


class Compiled:
    """The functions of all blocks so far; those that are alike share them.

    Args:
      how: what leaves make up for, or None.
    """

    def __init__(self, how: Exact | None) -> None:
        self._how = how
        self._found: dict[Hashable, Alike] = {}

    def of(self, part: Part, block: Block) -> Alike:
        """For one of a part's blocks."""
        key = block.shape, part.known, part.held
        if key not in self._found:
            self._found[key] = Alike(part, block, self._how)
        return self._found[key]


def _stages(program: Program, known: set[str], apart: Mapping[str, Shape]) -> tuple[Stage, ...]:
    """In the program's order; the layers of a scan one after the other, each with all its leaves.

    Args:
      program: of a block.
      known: numbers of the leaves that are compressed.
      apart: which layer of its leaf each number is, so that two of one leaf are not compressed at a time.
    """
    ops = {op.location: op for op in program.flow.ops}
    found: dict[tuple[Location, int, Shape], list[str]] = {}
    around: dict[str, tuple[tuple[Location, ...], Shape]] = {}
    for site in sites_of(program):
        if site.leaf not in known or site.leaf in around or site.weight is None:
            continue
        op, roles = ops[site.location], site.operands[site.weight].leaf_roles
        stacked = [i for i, role in enumerate(roles) if role == STACKED]
        sliced = bool(stacked) and stacked == list(range(len(site.layer_steps)))
        scans = tuple(loop.location for loop in op.loops if loop.layers)
        around[site.leaf] = (scans, site.layer_steps) if sliced else ((), ())
        value = op.eqn.invars[site.activations[0]] if site.activations else None  # of a table that is looked up, none
        alone = value is None or (scans and not sliced)
        key = site.location[:-1], id(op) if alone else id(value), apart[site.leaf]
        found.setdefault(key, []).append(site.leaf)
    stages: list[Stage] = []
    for (_, steps), together in groupby(found.values(), key=lambda names: around[names[0]]):
        each = [tuple(names) for names in together]
        stages += [Stage(names, layer) for layer in np.ndindex(steps) for names in each]
    return tuple(stages)
