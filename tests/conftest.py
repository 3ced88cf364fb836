"""Tests are stricter than users: no silent promotion of types or ranks, shapes of kernels checked at run time."""

import jax
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports them: the array mathematics, where every signature gives shapes.
install_import_hook(
    [
        "jaxcomp.core.bits",
        "jaxcomp.core.gradients",
        "jaxcomp.factorization.decompositions",
        "jaxcomp.factorization.rank_one",
        "jaxcomp.federated.arrays",
        "jaxcomp.pruning.masks",
        "jaxcomp.pruning.scores",
        "jaxcomp.quantization.numerics",
        "jaxcomp.sharing.kmeans",
    ],
    "beartype.beartype",
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The same examples in every run; --hypothesis-profile=explore draws new ones, and more of them.
checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("jaxcomp", max_examples=25, deadline=None, derandomize=True, suppress_health_check=checks)
settings.register_profile("explore", max_examples=500, deadline=None, suppress_health_check=checks)
settings.load_profile("jaxcomp")
