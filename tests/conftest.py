"""Tests are stricter than users: no silent promotion of types or ranks, shapes of kernels checked at run time."""

import os

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests import more
from tests.marks import DRY, why_no_gpu

# Several test processes (pytest -n) on one GPU: the first must not take nearly all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

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


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases that the quick suite leaves out."""
    further = more.listed()
    for item in items:
        if item.nodeid in further or not more.LONG_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("more")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without an accelerator, every test of one is skipped by name: none passes without having run."""
    if item.get_closest_marker("gpu") and (why := why_no_gpu(jax.default_backend(), os.environ.get(DRY))):
        pytest.skip(why)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Where the tests of an accelerator run, if they were asked for."""
    asked = config.option.markexpr
    if "gpu" not in asked or "not gpu" in asked:
        return None
    return f"gpu tests: {why_no_gpu(jax.default_backend(), os.environ.get(DRY)) or jax.devices()[0].device_kind}"
