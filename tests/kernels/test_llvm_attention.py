"""Attention to codes in code of our own: numpy's over odd shapes, and where it does not run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from jaxcomp.kernels import KVCache, kv_cache, llvm_calls
from jaxcomp.kernels.llvm_attention import MOST, refusal
from jaxcomp.kernels.llvm_heads import BLOCK
from jaxcomp.quantization import E2M1, E2M3, E4M3, E5M2, NF4, Int
from tests.kernels.attention import Seen, oracle
from tests.marks import quick

pytest.importorskip("llvmlite")

CALL = "jaxcomp_attention"


class Case(NamedTuple):
    """Sizes of a cache and of what asks it, and what of it is seen."""

    shape: tuple[int, int, int, int]
    sharing: int = 1
    queries: int = 1
    seen: Seen = Seen(0)
    options: dict[str, Any] | None = None
    width: int | None = None

    def cache(self, seed: int = 0) -> KVCache:
        """Full of numbers."""
        batch, tokens, heads, width = self.shape
        rng = np.random.default_rng(seed)
        draw = lambda n: jnp.asarray(rng.normal(size=(batch, tokens, heads, n)), jnp.float32)  # noqa: E731
        empty = kv_cache(self.shape, value_width=self.width, **(self.options or {}))
        return jax.jit(KVCache.append)(empty, draw(width), 2 * draw(self.width or width) + 1, 0)

    def asks(self, dtype: Any = jnp.float32) -> jax.Array:
        """The queries."""
        batch, _, heads, width = self.shape
        x = np.random.default_rng(9).normal(size=(batch, self.queries, heads * self.sharing, width))
        return jnp.asarray(x, dtype)


def attended(cache: KVCache, q: jax.Array, seen: Seen) -> jax.Array:
    start = jnp.asarray(seen.start)
    mask = None if seen.mask is None else jnp.asarray(seen.mask)
    return cache.attend(q, start, causal=seen.causal, window=seen.window, mask=mask)


def ran(cache: KVCache, q: jax.Array, seen: Seen) -> np.ndarray:
    run = jax.jit(lambda cache, q: attended(cache, q, seen))
    assert CALL in run.lower(cache, q).as_text()
    return np.asarray(run(cache, q), np.float64)


HIDING = np.random.default_rng(3).random((2, 2, 72)) < 0.6
CASES = {
    "one query": Case((1, 128, 2, 64), 3, seen=Seen(100)),
    "the first token": Case((1, 64, 1, 8), seen=Seen(0)),
    "the last place, more than a block": Case((1, BLOCK + 8, 2, 16), 2, seen=Seen(BLOCK + 7)),
    "rows of different lengths": Case((2, 72, 2, 16), 2, 2, Seen(np.array([60, 3]))),
    "a mask": Case((2, 72, 1, 16), 1, 2, Seen(60, mask=HIDING)),
    "a mask that hides all of a row": Case((1, 72, 1, 16), 1, 2, Seen(60, mask=np.array([[[True], [False]]]))),
    "a window": Case((1, 256, 2, 16), 1, 3, Seen(200, window=5)),
    "a window longer than a block": Case((1, 256, 1, 16), 1, 1, Seen(250, window=100)),
    "to another sequence": Case((2, 72, 1, 16), 2, 3, Seen(50, causal=False)),
    "nothing there yet": Case((1, 72, 1, 16), 2, 3, Seen(0, causal=False)),
    "as many queries as there may be": Case((1, 64, 1, 8), 4, MOST // 4, Seen(40)),
    "values of another width": Case((1, 64, 2, 16), 3, 1, Seen(40), width=24),
    "4 bits": Case((1, 136, 2, 32), 3, 1, Seen(100), {"keys": Int(4)}),
    "4 bits, asymmetric values": Case(
        (2, 136, 2, 32), 3, 1, Seen(130), {"keys": Int(4), "values": Int(4, symmetric=False)}
    ),
    "asymmetric bytes": Case((1, 136, 2, 8), 1, 1, Seen(100), {"keys": Int(8, symmetric=False)}),
    "float8": Case((1, 136, 2, 16), 3, 1, Seen(100), {"keys": E4M3, "values": E5M2}),
    "floats of 4 and 6 bits": Case((1, 72, 1, 32), 2, 1, Seen(70), {"keys": E2M1, "values": E2M3}),
    "3 and 6 bits": Case((1, 72, 1, 64), 2, 1, Seen(70), {"keys": Int(3), "values": Int(6)}),
}
NAMES = ("one query", "rows of different lengths", "a mask", "a window", "4 bits, asymmetric values", "float8")


@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_it_is_numpys_attention(name) -> None:
    case = CASES[name]
    cache, q = case.cache(), case.asks()
    got, wanted = ran(cache, q, case.seen), np.asarray(oracle(cache, q, case.seen), np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * max(1.0, np.abs(wanted).max()))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 79), st.floats(0.01, 300), st.integers(0, 5))
def test_scores_of_any_size(start, size, seed) -> None:
    case = Case((1, 80, 1, 8), 2)
    cache, q = case.cache(seed), size * case.asks()
    got, wanted = ran(cache, q, Seen(start)), np.asarray(oracle(cache, q, Seen(start)), np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=(1 + size) * 3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_of_fewer_bits(dtype) -> None:
    case = CASES["one query"]
    cache, q = case.cache(), case.asks(dtype)
    got = jax.jit(lambda cache, q: attended(cache, q, case.seen))(cache, q)
    assert got.dtype == dtype
    wanted = np.asarray(oracle(cache, q, case.seen), np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("grid", [E4M3, E5M2, E2M3, Int(8), Int(8, symmetric=False), Int(4)], ids=lambda g: g.label)
def test_every_code_is_the_number_that_it_stands_for(grid) -> None:
    """Of one token that is seen the value comes back as it is."""
    numbers = (
        np.asarray(grid.levels) if grid.code_range is None else np.arange(grid.code_range[0], grid.code_range[1] + 1)
    )
    x = np.resize(numbers, (-(-len(numbers) // 16) * 16,)).astype(np.float32)
    cache = kv_cache((1, 64, 1, 8), values=grid, value_width=len(x))
    cache = cache.append(jnp.ones((1, 1, 1, 8)), jnp.asarray(x)[None, None, None], 0)
    got = ran(cache, jnp.ones((1, 1, 1, 8)), Seen(0))[0, 0, 0]
    wanted = np.asarray(cache.values.materialize()[0, 0, 0], np.float64)
    assert (np.abs(got - wanted) <= 2.0**-22 * np.abs(wanted).max() * (grid.code_range is not None)).all()
    assert len(set(wanted.tolist())) >= len(numbers) - 1


def test_what_is_not_finite_is_nan_where_it_is_seen_and_nowhere_else() -> None:
    case = Case((1, 72, 2, 16), 2)
    cache = case.cache()
    bad = jnp.full((1, 1, 2, 16), jnp.nan).at[:, :, 1].set(1.0)  # of one head
    cache = cache.append(bad, bad, 50)
    assert np.isfinite(ran(cache, case.asks(), Seen(49))).all()
    after = ran(cache, case.asks(), Seen(60))
    assert np.isnan(after[:, :, :2]).all()
    assert np.isfinite(after[:, :, 2:]).all()
    hidden = Seen(60, mask=(np.arange(72) != 50)[None, None])
    assert np.isfinite(ran(cache, case.asks(), hidden)).all()
    odd = case.asks().at[0, 0, 3].set(jnp.inf)
    assert np.isfinite(ran(cache, odd, Seen(49))[:, :, :3]).all()


def test_layers_of_a_stacked_cache() -> None:
    case = Case((2, 72, 2, 16), 2, options={"layers": 3})
    one, q = Case((2, 72, 2, 16), 2).cache(), case.asks()
    stacked = kv_cache(case.shape, layers=3)
    stacked = jax.tree.map(lambda a, b: a.at[1].set(b), stacked, one)
    run = jax.jit(lambda cache, layer: cache.attend(q, 60, layer=layer))
    assert CALL in run.lower(stacked, jnp.int32(1)).as_text()
    np.testing.assert_allclose(run(stacked, jnp.int32(1)), oracle(one, q, Seen(60)).astype(np.float64), atol=1e-5)
    assert (run(stacked, jnp.int32(2)) == 0).all()
    for beyond, nearest in ((9, 2), (-2, 1), (-9, 0)):
        assert (run(stacked, jnp.int32(beyond)) == run(stacked, jnp.int32(nearest))).all()

    def step(x, cache):
        return x, cache.attend(q, 60)

    _, each = jax.jit(lambda cache: jax.lax.scan(step, 0, cache))(stacked)
    np.testing.assert_array_equal(each[1], run(stacked, jnp.int32(1)))


def test_tokens_are_appended_in_place_before_it() -> None:
    case = Case((1, 4096, 4, 64), 3)
    cache, q = kv_cache(case.shape), case.asks()
    k = jnp.ones((1, 1, 4, 64))

    def step(cache: KVCache, k: jax.Array, q: jax.Array, start: jax.Array) -> tuple[jax.Array, KVCache]:
        cache = cache.append(k, k, start)
        return cache.attend(q, start), cache

    made = jax.jit(step, donate_argnums=0).lower(cache, k, q, jnp.int32(7)).compile()
    assert CALL in made.as_text()
    assert made.memory_analysis().temp_size_in_bytes < cache.keys.codes.nbytes // 4


def test_where_it_does_not_run() -> None:
    case = CASES["one query"]
    cache, q = case.cache(), case.asks()
    run = jax.jit(lambda cache, q: attended(cache, q, case.seen))
    wanted = oracle(cache, q, case.seen).astype(np.float64)
    kept = export.export(run)(cache, q)
    assert CALL not in kept.mlir_module()
    np.testing.assert_allclose(kept.call(cache, q), wanted, atol=1e-5)
    assert CALL not in export.export(run, platforms=["cuda"])(cache, q).mlir_module()
    two = jax.tree.map(lambda v: jnp.stack([v, v]), cache)
    mapped = jax.jit(jax.vmap(run, (0, None)))
    assert CALL not in mapped.lower(two, q).as_text()
    np.testing.assert_allclose(mapped(two, q)[1], wanted, atol=1e-5)


def test_what_it_cannot_run_it_names(monkeypatch) -> None:
    rows = CASES["one query"].cache()
    f32 = jnp.dtype(jnp.float32)

    def why(shape=(1, 64, 1, 16), queries=1, dtype=f32, **options):
        cache = kv_cache(shape, **options)
        return refusal(queries, dtype, cache.keys, cache.values)

    assert why() is None
    assert "it takes 16 queries that share a head, and there are 17" in why(queries=17)
    assert "it takes 8 queries that share a head, and there are 9" in why(queries=9, keys=E4M3)
    assert "8 tokens at a time, and there is room for 63" in why((1, 63, 1, 16))
    assert "the codes of CodedRows int8 of width 12 do not lie in runs of 8" in why((1, 64, 1, 12))
    assert "the codes of CodedRows NF4 are neither integers nor floats, but names of levels" in why(keys=NF4())
    with jax.enable_x64(True):
        assert "sums are in float32" in why(dtype=jnp.dtype("float64"))
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    assert "is not installed" in refusal(1, f32, rows.keys, rows.values)


def test_a_gradient_is_refused_as_before() -> None:
    case = CASES["one query"]
    cache, q = case.cache(), case.asks()
    with pytest.raises(TypeError, match="a cache of codes has no gradient"):
        jax.grad(lambda q: attended(cache, q, case.seen).sum())(q)


def test_what_runs_elsewhere_is_traced_once_and_at_the_precision_that_is_asked_for() -> None:
    case = Case((1, 64, 1, 8))
    cache, q = case.cache(), case.asks()

    def body() -> Any:
        program = jax.make_jaxpr(lambda cache, q: cache.attend(q, 3))(cache, q)
        return next(eqn.params["jaxpr"] for eqn in program.eqns if eqn.primitive.name == "attend_rows")

    assert body() is body()
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(body())
    assert "HIGHEST" not in str(body())
