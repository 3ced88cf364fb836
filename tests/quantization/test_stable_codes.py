"""Codes that the last bit of a weight and its unit do not change: what halves, a block's extremes first, become."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.activations import Dynamic
from jaxcomp.activations.fake import Entry, encode
from jaxcomp.quantization import NF4, APoT, Blocked, Fixed, Log, PoT, Stochastic
from jaxcomp.quantization.level_grids import E2M1, E4M3, E5M2
from jaxcomp.quantization.numerics.rounding import hair, nearest, round_with
from jaxcomp.trace.ranges import Range
from tests.benchmarks.int_conventions import table
from tests.marks import quick

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WIDTHS = st.integers(2, 8)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 5))


@cache
def quantizer(bits: int, **fields):
    t = jc.quantize(jc.Int(bits, **fields), per=jc.Channels(-1))
    return jax.jit(lambda w: t.apply((), {"kernel": w})["kernel"].codes)


def codes(w: np.ndarray, bits: int, **fields) -> np.ndarray:
    return np.asarray(quantizer(bits, **fields)(jnp.asarray(w)))


def doubled_steps(w: np.ndarray, bits: int) -> np.ndarray:
    """``2 |w| / scale`` of the written equation; halves are its odd integers, exact at them."""
    exact = np.abs(w.astype(np.longdouble))
    return (2**bits - 1) * exact / np.maximum(exact.max(0), np.finfo(np.longdouble).tiny)


def oracle(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes, halves towards zero, and which are no more than 2**-19 of themselves above a half."""
    doubled = doubled_steps(w, bits)
    magnitude = np.minimum(np.ceil((doubled - 1) / 2), 2 ** (bits - 1) - 1)
    below = 2 * np.floor((doubled - 1) / 2) + 1
    above = (doubled > below) & (doubled <= below * (1 + 2.0**-19))
    return np.where(w < 0, -magnitude, magnitude).astype(np.float64), above


def numbers(dtype: str, shape=shapes):
    """Weights with few digits, which meet halves, and with all of them."""
    some = st.integers(-127, 127).map(float) | st.floats(-1, 1, width=16) | st.floats(-1e3, 1e3, width=32)
    return hnp.arrays(np.float64, shape, elements=some).map(lambda w: w.astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), bits=WIDTHS)
def test_fault_2_codes_are_the_quotients_and_halves_go_towards_zero(dtype, data, bits) -> None:
    w = data.draw(numbers(dtype))
    w = np.where(np.abs(w.astype(np.float64)) < 1e-30, np.zeros_like(w), w)
    want, above = oracle(w, bits)
    np.testing.assert_array_equal(codes(w, bits)[~above], want[~above])
    np.testing.assert_array_equal(codes(-w, bits), -codes(w, bits))


@given(data=st.data(), bits=WIDTHS, power=st.integers(-30, 30))
def test_fault_2_codes_do_not_depend_on_the_unit(data, bits, power) -> None:
    """Of weights whose products with a small number are exact no code changes; of others those at a half may."""
    few = data.draw(numbers("bfloat16") | numbers("float16")).astype(np.float32)
    few = np.where(np.abs(few) < 2.0**-24, 0, few)
    for factor in (3, 5, 7, 2.0**power, 3 * 2.0**power):
        np.testing.assert_array_equal(codes(few * np.float32(factor), bits), codes(few, bits))
    w = data.draw(numbers("float32"))
    w = np.where(np.abs(w) < 1e-20, 0, w).astype(np.float32)
    for factor in np.float32([3, 10.0 ** (power // 5), np.pi]):
        clear = ~(oracle(w, bits)[1] | oracle(w * factor, bits)[1])
        far = np.abs(doubled_steps(w, bits) / 2 % 1 - 0.5) > 1e-4
        extreme = np.abs(w) == np.abs(w).max(0)
        some = clear & (far | extreme)
        np.testing.assert_array_equal(codes(w * factor, bits)[some], codes(w, bits)[some])


@pytest.mark.parametrize("bits", range(2, 9))
def test_fault_2_extremes_do_not_stand_on_a_tie(bits) -> None:
    """What a step of the last bit did to 12% of the channels at 8 bits, and to 24% at 2."""
    w = np.random.default_rng(bits).normal(size=(64, 512)).astype(np.float32)
    w[np.abs(w).argmax(0), np.arange(512)] *= -np.sign(w[np.abs(w).argmax(0), np.arange(512)])
    first = codes(w, bits)
    extreme = np.abs(w) == np.abs(w).max(0)
    assert (first[extreme] == 1 - 2 ** (bits - 1)).all()
    far = np.abs(doubled_steps(w, bits) / 2 % 1 - 0.5) > 1e-4
    for other in (
        np.nextafter(w, np.float32(np.inf)),
        np.nextafter(w, np.float32(-np.inf)),
        3 * w,
        w * np.float32(0.1),
    ):
        np.testing.assert_array_equal(codes(other, bits)[far | extreme], first[far | extreme])


@pytest.mark.parametrize("bits", quick(range(2, 9), 4, 8))
def test_fault_2_a_range_as_wide_on_both_sides_has_a_stable_zero_point(bits) -> None:
    w = np.random.default_rng(bits).uniform(-1, 1, (64, 128)).astype(np.float32)
    w[0], w[1] = w.max(0), -w.max(0)
    w[2:] *= 0.5
    top = 2**bits - 1
    t = jc.quantize(jc.Int(bits, symmetric=False))
    for factor in np.float32([1, 3, 0.1, 7]):
        leaf = t.apply((), {"kernel": jnp.asarray(w * factor)})["kernel"]
        assert (np.asarray(leaf.zero_point) == (top - 1) / 2).all()
        assert (np.asarray(leaf.codes[:2]) == [[top - 1], [0]]).all()
        steps = w.astype(np.float64) / (2 * w[0].astype(np.float64) / top)
        far = np.abs(steps % 1 - 0.5) > 1e-4
        np.testing.assert_array_equal(np.asarray(leaf.codes)[far], (np.round(steps) + (top - 1) / 2)[far])


@pytest.mark.parametrize("symmetric", [True, False])
def test_fault_2_activations_have_the_codes_of_weights(symmetric) -> None:
    """Dynamic and given ranges, in fake and in integer mode."""
    x = np.random.default_rng(0).uniform(-0.9, 0.9, (8, 32)).astype(np.float32)
    x[0, 0], x[1, 1] = -1, 1
    w = {"kernel": jnp.eye(32)}

    def product(p, x):
        return x @ p["kernel"]

    for bits in (2, 8):
        top = 2 ** (bits - 1) - 1
        zero = 0 if symmetric else top
        low = 0 if symmetric else -top
        for factor in np.float32([1, 3, 0.1]):
            y = jnp.asarray(x * factor)
            ends = Range(jnp.min(y), jnp.max(y))
            dynamic, static = jc.Act(bits, symmetric=symmetric, range=Dynamic()), jc.Act(bits, symmetric=symmetric)
            for act, given_range in ((dynamic, None), (static, ends)):
                coded = encode(y, act, Entry(("batch", "contracted"), given_range))
                assert (np.asarray(coded.numbers)[[0, 1], [0, 1]] == [-top, top]).all()
                assert coded.zero is None or (np.asarray(coded.zero) == zero).all()
                assert low <= np.asarray(coded.numbers).min() + top
                leaf = jc.pack(jc.quantize(jc.Int(8)).apply((), w))
                ranges = {} if given_range is None else {"kernel": ends}
                fake = jc.quantize_function(product, {"kernel": act})(leaf, ranges, y)
                real = jc.quantize_function(product, {"kernel": act}, integer=True)(leaf, ranges, y)
                np.testing.assert_allclose(fake, real, rtol=1e-6, atol=1e-6 * factor)


TABLES = {
    "nf4": NF4(),
    "pot": PoT(4),
    "apot": APoT(4),
    "e4m3": E4M3,
    "e2m1": E2M1,
    "e5m2": E5M2,
    "narrow": jc.Int(4, narrow=True),
}


@pytest.mark.parametrize("name", quick(TABLES, "pot", "e4m3", "narrow"))
def test_fault_2_tables_do_not_depend_on_the_unit_either(name) -> None:
    """Halves between levels: weights of eight bits meet them, and their products with 3 exactly."""
    grid = TABLES[name]
    levels = np.array(getattr(grid, "levels", np.arange(-7, 8)), np.float64)
    w = np.random.default_rng(0).integers(-127, 128, (256, 16)).astype(np.float32)
    w[0] = np.arange(112, 128)
    w = np.clip(w, -w[0], w[0])
    t = jc.quantize(grid, per=jc.Channels(-1))
    apply = jax.jit(lambda w: t.apply((), {"kernel": w})["kernel"].codes)
    first = np.asarray(apply(w))
    for factor in np.float32([3, 5, 2.0**-9, 3 * 2.0**20]):
        np.testing.assert_array_equal(apply(w * factor), first)
    if name != "nf4":
        np.testing.assert_array_equal(apply(-w), -first)
    exact = w.astype(np.longdouble) * levels.max() / np.abs(w).max(0)
    distance = np.abs(exact[..., None] - levels)
    tied = np.isclose(*np.moveaxis(np.sort(distance, -1)[..., :2], -1, 0), rtol=1e-12, atol=0)
    assert name in ("nf4", "apot") or tied.any()
    nearest_zero = np.where(distance <= distance.min(-1, keepdims=True) * (1 + 1e-12), np.abs(levels), np.inf).min(-1)
    np.testing.assert_array_equal(np.abs(first)[tied], nearest_zero[tied].astype(np.float32))


def test_fault_2_microscaling_formats_keep_halves_to_even() -> None:
    """The formats' specification says so; with scales that are powers of two a half is one in any unit."""
    w = np.array([[16.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], np.float32).T
    mx8 = jc.recipes.mx(jc.Int(6, narrow=True), 8).apply((), {"kernel": jnp.asarray(w)})["kernel"]
    assert np.asarray(mx8.codes).ravel().tolist() == [16, 0, 2, 2, 0, -2, -2, 4]
    fp4 = jc.quantize(Blocked(E2M1, jc.quantization.E8M0()), per=jc.Groups(4)).apply(
        (), {"kernel": jnp.asarray([[4.0], [2.5], [-3.5], [5.0]])}
    )
    assert fp4["kernel"].materialize().ravel().tolist() == [4, 2, -4, 4]


@pytest.mark.parametrize("bits", quick(range(2, 9), 2, 8))
@pytest.mark.parametrize("symmetric", [True, False])
def test_fault_2_stochastic_rounding_leaves_what_is_on_the_grid(bits, symmetric) -> None:
    """No hair is taken off there: a value on the grid stays, and the expectation is the value."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    whole = jnp.arange(low, high + 1, dtype=jnp.float32)
    for noise in (0.0, 0.5, 1 - 2.0**-23):
        np.testing.assert_array_equal(round_with(whole, low, high, noise=jnp.full_like(whole, noise)), whole)
    w = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)}
    grid = jc.Int(bits, symmetric=symmetric)
    draws = [
        jc.quantize(grid, rounding=Stochastic(jax.random.key(i))).apply(jax.random.key_data(jax.random.key(i)), w)
        for i in range(3)
    ]
    near = jc.quantize(grid).apply((), w)["kernel"]
    for leaf in (d["kernel"] for d in draws):
        assert np.abs(np.asarray(leaf.codes - near.codes)).max() <= 1
        np.testing.assert_array_equal(leaf.scale, near.scale)


def test_fault_2_the_gradient_is_still_one_everywhere() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)
    for grid in (jc.Int(2), jc.Int(8, symmetric=False), jc.Int(1), E4M3):
        t = jc.quantize(grid)
        g = jax.grad(lambda p, t=t: jc.materialize(t.apply((), p))["kernel"].sum())({"kernel": w})["kernel"]
        np.testing.assert_allclose(g, np.ones_like(g), rtol=3e-7)


@pytest.mark.parametrize("grid", [jc.Int(3), jc.Int(8, symmetric=False), Log(8)], ids=["int", "asymmetric", "log"])
def test_fault_2_jit_gives_what_eager_gives(grid) -> None:
    w = np.random.default_rng(0).integers(-127, 128, (128, 33)).astype(np.float32) / 3
    for rule in (None, Fixed(30.0)) if grid == jc.Int(3) else (None,):
        t = jc.quantize(grid, scale=rule)
        eager = t.apply((), {"kernel": jnp.asarray(w)})["kernel"]
        jitted = jax.jit(partial(t.apply, ()))({"kernel": jnp.asarray(w)})["kernel"]
        np.testing.assert_array_equal(eager.codes, jitted.codes)
        np.testing.assert_array_equal(eager.scale, jitted.scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
def test_fault_2_a_learned_step_has_the_same_halves(dtype) -> None:
    """Also where a loop has cast its parameters to a narrow type: codes are computed in float32."""
    latent = jnp.array([[0.5, 1.5, -0.5, -1.5, 100.5, -127.5, 126.5, 3.0]], jnp.float32)
    for step in (1.0, 0.25, 4.0):
        leaf = jc.quantization.learned({"kernel": latent * step}, jc.Int(8), per=jc.Tensor())["kernel"]
        leaf = leaf.with_fields({"scale": jnp.full((1, 1), step, dtype)})
        assert leaf.quantized().codes.tolist() == [[0, 1, 0, -1, 100, -127, 126, 3]]
        grads = jax.grad(lambda leaf: leaf.materialize().sum())(leaf)
        assert grads.scale.dtype == dtype
        assert grads.latent.tolist() == [[1] * 8]
        assert (jc.pack(leaf).materialize() == leaf.materialize()).all()


def test_fault_2_the_error_is_no_more_than_with_halves_to_even() -> None:
    """And the table of docs/quantization.md: symmetric grids on three distributions beside other conventions."""
    for name, errors in table().items():
        assert errors["ours"] <= errors["halves to even"] * (1 + 1e-6), name
        assert errors["ours"] < errors["absmax, narrow"], name


def test_the_hair_is_wider_than_the_errors_of_a_quotient() -> None:
    """The scale, its reciprocal and the two products are rounded once each, half a unit in the last place at most."""
    eps = float(jnp.finfo(jnp.float32).eps)
    assert 1 - hair(jnp.dtype("float32")) > 2 * 4 * (eps / 2)
    assert nearest(jnp.array([127.5, -127.5, 0.5, 1.5])).tolist() == [127, -127, 0, 1]
