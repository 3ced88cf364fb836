"""Fault 1: whatever is done to a file, loading it is one FileError, in bounded memory and time.

Where checksums are put right again, so that the deeper checks must find it, a file may load as another tree, too.
"""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.artifact import FileError, open_tree, save
from tests.artifact.by_hand import Compact, Plain
from tests.marks import quick

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
LIMIT = 1 << 26
Rng = np.random.Generator


def small_trees() -> list[Any]:
    """A few leaves each, of every class."""
    rng = np.random.default_rng(3)
    held: dict[str, Any] = {}
    for name in ("masks", "codebooks", "factors", "blocks"):
        held |= {f"{name}/{k}": x for k, x in jc.load(GOLDEN / f"{name}.safetensors", companders=[ROOT]).items()}
    more = {"k": jax.random.key(1), "n": [np.eye(9), (None, 2.5, "x")], "i": np.arange(40, dtype=np.int8) % 3}
    names = sorted(held)
    rng.shuffle(names)
    return [{**{n: held[n] for n in names[i : i + 3]}, **(more if i % 2 else {})} for i in range(0, len(names), 3)]


def root(x: Any) -> Any:
    return x


ROOT = jc.quantization.Compander("root", root, root)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[bytes]]:
    """Files by how they were written."""
    path = tmp_path_factory.mktemp("files") / "f"
    found: dict[str, list[bytes]] = {}
    for coding in (None, "zstd", "ans"):
        for tree in small_trees():
            save(path, tree, coding=coding)  # type: ignore[arg-type]
            found.setdefault(str(coding), []).append(path.read_bytes())
    found["older"] = [p.read_bytes() for p in sorted(GOLDEN.glob("*.safetensors")) if p.stat().st_size < 20_000]
    return found


# What is done to bytes


def flipped(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 4)):
        out[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(out)


def truncated(rng: Rng, data: bytes) -> bytes:
    return data[: rng.integers(0, len(data))]


def extended(rng: Rng, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 100)))


def overwritten(rng: Rng, data: bytes) -> bytes:
    start, size = int(rng.integers(0, len(data))), int(rng.integers(1, 64))
    return data[:start] + rng.bytes(size)[: len(data) - start] + data[start + size :]


def zeroed(rng: Rng, data: bytes) -> bytes:
    start, size = int(rng.integers(0, len(data))), int(rng.integers(1, 512))
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def moved(rng: Rng, data: bytes) -> bytes:
    a, b = sorted(int(n) for n in rng.integers(0, len(data), 2))
    return data[b:] + data[a:b] + data[:a]


BYTES = [flipped, truncated, extended, overwritten, zeroed, moved]

# What is done to JSON

VALUES = [0, 1, -1, 3, 7, 255, 65, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 10**30, 1.5, 1e308, float("nan")]
VALUES += [True, None, "", "x", "float32", "F32", "BOOL", [], {}, [[]], [1, 2], ["a", 0], {"list": []}, {"value": 1}]
VALUES += [[0] * 70, [1] * 70, [1 << 40, 0, 1 << 40], [1 << 20, 1 << 20], {"packed": [4, -8, [4, 4], 0]}]


def places(x: Any) -> list[tuple[Any, Any]]:
    """Every container and key of JSON."""
    found, left = [], [x]
    while left:
        inner = left.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        found += [(inner, key) for key in keys]
        left += [inner[key] for key in keys]
    return found


def rewritten(rng: Rng, x: Any) -> Any:
    """JSON with one or two changes."""
    x = json.loads(json.dumps(x))
    for _ in range(rng.integers(1, 3)):
        found = places(x)
        if not found:
            return x
        holder, key = found[rng.integers(len(found))]
        other, at = found[rng.integers(len(found))]
        value = json.loads(json.dumps(other[at]))
        how = rng.integers(8)
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[key] = value
        elif how == 2 and isinstance(holder, list):
            holder.insert(key, value)
        elif how == 3 and isinstance(holder, dict):
            holder[str(rng.choice(["x", "shape", "numpy", "sparse", "leaf", "masked", "typed", "key"]))] = holder.pop(
                key
            )
        elif how == 4 and type(holder[key]) is int:
            holder[key] += int(rng.choice([-1, 1, 2, 100, 1 << 33]))
        elif how == 5 and isinstance(holder[key], list):
            holder[key] = holder[key] * 2
        elif how == 6:
            for _ in range(int(rng.choice([1, 120, 2000]))):
                value = [value] if rng.random() < 0.1 else {"list": [value]}
            holder[key] = value if len(json.dumps(value)) < 50_000 else None
        else:
            holder[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return x


def safely(change: Callable[[Rng, Any], Any]) -> Callable[[Rng, Any], Any]:
    """JSON that nests too deep to be written stays as it was."""

    def run(rng: Rng, x: Any) -> Any:
        try:
            return change(rng, x)
        except RecursionError:
            return x

    return run


def forged_plain(rng: Rng, data: bytes) -> bytes:
    """A plain file with other JSON, entries or bytes, and the right checksums."""
    file = Plain.of(data)
    what, change = rng.integers(3), safely(rewritten)
    if what == 0:
        file = replace(file, said={**change(rng, file.said)} if rng.random() < 0.1 else _other_tree(rng, file.said))
    elif what == 1:
        file = replace(file, entries=change(rng, file.entries))
    else:
        file = replace(file, data=BYTES[rng.integers(len(BYTES))](rng, file.data))
    return file.file()


def forged_compact(rng: Rng, data: bytes) -> bytes:
    """A compact file with another directory, other JSON or code, and the right checksums."""
    file = Compact.of(data)
    what, change = rng.integers(4), safely(rewritten)
    if what == 0:
        file = replace(file, said=_other_tree(rng, file.said))
    elif what == 1:
        file = replace(file, said={**file.said, "pieces": change(rng, file.said["pieces"])})
    elif what == 2:
        file = replace(file, data=BYTES[rng.integers(len(BYTES))](rng, file.data))
    else:
        about = {"directory": rng.choice(VALUES[:12], 2).tolist(), "later": 1}
        file = replace(file, about=about if rng.random() < 0.5 else {"sums": "AAAA"}, said=change(rng, file.said))
    return (file.summed() if isinstance(file.said, dict) else file).file()


def _other_tree(rng: Rng, said: Any) -> Any:
    return {**said, "tree": safely(rewritten)(rng, said["tree"])}


HARNESS = {"None": forged_plain, "zstd": forged_compact, "ans": forged_compact}


def outcome(path: Path, data: bytes) -> str:
    """ "loaded", or the message of the error; the same leaf by leaf."""
    path.write_bytes(data)
    start = _processor_seconds()
    try:
        jc.load(path, companders=[ROOT], limit=LIMIT)
    except FileError as e:
        found = str(e)
    else:
        found = "loaded"
    try:
        with open_tree(path, companders=[ROOT], limit=LIMIT) as opened:
            for name in opened:
                try:
                    opened[name]
                except FileError:
                    continue
    except FileError:
        pass
    assert _processor_seconds() - start < 10
    assert found == "loaded" or found.startswith("load: '"), found
    return found


def _processor_seconds() -> float:
    """Of this process: work that does not end, however busy the machine is."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def run(files: list[bytes], count: int, change: Callable[[Rng, bytes], bytes], path: Path) -> list[str]:
    """Outcomes of so many files, and that they took little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        data = files[rng.integers(len(files))]
        other = change(rng, data)
        if other != data:
            found.append(outcome(path, other))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 600, f"{grown:.0f} MB"
    return found


COUNTS = [60, 3000]


@pytest.mark.parametrize("count", quick(COUNTS, 60))
@pytest.mark.parametrize("kind", ["None", "zstd", "ans", "older"])
def test_fault_1_changed_bytes(kind, count, files, tmp_path) -> None:
    found = run(files[kind], count, lambda rng, data: BYTES[rng.integers(len(BYTES))](rng, data), tmp_path / "f")
    assert len(found) > 0.9 * count
    assert "loaded" not in found


@pytest.mark.parametrize("count", quick(COUNTS, 60))
@pytest.mark.parametrize("kind", HARNESS)
def test_fault_1_changes_with_the_right_checksums(kind, count, files, tmp_path) -> None:
    found = run(files[kind], count, HARNESS[kind], tmp_path / "f")
    wrong = [what for what in found if what != "loaded"]
    assert len(wrong) > 0.4 * len(found)
    seen = [what for what in wrong if "does not match its checksum" in what]
    assert len(seen) < 0.2 * len(wrong), "these are not the deeper checks"
