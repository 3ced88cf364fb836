"""Evolution, as a search that asks and is told: the best so far are changed a little and crossed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcomp.core.specs import is_integer, is_number
from jaxcomp.core.types import Key
from jaxcomp.search.ask_tell import (
    Candidate,
    Choice,
    Interval,
    Repair,
    Search,
    Space,
    State,
    begun,
    checked_scores,
    checked_space,
    repaired,
)


def evolution(
    space: Space, *, population: int = 32, parents: int = 8, mutation: float = 0.1, repair: Repair | None = None
) -> Search:
    """Evolution over choices and intervals: half of the candidates are changed parents, half are crossed ones.

    The first generation is drawn at random; from then on the best that were ever told are the parents. Good where
    something good is known before: tell it that with the first generation.

    Args:
      space: what is decided, by name.
      population: candidates asked for at a time.
      parents: how many of the best are kept.
      mutation: the probability that a decision of a changed parent is drawn anew, of an interval by a normal step of a
        fifth of its length; one at least is.
      repair: makes a candidate possible, one over a budget say.

    Raises:
      ValueError: a number out of range.

    >>> import jax
    >>> space = {"bits": Choice((2, 4, 8)), "sparsity": Interval(0.0, 1.0)}
    >>> search = evolution(space)
    >>> state = search.init(jax.random.key(0))
    >>> for _ in range(20):
    ...     asked = search.ask(state)
    ...     state = search.tell(state, asked, [-abs(c["bits"] - 4) - (c["sparsity"] - 0.3) ** 2 for c in asked])
    >>> best, score = state.found(space)
    >>> best["bits"], round(best["sparsity"], 1)
    (4, 0.3)

    Source: Guo et al. 2020 (single path one-shot), arXiv:1904.00420, algorithm 1.
    """
    checked_space("evolution", space, population)
    if not is_integer(parents) or parents < 2:
        raise ValueError(f"evolution: parents must be an integer, 2 or more, got {parents!r}.")
    if not is_number(mutation) or not 0 < mutation <= 1:
        raise ValueError(f"evolution: mutation must be a number in (0, 1], got {mutation!r}.")
    kinds = list(space.values())

    def init(key: Key) -> State:
        return begun(space, key, (np.zeros((0, len(kinds))), np.zeros(0)))

    def ask(state: State) -> list[dict[str, object]]:
        rng, (best, _) = state.random(), state.inner
        if not len(best):
            rows = np.stack([_drawn(rng, what, population) for what in kinds], 1)
        else:
            half = population // 2
            rows = np.concatenate([_changed(rng, kinds, best, mutation, half), _crossed(rng, best, population - half)])
        return repaired(space, rows, repair)

    def tell(state: State, candidates: Sequence[Candidate], scores: Sequence[float]) -> State:
        rows, values = checked_scores(space, candidates, scores)
        every = np.concatenate([state.inner[0], rows]), np.concatenate([state.inner[1], values])
        _, first = np.unique(every[0], axis=0, return_index=True)
        first = np.sort(first[np.isfinite(every[1][first])])
        kept = first[np.argsort(-every[1][first], kind="stable")[:parents]]
        return state.told(rows, values, (every[0][kept], every[1][kept]))

    return Search(init, ask, tell)


def _drawn(rng: np.random.Generator, what: Choice | Interval, count: int) -> np.ndarray:
    if isinstance(what, Choice):
        return rng.integers(0, len(what.values), count).astype(float)
    return rng.uniform(what.low, what.high, count)


def _changed(
    rng: np.random.Generator, kinds: Sequence[Choice | Interval], best: np.ndarray, mutation: float, count: int
) -> np.ndarray:
    rows = best[rng.integers(0, len(best), count)]
    anew = rng.random(rows.shape) < mutation
    anew[np.arange(count), rng.integers(0, len(kinds), count)] = True
    for d, what in enumerate(kinds):
        if isinstance(what, Choice):
            other = _drawn(rng, what, count)
        else:
            other = np.clip(rows[:, d] + rng.normal(0, (what.high - what.low) / 5, count), what.low, what.high)
        rows[:, d] = np.where(anew[:, d], other, rows[:, d])
    return rows


def _crossed(rng: np.random.Generator, best: np.ndarray, count: int) -> np.ndarray:
    one, two = (best[rng.integers(0, len(best), count)] for _ in range(2))
    return np.where(rng.random(one.shape) < 0.5, one, two)
