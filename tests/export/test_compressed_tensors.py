"""Folders of the compressed-tensors layout: read by an oracle of the documented layout; damaged ones.

What the package itself makes of them is in ``test_compressed_tensors_parity``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

import jaxcomp as jc
from jaxcomp.activations import Dynamic, Float8
from jaxcomp.artifact import FileError
from jaxcomp.core import Tokens
from jaxcomp.core.packed import Packed
from jaxcomp.core.roles import Roles
from jaxcomp.export import ExportError, from_compressed_tensors, to_compressed_tensors
from jaxcomp.export.compressed_tensors import writing
from jaxcomp.export.compressed_tensors.packing import codes_of, factor_of, global_scale, words
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.quantization.level_grids import E2M1, E4M3, E5M2
from jaxcomp.quantization.microscaling import E8M0
from jaxcomp.trace.ranges import Range
from tests.export.formats import TRANSFORMS, float_leaf, params, spread, value
from tests.export.formats import random_leaf as leaf
from tests.marks import quick

RNG = np.random.default_rng(0)
FLOAT = jnp.dtype("float32")
DTYPES = {
    "F32": np.float32, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F16": np.float16,
}  # fmt: skip


def tensors(folder) -> dict[str, np.ndarray]:
    held = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    return {name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in held}


def bits_of(row: np.ndarray, bits: int, count: int) -> list[int]:
    """The numbers of a row of words as one long little-endian number."""
    whole = int.from_bytes(np.ascontiguousarray(row).astype("<i4").tobytes(), "little")
    return [whole >> (bits * i) & (2**bits - 1) for i in range(count)]


def oracle(folder, module: str) -> np.ndarray:
    """A module's weight by the layout's documentation."""
    held = {k.removeprefix(f"{module}."): v for k, v in tensors(folder).items() if k.startswith(f"{module}.weight")}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    [group] = said["config_groups"].values()
    args = group["weights"]
    bits, half, scale = args["num_bits"], 2 ** (args["num_bits"] - 1), held["weight_scale"]
    if group["format"] == "pack-quantized":
        rows, columns = held["weight_shape"]
        q = np.array([bits_of(row, bits, columns) for row in held["weight_packed"]]) - half
        if not args["symmetric"] and args["strategy"] != "tensor":
            zero = np.array([bits_of(col, bits, rows) for col in held["weight_zero_point"].T]).T - half
        else:
            zero = held.get("weight_zero_point", np.zeros(1, int)).astype(int).reshape(1, 1)
    elif "weight_packed" in held:
        levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = np.stack([held["weight_packed"] & 15, held["weight_packed"] >> 4], -1).reshape(len(scale), -1)
        q, zero = levels[codes & 7] * np.where(codes > 7, -1, 1), 0
    else:
        q, zero = held["weight"].astype(np.float32), held.get("weight_zero_point", np.zeros((1, 1))).astype(int)
    if args.get("scale_dtype") == "torch.uint8":
        scale = (2.0 ** (scale.astype(int) - 127)).astype(np.float32)
    if "weight_global_scale" in held:
        scale = scale.astype(np.float32) / held["weight_global_scale"]
    scale = scale.reshape(1, 1) if args["strategy"] == "tensor" else scale
    zero = spread(zero, q.shape) if np.ndim(zero) == 2 else zero
    return (q - zero).astype(np.float32) * spread(scale, q.shape).astype(np.float32)


LEAVES = {
    "int3": leaf(jc.Int(3)),
    "int4": leaf(jc.Int(4)),
    "int5 asymmetric": leaf(jc.Int(5, symmetric=False), (64, 24)),
    "int8 of one scale": leaf(jc.Int(8), (6, 64)[::-1], 64),
    "float8": float_leaf(E4M3),
    "float8 in tiles": float_leaf(E4M3, blocks=(4, 2)),
    "nvfp4": float_leaf(E2M1, blocks=(4, 6), scales=E4M3),
    "mxfp4": float_leaf(E2M1, blocks=(2, 6), scales=E8M0()),
}


@pytest.mark.parametrize("name", LEAVES)
def test_codes_are_written_as_they_are(name, tmp_path) -> None:
    q = LEAVES[name]
    to_compressed_tensors(tmp_path, {"m": {"kernel": q}})
    got, want = oracle(tmp_path, "m"), value(q).T
    if isinstance(q.scale, Quantized):  # which the package dequantizes in bfloat16
        got, want = (x.astype(ml_dtypes.bfloat16) for x in (got, want))
    np.testing.assert_array_equal(got, want)
    back = from_compressed_tensors(tmp_path)["m"]["weight"]
    assert (back.grid, back.shape) == (q.grid, (q.shape[1], q.shape[0]))
    np.testing.assert_array_equal(value(back).astype(want.dtype), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_layout_is_the_documented_one(name, tmp_path) -> None:
    t, tree = TRANSFORMS[name], params(64, 24)
    small = t.apply(t.init(tree), tree)
    size = to_compressed_tensors(tmp_path, small, config={"model_type": "mine"})
    assert size == (tmp_path / "model.safetensors").stat().st_size
    want = np.asarray(jc.materialize(small)["a"]["mlp"]["kernel"]).T
    got = oracle(tmp_path, "a.mlp")
    if name in ("nvfp4", "mxfp4", "mxfp8"):  # which the package dequantizes in bfloat16
        got, want = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (got, want))
    np.testing.assert_array_equal(got, want)
    back = from_compressed_tensors(tmp_path, like=tree)["a"]["mlp"]
    np.testing.assert_array_equal(np.asarray(back["kernel"].materialize().astype(jnp.float32)).T, want)
    np.testing.assert_array_equal(np.asarray(back["bias"]), np.asarray(tree["a"]["mlp"]["bias"]))
    inner = small["a"]["mlp"]["kernel"]
    assert back["kernel"].grid == getattr(inner, "values", inner).grid or "narrow" in name
    with (tmp_path / "config.json").open() as f:
        assert json.load(f)["model_type"] == "mine"


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_a_stream_of_bits(bits) -> None:
    for columns in (1, 31, 32, 33, 70):
        codes = RNG.integers(0, 2**bits, (3, columns)).astype(np.uint8)
        held = words(codes, bits)
        assert held.shape == (3, -(-columns * bits // 32))
        assert [bits_of(row, bits, columns) for row in held] == codes.tolist()
        np.testing.assert_array_equal(codes_of(held, bits, columns), codes)


def test_every_factor_has_a_divisor() -> None:
    for outer in np.exp(RNG.normal(-6, 4, 500)).astype(np.float32):
        divisor = global_scale(outer)
        assert divisor is not None
        assert factor_of(divisor) is not None
        assert abs(float(divisor) * float(outer) - 1) < 1e-5
    assert global_scale(0) is None
    assert global_scale(np.nan) is None


def heads(fill) -> dict:
    """An attention's kernels as linen has them, 8 inputs by 2 heads of 4."""
    return {"query": {"kernel": fill((8, 2, 4)), "bias": fill((2, 4))}, "out": {"kernel": fill((2, 4, 8))}}


def attend(p, x):
    y = jnp.einsum("bi,ihd->bhd", x, p["query"]["kernel"]) + p["query"]["bias"][None]
    return jnp.einsum("bhd,hdo->bo", y, p["out"]["kernel"])


def test_heads_are_matrices_by_their_roles(tmp_path) -> None:
    tree = heads(lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32))
    roles = jc.roles(attend)(tree, jnp.ones((3, 8)))
    with pytest.raises(ExportError, match=r"'out/kernel' has 3 axes, .* pass roles=jaxcomp.roles\(fn\)"):
        to_compressed_tensors(tmp_path, tree)
    to_compressed_tensors(tmp_path, tree, roles=roles)
    held = tensors(tmp_path)
    np.testing.assert_array_equal(held["query.weight"], np.asarray(tree["query"]["kernel"]).reshape(8, 8).T)
    np.testing.assert_array_equal(held["out.weight"], np.asarray(tree["out"]["kernel"]).reshape(8, 8).T)
    np.testing.assert_array_equal(held["query.bias"], np.asarray(tree["query"]["bias"]).reshape(8))

    # One scale an output, and one for each two inputs of a head: what does not follow the matrix is repeated.
    def q(shape, blocks) -> Quantized:
        codes = Packed.of(jnp.asarray(RNG.integers(-8, 8, shape)), 4, -8)
        return Quantized(codes, jnp.asarray(RNG.uniform(1, 2, blocks), jnp.float32), None, jc.Int(4), FLOAT)

    for blocks, there in (((2, 2, 8), (8, 4)), ((1, 4, 8), (8, 8)), ((1, 1, 8), (8, 1)), ((2, 1, 1), (8, 2))):
        small = {"query": {**tree["query"], "kernel": q((8, 2, 4), (1, 2, 4))}, "out": {"kernel": q((2, 4, 8), blocks)}}
        to_compressed_tensors(tmp_path, small, roles=roles)
        assert tensors(tmp_path)["out.weight_scale"].shape == there
        back = from_compressed_tensors(tmp_path, like=tree, roles=roles)
        for path in ("query", "out"):
            want = value(small[path]["kernel"])
            np.testing.assert_array_equal(value(back[path]["kernel"]), want)
            plain = from_compressed_tensors(tmp_path)[path]["weight"]
            np.testing.assert_array_equal(value(plain), want.reshape(8, 8).T)


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_layers_of_a_scan_go_to_names_of_their_own(form, tmp_path) -> None:
    write, read = {
        "gguf": (jc.export.to_gguf, jc.export.from_gguf),
        "compressed-tensors": (to_compressed_tensors, from_compressed_tensors),
    }[form]
    q = leaf(jc.Int(4), (3, 64, 6))
    near = np.asarray(q.scale).astype(np.float16).astype(np.float32)  # which GGUF rounds to
    q = replace(q, scale=jnp.asarray(near))
    shared = replace(q, scale=jnp.asarray(near[:1]))
    bias = RNG.normal(size=(3, 6)).astype(np.float32)
    tree = {"layers": {"a": {"kernel": q, "bias": bias}, "b": {"kernel": shared}}}
    names = {r"layers/(.*)/kernel": r"blk.{}.\1.weight", r"layers/(.*)/bias": r"blk.{}.\1.bias"}
    write(tmp_path / "net", tree, names=names)
    flat = read(tmp_path / "net")["blk"]
    assert list(flat) == ["0", "1", "2"]
    for i in range(3):
        np.testing.assert_array_equal(value(flat[str(i)]["a"]["weight"]), value(q)[i].T)
        np.testing.assert_array_equal(value(flat[str(i)]["b"]["weight"]), value(shared)[i].T)
        np.testing.assert_array_equal(np.asarray(flat[str(i)]["a"]["bias"]), bias[i])
    like = {"layers": {"a": {"kernel": value(q), "bias": bias}, "b": {"kernel": value(q)}}}
    back = read(tmp_path / "net", like=like, names=names)["layers"]
    np.testing.assert_array_equal(value(back["a"]["kernel"]), value(q))
    np.testing.assert_array_equal(value(back["b"]["kernel"]), value(shared))
    np.testing.assert_array_equal(np.asarray(back["a"]["bias"]), bias)
    with pytest.raises(FileError, match=r"does not hold 'layers/a/bias' as 'blk.3.a.bias', "):
        read(tmp_path / "net", like=jax.tree.map(lambda x: np.concatenate([x, x[:1]]), like), names=names)
    with pytest.raises(ExportError, match=r"'one' is one number and called 'x.{}', a name for each layer"):
        write(tmp_path / "net", {"one": np.float32(1)}, names={"one": "x.{}"})


def test_names_and_axes(tmp_path) -> None:
    def x(*shape: int) -> np.ndarray:
        return RNG.normal(size=shape).astype(np.float32)

    tree = {
        "Conv_0": {"kernel": x(3, 5, 2, 4)},
        "Dense_0": {"kernel": x(4, 6)},
        "linear": {"weight": x(6, 4)},
        "Embed_0": {"embedding": x(7, 4)},
        "norm": {"scale": x(4), "bias": x(4)},
    }
    to_compressed_tensors(tmp_path, tree, names={r"(Embed_\d)/embedding": r"model.\1.weight", "norm/scale": "g"})
    held = tensors(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    np.testing.assert_array_equal(held["Conv_0.weight"], tree["Conv_0"]["kernel"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(held["Dense_0.weight"], tree["Dense_0"]["kernel"].T)
    np.testing.assert_array_equal(held["linear.weight"], tree["linear"]["weight"])
    np.testing.assert_array_equal(held["model.Embed_0.weight"], tree["Embed_0"]["embedding"])
    assert {"g", "norm.bias"} < set(held)
    back = from_compressed_tensors(tmp_path)
    assert set(back["model"]) == {"Embed_0"}

    positions = {"positions": x(9, 4)}
    with pytest.raises(ExportError, match="'positions' has 2 axes, and neither its path nor its rank settles"):
        to_compressed_tensors(tmp_path, positions)
    to_compressed_tensors(tmp_path, positions, roles=Roles({}))  # of a program that multiplies by nothing
    np.testing.assert_array_equal(tensors(tmp_path)["positions"], positions["positions"])

    wrong = {
        "rule 'nothing' matches nothing": {"nothing": "x"},
        "which asks for a group that the rule has not": {"norm/bias": r"x", r"norm/.*": r"\1"},
        "'norm/bias' and 'norm/scale' are both called 'one'": lambda p: "one" if "norm" in p else p,
    }
    for said, names in wrong.items():
        with pytest.raises(ValueError, match=said):
            to_compressed_tensors(tmp_path, tree, names=names)


WRONG = {
    "is on float8 e5m2, which compressed-tensors has no format for": float_leaf(E5M2),
    "is on int1, which compressed-tensors has no format for": jc.quantize(jc.Int(1)),
    "is Codebook of 4, which the format does not know": jc.share(4),
    "is LowRank": jc.low_rank(2),
}


@pytest.mark.parametrize("said", quick(WRONG, *list(WRONG)[:1]), ids=lambda said: said[:12])
def test_what_does_not_fit_is_said(said, tmp_path) -> None:
    tree = params(64, 8)
    t = WRONG[said]
    small = {"a": {"mlp": {"kernel": t}}} if isinstance(t, Quantized) else t.apply(t.init(tree), tree)
    with pytest.raises(ExportError) as e:
        to_compressed_tensors(tmp_path / "new", small)
    assert str(e.value).startswith("to_compressed_tensors: 'a/mlp/kernel' is ")
    assert "floats='a/mlp/kernel'" in str(e.value)
    assert not (tmp_path / "new").exists()
    to_compressed_tensors(tmp_path / "new", small, floats=r".*kernel")
    got = from_compressed_tensors(tmp_path / "new")["a"]["mlp"]["weight"]
    np.testing.assert_array_equal(np.asarray(got).T, np.asarray(jc.materialize(small)["a"]["mlp"]["kernel"]))


def test_names_of_quantized_weights_and_scales(tmp_path) -> None:
    q = leaf(jc.Int(4))
    with pytest.raises(
        ExportError, match=r"'kernel' is quantized and called 'weight'; the layout wants a name such as"
    ):
        to_compressed_tensors(tmp_path, {"kernel": q})
    to_compressed_tensors(tmp_path, {"m": {"kernel": q}}, scale_dtype=jnp.bfloat16)
    rounded = from_compressed_tensors(tmp_path)["m"]["weight"]
    assert (rounded.dtype, tensors(tmp_path)["m.weight_scale"].dtype) == (jnp.bfloat16, ml_dtypes.bfloat16)
    near = np.asarray(q.scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    want = (np.asarray(q.numbers()) * np.repeat(near, 32, 0)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(value(rounded), want.T)
    with pytest.raises(ExportError, match=r"has scales from 1e-06 to 1e-06, beyond the normal numbers of float16"):
        to_compressed_tensors(tmp_path, {"m": {"kernel": leaf(jc.Int(4), scale=1e-6)}}, scale_dtype=jnp.float16)


def test_activations_are_said(tmp_path) -> None:
    tree = {"m": {"kernel": leaf(jc.Int(8))}, "n": {"kernel": float_leaf(E4M3)}, "o": {"kernel": leaf(jc.Int(4))}}
    rules = {"m/.*": jc.Act(8), "n/.*": Float8(per=Tokens()), ".*": None}
    ranges = {"m/kernel": Range(np.float32(-1), np.float32(3))}
    to_compressed_tensors(tmp_path, tree, rules=rules, ranges=ranges)
    held, said = tensors(tmp_path), json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = {g["targets"][0]: g for g in said["config_groups"].values()}
    assert said["format"] == "mixed-precision"
    assert {k: g["format"] for k, g in groups.items()} == {
        "m": "int-quantized", "n": "float-quantized", "o": "pack-quantized",
    }  # fmt: skip
    assert groups["o"]["input_activations"] is None
    assert groups["n"]["input_activations"]["strategy"] == "token"
    assert groups["m"]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": False, "dynamic": False, "strategy": "tensor", "group_size": None,
    }  # fmt: skip
    np.testing.assert_allclose(held["m.input_scale"], [4 / 255], rtol=1e-6)
    assert held["m.input_zero_point"].tolist() == [64 - 128]
    assert set(from_compressed_tensors(tmp_path)["m"]) == {"input_scale", "input_zero_point", "weight"}
    like = {name: {"kernel": jax.ShapeDtypeStruct((64, 6), FLOAT)} for name in "mno"}
    np.testing.assert_array_equal(
        value(from_compressed_tensors(tmp_path, like=like)["m"]["kernel"]), value(tree["m"]["kernel"])
    )
    wrong = {
        "the activation of 'm/kernel' has no range; pass ranges=": {"m/kernel": jc.Act(8)},
        "the activation of 'n/kernel' is float8_e5m2": {"n/kernel": Float8(5)},
        "on float8 e4m3 with activations of type int": {"n/kernel": jc.Act(8, range=Dynamic())},
        "rule 'x' matches nothing": {"x": jc.Act(8)},
    }
    for text, asked in wrong.items():
        with pytest.raises(ValueError, match=text):
            to_compressed_tensors(tmp_path, tree, rules=asked)


def test_zero_points_of_few_outputs_are_not_packed(tmp_path) -> None:
    """The package cannot read them then."""
    q = leaf(jc.Int(4, symmetric=False), (64, 6))
    to_compressed_tensors(tmp_path, {"m": {"kernel": q}})
    assert tensors(tmp_path)["m.weight_zero_point"].dtype == np.int8
    np.testing.assert_array_equal(oracle(tmp_path, "m").T, value(q))
    np.testing.assert_array_equal(value(from_compressed_tensors(tmp_path)["m"]["weight"]), value(q).T)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("whole")
    fp8 = float_leaf(E4M3)
    tree = {
        "m": {"kernel": leaf(jc.Int(4)), "bias": jnp.ones(6)},
        "n": {"kernel": leaf(jc.Int(3))},
        "o": {"kernel": fp8},
    }
    to_compressed_tensors(at, tree)
    return at


def test_a_folder_stays_whole(folder, tmp_path, monkeypatch) -> None:
    at = tmp_path / "net"
    shutil.copytree(folder, at)
    (at / "config.json").write_text(json.dumps({"hidden_size": 3} | json.loads((at / "config.json").read_text())))
    to_compressed_tensors(at, {"m": {"kernel": leaf(jc.Int(4))}})
    said = json.loads((at / "config.json").read_text())
    assert said["hidden_size"] == 3
    assert said["quantization_config"]["config_groups"]["group_0"]["targets"] == ["m"]
    before = {p.name: p.read_bytes() for p in at.iterdir()}

    def full(f, data) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_all", full)
    with pytest.raises(FileError, match="No space left on device"):
        to_compressed_tensors(at, {"m": {"kernel": jnp.ones((2, 2))}})
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in at.iterdir()} == before
    (at / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config.json' is no JSON object; mend it, or give another folder"):
        to_compressed_tensors(at, {"w": jnp.ones(2)})
    (at / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match=r"holds model.safetensors.index.json, of a model in several files"):
        to_compressed_tensors(at, {"w": jnp.ones(2)})


def test_several_files_are_one_model(folder, tmp_path) -> None:
    whole = tensors(folder)
    shutil.copy(folder / "config.json", tmp_path)
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        header, data = writing._header({name: whole[name] for name in some})
        (tmp_path / file).write_bytes(header + b"".join(x.tobytes() for x in data))
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one, several = from_compressed_tensors(folder), from_compressed_tensors(tmp_path)
    for module in "mno":
        a, b = one[module]["weight"], several[module]["weight"]
        np.testing.assert_array_equal(value(a), value(b))
    index["weight_map"]["m.bias"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="its weight_map does not name files of the folder"):
        from_compressed_tensors(tmp_path)


def rewritten(folder, at, change) -> None:
    """A copy with other tensors or another config."""
    held, said = tensors(folder), json.loads((folder / "config.json").read_text())
    held = change(held, said["quantization_config"]) or held
    header, data = writing._header({k: np.ascontiguousarray(v) for k, v in held.items()})
    (at / "model.safetensors").write_bytes(header + b"".join(x.tobytes() for x in data))
    (at / "config.json").write_text(json.dumps(said))


def test_codes_of_before_018_are_read(folder, tmp_path) -> None:
    """Words of ten codes of three bits: told by their number, or by the version where that is the same."""
    q = from_compressed_tensors(folder)["n"]["weight"]
    codes = q.codes.on_host().astype(np.int64) + 4
    for columns, version in ((64, "0.20.0"), (64, "0.9.1"), (11, "0.17.0")):
        part = np.pad(codes[:, :columns], ((0, 0), (0, -columns % 10))).reshape(6, -1, 10)
        old = (part << (3 * np.arange(10))).sum(-1).astype(np.int32)

        def change(held, said, old=old, columns=columns, version=version) -> None:
            held["n.weight_packed"], held["n.weight_shape"] = old, np.array([6, columns])
            held["n.weight_scale"] = held["n.weight_scale"][:, :1]
            said["version"] = version
            group = next(g for g in said["config_groups"].values() if g["targets"] == ["n"])
            group["weights"] |= {"strategy": "channel", "group_size": None}

        rewritten(folder, tmp_path, change)
        back = from_compressed_tensors(tmp_path)["n"]["weight"]
        np.testing.assert_array_equal(back.codes.on_host() + 4, codes[:, :columns])


def group(said, target: str) -> dict:
    return next(g for g in said["config_groups"].values() if g["targets"] == [target])


def drop(name: str):
    return lambda held, said: {k: v for k, v in held.items() if k != name}


DAMAGED = {
    "is quantized by 'gptq'; compressed-tensors alone is read": lambda h, s: s.update(quant_method="gptq"),
    "config.json has no group for": lambda h, s: group(s, "m").update(targets=["x"]),
    "holds 'm', which has no weight_packed": drop("m.weight_packed"),
    "holds 'm', which has no weight_shape": drop("m.weight_shape"),
    "has a weight_shape of [6, 65]": lambda h, s: h.update({"m.weight_shape": np.array([6, 65])}),
    "has a weight_shape of [6, -1]": lambda h, s: h.update({"m.weight_shape": np.array([6, -1])}),
    "scales for a matrix of (6, 64) are not": lambda h, s: h.update({"m.weight_scale": np.ones((6, 3), np.float32)}),
    "has a weight_scale of type int32": lambda h, s: h.update({"m.weight_scale": np.ones((6, 2), np.int32)}),
    "in another order (weight_g_idx)": lambda h, s: h.update({"m.weight_g_idx": np.zeros(64, np.int32)}),
    "is of format 'marlin-24'": lambda h, s: group(s, "m").update(format="marlin-24"),
    "type 'int' and 9 bits": lambda h, s: group(s, "m")["weights"].update(num_bits=9),
    "has no weight_zero_point": lambda h, s: group(s, "m")["weights"].update(symmetric=False),
    "holds weights that are NaN": lambda h, s: h.update({"o.weight": np.full_like(h["o.weight"], np.nan)}),
    "the targets of 'group_0' are no names": lambda h, s: s["config_groups"]["group_0"].update(targets=[1]),
    "no regular expression": lambda h, s: group(s, "m").update(targets=["re:("]),
}


@pytest.mark.parametrize("said", DAMAGED, ids=lambda said: said[:20])
def test_damage_is_said(said, folder, tmp_path) -> None:
    rewritten(folder, tmp_path, DAMAGED[said])
    with pytest.raises(FileError) as e:
        from_compressed_tensors(tmp_path)
    assert said in str(e.value)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("count", quick((200, 5000), 200))
def test_any_damage_is_a_file_error(count, folder, tmp_path) -> None:
    rng = np.random.default_rng(count)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    head = int.from_bytes(files["model.safetensors"][:8], "little")
    read = wrong = 0
    for n in range(count):
        name = "config.json" if n % 2 else "model.safetensors"
        data, end = bytearray(files[name]), len(files[name]) if n % 2 else head
        if n % 5 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for at in rng.integers(0, end, 1 + n % 3):
                data[at] = rng.integers(0, 256)
        for other, whole in files.items():
            (tmp_path / other).write_bytes(whole if other != name else bytes(data))
        try:
            from_compressed_tensors(tmp_path)
            read += 1
        except FileError as e:
            wrong += not str(e).startswith("from_compressed_tensors: ")
    assert read < 0.75 * count
    assert not wrong
