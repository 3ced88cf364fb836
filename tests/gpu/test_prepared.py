"""Packed weights, caches and tables on a GPU against dense products in float64: each form that its backend has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Dynamic
from jaxcomp.quantization import E4M3
from tests.laws import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")]

GRIDS = {
    "int8": jc.quantize(jc.Int(8)),
    "int8 asymmetric": jc.quantize(jc.Int(8, symmetric=False)),
    "int4": jc.quantize(jc.Int(4)),
    "int4 groups": jc.quantize(jc.Int(4), per=jc.Groups(128)),
    "int4 groups asymmetric": jc.quantize(jc.Int(4, symmetric=False), per=jc.Groups(32)),
    "int3": jc.quantize(jc.Int(3), per=jc.Groups(64)),
    "nf4": jc.recipes.nf4(),
    "masked int4": jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))),
}
SHAPES = [(1, 384, 200), (3, 384, 200), (16, 1024, 512), (1, 200, 7), (200, 384, 129)]
"""Rows, the contracted axis, features: one row and few, many, and none that a block divides."""
GROUP = {"int4 groups": 128, "int4 groups asymmetric": 32, "int3": 64, "nf4": 64}
CASES = [(grid, shape) for grid in GRIDS for shape in SHAPES if shape[1] % GROUP.get(grid, 1) == 0]
# The most that operands rounded to bfloat16 or TF32 change a sum of products, over the sum of their magnitudes.
ROUNDED = {"bfloat16": 2.0**-7, "float32": 2.0**-10}


def product(p: Any, x: jax.Array) -> jax.Array:
    """A kernel as Flax has it."""
    return x @ p["kernel"].astype(x.dtype)


def drawn(grid: str, shape: tuple[int, int, int], dtype: str) -> tuple[Any, jax.Array]:
    """A packed tree and activations."""
    rows, length, features = shape
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(length, features)), jnp.float32)}
    transform = GRIDS[grid]
    tree = jc.pack(transform.apply(transform.init(params), params))
    return tree, jnp.asarray(rng.normal(size=(rows, length)), dtype)


def check_product(got: jax.Array, tree: Any, x: jax.Array) -> None:
    """Against the dense weight in float64."""
    a, w = np.asarray(x).astype(np.float64), np.asarray(jc.materialize(tree)["kernel"], np.float64)
    bound = ROUNDED[x.dtype.name] * (np.abs(a) @ np.abs(w))
    assert got.dtype == x.dtype
    assert (np.abs(np.asarray(got).astype(np.float64) - a @ w) <= bound).all()


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("grid", "shape"), CASES, ids=str)
def test_a_prepared_weight_multiplies_as_the_dense_one(grid, shape, dtype) -> None:
    tree, x = drawn(grid, shape, dtype)
    made = jc.prepare(tree, product, x)
    assert_same_bits(jc.materialize(made), jc.materialize(tree))
    run = jax.jit(jc.quantize_function(product, {}, integer=True))
    check_product(run(made, None, x), tree, x)


@pytest.mark.parametrize("form", ["sums", "chunks", "whole", "llvm", "triton", "mosaic"])
@pytest.mark.parametrize("shape", [(1, 384, 200), (16, 1024, 512)], ids=str)
@pytest.mark.parametrize("grid", ["int8", "int4 groups", "int4 groups asymmetric"])
def test_each_form_of_the_backend_is_right(grid, shape, form) -> None:
    from jaxcomp.kernels.products import weight_only

    tree, x = drawn(grid, shape, "bfloat16")
    (leaf,) = jc.prepare(tree, product, x).values()
    try:
        got = jax.jit(lambda x, w: weight_only(x, w, form=form))(x, leaf.weight)
    except ValueError as error:
        if "does not run on" not in str(error):
            raise
        pytest.skip(str(error))
    check_product(got, tree, x)


@pytest.mark.parametrize("rows", [1, 16, 200])
@pytest.mark.parametrize("grid", ["int8", "int8 asymmetric", "int4", "int4 groups"])
def test_a_prepared_weight_meets_integer_activations(grid, rows) -> None:
    """Sums of codes are exact: prepared or not, the same to the rounding of scales, of which groups have several."""
    tree, x = drawn(grid, (rows, 384, 200), "float32")
    run = jax.jit(jc.quantize_function(product, {".*": jc.Act(8, symmetric=True, range=Dynamic())}, integer=True))
    got, wanted = (np.asarray(run(t, None, x)) for t in (jc.prepare(tree, product, x), tree))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_prepared_panels_convolve_as_the_packed_one(bits, integer) -> None:
    """Prepared on a machine with llvmlite, and run where there is none of its code."""
    pytest.importorskip("llvmlite")

    def fn(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["kernel"], (2, 2), "SAME", dimension_numbers=numbers)

    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 24, 40)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(4, 9, 8, 24)), jnp.float32)
    tree = jc.pack(jc.quantize(jc.Int(bits), roles=jc.roles(fn)(params, x)).apply((), params))
    made = jc.prepare(tree, fn, x)
    assert_same_bits(jc.materialize(made), jc.materialize(tree))
    rules = {".*": jc.Act(8, range=Dynamic())} if integer else {}
    run = jax.jit(jc.quantize_function(fn, rules, integer=integer))
    got, wanted = (np.asarray(run(t, None, x)) for t in (made, tree))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=(0 if integer else 2e-2) * np.abs(wanted).max())


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("grid", ["int8", "int4 groups"])
def test_no_dense_weight_is_written(grid, rows) -> None:
    if rows > 1 and jax.default_backend() == "tpu":
        pytest.skip("the whole form may be the fastest there")
    tree, x = drawn(grid, (rows, 4096, 4096), "bfloat16")
    run = jax.jit(jc.quantize_function(product, {}, integer=True))
    memory = run.lower(jc.prepare(tree, product, x), None, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2_000_000


CACHES = {jc.Int(8): 0.03, jc.Int(4): 0.3, E4M3: 0.06}
"""How far attention to a cache is from that to floats at most: three bits of mantissa round by up to a sixteenth."""


@pytest.mark.parametrize("grid", CACHES, ids=str)
def test_a_cache_in_codes_is_read_as_the_dense_one(grid) -> None:
    from jaxcomp.kernels import kv_cache

    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 300, 2, 64)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, 1, 4, 64)), jnp.float32)
    step = jax.jit(lambda c, k, v, start: c.append(k, v, start))
    whole = step(kv_cache((2, 320, 2, 64), keys=grid), k, v, 0)
    split = step(step(kv_cache((2, 320, 2, 64), keys=grid), k[:, :299], v[:, :299], 0), k[:, 299:], v[:, 299:], 299)
    assert_same_bits(whole, split)
    got = np.asarray(jax.jit(lambda c, q: c.attend(q, 299))(whole, q), np.float64)
    near = np.asarray(jax.nn.dot_product_attention(q, k, v), np.float64)
    assert np.linalg.norm(got - near) <= CACHES[grid] * np.linalg.norm(near)
    host = jax.devices("cpu")[0]
    there = np.asarray(jax.jit(lambda c, q: c.attend(q, 299))(*jax.device_put((whole, q), host)), np.float64)
    np.testing.assert_allclose(got, there, rtol=0, atol=2.0**-9 * np.abs(there).max())
