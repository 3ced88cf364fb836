"""A simulated federation: accuracy against bytes sent, for each way of compressing what the clients send.

``python -m train.federated`` deals a data set out to clients. In every round a few of them train the server's network
on their own examples and send back, compressed, how their parameters changed; the server adds up the messages (FedAvg)
and steps. What is counted is what :func:`jaxcomp.federated.to_bytes` would send.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

import jaxcomp.federated as fed
from jaxcomp.artifact.files import FileError
from train.data import DataError, Dataset, load, normalize
from train.evaluate import accuracy
from train.federated_report import write_report
from train.models import build
from train.shards import client_batches, dirichlet_shards, iid_shards
from train.step import init_variables, make_predict
from train.terminal import make_console, print_error


class FederationError(RuntimeError):
    """A federation that cannot run or did not stay finite."""


COMPRESSORS: dict[str, tuple[str, Callable[[jax.Array], fed.Compressor]]] = {
    "dense": ("float32", lambda key: fed.dense()),
    "uniform4": ("4-bit", lambda key: fed.uniform(4)),
    "rotated4": ("rotated 4-bit", lambda key: fed.rotate(fed.uniform(4), block=1024)),
    "rotated2": ("rotated 2-bit", lambda key: fed.rotate(fed.uniform(2), block=1024)),
    "drive": ("rotated sign (DRIVE)", lambda key: fed.rotate(fed.sign(unbiased=True), block=1024)),
    "sign": ("sign + feedback", lambda key: fed.error_feedback(fed.sign())),
    "vote": ("sign, majority vote", lambda key: fed.sign(vote=True)),
    "randomk": ("random 5%", lambda key: fed.randomk(0.05)),
    "topk": ("top 1%", lambda key: fed.topk(0.01)),
    "topk_feedback": ("top 1% + feedback", lambda key: fed.error_feedback(fed.topk(0.01))),
    "powersgd": ("PowerSGD rank 2 + feedback", lambda key: fed.error_feedback(fed.powersgd(2, key=key))),
}
"""Rows of the table: a title, and the compressor from a key."""


@dataclass(frozen=True)
class Config:
    """Settings of a federation.

    ``python -m train.federated`` takes under three minutes on one CPU core: float32 86.27% on test after 407 MB sent
    up, rotated signs the same after 12.9 MB.
    """

    dataset: Literal["digits", "fashion_mnist", "cifar10"] = "fashion_mnist"
    """Which data."""
    widths: tuple[int, ...] = (128,)
    """Hidden layers of the network, an MLP."""
    clients: int = 50
    """How many hold a shard of the training split."""
    per_round: int = 10
    """How many of them are drawn in a round."""
    rounds: int = 100
    """How often the server's network changes."""
    local_steps: int = 20
    """Steps of SGD that a client makes in a round."""
    batch: int = 32
    """Examples in such a step."""
    learning_rate: float = 0.1
    """Of the clients."""
    dirichlet: float | None = None
    """Shards of few classes each (0.1: two or three); none deals the examples out at random."""
    server: Literal["average", "momentum", "adam"] = "average"
    """What the server does with the mean change: FedAvg adds it, the others take it as a gradient (FedOpt)."""
    server_learning_rate: float | None = None
    """1 for average and momentum (0.9), 0.003 for adam."""
    compressors: tuple[str, ...] = ()
    """Rows of the table; none means all."""
    evaluate_every: int = 10
    """Rounds between two points of the curve."""
    target: float = 0.85
    """The table says after how many bytes the test accuracy was this high for the first time."""
    seed: int = 0
    """Of shards, clients, order and initialization."""
    out: Path | None = None
    """Folder of report.json and the picture; runs/federated_<dataset> by default."""
    data_dir: Path | None = None
    """Folder of prepared data sets; $JAXCOMP_DATA or ~/.cache/jaxcomp/data by default."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.compressors if name not in COMPRESSORS]
        if unknown:
            raise ValueError(f"compressors: there is no {unknown[0]!r}; there are {', '.join(COMPRESSORS)}.")
        for name in ("clients", "per_round", "rounds", "local_steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.per_round > self.clients:
            raise ValueError(f"per_round must be at most {self.clients}, the number of clients, got {self.per_round}.")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.out or Path("runs") / f"federated_{self.dataset}"


class Server(NamedTuple):
    """All that changes in a round: the network, the server's optimizer, and each client's memory, stacked."""

    params: Any
    optimizer: Any
    memory: Any


@dataclass
class Row:
    """What a compressor cost and gave. Bytes are of all rounds and clients, headers included."""

    name: str
    title: str
    bits_per_value: float
    bytes_up: int
    bytes_down: int
    test_accuracy: float
    seconds: float
    history: list[tuple[int, int, float]] = field(default_factory=list)
    """Round, bytes sent up until then, test accuracy."""

    def bytes_to(self, target: float) -> int | None:
        """Bytes sent up when the test accuracy was ``target`` for the first time, or None."""
        return next((sent for _, sent, reached in self.history if reached >= target), None)


def run(config: Config, console: Console) -> list[Row]:
    """One federation for each compressor, from the same start, over the same clients and batches."""
    data = load(config.dataset, data_dir=config.data_dir)
    shards = make_shards(config, data)
    model = build("mlp", widths=config.widths, num_classes=data.num_classes)
    params, _ = init_variables(model, data, config.seed)
    predict = make_predict(model, data)
    rows = []
    for name in config.compressors or COMPRESSORS:
        rows.append(run_one(name, config, data, shards, model, params, predict))
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


def run_one(
    name: str, config: Config, data: Dataset, shards: list[np.ndarray], model: nn.Module, params: Any, predict: Any
) -> Row:
    """All rounds with one compressor."""
    start = time.perf_counter()
    title, make = COMPRESSORS[name]
    compressor = make(jax.random.key(config.seed))
    optimizer = server_optimizer(config)
    up, down = message_bytes(compressor, params), message_bytes(fed.dense(), params)
    values = sum(x.size for x in jax.tree.leaves(params))
    row = Row(name, title, 8 * (up - fed.HEADER_BYTES) / values, 0, 0, 0.0, 0.0)
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.clients, *x.shape)), compressor.init(params))
    server = Server(jax.tree.map(jnp.copy, params), optimizer.init(params), memory)
    step = make_round(model, data, compressor, optimizer, config)
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
    row.seconds = time.perf_counter() - start
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
    model: nn.Module,
    data: Dataset,
    compressor: fed.Compressor,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> Callable[..., tuple[Server, jax.Array]]:
    """``round(server, images, labels, chosen, sizes, indices, key) -> (server, mean loss of the clients)``, jitted."""
    local = make_local_training(model, data, config)
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


def make_local_training(model: nn.Module, data: Dataset, config: Config) -> Callable[..., tuple[Any, jax.Array]]:
    """``local(params, images, labels, indices) -> (change, loss)``: a client's SGD from the server's parameters."""

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, normalize(images, data.mean, data.std), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def local(params: Any, images: jax.Array, labels: jax.Array, indices: jax.Array) -> tuple[Any, jax.Array]:
        def step(now: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
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


def message_bytes(compressor: fed.Compressor, params: Any) -> int:
    """Bytes of one client's message, from the shapes alone."""

    def encode(update: Any) -> Any:
        key = jax.random.key(0)
        return compressor.encode(compressor.init(update), update, key=key, shared=key)[0]

    return fed.bits(jax.eval_shape(encode, params)) // 8 + fed.HEADER_BYTES


def main(arguments: list[str]) -> int:
    """Runs all federations; 0 when the table is printed, 2 when an error was."""
    try:
        config = tyro.cli(Config, args=arguments, description=__doc__, prog="python -m train.federated")
        console = make_console(130)
        write_report(run(config, console), config, console)
    except (FederationError, DataError, FileError, ValueError, OSError) as e:
        print_error(e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
