"""Plans of shapes alone have the widths of plans of values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc


def fn(p, x):
    """A hidden layer."""
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def test_widths_are_those_of_values() -> None:
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(4, 12)).astype(np.float32), "down": rng.normal(size=(12, 3)).astype(np.float32)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    groups = jc.channel_groups(fn)(shapes, x)
    for target in ({"sparsity": 0.4}, {"macs": 0.5 * groups.macs()}):
        found = jc.plan(groups, shapes, **target)
        assert found.widths == jc.plan(groups, params, **target).widths
    kept = jc.plan(groups, shapes, sparsity=0.5).take(params)
    np.testing.assert_array_equal(kept["up"], params["up"][:, :6])
    for more in ({"scope": "global"}, {"score": jc.structure.l1()}):
        with pytest.raises(ValueError, match="plan: these parameters are shapes"):
            jc.plan(groups, shapes, sparsity=0.5, **more)
