"""Writes a tree as a folder that vLLM and transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcomp.activations.planning import Rules
from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.artifact.tensors import NAMES, blocks_of
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import DType, Json, PyTree
from jaxcomp.export.coded import Coded, coded, prepared
from jaxcomp.export.compressed_tensors.inputs import NOTHING, Inputs, inputs_of
from jaxcomp.export.compressed_tensors.schemes import scheme
from jaxcomp.export.errors import ExportError
from jaxcomp.export.names import Names, Place, array_leaves, places
from jaxcomp.trace.ranges import Range

OWNER = "to_compressed_tensors"
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
KEY = "quantization_config"


def to_compressed_tensors(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    names: Names | None = None,
    roles: Roles | None = None,
    floats: Where | None = None,
    config: Mapping[str, Json] | None = None,
    scale_dtype: DType | None = None,
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> int:
    """Writes a tree in the layout of compressed-tensors: a folder of model.safetensors and config.json.

    Codes are written as they are, nothing is quantized anew: what the package dequantizes is
    ``(codes - zero_point) * scale`` in the type of the scales, which is what ``materialize`` computes before it casts
    to the dense type. NVFP4 and MX weights it dequantizes in bfloat16: ``materialize`` rounded to that.

    Args:
      path: a folder; it is made where there is none. Of a config.json in it the other entries are kept.
      tree: arrays and compressed leaves, by path.
      names: of the tensors, by path: ``{r"blocks/(.*)/kernel": r"model.layers.\\1.weight"}``, an ordered table of
        regular expressions, or a function. What no rule matches is called as its path, with dots.
      roles: what the axes do, as ``jaxcomp.roles(fn)(params, *args)`` reads off the program; needed for kernels of
        more than two axes that are no convolution's.
      floats: which leaves are written as floats though they are compressed.
      config: entries of config.json, such as ``{"model_type": "llama"}``.
      scale_dtype: what scales are rounded to, such as bfloat16, which some kernels want; None keeps them.
      rules: how the activations that enter a quantized weight are, as of ``quantize_function``, by the weight's path:
        ``{".*": Act(8, symmetric=True, range=Dynamic(), per=Tokens())}``. Weights of integers are then stored as bytes.
      ranges: of those with ``Static()`` ranges, by the weight's path.

    Returns:
      Bytes of model.safetensors.

    Raises:
      ExportError: a leaf that the layout has nothing for, two leaves of one name, or a folder that holds another model.
      FileError: it cannot be written; then nothing is.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> params = {"mlp": {"kernel": jnp.ones((32, 8)), "bias": jnp.zeros(8)}}
    >>> small = jc.quantize(jc.Int(4), per=jc.Groups(16)).apply((), params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = jc.export.to_compressed_tensors(folder, small)
    ...     print(jc.export.from_compressed_tensors(folder)["mlp"]["weight"])
    <Quantized int4, 8x32, groups of 16, 0.75 B/weight, 0% zeros>

    Source: the package compressed-tensors, 0.20; words are packed as it does from 0.18 on.
    """
    leaves = array_leaves(tree, OWNER, is_compressed)
    where = places(leaves, names=names, roles=roles, owner=OWNER)
    small = {key: prepared(leaf, key, floats=floats, owner=OWNER) for key, leaf in leaves}
    quantized = [key for key, leaf in small.items() if is_compressed(leaf)]
    inputs = inputs_of(quantized, rules, ranges, owner=OWNER)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, _Module] = {}
    ignored: list[str] = []
    for key, leaf in small.items():
        place, shape = where[key], tuple(leaf.shape)
        if not is_compressed(leaf):
            for name, x in zip(place.names(shape), place.layers(np.asarray(leaf)), strict=True):
                tensors[name] = _plain(place.there(x), key)
                ignored += [name.removesuffix(".weight")] if place.is_matrix and name.endswith(".weight") else []
            continue
        _check_name(place, key)
        for name, matrix in zip(place.names(shape), coded(leaf, place, key, OWNER), strict=True):
            module = name.removesuffix(".weight")
            modules[module] = _module(matrix, key, inputs.get(key, NOTHING), scale_dtype)
            tensors |= {f"{module}.{part}": x for part, x in modules[module].tensors.items()}
    return _written(Path(path), tensors, _config(modules, ignored), config or {})


class _Module(NamedTuple):
    """A module whose weight is quantized: what config.json says of it, as text to compare by, and its tensors."""

    said: str
    tensors: dict[str, np.ndarray]


def _check_name(place: Place, path: str) -> None:
    if not place.name.endswith(".weight"):
        raise ExportError(
            f"{OWNER}: {path!r} is quantized and called {place.name!r}; the layout wants a name such as 'layer.weight'."
            " Say so in names=."
        )


def _module(x: Coded, path: str, inputs: Inputs, scale_dtype: DType | None) -> _Module:
    try:
        found = scheme(x, scale_dtype, inputs.arguments.get("type"))
    except ExportError as e:
        raise ExportError(f"{OWNER}: {path!r} {e} floats={path!r} writes it as floats.") from None
    said = {
        "weights": found.weights,
        "input_activations": inputs.arguments or None,
        "output_activations": None,
        "format": found.format,
    }
    return _Module(json.dumps(said), found.tensors | inputs.tensors)


def _plain(x: np.ndarray, path: str) -> np.ndarray:
    if x.dtype not in NAMES:
        raise ExportError(f"{OWNER}: {path!r} is of type {x.dtype}, which safetensors has no name for; cast it first.")
    return x


def _config(modules: Mapping[str, _Module], ignored: list[str]) -> dict[str, Json]:
    """The entry quantization_config, a group for each way of quantizing; empty where nothing is quantized."""
    groups: dict[str, list[str]] = {}
    for name, found in modules.items():
        groups.setdefault(found.said, []).append(name)
    if not groups:
        return {}
    said = [{"targets": names, **json.loads(text)} for text, names in groups.items()]
    formats = {group["format"] for group in said}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {f"group_{i}": group for i, group in enumerate(said)},
    }


def _written(
    folder: Path, tensors: Mapping[str, np.ndarray], said: Mapping[str, Json], config: Mapping[str, Json]
) -> int:
    kept = _kept(folder)
    kept.pop(KEY, None)
    text = json.dumps({**kept, **config, **({KEY: said} if said else {})}, indent=2).encode() + b"\n"
    header, ordered = _header(tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError(f"{OWNER}: cannot make the folder {os.fspath(folder)!r}: {e.strerror or e}.") from e
    # Both are on disk before either appears; the weights, whose block ends first, before what describes them.
    with replacing(folder / CONFIG, owner=OWNER) as f:
        write_all(f, text)
        with replacing(folder / WEIGHTS, owner=OWNER) as g:
            write_all(g, header)
            for x in ordered:
                for block in blocks_of(x):
                    write_all(g, memoryview(block))
    return len(header) + sum(x.nbytes for x in ordered)


def _header(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, list[np.ndarray]]:
    """How a safetensors file begins, and the tensors in the order of their bytes: wide items first, so all align."""
    said: dict[str, Json] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    start = 0
    for name, x in ordered:
        stop = start + x.nbytes
        said[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [x for _, x in ordered]


def _kept(folder: Path) -> dict[str, Json]:
    """What a config.json that is there already says."""
    if (folder / INDEX).exists():
        raise ExportError(
            f"{OWNER}: {os.fspath(folder)!r} holds {INDEX}, of a model in several files; give another folder."
        )
    try:
        text = (folder / CONFIG).read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        raise ExportError(f"{OWNER}: cannot read {os.fspath(folder / CONFIG)!r}: {e}; give another folder.") from e
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ExportError(
            f"{OWNER}: {os.fspath(folder / CONFIG)!r} is no JSON object; mend it, or give another folder."
        )
    return said
