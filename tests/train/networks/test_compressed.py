"""What a network is after training and before its file."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from train.networks.compressed import Widened, narrow_norms
from train.networks.linen import BasicBlock, ConvNet


def test_norms_in_two_vectors_give_what_they_gave() -> None:
    net = ConvNet(widths=(4, 6))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    variables = net.init(jax.random.key(1), x)
    rng = np.random.default_rng(0)
    random = lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), jnp.float32)  # noqa: E731
    stats = jax.tree.map(random, variables["batch_stats"])
    params = {k: jax.tree.map(random, v) if k.startswith("norm") else v for k, v in variables["params"].items()}
    full = {"params": params, "batch_stats": stats}
    small = narrow_norms(full)
    assert {v.dtype for k, v in small["params"]["norm_1"].items()} == {jnp.dtype(jnp.float16)}
    assert (small["batch_stats"]["norm_0"]["mean"] == 0).all()
    wanted = net.apply(full, x, train=False)
    assert jnp.abs(Widened(net).apply(small, x, train=False) - wanted).max() < 4e-3 * jnp.abs(wanted).max()


def test_norms_within_blocks_are_found() -> None:
    block = BasicBlock(4, 4, stride=2)
    variables = block.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)), True)
    variables = {c: {"block": v} for c, v in variables.items()}
    small = narrow_norms(variables)
    assert jax.tree.structure(small) == jax.tree.structure(variables)
    assert small["params"]["block"]["projection_norm"]["scale"].dtype == jnp.float16
    assert small["params"]["block"]["conv_1"]["kernel"].dtype == jnp.float32
