"""Depthwise convolutions of codes: numpy's sums over all kinds of windows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.kernels import llvm_depthwise
from jaxcomp.kernels.llvm_depthwise import TAPS, llvm_depthwise_sums, refusal
from jaxcomp.kernels.windows import Window
from tests.kernels.images import by_numpy
from tests.kernels.test_panels import ZEROS, codes_and_zero
from tests.marks import quick

pytest.importorskip("llvmlite")
runs_here = pytest.mark.skipif(bool(refusal((9, 1, 16), 16)), reason=str(refusal((9, 1, 16), 16)))


def window(kernel, channels, strides=None, padding=None, dilation=None, base=None):
    ones = (1,) * len(kernel)
    return Window(kernel, strides or ones, padding or ((0, 0),) * len(kernel), dilation or ones, base or ones, channels)


SAME = ((1, 1), (1, 1))
CASES = {
    "same": (window((3, 3), 21, padding=SAME), (2, 6, 7, 21)),
    "steps of two": (window((3, 3), 16, (2, 2), ((0, 1), (0, 1))), (1, 8, 8, 16)),
    "few channels": (window((3, 3), 5, padding=SAME), (2, 5, 4, 5)),
    "an even number of elements": (window((2, 2), 33), (1, 4, 5, 33)),
    "one element": (window((1, 1), 17), (2, 3, 3, 17)),
    "dilated": (window((3, 2), 18, padding=((2, 2), (0, 3)), dilation=(2, 3)), (2, 7, 8, 18)),
    "transposed": (window((3, 3), 16, padding=((2, 1), (2, 1)), base=(2, 2)), (2, 4, 5, 16)),
    "cut": (window((3, 3), 19, padding=((-1, 0), (-2, 3))), (2, 7, 8, 19)),
    "an audio signal": (window((5,), 20, (2,), ((4, 0),)), (3, 21, 20)),
    "a volume": (window((2, 3, 2), 16, (1, 2, 1), ((0, 1), (1, 1), (0, 0))), (2, 4, 5, 6, 16)),
    "seven by seven": (window((7, 7), 32, padding=((3, 3), (3, 3))), (1, 9, 8, 32)),
    "more windows than a thread takes": (window((3, 3), 300, padding=SAME), (2, 9, 8, 300)),
}


def kernel_of(w: Window, *, ends: bool = False) -> np.ndarray:
    """``(features, *elements, 1)``."""
    rng, shape = np.random.default_rng(5), (w.groups, *w.kernel, 1)
    return np.full(shape, -128) if ends else rng.integers(-128, 128, shape)


def by_taps(kernel: np.ndarray) -> jax.Array:
    return jnp.asarray(kernel.reshape(len(kernel), -1).T, jnp.int8)


@runs_here
@pytest.mark.parametrize("zero", quick(ZEROS, "one", "one an image"))
@pytest.mark.parametrize("name", CASES)
def test_it_is_numpys_sum(processor, name, zero) -> None:
    w, shape = CASES[name]
    kernel, (x, given, differences) = kernel_of(w), codes_and_zero(shape, zero)
    got = jax.jit(partial(llvm_depthwise_sums, window=w))(x, given, by_taps(kernel))
    assert got.dtype == jnp.int32
    assert got.tolist() == by_numpy(differences, kernel, w).tolist()


@runs_here
@settings(max_examples=25)
@given(st.data(), st.integers(1, 2), st.integers(1, 40), st.sampled_from(ZEROS))
def test_any_windows(data, rank, channels, zero) -> None:
    small = st.integers(1, 3)
    each = [
        data.draw(st.tuples(small, small, st.integers(-1, 3), st.integers(-1, 3), small, small)) for _ in range(rank)
    ]
    kernel, strides, low, high, dilation, base = zip(*each, strict=True)
    w = Window(kernel, strides, tuple(zip(low, high, strict=True)), dilation, base, channels)
    shape = (data.draw(small), *(data.draw(st.integers(1, 6)) for _ in range(rank)), channels)
    if 0 in w.result(shape, channels):
        return  # nothing to sum
    numbers, (x, given, differences) = kernel_of(w), codes_and_zero(shape, zero)
    assert llvm_depthwise_sums(x, given, by_taps(numbers), w).tolist() == by_numpy(differences, numbers, w).tolist()


@runs_here
def test_no_sum_overflows_where_all_are_at_their_ends() -> None:
    w, shape = CASES["seven by seven"]
    x, numbers = np.full(shape, -128), kernel_of(w, ends=True)
    got = llvm_depthwise_sums(jnp.asarray(x, jnp.int8), None, by_taps(numbers), w)
    assert got.tolist() == by_numpy(x.astype(np.float64), numbers, w).tolist()


def test_what_it_does_not_take(monkeypatch) -> None:
    monkeypatch.setattr(llvm_depthwise, "features", lambda: frozenset({"avx2"}))
    assert refusal((9, 1, 16), 16) is None
    assert "a channel a feature" in (refusal((9, 2, 16), 8) or "")
    assert "a channel a feature" in (refusal((9, 1, 16), 8) or "")
    assert f"kernels of {TAPS} elements" in (refusal((TAPS + 1, 1, 16), 16) or "")
    monkeypatch.setattr(llvm_depthwise, "features", frozenset)
    assert "AVX2" in (refusal((9, 1, 16), 16) or "")
