"""GGUF files: blocks read by an oracle of the documented layout and by the package gguf; damaged files."""

from __future__ import annotations

import struct
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact import FileError
from jaxcomp.core.wrappers import Masked
from jaxcomp.export.gguf import container
from jaxcomp.export.gguf.blocks import narrowed
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.level_grids import E2M1
from jaxcomp.quantization.microscaling import E8M0
from tests.export.formats import float_leaf, value
from tests.export.formats import random_leaf as leaf
from tests.marks import quick

RNG = np.random.default_rng(0)
F32 = jnp.dtype("float32")
TYPES = {"Q8_0": jc.Int(8), "Q4_0": jc.Int(4), "Q4_1": jc.Int(4, symmetric=False), "Q5_0": jc.Int(5)}


def blocks_of(path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Type, shape and bytes of each tensor, by the GGUF specification alone."""
    data = path.read_bytes()
    at = 24
    assert data[:4] == b"GGUF"
    version, count, keys = struct.unpack_from("<IQQ", data, 4)
    assert version == 3

    def text() -> str:
        nonlocal at
        (n,) = struct.unpack_from("<Q", data, at)
        at += 8 + n
        return data[at - n : at].decode()

    for _ in range(keys):
        text()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == 8:
            text()
        else:
            at += {4: 4, 6: 4}[kind]
    infos = []
    for _ in range(count):
        name = text()
        (axes,) = struct.unpack_from("<I", data, at)
        dims = struct.unpack_from(f"<{axes}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * axes)
        at += 16 + 8 * axes
        infos.append((name, kind, dims[::-1], offset))
    start = -(-at // 32) * 32
    assert all(offset % 32 == 0 for *_, offset in infos)
    return {name: (kind, shape, data[start + offset :]) for name, kind, shape, offset in infos}


def oracle(kind: int, shape, data: bytes) -> np.ndarray:
    """Blocks of 32 weights as ggml-common.h lays them out, one weight at a time."""
    out = []
    size = {8: 34, 2: 18, 3: 20, 6: 22}[kind]
    for b in range(shape[0] * shape[1] // 32):
        block = data[b * size : (b + 1) * size]
        d = np.float32(np.frombuffer(block[:2], np.float16)[0])
        m = np.float32(np.frombuffer(block[2:4], np.float16)[0]) if kind == 3 else np.float32(0)
        for i in range(32):
            low = block[-16 + i % 16] >> (4 * (i // 16)) & 15
            if kind == 8:
                q = np.frombuffer(block[2 + i : 3 + i], np.int8)[0]
            elif kind == 6:
                q = low + 16 * (block[2 + i // 8] >> i % 8 & 1) - 16
            else:
                q = low - 8 * (kind == 2)
            out.append(d * np.float32(q) + m if kind == 3 else d * np.float32(q))
    return np.array(out, np.float32).reshape(shape)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_the_documented_ones(name, tmp_path) -> None:
    q = leaf(TYPES[name])
    path = tmp_path / "a.gguf"
    size = jc.export.to_gguf(path, {"m": {"kernel": q}})
    assert size == path.stat().st_size
    kind, shape, data = blocks_of(path)["m.weight"]
    assert (kind, shape) == ({"Q8_0": 8, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6}[name], (6, 64))
    got = oracle(kind, shape, data)
    # The codes are ours; the scale is float16's nearest, in Q4_1 the nearest that times the zero point is one of its.
    numbers = np.asarray(q.codes if name == "Q8_0" else q.codes.on_host()).astype(np.float32)
    zero = 0 if q.zero_point is None else np.repeat(np.asarray(q.zero_point), 32, 0)
    scale = np.asarray(q.scale)
    near = scale.astype(np.float16).astype(np.float32) if name != "Q4_1" else got_scales(data)
    np.testing.assert_array_equal(got.T, (numbers - zero) * np.repeat(near, 32, 0))
    bits = 2.0**-11 if name != "Q4_1" else 2.0**-7
    assert (np.abs(near - scale) <= bits * scale).all()
    # The package reads the same, and so do we.
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "m.weight")
    np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), got)
    back = jc.export.from_gguf(path)["m"]["weight"]
    assert back.grid == q.grid
    np.testing.assert_array_equal(value(back), got)


def got_scales(data: bytes) -> np.ndarray:
    blocks = np.frombuffer(data[: 12 * 20], np.uint8).reshape(6, 2, 20)
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].T.astype(np.float32)


def test_microscaled_blocks_lose_nothing(tmp_path) -> None:
    q = float_leaf(E2M1, blocks=(2, 6), scales=E8M0())
    jc.export.to_gguf(tmp_path / "a.gguf", {"m": {"kernel": q}})
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), value(q).T)
    back = jc.export.from_gguf(tmp_path / "a.gguf")["m"]["weight"]
    assert (back.grid, back.scale.grid) == (E2M1, E8M0())
    np.testing.assert_array_equal(value(back), value(q).T)


def test_scales_times_zero_points_are_float16() -> None:
    scale = (RNG.uniform(0.5, 2, 20_000) * 2.0 ** RNG.integers(-10, 4, 20_000)).astype(np.float32)
    zero = RNG.integers(0, 16, 20_000)
    near = narrowed(scale, zero, 4)
    assert (near == near.astype(np.float16)).all()
    assert (near * zero == (near * zero).astype(np.float16)).all()
    assert (np.abs(near - scale) <= scale * 2.0**-7).all()
    easy = np.isin(zero, [0, 1, 2, 4, 8])
    np.testing.assert_array_equal(near[easy], scale[easy].astype(np.float16).astype(np.float32))


def test_masked_weights_and_zeros_stay_zero(tmp_path) -> None:
    q = leaf(TYPES["Q4_1"])
    mask = RNG.random(q.shape) < 0.5
    jc.export.to_gguf(tmp_path / "a.gguf", {"m": {"kernel": Masked(q, jnp.asarray(mask))}})
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    got = gguf.dequantize(tensor.data, tensor.tensor_type).T
    zero = q.codes.on_host() == np.repeat(np.asarray(q.zero_point), 32, 0)
    np.testing.assert_array_equal(got == 0, ~mask | zero)


def test_wider_groups_are_repeated_and_a_tree_comes_back(tmp_path) -> None:
    tree = {
        "a": {"kernel": leaf(jc.Int(8), (64, 6), 64), "bias": jnp.ones(6)},
        "table": {"embedding": jnp.asarray(RNG.normal(size=(5, 7)), jnp.bfloat16)},
        "scale": jnp.asarray(2.5, jnp.float16),
        "count": np.array([2**40, -1]),
    }
    jc.export.to_gguf(tmp_path / "a.gguf", tree)
    like = jc.core.materialize(tree)
    back = jc.export.from_gguf(tmp_path / "a.gguf", like=like)
    scale = np.asarray(tree["a"]["kernel"].scale).astype(np.float16).astype(np.float32)
    want = np.asarray(tree["a"]["kernel"].codes).astype(np.float32) * scale
    np.testing.assert_array_equal(value(back["a"]["kernel"]), want)
    assert back["count"].tolist() == [2**40, -1]
    for key in ("table", "scale"):
        assert str(back[key]) == str(tree[key])
    with pytest.raises(FileError, match=r"does not hold 'b/kernel' as 'b.weight'; change names="):
        jc.export.from_gguf(tmp_path / "a.gguf", like={"b": {"kernel": like["a"]["kernel"]}})
    with pytest.raises(FileError, match=r"holds .*, 'scale', 'table.weight', which like= has no leaf for"):
        jc.export.from_gguf(tmp_path / "a.gguf", like={"a": {"kernel": like["a"]["kernel"]}})


def test_what_the_package_writes(tmp_path) -> None:
    """Its quantizers' blocks, and random ones of the types that it only reads."""
    kinds = gguf.GGMLQuantizationType
    w = RNG.normal(size=(3, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    writer.add_uint32("test.size", 7)
    writer.add_array("test.words", ["a", "b"])
    want = {}
    for kind in (kinds.Q8_0, kinds.Q4_0, kinds.Q4_1, kinds.Q5_0, kinds.Q5_1, kinds.BF16, kinds.MXFP4):
        data = gguf.quantize(w, kind)
        want[kind.name] = gguf.dequantize(data, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    for kind in (kinds.Q4_K, kinds.Q6_K, kinds.IQ4_NL):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = RNG.integers(0, 60, (3, 256 // block * size)).astype(np.uint8)
        want[kind.name] = gguf.dequantize(data, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.add_tensor("plain", w.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tree = jc.export.from_gguf(tmp_path / "a.gguf")
    np.testing.assert_array_equal(np.asarray(tree.pop("plain")), w.astype(np.float16))
    assert {name for name, x in tree.items() if isinstance(x, Quantized)} == {"Q8_0", "Q4_0", "Q5_0", "MXFP4"}
    assert list(tree) == list(want)
    for name, x in tree.items():
        got = value(x) if isinstance(x, Quantized) else np.asarray(x).astype(np.float32)
        np.testing.assert_array_equal(got, want[name], err_msg=name)


def test_a_type_that_wants_the_package_says_so(tmp_path, monkeypatch) -> None:
    path, kind = tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q6_K
    data = np.zeros((1, 210), np.uint8)
    write(path, [("w", (1, 256), int(kind), data)])
    assert jc.export.from_gguf(path)["w"].shape == (1, 256)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"from_gguf: 'w' is of type 14, which .* pip install \"jaxcomp\[export\]\""):
        jc.export.from_gguf(path)
    write(path, [("w", (2,), 0, np.ones(2, np.float32))])
    assert jc.export.from_gguf(path)["w"].tolist() == [1, 1]


def write(path, tensors) -> None:
    with path.open("wb", buffering=0) as f:
        container.write(f, {}, tensors)


def test_metadata_keep_their_types(tmp_path) -> None:
    given = {
        "a": 7, "b": -1, "c": 2**40, "d": 1.5, "e": True, "f": "ä", "g": [1, 2], "h": ["x", ""], "i": np.uint8(3),
        "j": [0.5, 1], "k": [True, False], "l": 2**64 - 1,
    }  # fmt: skip
    jc.export.to_gguf(tmp_path / "a.gguf", {"w": jnp.ones(2)}, architecture="llama", metadata=given)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["general.file_type"].contents() == 0
    assert {k: fields[k].contents() for k in given} == given
    types = [fields[k].types[-1].name for k in "abcdi"]
    assert types == ["UINT32", "INT32", "INT64", "FLOAT32", "UINT8"]


WRONG = {
    "is on int3, which GGUF has no blocks for; it has them for Int(8)": leaf(jc.Int(3)),
    "has its scales in groups of 16 inputs, and each block of 32 of GGUF has one; quantize with per=Groups(32)": leaf(
        jc.Int(4), group=16
    ),
    "has 48 inputs, and GGUF wants a multiple of 32": leaf(jc.Int(4), (48, 6), 16),
    "has a scale of 1e-08, which float16, the type of GGUF's scales, rounds by more than half a step": leaf(
        jc.Int(4), scale=1e-8
    ),
    "has a scale of 1e+06, which float16": leaf(jc.Int(4), scale=1e6),
    "is no matrix of outputs and inputs": leaf(jc.Int(4), (2, 3, 4, 5), 4),
}


@pytest.mark.parametrize("said", WRONG, ids=lambda said: said[:12])
def test_what_does_not_fit_is_said(said, tmp_path) -> None:
    tree = {"conv": {"kernel": WRONG[said]}}
    with pytest.raises(jc.export.ExportError) as e:
        jc.export.to_gguf(tmp_path / "a.gguf", tree)
    assert str(e.value).startswith("to_gguf: 'conv/kernel' ")
    assert said in str(e.value)
    assert "floats='conv/kernel'" in str(e.value)
    assert not list(tmp_path.iterdir())
    jc.export.to_gguf(tmp_path / "a.gguf", tree, floats="conv/kernel")
    assert jc.export.from_gguf(tmp_path / "a.gguf")["conv"]["weight"].dtype == jnp.float32


def test_what_no_tensor_can_be(tmp_path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(jc.export.ExportError, match=r"longer than the 63 bytes that a name has in GGUF"):
        jc.export.to_gguf(path, {"x" * 64: jnp.ones(2)})
    with pytest.raises(jc.export.ExportError, match=r"'x' is of type bool, which GGUF has no name for"):
        jc.export.to_gguf(path, {"x": np.ones(2, bool)})
    with pytest.raises(jc.export.ExportError, match="'bias' has 5 axes, and a tensor of GGUF at most 4"):
        jc.export.to_gguf(path, {"bias": np.ones((1,) * 5)})
    with pytest.raises(jc.export.ExportError, match=r"the metadata 'a' cannot be written: None is no boolean"):
        jc.export.to_gguf(path, {"x": jnp.ones(2)}, metadata={"a": None})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    tree = {"m": {"kernel": leaf(jc.Int(4)), "bias": jnp.ones(6)}, "n": {"kernel": leaf(jc.Int(8))}}
    jc.export.to_gguf(path, tree, metadata={"a": ["x", "y"], "b": [1, 2]})
    return path.read_bytes()


def patched(data: bytes, at: int, code: str, value: int) -> bytes:
    new = struct.pack(f"<{code}", value)
    return data[:at] + new + data[at + len(new) :]


def test_damaged_files_are_one_error(whole, tmp_path) -> None:
    path = tmp_path / "a.gguf"
    info = whole.index(b"m.weight") + 8  # behind a name: axes, sizes, type, offset
    damaged = {
        "is no GGUF file": b"GGML" + whole[4:],
        "is a big-endian file; convert it": patched(whole, 4, "I", 3 << 24),
        "has GGUF version 1; read are 2 and 3": patched(whole, 4, "I", 1),
        "announces 1152921504606846976 tensors": patched(whole, 8, "Q", 2**60),
        "has 9 axes; there are at most 4": patched(whole, info, "I", 9),
        " of 1056": patched(whole, info + 12, "Q", 2**40),
        "is in blocks of 32": patched(whole, info + 4, "Q", 33),
        "of type 999, which is not known": patched(whole, info + 20, "I", 999),
        "lies over": patched(whole, whole.index(b"n.weight") + 8 + 24, "Q", 32),
        "the list at byte": patched(whole, whole.index(b"\1\0\0\0\0\0\0\0b") + 17, "Q", 2**50),
    }
    for said, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(FileError) as e:
            jc.export.from_gguf(path)
        assert said in str(e.value)
        assert str(path) in str(e.value)


@pytest.mark.parametrize("count", quick((300, 5000), 300))
def test_any_damage_is_a_file_error(count, whole, tmp_path) -> None:
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(count)
    header = whole.index(b"n.weight") + 40
    read = wrong = 0
    for n in range(count):
        data = bytearray(whole)
        if n % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for at in rng.integers(0, header, 1 + n % 3):
                data[at] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            jc.export.from_gguf(path)
            read += 1
        except FileError as e:
            wrong += not str(e).startswith("from_gguf: ")
    assert read < 0.75 * count
    assert not wrong


def test_who_cannot_write_is_named(tmp_path) -> None:
    with pytest.raises(FileError, match=r"^to_gguf: cannot write '.*/gone/w.gguf': No such file or directory\.$"):
        jc.export.to_gguf(tmp_path / "gone" / "w.gguf", {"w": np.ones((2, 32), np.float32)})
