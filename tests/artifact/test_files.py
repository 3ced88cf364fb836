"""The file: every bit comes back, it is as small as it says, and anything wrong with it is one error."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxcomp as jc
from jaxcomp.artifact.disk import FileError
from jaxcomp.artifact.encoding import encode_tree
from jaxcomp.artifact.files import load_metadata, write_atomically
from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.specs import Spec
from tests.artifact.memory import decoded
from tests.laws import assert_same_bits
from tests.marks import quick


@pytest.fixture
def saved(tmp_path):
    """A joint tree and its file."""
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (32, 16)), "bias": jnp.arange(16.0)}}
    t = jc.chain(jc.prune(0.8), jc.quantize(jc.Int(4)))
    seen = t.apply(t.init(params), params)
    path = tmp_path / "net.safetensors"
    jc.save(path, seen, metadata={"note": "x"})
    return path, seen


def test_leaves_come_back_packed_and_equal(saved) -> None:
    path, seen = saved
    loaded = jc.load(path)
    assert_same_bits(loaded, jc.pack(seen))
    assert load_metadata(path) == {"note": "x"}


def test_a_sparse_leaf_is_a_bitmap_and_its_survivors(saved) -> None:
    path, _ = saved
    tensors = safetensors.numpy.load_file(path)
    survivors = 512 - round(0.8 * 512)
    assert tensors["layer/kernel.mask"].nbytes == 512 // 8
    assert tensors["layer/kernel"].nbytes == -(-survivors * 4 // 8)


def test_a_mask_that_does_not_pay_is_left_out(tmp_path) -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    t = jc.chain(jc.prune(0.05), jc.quantize(jc.Int(2)))
    seen = t.apply(t.init(params), params)
    jc.save(tmp_path / "f", seen)
    loaded = jc.load(tmp_path / "f")
    assert isinstance(loaded["kernel"], jc.quantization.Quantized)
    assert_same_bits(jc.materialize(loaded), jc.materialize(seen))


def test_an_array_with_many_zeros_is_stored_without_them(tmp_path) -> None:
    w = np.zeros((100, 100), np.float32)
    w[0, 0], w[5, 5] = 3.0, -0.0
    assert jc.save(tmp_path / "f", {"w": jnp.asarray(w)}) < 2000
    assert_same_bits(jc.load(tmp_path / "f"), {"w": jnp.asarray(w)})


def test_every_type_of_array(tmp_path) -> None:
    types = [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.uint32, np.float16, np.float32, ml_dtypes.bfloat16]
    types += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    tree = {np.dtype(t).name: jnp.asarray(np.array([[0, 1, 1], [1, 0, 1]]).astype(t)) for t in types}
    tree |= {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2)}
    jc.save(tmp_path / "f", tree)
    assert_same_bits(jc.load(tmp_path / "f"), tree)


def test_containers_keep_their_kind_or_take_that_of_like(tmp_path) -> None:
    tree = {"a": [jnp.ones(2), (None, 3, "x", True)], "c": {7: {"b": jnp.zeros(1)}}}
    jc.save(tmp_path / "f", tree)
    loaded = jc.load(tmp_path / "f")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert loaded["a"][1] == (None, 3, "x", True)

    _, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    jc.save(tmp_path / "g", jc.quantize().apply((), state))
    again = jc.load(tmp_path / "g", like=state)
    assert type(again) is type(state)
    assert isinstance(jc.load(tmp_path / "g")["kernel"], jc.quantization.Quantized)

    arrays = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    jc.save(tmp_path / "h", arrays)
    assert_same_bits(jc.load(tmp_path / "h", like=arrays), arrays)


def test_custom_companders_are_named_by_the_reader(tmp_path) -> None:
    root = jc.quantization.Compander(
        "root", lambda w: jnp.sign(w) * jnp.sqrt(jnp.abs(w)), lambda v: jnp.sign(v) * v * v
    )
    seen = jc.quantize(jc.quantization.Companded(4, root)).apply((), {"kernel": jnp.linspace(-1, 1, 12).reshape(4, 3)})
    jc.save(tmp_path / "f", seen)
    assert_same_bits(jc.materialize(jc.load(tmp_path / "f", companders=[root])), jc.materialize(seen))
    with pytest.raises(FileError, match=r"'kernel' is companded by 'root', which is not known here"):
        jc.load(tmp_path / "f")


def test_any_truncation_is_one_error(saved) -> None:
    path, _ = saved
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match=r"truncated|damaged"):
            jc.load(path)


def test_any_flipped_byte_is_one_error(saved) -> None:
    path, _ = saved
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for i in [*rng.integers(0, len(data), 60).tolist(), 8, len(data) - 1]:
        broken = bytearray(data)
        broken[i] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(broken)
        try:
            jc.load(path)
        except FileError:
            continue
        # A header may end in spaces: nothing else may change unnoticed.
        pytest.fail(f"byte {i} was changed and nobody noticed")


def test_files_of_others_and_of_the_future(tmp_path, saved) -> None:
    foreign = tmp_path / "foreign"
    safetensors.numpy.save_file({"w": np.ones(3)}, foreign)
    with pytest.raises(FileError, match=r"foreign' is a safetensors file, but not one that jaxcomp\.save wrote"):
        jc.load(foreign)
    newer = tmp_path / "newer"
    header = {"jaxcomp": json.dumps({"version": 5, "tree": {}, "metadata": {}, "sha256": "0"})}
    safetensors.numpy.save_file({"w": np.ones(3)}, newer, metadata=header)
    with pytest.raises(FileError, match=r"has format version 5, this jaxcomp reads 1 to 4; use the jaxcomp that"):
        jc.load(newer)
    (tmp_path / "text").write_text("not a file of weights, whatever its name")
    with pytest.raises(FileError, match=r"truncated or not a safetensors file"):
        jc.load(tmp_path / "text")
    with pytest.raises(FileError, match=r"cannot read .*missing'"):
        jc.load(tmp_path / "missing")


def test_like_of_another_model(saved) -> None:
    path, seen = saved
    like = jc.materialize(seen)
    with pytest.raises(FileError, match=r"lacks 'layer/extra'"):
        jc.load(path, like={"layer": {**like["layer"], "extra": jnp.ones(1)}})
    with pytest.raises(FileError, match=r"holds 'layer/bias', which the tree does not"):
        jc.load(path, like={"layer": {"kernel": like["layer"]["kernel"]}})
    with pytest.raises(FileError, match=r"holds 'layer/bias' of shape \(16,\), wanted \(4,\)"):
        jc.load(path, like={"layer": {**like["layer"], "bias": jnp.ones(4)}})


def test_a_folder_that_is_not_there_or_not_ours(tmp_path) -> None:
    with pytest.raises(FileError, match=r"save: cannot write .*No such file or directory"):
        jc.save(tmp_path / "none" / "f", {"w": jnp.ones(2)})
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"save: cannot write .*Not a directory"):
        jc.save(tmp_path / "file" / "f", {"w": jnp.ones(2)})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "f"
    jc.save(path, {"w": jnp.ones(2)})
    before = path.read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*No space left on device"):
        jc.save(path, {"w": jnp.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path) -> None:
    path = tmp_path / "f"
    old, new = {"w": jnp.zeros(5000)}, {"w": jnp.ones(5000)}
    jc.save(path, old)
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            jc.save(path, new)
            jc.save(path, old)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(30):
            assert len(set(np.asarray(jc.load(path)["w"]).tolist())) == 1
    finally:
        stop.set()
        thread.join()


def test_files_can_be_read_by_others(tmp_path) -> None:
    write_atomically(tmp_path / "f", b"x")
    assert stat.S_IMODE(os.stat(tmp_path / "f").st_mode) == 0o644


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.tanh, "'a/f' is .*, which a file of weights cannot hold; keep arrays only"),
        (np.ones(2, object), "'a/f' is of type object, which files do not hold"),
        (np.ma.masked_array([1.0], [True]), "'a/f' is MaskedArray, which a file of weights cannot hold"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "'a/f' is ShapeDtypeStruct, which a file of weights cannot hold"),
        (b"x", "'a/f' is bytes, which a file of weights cannot hold"),
    ],
)
def test_names_a_leaf_that_a_file_cannot_hold(tmp_path, leaf, message) -> None:
    with pytest.raises(TypeError, match=message):
        jc.save(tmp_path / "f", {"a": {"f": leaf}})
    assert os.listdir(tmp_path) == []


def test_a_tracer_cannot_be_saved(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"'w' is a tracer; save outside jit"):
        jax.jit(lambda x: jc.save(tmp_path / "f", {"w": x}))(jnp.ones(2))


@dataclass(frozen=True)
class Twice(Spec):
    """A spec that the package does not know."""

    times: int = 2


@compressed_leaf(meta=("how", "dense_dtype"))
class Outer(CompressedLeaf):
    """``dense == left @ right * how.times + shift``, the factors compressed or not, ``shift`` perhaps None."""

    left: Any
    right: Any
    shift: Any
    how: Twice
    dense_dtype: Any

    @property
    def shape(self):
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self):
        return self.dense_dtype

    def materialize(self):
        y = dense(self.left) @ dense(self.right) * self.how.times
        return y if self.shift is None else y + self.shift

    def pack(self):
        return dataclasses.replace(self, left=jc.pack(self.left), right=jc.pack(self.right))


@pytest.mark.parametrize("times", quick([2, 5], 2))
def test_any_leaf_class_is_stored_by_its_fields(times, tmp_path) -> None:
    joint = jc.chain(jc.prune(0.9), jc.quantize(jc.Int(3, symmetric=False)))
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 24))}
    left = joint.apply(joint.init(params), params)["kernel"]
    tree = {"w": Outer(left, jnp.ones((24, 2)), None, Twice(times), jnp.dtype("float32"))}
    tree["v"] = dataclasses.replace(tree["w"], shift=jnp.ones((32, 2)))
    jc.save(tmp_path / "f", tree)
    loaded = jc.load(tmp_path / "f")
    assert loaded["w"].how == Twice(times)
    assert_same_bits(loaded, jc.pack(tree))
    assert_same_bits(jc.materialize(loaded), jc.materialize(tree))


def test_a_mask_over_values_that_are_not_zero_is_kept(tmp_path) -> None:
    seen = {"k": jc.core.Masked(jnp.ones((8, 4)), jnp.arange(32).reshape(8, 4) != 3)}
    jc.save(tmp_path / "f", seen)
    assert_same_bits(jc.materialize(jc.load(tmp_path / "f")), jc.materialize(seen))


def test_a_leaf_of_an_unknown_class_is_one_error(saved, tmp_path) -> None:
    class Foreign(jc.quantization.Quantized):
        """Gone when the file is read."""

    _, seen = saved
    q = jc.pack(seen)["layer"]["kernel"].values
    jc.save(tmp_path / "f", {"w": Foreign(**{f.name: getattr(q, f.name) for f in dataclasses.fields(q)})})
    Foreign.__name__ = "Other"
    with pytest.raises(FileError, match="'w' is made of 'Foreign', which is not known here"):
        jc.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        (["Int", {"bits": 4, "group": 4}], jc.Int(4)),
        (["Float", {"exponent": 2, "mantissa": 1, "group": 4}], jc.quantization.E2M1),
        (["Levels", {"values": [-1.0, 0.0, 0.5], "group": 4}], jc.quantization.Levels((-1.0, 0.0, 0.5))),
        (["PoT", {"bits": 3, "group": 4}], jc.quantization.PoT(3)),
        (["APoT", {"bits": 3, "group": 4}], jc.quantization.APoT(3)),
        (["NF4", {"group": 4}], jc.quantization.NF4()),
        (["NF4", {"group": None}], jc.quantization.NF4()),
    ],
    ids=str,
)
def test_grids_that_said_their_groups_load(spec, grid, tmp_path) -> None:
    """What files said before ``per=``: the scale's shape says it too, so nothing is lost."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))}
    seen = jc.quantize(grid, per=jc.Groups(4)).apply((), params)
    node, tensors = encode_tree(seen)
    meta = node["dict"][0][1]["leaf"][1]
    assert "group" not in str(meta)
    meta["grid"]["spec"] = spec
    loaded = decoded(node, tensors)
    assert loaded["kernel"].grid == grid
    assert loaded["kernel"].scale.shape == (2, 3)
    assert_same_bits(jc.materialize(loaded), jc.materialize(seen))


def test_other_fields_that_a_spec_has_not_are_not_passed_over() -> None:
    node, tensors = encode_tree(jc.quantize().apply((), {"kernel": jnp.ones((2, 2))}))
    node["dict"][0][1]["leaf"][1]["grid"]["spec"] = ["Int", {"width": 4}]
    with pytest.raises(ValueError, match=r"'kernel' is made of Int\(\*\*{'width': 4}\), .*unexpected keyword"):
        decoded(node, tensors)
