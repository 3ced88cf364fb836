"""Tests are stricter than users: no silent promotion of types or ranks, shapes of kernels checked at run time."""

from jaxtyping import install_import_hook

KERNELS = ["jaxcomp.numerics", "jaxcomp.masks"]
with install_import_hook(KERNELS, "beartype.beartype"):
    import jaxcomp.masks.scores
    import jaxcomp.masks.structures
    import jaxcomp.masks.thresholds
    import jaxcomp.numerics.packing
    import jaxcomp.numerics.quantizers
    import jaxcomp.numerics.rounding  # noqa: F401

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile(
    "jaxcomp", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("jaxcomp")


@pytest.fixture
def key():
    """A fixed key."""
    return jax.random.key(0)
