"""Search that asks for candidates and is told their scores: for objectives that are no sum over layers.

A search is pure: ``state = init(key)``; ``candidates = ask(state)``; ``state = tell(state, candidates, scores)``. What
is asked depends on the state alone, and a state is a tree of arrays, so a search that was killed goes on from what was
saved, and gives what it would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import jax
import numpy as np

from jaxcomp.core.paths import some_paths
from jaxcomp.core.specs import Spec, check_key, is_integer, is_number
from jaxcomp.core.types import Key, PyTree

Candidate = Mapping[str, object]
"""A value for each decision, by name."""
Repair = Callable[[dict[str, object]], Candidate]
"""From a candidate to one that is possible."""


@dataclass(frozen=True)
class Choice(Spec):
    """One of some values, in no order.

    Args:
      values: two or more, all different, such as 2, 4, 8 bits.

    Raises:
      ValueError: fewer, or one twice.
    """

    values: tuple[object, ...]

    def __post_init__(self) -> None:
        values = tuple(self.values)
        if len(values) < 2 or any(a == b for i, a in enumerate(values) for b in values[:i]):
            raise ValueError(f"Choice: wants two or more different values, got {values!r}.")
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Interval(Spec):
    """A number from ``low`` to ``high``, both included, such as a sparsity.

    Raises:
      ValueError: no finite numbers, or none between them.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and -math.inf < self.low < self.high < math.inf):
            raise ValueError(f"Interval: wants finite numbers low < high, got {self.low!r} and {self.high!r}.")


Space = Mapping[str, Choice | Interval]
"""What is decided, by name and in order."""


class Search(NamedTuple):
    """Three pure functions.

    Fields:
      init: ``init(key) -> state``.
      ask: ``ask(state) -> candidates``, the same ones until the state is told their scores.
      tell: ``tell(state, candidates, scores) -> state``; scores are better the higher they are, and one that is no
        finite number is that of a candidate that cannot be.
    """

    init: Callable[[Key], State]
    ask: Callable[[State], list[dict[str, object]]]
    tell: Callable[[State, Sequence[Candidate], Sequence[float]], State]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a search knows; a tree of arrays, for any checkpoint.

    Args:
      key: the data of its random key.
      generation: how often it was told.
      best: the best candidate so far, a number a decision: the place of a choice's value, or the number itself.
      score: of that one; minus infinity before the first.
      inner: what the method learned.
    """

    key: np.ndarray
    generation: np.ndarray
    best: np.ndarray
    score: np.ndarray
    inner: PyTree

    def found(self, space: Space) -> tuple[dict[str, object], float]:
        """The best candidate so far with its score.

        Args:
          space: what was searched.

        Raises:
          ValueError: nothing was told yet that has a score.
        """
        if not np.isfinite(self.score):
            raise ValueError("State: no candidate had a finite score yet; tell the search some.")
        return candidate_of(space, self.best), float(self.score)

    def told(self, rows: np.ndarray, scores: np.ndarray, inner: PyTree) -> Self:
        """The state one generation later."""
        at = int(np.argmax(scores))
        better = scores[at] > self.score
        best, score = (rows[at], np.array(scores[at])) if better else (self.best, self.score)
        return replace(self, generation=self.generation + 1, best=best, score=score, inner=inner)

    def random(self) -> np.random.Generator:
        """The randomness of this generation, whatever was drawn before."""
        return np.random.default_rng([int(self.generation), *map(int, np.asarray(self.key).ravel())])


def begun(space: Space, key: Key, inner: PyTree) -> State:
    """The state before anything was asked."""
    check_key("init", key)
    data = key if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.key_data(key)
    return State(np.asarray(data), np.array(0), np.zeros(len(space)), np.array(-np.inf), inner)


def candidate_of(space: Space, row: np.ndarray) -> dict[str, object]:
    """The candidate that numbers stand for.

    >>> candidate_of({"bits": Choice((2, 4)), "sparsity": Interval(0.0, 1.0)}, np.array([1.0, 0.25]))
    {'bits': 4, 'sparsity': 0.25}
    """
    return {
        name: what.values[int(x)] if isinstance(what, Choice) else float(x)
        for (name, what), x in zip(space.items(), row, strict=True)
    }


def row_of(space: Space, candidate: Candidate) -> np.ndarray:
    """The inverse of :func:`candidate_of`.

    Raises:
      ValueError: a decision is missing, or its value lies outside.
    """
    if set(candidate) != set(space):
        raise ValueError(f"tell: a candidate decides {some_paths(candidate)}, wanted {some_paths(space)}.")
    row = []
    for name, what in space.items():
        value = candidate[name]
        if isinstance(what, Choice):
            at = next((float(i) for i, v in enumerate(what.values) if v == value), None)
        else:
            at = float(value) if is_number(value) and what.low <= value <= what.high else None
        if at is None:
            raise ValueError(f"tell: {name!r} is {value!r}, wanted of {what!r}.")
        row.append(at)
    return np.array(row)


def checked_scores(
    space: Space, candidates: Sequence[Candidate], scores: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates as rows, and their scores, minus infinity for what is no finite number.

    Raises:
      ValueError: not as many scores as candidates, or none that is finite.
    """
    if len(candidates) != len(scores) or not candidates:
        raise ValueError(f"tell: wants a score for each candidate, got {len(scores)} for {len(candidates)}.")
    values = np.array([float(s) for s in scores])
    values = np.where(np.isfinite(values), values, -np.inf)
    if not np.isfinite(values).any():
        raise ValueError(
            f"tell: none of {len(values)} scores is a finite number; ask with a repair= that makes candidates possible,"
            " or score those that are not by how far they are from it."
        )
    return np.stack([row_of(space, c) for c in candidates]), values


def checked_space(owner: str, space: Space, population: int) -> None:
    """Checks what every search takes.

    Raises:
      ValueError: nothing to decide, or fewer than two candidates at a time.
      TypeError: a decision that is no Choice and no Interval.
    """
    if not space:
        raise ValueError(f"{owner}: there is nothing to decide; give a Choice or an Interval by name.")
    for name, what in space.items():
        if not isinstance(what, Choice | Interval):
            raise TypeError(f"{owner}: {name!r} is {what!r}, wanted a Choice or an Interval.")
    if not is_integer(population) or population < 2:
        raise ValueError(f"{owner}: population must be an integer, 2 or more, got {population!r}.")


def repaired(
    space: Space, rows: np.ndarray, repair: Callable[[dict[str, object]], Candidate] | None
) -> list[dict[str, object]]:
    """Rows as candidates, each as ``repair`` leaves it."""
    found = [candidate_of(space, row) for row in rows]
    return found if repair is None else [dict(repair(candidate)) for candidate in found]


def cross_entropy(
    space: Space,
    *,
    population: int = 64,
    elite: float = 0.125,
    smoothing: float = 0.7,
    least: float = 0.01,
    repair: Repair | None = None,
) -> Search:
    """The cross-entropy method over choices and intervals: draw, keep the best part, draw more like these.

    Choices have a probability each, intervals a normal distribution, cut to the interval.

    Args:
      space: what is decided, by name.
      population: candidates asked for at a time.
      elite: the part of them that the next distribution is fitted to; two at least.
      smoothing: the weight of the new distribution beside the old one, in (0, 1].
      least: the smallest probability of a choice, and the smallest deviation as a part of an interval, which halves
        every ten generations: without it the first lucky draw decides.
      repair: makes a candidate possible, one over a budget say; the method learns from what it makes.

    Raises:
      ValueError: a number out of range.

    >>> search = cross_entropy({"bits": Choice((2, 4, 8)), "sparsity": Interval(0.0, 1.0)})
    >>> state = search.init(jax.random.key(0))
    >>> for _ in range(20):
    ...     asked = search.ask(state)
    ...     state = search.tell(state, asked, [-abs(c["bits"] - 4) - (c["sparsity"] - 0.3) ** 2 for c in asked])
    >>> best, score = state.found({"bits": Choice((2, 4, 8)), "sparsity": Interval(0.0, 1.0)})
    >>> best["bits"], round(best["sparsity"], 2)
    (4, 0.3)

    Source: Rubinstein 1999, Methodology and Computing in Applied Probability 1; the deviation's floor: Szita and
    Lőrincz 2006, Neural Computation 18.
    """
    owner = "cross_entropy"
    checked_space(owner, space, population)
    for name, x in (("elite", elite), ("smoothing", smoothing), ("least", least)):
        if not is_number(x) or not 0 < x <= 1:
            raise ValueError(f"{owner}: {name} must be a number in (0, 1], got {x!r}.")
    kinds = list(space.values())

    def init(key: Key) -> State:
        return begun(space, key, [_start(what) for what in kinds])

    def ask(state: State) -> list[dict[str, object]]:
        rng = state.random()
        columns = [_drawn(rng, what, p, population) for what, p in zip(kinds, state.inner, strict=True)]
        return repaired(space, np.stack(columns, 1), repair)

    def tell(state: State, candidates: Sequence[Candidate], scores: Sequence[float]) -> State:
        rows, values = checked_scores(space, candidates, scores)
        count = min(max(2, round(elite * len(rows))), int(np.isfinite(values).sum()))
        best = rows[np.argsort(-values, kind="stable")[:count]]
        floor = least * 0.5 ** (int(state.generation) / 10)
        old = zip(kinds, state.inner, best.T, strict=True)
        inner = [_fitted(what, p, column, smoothing=smoothing, floor=floor) for what, p, column in old]
        return state.told(rows, values, inner)

    return Search(init, ask, tell)


def _start(what: Choice | Interval) -> np.ndarray:
    """Probabilities of a choice's values; mean and deviation within an interval."""
    if isinstance(what, Choice):
        return np.full(len(what.values), 1 / len(what.values))
    return np.array([(what.low + what.high) / 2, (what.high - what.low) / 2])


def _drawn(rng: np.random.Generator, what: Choice | Interval, p: np.ndarray, count: int) -> np.ndarray:
    if isinstance(what, Choice):
        return rng.choice(len(what.values), size=count, p=p / p.sum()).astype(float)
    return np.clip(rng.normal(p[0], p[1], count), what.low, what.high)


def _fitted(
    what: Choice | Interval, old: np.ndarray, best: np.ndarray, *, smoothing: float, floor: float
) -> np.ndarray:
    if isinstance(what, Choice):
        found = np.bincount(best.astype(int), minlength=len(what.values)) / len(best)
        mixed = np.maximum(smoothing * found + (1 - smoothing) * old, min(floor, 1 / len(what.values)))
        return mixed / mixed.sum()
    mixed = smoothing * np.array([best.mean(), best.std()]) + (1 - smoothing) * old
    return np.array([mixed[0], max(mixed[1], floor * (what.high - what.low))])
