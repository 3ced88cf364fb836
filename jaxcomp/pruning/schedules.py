"""When how much is pruned: sparsities as functions of the step, built on optax's schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.gates import Due, every, gate
from jaxcomp.core.records import recorded
from jaxcomp.core.specs import Spec, checked_fraction
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Step

Schedule = Callable[[Step], float | jax.Array]
"""``step -> fraction``, any optax schedule."""


@dataclass(frozen=True)
class PruningSchedule(Spec):
    """A schedule and the steps at which it is meant to be looked at: ``plan(step)`` and ``plan.due(step)``.

    ``prune(plan)`` follows the schedule at every update; ``plan.gate(prune(plan))`` finds masks at due steps only and
    keeps them in between.

    Args:
      schedule: step to fraction.
      due: step to boolean.
    """

    schedule: Schedule
    due: Due

    def __call__(self, step: Step) -> float | jax.Array:
        """The sparsity at a step."""
        return self.schedule(step)

    def gate(self, transform: Transform) -> Transform:
        """The transform, updated at due steps only; before the first it is not there."""
        return gate(transform, self.due)


@recorded
def cubic(final: float, *, begin: int = 0, end: int, initial: float = 0.0) -> Schedule:
    """The gradual schedule ``final + (initial - final) (1 - (step - begin) / (end - begin))**3``, flat outside.

    Built on ``optax.polynomial_schedule``.

    >>> s = cubic(0.8, begin=100, end=200)
    >>> float(s(0)), round(float(s(150)), 4), round(float(s(999)), 4)
    (0.0, 0.7, 0.8)

    Raises:
      ValueError: a sparsity outside [0, 1), or an end that is not after the beginning.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1.
    """
    return _decay("cubic", final, initial, begin=begin, end=end, power=3)


@recorded
def polynomial(
    final: float, *, begin: int, end: int, power: float = 3, initial: float = 0.0, every: int = 100
) -> PruningSchedule:
    """``final + (initial - final) (1 - (step - begin) / (end - begin))**power`` at begin, begin + every, … up to end.

    With ``plan.gate(prune(plan))`` nothing is pruned before ``begin``, and the masks of the last due step stay.

    Args:
      final, initial: fractions.
      begin, end: steps; ``end`` itself may be due.
      power: 3 is Zhu and Gupta's.
      every: the period in steps.

    Raises:
      ValueError: a sparsity outside [0, 1), an end that is not after the beginning, a power that is not positive, or a
        period below 1.

    >>> p = polynomial(0.8, begin=100, end=200, every=50)
    >>> [bool(p.due(s)) for s in (50, 100, 150, 151, 200, 250)], round(float(p(150)), 3)
    ([False, True, True, False, True, False], 0.7)

    Source: ``PolynomialDecay`` of the TensorFlow model optimization toolkit, whose numbers and due steps these are.
    """
    decay = _decay("polynomial", final, initial, begin=begin, end=end, power=power)
    return PruningSchedule(decay, _period("polynomial", every, begin, end))


@recorded
def constant(sparsity: float, *, begin: int = 0, end: int | None = None, every: int = 100) -> PruningSchedule:
    """One sparsity, at begin, begin + every, … up to ``end`` (None: for ever).

    >>> p = constant(0.5, begin=10, every=10)
    >>> [bool(p.due(s)) for s in (0, 10, 15, 1000)], float(p(10))
    ([False, True, False, True], 0.5)

    Raises:
      ValueError: a sparsity outside [0, 1), or a period below 1.

    Source: ``ConstantSparsity`` of the TensorFlow model optimization toolkit.
    """
    fraction = checked_fraction("constant", sparsity)
    return PruningSchedule(optax.constant_schedule(fraction), _period("constant", every, begin, end))


@recorded
def iterative(rate: float, *, rounds: int, every: int, begin: int = 0) -> PruningSchedule:
    """Prune, fine-tune for ``every`` steps, prune again: in each of ``rounds`` rounds a fraction of the survivors.

    ``sparsity = 1 - (1 - rate)**k`` after the k-th round; ``plan.gate(prune(plan, regrow=False))`` prunes among
    survivors only.

    Args:
      rate: the fraction of the survivors that goes in each round.
      rounds: how many.
      every: steps of a round.
      begin: the step of the first.

    Raises:
      ValueError: a rate outside (0, 1), fewer than one round, or a period below 1.

    >>> p = iterative(0.5, rounds=3, every=100)
    >>> [round(float(p(s)), 3) for s in (0, 99, 100, 200, 900)], bool(p.due(300))
    ([0.5, 0.5, 0.75, 0.875, 0.875], False)

    Source: Han et al. 2015, arXiv:1506.02626; Frankle and Carbin 2018, arXiv:1803.03635.
    """
    if not checked_fraction("iterative", rate) > 0 or rounds < 1:
        raise ValueError(f"iterative: wants a rate above 0 and at least one round, got {rate!r} and {rounds!r}.")
    due = _period("iterative", every, begin, begin + (rounds - 1) * every)
    levels = [optax.constant_schedule(1 - (1 - rate) ** k) for k in range(rounds + 1)]
    return PruningSchedule(optax.join_schedules(levels, [begin + k * every for k in range(rounds)]), due)


@recorded
def alternating(sparsity: float, *, sparse: int, dense: int, begin: int = 0, end: int | None = None) -> PruningSchedule:
    """AC/DC: phases of ``dense`` steps without a mask and ``sparse`` steps with one, dense first; sparse from ``end``.

    A mask is found at the beginning of each sparse phase and kept through it: ``plan.gate(prune(plan))``. The paper
    goes on from zeros where weights were masked: :func:`jaxcomp.pruning.unmasking.from_zero` around the gate.
    Without it they go on from where they were masked.

    Args:
      sparsity: in sparse phases.
      sparse, dense: lengths in steps.
      begin: the first step of the first dense phase; before it there is no mask.
      end: from here on the phase is sparse; None: the phases go on.

    Raises:
      ValueError: a sparsity outside [0, 1), or a phase below one step.

    >>> p = alternating(0.9, dense=2, sparse=3)
    >>> [round(float(p(s)), 1) for s in range(7)], [s for s in range(9) if p.due(s)]
    ([0.0, 0.0, 0.9, 0.9, 0.9, 0.0, 0.0], [0, 2, 5, 7])

    Source: Peste et al. 2021 (AC/DC), arXiv:2106.12379.
    """
    fraction = checked_fraction("alternating", sparsity)
    if sparse < 1 or dense < 1:
        raise ValueError(f"alternating: phases take at least one step, got dense={dense}, sparse={sparse}.")

    def is_sparse(step: Step) -> jax.Array:
        since = jnp.asarray(step) - begin
        on = (since >= 0) & (since % (dense + sparse) >= dense)
        return on if end is None else on | (step >= end)

    def due(step: Step) -> jax.Array:
        step = jnp.asarray(step)
        return (step == begin) | (is_sparse(step) != is_sparse(step - 1))

    return PruningSchedule(lambda step: jnp.where(is_sparse(step), jnp.float32(fraction), jnp.float32(0)), due)


def _decay(owner: str, final: float, initial: float, *, begin: int, end: int, power: float) -> Schedule:
    checked_fraction(owner, final), checked_fraction(owner, initial)
    if end <= begin:
        raise ValueError(f"{owner}: end must be after begin, got begin={begin}, end={end}.")
    if not power > 0:
        raise ValueError(f"{owner}: power must be positive, got {power!r}.")
    return optax.polynomial_schedule(initial, final, power=power, transition_steps=end - begin, transition_begin=begin)


def _period(owner: str, period: int, begin: int, end: int | None) -> Due:
    if period < 1 or begin < 0:
        raise ValueError(f"{owner}: wants a period of at least 1 and a beginning at 0 or later, got {period}, {begin}.")
    return every(period, start=begin, stop=None if end is None else end + 1)
