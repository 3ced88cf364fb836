"""Coded tensors come back bit for bit, near their entropy; and what is no coded tensor is one clear error."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from jaxcomp.artifact.coding import CODINGS, check, decode, encode
from jaxcomp.artifact.coding.ans import entropy
from jaxcomp.artifact.coding.blocks import CHUNK
from jaxcomp.artifact.tensors import DTYPES, Tensor, blocks_of
from jaxcomp.core.bits import pack_bits_on_host

RNG = np.random.default_rng(0)


def tensor(x: np.ndarray) -> Tensor:
    return Tensor("w", x.dtype, x.shape, lambda: blocks_of(x))


def coded(x: np.ndarray, coding: str) -> tuple[dict, np.ndarray, np.dtype, tuple[int, ...]]:
    """What decodes to ``x``."""
    said, pieces = encode(tensor(x), coding)  # type: ignore[arg-type]
    assert said is not None
    return said, np.concatenate([*pieces]), x.dtype, x.shape


def sparse_int4(size: int, density: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The bits of a mask, and the kept codes two to a byte."""
    mask = RNG.random(size) < density
    codes = np.clip(np.rint(RNG.standard_normal(int(mask.sum()) // 2 * 2) * 2.5), -7, 7).astype(np.int8) + 8
    return np.packbits(mask, bitorder="little"), (codes[::2] | codes[1::2] << 4).astype(np.uint8)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_type_comes_back_to_the_bit(name: str, coding: str) -> None:
    dtype = DTYPES[name]
    values = RNG.standard_normal((37, 41)) * 3
    x = (values > 1) if dtype.kind == "b" else values.astype(ml_dtypes.bfloat16).astype(dtype)
    said, data, *_ = coded(x, coding)
    again = decode(said, data, x.dtype, x.shape)
    assert (again.dtype, again.shape) == (dtype, x.shape)
    assert again.tobytes() == x.tobytes()
    assert data.nbytes < x.nbytes


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 3])
def test_chunks_meet_without_a_seam(size: int, coding: str) -> None:
    x = (RNG.integers(0, 200, size) // 60).astype(np.uint8)
    assert (decode(*coded(x, coding)) == x).all()


@pytest.mark.parametrize("x", [np.ones(9, np.float32), RNG.integers(0, 256, 5000).astype(np.uint8), np.zeros((0, 3))])
def test_what_coding_would_not_make_smaller_is_left(x: np.ndarray) -> None:
    for coding in CODINGS:
        said, pieces = encode(tensor(x), coding)
        assert said is None
        assert b"".join(piece.tobytes() for piece in pieces) == x.tobytes()


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_bytes_are_made_once(density: float) -> None:
    x = sparse_int4(100_000, density)[0]
    made = []

    def blocks():
        made.append(1)
        return blocks_of(x)

    _, pieces = encode(Tensor("w", x.dtype, x.shape, blocks), "ans")
    list(pieces)
    assert made == [1]


def test_bits_and_codes_are_at_their_entropy() -> None:
    mask, codes = sparse_int4(4_000_000)
    ideal = entropy(np.bincount(np.unpackbits(mask))) + entropy(np.bincount(np.stack([codes & 15, codes >> 4]).ravel()))
    size = sum(coded(x, "ans")[1].nbytes for x in (mask, codes))
    assert size * 8 < ideal * 1.005


@pytest.mark.parametrize(("bits", "size"), [(3, 100_001), (5, 100_001), (6, 100_001), (7, 5_000_000)])
def test_codes_across_bytes_are_at_their_entropy(bits: int, size: int) -> None:
    codes = np.clip(np.rint(RNG.standard_normal(size) * 2**bits / 8), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = (codes + 2 ** (bits - 1)).astype(np.uint8)
    x = pack_bits_on_host(codes, bits)
    said, data, *_ = coded(x, "ans")
    assert (decode(said, data, x.dtype, x.shape) == x).all()
    assert data.nbytes * 8 < entropy(np.bincount(codes)) * 1.005


def test_a_long_run_of_zeros_is_bounded_by_its_bytes() -> None:
    x = np.zeros(1 << 23, np.uint8)
    for coding in CODINGS:
        said, data, *_ = coded(x, coding)
        assert data.nbytes == x.nbytes // 4096
        assert not decode(said, data, x.dtype, x.shape).any()


WHOLE, DATA, *_ = coded(np.arange(4096, dtype=np.uint16) // 9, "ans")
CLAIMS = {
    "no dict": (3, (4096,), "is coded as '3', which is not known here"),
    "another codec": ({"codec": "lzma"}, (4096,), "is coded as 'lzma', which is not known here"),
    "a bomb": (WHOLE, (1 << 40,), "claims 2199023255552 bytes, more than 4096 times"),
    "more": (WHOLE, (9000,), "has|is cut off"),
    "less": (WHOLE, (100,), "has"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_what_cannot_be_is_one_error(case: str) -> None:
    said, shape, match = CLAIMS[case]
    with pytest.raises(ValueError, match=match):
        decode(said, DATA, np.dtype(np.uint16), shape)


@pytest.mark.parametrize("name", ["constriction", "zstandard"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    match = rf'coded tensors need the package {name}: pip install "jaxcomp\[coding\]"'
    with pytest.raises(ImportError, match=match):
        check("ans", owner="save")
    monkeypatch.undo()
    said, data, *_ = coded(RNG.binomial(9, 0.5, 9000).astype(np.uint8), "ans" if name == "constriction" else "zstd")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=match):
        decode(said, data, np.dtype(np.uint8), (9000,))


@pytest.mark.parametrize("coding", CODINGS)
def test_bytes_that_were_changed_are_an_error_or_other_values(coding: str) -> None:
    mask, _ = sparse_int4(40_000)
    said, data, *_ = coded(mask, coding)
    for i in range(400):
        wrong = data.copy()
        at = int(RNG.integers(0, 20 if i % 2 else wrong.size))
        wrong[at] ^= 1 << int(RNG.integers(8))
        wrong = wrong[: RNG.integers(wrong.size)] if i % 5 == 0 else wrong
        try:
            found: object = decode(said, wrong, mask.dtype, mask.shape).shape
        except ValueError as e:
            found = str(e)
        assert found == mask.shape or str(found).startswith(("has ", "is ", "claims "))


def read_block(block: bytes, size: int) -> bytes:
    """A block of a coded tensor, decoded in whole numbers of Python from docs/artifact.md."""
    kind, inside = block[0], block[5 : 5 + int.from_bytes(block[1:5], "little")]
    width, wide = kind % 16, 2 if kind > 16 else 1
    count = inside[0] + 1
    weights = [int.from_bytes(inside[1 + i * wide :][:wide], "little") for i in range(count)]
    free = 2**24 - count
    shares = [w * free // sum(weights) for w in weights]
    shares[shares.index(max(shares))] += free - sum(shares)
    slots = [1 + s for s in shares]
    words = [int.from_bytes(inside[i : i + 4], "little") for i in range(1 + count * wide, len(inside), 4)]
    state = stream = 0
    for _ in range(2):
        state = state << 32 | (words.pop() if words else 0)
    symbols = -(-size * 8 // width)
    for i in range(symbols):
        slot, symbol = state % 2**24, 0
        while slot >= slots[symbol]:
            slot, symbol = slot - slots[symbol], symbol + 1
        state = (state >> 24) * slots[symbol] + slot
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        stream |= symbol << (i * width)
    assert not words
    return stream.to_bytes(-(-symbols * width // 8), "little")[:size]


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 7])
def test_a_reader_that_knows_the_page_alone_reads_a_block(bits: int) -> None:
    codes = np.minimum(RNG.poisson(2**bits / 8, 3000), 2**bits - 1).astype(np.uint8)
    x = pack_bits_on_host(codes, bits)
    _, data, *_ = coded(x, "ans")
    assert data[0] != 32
    assert read_block(data.tobytes(), x.size) == x.tobytes()
