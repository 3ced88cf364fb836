"""Quantize and dequantize 32M (2**25) float32 weights: weights a second over XLA's own read and write.

The yardstick is ``x * 2``, which reads and writes every weight once. Weights are what is counted, not bytes of codes:
plain jitted jax.numpy, int8, is measured beside ours in the same unit, and an int4 that is stored a code to a byte
gains nothing by it.

What a kernel could reach is the second yardstick: an XLA kernel of exactly the bytes that an ideal one moves (the
weights, the codes as they are stored and the scales, each once): a sum for quantizing, which must read its input twice,
for the scale and for the codes, and a broadcast for dequantizing.

A new page of output costs several times a byte read, as the system clears it first. The last row leaves that out:
``x * 2`` and dequantizing into a donated buffer, in bytes moved a second. There a processor reads a line of output
before it writes it, so at equal speed the row is (5/9) / (8/12) = 0.83 for int8 and 0.80 for int4.

Command: ``python -m tests.benchmarks quantize_bandwidth``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import jaxcomp as jc
from tests.benchmarks.timing import Report, Row, measure

ROWS, COLUMNS = 4096, 8192
COPY = "x * 2"
TARGET = ">= 0.9"


def same_traffic(read: int, written: int) -> tuple[Any, jax.Array]:
    """A jitted kernel that reads and writes so many bytes, rounded to whole ratios, and its argument."""
    if read >= written:
        times = round(read / written)
        x = jnp.ones((times, written // 4), jnp.float32)
        return jax.jit(lambda x: sum(x[i] for i in range(times))), x
    times = round(written / read)
    x = jnp.ones((1, written // 4 // times), jnp.float32)
    return jax.jit(lambda x: jnp.broadcast_to(x * 2, (times, x.size))), x


def plain_quantize(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What one would write by hand: int8, a scale a channel."""
    scale = jnp.abs(weights).max(0) / 127
    return jnp.round(weights / scale).astype(jnp.int8), scale


def reusing(f: Callable[..., jax.Array], *args: Any) -> Callable[[], jax.Array]:
    """A call of ``f`` whose result is written where the result before it was."""
    jitted = jax.jit(lambda _, *args: f(*args), donate_argnums=0, keep_unused=True)
    held = [jax.jit(f)(*args)]

    def call() -> jax.Array:
        held[0] = jitted(held[0], *args)
        return held[0]

    return call


def compare(name: str, grid: jc.Int, weights: jax.Array, *, group: int, rounds: int) -> Report:
    """One grid, both ways."""
    transform = jc.quantize(grid, per=jc.Groups(group))
    quantize = jax.jit(lambda w: jc.pack(transform.apply((), {"kernel": w})))
    dequantize = jax.jit(jc.materialize)
    packed = quantize(weights)
    plain, unplain = jax.jit(plain_quantize), jax.jit(jnp.multiply)
    by_hand = plain(weights)
    wide, narrow = weights.nbytes, jc.nbytes(packed)
    copy = jax.jit(lambda x: x * 2)
    shrink, shrink_of = same_traffic(wide, narrow)
    grow, grow_of = same_traffic(narrow, wide)
    timings = measure(
        {
            COPY: lambda: copy(weights),
            "quantize and pack": lambda: quantize(weights),
            "jax.numpy, int8 quantize": lambda: plain(weights),
            "XLA, quantize's traffic": lambda: shrink(shrink_of),
            "unpack and dequantize": lambda: dequantize(packed),
            "jax.numpy, int8 dequantize": lambda: unplain(*by_hand),
            "XLA, dequantize's traffic": lambda: grow(grow_of),
            f"{COPY}, again (control)": lambda: copy(weights),
        },
        rounds=rounds,
    )
    donated = measure(
        {
            COPY: reusing(lambda x: x * 2, weights),
            "unpack and dequantize": reusing(lambda p: jc.materialize(p)["kernel"], packed),
        },
        rounds=rounds,
        inner=3,
    )

    def speed(case: str, baseline: str, target: str = "") -> Row:
        took = timings.median(case)
        rate = (
            f"{weights.size / took / 1e9:.2f} G weights/s, {(wide + narrow) / took / 1e9:.2f} GB/s, {took * 1e3:.0f} ms"
        )
        row = timings.speed_row(case, baseline, factor=1, detail=rate, target=target)
        return replace(row, name=f"{case} / {baseline}")

    in_place = donated.speed_row("unpack and dequantize", COPY, factor=(wide + narrow) / (2 * wide))
    rows = [
        timings.row(f"{COPY}, again (control)", COPY),
        speed("quantize and pack", COPY, TARGET),
        speed("jax.numpy, int8 quantize", COPY),
        speed("quantize and pack", "XLA, quantize's traffic"),
        speed("unpack and dequantize", COPY, TARGET),
        speed("jax.numpy, int8 dequantize", COPY),
        speed("unpack and dequantize", "XLA, dequantize's traffic", TARGET),
        replace(in_place, name=f"into a donated buffer: dequantize / {COPY}, bytes moved a second"),
        *_facts(grid, weights, packed, group),
    ]
    rate = f"XLA ({COPY}: {weights.size / timings.median(COPY) / 1e9:.2f} G weights/s)"
    return Report(f"{name}, {weights.size / 1e6:.1f}M weights, weights a second", rate, rows, timings.notes())


def _facts(grid: jc.Int, weights: jax.Array, packed: Any, group: int) -> list[Row]:
    """Bytes a weight, and the largest error over what the grid allows: half of absmax / (2**(bits-1) - 1/2)."""
    stored = jc.nbytes(packed) / weights.size
    w = weights.reshape(-1, group, weights.shape[1])
    error = jnp.abs(jc.materialize(packed)["kernel"].reshape(w.shape) - w).max(1)
    steps = 2 ** (grid.bits - 1) - 0.5
    worst = float((error / (jnp.abs(w).max(1) / steps)).max())
    return [
        Row("bytes a weight / (bits / 8)", *(stored / (grid.bits / 8),) * 3, f"{stored:.4f} bytes", "<= 1.1"),
        Row(f"largest error / (absmax / {steps})", worst, worst, worst, "1/2 is rounding", "<= 0.501"),
    ]


def run() -> Iterator[Report]:
    """The reports."""
    weights = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    yield compare("int8, a scale a channel", jc.Int(8), weights, group=ROWS, rounds=31)
    yield compare("int4, groups of 128, packed", jc.Int(4), weights, group=128, rounds=31)
