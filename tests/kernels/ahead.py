"""Programs compiled for a TPU on a machine that has none; what is compiled is counted, not run.

jax compiles ahead of time for a device that is described where the plugin of its platform is installed: ``pip install
libtpu``, of the version that this jax's extra ``tpu`` names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from unittest import mock

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def compiled_for_tpu(f: Callable[..., jax.Array], *args: object) -> jax.stages.Compiled:
    """The program of a function of arrays, or their shapes, on one TPU v5e; skips where it cannot be made."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    with mock.patch.dict("os.environ", ENVIRONMENT):
        device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    here = SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    return jax.jit(f, in_shardings=here, out_shardings=here).lower(*shapes).compile()
