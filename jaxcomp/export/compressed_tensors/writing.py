"""Writes a tree as a folder that vLLM and transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.artifact.statics import Json
from jaxcomp.artifact.tensors import NAMES, blocks_of
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import Where
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import DType, PyTree
from jaxcomp.export.coded import coded, prepared
from jaxcomp.export.compressed_tensors.schemes import Scheme, scheme
from jaxcomp.export.errors import ExportError
from jaxcomp.export.names import Names, array_leaves, places

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
    tensors: dict[str, np.ndarray] = {}
    schemes: dict[str, Scheme] = {}
    ignored: list[str] = []
    for key, leaf in leaves:
        place, held = where[key], prepared(leaf, key, floats=floats, owner=OWNER)
        module, dot, last = place.name.rpartition(".")
        if not is_compressed(held):
            tensors[place.name] = _plain(place.there(np.asarray(held)), key)
            ignored += [module] if place.is_matrix and last == "weight" else []
            continue
        if last != "weight" or not module:
            raise ExportError(
                f"{OWNER}: {key!r} is quantized and called {place.name!r}; the layout wants a name such as"
                " 'layer.weight'. Say so in names=."
            )
        x = coded(held, place, key, OWNER)
        try:
            schemes[module] = scheme(x, scale_dtype)
        except ExportError as e:
            raise ExportError(f"{OWNER}: {key!r} {e} floats={key!r} writes it as floats.") from None
        tensors |= {f"{module}{dot}{part}": x for part, x in schemes[module].tensors.items()}
    return _written(Path(path), tensors, _config(schemes, ignored), config or {})


def _plain(x: np.ndarray, path: str) -> np.ndarray:
    if x.dtype not in NAMES:
        raise ExportError(f"{OWNER}: {path!r} is of type {x.dtype}, which safetensors has no name for; cast it first.")
    return x


def _config(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Json]:
    """The entry quantization_config, a group for each way of quantizing; empty where nothing is quantized."""
    groups: dict[str, tuple[Scheme, list[str]]] = {}
    for module, found in schemes.items():
        groups.setdefault(json.dumps([found.format, found.weights]), (found, []))[1].append(module)
    if not groups:
        return {}
    formats = {found.format for found, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "targets": modules,
                "weights": found.weights,
                "input_activations": None,
                "output_activations": None,
                "format": found.format,
            }
            for i, (found, modules) in enumerate(groups.values())
        },
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
    with replacing(folder / CONFIG) as f:
        write_all(f, text)
        with replacing(folder / WEIGHTS) as g:
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
