"""Pallas kernels over odd shapes: their statements run on CPU against numpy, and they lower for their hardware."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxcomp.kernels import pallas_mosaic, pallas_triton
from jaxcomp.kernels.blocks import Blocks
from jaxcomp.kernels.pallas_mosaic import mosaic_product
from jaxcomp.kernels.pallas_triton import triton_product
from tests.kernels.hardware import TRITON, an_h100
from tests.kernels.weights import Case, activations, weight_of
from tests.marks import quick

CASES = {
    "one row": Case(1, 64, 256, 4, 128),
    "three rows, ragged features and length, zero points": Case(3, 70, 300, 4, 128, zero=True),
    "int8, one scale": Case(5, 33, 200, 8),
    "int8, groups, zero points": Case(2, 40, 384, 8, 128, zero=True),
    "groups longer than blocks": Case(3, 40, 600, 4, 256),
    "blocks longer than groups": Case(4, 48, 512, 4, 64, block=256),
    "groups across blocks": Case(3, 40, 500, 4, 96, zero=True),
    "more rows than one program takes": Case(18, 200, 320, 4, 64),
    "2 bits": Case(3, 40, 384, 2, 96, zero=True),
    "3 bits": Case(3, 40, 700, 3, block=256),
    "6 bits": Case(2, 40, 500, 6, 128),
    "shorter than a block": Case(3, 20, 50, 4),
    "a step that is not full": Case(2, 40, 128 * 9, 4, 128, zero=True),
}
NAMES = ("one row", "three rows, ragged features and length, zero points", "int8, one scale", "a step that is not full")
KERNELS = {
    "triton": partial(triton_product, blocks=Blocks(16, 32, splits=2)),
    "mosaic": partial(mosaic_product, blocks=Blocks(16, 128, length=512)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_a_kernel_is_exact_where_sums_are(name, kernel) -> None:
    w, dense = weight_of(CASES[name])
    x = activations(CASES[name], jnp.bfloat16, whole=True)
    got = KERNELS[kernel](x, w, dtype=jnp.dtype(jnp.float32), interpret=True)
    assert got.tolist() == (np.asarray(x, np.float64) @ dense.T).tolist()


@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16", "float16"], "float32"))
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_rounds_its_sums_alone(kernel, dtype) -> None:
    case = Case(3, 20, 200, 4, 32, block=64, zero=True)
    w, dense = weight_of(case)
    x = activations(case, dtype)
    got = np.asarray(KERNELS[kernel](x, w, dtype=jnp.dtype(jnp.float32), interpret=True), np.float64)
    exact = np.asarray(x, np.float64)
    bound = case.length * 2.0**-24 * (np.abs(exact) @ (np.abs(dense) + 8).T)  # 8: zero points are subtracted after
    assert (np.abs(got - exact @ dense.T) <= bound).all()


def test_a_result_takes_the_type_asked_for() -> None:
    w, _ = weight_of(CASES["one row"])
    x = activations(CASES["one row"], jnp.bfloat16)
    for run in KERNELS.values():
        assert jax.eval_shape(partial(run, interpret=True), x, w).dtype == jnp.bfloat16


SHORT = weight_of(Case(1, 16, 80, 3, 20))[0]


@pytest.mark.parametrize("kernel", [pallas_triton, pallas_mosaic])
def test_what_a_kernel_cannot_read_it_names(kernel) -> None:
    assert "only 4 neighbours share bytes and scales (3 bits, blocks of 128, groups of 20)" in kernel.refusal(SHORT)
    stack = jax.tree.map(lambda v: v[None], weight_of(CASES["one row"])[0])
    assert "a stack of shape (1, 64, 256)" in kernel.refusal(stack)


# Lowering, on a machine that has neither

LOWERED = ("one row", "three rows, ragged features and length, zero points", "int8, one scale")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", quick(CASES, *LOWERED))
def test_mosaic_lowers_for_tpu(name, dtype) -> None:
    if dtype == jnp.float32 and name != "one row":
        pytest.skip("one case of float32 shows it")
    w, _ = weight_of(CASES[name])
    run = jax.jit(partial(mosaic_product, blocks=Blocks(16, 256)))
    lowered = export.export(run, platforms=["tpu"])(activations(CASES[name], dtype), w).mlir_module()
    assert lowered.count("@tpu_custom_call") == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", quick(CASES, *LOWERED))
def test_triton_lowers_for_cuda(name, dtype) -> None:
    if dtype == jnp.float32 and name != "one row":
        pytest.skip("one case of float32 shows it")
    (w, _), x = weight_of(CASES[name]), activations(CASES[name], dtype)
    run = jax.jit(partial(triton_product, blocks=Blocks(16, 32, splits=2)))
    with an_h100():
        made = export.export(run, platforms=["cuda"], disabled_checks=[TRITON])(x, w)
    assert made.mlir_module().count("@__gpu$xla.gpu.triton") == 1
