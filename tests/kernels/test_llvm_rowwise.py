"""Functions of rows in LLVM code beside numpy in float64: passes, what lives from one to the next, ends of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from jaxcomp.kernels.llvm_calls import features
from jaxcomp.kernels.llvm_pointwise import WIDE
from jaxcomp.kernels.row_passes import Passes
from jaxcomp.trace.pointwise import Step
from tests.kernels.rowwise import by_llvm
from tests.marks import quick
from tests.trace.rowwise import Rows, by_numpy, drawn, hiding, read

pytest.importorskip("llvmlite")
special = pytest.importorskip("scipy.special")
pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.fixture
def jax_defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=[8, WIDE])
def lanes(request) -> int:
    """Numbers of a vector."""
    if request.param == WIDE and "avx512f" not in features():
        pytest.skip("the processor has no AVX-512")
    return request.param


def softmax_twice(x: jax.Array) -> jax.Array:
    """A row lives across all its passes."""
    return nn.softmax(nn.softmax(x) * 5.0 + x) * x


def standardized(x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-3)


def masked(x: jax.Array, mask: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
    return nn.softmax(jnp.where(mask, x * scale + bias, -jnp.inf)) * bias


def above_the_mean(x: jax.Array) -> jax.Array:
    """Values of two passes meet in a third."""
    kept = jnp.where(x > x.mean(-1, keepdims=True), x, -1e9)
    return nn.softmax(kept) + jnp.exp(x - x.max(-1, keepdims=True))


def normed(x: jax.Array) -> jax.Array:
    """A sum that is not of one sign, and numbers of the row that stand alone."""
    return (x / jnp.abs(x).max(-1, keepdims=True)) * x.sum(-1, keepdims=True) + jnp.exp(x.max(-1, keepdims=True))


def truths_that_live(x: jax.Array) -> jax.Array:
    """What is found in one pass decides in another."""
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return jnp.where(x > 0, e / e.sum(-1, keepdims=True), e)


def on_a_grid_of_its_own(x: jax.Array) -> jax.Array:
    low, high = (f(x, -1, keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.round((x - low) / (high - low) * 15)


FUNCTIONS = {
    "on a grid of its own": (on_a_grid_of_its_own, ()),
    "softmax": (nn.softmax, ()),
    "standardized": (standardized, ()),
    "softmax twice": (softmax_twice, ()),
    "masked": (masked, (hiding(6, 19), drawn(1, 19), drawn(6, 1))),
    "above the mean": (above_the_mean, ()),
    "normed": (normed, ()),
    "truths that live": (truths_that_live, ()),
}


def function(name: str) -> Rows:
    fn, others = FUNCTIONS[name]
    found = read(fn, jnp.zeros((6, 19)), *others)
    assert found is not None
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(lanes, name) -> None:
    x = 2 * np.asarray(drawn(6, 19, seed=1))
    rows = function(name)
    np.testing.assert_allclose(by_llvm(rows, lanes, x), by_numpy(rows, x), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("name", quick(["masked", "softmax twice", "standardized"], "masked"))
def test_several_rows_at_once(name, together) -> None:
    x = 2 * np.asarray(drawn(6, 19, seed=2))
    rows = function(name)
    np.testing.assert_allclose(by_llvm(rows, 8, x, together), by_numpy(rows, x), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("length", quick([1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40], 1, 7, 8, 17))
def test_lengths(lanes, length) -> None:
    """What lies beyond a row is no part of it."""
    x = np.asarray(drawn(3, length)) - 5  # sums and maxima that 0 would be seen in
    rows = function("softmax twice")._replace(shape=x.shape)
    np.testing.assert_allclose(by_llvm(rows, lanes, x), by_numpy(rows, x), rtol=2e-5, atol=1e-6)


def test_what_is_no_number(lanes) -> None:
    """As in JAX: NaN is all of its row's, and a row of nothing but minus infinity is."""
    x = np.array(drawn(6, 19))
    x[0, 3], x[1, 17], x[2] = np.nan, np.nan, -np.inf
    x[3, 2], x[3, 18] = -np.inf, -np.inf
    x[4, 5], x[5, :18] = np.inf, -np.inf
    got = by_llvm(function("softmax"), lanes, x)
    with np.errstate(invalid="ignore"):
        exact = special.softmax(x.astype(np.float64), -1)
    assert np.isnan(exact).all(-1).tolist() == [True, True, True, False, True, False]
    np.testing.assert_allclose(got, exact, rtol=2e-5)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(np.asarray(nn.softmax(jnp.asarray(x)))))


def test_the_extremes_of_what_is_no_number_are_none(lanes) -> None:
    x = np.array(drawn(6, 19))
    x[range(5), [0, 7, 8, 15, 18]] = np.nan
    for name in ("max", "min"):
        rows = read(lambda x, name=name: x - getattr(x, name)(-1, keepdims=True), jnp.zeros((6, 19)))
        assert rows is not None
        np.testing.assert_allclose(by_llvm(rows, lanes, x), x - getattr(x, name)(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e30])
def test_spreads(lanes, size) -> None:
    """What is far below the largest is 0."""
    x = size * np.asarray(drawn(6, 19))
    x[0], x[1] = size, -size
    x[2] = -np.arange(19.0) * size
    got, exact = by_llvm(function("softmax"), lanes, x), special.softmax(x.astype(np.float64), -1)
    np.testing.assert_allclose(got, exact, rtol=2e-5, atol=1e-36)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("x", [-80.0, 80.0])
def test_sums_near_the_ends_of_floats(lanes, x) -> None:
    """Of exponentials that are not shifted."""
    rows = read(lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), jnp.zeros((6, 3)))
    assert rows is not None
    np.testing.assert_allclose(by_llvm(rows, lanes, np.full((6, 3), x)), np.full((6, 3), 1 / 3), rtol=2e-5)


SOFTMAX = (
    Step("reduce_max", (0,)),
    Step("sub", (0, 1)),
    Step("exp", (2,)),
    Step("reduce_sum", (3,)),
    Step("div", (3, 4)),
)


@pytest.mark.parametrize(
    ("more", "varying", "kept", "slots"),
    [
        ((), [], [[], [3], [5]], 1),
        ((Step("mul", (5, 0)),), [True], [[], [3], [6]], 2),
        ((Step("reduce_sum", (5,)), Step("div", (5, 6))), [False, True], [[], [3], [5], [7]], 1),
        (
            (Step("reduce_max", (5,)), Step("add", (6, 4)), Step("mul", (3, 7))),
            [False, False, True],
            [[], [3], [], [8]],
            1,
        ),
        (
            (Step("reduce_max", (5,)), Step("sub", (3, 6)), Step("mul", (7, 5)), Step("add", (8, 0))),
            [False, True, True, True],
            [[], [3], [5], [9]],
            3,
        ),
    ],
    ids=["softmax", "times the row", "once more", "an earlier one again", "three at once"],
)
def test_what_lives_across_passes(more, varying, kept, slots) -> None:
    steps = SOFTMAX + more
    passes = Passes(steps, [True, False, True, True, False, True, *varying])
    assert passes.count == len(kept)
    assert [passes.kept(at) for at in range(passes.count)] == kept
    assert passes.slots == slots
    (last,) = kept[-1]
    assert passes.result == passes.slot(last, passes.count)
    assert passes.slot(0, 0) == 0
    assert [sorted(found) for found in passes.sums][:2] == [[1], [4]]


def test_exponentials_of_what_falls_are_known() -> None:
    passes = Passes(SOFTMAX, [True, False, True, True, False, True])
    assert passes.falls(2)
    assert not any(passes.falls(i) for i in (0, 1, 3, 5))
    floor = (Step("reduce_max", (0,)), Step("constant", (), -np.inf), Step("max", (2, 1)), Step("sub", (0, 3)))
    assert Passes(floor, [True, False, False, False, True]).falls(4)
    other = (Step("mul", (0, 0)), Step("reduce_max", (1,)), Step("sub", (0, 2)))
    assert not Passes(other, [True, True, False, True]).falls(3)
