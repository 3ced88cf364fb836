"""Hardware that is not there, for what is lowered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")


@contextlib.contextmanager
def an_h100() -> Iterator[None]:
    """A GPU for what is lowered inside."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        yield
