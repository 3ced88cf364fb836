"""Bit packing against numpy's own unpacking of bits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.core.bits import pack_bits, packed_size, unpack_bits
from jaxcomp.core.packed import Packed
from tests.marks import quick

SHAPES = [(0,), (1,), (7,), (8,), (3, 4), (2, 3, 5)]


@given(bits=st.integers(1, 8), shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**31))
def test_the_stream_is_little_endian_and_comes_back(bits, shape, seed) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape)
    data = np.asarray(pack_bits(jnp.asarray(codes, jnp.int32), bits))
    flat = codes.reshape(-1)
    stream = ((flat[:, None] >> np.arange(bits)) & 1).reshape(-1).astype(np.uint8)
    assert data.tolist() == np.packbits(stream, bitorder="little").tolist()
    assert data.nbytes == packed_size(flat.size, bits)
    assert np.asarray(unpack_bits(jnp.asarray(data), bits, flat.size)).tolist() == flat.tolist()


@pytest.mark.parametrize("bits", quick(range(2, 9), 2, 3, 8))
def test_signed_codes_come_back_with_their_sign(bits) -> None:
    low = -(2 ** (bits - 1))
    values = np.arange(low, -low)
    packed = Packed.of(jnp.asarray(values, jnp.float32), bits, low)
    assert packed.unpack().dtype == jnp.int8
    assert packed.unpack().tolist() == values.tolist()
    assert packed.data.nbytes == packed_size(values.size, bits)


def test_booleans_take_a_bit_each() -> None:
    mask = jnp.array([[True, False, True]] * 3)
    packed = Packed.of(mask, 1, 0)
    assert packed.data.nbytes == 2
    assert packed.unpack().dtype == bool
    assert (packed.unpack() == mask).all()


def test_refuses_a_stream_of_another_length() -> None:
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, got 5"):
        unpack_bits(jnp.zeros(5, jnp.uint8), 3, 10)
