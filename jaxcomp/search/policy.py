"""A small agent that decides layer after layer and learns from the whole's score: in the manner of AMC and HAQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.core.specs import check_positive, is_number
from jaxcomp.core.types import Key, PyTree
from jaxcomp.search.ask_tell import (
    Candidate,
    Choice,
    Repair,
    Search,
    Space,
    State,
    begun,
    checked_scores,
    checked_space,
    repaired,
)

Net = Mapping[str, jax.Array]


def policy_gradient(
    space: Space,
    *,
    features: Mapping[str, Sequence[float]] | None = None,
    population: int = 32,
    hidden: int = 32,
    learning_rate: float = 0.02,
    entropy: float = 0.01,
    repair: Repair | None = None,
) -> Search:
    """REINFORCE: an agent goes through the decisions in order, sees each one's features and what it decided before.

    One small network decides everything, so what it learns of a layer holds for layers alike. Its choices are
    categorical, its numbers logistic-normal within their interval. A generation's scores, less their mean and over
    their deviation, weight the gradient.

    Args:
      space: what is decided, by name and in order.
      features: numbers that describe a decision, its layer's size and depth say, as many for each; by default only its
        place.
      population: candidates asked for at a time.
      hidden: the width of the agent's layer.
      learning_rate: of Adam, one step a generation.
      entropy: the weight of the decisions' entropy beside the scores, so that the agent goes on trying.
      repair: makes a candidate possible, one over a budget say (HAQ lowers bits in order until it is met); the agent
        learns as if it had decided so.

    Raises:
      ValueError: a number out of range, or features that are not of each decision and alike in number.

    >>> space = {f"layer {i}": Choice((2, 4, 8)) for i in range(3)}
    >>> search = policy_gradient(space)
    >>> state = search.init(jax.random.key(0))
    >>> for _ in range(40):
    ...     asked = search.ask(state)
    ...     state = search.tell(state, asked, [-sum(abs(b - 4) for b in c.values()) for c in asked])
    >>> state.found(space)
    ({'layer 0': 4, 'layer 1': 4, 'layer 2': 4}, 0.0)

    Source: Williams 1992, Machine Learning 8; He et al. 2018, arXiv:1802.03494 (AMC); Wang et al. 2018,
    arXiv:1811.08886 (HAQ). Both train an actor and a critic by DDPG and one candidate at a time; scores of a whole
    generation need no critic.
    """
    _check(space, population, hidden, learning_rate=learning_rate, entropy=entropy)
    task = _task("policy_gradient", space, features)
    optimizer = optax.adam(learning_rate)
    draw = jax.jit(lambda net, key: jax.vmap(lambda k: _drawn(task, net, k))(jax.random.split(key, population)))
    step = jax.jit(lambda inner, told: _step(task, optimizer, inner, told=told, entropy=entropy))

    def init(key: Key) -> State:
        state = begun(space, key, ())
        net = _net(state.random(), task.table.shape[1] + 1, hidden, task.counts.max() + 2)
        inner = jax.tree.map(np.asarray, (net, optimizer.init(net)))
        return begun(space, key, inner)

    def ask(state: State) -> list[dict[str, object]]:
        key = jax.random.key(int(state.random().integers(2**31)))
        rows = np.asarray(draw(state.inner[0], key), np.float64)
        return repaired(space, task.bounded(rows), repair)

    def tell(state: State, candidates: Sequence[Candidate], scores: Sequence[float]) -> State:
        rows, values = checked_scores(space, candidates, scores)
        finite = np.isfinite(values)
        spread = values[finite].std() or 1.0
        filled = np.where(finite, values, values[finite].min() - spread)
        weights = (filled - filled.mean()) / (filled.std() or 1.0)
        inner = step(state.inner, _Told(rows.astype(np.float32), weights.astype(np.float32)))
        return state.told(rows, values, jax.tree.map(np.asarray, inner))

    return Search(init, ask, tell)


def _check(space: Space, population: int, hidden: int, **amounts: float) -> None:
    """Checks what the agent is made of.

    Raises:
      ValueError: a number out of range.
    """
    owner = "policy_gradient"
    checked_space(owner, space, population)
    check_positive(owner, hidden, "hidden")
    for name, x in amounts.items():
        if not is_number(x) or x < 0:
            raise ValueError(f"{owner}: {name} must be a number, 0 or more, got {x!r}.")


class _Told(NamedTuple):
    """Candidates as rows, ``(population, decisions)``, and what weight the gradient of each has."""

    rows: np.ndarray
    weights: np.ndarray


class _Task(NamedTuple):
    """The decisions as arrays, one row each; a choice's count is that of its values, an interval's is 0."""

    table: np.ndarray
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def bounded(self, rows: np.ndarray) -> np.ndarray:
        """Numbers within their intervals, which float32 may leave by a rounding."""
        return np.clip(rows, self.low, self.high)


def _task(owner: str, space: Space, features: Mapping[str, Sequence[float]] | None) -> _Task:
    """The decisions.

    Raises:
      ValueError: features that are not of each decision and alike in number.
    """
    n = len(space)
    places = np.linspace(-1, 1, n)[:, None] if n > 1 else np.zeros((1, 1))
    if features is None:
        table = np.concatenate([places, np.eye(n)], 1)
    else:
        if set(features) != set(space) or len({len(f) for f in features.values()}) != 1:
            raise ValueError(f"{owner}: features= wants equally many numbers for each of {', '.join(space)}.")
        given = np.array([list(map(float, features[name])) for name in space])
        spread = given.std(0)
        table = np.concatenate([places, (given - given.mean(0)) / np.where(spread > 0, spread, 1)], 1)
    counts = np.array([len(what.values) if isinstance(what, Choice) else 0 for what in space.values()])
    low = np.array([0.0 if isinstance(what, Choice) else what.low for what in space.values()])
    high = np.array([len(what.values) - 1.0 if isinstance(what, Choice) else what.high for what in space.values()])
    return _Task(table.astype(np.float32), counts, low, high)


def _net(rng: np.random.Generator, inputs: int, hidden: int, outputs: int) -> dict[str, np.ndarray]:
    """A hidden layer at random, and outputs that begin at 0: all choices alike."""
    return {
        "in": rng.normal(0, inputs**-0.5, (inputs, hidden)).astype(np.float32),
        "bias": np.zeros(hidden, np.float32),
        "out": np.zeros((hidden, outputs), np.float32),
        "offset": np.zeros(outputs, np.float32),
    }


def _heads(task: _Task, net: Net, at: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one decision after the one before, a number in 0..1: log probabilities of choices, mean, log deviation."""
    seen = jnp.append(jnp.asarray(task.table)[at], before)
    out = jnp.tanh(seen @ net["in"] + net["bias"]) @ net["out"] + net["offset"]
    known = jnp.arange(len(out) - 2) < jnp.maximum(jnp.asarray(task.counts)[at], 1)
    return jax.nn.log_softmax(jnp.where(known, out[:-2], -jnp.inf)), out[-2], jnp.clip(out[-1], -3.0, 1.0)


def _drawn(task: _Task, net: Net, key: Key) -> jax.Array:
    """A candidate as a row, each decision after the one before."""
    low, width = (jnp.asarray(x, jnp.float32) for x in (task.low, task.high - task.low))

    def one(before: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(jax.random.fold_in(key, at))
        log_p, mean, log_deviation = _heads(task, net, at, before)
        choice = jax.random.categorical(first, log_p).astype(jnp.float32)
        inside = jax.nn.sigmoid(mean + jnp.exp(log_deviation) * jax.random.normal(second))
        value = jnp.where(jnp.asarray(task.counts)[at] > 0, choice, low[at] + width[at] * inside)
        return (value - low[at]) / width[at], value

    return jax.lax.scan(one, jnp.float32(0), jnp.arange(len(task.counts)))[1]


def _log_density(task: _Task, net: Net, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How likely the agent is to decide a row, up to what does not depend on the agent, and its decisions' entropy."""
    low, width = (jnp.asarray(x, jnp.float32) for x in (task.low, task.high - task.low))
    part = (row - low) / width

    def one(at: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p, mean, log_deviation = _heads(task, net, at, before)
        known = jnp.where(jnp.isfinite(log_p), log_p, 0.0)
        inside = jnp.clip(part[at], 1e-3, 1 - 1e-3)
        reached = jnp.log(inside) - jnp.log1p(-inside)
        number = -0.5 * ((reached - mean) * jnp.exp(-log_deviation)) ** 2 - log_deviation
        is_choice = jnp.asarray(task.counts)[at] > 0
        choice = known[jnp.where(is_choice, row[at], 0.0).astype(jnp.int32)]
        disorder = jnp.where(is_choice, -jnp.sum(jnp.exp(log_p) * known), log_deviation)
        return jnp.where(is_choice, choice, number), disorder

    before = jnp.append(jnp.float32(0), part[:-1])
    density, disorder = jax.vmap(one)(jnp.arange(len(row)), before)
    return jnp.sum(density), jnp.sum(disorder)


def _step(
    task: _Task, optimizer: optax.GradientTransformation, inner: tuple[Net, PyTree], *, told: _Told, entropy: float
) -> tuple[PyTree, PyTree]:
    """The agent and its optimizer after a generation."""
    net, state = inner

    def loss(net: Net) -> jax.Array:
        density, disorder = jax.vmap(lambda row: _log_density(task, net, row))(told.rows)
        return -jnp.mean(told.weights * density) - entropy * jnp.mean(disorder)

    with jax.numpy_dtype_promotion("standard"):  # of optax's adam, which raises a float to an integer
        updates, state = optimizer.update(jax.grad(loss)(net), state)
    return optax.apply_updates(net, updates), state
