"""The rows of the table: what each method does to the weights while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jaxcomp as jc


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
      title: as the table shows it.
      bits: of a weight as stored.
      make: from the number of fine-tuning steps to the transform.
    """

    title: str
    bits: int
    make: Callable[[int], jc.Transform]


def not_the_head(path: str, leaf: Any) -> bool:
    """Matrices but the last layer's, whose filters are the classes."""
    return jc.matrices(path, leaf) and not path.startswith("head/")


def _joint(steps: int) -> jc.Transform:
    """Sparsity grows to 80% over the first half while all weights are at 4 bits; then the masks rest."""
    schedule = jc.cubic(0.8, end=max(1, steps // 2))
    due = jc.every(max(1, steps // 100), stop=steps // 2 + max(1, steps // 100))
    return jc.chain(jc.gate(jc.prune(schedule, scope=jc.Global()), due), jc.quantize(jc.Int(4)))


METHODS: dict[str, Method] = {
    "l1": Method("l1 pruning 20%", 32, lambda _: jc.once(jc.prune(0.2))),
    "sensitivity": Method("sensitivity pruning 20%", 32, lambda _: jc.once(jc.prune(0.2, score=jc.sensitivity))),
    "filters": Method(
        "filter l1 pruning 20%", 32, lambda _: jc.once(jc.prune(0.2, structure=jc.Filters(), where=not_the_head))
    ),
    "int8": Method("uniform 8-bit", 8, lambda _: jc.quantize(jc.Int(8))),
    "log8": Method("logarithmic 8-bit", 8, lambda _: jc.quantize(jc.Log(8))),
    "int4": Method("uniform 4-bit", 4, lambda _: jc.quantize(jc.Int(4))),
    "joint": Method("prune 80% + 4-bit, one run", 4, _joint),
}
