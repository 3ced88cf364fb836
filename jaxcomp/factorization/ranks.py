"""Ranks of many leaves, chosen together: each next rank goes where it lowers the error most for what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.errors import naming
from jaxcomp.core.progress import each
from jaxcomp.core.types import Shape
from jaxcomp.factorization import decompositions as decomp
from jaxcomp.factorization.axes import Placed, Selected
from jaxcomp.factorization.bases import Count, full_moment, largest_rank, size_at, view_of, weighted_view
from jaxcomp.factorization.rank_one import deflate
from jaxcomp.factorization.specs import SVD, Budget, Energy, Tucker2

OWNER = "low_rank"
Ranks = dict[str, Count]


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
    ranks: tuple[Count | None, ...]
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
    one: Selected, moment: jax.Array | None = None, *, weight: float = 1.0, max_rank: int | None = None
) -> Ladder:
    """The ladder of one leaf; ranks at which its factors are no smaller than the leaf are left out.

    Stacked layers share one rank; their errors are averaged.
    """
    slot, at = one
    w, shape = jnp.asarray(slot.array), tuple(slot.array.shape)
    size, largest = int(w.size), largest_rank(at, shape)
    if isinstance(largest, tuple):
        ranks: list[Count] = [*_pairs(at, shape, _tails(at, w, moment))]
    else:
        pays = (size - 1) // max(1, size_at(at, shape, 1))
        ranks = list(range(1, min(largest, pays, max_rank or largest) + 1))
    errors = _errors(at, w, moment, ranks)
    sizes = [size_at(at, shape, r) for r in ranks]
    return Ladder(slot.path, (*ranks, None), np.array([*sizes, size], float), np.array([*errors, 0.0]), weight)


def _slices(at: Placed, w: jax.Array, moment: jax.Array | None) -> list[jax.Array]:
    """Each stacked layer's view, weighted by its moment."""
    wide = w.astype(compute_dtype(w.dtype))
    own = wide.reshape(-1, *w.shape[at.stacked :])
    if moment is None:
        return [view_of(at, x) for x in own]
    full = full_moment(at, w.shape, jnp.asarray(moment, wide.dtype))
    full = full.reshape(-1, *full.shape[-2:])
    return [weighted_view(at, x, decomp.moment_root(m)[0]) for x, m in zip(own, full, strict=True)]


def _errors(at: Placed, w: jax.Array, moment: jax.Array | None, ranks: list[Count]) -> list[float]:
    if not ranks:
        return []
    method = at.method
    if isinstance(method, Tucker2):
        inner, outer = _tails(at, w, moment)
        return [min(1.0, float(inner[r[0] - 1] + outer[r[1] - 1])) for r in ranks if isinstance(r, tuple)]
    found = []
    for view in _slices(at, w, moment):
        if isinstance(method, SVD):
            found.append(np.maximum(0, 1 - np.cumsum(np.asarray(decomp.energies(view), float))))
        else:
            errors = deflate(view, rank=len(ranks), steps=method.steps, refits=method.refits)[1]
            found.append(np.asarray(errors, float))
    mean = np.minimum.accumulate(np.mean(found, 0))
    return [float(mean[r - 1]) for r in ranks if isinstance(r, int)]


def _tails(at: Placed, w: jax.Array, moment: jax.Array | None) -> tuple[np.ndarray, np.ndarray]:
    """What is lost of the input and of the output features at each rank: the tails of their spectra."""
    tails: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for view in _slices(at, w, moment):
        for side, gram in zip(tails, decomp.feature_grams(decomp.normalized(view)), strict=True):
            values = np.maximum(np.asarray(jnp.linalg.eigvalsh(gram), float), 0)[::-1]
            side.append(np.maximum(0, 1 - np.cumsum(values) / max(values.sum(), np.finfo(float).tiny)))
    return np.mean(tails[0], 0), np.mean(tails[1], 0)


def _pairs(at: Placed, shape: Shape, tails: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of ranks of growing size: each next one raises the rank that loses less for its parameters."""
    inner, outer = tails
    size, pair, found = int(np.prod(shape)), (1, 1), []
    while size_at(at, shape, pair) < size:
        found.append(pair)
        a, b = pair
        steps = []
        for new, gain in (((a + 1, b), _fall(inner, a)), ((a, b + 1), _fall(outer, b))):
            if gain is not None:
                steps.append((gain / (size_at(at, shape, new) - size_at(at, shape, pair)), new))
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
        rank = one.ranks[at]
        if rank is not None:
            chosen[one.path] = rank
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
    picked = ((one.path, one.ranks[i]) for one, i in zip(ladders, at, strict=True))
    chosen: Ranks = {path: rank for path, rank in picked if rank is not None}
    return _some(chosen, ladders, target)


def _some(chosen: Ranks, ladders: list[Ladder], target: Energy | Budget) -> Ranks:
    if not chosen:
        best = {one.path: round(1 - one.errors[-2], 4) for one in ladders if len(one.ranks) > 1}
        raise ValueError(
            f"{OWNER}: at {target!r} no selected leaf gets smaller; what each keeps at the last rank that pays is"
            f" {best or 'nothing'}. Ask for less, or for other leaves."
        )
    return chosen


def chosen_ranks(
    selected: Mapping[str, Selected],
    target: Energy | Budget,
    *,
    moments: Mapping[str, jax.Array],
    reuse: Mapping[str, float] | None,
    max_rank: int | None,
) -> Ranks:
    """The ranks of the selected leaves; a leaf that stays dense has none.

    Raises:
      ValueError: see :func:`~jaxcomp.factorization.transform.choose_ranks`.
    """

    def laddered(path: str, one: Selected) -> Ladder:
        if isinstance(one.slot.array, jax.core.Tracer | jax.ShapeDtypeStruct):
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
        with naming(OWNER, path):
            return ladder(one, moments.get(path), weight=weight, max_rank=max_rank)

    ladders = [*each(laddered, selected, f"{OWNER}: ranks").values()]
    return by_energy(ladders, target) if isinstance(target, Energy) else by_budget(ladders, target)
