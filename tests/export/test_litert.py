"""LiteRT models, run by its interpreter: what the tree and the rules say is what the file holds."""

from __future__ import annotations

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Dynamic
from jaxcomp.core.leaves import materialize
from jaxcomp.export import ExportError, to_litert
from jaxcomp.export.litert_model import Model, given, interpreter, results

pytestmark = pytest.mark.skipif(
    find_spec("litert_converter") is None or find_spec("ai_edge_quantizer") is None,
    reason="needs LiteRT's packages; docs/export.md says how they are installed",
)
RNG = np.random.default_rng(0)


def f32(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def small_net(p, x):
    conv = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(conv * p["gain"][None, None, None] + p["shift"][None, None, None])
    return jnp.mean(x, (1, 2)) @ p["head"] + p["bias"][None]


PARAMS = {
    "conv": f32(3, 3, 3, 32, scale=0.2),
    "gain": f32(32),
    "shift": f32(32),
    "head": f32(32, 16),
    "bias": f32(16),
}
X = f32(4, 8, 8, 3)
SAMPLES = [(np.asarray(X),), (np.asarray(f32(4, 8, 8, 3)),)]
INT8, INT4 = (jc.quantize(jc.Int(bits), per=jc.Channels(-1), where="conv|head") for bits in (8, 4))


def run(path, *args) -> np.ndarray:
    started = interpreter(path.read_bytes())
    given(started, [np.asarray(x) for x in args])
    started.invoke()
    return results(started)[0]


def kinds(path) -> list[str]:
    return [kind for kind, _, _ in Model.of(path.read_bytes()).ops]


def test_float_is_the_function_with_batch_norm_folded(tmp_path) -> None:
    size = to_litert(tmp_path / "m", small_net, PARAMS, X)
    assert size == os.path.getsize(tmp_path / "m")
    np.testing.assert_allclose(run(tmp_path / "m", X), small_net(PARAMS, X), rtol=1e-4, atol=1e-4)
    assert kinds(tmp_path / "m") == ["CONV_2D", "MEAN", "FULLY_CONNECTED"]


@pytest.mark.parametrize("method", [INT8, INT4], ids=["int8", "int4"])
def test_weights_alone_are_the_leaves_numbers(method, tmp_path) -> None:
    tree = method.apply((), PARAMS)
    to_litert(tmp_path / "m", small_net, tree, X)
    np.testing.assert_allclose(run(tmp_path / "m", X), small_net(materialize(tree), X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [INT8, INT4], ids=["int8", "int4"])
def test_static_activations_run_on_integers(method, tmp_path) -> None:
    tree, rules = method.apply((), PARAMS), {".*": jc.Act(8)}
    ranges = jc.activations.ranges_of(jc.calibrate(small_net)(PARAMS, X))
    to_litert(tmp_path / "m", small_net, tree, X, rules=rules, ranges=ranges, samples=SAMPLES)
    wanted = jc.quantize_function(small_net, rules)(tree, ranges, X)
    found = run(tmp_path / "m", X)
    assert abs(found - wanted).max() < 0.02 * abs(wanted).max()
    assert kinds(tmp_path / "m") == ["QUANTIZE", "CONV_2D", "MEAN", "DEQUANTIZE", "FULLY_CONNECTED"]
    model = Model.of((tmp_path / "m").read_bytes())
    given_range = ranges[next(iter(ranges))]
    scale = (max(float(given_range.high), 0) - min(float(given_range.low), 0)) / 255
    entering = model.tensors[model.products[0].inputs[0]].quantization.scale
    np.testing.assert_allclose(entering, scale, rtol=1e-5)


def test_dynamic_activations_and_a_site_left_in_float(tmp_path) -> None:
    tree = INT8.apply((), PARAMS)
    to_litert(tmp_path / "m", small_net, tree, X, rules={"head": jc.Act(8, range=Dynamic())})
    found, wanted = run(tmp_path / "m", X), small_net(materialize(tree), X)
    assert 0 < abs(found - wanted).max() < 0.02 * abs(wanted).max()
    assert kinds(tmp_path / "m").count("DEQUANTIZE") == 1, "the convolution's weight alone"


def test_several_arguments_and_results_keep_their_order(tmp_path) -> None:
    def fn(p, a, b):
        return {"sum": a @ p + b, "double": 2 * b}

    a, b = f32(3, 8), f32(3, 8)
    w = f32(8, 8)
    to_litert(tmp_path / "m", fn, w, a, b)
    started = interpreter((tmp_path / "m").read_bytes())
    given(started, [np.asarray(a), np.asarray(b)])
    started.invoke()
    for found, wanted in zip(results(started), jax.tree.leaves(fn(w, a, b)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


RULES = {".*": jc.Act(8)}


@pytest.mark.parametrize(
    ("tree", "rules", "says"),
    [
        (jc.quantize(jc.Int(3), where="head"), None, r"'head' is Quantized int3.*Int\(8\) and Int\(4\)"),
        (jc.quantize(jc.Int(8), where="head"), RULES, r"'conv' has a rule.*quantize the weight to Int\(8\)"),
        (INT8, {".*": jc.Act(4)}, r"takes Act\(8\) and Act\(8, range=Dynamic\(\)\)"),
        (INT8, RULES, r"give samples="),
    ],
    ids=["int3", "float weight", "four bits", "no samples"],
)
def test_what_it_cannot_do_is_said(tree, rules, says, tmp_path) -> None:
    ranges = jc.activations.ranges_of(jc.calibrate(small_net)(PARAMS, X)) if rules else None
    with pytest.raises(ExportError, match=says):
        to_litert(tmp_path / "m", small_net, tree.apply((), PARAMS), X, rules=rules, ranges=ranges)
    assert not (tmp_path / "m").exists()


def test_codes_survive_scales_of_any_kind(tmp_path) -> None:
    leaf = INT8.apply((), PARAMS)["head"]
    small = jc.quantization.Quantized(jnp.clip(leaf.codes, -60, 60), leaf.scale, None, leaf.grid, leaf.dense_dtype)
    tree = {**PARAMS, "head": small}
    to_litert(tmp_path / "m", small_net, tree, X)
    np.testing.assert_allclose(run(tmp_path / "m", X), small_net(materialize(tree), X), rtol=1e-3, atol=1e-3)
    model = Model.of((tmp_path / "m").read_bytes())
    made = model.maker(model.products[1].inputs[1])
    assert made is not None
    assert (np.asarray(small.codes) == model.values(made[1][0]).view(np.int8).reshape(16, 32).T).all()


def test_four_bits_of_a_depthwise_convolution_lie_in_bytes(tmp_path) -> None:
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)

    w, x = f32(3, 3, 1, 4), f32(1, 5, 5, 4)
    leaf = jc.quantize(jc.Int(4), per=jc.Channels(-1)).apply((), w)
    to_litert(tmp_path / "m", fn, leaf, x)
    np.testing.assert_allclose(run(tmp_path / "m", x), fn(materialize(leaf), x), rtol=1e-3, atol=1e-3)


def test_scales_that_lie_across_inputs_are_an_error(tmp_path) -> None:
    tree = jc.quantize(jc.Int(8), per=jc.Groups(8, 0), where="head").apply((), PARAMS)
    with pytest.raises(ExportError, match=r"'head' does not lie on them.*per channel of its outputs"):
        to_litert(tmp_path / "m", small_net, tree, X)


def test_an_operation_that_the_converter_lacks_is_named(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"does not take this program.*other operations"):
        to_litert(tmp_path / "m", lambda p, x: jnp.fft.fft(x @ p).real, f32(8, 8), f32(2, 8))
