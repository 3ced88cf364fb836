"""A reader of files of version 4, written from docs/artifact.md alone: nothing of jaxcomp, nothing of safetensors.

It reads arrays, and leaves of integer grids, codebooks and factors, as the arrays that they stand for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zstandard

FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
FLOATS |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
TYPES = {"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32}
TYPES |= {"I32": np.int32, "U64": np.uint64, "I64": np.int64, **FLOATS}


def stream(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of so many bits."""
    each = np.unpackbits(data, bitorder="little")[: bits * count].reshape(count, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(1)


class File:
    """A file, and the tree that it holds."""

    def __init__(self, path: Path) -> None:
        file = path.read_bytes()
        length = int.from_bytes(file[:8], "little")
        header, data = file[8 : 8 + length], file[8 + length :]
        begins = b'{"__metadata__":{"sha256":"'
        assert header.startswith(begins)
        digest = header[len(begins) : len(begins) + 64]
        zeros = begins + b"0" * 64 + header[len(begins) + 64 :]
        assert hashlib.sha256(zeros).hexdigest().encode() == digest
        entries = json.loads(header)
        said = json.loads(entries.pop("__metadata__")["jaxcomp"])
        assert said["version"] == 4
        spans = sorted((e["data_offsets"], e["dtype"], e["shape"]) for e in entries.values())
        self.tensors = [(data[a:b], dtype, shape, None) for (a, b), dtype, shape in spans]
        if "directory" in said:
            said = self._directory(said, data)
        self._check(said["sums"], [t[0] for t in self.tensors])
        assert not said.get("needs")
        self.metadata = said["metadata"]
        self.tree = self.node(said["tree"])

    def _check(self, sums: str, parts: list[bytes]) -> None:
        assert base64.b64decode(sums) == b"".join(hashlib.sha256(p).digest()[:8] for p in parts)

    def _directory(self, said: Any, data: bytes) -> Any:
        deflated, size = said["directory"]
        self._check(said["sums"], [data[-deflated:]])
        text = zlib.decompress(data[-deflated:])
        assert len(text) == size
        said, at = json.loads(text), 0
        self.tensors = []
        for dtype, shape, *code in said["pieces"]:
            size = code[0] if code else int(np.prod(shape, dtype=np.int64)) * np.dtype(TYPES[dtype]).itemsize
            self.tensors.append((data[at : at + size], dtype, shape, code[1] if code else None))
            at += size
        assert at + deflated == len(data)
        return said

    def tensor(self, number: int) -> np.ndarray:
        data, dtype, shape, code = self.tensors[number]
        kind = np.dtype(TYPES[dtype])
        if code is not None:
            assert code["codec"] == "blocks"
            data = decoded(data, int(np.prod(shape, dtype=np.int64)), kind, turned=dtype in FLOATS)
        return np.frombuffer(data, kind).reshape(shape)

    # The tree

    def node(self, node: Any) -> Any:
        if isinstance(node, int):
            return self.tensor(node)
        kind = next(iter(node))
        inside = node[kind]
        if kind == "dict":
            return {k: self.node(v) for k, v in inside}
        if kind in ("list", "tuple"):
            return [self.node(v) for v in inside]
        if kind in ("numpy", "scalar"):
            return self.node(inside)
        if kind == "sparse":
            return self.spread(self.tensor(inside[2]), self.mask(inside[1], inside[0]))
        if kind == "leaf":
            return self.leaf(inside)
        if kind == "masked":
            return self.masked(node)
        assert kind == "value"
        return inside

    def mask(self, mask: Any, shape: list[int]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        if isinstance(mask, int):
            return stream(self.tensor(mask), 1, size).astype(bool).reshape(shape)
        kept = np.zeros(size, bool)
        if "distances" in mask:
            at = 0
            for d in self.tensor(mask["distances"]).tolist():
                at += d
                if d < 255:
                    kept[at] = True
                    at += 1
            return kept.reshape(shape)
        group, inner, bits, table, codes = mask["patterns"]
        patterns = self.tensor(table)[stream(self.tensor(codes), bits, size // group)].reshape(-1, inner)
        rows = [(patterns >> i) & 1 for i in range(group)]
        return np.stack(rows, 1).astype(bool).reshape(shape)

    def spread(self, kept: np.ndarray, mask: np.ndarray) -> np.ndarray:
        out = np.zeros(mask.shape, kept.dtype)
        out[mask] = kept
        return out

    def masked(self, node: Any) -> np.ndarray:
        shape, mask = node["mask"]
        kept, inner = self.mask(mask, shape), node["masked"]
        kept = np.broadcast_to(kept, node.get("shape", shape))
        if not (isinstance(inner, dict) and "survivors" in inner):
            return np.where(kept, self.node(inner), np.zeros((), np.asarray(self.node(inner)).dtype))
        if isinstance(inner["survivors"], int):
            return self.spread(self.tensor(inner["survivors"]), kept)
        dense = self.leaf(inner["survivors"], kept)
        return np.where(kept, dense, np.zeros((), dense.dtype))

    def field(self, node: Any, kept: np.ndarray | None = None) -> np.ndarray:
        if isinstance(node, dict) and "packed" in node:
            bits, low, shape, number = node["packed"]
            codes = stream(self.tensor(number), bits, int(np.prod(shape, dtype=np.int64))).reshape(shape) + low
        else:
            codes = self.node(node)
        return codes if kept is None else self.spread(codes, kept)

    def leaf(self, body: Any, kept: np.ndarray | None = None) -> np.ndarray:
        name, static, fields = body
        if name == "LowRank":
            return self.node(fields["u"]) @ self.node(fields["v"])
        codes = self.field(fields["codes"], kept)
        if name == "Quantized":
            grid, given = static["grid"]["spec"]
            assert grid == "Int"
            if given.get("bits", 8) == 1 and "zero_point" not in fields:
                codes = 2 * codes - 1
            scale = self.field(fields["scale"])
            zero = self.field(fields["zero_point"]) if "zero_point" in fields else np.zeros((), scale.dtype)
            each = lambda x: blocks(x, codes.shape)  # noqa: E731
            dtype = np.dtype(getattr(ml_dtypes, static["dense_dtype"]["dtype"], static["dense_dtype"]["dtype"]))
            return ((codes.astype(np.float32) - each(zero)) * each(scale)).astype(dtype)
        assert name == "Codebook"
        table = self.field(fields["table"])
        number = np.zeros(codes.shape, np.int64)
        if table.shape[1] > 1 and static["bucket"]:
            number = (np.arange(codes.size) // static["bucket"]).reshape(codes.shape)
        elif table.shape[1] > 1:
            number = blocks(np.arange(table.shape[1]).reshape(static["blocks"]), codes.shape)
        return table[codes, number]


def blocks(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An entry for each block."""
    for axis in range(x.ndim):
        x = np.repeat(x, shape[axis] // x.shape[axis], axis)
    return x


# Codes


def decoded(data: bytes, count: int, dtype: np.dtype, *, turned: bool) -> bytes:
    out, at, n, size = [], 0, 4_200_000 // dtype.itemsize, dtype.itemsize
    for start in range(0, count, n):
        planes = []
        for _ in range(size):
            kind, length = data[at], int.from_bytes(data[at + 1 : at + 5], "little")
            planes.append(np.frombuffer(block(kind, data[at + 5 : at + 5 + length], min(n, count - start)), np.uint8))
            at += 5 + length
        words = np.stack(planes, 1).reshape(-1).view(f"<u{size}")
        if turned and size > 1:
            words = (words >> words.dtype.type(1)) | (words << words.dtype.type(8 * size - 1))
        out.append(words.tobytes())
    assert not any(data[at:])
    return b"".join(out)


def block(kind: int, data: bytes, size: int) -> bytes:
    if kind == 0:
        return data
    if kind == 32:
        return zstandard.ZstdDecompressor().decompress(data)
    width, item = kind % 16, 2 if kind > 16 else 1
    n = data[0] + 1
    weights = np.frombuffer(data[1 : 1 + n * item], f"<u{item}").astype(np.int64)
    words = np.frombuffer(data[1 + n * item :], "<u4").tolist()
    shares = weights * (2**24 - n) // weights.sum()
    shares[shares.argmax()] += 2**24 - n - shares.sum()
    frequency = (shares + 1).tolist()
    before = [0, *np.cumsum(frequency).tolist()]
    state = (words.pop() if words else 0) << 32 | (words.pop() if words else 0)
    bits, held = 0, 0
    out = bytearray()
    for _ in range(-(-size * 8 // width)):
        q = state & (2**24 - 1)
        s = int(np.searchsorted(before, q, "right")) - 1
        state = (state >> 24) * frequency[s] + q - before[s]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        bits |= s << held
        held += width
        while held >= 8:
            out.append(bits & 255)
            bits, held = bits >> 8, held - 8
    return bytes(out[:size])
