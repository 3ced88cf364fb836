#!/usr/bin/env bash
# compressed-tensors 0.20.1 (torch 2.14.1): asymmetric int4 weights (preset W4A16_ASYM) do not come back from a file.
# Expected: what compress_module makes of a module on "meta", which is how transformers lays a model out before it loads
# the file, has the shapes that compress_module makes of real weights; and decompress reads what compress wrote. Seen:
# (1) on meta the zero points keep their unpacked shape, [outputs, groups], in the file they are [outputs / 8, groups]:
#     transformers 5.24.0 stops with "Reinit due to size mismatch", for every such folder;
# (2) with 8 outputs or fewer decompress raises RuntimeError (stride), on what compress returned a line before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "compressed-tensors==0.20.1" "torch==2.14.1" "numpy==2.4.6"
"$work/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])


def shapes(device: str) -> dict[str, tuple[int, ...]]:
    with torch.device(device):
        net = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
    apply_quantization_config(net, QuantizationConfig(config_groups={"g": copy.deepcopy(scheme)}))
    if device == "cpu":
        net[0].weight_scale.data.fill_(0.1)
        net[0].weight_zero_point.data.zero_()
    compress_module(net[0])
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


real, meta = shapes("cpu"), shapes("meta")
differ = {name: (shape, meta[name]) for name, shape in real.items() if meta[name] != shape}
print(f"compressed-tensors 0.20.1, W4A16_ASYM, 64 outputs: shapes in a file and on meta that differ: {differ}")
assert differ == {"0.weight_zero_point": ((8, 2), (64, 2))}

form, read = BaseCompressor.get_value_from_registry("pack-quantized"), {}
for outputs in (16, 8):
    state = {
        "weight": torch.randn(outputs, 256),
        "weight_scale": torch.full((outputs, 2), 0.1),
        "weight_zero_point": torch.zeros((outputs, 2), dtype=torch.int8),
    }
    packed = form.compress(state, scheme)
    try:
        read[outputs] = tuple(form.decompress(packed, scheme)["weight"].shape)
    except RuntimeError as e:
        read[outputs] = str(e)
print(f"read back, by outputs: {read}")
assert read[16] == (16, 256) and "stride" in read[8]
PY
