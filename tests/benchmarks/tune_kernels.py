"""Blocks of the Pallas kernels, measured on the device that is there: rows for ``jaxcomp/kernels/blocks.py``.

Every candidate runs the product of some rows by a weight of 4 bits in groups of 128 and by one of 8 bits; what counts
is the sum of both times. Candidates take turns, so that all see the same machine; what does not compile is left out.
The table printed has the best few of each class of shape, beside the plain form and the dense product in bfloat16.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxcomp.kernels.blocks import Blocks, shape_class
from jaxcomp.kernels.products import device_kind, run_of
from tests.kernels.weights import square

SIDE = 8192
ROUNDS, INNER = 7, 10
SHOWN = 5
KERNEL = {"gpu": "triton", "cuda": "triton", "tpu": "mosaic"}


class Tuned:
    """The candidates of one class of shape, the fastest first."""

    def __init__(self, title: str, seconds: dict[str, float]) -> None:
        self.title, self.seconds = title, dict(sorted(seconds.items(), key=lambda item: item[1]))

    def table(self) -> Table:
        """The best, and the others that they are beside."""
        table = Table("what", "us", title=self.title)
        kernels = [name for name in self.seconds if name.startswith("Blocks")][:SHOWN]
        for name, seconds in self.seconds.items():
            if name in kernels or not name.startswith("Blocks"):
                table.add_row(name, f"{seconds * 1e6:.1f}")
        return table

    def json(self) -> dict[str, object]:
        """All candidates."""
        return {"title": self.title, "seconds": self.seconds}


def candidates(kernel: str, rows: int) -> Iterator[Blocks]:
    """What is tried."""
    few = 16 if rows <= 16 else 64
    if kernel == "mosaic":
        yield from (Blocks(few, n, length=k) for n, k in itertools.product((128, 256, 512), (512, 1024, 2048, 4096)))
        return
    for n, splits, warps, stages in itertools.product((16, 32, 64, 128), (1, 2, 4, 8), (2, 4, 8), (2, 3, 4)):
        yield Blocks(few, n, splits=splits, warps=warps, stages=stages)


def measured(cases: dict[str, list[Callable[[], jax.Array]]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each case, the median of rounds in which all take turns; those that fail are left out."""
    times: dict[str, list[float]] = {}
    for name, calls in cases.items():
        try:
            jax.block_until_ready([call() for call in calls])
            times[name] = []
        except Exception as e:  # a kernel that does not fit the device
            print(f"left out: {name}: {type(e).__name__} {str(e)[:100]}")
    for _, (name, seconds) in itertools.product(range(rounds), times.items()):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(INNER) for call in cases[name]])
        seconds.append((time.perf_counter() - start) / INNER)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def run(side: int = SIDE) -> Iterator[Tuned]:
    """The report of each class of shape; nothing where no kernel is for the device."""
    backend = jax.default_backend()
    kernel = KERNEL.get(backend)
    if kernel is None:
        print(f"tune_kernels: no kernel is for {backend}; run it where a GPU or a TPU is.")
        return
    backend = "cuda" if kernel == "triton" else backend
    weights = [square(bits, side) for bits in (4, 8)]
    dense = jnp.full((side, side), 1e-3, jnp.bfloat16)
    for rows in (1, 16, 64):
        x = jax.random.normal(jax.random.key(rows), (rows, side), jnp.bfloat16)
        forms = {"plain sums" if rows == 1 else "plain whole": run_of("sums" if rows == 1 else "whole", backend)}
        forms |= {str(blocks): run_of(kernel, backend, blocks) for blocks in candidates(kernel, rows)}
        cases = {name: [_call(form, x, w) for w in weights] for name, form in forms.items()}
        cases["dense bfloat16, twice"] = [_call(lambda x, w: x @ w.T, x, dense)] * 2
        yield Tuned(f"{kernel}, {device_kind(backend)}, {shape_class(rows)}: {rows} rows by {side}^2", measured(cases))


def _call(form: Callable[..., jax.Array], x: jax.Array, w: object) -> Callable[[], jax.Array]:
    jitted = jax.jit(form)
    return lambda: jitted(x, w)
