"""The toy main job by real processes of this machine, over loopback, and what a run leaves, clocks apart."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.processes import Ended, free_port, ran

OPTIONS = [
    "digits",
    *("--model.name", "mlp", "--batch", "256", "--checkpoint-seconds", "0.2"),
    *("--baseline.epochs", "4", "--baseline.learning-rate", "5e-3"),
    *("--finetune.epochs", "2", "--finetune.learning-rate", "1e-3"),
    *("--methods", "joint", "w8a8"),
]


CACHE = tempfile.TemporaryDirectory(prefix="jaxcomp-programs-")
"""Compiled programs of all these runs, removed when Python ends."""


def trained(count: int, out: Path, *options: str, **how: Any) -> list[Ended]:
    """The toy main job by so many processes."""
    base = ["-m", "train", *OPTIONS, "--out", str(out), "--compilation-cache", CACHE.name, *options]
    if count == 1:
        return ran([base], **how)
    together = ["--processes", str(count), "--coordinator", f"127.0.0.1:{free_port()}"]
    return ran([[*base, *together, "--process-id", str(i)] for i in range(count)], **how)


def rows_of(out: Path) -> list[dict]:
    """The rows of the report without their seconds."""
    rows = json.loads((out / "report.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def files_of(out: Path) -> list[str]:
    """What lies in the folder."""
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def worker() -> None:
    """Run as ``python -m tests.train.processes COUNT INDEX PORT``: transforms of weights split over all processes.

    Prints a line for each: its name and the checksum of every leaf, mask, code and threshold, gathered.
    """
    import jax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding

    count, index, port = map(int, sys.argv[1:])
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

    import jaxcomp as jc
    from tests.meshes import small_params, small_specs
    from train.loop.processes import digest

    transforms = {
        "prune": jc.prune(0.6),
        "prune global": jc.prune(0.6, scope=jc.Global()),
        "int8": jc.quantize(jc.Int(8)),
        "int4 pruned": jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4))),
        "log": jc.quantize(jc.Log(4)),
        "random": jc.prune(0.5, score=jc.pruning.random_score(jax.random.key(1))),
    }
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices())
    placed = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, NamedSharding(mesh, s), lambda own: x[own]),
        jax.device_get(small_params()),
        small_specs("rows"),
    )
    for name, t in transforms.items():

        def all_of_it(params: Any, t: jc.Transform = t) -> Any:
            state = t.update(t.init(params), params, step=1)
            seen = t.apply(state, params)
            return state, seen, jc.materialize(seen)

        found = jax.jit(all_of_it)(placed)
        whole = multihost_utils.process_allgather(found, tiled=True)
        if index == 0:
            print("found", name, digest(whole))


if __name__ == "__main__":
    worker()
