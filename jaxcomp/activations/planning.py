"""Which sites a table of rules selects, what it asks of each, and the ranges that they need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.reasons import LEAVE, LEFT, UNMATCHED, Why, barred
from jaxcomp.activations.specs import ActSpec
from jaxcomp.core.layouts import Groups
from jaxcomp.core.paths import Where, describe, first_matches, some_paths
from jaxcomp.core.roles import AxisRoles
from jaxcomp.trace.calibrate import Stats, activation_name
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.ranges import Range, lost_energy, min_max
from jaxcomp.trace.sites import Site, sites_of, unread

Rules = Mapping[Where, ActSpec | None]
"""An ordered table from sites, by path or as a predicate of ``(path, site)``, to what their activations are."""

OWNER = "quantize_function"


@dataclass(frozen=True)
class Planned:
    """One site and what is asked of it.

    Attributes:
      site, op: the site and its equation.
      act: what its activations become; None leaves them.
      why: why they are left; None where they are not.
    """

    site: Site
    op: Op
    act: ActSpec | None
    why: Why | None

    @property
    def asked(self) -> bool:
        """Whether a rule asks for its activations to be quantized, be it in vain."""
        return self.why not in (UNMATCHED, LEFT)

    @property
    def ranges(self) -> dict[int, str]:
        """The names of the ranges that it needs, by operand."""
        if self.act is None or not self.act.needs_range:
            return {}
        return {i: activation_name(self.site, i) for i in self.site.activations}


def assigned(program: Program, rules: Rules) -> tuple[Planned, ...]:
    """What a table of rules asks of each site, the first rule that matches its path deciding.

    Raises:
      TypeError: a rule asks for something that is no ``Act`` or ``Float8``.
      ValueError: a rule that no site is left for, or groups that a site cannot have.
    """
    table = list(rules.items())
    for where, act in table:
        if not isinstance(act, ActSpec | None):
            raise TypeError(f"{OWNER}: rule {describe(where)} must ask for an Act, a Float8 or None, got {act!r}.")
    every = sites_of(program)
    ops = {op.location: op for op in program.flow.ops}
    if rules and not every:
        hidden = [f"{name} ({why})" for _, name, why in unread(program)]
        raise ValueError(
            f"{OWNER}: no rule can match, for the function has no site; {', '.join(hidden) or 'it multiplies nothing'}."
            " Give no rules, or another function."
        )
    firsts = first_matches(rules, [(site.path, site) for site in every], owner=OWNER, things="sites")
    planned = []
    for site, first in zip(every, firsts, strict=True):
        act = None if first is None else table[first][1]
        why = UNMATCHED if first is None else LEFT if act is None else declined(site)
        if why is None:
            _check_groups(site, act)
        planned.append(Planned(site, ops[site.location], None if why else act, why))
    return tuple(planned)


def declined(site: Site) -> Why | None:
    """Why a site's activations cannot be quantized; None if they can."""
    around = [name for name in site.inside if name in BARRED]
    if around:
        return barred(around[0])
    if site.kind == "embed":
        return Why("a lookup has no activation to quantize")
    if not site.activations:
        return Why("no operand depends on an argument", LEAVE)
    odd = [operand.dtype for operand in site.operands if not jnp.issubdtype(operand.dtype, jnp.floating)]
    return Why(f"an operand is {odd[0]}") if odd else None


def _check_groups(site: Site, act: ActSpec | None) -> None:
    if act is None or not isinstance(act.per, Groups):
        return
    inputs = [AxisRoles(site.operands[i].roles).inputs for i in site.activations]
    if site.kind not in ("dot", "ragged") or not all(inputs):
        raise ValueError(
            f"{OWNER}: {site.path!r} is a {site.kind}, and per={act.per!r} needs a dot that sums over an axis; take"
            " another rule for this site."
        )
    for i, axes in zip(site.activations, inputs, strict=True):
        n = site.operands[i].shape[axes[-1]]
        if n % act.per.size:
            raise ValueError(
                f"{OWNER}: {site.path!r} has {n} elements along its contracted axis, which groups of {act.per.size} do"
                f" not divide; take a divisor of {n}, or another rule for this site."
            )


def checked_ranges(planned: tuple[Planned, ...], ranges: Mapping[str, Range] | None) -> dict[str, Range]:
    """The ranges that the plan needs, each with the axes of the layer scans around its site.

    Raises:
      TypeError: something that is no range.
      ValueError: ranges that are missing, of another model, or of another number of layers.
    """
    given = {} if ranges is None else dict(ranges)
    known = {activation_name(p.site, i) for p in planned for i in p.site.activations}
    needed = {name: p.site.layer_steps for p in planned for name in p.ranges.values()}
    foreign = [name for name in given if name not in known]
    if foreign:
        raise ValueError(
            f"{OWNER}: ranges name {some_paths(foreign)}, which this function does not have; it has "
            f"{some_paths(sorted(known))}. They belong to another model or function: calibrate this one."
        )
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(
            f"{OWNER}: calibration never run for {some_paths(missing)}; call "
            "ranges_of(calibrate(fn)(params, *args)) and pass the result as ranges, or ask for range=Dynamic()."
        )
    return {name: _layered(name, given[name], layers) for name, layers in needed.items()}


def _layered(name: str, given: object, layers: tuple[int, ...]) -> Range:
    if isinstance(given, Stats):
        raise TypeError(f"{OWNER}: ranges[{name!r}] are statistics; turn them into ranges with ranges_of(stats).")
    if not isinstance(given, Range):
        raise TypeError(f"{OWNER}: ranges[{name!r}] must be a Range(low, high), got {type(given).__name__}.")
    for end in given:
        if jnp.shape(end) not in ((), layers):
            raise ValueError(
                f"{OWNER}: ranges[{name!r}] has ends of shape {jnp.shape(end)}, wanted () or {layers}, one for each "
                "layer of the scan around; calibrate this function."
            )
    return Range(*(jnp.broadcast_to(jnp.asarray(end), layers) for end in given))


class PoorRange(UserWarning):
    """Ranges that cannot stand for what was seen; the message names the activations, what is wrong and the mend."""


def ranges_of(stats: Mapping[str, Stats], method: Callable[[Stats], Range] = min_max) -> dict[str, Range]:
    """The ranges of all activations from their statistics, by one method (``min_max``, ``percentile(99.9)``, …).

    Outside ``jit`` it warns (:class:`PoorRange`) of activations of which zeros alone were seen, and of ranges whose
    clipping takes away more than half of the sum of squares.

    Args:
      stats: by activation, from ``calibrate``.
      method: from statistics to a range.

    Raises:
      TypeError: a value that is no ``Stats``.
      ValueError: statistics without a finite range, outside ``jit``: the site was never reached, or met an infinity or
        a NaN.

    >>> from jaxcomp.trace.calibrate import observe
    >>> {name: (float(r.low), float(r.high)) for name, r in ranges_of({"w": observe(jnp.array([-1.0, 3.0]))}).items()}
    {'w': (-1.0, 3.0)}
    """
    result, still, cut = {}, [], []
    for name, s in stats.items():
        if not isinstance(s, Stats):
            raise TypeError(f"ranges_of: {name!r} must be Stats, as calibrate gives them, got {type(s).__name__}.")
        found = result[name] = method(s)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((s, found))):
            continue
        _check_finite(name, s, found)
        if ((np.asarray(s.low) == 0) & (np.asarray(s.high) == 0)).any():
            still.append(name)
        elif (lost := lost_energy(s, found)) > _MOST_LOST:
            cut.append(f"{name!r} ({lost:.0%})")
    _warn_poor(still, cut)
    return result


_MOST_LOST = 0.5


def _check_finite(name: str, s: Stats, found: Range) -> None:
    if all(np.isfinite(np.asarray(end)).all() for end in found):
        return
    low, high = np.asarray(s.low), np.asarray(s.high)
    if (low > high).any():
        what = "the calibration batches never reached it"
    elif np.isnan(low).any():
        what = "the calibration batches have NaN there"
    else:
        what = "the calibration batches are infinite there, or its method overflows"
    raise ValueError(
        f"ranges_of: {name!r} has the range {found}; {what}; calibrate on other batches, or leave it out by"
        " calibrate(fn, where) and by a rule."
    )


def _warn_poor(still: list[str], cut: list[str]) -> None:
    if still:
        warnings.warn(
            f"ranges_of: nothing but zeros was seen of {some_paths(still)}; its range is 0, and other values would be "
            "rounded to integers; calibrate on other batches, or ask for range=Dynamic().",
            PoorRange,
            stacklevel=3,
        )
    if cut:
        warnings.warn(
            f"ranges_of: clipping takes most of the sum of squares from {', '.join(cut)}: a few values are far larger "
            "than the range; take mse(bits), a larger percentile, or min_max.",
            PoorRange,
            stacklevel=3,
        )
