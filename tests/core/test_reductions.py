"""NaN among many numbers: XLA on CPU loses it in a maximum of 4,096 and more, so nothing here rests on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Backward, Dynamic, quantize_function, ranges_of
from jaxcomp.core.reductions import max_or_nan, nan_in
from jaxcomp.trace.calibrate import calibrate

RNG = np.random.default_rng(0)


def product(params, x):
    return x @ params["kernel"]


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (2, 4096), (3, 16, 16, 33)])
def test_fault_6_largest_values_keep_nan_at_any_size(shape):
    for _ in range(20):
        x = RNG.normal(size=shape).astype(np.float32)
        x.flat[RNG.integers(x.size)] = np.nan
        x.flat[0] = np.inf if np.isfinite(x.flat[0]) else x.flat[0]
        axes = tuple(range(1, x.ndim))
        with np.errstate(invalid="ignore"):
            want = x.max(axes)
        np.testing.assert_array_equal(jax.jit(lambda x: max_or_nan(x, tuple(range(1, x.ndim))))(x), want)
        assert jnp.isnan(nan_in(jnp.asarray(x)))
    assert nan_in(jnp.full(shape, jnp.inf)) == 0


@pytest.mark.parametrize(
    "act", [Act(8), Act(8, range=Dynamic()), Act(8, symmetric=True, range=Dynamic(), per=jc.core.Tokens())]
)
def test_fault_6_nan_among_many_activations_is_seen_on_integers(act):
    params = {"kernel": jnp.asarray(RNG.normal(size=(128, 64)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(96, 128)), jnp.float32)
    tree = jc.quantize(jc.Int(8)).apply((), params)
    ranges = ranges_of(calibrate(product)(params, x)) if act.needs_range else None
    run = jax.jit(quantize_function(product, {".*": act}, integer=True))
    spoilt = jnp.isnan(run(tree, ranges, x.at[50, 3].set(jnp.nan)))
    assert spoilt[50].all()
    assert not jnp.isnan(run(tree, ranges, x)).any()


def test_fault_6_a_calibration_batch_with_nan_among_many_numbers_is_refused():
    params, x = {"kernel": jnp.ones((128, 64))}, jnp.ones((96, 128)).at[50, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN"):
        ranges_of(jax.jit(calibrate(product))(params, x))


def test_fault_6_gradients_with_nan_among_many_numbers_stay_nan_on_integers():
    params, x = {"kernel": jnp.asarray(RNG.normal(size=(64, 96)), jnp.float32)}, jnp.ones((128, 64))
    q = quantize_function(product, {".*": Act(8, range=Dynamic())}, backward=Backward())
    pulled = jnp.ones((128, 96)).at[50, 3].set(jnp.nan)
    grads = jax.jit(lambda p: jax.vjp(lambda p: q(p, None, jax.random.key(0), x), p)[1](pulled)[0])(params)
    assert jnp.isnan(grads["kernel"]).any()


@pytest.mark.parametrize("make", [lambda f: f.uniform(4), lambda f: f.uniform(4, limit=3.0), lambda f: f.sign()])
def test_fault_7_messages_of_many_spoilt_numbers_are_spoilt(make):
    compressor = make(jc.federated)
    update = {"w": jnp.asarray(RNG.normal(size=(100, 100)), jnp.float32).at[50, 3].set(jnp.nan)}
    state = compressor.init(jax.tree.map(jnp.nan_to_num, update))

    @jax.jit
    def sent(update):
        return compressor.decode(compressor.encode(state, update, key=jax.random.key(0))[0])

    assert jnp.isnan(sent(update)["w"]).any()
