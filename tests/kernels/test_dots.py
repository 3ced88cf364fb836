"""Dots of codes against sums of Python's integers and of float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxcomp.kernels.dots import coded_dot, coded_matrix, folded

SHAPES = [(1, 5, 7), (3, 64, 33), (17, 130, 16)]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "length", "features"), SHAPES)
def test_int8_is_exact(rows, length, features, asymmetric, per_token) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (rows, length)), rng.integers(-128, 128, (features, length))
    tokens = (rows, 1) if per_token else ()
    zero, of_w = rng.integers(-99, 99, tokens), rng.integers(-99, 99, features)
    scale, of_x = 2.0 ** rng.integers(-3, 3, features), 2.0 ** rng.integers(-3, 3, tokens)
    zeros = (zero, of_w) if asymmetric else (0, np.zeros(features, int))
    want = ((x - zeros[0]) @ (w - zeros[1][:, None]).T) * scale * of_x
    matrix = coded_matrix(
        jnp.asarray(w, jnp.int8), jnp.asarray(scale, jnp.float32), jnp.asarray(of_w) if asymmetric else None
    )
    codes = jnp.asarray(x, jnp.int8)
    z = jnp.asarray(zero, jnp.int32) if asymmetric else None
    got = jax.jit(coded_dot)(codes, matrix, scale=jnp.asarray(of_x, jnp.float32), zero=z)
    assert got.tolist() == want.tolist()
    if asymmetric and not per_token:
        known = jax.jit(coded_dot)(codes, matrix, scale=jnp.asarray(of_x, jnp.float32), offset=folded(matrix, z))
        assert known.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_rounds_its_sums_alone(dtype) -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 3, 50), (9, 50)))
    got = coded_dot(x, coded_matrix(w, jnp.full(9, 0.5)), scale=jnp.full((2, 3, 1), 2.0), dtype=jnp.dtype(jnp.bfloat16))
    exact, size = (np.asarray(f(x), np.float64) @ np.asarray(f(w), np.float64).T for f in (jnp.positive, jnp.abs))
    assert got.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(got, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 50 * 2.0**-24 * size).all()


@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_it_lowers_for_three_platforms_with_the_contracted_axis_last(kind) -> None:
    x, w = jnp.ones((4, 32)).astype(kind), coded_matrix(jnp.ones((8, 32)).astype(kind), jnp.ones(8))
    text = export.export(jax.jit(coded_dot), platforms=["cpu", "cuda", "tpu"])(x, w, scale=jnp.float32(1)).mlir_module()
    assert "contracting_dims = [1] x [1]" in text
    assert "transpose" not in text
