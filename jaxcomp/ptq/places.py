"""Where the rows of a leaf lie in it, and whether what is asked for fits them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jaxcomp.core.errors import count_known, naming
from jaxcomp.core.layouts import Layout
from jaxcomp.core.paths import some_paths
from jaxcomp.core.roles import Roles
from jaxcomp.core.slots import Slot
from jaxcomp.core.types import Shape
from jaxcomp.pruning.specs import NM
from jaxcomp.ptq.columns import Rule
from jaxcomp.quantization.blocks import Cut
from jaxcomp.quantization.grids import Grid
from jaxcomp.quantization.scales import Fixed, ScaleRule
from jaxcomp.trace.matrices import Matrices, matrices_of
from jaxcomp.trace.rows import Moments

Keep = NM | float
"""Which weights stay: n of every m neighbours that a product sums over, or all but a fraction."""


class How(NamedTuple):
    """What is asked of every leaf; the fields are arguments of :func:`~jaxcomp.ptq.second_order.gptq`."""

    owner: str
    grid: Grid | None
    per: Layout
    scale: ScaleRule | None
    keep: Keep | None
    by_activation: bool
    reached: bool
    damping: float


class Place(NamedTuple):
    """How a leaf's rows lie in it: static.

    Fields:
      axes: the order in which a solver wants them.
      blocks: of its scales along each axis.
      group: rows of one scale that is found when they are reached; 0 for scales that are found before.
    """

    axes: Matrices
    blocks: Shape
    group: int

    def cut(self, slot: Slot, owner: str) -> Cut:
        """The leaf as a quantizer sees it."""
        return Cut(owner, slot.path, slot.array, slot.full_mask, self.blocks)

    def rule(self, how: How) -> Rule:
        """What is done to its rows."""
        return Rule(
            how.grid,
            self.group,
            None if isinstance(how.scale, Fixed) else how.scale,
            how.keep,
            by_activation=how.by_activation,
            damping=float(how.damping),
        )


def place_of(slot: Slot, moments: Mapping[str, Moments], how: How) -> Place:
    """Where the rows of a leaf are.

    Raises:
      ValueError: nobody knows, or what is asked for does not fit them; the message names the path.
    """
    shape = tuple(slot.array.shape)
    with naming(how.owner, slot.path):
        seen = moments.get(slot.leaf_path) if slot.path == slot.leaf_path else None
        if seen is None:
            raise ValueError(f"has no moments, which are of {some_paths(moments)}; gather them, or narrow where")
        fits = max((*seen.apart, *seen.summed), default=-1) < len(shape)
        sizes = [tuple(shape[i] for i in seen.apart), math.prod(shape[i] for i in seen.summed)] if fits else []
        if [seen.second.shape[:-2], seen.second.shape[-1]] != sizes:
            raise ValueError(
                f"has shape {shape}, and its moments, of shape {seen.second.shape}, are of another; gather them again"
            )
        _check_numbers(seen)
        _check_neighbours(how.keep, seen, shape)
    roles = Roles({slot.leaf_path: seen.roles(len(shape))})
    blocks, row = slot.blocks(how.per, roles, how.owner)
    if row:
        raise ValueError(
            f"{how.owner}: {slot.path!r} would be cut in buckets across its rows; take Channels(), Groups(size) or"
            " Tensor()."
        )
    return Place(matrices_of(seen, len(shape)), blocks, _group(how, seen, shape, blocks))


def _group(how: How, seen: Moments, shape: Shape, blocks: Shape) -> int:
    """How many neighbouring rows share a scale that is found when they are reached; 0 where scales are found before.

    Where rows are pruned too, they are found before: whole groups would go one after the other, and which weights stay
    is settled better where each row goes by its own activation.
    """
    known = how.keep is not None or not how.reached or isinstance(how.scale, Fixed)
    if how.grid is None or how.grid.scale_grid is not None or known:
        return 0
    *before, last = seen.summed
    apart = all(blocks[i] == n for i, n in enumerate(shape) if i not in seen.summed)
    runs = all(blocks[i] == shape[i] for i in before) and blocks[last] < shape[last]
    group = shape[last] // blocks[last]
    whole = blocks[last] == 1 and not any(shape[i] > 1 for i in before)
    return group if apart and runs and not whole else 0


def _check_numbers(seen: Moments) -> None:
    bad = count_known(lambda x: ~jnp.isfinite(x), seen.second)
    if bad:
        raise ValueError(
            f"has moments with {bad} values that are not finite, of {seen.second.size}; mend the batch that made them"
        )


def _check_neighbours(keep: Keep | None, seen: Moments, shape: Shape) -> None:
    if not isinstance(keep, NM):
        return
    axis = seen.summed[-1]
    if keep.axis is not None and keep.axis % len(shape) != axis:
        raise ValueError(
            f"is pruned along axis {axis}, the last that products sum over, and {keep} names another; name none"
        )
    if shape[axis] % keep.m:
        raise ValueError(
            f"has {shape[axis]} elements along axis {axis} of shape {shape}, which groups of {keep.m} do not divide;"
            " leave it out by a rule"
        )
