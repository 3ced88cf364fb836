"""Which equations are clamps, and of which numbers: as users write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxcomp.trace.clamps import both, clamp_of


def clamp_in(fn) -> tuple[float, float] | None:
    (eqn,) = jax.make_jaxpr(fn)(jnp.zeros((2, 3))).eqns
    return clamp_of(eqn, next(i for i, v in enumerate(eqn.invars) if not hasattr(v, "val")))


@pytest.mark.parametrize(
    ("fn", "clamp"),
    [
        (jax.nn.relu, (0.0, np.inf)),
        (jax.nn.relu6, (0.0, 6.0)),
        (lambda x: jnp.clip(x, -2.0, 3.0), (-2.0, 3.0)),
        (lambda x: lax.clamp(-1.0, x, 4.0), (-1.0, 4.0)),
        (lambda x: jnp.minimum(1.0, x), (-np.inf, 1.0)),
        (lambda x: jax.jit(lambda x: jnp.maximum(jnp.minimum(x, 5.0), -5.0))(x), (-5.0, 5.0)),
        (lambda x: jax.jit(lambda x: jnp.minimum(jnp.maximum(x, 5.0), 1.0))(x), (1.0, 1.0)),
        (jax.nn.leaky_relu, None),
        (jax.nn.hard_tanh, None),
        (jnp.abs, None),
        (lambda x: jnp.maximum(x, x), None),
        (lambda x: jax.jit(lambda x: (x, x))(x)[0], None),
    ],
)
def test_which_equations_are_clamps(fn, clamp) -> None:
    assert clamp_in(fn) == clamp


numbers = st.floats(-9, 9)


@given(numbers, numbers, numbers, numbers, numbers)
def test_one_behind_another(x, a, b, c, d) -> None:
    first, then = sorted((a, b)), sorted((c, d))
    assert np.clip(np.clip(x, *first), *then) == np.clip(x, *both(tuple(first), tuple(then)))
