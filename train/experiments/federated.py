"""A simulated federation: accuracy against bytes sent, for each way of compressing what the clients send.

A data set is dealt out to clients. In every round a few of them train the server's network on their own examples and
send back, compressed, how their parameters changed; the server adds up the messages (FedAvg) and steps. What is counted
is what :func:`jaxcomp.federated.to_bytes` would send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxcomp.federated as fed
from jaxcomp.core.types import Params, PyTree
from train.data.images import normalize
from train.data.sets import Dataset, load
from train.data.shards import client_batches, dirichlet_shards, iid_shards
from train.errors import FederationError
from train.experiments.federated_configs import COMPRESSORS, Config, Row
from train.loop.evaluate import accuracy
from train.loop.step import Predict, init_variables, make_predict
from train.networks.linen import build


class Server(NamedTuple):
    """All that changes in a round: the network, the server's optimizer, and each client's memory, stacked."""

    params: Params
    optimizer: optax.OptState
    memory: PyTree


class Start(NamedTuple):
    """What all federations of a run begin with: data, each client's examples of it, the network and its parameters."""

    data: Dataset
    shards: list[np.ndarray]
    model: nn.Module
    params: Params
    predict: Predict


def run(config: Config, console: Console) -> list[Row]:
    """One federation for each compressor, from the same start, over the same clients and batches."""
    data = load(config.dataset, data_dir=config.data_dir)
    shards = make_shards(config, data)
    model = build("mlp", widths=config.widths, num_classes=data.num_classes)
    params, _ = init_variables(model, data, config.seed)
    start = Start(data, shards, model, params, make_predict(model, data))
    rows = []
    for name in config.compressors or COMPRESSORS:
        rows.append(run_one(name, config, start))
        row = rows[-1]
        console.print(f"{row.title}: {row.test_accuracy:.2%}, {row.bytes_up:,} bytes up, {row.seconds:.0f} s")
    return rows


def make_shards(config: Config, data: Dataset) -> list[np.ndarray]:
    """Each client's examples of the training split."""
    try:
        if config.dirichlet is None:
            return iid_shards(len(data.train), config.clients, seed=config.seed)
        return dirichlet_shards(data.train.labels, config.clients, alpha=config.dirichlet, seed=config.seed)
    except ValueError as e:
        raise FederationError(str(e)) from e


def run_one(name: str, config: Config, start: Start) -> Row:
    """All rounds with one compressor."""
    began = time.perf_counter()
    data, shards, model, params, predict = start
    title, make = COMPRESSORS[name]
    compressor = make(jax.random.key(config.seed))
    optimizer = server_optimizer(config)
    up, down = message_bytes(compressor, params), message_bytes(fed.dense(), params)
    values = sum(x.size for x in jax.tree.leaves(params))
    row = Row(name, title, 8 * (up - fed.HEADER_BYTES) / values, 0, 0, 0.0, 0.0)
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.clients, *x.shape)), compressor.init(params))
    server = Server(jax.tree.map(jnp.copy, params), optimizer.init(params), memory)
    step = make_round(config, data, model, compressor=compressor, optimizer=optimizer)
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)
    for number, (chosen, sizes, indices) in enumerate(schedule(config, shards), start=1):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        server, loss = step(server, images, labels, chosen, sizes, indices, key)
        row.bytes_up += up * config.per_round
        row.bytes_down += down * config.per_round
        if number % config.evaluate_every == 0 or number == config.rounds:
            if not np.isfinite(float(loss)):
                raise FederationError(f"{title}: the clients' loss is {float(loss)} in round {number}; lower a rate.")
            row.test_accuracy = accuracy(predict, server.params, {}, data.test)
            row.history.append((number, row.bytes_up, row.test_accuracy))
    row.seconds = time.perf_counter() - began
    return row


def schedule(config: Config, shards: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each round the clients drawn, how many examples they hold, and their batches (client, step, example)."""
    for number in range(config.rounds):
        rng = np.random.default_rng(np.random.SeedSequence((config.seed, 2, number)))
        chosen = np.sort(rng.choice(config.clients, config.per_round, replace=False))
        batches = [
            client_batches(shards[c], config.local_steps, config.batch, entropy=(config.seed, number, int(c)))
            for c in chosen
        ]
        yield chosen, np.array([len(shards[c]) for c in chosen], np.float32), np.stack(batches)


def make_round(
    config: Config,
    data: Dataset,
    model: nn.Module,
    *,
    compressor: fed.Compressor,
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[Server, jax.Array]]:
    """``round(server, images, labels, chosen, sizes, indices, key) -> (server, mean loss of the clients)``, jitted."""
    local = make_local_training(config, data, model)
    shared_out = config.dirichlet is None  # equal shards: a plain mean, which sums integer codes as integers

    def one_round(
        server: Server,
        images: jax.Array,
        labels: jax.Array,
        chosen: jax.Array,
        sizes: jax.Array,
        indices: jax.Array,
        key: jax.Array,
    ) -> tuple[Server, jax.Array]:
        changes, losses = jax.vmap(local, (None, None, None, 0))(server.params, images, labels, indices)
        own = jax.random.split(jax.random.fold_in(key, 1), config.per_round)
        memory = jax.tree.map(lambda m: m[chosen], server.memory)
        messages, memory = jax.vmap(lambda m, u, k: compressor.encode(m, u, key=k, shared=key))(memory, changes, own)
        memory = jax.tree.map(lambda m, new: m.at[chosen].set(new), server.memory, memory)
        total = fed.combine_stacked(messages, None if shared_out else sizes / jnp.sum(sizes))
        gradient = jax.tree.map(jnp.negative, compressor.decode(total))
        updates, state = optimizer.update(gradient, server.optimizer, server.params)
        return Server(optax.apply_updates(server.params, updates), state, memory), losses.mean()

    return jax.jit(one_round, donate_argnums=0)


def make_local_training(config: Config, data: Dataset, model: nn.Module) -> Callable[..., tuple[Params, jax.Array]]:
    """``local(params, images, labels, indices) -> (change, loss)``: a client's SGD from the server's parameters."""

    def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, normalize(images, data.mean, data.std), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def local(params: Params, images: jax.Array, labels: jax.Array, indices: jax.Array) -> tuple[Params, jax.Array]:
        def step(now: Params, batch: jax.Array) -> tuple[Params, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(now, images[batch], labels[batch])
            return jax.tree.map(lambda p, g: p - config.learning_rate * g, now, grads), loss

        after, losses = jax.lax.scan(step, params, indices)
        return jax.tree.map(jnp.subtract, after, params), losses.mean()

    return local


def server_optimizer(config: Config) -> optax.GradientTransformation:
    """What turns the mean change, as a negative gradient, into a step. Source: Reddi et al. 2020, arXiv:2003.00295."""
    default = {"average": 1.0, "momentum": 1.0, "adam": 3e-3}[config.server]
    rate = default if config.server_learning_rate is None else config.server_learning_rate
    if config.server == "adam":
        return optax.adam(rate, b2=0.99, eps=1e-3)
    return optax.sgd(rate, momentum=0.9 if config.server == "momentum" else None)


def message_bytes(compressor: fed.Compressor, params: Params) -> int:
    """Bytes of one client's message, from the shapes alone."""

    def encode(update: Params) -> PyTree:
        key = jax.random.key(0)
        return compressor.encode(compressor.init(update), update, key=key, shared=key)[0]

    return fed.bits(jax.eval_shape(encode, params)) // 8 + fed.HEADER_BYTES
