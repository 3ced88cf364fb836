"""Convolutions and pooling over odd shapes, run by onnxruntime and by JAX; one file of ONNX holds all cases."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.export import ExportError, to_onnx
from tests.export.onnx.test_to_onnx import draws
from tests.export.running import exported

X, W = draws(2, 7, 6, 4), draws(3, 2, 4, 5, seed=1)
NHWC, NCHW, DEEP = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC"), ("NHWDC", "HWDIO", "NHWDC")
LOWEST = -jnp.inf


def conv(x: Any, w: Any, strides: Any = (1, 1), padding: Any = "SAME", **how: Any) -> Any:
    how = {"dimension_numbers": NHWC, **how}
    return lax.conv_general_dilated(x, w, strides, padding, **how)


def image(x: Any) -> Any:
    """NCHW out of NHWC."""
    return x.transpose(0, 3, 1, 2)


def pool(x: Any, start: float, op: Any, sizes: Any, strides: Any = None, padding: Any = "VALID", **how: Any) -> Any:
    return lax.reduce_window(x, start, op, sizes, strides or (1,) * x.ndim, padding, **how)


CASES = {
    "plain": lambda x, w: conv(x, w),
    "strides": lambda x, w: conv(x, w, (2, 3), "VALID"),
    "uneven padding": lambda x, w: conv(x, w, padding=((0, 2), (3, 1))),
    "negative padding": lambda x, w: conv(x, w, padding=((-1, 2), (1, -2))),
    "dilated": lambda x, w: conv(x, w, rhs_dilation=(2, 3)),
    "with holes": lambda x, w: conv(x, w, padding=((2, 2), (1, 0)), lhs_dilation=(2, 3)),
    "grouped": lambda x, w: conv(x, w[:, :, :2, :4], feature_group_count=2),
    "depthwise": lambda x, w: conv(x, w[:, :, :1, :4], feature_group_count=4),
    "channels first": lambda x, w: conv(image(x), w.transpose(3, 2, 0, 1), dimension_numbers=NCHW),
    "one axis": lambda x, w: conv(x[:, 0], w[0], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    "three axes": lambda x, w: conv(x[..., None, :], w[:, :, None], (1, 2, 1), dimension_numbers=DEEP),
    "of its own results": lambda x, w: conv(conv(x, w)[..., :4], w),
    "kernel that is computed": lambda x, w: conv(x, x[0, :3, :2, :, None] * w),
    "bfloat16": lambda x, w: conv(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(jnp.float32) * 0.01,
    "max pool": lambda x, w: nn.max_pool(x, (3, 2), (2, 2), "SAME"),
    "min pool": lambda x, w: pool(x, jnp.inf, lax.min, (1, 3, 2, 1), (1, 1, 2, 1)),
    "avg pool": lambda x, w: nn.avg_pool(x, (3, 2), (2, 1), "SAME", count_include_pad=False),
    "pool channels first": lambda x, w: pool(image(x), LOWEST, lax.max, (1, 1, 2, 2), (1, 1, 2, 2)),
    "pool far outside": lambda x, w: pool(x, 0.0, lax.add, (1, 2, 2, 1), padding=((0, 0), (3, 0), (0, 4), (0, 0))),
    "pool dilated": lambda x, w: pool(x, LOWEST, lax.max, (1, 2, 2, 1), window_dilation=(1, 2, 3, 1)),
    "pool one of two axes": lambda x, w: pool(x[0, 0], 0.0, lax.add, (2, 1), padding="SAME"),
    "pool both axes": lambda x, w: pool(x[0, 0], LOWEST, lax.max, (2, 3), padding="SAME"),
    "pool a vector": lambda x, w: pool(x[0, 0, :, 0], LOWEST, lax.max, (3,), (2,)),
    "pool channels": lambda x, w: pool(x, LOWEST, lax.max, (1, 1, 1, 2), (1, 1, 1, 2)),
}  # fmt: skip


def test_windows(tmp_path) -> None:
    fn = lambda p, x: [case(x, p["w"]) for case in CASES.values()]  # noqa: E731
    for name, found, wanted in zip(CASES, exported(tmp_path, fn, {"w": W}, X), fn({"w": W}, X), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5, err_msg=name)


WRONG = {
    "'conv_general_dilated' at .*: it has batch groups": lambda w, x: conv(x, w[..., :4], batch_group_count=2),
    "no runtime convolves int16 into int16; cast to": lambda w, x: conv(x.astype(jnp.int16), w.astype(jnp.int16)),
    "no runtime pools int32; cast to": lambda w, x: pool(x[0, 0].astype(jnp.int32), 0, lax.add, (2, 2)),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_refused(said, tmp_path) -> None:
    with pytest.raises(ExportError, match=said):
        to_onnx(tmp_path / "fn.onnx", lambda p, x: WRONG[said](p["w"], x), {"w": W}, X)
