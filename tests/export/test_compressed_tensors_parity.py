"""What the package compressed-tensors dequantizes from our folders, where it and torch are installed (0.20.1)."""

from __future__ import annotations

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Dynamic, Float8, Static
from jaxcomp.core import Tokens
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.quantization.level_grids import E4M3
from jaxcomp.trace.ranges import Range
from tests.export.formats import TRANSFORMS, params

torch = pytest.importorskip("torch")
with warnings.catch_warnings():  # of what the package would like to have besides
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_package_dequantizes_what_materialize_gives(name, tmp_path) -> None:
    t, tree = TRANSFORMS[name], params()
    small = t.apply(t.init(tree), tree)
    jc.export.to_compressed_tensors(tmp_path, small)
    config = config_in(tmp_path)
    scheme = config.config_groups["group_0"]
    assert scheme.targets == ["a.mlp"]
    state = load_file(tmp_path / "model.safetensors")
    own = {k.removeprefix("a.mlp."): v for k, v in state.items() if k != "a.mlp.bias"}
    form = BaseCompressor.get_value_from_registry(scheme.format)
    got = form.decompress(own, scheme)["weight"]
    dtype = jnp.bfloat16 if got.dtype == torch.bfloat16 else jnp.float32
    want = jc.materialize(small)["a"]["mlp"]["kernel"].astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(got.float().numpy(), np.asarray(want).T)
    back = jc.export.from_compressed_tensors(tmp_path)["a"]["mlp"]["weight"]
    np.testing.assert_array_equal(got.float().numpy(), np.asarray(back.materialize().astype(jnp.float32)))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Module()
        self.a.mlp = torch.nn.Linear(128, 24)


def config_in(folder):
    return QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])


def loaded(folder, config) -> Net:
    """The module with the folder's weights, still compressed."""
    from compressed_tensors.compressors import compress_module

    net = Net()
    apply_quantization_config(net, config)
    compress_module(net.a.mlp)
    missing, unexpected = net.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing
    assert not unexpected
    return net


def test_a_model_of_torch_loads_the_folder(tmp_path) -> None:
    """As transformers does: the scheme is put on the modules, the state is loaded, the weights are decompressed."""
    from compressed_tensors.compressors import decompress_module

    small = TRANSFORMS["int4 in groups"].apply((), params())
    jc.export.to_compressed_tensors(tmp_path, small)
    config = config_in(tmp_path)
    net = loaded(tmp_path, config)
    decompress_module(net.a.mlp)
    dense = jc.materialize(small)["a"]["mlp"]
    np.testing.assert_array_equal(net.a.mlp.weight.detach().float().numpy(), np.asarray(dense["kernel"]).T)
    x = np.random.default_rng(1).normal(size=(3, 128)).astype(np.float32)
    got = net.a.mlp(torch.from_numpy(x))
    np.testing.assert_allclose(
        got.detach().numpy(), x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]), rtol=1e-4
    )


PRESETS = [
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W3A16",
    "INT8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP8A16",
]


@pytest.mark.parametrize("rows", [256, 8, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_package_writes_is_read(preset, rows, tmp_path) -> None:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import save_file

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.input_activations = None if "INT8" not in preset else scheme.input_activations
    args = scheme.weights
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, 256)).astype(np.float32)).bfloat16()
    g = args.group_size
    view = {"tensor": w.reshape(1, -1), "channel": w}.get(args.strategy)
    if args.strategy in ("group", "tensor_group"):
        view = w.reshape(rows, -1, g)
    state = {"weight": w}
    if args.strategy == "block":
        ob, ib = -(-rows // 128), 2
        padded = torch.zeros(ob * 128, 256, dtype=w.dtype)
        padded[:rows] = w
        view = padded.reshape(ob, 128, ib, 128).transpose(1, 2).reshape(ob, ib, -1)
    low, high = view.amin(-1), view.amax(-1)
    extra = {}
    if args.strategy == "tensor_group":
        extra["global_scale"] = (448 * 6 / w.abs().amax().float()).reshape(1)
        state["weight_global_scale"] = extra["global_scale"]
    scale, zero = calculate_qparams(low, high, args, **extra)
    if args.strategy == "channel":
        scale, zero = scale.reshape(rows, 1), zero.reshape(rows, 1)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    fmt = infer_module_format(torch.nn.Linear, scheme)
    form = BaseCompressor.get_value_from_registry(fmt.value)
    scheme.format = fmt
    packed = form.compress(state, scheme)
    if preset == "W4A16_ASYM" and rows <= 8:  # which it cannot read back itself
        with pytest.raises(RuntimeError, match="stride"):
            form.decompress(dict(packed), scheme)
        want = fake_quantize(w, scale, zero, args)
    else:
        want = form.decompress(dict(packed), scheme)["weight"]
    save_file({f"m.{k}": v.contiguous() for k, v in packed.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=fmt.value, quantization_status="compressed")
    said = json.loads(config.model_dump_json())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    leaf = jc.export.from_compressed_tensors(tmp_path)["m"]["weight"]
    got = np.asarray(jc.materialize({"w": leaf})["w"].astype(jnp.float32))
    np.testing.assert_array_equal(got, want.float().numpy())


ACTIVATIONS = {
    "int8, dynamic by token": (jc.Int(8), jc.Act(8, symmetric=True, range=Dynamic(), per=Tokens()), "int-quantized"),
    "int8, static": (jc.Int(8), jc.Act(8), "int-quantized"),
    "int4 and int8": (jc.Int(4), jc.Act(8, range=Dynamic(), per=Tokens()), "int-quantized"),
    "int4 and float8": (jc.Int(4), Float8(per=Tokens()), "pack-quantized"),
    "float8, dynamic": (E4M3, Float8(per=Tokens()), "float-quantized"),
    "float8, static": (E4M3, Float8(range=Static()), "float-quantized"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_package(name, tmp_path) -> None:
    """A module with its activations quantized: its inputs lie within half a step of ours, and the weights are ours."""
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    grid, act, form = ACTIVATIONS[name]
    small = jc.quantize(grid, per=jc.Channels()).apply((), params())
    ranges = {"a/mlp/kernel": Range(jnp.float32(-1.5), jnp.float32(2.5))}
    jc.export.to_compressed_tensors(tmp_path, small, rules={".*kernel": act}, ranges=ranges)
    config = config_in(tmp_path)
    assert config.format == form
    net = loaded(tmp_path, config)
    x = np.random.default_rng(1).uniform(-1.5, 2.5, (1, 3, 128)).astype(np.float32)  # batch, tokens, features
    got = forward_quantize(net.a.mlp, torch.from_numpy(x), "input", net.a.mlp.quantization_scheme.input_activations)
    q = jc.quantize_function(lambda p, x: x @ p["a"]["mlp"]["kernel"], {".*": act})
    eye = {"a": {"mlp": {"kernel": jnp.eye(128)}}}
    want = np.asarray(q(eye, ranges if act.needs_range else {}, jnp.asarray(x)))
    step = np.abs(want) / 8 + 1e-3 if isinstance(act, Float8) else np.float32(2.5 / 127)  # of what lies on a tie
    assert (np.abs(got.numpy() - want) <= step).all()
    assert (np.abs(got.numpy() - want) <= 1e-6).mean() > 0.95
    decompress_module(net.a.mlp)
    dense = jc.materialize(small)["a"]["mlp"]["kernel"]
    np.testing.assert_array_equal(net.a.mlp.weight.detach().float().numpy(), np.asarray(dense).T)


@pytest.mark.parametrize("name", ["int4 in groups", "int8", "float8"])
def test_transformers_runs_the_folder(name, tmp_path) -> None:
    """A small BERT: read as a tree, quantized, written, and loaded by its library; outputs are the dense weights'."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tree = jc.export.from_compressed_tensors(tmp_path)
    grids = {"int4 in groups": (jc.Int(4), jc.Groups(32)), "int8": (jc.Int(8), jc.Channels())}
    grid, per = grids.get(name, (E4M3, jc.Channels()))
    where = r"encoder/.*(query|key|value|dense)/weight"
    small = jc.quantize(grid, per=per, where=where).apply((), tree)
    jc.export.to_compressed_tensors(tmp_path, small)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    dense, _ = leaves_with_paths(jc.materialize(small))
    model.load_state_dict({path.replace("/", "."): torch.from_numpy(np.array(x)) for path, x in dense})
    ids = torch.tensor([[1, 7, 3, 9]])
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(ids).last_hidden_state.numpy(), model(ids).last_hidden_state.numpy())
