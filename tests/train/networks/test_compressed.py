"""What a network is after training and before its file."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.networks.compressed import Widened, narrow_norms
from train.networks.linen import EPSILON, BasicBlock

RNG = np.random.default_rng(0)


def test_norms_in_two_vectors_do_what_they_did() -> None:
    scale, bias, mean, var = (RNG.uniform(0.5, 2, 6).astype(np.float32) for _ in range(4))
    full = {"params": {"norm": {"scale": scale, "bias": bias}}, "batch_stats": {"norm": {"mean": mean, "var": var}}}
    small = narrow_norms(full)
    params, stats = (jax.tree.map(np.asarray, small[c]["norm"]) for c in ("params", "batch_stats"))
    assert {v.dtype for v in params.values()} == {jnp.dtype(jnp.float16)}
    x = RNG.standard_normal((100, 6)).astype(np.float32)
    wanted = (x - mean) / np.sqrt(var + EPSILON) * scale + bias
    found = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON) * np.float32(params["scale"]) + params["bias"]
    assert np.abs(found - wanted).max() <= 2**-11 * (np.abs(wanted).max() + np.abs(x).max() * 3)


def test_norms_within_blocks_are_found() -> None:
    block = BasicBlock(4, 4, stride=2)
    shapes = jax.eval_shape(lambda k, x: block.init(k, x, True), jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    shapes = {c: {"block": v} for c, v in shapes.items()}
    small = jax.eval_shape(narrow_norms, shapes)
    assert jax.tree.structure(small) == jax.tree.structure(shapes)
    assert small["params"]["block"]["projection_norm"]["scale"].dtype == jnp.float16
    assert small["params"]["block"]["conv_1"]["kernel"].dtype == jnp.float32


def test_a_network_gets_what_it_was_trained_with() -> None:
    class Types:
        def apply(self, variables: Any, images: Any, *, train: bool, mutable: Any = False) -> Any:
            return jax.tree.map(lambda x: x.dtype, variables)

    given = {"a": np.ones(2, np.float16), "b": np.ones(2, np.float32), "c": np.ones(2, np.int32)}
    found = Widened(Types()).apply(given, jnp.ones(1), train=False)
    assert found == {"a": np.float32, "b": np.float32, "c": np.int32}
