"""Accuracy of a trained ResNet-18 after training alone: nearest rounding beside reconstruction, and channels refitted.

Command: ``JAXCOMP_BASELINES=FOLDER python -m tests.benchmarks reconstruction``, where ``FOLDER/0``, ``/1`` and ``/2``
hold what ``python -m train fashion_mnist --baseline.epochs 2 --seed N`` leaves: ``baseline.safetensors``. Calibrated
on 1024 images of the train split without their labels, judged on the test split. The first and the last layer have 8
bits, as in BRECQ and QDrop. Ratios are accuracies over the float network's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import LSQ
from jaxcomp.ptq import Training, reconstruct, refit, removal_error
from jaxcomp.quantization.adaround import adaround, harden
from jaxcomp.structure import channel_groups, mask, plan
from jaxcomp.trace import row_moments_over
from jaxcomp.trace.calibrate import calibrate_over
from jaxcomp.trace.ranges import min_max, mse
from tests.benchmarks.timing import Report, Row
from train.data.images import normalize
from train.data.sets import Dataset, load
from train.networks.compressed import inference
from train.networks.linen import ResNet18

VARIABLE = "JAXCOMP_BASELINES"
SEEDS = (0, 1, 2)
BATCH, BATCHES = 64, 16
WITHIN = {8: 0.5, 4: 2.0}
"""Points below the float network that W4A8 and W4A4 may be."""


class Case:
    """One seed's network with its batch norms folded, and how it is judged."""

    def __init__(self, folder: Path, data: Dataset) -> None:
        variables = jc.load(folder / "baseline.safetensors")
        self.data = data
        self.batches = [self.images(data.train.images[i * BATCH : (i + 1) * BATCH]) for i in range(BATCHES)]
        folded = jc.fold_batch_norm(inference(ResNet18(width=16)))(variables, self.batches[0])
        self.fn, self.params = folded.fn, folded.params
        self.paths = [site.path for site in jc.sites(self.fn)(self.params, self.batches[0])]
        self.stats = calibrate_over(self.fn)(self.params, self.batches)
        self.float = self.accuracy(self.fn, self.params)

    def images(self, images: np.ndarray) -> jax.Array:
        """As the network takes them."""
        return normalize(jnp.asarray(images), self.data.mean, self.data.std)

    def accuracy(self, fn: Callable[..., Any], params: Any) -> float:
        """On the test split, in percent."""
        classes = jax.jit(lambda params, x: fn(params, x).argmax(-1))
        test, right = self.data.test, 0
        for i in range(0, len(test), 1000):
            found = classes(params, self.images(test.images[i : i + 1000]))
            right += int((np.asarray(found) == test.labels[i : i + 1000]).sum())
        return 100 * right / len(test)

    def row(self, name: str, accuracy: float, within: float | None = None) -> Row:
        """A row of the table."""
        target = "" if within is None else f">= {(self.float - within) / self.float:.6f}"
        ratio = accuracy / self.float
        return Row(name, ratio, ratio, ratio, f"{accuracy:.2f}%, float {self.float:.2f}%", target)

    def on_grids(self, bits: int) -> Iterator[tuple[str, float]]:
        """Weights of 4 bits, activations of ``bits``: to nearest, BRECQ and QDrop."""
        ends = {self.paths[0], self.paths[-1]}
        rules: dict[Any, Any] = {}
        ranges = {}
        for name, stats in self.stats.items():
            width, signed = 8 if name in ends else bits, float(stats.low) < 0
            rules[re.escape(name)] = jc.Act(width, symmetric=signed, range=LSQ())
            ranges[name] = (min_max if width == 8 else mse(width, symmetric=signed))(stats)
        roles = jc.roles(self.fn)(self.params, self.batches[0])
        soft = adaround(self.params, jc.Int(4), roles=roles, where=lambda p, _: p in self.paths and p not in ends)
        soft = adaround(soft, jc.Int(8), roles=roles, where=lambda p, _: p in ends)
        q = jc.quantize_function(self.fn, rules)

        def judged(params: Any, ranges: Any) -> float:
            return self.accuracy(lambda params, x: q(params, ranges, x), params)

        yield "to nearest", judged(harden(soft), ranges)
        given = {"batches": self.batches, "rules": rules, "ranges": ranges, "key": jax.random.key(0)}
        for name, drop in (("reconstructed", 0.0), ("reconstructed, dropping half", 0.5)):
            found = reconstruct(self.fn, self.params, soft, training=Training(steps=200, drop=drop), **given)
            yield name, judged(found.params, found.ranges)

    def fewer_channels(self) -> Iterator[tuple[str, float]]:
        """A quarter of each group of channels removed: by magnitude, then by what a fit leaves, each fitted and not."""
        groups = channel_groups(self.fn)(self.params, self.batches[0])
        moments = row_moments_over(self.fn)(self.params, self.batches)
        for name, score in (("magnitude", None), ("removal error", removal_error(moments))):
            pruned = mask(plan(groups, self.params, sparsity=0.25, score=score))(self.params)
            yield f"by {name}", self.accuracy(self.fn, pruned)
            found = refit(self.fn, self.params, pruned, batches=self.batches)
            yield f"by {name}, refitted", self.accuracy(self.fn, found.params)


def report(folder: Path, title: str, rows: Callable[[Case, int], Iterator[Row]]) -> Report:
    """The rows of all seeds that there are."""
    data = load("fashion_mnist")
    found = [row for seed in SEEDS for row in rows(Case(folder / str(seed), data), seed)]
    notes = [f"calibrated on {BATCH * BATCHES} images of the train split, no labels; judged on {len(data.test)}"]
    return Report(title, "float", found, notes)


def _quantized(bits: int, case: Case, seed: int) -> Iterator[Row]:
    for name, accuracy in case.on_grids(bits):
        within = None if name == "to nearest" else WITHIN[bits]
        yield case.row(f"W4A{bits}, seed {seed}, {name}", accuracy, within)


def _fewer(case: Case, seed: int) -> Iterator[Row]:
    for name, accuracy in case.fewer_channels():
        yield case.row(f"a quarter of channels, seed {seed}, {name}", accuracy)


def run() -> Iterator[Report]:
    """W4A8, W4A4, and fewer channels.

    Raises:
      ValueError: the folder of baselines is not named.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(f"reconstruction reads trained networks: set {VARIABLE} to their folder, see its docstring")
    title = "ResNet-18 of width 16 on Fashion-MNIST"
    for bits in WITHIN:
        yield report(Path(folder), f"{title}, W4A{bits}", partial(_quantized, bits))
    yield report(Path(folder), f"{title}, fewer channels", _fewer)
