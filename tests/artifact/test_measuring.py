"""What a leaf takes of a file, and its entropy, against numbers counted by hand."""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact.measuring import entropy_of, load_measured

RNG = np.random.default_rng(0)


def by_hand(values: np.ndarray) -> float:
    """Bits at the entropy of how often each value comes."""
    p = np.unique(values, return_counts=True)[1] / values.size
    return float(-np.log2(p) @ p) * values.size


def leaf(*steps: jc.Transform, shape: tuple[int, ...] = (300, 40)) -> jc.core.leaves.CompressedLeaf:
    w = {"w": jnp.asarray(RNG.standard_normal(shape), jnp.float32)}
    t = jc.chain(*steps)
    return t.apply(t.init(w), w)["w"]


def test_the_entropy_of_codes_is_that_of_how_often_each_comes() -> None:
    quantized = leaf(jc.quantize(jc.Int(4)))
    assert entropy_of(quantized) == pytest.approx(by_hand(np.asarray(quantized.codes)))
    assert entropy_of(jc.pack({"w": quantized})["w"]) == entropy_of(quantized)


def test_the_entropy_of_a_masked_leaf_is_that_of_its_mask_and_of_what_is_kept() -> None:
    masked = leaf(jc.prune(0.8), jc.quantize(jc.Int(4)))
    mask = np.asarray(masked.mask)
    expected = by_hand(mask) + by_hand(np.asarray(masked.values.codes)[mask])
    assert entropy_of(masked) == pytest.approx(expected)


@pytest.mark.parametrize("x", [np.ones(3), 3.0, leaf(jc.low_rank(2))], ids=["array", "number", "factors"])
def test_what_has_no_codes_has_none(x) -> None:
    assert entropy_of(x) is None


@pytest.mark.parametrize("coding", [None, "ans"])
def test_the_leaves_take_the_whole_file_but_for_its_header(tmp_path, coding) -> None:
    same = np.arange(5000.0)
    tree = {"a": jc.pack({"w": leaf(jc.prune(0.9), jc.quantize(jc.Int(4)))})["w"], "b": [same, same, np.zeros(800)]}
    size = jc.save(tmp_path / "f", tree, coding=coding)
    again, stored = load_measured(tmp_path / "f")
    assert (again["b"][1] == same).all()
    assert stored["b/0"] > 0
    assert stored["b/1"] == 0
    header = 8 + int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    assert 0 <= os.path.getsize(tmp_path / "f") - header - sum(stored.values()) <= (0 if coding is None else 600)
    assert size == os.path.getsize(tmp_path / "f")
