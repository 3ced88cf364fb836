"""A small federation on digits: shards, one round against plain SGD, what is counted, and what is written."""

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
from train.data import load, normalize
from train.federated import (
    COMPRESSORS,
    Config,
    FederationError,
    Server,
    main,
    make_round,
    message_bytes,
    run,
    schedule,
    server_optimizer,
)
from train.federated_report import write_report
from train.models import build
from train.shards import client_batches, dirichlet_shards, iid_shards
from train.step import init_variables

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


def test_shards_are_a_partition() -> None:
    labels = np.repeat(np.arange(10), 100)
    for shards in (iid_shards(1000, 7, seed=1), dirichlet_shards(labels, 7, alpha=0.5, seed=1)):
        assert np.sort(np.concatenate(shards)).tolist() == list(range(1000))


def test_a_small_alpha_gives_a_client_few_classes() -> None:
    labels = np.repeat(np.arange(10), 500)

    def largest_share(shards):
        return np.mean([np.bincount(labels[s]).max() / len(s) for s in shards])

    assert largest_share(iid_shards(5000, 10, seed=0)) < 0.15
    assert largest_share(dirichlet_shards(labels, 10, alpha=0.1, seed=0)) > 0.4
    assert largest_share(dirichlet_shards(labels, 10, alpha=1000.0, seed=0)) < 0.15


def test_a_short_shard_is_gone_through_again() -> None:
    got = client_batches(np.array([3, 5, 7]), 2, 4, entropy=(0, 1))
    assert got.shape == (2, 4)
    assert np.bincount(got.reshape(-1))[[3, 5, 7]].min() >= 2


def test_shards_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clients must be in 1..3, the number of examples, got 4"):
        iid_shards(3, 4, seed=0)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        dirichlet_shards(np.zeros(10, int), 2, alpha=0, seed=0)
    with pytest.raises(ValueError, match="some of 10 clients always get fewer than 1 examples"):
        dirichlet_shards(np.zeros(12, int), 10, alpha=0.001, seed=0)


@pytest.mark.slow
def test_one_client_that_sends_all_is_plain_sgd() -> None:
    config = dataclasses.replace(SMALL, clients=1, per_round=1)
    data = load("digits")
    model = build("mlp", widths=config.widths)
    params, _ = init_variables(model, data, 0)
    optimizer = server_optimizer(config)
    step = make_round(model, data, fed.dense(), optimizer, config)
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
    step = make_round(model, data, fed.dense(), optimizer, config)
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--compressors", "gzip"], "there is no 'gzip'; there are dense, uniform4"),
        (["--per-round", "60"], "per_round must be at most 50, the number of clients, got 60"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--dataset", "digits", "--clients", "2000"], "clients must be in 1..1078"),
    ],
)
def test_bad_settings_are_one_error(options, text, capsys, tmp_path) -> None:
    try:
        code = main([*options, "--out", str(tmp_path / "run")])
    except SystemExit as e:  # tyro's, for a field
        code = e.code
    assert code == 2
    assert text in " ".join(capsys.readouterr().err.replace("|", " ").replace("│", " ").split())
    assert not (tmp_path / "run").exists()
