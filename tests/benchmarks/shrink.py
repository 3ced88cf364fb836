"""Half the channels of ResNet-18 removed: multiply-adds, bytes, and the time of the forward and of a training step.

Command: ``python -m tests.benchmarks shrink``. The small network is run in both ways: the full program rewritten over
the smaller arrays, and the same Flax module built at the plan's widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.structure import Plan, channel_groups, plan, shrink
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18

FULL, CONTROL = "full", "full again (control)"
REWRITTEN, REBUILT = "shrink(fn, plan)", "ResNet18(widths=plan.widths)"
MACS, SPEED = "<= 0.27", ">= 2.5"
WIDTH, BATCH = 64, 32


def halved(variables: Any, images: jax.Array) -> Plan:
    """The plan that removes half of every group of channels."""
    return plan(channel_groups(ResNet18(width=WIDTH).apply)(variables, images), variables, sparsity=0.5)


def fixed(name: str, part: float, whole: float, unit: str, target: str = "") -> Row:
    """A ratio that does not vary."""
    return Row(name, part / whole, part / whole, part / whole, f"{part:,.0f} of {whole:,.0f} {unit}", target)


def forward(variables: Any, half: Plan, images: jax.Array, *, rounds: int) -> Report:
    """Inference on one batch."""
    full, small = ResNet18(width=WIDTH).apply, half.take(variables)

    def compiled(fn: Callable[..., Any], params: Any) -> Callable[[], Any]:
        done = jax.jit(fn).lower(params, images).compile()
        return lambda: done(params, images)

    timings = measure(
        {
            FULL: compiled(full, variables),
            CONTROL: compiled(full, variables),
            REWRITTEN: compiled(shrink(full, half), small),
            REBUILT: compiled(ResNet18(widths=half.widths).apply, small),
        },
        rounds=rounds,
    )
    rows = [
        fixed("multiply-adds", half.macs, half.groups.macs(), "MACs", MACS),
        fixed("parameters and batch statistics", jc.nbytes(small), jc.nbytes(variables), "bytes"),
        timings.speed_row(CONTROL, FULL, factor=1.0),
        *(timings.speed_row(name, FULL, factor=1.0, target=SPEED) for name in (REWRITTEN, REBUILT)),
    ]
    title = f"half the channels removed, ResNet-18 width {WIDTH}, 32x32x3, batch {BATCH}, forward: speed"
    return Report(title, f"full ({timings.median(FULL) * 1e3:.0f} ms)", rows, timings.notes())


class Stepper:
    """One compiled, donated training step (SGD with momentum) with a state of its own; each call moves it on."""

    def __init__(self, apply: Callable[..., Any], variables: Any, opt_state: Any, images: jax.Array) -> None:
        labels = jnp.arange(len(images), dtype=jnp.int32) % 10
        optimizer = optax.sgd(1e-3, momentum=0.9)

        def loss_fn(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
            logits, new = apply({"params": params, "batch_stats": batch_stats}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        def step(state: Any) -> tuple[Any, jax.Array]:
            params, batch_stats, opt_state = state
            (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

        self.state = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"], opt_state))
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state).compile()

    def __call__(self) -> jax.Array:
        self.state, loss = self.compiled(self.state)
        return loss


def training(variables: Any, half: Plan, images: jax.Array, *, rounds: int) -> Report:
    """A training step, batch statistics updated; the optimizer's state is the full one's, shrunk by the plan."""
    full = partial(ResNet18(width=WIDTH).apply, train=True, mutable=["batch_stats"])
    rebuilt = partial(ResNet18(widths=half.widths).apply, train=True, mutable=["batch_stats"])
    opt_state = optax.sgd(1e-3, momentum=0.9).init(variables["params"])
    small, small_state = half.take(variables), half.take_like(opt_state, variables["params"])
    steppers = {
        FULL: Stepper(full, variables, opt_state, images),
        CONTROL: Stepper(full, variables, opt_state, images),
        REWRITTEN: Stepper(shrink(full, half), small, small_state, images),
        REBUILT: Stepper(rebuilt, small, small_state, images),
    }
    timings = measure({**steppers}, rounds=rounds)
    rows = [
        fixed("optimizer state", jc.nbytes(small_state), jc.nbytes(opt_state), "bytes"),
        timings.speed_row(CONTROL, FULL, factor=1.0),
        *(timings.speed_row(name, FULL, factor=1.0, target=SPEED) for name in (REWRITTEN, REBUILT)),
    ]
    title = f"the same, training step of batch {BATCH}: speed"
    return Report(title, f"full ({timings.median(FULL) * 1e3:.0f} ms)", rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 32, 32, 3)), jnp.float32)
    variables = jax.jit(ResNet18(width=WIDTH).init)(jax.random.key(0), images[:1])
    half = halved(variables, images)
    yield forward(variables, half, images, rounds=7)
    yield training(variables, half, images, rounds=5)
