"""``refit``: kernels that lost inputs fitted anew, by least squares, to what they gave before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from jaxcomp.core.leaves import dense, is_compressed, materialize, method_of
from jaxcomp.core.packed import unpacked
from jaxcomp.core.paths import Where, describe, leaves_with_paths, matches, some_paths
from jaxcomp.core.progress import progress
from jaxcomp.core.specs import is_number
from jaxcomp.core.types import Params, PyTree
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq.notices import FewRows
from jaxcomp.ptq.reconstruction.batches import check_trees, read
from jaxcomp.ptq.reconstruction.products import Case, Functions, Statistics
from jaxcomp.trace.cut_specs import Cuts, Single
from jaxcomp.trace.cuts import Block, Values, arrays_in, cut
from jaxcomp.trace.walk import Fn

OWNER = "refit"
Matrix = NDArray[np.float64]


class SiteError(NamedTuple):
    """How far a product is from the float network's: squared errors over the target's square, on the given batches.

    Attributes:
      path: of the leaf.
      before, after: of the kernel as it was, and as fitted anew; both on inputs of the pruned network.
    """

    path: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Refitted:
    """What :func:`refit` gives.

    Attributes:
      params: the tree.
      sites: the errors of each leaf that was fitted, in the program's order.
      left: leaves that were to be fitted and stay as they were, as their rows are not read: in a loop that is not over
        layers, in a branch, multiplied in more ways than one, or in several blocks.
    """

    params: Params
    sites: tuple[SiteError, ...]
    left: tuple[str, ...] = ()

    def __repr__(self) -> str:
        errors = [f"{s.before:.3e} -> {s.after:.3e}  {s.path!r}" for s in self.sites]
        return "\n".join(errors + [f"left as it was: {path!r}, whose rows are not read" for path in self.left])


def refit(
    fn: Fn,
    params: Params,
    pruned: Params,
    *,
    batches: Iterable[PyTree],
    where: Where | None = None,
    damping: float = 1e-3,
    cuts: Cuts = Single(),  # noqa: B008 - frozen
) -> Refitted:
    """Kernels of ``pruned`` fitted by least squares to the products of ``fn(params, …)``, one after another.

    For a leaf whose rows ``x`` gave ``y = x W`` in the float network and are ``x'`` in the pruned one, behind the
    leaves that were fitted before it,

        ``argmin Σ |y - x' W'|² + δ |W' - W|²``

    over the elements of ``W'`` that are left: rows and columns of zeros stay zeros, and so does what a mask takes. So
    channels, or single weights, that were removed are made up for by those that stay: for a given mask nothing gives a
    smaller error. Shrink the result: ``plan.take(refitted.params)`` with ``shrink(fn, plan)`` gives
    what it gives.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      params: its parameters, whose products are the target.
      pruned: the tree with units removed: arrays of the same shapes with zeros, as ``mask(plan)(params)`` makes them,
        or ``Masked`` leaves.
      batches: of what ``fn`` takes behind the parameters: a tuple of arguments, or the only one, all of the same
        shapes.
      where: the leaves to fit; None is those that lost rows, and those that are ``Masked``.
      damping: ``δ`` as a multiple of the mean of ``x'``'s squares over inputs; it keeps what the batches do not
        determine.
      cuts: where a block begins; what enters one is kept for all batches.

    Raises:
      ValueError: no leaf is to be fitted, trees or batches of other shapes, a rule that matches nothing, values that
        are not finite, or a damping that is no positive number.

    >>> p = {"a": jnp.eye(3), "b": jnp.ones((3, 1))}
    >>> f = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> pruned = {"a": jnp.diag(jnp.array([1.0, 1.0, 0.0])), "b": jnp.array([[1.0], [1.0], [0.0]])}
    >>> x = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [2.0, 1.0, 2.0]])  # the third input is the first
    >>> refit(f, p, pruned, batches=[x], damping=1e-6).params["b"].round(3).tolist()
    [[2.0], [1.0], [0.0]]

    Source: He et al. 2017, arXiv:1707.06168, equation 3, for channels, and PocketFlow's channel pruning; for masks
    of elements the least squares that SparseGPT, arXiv:2301.00774, equation 2, approximates. Deviation: damped toward
    the weights as they were.
    """
    if not is_number(damping) or not 0 < damping < np.inf:
        raise ValueError(f"{OWNER}: damping must be a positive number, got {damping!r}.")
    cases = read(batches, OWNER)
    check_trees(params, pruned, OWNER, "pruned")
    exact: list[Values] = [()] * len(cases)
    values = exact
    arrays = [arrays_in(case) for case in cases]
    blocks = cut(fn, cuts)(params, *cases[0])
    walk = _Walk(materialize(params), pruned, where, damping)
    walk.several = _of_several(blocks)
    with progress("refit: blocks", len(blocks)) as advance:
        for block in blocks:
            rests = [block.rest(x) for x in arrays]
            exact, values = walk.block(block, list(map(Case, exact, values, rests)))
            advance(1)
    return walk.result()


class _Walk:
    """The leaves so far, and the errors of those that were fitted."""

    def __init__(self, params: Params, pruned: Params, where: Where | None, damping: float) -> None:
        self.params, self.where, self.damping = params, where, damping
        named, self.treedef = leaves_with_paths(pruned, is_leaf=is_compressed)
        self.leaves = dict(named)
        self.fitted: list[SiteError] = []
        self.left: list[str] = []
        self.several: frozenset[str] = frozenset()
        self.compiled: dict[str, Functions] = {}

    def block(self, block: Block, cases: list[Case]) -> tuple[list[Values], list[Values]]:
        """Fits the block's leaves; gives what leaves it in both networks."""
        functions = self.compiled.setdefault(block.shape, Functions(block))
        exact = block.weights(self.params)
        done = {site.path for site in self.fitted}
        for n, summed in functions.leaves.items():
            path = block.paths[n]
            if path not in done and self.chosen(path, exact[n], summed):
                if path in self.several:  # fitted to one block it would be wrong in the others
                    self.left += [path] if path not in self.left else []
                    continue
                now = self.now(block)
                self.fit(path, functions.over(n, [(exact, now, case) for case in cases]))
        now, give = self.now(block), functions.give
        return [give(exact, c.exact, c.rest) for c in cases], [give(now, c.values, c.rest) for c in cases]

    def now(self, block: Block) -> tuple[jax.Array, ...]:
        """The block's leaves as arrays, those that were fitted as they are by now."""
        return tuple(dense(self.leaves[path]) for path in block.paths)

    def chosen(self, path: str, was: jax.Array, summed: tuple[int, ...]) -> bool:
        """Whether a leaf is to be fitted: by the rule, or as it has a mask or lost an index that is summed over."""
        if self.where is not None:
            return matches(self.where, path, was)
        leaf = self.leaves[path]
        before, after = np.asarray(was) != 0, np.asarray(dense(leaf)) != 0
        others = [tuple(i for i in range(before.ndim) if i != axis) for axis in summed]
        return isinstance(leaf, Masked) or any((before.any(o) & ~after.any(o)).any() for o in others)

    def fit(self, path: str, found: Statistics | None) -> None:
        """Puts a leaf that was fitted anew in its place."""
        leaf = self.leaves[path]
        if found is None:
            self.left.append(path)
            return
        if is_compressed(leaf) and not (isinstance(leaf, Masked) and not is_compressed(leaf.values)):
            raise ValueError(f"{OWNER}: {path!r} is compressed already ({method_of(leaf)}); refit first, then that.")
        square, w = found.square, found.matrices(np.asarray(dense(leaf), np.float64))
        if not (np.isfinite(found.second).all() and np.isfinite(found.cross).all()):
            raise ValueError(f"{OWNER}: what enters or leaves {path!r} is not finite; look at the batches.")
        mask = np.broadcast_to(unpacked(leaf.mask), leaf.shape) if isinstance(leaf, Masked) else None
        support = _support(w, None if mask is None else found.matrices(np.asarray(mask, np.float64)))
        needed = int(support.sum(-2).max())
        if found.count < needed:
            warnings.warn(
                f"{OWNER}: {path!r} has {needed} inputs left and saw {found.count:.0f} rows; calibrate on {needed} rows"
                " at least. What they do not determine stays as it was.",
                FewRows,
                stacklevel=5,
            )
        parts = zip(found.second, found.cross, w, support, strict=True)
        new = np.stack([_solved(*part, self.damping) for part in parts])
        errors = [max(_squared(found, x) + square, 0.0) / (square or 1.0) for x in (w, new)]
        self.fitted.append(SiteError(path, *errors))
        array = jnp.asarray(found.leaf(new), leaf.dtype)
        self.leaves[path] = replace(leaf, values=array) if isinstance(leaf, Masked) else array

    def result(self) -> Refitted:
        """The tree; an error where nothing was fitted."""
        if not self.fitted:
            rule = "no leaf lost rows or is masked" if self.where is None else f"{describe(self.where)} matches none"
            also = f"; {some_paths(self.left)} have no rows that are read" if self.left else ""
            raise ValueError(f"{OWNER}: there is nothing to fit: {rule}{also}; name leaves by where=.")
        return Refitted(self.treedef.unflatten(self.leaves.values()), tuple(self.fitted), tuple(self.left))


def _of_several(blocks: Sequence[Block]) -> frozenset[str]:
    """The leaves that products of more than one block multiply."""
    own = [{block.paths[int(site.leaf)] for site in block.own_sites if site.leaf is not None} for block in blocks]
    every = [path for paths in own for path in paths]
    return frozenset(path for path in every if every.count(path) > 1)


def _support(w: Matrix, mask: Matrix | None) -> NDArray[np.bool_]:
    """Where elements may be: in rows and columns that are not all zeros, and where a mask has them."""
    kept = np.any(w, axis=-1, keepdims=True) & np.any(w, axis=-2, keepdims=True)
    return kept if mask is None else kept & (mask != 0)


def _solved(second: Matrix, cross: Matrix, w: Matrix, support: NDArray[np.bool_], damping: float) -> Matrix:
    """Each column fitted over the rows that it has; columns with the same rows are solved for at once."""
    delta = damping * np.mean(np.diag(second))
    if not delta:
        return w
    damped, wanted = second + delta * np.eye(len(second)), cross + delta * w
    new = np.zeros_like(w)
    patterns, which = np.unique(support, axis=1, return_inverse=True)
    for i, rows in enumerate(patterns.T):
        at = np.ix_(rows, which.ravel() == i)
        if rows.any():
            new[at] = scipy.linalg.solve(damped[np.ix_(rows, rows)], wanted[at], assume_a="pos")
    return new


def _squared(found: Statistics, w: Matrix) -> float:
    """``Σ |x' w|² - 2 Σ y · x' w``."""
    return float(np.einsum("...ij,...ik,...jk->", found.second, w, w, optimize=True) - 2 * np.vdot(found.cross, w))
