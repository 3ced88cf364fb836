"""Equal tensors are in the file once, and come back as many."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
import safetensors
import safetensors.numpy

import jaxcomp as jc
from jaxcomp.artifact.files import FileError, _digest
from tests.laws import assert_same_bits


def described_in(path) -> dict:
    """What the header says."""
    with safetensors.safe_open(path, framework="numpy") as f:
        return json.loads(f.metadata()["jaxcomp"])


@pytest.mark.slow
def test_the_one_table_of_a_tree_is_in_the_file_once(tmp_path) -> None:
    params = {name: jax.random.normal(jax.random.key(i), (20, 30)) for i, name in enumerate("uvw")}
    t = jc.share(16, per=jc.Global())
    seen = t.apply(t.init(params), params)
    jc.save(tmp_path / "f", seen)
    tensors = safetensors.numpy.load_file(tmp_path / "f")
    assert sorted(tensors) == ["u", "u.table", "v", "w"]
    assert described_in(tmp_path / "f")["same"] == {"v.table": "u.table", "w.table": "u.table"}
    assert_same_bits(jc.load(tmp_path / "f"), jc.pack(seen))


def test_only_what_is_equal_bit_by_bit_is_held_once(tmp_path) -> None:
    tree = {"zero": jnp.ones(8).at[0].set(0.0), "minus": jnp.ones(8).at[0].set(-0.0), "i": jnp.ones(8, jnp.int32)}
    tree |= {"wide": jnp.ones((2, 4)), "long": jnp.ones(8), "nan": jnp.full(8, jnp.nan), "nans": jnp.full(8, jnp.nan)}
    jc.save(tmp_path / "f", tree)
    assert described_in(tmp_path / "f")["same"] == {"nans": "nan"}
    assert_same_bits(jc.load(tmp_path / "f"), tree)


def test_a_file_without_equal_tensors_is_one_of_the_first_version(tmp_path) -> None:
    jc.save(tmp_path / "f", {"a": jnp.ones(3), "b": jnp.zeros(3)})
    described = described_in(tmp_path / "f")
    assert described["version"] == 1
    assert "same" not in described


@pytest.mark.parametrize(
    ("same", "message"),
    [
        ({"b": "c"}, r"'b' refers to 'c', which the file does not hold"),
        ({"b": "b"}, r"'b' refers to 'b', which the file does not hold"),
        ({"b": "a", "a": "b"}, r"'a' is held by the file and refers to 'b', too"),
        ({"b": ["a"]}, r"'b' refers to \['a'\], which the file does not hold"),
        (["b"], r"the list of equal tensors is damaged"),
    ],
)
def test_a_reference_to_nothing_is_one_error(same, message, tmp_path) -> None:
    jc.save(tmp_path / "f", {"a": jnp.ones(3), "b": jnp.ones(3)})
    described = {**described_in(tmp_path / "f"), "same": same}
    tensors = safetensors.numpy.load_file(tmp_path / "f")
    described["sha256"] = _digest(described, tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "f", metadata={"jaxcomp": json.dumps(described)})
    with pytest.raises(FileError, match=message):
        jc.load(tmp_path / "f")
