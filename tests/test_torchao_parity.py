"""MX and NVFP4 blocks equal to those of torchao, where it is installed (the benchmarks extra); compared with 0.18.0."""

from __future__ import annotations

import warnings
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2
from jaxcomp.quantization.microscaling import E8M0, Blocked

torch = pytest.importorskip("torch")
with warnings.catch_warnings():  # of what torchao would like to have besides
    warnings.simplefilter("ignore")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")

Mode = mx.ScaleCalculationMode
ELEMENTS = {
    "MXFP8 E4M3": (E4M3, torch.float8_e4m3fn),
    "MXFP8 E5M2": (E5M2, torch.float8_e5m2),
    "MXFP6 E3M2": (E3M2, mx.DTYPE_FP6_E3M2),
    "MXFP6 E2M3": (E2M3, mx.DTYPE_FP6_E2M3),
    "MXFP4": (E2M1, torch.float4_e2m1fn_x2),
}


def blocks_of(size: int) -> np.ndarray:
    """Blocks, a row each: random ones, zeros, one value, powers of two and their neighbours, fine steps of a binade."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(64, size)).astype(np.float32)
    wide = normal * np.exp2(rng.integers(-12, 12, normal.shape)).astype(np.float32)
    scaled = np.concatenate([normal, wide]) * np.exp2(rng.integers(-40, 60, (128, 1))).astype(np.float32)
    ones = np.exp2(np.arange(-40.0, 40.0)).astype(np.float32)
    largest = np.concatenate([ones, np.nextafter(ones, 0), np.nextafter(ones, np.inf), ones * 1.75, ones * 1.5])
    edge = rng.uniform(-0.99, 0.99, (largest.size, size)).astype(np.float32) * largest[:, None]
    edge[:, 3] = -largest
    single = np.zeros((largest.size, size), np.float32)
    single[:, 5] = largest
    steps = np.arange(2 * 63 * (size - 1)).reshape(-1, size - 1) / 2.0**11  # the ties of every binade are among them
    steps = [np.pad(steps / shift, ((0, 0), (1, 0)), constant_values=1.9990234375) for shift in (4, 2**8, 2**16)]
    return np.concatenate([scaled, np.zeros((2, size)), edge, single, -single, *steps]).astype(np.float32)


USUAL = blocks_of(32)
SOME = np.abs(USUAL).max(1) > 0  # of a block of zeros the scale is free
HUGE = USUAL[:128] / np.abs(USUAL[:128]).max(1, keepdims=True)
HUGE = np.concatenate([HUGE * np.float32(s) for s in (2.0**126, 2.0**127, 3e38)])
EXPONENTS = np.arange(-126, -26)  # of the largest magnitude
TINY = np.random.default_rng(1).uniform(-1, 1, (100, 32)).astype(np.float32)
TINY[:, 0] = 1.5
TINY = np.ldexp(TINY, EXPONENTS[:, None]).astype(np.float32)
ROWS = np.concatenate([USUAL, HUGE, TINY])
PARTS = {"usual": slice(0, len(USUAL)), "huge": slice(len(USUAL), -len(TINY)), "tiny": slice(-len(TINY), None)}


def ours(transform, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and the blocks' scale codes; blocks lie along axis 0."""
    leaf = jc.pack(transform.apply((), {"kernel": jnp.asarray(rows.T)}))["kernel"]
    return np.asarray(leaf.materialize()).T, np.asarray(leaf.scale.codes).reshape(-1)


@cache
def our_mx(name: str) -> tuple[np.ndarray, np.ndarray]:
    return ours(jc.recipes.mx(ELEMENTS[name][0]), ROWS)


def their_mx(name: str, mode) -> tuple[np.ndarray, np.ndarray]:
    leaf = mx.MXTensor.to_mx(torch.from_numpy(ROWS), ELEMENTS[name][1], 32, mode)
    return leaf.dequantize(torch.float32).numpy(), leaf.scale.view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("part", ["usual", "huge"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_torchaos_floor_mode(name, part) -> None:
    (got, scales), (want, codes) = (
        [x[PARTS[part]] for x in pair] for pair in (our_mx(name), their_mx(name, Mode.FLOOR))
    )
    np.testing.assert_array_equal(got, want)
    some = SOME if part == "usual" else slice(None)
    np.testing.assert_array_equal(scales[some], codes[some])


@pytest.mark.parametrize("name", ELEMENTS)
def test_tiny_blocks_stop_at_our_smallest_scale(name) -> None:
    """torchao's scales go on to 2**-127, ours to 2**-100: smaller blocks count in the least level times that."""
    element = ELEMENTS[name][0]
    (got, scales), (want, codes) = (
        [x[PARTS["tiny"]] for x in pair] for pair in (our_mx(name), their_mx(name, Mode.FLOOR))
    )
    reached = EXPONENTS - Blocked(element, E8M0()).top_exponent >= -100
    np.testing.assert_array_equal(scales[reached], codes[reached])
    np.testing.assert_array_equal(got[reached], want[reached])
    assert (scales[~reached] == 27).all()
    spacing = np.maximum(2.0**-100 * element.magnitudes[1], 2.0**-element.mantissa * np.abs(TINY[~reached]))
    assert (np.abs(got[~reached] - TINY[~reached]) <= spacing / 2).all()


@pytest.mark.parametrize("mode", [Mode.RCEIL, Mode.EVEN, Mode.CEIL], ids=lambda m: m.name)
def test_other_modes_differ_by_one_power_of_two_at_most(mode) -> None:
    """They never or seldom saturate; the specification's 6.3, and so ours, is FLOOR."""
    for name in ELEMENTS:
        step = their_mx(name, mode)[1][PARTS["usual"]].astype(int) - our_mx(name)[1][PARTS["usual"]]
        assert set(step[SOME]) == {0, 1}


def nvfp4(rows: np.ndarray, outer: float | None) -> tuple[np.ndarray, np.ndarray]:
    scale = None if outer is None else torch.tensor(outer, dtype=torch.float32)
    leaf = nv.NVFP4Tensor.to_nvfp4(torch.from_numpy(rows), per_tensor_scale=scale)
    return leaf.dequantize(torch.float32).numpy(), leaf.scale.view(torch.uint8).numpy().reshape(-1)


def test_nvfp4_is_torchaos_two_levels() -> None:
    """Ours finds the outer scale itself: torchao's of the leaf's largest magnitude."""
    for seed, spread in ((0, 1), (1, 3)):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(512, 16)) * np.exp2(rng.uniform(-spread, spread, (512, 1)))
        rows = rows.astype(np.float32)
        outer = nv.per_tensor_amax_to_scale(torch.from_numpy(rows).abs().max()).item()
        got, scales = ours(jc.recipes.nvfp4(), rows)
        want, codes = nvfp4(rows, outer)
        np.testing.assert_array_equal(scales, codes)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_nvfp4_is_torchaos_single_level_where_the_outer_scale_is_one() -> None:
    rows = np.clip(blocks_of(16), -2688, 2688)
    rows = rows[np.abs(rows).max(1) >= 6 * 2.0**-6]
    rows[0, 0] = 2688.0
    got, scales = ours(jc.recipes.nvfp4(), rows)
    for outer in (None, 1.0):
        want, codes = nvfp4(rows, outer)
        np.testing.assert_array_equal(scales, codes)
        np.testing.assert_array_equal(got, want)


def test_small_nvfp4_blocks_are_finer_than_torchaos() -> None:
    """Its least block scale is E4M3's least normal number, 2**-6; ours is the least subnormal one, 2**-9."""
    rows = np.zeros((4, 16), np.float32)
    rows[:, 0] = [2688.0, 6 * 2.0**-6, 6 * 2.0**-8, 6 * 2.0**-12]
    got, scales = ours(jc.recipes.nvfp4(), rows)
    want, codes = nvfp4(rows, 1.0)
    assert scales.tolist() == [0x7E, 0x08, 0x02, 0x01]
    assert codes.tolist() == [0x7E, 0x08, 0x08, 0x08]
    assert got[:, 0].tolist() == [2688.0, 6 * 2.0**-6, 6 * 2.0**-8, 2.0**-9]  # 3/4 is a tie
    assert want[:, 0].tolist() == [2688.0, 6 * 2.0**-6, 1.5 * 2.0**-6, 0.0]
