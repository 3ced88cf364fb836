"""When a training is saved, and what of its steps is on record until then."""

from __future__ import annotations

import time

import jax
import numpy as np

from jaxcomp.artifact.disk import FileError
from train.errors import RunError, TrainingError
from train.loop.checkpoints import Checkpoints, Reached
from train.loop.history import Epoch
from train.loop.step import Metrics, TrainState

AHEAD = 2
"""Steps that may be under way at a time: more would be waited for when a signal comes."""


class Saves:
    """The record of a training from step ``step`` on, saved at least ``every`` seconds apart.

    ``reached`` is what a checkpoint gave, and kept up to date when an epoch ends and when a state is saved. What does
    not write, keeps the record alone.
    """

    def __init__(
        self, checkpoints: Checkpoints, reached: Reached, name: str, *, every: float, step: int, writes: bool = True
    ) -> None:
        self._checkpoints, self._reached, self._name, self._every = checkpoints, reached, name, every
        self._writes = writes
        self._began = self._saved = time.monotonic()
        self._before, self._done, self._safe = reached.seconds, step, step
        self._pending: list[Metrics] = []

    def count(self, metrics: Metrics) -> None:
        """One step is under way; returns when few enough are."""
        self._pending.append(metrics)
        self._done += 1
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD])

    def steps(self) -> list[tuple[float, ...]]:
        """The metrics of the steps of this epoch.

        Raises:
          TrainingError: one of them is not finite.
        """
        at = self._done - len(self._pending)
        for i, found in enumerate(jax.device_get(self._pending)):
            for metric, value in found._asdict().items():
                if not np.isfinite(value):
                    before = f" The last checkpoint, of step {self._safe}, is from before it." if self._safe else ""
                    raise TrainingError(
                        f"{self._name}: {metric} is {value} at step {at + i} (epoch {len(self._reached.history)});"
                        f" lower the learning rate.{before}"
                    )
            self._reached.steps.append(tuple(map(float, found)))
        self._pending = []
        return self._reached.steps

    def end_epoch(self, line: Epoch) -> None:
        """The epoch is done."""
        self._reached.history.append(line)
        self._reached.steps = []

    def save_if_due(self, state: TrainState) -> None:
        """Saves a state if the last one was saved long enough ago."""
        if self._writes and time.monotonic() - self._saved >= self._every:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Saves a state.

        Raises:
          TrainingError: a step since the last one was not finite.
          RunError: it cannot be written.
        """
        self.steps()
        self._reached.seconds = self._before + time.monotonic() - self._began
        if not self._writes:
            return
        try:
            self._checkpoints.save(state, self._reached, step=self._done)
        except FileError as e:
            raise RunError(
                f"{self._name}: {str(e).rstrip('.')}; mend that, make room say, and the same command goes on from step"
                f" {self._safe}."
            ) from e
        self._saved, self._safe = time.monotonic(), self._done
