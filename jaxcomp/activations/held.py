"""Packed leaves on their way through a program, unpacked where a product takes them and not before its turn.

A leaf that is unpacked when the program begins is dense from then on, and XLA on CPU does so with the leaves of all
layers before the first product: their unpacking waits for nothing. Here a leaf stays in its bytes up to its product,
and a barrier over the bytes and the product's other operand makes the unpacking wait for that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax

from jaxcomp.activations import codes as as_arrays
from jaxcomp.activations.codes import Codes, Value, array_of, codes_of, filled, passing
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.reasons import Why
from jaxcomp.activations.thin_claims import stepped_axes
from jaxcomp.core.barriers import made_once
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.packed import Packed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Params
from jaxcomp.quantization.leaves import Quantized
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location

T = TypeVar("T")


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["rank", "steps", "coded", "moves"])
@dataclass(frozen=True)
class Held:
    """A packed leaf where an array stood: the array is the leaf after the ``moves``.

    Attributes:
      leaf: as it is stored; where scans step over it, its bytes lie by its leading axes, so that they can be sliced.
      rank: of the leaf, whole.
      steps: over how many of its leading axes scans step.
      coded: whether it stands for codes rather than for the dense array.
      moves: the layout operations that it came through.
    """

    leaf: Quantized
    rank: int
    steps: int
    coded: bool
    moves: tuple[Op, ...] = ()

    def array(self) -> Value:
        """The array here, or its codes."""
        value = codes_of(self._here()) if self.coded else dense(self._here())
        assert not isinstance(value, Why)
        for op in self.moves:
            (value,) = as_arrays.moved(op, value)
        return value

    def dense(self) -> jax.Array:
        """The array here."""
        value = self.array()
        return array_of(value)

    @property
    def waits(self) -> bool:
        """Whether a scan has still to slice it: it does so in the leaf's own axes."""
        return self.rank - self.leaf.scale.ndim < self.steps

    def _here(self) -> Quantized:
        """The leaf, or the slice of it that scans have made."""
        leaf, gone = self.leaf, self.rank - self.leaf.scale.ndim
        if not isinstance(leaf.codes, Packed) or not self.steps:
            return leaf
        codes = replace(leaf.codes, data=leaf.codes.data.reshape(-1), shape=leaf.codes.shape[gone:])
        return replace(leaf, codes=codes)


def holdable(program: Program, planned: Iterable[Planned], params: Params) -> dict[str, int]:
    """The leaves that are held, by path, with the number of axes that scans step over.

    Those that one product reads, once for each layer: others would be unpacked again and again.
    """
    stepped, users = stepped_axes(program), Counter[str]()
    once: set[str] = set()
    for p in planned:
        users.update(path for o in p.site.operands for path in (o.params if o.leaf is None else (o.leaf,)))
        weight = p.site.weight
        alone = p.site.steps == math.prod(p.site.layer_steps) and BARRED.isdisjoint(p.site.inside)
        if (
            p.site.leaf is not None
            and weight is not None
            and p.site.kind != "embed"
            and alone
            and p.site.operands[weight].exact
        ):
            once.add(p.site.leaf)
    found = {}
    for path, leaf in leaves_with_paths(params, is_leaf=is_compressed)[0]:
        axes = stepped.get(path, set())
        if path not in once or users[path] > 1 or not isinstance(leaf, Quantized) or not leaf.packed:
            continue
        if axes == set(range(len(axes))) and _by_bytes(leaf, len(axes)):
            found[path] = len(axes)
    return found


def _by_bytes(leaf: Quantized, steps: int) -> bool:
    """Whether the bytes of a step of the scan are its own."""
    return not isinstance(leaf.codes, Packed) or math.prod(leaf.shape[steps:]) * leaf.codes.bits % 8 == 0


def held(leaf: Quantized, steps: int, *, coded: bool) -> Held:
    """A leaf as a value of the program."""
    rank = len(leaf.shape)
    if steps:
        codes, axes = leaf.codes, frozenset(range(steps))
        if isinstance(codes, Packed):
            codes = replace(codes, data=codes.data.reshape(*leaf.shape[:steps], -1))
        scale, zero = (None if v is None else filled(v, leaf.shape, axes) for v in (dense(leaf.scale), leaf.zero_point))
        leaf = replace(leaf, codes=codes, scale=scale, zero_point=zero)
    return Held(leaf, rank, steps, coded)


def as_array(value: Value | Held) -> Value:
    """What stands where a held leaf did; other values are the same."""
    return value.array() if isinstance(value, Held) else value


def held_layouts(program: Program, paths: Container[str]) -> dict[Location, Claim]:
    """Claims on the layout operations between a held leaf and its product."""
    return passing(program, paths, _moved, as_array)


def _moved(op: Op, value: Value | Held, *rest: jax.Array) -> Sequence[Value | Held]:
    one = len(op.eqn.outvars) == 1 and not rest
    if isinstance(value, Held) and one and not value.waits:
        return [replace(value, moves=(*value.moves, op))]
    return as_arrays.moved(op, as_array(value), *rest)


def held_product(planned: Planned, paths: Container[str]) -> Claim | None:
    """A claim on a product whose activations stay as they are and whose weight is held."""
    if planned.site.leaf not in paths or planned.site.weight is None:
        return None
    weight = planned.site.weight

    def run(*values: Value | Held) -> Sequence[jax.Array]:
        taken = list(values)
        taken[1 - weight], taken[weight] = in_its_turn(values[1 - weight], values[weight])
        return planned.op.bind(*(v.dense() if isinstance(v, Held | Codes) else v for v in taken))

    return Claim(run)


def in_its_turn(other: T, value: Value | Held) -> tuple[T, Value | Held]:
    """What a held leaf is multiplied by, and the leaf, which is not unpacked before that is there."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(other))
    if not isinstance(value, Held) or not traced:  # else each is computed when it is asked for
        return other, value
    return made_once((other, value))
