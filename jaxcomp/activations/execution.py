"""How one site is done: its operands encoded, and the product on codes or on rounded values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.activations.codes import Codes, rows
from jaxcomp.activations.planning import BARRED, Planned
from jaxcomp.activations.products import Factor, integer_product, refusal
from jaxcomp.activations.quantizers import encode, fake_quantize
from jaxcomp.activations.specs import Act
from jaxcomp.trace.evaluator import Claim
from jaxcomp.trace.ranges import Range

Record = Callable[[str, str, str], None]
"""Called with a site's path, what was done ("integer", "fake", "lookup"), and why no more was done."""


def claim_of(
    planned: Planned, ranges: Mapping[str, Range], integer: bool, reasons: Mapping[str, str], record: Record
) -> Claim | None:
    """The claim that a plan makes on its site, if any; ``reasons`` say by path why a leaf has no codes."""
    site = planned.site
    if site.kind == "embed":
        return Claim(_lookup(planned, record)) if integer and BARRED.isdisjoint(site.inside) else None
    if planned.act is None:
        return None
    product = _Product(planned, planned.act, integer, reasons.get(site.leaf or "", ""), record)
    side = {i: ranges[name] for i, name in planned.ranges.items()}
    return Claim(product, side=side) if side else Claim(lambda *values: product({}, *values))


def _lookup(planned: Planned, record: Record) -> Callable[..., list[Any]]:
    def run(table: Any, *rest: Any) -> list[Any]:
        if not isinstance(table, Codes):
            return planned.op.bind(table, *rest)
        record(planned.site.path, "lookup", "")
        return [rows(planned.op, table, rest)]

    return run


@dataclass(frozen=True)
class _Product:
    """A dot or convolution whose activations are quantized."""

    planned: Planned
    act: Act
    integer: bool
    reason: str
    record: Record

    def __call__(self, side: Mapping[int, Range], *values: Any) -> list[Any]:
        path, op = self.planned.site.path, self.planned.op
        why = ""
        if self.integer:
            factors = [self.factor(i, value, side.get(i)) for i, value in enumerate(values)]
            missing = [f for f in factors if isinstance(f, str)]
            a, b = factors
            why = missing[0] if isinstance(a, str) or isinstance(b, str) else refusal(op, a, b)
            if not why and not isinstance(a, str) and not isinstance(b, str):
                self.record(path, "integer", "")
                return [integer_product(op, a, b)]
        self.record(path, "fake", why)
        return op.bind(*(self.rounded(i, value, side.get(i)) for i, value in enumerate(values)))

    def factor(self, index: int, value: Any, given: Range | None) -> Factor | str:
        """An operand in codes, or why it has none."""
        if isinstance(value, Codes):
            zero = None if value.zero is None else value.zero.astype(jnp.int32)
            return Factor(value.codes, value.scale, zero, value.reach)
        site = self.planned.site
        if index not in site.activations:
            exact = site.operands[index].exact
            return self.reason or ("the weight is not quantized" if exact else "the weight is computed, not a leaf")
        codes, scale, zero = encode(value, self.act, site.operands[index].roles, given)
        low, high = self.act.grid.code_range
        shift = 128 if high > 127 else 0  # int8 by int8 is the fast product
        codes = (codes - shift).astype(jnp.int8)
        if zero is None:
            return Factor(codes, scale, None, max(-low, high))
        return Factor(codes, scale, (zero - shift).astype(jnp.int32), high - low)

    def rounded(self, index: int, value: Any, given: Range | None) -> jax.Array:
        """An operand as the float product takes it."""
        if isinstance(value, Codes):
            return value.dense()
        site = self.planned.site
        if index not in site.activations:
            return value
        return fake_quantize(value, self.act, site.operands[index].roles, given)
