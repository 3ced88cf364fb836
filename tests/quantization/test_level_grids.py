"""The tables of levels against ml_dtypes, the normal distribution and the papers' own numbers; what specs refuse."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

import jaxcomp as jc
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2, Levels
from jaxcomp.quantization.microscaling import E8M0, Blocked

# Every minifloat that ml_dtypes has: formats without infinities reserve NaN's code or none; those whose NaN is -0's
# code ("fnuz") reserve none of the magnitudes.
FORMATS = {
    "float4_e2m1fn": E2M1,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2,
    "float8_e3m4": jc.Float(3, 4, reserved=16),
    "float8_e4m3": jc.Float(4, 3, reserved=8),
    "float8_e4m3fnuz": jc.Float(4, 3, bias=8),
    "float8_e5m2fnuz": jc.Float(5, 2, bias=16),
    "float8_e4m3b11fnuz": jc.Float(4, 3, bias=11),
}


def all_codes(name: str) -> np.ndarray:
    """Every bit pattern of a format, as float64."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = ml_dtypes.finfo(dtype).bits
    return np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_a_minifloat_has_the_values_of_ml_dtypes(name) -> None:
    values = all_codes(name)
    want = np.unique(values[np.isfinite(values)])
    assert FORMATS[name].levels == tuple(want.tolist())
    assert FORMATS[name].top == want.max()


def test_nf4_is_derived_from_the_normal_distribution() -> None:
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(jc.quantization.NF4().levels, want, atol=1e-6)


def test_additive_powers_are_those_of_the_paper() -> None:
    assert jc.quantization.APoT(2).levels == (-1.0, 0.0, 1.0)
    assert jc.quantization.APoT(3).levels == (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    # Five bits, two terms of two bits (the paper's figure 1): p0 in {0, 1, 1/4, 1/16}, p1 in {0, 1/2, 1/8, 1/32}.
    sums = {a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)}
    np.testing.assert_allclose(jc.quantization.APoT(5).levels[15:], np.sort(list(sums)) / 1.5)
    for bits in range(2, 9):
        assert len(jc.quantization.APoT(bits).levels) == 2**bits - 1  # no two sums are equal
        assert jc.quantization.APoT(bits).levels[-1] == 1


@pytest.mark.parametrize("bits", range(2, 7))
def test_powers_of_two_are_that(bits) -> None:
    levels = np.array(jc.quantization.PoT(bits).levels)
    assert len(levels) == 2**bits - 1
    assert (levels == -levels[::-1]).all()
    assert (np.frexp(levels[levels > 0])[0] == 0.5).all()


def test_zero_has_its_code() -> None:
    tables = jc.quantization.NF4(), jc.quantization.PoT(4), jc.quantization.APoT(3), Levels((-1.0, -0.5, 0.0, 2.0))
    for grid in (*FORMATS.values(), *tables, jc.Int(4), jc.Int(1, symmetric=False), jc.Log(3)):
        stored, _ = grid.stored(jnp.zeros(1, jnp.float32))
        assert stored.tolist() == [grid.code_of_zero], grid
        assert np.asarray(grid.loaded(stored, jnp.dtype("float32"))).tolist() == [0], grid


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: jc.Float(0, 3),
            ValueError,
            "exponent and mantissa take at least a bit each and 7 together, got 0 and",
        ),
        (
            lambda: jc.Float(5, 3),
            ValueError,
            "exponent and mantissa take at least a bit each and 7 together, got 5 and",
        ),
        (lambda: jc.Float(2, 1, reserved=7), ValueError, r"Float: reserved must be in 0\.\.6, got 7"),
        (lambda: jc.Float(2, 1, bias=99), ValueError, r"Float: bias must be in -64\.\.64, got 99"),
        (lambda: jc.quantization.PoT(7), ValueError, r"PoT: bits must be an integer in 2\.\.6, got 7"),
        (lambda: Levels((1.0,)), ValueError, "Levels: wants 2 to 256 finite values"),
        (lambda: Levels((0.0, float("nan"))), ValueError, "Levels: wants 2 to 256 finite values"),
        (lambda: Levels((1.0, 1.0)), ValueError, "Levels: values must ascend"),
        (lambda: Levels((0.0, 1.0, 1 + 1e-12)), ValueError, "Levels: values must ascend, as float32 too"),
        (lambda: Levels((0.0, 1e-45)), ValueError, "Levels: values must be 0 or normal float32 numbers"),
        (lambda: Levels((0.0, 1e300)), ValueError, "Levels: values must be 0 or normal float32 numbers"),
        (lambda: jc.Float(4, 3, 1.5), ValueError, "Float: reserved must be an integer, got 1.5"),
        (lambda: jc.Float(2, True), ValueError, "Float: mantissa must be an integer, got True"),
        (lambda: Blocked(jc.Log(4), E8M0()), TypeError, "Blocked: wants a grid such as E2M1 and scales"),
        (lambda: Blocked(jc.Int(8, symmetric=False), E8M0()), ValueError, "Blocked: an Int grid must be symmetric"),
        (lambda: Blocked(jc.Int(1), E8M0()), ValueError, "Blocked: an Int grid must be symmetric, of two bits or more"),
        (lambda: Blocked(E2M1, jc.Int(8)), TypeError, "Blocked: wants a grid"),
    ],
)
def test_specs_refuse(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
