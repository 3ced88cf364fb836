"""One process that saves and loads a tree, with whatever jaxcomp it imports: figures as JSON on standard output.

It is a file of its own, and knows the public names only, so that ``save_load`` can run it with another checkout too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc

LAYERS = 16
KEPT = 0.1


def high_water() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def layer(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Any:
    """A matrix: dense, or masked int4 codes as training leaves them, or packed."""
    if kind == "dense":
        return jax.device_put(rng.standard_normal((rows, columns), dtype=np.float32))
    kept = rng.random((rows, columns), dtype=np.float32) < KEPT
    codes = rng.integers(-8, 8, (rows, columns), dtype=np.int8) * kept
    scale = jnp.ones((1, columns))
    leaf = jc.quantization.Quantized(
        jax.device_put(codes.astype(np.float32)), scale, None, jc.Int(4), jnp.dtype("float32")
    )
    masked = jc.core.Masked(leaf, jax.device_put(kept))
    if kind == "training":
        return masked
    return jax.block_until_ready(jc.pack(masked))


def seconds(work: Any) -> tuple[float, float, Any]:
    """By the wall clock, and of the processor; and the result."""
    wall, own = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(work())
    return time.perf_counter() - wall, time.process_time() - own, result


def main(kind: str, parameters: int, path: Path, *, repeats: int, options: dict[str, Any]) -> dict[str, Any]:
    """Saves, with these options, and loads: figures of the first time, and of the best of the others."""
    rng = np.random.default_rng(0)
    columns = parameters // LAYERS // 2048
    tree = {f"layer_{i}": {"kernel": layer(kind, 2048, columns + i, rng)} for i in range(LAYERS)}
    figures: dict[str, Any] = {"tree": jc.nbytes(tree)}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    saves, loads = [], []
    for i in range(repeats):
        wall, own, size = seconds(lambda: jc.save(path, tree, **options))
        saves.append((wall, own))
        if not i:
            figures |= {"save_compiles": len(compiled)}
    for i in range(repeats):
        compiled.clear()
        wall, own, _ = seconds(lambda: jc.load(path))
        loads.append((wall, own))
        if not i:
            figures |= {"load_compiles": len(compiled)}
    return figures | {"file": size, "save": saves, "load": loads}


def peaks(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The most bytes held while a file is loaded and its tree saved, beyond what the process had before."""
    jax.block_until_ready(jnp.ones(3) + 1)
    before = high_water()
    tree = jax.block_until_ready(jc.load(path))
    loaded = high_water() - before
    jc.save(path.with_suffix(".again"), tree, **options)
    path.with_suffix(".again").unlink()
    return {"tree": jc.nbytes(tree), "load_peak": loaded, "save_peak": high_water() - before}


if __name__ == "__main__":
    what, count, where, times = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    given = {"coding": sys.argv[5]} if sys.argv[5:] else {}
    out = peaks(where, given) if what == "peaks" else main(what, count, where, repeats=times, options=given)
    print(json.dumps({**out, "build": os.path.dirname(jc.__file__)}))
