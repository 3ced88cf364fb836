"""Weights in panels, of convolutions and of dots: the bits of the tree that was prepared, in every kind of program."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.core.layouts import Tokens
from jaxcomp.kernels import PreparedPanels, llvm_panels
from tests.marks import quick

pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes())),
]
RNG = np.random.default_rng(0)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def convolved(x, w, strides=(1, 1), padding="SAME", numbers=NUMBERS, **how):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **how)


def two(p, x):
    return convolved(jax.nn.relu(convolved(x, p["first"])), p["second"], (2, 2))


def channels_first(p, x):
    y = convolved(x, p["first"], numbers=("NCHW", "OIHW", "NCHW"))
    return convolved(jax.nn.relu(y), p["second"], numbers=("NCHW", "OIHW", "NCHW"))


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.clip(convolved(x, w), -1, 1), None), x, p["w"])[0]


def signal(p, x):
    return convolved(x, p["w"], (2,), [(3, 0)], ("NWC", "WIO", "NWC"), rhs_dilation=(2,))


def transposed(p, x):
    return jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NUMBERS)


def relaid(p, x):
    return convolved(x, jnp.transpose(p["w"], (2, 3, 1, 0)).astype(jnp.float32))


def rematted(p, x):
    return jax.checkpoint(lambda w, x: jnp.clip(convolved(x, w), -1, 1))(p["w"], x)


def line(p, x):
    return jax.nn.relu(x @ p["w"])


def turned(p, x):
    return x @ p["w"].T


def heads(p, x):
    return jnp.einsum("btd,dhk->bhtk", x, p["w"])  # the weight is the left operand


def merged(p, x):
    return jnp.einsum("bthk,hkd->btd", x, p["w"])


def layers(p, x):
    return jax.lax.scan(lambda x, w: (jnp.clip(x @ w, -1, 1), None), x, p["w"])[0]


PROGRAMS = {
    two: ({"first": (3, 3, 5, 18), "second": (1, 1, 18, 7)}, (2, 6, 5, 5)),
    channels_first: ({"first": (8, 3, 3, 3), "second": (5, 8, 1, 2)}, (2, 3, 6, 5)),
    scanned: ({"w": (3, 3, 3, 4, 4)}, (2, 5, 5, 4)),
    signal: ({"w": (3, 4, 6)}, (3, 11, 4)),
    transposed: ({"w": (3, 3, 4, 5)}, (1, 4, 3, 4)),
    relaid: ({"w": (6, 4, 3, 3)}, (1, 4, 4, 4)),
    rematted: ({"w": (3, 3, 4, 5)}, (1, 4, 3, 4)),
    line: ({"w": (50, 37)}, (70, 50)),
    turned: ({"w": (37, 50)}, (20, 50)),
    heads: ({"w": (50, 3, 21)}, (2, 40, 50)),
    merged: ({"w": (3, 21, 50)}, (2, 40, 3, 21)),
    layers: ({"w": (3, 34, 34)}, (70, 34)),
}
EITHER = [two, line]
SOME = [two, channels_first, scanned, line, heads, layers]
GRIDS = {f"Int{bits}": jc.Int(bits) for bits in (8, 6, 4, 3, 2)}
ACTS = {
    "asymmetric": Act(8, range=Dynamic()),
    "symmetric": Act(8, symmetric=True, range=Dynamic()),
    "an image": Act(8, per=Tokens(), range=Dynamic()),
    "4 bits": Act(4, range=Dynamic()),
}
RULES = {".*": ACTS["asymmetric"]}


def tree_of(fn, grid=jc.Int(4), prune=None, per=jc.Channels()):  # noqa: B008 - frozen
    shapes, of_x = PROGRAMS[fn]
    params, x = {name: normal(*shape) for name, shape in shapes.items()}, normal(*of_x)
    quantize = jc.quantize(grid, per=per, roles=jc.roles(fn)(params, x))
    compress = quantize if prune is None else jc.chain(jc.prune(prune), quantize)
    return compress.apply(compress.init(params), params), x


def run_of(fn, rules=RULES, **how):
    q = quantize_function(fn, rules, **{"integer": True, "strict": True, **how})
    return jax.jit(lambda tree, x: q(tree, None, x))


@pytest.mark.parametrize("grid", quick(GRIDS, "Int4"))
@pytest.mark.parametrize("act", quick(ACTS, "asymmetric", "an image"))
@pytest.mark.parametrize("fn", quick(PROGRAMS, *SOME), ids=lambda fn: fn.__name__)
def test_on_integers_it_gives_the_same_bits(fn, act, grid) -> None:
    tree, x = tree_of(fn, GRIDS[grid])
    ready = jc.prepare(tree, fn, x)
    assert all(isinstance(leaf, PreparedPanels) for leaf in ready.values())
    run = run_of(fn, {".*": ACTS[act]})
    for some in (x, x[:1]):  # of images or sentences one, or one row of a dot
        text = run.lower(ready, some).as_text()
        assert "jaxcomp_panels" in text
        assert not any(name in text for name in ("convolution", "dot_general"))
        assert run(ready, some).tolist() == run(jc.pack(tree), some).tolist()


@pytest.mark.parametrize("fn", quick(PROGRAMS, two, scanned, line, heads, layers), ids=lambda fn: fn.__name__)
def test_it_is_the_tree(fn) -> None:
    tree, x = tree_of(fn, prune=0.5)
    ready, packed = jc.prepare(tree, fn, x), jc.pack(tree)
    for name, leaf in ready.items():
        assert leaf.materialize().tolist() == jc.materialize(tree)[name].tolist()
        assert leaf.shape == tree[name].shape
    assert jc.pack(ready)[name] is ready[name]
    for rules in ({}, RULES):
        run = run_of(fn, rules, integer=False, strict=False)
        got, wanted = run(ready, x), run(packed, x)
        # Sums in another order: each of the scanned layers makes the difference four times as large, before it clips.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-5 * jnp.abs(wanted).max())


EACH = pytest.mark.parametrize("fn", EITHER, ids=lambda fn: fn.__name__)


@EACH
def test_reports_name_the_form(fn) -> None:
    tree, x = tree_of(fn)
    ready, count = jc.prepare(tree, fn, x), len(tree)
    report = coverage(fn, {})(ready, x)
    assert {(row.done, row.form) for row in report.rows} == {
        ("weight-only", "llvm on cpu, whole on cuda, rocm and tpu")
    }
    report = coverage(fn, RULES, integer=True)(ready, x)
    assert [row.done for row in report.rows] == ["integer"] * count
    assert {row.form for row in report.rows} == {"integers on cpu, own on cuda, rocm and tpu"}
    assert "own" not in coverage(fn, RULES, integer=True)(tree, x).rows[0].form


@EACH
def test_programs_that_are_kept_hold_no_code_of_ours(fn) -> None:
    tree, x = tree_of(fn)
    ready, run = jc.prepare(tree, fn, x), run_of(fn)
    kept = export.export(run, platforms=("cpu", "cuda", "tpu"))(ready, x)
    assert "jaxcomp_" not in kept.mlir_module()
    assert kept.call(ready, x).tolist() == run(ready, x).tolist()


@EACH
def test_readers_of_programs_see_the_product(fn) -> None:
    tree, x = tree_of(fn)
    ready, run = jc.prepare(tree, fn, x), run_of(fn)
    assert jc.trace.cost(run)(ready, x).macs == jc.trace.cost(run)(jc.pack(tree), x).macs


@EACH
def test_gradients_and_maps(fn) -> None:
    tree, x = tree_of(fn)
    ready, packed = jc.prepare(tree, fn, x), jc.pack(tree)
    q = quantize_function(fn, {".*": ACTS["an image"]}, integer=True)
    got, wanted = (jax.jit(jax.grad(lambda x, t=t: (q(t, None, x) ** 2).sum()))(x) for t in (ready, packed))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    batches = jnp.stack([x, -x, 2 * x])
    mapped = jax.jit(jax.vmap(lambda x: q(ready, None, x)))(batches)
    assert mapped.tolist() == [jax.jit(lambda x: q(packed, None, x))(one).tolist() for one in batches]
    assert jnp.allclose(q(ready, None, x), q(packed, None, x))  # not in jit


def test_images_with_nan_and_infinities() -> None:
    tree, x = tree_of(two)
    x = x.at[0, 1, 1, 0].set(jnp.nan).at[1, 0, 0, 0].set(jnp.inf)
    run = run_of(two, {".*": ACTS["an image"]})
    got, wanted = run(jc.prepare(tree, two, x), x), run(jc.pack(tree), x)
    np.testing.assert_array_equal(got, wanted)
    assert np.isnan(got[0]).all()


def test_files_hold_prepared_panels(tmp_path) -> None:
    tree, x = tree_of(two, jc.Int(3))
    ready, run = jc.prepare(tree, two, x), run_of(two)
    jc.save(tmp_path / "ready.safetensors", ready)
    again = jc.load(tmp_path / "ready.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(ready)
    assert run(again, x).tolist() == run(ready, x).tolist()


def test_what_is_not_laid_out_says_why(monkeypatch) -> None:
    def grouped(p, x):
        return convolved(x, p["w"], feature_group_count=2)

    params, x = {"w": normal(3, 3, 2, 6)}, normal(1, 4, 4, 4)
    with pytest.raises(ValueError, match="'w': it is the kernel of a convolution in groups"):
        jc.prepare(jc.quantize(jc.Int(4), roles=jc.roles(grouped)(params, x)).apply((), params), grouped, x)

    def fn(p, x):
        return convolved(x, p["w"])

    x = normal(1, 4, 4, 2)
    for grid, why in (
        (jc.Int(8, symmetric=False), "a kernel with zero points is not multiplied as integers"),
        (jc.quantization.NF4(), "codes name levels, and convolutions multiply integers"),
    ):
        with pytest.raises(ValueError, match=why):
            jc.prepare(jc.quantize(grid, per=jc.Tensor()).apply((), params), fn, x)
    blocks = jc.quantize(
        jc.Int(4), per=jc.Groups(9), roles=jc.roles(fn)({"w": normal(3, 3, 9, 6)}, normal(1, 4, 4, 9))
    ).apply((), {"w": normal(3, 3, 9, 6)})
    with pytest.raises(ValueError, match="it has several scales along what is summed over"):
        jc.prepare(blocks, fn, normal(1, 4, 4, 9))
    monkeypatch.setattr(sys.modules["jaxcomp.kernels.prepare"], "missing", lambda: "it is gone")
    with pytest.raises(ValueError, match="whose code is compiled here, and it is gone"):
        jc.prepare(jc.quantize(jc.Int(4), per=jc.Tensor()).apply((), params), fn, x)


@EACH
def test_a_tree_prepared_elsewhere_runs_where_there_is_no_code(fn, monkeypatch) -> None:
    tree, x = tree_of(fn)
    ready = jc.prepare(tree, fn, x)
    wanted = run_of(fn)(jc.pack(tree), x)
    monkeypatch.setattr(llvm_panels, "features", frozenset)
    assert run_of(fn)(ready, x).tolist() == wanted.tolist()
    report = coverage(fn, RULES, integer=True)(ready, x)
    assert [(row.done, row.form) for row in report.rows] == [("integer", "own")] * len(tree)
