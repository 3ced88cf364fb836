"""Products of compressed weights on a GPU beside bf16, raw XLA and qwix: square dots, decoding, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Dynamic, Float8, ranges_of
from jaxcomp.core.layouts import Tokens
from tests.benchmarks.gpu_cases import BASE, CONTROL, Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report, Row

DYNAMIC = jc.Act(8, symmetric=True, range=Dynamic())
TOKENS = jc.Act(8, symmetric=True, range=Dynamic(), per=Tokens())
STATIC, ASYMMETRIC = jc.Act(8, symmetric=True), jc.Act(8)
GRIDS = {"int8": jc.quantize(jc.Int(8)), "int4 g128": jc.quantize(jc.Int(4), per=jc.Groups(128))}
FLOAT8 = jnp.float8_e4m3fn
W8A8, F8 = ">= 1.25", ">= 1.2"


def bandwidth(setting: Setting) -> Iterator[Report]:
    """Gigabytes a second of ``x * 2``: what all that is bound by memory is compared with."""
    size = setting.pick(1 << 28, 1 << 16)
    ran = run_cases({"x * 2": lambda: Compiled(lambda x: x * 2, jnp.ones(size))}, setting)
    rate = lambda s: f"{8 * size / s / 1e9:.0f} GB/s"  # noqa: E731
    yield ran.report("x * 2", [ran.speed("x * 2", "x * 2", detail=rate)], "x * 2")


def to_mantissa(x: jax.Array, bits: int) -> jax.Array:
    """float32 rounded to so many bits of mantissa, halves to even."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)


def precision(setting: Setting) -> Iterator[Report]:
    """What a float32 product does with its operands by default: its error against each way to round them."""
    n = setting.pick(1024, 64)
    a, b = (jax.random.normal(jax.random.key(i), (n, n)) for i in (0, 1))
    got = np.asarray(jax.jit(jnp.matmul)(a, b), np.float64)
    rows = []
    for name, bits in (("as they are", 23), ("TF32 (10 bits of mantissa)", 10), ("bfloat16 (7 bits)", 7)):
        wanted = np.asarray(to_mantissa(a, bits), np.float64) @ np.asarray(to_mantissa(b, bits), np.float64)
        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        rows.append(Row(f"operands {name}", error * 1e6, error * 1e6, error * 1e6, "the least is what was done"))
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    yield Report(f"float32 product of {n}^2 at default precision: error", "1e-6 of the largest", rows, [device])


def square(p: Any, x: jax.Array) -> jax.Array:
    """The function of the dots."""
    return x @ p["w"].astype(x.dtype)


def raw_dot(a: jax.Array, b: jax.Array, *, axis: int, sums: Any, scale: jax.Array | None = None) -> jax.Array:
    """XLA's own: contracted over the last axis of ``a`` and one of ``b``; with a scale, rescaled to bf16."""
    out = lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=sums)
    return out if scale is None else (out.astype(jnp.float32) * scale).astype(jnp.bfloat16)


def raw_dots(x: jax.Array, w: jax.Array) -> dict[str, Callable[[], Call]]:
    """XLA's forms of int8 and float8; the first operand of each pair is as stored, contracted axis first."""
    scale = jnp.full((1, w.shape[1]), 1e-3)
    i8 = lambda v: jnp.round(v / jnp.abs(v).max() * 127).astype(jnp.int8)  # noqa: E731
    f8 = lambda v: v.astype(FLOAT8)  # noqa: E731
    s8, e4 = partial(raw_dot, sums=jnp.int32), partial(raw_dot, sums=jnp.float32)
    return {
        "XLA s8 x s8, weight as stored": lambda: Compiled(partial(s8, axis=0), i8(x), i8(w)),
        "XLA s8 x s8, contracted axis last": lambda: Compiled(partial(s8, axis=1), i8(x), i8(w.T)),
        "XLA the same, rescaled to bf16": lambda: Compiled(partial(s8, axis=1, scale=scale), i8(x), i8(w.T)),
        "XLA float8, weight as stored": lambda: Compiled(partial(e4, axis=0, scale=scale), f8(x), f8(w)),
        "XLA float8, contracted axis last": lambda: Compiled(partial(e4, axis=1, scale=scale), f8(x), f8(w.T)),
    }


def our_dots(params: Any, x: jax.Array) -> dict[str, tuple[Callable[[], Call], str]]:
    """Our products and what is aimed at: with leaves as they are, and prepared for the device."""
    leaves = lambda: jc.pack(GRIDS["int8"].apply((), params))  # noqa: E731
    float8 = lambda: {"w": params["w"].astype(FLOAT8)}  # noqa: E731
    ranges = lambda: ranges_of(jc.calibrate(square)(params, x))  # noqa: E731

    def run(rule: Any, tree: Callable[[], Any], *, prepare: bool, given: bool, integer: bool = True) -> Call:
        made = jc.prepare(tree(), square, x) if prepare else tree()
        q = jc.quantize_function(square, {".*": rule}, integer=integer)
        return Compiled(q, made, ranges() if given else None, x)

    kinds = {
        "W8A8 static": (STATIC, leaves, True, W8A8),
        "W8A8 static, asymmetric": (ASYMMETRIC, leaves, True, W8A8),
        "W8A8 dynamic": (DYNAMIC, leaves, False, W8A8),
        "W8A8 dynamic, per token": (TOKENS, leaves, False, W8A8),
        "float8 static": (Float8(), float8, True, F8),
    }
    cases: dict[str, tuple[Callable[[], Call], str]] = {}
    for name, (rule, tree, given, target) in kinds.items():
        for prepare in (False, True):
            words = f"ours {name}{', prepared' if prepare else ''}"
            cases[words] = partial(run, rule, tree, prepare=prepare, given=given), target if prepare else ""
    fake = lambda: GRIDS["int8"].apply((), params)  # noqa: E731
    cases["ours W8A8, fake"] = partial(run, STATIC, fake, prepare=False, given=True, integer=False), ""
    return cases


def dots(setting: Setting) -> Iterator[Report]:
    """A square product in bf16 against int8 and float8."""
    n = setting.pick(4096, 64)
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    params = {"w": jax.random.normal(jax.random.key(1), (n, n)) * 0.02}
    w = params["w"].astype(jnp.bfloat16)
    ours = our_dots(params, x)
    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, jnp.matmul, x, w) for name in (BASE, CONTROL)}
    makers |= raw_dots(x, w) | {name: make for name, (make, _) in ours.items()}
    makers["qwix W8A8 dynamic, per token"] = partial(qwix_layers, {"w": w}, x)
    makers["qwix float8 dynamic, per token"] = partial(qwix_layers, {"w": w}, x, act=FLOAT8, weight=FLOAT8)
    ran = run_cases(makers, setting)
    rate = lambda s: f"{s * 1e6:.0f} us, {2 * n**3 / s / 1e12:.1f} T operations/s"  # noqa: E731
    targets = {name: target for name, (_, target) in ours.items()}
    ours_or_qwix = lambda name: name.startswith(("ours", "qwix"))  # noqa: E731
    rows = [
        ran.speed(name, target=targets.get(name, ""), detail=rate, compared=ours_or_qwix(name))
        for name in makers
        if name != BASE
    ]
    yield ran.report(f"dot {n}^3, bf16 in and out", rows)


LAYERS = 4
AIMS = {
    ("int8", "weight only", 1): ">= 1.6",
    ("int8", "weight only", 16): ">= 1.4",
    ("int4 g128", "weight only", 1): ">= 2.5",
    ("int4 g128", "weight only", 16): ">= 2",
    ("int8", "dynamic int8 activations", 1): ">= 1.6",
    ("int8", "dynamic int8 activations", 16): ">= 1.6",
    ("int4 g128", "dynamic int8 activations", 1): ">= 2",
}


def layers(p: Any, x: jax.Array) -> jax.Array:
    """One product after another, as decoding runs them."""
    for name in sorted(p):
        x = x @ p[name].astype(x.dtype)
    return x


def decode(setting: Setting) -> Iterator[Report]:
    """Four layers for one row and for sixteen: weights alone in codes, and with dynamic int8 activations."""
    d = setting.pick(8192, 256)
    keys = jax.random.split(jax.random.key(1), LAYERS)
    make = lambda k: jax.random.normal(k, (d, d), jnp.bfloat16) / np.sqrt(d).astype(jnp.bfloat16)  # noqa: E731
    params = {f"l{i}": make(k) for i, k in enumerate(keys)}
    trees = {name: jax.jit(lambda p, t=t: jc.pack(t.apply((), p)))(params) for name, t in GRIDS.items()}
    for batch in (1, 16):
        x = jax.random.normal(jax.random.key(2), (batch, d), jnp.bfloat16)
        yield _decoded(setting, params, trees, x)


def _decoded(setting: Setting, params: Any, trees: dict[str, Any], x: jax.Array) -> Report:
    batch, d = x.shape
    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, layers, params, x) for name in (BASE, CONTROL)}
    aims: dict[str, str] = {}
    for grid, tree in trees.items():
        makers[f"XLA {grid}, materialized"] = partial(Compiled, lambda p, x: layers(jc.materialize(p), x), tree, x)
        for kind, rules in (("weight only", {}), ("dynamic int8 activations", {".*": DYNAMIC})):
            for prepare in (False, True):
                name = f"ours {grid}, {kind}{', prepared' if prepare else ''}"
                makers[name] = partial(our_layers, tree, x, rules, prepare=prepare)
                aims[name] = AIMS.get((grid, kind, batch), "") if prepare else ""
        bits = {"weight": jnp.int4, "tile": 128} if "int4" in grid else {"weight": jnp.int8}
        makers[f"qwix {grid}, weight only"] = partial(qwix_layers, params, x, act=None, **bits)
        makers[f"qwix {grid}, dynamic int8 activations"] = partial(qwix_layers, params, x, act=jnp.int8, **bits)
        # The least that a call costs: with fewer microseconds than this nothing else can be told apart.
        makers[f"no product, the arguments of {grid}"] = partial(
            Compiled, lambda p, x: x + 1, tree, x, keep_unused=True
        )
    ran = run_cases(makers, setting, inner=20)
    rate = lambda s: f"{s * 1e6:.0f} us, as bf16 {2 * LAYERS * d * d / s / 1e9:.0f} GB/s"  # noqa: E731
    product = lambda name: name not in (BASE, CONTROL) and not name.startswith("no product")  # noqa: E731
    rows = [
        ran.speed(name, target=aims.get(name, ""), detail=rate, compared=product(name))
        for name in makers
        if name != BASE
    ]
    bound = {name: "<= 1" if "weight only, prepared" in name else "" for name in makers if "weight only" in name}
    megabytes = lambda case: case.temporaries() / 1e6  # noqa: E731
    rows += [ran.counted(name, "temporaries", megabytes, target=t, unit="MB") for name, t in bound.items()]
    return ran.report(f"{LAYERS} layers of {d}^2, batch {batch}", rows)


def no_product(p: Any, x: jax.Array) -> jax.Array:
    """What a call costs that is given the weights and reads none."""
    return x + 1


def our_layers(tree: Any, x: jax.Array, rules: Any, *, prepare: bool) -> Call:
    """The layers by ``quantize_function``, with leaves as they are or prepared."""
    made = jc.prepare(tree, layers, x) if prepare else tree
    return Compiled(jc.quantize_function(layers, rules, integer=True), made, None, x)


def qwix_layers(params: Any, x: jax.Array, *, act: Any = jnp.int8, weight: Any = jnp.int8, tile: int = 0) -> Call:
    """The layers by qwix's own products: weights in codes, and activations, by row, unless ``act`` is None."""
    import qwix

    tiles, across = ({0: tile}, {1: tile}) if tile else ({}, {})
    codes = {n: qwix.quantize(w, weight, channelwise_axes=(1,), tiled_axes=tiles) for n, w in params.items()}

    def run(p: Any, x: jax.Array) -> jax.Array:
        for name in sorted(p):
            row = qwix.quantize(x, act, channelwise_axes=(0,), tiled_axes=across) if act else x
            x = qwix.dot(row, p[name])
        return x

    return Compiled(run, codes, x)
