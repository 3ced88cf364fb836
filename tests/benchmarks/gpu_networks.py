"""Whole networks on a GPU: an integer forward pass over bf16, and training steps over the float step and qwix's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxcomp as jc
from jaxcomp.activations import LSQ, Act, Dynamic, ranges_of
from jaxcomp.trace.fold import fold_batch_norm
from tests.benchmarks import activations
from tests.benchmarks.activations import FLOAT, PER, Case, Stepper, training
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report
from train.networks import ConvNet, ResNet18, ViT

FOLDED, PLAIN = "bf16, norms folded", "bf16, norms as they are"
QAT = {
    "W8A8, static ranges": "<= 1.04",
    "W4A8, learned ranges (LSQ)": "<= 1.08",
    "W8A8, symmetric ranges, forward on integers": "<= 1.08",
    "W8A8, static ranges, forward on integers": "<= 1.08",
}
"""The steps in the table, and what is aimed at."""


def inference(setting: Setting) -> Iterator[Report]:
    """ResNet-18 on integers, batch norms folded."""
    for batch, target in ((1, ">= 1.0"), (setting.pick(256, 2), ">= 1.1")):
        yield _forward(setting, batch, target)


def _forward(setting: Setting, batch: int, target: str) -> Report:
    width, size = setting.pick(64, 8), setting.pick(32, 8)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3), jnp.bfloat16)
    model = ResNet18(width=width, dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    folded = fold_batch_norm(model.apply)(variables, images)
    fn, params = folded.fn, folded.params
    tree = jc.pack(jc.quantize(jc.Int(8), per=PER).apply((), params))
    ranges = ranges_of(jax.jit(jc.calibrate(fn))(params, images[:8]))

    def ours(act: Act, *, prepare: bool) -> Call:
        made = jc.prepare(tree, fn, images) if prepare else tree
        q = jc.quantize_function(fn, {r".*": act}, integer=True)
        return Compiled(q, made, ranges if act.needs_range else None, images)

    makers: dict[str, Callable[[], Call]] = {
        FOLDED: partial(Compiled, fn, params, images),
        PLAIN: partial(Compiled, model.apply, variables, images),
    }
    kinds = {"symmetric": Act(8, symmetric=True), "asymmetric": Act(8)}
    kinds["dynamic"] = Act(8, symmetric=True, range=Dynamic())
    for name, act in kinds.items():
        for prepare in (False, True):
            makers[f"int8, {name}{', prepared' if prepare else ''}"] = partial(ours, act, prepare=prepare)
    ran = run_cases(makers, setting, inner=10)
    rate = lambda s: f"{batch / s:.0f} images/s, {s * 1e3:.3f} ms"  # noqa: E731
    aims = {"int8, symmetric": target, "int8, asymmetric": target}
    rows = [ran.speed(n, FOLDED, target=aims.get(n, ""), detail=rate) for n in makers if n != FOLDED]
    return ran.report(f"ResNet-18 width {width}, {size}x{size}x3, batch {batch}, forward", rows, FOLDED)


def _steps(setting: Setting, title: str, model: Any, batch: int) -> Report:
    table, missing = activations.cases(model)
    lsq = Act(8, range=LSQ())
    q = jc.quantize_function(training(model), {r".*": lsq}, integer=True)
    run = lambda variables, ranges, key, images: q(variables, ranges, images)  # noqa: E731
    on_integers = "W8A8, learned ranges (LSQ), forward on integers"
    table[on_integers] = Case(run, jc.quantize(jc.Int(8), per=PER), True, True, True)
    wanted = [FLOAT, activations.CONTROL, *QAT, on_integers, *(n for n in table if n.startswith("qwix"))]
    makers = {name: partial(Stepper, model, table[name], batch) for name in wanted}
    ran = run_cases(makers, setting, rounds=5, inner=3)
    rate = lambda s: f"{batch / s:.0f} images/s, {s * 1e3:.2f} ms"  # noqa: E731
    rows = [ran.time(name, FLOAT, target=QAT.get(name, ""), detail=rate) for name in wanted if name != FLOAT]
    base = ran.cases[FLOAT].bytes_accessed() if FLOAT in ran.cases else 1.0
    read = lambda case: case.bytes_accessed() / base  # noqa: E731
    rows += [ran.counted(name, "bytes accessed over float's", read) for name in QAT]
    report = ran.report(f"QAT step, {title}, bf16, batch {batch}", rows, FLOAT, unit="time")
    return Report(report.title, report.baseline, report.rows, [*report.notes, *missing])


def qat_resnet(setting: Setting) -> Iterator[Report]:
    """ResNet-18's step; images of 32x32."""
    full = ResNet18(width=64, dtype=jnp.bfloat16)
    title, model, batch = setting.pick(
        ("ResNet-18 width 64", full, 512), ("two convolutions", ConvNet((4, 8), dtype=jnp.bfloat16), 2)
    )
    yield _steps(setting, title, model, batch)


def qat_vit(setting: Setting) -> Iterator[Report]:
    """A transformer's step: 64 tokens."""
    dim, depth, batch = setting.pick((768, 12, 128), (32, 1, 2))
    model = ViT(patch=4, dim=dim, depth=depth, heads=dim // 64 or 1, mlp_dim=4 * dim, dtype=jnp.bfloat16)
    yield _steps(setting, f"transformer of {depth} layers, d = {dim}", model, batch)
