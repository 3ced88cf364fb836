"""Quantized products in the file: what they compute, and what onnxruntime makes of them."""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, quantize_function
from jaxcomp.artifact import FileError
from jaxcomp.export import ExportError, to_onnx
from jaxcomp.export.onnx.export import FloatConvolutions
from jaxcomp.trace.ranges import Range
from tests.export.onnx.test_to_onnx import CONV, DENSE, conv_net, dense_net, draws
from tests.export.running import exported, operators, run, session
from tests.marks import quick

W8A8 = {r".*": Act(8)}


INT8 = jc.Int(8)


INT7 = jc.Int(7)
"""Of which pairs of products fit 16 bits, in which onnxruntime adds them on x86 processors without VNNI."""


def quantized(params, grid=INT8, **how):
    how = {"per": jc.Channels(-1), "where": r".*w.*|.*v", **how}
    return jc.pack(jc.quantize(grid, **how).apply((), params))


def over(*names, low=0.0, high=3.0):
    """Ranges as a calibration gives them, which takes longer."""
    return {name: Range(jnp.float32(low), jnp.float32(high)) for name in names}


OF_DENSE = {**over("w", low=-2.0, high=2.5), **over("v")}


def optimized(path, folder) -> Counter[str]:
    session(path, optimized=folder / "optimized.onnx")
    return Counter(operators(folder / "optimized.onnx"))


CASES = {
    f"{act.bits} {grid.label}{' symmetric' * act.symmetric}": (act, grid)
    for act in (Act(8), Act(8, symmetric=True), Act(4), Act(3, symmetric=True))
    for grid in (jc.Int(8), jc.Int(4), jc.Int(8, symmetric=False))
}


@pytest.mark.parametrize("case", quick(CASES, "8 int8", "4 int4"))
def test_dots_are_the_integer_function_bit_by_bit(case, tmp_path) -> None:
    act, grid = CASES[case]
    params, x, rules = quantized(DENSE, grid), draws(6, 7), {r".*": act}
    (y,) = exported(tmp_path, dense_net, params, x, rules=rules, ranges=OF_DENSE)
    wanted = jax.jit(quantize_function(dense_net, rules, integer=True, strict=True))(params, OF_DENSE, x)
    np.testing.assert_array_equal(y, wanted)
    assert operators(tmp_path / "fn.onnx").count("MatMulInteger") == 2


def test_dynamic_ranges(tmp_path) -> None:
    params, x, rules = quantized(DENSE, INT7), draws(6, 7), {r".*": Act(8, range=Dynamic())}
    (y,) = exported(tmp_path, dense_net, params, x, rules=rules)
    wanted = jax.jit(quantize_function(dense_net, rules, integer=True, strict=True))(params, None, x)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    assert optimized(tmp_path / "fn.onnx", tmp_path)["DynamicQuantizeMatMul"] == 2


def test_products_of_activations(tmp_path) -> None:
    """Both sides quantized, one of them transposed on its way."""

    def fn(p, x):
        y = x * p["s"]
        return jnp.einsum("bqhd,bkhd->bhqk", x, y)

    x, p = draws(2, 3, 2, 4), {"s": np.float32(2)}
    ranges = {f"bqhd,bkhd->bhqk/dot_0:{i}": Range(jnp.float32(-2), jnp.float32(2)) for i in (0, 1)}
    (y,) = exported(tmp_path, fn, p, x, rules=W8A8, ranges=ranges)
    wanted = jax.jit(quantize_function(fn, W8A8, integer=True, strict=True))(p, ranges, x)
    np.testing.assert_array_equal(y, wanted)
    assert operators(tmp_path / "fn.onnx").count("MatMulInteger") == 1


def dot(p, x):
    return x @ p["w"]


@pytest.mark.parametrize(
    ("grid", "per", "kind"),
    [
        (jc.Int(4), jc.Groups(16), "int4"),
        (jc.Int(4, symmetric=False), jc.Groups(16), "uint4"),
        (jc.Int(8), jc.Channels(-1), "int8"),
        (jc.Int(8), jc.Tensor(), "int8"),
    ],
    ids=["int4 groups", "uint4 groups", "int8 channels", "int8 tensor"],
)
def test_weights_alone(grid, per, kind, tmp_path) -> None:
    """Codes stay as narrow as they are, onnxruntime multiplies by them, and in floats if it is told to."""
    w, x = draws(64, 32), draws(3, 64)
    params = quantized({"w": w}, grid, per=per, roles=jc.roles(dot)({"w": w}, x))
    size = to_onnx(tmp_path / "fn.onnx", dot, params, x)
    assert size < w.size * int(kind[-1]) / 8 * 1.6 + 1000
    config = {"session.qdq_matmulnbits_accuracy_level": "1"}
    ran = session(tmp_path / "fn.onnx", optimized=tmp_path / "optimized.onnx", **config)
    np.testing.assert_allclose(ran.run(None, {"input": x})[0], x @ np.asarray(jc.materialize(params)["w"]), atol=1e-4)
    assert operators(tmp_path / "optimized.onnx") == ["MatMulNBits"]


def test_a_relu_behind_weights_alone_does_not_hide_them(tmp_path) -> None:
    """onnxruntime would fuse it into a product of floats, for a float product comes next."""

    def fn(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"]) @ p["head"]

    given = {"w": draws(64, 32), "b": draws(1, 32), "head": draws(32, 4)}
    params = {**given, **quantized({"w": given["w"]}, jc.Int(4), per=jc.Groups(32, 0))}
    to_onnx(tmp_path / "fn.onnx", fn, params, draws(1, 64))
    session(tmp_path / "fn.onnx", optimized=tmp_path / "optimized.onnx")
    assert "MatMulNBits" in operators(tmp_path / "optimized.onnx")


def test_kernels_of_4_bits_take_4_bits_of_the_file_and_run_on_integers(tmp_path) -> None:
    def fn(p, x):
        for name in ("w", "v"):
            x = lax.conv_general_dilated(x, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return 2.0 * x

    x, small = draws(2, 5, 5, 16), quantized({"w": draws(3, 3, 16, 32), "v": draws(1, 1, 32, 16)}, jc.Int(4))
    ranges = {**over("w", low=-3.0), **over("v", low=-30.0, high=30.0)}
    size = to_onnx(tmp_path / "fn.onnx", fn, small, x, rules={".*": Act(8)}, ranges=ranges)
    assert size < (9 * 16 * 32 + 32 * 16) / 2 + 2500
    assert optimized(tmp_path / "fn.onnx", tmp_path)["QLinearConv"] >= 1


@cache
def normed():
    """A convolution with a batch norm behind it, and its quantized weights."""

    def fn(p, x):
        x = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = (x - p["mean"]) * (p["gain"] * lax.rsqrt(p["var"] + 1e-5)) + p["bias"]
        x = jax.nn.relu(x)
        x = lax.conv_general_dilated(x, p["v"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return 2.0 - x

    each = {k: draws(1, 1, 1, 4, seed=i) ** 2 + 0.1 for i, k in enumerate(("mean", "gain", "var", "bias"))}
    return fn, {"w": draws(3, 3, 3, 4), "v": draws(1, 1, 4, 5), **each}


def test_batch_norm_goes_into_the_scales(tmp_path) -> None:
    fn, params = normed()
    x, small = draws(2, 6, 5, 3), quantized(params, INT7)
    ranges = {**over("w", low=-3.0), **over("v", high=9.0)}
    (y,) = exported(tmp_path, fn, small, x)
    np.testing.assert_allclose(y, fn(jc.materialize(small), x), atol=1e-4)
    kept = [op for op in operators(tmp_path / "fn.onnx") if op not in ("Transpose", "DequantizeLinear", "Identity")]
    assert kept == ["Conv", "Relu", "Conv"]
    (y,) = exported(tmp_path, fn, small, x, rules=W8A8, ranges=ranges)
    wanted = jax.jit(quantize_function(fn, W8A8, integer=True, strict=True))(small, ranges, x)
    np.testing.assert_allclose(y, wanted, atol=0.02 * np.abs(wanted).max())
    assert optimized(tmp_path / "fn.onnx", tmp_path)["QLinearConv"] == 1, "the first; nobody quantizes the second's"


def residual(p, x):
    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(conv(x, p["w0"]))
    for i in (1, 3):
        x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p[f"w{i}"])), p[f"w{i + 1}"]))
    return x.mean((1, 2)) @ p["v"]


OF_RESIDUAL = {**over("w0", low=-3.0), **over("w1", "w2", "w3", "w4", "v")}


def residual_net():
    params = {f"w{i}": draws(3, 3, 4 if i else 2, 4, seed=i) / 5 for i in range(5)}
    return {**params, "v": draws(4, 3)}


def test_residual_sums_run_on_codes_where_there_are_samples(tmp_path) -> None:
    params, x, n = residual_net(), draws(16, 6, 6, 2), export.symbolic_shape("n")[0]
    small, shape = quantized(params, INT7), jax.ShapeDtypeStruct((n, 6, 6, 2), jnp.float32)
    wanted = jax.jit(quantize_function(residual, W8A8, integer=True, strict=True))(small, OF_RESIDUAL, x)
    path = tmp_path / "fn.onnx"
    with pytest.warns(FloatConvolutions, match="give samples="):
        to_onnx(path, residual, small, shape, rules=W8A8, ranges=OF_RESIDUAL)
    np.testing.assert_allclose(run(path, x)[0], wanted, atol=0.02 * np.abs(wanted).max())
    assert optimized(path, tmp_path)["QLinearConv"] == 2
    to_onnx(path, residual, small, shape, rules=W8A8, ranges=OF_RESIDUAL, samples=[x[:8], x[8:]])
    np.testing.assert_allclose(run(path, x)[0], wanted, atol=0.05 * np.abs(wanted).max())
    found = optimized(path, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["MatMulInteger"]) == (5, 2, 1)
    assert found["Transpose"] <= 2, "the image's, and codes back"


def test_layouts(tmp_path) -> None:
    x = draws(3, 8, 6, 2)
    fn = lambda p, x: conv_net(p, x)[:, None]  # noqa: E731
    to_onnx(tmp_path / "a.onnx", fn, CONV, x, layouts={"input": (0, 3, 1, 2), "output": (2, 1, 0)})
    (y,) = run(tmp_path / "a.onnx", x.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(y.transpose(2, 1, 0), fn(CONV, x), atol=1e-5)
    to_onnx(tmp_path / "b.onnx", conv_net, CONV, x, layouts={"input": (0, 3, 1, 2)})
    assert "Transpose" not in operators(tmp_path / "b.onnx")


def wrong_layout(path) -> None:
    to_onnx(path, dense_net, DENSE, draws(2, 7), layouts={"input": (0, 2)})


def foreign_layout(path) -> None:
    to_onnx(path, dense_net, DENSE, draws(2, 7), layouts={"image": (0, 1)})


def wrong_samples(path) -> None:
    p, x = residual_net(), draws(2, 6, 6, 2)
    to_onnx(path, residual, quantized(p), x, rules=W8A8, ranges=OF_RESIDUAL, samples=[x[0]])


def no_rules(path) -> None:
    to_onnx(path, dense_net, DENSE, draws(2, 7), ranges={})


def random_key(path) -> None:
    to_onnx(path, lambda p, k: p["up"] + jax.random.normal(k), {"up": jnp.ones(3)}, jax.random.key(0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (wrong_layout, r"layouts\['input'\] must be an order of the 2 axes of \(2, 7\), got \(0, 2\)"),
        (foreign_layout, r"layouts name 'image'; the file has 'input', 'output'"),
        (wrong_samples, r"a batch of samples= has arrays of shape \[\(6, 6, 2\)\], wanted \[\(2, 6, 6, 2\)\]"),
        (no_rules, "ranges= is of rounded activations, and no rules= round any; give rules too"),
        (random_key, r"argument 0 is of key<fry>, which ONNX has not; make what it is for"),
    ],
    ids=["order", "name", "samples", "rules", "key"],
)
def test_errors(wrong, said, tmp_path) -> None:
    with pytest.raises(ExportError, match=said):
        wrong(tmp_path / "fn.onnx")
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path) -> None:
    with pytest.raises(FileError, match=r"^to_onnx: cannot write '.*net.onnx': No such file"):
        to_onnx(tmp_path / "gone" / "net.onnx", dense_net, DENSE, draws(2, 7))


def pooled(p, x):
    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    y = jax.nn.relu(conv(x, p["w0"]))
    y = jax.nn.relu(nn.max_pool(jnp.concatenate([y, conv(y, p["w1"])], -1), (2, 2), (2, 2)))
    return jax.nn.silu(conv(y, p["w2"])).mean((1, 2)) @ p["v"]


def test_grids_go_through_pooling_and_concatenation(tmp_path) -> None:
    x, path = draws(16, 6, 6, 2), tmp_path / "fn.onnx"
    params = {"w0": draws(3, 3, 2, 4) / 3, "w1": draws(3, 3, 4, 4) / 5, "w2": draws(3, 3, 8, 4) / 5, "v": draws(4, 3)}
    ranges = {**over("w0", low=-3.0), **over("w1", "w2"), **over("v", low=-1.0)}
    small = quantized(params, INT7)
    wanted = jax.jit(quantize_function(pooled, W8A8, integer=True, strict=True))(small, ranges, x)
    with pytest.warns(FloatConvolutions):
        to_onnx(path, pooled, small, x, rules=W8A8, ranges=ranges)
    np.testing.assert_allclose(run(path, x)[0], wanted, atol=0.02 * np.abs(wanted).max())
    assert optimized(path, tmp_path)["QLinearConv"] == 1
    to_onnx(path, pooled, small, x, rules=W8A8, ranges=ranges, samples=[x])
    np.testing.assert_allclose(run(path, x)[0], wanted, atol=0.03 * np.abs(wanted).max())
    found = optimized(path, tmp_path)
    assert (found["QLinearConv"], found["MaxPool"], found["Conv"]) == (3, 1, 0)


def test_what_stretches_one_channel_stays(tmp_path) -> None:
    """A product of one channel that an operator repeats over four cannot hold their biases."""

    def fn(p, x):
        four, y = p["four"], lax.conv(x[None, None], p["v"], (1, 1), "SAME")
        return (x @ p["w"]) * four[None] + four[None], y + four[None, :, None, None]

    p, x = {"w": draws(7, 1), "v": draws(1, 1, 3, 3), "four": draws(4)}, draws(5, 7)
    for found, wanted in zip(exported(tmp_path, fn, p, x), fn(p, x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ExportError, match=rf'{package}.* not installed; install it with: pip install "jaxcomp\[export\]"'
    ):
        wrong_samples(tmp_path / "fn.onnx")
    assert not list(tmp_path.iterdir())
