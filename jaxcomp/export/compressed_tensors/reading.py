"""Reads a folder of the compressed-tensors layout as a tree of quantized leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from jaxcomp.artifact.container import Reader, opened
from jaxcomp.artifact.disk import reading_file
from jaxcomp.artifact.limits import parsed
from jaxcomp.core.roles import Roles
from jaxcomp.core.types import Json, PyTree
from jaxcomp.export.compressed_tensors.weights import weight_of
from jaxcomp.export.compressed_tensors.writing import CONFIG, INDEX, KEY, WEIGHTS
from jaxcomp.export.filling import Weight, filled
from jaxcomp.export.names import Names

OWNER = "from_compressed_tensors"
MAX_CONFIG = 100_000_000
_ENDS = ("packed", "scale", "shape", "zero_point", "global_scale", "g_idx")
_PARTS = ("weight", *(f"weight_{end}" for end in _ENDS))


def from_compressed_tensors(
    path: str | os.PathLike[str],
    *,
    like: PyTree | None = None,
    names: Names | None = None,
    roles: Roles | None = None,
) -> PyTree:
    """Reads a folder of the compressed-tensors layout: quantized weights as ``Quantized`` leaves, others as arrays.

    Exact: codes and scales are those of the file, and ``materialize`` gives what the package dequantizes, bit for bit.
    A weight whose blocks do not divide it comes as the array that the package makes of it.

    Args:
      path: of the folder.
      like: a tree of arrays or their shapes, whose structure is filled; None makes nested dicts of the names, split at
        their dots, with matrices as the file has them, outputs first.
      names, roles: as of ``to_compressed_tensors``, by the paths of ``like``.

    Raises:
      FileError: no such folder, a damaged file, a scheme that is not known, or not the weights that ``like`` wants.

    >>> from_compressed_tensors("no")
    Traceback (most recent call last):
    ...
    jaxcomp.artifact.disk.FileError: from_compressed_tensors: cannot read 'no/config.json': No such file or directory.
    """
    with reading_file(os.fspath(path), owner=OWNER), _folder(Path(path)) as held:
        return filled(_weights(held, activations=like is None), like, names=names, roles=roles, owner=OWNER)


def _weights(held: _Held, *, activations: bool) -> dict[str, Weight | np.ndarray]:
    """All of a folder by name, in the order of the files; a quantized one stands at its scales' place.

    Args:
      held: the folder.
      activations: whether the scales of quantized modules' in- and outputs are among them.
    """
    modules = {full.rpartition(".")[0] for full in held.entries if full.endswith(".weight_scale")}
    found: dict[str, Weight | np.ndarray] = {}
    for full in held.entries:
        module, _, part = full.rpartition(".")
        if module not in modules or part not in _PARTS:
            if activations or module not in modules or not part.startswith(("input_", "output_")):
                found[full] = held.read(full)
        elif part == "weight_scale":
            found[f"{module}.weight"] = _weight(held, module)
    return found


def _weight(held: _Held, module: str) -> Weight | np.ndarray:
    parts = {part: held.read(f"{module}.{part}") for part in _PARTS if f"{module}.{part}" in held.entries}
    try:
        return weight_of(parts, held.arguments(module), held.version)
    except ValueError as e:
        raise ValueError(f"holds {module!r}, which {e}") from e


@dataclass(frozen=True)
class _Held:
    """An open folder.

    Fields:
      entries: the reader and the number of each tensor, by name.
      groups: what config.json says of each way of quantizing: targets, arguments and format.
      version: of the package that wrote it, major and minor; None where it is not said.
    """

    entries: Mapping[str, tuple[Reader, int]]
    groups: list[tuple[list[str], dict[str, Json], str]]
    version: tuple[int, int] | None

    def read(self, name: str) -> np.ndarray:
        reader, number = self.entries[name]
        return reader.read(number)

    def arguments(self, module: str) -> tuple[dict[str, Json], str]:
        """What is said of a module's weights: by its name, by a pattern, or by a class, which no file names."""
        by_class = []
        for targets, weights, form in self.groups:
            for target in targets:
                if target == module or (target.startswith("re:") and _matches(target[3:], module)):
                    return weights, form
            if any(t.isidentifier() and t[:1].isupper() for t in targets):
                by_class.append((weights, form))
        if len(by_class) == 1:
            return by_class[0]
        raise ValueError(f"config.json has {'several groups' if by_class else 'no group'} for")


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as e:
        raise ValueError(f"config.json targets by {pattern!r}, which is no regular expression ({e}), so") from e


@contextmanager
def _folder(folder: Path) -> Iterator[_Held]:
    config = _json(folder / CONFIG)
    said = config.get(KEY, config.get("compression_config", {}))
    groups, version = _groups(said)
    with ExitStack() as stack:
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        entries: dict[str, tuple[Reader, int]] = {}
        for file in _files(folder):
            reader = opened(stack.enter_context(FileIO(file, "r")), hashing)
            for number, entry in enumerate(reader.entries):
                if entry.name in entries:
                    raise ValueError(f"holds {entry.name!r} twice, in several files")
                entries[entry.name] = (reader, number)
        yield _Held(entries, groups, version)


def _files(folder: Path) -> list[Path]:
    """The files of weights: one, or those that the index names."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    named = _json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(v, str) and Path(v).name == v for v in named.values()):
        raise ValueError(f"has a damaged {INDEX}: its weight_map does not name files of the folder")
    return [folder / file for file in sorted(set(named.values()))]


def _json(file: Path) -> dict[str, Json]:
    with FileIO(file, "r") as f:
        text = f.read(MAX_CONFIG + 1) or b""
    said = parsed(text, f"has a damaged {file.name}: it is no JSON") if len(text) <= MAX_CONFIG else None
    if not isinstance(said, dict):
        raise ValueError(f"has a damaged {file.name}: it is no JSON object")
    return said


def _groups(said: Json) -> tuple[list[tuple[list[str], dict[str, Json], str]], tuple[int, int] | None]:
    if not isinstance(said, dict):
        raise ValueError(f"has a damaged {CONFIG}: {KEY} is no JSON object")
    if not said:
        return [], None
    if said.get("quant_method") != "compressed-tensors":
        raise ValueError(f"is quantized by {said.get('quant_method')!r}; compressed-tensors alone is read")
    groups, given = said.get("config_groups"), said.get("format")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"has a damaged {CONFIG}: config_groups is no object of objects")
    found = []
    for key, group in groups.items():
        targets, weights = group.get("targets"), group.get("weights")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"has a damaged {CONFIG}: the targets of {key!r} are no names")
        if isinstance(weights, dict):
            found.append((targets, weights, str(group.get("format") or given)))
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", str(said.get("version", "")))
    return found, (int(numbers[1]), int(numbers[2])) if numbers else None
