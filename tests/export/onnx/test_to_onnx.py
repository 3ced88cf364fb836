"""Whole networks as ONNX files, run by onnxruntime."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxcomp.export import ExportError, to_onnx
from tests.export.running import exported, operators, run


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_net(p, x):
    h = jax.nn.relu(x @ p["w"] + p["b"][None])
    return h @ p["v"]


DENSE = {"w": draws(7, 5), "b": draws(5, seed=1), "v": draws(5, 3, seed=2)}


def conv_net(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + b[None, None, None])
    return x.mean((1, 2))


CONV = {"w": [draws(3, 3, 2, 4), draws(3, 3, 4, 5)], "b": [draws(4), draws(5)]}


def test_dense(tmp_path) -> None:
    x = draws(2, 7)
    (y,) = exported(tmp_path, dense_net, DENSE, x)
    np.testing.assert_allclose(y, np.maximum(x @ DENSE["w"] + DENSE["b"], 0) @ DENSE["v"], atol=1e-5)


def test_conv_of_any_batch(tmp_path) -> None:
    x, (b,) = draws(3, 8, 6, 2), export.symbolic_shape("b")
    to_onnx(tmp_path / "net.onnx", conv_net, CONV, jax.ShapeDtypeStruct((b, 8, 6, 2), jnp.float32))
    (y,) = run(tmp_path / "net.onnx", x)
    np.testing.assert_allclose(y, conv_net(CONV, x), atol=1e-5)
    assert operators(tmp_path / "net.onnx").count("Transpose") == 1, "the image's alone"


def test_unknown_primitive(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"'erf_inv' at .*test_to_onnx.py.*no rule"):
        to_onnx(tmp_path / "net.onnx", lambda p, x: lax.erf_inv(x * p["w"]), {"w": draws(3)}, draws(3))
    assert not list(tmp_path.iterdir())
