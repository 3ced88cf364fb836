"""``channel_groups``: which slices of which parameters must be removed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.paths import Where
from jaxcomp.core.types import Params, PyTree
from jaxcomp.structure.analysis import Analysis, Options, analyze, layer_count
from jaxcomp.structure.labelling import Unknown, source_of
from jaxcomp.structure.reading import every, read
from jaxcomp.trace.walk import Fn


@dataclass(frozen=True, eq=False)
class Slice:
    """One dimension of one parameter: ``unit_of[i]`` is the unit that owns index i, -1 if none of the group does."""

    path: str
    axis: int
    unit_of: NDArray[np.int64]

    @property
    def width(self) -> int:
        """How many indices one unit has here."""
        return int((self.unit_of == 0).sum())


@dataclass(frozen=True, eq=False)
class Group:
    """Interchangeable units: any of them may be removed, each from every slice at once.

    ``layers`` is the height of the stack if the slices lie in a scan whose layers may each keep other units
    (as many in every layer), and None otherwise.
    """

    units: int
    slices: tuple[Slice, ...]
    layers: int | None = None

    def unit(self, i: int) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
        """The (path, axis, indices) that unit ``i`` owns."""
        return tuple((s.path, s.axis, tuple(np.flatnonzero(s.unit_of == i).tolist())) for s in self.slices)

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that the group touches, each once."""
        return tuple(dict.fromkeys(s.path for s in self.slices))

    def __repr__(self) -> str:
        shown = ", ".join(f"{s.path}:{s.axis}" + (f" x{s.width}" if s.width > 1 else "") for s in self.slices[:4])
        more = f", … ({len(self.slices)} slices)" if len(self.slices) > 4 else ""
        stack = f" in each of {self.layers} layers" if self.layers else ""
        return f"{self.units} units{stack}: {shown}{more}"


@dataclass(frozen=True)
class Frozen:
    """Indices of a parameter's dimension that stay, and why: ``primitive`` at ``source`` wants them, if one does."""

    path: str
    axis: int
    indices: int
    why: str
    primitive: str = ""
    source: str = ""

    def __repr__(self) -> str:
        by = f" ({self.primitive} at {self.source})" if self.primitive else ""
        return f"{self.path}:{self.axis}, {self.indices} indices: {self.why}{by}"


@dataclass(frozen=True)
class Term:
    """``count`` times a product of widths; a width is ``fixed + sum(per_unit * kept[group])``."""

    count: int
    widths: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]

    def __call__(self, kept: Sequence[int]) -> float:
        """The value when group g keeps ``kept[g]`` units."""
        return self.count * math.prod(fixed + sum(m * kept[g] for g, m in per) for fixed, per in self.widths)


@dataclass(frozen=True, eq=False)
class Groups:
    """What ``channel_groups`` found: the groups, the shapes of the tree, what stays, and what was not known.

    ``frozen`` says of each dimension of a parameter that is no channel, or of the part of it that is none, why; for
    the primitives in ``unknown`` the analysis has no rule.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    frozen: tuple[Frozen, ...]
    unknown: tuple[Unknown, ...]
    options: Options
    parameter_terms: tuple[Term, ...]
    mac_terms: tuple[Term, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __getitem__(self, i: int) -> Group:
        return self.groups[i]

    def of(self, path: str, axis: int) -> tuple[Group, ...]:
        """The groups that own indices of this dimension; empty if all of it stays.

        Raises:
          KeyError: no parameter has this path.
        """
        if path not in self.shapes:
            raise KeyError(f"channel_groups: no parameter is named {path!r}; there are {', '.join(self.shapes)}.")
        return tuple(g for g in self.groups if any(s.path == path and s.axis == axis for s in g.slices))

    def parameters(self, kept: Sequence[int] | None = None) -> int:
        """The number of parameters when group g keeps ``kept[g]`` units (all by default)."""
        return round(sum(t(kept or [g.units for g in self.groups]) for t in self.parameter_terms))

    def macs(self, kept: Sequence[int] | None = None) -> int:
        """The multiply-adds of the traced call's dots and convolutions when group g keeps ``kept[g]`` units."""
        return round(sum(t(kept or [g.units for g in self.groups]) for t in self.mac_terms))

    def __repr__(self) -> str:
        units = sum(g.units for g in self.groups)
        head = (
            f"Groups({len(self.groups)} groups, {units} units; {self.parameters():,} parameters, {self.macs():,} MACs"
        )
        lines = [head, *(f"  [{i}] {g!r}" for i, g in enumerate(self.groups))]
        lines += [f"  frozen by unknown primitive {u.primitive!r} at {u.source}" for u in self.unknown]
        return "\n".join(lines) + ")"


def channel_groups(
    fn: Fn, *, free_outputs: Where | None = None, through_means: bool = False, strict: bool = False
) -> Callable[..., Groups]:
    """Finds the channels of ``fn(params, *args)`` that can be removed, and what each owns.

    Traces ``fn`` to a jaxpr and follows every index of every floating parameter through it. Two indices that
    meet (in a sum, in a contraction, in a batch dimension) are one unit; a unit can be removed if the function
    without its slices equals the function with its slices set to zero. Inputs, outputs, spatial dimensions, and
    what a maximum, a softmax, a sort or a mean runs over stay whole.

    Args:
      fn: a pure function whose first argument is the parameter tree; leaves may be ``jax.ShapeDtypeStruct``.
      free_outputs: a rule over output paths ("0", "1/batch_stats/bn/mean"); outputs that match may come back
        smaller. An output whose path ends in a parameter's path and has its shape is that parameter's new value
        (batch statistics, caches): it shrinks alike without being named.
      through_means: let channels be removed over which a mean runs (LayerNorm's, RMSNorm's). ``shrink`` stays
        exact, for it divides by the old count; the same Flax module built at the new width would not.
      strict: raise at a primitive that the analysis does not know, instead of freezing what it touches.

    Returns:
      A function of ``(params, *args, **kwargs)`` giving ``Groups``.

    Raises (on call):
      NotImplementedError: with ``strict``, naming the primitive and its source line.
      TypeError: the first argument holds no array.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(p, x):
    ...     return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]
    >>> shapes = {"up": (3, 8), "bias": (8,), "down": (8, 2)}
    >>> params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    >>> channel_groups(mlp)(params, jnp.ones((5, 3)))
    Groups(1 groups, 8 units; 48 parameters, 200 MACs
      [0] 8 units: bias:0, down:0, up:1)

    The idea of dependency groups is that of DepGraph (Fang et al., 2023), which reads them off a list of layer types.
    """
    options = Options(free_outputs, through_means, strict)

    def groups_of(params: Params, *args: PyTree, **kwargs: PyTree) -> Groups:
        return _collect(_kept(analyze(fn, options, params, *args, **kwargs)), options)

    return groups_of


def _kept(analysis: Analysis) -> Analysis:
    """Makes what the call does not read stay: a call that does may need it. What goes with what is read goes."""
    jaxpr, atoms = analysis.program.jaxpr, analysis.atoms
    live = read(jaxpr, analysis.walked, [every(v) for v in jaxpr.jaxpr.outvars])
    needed, unread = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for dims, found in zip(analysis.dims.values(), live, strict=False):
        for axis, d in enumerate(dims):
            if isinstance(d, np.ndarray):
                on = np.full(len(d), False) if found is None else found[axis]
                needed.append(atoms.find(d[on]))
                unread.append(d[~on])
    alone = np.concatenate(unread)
    atoms.freeze(alone[~np.isin(atoms.find(alone), np.concatenate(needed))], len(analysis.reasons) - 1)
    return analysis


def _frozen(analysis: Analysis) -> Iterator[Frozen]:
    """Why each dimension of each parameter stays, as far as it does."""
    for path, dims in analysis.dims.items():
        for axis, (d, n) in enumerate(zip(dims, analysis.shapes[path], strict=True)):
            if not isinstance(d, np.ndarray):
                if n > 1:
                    yield Frozen(path, axis, n, "it is not of a floating type, so no weight")
                continue
            found, counts = np.unique(analysis.atoms.reason(d), return_counts=True)
            for number, count in zip(found.tolist(), counts.tolist(), strict=True):
                if number < len(analysis.reasons):
                    eqns, why = analysis.reasons[number]
                    made_by = (eqns[-1].primitive.name, source_of(*reversed(eqns))) if eqns else ()
                    yield Frozen(path, axis, count, why, *made_by)


def _collect(analysis: Analysis, options: Options) -> Groups:
    """Gathers units by the dimensions they touch: those with the same ones are interchangeable."""
    roots = {
        (path, axis): analysis.atoms.find(d)
        for path, dims in analysis.dims.items()
        for axis, d in enumerate(dims)
        if isinstance(d, np.ndarray)
    }
    family = _families(roots, len(analysis.atoms))
    unit = np.full(len(analysis.atoms), -1, np.int64)
    slices: dict[int, list[Slice]] = {}
    members: dict[int, NDArray[np.int64]] = {}
    for (path, axis), r in roots.items():
        of = family[r]
        for f in np.unique(of[of > 0]).tolist():
            mine = of == f
            if f not in members:
                found, first = np.unique(r[mine], return_index=True)
                members[f] = found[np.argsort(first)]
                unit[members[f]] = np.arange(len(found))
            slices.setdefault(f, []).append(Slice(path, axis, np.where(mine, unit[r], -1)))
    groups = tuple(
        Group(len(members[f]), tuple(s), layer_count(analysis, [x.path for x in s], members[f]))
        for f, s in slices.items()
    )
    number = np.full(len(analysis.atoms), -1, np.int64)
    for g, f in enumerate(slices):
        number[members[f]] = g
    units = [g.units for g in groups]
    parameters = tuple(
        Term(1, tuple(_width(number, units, roots.get((path, axis)), n) for axis, n in enumerate(shape)))
        for path, shape in analysis.shapes.items()
    )
    macs = tuple(
        Term(p.count, tuple(_width(number, units, analysis.atoms.find(d), len(d)) for d in p.dims))
        for p in analysis.products
    )
    frozen = tuple(_frozen(analysis))
    return Groups(groups, dict(analysis.shapes), frozen, analysis.unknown, options, parameters, macs)


def _families(roots: Mapping[tuple[str, int], NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """A number for each atom: equal for those that own as many indices of the same dimensions; 0 for what stays."""
    family, names = np.zeros(n, np.int64), 1
    for r in roots.values():
        found, count = np.unique(r[r > 0], return_counts=True)
        if len(found) == 0:
            continue
        _, kind = np.unique(np.stack([family[found], count]), axis=1, return_inverse=True)
        family[found] = names + kind.reshape(-1)
        names += int(kind.max()) + 1
    return family


def _width(
    number: NDArray[np.int64], units: Sequence[int], root: NDArray[np.int64] | None, n: int
) -> tuple[int, tuple[tuple[int, float], ...]]:
    """A dimension's size as a function of how many units each group keeps."""
    if root is None:
        return n, ()
    owner = number[root]
    found, count = np.unique(owner[owner >= 0], return_counts=True)
    per = tuple((int(g), float(c) / units[g]) for g, c in zip(found, count, strict=True))
    return int((owner < 0).sum()), per
