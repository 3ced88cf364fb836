"""One function, three platforms: each is lowered in the form that it runs, from a machine with none but the CPU."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import LSQ, Act, Backward, Dynamic, Float8, quantize_function
from jaxcomp.core.barriers import made_once
from jaxcomp.core.bits import pack_bits, unpack_bits
from jaxcomp.kernels.windows import Window
from jaxcomp.pruning.masks.nm import n_m_mask
from jaxcomp.pruning.specs import NM
from jaxcomp.trace.ranges import Range
from tests.activations.platforms import PLATFORMS, run_as_on
from tests.kernels.images import by_numpy
from tests.marks import quick
from tests.trace.models import normal

SYMMETRIC, ASYMMETRIC = Act(8, symmetric=True, range=Dynamic()), Act(8)
ACTS = quick([ASYMMETRIC, SYMMETRIC], ASYMMETRIC)


class Conv(NamedTuple):
    """A convolution over channels-last images along any number of axes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: int = 1
    pad: tuple[int, int] = (1, 1)
    hole: int = 1
    spacing: int = 1
    groups: int = 1

    def __call__(self, p, x):
        n, axes = len(self.x) - 2, "DHW"[5 - len(self.x) :]
        numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        parts = ((self.stride,) * n, (self.pad,) * n, (self.hole,) * n, (self.spacing,) * n)
        return lax.conv_general_dilated(x, p["w"], *parts, numbers, self.groups)

    def by_hand(self, x, w):
        """In float64, window by window."""
        n = x.ndim - 2
        each = ((self.stride,) * n, (self.pad,) * n, (self.spacing,) * n, (self.hole,) * n)
        return by_numpy(x, np.moveaxis(w, -1, 0), Window(w.shape[:n], *each, self.groups))


CONVS = {
    "plain": Conv((2, 6, 6, 20), (3, 3, 20, 24)),
    "narrow": Conv((2, 6, 6, 4), (3, 3, 4, 8)),
    "strided": Conv((2, 7, 7, 20), (3, 3, 20, 24), stride=2, pad=(0, 1)),
    "cropped": Conv((2, 7, 7, 20), (3, 3, 20, 24), pad=(-1, 2)),
    "dilated": Conv((2, 7, 7, 4), (3, 3, 4, 8), spacing=2, pad=(2, 2)),
    "transposed": Conv((2, 5, 5, 4), (3, 3, 4, 8), hole=2, pad=(2, 1)),
    "grouped": Conv((2, 6, 6, 16), (3, 3, 4, 8), groups=4),
    "depthwise": Conv((2, 6, 6, 8), (3, 3, 1, 8), groups=8),
    "sums beyond 2**24": Conv((1, 4, 4, 128), (3, 3, 128, 3)),
    "one axis": Conv((2, 29, 20), (9, 20, 18), pad=(4, 4)),
    "one axis, narrow, strided, transposed": Conv((2, 30, 5), (4, 5, 6), hole=3, stride=2, pad=(2, 3)),
    "one axis, depthwise": Conv((2, 30, 8), (5, 1, 8), pad=(2, 2), groups=8),
    "three axes": Conv((1, 4, 4, 4, 6), (2, 2, 2, 6, 7)),
}
LACKING = {
    "dilated",
    "transposed",
    "grouped",
    "depthwise",
    "one axis, narrow, strided, transposed",
    "one axis, depthwise",
    "three axes",
}
"""What cuDNN has no convolution of integers for."""


def integers(conv, act, seed=1):
    """``(q, tree, ranges, x)``, on integers; the ranges clip a little, and zero is no code in the middle."""
    w, x = normal(seed, *conv.w), normal(seed + 1, *conv.x) + 0.5
    t = jc.quantize(jc.Int(8), per=jc.Channels(-1), where=jc.core.everything)
    ranges = {"w": Range(jnp.float32(-1.5), jnp.float32(3.0))} if act.needs_range else None
    return quantize_function(conv, {"w": act}, integer=True), jc.pack(t.apply(t.init({"w": w}), {"w": w})), ranges, x


def lowered(fn, *args):
    """The program in StableHLO, traced once, for each platform."""
    traced = jax.jit(fn).trace(*args)
    return [traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS]


CONVOLUTION = re.compile(r"(%\w+) = stablehlo\.convolution\(.* : \(tensor<[\dx]*x(\w+)>, .*\) -> tensor<[\dx]*x(\w+)>")


def convolutions(text):
    """``(from type, to type, what reads the result)`` of each convolution in a program."""
    found = []
    for function in text.split("func.func"):
        lines = [line.strip() for line in function.splitlines()]
        for result, kind, into in CONVOLUTION.findall(function):
            users = [line for line in lines if re.search(rf"{result}\b", line) and not line.startswith(f"{result} =")]
            found.append((kind, into, tuple(line.split("= ")[-1].split()[0] for line in users)))
    return found


@pytest.mark.parametrize("name", quick(CONVS, "narrow", "transposed", "depthwise", "sums beyond 2**24", "one axis"))
@pytest.mark.parametrize("act", ACTS, ids=["asymmetric", "symmetric"])
def test_what_is_lowered_for_each_platform(name, act):
    q, tree, ranges, x = integers(CONVS[name], act)
    for platform, text in zip(PLATFORMS, lowered(q, tree, ranges, x), strict=True):
        if platform == "cpu" and "depthwise" in name:
            assert not convolutions(text)  # shifted images are summed
            continue
        ((kind, into, users),) = convolutions(text)
        if platform == "cuda" and name in LACKING:
            assert (kind, into) == ("bf16", "f32")
        else:
            assert (kind, into) == ("i8", "i32")
            if platform == "cuda":
                assert users == ("stablehlo.convert",)


def test_narrow_convolutions_are_widened_for_the_cpu_alone():
    q, tree, ranges, x = integers(CONVS["narrow"], ASYMMETRIC)
    wide = ["3x3x4x32xi8" in text for text in lowered(q, tree, ranges, x)]
    assert wide == [True, False, False]


@pytest.mark.parametrize(
    "name", quick(CONVS, "plain", "grouped", "sums beyond 2**24", "one axis, narrow, strided, transposed")
)
@pytest.mark.parametrize("act", ACTS, ids=["asymmetric", "symmetric"])
def test_all_forms_are_the_sum_over_codes(name, act, monkeypatch):
    conv = CONVS[name]
    q, tree, ranges, x = integers(conv, act)
    results = []
    for platform in PLATFORMS:
        run_as_on(platform, monkeypatch)
        results.append(np.asarray(jax.jit(q)(tree, ranges, x)))
    values = np.asarray(x, np.float64)
    if act.needs_range:
        scale = 4.5 / 255
        zero = np.round(1.5 / scale)
        values = (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale
    else:
        scale = np.abs(np.asarray(x)).max() / np.float32(127.5)
        steps = np.asarray(x) / scale  # in float32, where a half may lie elsewhere
        values = np.clip(np.round(steps), -128, 127).astype(np.float64) * np.float64(scale)
    wanted = conv.by_hand(values, np.asarray(tree["w"].materialize(), np.float64))
    for found in results:
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    if name != "sums beyond 2**24":  # below, float32 holds every sum
        np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_zero_points_of_images_are_taken_off_on_each_platform(monkeypatch):
    conv = CONVS["strided"]
    q, tree, _, x = integers(conv, Act(8, range=Dynamic(), per=jc.core.Tokens()))
    x = x * jnp.asarray([1.0, 5.0])[:, None, None, None]
    results = []
    for platform in PLATFORMS:
        run_as_on(platform, monkeypatch)
        results.append(jax.jit(q)(tree, None, x))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_float8_is_convolved_in_bfloat16_on_cuda():
    conv = CONVS["plain"]
    p = {"w": normal(1, *conv.w).astype("float8_e4m3fn")}

    def fn(p, x):
        return conv({"w": p["w"].astype(x.dtype)}, x)

    q = quantize_function(fn, {".*": Float8()}, integer=True)
    kinds = [convolutions(text)[0][:2] for text in lowered(q, p, None, normal(2, *conv.x))]
    assert kinds == [("f8E4M3FN", "f32"), ("bf16", "f32"), ("f8E4M3FN", "f32")]


def test_gradients_are_convolved_on_integers_where_the_backend_can():
    conv = CONVS["strided"]
    q = quantize_function(conv, {".*": SYMMETRIC}, backward=Backward(8, stochastic=False))
    run = jax.grad(lambda p, x: jnp.sum(q(p, None, None, x) ** 2), argnums=(0, 1))
    p, x = {"w": normal(1, *conv.w)}, normal(2, *conv.x)
    cpu, cuda, tpu = (sorted(found[:2] for found in convolutions(text)) for text in lowered(run, p, x))
    assert cpu == [("f32", "f32")] * 3
    assert cuda == [("bf16", "f32")] * 2 + [("f32", "f32")]
    assert tpu == [("f32", "f32")] + [("i8", "i32")] * 2


W = normal(1, 64, 32)
CODES = jnp.zeros((64, 32), jnp.uint8)
MADE_ONCE = {
    "packed": (lambda v: pack_bits(v, 4), CODES),
    "words": (lambda v: unpack_bits(v, 3, 2048), jnp.zeros(768, jnp.uint8)),
    "N:M along the last axis": (lambda v: n_m_mask(v, NM(2, 4, axis=1)), W),
    "fake": (
        lambda v: quantize_function(lambda p, x: x @ p, {".*": Act(8, symmetric=True, range=Dynamic())})(v, None, v.T),
        W,
    ),
}


@pytest.mark.parametrize("name", MADE_ONCE)
def test_barriers_are_for_the_cpu_alone(name):
    fn, x = MADE_ONCE[name]
    counts = [text.count("optimization_barrier") for text in lowered(fn, x)]
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_a_mask_along_another_axis_takes_one_pass_on_accelerators():
    counts = [text.count("stablehlo.reduce") for text in lowered(lambda v: n_m_mask(v, NM(2, 4, axis=0)), W)]
    assert counts == [1, 0, 0]


def test_one_export_for_all_platforms_runs_here():
    q, tree, ranges, x = integers(CONVS["narrow"], ASYMMETRIC)
    exported = jax.export.export(jax.jit(q), platforms=PLATFORMS)(tree, ranges, x)
    np.testing.assert_array_equal(exported.call(tree, ranges, x), jax.jit(q)(tree, ranges, x))


@pytest.mark.parametrize("name", quick(["narrow", "depthwise", "one axis"], "narrow"))
def test_forms_compose_with_grad_vmap_scan_and_remat(name):
    q, tree, ranges, x = integers(CONVS[name], Act(8, range=LSQ()))
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(q(tree, ranges, x))))

    @jax.jit
    def all_ways(x):
        each = jax.vmap(slope)(x[:, None])[:, 0]
        _, scanned = lax.scan(lambda c, row: (c, slope(row[None])[0]), 0, x)
        again = jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(q(tree, ranges, x)))))(x)
        return slope(x), each, scanned, again

    wanted, *others = all_ways(x)
    for found in others:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_made_once_is_the_value_with_its_gradient():
    x = normal(1, 5)
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(made_once(jnp.sin(x)) ** 2))(x), jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2))(x)
    )
