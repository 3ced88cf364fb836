"""Files that earlier code saved load as the arrays that it saw in them.

``saved/codebooks.safetensors`` holds a codebook of each form, and ``saved/codebooks.npz`` what each materialized to,
both as the code before ``per=`` had one vocabulary wrote them.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.sharing import Codebook
from tests.laws import assert_same_bits

SAVED = Path(__file__).parent / "saved"
BLOCKS = {
    "tensor": ((1, 1), 0),
    "channels": ((1, 1, 5), 0),
    "two": ((3, 1, 4), 0),
    "buckets": ((3, 1), 20),
    "wide": ((1, 1), 0),
    "masked": ((8, 1), 0),
    "quantized": ((6, 1), 0),
}


@pytest.fixture(scope="module")
def tree():
    return jc.load(SAVED / "codebooks.safetensors")


def test_every_leaf_is_the_array_that_it_was(tree) -> None:
    with np.load(SAVED / "codebooks.npz") as wanted:
        assert set(tree) == set(wanted.files) == {*BLOCKS, "vectors"}
        for name, leaf in tree.items():
            found = np.asarray(dense(leaf))
            assert found.dtype == wanted[name].dtype
            np.testing.assert_array_equal(found.view(np.uint32), wanted[name].view(np.uint32), err_msg=name)


@pytest.mark.parametrize("name", BLOCKS)
def test_axes_become_blocks(tree, name) -> None:
    leaf = tree[name].values if isinstance(tree[name], jc.core.Masked) else tree[name]
    assert isinstance(leaf, Codebook)
    assert (leaf.blocks, leaf.bucket) == BLOCKS[name]
    assert leaf.zero_first == (name in ("tensor", "masked"))


def test_what_was_loaded_is_saved_as_it_is_today(tree, tmp_path) -> None:
    jc.save(tmp_path / "again", tree)
    again = jc.load(tmp_path / "again")
    assert_same_bits(jc.materialize(again), jc.materialize(tree))
    assert jax.tree.structure(again, is_leaf=is_compressed) == jax.tree.structure(tree, is_leaf=is_compressed)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
