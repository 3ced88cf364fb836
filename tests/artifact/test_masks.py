"""Masks in fewer bytes than they have bits come back bit for bit, and what is no such mask is one error."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact.masking import Kept, constant, part_of
from jaxcomp.artifact.masks import (
    Smallest,
    bits_of_form,
    distances,
    from_distances,
    from_patterns,
    pattern_codes,
    patterns_of,
)
from jaxcomp.core.bits import CHUNK
from tests.laws import assert_same_bits

RNG = np.random.default_rng(0)


def kept(mask: np.ndarray) -> Kept:
    return Kept(np.packbits(mask, bitorder="little"), mask.shape)


def n_of_m(shape: tuple[int, ...], axis: int, n: int, m: int) -> np.ndarray:
    """The n largest of every m along an axis are kept."""
    x = np.moveaxis(RNG.standard_normal(shape), axis, -1)
    groups = x.reshape(-1, m)
    mask = groups >= np.sort(groups, axis=1)[:, m - n][:, None]
    return np.moveaxis(mask.reshape(x.shape), -1, axis)


@pytest.mark.parametrize("size", [0, 1, 8, 255, 256, 1000, CHUNK, CHUNK + 1, 2 * CHUNK + 300])
@pytest.mark.parametrize("density", [0, 0.0005, 0.05, 1])
def test_distances_come_back(size: int, density: float) -> None:
    k = kept(RNG.random(size) < density)
    stored = distances(k)
    assert (from_distances(stored, size) == k.bits).all()
    places = np.flatnonzero(np.unpackbits(k.bits, count=size, bitorder="little"))
    by_hand = [
        d for a, b in itertools.pairwise([-1, *places]) for d in [255] * ((b - a - 1) // 255) + [(b - a - 1) % 255]
    ]
    assert stored[: len(by_hand)].tolist() == by_hand
    assert (stored[len(by_hand) :] == 255).all()


CASES = {
    "2 of 4, the first axis": ((64, 48), 0, 2, 4, (4, 48, 3)),
    "2 of 4, the last axis": ((64, 48), 1, 2, 4, (4, 1, 3)),
    "1 of 4": ((3, 3, 16, 24), 2, 1, 4, (4, 24, 2)),
    "2 of 8": ((64, 96), 0, 2, 8, (8, 96, 5)),
    "2 of 4, over chunks": ((4, 1 << 17), 0, 2, 4, (4, 1 << 17, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_patterns_come_back_in_the_bits_of_their_number(case: str) -> None:
    shape, axis, n, m, expected = CASES[case]
    k = kept(n_of_m(shape, axis, n, m))
    p = patterns_of(k)
    assert p is not None
    assert p[:3] == expected
    assert all(int(x).bit_count() == n for x in p.table)
    codes = np.concatenate([*pattern_codes(k, p)])
    assert codes.nbytes == -(-k.size // m * p.bits // 8)
    assert (from_patterns(codes, k.size, p) == k.bits).all()


def test_a_mask_without_patterns_is_its_bits() -> None:
    k = kept(RNG.random((64, 64)) < 0.5)
    assert Smallest.of(k).nbytes == 512
    assert patterns_of(k) is None


MASKS = {"few": RNG.random((256, 128)) < 0.02, "2 of 4": n_of_m((256, 128), 0, 2, 4)}


@pytest.mark.parametrize("coding", [None, "zstd", "ans"])
@pytest.mark.parametrize("name", MASKS)
def test_leaves_with_such_masks_come_back(tmp_path, name: str, coding: Any) -> None:
    mask = MASKS[name]
    codes = jnp.asarray(RNG.integers(-7, 8, mask.shape) * mask, jnp.float32)  # as training has them
    leaf = jc.quantization.Quantized(codes, jnp.ones((1, 128)), None, jc.Int(4), jnp.dtype("float32"))
    masked = jc.pack({"kernel": jc.core.Masked(leaf, jnp.asarray(mask))})
    size = jc.save(tmp_path / "f", masked, coding=coding)
    assert_same_bits(jc.load(tmp_path / "f"), masked)
    bits = 8 * 0.025 + 4 * 0.025 if name == "few" else 0.75 + 4 * 0.5
    assert size < mask.size * bits / 8 + 128 * 4 + 1200


def test_an_array_of_few_entries_is_its_distances(tmp_path) -> None:
    x = np.zeros((1000, 1000), np.float32)
    x[3, 7] = x[999, 999] = 1.5
    assert jc.save(tmp_path / "f", {"x": x}) < 6000
    assert (jc.load(tmp_path / "f")["x"] == x).all()


TENSORS = [np.array([3, 255, 255], np.uint8), np.zeros(3, np.float32), np.array([3, 5], np.uint8)]
WRONG = {
    "another kind": ({"runs": 0}, 600, "a mask of kind 'runs'"),
    "nothing": ({}, 600, "a mask of kind None"),
    "a number in words": ({"distances": "0"}, 600, "is said to be"),
    "floats": ({"distances": 1}, 600, "not bytes"),
    "too long": ({"distances": 0}, 500, "elements in distances over 514"),
    "a bomb": ({"distances": 0}, 1 << 30, "elements in distances over 514"),
    "four numbers": ({"patterns": [4, 1, 1, 2]}, 96, "is said to be"),
    "groups of nothing": ({"patterns": [0, 1, 1, 2, 0]}, 96, "patterns of 0 by 1"),
    "many bits": ({"patterns": [4, 1, 9, 2, 0]}, 96, "patterns of 4 by 1"),
    "a code too large": ({"patterns": [4, 1, 2, 2, 0]}, 48, "a pattern 3 of 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_error(case: str) -> None:
    node, size, match = WRONG[case]
    with pytest.raises(ValueError, match=match):
        bits_of_form(node, size, TENSORS.__getitem__, "w")


@pytest.mark.parametrize("density", [0.03, 0.08, 0.1, 0.3])
def test_what_is_kept_is_taken_and_put_back_at_any_density(density: float) -> None:
    mask, x = RNG.random(CHUNK + 1000) < density, RNG.integers(0, 255, CHUNK + 1000).astype(np.uint8)
    taken = np.concatenate([*kept(mask).take(part_of(x))])
    assert (taken == x[mask]).all()
    again = np.concatenate([*kept(mask).put(part_of(taken), constant(0, x.dtype))])
    assert (again == np.where(mask, x, 0)).all()
