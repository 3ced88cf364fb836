"""One training step, the whole state in and out: pure, jitted, donated, the same code on one device or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import jaxcomp as jc
from jaxcomp.core.types import Params, PyTree, State
from jaxcomp.distill import soft_targets
from train.configs import DistillConfig, OptimConfig
from train.data.images import augment, normalize
from train.data.sets import Dataset
from train.loop.mesh import Mesh
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


class Batch(NamedTuple):
    """What one step sees: augmented images, uint8, and their labels."""

    images: jax.Array
    labels: jax.Array


class Part(NamedTuple):
    """What a batch, or a part of one, gives: means over its examples."""

    grads: Params
    batch_stats: PyTree
    loss: jax.Array
    accuracy: jax.Array


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
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """``step(state, images, labels, indices) -> (state, metrics)``; the state's buffers are donated.

    Images and labels are the whole training split on the device, uint8, and ``indices`` picks the batch; or they are
    the batch, and ``indices`` is None: see :meth:`Mesh.feed`. The augmentation's key is made of the seed and the step,
    so a resumed run draws what it would have drawn. A teacher sees the same images.

    With ``accumulate`` the batch is seen in so many parts, one after the other, and the step is made of the mean of
    their gradients: the memory for activations is that of a part. Examples, augmentation and learning rate are those of
    the whole batch; batch norm normalizes by the statistics of a part, and keeps the mean of theirs.
    """
    loss_fn = _make_loss(model, transform, data=data, label_smoothing=label_smoothing, teacher=teacher)

    def draw(step: jax.Array, images: jax.Array, labels: jax.Array, indices: jax.Array | None) -> Batch:
        batch = images if indices is None else images[indices]
        if augmented:
            batch = augment(jax.random.fold_in(jax.random.key(seed), step), batch, data.augmentation)
        return Batch(batch, labels if indices is None else labels[indices])

    def part(state: TrainState, batch: Batch, known: PyTree) -> Part:
        images = normalize(batch.images, data.mean, data.std)
        (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state, images, batch.labels, known
        )
        return Part(grads, batch_stats, loss, (logits.argmax(-1) == batch.labels).mean())

    def update(state: TrainState, seen: Part) -> tuple[TrainState, Metrics]:
        updates, opt_state = optimizer.update(seen.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        compression = transform.update(state.compression, params, step=state.step + 1, grads=seen.grads)
        metrics = Metrics(seen.loss, seen.accuracy, optax.global_norm(seen.grads))
        return TrainState(state.step + 1, params, seen.batch_stats, opt_state, compression), metrics

    known = mesh.copy({} if teacher is None else dict(teacher.variables))
    make = _in_one_program if accumulate == 1 else partial(_in_parts, count=accumulate)
    return make(draw, part, update, mesh=mesh, known=known)


Step = Callable[..., tuple[TrainState, Metrics]]


def _in_one_program(
    draw: Callable[..., Batch],
    part: Callable[..., Part],
    update: Callable[..., tuple[TrainState, Metrics]],
    *,
    mesh: Mesh,
    known: PyTree,
) -> Step:
    """The step of the whole batch."""

    def step(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array | None, known: PyTree
    ) -> tuple[TrainState, Metrics]:
        return update(state, part(state, draw(state.step, images, labels, indices), known))

    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(mesh.copied, mesh.source, mesh.source, mesh.split, mesh.copied),
        out_shardings=(mesh.copied, mesh.copied),
    )
    return lambda state, images, labels, indices: jitted(state, images, labels, indices, known)


def _in_parts(
    draw: Callable[..., Batch],
    part: Callable[..., Part],
    update: Callable[..., tuple[TrainState, Metrics]],
    *,
    mesh: Mesh,
    known: PyTree,
    count: int,
) -> Step:
    """The step of ``count`` parts.

    They are calls of one program: in a loop within one, XLA's convolutions are 10 to 13 times slower on CPUs (jax
    0.12), and unrolled they are compiled ``count`` times.
    """

    def begin(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array | None
    ) -> tuple[Part, list[Batch]]:
        batch = draw(state.step, images, labels, indices)
        grads, batch_stats = jax.tree.map(jnp.zeros_like, (state.params, state.batch_stats))
        none = Part(grads, batch_stats, jnp.zeros(()), jnp.zeros(()))
        # Every count-th example: what is on a device stays there.
        return none, [jax.tree.map(lambda x, i=i: x[i::count], batch) for i in range(count)]

    def add(state: TrainState, total: Part, batch: Batch, known: PyTree) -> Part:
        return jax.tree.map(lambda t, x: t + x / count, total, part(state, batch, known))

    everywhere, split, source = mesh.copied, mesh.split, mesh.source
    began = jax.jit(begin, in_shardings=(everywhere, source, source, split), out_shardings=(everywhere, split))
    added = jax.jit(
        add, donate_argnums=1, in_shardings=(everywhere, everywhere, split, everywhere), out_shardings=everywhere
    )
    updated = jax.jit(update, donate_argnums=0, out_shardings=(everywhere, everywhere))

    def step(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        total, batches = began(state, images, labels, indices)
        for batch in batches:
            total = added(state, total, batch, known)
        return updated(state, total)

    return step


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
