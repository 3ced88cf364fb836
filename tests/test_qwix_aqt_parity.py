"""What docs/coming-from.md says of qwix and AQT, tried against them; both are in the extra ``benchmarks``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxcomp as jc

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs
    pytest.mark.slow,
]
W = jax.random.normal(jax.random.key(0), (64, 32))
X = jax.random.normal(jax.random.key(1), (16, 64))


def fn(params, x):
    return x @ params["kernel"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile", [None, 32])
def test_weights_of_qwix_have_our_scale_and_differ_at_halves_alone(bits, tile) -> None:
    qarray = pytest.importorskip("qwix._src.core.qarray")
    tiled = {} if tile is None else {"tiled_axes": {0: tile}}
    how = qarray.HowToQuantize(
        qtype=jnp.dtype(f"int{bits}"), channelwise_axes=(1,), calibration_method="absmax", **tiled
    )
    theirs = qarray.quantize(W, how)
    per = jc.Channels() if tile is None else jc.Groups(tile)
    ours = jc.quantize(jc.Int(bits), per=per).apply((), {"kernel": W})["kernel"]
    np.testing.assert_allclose(np.ravel(ours.scale), np.ravel(theirs.scale), rtol=1e-6)
    steps = np.abs(np.asarray(ours.materialize() - qarray.dequantize(theirs))).reshape(-1, 32)
    most = np.asarray(theirs.scale).max()
    assert steps.max() <= 1.0001 * most  # extremes lie half a step beyond the highest code: theirs go to the even one
    assert (steps > 1e-6).sum() <= theirs.scale.size


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_aqt_are_ours_with_a_scale_a_row(bits) -> None:
    config = pytest.importorskip("aqt.jax.v2.config")
    theirs = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)(X, W, (((1,), (0,)), ((), ())))
    act = jc.Act(bits, symmetric=True, range=jc.activations.Dynamic(), per=jc.core.Tokens())
    tree = jc.quantize(jc.Int(bits)).apply((), {"kernel": W})
    np.testing.assert_allclose(jc.quantize_function(fn, {".*": act})(tree, None, X), theirs, atol=1e-5)


def test_a_rule_of_qwix_is_a_transform_and_a_rule() -> None:
    qwix = pytest.importorskip("qwix")
    net = nn.Dense(32, use_bias=False)
    params = net.init(jax.random.key(0), X)
    rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    with jax.numpy_dtype_promotion("standard"):
        theirs = qwix.quantize_model(net, qwix.QtProvider([rule])).apply(params, X)
    act = jc.Act(8, symmetric=True, range=jc.activations.Dynamic(), per=jc.core.Tokens())
    ours = jc.quantize_function(net.apply, {".*": act})(jc.quantize(jc.Int(8)).apply((), params), None, X)
    exact = net.apply(params, X)
    assert jnp.linalg.norm(ours - theirs) < 0.5 * jnp.linalg.norm(theirs - exact)  # but for codes of halves
