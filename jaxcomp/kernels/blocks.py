"""How much one program of a kernel takes: a table by device and class of shape."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    rows: int
    features: int
    length: int = 1024
    splits: int = 1
    warps: int = 4
    stages: int = 3
