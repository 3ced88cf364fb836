"""Codes made of sums where these are: a product, its scale and bias, a function and the rounding behind it in one."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.kernels.llvm_depthwise import llvm_depthwise_sums, refusal
from jaxcomp.kernels.llvm_dots import llvm_panel_floats
from jaxcomp.kernels.llvm_panels import llvm_panel_sums, refusal_of_codes
from jaxcomp.kernels.llvm_results import Requantized
from jaxcomp.kernels.panels import PanelWeight, panel_codes
from jaxcomp.kernels.windows import Window
from jaxcomp.quantization.numerics.rounding import hair
from tests.kernels.images import by_numpy
from tests.trace.pointwise import by_jax, read

pytest.importorskip("llvmlite")
runs_here = pytest.mark.skipif(bool(refusal_of_codes() or refusal((9, 1, 16), 16)), reason=str(refusal_of_codes()))
RELU6, GELU = read(jax.nn.relu6), read(jax.nn.gelu)


def window(kernel, stride=1, pad=0, groups=1):
    ones = (1,) * len(kernel)
    return Window(kernel, (stride,) * len(kernel), ((pad, pad),) * len(kernel), ones, ones, groups)


def grid_of(features, then, *, symmetric=False, seed=0) -> Requantized:
    """Sums of some thousands become numbers of a few units."""
    rng = np.random.default_rng(seed)
    scale = jnp.asarray(rng.uniform(1e-4, 1e-3, features), jnp.float32)
    bias = jnp.asarray(rng.normal(size=features), jnp.float32)
    zero, codes, shift = (0.0, (-128, 127), 0) if symmetric else (77.0, (0, 255), 128)
    step = jnp.float32(0.03)
    one = lambda v: jnp.full((1, 1), v, jnp.float32)  # noqa: E731
    return Requantized(scale, bias, one(zero), one(1.0), one(1 / step), then, codes, shift)


def by_formula(sums: np.ndarray, to: Requantized) -> np.ndarray:
    """In float64 but for the last rounding's hair."""
    low, high = (end - float(to.zero[0, 0]) for end in to.codes)
    y = sums * np.asarray(to.scale, np.float64) + np.asarray(to.bias, np.float64)
    y = np.asarray(by_jax(to.then, y), np.float64) * float(to.less[0, 0]) * float(to.reciprocal[0, 0])
    return np.clip(y, low, high) * hair(jnp.dtype(jnp.float32)) + float(to.zero[0, 0]) - to.shift


def near(codes: jax.Array, exact: np.ndarray) -> None:
    """Each is the nearest integer, of two as near either."""
    assert codes.dtype == jnp.int8
    assert codes.shape == exact.shape
    assert np.abs(np.asarray(codes, np.float64) - exact).max() <= 0.5 + 1e-4
    assert len(np.unique(codes)) > 8


DENSE = {
    "pixels": (window((1, 1)), (1, 9, 8, 24), 40),
    "pixels that fill tiles": (window((1, 1)), (2, 5, 8, 64), 48),
    "few pixels": (window((1, 1)), (1, 2, 3, 20), 16),
    "three by three": (window((3, 3), pad=1), (2, 6, 7, 20), 33),
    "steps of two": (window((3, 3), 2, 1), (1, 13, 12, 3), 32),
    "more than a thread takes": (window((1, 1)), (1, 16, 17, 16), 150),
}


@runs_here
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", DENSE)
def test_codes_of_a_convolution(processor, name, bits) -> None:
    w, shape, features = DENSE[name]
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, shape)
    kernel = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (features, *w.kernel, shape[-1]))
    flat = jnp.asarray(kernel.reshape(features, -1), jnp.int8)
    panels = PanelWeight(
        panel_codes(flat, bits, shape[-1]),
        jnp.ones((features, 1)),
        flat.sum(-1, dtype=jnp.int32),
        jc.Int(bits),
        math.prod(w.kernel),
        shape[-1],
        features,
        jnp.dtype(jnp.float32),
    )
    to = grid_of(features, RELU6)
    got = jax.jit(partial(llvm_panel_sums, window=w))(jnp.asarray(x, jnp.int8), jnp.asarray([5]), panels, to=to)
    near(got, by_formula(by_numpy(x - 5, kernel, w), to))


@runs_here
@pytest.mark.parametrize("channels", [5, 16, 33])
def test_codes_of_a_depthwise_convolution(processor, channels) -> None:
    w, rng = window((3, 3), 1, 1, channels), np.random.default_rng(2)
    x, kernel = rng.integers(-128, 128, (2, 7, 6, channels)), rng.integers(-128, 128, (channels, 3, 3, 1))
    by_taps = jnp.asarray(kernel.reshape(channels, -1).T, jnp.int8)
    to = grid_of(channels, read(jax.nn.relu), symmetric=True)
    got = jax.jit(partial(llvm_depthwise_sums, window=w))(jnp.asarray(x, jnp.int8), jnp.asarray([-3]), by_taps, to=to)
    near(got, by_formula(by_numpy(x + 3, kernel, w), to))


@runs_here
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [3, 40, 150])
def test_floats_of_a_product(processor, count, bits) -> None:
    """In float32 as written: the bits are the same."""
    rng, features, length = np.random.default_rng(3), 40, 52
    x = rng.integers(-128, 128, (count, length))
    numbers = jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (features, length)), jnp.int8)
    scale, by_row = (rng.uniform(0.01, 1, n).astype(np.float32) for n in (features, count))
    zero = rng.integers(-128, 128, count)
    by_row[1] = np.nan
    panels = PanelWeight(
        panel_codes(numbers, bits, length),
        jnp.asarray(scale[:, None]),
        numbers.sum(-1, dtype=jnp.int32),
        jc.Int(bits),
        1,
        length,
        features,
        jnp.dtype(jnp.float32),
    )
    got = jax.jit(llvm_panel_floats)(
        jnp.asarray(x, jnp.int8), panels, jnp.asarray(by_row), jnp.asarray(zero, jnp.int32)
    )
    sums = (x - zero[:, None]) @ np.asarray(numbers, np.int64).T
    np.testing.assert_array_equal(got, sums.astype(np.float32) * (by_row[:, None] * scale))


@runs_here
@settings(max_examples=12)
@given(st.integers(-128, 127), st.booleans(), st.integers(0, 99), st.sampled_from([(), RELU6, GELU]))
def test_codes_are_within_their_grid(zero, symmetric, seed, then) -> None:
    shape, w = (1, 4, 4, 16), window((1, 1), groups=16)
    x = np.random.default_rng(seed).integers(-128, 128, shape)
    to = grid_of(16, then, symmetric=symmetric, seed=seed)
    ones = jnp.ones((1, 16), jnp.int8)
    got = llvm_depthwise_sums(jnp.asarray(x, jnp.int8), jnp.asarray([zero]), ones, w, to)
    exact = by_formula(x - zero, to)
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        (window((1, 1)), True),
        (window((1,)), True),
        (window((1, 1), 2), False),
        (window((1, 1), pad=1), False),
        (window((1, 3)), False),
        (Window((1,), (1,), ((0, 0),), (3,), (2,), 1), False),
    ],
)
def test_pointwise_windows_are_the_pixels(w, expected) -> None:
    spatial = (5, 4)[: len(w.kernel)]
    sources = w.sources(spatial)
    assert w.pointwise == expected
    assert (sources.shape[1] == 1 and sources[:, 0].tolist() == list(range(math.prod(spatial)))) == expected
