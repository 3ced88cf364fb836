"""Cost against size: time and memory a weight from 1M weights on, trace and compile time up to 200 layers.

Commands: ``python -m tests.benchmarks growth.weights`` (``JAXCOMP_GROWTH=1e9``: the largest tree, 1e8 if nothing is
said), ``growth.streaming`` (the same: a tree of so many weights pruned globally, quantized to int4 and saved, leaf by
leaf), ``growth.layers``. Each size runs in a process of its own, so that peaks are its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from tests.benchmarks import by_hand
from tests.benchmarks.timing import Report, Row

LARGEST = float(os.environ.get("JAXCOMP_GROWTH", "1e8"))
LEAF = 1 << 24
ROUNDS = 3
FLAT = "<= 1.3"


# Weights


def tree_of(weights: int, seed: int = 0) -> dict[str, Any]:
    """Square kernels of 2^24 weights, and of 2^20 for the rest of a multiple of that, in float32."""
    rng = np.random.default_rng(seed)
    large, left = divmod(weights, LEAF)
    sides = [4096] * large + [1024] * (left >> 20)
    draw = lambda side: jnp.array(rng.standard_normal((side, side), np.float32))  # noqa: E731
    return {f"layer_{i:03d}": {"kernel": jax.block_until_ready(draw(side))} for i, side in enumerate(sides)}


def now(what: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most since :func:`forget` (VmHWM)."""
    found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def forget() -> int:
    """Makes the peak now's; what is held."""
    Path("/proc/self/clear_refs").write_text("5")
    return now("VmRSS")


def works(params: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    prune = jc.prune(0.5)
    threshold = jc.prune(0.5, scope=jc.Global())
    int8, int4 = jc.quantize(jc.Int(8)), jc.quantize(jc.Int(4), per=jc.Groups(128))
    packed = jax.block_until_ready(jc.pack(int4.apply((), params)))
    seen = jax.block_until_ready(jax.jit(lambda p: int4.apply((), p))(params))
    file = folder / "w"
    jc.save(file, packed)
    mask = jax.jit(lambda p: prune.update(None, p, step=jnp.int32(0)))
    joint = jax.jit(lambda p: threshold.update(None, p, step=jnp.int32(0)))
    to_int8, to_int4 = jax.jit(lambda p: int8.apply((), p)), jax.jit(lambda p: int4.apply((), p))
    return {
        "mask, leaf by leaf": lambda: mask(params),
        "mask, one threshold": lambda: joint(params),
        "quantize int8": lambda: to_int8(params),
        "quantize int4, groups of 128": lambda: to_int4(params),
        "pack int4": lambda: jc.pack(seen),
        "save int4": lambda: jc.save(folder / "again", packed),
        "load int4": lambda: jc.load(file),
    }


def one_size(weights: int) -> dict[str, Any]:
    """Seconds of each work, best of some, and the peak beside the weights, in their bytes."""
    params = tree_of(weights)
    size = jc.nbytes(params)
    found = {}
    with tempfile.TemporaryDirectory() as d:
        for name, work in works(params, Path(d)).items():
            jax.block_until_ready(work())  # compiled
            before, seconds = forget(), []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                jax.block_until_ready(work())
                seconds.append(time.perf_counter() - start)
            found[name] = {"seconds": min(seconds), "peak": (now("VmHWM") - before) / size}
    return found


def streamed(weights: int) -> dict[str, Any]:
    """A tree in memory, pruned globally, quantized to int4 and saved; the peak is of all that the process holds."""
    t = jc.chain(jc.prune(0.5, scope=jc.Global()), jc.quantize(jc.Int(4), per=jc.Groups(128)))
    with tempfile.TemporaryDirectory() as d:
        jc.scale.compress_file(Path(d) / "small", tree_of(LEAF), t)  # compiled
        empty = forget()
        params = tree_of(weights)
        size = jc.nbytes(params)
        start = time.perf_counter()
        written = jc.scale.compress_file(Path(d) / "w", params, t)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "size": size, "written": written, "peak": now("VmHWM") - empty}


def sizes() -> list[int]:
    """1M, 10M, ... up to the largest, a million being 2^20."""
    return [10**n << 20 for n in range(6) if 10**n * 1e6 <= LARGEST]


def apart(work: str, *args: object) -> Any:
    """What one of this file's functions gives in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.growth", work, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def weights() -> Iterator[Report]:
    """The growth over weights."""
    found = {n: apart("one_size", n) for n in sizes()}
    base = min(n for n in found if n >= 10 << 20 or n == max(found))
    rows = []
    for name in found[base]:
        each = {n: f[name]["seconds"] / n for n, f in found.items()}
        for n, f in found.items():
            ratio = each[n] / each[base]
            detail = f"{each[n] * 1e9:.2f} ns a weight, peak {f[name]['peak']:.2f} of the weights"
            rows.append(Row(f"{name}, {n >> 20}M", ratio, ratio, ratio, detail, FLAT if n >= base else ""))
    yield Report("Time a weight", f"{base >> 20}M weights", rows, notes())


def streaming() -> Iterator[Report]:
    """A tree of the largest size pruned globally, quantized to int4 and saved."""
    rows = []
    for n in sizes()[-2:]:
        f = apart("streamed", n)
        ratio = f["peak"] / f["size"]
        speed = f["size"] / f["seconds"] / 1e9
        detail = f"{speed:.3f} GB/s of weights, {f['seconds']:.0f} s, file {f['written'] / 1e6:.0f} MB"
        rows.append(Row(f"peak memory, {n >> 20}M weights", ratio, ratio, ratio, detail, FLAT))
    yield Report("Pruned globally, int4, saved leaf by leaf", "the weights' bytes", rows, notes())


def notes() -> list[str]:
    """Where it ran."""
    return [f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores), jax {jax.__version__}; best of {ROUNDS}"]


# Layers

WIDTH, TOKENS = 256, 128


def block(p: Any, h: jax.Array) -> jax.Array:
    """One layer of a transformer."""
    n = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    q, k, v = (n @ p["attn"][x]["kernel"] for x in "qkv")
    h = h + (jax.nn.softmax(q @ k.swapaxes(-1, -2) * WIDTH**-0.5, -1) @ v) @ p["attn"]["o"]["kernel"]
    return h + jax.nn.gelu(h @ p["up"]["kernel"]) @ p["down"]["kernel"]


def layer(*lead: int) -> Any:
    """Its shapes, perhaps stacked."""
    s = lambda *shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)  # noqa: E731
    attn = {x: {"kernel": s(WIDTH, WIDTH)} for x in "qkvo"}
    return {
        "norm": {"scale": s(WIDTH)},
        "attn": attn,
        "up": {"kernel": s(WIDTH, 4 * WIDTH)},
        "down": {"kernel": s(4 * WIDTH, WIDTH)},
    }


def network(layers: int, *, scanned: bool) -> tuple[Any, Callable[..., jax.Array]]:
    """Shapes and function."""
    if scanned:
        run = lambda p, x: jax.lax.scan(lambda h, l: (block(l, h), None), x, p["layers"])[0]  # noqa: E731
        return {"layers": layer(layers)}, run

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        for i in range(layers):
            x = block(p[f"layer_{i}"], x)
        return x

    return {f"layer_{i}": layer() for i in range(layers)}, unrolled


def compiled(layers: int, kind: str) -> dict[str, float]:
    """Processor seconds of tracing and of compiling a training step, in float and with weights and activations int8."""
    figures(1, kind)  # the first one pays for what jax imports and sets up
    jax.clear_caches()  # and its traces would serve for the layers of this one
    return figures(layers, kind)


def figures(layers: int, kind: str) -> dict[str, float]:
    """Of one network; one that is rolled is quantized so, and beside it is float as it was written, unrolled."""
    x = jax.ShapeDtypeStruct((2, TOKENS, WIDTH), jnp.float32)
    params, fn = network(layers, scanned=kind == "scanned")
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = found.get(name, 0.0) + time.process_time() - start
        return result

    def step(f: Callable[..., jax.Array]) -> Any:
        return jax.jit(jax.grad(lambda p, *args: jnp.sum(f(p, *args) ** 2)))

    lowered = timed("float trace", lambda: step(fn).lower(params, x))
    timed("float compile", lowered.compile)
    if kind == "scanned":
        run, of = by_hand.scanned(layers)
        timed("by hand compile", step(run).lower(params, of, x).compile)
    if kind == "rolled":
        loop = timed("plan", lambda: jc.trace.rolled(fn)(params, x))
        params, fn = jax.eval_shape(loop.roll, params), loop.fn
    roles = timed("plan", lambda: jc.roles(fn)(params, x))
    ranges = jax.eval_shape(jc.activations.ranges_of, jax.eval_shape(jc.calibrate(fn), params, x))
    t, rules = jc.quantize(jc.Int(8), roles=roles), {".*": jc.Act(8)}
    q = jc.quantize_function(fn, rules)
    tree = timed("plan", lambda: jax.eval_shape(lambda p: t.apply((), p), params))
    timed("plan", lambda: jc.coverage(fn, rules)(tree, x))
    lowered = timed("trace", lambda: step(lambda p, r, x: q(t.apply((), p), r, x)).lower(params, ranges, x))
    timed("compile", lowered.compile)
    return found


def layers(*, toy: bool = False) -> Iterator[Report]:
    """The growth over layers."""
    for kind, aim in (("scanned", "<= 1.3"), ("unrolled", "<= 1.5"), ("rolled", "<= 1.5")):
        rows = []
        for n in (2, 4) if toy else (1, 10, 50, 100, 200):
            f = apart("compiled", n, kind)
            ratio = f["compile"] / f["float compile"]
            detail = f"compile {f['compile']:.2f} s, float {f['float compile']:.2f} s"
            rows.append(Row(f"compile, {n} layers", ratio, ratio, ratio, detail, aim if n == 100 else ""))
            if kind == "scanned":
                least = f["by hand compile"] / f["float compile"]
                rows.append(Row("  the same rounded by hand", least, least, least, f"{f['by hand compile']:.2f} s"))
            own = f["trace"] + f["plan"]
            detail = f"trace {f['trace']:.2f} s, float {f['float trace']:.2f} s; plan {f['plan']:.2f} s"
            rows.append(Row(f"trace and plan in seconds, {n} layers", own, own, own, detail, "<= 10" * (n == 100)))
        yield Report(f"A training step of a transformer, W8A8, {kind}", "float32", rows, notes())


SECTIONS = {"weights": weights, "streaming": streaming, "layers": layers}


def sections(name: str = "", *, toy: bool = False) -> Callable[[], Iterator[Report]]:
    """What runs one section, or all."""
    if name and name not in SECTIONS:
        raise ValueError(f"no section of growth is called {name!r}; there are {', '.join(SECTIONS)}")

    def run() -> Iterator[Report]:
        if toy:
            yield from layers(toy=True)
            return
        for section in [SECTIONS[name]] if name else SECTIONS.values():
            yield from section()

    return run


if __name__ == "__main__":
    works_by_name = {"one_size": one_size, "streamed": streamed}
    what, count, *more = sys.argv[1:]
    print(json.dumps(compiled(int(count), *more) if what == "compiled" else works_by_name[what](int(count))))
