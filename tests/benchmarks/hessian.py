"""A product with the Hessian over a gradient, in time and in XLA's count of operations.

Command: ``python -m tests.benchmarks hessian``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp.core.paths import matrices
from jaxcomp.search.prepared import prepared
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18, ViT

WANTED = "<= 2.5"
PROBES = 2
GRADIENT, TRACES, ONE = "gradient", f"a product of traces, {PROBES} at once", "a product of eigenvalues"


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
    active = np.ones(len(units), bool)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        GRADIENT: (jax.grad(loss), (params, images, labels)),
        TRACES: (ready.samples(PROBES), (arrays, jax.random.key(1), active, np.int32(0), batches)),
        ONE: (ready.block_product(units), (arrays, vectors, np.int64(1), vectors, (np.float64(1), batches))),
    }
    compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, args) in calls.items()}
    timings = measure({name: partial(compiled[name], *args) for name, (_, args) in calls.items()}, rounds=rounds)
    flops = {name: float((c.cost_analysis() or {})["flops"]) for name, c in compiled.items()}
    rows = []
    for name, factor in ((TRACES, 1 / PROBES), (ONE, 1.0)):
        ratio = factor * flops[name] / flops[GRADIENT]
        rows.append(timings.row(name, GRADIENT, factor=factor, target=WANTED))
        rows.append(Row(f"  operations, {name}", ratio, ratio, ratio, f"{flops[name]:.3g}", WANTED))
    return Report(title, f"a gradient ({timings.median(GRADIENT) * 1e3:.0f} ms)", rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    yield compare("Hessian products, ResNet-18 width 16, 32x32x3, batch 32", ResNet18(width=16), batch=32, rounds=8)
    vit = ViT(patch=4, dim=128, depth=4, heads=4, mlp_dim=512)
    yield compare("Hessian products, transformer of 4 layers, d=128, 64 tokens, batch 16", vit, batch=16, rounds=8)
