"""Lookups in tables of codes: the rows are those of the dense table, bit for bit, and it is never made."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.kernels import prepare
from jaxcomp.quantization import E4M3, NF4
from tests.marks import quick

ROWS, WIDTH = 5000, 64
TABLE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
TOKENS = jnp.array([[0, 4999], [3, 7000]])
ROLES = jc.roles(lambda p, t: p["w"][t])({"w": TABLE}, TOKENS)
GRIDS = {
    "int8, a scale a row": jc.quantize(jc.Int(8), per=jc.Channels(0)),
    "int8, one scale": jc.quantize(jc.Int(8), per=jc.Tensor()),
    "int4, groups": jc.quantize(jc.Int(4), per=jc.Groups(32, -1)),
    "int4, a scale a column": jc.quantize(jc.Int(4), per=jc.Channels(-1)),
    "int4, asymmetric": jc.quantize(jc.Int(4, symmetric=False), per=jc.Channels(0)),
    "int3": jc.quantize(jc.Int(3), per=jc.Channels(0)),
    "e4m3": jc.quantize(E4M3, per=jc.Channels(0)),
    "nf4": jc.quantize(NF4(), per=jc.Groups(32, -1)),
    "mx": jc.recipes.mx(roles=ROLES),
    "nvfp4": jc.recipes.nvfp4(roles=ROLES),
}
LOOKUPS = {
    "index": lambda p, t: p["w"][t],
    "take": lambda p, t: jnp.take(p["w"], t, axis=0),
    "fill": lambda p, t: p["w"].at[t].get(mode="fill", fill_value=5.0),
    "cast": lambda p, t: jnp.take(p["w"].astype(jnp.bfloat16), t, axis=0),
    "loop": lambda p, t: jax.lax.map(lambda i: p["w"][i], t),
}
CASES = [(grid, "take") for grid in GRIDS] + [("int4, groups", name) for name in LOOKUPS if name != "take"]


@functools.cache
def packed(grid: str) -> dict[str, jc.quantization.Quantized]:
    params = {"w": jnp.asarray(TABLE)}
    return jc.pack(GRIDS[grid].apply(GRIDS[grid].init(params), params))


@pytest.mark.parametrize("integer", [False, True], ids=["weight-only", "integer"])
@pytest.mark.parametrize(
    "case", quick(CASES, ("int4, groups", "take"), ("int8, one scale", "take"), ("int4, groups", "cast")), ids="-".join
)
def test_rows_are_those_of_the_dense_table_which_is_never_made(case, integer):
    grid, name = case
    fn, tree = LOOKUPS[name], packed(grid)
    run = quantize_function(fn, {}, integer=integer)
    compiled = jax.jit(lambda tree, t: run(tree, None, t)).lower(tree, TOKENS).compile()
    wanted = fn(jc.materialize(tree), TOKENS)
    out = compiled(tree, TOKENS)
    assert out.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(wanted, np.float32))
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * ROWS  # less than a code a row is
    assert [row.done for row in coverage(fn, {}, integer=integer)(tree, TOKENS).rows] == ["lookup"]


def tied(p, tokens):
    return jnp.einsum("btd,vd->btv", p["w"][tokens], p["w"])


def test_a_tied_table_is_looked_up_as_it_is_multiplied():
    tokens = TOKENS[:, :1]
    wanted = tied(jc.materialize(packed("int4, groups")), tokens)
    for tree in (packed("int4, groups"), prepare(packed("int4, groups"), tied, tokens)):
        out = jax.jit(lambda tree: quantize_function(tied, {})(tree, None, tokens))(tree)
        np.testing.assert_allclose(out, wanted, atol=2e-5)
        assert coverage(tied, {})(tree, tokens).rows[0].done == "lookup"
    rules = {".*": Act(8, range=Dynamic())}
    small = {"w": packed("int8, a scale a row")["w"]}
    fake, real = (
        jax.jit(lambda tree, i=i: quantize_function(tied, rules, integer=i)(tree, None, tokens))(small) for i in (0, 1)
    )
    np.testing.assert_allclose(fake, real, atol=1e-4)


def test_what_a_table_is_used_for_beside_is_done_to_the_array():
    def fn(p, tokens):
        return p["w"][tokens] + jnp.mean(p["w"], axis=0) + jnp.concatenate([p["w"], p["w"]])[tokens[0]]

    tree = packed("int4, groups")
    with jax.numpy_rank_promotion("allow"):
        out = jax.jit(lambda tree: quantize_function(fn, {})(tree, None, TOKENS % ROWS))(tree)
        np.testing.assert_allclose(out, fn(jc.materialize(tree), TOKENS % ROWS), atol=1e-5)
