"""Every kind of network that the other rooms read, in float, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcomp.export import to_onnx
from tests.export.running import run
from tests.marks import quick
from tests.structure.models import CASES
from tests.trace.models import CASES as MORE

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NAMES = [*CASES, *MORE]


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", quick(NAMES, "linen gru"))
def test_architectures(tmp_path: Path, name: str) -> None:
    if name == "decoding with a cache":
        pytest.skip("an argument is a random key")
    case = MORE[name]() if name in MORE else CASES[name]()
    fn, params, args = case if name in MORE else (case.fn, case.params, case.args)
    args = (args,) if name in MORE else args
    to_onnx(tmp_path / "m.onnx", fn, params, *args)
    got = run(tmp_path / "m.onnx", *jax.tree.leaves(args))
    if name == "equinox_mlp":  # its parameters hold functions
        want = jax.jit(lambda *given: fn(params, *given), compiler_options=FAST)(*args)
    else:
        want = jax.jit(fn, compiler_options=FAST)(params, *args)
    for a, b in zip(got, jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.abs(np.asarray(b, np.float64)).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * scale)
