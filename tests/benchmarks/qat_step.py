"""The step of quantization-aware training over the float step, weights only, whole step: loss, gradients, optimizer.

Command: ``python -m tests.benchmarks qat_step``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18, ViT

PER = jc.Channels(-1)  # a scale for each output feature of a Flax kernel, whatever the kernel is called
TIME, BYTES, TEMP, JOINT_TIME = "<= 1.08", "<= 1.15", "<= 1.1", "<= 1.25"
FLOAT, CONTROL = "float", "float again (control)"


class State(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    compression: Any


def transforms() -> dict[str, tuple[jc.Transform, str]]:
    """The cases and their targets for the time."""
    return {
        FLOAT: (jc.core.identity(), ""),
        "Int(8)": (jc.quantize(jc.Int(8), per=PER), TIME),
        "Int(4)": (jc.quantize(jc.Int(4), per=PER), TIME),
        "prune, masks renewed every 100 steps, Int(8)": (
            jc.chain(jc.gate(jc.prune(0.5), jc.every(100)), jc.quantize(jc.Int(8), per=PER)),
            TIME,
        ),
        "prune, masks renewed every step, Int(8)": (
            jc.chain(jc.prune(0.5), jc.quantize(jc.Int(8), per=PER)),
            JOINT_TIME,
        ),
    }


def make_step(model: nn.Module, transform: jc.Transform, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """``step(state, images, labels) -> (state, loss)``, not jitted."""

    def loss_fn(params: Any, state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": jc.materialize(transform.apply(state.compression, params))}
        if state.batch_stats:
            variables["batch_stats"] = state.batch_stats
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updated.get("batch_stats", {})

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        compression = transform.update(state.compression, params, step=state.step + 1)
        return State(state.step + 1, params, batch_stats, opt_state, compression), loss

    return step


class Stepper:
    """One compiled, donated step with a state of its own; each call moves it on."""

    def __init__(self, model: nn.Module, transform: jc.Transform, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
        self.labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
        optimizer = optax.sgd(1e-3, momentum=0.9)
        variables = jax.jit(model.init)(jax.random.key(0), self.images[:1])
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        state = State(jnp.int32(0), params, stats, optimizer.init(params), transform.init(params))
        step = jax.jit(make_step(model, transform, optimizer), donate_argnums=0)
        self.compiled = step.lower(state, self.images, self.labels).compile()
        self.state = jax.tree.map(jnp.copy, state)

    def __call__(self) -> jax.Array:
        self.state, loss = self.compiled(self.state, self.images, self.labels)
        return loss

    def bytes_accessed(self) -> float:
        """By XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["bytes accessed"])

    def temp_bytes(self) -> float:
        """By XLA's buffer assignment."""
        return float(self.compiled.memory_analysis().temp_size_in_bytes)


def compare(title: str, model: nn.Module, *, batch: int, rounds: int) -> Report:
    """All cases of one model."""
    cases = transforms()
    steppers = {name: Stepper(model, transform, batch) for name, (transform, _) in cases.items()}
    timings = measure({**steppers, CONTROL: steppers[FLOAT]}, rounds=rounds)
    base = steppers[FLOAT]
    rows = [timings.row(CONTROL, FLOAT)]
    for name, (_, target) in cases.items():
        if name == FLOAT:
            continue
        read, temp = steppers[name].bytes_accessed(), steppers[name].temp_bytes()
        rows.append(timings.row(name, FLOAT, target=target))
        rows.append(_count(f"  bytes accessed, {name}", read, base.bytes_accessed(), BYTES))
        rows.append(_count(f"  temp memory, {name}", temp, base.temp_bytes(), TEMP))
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.0f} ms)", rows, timings.notes())


def _count(name: str, value: float, base: float, target: str) -> Row:
    return Row(name, value / base, value / base, value / base, f"{value / 1e6:.1f} MB", target)


def run() -> Iterator[Report]:
    """The reports."""
    vit = ViT(patch=4, dim=256, depth=4, heads=4, mlp_dim=1024)
    yield compare("QAT step, ResNet-18 width 16, 32x32x3, batch 64", ResNet18(width=16), batch=64, rounds=12)
    yield compare("QAT step, transformer of 4 layers, d=256, 64 tokens, batch 32", vit, batch=32, rounds=12)
