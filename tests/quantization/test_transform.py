"""quantize against its own bound and a plain numpy reading of the equations; and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc

moderate = st.floats(-100, 100, width=32) | st.just(0.0)
# A few shapes, many values: each new shape is a new compilation.
arrays = hnp.arrays(np.float32, st.sampled_from([(1, 1), (7, 5), (2, 3, 4)]), elements=moderate)


def leaf(w, grid, **options) -> jc.quantization.Quantized:
    t = jc.quantize(grid, **options)
    params = {"conv": jnp.asarray(w)}  # the name settles what the axes of a kernel do
    return t.apply(t.init(params), params)["conv"]


def spread(scale, shape) -> np.ndarray:
    out = np.asarray(scale, np.float64)
    for axis, (b, n) in enumerate(zip(out.shape, shape, strict=True)):
        out = np.repeat(out, n // b, axis)
    return out


@given(w=arrays, bits=st.integers(2, 8), symmetric=st.booleans(), per_tensor=st.booleans())
def test_the_error_is_half_a_step_at_most(w, bits, symmetric, per_tensor) -> None:
    q = leaf(w, jc.Int(bits, symmetric=symmetric), per=jc.Tensor() if per_tensor else jc.Channels())
    error = np.abs(np.asarray(q.materialize(), np.float64) - w)
    assert (error <= spread(q.scale, w.shape) * 0.5 * (1 + 2e-4) + 1e-37).all()


@given(w=arrays, bits=st.integers(2, 8), symmetric=st.booleans())
def test_codes_stay_in_range_and_zero_stays_zero(w, bits, symmetric) -> None:
    grid = jc.Int(bits, symmetric=symmetric)
    q = leaf(w, grid)
    codes = np.asarray(q.codes)
    assert (codes == np.round(codes)).all()
    assert codes.min() >= grid.code_range[0]
    assert codes.max() <= grid.code_range[1]
    assert (np.asarray(q.materialize())[w == 0] == 0).all()


@given(w=arrays, bits=st.integers(2, 8))
def test_the_step_is_no_larger_than_the_full_grid_needs(w, bits) -> None:
    top = np.abs(w.reshape(-1, w.shape[-1])).max(0)
    scale = np.asarray(leaf(w, jc.Int(bits)).scale).reshape(-1)
    tiny = np.finfo(np.float32).tiny  # subnormal numbers may be read as zero
    normal = top >= 100 * tiny
    np.testing.assert_allclose(scale[normal], top[normal] / (2 ** (bits - 1) - 0.5), rtol=1e-6)
    assert np.isin(scale[top == 0], 1).all()


@given(w=arrays, bits=st.integers(2, 8))
def test_the_logarithmic_grid_is_the_written_equation(w, bits) -> None:
    q = leaf(w, jc.Log(bits))
    x = w.astype(np.float64)
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0  # subnormal numbers may be read as zero
    top = np.abs(x).max(axis=tuple(range(x.ndim - 1)), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(top > 0, (2 ** (bits - 1) - 1) / np.log1p(top), 0)
    exact = np.sign(x) * np.log1p(np.abs(x)) * scale
    codes = np.asarray(q.codes)
    normal = np.broadcast_to((top == 0) | (top >= 1e-35), x.shape)  # else the step itself is subnormal
    assert (np.abs(codes - exact) <= 0.5 + 1e-3)[normal].all()
    if (top > 1e-30).all():
        want = np.sign(codes) * np.expm1(np.abs(codes) / scale)
        np.testing.assert_allclose(np.asarray(q.materialize()), want, rtol=1e-4, atol=1e-6)


def test_a_companded_grid_takes_any_pair() -> None:
    root = jc.quantization.Compander(
        "root", lambda w: jnp.sign(w) * jnp.sqrt(jnp.abs(w)), lambda v: jnp.sign(v) * v * v
    )
    q = leaf(np.array([[4.0], [-1.0], [0.0]]), jc.quantization.Companded(3, root))
    assert q.codes.tolist() == [[3], [-1], [0]]  # roots 2, 1, 0 in steps of 2/3: 3, 1.5 (towards zero), 0
    np.testing.assert_allclose(q.materialize(), [[4.0], [-((2 / 3) ** 2)], [0.0]], rtol=1e-6)


def test_groups_have_their_own_scale() -> None:
    w = np.concatenate([np.full((4, 3), 0.01), np.full((4, 3), 10.0)]).astype(np.float32)
    q = leaf(w, jc.Int(4), per=jc.Groups(4))
    assert q.scale.shape == (2, 3)
    np.testing.assert_allclose(q.materialize(), w, rtol=0.07)
    whole = leaf(w, jc.Int(4))
    assert (np.asarray(whole.materialize())[:4] == 0).all()


def test_stacked_layers_keep_a_scale_each() -> None:
    w = jnp.stack([jnp.ones((4, 3)), 100 * jnp.ones((4, 3))])
    assert leaf(w, jc.Int(8), per=jc.Channels((0, -1))).scale.shape == (2, 1, 3)


def test_int4_is_no_worse_than_absmax_over_seven_and_a_half() -> None:
    w = np.asarray(jax.random.normal(jax.random.key(0), (256, 64)))
    scale = np.abs(w).max(0) / 7.5
    theirs = np.clip(np.round(w / scale), -8, 7) * scale
    ours = np.asarray(leaf(w, jc.Int(4)).materialize())
    assert ((ours - w) ** 2).mean() <= ((theirs - w) ** 2).mean() * (1 + 1e-6)


@given(bits=st.integers(2, 8), count=st.sampled_from([1, 7, 8, 33]))
def test_packed_codes_take_their_bits_and_no_more(bits, count) -> None:
    q = jc.pack(leaf(np.linspace(-1, 1, count, dtype=np.float32)[:, None], jc.Int(bits)))
    data = q.codes.data if bits < 8 else q.codes
    assert data.nbytes == -(-bits * count // 8)


def test_the_gradient_is_one_inside_and_passes_the_compander() -> None:
    w = jax.random.normal(jax.random.key(0), (64, 4))
    for grid in (jc.Int(2), jc.Int(4, narrow=True), jc.Int(8, symmetric=False), jc.Log(4)):
        t = jc.quantize(grid)
        g = jax.grad(lambda p, t=t: jc.materialize(t.apply((), p))["kernel"].sum())({"kernel": w})["kernel"]
        if isinstance(grid, jc.Int):
            np.testing.assert_allclose(g, 1, rtol=1e-6)
        else:
            dense = t.apply((), {"kernel": w})["kernel"].materialize()
            np.testing.assert_allclose(g, (1 + jnp.abs(dense)) / (1 + jnp.abs(w)), rtol=1e-4)


def test_quantizing_a_pruned_leaf_keeps_its_zeros_and_mask() -> None:
    params = {"kernel": jax.random.normal(jax.random.key(3), (16, 16))}
    t = jc.chain(jc.prune(0.75), jc.quantize(jc.Int(4, symmetric=False)))
    seen = t.apply(t.init(params), params)["kernel"]
    assert isinstance(seen, jc.core.Masked)
    assert isinstance(seen.values, jc.quantization.Quantized)
    assert (np.asarray(seen.materialize())[~np.asarray(seen.mask)] == 0).all()


@pytest.mark.parametrize("bits", [0, 9, 16, 4.0, True, "4"])
@pytest.mark.parametrize(
    ("spec", "least"), [(jc.Int, 1), (jc.quantization.Companded, 2), (jc.Log, 2), (jc.quantization.APoT, 2)]
)
def test_refuses_other_widths(spec, least, bits) -> None:
    with pytest.raises(ValueError, match=rf"bits must be an integer in {least}\.\.8, got"):
        spec(bits)


def test_refuses_one_bit_where_it_says_nothing() -> None:
    with pytest.raises(ValueError, match=r"narrow leaves one code of one bit"):
        jc.Int(1, narrow=True)
    with pytest.raises(ValueError, match=r"bits must be an integer in 2\.\.8, got 1"):
        jc.Log(1)


def test_refuses_narrow_without_symmetric() -> None:
    with pytest.raises(ValueError, match="narrow"):
        jc.Int(4, symmetric=False, narrow=True)


def test_refuses_what_is_no_grid() -> None:
    with pytest.raises(TypeError, match=r"quantize: wants a grid such as Int\(8\) or Log\(4\), got 8"):
        jc.quantize(8)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (
            jc.quantize(jc.Int(4), per=jc.Groups(4)),
            r"quantize: 'a/kernel' has 6 elements along axis 0 of shape \(6, 3\), which groups of 4 do not divide",
        ),
        (
            jc.quantize(jc.Int(4), per=jc.Groups(2, -1)),
            r"quantize: 'a/kernel' has 3 elements along axis 1 of shape \(6, 3\), which groups of 2 do not divide",
        ),
        (
            jc.quantize(jc.Int(4), per=jc.Channels(5)),
            r"'a/kernel' has shape \(6, 3\) and no axis 5; name axes in -2\.\.1",
        ),
        (jc.quantize(jc.Int(4), where="b/.*"), r"quantize: rule 'b/\.\*' matches nothing; the paths are 'a/kernel'"),
        (
            jc.chain(jc.quantize(), jc.quantize()),
            r"quantize: 'a/kernel' was made by quantize earlier in this chain; put quantize before quantize",
        ),
    ],
)
def test_names_the_leaf_that_does_not_fit(t, message) -> None:
    with pytest.raises(ValueError, match=message):
        t.init({"a": {"kernel": jnp.ones((6, 3))}})


def test_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="quantize: 'kernel' has 2 values that are not finite, of 4"):
        jc.quantize().init({"kernel": jnp.array([[1, jnp.nan], [-jnp.inf, 2]])})
