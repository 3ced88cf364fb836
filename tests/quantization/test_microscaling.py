"""Blocks of the OCP MX specification 1.0 and of NVFP4, worked out by hand: no library's rounding in them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.quantization.level_grids import E2M1, E2M3, E3M2, E4M3, E5M2
from jaxcomp.recipes import mx, nvfp4
from tests.laws import assert_same_bits

# A block whose largest magnitude lies in [1, 2): its scale is 2**-emax (section 6.3), emax being the exponent of the
# element's largest value (tables 1 to 6). element: emax; the largest value over 2**emax (what is above saturates); two
# ties of the top binade, to the even significand below and above; the least subnormal number, as a power of two.
ELEMENTS = {
    "E4M3": (E4M3, 8, 1.75, (1.0625, 1.0), (1.1875, 1.25), -9),
    "E5M2": (E5M2, 15, 1.75, (1.125, 1.0), (1.375, 1.5), -16),
    "E3M2": (E3M2, 4, 1.75, (1.125, 1.0), (1.375, 1.5), -4),
    "E2M3": (E2M3, 2, 1.875, (1.0625, 1.0), (1.1875, 1.25), -3),
    "E2M1": (E2M1, 2, 1.5, (1.25, 1.0), (1.125, 1.0), -1),
    "INT8": (jc.Int(8, narrow=True), 0, 127 / 64, (1 + 1 / 128, 1.0), (1 + 3 / 128, 1 + 2 / 64), -6),
}


def column(*blocks: list[float]) -> dict:
    return {"kernel": jnp.asarray(np.concatenate(blocks).astype(np.float32)[:, None])}


def seen(transform, params) -> tuple[list[float], jc.quantization.Quantized]:
    """What the blocks become, and the packed leaf."""
    tree = transform.apply((), params)
    packed = jc.pack(tree)["kernel"]
    assert_same_bits(packed.materialize(), tree["kernel"].materialize())
    return np.asarray(packed.materialize())[:, 0].tolist(), packed


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_mx_block_by_hand(name) -> None:
    element, emax, top, (low_tie, below), (high_tie, above), least = ELEMENTS[name]
    tiny = 2.0 ** (least - emax)  # the least subnormal number, scaled
    block = [1.998, -1.998, low_tie, -high_tie, tiny, tiny / 2, -1.5 * tiny, 0.0]
    want = [top, -top, below, -above, tiny, 0.0, -2 * tiny, 0.0]
    shifts = [0, 5, -60]
    got, packed = seen(mx(element, 8), column(*([v * 2.0**shift for v in block] for shift in shifts)))
    assert got == [v * 2.0**shift for shift in shifts for v in want]
    assert np.asarray(packed.scale.codes)[:, 0].tolist() == [127 + shift - emax for shift in shifts]  # E8M0, biased


def test_all_of_fp4_by_hand() -> None:
    block = [5.9, 0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0, 0.26, -0.74, 1.26, 1.74, 2.51, 3.49, 4.99, 5.01]
    want = [6.0, 0.0, 1.0, -1.0, 2.0, 2.0, -4.0, 4.0, 0.5, -0.5, 1.5, 1.5, 3.0, 3.0, 4.0, 6.0]
    assert seen(mx(E2M1, 16), column(block))[0] == want


def test_nvfp4_blocks_by_hand() -> None:
    """The leaf's scale is 1, so a block's is its largest magnitude over 6, rounded to E4M3."""
    rest = [0.0] * 12
    first = [2688.0, 112.0, 336.0, -1000.0]  # over 448: 6, the tie 1/4, the tie 3/4, -2.23
    second = [6.3, 5.0, 0.75, -0.2]  # 1.05 is between 1 and 1.125, nearer to 1: 6.3 saturates
    third = [6.4, 0.0, 0.0, 0.28]  # 1.0667 is nearer to 1.125; 0.28 over it is 0.249
    fourth = [0.01, 0.0005, -0.004, 0.0]  # 0.01 / 6 rounds to the least subnormal scale, 2**-9
    got, packed = seen(nvfp4(), column(*(b + rest for b in (first, second, third, fourth))))
    tiny = 2.0**-9
    want = [
        [2688.0, 0.0, 448.0, -896.0],
        [6.0, 4.0, 1.0, 0.0],
        [6.75, 0.0, 0.0, 0.0],
        [6 * tiny, 0.5 * tiny, -2 * tiny, 0],
    ]
    for block, values in zip(np.array(got).reshape(4, 16), want, strict=True):
        assert block.tolist() == values + rest
    # E4M3's bit patterns: 448 = 1.75 * 2**8, 1 = 2**0, 1.125, 2**-9.
    assert np.asarray(packed.scale.codes).reshape(-1).tolist() == [0x7E, 0x38, 0x39, 0x01]
