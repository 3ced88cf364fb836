"""The walk: labels for every equation of a jaxpr, by one rule a primitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.extend import core, source_info_util
from numpy.typing import NDArray

from jaxcomp.structure.atoms import FREE, FROZEN, Atoms, Dim, Known, Label, arrays, fixed, weakest
from jaxcomp.structure.splits import Reason, Split, settle
from jaxcomp.trace import walk
from jaxcomp.trace.nested import Closed, bind, is_open
from jaxcomp.trace.walk import Location, aval_of, shape_of

Dims = tuple[Dim, ...]
_SMALL = 4096  # constants up to this many elements are followed by value, so that an index can be known


@dataclass(frozen=True)
class Step:
    """One equation's labels: its operands as it uses them, its results, and the walks of its inner jaxprs by part."""

    uses: tuple[Label, ...]
    outs: tuple[Label, ...]
    inner: Mapping[str, Walked] = field(default_factory=dict)


@dataclass(frozen=True)
class Walked:
    """A jaxpr's labels: a step for each equation; inputs and results as the surrounding equation wants them."""

    steps: tuple[Step, ...]
    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]


@dataclass(frozen=True)
class Product:
    """The multiply-adds of one dot or conv: ``count`` times the product of the sizes of ``dims``."""

    count: int
    dims: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Unknown:
    """A primitive that the analysis does not know, and the source line that called it."""

    primitive: str
    source: str


ONE = "it has one index, which is stretched, dropped or merged"
"""Why what broadcasts or goes away stays."""
Result = tuple[Sequence[Label], Sequence[Label]] | tuple[Sequence[Label], Sequence[Label], Mapping[str, Walked]]
"""What a rule gives: the operands as used, the results, and the walks inside."""
Rule = Callable[["Walk", core.JaxprEqn, list[Label]], Result]
RULES: dict[str, Rule] = {}
"""The rule of each known primitive."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of the primitives called ``names``."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


@dataclass
class Walk:
    """One analysis under way.

    Attributes:
      strict: raise at an unknown primitive.
      through_means: let means run over channels.
      atoms: the sets so far.
      products: every dot and conv met.
      unknown: primitives without a rule that froze something.
      positional: atoms whose place in their dimension mattered; layers of a stack must agree on them.
      stacked: atoms of what the outermost scans slice layer by layer.
      depth: how many loops surround the equation; 1 in a layer's body.
      repeat: how often the equation runs.
      splits: the reshapes so far that took channels apart, or put them together.
      reasons: why something stays, by number.
      open: the equation being walked, after those around it.
    """

    strict: bool = False
    through_means: bool = False
    atoms: Atoms = field(default_factory=Atoms)
    products: list[Product] = field(default_factory=list)
    unknown: dict[Unknown, None] = field(default_factory=dict)
    positional: list[NDArray[np.int64]] = field(default_factory=list)
    stacked: list[NDArray[np.int64]] = field(default_factory=list)
    depth: int = 0
    repeat: int = 1
    splits: list[Split] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    open: list[core.JaxprEqn] = field(default_factory=list)

    def join(self, *dims: Dim) -> Dim:
        """Makes the dimensions one: equal positions are removed together."""
        with_atoms = arrays(dims)
        if FROZEN in [d for d in dims if not isinstance(d, np.ndarray)]:
            self.freeze(*with_atoms, why="it meets a dimension that stays, as an input's does")
            return FROZEN
        if not with_atoms:
            return weakest(dims)
        if any(d is FREE for d in dims):
            self.mark(with_atoms[0])
        for other in with_atoms[1:]:
            self.atoms.union(with_atoms[0], other)
        return with_atoms[0]

    def freeze(self, *dims: Dim, why: str) -> None:
        """Keeps every index of the dimensions, and notes the reason."""
        with_atoms = arrays(dims)
        if with_atoms:
            reason = self.because(why)
            for d in with_atoms:
                self.atoms.freeze(d, reason)

    def still(self, n: int, dims: Sequence[Dim], *, why: str) -> Dim:
        """A dimension of ``n`` of which nothing goes, made from what stays: with the reason, where atoms went in."""
        if not arrays(dims):
            return FROZEN if weakest(dims) is FROZEN else FREE
        new = self.atoms.fresh(n)
        self.freeze(new, why=why)
        return new

    def because(self, why: str) -> int:
        """The number of a reason that the equation at hand gives."""
        self.reasons.append(Reason(tuple(self.open), why))
        return len(self.reasons) - 1

    def regrid(self, flat: Dim, shape: Sequence[int], axes: Sequence[Dim]) -> None:
        """Notes that the dimension ``flat`` runs over the grid of ``axes``, of which one holds its units."""
        why = "a reshape merges it with other channels, or splits it off them"
        self.splits.append(Split(arrays([flat])[0], tuple(shape), tuple(axes), self.because(why)))

    def settle(self) -> None:
        """Decides along which axes the units of all reshapes lie; once, after the walk."""
        settle(self.atoms, self.splits)
        self.splits.clear()

    def mark(self, *dims: Dim) -> None:
        """Notes that an index's place matters here, so that layers of a stack cannot keep different ones."""
        self.positional.extend(arrays(dims))

    def count(self, sizes: Sequence[int], dims: Sequence[Dim]) -> None:
        """Notes the multiply-adds of an equation whose loops run over ``sizes``."""
        fixed_size = math.prod(n for n, d in zip(sizes, dims, strict=True) if not isinstance(d, np.ndarray))
        self.products.append(Product(fixed_size * self.repeat, tuple(arrays(dims))))

    def run(self, jaxpr: Closed, ins: Sequence[Label]) -> tuple[Walked, list[Label]]:
        """Walks ``jaxpr`` from the labels of its inputs; gives its steps and the labels of its results."""
        steps: list[Step] = []

        def equation(eqn: core.JaxprEqn, location: Location, labels: list[Label]) -> Sequence[Label]:
            steps.append(self._step(eqn, labels))
            return steps[-1].outs

        results = walk.run(jaxpr, ins, equation, constant=_constant)
        return Walked(tuple(steps), tuple(i.dims for i in ins), tuple(r.dims for r in results)), results

    def _step(self, eqn: core.JaxprEqn, ins: list[Label]) -> Step:
        self.open.append(eqn)
        found = RULES.get(eqn.primitive.name, unknown)(self, eqn, ins)
        self.open.pop()
        uses, outs = found[0], list(found[1])
        inner = found[2] if len(found) == 3 else {}
        if self.depth != 1 and not is_open(eqn):
            for use in uses:
                self.mark(*use.dims)
        if not inner and (value := _fold(eqn, ins)) is not None:
            outs = [fixed(value.shape, FREE, value)]
        return Step(tuple(uses), tuple(outs), inner)


def unknown(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The rule of a primitive without one: what it touches stays, and it is named in the report."""
    touched = [d for i in ins for d in arrays(i.dims) if walk.atoms.find(d).any()]
    if touched:
        named = Unknown(eqn.primitive.name, source_of(*reversed(walk.open)))
        if walk.strict:
            raise NotImplementedError(
                f"channel_groups: primitive {named.primitive!r} at {named.source} is not known to the analysis; "
                "without strict=True the dimensions it touches are frozen and it is listed in groups.unknown."
            )
        walk.unknown[named] = None
    why, dims = "the analysis has no rule for this primitive", [d for i in ins for d in i.dims]
    walk.freeze(*touched, why=why)
    made = [[walk.still(n, dims, why=why) for n in shape_of(v)] for v in eqn.outvars]
    return ins, [Label(shape_of(v), tuple(m), (False,) * len(m)) for v, m in zip(eqn.outvars, made, strict=True)]


def out_shape(eqn: core.JaxprEqn) -> tuple[int, ...]:
    """The shape of an equation's first result."""
    return tuple(aval_of(eqn.outvars[0]).shape)


def source_of(*eqns: core.JaxprEqn) -> str:
    """The line of the user's program that made an equation; those after it surround it, for where it has none."""
    lines = (source_info_util.summarize(e.source_info) for e in eqns)
    return next((line for line in lines if line), "an unknown line")


def _constant(value: jax.Array) -> Label:
    known = None
    if not isinstance(value, jax.core.Tracer) and not _is_key(value):
        shape = np.shape(value)
        if not shape or (int(np.prod(shape)) <= _SMALL and np.asarray(value).dtype.kind in "iub"):
            known = np.asarray(value)
    return fixed(np.shape(value), FREE, known)


def _is_key(value: jax.Array) -> bool:
    return hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)


def _fold(eqn: core.JaxprEqn, ins: list[Label]) -> Known | None:
    """The value of an equation over known constants, if it is small and one that an index could be made of."""
    if len(eqn.outvars) != 1 or eqn.effects or is_open(eqn) or any(i.value is None for i in ins):
        return None
    aval = aval_of(eqn.outvars[0])
    if not hasattr(aval, "shape") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    if aval.shape and (aval.size > _SMALL or np.dtype(aval.dtype).kind not in "iub"):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(bind(eqn, [i.value for i in ins])[0])
