"""Whole layers: residual branches found in the program, and the same function without some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from jax.extend import core

from jaxcomp.core.paths import leaves_with_paths, path_str
from jaxcomp.core.types import Params, PyTree
from jaxcomp.structure.analysis import Options, Output, analyze
from jaxcomp.structure.labelling import source_of
from jaxcomp.trace import walk
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.nested import Closed, call_body
from jaxcomp.trace.primitives import SUMS
from jaxcomp.trace.walk import Fn, Location, Value, aval_of


@dataclass(frozen=True)
class Branch:
    """A residual sum ``x + f(x)`` whose ``f`` owns parameters.

    ``at`` is the place of the sum in the program, ``kept`` which of its two
    operands is x, ``shapes`` the parameters that only f uses, and ``source`` the line that sums.
    """

    at: Location
    kept: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    source: str

    def __repr__(self) -> str:
        return f"Branch({', '.join(self.shapes)} at {self.source})"


@dataclass(frozen=True)
class _Equation:
    at: Location
    eqn: core.JaxprEqn
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class _Graph:
    """A program's equations with its calls opened; values are numbered, a literal anew each time that it is read."""

    def __init__(self, jaxpr: Closed) -> None:
        self.equations: list[_Equation] = []
        self.widths: dict[Location, int] = {}
        self._count = 0
        self.ins = self._fresh(len(jaxpr.jaxpr.invars))
        self.outs = self._open(jaxpr, self.ins, ())

    def _fresh(self, n: int) -> list[int]:
        self._count += n
        return list(range(self._count - n, self._count))

    def _open(self, jaxpr: Closed, ins: Sequence[int], at: Location) -> list[int]:
        def equation(eqn: core.JaxprEqn, location: Location, operands: list[int]) -> list[int]:
            inner, self.widths[location] = call_body(eqn), len(eqn.outvars)
            if inner is not None:
                return self._open(inner, operands, (*location, "call"))
            outs = self._fresh(len(eqn.outvars))
            self.equations.append(_Equation(location, eqn, tuple(operands), tuple(outs)))
            return outs

        return walk.run(jaxpr, ins, equation, constant=lambda _: self._fresh(1)[0], at=at)

    def live(self, outs: Sequence[int], dropped: Mapping[Location, int]) -> tuple[set[int], set[Location]]:
        """The values and the equations that ``outs`` need, when the sums ``dropped`` are their operand alone."""
        needed, run = set(outs), set()
        for e in reversed(self.equations):
            if needed.isdisjoint(e.outs):
                continue
            run.add(e.at)
            needed.update([e.ins[dropped[e.at]]] if e.at in dropped else e.ins)
        return needed, run


def residual_branches(fn: Fn) -> Callable[..., tuple[Branch, ...]]:
    """Finds the residual sums of ``fn(params, *args)`` whose branch owns parameters, in program order.

    A sum ``x + f(x)`` is found wherever f's result depends on x and f has parameters that nothing else uses; sums
    inside jit and remat are found, inside scans and loops they are not.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: (x + jnp.tanh(x @ p["a"])) @ p["b"]
    >>> residual_branches(f)({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 1))}, jnp.ones((3, 2)))[0].shapes.keys()
    dict_keys(['a'])
    """

    def find(params: Params, *args: PyTree, **kwargs: PyTree) -> tuple[Branch, ...]:
        analysis = analyze(fn, Options(), params, *args, **kwargs)
        program = analysis.program
        graph = _Graph(program.jaxpr)
        owners = dict(zip(graph.ins, program.param_paths, strict=False))
        avals = {p: aval_of(v) for p, v in zip(program.param_paths, program.jaxpr.jaxpr.invars, strict=False)}
        branches = []
        for e, kept in _sums(graph):
            gone = _owned(graph, {e.at: kept}, analysis.outs, owners)
            if gone:
                shapes = {p: jax.ShapeDtypeStruct(avals[p].shape, avals[p].dtype) for p in gone}
                branches.append(Branch(e.at, kept, shapes, source_of(e.eqn)))
        return tuple(branches)

    return find


def _owned(
    graph: _Graph, dropped: Mapping[Location, int], outs: Sequence[Output], owners: Mapping[int, str]
) -> list[str]:
    """The parameters that are not needed once the sums are dropped, their own new values (statistics) left aside."""
    results = [o for o, out in zip(graph.outs, outs, strict=True) if out.param is None]
    after, _ = graph.live(results, dropped)
    gone = {v for v in graph.live(results, {})[0] - after if v in owners}
    made_from = _made_from(graph, dropped)
    state = {path: v for v, path in owners.items()}
    updates = [(o, state[out.param]) for o, out in zip(graph.outs, outs, strict=True) if out.param is not None]
    size = 0
    while gone and len(gone) > size:
        size, bits = len(gone), sum(1 << v for v in gone)
        gone |= {v for o, v in updates if made_from.get(o, 0) & bits and v not in after}
    return [path for v, path in owners.items() if v in gone]


def _made_from(graph: _Graph, dropped: Mapping[Location, int]) -> dict[int, int]:
    """For each value, bit v is set where value v went in."""
    made_from: dict[int, int] = {}
    for e in graph.equations:
        sources = 0
        for v in [e.ins[dropped[e.at]]] if e.at in dropped else e.ins:
            sources |= made_from.get(v, 0) | 1 << v
        made_from.update(dict.fromkeys(e.outs, sources))
    return made_from


def _sums(graph: _Graph) -> list[tuple[_Equation, int]]:
    """The sums of which one operand is made from the other, and which operand the other is."""
    made_from = _made_from(graph, {})
    found = []
    for e in graph.equations:
        if e.eqn.primitive.name not in SUMS:
            continue
        if any(aval_of(v).shape != aval_of(e.eqn.outvars[0]).shape for v in e.eqn.invars):
            continue
        a, b = e.ins
        if made_from.get(b, 0) >> a & 1:
            found.append((e, 0))
        elif made_from.get(a, 0) >> b & 1:
            found.append((e, 1))
    return found


def without_branches(branches: Sequence[Branch]) -> Callable[[Params], Params]:
    """The tree without the branches' parameters: ``without_branches(branches)(params)`` has None in their places.

    Raises (on call):
      ValueError: the tree lacks one of the parameters or has it in another shape.

    >>> import numpy as np
    >>> from jaxcomp.structure import residual_branches
    >>> f = lambda p, x: (x + x @ p["a"]) @ p["b"]
    >>> params, x = {"a": np.ones((2, 2), np.float32), "b": np.ones((2, 1), np.float32)}, np.ones((1, 2), np.float32)
    >>> branches = residual_branches(f)(params, x)
    >>> without_branches(branches)(params)["a"] is None
    True
    """
    gone = {path: s for b in branches for path, s in b.shapes.items()}

    def smaller(params: Params) -> Params:
        found = {path: getattr(leaf, "shape", None) for path, leaf in leaves_with_paths(params)[0]}
        for path, s in gone.items():
            if found.get(path) != s.shape:
                raise ValueError(
                    f"without_branches: {path!r} must have shape {s.shape}, found {found.get(path, 'no such leaf')}; "
                    "find the branches of this very tree with residual_branches(fn)(params, ...)."
                )
        return jax.tree_util.tree_map_with_path(lambda p, leaf: None if path_str(p) in gone else leaf, params)

    return smaller


def drop_branches(fn: Fn, branches: Sequence[Branch]) -> Fn:
    """``fn`` with ``x`` in place of ``x + f(x)`` at each branch; what only the branches needed is not run.

    The result takes the tree of ``without_branches`` and equals ``fn`` with f's result set to zero. New values of
    the branches' own parameters (their batch statistics) come back as None. It is a function like any other:
    ``channel_groups`` and ``shrink`` take it.

    Args:
      fn: the function with its branches, ``fn(params, *args)``.
      branches: from ``residual_branches``.

    Raises (on call):
      ValueError: the program has no such sum at a branch's place: it was found in another function or mode.

    >>> import numpy as np
    >>> from jaxcomp.structure import residual_branches
    >>> f = lambda p, x: (x + x @ p["a"]) @ p["b"]
    >>> params, x = {"a": np.ones((2, 2), np.float32), "b": np.ones((2, 1), np.float32)}, np.ones((1, 2), np.float32)
    >>> branches = residual_branches(f)(params, x)
    >>> float(drop_branches(f, branches)(without_branches(branches)(params), x)[0, 0])
    2.0
    """
    dropped = {b.at: b.kept for b in branches}
    gone = {path: s for b in branches for path, s in b.shapes.items()}

    def smaller(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        full = jax.tree_util.tree_map_with_path(
            lambda p, leaf: gone.get(path_str(p)) if leaf is None else leaf, params, is_leaf=lambda leaf: leaf is None
        )
        analysis = analyze(fn, Options(), full, *args, **kwargs)
        program = analysis.program
        graph = _Graph(program.jaxpr)
        sums = {e.at for e in graph.equations if e.eqn.primitive.name in SUMS}
        for b in branches:
            if b.at not in sums:
                raise ValueError(
                    f"drop_branches: this call of fn has no sum where {b!r} was found; find its branches with "
                    "residual_branches(fn) in the same mode."
                )
        stays = [out.param not in gone for out in analysis.outs]
        needed, run = graph.live([o for o, stay in zip(graph.outs, stays, strict=True) if stay], dropped)
        needed_gone = [p for v, p in zip(graph.ins, program.param_paths, strict=False) if v in needed and p in gone]
        if needed_gone:
            raise ValueError(f"drop_branches: {needed_gone[0]!r} is used outside the branches in this call of fn.")
        values = program.flatten(full, *args, **kwargs)
        values = [None if isinstance(v, jax.ShapeDtypeStruct) else v for v in values]
        out = evaluate(program, _claims(graph, dropped, run), values).out
        return program.unflatten([r if stay else None for r, stay in zip(program.results(out), stays, strict=True)])

    return smaller


def _claims(graph: _Graph, dropped: Mapping[Location, int], run: set[Location]) -> dict[Location, Claim]:
    """The sums are one of their operands; what nothing needs is absent, in the jaxprs that are opened for a sum."""
    opened = {at[:n] for at in dropped for n in range(1, len(at), 2)}
    alive = {at[:n] for at in run for n in range(1, len(at) + 1, 2)}
    claims = {at: Claim(partial(_operand, kept)) for at, kept in dropped.items() if at in run}
    for e in graph.equations:
        places = [e.at[:n] for n in range(1, len(e.at) + 1, 2)]
        dead = next((i for i, at in enumerate(places) if at not in alive), None)
        if dead is not None and set(places[:dead]) <= opened:
            claims[places[dead]] = Claim(partial(_absent, graph.widths[places[dead]]))
    return claims


def _operand(kept: int, *values: Value) -> list[Value]:
    return [values[kept]]


def _absent(count: int, *values: Value) -> list[Value]:
    return [None] * count
