"""Fault 12: codes of weights that are unpacked, stacked or tiled on the way to their product run on integers."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from tests.marks import quick
from tests.trace.models import normal

RULES = {".*": Act(8, range=Dynamic())}


def unpacked(p, x):
    """``a, b = p["w"]``: an unstack on new JAX, slices on old."""
    a, b = p["w"]
    return x @ a + jnp.tanh(x) @ b


def looped(p, x):
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


CASES = {
    "unpacked": (unpacked, {"w": (2, 6, 8)}, jc.core.Channels((0, -1))),
    "looped": (looped, {"w": (3, 6, 6)}, jc.core.Channels((0, -1))),
    "one scale": (looped, {"w": (3, 6, 6)}, jc.core.Tensor()),
    "an inner axis": (lambda p, x: x @ jnp.unstack(p["w"], axis=1)[1], {"w": (6, 2, 8)}, jc.core.Channels((1, 2))),
    "stacked": (
        lambda p, x: jnp.einsum("bi,kio->bko", x, jnp.stack([p["a"], p["c"]])),
        {"a": (6, 8), "c": (6, 8)},
        jc.core.Channels(),
    ),
    "stacked behind": (
        lambda p, x: jnp.einsum("bi,iok->bko", x, jnp.stack([p["a"], p["c"]], axis=-1)),
        {"a": (6, 8), "c": (6, 8)},
        jc.core.Channels(),
    ),
    "tiled": (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), {"w": (6, 8)}, jc.core.Channels()),
    "tiled inputs": (lambda p, x: jnp.tile(x, (1, 2)) @ jnp.tile(p["w"], (2, 1)), {"w": (6, 8)}, jc.core.Channels()),
}


@pytest.mark.parametrize("name", quick(CASES, "unpacked", "stacked behind", "tiled inputs"))
@pytest.mark.parametrize("symmetric", [True, False])
def test_fault_12_codes_reach_their_product(name, symmetric):
    fn, shapes, per = CASES[name]
    params = {k: normal(i, *s) for i, (k, s) in enumerate(shapes.items())}
    x = normal(9, 4, 6)
    quantized = jc.quantize(jc.quantization.Int(8, symmetric=symmetric), per=per).apply((), params)
    done = {row.path: row.done for row in coverage(fn, RULES, integer=True)(quantized, x).rows if row.kind == "dot"}
    assert set(done.values()) == {"integer"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer = quantize_function(fn, RULES, integer=True)(quantized, {}, x)
    fake = quantize_function(fn, RULES)(quantized, {}, x)
    np.testing.assert_allclose(integer, fake, rtol=2e-5, atol=2e-5)
    packed = quantize_function(fn, RULES, integer=True)(jc.pack(quantized), {}, x)
    np.testing.assert_allclose(packed, integer, rtol=2e-5, atol=2e-5)


def test_fault_12_roles_and_sites_of_unpacked_leaves():
    params, x = {"w": jnp.ones((2, 6, 8))}, jnp.ones((4, 6))
    assert [site.leaf for site in jc.sites(unpacked)(params, x)] == ["w", "w"]
    assert jc.sites(unpacked)(params, x)[0].operands[1].leaf_roles == ("stacked", "contracted", "output")
    assert jc.roles(unpacked)(params, x)["w"] == jc.roles(lambda p, x: x @ p["w"][0] + x @ p["w"][1])(params, x)["w"]
