from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.activations import platforms


@pytest.fixture(autouse=True)
def _other_platforms_forgotten() -> Iterator[None]:
    """What was traced as on another platform is not met by the next test."""
    yield
    if platforms.traced_as:
        platforms.traced_as.clear()
        jax.clear_caches()


@pytest.fixture
def jax_defaults() -> Iterator[None]:
    """Functions as users write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
