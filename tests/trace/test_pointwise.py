"""Which programs are functions of each number, as users write them, and which of these give NaN of no number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax, nn

from jaxcomp.trace.pointwise import Step, gives_numbers
from tests.trace.pointwise import by_jax, read

ACTIVATIONS = {
    "nothing": lambda x: x,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "clip": lambda x: jnp.clip(x, -2.0, 3.0),
    "clamp": lambda x: lax.clamp(-1.0, x, 4.0),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu by tanh": nn.gelu,
    "silu": nn.silu,
    "silu by hand": lambda x: x / (1 + jnp.exp(-x)),
    "sigmoid by hand": lambda x: x * nn.sigmoid(1.702 * x),
    "hard swish": nn.hard_swish,
    "hard swish by hand": lambda x: x * nn.relu6(x + 3) / 6,
    "hard sigmoid": nn.hard_sigmoid,
    "hard tanh": nn.hard_tanh,
    "elu": nn.elu,
    "selu": nn.selu,
    "celu": nn.celu,
    "leaky relu": nn.leaky_relu,
    "leaky relu by hand": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "mish": nn.mish,
    "softplus": nn.softplus,
    "soft sign": nn.soft_sign,
    "squareplus": nn.squareplus,
    "squared relu": lambda x: jnp.square(nn.relu(x)),
    "cubes": lambda x: x**3,
    "tanh": jnp.tanh,
    "erf": lax.erf,
    "both": lambda x: jnp.where((x > -1) & ~(x > 1), x, -x),
    "a call": lambda x: jax.jit(lambda x: jnp.maximum(jnp.minimum(x, 5.0), -5.0))(x),
    "on a grid": lambda x: jnp.clip(jnp.round(x * 4.0), -8, 7) / 4,
    "a barrier": lambda x: lax.stop_gradient(nn.relu(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_function_is_read(name) -> None:
    fn, x = ACTIVATIONS[name], jnp.linspace(-9, 9, 101)
    found = read(fn)
    assert found is not None
    np.testing.assert_allclose(by_jax(found, x), fn(x), rtol=1e-6, atol=1e-6)
    assert gives_numbers(found)


@pytest.mark.parametrize(
    "fn",
    [
        jnp.sin,
        lambda x: x * jnp.arange(3.0),
        lambda x: x - x.max(-1, keepdims=True),
        lambda x: x.T,
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
        lambda x: x**-2,
        lambda x: nn.softmax(x),
        lambda x: x + jnp.nan,
        lambda x: jnp.cumsum(x, 1),
        lambda x: jax.jit(lambda x: jnp.sin(x))(x),
        lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    ],
)
def test_what_is_another_is_not(fn) -> None:
    assert read(fn) is None


def test_what_is_done_twice_is_one_step() -> None:
    steps = Step("constant", (), 1.0), Step("add", (0, 1)), Step("mul", (2, 2))
    assert read(lambda x: (x + 1.0) * (x + 1.0)) == steps


NEVER = ["exp(x) - exp(-x)", "0 * exp(x)", "x / x", "jnp.sqrt(x)", "jnp.log1p(x)", "x / nn.sigmoid(x)", "x**3 - x**2"]


@pytest.mark.parametrize("text", NEVER)
def test_what_may_be_no_number_is_known(text) -> None:
    found = read(lambda x: eval(text, {"x": x, "exp": jnp.exp, "jnp": jnp, "nn": nn}))
    assert found is not None
    assert not gives_numbers(found)


@given(st.sampled_from(sorted(ACTIVATIONS)), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_numbers_give_numbers(name, x) -> None:
    found = read(ACTIVATIONS[name])
    assert not np.isnan(by_jax(found, jnp.full(1, x))).any()


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        ("relu", -np.inf, True),
        ("silu", np.inf, True),
        ("silu", -np.inf, False),
        ("hard swish", -np.inf, False),
        ("gelu by tanh", -np.inf, False),
        ("elu", -np.inf, True),
    ],
)
def test_of_what_is_infinite(name, at, expected) -> None:
    found = read(ACTIVATIONS[name])
    assert gives_numbers(found, (at, at)) == expected == (not np.isnan(by_jax(found, jnp.full(1, at))).any())
