"""Convolutions by sparse kernels: numpy's sums over all kinds of windows, and programs whose kernels are prepared."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import export, lax

import jaxcomp as jc
from jaxcomp.activations import coverage, quantize_function
from jaxcomp.activations.specs import Act, Dynamic
from jaxcomp.kernels import PreparedPanels, PreparedSparse, SparseWeight
from jaxcomp.kernels.forms import Images, Product, form_of
from jaxcomp.kernels.products import convolution
from jaxcomp.kernels.sparse import sparse_parts
from jaxcomp.kernels.windows import Planes, Window
from jaxcomp.quantization import Int
from tests.kernels.images import by_numpy, geometries, images
from tests.marks import quick

pytest.importorskip("llvmlite")


def window(kernel, strides=None, padding=None, dilation=None, base=None, groups=1):
    ones = (1,) * len(kernel)
    return Window(kernel, strides or ones, padding or ((0, 0),) * len(kernel), dilation or ones, base or ones, groups)


def weight(w: Window, features: int, channels: int, *, kept=0.4, coded=False, dtype="float32"):
    """A sparse kernel of small integers and the dense one ``(features, *kernel, channels of a group)`` in float64."""
    rng = np.random.default_rng(features + channels)
    shape = (features, int(np.prod(w.kernel)) * channels // w.groups)
    numbers = np.where(rng.random(shape) < kept, rng.integers(-8, 9, shape), 0)
    numbers[0, 0] = 1
    scale = 2.0 ** rng.integers(-3, 3, (features, 1)) if coded else np.ones((1, 1))
    parts = [jnp.asarray(v) for v in sparse_parts(numbers * scale, numbers.astype(np.int8 if coded else dtype))]
    scales = jnp.asarray(scale, jnp.float32) if coded else None
    made = SparseWeight(*parts, scales, Int(8) if coded else None, shape[1], jnp.dtype(dtype))
    return made, (numbers * scale).reshape(features, *w.kernel, -1)


SAME = ((1, 1), (1, 1))
CASES = {
    "same": (window((3, 3), padding=SAME), (2, 6, 7, 5), 9),
    "steps of two": (window((3, 3), (2, 2), ((0, 1), (0, 1))), (1, 8, 8, 16), 20),
    "one element, steps of two": (window((1, 1), (2, 2)), (2, 5, 4, 8), 8),
    "steps beyond the kernel": (window((2, 1), (3, 2)), (2, 9, 5, 3), 4),
    "wide kernel": (window((7, 7), (2, 2), ((3, 3), (3, 3))), (1, 15, 12, 3), 17),
    "dilated": (window((3, 2), padding=((2, 2), (0, 3)), dilation=(2, 3)), (2, 7, 8, 4), 5),
    "transposed": (window((3, 3), padding=((2, 1), (2, 1)), base=(2, 2)), (2, 4, 5, 6), 7),
    "cut": (window((3, 3), padding=((-1, 0), (-2, 3))), (2, 7, 8, 4), 5),
    "groups": (window((3, 3), padding=SAME, groups=2), (2, 5, 5, 8), 6),
    "depthwise": (window((3, 3), padding=SAME, groups=10), (1, 9, 9, 10), 20),
    "an audio signal": (window((5,), (2,), ((4, 0),)), (3, 21, 6), 10),
    "a volume": (window((2, 3, 2), (1, 2, 1), ((0, 1), (1, 1), (0, 0))), (2, 4, 5, 6, 3), 5),
    "more features than a thread takes": (window((3, 3), padding=SAME), (1, 4, 4, 16), 50),
    "more panels than a thread takes": (window((3, 3), padding=SAME), (2, 30, 31, 2), 3),
    "margins larger than the image": (window((3, 3), padding=((4, 4), (0, 5))), (2, 1, 2, 3), 2),
    "no margin": (window((2, 2), (2, 2)), (4, 6, 6, 3), 12),
}
NAMES = ("same", "steps of two", "transposed", "groups", "an audio signal", "margins larger than the image")


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_it_is_exact_where_sums_are(name, coded) -> None:
    w, shape, features = CASES[name]
    kernel, dense = weight(w, features, shape[-1], coded=coded)
    x = images(*shape)
    wanted = by_numpy(x, dense, w)
    assert wanted.any()
    for form in (None, "llvm", "whole"):
        got = jax.jit(partial(convolution, window=w, form=form))(jnp.asarray(x, jnp.float32), kernel)
        assert got.shape == wanted.shape == w.result(shape, features)
        assert got.tolist() == wanted.tolist()


@settings(max_examples=25)
@given(geometries(1))
def test_any_windows(case) -> None:
    w, shape, features = case
    kernel, dense = weight(w, features, shape[-1])
    x = images(*shape)
    got = convolution(jnp.asarray(x, jnp.float32), kernel, w)
    assert got.tolist() == by_numpy(x, dense, w).tolist()


def test_margins_are_kept_once() -> None:
    planes = Planes(window((3, 3), padding=SAME), (2, 4, 4, 1))
    assert (planes.steps, planes.span, planes.length) == ((5, 5), 25 + 3 * 5 + 4, 56)  # 2 * 25 and one more line, by 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_kernels_and_images(dtype) -> None:
    w, shape, features = CASES["same"]
    kernel, dense = weight(w, features, shape[-1], dtype=dtype)
    got = convolution(jnp.asarray(images(*shape), dtype), kernel, w, form="llvm")
    assert got.dtype == dtype
    assert got.tolist() == jnp.asarray(by_numpy(images(*shape), dense, w), dtype).tolist()


def test_what_is_not_finite_stays_where_the_kernel_meets_it() -> None:
    w = window((3, 3), padding=SAME)
    kernel, _ = weight(w, 5, 4, kept=1.0)
    x = jnp.asarray(images(3, 8, 8, 4), jnp.float32).at[1, 0, 7, 2].set(np.nan)
    got, wanted = (np.isnan(convolution(x, kernel, w, form=form)) for form in ("llvm", "whole"))
    assert (got <= wanted).all()
    assert got[1, 1, 6].any()
    assert not got[[0, 2]].any()
    assert not got[1, 2:].any()


def test_gradients_and_maps() -> None:
    w, shape, features = CASES["groups"]
    kernel, dense = weight(w, features, shape[-1])
    x = images(3, *shape)
    run = partial(convolution, window=w)
    wanted = np.stack([by_numpy(one, dense, w) for one in x])
    assert jax.vmap(run, (0, None))(jnp.asarray(x, jnp.float32), kernel).tolist() == wanted.tolist()
    grad = jax.grad(lambda x: (run(x, kernel) * 2).sum())(jnp.asarray(x[0], jnp.float32))
    plain = jax.grad(lambda x: (run(x, kernel, form="whole") * 2).sum())(jnp.asarray(x[0], jnp.float32))
    assert grad.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="the form 'llvm' does not run under vmap over weights"):
        jax.vmap(partial(run, form="llvm"), (None, 0))(x[0], jax.tree.map(lambda v: v[None], kernel))


def test_forms_of_convolutions() -> None:
    w, shape, features = CASES["same"]
    kernel, _ = weight(w, features, shape[-1])
    p = Product(84, jnp.dtype(jnp.float32), kernel, images=Images(shape, w))
    assert form_of("cpu", p) == "llvm"
    assert form_of("cuda", p) == form_of("cpu", p._replace(kept=True)) == form_of("cpu", p._replace(rows=0)) == "whole"
    large = p._replace(images=Images((1 << 20, 32, 32, 5), w))
    assert form_of("cpu", large) == "whole"
    with pytest.raises(
        ValueError, match=r"the images are 57.* numbers with their margins, and it counts to 2147483647"
    ):
        form_of("cpu", large, "llvm")
    x = jnp.ones(shape)
    run = jax.jit(partial(convolution, window=w))
    assert "jaxcomp_convolution" in run.lower(x, kernel).as_text()
    assert "jaxcomp_convolution" not in export.export(run)(x, kernel).mlir_module()
    assert run(x[:0], kernel).shape == (0, 6, 7, 9)


# Prepared


def channels_last(p, x):
    x = lax.conv_general_dilated(x, p["first"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(x).mean((1, 2)) @ p["second"]


def channels_first(p, x):
    x = jnp.moveaxis(x, -1, 1)
    x = lax.conv_general_dilated(x, p["first"].astype(x.dtype), (1, 1), ((1, 1), (1, 1)), feature_group_count=2)
    x = lax.conv_general_dilated(x, p["second"], (1, 1), "VALID", rhs_dilation=(2, 2))
    return x.sum((2, 3))


PROGRAMS = {
    channels_last: {"first": (3, 3, 6, 12), "second": (12, 5)},
    channels_first: {"first": (8, 3, 3, 3), "second": (5, 8, 2, 2)},
}


def pruned(fn, grid):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in PROGRAMS[fn].items()}
    x = jnp.asarray(rng.normal(size=(2, 7, 7, 6)), jnp.float32)
    steps = [jc.prune(0.8)] + ([] if grid is None else [jc.quantize(grid, roles=jc.roles(fn)(params, x))])
    compress = jc.chain(*steps)
    return jc.pack(compress.apply(compress.init(params), params)), x


@pytest.mark.parametrize("grid", [None, jc.Int(8)], ids=["floats", "Int8"])
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_a_prepared_network_is_the_network(fn, grid, tmp_path) -> None:
    tree, x = pruned(fn, grid)
    ready = jc.prepare(tree, fn, x, sparse=0.7)
    assert all(isinstance(leaf, PreparedSparse) for leaf in ready.values())
    for name, leaf in jc.materialize(ready).items():
        assert leaf.tobytes() == jc.materialize(tree)[name].tobytes()
    run = jax.jit(lambda tree, x: quantize_function(fn, {})(tree, None, x))
    assert "jaxcomp_convolution" in run.lower(ready, x).as_text()
    np.testing.assert_allclose(run(ready, x), fn(jc.materialize(tree), x), rtol=2e-5, atol=2e-5)
    report = coverage(fn, {})(ready, x)
    assert [(row.done, row.form) for row in report.rows] == [
        ("weight-only", "llvm on cpu, whole on cuda, rocm and tpu")
    ] * 2
    jc.save(tmp_path / "ready.safetensors", ready)
    assert (run(jc.load(tmp_path / "ready.safetensors"), x) == run(ready, x)).all()


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("grid", [None, jc.Int(8)], ids=["floats", "Int8"])
def test_rounded_activations_meet_the_same_kernel(grid, integer) -> None:
    tree, x = pruned(channels_last, grid)
    q = quantize_function(channels_last, {".*": Act(8, range=Dynamic())}, integer=integer)
    got, wanted = q(jc.prepare(tree, channels_last, x, sparse=0.7), None, x), q(tree, None, x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def scanned(p, x):
    def layer(x, kernel):
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y), None

    return lax.scan(layer, x, p["w"])[0]


def test_layers_of_a_scan() -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3, 3, 4, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(1, 5, 5, 4)), jnp.float32)
    compress = jc.prune(0.9)
    tree = compress.apply(compress.init(params), params)
    ready = jc.prepare(tree, scanned, x, sparse=0.8)
    run = jax.jit(lambda tree, x: quantize_function(scanned, {})(tree, None, x))
    assert "jaxcomp_convolution" in run.lower(ready, x).as_text()
    np.testing.assert_allclose(run(ready, x), scanned(jc.materialize(tree), x), rtol=2e-5, atol=2e-5)


def test_dense_kernels_and_others_say_why() -> None:
    tree, x = pruned(channels_last, jc.Int(8))
    only = {"first": tree["first"], "second": jnp.ones((12, 5))}
    assert isinstance(jc.prepare(only, channels_last, x)["first"], PreparedPanels)
    assert isinstance(jc.prepare(only, channels_last, x, sparse=0.9)["first"], PreparedPanels)  # 79.9% of it is zero
    prune = jc.prune(0.8, where="first")
    floats = prune.apply(prune.init(jc.materialize(only)), jc.materialize(only))
    with pytest.raises(ValueError, match=r"'first': 79.9% of it is zero, 90.0% are wanted; it is floats under a mask"):
        jc.prepare(floats, channels_last, x, sparse=0.9)
    ready = jc.prepare(only, channels_last, x, sparse=0.7)

    def turned(p, x):
        return channels_last({**p, "first": p["first"].swapaxes(2, 3)}, jnp.concatenate([x, x], -1))

    with pytest.raises(ValueError, match="'first' was prepared for the site"):
        quantize_function(turned, {})({**ready, "second": jnp.ones((6, 5))}, None, x)
