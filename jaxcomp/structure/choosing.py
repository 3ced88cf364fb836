"""``plan``: which units to remove, to reach a sparsity or a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.paths import Where, describe, matches
from jaxcomp.core.specs import share_of
from jaxcomp.core.types import Params
from jaxcomp.structure.groups import Group, Groups
from jaxcomp.structure.plans import Plan
from jaxcomp.structure.scores import UnitScore, UnitScores, l2

_STEPS = 4096  # how finely a uniform sparsity is searched


def plan(
    groups: Groups,
    params: Params,
    *,
    sparsity: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    latency: tuple[Callable[[Plan], float], float] | None = None,
    score: UnitScore | None = None,
    scope: Literal["uniform", "global"] = "uniform",
    round_to: int | Callable[[Group], int] = 1,
    min_channels: int = 1,
    exclude: Where | None = None,
) -> Plan:
    """Chooses the units to remove: as few as meet exactly one of the four targets.

    Args:
      groups: from ``channel_groups``.
      params: the tree of arrays to score. Of ``jax.ShapeDtypeStruct`` the first units stay: widths, parameters and
        macs are the same whichever go.
      sparsity: the fraction of units to remove, of each group (uniform) or of all (global), in [0, 1).
      parameters: at most so many parameters, as ``0.5 * groups.parameters()``.
      macs: at most so many multiply-adds of the traced call, as ``0.25 * groups.macs()``.
      latency: ``(measure, target)``: ``measure(plan)`` gives seconds (or any cost that falls as units go) and is
        called about a dozen times.
      score: which units matter; ``l2()`` by default.
      scope: "uniform" takes the same fraction of every group; "global" takes the lowest-scored units of all groups,
        each group's scores divided by their mean. Layers of a stack lose equally many units.
      round_to: widths are rounded to the nearest multiple of this (8, 128), counting the narrowest slice of a unit
        (a head of 64 is a multiple of 8 already); or a function of the group, for one multiple each. A group
        narrower than it stays whole.
      min_channels: at least so many units of each group stay.
      exclude: groups that touch a parameter selected by this rule stay whole.

    Raises:
      ValueError: shapes where values matter, for a score or "global"; not exactly one target; a target out of range;
        no groups; ``exclude`` matches nothing; the smallest network that the other arguments allow is still over the
        budget (the message says what it needs).

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> half = plan(groups, params, sparsity=0.5)
    >>> half.widths, half.take(params)["up"].tolist()
    ({'down': (2, 1), 'up': (1, 2)}, [[3.0, 2.0]])
    """
    targets = {"sparsity": sparsity, "parameters": parameters, "macs": macs, "latency": latency}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"plan: give exactly one of sparsity, parameters, macs, latency; got {given or 'none'}.")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"plan: sparsity must be a fraction in [0, 1), got {sparsity}.")
    if scope not in ("uniform", "global"):
        raise ValueError(f"plan: scope must be 'uniform' or 'global', got {scope!r}.")
    if min_channels < 1:
        raise ValueError(f"plan: min_channels must be at least 1, got {min_channels}.")
    if not len(groups):
        stays = "\n  ".join(map(repr, groups.frozen))
        raise ValueError(f"plan: no channel can be removed: channel_groups froze every dimension:\n  {stays}")
    scores = _scored(groups, params, score, scope)
    _check_scores(groups, scores)
    ladder = _Ladder(groups, scores, scope, round_to, min_channels, _excluded(groups, params, exclude))
    if sparsity is not None:
        return ladder.plan(share_of(sparsity, ladder.top))
    if latency is not None:
        return _search(ladder, *latency, "latency")
    if parameters is not None:
        return _search(ladder, lambda p: p.parameters, parameters, "parameters")
    assert macs is not None
    return _search(ladder, lambda p: p.macs, macs, "macs")


def _scored(groups: Groups, params: Params, score: UnitScore | None, scope: str) -> UnitScores:
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        return (score or l2())(groups, params)
    if score is not None or scope == "global":
        raise ValueError(
            "plan: these parameters are shapes, and which units matter is in their values; give arrays, or take"
            " scope='uniform' without a score, for widths alone."
        )
    falling = (-np.arange(group.units, dtype=np.float64) for group in groups)
    return tuple(np.tile(x, (g.layers, 1)) if g.layers else x for x, g in zip(falling, groups, strict=True))


def _search(ladder: _Ladder, cost: Callable[[Plan], float], limit: float, name: str) -> Plan:
    """The least removal within the limit, by bisection."""
    best = ladder.plan(ladder.top)
    least = cost(best)
    if least > limit:
        raise ValueError(
            f"plan: {name} of at most {limit:,g} cannot be met: the smallest reachable is {least:,g}, with "
            f"{best.counts} units left in each group; allow it by a smaller min_channels or round_to, a narrower "
            "exclude, or a larger budget."
        )
    low, high = 0, ladder.top
    while low < high:
        middle = (low + high) // 2
        if ladder.counts(middle) == best.counts:
            high = middle
            continue
        tried = ladder.plan(middle)
        if cost(tried) <= limit:
            best, high = tried, middle
        else:
            low = middle + 1
    return best


class _Ladder:
    """Plans that remove ever more: step 0 removes nothing, step ``top`` all that may go."""

    def __init__(
        self,
        groups: Groups,
        scores: UnitScores,
        scope: str,
        round_to: int | Callable[[Group], int],
        min_channels: int,
        excluded: Sequence[bool],
    ) -> None:
        self.groups, self.scores, self.min_channels, self.excluded = groups, scores, min_channels, excluded
        self.multiples = [_multiple(g, round_to) for g in groups]
        self.uniform = scope == "uniform"
        ranked = [_ranked(s) for s in scores]
        pruned = [r for r, out in zip(ranked, excluded, strict=True) if not out]
        self.pooled = np.sort(np.concatenate([np.zeros(0), *pruned]))
        self.ranked = ranked
        self.top = _STEPS if self.uniform else len(self.pooled)

    def counts(self, step: int) -> list[int]:
        """How many units of each group stay."""
        kept = []
        for i, group in enumerate(self.groups):
            if self.excluded[i]:
                kept.append(group.units)
            elif self.uniform:
                kept.append(self._rounded(i, group.units * (1 - step / self.top)))
            else:
                bar = self.pooled[step] if step < self.top else np.inf
                kept.append(self._rounded(i, float((self.ranked[i] >= bar).sum())))
        return kept

    def _rounded(self, i: int, wanted: float) -> int:
        units, by = self.groups[i].units, self.multiples[i]
        nearest = math.floor(wanted / by + 0.5) * by
        least = -(-self.min_channels // by) * by
        return min(units, max(nearest, least))

    def plan(self, step: int) -> Plan:
        """The plan that keeps the highest-scored units."""
        kept = []
        for score, count in zip(self.scores, self.counts(step), strict=True):
            order = np.argsort(-score, axis=-1, kind="stable")
            kept.append(np.sort(order[..., :count], axis=-1))
        return Plan(self.groups, tuple(kept))


def _ranked(score: NDArray[np.float64]) -> NDArray[np.float64]:
    """A group's scores over their mean; of a stack, the mean over layers of the r-th largest."""
    ranked = score if score.ndim == 1 else np.sort(score, axis=-1).mean(0)
    finite = ranked[np.isfinite(ranked)]
    mean = finite.mean() if len(finite) else 1.0
    return ranked / (mean or 1.0)


def _multiple(group: Group, round_to: int | Callable[[Group], int]) -> int:
    multiple = round_to(group) if callable(round_to) else round_to
    if multiple < 1:
        raise ValueError(f"plan: round_to must be at least 1, got {multiple} for {group!r}.")
    return multiple // math.gcd(multiple, math.gcd(*(s.width for s in group.slices)))


def _excluded(groups: Groups, params: Params, exclude: Where | None) -> list[bool]:
    if exclude is None:
        return [False] * len(groups)
    out = [any(matches(exclude, path, None) for path in g.paths) for g in groups]
    if not any(out):
        raise ValueError(f"plan: exclude={describe(exclude)} matches no parameter of any group:\n{groups!r}")
    return out


def _check_scores(groups: Groups, scores: UnitScores) -> None:
    for group, score in zip(groups, scores, strict=True):
        wanted = (group.layers, group.units) if group.layers else (group.units,)
        if score.shape != wanted or np.isnan(score).any():
            raise ValueError(
                f"plan: the score of {group!r} must have shape {wanted} and no NaN, got shape {score.shape} with "
                f"{int(np.isnan(score).sum())} NaN."
            )
