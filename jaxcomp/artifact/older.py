"""What older files say otherwise: static fields of leaves and specs, as today's classes have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxcomp.core.types import Shape

Fields = Mapping[str, Any]

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
