"""One step of attention over a long cache of keys and values on a GPU, in codes and in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

import jaxcomp as jc
from jaxcomp.quantization import E4M3
from tests.benchmarks.gpu_cases import BASE, CONTROL, Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report

QUERY_HEADS = 4
"""Query heads that share a head of the cache."""


def cache(setting: Setting) -> Iterator[Report]:
    """A query for each row of a batch, over all cached tokens; and one token more appended."""
    batch, tokens, heads, width = setting.pick((8, 8192, 8, 128), (2, 64, 2, 16))
    k, v = (jax.random.normal(jax.random.key(i), (batch, tokens, heads, width), jnp.bfloat16) for i in (0, 1))
    q = jax.random.normal(jax.random.key(2), (batch, 1, heads * QUERY_HEADS, width), jnp.bfloat16)

    def attending(grid: jc.quantization.Grid) -> Call:
        from jaxcomp.kernels import kv_cache

        full = kv_cache(k.shape, keys=grid, dtype=jnp.bfloat16).append(k, v, 0)
        return Compiled(lambda c, q: c.attend(q, tokens - 1), full, q)

    def appending(grid: jc.quantization.Grid) -> Call:
        from jaxcomp.kernels import kv_cache

        kept = [kv_cache(k.shape, keys=grid, dtype=jnp.bfloat16).append(k, v, 0)]
        step = jax.jit(lambda c, k, v: c.append(k, v, tokens - 1), donate_argnums=0)

        def call() -> jax.Array:
            kept[0] = step(kept[0], k[:, :1], v[:, :1])
            return jax.tree.leaves(kept[0])[0]

        return call

    makers: dict[str, Callable[[], Call]] = {
        name: partial(Compiled, jax.nn.dot_product_attention, q, k, v) for name in (BASE, CONTROL)
    }
    grids = {"int8": jc.Int(8), "int4": jc.Int(4), "float8": E4M3}
    makers |= {f"{name}, attend": partial(attending, grid) for name, grid in grids.items()}
    makers |= {f"{name}, append": partial(appending, grid) for name, grid in grids.items()}
    ran = run_cases(makers, setting, inner=10)
    rate = lambda s: f"{s * 1e6:.0f} us, as bf16 {(k.nbytes + v.nbytes) / s / 1e9:.0f} GB/s"  # noqa: E731
    rows = [ran.speed(n, detail=rate, compared=n.endswith("attend")) for n in makers if n != BASE]
    title = f"attention of one token to {tokens}, batch {batch}, {heads} heads of {width}"
    yield ran.report(title, rows)
