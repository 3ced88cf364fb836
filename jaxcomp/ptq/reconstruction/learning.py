"""One block's rounding and ranges learned, so that it gives what the block of float numbers gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.specs import check_positive, is_number
from jaxcomp.core.types import Key, Leaf, PyTree, Step
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq.reconstruction.passing import Gridded, Inputs, Noise
from jaxcomp.quantization.adaround import SoftRounded, annealed_beta, harden, rounding_regularizer
from jaxcomp.trace.cuts import Values
from jaxcomp.trace.ranges import Range

Optimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


@dataclass(frozen=True)
class Training:
    """How a block is reconstructed.

    Args:
      steps: of the optimizer, a batch each; at least 2.
      rate: the learning rate of the rounding.
      range_rate: that of the logarithms of the ranges' ends, which falls to 0 by a cosine.
      regularizer: how much the rounding's indecision weighs, as a multiple of the block's first error.
      drop: the probability with which an element of an activation stays unrounded in a step, and one that enters the
        block is that of the float network. 0 is BRECQ, a half QDrop.
      optimizer: from a rate, or a schedule of rates, to what optimizes: ``optax.adam``.

    Raises:
      ValueError: a number outside its range.

    Sources: BRECQ, Li et al. 2021, arXiv:2102.05426; QDrop, Wei et al. 2022, arXiv:2203.05740. Deviations: the error is
    divided by that of the nearest rounding, and the regularizer is a mean over weights, so that neither needs another
    weight for another network; ranges are trained by their ends' logarithms; fewer steps at a higher rate.
    """

    steps: int = 1000
    rate: float = 1e-2
    range_rate: float = 1e-3
    regularizer: float = 1.0
    drop: float = 0.0
    optimizer: Optimizer = optax.adam

    def __post_init__(self) -> None:
        check_positive("Training", self.steps, "steps")
        if self.steps < 2:
            raise ValueError(f"Training: steps must be at least 2, got {self.steps!r}.")
        for name in ("rate", "range_rate", "regularizer"):
            if not is_number(value := getattr(self, name)) or value < 0:
                raise ValueError(f"Training: {name} must be a number of 0 or more, got {value!r}.")
        if not is_number(self.drop) or not 0 <= self.drop < 1:
            raise ValueError(f"Training: drop must be a probability below 1, got {self.drop!r}.")


class Learned(NamedTuple):
    """What is learned: V of each softly rounded weight (None elsewhere), and logarithms of the ends of each range."""

    rounding: tuple[jax.Array | None, ...]
    ends: tuple[Range | None, ...]

    def any(self) -> bool:
        """Whether there is anything."""
        return bool(jax.tree.leaves(self))


class Case(NamedTuple):
    """One batch of a block: what enters it in both networks, what it should give, and how much that matters."""

    quantized: Values
    exact: Values
    rest: Values
    target: Values
    importance: Values | None


class Fixed(NamedTuple):
    """What a step reads and does not change; ``first`` is the mean error that the rounding to nearest makes."""

    weights: tuple[Leaf, ...]
    ranges: tuple[Range, ...]
    first: jax.Array


def begin(weights: Iterable[Leaf], ranges: Sequence[Range], trained: Sequence[bool]) -> Learned:
    """What is learned before the first step."""
    rounding = tuple(leaf.rounding if isinstance(leaf := _bare(x), SoftRounded) else None for x in weights)
    zero = (Range(*map(jnp.zeros_like, r)) if some else None for r, some in zip(ranges, trained, strict=True))
    return Learned(rounding, tuple(zero))


def _bare(leaf: Leaf) -> Leaf:
    return leaf.values if isinstance(leaf, Masked) else leaf


def with_learned(fixed: Fixed, learned: Learned) -> tuple[tuple[Leaf, ...], tuple[Range, ...]]:
    """The leaves and the ranges with what was learned in them."""
    leaves = tuple(_with(leaf, v) for leaf, v in zip(fixed.weights, learned.rounding, strict=True))
    ranges = tuple(
        given if log is None else Range(*(end * jnp.exp(by) for end, by in zip(given, log, strict=True)))
        for given, log in zip(fixed.ranges, learned.ends, strict=True)
    )
    return leaves, ranges


def _with(leaf: Leaf, rounding: jax.Array | None) -> Leaf:
    if rounding is None:
        return leaf
    if isinstance(leaf, Masked):
        return replace(leaf, values=_with(leaf.values, rounding))
    return replace(leaf, rounding=rounding)


def hard(leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """The leaves with what is softly rounded rounded up or down."""
    return tuple(harden(x) if isinstance(_bare(x), SoftRounded) else x for x in leaves)


class Learner:
    """The compiled functions of all blocks that have the same program, rules and training."""

    def __init__(self, gridded: Gridded, training: Training) -> None:
        self.training = training
        run = gridded.run()
        self.give = jax.jit(lambda given: run(given, None))
        self.error = jax.jit(partial(_error, run))
        beta = annealed_beta(training.steps)
        falling = optax.cosine_decay_schedule(training.range_rate, training.steps)
        self.optimizers = training.optimizer(training.rate), training.optimizer(falling)

        def loss(learned: Learned, fixed: Fixed, case: Case, at: tuple[Step, Key]) -> jax.Array:
            step, key = at
            leaves, ranges = with_learned(fixed, learned)
            values, noise = case.quantized, None
            if training.drop:
                own, other = jax.random.split(jax.random.fold_in(key, step))
                values, noise = _mixed_with(case, training.drop, other), Noise(own, training.drop)
            out = run(Inputs(leaves, values, case.rest, ranges), noise)
            total = squared(out, case) / fixed.first
            soft = [_bare(leaf) for leaf in leaves if isinstance(_bare(leaf), SoftRounded)]
            if soft:
                weight = training.regularizer / sum(leaf.size for leaf in soft)
                total += weight * rounding_regularizer(soft, beta(step))
            return total

        def step(carry: tuple[Learned, PyTree], fixed: Fixed, case: Case, at: tuple[Step, Key]) -> PyTree:
            learned, states = carry
            value, grads = jax.value_and_grad(loss)(learned, fixed, case, at)
            moved, after = [], []
            for how, own, grad, state in zip(self.optimizers, learned, grads, states, strict=True):
                with jax.numpy_dtype_promotion("standard"):  # optax's counts of steps meet its floats
                    updates, new = how.update(grad, state, own)
                moved.append(optax.apply_updates(own, updates))
                after.append(new)
            return (Learned(*moved), tuple(after)), value

        self.step = jax.jit(step, donate_argnums=0)

    def start(self, learned: Learned) -> tuple[Learned, PyTree]:
        """What steps carry, before the first; its arrays are its own."""
        learned = jax.tree.map(jnp.copy, learned)
        return learned, tuple(how.init(own) for how, own in zip(self.optimizers, learned, strict=True))


def _mixed_with(case: Case, drop: float, key: Key) -> Values:
    """What enters the block, some of it as in the float network."""

    def mixed(i: int, rounded: jax.Array, exact: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), drop, rounded.shape), exact, rounded)

    both = zip(case.quantized, case.exact, strict=True)
    return tuple(mixed(i, a, b) if is_float(a) else a for i, (a, b) in enumerate(both))


def _error(run: Callable[..., Values], given: Inputs, case: Case) -> tuple[jax.Array, jax.Array]:
    """The squared error of a batch, and the target's square."""
    zeros = tuple(map(jnp.zeros_like, case.target))
    return squared(run(given, None), case), squared(zeros, case)


def squared(out: Values, case: Case) -> jax.Array:
    """The sum of squared differences from the target, each times its importance."""
    total = jnp.zeros((), jnp.float32)
    for i, (x, y) in enumerate(zip(out, case.target, strict=True)):
        if not is_float(y):
            continue
        square = jnp.square((x - y).astype(jnp.float32))
        total += jnp.sum(square if case.importance is None else square * case.importance[i])
    return total


def is_float(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a value's errors can be squared."""
    return jnp.issubdtype(x.dtype, jnp.floating)
