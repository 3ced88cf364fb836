"""Coded tensors: their size over the entropy of the codes, and weights a second of a core; then files, coded.

Beside ours: zstd and constriction alone, on the codes two to a byte and one by one. Seconds are of the processor, so
that one core is counted. Files are saved and loaded in processes of their own, one of which does so without coding, for
memory; the codec's own time is that of the tensors that the file holds, nothing else.

Command: ``[PARAMETERS=1600000000] python -m tests.benchmarks coding``; that many weights are 1 GB packed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import constriction
import ml_dtypes
import numpy as np
import zstandard

from jaxcomp.artifact.coding import Coding, decode, encode
from jaxcomp.artifact.coding.ans import entropy
from jaxcomp.artifact.tensors import Tensor, blocks_of
from tests.benchmarks import saving
from tests.benchmarks.timing import Report, Row

PARAMETERS = int(os.environ.get("PARAMETERS", 160_000_000))
HERE = Path(__file__).parents[2]
KEPT = 0.1
Stored = list[np.ndarray]


def seconds(work: Callable[[], Any], rounds: int = 3) -> tuple[float, Any]:
    """Of the processor, the least of some rounds; and the result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def codes_of(count: int, rng: np.random.Generator) -> np.ndarray:
    """Int4 codes of normal weights, from 1 to 15."""
    return (np.clip(np.rint(rng.standard_normal(count, np.float32) * 2.5), -7, 7) + 8).astype(np.uint8)


def paired(codes: np.ndarray) -> np.ndarray:
    return codes[::2] | codes[1::2] << 4


def sparse(count: int, rng: np.random.Generator) -> tuple[Stored, float]:
    """What a file holds of int4 codes of which a tenth are kept: a bitmap and those; and the bytes of their entropy."""
    mask = rng.random(count, np.float32) < KEPT
    codes = codes_of(int(mask.sum()) // 2 * 2, rng)
    ideal = entropy([codes.size, count - codes.size]) + entropy(np.bincount(codes))
    return [np.packbits(mask, bitorder="little"), paired(codes)], ideal / 8


def dense(count: int, rng: np.random.Generator) -> tuple[Stored, float]:
    codes = codes_of(count, rng)
    return [paired(codes)], entropy(np.bincount(codes)) / 8


def floats(count: int, rng: np.random.Generator) -> tuple[Stored, float]:
    """Weights in bfloat16; their entropy is that of the values, each of which comes often."""
    x = (rng.standard_normal(count, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    return [x], entropy(np.bincount(x.view(np.uint16))) / 8


def coded(stored: Stored, coding: Coding) -> list[Any]:
    tensors = [Tensor("w", x.dtype, x.shape, lambda x=x: blocks_of(x)) for x in stored]
    found = [encode(t, coding) for t in tensors]
    return [(said, np.concatenate([*pieces])) for said, pieces in found if said is not None]


def rows(name: str, made: tuple[Stored, float], count: int, coding: Coding, *, aims: bool) -> Iterator[Row]:
    """Size, and weights a second, of one content."""
    stored, ideal = made
    encoding, out = seconds(lambda: coded(stored, coding))
    pairs = list(zip(stored, out, strict=True))
    decoding, again = seconds(lambda: [decode(said, data, x.dtype, x.shape) for x, (said, data) in pairs])
    assert all((a.view(np.uint8) == x.view(np.uint8)).all() for a, x in zip(again, stored, strict=True))
    ratio = sum(data.nbytes for _, data in out) / ideal
    yield _row(f"{name}, {coding}: bytes to the entropy", ratio, "<= 1.005" if aims else "")
    yield _row(f"{name}, {coding}: encode, M weights/s", count / encoding / 1e6, ">= 100" if aims else "")
    yield _row(f"{name}, {coding}: decode, M weights/s", count / decoding / 1e6, ">= 60" if aims else "")


def peers(count: int, rng: np.random.Generator) -> Iterator[Row]:
    """The sparse codes, as zstd and constriction alone take them."""
    codes = codes_of(count, rng) * (rng.random(count, np.float32) < KEPT)
    ideal, data = entropy(np.bincount(codes)) / 8, paired(codes).tobytes()
    for level in (3, 19):
        took, out = seconds(lambda level=level: zstandard.ZstdCompressor(level=level).compress(data), 1)
        back, _ = seconds(lambda out=out: zstandard.ZstdDecompressor().decompress(out))
        yield _row(f"zstd {level}, two codes a byte", len(out) / ideal, detail=_speeds(count, took, back))
    symbols, weights = codes.astype(np.int32), np.bincount(codes, minlength=16).astype(np.float64)
    model = constriction.stream.model.Categorical(weights / count, perfect=False)

    def alone() -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed()

    took, words = seconds(alone)
    back, _ = seconds(lambda: constriction.stream.stack.AnsCoder(words).decode(model, count))
    yield _row("constriction, code by code", words.nbytes / ideal, detail=_speeds(count, took, back))


def _speeds(count: int, encoding: float, decoding: float) -> str:
    return f"{count / encoding / 1e6:.0f} and {count / decoding / 1e6:.0f} M weights/s"


def _row(name: str, ratio: float, target: str = "", detail: str = "") -> Row:
    return Row(name, ratio, ratio, ratio, detail, target)


def files(parameters: int, folder: Path, coding: Coding) -> Iterator[Row]:
    """A tree of 16 masked int4 matrices, saved and loaded, to the time that its tensors alone take."""
    own = _child("codec", parameters, folder / "own", coding)
    ours = _child("packed", parameters, folder / "ours", coding)
    memory = _child("peaks", parameters, folder / "ours", coding)
    for verb, alone in (("save", own["encode"]), ("load", own["decode"])):
        wall, processor = min(map(tuple, ours[verb]))
        detail = f"{wall:.2f} s, {processor:.2f} s of processors; the codec alone {alone:.2f} s"
        yield _row(f"{coding}: {verb}, time to the codec's", wall / alone, "<= 2" if coding == "ans" else "", detail)
        peak = memory[f"{verb}_peak"] / memory["tree"]
        yield _row(f"{coding}: {verb}, memory to the tree", peak, "<= 1.3", f"{memory['tree'] / 1e6:.0f} MB")


def _child(kind: str, parameters: int, file: Path, coding: Coding) -> dict[str, Any]:
    script = __file__ if kind == "codec" else saving.__file__
    command = [sys.executable, script, kind, str(parameters), str(file), "2", coding]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def codec(parameters: int, coding: Coding) -> dict[str, float]:
    """Seconds by the wall clock for the tensors of the tree that ``saving`` makes."""
    from jaxcomp.artifact.encoding import encode_tree

    rng, columns = np.random.default_rng(0), parameters // saving.LAYERS // 2048
    tree = {str(i): saving.layer("packed", 2048, columns + i, rng) for i in range(saving.LAYERS)}
    stored = [np.concatenate([*t.pieces()]) for t in encode_tree(tree)[1]]
    began = time.perf_counter()
    out = [(x, found) for x in stored for found in coded([x], coding)]
    encoding = time.perf_counter() - began
    began = time.perf_counter()
    for x, (said, data) in out:
        decode(said, data, x.dtype, x.shape)
    return {"encode": encoding, "decode": time.perf_counter() - began}


CONTENTS: dict[str, Callable[[int, np.random.Generator], tuple[Stored, float]]] = {
    "90% sparse int4": sparse,
    "int4": dense,
    "bfloat16": floats,
}
BOTH: tuple[Literal["ans", "zstd"], ...] = ("ans", "zstd")


def run(*, toy: bool = False) -> Iterator[Report]:
    """Tensors, peers, files."""
    count, parameters = (400_000, 4_000_000) if toy else (40_000_000, PARAMETERS)
    for name, make in CONTENTS.items():
        made = make(count, np.random.default_rng(0))
        found = [r for c in BOTH for r in rows(name, made, count, c, aims=(name, c) == ("90% sparse int4", "ans"))]
        yield Report(f"coding of {count / 1e6:.1f}M weights", "the entropy, or M weights/s", found, [])
    alone = list(peers(count // 4, np.random.default_rng(0)))
    yield Report("others, on 90% sparse int4", "the entropy", alone, [])
    for coding in BOTH:
        with tempfile.TemporaryDirectory() as d:
            found = list(files(parameters, Path(d), coding))
            yield Report(f"files of {parameters / 1e6:.0f}M weights", "the codec alone, or the tree", found, [])


if __name__ == "__main__":
    print(json.dumps(codec(int(sys.argv[2]), sys.argv[5])))  # type: ignore[arg-type]
