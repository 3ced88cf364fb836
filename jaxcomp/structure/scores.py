"""Scores of units: how much each matters. The lowest go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.paths import Where, describe, is_float_array, leaves_with_paths, matches, matrices
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.pruning.scores import Score, magnitude, norm
from jaxcomp.structure.groups import Group, Groups, Slice

UnitScores = tuple[NDArray[np.float64], ...]
"""One array a group: shape (units,), or (layers, units) where each layer of a stack keeps its own."""
UnitScore = Callable[[Groups, Params], UnitScores]
"""From groups and the parameter tree to a score for each unit."""
Reduce = Literal["sum", "mean"]
Values = NDArray[np.float32]


def weights(path: str, leaf: Leaf) -> bool:
    """The default rule: :func:`~jaxcomp.core.paths.matrices`, and those called "b" too: groups know channels."""
    named_b = path.rsplit("/", 1)[-1] == "b" and is_float_array(leaf) and len(leaf.shape) >= 2
    return named_b or matrices(path, leaf)


def unit_score(score: Score, *, reduce: Reduce = "sum", where: Where = weights, **statistics: PyTree) -> UnitScore:
    """The sum of a pruning score over a unit's slices: ``unit_score(jc.pruning.taylor, grads=grads)``.

    Args:
      score: what an element scores, such as ``magnitude``, ``taylor`` or ``norm(2)`` of ``jaxcomp.pruning``.
      reduce: how the slices of a group combine: their sum, or their mean over slices.
      where: the parameters that count; a group in which it selects none is scored by all of its parameters.
      statistics: what the score needs, each a tree like the parameters (at least where it selects).

    Raises:
      ValueError: the score is of whole units already or is normalized, or is not given what it needs; when called, a
        statistic that lacks a parameter or has it in another shape.

    >>> from jaxcomp.structure.groups import channel_groups
    >>> params = {"up": jnp.array([[1.0, -2.0]]), "down": jnp.array([[3.0], [0.5]])}
    >>> groups = channel_groups(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])(params, jnp.ones((1, 1)))
    >>> unit_score(magnitude)(groups, params)[0].tolist()
    [4.0, 2.5]
    """
    if score.of_units or score.normalize is not None or "structure" in score.takes:
        raise ValueError(
            f"unit_score: {score.name!r} scores or compares whole units itself, and there is nothing to sum; "
            "take a score of elements, or fpgm() for distances between units."
        )
    if set(statistics) != set(score.needs):
        raise ValueError(
            f"unit_score: {score.name!r} needs {', '.join(score.needs) or 'no statistic'}, got "
            f"{', '.join(statistics) or 'none'}" + (f"; it comes from {score.maker}." if score.maker else ".")
        )

    def of(path: str, w: Values, given: Mapping[str, Values]) -> Values:
        known = {"path": path, "step": 0}
        also = {name: known[name] for name in score.takes}
        scores = score.fn(jnp.asarray(w), **{name: jnp.asarray(g) for name, g in given.items()}, **also)
        return np.asarray(scores, np.float32)

    return _summed(of, reduce, where, statistics)


def l1(*, reduce: Reduce = "sum", where: Where = weights) -> UnitScore:
    """``sum |w|`` over a unit's slices; arguments as ``unit_score``. Li et al. 2017, arXiv:1608.08710, over whole
    groups as in DepGraph.

    Args:
      reduce, where: as in ``unit_score``.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> l1()(groups, params)
    (array([4. , 1.1, 3. , 1.2]),)
    """
    return unit_score(magnitude, reduce=reduce, where=where)


def l2(*, reduce: Reduce = "sum", where: Where = weights) -> UnitScore:
    """``sqrt(sum w^2)`` over a unit's slices; arguments as ``unit_score``. DepGraph, Fang et al. 2023,
    arXiv:2301.12900.

    Args:
      reduce, where: as in ``unit_score``.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> [score.round(2).tolist() for score in l2()(groups, params)]
    [[3.16, 1.0, 2.24, 1.02]]
    """
    squares = unit_score(norm(2), reduce=reduce, where=where)
    return lambda groups, params: tuple(np.sqrt(s) for s in squares(groups, params))


def group_fisher(example_grads: PyTree, *, reduce: Reduce = "sum", where: Where = weights) -> UnitScore:
    """``mean_n (sum w · ∂L_n/∂w)^2``: the square is of a unit's whole sum, for each example n.

    Args:
      example_grads: the gradients of single examples (or batches): a tree like the parameters with one more axis,
        the examples, in front of every leaf.
      reduce, where: as in ``unit_score``.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> grads = {name: np.ones((2, *w.shape), np.float32) for name, w in params.items()}  # of two examples
    >>> [score.round(2).tolist() for score in group_fisher(grads)(groups, params)]
    [[16.0, 1.21, 9.0, 1.44]]

    Source: group Fisher pruning, Liu et al. 2021, arXiv:2108.00708.
    """
    named = dict(leaves_with_paths(example_grads)[0])

    def score(groups: Groups, params: Params) -> UnitScores:
        count = min(len(g) for g in named.values())
        sums = []
        for n in range(count):
            one = {"grads": {path: np.asarray(g)[n] for path, g in named.items()}}
            sums.append(_summed(lambda _, w, given: w * given["grads"], reduce, where, one)(groups, params))
        return tuple(np.mean([np.square(s[i]) for s in sums], axis=0) for i in range(len(groups)))

    return score


def batch_norm_scale(where: Where, *, reduce: Reduce = "sum") -> UnitScore:
    """``|γ|`` of the scales that ``where`` selects; network slimming, Liu et al. 2017, arXiv:1708.06519.

    A group without such a scale gets infinite scores: it is pruned last.

    Args:
      where: the scales.
      reduce: of several scales of a unit, their sum or their mean.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> [score.round(2).tolist() for score in batch_norm_scale("up")(groups, params)]
    [[3.0, 0.1, 2.0, 0.2]]
    """

    def score(groups: Groups, params: Params) -> UnitScores:
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


def fpgm(*, where: Where = weights) -> UnitScore:
    """``sum_j ||w_i - w_j||``: a unit near all others is replaceable. He et al. 2019, arXiv:1811.00250.

    A unit is the vector of all its weights that ``where`` selects; in a stack each layer is measured by itself.

    Args:
      where: the parameters whose weights make a unit's vector.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> [score.round(2).tolist() for score in fpgm()(groups, params)]
    [[6.7, 4.9, 4.7, 4.7]]
    """

    def score(groups: Groups, params: Params) -> UnitScores:
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


def _distances(group: Group, s: Slice, leaf: Values) -> NDArray[np.float64]:
    """Squared distances between units along one slice, shape (layers or 1, units, units)."""
    w = leaf if group.layers else leaf[None]
    axis = s.axis if group.layers else s.axis + 1
    order = np.argsort(s.unit_of, kind="stable")
    order = order[s.unit_of[order] >= 0]
    rows = np.moveaxis(np.take(w, order, axis), axis, 1).reshape(len(w), group.units, -1).astype(np.float64)
    norm = np.square(rows).sum(-1)
    return norm[:, :, None] + norm[:, None, :] - 2 * rows @ rows.swapaxes(1, 2)


def _summed(
    of: Callable[[str, Values, Mapping[str, Values]], Values],
    reduce: Reduce,
    where: Where,
    statistics: Mapping[str, PyTree],
) -> UnitScore:
    """A score that is a sum over a unit's elements of ``of(path, weights, statistics)``."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f"score: reduce must be 'sum' or 'mean', got {reduce!r}.")
    given = {name: dict(leaves_with_paths(tree)[0]) for name, tree in statistics.items()}

    def score(groups: Groups, params: Params) -> UnitScores:
        leaves = _leaves(groups, params)

        def value(path: str) -> Values:
            w = leaves[path]
            return of(path, w, {name: _given(name, tree, path, w) for name, tree in given.items()})

        return tuple(
            _combine(group, [(s, value(s.path)) for s in _selected(group, leaves, where)], reduce) for group in groups
        )

    return score


def _given(name: str, tree: Mapping[str, jax.Array], path: str, w: Values) -> Values:
    """One leaf's statistic: of the weights' shape, or 1 along some axes."""
    found = np.shape(tree[path]) if path in tree else None
    if found is None or len(found) != w.ndim or any(n not in (1, m) for n, m in zip(found, w.shape, strict=True)):
        raise ValueError(f"score: {name} must have an entry of shape {w.shape} for {path!r}, found {found or 'none'}.")
    return np.asarray(tree[path], np.float32)


def _leaves(groups: Groups, params: Params) -> dict[str, Values]:
    touched = dict.fromkeys(s.path for group in groups for s in group.slices)
    named = dict(leaves_with_paths(params)[0])
    for path in touched:
        if path not in named or np.shape(named[path]) != groups.shapes[path]:
            found = np.shape(named[path]) if path in named else "no such leaf"
            raise ValueError(f"score: {path!r} must have shape {groups.shapes[path]} as in the groups, found {found}.")
    return {path: np.asarray(named[path], np.float32) for path in named if path in touched}


def _selected(group: Group, leaves: dict[str, Values], where: Where) -> Sequence[Slice]:
    return [s for s in group.slices if matches(where, s.path, leaves[s.path])] or group.slices


def _shape(group: Group) -> tuple[int, ...]:
    return (group.layers, group.units) if group.layers else (group.units,)


def _combine(group: Group, parts: list[tuple[Slice, Values]], reduce: Reduce) -> NDArray[np.float64]:
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
