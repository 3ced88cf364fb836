"""Training: epochs of steps, checkpoints, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

import jaxcomp as jc
from jaxcomp.core.types import Params, PyTree, State
from train.configs import Config, OptimConfig
from train.data.order import epoch_batches
from train.data.sets import Dataset
from train.errors import TrainingError
from train.loop.checkpoints import Checkpoints, Reached
from train.loop.evaluate import accuracy, mean_abs_gradient
from train.loop.history import Epoch, write_history
from train.loop.mesh import Mesh, data_mesh
from train.loop.processes import Processes
from train.loop.progress import Progress
from train.loop.saves import Saves
from train.loop.step import (
    Metrics,
    Predict,
    Teacher,
    TrainState,
    make_gradient,
    make_optimizer,
    make_predict,
    make_train_step,
)
from train.networks.compressed import Network


@dataclass(frozen=True)
class Job:
    """What the trainings of one main job share: network, data, devices and processes, settings."""

    config: Config
    model: Network
    data: Dataset
    mesh: Mesh
    predict: Predict
    processes: Processes
    teacher: Teacher | None = None

    @staticmethod
    def of(config: Config, model: Network, data: Dataset, *, processes: Processes | None = None) -> Job:
        """A job on all devices of all processes.

        Raises:
          TrainingError: the batch does not divide over the devices and parts, or is larger than the training split.
        """
        mesh, n = data_mesh(), len(data.train)
        if config.batch % (mesh.devices * config.accumulate) or not 0 < config.batch <= n:
            parts = f" times {config.accumulate} parts" if config.accumulate > 1 else ""
            raise TrainingError(
                f"batch is {config.batch}; it must be a multiple of the {mesh.devices} devices{parts} and at most {n},"
                " the training split."
            )
        return Job(config, model, data, mesh, make_predict(model, data), processes or Processes())

    def on(self, network: Network) -> Job:
        """The job with another network."""
        return self if network is self.model else replace(self, model=network, predict=make_predict(network, self.data))


def fit(
    job: Job,
    name: str,
    transform: jc.Transform,
    *,
    optim: OptimConfig,
    variables: tuple[Params, PyTree],
    folder: Path,
    progress: Progress,
    compression: State,
) -> tuple[TrainState, Reached]:
    """Trains from ``variables`` (parameters, batch statistics) under ``transform``; resumes what is in ``folder``.

    ``compression`` is the transform's state before the first step, as :func:`first_compression` gives it.

    Returns:
      The state after the last epoch, and what was reached: the epochs, and the seconds over all resumptions.

    Raises:
      TrainingError: a loss or gradient is not finite; the metric and the step are named.
      RunError: a checkpoint cannot be written.
      Stopped: a signal came; the step that was under way is done and saved.
    """
    config, data, stop, writes = job.config, job.data, job.processes.stop, job.processes.writes
    per_epoch = len(data.train) // config.batch
    step, state = _start(job, transform, optim, variables=variables, compression=compression)
    checkpoints = Checkpoints(folder / "checkpoints", progress.say)
    state, reached = _restored(checkpoints, state, job.processes)
    done, total = int(state.step), optim.epochs * per_epoch
    saves = Saves(checkpoints, reached, name, every=config.checkpoint_seconds, step=done, writes=writes)
    progress.resumed(name, step=done, of=total)
    state, feed = job.mesh.copy(state), job.mesh.feed(data.train)
    with progress.training(name, total=total, done=done) as bar, stop.at_steps():
        for epoch in range((done - len(reached.steps)) // per_epoch, optim.epochs):
            began, batches = time.monotonic(), epoch_batches(config.seed, epoch, len(data.train), config.batch)
            batches = batches[len(reached.steps) :]
            for indices in batches:
                state, metrics = step(state, *feed(indices))
                saves.count(metrics)
                bar.step(examples=config.batch)
                if stop.now():
                    saves.save(state)
                    raise stop.stopped(f" after step {int(state.step)} of {name}, which is saved")
                saves.save_if_due(state)
            rate = len(batches) * config.batch / (time.monotonic() - began)
            line = _epoch_line(job, name, transform, epoch=epoch, state=state, steps=saves.steps(), rate=rate)
            saves.end_epoch(line)
            if writes:
                write_history(folder, reached.history)
            bar.epoch(line)
        saves.save(state)
    return job.mesh.own(state), reached


def _restored(checkpoints: Checkpoints, like: TrainState, processes: Processes) -> tuple[TrainState, Reached]:
    """What the first process finds whole, read by each.

    Raises:
      ToldError: one cannot read it, or reads another.
    """
    if processes.count == 1:
        return checkpoints.restore(like)
    step = processes.first(lambda: int(checkpoints.restore(like)[0].step))
    state, reached = processes.together(lambda: checkpoints.at(step, like))
    processes.alike(f"The weights after step {step}", state)
    return state, reached


def _start(
    job: Job,
    transform: jc.Transform,
    optim: OptimConfig,
    *,
    variables: tuple[Params, PyTree],
    compression: State,
) -> tuple[Callable[..., tuple[TrainState, Metrics]], TrainState]:
    """The compiled step and the state before the first one."""
    config = job.config
    optimizer = make_optimizer(optim, len(job.data.train) // config.batch * optim.epochs)
    step = make_train_step(
        job.model,
        optimizer,
        transform,
        data=job.data,
        label_smoothing=config.label_smoothing,
        augmented=config.augment,
        seed=config.seed,
        mesh=job.mesh,
        teacher=job.teacher,
        accumulate=config.accumulate,
    )
    state = TrainState(jax.numpy.int32(0), *variables, optimizer.init(variables[0]), compression)
    # Copies: the step donates its state, and the caller keeps the variables.
    return step, jax.tree.map(jax.numpy.array, state)


def first_compression(job: Job, transform: jc.Transform, variables: tuple[Params, PyTree]) -> State:
    """The transform's state before the first step, updated with the mean gradient over the training split."""
    params, batch_stats = variables
    grads = mean_abs_gradient(make_gradient(job.model, job.data), params, batch_stats, job.data.train)
    return transform.update(transform.init(params), params, step=0, grads=grads)


def compressed_variables(state: TrainState, transform: jc.Transform) -> dict[str, PyTree]:
    """What is shipped: compressed parameters, packed, and batch statistics."""
    return {"params": jc.pack(transform.apply(state.compression, state.params)), "batch_stats": state.batch_stats}


def _epoch_line(
    job: Job,
    name: str,
    transform: jc.Transform,
    *,
    epoch: int,
    state: TrainState,
    steps: Sequence[tuple[float, ...]],
    rate: float,
) -> Epoch:
    """The epoch's means and its accuracy on the validation split."""
    loss, train_accuracy, grad_norm = np.mean(np.asarray(steps, np.float64), 0).tolist()
    own = job.mesh.own(state)
    params = jc.materialize(transform.apply(own.compression, own.params))
    validation = accuracy(job.predict, params, own.batch_stats, job.data.validation, job.processes)
    return Epoch(name, epoch, int(state.step), loss, train_accuracy, validation, grad_norm, round(rate, 1))
