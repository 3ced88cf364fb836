"""Training: epochs of steps, checkpoints, metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcomp as jc
from jaxcomp.artifact.files import write_atomically
from train.checkpoints import Checkpoints
from train.configs import Config, OptimConfig
from train.data import Dataset, epoch_batches
from train.evaluate import accuracy, mean_abs_gradient
from train.networks import Network
from train.progress import Progress
from train.step import (
    Mesh,
    TrainState,
    data_mesh,
    make_gradient,
    make_optimizer,
    make_predict,
    make_train_step,
)


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, as a line of metrics.jsonl. Accuracies are fractions."""

    run: str
    epoch: int
    step: int
    loss: float
    train_accuracy: float
    validation_accuracy: float
    grad_norm: float
    examples_per_second: float


@dataclass(frozen=True)
class Job:
    """What the trainings of one main job share: network, data, devices, settings."""

    config: Config
    model: Network
    data: Dataset
    mesh: Mesh
    predict: Callable[..., jax.Array]

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
    optim: OptimConfig,
    variables: tuple[Any, Any],
    *,
    folder: Path,
    progress: Progress,
    compression: Any = None,
) -> tuple[TrainState, float]:
    """Trains from ``variables`` (parameters, batch statistics) under ``transform``; resumes what is in ``folder``.

    ``compression`` is the transform's state before the first step; by default what :func:`first_compression` gives.

    Returns:
      The state after the last epoch, and the seconds spent, over all resumptions.

    Raises:
      TrainingError: a loss or gradient is not finite; the metric and the step are named.
    """
    config, data = job.config, job.data
    per_epoch = len(data.train) // config.batch
    optimizer = make_optimizer(optim, per_epoch * optim.epochs)
    step = make_train_step(
        job.model,
        optimizer,
        transform,
        data,
        label_smoothing=config.label_smoothing,
        augmented=config.augment,
        seed=config.seed,
        mesh=job.mesh,
    )
    if compression is None:
        compression = first_compression(job, transform, variables)
    state = TrainState(jax.numpy.int32(0), *variables, optimizer.init(variables[0]), compression)
    # Copies: the step donates its state, and the caller keeps the variables.
    state = jax.device_put(jax.tree.map(jax.numpy.array, state), job.mesh.copied)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, first, seconds = checkpoints.restore(state)
        history = _history(folder / "metrics.jsonl", first)
        images = jax.device_put(data.train.images, job.mesh.copied)
        labels = jax.device_put(data.train.labels, job.mesh.copied)
        saved = time.monotonic()
        with progress.training(name, total=optim.epochs * per_epoch, done=first * per_epoch) as bar:
            for epoch in range(first, optim.epochs):
                began = time.monotonic()
                metrics = []
                for indices in epoch_batches(config.seed, epoch, len(data.train), config.batch):
                    state, m = step(state, images, labels, jax.device_put(indices, job.mesh.split))
                    metrics.append(m)
                    bar.step(examples=config.batch)
                line = _epoch_line(job, name, epoch, state, transform, jax.device_get(metrics), began)
                seconds += time.monotonic() - began
                history.append(line)
                _write_history(folder / "metrics.jsonl", history)
                bar.epoch(line)
                last = epoch + 1 == optim.epochs
                if last or time.monotonic() - saved >= config.checkpoint_seconds:
                    checkpoints.save(state, epoch=epoch + 1, seconds=seconds)
                    saved = time.monotonic()
    return state, seconds


def first_compression(job: Job, transform: jc.Transform, variables: tuple[Any, Any]) -> Any:
    """The transform's state before the first step, updated with the mean gradient over the training split."""
    params, batch_stats = variables
    grads = mean_abs_gradient(make_gradient(job.model, job.data), params, batch_stats, job.data.train)
    return transform.update(transform.init(params), params, step=0, grads=grads)


def compressed_variables(state: TrainState, transform: jc.Transform) -> dict[str, Any]:
    """What is shipped: compressed parameters, packed, and batch statistics."""
    return {"params": jc.pack(transform.apply(state.compression, state.params)), "batch_stats": state.batch_stats}


def _epoch_line(
    job: Job, name: str, epoch: int, state: TrainState, transform: jc.Transform, metrics: list[Any], began: float
) -> Epoch:
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


def _history(path: Path, epochs: int) -> list[Epoch]:
    """The lines of the epochs that the checkpoint holds; later ones will be made again."""
    if not path.exists():
        return []
    lines = [Epoch(**json.loads(line)) for line in path.read_text().splitlines()]
    return [line for line in lines if line.epoch < epochs]


def _write_history(path: Path, history: list[Epoch]) -> None:
    write_atomically(path, "".join(json.dumps(asdict(line)) + "\n" for line in history).encode())
