"""A network of every width at once: its parameters at full size, masked to widths that a compiled program is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxcomp.core.paths import path_str
from jaxcomp.core.specs import is_integer, is_number
from jaxcomp.core.types import Key, Leaf, Params
from jaxcomp.structure.groups import Group, Groups
from jaxcomp.structure.plans import Plan
from jaxcomp.structure.scores import UnitScore, l2

LEVELS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""The parts of each group's units that may stay."""


@dataclass(frozen=True, eq=False)
class Supernet:
    """What may stay of each group of channels, and which units go first; ``slimmable`` makes it.

    A width is a vector of counts: how many units of each group stay, those of the lowest rank.

    Attributes:
      groups: of the program.
      ranks: of each group the place of every unit, 0 for the one that goes last, shape (units,), or (layers, units) of
        a stack whose layers keep units of their own.
      levels: parts that may stay, rising, the last of them 1.
      table: the counts at each level, shape (groups, levels).
    """

    groups: Groups
    ranks: tuple[NDArray[np.int64], ...]
    levels: tuple[float, ...]
    table: NDArray[np.int32]

    @property
    def widest(self) -> NDArray[np.int32]:
        """All units of every group."""
        return self.table[:, -1]

    @property
    def narrowest(self) -> NDArray[np.int32]:
        """The least level of every group."""
        return self.table[:, 0]

    def uniform(self, level: float) -> NDArray[np.int32]:
        """The counts at one of the levels, alike in all groups.

        Raises:
          ValueError: it is not one of the levels.
        """
        if level not in self.levels:
            raise ValueError(f"Supernet: level must be one of {self.levels}, got {level!r}.")
        return self.table[:, self.levels.index(level)]

    def drawn(self, key: Key) -> jax.Array:
        """Random counts of int32, shape (groups,): each group's level is drawn between two that are drawn first.

        Drawn from all levels each, counts of many groups would nearly always sum up to a middling network: narrow and
        wide ones, and those of one level throughout, are trained as often this way. May run in jit.
        """
        ends, each = jax.random.split(key)
        between = jnp.sort(jax.random.randint(ends, (2,), 0, len(self.levels)))
        at = jax.random.randint(each, (len(self.groups),), between[0], between[1] + 1)
        return jnp.asarray(self.table)[jnp.arange(len(self.groups)), at]

    def masked(self, params: Params, counts: ArrayLike) -> Params:
        """The parameters with zeros in all units but the first ``counts`` of each group.

        Counts may be traced, so one compiled program has every width; ``fn`` of the result is what ``shrink`` gives of
        :meth:`plan`, exactly but for the order of sums.

        Args:
          params: the full-size tree.
          counts: integers of shape (groups,).

        Raises:
          ValueError: the tree is not the one that the groups were read for, or the counts have another shape.
        """
        if np.shape(counts) != (len(self.groups),):
            raise ValueError(f"Supernet: counts must have shape ({len(self.groups)},), got {np.shape(counts)}.")
        Plan(self.groups, tuple(np.arange(g.units) for g in self.groups)).check(params, self.groups.shapes)
        stays = [_stays(rank, count) for rank, count in zip(self.ranks, jnp.asarray(counts), strict=True)]

        def zeroed(path: str, leaf: Leaf) -> Leaf:
            for g, axis, unit_of in self._owners.get(path, ()):
                mask = stays[g][..., unit_of]
                sizes = {axis: mask.shape[-1]} | ({0: mask.shape[0]} if mask.ndim == 2 else {})
                mask = mask.reshape([sizes.get(d, 1) for d in range(leaf.ndim)])
                leaf = jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
            return leaf

        return jax.tree_util.tree_map_with_path(lambda path, leaf: zeroed(path_str(path), leaf), params)

    @cached_property
    def _owners(self) -> dict[str, list[tuple[int, int, NDArray[np.int64]]]]:
        """By path: the group, the axis and the unit of each of its indices; -1, the group's last entry, where none."""
        found: dict[str, list[tuple[int, int, NDArray[np.int64]]]] = {}
        for g, group in enumerate(self.groups):
            for s in group.slices:
                found.setdefault(s.path, []).append((g, s.axis, s.unit_of))
        return found

    def plan(self, counts: ArrayLike | Sequence[int]) -> Plan:
        """The plan of structure: ``plan.take(params)`` are the smaller parameters, ``shrink(fn, plan)`` runs them.

        Args:
          counts: integers of shape (groups,), each from 1 to the group's units.

        Raises:
          ValueError: counts outside.
        """
        wanted = np.asarray(counts)
        units = np.array([g.units for g in self.groups])
        if wanted.shape != units.shape or (wanted < 1).any() or (wanted > units).any():
            raise ValueError(f"Supernet: counts must be from 1 to {units.tolist()}, got {wanted.tolist()}.")
        kept = [np.argsort(rank, axis=-1)[..., :n] for rank, n in zip(self.ranks, wanted, strict=True)]
        return Plan(self.groups, tuple(np.sort(k, axis=-1) for k in kept))

    def __repr__(self) -> str:
        shown = ", ".join(f"{level:g}" for level in self.levels)
        lines = [f"  {row.tolist()} of {group!r}" for group, row in zip(self.groups, self.table, strict=True)]
        return "\n".join([f"Supernet(levels {shown}", *lines]) + ")"


def _stays(rank: NDArray[np.int64], count: jax.Array) -> jax.Array:
    """Which units stay, and behind them True for the indices of none of them."""
    within = jnp.asarray(rank, jnp.int32) < count.astype(jnp.int32)
    return jnp.concatenate([within, jnp.ones((*rank.shape[:-1], 1), bool)], -1)


def slimmable(
    groups: Groups,
    params: Params,
    *,
    levels: Sequence[float] = LEVELS,
    score: UnitScore | None = None,
    round_to: int | Callable[[Group], int] = 1,
) -> Supernet:
    """A supernet of a program's channel groups, units sorted by importance.

    Args:
      groups: from ``channel_groups`` of the function as it is used, at inference.
      params: the full-size tree, to score; of a network that is not trained yet any order is as good as another.
      levels: the parts of each group's units that may stay, in (0, 1], with 1 among them.
      score: which units matter; ``l2()`` by default.
      round_to: counts are rounded up to multiples of this many units, or of what a function gives of each group.

    Raises:
      ValueError: no groups; levels outside, doubled, or without 1; a multiple below 1; scores that are NaN.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcomp.structure import channel_groups, shrink
    >>> def mlp(p, x):
    ...     return jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[3.0, 0.1, 2.0, 0.2]]), "down": jnp.ones((4, 1))}
    >>> x = jnp.ones((2, 1))
    >>> net = slimmable(channel_groups(mlp)(params, x), params, levels=(0.5, 1))
    >>> program = jax.jit(lambda params, counts: mlp(net.masked(params, counts), x)[0, 0])
    >>> [round(float(program(params, net.uniform(level))), 3) for level in net.levels]
    [5.0, 5.3]
    >>> half = net.plan(net.uniform(0.5))
    >>> half.take(params)["up"].tolist(), float(shrink(mlp, half)(half.take(params), x)[0, 0])
    ([[3.0, 2.0]], 5.0)

    Source: slimmable networks, Yu et al. 2019, arXiv:1812.08928; sorted channels: Cai et al. 2020, arXiv:1908.09791,
    section 3.3. Widths of groups that a program ties (residual sums, heads) are one here, read off the program.
    """
    if not len(groups):
        raise ValueError("slimmable: no channel can be removed, see groups.frozen for why; there is nothing to slim.")
    parts = tuple(sorted(levels))
    if not all(is_number(x) and 0 < x <= 1 for x in parts) or len(set(parts)) < len(parts) or 1.0 not in parts:
        raise ValueError(f"slimmable: levels are different parts in (0, 1] with 1 among them, got {levels!r}.")
    scores = (score or l2())(groups, params)
    ranks = []
    for group, found in zip(groups, scores, strict=True):
        if np.isnan(found).any():
            raise ValueError(f"slimmable: the score of {group!r} has {int(np.isnan(found).sum())} NaN.")
        ranks.append(np.argsort(np.argsort(-found, axis=-1, kind="stable"), axis=-1))
    rows = [_counts(group, parts, round_to(group) if callable(round_to) else round_to) for group in groups]
    return Supernet(groups, tuple(ranks), tuple(map(float, parts)), np.array(rows, np.int32))


def _counts(group: Group, levels: Sequence[float], multiple: int) -> list[int]:
    if not is_integer(multiple) or multiple < 1:
        raise ValueError(f"slimmable: round_to must be at least 1, got {multiple!r} for {group!r}.")
    return [min(group.units, max(1, -(-round(x * group.units) // multiple)) * multiple) for x in levels]
