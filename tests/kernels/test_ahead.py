"""The product by a packed weight as a TPU v5e would run it: no dense weight, few kernels."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.kernels.products import weight_only
from tests.kernels.ahead import compiled_for_tpu
from tests.kernels.weights import square

SIDE = 8192
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_mebibyte_of_temporaries_is_enough(rows, bits) -> None:
    w = jax.eval_shape(partial(square, bits, SIDE))
    made = compiled_for_tpu(weight_only, jax.ShapeDtypeStruct((rows, SIDE), jnp.bfloat16), w)
    assert made.memory_analysis().temp_size_in_bytes <= 2**20
    entry = made.as_text().partition("ENTRY")[2]
    assert len(re.findall(r" (?:fusion|custom-call)\(", entry)) <= 2
    assert f"[{SIDE},{SIDE}]" not in entry.replace(f"s8[{SIDE},{SIDE}]", "")
