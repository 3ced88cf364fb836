"""Where a program is cut into blocks, and each block as a function of its own parameters and what enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths, some_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.trace import walk
from jaxcomp.trace.cut_specs import Cuts, Layers, Scopes, Single
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.program import Program, is_array_like, program_of, shapes_of, trace
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn, Value

OWNER = "cut"
Values = tuple[jax.Array, ...]
"""What crosses a cut, in the program's order."""


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a program, between two cuts.

    Attributes:
      sites: paths of its sites, as ``sites(fn)`` names them.
      paths: the parameter leaves that it reads.
      program: of ``(weights, values, rest)``, tuples: the leaves of ``paths``, what enters at the cut, and the arrays
        of the function's arguments and the whole program's constants that it reads.
      reads: which arrays of the function's arguments it reads, in the order of their leaves.
      constants: what it reads of the program's constants.
    """

    sites: tuple[str, ...]
    paths: tuple[str, ...]
    program: Program
    reads: tuple[int, ...]
    constants: Values

    @property
    def name(self) -> str:
        """Its sites, as far as a line holds them."""
        return some_paths(self.sites, 3)

    @cached_property
    def shape(self) -> str:
        """The text of its program, and how its inputs lie: blocks of the same one compute the same function of them."""
        return f"{self.program.in_tree} {self.program.jaxpr.jaxpr}"

    @cached_property
    def own_sites(self) -> tuple[Site, ...]:
        """Its sites as its own program has them, whose leaves are numbered."""
        return sites_of(self.program)

    def weights(self, params: Params) -> tuple[Leaf, ...]:
        """The leaves that it reads, from the whole tree; compressed ones as they are."""
        named = dict(leaves_with_paths(params, is_leaf=is_compressed)[0])
        missing = [path for path in self.paths if path not in named]
        if missing:
            raise ValueError(f"{OWNER}: the tree has no {some_paths(missing)}, which the block {self.name} reads.")
        return tuple(named[path] for path in self.paths)

    def rest(self, arrays: Sequence[jax.Array]) -> Values:
        """What it reads besides, from all arrays in the function's arguments."""
        return (*(arrays[i] for i in self.reads), *self.constants)

    def __call__(self, params: Params, values: Values, *args: PyTree) -> Values:
        """What leaves the block.

        Args:
          params: the whole tree, of arrays.
          values: what enters it: what the block before gave; the first takes ().
          args: the function's arguments.
        """
        return self.of(params, values, arrays_in(args))

    def of(self, params: Params, values: Values, arrays: Sequence[jax.Array]) -> Values:
        """What leaves the block, from all arrays in the function's arguments."""
        return self.between(self.weights(params), values, self.rest(arrays))

    def between(self, weights: tuple[Leaf, ...], values: Values, rest: Values) -> Values:
        """What leaves the block, from all that its program takes: see ``program``."""
        return tuple(evaluate(self.program, {}, self.program.flatten(weights, values, rest)).out)

    def __repr__(self) -> str:
        return f"<Block {self.name}>"


def arrays_in(args: PyTree) -> list[jax.Array]:
    """The arrays in a function's arguments, in order."""
    return [x for x in jax.tree.leaves(args) if is_array_like(x)]


class Blocks(tuple[Block, ...]):
    """The blocks in order; what the last gives are the arrays of the function's result, ``result`` puts them together.

    Invariant: for ``values = ()``, and ``values = block(params, values, *args)`` of each in turn, ``result(values)`` is
    ``fn(params, *args)``.
    """

    whole: Program

    def result(self, values: Values) -> PyTree:
        """The function's result from what the last block gives."""
        return self.whole.unflatten(values)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))


def cut(fn: Fn, cuts: Cuts = Single()) -> Callable[..., Blocks]:  # noqa: B008 - frozen
    """``fn(params, *args)`` as blocks, each a pure function of the parameters and of what the block before gave.

    A cut is a place in the program: what crosses it are the values that were computed from parameters and arguments
    and are read behind it. What needs parameters alone, or arguments alone (a mask), is computed where it is read. A
    scan over stacked layers is one equation, and so in one block.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      cuts: where.

    Raises:
      TypeError: ``cuts`` is nothing of the kind.
      ValueError: the function has no site.

    >>> def net(p, x):
    ...     x = x @ p["stem"]
    ...     x = x + jax.nn.relu(x @ p["a"]) @ p["b"]
    ...     return jnp.tanh(x) @ p["head"]
    >>> p, x = {name: jnp.eye(2) for name in ("stem", "a", "b", "head")}, jnp.ones((1, 2))
    >>> blocks = cut(net)(p, x)
    >>> [block.sites for block in blocks]
    [('stem',), ('a', 'b'), ('head',)]
    >>> values = ()
    >>> for block in blocks:
    ...     values = block(p, values, x)
    >>> bool((blocks.result(values) == net(p, x)).all())
    True
    """
    if not isinstance(cuts, Cuts):
        raise TypeError(f"{OWNER}: cuts must be Single(), Layers() or Scopes(pattern), got {cuts!r}.")

    @wraps(fn)
    def blocks(params: Params, *args: PyTree) -> Blocks:
        whole = trace(fn, shapes_of(params), *args)
        if not sites_of(whole):
            raise ValueError(f"{OWNER}: the function has no site, so there is nothing to cut.")
        found = Blocks(_Cutter(whole).blocks(cuts))
        found.whole = whole
        return found

    return blocks


def _opened(whole: Program) -> Program:
    """The program without jits around its equations, of all its parameters and of all its arguments."""
    n = len(whole.param_paths)
    avals = walk.shapes_of(whole.jaxpr.jaxpr.invars)

    def opened(params: Sequence[jax.Array], rest: Sequence[jax.Array]) -> list[Value]:
        return whole.results(evaluate(whole, {}, [*params, *rest], inline=True).out)

    return trace(opened, avals[:n], avals[n:])


class _Cutter:
    """A flat program, the names of its sites, and what crosses each of its places."""

    def __init__(self, whole: Program) -> None:
        self.paths = whole.param_paths
        self.program = _opened(whole)
        self.jaxpr = self.program.jaxpr.jaxpr
        self.names: dict[int, list[str]] = {}
        for site, named in zip(sites_of(self.program), sites_of(whole), strict=True):
            self.names.setdefault(int(site.location[0]), []).append(named.path)
        self.mixed = _mixed(self.jaxpr, len(self.paths))
        self.crossing = _crossing(self.jaxpr, self.mixed)

    def blocks(self, cuts: Cuts) -> list[Block]:
        """The blocks, in order."""
        places = self.places(cuts)
        return [self.block(a, b) for a, b in pairwise([0, *places, len(self.jaxpr.eqns)])]

    def places(self, cuts: Cuts) -> list[int]:
        """The numbers of the equations that begin a block, without the first."""
        at = [i for i in sorted(self.names) if any(v in self.mixed for v in self.jaxpr.eqns[i].outvars)]
        found, first = [], 0  # of the site that the block which is being made begins with
        for here, after in pairwise(range(len(at))):
            least = min(len(self.crossing[i]) for i in range(at[here], at[after]))
            free = [i + 1 for i in range(at[here], at[after]) if len(self.crossing[i]) == least]
            if least > 1 and not isinstance(cuts, Layers):
                continue
            if isinstance(cuts, Scopes):
                text = cuts.of(self.names[at[first]][0])
                if text is not None and text == cuts.of(self.names[at[after]][0]):
                    continue
            found += sorted({free[0], free[-1]}) if cuts == Single(apart=True) else free[-1:]
            first = after
        if cuts == Single(apart=True):
            behind = range(at[-1], len(self.jaxpr.eqns) - 1)
            found += [i + 1 for i in behind if len(self.crossing[i]) == 1][:1]
        return found

    def block(self, start: int, stop: int) -> Block:
        """The equations from ``start`` to ``stop``, and those that need parameters or arguments alone."""
        entering = self.crossing[start - 1] if start else ()
        leaving = self.crossing[stop - 1] if stop < len(self.jaxpr.eqns) else self.jaxpr.outvars
        chosen, needed = self.behind(leaving, entering, stop)
        params = [i for i, v in enumerate(self.jaxpr.invars[: len(self.paths)]) if v in needed]
        reads = [i for i, v in enumerate(self.jaxpr.invars[len(self.paths) :]) if v in needed]
        constants = [i for i, v in enumerate(self.jaxpr.constvars) if v in needed]
        variables = (
            [self.jaxpr.invars[i] for i in params],
            [*entering],
            [*(self.jaxpr.invars[len(self.paths) + i] for i in reads), *(self.jaxpr.constvars[i] for i in constants)],
        )
        inputs = [v for some in variables for v in some]
        eqns = [self.jaxpr.eqns[i] for i in chosen]
        debug = core.DebugInfo("jaxcomp", "block", ("",) * len(inputs), ("",) * len(leaving))
        own = core.Jaxpr((), inputs, [*leaving], eqns, self.jaxpr.effects, debug)

        def run(*groups: Values) -> Values:
            return tuple(jax.core.eval_jaxpr(own, (), *(x for group in groups for x in group)))

        program = program_of(run, *(tuple(walk.shapes_of(some)) for some in variables))
        names = tuple(name for i in chosen for name in self.names.get(i, ()))
        values = tuple(jnp.asarray(self.program.jaxpr.consts[i]) for i in constants)
        return Block(names, tuple(self.paths[i] for i in params), program, tuple(reads), values)

    def behind(
        self, leaving: Iterable[core.Var | core.Literal], entering: Iterable[core.Var], stop: int
    ) -> tuple[list[int], set[core.Var]]:
        """The equations before ``stop`` that lead from ``entering`` to ``leaving``; and what they read besides."""
        known = set(entering)
        needed = {v for v in leaving if isinstance(v, core.Var)} - known
        chosen = []
        for i in reversed(range(stop)):
            eqn = self.jaxpr.eqns[i]
            if needed.isdisjoint(eqn.outvars):
                continue
            chosen.append(i)
            needed.update(v for v in eqn.invars if isinstance(v, core.Var) and v not in known)
        return chosen[::-1], needed


def _mixed(jaxpr: core.Jaxpr, params: int) -> set[core.Var]:
    """The variables that are computed from parameters and arguments both."""
    of_params, of_args = set(jaxpr.invars[:params]), set(jaxpr.invars[params:])
    for eqn in jaxpr.eqns:
        for kind in (of_params, of_args):
            if any(isinstance(v, core.Var) and v in kind for v in eqn.invars):
                kind.update(eqn.outvars)
    return of_params & of_args


def _crossing(jaxpr: core.Jaxpr, mixed: set[core.Var]) -> list[tuple[core.Var, ...]]:
    """Behind each equation, the mixed variables that are read later."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
    last.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)})
    crossing: list[tuple[core.Var, ...]] = []
    here: tuple[core.Var, ...] = ()
    for i, eqn in enumerate(jaxpr.eqns):
        made = (v for v in eqn.outvars if v in mixed)
        here = tuple(v for v in (*here, *made) if last.get(v, i) > i)
        crossing.append(here)
    return crossing
