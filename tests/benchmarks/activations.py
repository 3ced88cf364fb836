"""Weights and activations on integer grids: the training step over float beside peers', and the integer forward.

Command: ``python -m tests.benchmarks activations``; the forward is timed on the threads that the process has, so
``taskset -c 0`` gives one core. Peers' rows need the extra ``benchmarks``.
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
from jaxcomp.activations import LSQ, PACT, Act, Backward, Dynamic, ranges_of
from jaxcomp.activations import quantize_function as quantize_activations
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.fold import fold_batch_norm
from tests.benchmarks.peers import peers, training
from tests.benchmarks.timing import Report, Row, measure
from train.networks import ResNet18, ViT

PER = jc.Channels(-1)  # a scale for each output feature of a Flax kernel, whatever the kernel is called
TIME, BYTES, SPEED = "<= 1.08", "<= 1.15", ">= 2"
FLOAT, CONTROL = "float", "float again (control)"


class Case(NamedTuple):
    """A training step: ``run(variables, ranges, key, images)``, what its weights become, which ranges it takes.

    ``integer``: its weights stay leaves of codes, for products on integers.
    """

    run: Callable[..., Any]
    transform: jc.Transform = jc.core.identity()
    calibrated: bool = False
    learned: bool = False
    integer: bool = False
    target: str = ""


def cases(model: nn.Module) -> tuple[dict[str, Case], list[str]]:
    """All cases by name, and which peers are missing."""
    apply = training(model)

    def ours(bits: int, act: Act, *, target: str = "", integer: bool = False, backward: Backward | None = None) -> Case:
        q = quantize_activations(apply, {r".*": act}, integer=integer, backward=backward)
        call = q if backward else lambda variables, ranges, key, images: q(variables, ranges, images)
        learned = isinstance(act.range, LSQ | PACT)
        return Case(call, jc.quantize(jc.Int(bits), per=PER), act.needs_range, learned, integer, target)

    def other(peer: Callable[..., Any]) -> Case:
        return Case(lambda variables, ranges, key, images: peer(variables, images))

    found, missing = peers(model)
    return {
        FLOAT: other(apply),
        CONTROL: other(apply),
        "W8A8, static ranges": ours(8, Act(8), target=TIME),
        "W8A8, static ranges, forward on integers": ours(8, Act(8), target=TIME, integer=True),
        "W8A8, symmetric ranges, forward on integers": ours(8, Act(8, symmetric=True), integer=True),
        "W8A8, dynamic ranges": ours(8, Act(8, symmetric=True, range=Dynamic())),
        "W4A8, learned ranges (LSQ)": ours(4, Act(8, range=LSQ())),
        "W4A8, learned ranges (PACT)": ours(4, Act(8, range=PACT())),
        "W8A8, static, int8 gradients": ours(8, Act(8), backward=Backward()),
        **{name: other(peer) for name, peer in found.items()},
    }, missing


class State(NamedTuple):
    """All that a step changes. Ranges that are learned are trained with the parameters, others stay."""

    trained: Any
    ranges: Any
    batch_stats: Any
    opt_state: Any


def make_step(case: Case) -> Callable[..., Any]:
    """``step(state, images, labels) -> (state, loss)``, not jitted."""
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def loss_fn(trained: Any, state: State, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        params, learned = trained
        ranges = learned if case.learned else state.ranges
        params = case.transform.apply(case.transform.init(params), params)
        params = params if case.integer else jc.materialize(params)
        key = jax.random.key(labels[0])
        logits, updated = case.run({"params": params, "batch_stats": state.batch_stats}, ranges, key, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained, state, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return State(trained, state.ranges, updated.get("batch_stats", {}), opt_state), loss

    return step


class Stepper:
    """One compiled, donated step with a state of its own; each call moves it on."""

    def __init__(self, model: nn.Module, case: Case, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
        self.labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
        variables = jax.jit(model.init)(jax.random.key(0), self.images[:1])
        variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        ranges = {}
        if case.calibrated:
            ranges = ranges_of(jax.jit(calibrate(training(model)))(variables, self.images[:8]))
        trained, fixed = (variables["params"], ranges if case.learned else {}), {} if case.learned else ranges
        opt_state = optax.sgd(1e-3, momentum=0.9).init(trained)
        self.state = jax.tree.map(jnp.copy, State(trained, fixed, variables["batch_stats"], opt_state))
        step = jax.jit(make_step(case), donate_argnums=0)
        self.compiled = step.lower(self.state, self.images, self.labels).compile()

    def __call__(self) -> jax.Array:
        self.state, loss = self.compiled(self.state, self.images, self.labels)
        return loss

    def still(self) -> str:
        """How many kernels have no gradient at all: their momentum is zero."""
        momentum = jax.tree_util.tree_leaves_with_path(self.state.opt_state[0].trace[0])
        kernels = [leaf for path, leaf in momentum if jax.tree_util.keystr(path).endswith("['kernel']")]
        still = sum(not jnp.any(leaf) for leaf in kernels)
        return f", {still} of {len(kernels)} kernels get no gradient" if still else ""

    def bytes_accessed(self) -> float:
        """By XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["bytes accessed"])


def steps(title: str, model: nn.Module, *, batch: int, rounds: int) -> Report:
    """All cases of one model's training step, ours and the peers'."""
    table, missing = cases(model)
    steppers = {name: Stepper(model, case, batch) for name, case in table.items()}
    timings = measure({**steppers}, rounds=rounds)
    base = steppers[FLOAT].bytes_accessed()
    rows = [timings.row(CONTROL, FLOAT)]
    for name, case in table.items():
        if name in (FLOAT, CONTROL):
            continue
        read = steppers[name].bytes_accessed()
        time = f"{timings.median(name) * 1e3:.1f} ms{steppers[name].still()}"
        rows.append(timings.row(name, FLOAT, detail=time, target=case.target))
        detail, target = f"{read / 1e6:.1f} MB", BYTES if case.target else ""
        rows.append(Row(f"  bytes accessed, {name}", read / base, read / base, read / base, detail, target))
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.0f} ms)", rows, [*timings.notes(), *missing])


def inference(*, width: int, batch: int, rounds: int) -> Report:
    """ResNet-18 with its batch norms folded, on integers over float."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    model = ResNet18(width=width)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    folded = fold_batch_norm(model.apply)(variables, images)
    fn, params = folded.fn, folded.params
    compress = jc.quantize(jc.Int(8), per=PER)
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


def along_one_axis(*, channels: int, length: int, rounds: int) -> Report:
    """A convolution with one spatial axis, as networks for sound have, on integers over float."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, length, channels)), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(9, channels, channels)), jnp.float32)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    compress = jc.quantize(jc.Int(8), per=PER)
    tree = jc.pack(compress.apply(compress.init(params), params))
    name = "int8, dynamic symmetric"
    q = quantize_activations(fn, {r".*": Act(8, symmetric=True, range=Dynamic())}, integer=True)
    plain, integer = jax.jit(fn).lower(params, x).compile(), jax.jit(q).lower(tree, None, x).compile()
    timings = measure({FLOAT: lambda: plain(params, x), name: lambda: integer(tree, None, x)}, rounds=rounds)
    title = f"convolution of 9 taps along one axis, {channels} channels, 8 x {length}: speed"
    rows = [timings.speed_row(name, FLOAT, factor=1.0, target=">= 1.5")]
    return Report(title, f"float ({timings.median(FLOAT) * 1e3:.1f} ms)", rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    vit = ViT(patch=4, dim=256, depth=4, heads=4, mlp_dim=1024)
    yield inference(width=64, batch=8, rounds=9)
    yield along_one_axis(channels=128, length=1024, rounds=9)
    yield steps("QAT step, ResNet-18 width 16, 32x32x3, batch 64", ResNet18(width=16), batch=64, rounds=9)
    yield steps("QAT step, transformer of 4 layers, d=256, 64 tokens, batch 16", vit, batch=16, rounds=9)
