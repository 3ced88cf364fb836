"""Products with packed weights equal numpy's with the dense ones: widths, odd shapes, every form; no dense weight."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.kernels import PackedWeight, weight_only
from jaxcomp.kernels.packing import pack_blocks, unpack_blocks
from jaxcomp.kernels.weight_only import _forms, chunks, summable, sums, sums_of_bytes, whole
from jaxcomp.kernels.weight_only import weight_only as plain
from jaxcomp.quantization import NF4, Int
from tests.marks import quick

RNG = np.random.default_rng(0)


def packed(features, length, grid, *, group=None, block=8):
    """A packed weight and its values as numpy makes them from the codes, in float64."""
    group = length if group is None else group
    raw = RNG.integers(0, 2**grid.bits, (features, length)).astype(np.uint8)
    scale = 2.0 ** RNG.integers(-3, 2, (features, -(-length // group)))
    zero = None if grid.code_range is None or grid.symmetric else RNG.integers(-3, 4, scale.shape)
    codes = pack_blocks(jnp.asarray(raw), grid.bits, block)
    if grid == Int(8) or grid == Int(8, symmetric=False):
        codes = (codes ^ 128).view(jnp.int8)
    numbers = np.asarray(NF4().levels)[raw] if grid == NF4() else raw.astype(np.float64) - 2 ** (grid.bits - 1)
    at = np.arange(length) // group
    values = (numbers - (0 if zero is None else zero[:, at])) * scale[:, at]
    arrays = [None if v is None else jnp.asarray(v, jnp.float32) for v in (scale, zero)]
    return PackedWeight(codes, *arrays, grid, length, group, block, jnp.dtype("float32")), values


SHAPES = {
    "odd": (5, 33, None, 8),
    "one": (1, 1, None, 8),
    "groups are blocks": (7, 64, 16, 16),
    "groups of blocks": (3, 128, 64, 16),
    "groups within blocks": (4, 96, 8, 32),
    "groups across blocks": (4, 96, 12, 16),
    "last block is short": (6, 300, 150, 128),
}
GRIDS = {f"Int({b})": Int(b) for b in range(2, 9)} | {f"asymmetric {b}": Int(b, symmetric=False) for b in (2, 3, 4, 8)}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 8, 33, 130])
def test_codes_come_back_from_blocks(bits, length) -> None:
    codes = RNG.integers(0, 2**bits, (2, 3, length)).astype(np.uint8)
    data = pack_blocks(jnp.asarray(codes), bits, 64)
    assert data.shape == (2, 3, -(-length // 64) * 64 * bits // 8)
    assert (np.asarray(unpack_blocks(data, bits, 64))[..., :length] == codes).all()


@pytest.mark.parametrize("grid", quick(GRIDS, "asymmetric 4", "Int(8)"))
@pytest.mark.parametrize("shape", quick(SHAPES, "odd", "groups across blocks", "last block is short"))
def test_every_form_is_numpys_product_exactly(grid, shape) -> None:
    features, length, group, block = SHAPES[shape]
    w, values = packed(features, length, GRIDS[grid], group=group, block=block)
    assert (np.asarray(w.dense()) == values).all()

    def forms(x, w):
        few = (sums_of_bytes, sums) if x.shape[0] == 1 and summable(w) else ()
        return [form(x, w) for form in (weight_only, plain, whole, chunks, *few)]

    for rows in (1, 3):
        x = RNG.integers(-64, 65, (rows, length)).astype(np.float32)  # all sums are exact
        for got in jax.jit(forms)(jnp.asarray(x), w):
            assert (np.asarray(got) == x.astype(np.float64) @ values.T).all()


def test_a_table_of_levels() -> None:
    w, values = packed(6, 40, NF4(), group=8, block=16)
    for rows in (1, 3):
        x = RNG.normal(size=(rows, 40)).astype(np.float32)
        np.testing.assert_allclose(weight_only(jnp.asarray(x), w), x @ values.T, rtol=1e-5, atol=1e-5)


def test_floats_leading_axes_and_types() -> None:
    w, values = packed(96, 256, Int(4), group=128, block=128)
    x = RNG.normal(size=(2, 1, 256)).astype(np.float32)
    wanted = x.astype(np.float64) @ values.T
    for some in (x, x[:1]):
        got = jax.jit(weight_only)(jnp.asarray(some), w)
        assert np.abs(np.asarray(got) - wanted[: len(some)]).max() < 2e-6 * np.abs(wanted).max()
    assert weight_only(jnp.asarray(x, jnp.bfloat16), w).dtype == jnp.bfloat16
    assert weight_only(jnp.asarray(x, jnp.bfloat16), w, dtype=jnp.float32).dtype == jnp.float32
    assert weight_only(jnp.ones((0, 256)), w).shape == (0, 96)


def test_many_features_in_chunks_whose_last_one_overlaps() -> None:
    w, values = packed(1030, 512, Int(4), group=512, block=128)
    x = RNG.integers(-8, 9, (3, 512)).astype(np.float32)
    assert (np.asarray(jax.jit(chunks)(jnp.asarray(x), w)) == x @ values.T).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bits, odd) -> None:
    w, _ = packed(3, 16, Int(bits), block=16)
    x = np.ones((1, 16), np.float32)
    x[0, 3] = odd
    assert not np.isfinite(np.asarray(weight_only(jnp.asarray(x), w))).any()


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_and_vmap(rows) -> None:
    w, values = packed(5, 32, Int(4), group=16, block=16)
    x, g = RNG.integers(-8, 9, (rows, 32)).astype(np.float32), np.arange(rows * 5, dtype=np.float32).reshape(rows, 5)

    def loss(x, scale):
        return (weight_only(x, PackedWeight(w.codes, scale, None, w.grid, 32, 16, 16, w.dtype)) * g).sum()

    of_x, of_scale = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), w.scale)
    assert (np.asarray(of_x) == g @ values).all()
    by_group = (g.T @ x * values).reshape(5, 2, 16).sum(-1) / np.asarray(w.scale)
    np.testing.assert_allclose(of_scale, by_group, rtol=1e-6)
    many = jax.tree.map(lambda v: jnp.stack([v, v]), w)
    got = jax.vmap(weight_only)(jnp.stack([jnp.asarray(x), jnp.asarray(2 * x)]), many)
    assert (np.asarray(got) == np.stack([x @ values.T, 2 * x @ values.T])).all()


def sizes(text):
    """How many elements each result outside of fused kernels has, of a compiled program's text."""
    outside = re.sub(r"(?ms)^%(fused|wrapped)\S*computation.*?^}", "", text)
    shapes = re.findall(r"^\s+(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\]\S* (?!parameter|bitcast|get-tuple)", outside, re.M)
    return [(kind, int(np.prod([int(n) for n in shape.split(",")]))) for kind, shape in shapes]


PLAIN = {1: "sums", 3: "chunks"}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("bits", "group", "rows"), [(8, 128, 1), (8, 1024, 1), (4, 128, 1), (4, 1024, 1), (4, 128, 3)])
def test_no_dense_weight_is_written(bits, group, rows, plain) -> None:
    ws = [packed(1024, 1024, Int(bits), group=group, block=128)[0] for _ in range(3)]

    def decode(x, ws):
        for w in ws:
            x = weight_only(x, w, form=PLAIN[rows] if plain else None)
        return x

    program = jax.jit(decode).lower(jnp.ones((rows, 1024)), ws).compile()
    assert max(size for _, size in sizes(program.as_text())) <= 1024 * 1024 // 4
    assert program.memory_analysis().temp_size_in_bytes <= 1 << 20


@pytest.mark.parametrize("form", [None, "sums"])
@pytest.mark.parametrize(("bits", "group"), [(8, 1024), (8, 128), (4, 128)])
def test_a_loop_over_tokens_makes_no_dense_weight_in_front_of_it(bits, group, form) -> None:
    w = packed(1024, 1024, Int(bits), group=group, block=128)[0]

    def decode(xs, w):
        return jax.lax.scan(lambda x, new: (weight_only(x + new, w, form=form), x), jnp.zeros_like(xs[0]), xs)

    program = jax.jit(decode).lower(jnp.ones((8, 1, 1024)), w).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1 << 20  # dense it would be 4 MB


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_elsewhere(platform) -> None:
    w, _ = packed(32, 64, Int(4), block=64)
    for rows in (1, 3):
        text = jax.export.export(jax.jit(weight_only), platforms=[platform])(jnp.ones((rows, 64)), w).mlir_module()
        assert "while" not in text


def test_which_form_is_plain() -> None:
    w, _ = packed(4, 64, Int(4), group=16, block=16)
    assert _forms(1, w) == (sums_of_bytes, sums)
    assert _forms(3, w) == (chunks, whole)
    assert _forms(1, packed(4, 64, Int(3))[0]) == (chunks, whole)
