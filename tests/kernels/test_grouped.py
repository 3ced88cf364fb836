"""Convolutions with feature groups on a CPU: numpy's sums, JAX's gradients of each order, what is lowered where."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomp as jc
from jaxcomp.activations import coverage, quantize_function
from jaxcomp.activations.function import factored
from jaxcomp.activations.specs import Act
from jaxcomp.factorization import CP
from jaxcomp.kernels import grouped
from jaxcomp.kernels.windows import Window
from jaxcomp.trace import nested
from tests.kernels.images import by_numpy, geometries, images
from tests.marks import quick


def conv(w: Window, numbers=None, **more):
    """A convolution of images and a kernel, both with channels last unless told."""
    axes = "WHD"[: len(w.kernel)][::-1]
    numbers = numbers or (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], w.strides, w.padding, w.base, w.dilation, numbers, w.groups, **more)

    return fn


def fast(fn):
    return jax.jit(lambda p, x: quantize_function(fn, {})(p, None, x))


SAME = ((1, 1), (1, 1))
CASES = {
    "depthwise": (Window((3, 3), (1, 1), SAME, (1, 1), (1, 1), 6), (2, 5, 6, 6), 6),
    "steps of two": (
        Window((3, 3), (2, 2), ((0, 1), (1, 0)), (1, 1), (1, 1), 4),
        (3, 8, 7, 4),
        8,
    ),
    "groups of two": (Window((3, 2), (1, 2), SAME, (1, 1), (1, 1), 3), (2, 6, 6, 6), 9),
    "groups of many": (Window((3, 3), (1, 1), SAME, (1, 1), (1, 1), 2), (2, 4, 4, 24), 10),
    "dilated, transposed, cut": (Window((3, 3), (2, 1), ((4, 3), (-1, 2)), (2, 1), (2, 3), 2), (2, 4, 5, 4), 6),
    "an audio signal": (Window((7,), (2,), ((6, 0),), (1,), (1,), 5), (3, 20, 5), 5),
    "a volume": (Window((2, 3, 1), (1, 1, 2), ((1, 0), (1, 1), (0, 0)), (1, 1, 1), (1, 1, 1), 3), (1, 3, 4, 5, 6), 3),
    "many features of a channel": (Window((2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 2), (2, 4, 4, 2), 12),
    "more terms than are summed": (Window((17, 16), (1, 1), ((8, 8), (8, 7)), (1, 1), (1, 1), 2), (1, 6, 6, 2), 2),
}
NAMES = (
    "depthwise",
    "steps of two",
    "groups of two",
    "dilated, transposed, cut",
    "groups of many",
)


def given_case(name):
    w, shape, features = CASES[name]
    kernel = images(features, *w.kernel, shape[-1] // w.groups)
    p = {"w": jnp.asarray(np.moveaxis(kernel, 0, -1), jnp.float32)}
    return w, p, jnp.asarray(images(*shape), jnp.float32), by_numpy(images(*shape), kernel, w)


@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_it_is_exact_where_sums_are(name) -> None:
    w, p, x, wanted = given_case(name)
    run = fast(conv(w))
    assert run(p, x).tolist() == wanted.tolist()
    assert quantize_function(conv(w), {})(p, None, x).tolist() == wanted.tolist()  # outside jit


@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_gradients_are_those_of_jax(name) -> None:
    w, p, x, wanted = given_case(name)
    g = jnp.asarray(np.random.default_rng(2).integers(-3, 4, wanted.shape), jnp.float32)
    own, ours = (jax.jit(lambda p, x, g, f=f: jax.vjp(f, p, x)[1](g)) for f in (conv(w), fast(conv(w))))
    for a, b in zip(jax.tree.leaves(ours(p, x, g)), jax.tree.leaves(own(p, x, g)), strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", ["depthwise", "groups of two"])
def test_products_with_hessians_are_those_of_jax(name) -> None:
    w, p, x, _ = given_case(name)

    def product(fn):
        def loss(p, x):
            return (fn(p, x) ** 3).sum()

        both = jax.grad(loss, (0, 1))
        forward = jax.jvp(both, (p, x), jax.tree.map(jnp.ones_like, (p, x)))[1]
        reverse = jax.grad(lambda p, x: sum(v.sum() for v in jax.tree.leaves(both(p, x))), (0, 1))(p, x)
        return jax.tree.leaves((forward, reverse))

    for a, b in zip(product(fast(conv(w))), product(conv(w)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)], ids=["images", "kernels", "both"])
def test_maps_of_products_and_of_gradients(axes) -> None:
    w, p, x, _ = given_case("groups of two")
    p, x = (
        jax.tree.map(lambda v: jnp.stack([v, 2 * v, v[::-1]]), v) if a == 0 else v
        for v, a in zip((p, x), axes, strict=True)
    )

    def gradient(fn):
        return jax.grad(lambda p, x: (fn(p, x) ** 2).sum(), (0, 1))

    for make in (lambda fn: fn, gradient):
        ours, own = (jax.tree.leaves(jax.vmap(make(fn), axes)(p, x)) for fn in (fast(conv(w)), conv(w)))
        for a, b in zip(ours, own, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@settings(max_examples=8)
@given(geometries(2))
def test_any_windows(case) -> None:
    w, shape, features = case
    kernel = images(features, *w.kernel, shape[-1] // w.groups)
    p, x = {"w": jnp.asarray(np.moveaxis(kernel, 0, -1), jnp.float32)}, jnp.asarray(images(*shape), jnp.float32)
    y = by_numpy(images(*shape), kernel, w)
    weights = jnp.asarray(1 + np.arange(y.size).reshape(y.shape) % 3, jnp.float32)
    assert fast(conv(w))(p, x).tolist() == y.tolist()
    own, ours = (jax.grad(lambda p, f=f: (f(p, x) * weights).sum())(p) for f in (conv(w), fast(conv(w))))
    assert ours["w"].tolist() == own["w"].tolist()


@pytest.mark.parametrize("numbers", [("NCHW", "OIHW", "NCHW"), ("HWNC", "IHOW", "CNHW")])
def test_axes_in_any_order(numbers) -> None:
    w, p, x, wanted = given_case("steps of two")
    first, kernel, result = (
        [from_.index(c) for c in to] for from_, to in zip(("NHWC", "HWIO", "NHWC"), numbers, strict=True)
    )
    p, x = {"w": jnp.transpose(p["w"], kernel)}, jnp.transpose(x, first)
    run = fast(conv(w, numbers))
    assert run(p, x).tolist() == np.transpose(wanted, result).tolist()
    own, ours = (jax.grad(lambda p, x, f=f: (f(p, x) ** 2).sum(), (0, 1))(p, x) for f in (conv(w, numbers), run))
    assert [v.tolist() for v in jax.tree.leaves(ours)] == [v.tolist() for v in jax.tree.leaves(own)]


@pytest.mark.parametrize(("dtype", "sums"), [("bfloat16", None), ("float16", "float32"), ("float32", "float64")])
def test_types(dtype, sums) -> None:
    w, p, x, wanted = given_case("depthwise")
    p, x = jax.tree.map(lambda v: v.astype(dtype), (p, x))
    with jax.enable_x64(sums == "float64"):
        fn = conv(w, preferred_element_type=sums)
        got = fast(fn)(p, x)
        assert got.dtype == (sums or dtype)
        assert got.tolist() == jnp.asarray(wanted, got.dtype).tolist()
        grads = jax.grad(lambda p: fast(fn)(p, x).astype("float32").sum())(p)
    assert grads["w"].dtype == dtype


def grouped_convolutions(text: str) -> list[str]:
    return re.findall(r"(?:feature|batch)_group_count = ([2-9]|\d\d+)", text)


def test_other_backends_meshes_and_programs_that_are_kept_hold_the_convolution() -> None:
    w, p, x, wanted = given_case("depthwise")
    step = jax.jit(jax.grad(lambda p, x: fast(conv(w))(p, x).sum(), (0, 1)))
    assert not grouped_convolutions(step.lower(p, x).as_text())
    assert len(grouped_convolutions(step.trace(p, x).lower(lowering_platforms=("tpu",)).as_text())) == 2
    assert len(grouped_convolutions(export.export(step)(p, x).mlir_module())) == 2
    many = {"w": jnp.ones((17, 17, 1, 2))}
    assert grouped_convolutions(fast(conv(CASES["more terms than are summed"][0])).lower(many, x[..., :2]).as_text())
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a")))
        assert fast(conv(w))(p, put).tolist() == wanted.tolist()


def mobile(p, x):
    """Two blocks of a mobile network."""
    for block in p.values():
        x = jax.nn.relu6(x @ block["up"])
        x = jax.nn.relu6(conv(replace(CASES["depthwise"][0], groups=x.shape[-1]))({"w": block["w"]}, x))
        x = x @ block["down"]
    return x.mean((1, 2))


def blocks():
    keys = iter(jax.random.split(jax.random.key(0), 7))
    shapes = {"up": (4, 12), "w": (3, 3, 1, 12), "down": (12, 4)}
    p = {f"block_{i}": {name: jax.random.normal(next(keys), s) for name, s in shapes.items()} for i in range(2)}
    return p, jax.random.normal(next(keys), (2, 6, 6, 4))


@pytest.mark.parametrize("integer", [False, True])
def test_training_with_rounded_activations_is_the_same(integer, monkeypatch) -> None:
    p, x = blocks()
    transform = jc.quantize(jc.Int(8), roles=jc.roles(mobile)(p, x))
    ranges = jc.activations.ranges_of(jc.calibrate(mobile)(p, x))

    def gradient(x):
        q = quantize_function(mobile, {".*": Act(8)}, integer=integer)
        loss = jax.jit(jax.value_and_grad(lambda p: (q(transform.apply((), p), ranges, x)[:2] ** 2).sum()))
        return loss(p), loss.lower(p).as_text()

    ours, text = gradient(x)
    assert not grouped_convolutions(text)
    monkeypatch.setattr(grouped, "bind", nested.bind)
    own, text = gradient(jnp.concatenate([x, x[:1]]))  # of another shape: what is alike is traced once
    assert grouped_convolutions(text)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_it_is_read_as_the_convolution_that_it_is() -> None:
    p, x = blocks()
    run = partial(lambda f, p, x: f(p, None, x), quantize_function(mobile, {}))
    assert jc.cost(run)(p, x).macs == jc.cost(mobile)(p, x).macs
    assert [s.path for s in jc.sites(run)(p, x)] == [s.path for s in jc.sites(mobile)(p, x)]
    forms = {row.path: row.form for row in coverage(mobile, {})(p, x).rows}
    assert {path for path, form in forms.items() if form} == {"block_0/w", "block_1/w"}
    assert forms["block_0/w"] == "shifts on cpu, own on cuda, rocm and tpu"


def test_factors_that_are_depthwise_run_so_too() -> None:
    p = {"w": jax.random.normal(jax.random.key(0), (3, 3, 4, 5))}
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    fn = conv(Window((3, 3), (1, 1), SAME, (1, 1), (1, 1), 1))
    tree = jc.factorize(p, 3, method=CP(steps=5, sweeps=2, stacked=0))
    run = jax.jit(factored(fn))
    assert not grouped_convolutions(run.lower(tree, x).as_text())
    np.testing.assert_allclose(run(tree, x), fn(jc.materialize(tree), x), rtol=1e-4, atol=1e-4)


def test_what_reads_programs_reads_it_too() -> None:
    p, x = blocks()
    run = partial(lambda f, p, x: f(p, None, x), quantize_function(mobile, {}))
    ranges, wanted = (jc.activations.ranges_of(jc.calibrate(fn)(p, x)) for fn in (run, mobile))
    assert ranges.keys() == wanted.keys()
    for name, found in ranges.items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=1e-5)
    rules = {".*": Act(8)}
    got, own = (jax.jit(partial(quantize_function(fn, rules), p, wanted))(x) for fn in (run, mobile))
    np.testing.assert_allclose(got, own, rtol=1e-4, atol=1e-4)
    fewer = jc.plan(jc.channel_groups(run)(p, x), p, sparsity=0.5)
    assert fewer.widths == jc.plan(jc.channel_groups(mobile)(p, x), p, sparsity=0.5).widths
    small = fewer.take(p)
    assert small["block_0"]["w"].shape[-1] == 6
    np.testing.assert_allclose(
        jc.shrink(run, fewer)(small, x), jc.shrink(mobile, fewer)(small, x), rtol=1e-5, atol=1e-5
    )
    pruned = jc.prune(0.8)
    tree = pruned.apply(pruned.init(p), p)
    ready = jc.prepare(tree, run, x, sparse=0.7)
    np.testing.assert_allclose(
        quantize_function(run, {})(ready, None, x), mobile(jc.materialize(tree), x), rtol=1e-4, atol=1e-4
    )
