"""The functions that these tests trace are written as users write them, under JAX's own rules of promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _jax_defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
