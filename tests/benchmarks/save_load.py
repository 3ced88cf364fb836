"""Save and load of a tree of 16 matrices: dense float32, masked int4 as training leaves it, and packed.

Each build saves and loads in processes of its own, one after the other, the first time with what it compiles. Beside
ours: safetensors.numpy.save_file and load_file, and a plain write, of as many bytes, all of them on disk when they
return; and, with ``BEFORE=FOLDER``, another checkout. Memory is the process's high water, over that of the tree.

Command: ``[PARAMETERS=400000000] [BEFORE=../then] python -m tests.benchmarks save_load``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.benchmarks import saving
from tests.benchmarks.timing import Report, Row, measure

PARAMETERS = int(os.environ.get("PARAMETERS", 40_000_000))
HERE = Path(__file__).parents[2]


def figures(build: Path, kind: str, file: Path) -> dict[str, Any]:
    """What ``saving`` prints with the jaxcomp of a checkout."""
    command = [sys.executable, saving.__file__, kind, str(PARAMETERS), str(file), "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(build)}, capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def peers(folder: Path, size: int) -> dict[str, float]:
    """Seconds of others for a file of so many bytes."""
    data = {f"layer_{i}": np.ones(size // 64, np.float32) for i in range(16)}
    file = folder / "peer"

    def on_disk(write: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            write()
            with open(file, "rb+") as f:
                os.fsync(f.fileno())

        return call

    cases = {
        "safetensors.numpy.save_file": on_disk(lambda: safetensors.numpy.save_file(data, file)),
        "safetensors.numpy.load_file": lambda: safetensors.numpy.load_file(file),
        "a plain write": on_disk(lambda: file.write_bytes(b"".join(x.data for x in data.values()))),
    }
    timings = measure(cases, rounds=3)
    return {name: timings.median(name) for name in cases}


def rows(kind: str, folder: Path) -> Iterator[Row]:
    """Ours against the peers, and against another build."""
    ours, file = figures(HERE, kind, folder / "ours"), folder / "ours"
    memory = figures(HERE, "peaks", file)
    beside = peers(folder, ours["file"])
    for verb, peer in (("save", "safetensors.numpy.save_file"), ("load", "safetensors.numpy.load_file")):
        first, again = ours[verb][0][0], ours[verb][1][0]
        detail = f"{first:.2f} s, {ours['file'] / first / 1e9:.3f} GB/s of file, {ours[f'{verb}_compiles']} compiled"
        low, high = sorted(beside[peer] / t for t in (first, again))
        yield Row(f"{kind}: {verb}, speed to {peer}", beside[peer] / first, low, high, detail)
        peak = memory[f"{verb}_peak"] / memory["tree"]
        yield Row(f"{kind}: {verb}, memory to the tree", peak, peak, peak, f"{memory['tree'] / 1e6:.0f} MB", "<= 1.3")
    if "BEFORE" in os.environ:
        then = figures(Path(os.environ["BEFORE"]), kind, folder / "then")
        target = ">= 3" if kind == "dense" else ">= 10"
        for verb in ("save", "load"):
            ratios = [a[0] / b[0] for a, b in zip(then[verb], ours[verb], strict=True)]
            detail = f"{then[verb][0][0]:.2f} s, {then[f'{verb}_compiles']} compiled; again {ratios[1]:.1f}x"
            yield Row(f"{kind}: {verb}, speed to before", ratios[0], *sorted(ratios), detail, target)


def run() -> Iterator[Report]:
    """One report a kind of tree."""
    for kind in ("dense", "packed", "training"):
        with tempfile.TemporaryDirectory() as d:
            yield Report(f"save and load, {PARAMETERS / 1e6:.0f}M parameters", "the other", [*rows(kind, Path(d))], [])
