"""A cache of codes: what it holds, that nothing of it is rewritten, and that attention equals that of numpy."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.kernels import KVCache, kv_cache
from jaxcomp.quantization import E4M3, E5M2, NF4, Blocked, Int, Log
from tests.kernels.attention import Seen, oracle
from tests.marks import quick

BATCH, TOKENS, HEADS, WIDTH = 2, 23, 2, 6
SHAPE = (BATCH, TOKENS, HEADS, WIDTH)
GRIDS = {
    "int8": Int(8),
    "int4": Int(4),
    "int4, asymmetric": Int(4, symmetric=False),
    "int8, asymmetric": Int(8, symmetric=False),
    "int3": Int(3),
    "e4m3": E4M3,
    "e5m2": E5M2,
    "nf4": NF4(),
}


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


APPEND = jax.jit(KVCache.append)
ATTEND = jax.jit(KVCache.attend, static_argnames=("causal", "window", "scale", "block"))


def filled(count: int = TOKENS, **options: Any) -> tuple[KVCache, jax.Array, jax.Array]:
    k, v = normal(BATCH, count, HEADS, WIDTH, seed=1), 3 * normal(BATCH, count, HEADS, WIDTH, seed=2) + 1
    return APPEND(kv_cache(SHAPE, **options), k, v, 0), k, v


# What it holds


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_codes_are_the_nearest_with_a_scale_a_head_and_token(bits, top):
    cache, k, _ = filled(keys=Int(bits))
    x = np.asarray(jnp.swapaxes(k, 1, 2), np.longdouble)
    scale = np.abs(x).max(-1, keepdims=True) / (top + 0.5)
    np.testing.assert_allclose(cache.keys.scale, scale, rtol=1e-6)
    codes = np.asarray(cache.keys.codes)
    if bits == 4:  # the first half of a vector in the low nibbles, from -8 on
        codes = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - 8
    assert np.abs(codes - x / scale).max() <= 0.5 + 1e-5
    assert np.abs(codes).max() == top
    np.testing.assert_allclose(cache.keys.materialize(), codes * np.asarray(cache.keys.scale), rtol=1e-6)


def test_float8_codes_are_the_bits_of_the_type():
    for grid, dtype, mantissa in ((E4M3, ml_dtypes.float8_e4m3fn, 3), (E5M2, ml_dtypes.float8_e5m2, 2)):
        cache, k, _ = filled(keys=grid)
        numbers = np.asarray(cache.keys.codes).view(dtype).astype(np.float64)
        x = np.asarray(jnp.swapaxes(k, 1, 2), np.float64) / np.asarray(cache.keys.scale, np.float64)
        assert (np.abs(numbers - x) <= np.abs(x) * 2.0 ** -(mantissa + 1) + 1e-6).all()


def test_an_asymmetric_grid_has_a_zero_point_of_a_byte():
    cache, _, v = filled(values=Int(4, symmetric=False))
    low = np.minimum(np.swapaxes(v, 1, 2).min(-1, keepdims=True), 0)
    high = np.maximum(np.swapaxes(v, 1, 2).max(-1, keepdims=True), 0)
    assert cache.values.zero.dtype == jnp.uint8
    np.testing.assert_allclose(cache.values.scale, (high - low) / 15, rtol=1e-5)
    error = np.abs(np.asarray(cache.values.materialize()) - np.swapaxes(v, 1, 2))
    assert (error <= np.asarray(cache.values.scale)).all()  # half a step of its own, half of the zero point


def test_bytes_are_counted():
    sizes = {name: jc.nbytes(kv_cache((1, 100, 2, 64), keys=grid)) for name, grid in GRIDS.items()}
    row = {"int8": 64 + 4, "int4": 32 + 4, "int4, asymmetric": 32 + 5, "int3": 24 + 4, "e4m3": 64 + 4}
    assert {name: sizes[name] for name in row} == {name: 2 * 100 * 2 * n for name, n in row.items()}


# Appending


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("start", [7, [7, 3]], ids=["one start", "a start a row"])
@pytest.mark.parametrize("grid", quick(["int8", "int4, asymmetric"], "int4, asymmetric"))
def test_append_changes_the_new_tokens_only(grid, start, layers):
    layer = None if layers is None else jnp.int32(1)
    cache = kv_cache(SHAPE, keys=GRIDS[grid], layers=layers)
    k, v = normal(BATCH, 9, HEADS, WIDTH, seed=1), normal(BATCH, 9, HEADS, WIDTH, seed=2)
    before = APPEND(cache, k, v, 0, layer=layer)
    after = APPEND(before, k[:, :2], v[:, :2], jnp.asarray(start), layer=layer)
    alone = APPEND(kv_cache(SHAPE, keys=GRIDS[grid]), k[:, :2], v[:, :2], 0)
    for old, new, fresh in zip(*map(jax.tree.leaves, (before, after, alone)), strict=True):
        wanted, fresh = np.array(old), np.asarray(fresh)
        rows = wanted if layers is None else wanted[1]
        for b, at in enumerate(np.broadcast_to(start, (BATCH,))):
            rows[b, :, at : at + 2] = fresh[b, :, :2]
        np.testing.assert_array_equal(new, wanted)


def test_tokens_beyond_the_capacity_are_dropped_and_seen_as_nan():
    cache, k, v = filled(TOKENS - 1)
    for start in (jnp.int32(TOKENS - 1), jnp.full(BATCH, TOKENS - 1), jnp.int32(TOKENS + 5), jnp.full(BATCH, -4)):
        after = APPEND(cache, k[:, :3], v[:, :3], start)
        first = int(np.ravel(start)[0])
        fits = [t for t in range(first, first + 3) if 0 <= t < TOKENS]
        for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
            others = [t for t in range(TOKENS) if t not in fits]
            np.testing.assert_array_equal(np.asarray(old)[:, :, others], np.asarray(new)[:, :, others])
        out = np.asarray(ATTEND(after, k[:, :3], start))
        assert [bool(np.isnan(out[:, i]).all()) for i in range(3)] == [first + i not in fits for i in range(3)]
        assert np.isfinite(out[:, [i for i in range(3) if first + i in fits]]).all()


def test_step_by_step_the_codes_are_those_of_one_pass():
    k, v = normal(BATCH, 9, HEADS, WIDTH, seed=1), normal(BATCH, 9, HEADS, WIDTH, seed=2)
    q = normal(BATCH, 9, 2 * HEADS, WIDTH, seed=3)
    one = APPEND(kv_cache(SHAPE, keys=Int(8), values=Int(4)), k, v, 0)
    cache, outs = kv_cache(SHAPE, keys=Int(8), values=Int(4)), []
    for t in range(9):
        at = slice(t, t + 1)
        cache = APPEND(cache, k[:, at], v[:, at], jnp.int32(t))
        outs.append(ATTEND(cache, q[:, at], jnp.int32(t)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), ATTEND(one, q, 0), atol=1e-5)


# Attention

MASK = np.random.default_rng(5).random((BATCH, 1, TOKENS)) < 0.6
CASES = {
    "start": (Seen(4), {}),
    "starts": (Seen(np.array([4, 17])), {}),
    "window": (Seen(np.array([4, 17]), window=3), {"block": 4}),
    "mask": (Seen(9, mask=MASK), {"block": 5}),
    "another sequence": (Seen(11, causal=False), {"block": 8}),
    "one block": (Seen(4), {"block": TOKENS}),
    "blocks of one": (Seen(2), {"block": 1}),
}


@pytest.mark.parametrize("case", quick(CASES, "starts", "window", "mask", "another sequence"))
def test_attention_is_that_of_the_dense_cache(case):
    seen, options = CASES[case]
    cache, _, _ = filled(keys=Int(8), values=Int(4, symmetric=False))
    q = normal(BATCH, 3, 2 * HEADS, WIDTH, seed=3)
    mask = None if seen.mask is None else jnp.asarray(seen.mask)
    given = {"causal": seen.causal, "window": seen.window, "mask": mask, **options}
    out = ATTEND(cache, q, jnp.asarray(seen.start), **given)
    np.testing.assert_allclose(out, oracle(cache, q, seen).astype(float), atol=3e-6)


@pytest.mark.parametrize("grid", quick(GRIDS, "int4", "e4m3"))
def test_attention_reads_every_grid(grid):
    cache, _, _ = filled(keys=GRIDS[grid])
    q = normal(BATCH, 2, 3 * HEADS, WIDTH, seed=3)
    np.testing.assert_allclose(ATTEND(cache, q, 19, block=7), oracle(cache, q, Seen(19)).astype(float), atol=3e-6)


def test_types_widths_and_scales():
    cache = kv_cache(SHAPE, value_width=10, dtype=jnp.bfloat16)
    k, v = normal(*SHAPE, dtype=jnp.bfloat16), normal(BATCH, TOKENS, HEADS, 10, dtype=jnp.bfloat16)
    cache = APPEND(cache, k, v, 0)
    assert cache.keys.materialize().dtype == jnp.bfloat16
    exact = oracle(cache, k[:, -1:], Seen(TOKENS - 1)).astype(float)
    for dtype, tolerance in ((jnp.bfloat16, 3e-2), (jnp.float16, 5e-3), (jnp.float32, 5e-3)):
        out = ATTEND(cache, k[:, -1:].astype(dtype), TOKENS - 1)
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out, float), exact, atol=tolerance)
    twice = ATTEND(cache, 2 * k[:, -1:].astype(jnp.float32), 3, scale=0.5 * WIDTH**-0.5)
    np.testing.assert_allclose(twice, ATTEND(cache, k[:, -1:].astype(jnp.float32), 3), atol=1e-6)


@pytest.mark.parametrize("grid", ["int8", "int8, asymmetric", "e4m3", "e5m2"])
def test_what_is_multiplied_is_exact_in_bfloat16(grid):
    numbers = filled(keys=GRIDS[grid])[0].keys.numbers()
    np.testing.assert_array_equal(numbers.astype(jnp.bfloat16).astype(jnp.float32), numbers.astype(jnp.float32))


def test_nan_is_seen_where_it_is_and_nowhere_else():
    cache, k, v = filled()
    for bad in (jnp.nan, jnp.inf):
        lost = APPEND(cache, k[:, :1].at[0, 0, 0, 2].set(bad), v[:, :1].at[0, 0, 0, 2].set(bad), 20)
        assert np.isnan(ATTEND(lost, k[:, :1], 21)[0, 0, 0]).all()
        assert np.isfinite(ATTEND(lost, k[:, :1], 21)[1]).all()
        assert np.isfinite(ATTEND(lost, k[:, :1], 19)).all()
        hidden = ATTEND(lost, k[:, :1], 21, mask=jnp.arange(TOKENS)[None, None] != 20)
        assert np.isfinite(hidden).all()


def test_a_query_that_sees_nothing_gives_zero():
    cache, k, _ = filled()
    assert not np.asarray(ATTEND(cache, k[:, :2], 0, causal=False)).any()
    assert not np.asarray(ATTEND(cache, k[:, :2], 5, mask=jnp.zeros((1, 1, TOKENS), bool))).any()


def test_layers_are_stepped_over_or_carried():
    k, q = normal(3, BATCH, 1, HEADS, WIDTH, seed=1), normal(BATCH, 1, HEADS, WIDTH, seed=2)
    stacked = kv_cache(SHAPE, keys=Int(4), layers=3)

    def one(cache, q, k):
        cache = APPEND(cache, k, k, 0)
        return cache, ATTEND(cache, q, 0)

    def over(q, given):
        cache, out = one(given[0], q, given[1])
        return out, cache

    def carrying(carry, given):
        cache, q = carry
        cache = APPEND(cache, given[1], given[1], 0, layer=given[0])
        return (cache, ATTEND(cache, q, 0, layer=given[0])), None

    out, after = jax.jit(lambda c: jax.lax.scan(over, q, (c, k)))(stacked)
    (carried, same), _ = jax.jit(lambda c: jax.lax.scan(carrying, (c, q), (jnp.arange(3), k)))(stacked)
    plain, looped = [kv_cache(SHAPE, keys=Int(4)) for _ in range(3)], q
    for i in range(3):
        plain[i], looped = one(plain[i], looped, k[i])
    expected = jax.tree.map(lambda *x: np.stack(x), *plain)
    for a, b, c in zip(*map(jax.tree.leaves, (expected, after, carried)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    np.testing.assert_allclose(out, looped, atol=1e-6)
    np.testing.assert_allclose(same, looped, atol=1e-6)


# What is compiled


@pytest.mark.parametrize("grid", quick(["int8", "int4", "e4m3"], "int4"))
@pytest.mark.parametrize("ragged", [False, True], ids=["one start", "a start a row"])
def test_a_step_is_in_place_and_writes_no_dense_cache(grid, ragged):
    shape = (2, 4096, 4, 64)
    cache = kv_cache(shape, keys=GRIDS[grid])
    k, q = jnp.ones((2, 1, 4, 64)), jnp.ones((2, 1, 8, 64))

    def step(cache, k, q, start):
        cache = cache.append(k, k, start)
        return cache, cache.attend(q, start)

    start = jnp.zeros((2,) if ragged else (), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, k, q, start).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == jc.nbytes(cache)
    assert memory.temp_size_in_bytes <= 3 * 2**19  # two blocks; the dense cache is 17 MB
    assert not re.search(r"(f32|f16|bf16)\[2,4,4096,64\]", compiled.as_text())


def test_one_program_serves_all_positions():
    cache, k, v = filled()

    traced = []

    @jax.jit
    def step(cache, start):
        traced.append(start)
        cache = cache.append(k[:, :1], v[:, :1], start)
        return cache, cache.attend(k[:, :1], start)

    for start in range(3):
        cache, _ = step(cache, jnp.int32(start))
    assert len(traced) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_for_accelerators(platform):
    shapes = jax.eval_shape(lambda: (kv_cache(SHAPE, keys=Int(4), values=E4M3), normal(*SHAPE)[:, :1]))

    def step(cache, k, start):
        cache = cache.append(k, k, start)
        return jax.tree.leaves(cache), cache.attend(k, start, window=5)

    start = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    exported = jax.export.export(jax.jit(step), platforms=[platform])(*shapes, start)
    assert "custom_call" not in exported.mlir_module()


# Saving, gradients, wrong input


@pytest.mark.parametrize("grid", quick(GRIDS, "int4, asymmetric"))
def test_a_cache_is_saved_and_loaded(grid, tmp_path):
    cache, k, v = filled(11, keys=GRIDS[grid])
    jc.save(tmp_path / "cache.safetensors", {"layer": cache})
    like = {"layer": kv_cache(SHAPE, keys=GRIDS[grid])}
    loaded = jc.load(tmp_path / "cache.safetensors", like=like)["layer"]
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded.append(k, v, 11)


def test_a_gradient_is_refused_and_not_zero():
    cache, k, _ = filled()

    def through(x, of):
        cache_now = cache.append(x if of == "k" else k[:, :1], k[:, :1], 3)
        return jnp.sum(cache_now.attend(x if of == "q" else k[:, :1], 3))

    for of, owner in (("k", "append"), ("q", "attend")):
        with pytest.raises(TypeError, match=f"{owner}: a cache of codes has no gradient, and one was asked for"):
            jax.jit(jax.grad(lambda x, of=of: through(x, of)))(k[:, :1])
    still = jax.grad(lambda x: jnp.sum(x) + through(jax.lax.stop_gradient(x), "k"))(k[:, :1])
    np.testing.assert_array_equal(still, jnp.ones_like(still))


def wrong(call: str, cache: KVCache, k: jax.Array) -> object:
    q, layered = k[:, :1], kv_cache(SHAPE, layers=2)
    return {
        "heads": lambda: cache.append(k[:, :, :1], k[:, :, :1], 0),
        "count": lambda: cache.append(k[:, :2], k[:, :3], 0),
        "many": lambda: cache.append(jnp.concatenate([k, k], 1), jnp.concatenate([k, k], 1), 0),
        "beyond": lambda: cache.append(q, q, TOKENS),
        "beyond, a row": lambda: cache.append(q, q, jnp.array([0, TOKENS])),
        "starts": lambda: cache.append(q, q, jnp.zeros(3, jnp.int32)),
        "float": lambda: cache.append(q, q, 1.0),
        "queries": lambda: cache.attend(normal(BATCH, 1, 3, WIDTH), 0),
        "mask": lambda: cache.attend(q, 0, mask=jnp.ones((1, 1, 5), bool)),
        "mask's type": lambda: cache.attend(q, 0, mask=jnp.ones((1, 1, TOKENS))),
        "window": lambda: cache.attend(q, 0, window=0),
        "no layer": lambda: layered.append(q, q, 0),
        "layer": lambda: layered.append(q, q, 0, layer=2),
        "layer of none": lambda: cache.attend(q, 0, layer=0),
        "shape": lambda: kv_cache((2, 0, 2, 6)),
        "layers": lambda: kv_cache(SHAPE, layers=0),
        "grid": lambda: kv_cache(SHAPE, values=Log(4)),
        "no zero": lambda: kv_cache(SHAPE, keys=Int(1)),
        "scales": lambda: kv_cache(SHAPE, keys=Blocked(Int(8), E4M3)),
    }[call]()


ERRORS = {
    "heads": "append: keys of shape (2, 23, 1, 6) do not fit a cache of batch 2, 2 heads and width 6; pass (2, new",
    "count": "append: 2 keys come with 3 values; pass as many of both.",
    "many": "append: 46 tokens are more than the cache's capacity of 23; make it larger.",
    "beyond": "append: 1 tokens from position 23 on do not fit a cache of 23 tokens; make it larger, or begin a",
    "beyond, a row": "append: 1 tokens from position Array([ 0, 23], dtype=int32) on do not fit a cache of 23 tokens",
    "starts": "append: start must be one integer or one for each of 2 rows, got (3,).",
    "float": "append: start must be integers, got 1.0.",
    "queries": "attend: queries of shape (2, 1, 3, 6) do not fit a cache of batch 2, 2 heads and width 6; pass (2, que",
    "mask": "attend: the mask is of bool and shape (1, 1, 5); pass booleans that broadcast to (batch, queries, capac",
    "mask's type": "attend: the mask is of float32 and shape (1, 1, 23); pass booleans",
    "window": "attend: window must be a positive integer or None, got 0.",
    "no layer": "append: the cache has the axes (2, 2, 2, 23, 6), and layer is None; pass layer= of its 2 layers.",
    "layer": "append: layer must be one of 0..1, got 2.",
    "layer of none": "attend: the cache has the axes (2, 2, 23, 6), and layer is 0; leave layer= out.",
    "shape": "kv_cache: shape must be four positive integers (batch, capacity, heads, width), got (2, 0, 2, 6).",
    "layers": "kv_cache: layers must be a positive integer or None, got 0.",
    "grid": "kv_cache: values must be a grid that has a zero and one scale outside its codes, such as Int(8), Int(4),",
    "no zero": "kv_cache: keys must be a grid that has a zero",
    "scales": "kv_cache: keys must be a grid that has a zero",
}


@pytest.mark.parametrize("call", ERRORS)
def test_wrong_input_is_one_clear_error(call):
    cache, k, _ = filled()
    with pytest.raises((TypeError, ValueError), match=re.escape(ERRORS[call])):
        wrong(call, cache, k)
