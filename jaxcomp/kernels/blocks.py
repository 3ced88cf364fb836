"""How much one program of a kernel takes: a table by kernel, device and class of shape.

``python -m tests.benchmarks tune_kernels`` measures candidates on the device that is there and prints the rows to put
here. A row whose device is empty serves every device that has none of its own; those were not measured: they were
chosen by what registers and memory hold, and compiled for an H100 and a TPU v5e.
"""

from __future__ import annotations

from typing import NamedTuple

ONE, FEW, MANY = "one", "few", "many"
"""Classes of shape by the rows of activations."""
MOST_FEW = 64
"""So many rows are few: what they cost is to read the weight."""


def shape_class(rows: int) -> str:
    """One row, few or many; many of a program for any number of rows.

    >>> [shape_class(rows) for rows in (1, 16, 65)]
    ['one', 'few', 'many']
    """
    if not isinstance(rows, int):  # an expression of jax.export.symbolic_shape
        return MANY
    return ONE if rows == 1 else FEW if rows <= MOST_FEW else MANY


class Blocks(NamedTuple):
    """What one program takes.

    Attributes:
      rows: of activations.
      features: of the weight.
      length: of the contracted axis in a step, about; for Mosaic.
      splits: programs that share the contracted axis; for Triton.
      warps, stages: for Triton.
    """

    rows: int
    features: int
    length: int = 1024
    splits: int = 1
    warps: int = 4
    stages: int = 3


TABLE: dict[tuple[str, str, str], Blocks] = {
    ("triton", "", ONE): Blocks(rows=16, features=32, splits=4),
    ("triton", "", FEW): Blocks(rows=16, features=64, splits=2),
    ("triton", "", MANY): Blocks(rows=64, features=64),
    ("mosaic", "", ONE): Blocks(rows=16, features=256, length=2048),
    ("mosaic", "", FEW): Blocks(rows=64, features=256, length=2048),
    ("mosaic", "", MANY): Blocks(rows=256, features=256),
}
"""Blocks by form, kind of device as jax names it, and class of shape."""


def blocks_for(form: str, device: str, rows: int) -> Blocks:
    """The row of the table for a form on a kind of device.

    >>> blocks_for("triton", "NVIDIA H100 80GB HBM3", 1) == TABLE["triton", "", "one"]
    True
    """
    shape = shape_class(rows)
    return TABLE.get((form, device, shape), TABLE[form, "", shape])
