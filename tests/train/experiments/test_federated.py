"""A small federation on digits: one round against plain SGD, what is counted, and what is written."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxcomp.federated as fed
from tests.marks import quick
from train.data.images import normalize
from train.data.sets import load
from train.data.shards import iid_shards
from train.errors import FederationError
from train.experiments.federated import Server, make_round, message_bytes, run, schedule, server_optimizer
from train.experiments.federated_configs import COMPRESSORS, Config
from train.loop.step import init_variables
from train.networks.linen import build
from train.reports.federated import write_report

SMALL = Config(
    dataset="digits",
    widths=(32,),
    clients=8,
    per_round=4,
    rounds=12,
    local_steps=8,
    batch=16,
    evaluate_every=6,
    compressors=("dense", "topk_feedback", "rotated4"),
    target=0.8,
)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """flax's and optax's own code mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def quiet() -> Console:
    return Console(record=True, width=140, file=io.StringIO())


@pytest.mark.slow
def test_one_client_that_sends_all_is_plain_sgd() -> None:
    config = dataclasses.replace(SMALL, clients=1, per_round=1)
    data = load("digits")
    model = build("mlp", widths=config.widths)
    params, _ = init_variables(model, data, 0)
    optimizer = server_optimizer(config)
    step = make_round(config, data, model, compressor=fed.dense(), optimizer=optimizer)
    shards = iid_shards(len(data.train), 1, seed=0)
    chosen, sizes, indices = next(schedule(config, shards))
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)
    want = params
    for batch in indices[0]:
        x, y = normalize(images[batch], data.mean, data.std), labels[batch]

        def loss(p, x=x, y=y):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": p}, x), y).mean()

        want = jax.tree.map(lambda p, g: p - 0.1 * g, want, jax.grad(loss)(want))
    server = Server(jax.tree.map(jnp.copy, params), optimizer.init(params), ())
    got, _ = step(server, images, labels, chosen, sizes, indices, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, want)


def descended(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A step of softmax regression at rate 0.1."""
    scores = x @ w + b
    p = np.exp(scores - scores.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True) - np.eye(10)[y]) / len(y)
    return w - 0.1 * x.T @ p, b - 0.1 * p.sum(0)


@pytest.mark.parametrize(
    ("dirichlet", "cuts"), [(0.3, [20, 100, 300]), (None, [175, 350, 525])], ids=["unequal", "equal"]
)
def test_a_round_is_fedavg_in_numpy(dirichlet, cuts) -> None:
    """McMahan et al. 2017, algorithm 1: the mean of the clients' networks, weighted by their examples."""
    config = dataclasses.replace(SMALL, widths=(), clients=4, per_round=3, local_steps=3, dirichlet=dirichlet)
    data, model = load("digits"), build("mlp", widths=())
    shards = np.split(np.arange(700), cuts)
    chosen, sizes, indices = next(schedule(config, shards))
    held = np.array([len(shards[c]) for c in chosen])
    start = np.random.default_rng(0).normal(size=(64, 10)) / 8, np.zeros(10)
    x = ((data.train.images / 255 - np.array(data.mean)) / np.array(data.std)).reshape(-1, 64)
    ends = []
    for batches in indices:
        now = start
        for batch in batches:
            now = descended(*now, x[batch], data.train.labels[batch])
        ends.append(now)
    want = [np.tensordot(held / held.sum(), np.stack(own), 1) for own in zip(*ends, strict=True)]
    params = {"head": {"kernel": jnp.asarray(start[0], jnp.float32), "bias": jnp.zeros(10)}}
    optimizer = server_optimizer(config)
    step = make_round(config, data, model, compressor=fed.dense(), optimizer=optimizer)
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)
    server = Server(params, optimizer.init(params), ())
    got = step(server, images, labels, chosen, sizes, indices, jax.random.key(0))[0].params["head"]
    np.testing.assert_allclose(got["kernel"], want[0], atol=2e-6)
    np.testing.assert_allclose(got["bias"], want[1], atol=2e-6)


@pytest.mark.parametrize("name", quick(COMPRESSORS, "dense", "topk"))
def test_what_is_counted_is_what_would_be_sent(name) -> None:
    update = {"dense_0": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
    compressor = COMPRESSORS[name][1](jax.random.key(0))
    key = jax.random.key(1)
    message, _ = compressor.encode(compressor.init(update), update, key=key, shared=key)
    assert len(fed.to_bytes(message)) == message_bytes(compressor, update)


@pytest.mark.slow
def test_a_federation_learns_counts_and_writes_the_same_twice(tmp_path) -> None:
    config = dataclasses.replace(SMALL, out=tmp_path / "run")
    rows = run(config, quiet())
    console = quiet()
    write_report(rows, config, console)
    printed = console.export_text()
    dense, topk, rotated = rows
    assert dense.test_accuracy > 0.8
    assert rotated.test_accuracy > dense.test_accuracy - 0.05
    assert topk.test_accuracy > 0.3
    assert dense.bytes_up == dense.bytes_down == 12 * 4 * (4 * (64 * 32 + 32 + 320 + 10) + fed.HEADER_BYTES)
    assert rotated.bytes_up < dense.bytes_up / 6
    assert topk.bytes_up < dense.bytes_up / 30
    assert [r for r, _, _ in dense.history] == [6, 12]
    assert "top 1% + feedback" in printed
    assert f"{dense.test_accuracy:.2%}" in printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [r["bytes_up"] for r in report["rows"]] == [r.bytes_up for r in rows]
    assert (tmp_path / "run" / "accuracy_against_bytes.png").read_bytes()[:4] == b"\x89PNG"
    again = run(dataclasses.replace(config, compressors=("topk_feedback",)), quiet())
    assert again[0].history == topk.history


@pytest.mark.slow
@pytest.mark.parametrize(("server", "rate"), [("adam", 0.02), ("momentum", None)])
def test_other_servers_and_unequal_shards_learn_too(server, rate) -> None:
    config = dataclasses.replace(SMALL, compressors=("rotated4",), server=server, server_learning_rate=rate)
    config = dataclasses.replace(config, dirichlet=1.0)
    assert run(config, quiet())[0].test_accuracy > 0.5


def test_a_federation_that_diverges_says_so() -> None:
    with pytest.raises(FederationError, match=r"float32: the clients' loss is (nan|inf) in round 6; lower a rate"):
        run(dataclasses.replace(SMALL, compressors=("dense",), learning_rate=1e6), quiet())
