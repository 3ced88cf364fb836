"""No hidden state: float, int8 and int2 versions of one model live in one process in any order, bit for bit.

This file is also the program of the fresh processes: ``python -m tests.test_isolation VERSION FILE``.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from tests.marks import quick

VERSIONS = {"float": jc.core.identity(), "int8": jc.quantize(jc.Int(8)), "int2": jc.quantize(jc.Int(2))}
STACKED = {
    "float": VERSIONS["float"],
    "int8": jc.quantize(jc.Int(8), per=jc.Channels((0, -1))),
    "int2": jc.quantize(jc.Int(2), per=jc.Channels((0, -1))),
}
DIM, DEPTH = 32, 2


def with_operator(params: Any, x: jax.Array) -> jax.Array:
    """A perceptron by ``@``."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None, :])
    return x


def with_matmul(params: Any, x: jax.Array) -> jax.Array:
    """The same by ``jnp.matmul``."""
    for layer in params["layers"]:
        x = jax.nn.relu(jnp.matmul(x, layer["kernel"]) + layer["bias"][None, :])
    return x


def with_scan(params: Any, x: jax.Array) -> jax.Array:
    """The same by ``lax.scan`` over stacked layers."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return jax.nn.relu(x @ p["kernel"] + p["bias"][None, :]), None

    return jax.lax.scan(layer, x, params["stack"])[0]


MODELS = {"operator": with_operator, "matmul": with_matmul, "scan": with_scan}


def inputs() -> tuple[dict[str, Any], jax.Array]:
    """Parameters of each model, and what it is called on."""
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(DEPTH, DIM, DIM)) / DIM**0.5, jnp.float32)
    biases = jnp.asarray(rng.normal(size=(DEPTH, DIM)), jnp.float32)
    layers = {"layers": [{"kernel": k, "bias": b} for k, b in zip(kernels, biases, strict=True)]}
    stack = {"stack": {"kernel": kernels, "bias": biases}}
    return {"operator": layers, "matmul": layers, "scan": stack}, jnp.asarray(rng.normal(size=(8, DIM)), jnp.float32)


def evaluate(version: str) -> dict[str, np.ndarray]:
    """What one version of every model gives, under jit."""
    params, x = inputs()
    transforms = {name: (STACKED if name == "scan" else VERSIONS)[version] for name in MODELS}
    states = {name: transforms[name].init(params[name]) for name in MODELS}

    @jax.jit
    def forward(params: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        seen = {name: jc.materialize(t.apply(states[name], params[name])) for name, t in transforms.items()}
        return {name: model(seen[name], x) for name, model in MODELS.items()}

    return {name: np.asarray(y) for name, y in forward(params, x).items()}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What each version gives in a process of its own."""
    folder = tmp_path_factory.mktemp("fresh")
    root = Path(__file__).resolve().parents[1]
    with contextlib.ExitStack() as stack:
        running = []
        for version in VERSIONS:
            command = [sys.executable, "-m", "tests.test_isolation", version, str(folder / f"{version}.npz")]
            process = stack.enter_context(subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)  # of one that has ended it is nothing
            running.append(process)
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    return {version: dict(np.load(folder / f"{version}.npz")) for version in VERSIONS}


ORDERS = list(itertools.permutations(VERSIONS))


@pytest.mark.parametrize("order", quick(ORDERS, ORDERS[0], ORDERS[-1]), ids="-".join)
def test_every_order_gives_what_fresh_processes_give(order, fresh):
    for version in order:
        found = evaluate(version)
        assert found.keys() == fresh[version].keys()
        for name, want in fresh[version].items():
            np.testing.assert_array_equal(found[name], want, err_msg=f"{version} {name} after {order}", strict=True)


def test_the_versions_differ(fresh):
    for one, other in itertools.combinations(VERSIONS, 2):
        for name in MODELS:
            assert not np.array_equal(fresh[one][name], fresh[other][name])


if __name__ == "__main__":
    np.savez(sys.argv[2], **evaluate(sys.argv[1]))
