"""Fault 1: a file that says what cannot be is one FileError, with its checksum right, too."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

import jaxcomp as jc
from jaxcomp.artifact.disk import FileError, replacing
from tests.artifact.by_hand import Compact, Plain, checksum

FRAME = zstandard.compress(bytes(10**6))
SCALE = np.ones((1, 4), np.float32)
CODES = np.zeros(8, np.uint8)
INT = {"grid": {"spec": ["Int", {"bits": 4}]}, "dense_dtype": {"dtype": "float32"}}


def sums_of(*tensors: np.ndarray) -> str:
    return base64.b64encode(b"".join(hashlib.sha256(x.tobytes()).digest()[:8] for x in tensors)).decode()


def write(path: Path, tree: Any, *tensors: np.ndarray, entries: Any = None, **more: Any) -> None:
    """A file by hand, with the right checksums."""
    kinds = {"float32": "F32", "uint8": "U8"}
    described = {"version": 4, "sums": sums_of(*tensors), "tree": tree, "metadata": {}, **more}
    text = tree if isinstance(tree, str) else json.dumps(described)
    said: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, "jaxcomp": text}}
    start = 0
    for i, x in enumerate(tensors):
        kind = kinds[x.dtype.name]
        said[f"t{i}"] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [start, start + x.nbytes]}
        start += x.nbytes
    said.update(entries or {})
    header = json.dumps(said, separators=(",", ":")).encode()
    digest = hashlib.sha256(header).hexdigest().encode()
    header = header.replace(b"0" * 64, digest, 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(x.tobytes() for x in tensors))


def quantized(**changed: Any) -> Any:
    """The node of a quantized leaf of 4 by 4."""
    data = {"codes": {"packed": [4, -8, [4, 4], 0]}, "scale": 1, **changed.pop("data", {})}
    return {"leaf": ["Quantized", {**INT, **changed}, data]}


def test_a_file_by_hand_is_read(tmp_path) -> None:
    write(tmp_path / "f", {"dict": [["w", quantized()], ["a", 1]]}, CODES, SCALE)
    tree = jc.load(tmp_path / "f")
    assert (tree["w"].materialize() == -8).all()
    assert (tree["a"] == 1).all()


HUGE = {"masked": {"survivors": 1}, "mask": [[1], 0], "shape": [1 << 40]}
NESTED = '{"list":[' * 3000 + "0" + "]}" * 3000
DEEP = f'{{"version":4,"sums":"{sums_of(CODES, SCALE)}","tree":{NESTED},"metadata":{{}}}}'
TREES = {
    # Too deep for the parser of some Pythons (RecursionError), parsed by others (3.13) and refused as a tree.
    "a deep tree": (DEEP, "nested|deep"),
    "a tree deeper than trees are": ({"list": [{"list": []}]}, ""),
    "no tree": ('{"version":3}', "damaged header"),
    "no JSON": ("{", "damaged header"),
    "a version in words": ('{"version":"3","tree":0}', "damaged header"),
    "a tensor beyond the last": ({"dict": [["w", 7]]}, "refers to tensor 7 of 2"),
    "a tensor before the first": ({"dict": [["w", -1]]}, "refers to tensor -1 of 2"),
    "a node that is none": ({"dict": [["w", "array"]]}, "'w' is described by 'array', which says nothing"),
    "true as a node": ({"dict": [["w", True]]}, "'w' is described by 'True', which says nothing"),
    "an unknown kind": ({"dict": [["w", {"code": "print(1)"}]]}, "'w' is of kind 'code', which is not known here"),
    "an unknown class": ({"leaf": ["Popen", {}, {}]}, "is made of 'Popen', which is not known here"),
    "an unknown spec": (quantized(grid={"spec": ["system", {}]}), "is made of 'system', which is not known here"),
    "a spec of other fields": (quantized(grid={"spec": ["Int", {"width": 3}]}), "unexpected keyword"),
    "a spec of bad values": (quantized(grid={"spec": ["Int", {"bits": 99}]}), r"Int: bits must be .* 1\.\.8, got 99"),
    "a field too many": (quantized(data={"other": 1}), "Quantized with the parts codes, scale, other"),
    "a field too few": ({"leaf": ["Quantized", {}, {"scale": 1}]}, "is no Quantized as this jaxcomp has it"),
    "an unknown type": (quantized(dense_dtype={"dtype": "object"}), "type 'object', which is not known here"),
    "codes of another size": (quantized(data={"codes": {"packed": [4, -8, [4, 5], 0]}}), r"shape \(4, 5\) in 8 bytes"),
    "codes of no bits": (quantized(data={"codes": {"packed": [0, 0, [4, 4], 0]}}), "codes of 0 bits"),
    "codes of many bits": (quantized(data={"codes": {"packed": [64, 0, [1], 0]}}), "codes of 64 bits"),
    "65 dimensions": (quantized(data={"codes": {"packed": [4, -8, [1] * 65, 0]}}), "65 dimensions"),
    "a negative dimension": (quantized(data={"codes": {"packed": [4, -8, [-4, -4], 0]}}), r"the shape \[-4, -4\]"),
    "half a dimension": (quantized(data={"codes": {"packed": [4, -8, [4.5, 4], 0]}}), r"the shape \[4\.5, 4\]"),
    "a large claim": ({"sparse": [[1 << 50], 0, 1]}, "a mask of shape"),
    "a large mask": ({**HUGE, "mask": [[64, 1], 0], "shape": [64, 1 << 34]}, r"would take 10995116\d+ bytes"),
    "a mask that does not fit": ({**HUGE, "mask": [[64], 0], "shape": [5]}, "does not broadcast to"),
    "a mask of another size": ({**HUGE, "mask": [[100], 0], "shape": [100]}, "in 8 bytes"),
    "survivors of another mask": ({"masked": {"survivors": 1}, "mask": [[64], 0]}, "where its mask keeps 0"),
    "codes of another mask": (
        {"masked": {"survivors": quantized()["leaf"]}, "mask": [[8, 8], 0]},
        r"has \(4, 4\) codes where its mask keeps 0",
    ),
    "a typed array of another size": ({"typed": ["int4", [99], 0]}, "type int4 and shape"),
    "a type that needs no words": ({"typed": ["float32", [2], 0]}, "said to be of type float32"),
    "an unknown branch": ({"branch": ["Popen", [["args", 0]]]}, "is made of 'Popen', which is not known here"),
    "an unknown object": ({"object": ["Popen", {}]}, "is made of 'Popen', which is not known here"),
    "a range without an end": ({"branch": ["Range", [["low", 0]]]}, "holds '', which cannot be: .*missing"),
    "a plan without groups": ({"object": ["Plan", {"kept": []}]}, "holds '', which cannot be: .*missing"),
    "a key of an unknown kind": ({"key": ["mine", 0]}, "mine"),
    "a key twice": ({"dict": [["a", 0], ["a", 1]]}, "has a key twice"),
    "a key that is a list": ({"dict": [[["a"], 0]]}, "a key twice, or one that is no string"),
    "a number that is none": ({"value": {"int": "0xg"}}, "invalid literal"),
    "an object for a value": ({"value": {"code": 1}}, "holds '', which cannot be: "),
    "items that are none": ({"dict": 3}, "holds '', which cannot be: "),
}


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"a tree deeper than trees are"}))
def test_fault_1_a_tree_that_cannot_be_is_one_error(name, tmp_path) -> None:
    tree, message = TREES[name]
    write(tmp_path / "wrong", tree, CODES, SCALE)
    with pytest.raises(FileError, match=message) as e:
        jc.load(tmp_path / "wrong")
    assert str(e.value).startswith(f"load: {os.fspath(tmp_path / 'wrong')!r} ")


def test_fault_1_a_tree_deeper_than_trees_are(tmp_path) -> None:
    tree: Any = 0
    for _ in range(150):
        tree = {"list": [tree]}
    write(tmp_path / "f", tree, CODES)
    with pytest.raises(FileError, match="nested more than 100 deep"):
        jc.load(tmp_path / "f")


def entry(**changed: Any) -> Any:
    return {"t0": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], **changed}}


HEADERS = {
    "more than 64 dimensions": (entry(shape=[1] * 65 + [8]), "holds 't0' of 66 dimensions; an array has at most 64"),
    "a shape of other size": (entry(shape=[9]), "'t0' of type U8 and shape .* has 8 bytes"),
    "an absurd shape": (entry(shape=[1 << 60, 1 << 60]), "'t0' of the shape .* is larger than arrays are"),
    "a negative shape": (entry(shape=[-8]), r"'t0' of the shape \[-8\]; it must be"),
    "a shape in words": (entry(shape=["8"]), r"'t0' of the shape \['8'\]; it must be"),
    "bytes beyond the end": (entry(shape=[99], data_offsets=[0, 99]), "has .* bytes, and its header describes"),
    "bytes before the start": (entry(data_offsets=[-8, 0]), "the header's entry of 't0' is none"),
    "a gap": (entry(shape=[4], data_offsets=[4, 8]), "'t0' begins at byte"),
    "an end before the start": (entry(shape=[0], data_offsets=[8, 0]), "has -8 bytes"),
    "an overlap": ({"u": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "'t0' begins at byte"),
    "an unknown type": (entry(dtype="F7"), "holds 't0' of type F7, which is not known"),
    "an entry that is none": ({"t0": 3}, "the header's entry of 't0' is none"),
    "a type that is a list": (entry(dtype=["U8"]), "holds 't0' of type|entry of 't0' is none"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_fault_1_a_header_that_cannot_be_is_one_error(name, tmp_path) -> None:
    entries, message = HEADERS[name]
    write(tmp_path / "wrong", {"dict": [["w", 0]]}, CODES, entries=entries)
    with pytest.raises(FileError, match=message) as e:
        jc.load(tmp_path / "wrong")
    assert str(e.value).startswith(f"load: {os.fspath(tmp_path / 'wrong')!r} ")


def test_fault_1_a_header_nested_deep_is_one_error(tmp_path) -> None:
    header = b'{"__metadata__":{"jaxcomp":"{}"},"t0":' + b"[" * 5000 + b"]" * 5000 + b"}"
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match=r"nested deeper|entry of 't0' is none"):
        jc.load(tmp_path / "f")
    (tmp_path / "f").write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="truncated or not a safetensors file"):
        jc.load(tmp_path / "f")


def test_fault_1_the_checksum_is_of_names_types_and_order_too(tmp_path) -> None:
    jc.save(tmp_path / "f", {"a": jnp.ones(3), "b": jnp.zeros(3) + 2})
    data = (tmp_path / "f").read_bytes()
    changes = {b'"a":{': b'"c":{', b'"F32"': b'"I32"', b'[[\\"a\\"': b'[[\\"d\\"', b'[\\"a\\",0]': b'[\\"a\\",1]'}
    for old, new in changes.items():
        assert old in data
        (tmp_path / "g").write_bytes(data.replace(old, new, 1))
        with pytest.raises(FileError, match="does not match its checksum: it was damaged or edited"):
            jc.load(tmp_path / "g")


@pytest.mark.parametrize("seed", range(3))
def test_fault_1_changed_bytes_are_one_error(seed, tmp_path) -> None:
    params = {"a": jax.random.normal(jax.random.key(0), (16, 8)), "b": np.eye(20), "k": jax.random.key(1)}
    t = jc.chain(jc.prune(0.8, where="a"), jc.quantize(jc.Int(4), where="a"))
    jc.save(tmp_path / "f", t.apply(t.init(params), params))
    data, rng = (tmp_path / "f").read_bytes(), np.random.default_rng(seed)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[at] ^= 1 << int(rng.integers(0, 8))
        if broken == data:
            continue
        (tmp_path / "f").write_bytes(broken[: rng.integers(0, len(data))] if rng.random() < 0.2 else broken)
        with pytest.raises(FileError, match=r"^load: '"):
            jc.load(tmp_path / "f")


STOPS = [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")]


@pytest.mark.parametrize("error", STOPS, ids=["full", "interrupted", "failed"])
def test_fault_1_nothing_is_left_of_a_save_that_stops_midway(error, tmp_path) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def stop() -> None:
        with replacing(tmp_path / "f") as f:
            f.write(b"half")
            raise error

    wanted = FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        stop()
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_fault_1_a_link_stays_one(tmp_path) -> None:
    jc.save(tmp_path / "f", {"w": jnp.ones(2)})
    (tmp_path / "link").symlink_to(tmp_path / "f")
    jc.save(tmp_path / "link", {"w": jnp.zeros(2)})
    assert (tmp_path / "link").is_symlink()
    assert (jc.load(tmp_path / "f")["w"] == 0).all()


def test_fault_1_a_leaf_whose_packing_fails_names_its_path(tmp_path) -> None:
    leaf = jc.quantize(jc.Int(4)).apply((), {"k": jnp.ones((4, 4))})["k"]
    nan = jax.tree.map(lambda x: x * jnp.nan, leaf)
    with pytest.raises(ValueError, match=re.escape("save: 'net/k' was quantized from values that are NaN")):
        jc.save(tmp_path / "f", {"net": {"k": nan}})
    assert os.listdir(tmp_path) == []


def zeros_of(pieces: Any, data: bytes) -> Compact:
    """A compact file of such pieces, the first of which is its tree."""
    sums = base64.b64encode(checksum(data) * len(pieces)).decode()
    return Compact({"sums": sums, "pieces": pieces, "tree": 0, "metadata": {}}, data)


NOTHING = zeros_of([], b"")
DEFLATED = Plain.of(NOTHING.file()).said["directory"][0]
BOMB = b"\x20" + len(FRAME).to_bytes(4, "little") + FRAME
BOMBS = {
    "a directory that inflates to more": (
        replace(NOTHING, about={"directory": [DEFLATED, 10]}),
        "does not inflate",
    ),
    "a directory of more than there may be": (
        replace(NOTHING, about={"directory": [DEFLATED, 10**9]}),
        "damaged header",
    ),
    "a directory before the file": (replace(NOTHING, about={"directory": [10**6, 10]}), "damaged header"),
    "a directory of nothing": (replace(NOTHING, said=b"[]"), "damaged directory"),
    "a directory of other pieces": (zeros_of([["U8", [9]]], b"12345678"), "its pieces end at byte 273 and not at 272"),
    "a code that is none": (zeros_of([["U8", [9], 8, "zstd"]], b"12345678"), "piece 0 of its directory has no code"),
    "a code of another size": (
        zeros_of([["U8", [9], 8, {"codec": "blocks"}]], b"12345678"),
        "bytes 264 to 272 is cut off",
    ),
    "a tensor of a terabyte": (
        zeros_of([["U8", [1 << 40], len(BOMB), {"codec": "blocks"}]], BOMB),
        "would take 1099511627776",
    ),
    "a tensor of many times its code": (
        zeros_of([["U8", [1 << 29], len(BOMB), {"codec": "blocks"}]], BOMB),
        "more than 4096 times the",
    ),
    "a frame of more than the tensor": (zeros_of([["U8", [9], len(BOMB), {"codec": "blocks"}]], BOMB), "hold 9 bytes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_fault_1_a_compact_file_that_cannot_be_is_one_error(name, tmp_path) -> None:
    file, message = BOMBS[name]
    (tmp_path / "f").write_bytes(file.file())
    with pytest.raises(FileError, match=message):
        jc.load(tmp_path / "f")
