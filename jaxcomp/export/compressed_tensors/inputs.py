"""What the layout says of the activations that enter a module: as rules say it, with the scales of fixed ranges."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.fake import grid_of_range
from jaxcomp.activations.planning import Rules
from jaxcomp.activations.specs import Act, ActSpec, Float8
from jaxcomp.core.layouts import Groups, Tensor, Tokens
from jaxcomp.core.paths import first_matches
from jaxcomp.core.types import Json
from jaxcomp.export.errors import ExportError
from jaxcomp.trace.ranges import Range


class Inputs(NamedTuple):
    """Of one module.

    Fields:
      arguments: for config.json.
      tensors: by what stands behind the module's name.
    """

    arguments: dict[str, Json]
    tensors: dict[str, np.ndarray]


NOTHING = Inputs({}, {})
"""Of a module whose activations are not quantized."""


def inputs_of(
    paths: list[str], rules: Rules | None, ranges: Mapping[str, Range] | None, *, owner: str
) -> dict[str, Inputs]:
    """What is said of the activations, by the paths of the quantized leaves; those without are left out.

    Raises:
      ExportError: the layout cannot say it, or a range is missing.
      ValueError: a rule that no path is left for.
    """
    table = list((rules or {}).items())
    if not table:
        return {}
    firsts = first_matches([where for where, _ in table], [(path, None) for path in paths], owner=owner)
    asked = {path: table[at][1] for path, at in zip(paths, firsts, strict=True) if at is not None}
    return {path: _inputs(act, path, ranges or {}, owner) for path, act in asked.items() if act is not None}


def _inputs(act: ActSpec, path: str, ranges: Mapping[str, Range], owner: str) -> Inputs:
    said: dict[str, Json] = {"dynamic": not act.needs_range}
    match act.per:
        case Tensor():
            said |= {"strategy": "tensor", "group_size": None}
        case Tokens():
            said |= {"strategy": "token", "group_size": None}
        case Groups(size=size):
            said |= {"strategy": "group", "group_size": size}
    given = ranges.get(path)
    if act.needs_range and given is None:
        raise ExportError(
            f"{owner}: the activation of {path!r} has no range; pass ranges=ranges_of(calibrate(fn)(params, *args)), or"
            " ask for range=Dynamic()."
        )
    try:
        kind, tensors = _numbers(act, given if act.needs_range else None)
    except ValueError as e:
        raise ExportError(f"{owner}: the activation of {path!r} {e}.") from None
    return Inputs({**kind, **said}, tensors)


@singledispatch
def _numbers(act: ActSpec, given: Range | None) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    """What the numbers are, and of a fixed range its scale and zero point."""
    raise ValueError(f"is {act}, for which the layout has nothing")


@_numbers.register
def _(act: Act, given: Range | None) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    kind: dict[str, Json] = {"num_bits": act.bits, "type": "int", "symmetric": act.symmetric}
    if given is None:
        return kind, {}
    scale, zero = (np.asarray(x, np.float32) for x in grid_of_range(_checked(given), act.grid))
    tensors = {"input_scale": scale.reshape(1)}
    if not act.symmetric:
        tensors["input_zero_point"] = (zero.reshape(1) - 2 ** (act.bits - 1)).astype(np.int8)
    return kind, tensors


@_numbers.register
def _(act: Float8, given: Range | None) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    if act.exponent != 4:
        raise ValueError(f"is {act}, and the layout has e4m3 alone; take Float8(4)")
    kind: dict[str, Json] = {"num_bits": 8, "type": "float", "symmetric": True}
    if given is None:
        return kind, {}
    low, high = _checked(given)
    end = np.maximum(np.abs(np.asarray(low, np.float32)), np.abs(np.asarray(high, np.float32)))
    return kind, {"input_scale": (np.where(end > 0, end, act.top) / np.float32(act.top)).astype(np.float32).reshape(1)}


def _checked(given: Range) -> Range:
    if (
        np.size(given.low) != 1
        or np.size(given.high) != 1
        or not np.isfinite([*map(float, map(np.squeeze, given))]).all()
    ):
        raise ValueError(f"has the range {given}; wanted are two finite numbers")
    return Range(jnp.asarray(given.low, jnp.float32), jnp.asarray(given.high, jnp.float32))
