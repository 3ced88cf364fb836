"""The files of a run as programs of other runtimes: each is written, run on the test split, and compared with JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, singledispatch
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Rules
from jaxcomp.core.types import Params, PyTree
from jaxcomp.export import ExportError, command
from jaxcomp.export.running import SUFFIXES, Target, opened
from jaxcomp.trace.ranges import Range
from train.data.images import normalize
from train.data.sets import Dataset, Split
from train.networks.compressed import LearnedGrids, Network, OnGrids, Variables, inference

BATCH = 500
SAMPLES = 100
"""Images of the training split that say the ranges of sums and results."""


class Program(NamedTuple):
    """A network as exports take it: a function of parameters, which may be compressed, and images."""

    fn: Callable[..., PyTree]
    params: Params
    rules: Rules | None = None
    ranges: Mapping[str, Range] | None = None


@dataclass(frozen=True)
class Export:
    """One file of another runtime.

    Attributes:
      name, target: the row, and for what runtime it is.
      bytes: of the file.
      accuracy: on the test split, in that runtime.
      agreement: the fraction of the test split that JAX puts into the same class.
      refused: why there is no file; "" where there is one.
    """

    name: str
    target: Target
    bytes: int = 0
    accuracy: float = 0.0
    agreement: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        """One line."""
        if self.refused:
            return f"{self.name}: no {self.target} file: {self.refused}"
        return (
            f"{self.name}: {self.target}, {self.bytes:,} bytes, {self.accuracy:.2%} on the test split, and of"
            f" {self.agreement:.2%} of it JAX says the same."
        )


@singledispatch
def program_of(network: Network, variables: Variables) -> Program:
    """The network's function, and what its products are rounded to."""
    return Program(inference(network), variables)


@program_of.register
def _(network: OnGrids, variables: Variables) -> Program:
    return Program(inference(network.network), variables, network.rules, network.ranges)


@program_of.register
def _(network: LearnedGrids, variables: Variables) -> Program:
    own, ranges = network.apart(variables)
    return Program(inference(network.network), own, network.rules, ranges)


def export(name: str, target: Target, *, program: Program, data: Dataset, folder: Path) -> Export:
    """Writes one file beside the others of the run, and judges it."""
    path = folder / f"{name}{SUFFIXES[target]}"
    rows = 1 if target == "litert" else jax.export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((rows, *data.test.images.shape[1:]), jnp.float32)
    options: dict[str, PyTree] = {} if program.rules is None else {"rules": program.rules, "ranges": program.ranges}
    if program.rules is not None and target != "stablehlo":
        samples = normalize(jnp.asarray(data.train.images[:SAMPLES]), data.mean, data.std)
        options["samples"] = [np.asarray(x) for x in jnp.split(samples, len(samples))]
    try:
        size = command.writer(target)(path, program.fn, program.params, images, **options)
    except (ExportError, ValueError, TypeError) as e:
        return Export(name, target, refused=str(e))
    run, batch = opened(path, target), 1 if target == "litert" else BATCH
    found = classes(lambda x: run(x)[0], data, batch)
    wanted = classes(partial(_in_jax(program), program.params), data, BATCH)
    accuracy, agreement = ((found == other).mean() for other in (data.test.labels, wanted))
    return Export(name, target, size, float(accuracy), float(agreement))


def _in_jax(program: Program) -> Callable[..., jax.Array]:
    """The function in JAX: on integers where it has rules."""
    run = jc.quantize_function(program.fn, program.rules or {}, integer=program.rules is not None)
    return jax.jit(lambda params, images: run(params, program.ranges, images))


def classes(predict: Callable[[np.ndarray], jax.Array | np.ndarray], data: Dataset, batch: int) -> np.ndarray:
    """Which class each image of the test split is put into."""
    return np.concatenate([np.asarray(predict(x)).argmax(-1) for x in batches(data.test, data, batch)])


def batches(split: Split, data: Dataset, batch: int) -> Iterator[np.ndarray]:
    """The images of a split as the network takes them; the last batch may be smaller."""
    for start in range(0, len(split), batch):
        yield np.asarray(normalize(jnp.asarray(split.images[start : start + batch]), data.mean, data.std))
