"""The walk of a reconstruction over a network's blocks, and what is compiled for blocks that are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.planning import Planned
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.types import Key, Leaf, Params, PyTree
from jaxcomp.ptq.reconstruction.learning import (
    Case,
    Fixed,
    Learned,
    Learner,
    Training,
    begin,
    hard,
    is_float,
    with_learned,
)
from jaxcomp.ptq.reconstruction.passing import Gridded, Inputs
from jaxcomp.trace.cuts import Block, Blocks, Values
from jaxcomp.trace.ranges import Range

Importance = Callable[[PyTree, Key], jax.Array]
"""From the function's result and a key to a number whose gradient says how much each value matters."""


class BlockError(NamedTuple):
    """How far a block is from the float network's: squared errors over the target's square, on the given batches.

    Attributes:
      name: its sites.
      before: with weights rounded to nearest and the ranges as given, behind the blocks that were done before it.
      after: as it is left.
    """

    name: str
    before: float
    after: float


class Calibration(NamedTuple):
    """The arrays of each batch; the importance of what leaves each block, if asked for; and a key."""

    cases: list[list[jax.Array]]
    weighed: list[list[Values]] | None
    key: Key

    def rests(self, block: Block) -> list[Values]:
        """What the block reads of each batch's arguments."""
        return [block.rest(arrays) for arrays in self.cases]

    def marks(self, n: int) -> Sequence[Values | None]:
        """The importance of what leaves block ``n``, for each batch."""
        return [None] * len(self.cases) if self.weighed is None else [w[n] for w in self.weighed]


class Blockwise:
    """One reconstruction: the blocks, what is asked of them, and the functions compiled so far."""

    def __init__(self, blocks: Blocks, planned: Sequence[Planned], params: Params, training: Training) -> None:
        self.blocks, self.params, self.training = blocks, params, training
        by_path = {p.site.path: p for p in planned}
        self.gridded = [Gridded.of(block, by_path) for block in blocks]
        self.learners: dict[object, Learner] = {}

    def learner(self, gridded: Gridded) -> Learner:
        """The functions of blocks like this one."""
        if gridded.shape not in self.learners:
            self.learners[gridded.shape] = Learner(gridded, self.training)
        return self.learners[gridded.shape]

    def learns(self, rounded: Params) -> bool:
        """Whether anything is to be learned."""
        soft = any(begin(block.weights(rounded), (), ()).any() for block in self.blocks)
        return soft or any(any(gridded.trained) for gridded in self.gridded)

    def importances(self, objective: Importance, cases: list[list[jax.Array]], key: Key) -> list[list[Values]]:
        """For each batch and block, squares of the objective's gradient by what leaves the block; their mean is 1."""

        def through(moved: list[Values], params: Params, arrays: list[jax.Array], key: Key) -> jax.Array:
            values: Values = ()
            for block, by in zip(self.blocks, moved, strict=True):
                found = zip(block.of(params, values, arrays), by, strict=True)
                values = tuple(x if dx is None else x + dx for x, dx in found)
            return objective(self.blocks.result(values), key)

        @jax.jit
        def squares(params: Params, arrays: list[jax.Array], key: Key) -> list[Values]:
            shapes = jax.eval_shape(self.crossing, params, arrays)
            zero = [tuple(jnp.zeros(s.shape, s.dtype) if is_float(s) else None for s in some) for some in shapes]
            grads = jax.grad(through)(zero, params, arrays, key)
            return jax.tree.map(lambda g: jnp.square(g) / jnp.mean(jnp.square(g)), grads)

        keys = [jax.random.fold_in(key, i) for i in range(len(cases))]
        return [jax.device_get(squares(self.params, arrays, k)) for arrays, k in zip(cases, keys, strict=True)]

    def crossing(self, params: Params, arrays: list[jax.Array]) -> list[Values]:
        """What leaves each block."""
        found: list[Values] = []
        for block in self.blocks:
            found.append(block.of(params, found[-1] if found else (), arrays))
        return found

    def all(
        self, rounded: Params, ranges: Mapping[str, Range], on: Calibration
    ) -> tuple[Params, dict[str, Range], tuple[BlockError, ...]]:
        """All blocks, in order: the tree, the ranges, and the errors."""
        named, treedef = leaves_with_paths(rounded, is_leaf=is_compressed)
        leaves, ranges = dict(named), dict(ranges)
        exact: list[Values] = [()] * len(on.cases)
        quantized, errors = exact, []
        with progress("reconstruct: steps", len(self.blocks) * self.training.steps) as advance:
            for n, (block, gridded) in enumerate(zip(self.blocks, self.gridded, strict=True)):
                rests, learner = on.rests(block), self.learner(gridded)
                target = self.targets(gridded, exact, rests)
                cases = [Case(*x) for x in zip(quantized, exact, rests, target, on.marks(n), strict=True)]
                before = Part(tuple(leaves[p] for p in block.paths), tuple(ranges[r] for r in gridded.names))
                one = _One(learner, gridded, cases, jax.random.fold_in(on.key, n))
                after, error = one.reconstructed(before, advance)
                errors.append(error)
                leaves.update(zip(block.paths, after.weights, strict=True))
                ranges.update(zip(gridded.names, after.ranges, strict=True))
                quantized, exact = [learner.give(one.inputs(after, case)) for case in cases], target
        return treedef.unflatten([leaves[path] for path, _ in named]), ranges, tuple(errors)

    def targets(self, gridded: Gridded, exact: list[Values], rests: list[Values]) -> list[Values]:
        """What leaves a block of the float network, for each batch."""
        give = self.learner(gridded._replace(acts=(None,) * len(gridded.acts))).give
        weights = gridded.block.weights(self.params)
        return [give(Inputs(weights, x, rest, ())) for x, rest in zip(exact, rests, strict=True)]


class Part(NamedTuple):
    """A block's leaves and ranges."""

    weights: tuple[Leaf, ...]
    ranges: tuple[Range, ...]


class _One(NamedTuple):
    """One block and its batches."""

    learner: Learner
    gridded: Gridded
    cases: list[Case]
    key: Key

    def inputs(self, part: Part, case: Case) -> Inputs:
        """What the compressed block reads."""
        return Inputs(part.weights, case.quantized, case.rest, part.ranges)

    def error(self, part: Part) -> tuple[float, float]:
        """The squared error over all batches, and the targets' square."""
        found = [self.learner.error(self.inputs(part, case), case) for case in self.cases]
        error, square = np.asarray(found, np.float64).sum(0)
        if not np.isfinite(error):
            raise ValueError(
                f"reconstruct: the block {self.gridded.block.name} gives values that are not finite; look at the "
                "parameters, the ranges and the batches."
            )
        return float(error), float(square)

    def reconstructed(self, begun: Part, advance: Callable[[float], None]) -> tuple[Part, BlockError]:
        """The block's leaves, hard, and its ranges; and its errors."""
        nearest = begun._replace(weights=hard(begun.weights))
        error, square = self.error(nearest)
        learned = begin(begun.weights, begun.ranges, self.gridded.trained)
        name, scale = self.gridded.block.name, square or 1.0
        if not error or not learned.any():
            advance(self.learner.training.steps)
            return nearest, BlockError(name, error / scale, error / scale)
        fixed = Fixed(*begun, jnp.float32(error / len(self.cases)))
        learned = self.learned(learned, fixed, advance)
        leaves, ranges = with_learned(fixed, learned)
        found = Part(hard(leaves), ranges)
        after, _ = self.error(found)
        if after > error:
            found, after = nearest, error
        return found, BlockError(name, error / scale, after / scale)

    def learned(self, learned: Learned, fixed: Fixed, advance: Callable[[float], None]) -> Learned:
        """After all steps."""
        carry = self.learner.start(learned)
        for step in range(self.learner.training.steps):
            case = self.cases[step % len(self.cases)]
            carry, _ = self.learner.step(carry, fixed, case, (np.int32(step), self.key))
            advance(1)
        return carry[0]
