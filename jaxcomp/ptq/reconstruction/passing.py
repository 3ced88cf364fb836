"""A block run with the activations that enter its products on grids, all of them or each with a probability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.fake import Entry, fake_quantize
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.specs import LSQ, ActSpec
from jaxcomp.core.leaves import dense
from jaxcomp.core.types import Key, Leaf
from jaxcomp.trace.cuts import Block, Values
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.sites import Site
from jaxcomp.trace.walk import Location


class Noise(NamedTuple):
    """With probability ``drop`` an element of an activation is left as it is, not rounded."""

    key: Key
    drop: float


class Inputs(NamedTuple):
    """What a block reads.

    Attributes:
      weights: its leaves, compressed ones too.
      values: what enters at the cut.
      rest: what it reads besides, :meth:`Block.rest <jaxcomp.ptq.Block.rest>`.
      ranges: of its activations, in the order of :attr:`Gridded.names`.
    """

    weights: tuple[Leaf, ...]
    values: Values
    rest: Values
    ranges: tuple[Range, ...]


class Gridded(NamedTuple):
    """A block, and what its activations become.

    Attributes:
      block: the block.
      acts: for each of its sites what a rule asks; None leaves it.
      names: the ranges that the sites need.
      trained: for each of these, whether its rule trains it.
    """

    block: Block
    acts: tuple[ActSpec | None, ...]
    names: tuple[str, ...]
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, block: Block, planned: Mapping[str, Planned]) -> Gridded:
        """From what the rules ask of the whole function's sites, by path."""
        here = [planned[path] for path in block.sites]
        names = tuple(name for p in here for name in p.ranges.values())
        trained = tuple(isinstance(getattr(p.act, "range", None), LSQ) for p in here for _ in p.ranges)
        return cls(block, tuple(p.act for p in here), names, trained)

    @property
    def shape(self) -> tuple[str, tuple[ActSpec | None, ...]]:
        """What one compiled function can serve."""
        return self.block.shape, self.acts

    def run(self) -> Callable[[Inputs, Noise | None], Values]:
        """What leaves the block; differentiable in its weights and ranges."""
        program = self.block.program
        ops = {op.location: op for op in program.flow.ops}
        sites, acts = self.block.own_sites, self.acts

        def run(given: Inputs, noise: Noise | None = None) -> Values:
            claims: dict[Location, Claim] = {}
            ranges = iter(given.ranges)
            for n, (site, act) in enumerate(zip(sites, acts, strict=True)):
                if act is None:
                    continue
                own = {i: next(ranges) for i in site.activations} if act.needs_range else {}
                side = (own, _keys(noise, n, site.layer_steps))
                drop = 0.0 if noise is None else noise.drop
                claims[site.location] = Claim(partial(_product, ops[site.location], site, (act, drop)), side)
            weights = tuple(dense(leaf) for leaf in given.weights)
            flat = program.flatten(weights, given.values, given.rest)
            return tuple(evaluate(program, claims, flat).out)

        return run


def _keys(noise: Noise | None, n: int, layers: tuple[int, ...]) -> Key | None:
    """A key for each layer of the scans around a site."""
    if noise is None:
        return None
    own = jax.random.fold_in(noise.key, n)
    return jax.random.split(own, layers) if layers else own


def _product(
    op: Op,
    site: Site,
    how: tuple[ActSpec, float],
    side: tuple[Mapping[int, Range], Key | None],
    *given: jax.Array,
) -> Sequence[jax.Array]:
    (act, drop), (ranges, key), values = how, side, list(given)
    for i in site.activations:
        x = values[i]
        rounded = fake_quantize(x, act, Entry(site.operands[i].roles, ranges.get(i))).value
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), drop, x.shape)
            rounded = jnp.where(kept, x, rounded)
        values[i] = rounded
    return op.bind(*values)
