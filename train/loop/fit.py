"""Training: epochs of steps, checkpoints, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from train.loop.checkpoints import Checkpoints
from train.loop.evaluate import accuracy, mean_abs_gradient
from train.loop.history import Epoch, read_history, write_history
from train.loop.progress import Progress
from train.loop.step import (
    Mesh,
    Metrics,
    Predict,
    Teacher,
    TrainState,
    data_mesh,
    make_gradient,
    make_optimizer,
    make_predict,
    make_train_step,
)
from train.networks.compressed import Network


@dataclass(frozen=True)
class Job:
    """What the trainings of one main job share: network, data, devices, settings."""

    config: Config
    model: Network
    data: Dataset
    mesh: Mesh
    predict: Predict
    teacher: Teacher | None = None

    @staticmethod
    def of(config: Config, model: Network, data: Dataset) -> Job:
        """A job on all local devices.

        Raises:
          TrainingError: the batch does not divide over the devices, or is larger than the training split.
        """
        mesh = data_mesh()
        if config.batch % mesh.devices or not 0 < config.batch <= len(data.train):
            raise TrainingError(
                f"batch is {config.batch}; it must be a multiple of the {mesh.devices} devices and at most"
                f" {len(data.train)}, the training split."
            )
        return Job(config, model, data, mesh, make_predict(model, data))

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
) -> tuple[TrainState, float]:
    """Trains from ``variables`` (parameters, batch statistics) under ``transform``; resumes what is in ``folder``.

    ``compression`` is the transform's state before the first step, as :func:`first_compression` gives it.

    Returns:
      The state after the last epoch, and the seconds spent, over all resumptions.

    Raises:
      TrainingError: a loss or gradient is not finite; the metric and the step are named.
    """
    config, data = job.config, job.data
    per_epoch = len(data.train) // config.batch
    step, state = _start(job, transform, optim, variables=variables, compression=compression)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, first, seconds = checkpoints.restore(state)
        history = read_history(folder / "metrics.jsonl", first)
        progress.resumed(name, epoch=first, of=optim.epochs, step=first * per_epoch)
        images, labels = jax.device_put((data.train.images, data.train.labels), job.mesh.copied)
        saved = time.monotonic()
        with progress.training(name, total=optim.epochs * per_epoch, done=first * per_epoch) as bar:
            for epoch in range(first, optim.epochs):
                began = time.monotonic()
                metrics = []
                for indices in epoch_batches(config.seed, epoch, len(data.train), config.batch):
                    state, m = step(state, images, labels, jax.device_put(indices, job.mesh.split))
                    metrics.append(m)
                    bar.step(examples=config.batch)
                line = _epoch_line(
                    job, name, transform, epoch=epoch, state=state, metrics=jax.device_get(metrics), began=began
                )
                seconds += time.monotonic() - began
                history.append(line)
                write_history(folder / "metrics.jsonl", history)
                bar.epoch(line)
                last = epoch + 1 == optim.epochs
                if last or time.monotonic() - saved >= config.checkpoint_seconds:
                    checkpoints.save(state, epoch=epoch + 1, seconds=seconds)
                    saved = time.monotonic()
    return state, seconds


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
    )
    state = TrainState(jax.numpy.int32(0), *variables, optimizer.init(variables[0]), compression)
    # Copies: the step donates its state, and the caller keeps the variables.
    return step, jax.device_put(jax.tree.map(jax.numpy.array, state), job.mesh.copied)


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
    metrics: list[Metrics],
    began: float,
) -> Epoch:
    """The epoch's means and its accuracy on the validation split, if every step was finite."""
    for i, m in enumerate(metrics):
        for metric, value in m._asdict().items():
            if not np.isfinite(value):
                step = int(state.step) - len(metrics) + i
                raise TrainingError(
                    f"{name}: {metric} is {value} at step {step} (epoch {epoch}); lower the learning rate. The last"
                    " checkpoint is from before it."
                )
    loss, train_accuracy, grad_norm = (float(np.mean([m[k] for m in metrics])) for k in range(3))
    rate = len(metrics) * job.config.batch / (time.monotonic() - began)
    params = jc.materialize(transform.apply(state.compression, state.params))
    validation = accuracy(job.predict, params, state.batch_stats, job.data.validation)
    return Epoch(name, epoch, int(state.step), loss, train_accuracy, validation, grad_norm, round(rate, 1))
