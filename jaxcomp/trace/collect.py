"""The skeleton of what looks at activations: sites are chosen, each is observed, and what was seen is merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import jax

from jaxcomp.core.paths import Where, describe, some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Aux, Claim, Emitted, Monoid, zeros
from jaxcomp.trace.program import trace
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn

Observer = Callable[[Sequence[jax.Array]], Mapping[str, PyTree]]
"""From the values of a site's operands to what is to be gathered, by name."""
ADDED = Monoid(zeros, lambda a, b: a.plus(b))
"""What was seen adds, as :class:`~jaxcomp.trace.exact.Sum` does."""


class Nothing(NamedTuple):
    """What to say where no site is chosen: ``owner`` and its rule ``where`` match no ``wanted``."""

    owner: str
    where: Where
    wanted: str


class NoSite(ValueError):
    """Every site was left out."""


class Collected(NamedTuple):
    """The sites that were observed, and what was seen, by name."""

    sites: tuple[Site, ...]
    seen: Aux


def collect(
    fn: Fn, observer: Callable[[Site, Op], Observer | None], *, merged: Monoid, nothing: Nothing
) -> Callable[..., Collected]:
    """What ``fn(params, *args)`` shows at some of its sites.

    In a scan over stacked layers, what is seen has the layers' axes in front; other loops, branches and equal names are
    merged.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      observer: what looks at a site, given with its equation; None leaves the site out.
      merged: how what was seen of one name combines.
      nothing: the message where every site is left out.

    Raises:
      NoSite: every site is left out.
    """

    @wraps(fn)
    def collected(params: Params, *args: PyTree, **kwargs: PyTree) -> Collected:
        program = trace(fn, params, *args, **kwargs)
        ops = {op.location: op for op in program.flow.ops}
        every = sites_of(program)
        found = [(site, observer(site, ops[site.location])) for site in every]
        claims = {site.location: _claim(ops[site.location], look) for site, look in found if look is not None}
        if not claims:
            raise NoSite(
                f"{nothing.owner}: {describe(nothing.where)} matches no {nothing.wanted}; there are "
                f"{some_paths(s.path for s in every) or 'none'}."
            )
        seen = evaluate(program, claims, program.flatten(params, *args, **kwargs), collect=merged).aux
        return Collected(tuple(site for site, look in found if look is not None), seen)

    return collected


def _claim(op: Op, look: Observer) -> Claim:
    return Claim(lambda *values: Emitted(op.bind(*values), look(values)))
