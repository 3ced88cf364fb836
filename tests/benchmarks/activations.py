"""Weights and activations on integer grids: the training step over float, and the integer forward over float.

Command: ``python -m tests.benchmarks activations``; the forward is timed on the threads that the process has, so
``taskset -c 0`` gives one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.activations import LSQ, PACT, Act, Dynamic, ranges_of
from jaxcomp.activations import quantize_function as quantize_activations
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.fold import fold_batch_norm
from tests.benchmarks.timing import Report, Row, measure
from train.models import ResNet18, ViT

TIME, BYTES, SPEED = "<= 1.08", "<= 1.15", ">= 2"
FLOAT, CONTROL = "float", "float again (control)"
CASES: dict[str, tuple[Act | None, str]] = {
    "W8A8, static ranges": (Act(8), TIME),
    "W8A8, dynamic ranges": (Act(8, symmetric=True, range=Dynamic()), ""),
    "W4A8, learned ranges (LSQ)": (Act(8, range=LSQ()), ""),
    "W4A8, learned ranges (PACT)": (Act(8, range=PACT()), ""),
}


class State(NamedTuple):
    """All that a step changes; ranges are trained where the rule says so."""

    params: Any
    ranges: Any
    batch_stats: Any
    opt_state: Any


def make_step(apply: Callable[..., Any], transform: jc.Transform, act: Act | None) -> Callable[..., Any]:
    """``step(state, images, labels) -> (state, loss)``, not jitted; ``apply(variables, images)``."""
    optimizer = optax.sgd(1e-3, momentum=0.9)
    run = quantize_activations(apply, {r".*": act})

    def loss_fn(trained: Any, state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        params, ranges = trained
        variables = {"params": transform.apply(transform.init(params), params), "batch_stats": state.batch_stats}
        logits, updated = run(variables, ranges, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        trained = state.params, state.ranges
        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, state, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params, ranges = optax.apply_updates(trained, updates)
        return State(params, ranges, updated.get("batch_stats", {}), opt_state), loss

    return step


class Stepper:
    """One compiled, donated step with a state of its own; each call moves it on."""

    def __init__(self, model: nn.Module, transform: jc.Transform, act: Act | None, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
        self.labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
        variables = jax.jit(model.init)(jax.random.key(0), self.images[:1])
        variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        apply = partial(model.apply, train=True, mutable=["batch_stats"])
        ranges = {}
        if act is not None and act.needs_range:
            ranges = ranges_of(jax.jit(calibrate(apply))(variables, self.images[:8]))
        opt_state = optax.sgd(1e-3, momentum=0.9).init((variables["params"], ranges))
        self.state = jax.tree.map(jnp.copy, State(variables["params"], ranges, variables["batch_stats"], opt_state))
        step = jax.jit(make_step(apply, transform, act), donate_argnums=0)
        self.compiled = step.lower(self.state, self.images, self.labels).compile()

    def __call__(self) -> jax.Array:
        self.state, loss = self.compiled(self.state, self.images, self.labels)
        return loss

    def bytes_accessed(self) -> float:
        """By XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["bytes accessed"])


def training(title: str, model: nn.Module, *, batch: int, rounds: int) -> Report:
    """All cases of one model's training step."""
    steppers: dict[str, Stepper] = {name: Stepper(model, jc.identity(), None, batch) for name in (FLOAT, CONTROL)}
    for name, (act, _) in CASES.items():
        bits = 8 if name.startswith("W8") else 4
        steppers[name] = Stepper(model, jc.quantize(jc.Int(bits)), act, batch)
    timings = measure({**steppers}, rounds=rounds)
    base = steppers[FLOAT].bytes_accessed()
    rows = [timings.row(CONTROL, FLOAT)]
    for name, (_, target) in CASES.items():
        read = steppers[name].bytes_accessed()
        rows.append(timings.row(name, FLOAT, target=target))
        detail = f"{read / 1e6:.1f} MB"
        rows.append(
            Row(f"  bytes accessed, {name}", read / base, read / base, read / base, detail, BYTES if target else "")
        )
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.0f} ms)", rows, timings.notes())


def inference(*, width: int, batch: int, rounds: int) -> Report:
    """ResNet-18 with its batch norms folded, on integers over float."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    model = ResNet18(width=width)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    folded = fold_batch_norm(model.apply)(variables, images)
    fn, params = folded.fn, folded.params
    compress = jc.quantize(jc.Int(8))
    tree = jc.pack(compress.apply(compress.init(params), params))
    ranges = ranges_of(jax.jit(calibrate(fn))(params, images[:8]))

    def compiled(call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        done = jax.jit(call).lower(*args).compile()
        return lambda: done(*args)

    cases = {FLOAT: compiled(fn, params, images), CONTROL: compiled(fn, params, images)}
    kinds = {
        "int8, static symmetric": Act(8, symmetric=True),
        "int8, static asymmetric": Act(8),
        "int8, dynamic symmetric": Act(8, symmetric=True, range=Dynamic()),
    }
    for name, act in kinds.items():
        given = ranges if act.needs_range else None
        cases[name] = compiled(quantize_activations(fn, {r".*": act}, integer=True), tree, given, images)
    timings = measure(cases, rounds=rounds)
    rows = [timings.speed_row(CONTROL, FLOAT, factor=1.0)]
    rows += [timings.speed_row(name, FLOAT, factor=1.0, target=SPEED if "static sym" in name else "") for name in kinds]
    title = f"integer forward, ResNet-18 width {width}, 32x32x3, batch {batch}, batch norms folded: speed"
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.1f} ms)", rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    vit = ViT(patch=4, dim=256, depth=4, heads=4, mlp_dim=1024)
    yield inference(width=64, batch=8, rounds=9)
    yield training("QAT step, ResNet-18 width 16, 32x32x3, batch 64", ResNet18(width=16), batch=64, rounds=9)
    yield training("QAT step, transformer of 4 layers, d=256, 64 tokens, batch 16", vit, batch=16, rounds=9)
