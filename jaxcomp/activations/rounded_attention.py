"""Attention whose products run on integers, in one pass on a CPU: what they multiply are numbers on their grids.

Products of these in float32 are those of the codes, rescaled, within rounding. Weights are rounded where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import jax

from jaxcomp.activations.coded_rows import behind, rounded_rows
from jaxcomp.activations.execution import Around, claim_of
from jaxcomp.activations.fake import Entry
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.reasons import Why
from jaxcomp.activations.regions import Region
from jaxcomp.activations.specs import Act
from jaxcomp.core.layouts import Tokens
from jaxcomp.kernels.llvm_float_attention import How
from jaxcomp.trace.interpreter import Claim

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
    if first.act.needs_range or act.needs_range or not isinstance(act.per, Tokens):
        return None
    if around.mode.gradients.spec is not None:
        return None
    function, varying = behind(how.function, how.varying, rounded_rows(act, how.sizes[how.keys]))
    used = tuple(zip((first, first, last), region.sides, strict=True))
    seen = replace(around, record=partial(_record, around))

    def entered(given: Sequence[jax.Array]) -> list[jax.Array]:
        return [_rounded(x, p, side, around) for x, (p, side) in zip(given, used, strict=True)]

    products = {p.site.location: partial(_multiplied, claim_of(p, 0, seen)) for p in (first, last)}
    how = how._replace(function=function, varying=varying)
    return replace(region, how=how, entered=entered, products=products)


def _multiplied(claim: Claim | None, *operands: jax.Array) -> list[jax.Array]:
    """A product as it is without such a pass."""
    assert claim is not None
    return cast(list[jax.Array], claim.run(claim.side, *operands))


def _record(around: Around, path: str, done: str, why: Why | None, form: str = "") -> None:
    """One pass, if products run on integers at all."""
    around.record(path, done, why, ONE_PASS if done == "integer" else form)


def _rounded(x: jax.Array, p: Planned, side: int, around: Around) -> jax.Array:
    """An operand of a product on its grid."""
    assert isinstance(p.act, Act)
    return around.encoded(x, p.act, Entry(p.site.operands[side].roles)).value()
