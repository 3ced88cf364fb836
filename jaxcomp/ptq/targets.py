"""What a leaf should give: what it gave in the float network, though other rows reach it now."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.roles import BATCH, OUTPUT, STACKED
from jaxcomp.core.specs import is_number
from jaxcomp.core.types import PyTree
from jaxcomp.ptq.rewrites.biases import Biases, result_channels
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid, Watch, zeros
from jaxcomp.trace.matrices import matrices_of
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.rows import Moments
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.walk import Fn, Location, aval_of

Matrix = NDArray[np.float64]
Given = tuple[PyTree, ...]
"""Parameters and arguments."""
_ROUNDED = 1e-6
"""Of the moments' mean diagonal: what float32 may get wrong."""
_ADDED = Monoid(zeros, lambda a, b: jax.tree.map(jnp.add, a, b))


@dataclass(frozen=True)
class Exact:
    """Leaves are to give what they gave in the float network, on the rows that reached them there.

    Args:
      damping: added to the diagonal of the rows' second moments, as a fraction of its mean: it holds a leaf where the
        rows say little.
      biases: a bias behind a leaf, an array that is used nowhere else, takes what the mean of the result is off by.
      stream: where the result is added to a residual stream, the sum is the target: the leaf makes up for what the
        stream carries on.

    Raises:
      ValueError: a damping that is no positive number.
    """

    damping: float = 0.03
    biases: bool = True
    stream: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.damping) or not 0 < self.damping < math.inf:
            raise ValueError(f"Exact: damping must be a positive number, got {self.damping!r}.")


class Gap(NamedTuple):
    """How far a leaf's results are from their targets, over rows: sums.

    Fields:
      cross: ``Σ x' (y - y')ᵀ``, laid out as the leaf.
      first: ``Σ (y - y')``, over all but the channels of a bias; None where the leaf has none of its own.
    """

    cross: jax.Array
    first: jax.Array | None


class Target(NamedTuple):
    """Where what a product gives is compared, and the bias that is added to it.

    Fields:
      site, op: the product.
      at: the equation whose result is compared: the product, or the sum with a residual stream.
      bias: the path of its own bias; None where it has none.
      channels: the axes of the result that are the bias's.
    """

    site: Site
    op: Op
    at: Location
    bias: str | None
    channels: tuple[int, ...]


def targets_of(program: Program, held: Collection[str], wanted: Sequence[str], how: Exact) -> dict[str, list[Target]]:
    """The products of each leaf, by path; a leaf that some product hides is left out.

    Args:
      program: of the function.
      held: paths of leaves that stay as they are, though they be biases.
      wanted: paths of leaves.
      how: what is to be made up for.
    """
    ops = {op.location: op for op in program.flow.ops}
    users: dict[core.Var, list[Op]] = {}
    for op in program.flow.ops:
        for v in op.eqn.invars:
            if not isinstance(v, core.Literal):
                users.setdefault(v, []).append(op)
    biases = Biases(program, held)
    found: dict[str, list[Target]] = {path: [] for path in wanted}
    hidden = set[str]()
    for site in sites_of(program):
        if site.leaf not in found or site.weight is None:
            continue
        op = ops[site.location]
        if not BARRED.isdisjoint(site.inside) or "cond" in site.inside or not all(loop.layers for loop in op.loops):
            hidden.add(site.leaf)
            continue
        bias = biases.of(site, op) if how.biases and _in_order(site, op) else None
        at = _stream(op, users) if how.stream else None
        found[site.leaf].append(Target(site, op, op.location if at is None else at, bias, result_channels(site, op)))
    return {path: each for path, each in found.items() if each and path not in hidden}


def _in_order(site: Site, op: Op) -> bool:
    """Whether the columns of the leaf, one matrix a layer, are in the order of the results."""
    weight, origin = site.operands[site.weight or 0], op.tags[site.weight or 0].origin
    stacked = sum(role == STACKED for role in weight.leaf_roles)
    if origin is None or BATCH in weight.leaf_roles or stacked != len(site.layer_steps):
        return False
    axes = [a for i, role in enumerate(weight.roles) if role == OUTPUT for a in origin.axes[i]]
    return axes == sorted(axes)


def _stream(op: Op, users: Mapping[core.Var, Sequence[Op]]) -> Location | None:
    """The sum of a product's result, its bias added, and another activation of its shape."""
    v = op.eqn.outvars[0]
    shape = aval_of(v).shape
    while len(after := users.get(v, ())) == 1 and after[0].location[:-1] == op.location[:-1]:
        (user,) = after
        if user.name != "add":
            return None
        other = next(i for i, u in enumerate(user.eqn.invars) if u is not v or len(user.eqn.invars) == 1)
        v = user.eqn.outvars[0]
        if aval_of(v).shape != shape:
            return None
        if user.tags[other].args:  # an activation
            return user.location
    return None


def gaps(fn: Fn, held: Collection[str], wanted: Sequence[str], *, how: Exact) -> Callable[..., dict[str, Gap]]:
    """``gaps(chosen, exact, now)``: the :class:`Gap` of each leaf that is chosen, zeros for the others.

    ``exact`` and ``now`` are what ``fn`` takes in the float and in the compressed network, ``(params, *args)`` with a
    dense tree. The results of all products are held for one batch, in both networks.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      held: paths of leaves that stay as they are, though they be biases.
      wanted: paths of leaves, which :func:`targets_of` finds.
      how: what is to be made up for.
    """

    def run(chosen: Mapping[str, jax.Array], exact: Given, now: Given) -> dict[str, Gap]:
        params, *args = now
        program = trace(fn, params, *args)
        targets = targets_of(program, held, wanted, how)
        every = [t for each in targets.values() for t in each]
        watch = _watches(every)
        want, have = (evaluate(program, {}, program.flatten(*given), watch=watch).aux for given in (exact, now))
        gap = {path: want[path].astype(jnp.float32) - have[path].astype(jnp.float32) for path in want}
        claims = {t.op.location: Claim(_agreeing(t, chosen), gap[t.site.path]) for t in every}

        def agreement(leaves: dict[str, jax.Array]) -> jax.Array:
            named, treedef = leaves_with_paths(params)
            tree = treedef.unflatten([leaves.get(path, leaf) for path, leaf in named])
            seen = evaluate(program, claims, program.flatten(tree, *args), collect=_ADDED).aux
            return sum((jnp.sum(x) for x in seen.values()), jnp.float32(0))

        cross = jax.grad(agreement)({path: leaf for path, leaf in leaves_with_paths(params)[0] if path in targets})
        return {path: Gap(cross[path], _firsts(each, gap)) for path, each in targets.items()}

    return run


def _watches(every: Sequence[Target]) -> dict[Location, Watch]:
    by_place: dict[Location, list[str]] = {}
    for t in every:
        by_place.setdefault(t.at, []).append(t.site.path)

    def seen(names: list[str]) -> Watch:
        return lambda values, results: dict.fromkeys(names, results[0])

    return {at: seen(names) for at, names in by_place.items()}


def _agreeing(t: Target, chosen: Mapping[str, jax.Array]) -> Callable[..., Emitted]:
    """Emits ``Σ gap · (x' W)``, whose gradient by W is ``Σ x' gapᵀ``."""

    def run(gap: jax.Array, *values: jax.Array) -> Emitted:
        held = [lax.stop_gradient(x) if i in t.site.activations else x for i, x in enumerate(values)]

        def agreement(held: list[jax.Array]) -> jax.Array:
            return jnp.sum(t.op.bind(*held)[0].astype(jnp.float32) * lax.stop_gradient(gap))

        own = lax.cond(chosen[t.site.leaf or ""], agreement, lambda _: jnp.float32(0), held)
        return Emitted(t.op.bind(*map(lax.stop_gradient, values)), {t.site.path: own})

    return run


def _firsts(each: Sequence[Target], gap: Mapping[str, jax.Array]) -> jax.Array | None:
    if len(each) != 1 or each[0].bias is None:
        return None
    (t,) = each
    x, layers = gap[t.site.path], len(t.site.layer_steps)
    kept = {*range(layers), *(layers + i for i in t.channels)}
    return jnp.sum(x, axis=tuple(i for i in range(x.ndim) if i not in kept))


def fitted(leaf: jax.Array, moments: Moments, gap: Gap, how: Exact) -> jax.Array:
    """The leaf that gives its targets with the least squared error, held by damping.

    ``W + (H + λI)⁻¹ Σ x' (y - y')ᵀ``, and with a bias all of it about the means.

    Args:
      leaf: ``W``, dense.
      moments: of the rows ``x'``.
      gap: sums.
      how: the damping.
    """
    axes = matrices_of(moments, leaf.ndim)
    cross = axes.of(np.asarray(gap.cross, np.float64))
    n = cross.shape[1]
    second = np.asarray(moments.second, np.float64).reshape(-1, n, n)
    noise = _ROUNDED * np.trace(second, axis1=1, axis2=2) / n
    if gap.first is not None:
        first, count = np.asarray(moments.first, np.float64).reshape(-1, n), np.asarray(moments.count).reshape(-1)
        mean = first / np.maximum(count, 1)[:, None]
        second = second - first[:, :, None] * mean[:, None, :]
        cross = cross - mean[:, :, None] * np.asarray(gap.first, np.float64).reshape(len(cross), 1, -1)
    moved = [_solved(h, c, how.damping, least) for h, c, least in zip(second, cross, noise, strict=True)]
    new = np.asarray(leaf, np.float64) + axes.back(np.stack(moved), leaf.shape)
    return jnp.asarray(new, leaf.dtype)


def _solved(second: Matrix, cross: Matrix, damping: float, noise: float) -> Matrix:
    """Ten times the damping, and so on, where rounding errors leave no factor; nothing where all is such errors."""
    mean = float(np.mean(np.diag(second)))
    if not mean > noise:  # no row reached it, or all about the mean is rounding
        return np.zeros_like(cross)
    while True:
        try:
            factor = scipy.linalg.cho_factor(second + damping * mean * np.eye(len(second)), lower=True)
        except np.linalg.LinAlgError:
            damping *= 10
        else:
            return np.asarray(scipy.linalg.cho_solve(factor, cross), np.float64)


def shifted(moments: Moments, gap: Gap, before: jax.Array, after: jax.Array) -> Matrix:
    """What the bias behind a leaf takes: the mean of ``y - y'`` and of what the leaf's change does to its rows.

    Args:
      moments: of the rows.
      gap: sums, with ``before`` as the leaf.
      before, after: the leaf, dense.
    """
    assert gap.first is not None
    axes, count = matrices_of(moments, before.ndim), max(float(np.max(moments.count)), 1.0)
    change = axes.of(np.asarray(before, np.float64) - np.asarray(after, np.float64))
    first = np.asarray(moments.first, np.float64).reshape(len(change), -1)
    total: Matrix = np.asarray(gap.first, np.float64).reshape(len(change), -1) + np.einsum("kn,knm->km", first, change)
    return total / count
