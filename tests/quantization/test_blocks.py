"""The slots of quantize: grids of levels, scale rules, what shares a scale, rounding, gradients; what they refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.core.layouts import Buckets, Tiles
from jaxcomp.quantization.leaves import Folded
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2, Levels
from jaxcomp.quantization.microscaling import E8M0, Blocked
from jaxcomp.quantization.scales import MSE, AbsMax, Fixed, MeanAbs, Percentile, Stochastic
from jaxcomp.recipes import mx, nf4, nvfp4
from tests.laws import assert_same_bits
from tests.marks import quick

GRIDS = [
    jc.Int(1),
    jc.Int(4),
    E4M3,
    E2M1,
    jc.quantization.NF4(),
    jc.quantization.PoT(4),
    jc.quantization.APoT(4),
    Levels((-1.0, -0.5, 0.5, 1.0)),
]


def leaf(w, grid, **options):
    t = grid if isinstance(grid, jc.Transform) else jc.quantize(grid, **options)
    params = {"kernel": jnp.asarray(w)}
    return t.apply(t.init(params), params)["kernel"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_signs_are_scaled_by_the_mean_magnitude() -> None:
    w = np.array([[1.0, -4.0], [-3.0, 0.0]], np.float32)
    q = leaf(w, jc.Int(1))
    assert q.materialize().tolist() == [[2, -2], [-2, 2]]
    assert jc.pack(q).codes.data.nbytes == 1
    assert leaf(w, jc.Int(1), per=jc.Tensor()).scale.tolist() == [[2.0]]


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M3, E3M2, E2M1], ids=lambda g: f"e{g.exponent}m{g.mantissa}")
def test_mx_against_ml_dtypes(element) -> None:
    w = normal(64, 6) * np.array([1e-6, 1, 1, 300, 1, 1], np.float32)
    w[:32, 2] = 0
    q = leaf(w, mx(element))
    name = f"float{element.bits}_e{element.exponent}m{element.mantissa}" + ("" if element == E5M2 else "fn")
    blocks = w.reshape(2, 32, 6)
    absmax = np.abs(blocks).max(1, keepdims=True)
    x = 2.0 ** (np.floor(np.log2(np.maximum(absmax, 2.0**-80))) - np.floor(np.log2(element.top)))
    coded = np.clip(blocks / x, -element.top, element.top).astype(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(q.materialize(), (coded * x).reshape(w.shape) + 0.0)
    packed = jc.pack(q)
    assert jc.nbytes(packed) == w.size * element.bits // 8 + w.size // 32 + 4
    scales = np.asarray(packed.scale.codes).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scales[absmax[:, 0] > 0], x[:, 0][absmax[:, 0] > 0])
    assert_same_bits(packed.materialize(), q.materialize())


def test_mxint8_counts_in_sixty_fourths() -> None:
    w = np.clip(normal(32, 3), -0.9, 0.9) * np.array([1.0, 2.0, 0.5], np.float32)
    w[0] = [1.0, 3.99, 0.5]
    q = leaf(w, mx(jc.Int(8, narrow=True)))
    exponents = np.asarray(jc.pack(q).scale.codes).astype(int) - 127
    assert exponents.tolist() == [[0, 1, -1]]
    step = 2.0**exponents / 64
    np.testing.assert_array_equal(q.materialize(), np.clip(np.round(w / step), -127, 127) * step)


def test_nvfp4_against_ml_dtypes() -> None:
    w = normal(64, 5) * np.array([1, 1e-3, 1, 1, 0], np.float32)
    q = leaf(w, nvfp4())
    blocks = w.reshape(4, 16, 5)
    outer = np.float32(np.abs(w).max() / (448 * 6))
    absmax = np.abs(blocks).max(1, keepdims=True)
    part = np.maximum(absmax / np.float32(6) / outer, 2.0**-9).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = part * outer
    coded = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_allclose(q.materialize(), (coded * scale).reshape(w.shape), rtol=1e-6)
    packed = jc.pack(q)
    assert jc.nbytes(packed) == w.size // 2 + w.size // 16 + 4
    assert np.asarray(packed.scale.codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32).max() == 448


@pytest.mark.slow
def test_blocks_are_exactly_their_group_in_a_convolution() -> None:
    params = {"conv": {"kernel": jnp.asarray(normal(3, 3, 8, 4))}}
    for t, groups in ((mx(E4M3, 4), 2), (nf4(8), 1), (jc.quantize(jc.Int(4), per=jc.Groups(4)), 2)):
        assert t.apply(t.init(params), params)["conv"]["kernel"].scale.shape == (3, 3, groups, 4)


def test_a_tile_has_one_scale() -> None:
    w = normal(4, 6)
    w[:2, :3] *= 100
    q = leaf(w, jc.Int(8), per=Tiles((2, 3)))
    top = np.abs(w.reshape(2, 2, 2, 3)).max((1, 3))
    np.testing.assert_allclose(q.scale, top / 127.5, rtol=1e-6)
    assert leaf(normal(5, 4, 6), E4M3, per=Tiles((2, 3))).scale.shape == (5, 2, 2)


@given(w=hnp.arrays(np.float32, (5, 7), elements=st.floats(-10, 10, width=32)), bucket=st.sampled_from([8, 35, 99]))
def test_buckets_of_the_flattened_leaf(w, bucket) -> None:
    q = leaf(w, jc.Int(4), per=Buckets(bucket))
    flat, got = w.reshape(-1), np.asarray(q.materialize()).reshape(-1)
    for start in range(0, flat.size, bucket):
        part = flat[start : start + bucket]
        np.testing.assert_allclose(got[start : start + bucket], leaf(part[:, None], jc.Int(4)).materialize()[:, 0])


def test_the_padding_of_a_bucket_does_not_count() -> None:
    q = leaf(np.full((3, 1), 2.0, np.float32), jc.Int(1), per=Buckets(8))
    assert isinstance(q, Folded)
    assert q.materialize().tolist() == [[2.0]] * 3
    assert jc.pack(q).rows.codes.data.nbytes == 1


@pytest.mark.parametrize("percent", [50.5, 75.0, 99.0, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_against_numpy(percent, symmetric) -> None:
    w = normal(40, 3)
    q = leaf(w, jc.Int(8, symmetric=symmetric), scale=Percentile(percent))
    if symmetric:
        want = np.percentile(np.abs(w), percent, axis=0, method="inverted_cdf") / 127.5
    else:
        top = np.percentile(w, percent, axis=0, method="inverted_cdf")
        bottom = -np.percentile(-w, percent, axis=0, method="inverted_cdf")
        want = (np.maximum(top, 0) - np.minimum(bottom, 0)) / 255
    np.testing.assert_allclose(q.scale[0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "grid", "of_survivors"),
    [
        (MeanAbs(), jc.Int(1), np.mean),
        (Percentile(75.0), E2M1, lambda w: np.percentile(w, 75.0, method="inverted_cdf") / 6),
    ],
    ids=["mean", "percentile"],
)
def test_what_a_mask_hides_is_not_counted(rule, grid, of_survivors) -> None:
    params = {"kernel": jnp.asarray(normal(20, 3))}
    t = jc.chain(jc.prune(0.6), jc.quantize(grid, scale=rule))
    seen = t.apply(t.init(params), params)["kernel"]
    kept, w = np.asarray(seen.mask), np.abs(np.asarray(params["kernel"]))
    want = [of_survivors(column[k]) for column, k in zip(w.T, kept.T, strict=True)]
    np.testing.assert_allclose(seen.values.scale[0], want, rtol=1e-6)
    assert (np.asarray(seen.materialize())[~kept] == 0).all()


GRIDS_TRIED = {
    "int3": jc.Int(3),
    "int4": jc.Int(4, symmetric=False),
    "nf4": jc.quantization.NF4(),
    "e2m1": E2M1,
    "log4": jc.Log(4),
}


@pytest.mark.parametrize("name", quick(GRIDS_TRIED, "int4", "nf4"))
def test_the_squared_error_range_is_the_best_of_those_tried(name) -> None:
    grid = GRIDS_TRIED[name]
    w = normal(100, 2) ** 3
    rule = MSE(0.2, 17)
    found = ((np.asarray(leaf(w, grid, scale=rule).materialize(), np.float64) - w) ** 2).sum(0)
    tried = []
    for ratio in np.linspace(1, 0.2, 17):
        if isinstance(grid, jc.Int) and not grid.symmetric:
            low, high = w.min(0) * ratio, w.max(0) * ratio
            scale = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
            zero = np.clip(np.round(-np.minimum(low, 0) / scale), 0, 15)
            dense = (np.clip(np.round(w / scale + zero), 0, 15) - zero) * scale
        else:
            tops = {"kernel": jnp.asarray(np.abs(w).max(0, keepdims=True) * np.float32(ratio))}
            dense = np.asarray(leaf(w, grid, scale=Fixed(tops)).materialize(), np.float64)
        tried.append(((dense - w) ** 2).sum(0))
    np.testing.assert_allclose(found, np.min(tried, 0), rtol=1e-4)
    assert (found < tried[0]).any()


def test_a_fixed_range_saturates() -> None:
    w = np.array([[0.2, 3.0], [-9.0, 1.0]], np.float32)
    assert leaf(w, jc.quantization.PoT(3), scale=Fixed(1.0)).materialize().tolist() == [[0.25, 1], [-1, 1]]
    tree = {"kernel": np.array([[4.0, 8.0]], np.float32)}
    assert leaf(w, jc.quantization.PoT(3), scale=Fixed(tree)).materialize().tolist() == [[0, 2], [-4, 0]]
    assert leaf(w, jc.quantization.PoT(3), scale=Fixed(tree)).scale.tolist() == [[4, 8]]
    q = leaf(w, jc.Int(8, symmetric=False), scale=Fixed(2.0))
    np.testing.assert_allclose(q.scale, 4 / 255, rtol=1e-6)


def test_stochastic_rounding_changes_with_the_step_and_repeats() -> None:
    t = jc.quantize(jc.Int(3), per=jc.Tensor(), scale=Fixed(3.5), rounding=Stochastic(jax.random.key(7)))
    params = {"kernel": jnp.full((200, 50), 0.3), "other": jnp.full((200, 50), 0.3)}
    state = t.init(params)
    steps = [t.update(state, params, step=i) for i in (0, 1, 1)]
    seen = [jc.materialize(t.apply(s, params)) for s in steps]
    assert_same_bits(seen[1], seen[2])
    assert (seen[0]["kernel"] != seen[1]["kernel"]).any()
    assert (seen[0]["kernel"] != seen[0]["other"]).any()
    assert set(np.unique(seen[0]["kernel"]).tolist()) == {0.0, 1.0}
    assert abs(float(seen[0]["kernel"].mean()) - 0.3) < 5 * (0.21 / 10000) ** 0.5


@pytest.mark.parametrize("grid", quick(GRIDS, jc.Int(1), jc.quantization.PoT(4), jc.quantization.NF4()), ids=str)
def test_zeros_of_a_mask_stay_zero_and_files_keep_them(grid, tmp_path) -> None:
    params = {"kernel": jnp.asarray(normal(16, 8))}
    for sparsity in (0.1, 0.8):
        t = jc.chain(jc.prune(sparsity), jc.quantize(grid))
        seen = t.apply(t.init(params), params)
        dense = np.asarray(jc.materialize(seen)["kernel"])
        assert (dense[~np.asarray(seen["kernel"].mask)] == 0).all()
        jc.save(tmp_path / "f", seen)
        assert_same_bits(jc.materialize(jc.load(tmp_path / "f")), jc.materialize(seen))


@pytest.mark.parametrize(
    "grid",
    [
        *(pytest.param(grid, id=str(grid)) for grid in GRIDS),
        pytest.param(mx(E4M3, 4), id="mx"),
        pytest.param(jc.quantize(Blocked(jc.quantization.NF4(), E4M3), per=jc.Groups(4)), id="nf4 blocked"),
    ],
)
@pytest.mark.parametrize("value", quick([0.0, 2.5, -1e-30], 0.0))
def test_constant_leaves_are_finite(grid, value) -> None:
    for rule in (None, Percentile(99.0), MSE(steps=3)):
        dense = np.asarray(leaf(np.full((8, 3), value, np.float32), grid, scale=rule).materialize())
        assert np.isfinite(dense).all()
        if value == 0:
            assert (dense == 0).all()


FORMATS = {"sign": jc.Int(1), "e4m3": E4M3, "nf4": nf4(4), "mx": mx(E2M1, 4), "nvfp4": nvfp4()}


@pytest.mark.parametrize("dtype", quick([jnp.float16, jnp.bfloat16], jnp.bfloat16))
@pytest.mark.parametrize("name", quick(FORMATS, "e4m3"))
def test_half_precision_leaves_keep_their_type(name, dtype) -> None:
    q = leaf(jnp.asarray(normal(16, 3), dtype), FORMATS[name])
    assert q.dtype == q.materialize().dtype == dtype
    assert_same_bits(jc.pack(q).materialize(), q.materialize())


@pytest.mark.slow
def test_double_precision_leaves_keep_their_type() -> None:
    with jax.enable_x64(True):
        for grid in (jc.Int(1), E4M3, jc.quantization.APoT(8), mx(E2M1, 4), nvfp4()):
            q = leaf(jnp.asarray(normal(16, 3), jnp.float64), grid)
            assert q.materialize().dtype == jnp.float64
            assert_same_bits(jc.pack(q).materialize(), q.materialize())


def test_the_gradient_is_cut_or_not() -> None:
    w = {"kernel": jnp.asarray([[0.1], [3.0]])}
    for clipped, want in ((True, [[1], [0]]), (False, [[1], [1]])):
        for grid in (jc.Int(4), E2M1, jc.Log(4)):
            t = jc.quantize(grid, scale=Fixed(0.5), clip_gradient=clipped)
            g = jax.grad(lambda p, t=t: jc.materialize(t.apply((), p))["kernel"].sum())(w)["kernel"]
            assert ((np.asarray(g) != 0) == np.array(want, bool)).all()


@pytest.mark.slow
def test_integer_products_take_microscaled_integers_and_name_the_rest() -> None:
    def fn(p, x):
        return x @ p["kernel"]

    params, x = {"kernel": jnp.asarray(normal(32, 4))}, jnp.asarray(normal(8, 32, seed=1))
    rules = {".*": jc.Act(8, range=jc.activations.Dynamic())}
    for compress in (jc.quantize(jc.Int(1)), mx(jc.Int(8, narrow=True))):
        t = compress.apply((), params)
        fake = jc.quantize_function(fn, rules)(t, {}, x)
        real = jc.quantize_function(fn, rules, integer=True)(jc.pack(t), {}, x)
        np.testing.assert_allclose(fake, real, rtol=1e-4, atol=1e-4)
        assert not jc.coverage(fn, rules, integer=True)(jc.pack(t), x).left
    packed = jc.pack(jc.quantize(E4M3).apply((), params))
    report = jc.coverage(fn, rules, integer=True)(packed, x)
    assert "Float codes are not proportional to the weight" in str(report)


NAN = {"kernel": jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [0.5, -1.0]])}
GRIDS = {
    "int": jc.Int(4),
    "asymmetric": jc.Int(4, symmetric=False),
    "sign": jc.Int(1),
    "log": jc.Log(4),
    "float": jc.Float(2, 1),
    "nf4": jc.quantization.NF4(),
    "pot": jc.quantization.PoT(4),
    "apot": jc.quantization.APoT(4),
    "mx": Blocked(E2M1, E8M0()),
    "nvfp": Blocked(E2M1, E4M3),
}
RULES = {"default": None, "percentile": Percentile(60), "fixed": Fixed(1.0)}


@pytest.mark.parametrize("rule", quick(RULES, "default"))
@pytest.mark.parametrize("grid", quick(GRIDS, "int", "nf4", "mx"))
def test_nan_is_not_hidden(grid, rule) -> None:
    """Of a network that has diverged the quantized one has too, and it is not packed or saved as if it had not."""
    t = jc.quantize(GRIDS[grid], scale=RULES[rule])
    assert jnp.isnan(jc.materialize(t.apply((), NAN))["kernel"][1, 0])
    with pytest.raises(ValueError, match=r"pack: 'kernel' was quantized from values that are NaN; mend the training"):
        jc.pack(t.apply((), NAN))
    if rule != "fixed":
        packed = jax.jit(lambda p: jc.pack(t.apply((), p)))(NAN)
        assert jnp.isnan(jc.materialize(packed)["kernel"][1, 0])


def test_values_that_jit_closes_over_are_known() -> None:
    leaf, end = jc.quantize(jc.Int(4)).apply((), {"kernel": jnp.eye(4)}), {"kernel": jnp.ones((1, 4))}
    seen = jax.jit(lambda x: jc.quantize(jc.Int(4), scale=Fixed(end)).apply((), x))({"kernel": jnp.eye(4)})
    assert seen["kernel"].scale.shape == (1, 4)
    packed = jax.jit(lambda: jc.pack(leaf))()
    assert (jc.materialize(packed)["kernel"] == jc.materialize(leaf)["kernel"]).all()


def test_nan_is_not_saved(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"save: 'kernel' was quantized from values that are NaN"):
        jc.save(tmp_path / "net.safetensors", jc.quantize().apply((), NAN))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jc.quantize(jc.quantization.NF4), TypeError, "quantize: wants a grid such as Int"),
        (lambda: jc.quantize(scale=3), TypeError, "scale must be a rule such as AbsMax"),
        (lambda: jc.quantize(rounding="up"), TypeError, "rounding must be Nearest"),
        (lambda: Stochastic(3), TypeError, r"Stochastic: wants one typed key such as jax\.random\.key\(0\), got 3"),
        (lambda: Stochastic(jax.random.split(jax.random.key(0))), TypeError, "Stochastic: wants one typed key"),
        (lambda: Percentile(50), ValueError, r"Percentile: percent must be a number in \(50, 100\], got 50"),
        (lambda: Percentile(101), ValueError, r"Percentile: percent must be a number in \(50, 100\], got 101"),
        (lambda: MSE(1.0), ValueError, r"MSE: smallest must be a fraction in \(0, 1\), got 1.0"),
        (lambda: MSE(steps=1), ValueError, "MSE: steps must be an integer of at least 2, got 1"),
        (lambda: Fixed(0.0), ValueError, "the range's end must be positive and finite, got 0.0"),
        (lambda: Fixed({"kernel": jnp.array([1.0, -1.0])}), ValueError, "end at 'kernel' must be positive and finite"),
        (lambda: jc.quantize(E8M0()), TypeError, r"quantize: wants a grid such as Int\(8\) or Log\(4\), got E8M0\(\)"),
        (
            lambda: jc.quantize(per=-1),
            TypeError,
            r"quantize: per must be one of Tensor\(\), Channels\(axes\), Groups\(size\), Tiles\(shape\), "
            r"Buckets\(size\), got -1",
        ),
        (lambda: jc.quantize(per=jc.core.Tokens()), TypeError, r"quantize: per must be one of .*, got Tokens\(\)"),
        (
            lambda: jc.quantize(roles={"kernel": (0, 1)}),
            TypeError,
            r"quantize: roles must be what jaxcomp\.roles\(fn\)",
        ),
        (lambda: jc.Channels("x"), ValueError, "Channels: axes must be an integer, or several, got 'x'"),
        (lambda: jc.Groups(0), ValueError, "Groups: size must be a positive integer, got 0"),
        (lambda: jc.Groups(2, "x"), ValueError, "Groups: axis must be an integer, got 'x'"),
        (lambda: Tiles(4), ValueError, "Tiles: shape must be a tuple of positive integers, got 4"),
        (lambda: Tiles((4, 0)), ValueError, "Tiles: shape must be a tuple of positive integers"),
        (lambda: Buckets(0), ValueError, "Buckets: size must be a positive integer, got 0"),
    ],
)
def test_refuses(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (
            jc.quantize(per=Tiles((4, 3))),
            r"'a/kernel' has shape \(6, 3\), which tiles of \(4, 3\) do not divide; take",
        ),
        (jc.quantize(per=Tiles((2, 2, 3))), r"'a/kernel' has shape \(6, 3\), which has fewer axes than tiles of"),
        (nvfp4(), r"'a/kernel' has 6 elements along axis 0 .* groups of 16 do not divide"),
        (jc.quantize(scale=Fixed({"b": 1.0})), "the tree of Fixed has no entry for 'a/kernel', only 'b'"),
        (
            jc.quantize(scale=Fixed({"a": {"kernel": np.ones((2, 2), np.float32)}})),
            r"the tree of Fixed has shape \(2, 2\) at 'a/kernel', which does not broadcast .* \(1, 3\)",
        ),
    ],
)
def test_names_the_leaf_that_does_not_fit(t, message) -> None:
    with pytest.raises(ValueError, match=f"quantize: .*{message}"):
        t.init({"a": {"kernel": jnp.ones((6, 3))}})


def test_specs_are_values() -> None:
    assert dataclasses.replace(E4M3, bias=3) == jc.Float(4, 3, reserved=1, bias=3)
    assert AbsMax() == AbsMax()
