"""Equal tensors are in the file once, and come back as many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxcomp as jc
from jaxcomp.artifact.disk import FileError
from tests.artifact.old_files import write_old
from tests.laws import assert_same_bits


@pytest.mark.slow
def test_the_one_table_of_a_tree_is_in_the_file_once(tmp_path) -> None:
    params = {name: jax.random.normal(jax.random.key(i), (20, 30)) for i, name in enumerate("uvw")}
    t = jc.share(16, per=jc.Global())
    seen = t.apply(t.init(params), params)
    jc.save(tmp_path / "f", seen)
    assert sorted(safetensors.numpy.load_file(tmp_path / "f")) == ["u", "u.table", "v", "w"]
    loaded = jc.load(tmp_path / "f")
    assert_same_bits(loaded, jc.pack(seen))
    assert loaded["u"].table is loaded["w"].table


def test_only_what_is_equal_bit_by_bit_is_held_once(tmp_path) -> None:
    tree = {"zero": jnp.ones(8).at[0].set(0.0), "minus": jnp.ones(8).at[0].set(-0.0), "i": jnp.ones(8, jnp.int32)}
    tree |= {"wide": jnp.ones((2, 4)), "long": jnp.ones(8), "nan": jnp.full(8, jnp.nan), "nans": jnp.full(8, jnp.nan)}
    jc.save(tmp_path / "f", tree)
    assert sorted(safetensors.numpy.load_file(tmp_path / "f")) == sorted({*tree, "zero.mask"} - {"nans"})
    assert_same_bits(jc.load(tmp_path / "f"), tree)


def test_what_is_equal_in_its_beginning_only_is_held_twice(tmp_path) -> None:
    a = np.ones(300_000, np.float32)
    b = a.copy()
    b[-1] = 2
    jc.save(tmp_path / "f", {"a": a, "b": b, "c": a.copy()})
    loaded = jc.load(tmp_path / "f")
    assert len(safetensors.numpy.load_file(tmp_path / "f")) == 2
    assert (loaded["a"] == a).all()
    assert (loaded["b"] == b).all()
    assert (loaded["c"] == a).all()
    loaded["a"][0] = 7  # an array of numpy is nobody else's
    assert loaded["c"][0] == 1


TWO = {"dict": [["a", "array"], ["b", "array"]]}


def test_references_of_version_2_are_followed(tmp_path) -> None:
    write_old(tmp_path / "f", TWO, {"a": np.ones(3, np.float32)}, same={"b": "a"})
    assert_same_bits(jc.load(tmp_path / "f"), {"a": jnp.ones(3), "b": jnp.ones(3)})


@pytest.mark.parametrize(
    ("same", "message"),
    [
        ({"b": "c"}, r"'b' refers to 'c', which the file does not hold"),
        ({"b": "b"}, r"'b' refers to 'b', which the file does not hold"),
        ({"b": "a", "a": "b"}, r"'a' is held by the file and refers to 'b', too"),
        ({"b": ["a"]}, r"'b' refers to \['a'\], which the file does not hold"),
        (["b"], r"a damaged list of equal tensors"),
        ({}, r"there is no tensor 'b', which the tree refers to"),
    ],
)
def test_a_reference_to_nothing_is_one_error(same, message, tmp_path) -> None:
    write_old(tmp_path / "f", TWO, {"a": np.ones(3, np.float32)}, same=same)
    with pytest.raises(FileError, match=message):
        jc.load(tmp_path / "f")
