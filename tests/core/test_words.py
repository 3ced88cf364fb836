"""Reprs say what a leaf is, in one line, from what is at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core import CompressedLeaf
from jaxcomp.factorization import low_rank
from jaxcomp.quantization import NF4, APoT, Levels, learned
from jaxcomp.recipes import mx
from jaxcomp.sharing import Codebook, VectorCodebook

W = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
W[:8, :3] = 0
PARAMS = {"kernel": jnp.asarray(W)}
TABLE = jnp.asarray([[0.0, 1.0], [-1.0, 2.0], [0.5, 0.5], [3.0, 0.0]])
CODES = jnp.asarray(np.arange(64 * 16, dtype=np.uint8).reshape(64, 16) % 4)


def applied(t):
    if isinstance(t, CompressedLeaf):
        return t
    return t.apply(t.init(PARAMS), PARAMS)["kernel"]


CASES = {
    "int4 groups": (jc.quantize(jc.Int(4), per=jc.Groups(32)), "Quantized int4, 64x16, groups of 32, 0.625 B/weight"),
    "sign": (jc.quantize(jc.Int(1)), "Quantized int1, 64x16, 16 scales, 0.188 B/weight"),
    "asymmetric": (
        jc.quantize(jc.Int(8, symmetric=False), per=jc.Tensor()),
        "Quantized int8 asymmetric, 64x16, one scale",
    ),
    "log": (jc.quantize(jc.Log(4)), "Quantized Log(4), 64x16, 16 scales"),
    "nf4": (jc.quantize(NF4()), "Quantized NF4, 64x16, 16 scales"),
    "levels": (jc.quantize(Levels((-1.0, 0.5, 2.0))), "Quantized 3 levels, 64x16"),
    "apot": (jc.quantize(APoT(4)), "Quantized APoT(4), 64x16"),
    "float8": (jc.quantize(jc.Float(4, 3)), "Quantized float8 e4m3, 64x16"),
    "tiles": (
        jc.quantize(jc.Int(2, narrow=True), per=jc.core.Tiles((16, 8))),
        "Quantized int2 narrow, 64x16, tiles of 16x8",
    ),
    "buckets": (jc.quantize(jc.Int(4), per=jc.core.Buckets(100)), "Quantized int4, 64x16, buckets of 100"),
    "mx": (mx(jc.Float(2, 1)), "Quantized float4 e2m1, 64x16, groups of 32, E8M0 scales, 0.5"),
    "masked": (jc.prune(0.5), "Masked float32, 64x16"),
    "both": (jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))), "Masked Quantized int4, 64x16, 16 scales"),
    "shared": (Codebook(TABLE[:, :1], CODES, None), "Codebook of 4, 64x16, one table, 0.266 B/weight"),
    "vectors": (VectorCodebook(TABLE, CODES[:, ::2], None, 1), "Codebook of 4 vectors of 2, 64x16"),
    "low rank": (low_rank(4), "LowRank of rank 4 float32, 64x16, 1.25 B/weight"),
    "gated": (jc.gate(jc.prune(0.5), jc.every(2)), "Masked float32, 64x16"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_leaf_says_what_it_is(name):
    t, words = CASES[name]
    leaf = applied(t)
    small = jc.pack(leaf)
    assert repr(small).startswith(f"<{words}"), repr(small)
    assert "\n" not in repr(small)
    assert "not packed" not in repr(small)
    for x in (leaf, small):
        seen = x.zeros_seen()
        if seen is not None:
            assert seen == (np.asarray(jc.materialize(x)) == 0).mean(), x
    assert repr(jax.eval_shape(lambda: leaf)).startswith(f"<{words.split(',')[0]}, 64x16")


@pytest.mark.parametrize("grid", [jc.Int(1), Levels((-1.0, 0.5, 2.0)), jc.Int(4)], ids=["sign", "levels", "int4"])
def test_what_a_mask_cuts_is_zero_whatever_the_grid(grid):
    leaf = applied(jc.chain(jc.prune(0.4), jc.quantize(grid, per=jc.core.Tensor())))
    zeros = (np.asarray(jc.materialize(leaf)) == 0).mean()
    assert zeros >= 0.4
    assert leaf.zeros_seen() == jc.pack(leaf).zeros_seen() == zeros


@pytest.mark.parametrize("name", ["int4 groups", "sign", "asymmetric", "log", "nf4", "float8", "masked", "both"])
def test_zeros_are_seen_without_computing(name):
    leaf = jc.pack(applied(CASES[name][0]))
    with jax.transfer_guard_host_to_device("disallow"):  # numpy alone: nothing is put on a device
        assert leaf.zeros_seen() is not None
        assert "% zeros" in repr(leaf)


def test_inside_jit_and_in_trees_that_hold_anything():
    said = []
    jax.jit(lambda p: said.append(repr(jc.quantize(jc.Int(4)).apply((), p)["kernel"])))(PARAMS)
    assert said == ["<Quantized int4, 64x16, 16 scales, not packed, 4.06 B/weight>"]
    leaf = applied(jc.quantize(jc.Int(4)))
    assert repr(jax.tree.map(lambda x: None, leaf)).startswith("Quantized(")
    assert repr(jax.tree.map(lambda x: object(), leaf)).startswith("Quantized(")


def test_large_leaves_are_not_looked_at():
    big = {"kernel": jnp.zeros((4096, 4096))}
    leaf = jax.jit(lambda p: jc.quantize(jc.Int(8)).apply((), p))(big)["kernel"]
    assert repr(leaf) == "<Quantized int8, 4096x4096, 4096 scales, not packed, 4 B/weight>"
    assert leaf.zeros_seen() is None


def test_a_trained_leaf_says_its_grid():
    leaf = learned(PARAMS, jc.Int(3), per=jc.Tensor())["kernel"]
    assert repr(leaf) == "<Learned int3, 64x16, one scale, 4 B/weight>"


def test_programs_in_lines():
    f = lambda p, x: x @ p["kernel"]  # noqa: E731
    x = jnp.ones((2, 64))
    found = jc.sites(f)(PARAMS, x)
    (site,) = found
    assert repr(found) == repr(site) == "<dot kernel, weight 64x16 (contracted, output), out 2x16 float32, 2,048 MACs>"
    assert len(repr(type(found)((site, site))).splitlines()) == 2
    assert repr(jc.cost(f)(PARAMS, x)).splitlines()[-1].split() == ["total", "2,048", "2,097,152", "4,736"]
    assert repr(jc.calibrate(f)(PARAMS, x)["kernel"]) == "<Stats 1 to 1>"
    assert jc.cost(f)(PARAMS, x)._repr_html_().count("<tr>") == 3
    covered = jc.activations.coverage(f, {})(PARAMS, x)
    assert repr(covered) == str(covered)
    assert '<td style="text-align:left">kernel</td>' in covered._repr_html_()


def test_what_serves_says_what_it_is():
    leaf = applied(jc.quantize(jc.Int(4), per=jc.core.Groups(32)))
    assert repr(jc.pack(leaf).codes) == "<Packed, 4 bits, 64x16>"
    served = jc.prepare({"kernel": jc.pack(leaf)}, lambda p, x: x @ p["kernel"], jnp.ones((1, 64)))["kernel"]
    assert repr(served).startswith("<Prepared int4, 64x16, groups of 32, 0.625 B/weight"), repr(served)
    cache = jax.eval_shape(lambda: jc.kernels.kv_cache((2, 16, 4, 64)))
    assert repr(cache.keys).startswith("<CodedRows int8, 2x4x16x64, ")
