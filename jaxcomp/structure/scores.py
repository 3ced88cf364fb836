"""Scores of units: how much each matters. The lowest go first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.paths import Where, describe, leaves_with_paths, matches, matrices
from jaxcomp.structure.groups import Group, Groups, Slice

UnitScores = tuple[NDArray[np.float64], ...]
"""One array a group: shape (units,), or (layers, units) where each layer of a stack keeps its own."""
Score = Callable[[Groups, Any], UnitScores]
"""From groups and the parameter tree to a score for each unit."""
Reduce = Literal["sum", "mean"]


def l1(*, reduce: Reduce = "sum", where: Where = matrices) -> Score:
    """``sum |w|`` over a unit's slices. Li et al. 2017, arXiv:1608.08710, over whole groups as in DepGraph.

    Args:
      reduce: how the slices of a group combine: their sum, or their mean over slices.
      where: the parameters that count; a group in which it selects none is scored by all of its parameters.
    """
    return _elementwise(lambda w, _: np.abs(w), reduce, where)


def l2(*, reduce: Reduce = "sum", where: Where = matrices) -> Score:
    """``sqrt(sum w^2)`` over a unit's slices; arguments as ``l1``. DepGraph, Fang et al. 2023, arXiv:2301.12900."""
    squares = _elementwise(lambda w, _: np.square(w), reduce, where)
    return lambda groups, params: tuple(np.sqrt(s) for s in squares(groups, params))


def gradient(grads: Any, *, reduce: Reduce = "sum", where: Where = matrices) -> Score:
    """``sum |∂L/∂w|`` over a unit's slices; ``grads`` is a tree like the parameters (at least where it selects)."""
    return _elementwise(lambda _, g: np.abs(g), reduce, where, grads)


def taylor(grads: Any, *, reduce: Reduce = "sum", where: Where = matrices) -> Score:
    """``sum |w · ∂L/∂w|`` over a unit's slices. Molchanov et al. 2016, arXiv:1611.06440; arguments as ``gradient``."""
    return _elementwise(lambda w, g: np.abs(w * g), reduce, where, grads)


def fisher(example_grads: Any, *, reduce: Reduce = "sum", where: Where = matrices) -> Score:
    """``mean_n (sum w · ∂L_n/∂w)^2``: the square is of a unit's whole sum, for each example n.

    Args:
      example_grads: the gradients of single examples (or batches): a tree like the parameters with one more axis,
        the examples, in front of every leaf.

    Source: group Fisher pruning, Liu et al. 2021, arXiv:2108.00708.
    """
    named = dict(leaves_with_paths(example_grads)[0])

    def score(groups: Groups, params: Any) -> UnitScores:
        count = min(len(g) for g in named.values())
        sums = []
        for n in range(count):
            one = {path: np.asarray(g)[n] for path, g in named.items()}
            sums.append(_elementwise(lambda w, g: w * g, reduce, where, one)(groups, params))
        return tuple(np.mean([np.square(s[i]) for s in sums], axis=0) for i in range(len(groups)))

    return score


def batch_norm_scale(where: Where, *, reduce: Reduce = "sum") -> Score:
    """``|γ|`` of the scales that ``where`` selects; network slimming, Liu et al. 2017, arXiv:1708.06519.

    A group without such a scale gets infinite scores: it is pruned last.
    """

    def score(groups: Groups, params: Any) -> UnitScores:
        leaves = _leaves(groups, params)
        if not any(matches(where, path, leaf) for path, leaf in leaves.items()):
            raise ValueError(
                f"batch_norm_scale: the rule {describe(where)} matches no parameter; found {', '.join(leaves)}."
            )
        return tuple(
            _combine(group, [(s, np.abs(leaves[s.path])) for s in mine], reduce)
            if (mine := [s for s in group.slices if matches(where, s.path, leaves[s.path])])
            else np.full(_shape(group), np.inf)
            for group in groups
        )

    return score


def fpgm(*, where: Where = matrices) -> Score:
    """``sum_j ||w_i - w_j||``: a unit near all others is replaceable. He et al. 2019, arXiv:1811.00250.

    A unit is the vector of all its weights that ``where`` selects; in a stack each layer is measured by itself.
    """

    def score(groups: Groups, params: Any) -> UnitScores:
        leaves = _leaves(groups, params)
        scores = []
        for group in groups:
            square = np.zeros((group.layers or 1, group.units, group.units))
            for s in _selected(group, leaves, where):
                square += _distances(group, s, leaves[s.path])
            total = np.sqrt(np.maximum(square, 0)).sum(-1)
            scores.append(total if group.layers else total[0])
        return tuple(scores)

    return score


def _distances(group: Group, s: Slice, leaf: NDArray[Any]) -> NDArray[np.float64]:
    """Squared distances between units along one slice, shape (layers or 1, units, units)."""
    w = leaf if group.layers else leaf[None]
    axis = s.axis if group.layers else s.axis + 1
    order = np.argsort(s.unit_of, kind="stable")
    order = order[s.unit_of[order] >= 0]
    rows = np.moveaxis(np.take(w, order, axis), axis, 1).reshape(len(w), group.units, -1).astype(np.float64)
    norm = np.square(rows).sum(-1)
    return norm[:, :, None] + norm[:, None, :] - 2 * rows @ rows.swapaxes(1, 2)


def _elementwise(f: Callable[[Any, Any], NDArray[Any]], reduce: Reduce, where: Where, grads: Any = None) -> Score:
    """A score that is a sum over a unit's elements of ``f(weight, gradient)``."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f"score: reduce must be 'sum' or 'mean', got {reduce!r}.")

    def score(groups: Groups, params: Any) -> UnitScores:
        leaves = _leaves(groups, params)
        given = None if grads is None else dict(leaves_with_paths(grads)[0])

        def value(path: str) -> NDArray[Any]:
            g = None
            if given is not None:
                if path not in given or np.shape(given[path]) != leaves[path].shape:
                    raise ValueError(f"score: there is no gradient of shape {leaves[path].shape} for {path!r}.")
                g = np.asarray(given[path], np.float32)
            return f(leaves[path], g)

        return tuple(
            _combine(group, [(s, value(s.path)) for s in _selected(group, leaves, where)], reduce) for group in groups
        )

    return score


def _leaves(groups: Groups, params: Any) -> dict[str, NDArray[np.float32]]:
    touched = dict.fromkeys(s.path for group in groups for s in group.slices)
    named = dict(leaves_with_paths(params)[0])
    for path in touched:
        if path not in named or np.shape(named[path]) != groups.shapes[path]:
            found = np.shape(named[path]) if path in named else "no such leaf"
            raise ValueError(f"score: {path!r} must have shape {groups.shapes[path]} as in the groups, found {found}.")
    return {path: np.asarray(named[path], np.float32) for path in named if path in touched}


def _selected(group: Group, leaves: dict[str, NDArray[np.float32]], where: Where) -> Sequence[Slice]:
    return [s for s in group.slices if matches(where, s.path, leaves[s.path])] or group.slices


def _shape(group: Group) -> tuple[int, ...]:
    return (group.layers, group.units) if group.layers else (group.units,)


def _combine(group: Group, parts: list[tuple[Slice, NDArray[Any]]], reduce: Reduce) -> NDArray[np.float64]:
    """Sums elementwise scores over each unit's indices, and over or across slices."""
    total = np.zeros(_shape(group))
    for s, value in parts:
        others = tuple(d for d in range(value.ndim) if d != s.axis and not (group.layers and d == 0))
        along = value.astype(np.float64).sum(others)
        mine = s.unit_of >= 0
        rows = np.zeros_like(total)
        np.add.at(rows.T, s.unit_of[mine], along[..., mine].T)
        total += rows
    return total / len(parts) if reduce == "mean" else total
