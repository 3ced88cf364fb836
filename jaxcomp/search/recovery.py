"""Fine-tuning under a plan: the float weights go on being trained, rounded and masked in every step."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.artifact.files import load, load_metadata, save
from jaxcomp.core.batches import Batch, as_batch
from jaxcomp.core.leaves import materialize
from jaxcomp.core.paths import Where, describe, is_float_array, leaves_with_paths, matches, some_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.slots import replace_slots
from jaxcomp.core.transform import Transform
from jaxcomp.core.types import Params, PyTree, State
from jaxcomp.search.measures import Measure

Fn = Callable[..., PyTree]
_FIXED = re.compile(r"(.*/)?(mean|var)")


@dataclass(frozen=True)
class Recovery:
    """How a compressed network is trained again.

    Args:
      steps: how many.
      batches: in order, and again from the first; each a tuple that begins with the function's arguments; what is
        behind them, such as labels, the loss sees alone. None: the calibration data.
      loss: ``loss(outputs, *batch)``; None trains towards the original's outputs alone, without labels.
      distill: the weight of the measure's distance from the original's outputs, beside a loss.
      learning_rate: of Adam, at first; it falls to 0 as a cosine.
      optimizer: another one.
      where: which floating leaves are trained; by default all but a batch norm's statistics, which are those called
        ``mean`` and ``var``.

    Raises:
      ValueError: no step, nothing to train towards, or, when it runs, a rule that no leaf matches.
    """

    steps: int
    batches: Sequence[PyTree] | None = None
    loss: Callable[..., jax.Array] | None = None
    distill: float = 1.0
    learning_rate: float = 1e-3
    optimizer: optax.GradientTransformation | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Recovery: steps must be at least 1, got {self.steps!r}.")
        if self.loss is None and not self.distill > 0:
            raise ValueError("Recovery: without a loss the weight of distill must be above 0.")

    @property
    def chain(self) -> optax.GradientTransformation:
        """The optimizer."""
        return self.optimizer or optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))


@dataclass
class Trainer:
    """One fine-tuning: of a function's parameters, under a transform, towards another function's outputs.

    Args:
      recovery: how.
      fn: what is trained.
      teacher: ``teacher(*args)``, the original's outputs.
      measure: the distance from them.
      transform, state: of the parameters, in every step.
      batches: each begins with ``arguments`` arguments of ``fn``.
      file: where it goes on after a kill; None keeps nothing.
      mark: what must be equal for a file to be gone on with: the plan, the network, the data.
      seconds: the least time between two files.
    """

    recovery: Recovery
    fn: Fn
    teacher: Fn
    measure: Measure
    transform: Transform
    state: State
    batches: Sequence[Batch]
    arguments: int
    file: Path | None = None
    mark: str = ""
    seconds: float = 30.0
    losses: list[float] = field(default_factory=list)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """What is minimized, of one batch."""
        args = batch[: self.arguments]
        outputs = self.fn(materialize(self.transform.apply(self.state, params)), *args)
        own = self.recovery.loss
        total = jnp.zeros(()) if own is None else own(outputs, *batch)
        if self.recovery.distill > 0:
            means = self.measure.of(outputs, jax.lax.stop_gradient(self.teacher(*args)), args)
            total = total + self.recovery.distill * (means[0] / means[1] if len(means) > 1 else means[0])
        return total

    def run(self, params: Params) -> Params:
        """The trained parameters, not compressed.

        Raises:
          ValueError: a loss that is not finite.
        """
        tx, step = self.recovery.chain, 0
        trained = _trained(params, self.recovery.where)
        opt_state = tx.init(trained)
        if self.file is not None and self.file.exists() and self._same():
            step, trained, opt_state = self._read(trained, opt_state)

        @jax.jit
        def update(trained: dict[str, jax.Array], opt_state: PyTree, batch: Batch) -> tuple[PyTree, PyTree, jax.Array]:
            value, grads = jax.value_and_grad(lambda t: self.loss(replace_slots(params, t), batch))(trained)
            with jax.numpy_dtype_promotion("standard"):  # optimizers raise floats to integer counts
                changes, opt_state = tx.update(grads, opt_state, trained)
            return optax.apply_updates(trained, changes), opt_state, value

        saved = time.monotonic()
        with progress("compress: recovering", self.recovery.steps) as advance:
            advance(step)
            while step < self.recovery.steps:
                batch = as_batch(self.batches[step % len(self.batches)])
                trained, opt_state, value = update(trained, opt_state, batch)
                step += 1
                self._check(step, value)
                advance(1)
                if self.file is not None and time.monotonic() - saved > self.seconds:
                    self._save(step, trained, opt_state)
                    saved = time.monotonic()
        if self.file is not None:
            self._save(step, trained, opt_state)
        return replace_slots(params, trained)

    def _save(self, step: int, trained: PyTree, opt_state: PyTree) -> None:
        assert self.file is not None
        state = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(opt_state))}
        save(self.file, {"step": step, "trained": trained, "opt": state}, metadata={"of": self.mark})

    def _check(self, step: int, value: jax.Array) -> None:
        if step % 20 and step < self.recovery.steps:
            return  # one look in twenty steps: each waits for the device
        self.losses.append(float(value))
        if not math.isfinite(self.losses[-1]):
            raise ValueError(
                f"compress: the loss of recovery is {self.losses[-1]} by step {step}; lower the learning_rate of"
                f" Recovery, now {self.recovery.learning_rate:g}."
            )

    def _same(self) -> bool:
        assert self.file is not None
        return load_metadata(self.file) == {"of": self.mark}

    def _read(self, trained: PyTree, opt_state: PyTree) -> tuple[int, PyTree, PyTree]:
        assert self.file is not None
        held = load(self.file)
        leaves = jax.tree.leaves(opt_state)
        new = [jnp.asarray(held["opt"][str(i)], x.dtype) for i, x in enumerate(leaves)]
        return (
            int(held["step"]),
            {k: jnp.asarray(held["trained"][k]) for k in trained},
            jax.tree.unflatten(jax.tree.structure(opt_state), new),
        )


def _trained(params: Params, where: Where | None) -> dict[str, jax.Array]:
    """The floating leaves that are trained, by path."""
    named = [(path, x) for path, x in leaves_with_paths(params)[0] if is_float_array(x)]
    chosen = [(p, x) for p, x in named if (not _FIXED.fullmatch(p) if where is None else matches(where, p, x))]
    if not chosen:
        rule = "its default" if where is None else f"rule {describe(where)}"
        raise ValueError(
            f"Recovery: {rule} selects no floating leaf to train; there are {some_paths(p for p, _ in named)}."
        )
    return {path: jnp.asarray(x) for path, x in chosen}
