"""Reading full-size programs: sites and channel groups of a ResNet-50 and of a transformer of 1.1e9 parameters.

Command: ``python -m tests.benchmarks analysis``. On shapes alone; beside what jax itself takes to trace the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax

import jaxcomp as jc
from jaxcomp.core.types import Params
from tests.benchmarks.timing import Report, measure
from tests.full_size import Decoder, ResNet50, decoder, resnet_50

TRACE, CONTROL = "jax.make_jaxpr", "jax.make_jaxpr again (control)"
AIMS = {"ResNet-50, 224x224": 5, "transformer, 22 layers of 2048": 30}  # seconds for the groups


def report(name: str, apply: Callable[..., jax.Array], params: Params, x: jax.ShapeDtypeStruct) -> Report:
    """Both readings of one function."""

    def run(read: Callable[..., Callable[..., object]]) -> Callable[[], object]:
        return lambda: read(lambda p, x: apply(p, x))(params, x)

    readings = {"sites": run(jc.sites), "channel_groups": run(jc.channel_groups)}
    timings = measure({TRACE: run(jax.make_jaxpr), CONTROL: run(jax.make_jaxpr), **readings}, rounds=5)
    rows = [timings.row(CONTROL, TRACE)]
    for case in readings:
        rows.append(timings.row(case, TRACE, detail=f"{timings.median(case):.2f} s, aim {AIMS[name]} s"))
    return Report(f"reading a program: {name}", f"{TRACE} ({timings.median(TRACE):.2f} s)", rows, timings.notes())


def run() -> Iterator[Report]:
    """The reports."""
    for name, network, made in zip(AIMS, (ResNet50(), Decoder()), (resnet_50(), decoder()), strict=True):
        yield report(name, network.apply, *made)
