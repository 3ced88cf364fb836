"""One training step, the whole state in and out: pure, jitted, donated, the same code on one device or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

import jaxcomp as jc
from jaxcomp.core.types import Params, PyTree, State
from jaxcomp.distill import soft_targets
from train.configs import DistillConfig, OptimConfig
from train.data.images import augment, normalize
from train.data.sets import Dataset
from train.networks.compressed import Network

Predict = Callable[[Params, PyTree, ArrayLike], jax.Array]
"""``predict(params, batch_stats, images uint8) -> classes``."""
Gradient = Callable[[Params, PyTree, ArrayLike, ArrayLike], Params]
"""``gradient(params, batch_stats, images uint8, labels)``: one tree like the parameters."""


class TrainState(NamedTuple):
    """All that training changes. ``params`` are the uncompressed (latent) ones."""

    step: jax.Array
    params: Params
    batch_stats: PyTree
    opt_state: optax.OptState
    compression: State


class Metrics(NamedTuple):
    """Of one step, as device scalars."""

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array


class Teacher(NamedTuple):
    """A trained network whose results another learns from, and how: see ``train.configs.DistillConfig``."""

    network: Network
    variables: Mapping[str, PyTree]
    config: DistillConfig


class Mesh(NamedTuple):
    """Where arrays live: batches are split over all local devices, everything else is on each."""

    split: NamedSharding
    copied: NamedSharding
    devices: int


def data_mesh() -> Mesh:
    """All local devices in one data-parallel axis."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return Mesh(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()), len(devices))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Linear warm-up and cosine to zero; decay on weights only: no vectors, no trained scales."""
    warmup = max(1, round(config.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=jc.core.weight_mask)
    decay = optax.add_decayed_weights(config.weight_decay, mask=jc.core.weight_mask)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


def init_variables(model: nn.Module, data: Dataset, seed: int) -> tuple[Params, PyTree]:
    """Parameters and batch statistics of a fresh model."""
    images = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(seed))
    return variables["params"], variables.get("batch_stats", {})


def forward(
    model: Network, params: Params, batch_stats: PyTree, *, images: jax.Array, train: bool
) -> tuple[jax.Array, PyTree]:
    """Logits and the new batch statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
        return model.apply(variables, images, train=False), batch_stats
    logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, updated.get("batch_stats", {})


def _make_loss(
    model: Network, transform: jc.Transform, *, data: Dataset, label_smoothing: float, teacher: Teacher | None
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """``loss(params, state, images, labels, known) -> (loss, (batch statistics, logits))``; the teacher's variables
    are ``known``."""

    def loss_fn(
        params: Params, state: TrainState, images: jax.Array, labels: jax.Array, known: PyTree
    ) -> tuple[jax.Array, PyTree]:
        seen = jc.materialize(transform.apply(state.compression, params))
        logits, batch_stats = forward(model, seen, state.batch_stats, images=images, train=True)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, data.num_classes), label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        if teacher is not None:
            loss = taught_loss(teacher, known, images, logits=logits, loss=loss)
        return loss, (batch_stats, logits)

    return loss_fn


def make_train_step(
    model: Network,
    optimizer: optax.GradientTransformation,
    transform: jc.Transform,
    *,
    data: Dataset,
    label_smoothing: float,
    augmented: bool,
    seed: int,
    mesh: Mesh,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """``step(state, images, labels, indices) -> (state, metrics)``; the state's buffers are donated.

    Images and labels are the whole training split on the device, uint8; ``indices`` picks the batch. The augmentation's
    key is made of the seed and the step, so a resumed run draws what it would have drawn. A teacher sees the same
    images.
    """

    loss_fn = _make_loss(model, transform, data=data, label_smoothing=label_smoothing, teacher=teacher)

    def step(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array, known: PyTree
    ) -> tuple[TrainState, Metrics]:
        batch, targets = images[indices], labels[indices]
        if augmented:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            batch = augment(key, batch, data.augmentation)
        batch = normalize(batch, data.mean, data.std)
        (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state, batch, targets, known
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        compression = transform.update(state.compression, params, step=state.step + 1, grads=grads)
        metrics = Metrics(loss, (logits.argmax(-1) == targets).mean(), optax.global_norm(grads))
        return TrainState(state.step + 1, params, batch_stats, opt_state, compression), metrics

    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(mesh.copied, mesh.copied, mesh.copied, mesh.split, mesh.copied),
        out_shardings=(mesh.copied, mesh.copied),
    )
    known = jax.device_put({} if teacher is None else dict(teacher.variables), mesh.copied)
    return lambda state, images, labels, indices: jitted(state, images, labels, indices, known)


def taught_loss(teacher: Teacher, known: PyTree, images: jax.Array, *, logits: jax.Array, loss: jax.Array) -> jax.Array:
    """The loss on labels, and on what the teacher says of the same images."""
    weight, temperature = teacher.config.weight, teacher.config.temperature
    said, _ = forward(teacher.network, known["params"], known["batch_stats"], images=images, train=False)
    return (1 - weight) * loss + weight * soft_targets(logits, said, temperature)


def make_predict(model: Network, data: Dataset) -> Predict:
    """``predict(params, batch_stats, images uint8) -> classes``, jitted."""

    def predict(params: Params, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        logits, _ = forward(model, params, batch_stats, images=normalize(images, data.mean, data.std), train=False)
        return logits.argmax(-1)

    return jax.jit(predict)


def make_gradient(model: Network, data: Dataset) -> Gradient:
    """``gradient(params, batch_stats, images, labels)``: |∂loss/∂params| of one batch, batch norm as in inference."""

    def loss_fn(params: Params, batch_stats: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = forward(model, params, batch_stats, images=normalize(images, data.mean, data.std), train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(lambda *given: jax.tree.map(jnp.abs, jax.grad(loss_fn)(*given)))
