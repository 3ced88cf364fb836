"""Decoding with a small language model: tokens a second and bytes, weights in 4 bits and caches of codes over float32.

Command: ``python -m tests.benchmarks decode_lm``; timed on the threads that the process has, so ``taskset -c 0`` gives
one core. The float32 cache beside is one of arrays, read whole by ``jax.nn.dot_product_attention``, as Flax's is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

import jaxcomp as jc
from jaxcomp.activations import Dynamic, quantize_function
from jaxcomp.core.layouts import Tokens
from jaxcomp.kernels import KVCache, prepare
from tests.benchmarks.timing import Report, Row, measure
from tests.kernels.language_model import LanguageModel, four_bits

FLOAT, CONTROL = "float32 weights and cache", "float32 again (control)"
INTEGERS = "4-bit weights, dynamic int8 activations, int8 cache"
RULES = {".*/kernel": jc.Act(8, symmetric=True, range=Dynamic(), per=Tokens())}
MODEL = LanguageModel(vocabulary=8192, dim=768, layers=4, heads=12, shared=4)
GROUP = 64


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class FloatCache:
    """What a cache of float32 is: ``(batch, capacity, heads, width)``, appended in place and masked."""

    keys: jax.Array
    values: jax.Array

    def append(self, k: jax.Array, v: jax.Array, start: jax.Array) -> FloatCache:
        """With the new tokens at ``start``."""
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return FloatCache(put(self.keys, k), put(self.values, v))

    def attend(self, q: jax.Array, start: jax.Array) -> jax.Array:
        """Attention to the tokens up to the queries' own."""
        last = start + jnp.arange(q.shape[1])[:, None]
        mask = jnp.arange(self.keys.shape[1])[None] <= last
        return jax.nn.dot_product_attention(q, self.keys, self.values, mask=mask[None, None])


class Decoder:
    """A compiled step of one token at a fixed position; its donated caches go in and out."""

    def __init__(self, tree: Any, caches: Any, at: int, rules: Any) -> None:
        run = quantize_function(MODEL.apply, rules, integer=True)
        batch = jax.tree.leaves(caches)[0].shape[0]
        token, start = jnp.zeros((batch, 1), jnp.int32), jnp.int32(at)

        def step(tree: Any, caches: Any) -> tuple[jax.Array, Any]:
            logits, after = run(tree, None, token, caches, start)
            return jnp.argmax(logits[:, -1], -1), after

        self.step = jax.jit(step, donate_argnums=1).lower(tree, caches).compile()
        self.tree, self.caches, self.batch = tree, caches, batch

    def __call__(self) -> jax.Array:
        token, self.caches = self.step(self.tree, self.caches)
        return token

    def words(self, seconds: float) -> str:
        """Tokens a second, and the bytes that are read and held beside."""
        temporaries = self.step.memory_analysis().temp_size_in_bytes
        sizes = (jc.nbytes(self.tree), jc.nbytes(self.caches), temporaries)
        weights, cache, beside = (f"{n / 1e6:.1f} MB" for n in sizes)
        return f"{self.batch / seconds:.0f} tokens/s; weights {weights}, cache {cache}, temporaries {beside}"


def filled(empty: Any, tokens: int) -> Any:
    """Caches with random keys and values."""
    shape = (jax.tree.leaves(empty)[0].shape[0], tokens, MODEL.shared, MODEL.width)
    k, v = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    append = jax.jit(lambda caches, k, v: tuple(cache.append(k, v, jnp.int32(0)) for cache in caches))
    return append(empty, k, v)


def decoding(*, batch: int, tokens: int, capacity: int, rounds: int) -> Report:
    """One token after ``tokens`` others."""
    shape = (batch, capacity, MODEL.shared, MODEL.width)
    floats = tuple(FloatCache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(MODEL.layers))
    example = (jnp.zeros((batch, 1), jnp.int32), MODEL.caches(batch, 8), jnp.int32(0))
    params = jax.jit(MODEL.init)(jax.random.key(0), *example)
    small = prepare(four_bits(params, GROUP), MODEL.apply, *example)
    codes: Callable[..., Any] = partial(MODEL.caches, batch, capacity)
    kinds = {
        FLOAT: (params, floats),
        CONTROL: (params, jax.tree.map(jnp.copy, floats)),
        "float32 weights, int8 cache": (params, codes(keys=jc.Int(8))),
        "4-bit weights, float32 cache": (small, jax.tree.map(jnp.copy, floats)),
        "4-bit weights, int8 cache": (small, codes(keys=jc.Int(8))),
        INTEGERS: (small, codes(keys=jc.Int(8))),
        "4-bit weights, int4 cache": (small, codes(keys=jc.Int(4), values=jc.Int(4, symmetric=False))),
        "4-bit weights, float8 cache": (small, codes(keys=jc.quantization.E4M3)),
    }
    rules = {INTEGERS: RULES}
    cases = {
        name: Decoder(tree, filled(empty, tokens), tokens, rules.get(name, {})) for name, (tree, empty) in kinds.items()
    }
    timings = measure({**cases}, rounds=rounds, warm=True)
    base = cases[FLOAT]
    rows: list[Row] = []
    for name, case in cases.items():
        if name != FLOAT:
            rows.append(timings.speed_row(name, FLOAT, factor=1.0, detail=case.words(timings.median(name))))
            size = (jc.nbytes(case.tree) + jc.nbytes(case.caches)) / (jc.nbytes(base.tree) + jc.nbytes(base.caches))
            rows += [] if name == CONTROL else [Row("  bytes of weights and cache", size, size, size)]
    title = (
        f"one token after {tokens} (capacity {capacity}), batch {batch}: speed, {MODEL.layers} layers of {MODEL.dim}"
    )
    return Report(title, f"{FLOAT} ({base.words(timings.median(FLOAT))})", rows, timings.notes())


def attending(cache: KVCache, queries: int, *, start: int, rounds: int) -> Iterator[Row]:
    """Attention alone to a full cache, over the blocks of tokens that a program holds which is kept."""
    batch, heads, _, width = cache.keys.shape
    q = jax.random.normal(jax.random.key(3), (batch, queries, 3 * heads, width))
    run = jax.jit(lambda cache, q: cache.attend(q, start))
    blocks = jax.jit(export.export(run)(cache, q).call)
    cases = {"blocks": lambda: blocks(cache, q), "again": lambda: blocks(cache, q), "one pass": lambda: run(cache, q)}
    timings = measure(cases, rounds=rounds, warm=True, inner=5)
    name = f"{cache.keys.grid.label}, batch {batch}, {start + queries} tokens, {3 * queries} queries a head"
    for case, words in (("again", f"{name}: control"), ("one pass", name)):
        row = timings.speed_row(case, "blocks", factor=1.0, detail=f"{timings.median(case) * 1e3:.2f} ms")
        yield replace(row, name=words)


def attention() -> Report:
    """In several sizes."""
    rows: list[Row] = []
    for grid in (jc.Int(8), jc.Int(4), jc.quantization.E4M3):
        for batch, start, capacity, queries in (
            (1, 3000, 4096, 1),
            (8, 1000, 1024, 1),
            (1, 3000, 4096, 2),
            (1, 3000, 4096, 5),
        ):
            empty = jc.kernels.kv_cache((batch, capacity, MODEL.shared, MODEL.width), keys=grid)
            (cache,) = filled((empty,), capacity)
            rows += attending(cache, queries, start=start, rounds=9)
    return Report("attention to a cache of codes: speed", "blocks of tokens", rows, [jax.devices()[0].device_kind])


def run() -> Iterator[Report]:
    """The reports."""
    yield attention()
    yield decoding(batch=1, tokens=3000, capacity=4096, rounds=15)
    yield decoding(batch=8, tokens=1000, capacity=1024, rounds=9)
