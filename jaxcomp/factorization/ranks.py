"""Ranks of many leaves, chosen together: each next rank goes where it lowers the error most for what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.slots import Slot
from jaxcomp.factorization import decompositions as decomp
from jaxcomp.factorization.bases import full_moment, largest_rank, size_at, view_of, weighted_view
from jaxcomp.factorization.rank_one import deflate
from jaxcomp.factorization.specs import SVD, Budget, Energy, Method, Tucker2

OWNER = "low_rank"
Ranks = dict[str, int | tuple[int, int]]


@dataclass(frozen=True)
class Ladder:
    """What a leaf may become, the cheapest first; the last rung is the dense leaf.

    Attributes:
      path: of the leaf.
      ranks: None for the dense leaf.
      sizes: parameters.
      errors: the part of the squared norm that is lost; falls.
      weight: what one parameter costs.
    """

    path: str
    ranks: tuple[Any, ...]
    sizes: np.ndarray
    errors: np.ndarray
    weight: float

    @property
    def costs(self) -> np.ndarray:
        """The cost of each rung."""
        return self.sizes * self.weight

    def best_step(self, at: int, room: float) -> tuple[float, int] | None:
        """The rung above ``at`` with the largest fall of error per cost among those that ``room`` pays for."""
        costs, errors = self.costs[at + 1 :] - self.costs[at], self.errors[at] - self.errors[at + 1 :]
        fits = costs <= room
        if not fits.any():
            return None
        gains = np.where(fits, errors / costs, -np.inf)
        step = int(np.argmax(gains))
        return float(gains[step]), at + 1 + step


def ladder(
    method: Method, slot: Slot, moment: Any = None, *, weight: float = 1.0, max_rank: int | None = None
) -> Ladder:
    """The ladder of one leaf; ranks at which its factors are no smaller than the leaf are left out.

    Stacked layers share one rank; their errors are averaged.
    """
    w, shape = jnp.asarray(slot.array), tuple(slot.array.shape)
    size, largest = int(w.size), largest_rank(method, shape)
    if isinstance(largest, tuple):
        ranks: list[Any] = _pairs(method, shape, _tails(method, w, moment))
    else:
        pays = (size - 1) // max(1, size_at(method, shape, 1))
        ranks = list(range(1, min(largest, pays, max_rank or largest) + 1))
    errors = _errors(method, w, moment, ranks)
    sizes = [size_at(method, shape, r) for r in ranks]
    return Ladder(slot.path, (*ranks, None), np.array([*sizes, size], float), np.array([*errors, 0.0]), weight)


def _slices(method: Method, w: jax.Array, moment: Any) -> list[jax.Array]:
    """Each stacked layer's view, weighted by its moment."""
    wide = w.astype(compute_dtype(w.dtype))
    own = wide.reshape(-1, *w.shape[method.stacked :])
    if moment is None:
        return [view_of(method, x) for x in own]
    full = full_moment(method, w.shape, jnp.asarray(moment, wide.dtype))
    full = full.reshape(-1, *full.shape[-2:])
    return [weighted_view(method, x, decomp.moment_root(m)[0]) for x, m in zip(own, full, strict=True)]


def _errors(method: Method, w: jax.Array, moment: Any, ranks: list[Any]) -> list[float]:
    if not ranks:
        return []
    if isinstance(method, Tucker2):
        inner, outer = _tails(method, w, moment)
        return [min(1.0, float(inner[a - 1] + outer[b - 1])) for a, b in ranks]
    found = []
    for view in _slices(method, w, moment):
        if isinstance(method, SVD):
            found.append(np.maximum(0, 1 - np.cumsum(np.asarray(decomp.energies(view), float))))
        else:
            errors = deflate(view, rank=len(ranks), steps=method.steps, refits=method.refits)[1]
            found.append(np.asarray(errors, float))
    mean = np.minimum.accumulate(np.mean(found, 0))
    return [float(mean[r - 1]) for r in ranks]


def _tails(method: Method, w: jax.Array, moment: Any) -> tuple[np.ndarray, np.ndarray]:
    """What is lost of the input and of the output features at each rank: the tails of their spectra."""
    tails: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for view in _slices(method, w, moment):
        for side, gram in zip(tails, decomp.feature_grams(decomp.normalized(view)), strict=True):
            values = np.maximum(np.asarray(jnp.linalg.eigvalsh(gram), float), 0)[::-1]
            side.append(np.maximum(0, 1 - np.cumsum(values) / max(values.sum(), np.finfo(float).tiny)))
    return np.mean(tails[0], 0), np.mean(tails[1], 0)


def _pairs(method: Method, shape: tuple[int, ...], tails: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of ranks of growing size: each next one raises the rank that loses less for its parameters."""
    inner, outer = tails
    size, pair, found = int(np.prod(shape)), (1, 1), []
    while size_at(method, shape, pair) < size:
        found.append(pair)
        a, b = pair
        steps = []
        for new, gain in (((a + 1, b), _fall(inner, a)), ((a, b + 1), _fall(outer, b))):
            if gain is not None:
                steps.append((gain / (size_at(method, shape, new) - size_at(method, shape, pair)), new))
        if not steps:
            break
        pair = max(steps)[1]
    return found


def _fall(tail: np.ndarray, rank: int) -> float | None:
    return None if rank >= len(tail) else float(tail[rank - 1] - tail[rank])


def by_energy(ladders: list[Ladder], target: Energy) -> Ranks:
    """The smallest rung of each leaf that keeps the energy.

    Raises:
      ValueError: no leaf gets smaller.
    """
    slack = 4 * float(np.finfo(np.float32).eps)
    chosen: Ranks = {}
    for one in ladders:
        at = int(np.argmax(one.errors <= 1 - target.fraction + slack))
        if one.ranks[at] is not None:
            chosen[one.path] = one.ranks[at]
    return _some(chosen, ladders, target)


def by_budget(ladders: list[Ladder], target: Budget) -> Ranks:
    """Climbs the ladders, the best step of all first, until the budget is met.

    Raises:
      ValueError: the lowest rungs cost more than the budget (it says the smallest reachable), or no leaf gets smaller.
    """
    at = [0] * len(ladders)
    full = sum(one.costs[-1] for one in ladders)
    spent = sum(one.costs[0] for one in ladders)
    asked = target.params if target.params is not None else target.macs
    limit = np.inf if asked is None else asked * full * (1 + 1e-9)
    if spent > limit:
        raise ValueError(
            f"{OWNER}: {target!r} cannot be met: rank 1 everywhere leaves {spent / full:.4f}; ask for that at least, or"
            " select other leaves."
        )
    open_ones = set(range(len(ladders)))
    while open_ones:
        lost = float(np.mean([one.errors[i] for one, i in zip(ladders, at, strict=True)]))
        if target.error is not None and lost <= target.error:
            break
        steps = {i: ladders[i].best_step(at[i], limit - spent) for i in open_ones}
        open_ones = {i for i, step in steps.items() if step is not None}
        if not open_ones:
            break
        best = max(open_ones, key=lambda i: (steps[i] or (0.0, 0))[0])
        new = (steps[best] or (0.0, 0))[1]
        spent += ladders[best].costs[new] - ladders[best].costs[at[best]]
        at[best] = new
    chosen = {one.path: one.ranks[i] for one, i in zip(ladders, at, strict=True) if one.ranks[i] is not None}
    return _some(chosen, ladders, target)


def _some(chosen: Ranks, ladders: list[Ladder], target: Any) -> Ranks:
    if not chosen:
        best = {one.path: round(1 - one.errors[-2], 4) for one in ladders if len(one.ranks) > 1}
        raise ValueError(
            f"{OWNER}: at {target!r} no selected leaf gets smaller; what each keeps at the last rank that pays is"
            f" {best or 'nothing'}. Ask for less, or for other leaves."
        )
    return chosen


def chosen_ranks(
    selected: Mapping[str, Slot],
    target: Energy | Budget,
    method: Method,
    moments: Mapping[str, Any],
    reuse: Mapping[str, float] | None,
    max_rank: int | None,
) -> Ranks:
    """The ranks of the selected leaves; a leaf that stays dense has none.

    Raises:
      ValueError: see :func:`~jaxcomp.factorization.transform.choose_ranks`.
    """
    ladders = []
    for path, slot in selected.items():
        if isinstance(slot.array, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"{OWNER}: ranks by {target!r} depend on the values of {path!r}, which are not known inside jit or"
                " eval_shape; call choose_ranks(params, target) outside and pass its result as the rank."
            )
        weight = 1.0
        if isinstance(target, Budget) and target.macs is not None:
            if reuse is None or path not in reuse:
                raise ValueError(
                    f"{OWNER}: Budget(macs=…) needs to know how often {path!r} is multiplied; pass"
                    " reuse=reuse_of(fn)(params, *args), or leave it out by a rule."
                )
            weight = reuse[path]
        try:
            ladders.append(ladder(method, slot, moments.get(path), weight=weight, max_rank=max_rank))
        except ValueError as e:
            raise ValueError(f"{OWNER}: {path!r} {e}.") from e
    return by_energy(ladders, target) if isinstance(target, Energy) else by_budget(ladders, target)
