"""The product by a packed weight as a TPU v5e would run it: no dense weight, few kernels."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.products import weight_only
from jaxcomp.quantization.grids import Int
from tests.kernels.ahead import compiled_for_tpu

SIDE = 8192
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_mebibyte_of_temporaries_is_enough(rows, bits) -> None:
    groups = SIDE // 128 if bits == 4 else 1
    shape = jax.ShapeDtypeStruct
    w = PackedWeight(
        codes=shape((SIDE, SIDE * bits // 8), jnp.uint8 if bits < 8 else jnp.int8),
        scale=shape((SIDE, groups), jnp.float32),
        zero=None,
        grid=Int(bits),
        length=SIDE,
        group=SIDE // groups,
        block=128,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    made = compiled_for_tpu(weight_only, shape((rows, SIDE), jnp.bfloat16), w)
    assert made.memory_analysis().temp_size_in_bytes <= 2**20
    entry = made.as_text().partition("ENTRY")[2]
    assert len(re.findall(r" (?:fusion|custom-call)\(", entry)) <= 2
    assert f"[{SIDE},{SIDE}]" not in entry.replace(f"s8[{SIDE},{SIDE}]", "")
