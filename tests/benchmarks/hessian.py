"""A product with the Hessian over a gradient, in time and in XLA's count of operations.

Command: ``python -m tests.benchmarks hessian``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.core.paths import matrices
from jaxcomp.search.eigenvalues import programs_of
from jaxcomp.search.prepared import prepared
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18, ViT

WANTED = "<= 2.5"
PROBES = 4
AT_ONCE = (1, 4, 8)
GRADIENT, TRACES = "gradient", f"a product of traces, {PROBES} at once"


def compare(title: str, model: nn.Module, *, batch: int, rounds: int) -> Report:
    """The products of one network's classification loss."""
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32), jnp.arange(batch) % 10
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply({**rest, "params": p}, x, train=False)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    ready = prepared("hessian", loss, params, [(images, labels)], where=matrices)
    arrays, batches, units = ready.opened.arrays, ready.batches[0], {path: (path,) for path in ready.slots}
    vectors = {path: jnp.ones(slot.array.shape) for path, slot in ready.slots.items()}
    active, counted = np.ones(len(units), bool), (np.float64(1), batches)
    calls: dict[str, list[tuple[Callable[..., Any], tuple[Any, ...]]]] = {
        GRADIENT: [(jax.grad(loss), (params, images, labels))],
        TRACES: [(ready.samples(PROBES), (arrays, jax.random.key(1), active, np.int32(0), batches))],
    }
    factors = {TRACES: 1 / PROBES}
    for n in AT_ONCE:
        name = f"a product of eigenvalues, {n} at once"
        calls[name], factors[name] = [], 1 / len(units)
        for program in programs_of(ready, units, n):
            own = {p: vectors[p] for p in program.units}
            calls[name].append((ready.block_products(program.units), (arrays, own, own, counted)))
    compiled, seconds = {}, {}
    for name, parts in calls.items():
        start = time.perf_counter()
        compiled[name] = [jax.jit(f).lower(*args).compile() for f, args in parts]
        seconds[name] = time.perf_counter() - start

    def all_of(name: str) -> Any:
        return [f(*args) for f, (_, args) in zip(compiled[name], calls[name], strict=True)]

    timings = measure({name: partial(all_of, name) for name in calls}, rounds=rounds)
    flops = {name: sum(float((c.cost_analysis() or {})["flops"]) for c in found) for name, found in compiled.items()}
    rows = []
    for name, factor in factors.items():
        ratio = factor * flops[name] / flops[GRADIENT]
        detail = f"{timings.median(name) * 1e3:.0f} ms; compiled in {seconds[name]:.1f} s"
        rows.append(timings.row(name, GRADIENT, factor=factor, detail=detail, target=WANTED))
        rows.append(Row(f"  operations, {name}", ratio, ratio, ratio, f"{flops[name]:.3g}", WANTED))
    words = f"a gradient ({timings.median(GRADIENT) * 1e3:.0f} ms; compiled in {seconds[GRADIENT]:.1f} s)"
    return Report(title, words, rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    yield compare("Hessian products, ResNet-18 width 16, 32x32x3, batch 32", ResNet18(width=16), batch=32, rounds=8)
    vit = ViT(patch=4, dim=128, depth=4, heads=4, mlp_dim=512)
    yield compare("Hessian products, transformer of 4 layers, d=128, 64 tokens, batch 16", vit, batch=16, rounds=8)
