"""Quantize and dequantize 32M (2**25) float32 weights: bytes moved a second over XLA's own read and write.

What counts is what an ideal kernel moves: the weights, the codes as they are stored (int4: two to a byte) and the
scales, each once, though quantizing must read its input twice: for the scale, then for the codes. The yardstick is
``x * 2``, which writes as many bytes as it reads. A fresh page of output costs several times a byte read, so
quantizing, which writes little, may pass 1, and dequantizing, which writes little else, cannot reach it; that is why
each is also set against an XLA kernel of exactly its traffic: a sum that reads and writes as many bytes as quantizing,
each once, and a broadcast that reads and writes as many as dequantizing.

Command: ``python -m tests.benchmarks quantize_bandwidth``
"""

from __future__ import annotations

from collections.abc import Iterator
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


def compare(name: str, grid: jc.Int, weights: jax.Array, rounds: int) -> Report:
    """One grid, both ways."""
    transform = jc.quantize(grid)
    quantize = jax.jit(lambda w: jc.pack(transform.apply((), {"kernel": w})))
    dequantize = jax.jit(jc.materialize)
    packed = quantize(weights)
    wide, narrow = weights.nbytes, jc.nbytes(packed)
    copy = jax.jit(lambda x: x * 2)
    shrink, shrink_of = same_traffic(wide, narrow)
    grow, grow_of = same_traffic(narrow, wide)
    timings = measure(
        {
            COPY: lambda: copy(weights),
            "quantize and pack": lambda: quantize(weights),
            "XLA, quantize's traffic": lambda: shrink(shrink_of),
            "unpack and dequantize": lambda: dequantize(packed),
            "XLA, dequantize's traffic": lambda: grow(grow_of),
            f"{COPY}, again (control)": lambda: copy(weights),
        },
        rounds=rounds,
    )
    moved = wide + narrow

    def speed(case: str, baseline: str, base_bytes: int, target: str = "") -> Row:
        rate = f"{moved / timings.median(case) / 1e9:.2f} GB/s, {timings.median(case) * 1e3:.0f} ms"
        row = timings.speed_row(case, baseline, factor=moved / base_bytes, detail=rate, target=target)
        return Row(f"{case} / {baseline}", row.ratio, row.low, row.high, row.detail, row.target)

    rows = [
        timings.row(f"{COPY}, again (control)", COPY),
        speed("quantize and pack", COPY, 2 * wide, TARGET),
        speed("quantize and pack", "XLA, quantize's traffic", moved),
        speed("unpack and dequantize", COPY, 2 * wide, TARGET),
        speed("unpack and dequantize", "XLA, dequantize's traffic", moved, TARGET),
        *_facts(grid, weights, packed),
    ]
    rate = f"XLA ({COPY}: {2 * wide / timings.median(COPY) / 1e9:.2f} GB/s)"
    return Report(f"{name}, {weights.size / 1e6:.1f}M weights, bytes moved a second", rate, rows, timings.notes())


def _facts(grid: jc.Int, weights: jax.Array, packed: Any) -> list[Row]:
    """Bytes a weight, and the largest error over what the grid allows: half of absmax / (2**(bits-1) - 1/2)."""
    stored = jc.nbytes(packed) / weights.size
    group = grid.group or weights.shape[0]
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
    yield compare("int8, a scale a channel", jc.Int(8), weights, rounds=31)
    yield compare("int4, groups of 128, packed", jc.Int(4, group=128), weights, rounds=31)
