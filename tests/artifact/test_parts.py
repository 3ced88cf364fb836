"""Leaves one by one, some of them, on their devices, and as views: what is not asked for is not read, nor checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.artifact import FileError, open_tree, save
from tests.artifact.old_files import write_old
from tests.laws import assert_same_bits

CODINGS = [None, "zstd", "ans"]


@pytest.fixture(scope="module")
def tree() -> Any:
    """Leaves of several kinds, none of which must be compiled."""
    held = jc.load(Path(__file__).parents[1] / "golden" / "data" / "masks.safetensors")
    w = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    made = {"sparse": held["int4"], "codes": held["does_not_pay"]}
    return {**made, "plain": w, "more": [np.arange(5), (7, {"x": np.float32(3)})]}


def broken_at(path: Path, leaf: np.ndarray) -> None:
    """Flips a bit in the middle of the bytes of a plain array in the file."""
    data, wanted = bytearray(path.read_bytes()), np.asarray(leaf).tobytes()
    at = bytes(data).index(wanted)
    data[at + len(wanted) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("coding", CODINGS)
def test_leaves_are_read_one_by_one(coding, tree, tmp_path) -> None:
    save(tmp_path / "f", tree, metadata={"n": 1}, coding=coding)
    with open_tree(tmp_path / "f") as opened:
        assert sorted(opened) == ["codes", "more/0", "more/1/0", "more/1/1/x", "plain", "sparse"]
        assert opened.metadata == {"n": 1}
        for name in ("codes", "sparse", "plain"):
            assert_same_bits({"x": opened[name]}, {"x": tree[name]})
        assert opened["more/1/0"] == 7
        assert (opened["more/0"] == np.arange(5)).all()
        with pytest.raises(KeyError):
            opened["other"]
    loaded = jc.load(tmp_path / "f")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert_same_bits({k: loaded[k] for k in ("codes", "sparse")}, {k: tree[k] for k in ("codes", "sparse")})


def test_a_damaged_leaf_does_not_stand_in_the_way_of_others(tree, tmp_path) -> None:
    save(tmp_path / "f", tree)
    broken_at(tmp_path / "f", tree["plain"])
    start = (tmp_path / "f").read_bytes().index(np.asarray(tree["plain"]).tobytes()[:64])
    message = rf"does not match its checksum: 'plain', bytes {start} to {start + 64 * 32 * 4}, was damaged or edited"
    with open_tree(tmp_path / "f") as opened:
        assert_same_bits({"x": opened["codes"]}, {"x": tree["codes"]})
        for read in (opened.__getitem__, opened.mapped):
            with pytest.raises(FileError, match=message):
                read("plain")
    assert set(jc.load(tmp_path / "f", only="codes|sparse")) == {"codes", "sparse"}
    for only in (None, "plain"):
        with pytest.raises(FileError, match=message):
            jc.load(tmp_path / "f", only=only)


def test_what_no_leaf_refers_to_is_checked_with_the_whole(tree, tmp_path) -> None:
    save(tmp_path / "f", {"a": np.ones(3), "b": np.zeros(3) + 2})
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data[:-1] + b"\x01")
    assert (jc.load(tmp_path / "f", only="a")["a"] == 1).all()
    with pytest.raises(FileError, match="'b', bytes"):
        jc.load(tmp_path / "f")


def test_a_header_that_was_changed_is_found_before_anything_is_read(tree, tmp_path) -> None:
    save(tmp_path / "f", tree)
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data.replace(b'[\\"plain\\"', b'[\\"plbin\\"', 1))
    with pytest.raises(FileError, match="does not match its checksum: it was damaged or edited"):
        open_tree(tmp_path / "f")


def test_views_are_of_the_file(tree, tmp_path) -> None:
    save(tmp_path / "f", tree)
    with open_tree(tmp_path / "f") as opened:
        view = opened.mapped("plain")
        assert not view.flags.writeable
        assert not view.flags.owndata
        with pytest.raises(TypeError, match="'codes' is not stored as it is; read it with"):
            opened.mapped("codes")
    assert (view == tree["plain"]).all()  # closed, and still there
    for read in (opened.mapped, opened.__getitem__):
        with pytest.raises(ValueError, match=r"<OpenTree of '.*', 6 leaves> was closed; read its leaves before"):
            read("plain")


def test_leaves_that_paths_cannot_tell_apart(tmp_path) -> None:
    save(tmp_path / "f", {"a/b": np.ones(1), "a": {"b": np.zeros(1)}})
    with pytest.raises(FileError, match="holds two leaves at 'a/b', which paths cannot tell apart; load it"):
        open_tree(tmp_path / "f")


def test_an_open_file_is_not_mixed_with_the_one_that_takes_its_place(tmp_path) -> None:
    save(tmp_path / "f", {"a": np.zeros(5000), "b": np.zeros(5000)})
    with open_tree(tmp_path / "f") as opened:
        save(tmp_path / "f", {"a": np.ones(5000), "b": np.ones(5000)})
        assert not opened["a"].any()
        assert not opened["b"].any()


def test_some_leaves(tree, tmp_path) -> None:
    save(tmp_path / "f", {"net": tree, "x": [np.zeros(3), np.ones(3)]})
    load = lambda only, **more: jc.load(tmp_path / "f", only=only, **more)  # noqa: E731
    assert list(load(r"net/(codes|plain)")["net"]) == ["codes", "plain"]
    assert load("x/1")["x"][0] is None
    assert (load("x/1")["x"][1] == 1).all()
    assert load(lambda path: path.endswith("/x")) == {"net": {"more": [None, (None, {"x": 3})]}}
    like = {"net": {"plain": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    assert (load("net/plain", like=like)["net"]["plain"] == tree["plain"]).all()
    with pytest.raises(FileError, match=r"holds no leaf that only='nte' selects; it has 'net/sparse', "):
        load("nte")


def test_some_leaves_of_an_older_file(tmp_path) -> None:
    write_old(
        tmp_path / "f", {"dict": [["a", "array"], ["b", "array"]]}, {"a": np.ones(3, "f4"), "b": np.ones(2, "f4")}
    )
    with open_tree(tmp_path / "f") as opened:
        assert opened["b"].shape == (2,)
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data[:-1] + b"\1")
    with pytest.raises(FileError, match="does not match its checksum"):
        jc.load(tmp_path / "f", only="a")


class Pair(NamedTuple):
    a: Any
    b: Any


def test_like_is_of_the_same_types_and_containers(tmp_path) -> None:
    save(tmp_path / "f", {"x": [jnp.ones(2), jnp.ones(3, jnp.bfloat16)], "p": Pair(jnp.ones(1), jnp.zeros(1))})
    struct = jax.ShapeDtypeStruct
    good = {"x": [struct((2,), jnp.float32), struct((3,), jnp.bfloat16)], "p": Pair(jnp.ones(1), jnp.ones(1))}
    loaded = jc.load(tmp_path / "f", like=good)
    assert type(loaded["p"]) is Pair
    with pytest.raises(FileError, match="holds 'x/1' of type bfloat16, wanted float32"):
        jc.load(tmp_path / "f", like={**good, "x": [good["x"][0], struct((3,), jnp.float32)]})
    with pytest.raises(FileError, match="holds a list at 'x', wanted a tuple"):
        jc.load(tmp_path / "f", like={**good, "x": tuple(good["x"])})
    with pytest.raises(FileError, match="holds a list at 'x', wanted a dict"):
        jc.load(tmp_path / "f", like={**good, "x": dict(enumerate(good["x"]))})
    _, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    save(tmp_path / "g", jc.quantize().apply((), state))
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    with pytest.raises(FileError, match="of type float32, wanted bfloat16"):
        jc.load(tmp_path / "g", like=other)


def test_a_limit_of_memory(tmp_path) -> None:
    save(tmp_path / "f", {"a": np.ones(1000, np.float32), "z": np.zeros(10**6, np.float32)})
    with pytest.raises(FileError, match=r"would take \d+ bytes of memory with 'z', more than the 10000 of limit="):
        jc.load(tmp_path / "f", limit=10_000)
    assert jc.load(tmp_path / "f", limit=10_000, only="a")["a"].shape == (1000,)
    with pytest.raises(TypeError, match="limit is a number of bytes"):
        jc.load(tmp_path / "f", limit="1G")  # type: ignore[arg-type]


ON_DEVICES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
import jaxcomp as jc
from jaxcomp.artifact import FileError
file, mesh = sys.argv[1], jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
rows, columns, whole = (NamedSharding(mesh, P(*axes)) for axes in (("d",), (None, "d"), ()))
want = jc.load(file)
got = jc.load(file, sharding={"codes": columns, "sparse": rows, "plain": rows, "more": whole})
for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    assert np.array_equal(np.asarray(x), np.asarray(y))
assert isinstance(got["plain"], jax.Array) and got["more"][1][0] == 7 and type(got["more"][0]) is np.ndarray  # 64 bits
parts = lambda x: x.sharding.shard_shape(x.shape)
assert parts(got["plain"]) == (16, 32)
assert parts(got["codes"].codes.data) == (32 * 8 * 2 // 8 // 4,)
assert parts(got["codes"].scale) == (1, 2)
assert parts(got["sparse"].mask.data) == (32 * 8 // 8 // 4,)
assert {d.id for d in jax.tree.leaves(got["sparse"])[0].sharding.device_set} == {0, 1, 2, 3}
one = SingleDeviceSharding(jax.devices()[3])
assert all(x.devices() == {jax.devices()[3]} for x in jax.tree.leaves(jc.load(file, sharding=one, only='plain|codes')))
for sharding, message in (
    ({"plain": rows}, "holds 'sparse', for which there is no sharding"),
    ({**dict.fromkeys(["codes", "sparse", "plain", "more"], whole), "no": rows}, "holds nothing at 'no'"),
    (NamedSharding(mesh, P(None, None, "d")), "cannot lie as"),
):
    try:
        jc.load(file, sharding=sharding)
    except FileError as e:
        assert message in str(e), e
    else:
        raise AssertionError(message)
"""


def test_leaves_go_to_their_devices(tree, tmp_path) -> None:
    save(tmp_path / "f", tree)
    env = {k: v for k, v in os.environ.items() if k not in {"XLA_FLAGS"}} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_DEVICES, os.fspath(tmp_path / "f")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
