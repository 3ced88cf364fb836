"""How one site is done: its operands encoded, and the product on codes or on rounded values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.backward import Gradients, integer_product_with_gradient, with_rounded_gradient
from jaxcomp.activations.codes import Codes, rows
from jaxcomp.activations.fake import encode, fake_quantize, float8_codes
from jaxcomp.activations.integer_products import Factor, refusal
from jaxcomp.activations.planning import BARRED, Planned
from jaxcomp.activations.specs import Float8, Rule
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.ranges import Range

Record = Callable[[str, str, str], None]
"""Called with a site's path, what was done ("integer", "float8", "fake", "lookup"), and why no more was done."""


class Mode(NamedTuple):
    """How a quantized function is run: on integers or not, and how its gradients are rounded, if at all."""

    integer: bool
    gradients: Gradients = Gradients()


class Side(NamedTuple):
    """What a product needs beside its operands: the ranges of some of them, and the key of its gradient."""

    ranges: dict[int, Range]
    key: Any


def claim_of(
    planned: Planned, index: int, ranges: Mapping[str, Range], mode: Mode, reasons: Mapping[str, str], record: Record
) -> Claim | None:
    """The claim that the plan with this ``index`` makes on its site, if any.

    ``reasons`` say by path why a leaf has no codes.
    """
    site, integer = planned.site, mode.integer
    if site.kind == "embed":
        return Claim(_lookup(planned, record)) if integer and BARRED.isdisjoint(site.inside) else None
    if planned.act is None:
        return None
    product = _Product(planned, planned.act, mode, reasons.get(site.leaf or "", ""), record)
    key = mode.gradients.key_of(index, planned.op)
    return Claim(product, side=Side({i: ranges[name] for i, name in planned.ranges.items()}, key))


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
    act: Rule
    mode: Mode
    reason: str
    record: Record

    def __call__(self, side: Side, *values: Any) -> list[Any]:
        path, op, spec = self.planned.site.path, self.planned.op, self.mode.gradients.spec
        why = ""
        if self.mode.integer:
            factors = [self.factor(i, value, side.ranges.get(i)) for i, value in enumerate(values)]
            missing = [f for f in factors if isinstance(f, str)]
            a, b = factors
            why = missing[0] if isinstance(a, str) or isinstance(b, str) else refusal(op, a, b)
            if not why and not isinstance(a, str) and not isinstance(b, str):
                self.record(path, *_done(a))
                product = integer_product_with_gradient(op, spec, self.rounded)
                return [product(values, side.ranges, side.key, jax.lax.stop_gradient((a, b)))]
        self.record(path, "fake", why)
        x, y = self.rounded(values, side.ranges)
        return op.bind(x, y) if spec is None else [with_rounded_gradient(op, spec)(side.key, x, y)]

    def factor(self, index: int, value: Any, given: Range | None) -> Factor | str:
        """An operand in codes, or why it has none."""
        if isinstance(value, Codes):
            zero = None if value.zero is None else value.zero.astype(jnp.int32)
            codes = value.codes.astype(jnp.int8) if value.reach else value.codes
            return Factor(codes, value.scale, zero, value.reach)
        site = self.planned.site
        if index not in site.activations:
            exact = site.operands[index].exact
            return self.reason or ("the weight is not quantized" if exact else "the weight is computed, not a leaf")
        if isinstance(self.act, Float8):
            return Factor(*float8_codes(value, self.act, site.operands[index].roles, given), None, 0)
        numbers, scale, zero = encode(value, self.act, site.operands[index].roles, given)
        low, high = self.act.grid.code_range
        shift = 128 if high > 127 else 0  # int8 by int8 is the fast product
        codes = (numbers if zero is None else numbers + (spread(zero, numbers.shape) - shift)).astype(jnp.int8)
        if zero is None:
            return Factor(codes, scale, None, max(-low, high))
        return Factor(codes, scale, (zero - shift).astype(jnp.int32), high - low)

    def rounded(self, values: tuple[Any, ...], ranges: Mapping[int, Range]) -> tuple[jax.Array, jax.Array]:
        """The operands as the float product takes them."""
        x, y = (self._rounded(i, value, ranges.get(i)) for i, value in enumerate(values))
        return x, y

    def _rounded(self, index: int, value: Any, given: Range | None) -> jax.Array:
        if isinstance(value, Codes):
            return value.dense()
        site = self.planned.site
        if index not in site.activations:
            return value
        return fake_quantize(value, self.act, site.operands[index].roles, given)


def _done(a: Factor) -> tuple[str, str]:
    """What a product on codes is called, and what its backend makes of it."""
    if a.codes.dtype == jnp.int8:
        return "integer", ""
    return "float8", WIDENED if jax.default_backend() == "cpu" else ""


WIDENED = "the CPU backend widens float8 before it multiplies"
