"""What a program makes of rows of numbers: of a product's results, or of what it takes sums of.

Residual sums, layer norms, GELU and the like, up to what others read: the longest run of equations that makes one value
alone which the rest of the program reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from jax.extend import core

from jaxcomp.activations.coded_rows import has_rows
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.regions import MOST, Region, beside_of, is_known_float, refusal
from jaxcomp.activations.specs import Act
from jaxcomp.kernels.llvm_rows import How
from jaxcomp.trace.flow import Op
from jaxcomp.trace.levels import Level
from jaxcomp.trace.primitives import BARRED, ELEMENTWISE
from jaxcomp.trace.rowwise import REDUCTIONS, RowReading, varies
from jaxcomp.trace.walk import Location, shape_of

WORTHWHILE = REDUCTIONS | {"erf", "erfc", "exp", "expm1", "log1p", "logistic", "tanh"}
"""Steps that XLA on a CPU takes long for, or goes over memory once more."""


class _Taken:
    """Equations that something is done with, and those around them."""

    def __init__(self, locations: Iterable[Location]) -> None:
        self._these: set[Location] = set()
        self._around: set[Location] = set()
        self.add(locations)

    def add(self, locations: Iterable[Location]) -> None:
        """These too."""
        for at in locations:
            self._these.add(at)
            self._around.update(at[:i] for i in range(1, len(at)))

    def has(self, at: Location) -> bool:
        """Whether an equation, one around it or one inside it is taken."""
        return at in self._around or any(at[:i] in self._these for i in range(1, len(at) + 1))


def row_functions(
    planned: Mapping[Location, Planned],
    levels: Mapping[Location, Level],
    taken: Collection[Location],
    *,
    integer: bool,
) -> list[Region]:
    """Those of a program.

    Args:
      planned: its sites.
      levels: its equations.
      taken: equations that something else is done with, beside the sites.
      integer: whether products run on integers, so that codes are made of what they round.
    """
    found: list[Region] = []
    gone = _Taken({*taken, *planned})
    for v, level in _starts(planned, levels, taken):
        region = _followed(v, level, gone, planned if integer else {})
        if region is not None:
            found.append(region)
            gone.add(op.location for op in region.ops)
    return found


def _starts(
    planned: Mapping[Location, Planned], levels: Mapping[Location, Level], taken: Collection[Location]
) -> Iterator[tuple[core.Var, Level]]:
    """Values, and where they are: results of products, then what sums are taken of."""
    for at, p in planned.items():
        if BARRED.isdisjoint(p.site.inside) and p.site.kind != "embed" and at not in taken:
            yield p.op.eqn.outvars[0], levels[at[:-1]]
    for level in levels.values():
        for op in {op.location: op for ops in level.users.values() for op in ops if op.name in REDUCTIONS}.values():
            if BARRED.isdisjoint(op.inside):
                yield _root(op, level), level


def _root(op: Op, level: Level) -> core.Var:
    """What a reduction sums a function of: ``x`` of the sum of its squares."""
    (v,) = (u for u in op.eqn.invars if isinstance(u, core.Var))
    while (maker := level.makers.get(v)) is not None and maker.name in ELEMENTWISE:
        operands = {u for u in maker.eqn.invars if isinstance(u, core.Var)}
        if len(operands) != 1:
            break
        (v,) = operands
    return v


def _followed(v: core.Var, level: Level, gone: _Taken, planned: Mapping[Location, Planned]) -> Region | None:
    """What begins with a value; None where nothing does that is worth it."""
    if not level.known or len(shape_of(v)) < 2 or not is_known_float(v):
        return None
    reading, best = RowReading(v, level.constant), 0
    ops: list[Op] = []
    waiting = level.readers(v)
    done: set[Location] = set()
    while waiting and len(ops) < MOST:
        op = waiting.pop(min(waiting))
        if gone.has(op.location) or not reading.read(op.eqn):
            continue
        ops.append(op)
        done.add(op.location)
        waiting |= level.readers(*op.eqn.outvars)
        if _open(ops, level, done) == {op.eqn.outvars[0]} and _is_whole(op.eqn.outvars[0], reading):
            best = len(ops)
    if not best:
        return None
    rounded = _is_rounded(ops[best - 1].eqn.outvars[0], level, planned)
    return _region(v, ops[:best], level, rounded=rounded)


def _is_rounded(v: core.Var, level: Level, planned: Mapping[Location, Planned]) -> bool:
    """Whether nothing reads a value but products that round each row of it on a grid of its own."""
    readers = level.readers(v)
    return bool(readers) and v not in level.outputs and all(_rounds(planned.get(at), v) for at in readers)


def _rounds(reader: Planned | None, v: core.Var) -> bool:
    if reader is None or not isinstance(reader.act, Act) or reader.act.needs_range:
        return False
    site, shape = reader.site, shape_of(v)
    which = [i for i, u in enumerate(reader.op.eqn.invars) if u is v]
    return all(i in site.activations and has_rows(reader.act, shape, site.operands[i].roles) for i in which)


def _open(ops: list[Op], level: Level, done: Collection[Location]) -> set[core.Var]:
    """What equations make that others read."""
    made = {v for op in ops for v in op.eqn.outvars}
    return {v for v in made if v in level.outputs or not level.readers(v).keys() <= {*done}}


def _is_whole(v: core.Var, reading: RowReading) -> bool:
    """Whether a value is laid out as the rows are, which lie along the last axis."""
    return reading.is_whole(v) and is_known_float(v) and reading.along in (None, len(shape_of(v)) - 1)


def _region(v: core.Var, ops: list[Op], level: Level, *, rounded: bool) -> Region | None:
    reading = RowReading(v, level.constant)
    if not all(reading.read(op.eqn) for op in ops):
        return None
    function, beside = reading.of(ops[-1].eqn.outvars[0]), beside_of(reading, level)
    last = len(shape_of(v)) - 1
    varying = tuple(varies(function, beside, last))
    if not varying[-1] or not (rounded or any(step.name in WORTHWHILE for step in function)):
        return None
    how = How(shape_of(v), function, varying, tuple(one.axes for one in beside))
    given = v, *(one.value for one in beside)
    return None if refusal(how, given) else Region(tuple(ops), given, how, rounded)
