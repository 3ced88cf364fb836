"""Mixed precision beside one width for all, at equal bytes: a trained ResNet-18, rounded after training.

Command: ``JAXCOMP_BASELINES=FOLDER python -m tests.benchmarks mixed_precision``, where ``FOLDER/0``, ``/1`` and ``/2``
hold what ``python -m train fashion_mnist --baseline.epochs 2 --seed N`` leaves: ``baseline.safetensors``.
``mixed_precision.1`` is of one seed, ``mixed_precision.nearest`` and ``mixed_precision.gptq`` round that way alone, and
``mixed_precision.1.gptq`` is both.

Every kernel has 2 to 6 bits, or 1 to 6 where the bytes are those of 2, and the file is at most as large as that of the
uniform width. Curvature, losses and
moments are of 256 images of the train split without their labels; accuracy, and the divergence from the float network's
predictions, are of the test split. Ratios are to the uniform width's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.transform import identity
from jaxcomp.search import GaussNewton, Table, allocate, choosing, kl, omega, sensitivity, traces, units_of
from jaxcomp.search.menus import rule_of
from jaxcomp.trace import row_moments_over
from tests.benchmarks.timing import Report, Row
from train.data.images import normalize
from train.data.sets import Dataset, load
from train.networks.compressed import inference
from train.networks.linen import ResNet18

VARIABLE = "JAXCOMP_BASELINES"
SEEDS = (0, 1, 2)
ROUNDINGS = ("nearest", "gptq")
BATCH, BATCHES = 64, 4
WIDTHS = range(1, 7)
BUDGETS = (2, 3, 4)
"""Uniform widths whose files say how large a file may be."""


class Case:
    """One seed's network with its batch norms folded, and how it is judged."""

    def __init__(self, folder: Path, data: Dataset) -> None:
        self.data = data
        self.batches = [self.images(data.train.images[i * BATCH : (i + 1) * BATCH]) for i in range(BATCHES)]
        variables = jc.load(folder / "baseline.safetensors")
        folded = jc.fold_batch_norm(inference(ResNet18(width=16)))(variables, self.batches[0])
        self.fn, self.params = folded.fn, folded.params
        self.logits = jax.jit(self.fn)
        self.curvature: Any = None
        self.paths = [site.path for site in jc.sites(self.fn)(self.params, self.batches[0])]
        self.was = np.concatenate(list(self.predictions(self.params)))
        self.float = self.judged(self.params)[0]

    def images(self, images: np.ndarray) -> jax.Array:
        """As the network takes them."""
        return normalize(jnp.asarray(images), self.data.mean, self.data.std)

    def predictions(self, params: Any) -> Iterator[np.ndarray]:
        """The logarithms of the test split's probabilities."""
        for i in range(0, len(self.data.test), 1000):
            logits = self.logits(params, self.images(self.data.test.images[i : i + 1000]))
            yield np.asarray(jax.nn.log_softmax(logits), np.float64)

    def judged(self, params: Any) -> tuple[float, float]:
        """Accuracy in percent, and the divergence from the float network's predictions."""
        now = np.concatenate(list(self.predictions(jc.materialize(params))))
        right = float(np.mean(now.argmax(-1) == self.data.test.labels))
        return 100 * right, float(np.mean((np.exp(self.was) * (self.was - now)).sum(-1)))

    def traces(self) -> Any:
        """Traces of the Fisher information of the network's own predictions, in which labels do not occur."""

        def against_itself(logits: jax.Array, x: jax.Array) -> jax.Array:
            wanted = jax.nn.softmax(jax.lax.stop_gradient(logits))
            return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), -1))

        if self.curvature is None:
            how = {"key": jax.random.key(0), "where": self._kernel, "rtol": 0.1, "most": 128}
            self.curvature = traces(GaussNewton(self.fn, against_itself), self.params, self.batches, **how)
        return self.curvature

    def _kernel(self, path: str, leaf: Any) -> bool:
        return path in self.paths

    def options(self, rounding: str) -> dict[str, jc.Transform]:
        """All widths, by labels."""
        known = jc.roles(self.fn)(self.params, self.batches[0])
        if rounding == "gptq":
            moments = row_moments_over(self.fn)(self.params, self.batches)
        found = {}
        for bits in WIDTHS:
            grid, scale = jc.Int(bits, narrow=bits == 2), rule_of(bits)
            if rounding == "gptq":
                found[f"int{bits}"] = given(jc.ptq.gptq(self.params, moments, grid, scale=scale))
            else:
                found[f"int{bits}"] = jc.quantize(grid, roles=known, scale=scale)
        return found

    def rows(self, rounding: str) -> Iterator[Row]:
        """Both allocations under each budget."""
        table = units_of(self.params, self.options(rounding), where=self._kernel)
        measured = sensitivity(self.fn, self.params, table, self.batches, measures=(kl,)).table("kl")
        told = omega(self.params, table, self.traces())
        price = choosing(self.fn, self.params, self.batches[0], where=self._kernel).priced
        ways = {"trace": price(told), "measured loss": price(measured)}
        for bits in BUDGETS:
            same = self.made(table, dict.fromkeys(self.paths, f"int{bits}"))
            size, before = jc.artifact.file_size(same), self.judged(same)
            for way, priced in ways.items():
                leaves = self.fitting(table, wider(priced, 1 if bits == 2 else 2), size)
                sizes = jc.artifact.file_size(leaves), size
                yield from self._compared(f"as int{bits}, by {way}", self.judged(leaves), before, leaves, sizes)

    def fitting(self, table: Table, priced: Table, size: int) -> Any:
        """The best choice whose file is no larger; its header is no sum over leaves, so the budget gives a little."""
        limit = float(size)
        while True:
            leaves = self.made(table, allocate(priced, {"bytes": limit}).choice)
            excess = jc.artifact.file_size(leaves) - size
            if excess <= 0:
                return leaves
            limit -= excess

    def made(self, table: Table, choice: Mapping[str, str]) -> Any:
        """The network under a choice."""
        rules = {unit.name: unit.option(choice[unit.name]).make for unit in table}
        transform = jc.by_path({**rules, ".*": identity()})
        return jc.pack(transform.apply(transform.init(self.params), self.params))

    def _compared(
        self, name: str, now: tuple[float, float], before: tuple[float, float], leaves: Any, sizes: tuple[int, int]
    ) -> Iterator[Row]:
        widths = Counter(
            x.grid.bits for _, x in leaves_with_paths(leaves, is_leaf=is_compressed)[0] if is_compressed(x)
        )
        words = " ".join(f"{widths[b]}x{b}" for b in sorted(widths))
        accuracy, far = now[0] / before[0], now[1] / before[1]
        detail = f"{now[0]:.2f}%, uniform {before[0]:.2f}%, float {self.float:.2f}%; {sizes[0]:,} of {sizes[1]:,} bytes"
        yield Row(name, accuracy, accuracy, accuracy, f"{detail}; layers x bits: {words}", ">= 1")
        yield Row(f"  divergence, {name}", far, far, far, f"{now[1]:.4f}, uniform {before[1]:.4f}", "<= 1")


def wider(table: Table, least: int) -> Table:
    """The table without widths below the least: a single bit is so far off that a quadratic says little of it."""
    gone = {f"int{bits}" for bits in WIDTHS if bits < least}
    units = (replace(unit, options=tuple(o for o in unit.options if o.label not in gone)) for unit in table)
    return Table(tuple(units), table.what)


def given(solved: Any) -> jc.Transform:
    """The transform that puts leaves in the place of those that were rounded to make them."""
    known = dict(leaves_with_paths(solved, is_leaf=is_compressed)[0])

    def apply(state: Any, params: Any) -> Any:
        named, treedef = leaves_with_paths(params, is_leaf=is_compressed)
        return treedef.unflatten([known[path] for path, _ in named])

    return jc.Transform(init=lambda params: (), update=lambda state, params, **_: state, apply=apply)


def reports(seeds: Sequence[int], roundings: Sequence[str]) -> Iterator[Report]:
    """A table for each seed and way to round.

    Raises:
      ValueError: the folder of baselines is not named.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(f"mixed_precision reads trained networks: set {VARIABLE} to their folder, see its docstring")
    data = load("fashion_mnist")
    for seed in seeds:
        case = Case(Path(folder) / str(seed), data)
        for rounding in roundings:
            title = f"ResNet-18 of width 16 on Fashion-MNIST, seed {seed}, rounded by {rounding}"
            notes = [
                f"calibrated on {BATCH * BATCHES} images of the train split, no labels; judged on {len(data.test)}"
            ]
            yield Report(title, "the uniform width", list(case.rows(rounding)), notes)


def sections(name: str, *, toy: bool = False) -> Callable[[], Iterator[Report]]:
    """What runs a seed, a way to round, one of both, or all.

    Raises:
      ValueError: no such section.
    """
    words = name.split(".") if name else []
    seeds, ways = [s for s in SEEDS if str(s) in words], [w for w in ROUNDINGS if w in words]
    if len(seeds) + len(ways) != len(words):
        raise ValueError(f"mixed_precision has no section {name!r}; there are the seeds {SEEDS}, and {ROUNDINGS}")
    return partial(reports, seeds or SEEDS, ways or ROUNDINGS)
