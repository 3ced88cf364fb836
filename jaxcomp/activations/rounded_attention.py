"""Attention whose products run on integers, in one pass on a CPU: what they multiply are numbers on their grids.

Products of these in float32 are those of the codes, rescaled, within rounding. Weights are rounded where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax

from jaxcomp.activations.coded_rows import behind, grid_numbers, rounded_rows
from jaxcomp.activations.execution import Around, claim_of
from jaxcomp.activations.factors import Factor
from jaxcomp.activations.fake import Entry, steps_of
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.reasons import Why
from jaxcomp.activations.regions import Region, Sides
from jaxcomp.activations.specs import Act, ActSpec
from jaxcomp.core.layouts import Tokens
from jaxcomp.kernels.llvm_float_attention import How
from jaxcomp.trace.pointwise import Pointwise
from jaxcomp.trace.rowwise import Axes

ONE_PASS = "one pass on cpu"
"""How the products of attention run, in a report."""


def rounded_attention(region: Region, first: Planned, last: Planned, around: Around) -> Region | None:
    """Attention with what its products multiply rounded; None where one pass does not do that.

    Args:
      region: as it is in floats.
      first, last: its products, and what is asked of them.
      around: what the claims of sites have in common.
    """
    how, act = region.how, last.act
    if not isinstance(first.act, Act) or not isinstance(act, Act) or not isinstance(how, How) or region.sides is None:
        return None
    if around.mode.gradients.spec is not None or not (act.needs_range or isinstance(act.per, Tokens)):
        return None
    rounding, steps = rounded_rows(act, how.sizes[how.keys])
    function, varying = behind(how.function, how.varying, _moved(rounding, len(how.beside)))
    everywhere: Axes = (None,) * len(how.sizes)
    how = how._replace(function=function, varying=varying, beside=(*how.beside, *[everywhere] * len(steps)))
    seen = replace(around, record=partial(_record, around))
    claims = {p.site.location: claim_of(p, 0, seen) for p in (first, last)}
    products = {at: claim for at, claim in claims.items() if claim is not None}
    entered = _Entered((first, first, last), region.sides, (first.act, first.act, act), steps, around.encoded)
    return replace(region, how=how, products=products, entered=entered)


def _moved(function: Pointwise, by: int) -> Pointwise:
    """With operands so many places further."""
    return tuple(step._replace(number=step.number + by) if step.name == "operand" else step for step in function)


@dataclass(frozen=True)
class _Entered:
    """What the code takes: queries, keys and values on their grids, what meets the scores, and the grid of weights.

    Attributes:
      products, sides, acts: of these three, whose operands they are, which, and what they become.
      steps: which numbers of the grid of weights the code takes.
      encoded: gives a value in codes.
    """

    products: tuple[Planned, Planned, Planned]
    sides: tuple[int, int, int]
    acts: tuple[Act, Act, Act]
    steps: tuple[int, ...]
    encoded: Callable[[jax.Array, ActSpec, Entry], Factor]

    def __call__(self, given: Sequence[jax.Array], needed: Sides) -> list[jax.Array]:
        of_three = [*zip(given, self.products, self.sides, self.acts, strict=False)]
        found = [self.encoded(x, act, _entry(p, side, needed)).value() for x, p, side, act in of_three]
        if not self.steps:
            return [*found, *given[3:]]
        x, p, side, act = of_three[2]
        grid = grid_numbers(steps_of(x, act, _entry(p, 1 - side, needed)), act)  # of values it takes their type
        return [*found, *given[3:], *(grid[i].reshape(()) for i in self.steps)]


def _entry(p: Planned, side: int, needed: Sides) -> Entry:
    """How an operand enters its product."""
    return Entry(p.site.operands[side].roles, needed[p.site.location].ranges.get(side))


def _record(around: Around, path: str, done: str, why: Why | None, form: str = "") -> None:
    """One pass, if products run on integers at all."""
    around.record(path, done, why, ONE_PASS if done == "integer" else form)
