"""How one site is done: its operands encoded, and the product on codes or on rounded values."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxcomp.activations.alike import product
from jaxcomp.activations.backward import Gradients, product_with_gradient, with_rounded_gradient
from jaxcomp.activations.chained import Made
from jaxcomp.activations.coded_convolutions import coded_convolution, coded_pair
from jaxcomp.activations.coded_dots import panel_pair
from jaxcomp.activations.coded_sums import CodedSums, convolved, multiplied
from jaxcomp.activations.codes import Codes, Value, array_of
from jaxcomp.activations.encoded import encoded, reach_of
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.fake import Entry, fake_quantize, scale_blocks
from jaxcomp.activations.float_products import Form, long_sum, no_codes, value_product
from jaxcomp.activations.held import Held, as_array, held_product, in_its_turn
from jaxcomp.activations.integer_products import (
    integer_product,
    refusal,
    turned_left,
    turned_right,
)
from jaxcomp.activations.lookups import lookup
from jaxcomp.activations.memory import Memory
from jaxcomp.activations.packed_products import packed_forms, packed_pair, packed_product
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.prepared import Carried, in_arrays, product_claim
from jaxcomp.activations.reasons import COMPUTED, MULTIPLIED_OUT, UNQUANTIZED, WIDENED, Record, Why
from jaxcomp.activations.specs import ActSpec
from jaxcomp.core.barriers import made_once
from jaxcomp.core.types import Key
from jaxcomp.kernels.leaves import Laid
from jaxcomp.kernels.llvm_panels import forms_of_codes
from jaxcomp.kernels.prepare import site_axes
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.ranges import Range

E = TypeVar("E")


class Mode(NamedTuple):
    """How a quantized function is run: on integers or not, and how its gradients are rounded, if at all."""

    integer: bool
    gradients: Gradients = Gradients()


class Side(NamedTuple):
    """What a product needs beside its operands: the ranges of some of them, and the key of its gradient."""

    ranges: dict[int, Range]
    key: Key | None


class Operand(NamedTuple):
    """An operand as the float product takes it: its value, which has the gradient, and its codes if there are any."""

    value: Value
    factor: Factor | None

    def dense(self) -> jax.Array:
        """The value as an array."""
        return array_of(self.value)


@dataclass(frozen=True)
class Around:
    """What the claims of all sites have in common.

    Attributes:
      mode: how the function is run.
      ranges: those given, by name.
      reasons: why the codes of a leaf do not come to its site, by its path.
      record: learns what was done at a site.
      prepared: the leaves that are laid out for their products, by path.
      held: the leaves that are unpacked at their products, by path.
      made: what is known of values that the sums of a product alone make.
      faked: gives a value as the float product takes it.
    """

    mode: Mode
    ranges: Mapping[str, Range]
    reasons: Mapping[str, Why]
    record: Record
    prepared: Mapping[str, Laid]
    held: Container[str]
    made: Made
    faked: Memory[Operand] = field(default_factory=lambda: Memory(_faked))

    @cached_property
    def encoded(self) -> Memory[Factor]:
        """Gives a value in codes."""
        return Memory(lambda value, act, at: encoded(value, act, at, self.made.of(value)))


def claim_of(planned: Planned, index: int, around: Around) -> Claim | None:
    """The claim that the plan with this ``index`` makes on its site, if any."""
    site, mode = planned.site, around.mode
    if site.kind == "embed":
        return Claim(lookup(planned, around.record)) if BARRED.isdisjoint(site.inside) else None
    if planned.act is None:
        return product_claim(planned, around.prepared, around.record) or held_product(planned, around.held)
    key = mode.gradients.key_of(index, planned.op)
    side = Side({i: around.ranges[name] for i, name in planned.ranges.items()}, key)
    return Claim(_Product(planned, planned.act, around), side)


@dataclass(frozen=True)
class _Product:
    """A product whose activations are quantized; operands after the first two (sizes of groups) stay as they are."""

    planned: Planned
    act: ActSpec
    around: Around

    def __call__(self, side: Side, *given: Value | Carried | Held) -> list[jax.Array]:
        path, op, spec = self.planned.site.path, self.planned.op, self.around.mode.gradients.spec
        why = None
        if self.around.mode.integer:
            values, waited = self.in_turn(given, side.ranges, self.factor)
            pair = self.factors(values, side.ranges, waited)
            if not isinstance(pair, Why):
                done, why = _done(pair[0])
                multiply, pair, named = self.on_codes(given, pair)
                self.around.record(path, done, why, named)
                form = Form(multiply, self.single(values, pair))
                on_codes = product_with_gradient(op, spec, self.rounded, form)
                y = on_codes(values, side.ranges, side.key, jax.lax.stop_gradient(pair))
                at = self.planned.site.location
                if at in self.around.made.links:
                    self.around.made.begin(at, self.sums(multiply, pair), y)
                return [y]
            why = pair
        return [self.fake(side, given, why)]

    def on_codes(
        self, given: tuple[Value | Carried | Held, ...], pair: tuple[Factor, Factor]
    ) -> tuple[Callable[[Op, Factor, Factor], jax.Array], tuple[Factor, Factor], str]:
        """How factors are multiplied; those; and the form in words, if one is chosen.

        A weight that is prepared, or that the program turns before the product, is multiplied as it lies.
        """
        site, op = self.planned.site, self.planned.op
        axes, side = site_axes(site, op), site.weight
        if axes is None or side is None:
            return integer_product, pair, ""
        if site.kind == "conv":
            coded = coded_pair(op, given[side], pair)
            return (integer_product, pair, "") if coded is None else (coded_convolution, coded, forms_of_codes())
        leaf = self.around.prepared.get(site.leaf or "")
        order = [axis for part in axes for axis in part]
        if order != sorted(order) if leaf is None else axes != leaf.axes:
            return integer_product, pair, ""
        in_panels = panel_pair(given[side], side, pair)
        if in_panels is not None:
            return integer_product, in_panels, forms_of_codes()
        packed = packed_pair(op, side, given[side], pair)
        if packed is not None:
            return packed_product, packed, packed_forms(op, *packed)
        return (turned_right if side else turned_left), pair, ""

    def sums(
        self, multiply: Callable[[Op, Factor, Factor], jax.Array], pair: tuple[Factor, Factor]
    ) -> CodedSums | None:
        """Those of which a CPU may make codes, if this is such a product."""
        if multiply is coded_convolution:
            return convolved(self.planned.op, *pair)
        return multiplied(self.planned.op, *pair) if self.planned.op.name == "dot_general" else None

    def in_turn(
        self, given: tuple[Value | Carried | Held, ...], ranges: Mapping[int, Range], enter: Callable[..., E]
    ) -> tuple[tuple[Value, ...], dict[int, E]]:
        """The operands with a held weight unpacked once the activation is in codes; and that activation by index."""
        waited: dict[int, E] = {}
        values: list[Value | Held] = [v if isinstance(v, Held) else in_arrays(v) for v in given]
        for index in (0, 1):
            value, other = values[index], values[1 - index]
            if isinstance(value, Held) and isinstance(other, jax.Array):
                entered = enter(1 - index, other, ranges.get(1 - index))
                if isinstance(entered, Factor) and entered.reach:  # its scale waits for the value's NaN
                    scale, values[index] = in_its_turn(entered.scale, value)
                    entered = replace(entered, scale=scale)
                else:
                    entered, values[index] = in_its_turn(entered, value)
                waited[1 - index] = entered
        return tuple(as_array(v) for v in values), waited

    def fake(self, side: Side, given: tuple[Value | Carried | Held, ...], why: Why | None) -> jax.Array:
        """The product in float, on codes where both operands have them; ``why`` it is not on integers."""
        values, waited = self.in_turn(given, side.ranges, self._rounded)
        op, spec, rest = self.planned.op, self.around.mode.gradients.spec, values[2:]
        x, y = (waited.get(i) or self._rounded(i, value, side.ranges.get(i)) for i, value in enumerate(values[:2]))
        if x.factor is None or y.factor is None:
            self.around.record(self.planned.site.path, "fake", why)
            if spec is None:
                return op.bind(x.dense(), y.dense(), *rest)[0]
            return with_rounded_gradient(op, spec)(side.key, x.dense(), y.dense(), rest)
        pair = x.factor, y.factor
        refused = no_codes(op, *pair)
        self.around.record(self.planned.site.path, "fake", why or refused or long_sum(op, *pair))
        form = Form(integer_product if refused is None else value_product, self.single(values, pair))
        if spec is None:
            return product(op, form, once=refused is None)(x.value, y.value, pair, rest)
        if refused is None:  # or XLA on CPU rounds anew for each that reads the codes
            first, second = (replace(f, codes=made_once(f.codes)) for f in pair)
            pair = first, second
        return product_with_gradient(op, spec, self.rounded, form)(values, side.ranges, side.key, pair)

    def single(self, values: tuple[Value, ...], pair: tuple[Factor, Factor]) -> tuple[bool, bool]:
        """Which operands have one scale that goes outside of the products of the gradient: none if one is in blocks."""
        if no_codes(self.planned.op, *pair) is not None:
            return False, False
        first, second = (self._has_one_scale(i, value) for i, value in enumerate(values[:2]))
        return first, second

    def _has_one_scale(self, index: int, value: Value) -> bool:
        if isinstance(value, Codes):
            return value.scale.size == 1
        return math.prod(scale_blocks(value.shape, self.planned.site.operands[index].roles, self.act.per)) == 1

    def factors(
        self, values: tuple[Value, ...], ranges: Mapping[int, Range], waited: Mapping[int, Factor | Why]
    ) -> tuple[Factor, Factor] | Why:
        """Both operands in codes, or why the product cannot be run on them."""
        a, b = (waited.get(i) or self.factor(i, value, ranges.get(i)) for i, value in enumerate(values[:2]))
        if isinstance(a, Why):
            return a
        if isinstance(b, Why):
            return b
        return refusal(self.planned.op, a, b) or (a, b)

    def factor(self, index: int, value: Value, given: Range | None) -> Factor | Why:
        """An operand in codes, or why it has none."""
        if isinstance(value, Codes):
            zero = None if value.zero is None else value.zero.astype(jnp.int32)
            codes = value.codes.astype(jnp.int8) if value.reach else value.codes
            return Factor(codes, value.scale, zero, value.reach)
        site = self.planned.site
        if index not in site.activations:
            why = self.around.reasons.get(site.leaf or "", UNQUANTIZED)
            return COMPUTED if why in (UNQUANTIZED, MULTIPLIED_OUT) and not site.operands[index].exact else why
        at = Entry(site.operands[index].roles, given)
        return self.around.encoded(value, self.act, at)

    def rounded(self, values: tuple[Value, ...], ranges: Mapping[int, Range]) -> tuple[jax.Array, jax.Array]:
        """The operands as the float product takes them."""
        x, y = (self._rounded(i, value, ranges.get(i)).dense() for i, value in enumerate(values[:2]))
        return x, y

    def _rounded(self, index: int, value: Value, given: Range | None) -> Operand:
        if isinstance(value, Codes):
            codes = value.codes.astype(value.scale.dtype)
            numbers = codes if value.zero is None else codes - spread(value.zero, codes.shape)
            factor = Factor(numbers.astype(value.dtype), value.scale, None, value.reach)
            return Operand(value, factor)
        site = self.planned.site
        if index not in site.activations:
            return Operand(value, None)
        return self.around.faked(value, self.act, Entry(site.operands[index].roles, given))


def _faked(value: jax.Array, act: ActSpec, at: Entry) -> Operand:
    """An activation rounded in float."""
    found = fake_quantize(value, act, at)
    return Operand(found.value, Factor(found.numbers, found.scale, None, reach_of(act)))


def _done(a: Factor) -> tuple[str, Why | None]:
    """What a product on codes is called, and what a backend makes of it."""
    return ("integer", None) if a.codes.dtype == jnp.int8 else ("float8", WIDENED)
