"""Kernels in panels: their bytes one by one, and numpy's sums of codes over all kinds of windows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.kernels import PanelWeight, llvm_amx, llvm_panels
from jaxcomp.kernels.forms import Images, Product, form_of
from jaxcomp.kernels.llvm_panels import llvm_panel_sums
from jaxcomp.kernels.packing import FIELDS
from jaxcomp.kernels.panels import DEEP, panel_codes, unit, width
from jaxcomp.kernels.products import convolution
from jaxcomp.kernels.windows import Window
from jaxcomp.quantization import Int
from tests.kernels.images import by_numpy, geometries, images
from tests.marks import quick

pytest.importorskip("llvmlite")
BITS = range(2, 9)
runs_here = pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes()))


def weight(w: Window, features: int, channels: int, bits: int, *, ends: bool = False) -> tuple[PanelWeight, np.ndarray]:
    """A kernel of random numbers, or of the two farthest from 0, and those ``(features, *kernel, channels)``."""
    rng = np.random.default_rng(features + channels + bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shape = (features, *w.kernel, channels)
    numbers = (
        rng.choice([low, high], (features, 1, 1, 1)) * np.ones(shape) if ends else rng.integers(low, high + 1, shape)
    )
    flat = numbers.reshape(features, -1)
    return PanelWeight(
        codes=panel_codes(jnp.asarray(flat, jnp.int8), bits, channels),
        scale=jnp.ones((features, 1)),
        totals=jnp.asarray(flat.sum(1), jnp.int32),
        grid=Int(bits),
        taps=flat.shape[1] // channels,
        channels=channels,
        features=features,
        dtype=jnp.dtype("float32"),
    ), numbers


def window(kernel, strides=None, padding=None, dilation=None, base=None):
    ones = (1,) * len(kernel)
    return Window(kernel, strides or ones, padding or ((0, 0),) * len(kernel), dilation or ones, base or ones, 1)


def code_at(w: PanelWeight, feature: int, tap: int, channel: int) -> int:
    """A code, cut out of its bytes as the docstrings say."""
    u, d, panel = unit(w.bits), DEEP, np.asarray(w.codes)[feature // 16]
    block = u * 16
    at = (tap * (w.filled // u) + channel // u) * (block * width(w.bits) // 8)
    j, code, place = (channel % u // d * 16 + feature % 16) * d + channel % d, 0, 0
    for bits in FIELDS[width(w.bits)]:
        size = block * bits // 8
        code |= (int(panel[at + j % size]) >> (bits * (j // size)) & (2**bits - 1)) << place
        at, place = at + size, place + bits
    return code


@pytest.mark.parametrize("bits", quick(BITS, 3, 4, 8))
def test_each_number_lies_where_the_docstring_says(bits: int) -> None:
    w, numbers = weight(window((2, 1)), 19, 5, bits)
    flat = numbers.reshape(19, 2, 5)
    found = [[[code_at(w, f, t, c) for c in range(5)] for t in range(2)] for f in range(19)]
    wanted = flat & 255 if bits > 4 else flat + 2 ** (bits - 1)
    assert found == wanted.tolist()
    assert w.numbers().tolist() == flat.reshape(19, -1).tolist()
    assert w.shape == (19, 10)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), w)
    assert stacked.numbers().tolist() == [w.numbers().tolist()] * 2


def test_blocks_fill_vectors() -> None:
    for bits in BITS:
        assert all(unit(bits) * 16 * field % (8 * 32) == 0 for field in FIELDS[width(bits)])


SAME = ((1, 1), (1, 1))
CASES = {
    "same": (window((3, 3), padding=SAME), (2, 6, 7, 5), 9),
    "one element": (window((1, 1)), (1, 5, 5, 40), 33),
    "steps of two": (window((3, 3), (2, 2), ((0, 1), (0, 1))), (1, 8, 8, 16), 20),
    "dilated": (window((3, 2), padding=((2, 2), (0, 3)), dilation=(2, 3)), (2, 7, 8, 4), 5),
    "transposed": (window((3, 3), padding=((2, 1), (2, 1)), base=(2, 2)), (2, 4, 5, 6), 7),
    "cut": (window((3, 3), padding=((-1, 0), (-2, 3))), (2, 7, 8, 4), 5),
    "an audio signal": (window((5,), (2,), ((4, 0),)), (3, 21, 6), 10),
    "a volume": (window((2, 3, 2), (1, 2, 1), ((0, 1), (1, 1), (0, 0))), (2, 4, 5, 6, 3), 5),
    "more windows than a thread takes": (window((3, 3), padding=SAME), (3, 11, 13, 8), 17),
    "more channels than 16 bits hold": (window((2, 2)), (1, 4, 4, 200), 16),
    "margins larger than the image": (window((3, 3), padding=((4, 4), (0, 5))), (2, 1, 2, 3), 2),
    "one window an image": (window((4, 4)), (7, 4, 4, 3), 3),
}
ZEROS = ("none", "one", "one an image")


def codes_and_zero(shape, zero):
    """Images of int8 codes, zero points, and the difference in float64."""
    rng = np.random.default_rng(3)
    x = rng.integers(-128, 128, shape)
    x.reshape(-1)[:2] = [-128, 127][: x.size]
    offset = {"none": np.zeros(1, int), "one": np.array([-5]), "one an image": rng.integers(-128, 128, shape[0])}[zero]
    given = None if zero == "none" else jnp.asarray(offset, jnp.int32)
    return jnp.asarray(x, jnp.int8), given, (x - offset.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float64)


@runs_here
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", quick(BITS, 3, 4, 7, 8))
@pytest.mark.parametrize(
    "name", quick(CASES, "same", "transposed", "an audio signal", "more windows than a thread takes")
)
def test_it_is_numpys_sum(name, bits, zero) -> None:
    w, shape, features = CASES[name]
    kernel, numbers = weight(w, features, shape[-1], bits)
    x, given, differences = codes_and_zero(shape, zero)
    got = jax.jit(partial(llvm_panel_sums, window=w))(x, given, kernel)
    assert got.dtype == jnp.int32
    assert got.tolist() == by_numpy(differences, numbers, w).tolist()


@runs_here
@settings(max_examples=25)
@given(geometries(1, 1), st.sampled_from([3, 4, 6, 8]), st.sampled_from(ZEROS))
def test_any_windows(case, bits, zero) -> None:
    w, shape, features = case
    if 0 in w.result(shape, features):
        return  # nothing to sum
    kernel, numbers = weight(w, features, shape[-1], bits)
    x, given, differences = codes_and_zero(shape, zero)
    assert llvm_panel_sums(x, given, kernel, w).tolist() == by_numpy(differences, numbers, w).tolist()


@pytest.mark.parametrize("bits", quick(BITS, 3, 4, 8))
@pytest.mark.parametrize("name", quick(CASES, "same", "transposed", "a volume"))
def test_floats_meet_the_same_numbers(name, bits) -> None:
    w, shape, features = CASES[name]
    kernel, numbers = weight(w, features, shape[-1], bits)
    scales = 2.0 ** np.arange(features) / 2**features
    kernel = replace(kernel, scale=jnp.asarray(scales[:, None], jnp.float32))
    x = images(*shape)
    wanted = by_numpy(x, numbers, w) * scales
    for form in (None, "llvm", "whole"):
        got = jax.jit(partial(convolution, window=w, form=form))(jnp.asarray(x, jnp.float32), kernel)
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("count", [1, 3])
def test_floats_in_vectors_of_every_processor(count, bits, processor) -> None:
    """Some 30 windows, and more than 64."""
    w, (_, *spatial, channels), features = CASES["same"]
    kernel, numbers = weight(w, features, channels, bits)
    x = images(count, *spatial, channels)
    got = llvm_panels.llvm_panel_product(jnp.asarray(x, jnp.float32), kernel, w)
    assert got.tolist() == by_numpy(x, numbers, w).tolist()


def test_forms_of_floats() -> None:
    w, shape, features = CASES["same"]
    kernel, _ = weight(w, features, shape[-1], 4)
    p = Product(84, jnp.dtype(jnp.float32), kernel, images=Images(shape, w))
    assert form_of("cpu", p) == "llvm"
    assert {form_of(*case) for case in (("cuda", p), ("cpu", p._replace(kept=True)), ("tpu", p))} == {"whole"}
    with pytest.raises(ValueError, match="it is for packed matrices, and the weight is the kernel of a convolution"):
        form_of("cpu", p, "chunks")
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), kernel)
    assert form_of("cpu", p._replace(weight=stacked)) == "whole"
    assert form_of("cpu", p._replace(weight=replace(kernel, scale=kernel.scale.astype(jnp.bfloat16)))) == "whole"


@pytest.mark.parametrize("zero", quick(ZEROS, "one an image"))
@pytest.mark.parametrize("bits", quick(BITS, 3, 4, 8))
@pytest.mark.parametrize("name", quick(CASES, "transposed", "more windows than a thread takes"))
def test_every_processor_sums_the_same(name, bits, zero, processor) -> None:
    w, shape, features = CASES[name]
    kernel, numbers = weight(w, features, shape[-1], bits)
    x, given, differences = codes_and_zero(shape, zero)
    assert llvm_panel_sums(x, given, kernel, w).tolist() == by_numpy(differences, numbers, w).tolist()


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("bits", quick(BITS, 4, 6, 8))
def test_no_sum_overflows_where_all_are_at_their_ends(bits, code, processor) -> None:
    """Without dot products of bytes pairs of products are summed in 16 bits, and these as often as they hold them."""
    w = window((3, 3), padding=SAME)
    kernel, numbers = weight(w, 8, 48, bits, ends=True)
    x = np.full((1, 7, 5, 48), code)
    got = llvm_panel_sums(jnp.asarray(x, jnp.int8), None, kernel, w)
    assert got.tolist() == by_numpy(x.astype(np.float64), numbers, w).tolist()


def test_which_code_a_processor_runs(processor) -> None:
    w, shape, features = CASES["more windows than a thread takes"]
    kernel, _ = weight(w, features, shape[-1], 8)
    x = jnp.zeros(shape, jnp.int8)
    many, few = (jax.jit(lambda x: llvm_panel_sums(x, None, kernel, w)).lower(v).as_text() for v in (x, x[:1, :1]))
    own = {"avx2": "panels_Words_8_8", "vnni": "panels_Dots_8_8", "vnni of 512 bits": "panels_Dots_8_16"}
    assert f"@jaxcomp_{own.get(processor, 'panels_amx_8')}" in many
    assert f"@jaxcomp_{own.get(processor, 'panels_Dots_8_16')}" in few  # 13 windows fill no tile


def test_processors_that_it_is_not_for(monkeypatch) -> None:
    monkeypatch.setattr(llvm_panels, "features", lambda: frozenset({"neon"}))
    assert "AVX2" in (llvm_panels.refusal_of_codes() or "")


def test_what_tiles_are_not_for(monkeypatch) -> None:
    monkeypatch.setattr(llvm_amx, "features", lambda: frozenset({"avx2", "avx512vnni"}))
    assert llvm_amx.refusal(100) == "the processor has no AMX"
    monkeypatch.setattr(llvm_amx, "features", lambda: frozenset({"amx-int8", "avx512bw"}))
    assert llvm_amx.refusal(15) == "tiles take 16 rows or windows and more, and there are 15"
    monkeypatch.setattr(llvm_amx, "_granted", lambda: False)
    assert llvm_amx.refusal(16) == "the system lets no program use the processor's AMX"
