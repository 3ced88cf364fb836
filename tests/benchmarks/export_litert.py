"""ResNet-18 as LiteRT models, one thread, batch 1: float, 8-bit weights, W8A8; and W8A8 on the test split.

Command: ``JAXCOMP_RESNET=runs/fashion_mnist/baseline.safetensors python -m tests.benchmarks export_litert``, the file
of a ResNet-18 that ``python -m train fashion_mnist`` trained. Wants LiteRT's packages, see docs/programs.md.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import ranges_of
from jaxcomp.export import to_litert
from jaxcomp.export.running import opened
from tests.benchmarks.timing import Report, Row, measure

RULES = {".*": jc.Act(8)}
FLOAT, AGAIN, WEIGHTS, INT8 = "float", "float again (control)", "8-bit weights", "W8A8"


def run() -> Iterator[Report]:
    """The reports."""
    from train.data.sets import load
    from train.networks import ResNet18

    file = os.environ.get("JAXCOMP_RESNET")
    if not file:
        raise ValueError("export_litert wants JAXCOMP_RESNET, baseline.safetensors of python -m train fashion_mnist.")
    data, variables = load("fashion_mnist"), jc.load(file)
    fn = ResNet18(width=variables["params"]["stem"]["kernel"].shape[-1]).apply
    mean, std = np.float32(data.mean), np.float32(data.std)
    images = (data.test.images.astype(np.float32) / 255 - mean) / std
    samples = (data.train.images[:512].astype(np.float32) / 255 - mean) / std
    one = jnp.asarray(images[:1])
    ranges = ranges_of(jax.jit(jc.calibrate(fn))(variables, samples))
    tree = jc.pack(jc.quantize(jc.Int(8), roles=jc.roles(fn)(variables, one)).apply((), variables))
    integer = jax.jit(jc.quantize_function(fn, RULES, integer=True))
    with tempfile.TemporaryDirectory() as name:
        files = {case: Path(name) / f"{i}.tflite" for i, case in enumerate((FLOAT, WEIGHTS, INT8))}
        to_litert(files[FLOAT], fn, jax.tree.map(jnp.asarray, variables), one)
        to_litert(files[WEIGHTS], fn, tree, one)
        each = [(x[None],) for x in samples[:256]]
        to_litert(files[INT8], fn, tree, one, rules=RULES, ranges=ranges, samples=each)
        programs = {case: opened(path, "litert") for case, path in {**files, AGAIN: files[FLOAT]}.items()}
        sizes = {case: path.stat().st_size for case, path in {**files, AGAIN: files[FLOAT]}.items()}
        calls = {case: (lambda ran=ran: ran(images[:1])) for case, ran in programs.items()}
        timings = measure(calls, rounds=30, inner=20, warm=True)
        said = {case: np.concatenate([programs[case](x[None])[0].argmax(-1) for x in images]) for case in (FLOAT, INT8)}
    said["integers in JAX"] = np.concatenate(
        [np.asarray(integer(tree, ranges, part)).argmax(-1) for part in np.split(images, 20)]
    )

    def speed(case: str) -> Row:
        detail = f"{timings.median(case) * 1e3:.3f} ms, {sizes[case]:,} bytes"
        return timings.speed_row(case, FLOAT, factor=1.0, detail=detail, target=">= 3" if case == INT8 else "")

    yield Report(
        "ResNet-18, 28x28x1, batch 1, LiteRT, one thread: speed",
        f"float ({timings.median(FLOAT) * 1e3:.3f} ms, {sizes[FLOAT]:,} bytes)",
        [speed(case) for case in (AGAIN, WEIGHTS, INT8)],
        timings.notes(),
    )
    yield judged(said, data.test.labels)


def judged(said: dict[str, np.ndarray], labels: np.ndarray) -> Report:
    """Accuracies, and how often LiteRT says what JAX says."""

    def row(name: str, value: float, target: str = "") -> Row:
        return Row(name, value, value, value, f"{value:.2%}", target)

    right = {name: float((classes == labels).mean()) for name, classes in said.items()}
    rows = [row(f"accuracy, {name}", value) for name, value in right.items()]
    rows.append(
        row("agrees with the integers in JAX", float((said[INT8] == said["integers in JAX"]).mean()), ">= 0.995")
    )
    rows.append(row("accuracy lost by W8A8", right[FLOAT] - right[INT8], "<= 0.002"))
    return Report("ResNet-18 on Fashion-MNIST, W8A8 in LiteRT", "1", rows, [])
