"""What older files say otherwise, in today's words: how their JSON names tensors, and static fields of leaves."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxcomp.artifact.tensors import NAMES
from jaxcomp.core.types import Json, Shape

Fields = Mapping[str, Any]
FieldsOf = Callable[[str, str], Mapping[str, bool]]

# Fields that specs had when files were written, by class and name: dropped on reading. A grid said how many neighbours
# share a scale; the shape of the scale in the file says it too.
RETIRED = {
    ("Int", "group"),
    ("Float", "group"),
    ("Levels", "group"),
    ("PoT", "group"),
    ("APoT", "group"),
    ("NF4", "group"),
    ("Blocked", "group"),
}


def of_today(name: str, fields: Fields, shape: Callable[[], Shape]) -> Fields:
    """The static fields of a leaf from those that its file holds.

    Args:
      name: of the leaf's class.
      fields: as the file has them.
      shape: gives the dense array's shape; asked for only where a field needs it.

    >>> of_today("Codebook", {"axes": (1,), "bucket": 0, "gradient": "sum"}, lambda: (3, 4))
    {'gradient': 'sum', 'blocks': (1, 4), 'bucket': 0}
    """
    if name == "Codebook" and "axes" in fields:
        return _codebook(fields, shape())
    return fields


def _codebook(fields: Fields, shape: Shape) -> Fields:
    """Tables were numbered by the C order of the ``axes`` that kept their own, which is the C order of the blocks."""
    kept = {k: v for k, v in fields.items() if k not in ("axes", "bucket")}
    axes, bucket = fields["axes"], fields["bucket"]
    if bucket:
        return {**kept, "blocks": (-(-math.prod(shape) // bucket), 1), "bucket": bucket}
    return {**kept, "blocks": tuple(n if a in axes else 1 for a, n in enumerate(shape)), "bucket": 0}


class _Entry(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> Shape: ...


E = TypeVar("E", bound=_Entry)


class _Reader(Protocol[E]):
    @property
    def header(self) -> bytes: ...
    @property
    def entries(self) -> Sequence[E]: ...
    def sha256(self, entry: E, sha: hashlib._Hash) -> hashlib._Hash: ...


def renewed(described: Mapping[str, Json], reader: _Reader[E], fields_of: FieldsOf) -> dict[str, Json]:
    """What a file of version 1 to 3 says, as one of version 4 would. All of the file is read for its checksum.

    Args:
      described: its entry "jaxcomp".
      reader: of the file.
      fields_of: of a leaf's class, by its name and the path, the fields that are children, and whether they are coded.

    Raises:
      ValueError: it does not match its checksum, or says what cannot be.
    """
    missing = [key for key in ("tree", "metadata") if key not in described]
    if missing:
        raise ValueError(f"has a damaged header, which lacks {missing[0]!r}; get the file again")
    as_3 = described["version"] == 3
    if not (_matches_3(reader) if as_3 else described.get("sha256") == _digest_2(described, reader)):
        raise ValueError("does not match its checksum: it was damaged or edited; get the file again")
    if as_3:
        return dict(described)
    numbers = all_names({e.name: n for n, e in enumerate(reader.entries)}, described.get("same", {}))
    return {**described, "tree": numbered(described["tree"], numbers, fields_of)}


def _matches_3(reader: _Reader[E]) -> bool:
    """The checksum of version 3: of the header with zeros in its place, and of the digests of all tensors."""
    begins = b'{"__metadata__":{"sha256":"'
    at = len(begins)
    sha = hashlib.sha256(reader.header[:at] + b"0" * 64 + reader.header[at + 64 :])
    for e in reader.entries:
        sha.update(reader.sha256(e, hashlib.sha256(_line(e).encode())).digest())
    return reader.header.startswith(begins) and sha.hexdigest().encode() == reader.header[at : at + 64]


def _digest_2(described: Mapping[str, Json], reader: _Reader[E]) -> str:
    """The checksum of versions 1 and 2: of the JSON without it, and of the tensors by name."""
    said = {k: v for k, v in described.items() if k != "sha256"}
    sha = hashlib.sha256(json.dumps(said, separators=(",", ":"), allow_nan=False).encode())
    for e in sorted(reader.entries, key=lambda e: e.name):
        sha.update(f"\n{_line(e)}".encode())
        reader.sha256(e, sha)
    return sha.hexdigest()


def _line(e: _Entry) -> str:
    return f"{e.name} {NAMES[e.dtype]} {list(e.shape)}\n"


def all_names(held: Mapping[str, int], same: object) -> dict[str, int]:
    """The numbers of tensors by name, with the names of version 2 that refer to another tensor's.

    Raises:
      ValueError: a name that refers to nothing, or stands for two tensors.
    """
    if not isinstance(same, Mapping):
        raise ValueError("has a damaged list of equal tensors")
    for name, first in same.items():
        if name in held:
            raise ValueError(f"is damaged: {name!r} is held by the file and refers to {first!r}, too")
        if not isinstance(first, str) or first not in held:
            raise ValueError(f"is damaged: {name!r} refers to {first!r}, which the file does not hold")
    return {**held, **{name: held[first] for name, first in same.items()}}


def numbered(node: Json, numbers: Mapping[str, int], fields_of: FieldsOf) -> Json:
    """The JSON of a file of version 1 or 2 as one of version 3 has it: tensors by number, not by the node's path.

    Args:
      node: the tree.
      numbers: of the tensors, by name.
      fields_of: of a leaf's class, by its name and the path, the fields that are children, and whether they are coded.

    Raises:
      ValueError: two nodes have one name: one of them overwrote the other when the file was written.

    >>> numbered({"dict": [["w", "array"]]}, {"w": 0}, lambda name, path: {})
    {'dict': [['w', 0]]}
    """
    return _Numbering(numbers, fields_of).node(node, "")


@dataclass(frozen=True)
class _Numbering:
    numbers: Mapping[str, int]
    fields_of: FieldsOf
    taken: set[str] = field(default_factory=set)

    def number(self, name: str) -> int:
        if name in self.taken:
            raise ValueError(
                f"two leaves of the tree have the name {name!r}, of which an older jaxcomp wrote one only; save the"
                " tree again from where it came"
            )
        if name not in self.numbers:
            raise ValueError(f"there is no tensor {name!r}, which the tree refers to")
        self.taken.add(name)
        return self.numbers[name]

    def node(self, node: Json, path: str) -> Json:
        if node == "array":
            return self.number(path)
        if "dict" in node:
            return {"dict": [[k, self.node(v, _join(path, k))] for k, v in node["dict"]]}
        for kind in ("list", "tuple"):
            if kind in node:
                return {kind: [self.node(v, _join(path, i)) for i, v in enumerate(node[kind])]}
        if "sparse" in node:
            return {"sparse": [node["sparse"], self.number(f"{path}.mask"), self.number(path)]}
        if "leaf" in node:
            return {"leaf": self.leaf(node["leaf"], path)}
        return self.masked(node, path) if "masked" in node else node

    def masked(self, node: Json, path: str) -> Json:
        inner = node["masked"]
        if inner == "survivors":
            inner = {"survivors": self.number(path)}
        elif "survivors" in inner:
            inner = {"survivors": self.leaf(inner["survivors"], path)}
        else:
            inner = self.node(inner, path)
        return {**node, "masked": inner, "mask": [node["mask"], self.number(f"{path}.mask")]}

    def leaf(self, body: Json, path: str) -> Json:
        name, meta, *rest = body
        said = rest[0] if rest else {}
        data: dict[str, Json] = {}
        for part, coded in self.fields_of(name, path).items():
            at = path if coded else f"{path}.{part}"
            if part not in said:  # an array, or None
                if at in self.numbers:
                    data[part] = self.number(at)
            elif "packed" in said[part]:
                data[part] = {"packed": [*said[part]["packed"], self.number(at)]}
            else:
                data[part] = self.node(said[part], at)
        return [name, meta, data]


def _join(path: str, key: str | int) -> str:
    return f"{path}/{key}" if path else str(key)
