"""What least squares of a leaf need: moments of its rows in one network, and their products with another's results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.roles import CONTRACTED, SPATIAL
from jaxcomp.trace.collect import NoSite
from jaxcomp.trace.cuts import Block, Values
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid, zeros
from jaxcomp.trace.matrices import matrices_of
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.rows import Moments, row_moments
from jaxcomp.trace.sites import Site

Matrix = NDArray[np.float64]
Arrays = tuple[jax.Array, ...]
_ADDED = Monoid(zeros, lambda a, b: jax.tree.map(jnp.add, a, b))


class Case(NamedTuple):
    """One batch of a block: what enters it in both networks, and what it reads besides."""

    exact: Values
    values: Values
    rest: Values


class Statistics:
    """Sums over all batches, of a leaf ``W`` whose rows are ``x'`` and whose products should be ``y``.

    Attributes:
      second, cross: ``Σ x' x'ᵀ`` and ``Σ x' yᵀ``, of shapes (k, n, n) and (k, n, m); k counts the parts of the leaf
        that have rows of their own.
      square: ``Σ |y|²``.
      count: the rows of the part that saw fewest.
    """

    def __init__(self, moments: Moments, cross: jax.Array, square: jax.Array) -> None:
        self.axes, self.shape = matrices_of(moments, cross.ndim), tuple(cross.shape)
        self.cross = self.matrices(np.asarray(cross, np.float64))
        n = self.cross.shape[1]
        self.second = np.asarray(moments.second, np.float64).reshape(-1, n, n)
        self.square, self.count = float(square), float(jnp.min(moments.count))

    def matrices(self, leaf: Matrix) -> Matrix:
        """An array of the leaf's shape as (k, n, m)."""
        return self.axes.of(leaf)

    def leaf(self, matrices: Matrix) -> Matrix:
        """The inverse of :meth:`matrices`."""
        return self.axes.back(matrices, self.shape)


class Functions:
    """The compiled functions of all blocks that have the same program."""

    def __init__(self, block: Block) -> None:
        self.program = block.program
        self.ops = {op.location: op for op in self.program.flow.ops}
        self.give = jax.jit(self.run)
        self.sites: dict[int, list[Site]] = {}
        for site in block.own_sites:
            if site.leaf is not None:
                self.sites.setdefault(int(site.leaf), []).append(site)
        self.compiled: dict[int, Callable[..., tuple[Moments, jax.Array, jax.Array]]] = {}

    @cached_property
    def leaves(self) -> dict[int, tuple[int, ...]]:
        """The leaves that products multiply, in the program's order, and the axes that are summed over."""
        roles = {n: sites[0].operands[sites[0].weight or 0].leaf_roles for n, sites in self.sites.items()}
        return {n: tuple(i for i, r in enumerate(own) if r in (CONTRACTED, SPATIAL)) for n, own in roles.items()}

    def run(self, weights: Arrays, values: Values, rest: Values) -> Values:
        """What leaves the block."""
        flat = self.program.flatten(weights, values, rest)
        return tuple(evaluate(self.program, {}, flat).out)

    def over(self, n: int, cases: Iterable[tuple[Arrays, Arrays, Case]]) -> Statistics | None:
        """The statistics of leaf ``n`` over batches, each with the leaves of both networks; None where it has none."""
        if not all(map(self.seen, self.sites[n])):
            return None
        if n not in self.compiled:
            self.compiled[n] = jax.jit(lambda *given: self.one(n, *given))
        try:
            found = [self.compiled[n](*case) for case in cases]
        except NoRows:
            return None
        total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), 0), *found)
        return Statistics(*total)

    def seen(self, site: Site) -> bool:
        """Whether each of its results can be kept: it is in no loop but over layers, and in no branch."""
        loops = self.ops[site.location].loops
        return BARRED.isdisjoint(site.inside) and "cond" not in site.inside and all(loop.layers for loop in loops)

    def one(self, n: int, exact: Arrays, now: Arrays, case: Case) -> tuple[Moments, jax.Array, jax.Array]:
        """The statistics of one batch."""
        target = self.results(n, exact, (case.exact, case.rest))

        def agreement(leaf: jax.Array) -> jax.Array:
            weights = (*now[:n], leaf, *now[n + 1 :])
            claims = {s.location: Claim(_agreeing(self.ops[s.location], s), target[s.path]) for s in self.sites[n]}
            flat = self.program.flatten(weights, case.values, case.rest)
            found = evaluate(self.program, claims, flat, collect=_ADDED).aux
            return sum((jnp.sum(x) for x in found.values()), jnp.float32(0))

        cross = jax.grad(agreement)(now[n])
        square = sum((jnp.sum(jnp.square(y)) for y in target.values()), jnp.float32(0))
        try:
            moments = row_moments(self.run, rf"{n}")(now, case.values, case.rest)
        except NoSite as e:
            raise NoRows from e
        if str(n) not in moments:  # multiplied in more ways than one
            raise NoRows
        return moments[str(n)], cross, square

    def results(self, n: int, weights: Arrays, given: tuple[Values, Values]) -> dict[str, jax.Array]:
        """What the products of leaf ``n`` give, by site."""

        def kept(op: Op, site: Site) -> Claim:
            def run(*values: jax.Array) -> Emitted:
                (y,) = op.bind(*values)
                return Emitted([y], {site.path: y})

            return Claim(run)

        claims = {site.location: kept(self.ops[site.location], site) for site in self.sites[n]}
        flat = self.program.flatten(weights, *given)
        return evaluate(self.program, claims, flat, collect=_ADDED).aux


class NoRows(Exception):
    """A leaf has no rows that are read."""


def _agreeing(op: Op, site: Site) -> Callable[..., Emitted]:
    """Emits ``Σ y · (x W)``, whose gradient by W is ``Σ x yᵀ``."""

    def run(target: jax.Array, *values: jax.Array) -> Emitted:
        held: Sequence[jax.Array] = [
            jax.lax.stop_gradient(x) if i in site.activations else x for i, x in enumerate(values)
        ]
        (y,) = op.bind(*held)
        return Emitted([y], {site.path: jnp.sum(y.astype(jnp.float32) * target.astype(jnp.float32))})

    return run
