"""Rounding, dots and depthwise convolutions in LLVM code: the bits of XLA's own, in every kind of program."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.core.layouts import Groups, Tokens
from jaxcomp.kernels import llvm_panels
from tests.marks import quick

pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes())),
]
RNG = np.random.default_rng(0)
NUMBERS = ("NHWC", "HWIO", "NHWC")
SHIFTED = jc.Int(8, symmetric=False)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def depthwise(p, x):
    w = p["w"].astype(x.dtype)
    y = jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=NUMBERS, feature_group_count=20)
    return jax.nn.relu(y)


def channels_first(p, x):
    numbers = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=20)


def signal(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1,), [(4, 0)], None, (2,), numbers, feature_group_count=20)


def line(p, x):
    return jnp.tanh(x @ p["w"].astype(x.dtype))


def turned(p, x):
    return x @ p["w"].T


def heads(p, x):
    return jnp.einsum("btd,dhk->bthk", x, p["w"])


def attention(p, x):
    q = x @ p["w"]
    scores = jnp.einsum("bqhd,bkhd->bhqk", *[q.reshape(*q.shape[:2], 2, 32)] * 2)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), q.reshape(*q.shape[:2], 2, 32))


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


PROGRAMS = {
    depthwise: ((3, 3, 1, 20), (2, 6, 5, 20), "depthwise"),
    channels_first: ((20, 1, 3, 3), (2, 20, 6, 5), "depthwise"),
    signal: ((3, 1, 20), (3, 11, 20), "depthwise"),
    line: ((64, 80), (96, 64), "panels"),
    turned: ((80, 64), (96, 64), "panels"),
    heads: ((64, 4, 20), (2, 96, 64), "panels"),
    attention: ((64, 64), (2, 96, 64), "panels"),
    scanned: ((3, 64, 64), (96, 64), "panels"),
}
ACTS = {
    "static": Act(8),
    "dynamic": Act(8, range=Dynamic()),
    "symmetric": Act(8, symmetric=True, range=Dynamic()),
    "tokens": Act(8, range=Dynamic(), per=Tokens()),
    "groups": Act(8, range=Dynamic(), per=Groups(16)),
    "4 bits": Act(4, range=Dynamic()),
}
GRIDS = {"Int8": jc.Int(8), "Int4": jc.Int(4), "shifted": SHIFTED}


def tree_of(fn, grid=jc.Int(8)):  # noqa: B008 - frozen
    shape, of_x, _ = PROGRAMS[fn]
    params, x = {"w": normal(*shape)}, normal(*of_x)
    return jc.pack(jc.quantize(grid, per=jc.Channels(), roles=jc.roles(fn)(params, x)).apply((), params)), x


def run_of(fn, act="dynamic", **how):
    q = quantize_function(fn, {".*": ACTS[act]}, **{"integer": True, **how})
    return jax.jit(lambda tree, ranges, x: q(tree, ranges, x))


def ranges_for(fn, act, x):
    if not ACTS[act].needs_range:
        return None
    dense = {"w": normal(*PROGRAMS[fn][0])}
    return jc.activations.ranges_of(jax.jit(jc.calibrate(fn))(dense, x))


@pytest.fixture
def without(monkeypatch):
    """The same programs without code of ours, from when it is called."""

    def off():
        jax.clear_caches()  # what is alike is lowered once
        for name in ("encoded", "coded_dots", "coded_rows"):
            monkeypatch.setattr(sys.modules[f"jaxcomp.activations.{name}"], "refusal", lambda *_: "off")
        monkeypatch.setattr(sys.modules["jaxcomp.kernels.llvm_depthwise"], "refusal", lambda *_: "off")

    yield off
    jax.clear_caches()


@pytest.mark.parametrize("grid", quick(GRIDS, "Int8"))
@pytest.mark.parametrize("act", quick(ACTS, "static", "tokens"))
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_it_gives_the_same_bits(fn, act, grid, without) -> None:
    if PROGRAMS[fn][2] == "depthwise" and (act == "groups" or grid == "shifted"):
        pytest.skip("these are for dots")
    tree, x = tree_of(fn, GRIDS[grid])
    ranges = ranges_for(fn, act, x)
    run = run_of(fn, act)
    text = run.lower(tree, ranges, x).as_text()
    assert ("jaxcomp_codes" in text or "jaxcomp_rows_of_codes" in text) == (act != "groups")
    assert f"jaxcomp_{PROGRAMS[fn][2]}" in text or act == "groups"
    got = run(tree, ranges, x)
    without()
    wanted = run_of(fn, act)
    assert "jaxcomp" not in wanted.lower(tree, ranges, x).as_text()
    np.testing.assert_array_equal(got, wanted(tree, ranges, x))


@pytest.mark.parametrize("fn", quick([depthwise, line, attention], depthwise, attention), ids=lambda fn: fn.__name__)
def test_numbers_that_are_none_and_infinities(fn, without) -> None:
    tree, x = tree_of(fn)
    x = x.at[0, 1].set(jnp.nan).at[1, 0].set(jnp.inf)
    got = run_of(fn, "tokens")(tree, None, x)
    without()
    np.testing.assert_array_equal(got, run_of(fn, "tokens")(tree, None, x))
    assert np.isnan(got[0]).any()


@pytest.mark.parametrize("fn", quick(PROGRAMS, depthwise, attention), ids=lambda fn: fn.__name__)
def test_gradients_and_maps(fn, without) -> None:
    tree, x = tree_of(fn)
    q = quantize_function(fn, {".*": ACTS["tokens"]}, integer=True)
    run = jax.jit(jax.value_and_grad(lambda x: (q(tree, None, x) ** 2).sum()))
    batches = jnp.stack([x, -x, 2 * x])
    mapped = jax.jit(jax.vmap(lambda x: q(tree, None, x)))
    found = run(x), mapped(batches), q(tree, None, x)
    assert found[1].tolist() == [jax.jit(lambda x: q(tree, None, x))(one).tolist() for one in batches]
    without()
    run = jax.jit(jax.value_and_grad(lambda x: (q(tree, None, x) ** 2).sum()))
    wanted = run(x), jax.jit(jax.vmap(lambda x: q(tree, None, x)))(batches), q(tree, None, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fn", quick([depthwise, line], line), ids=lambda fn: fn.__name__)
def test_numbers_of_other_types(fn, dtype, without) -> None:
    tree, x = tree_of(fn)
    x = x.astype(dtype)
    got = run_of(fn)(tree, None, x)
    without()
    np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (got, run_of(fn)(tree, None, x))))


@pytest.mark.parametrize("fn", quick(PROGRAMS, depthwise, line), ids=lambda fn: fn.__name__)
def test_programs_that_are_kept_hold_no_code_of_ours(fn) -> None:
    tree, x = tree_of(fn)
    run = run_of(fn)
    kept = export.export(run, platforms=("cpu", "cuda", "tpu"))(tree, None, x)
    assert "jaxcomp_" not in kept.mlir_module()
    np.testing.assert_array_equal(kept.call(tree, None, x), run(tree, None, x))


@pytest.mark.parametrize("fn", quick(PROGRAMS, depthwise, line), ids=lambda fn: fn.__name__)
def test_readers_of_programs_see_the_products(fn) -> None:
    tree, x = tree_of(fn)
    dense = jc.materialize(tree)
    macs = jc.trace.cost(run_of(fn))(tree, None, x).macs
    assert macs == jc.trace.cost(fn)(dense, x).macs


def test_reports_name_the_form_of_depthwise_kernels() -> None:
    tree, x = tree_of(depthwise)
    report = coverage(depthwise, {".*": ACTS["dynamic"]}, integer=True)(tree, x)
    assert [(row.done, row.form) for row in report.rows] == [("integer", "integers on cpu, own on cuda, rocm and tpu")]


def test_few_rows_keep_the_product_of_xla() -> None:
    tree, x = tree_of(line)
    assert "jaxcomp_panels" not in run_of(line).lower(tree, None, x[:64]).as_text()
    assert "jaxcomp_panels" in run_of(line).lower(tree, None, x[:65]).as_text()
