"""Iterative structured pruning: prune a bit, fine-tune, prune more on the shrunken network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcomp.core.types import Params, PyTree, State
from jaxcomp.structure.groups import Group, Groups, channel_groups
from jaxcomp.structure.plans import Plan
from jaxcomp.structure.shrinking import shrink
from jaxcomp.trace.walk import Fn

Choose = Callable[[Groups, Params, Fn], Plan]
"""From the groups, the parameters and the function at their present size to what goes next."""
Tune = Callable[[Plan, Params, State], tuple[Params, State]]
"""From the plan over the full-size tree and the parameters and the state that it leaves to tuned ones."""


class Pruned(NamedTuple):
    """What the last round left.

    Attributes:
      fn: the function over the smaller tree.
      params, state: the smaller trees.
      plan: from the full-size tree to this one: its ``widths`` build the same model again.
    """

    fn: Fn
    params: Params
    state: State
    plan: Plan


def prune_in_rounds(
    fn: Fn,
    params: Params,
    *args: PyTree,
    rounds: Sequence[Choose],
    tune: Tune,
    state: State = None,
    trained: Callable[[Params], Params] = lambda params: params,
) -> Pruned:
    """Prunes and fine-tunes in turns; each round really shrinks, so the next is trained and scored at its size.

    Args:
      fn: the function whose channels go, ``fn(params, *args)``.
      params: the full-size tree.
      args: the function's further arguments.
      rounds: for each round what chooses the units to remove; see ``fraction_per_round``.
      tune: fine-tunes after each round what it is given a plan of: ``shrink(fn, plan)``, the same in train mode with
        mutable batch statistics, or the same Flax module built at ``plan.widths``.
      state: an optimizer's state (or any tree made from the trained parameters), which is shrunk alike.
      trained: the part of ``params`` that ``state`` was made from, such as ``lambda v: v["params"]``.

    Raises:
      ValueError: no round; what ``plan`` and ``Plan.take_like`` raise.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcomp.structure.choosing import plan
    >>> f = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> params, x = {"up": jnp.ones((2, 16)), "down": jnp.ones((16, 1))}, jnp.ones((1, 2))
    >>> halves = [lambda groups, p, fn: plan(groups, p, sparsity=0.5)] * 3
    >>> prune_in_rounds(f, params, x, rounds=halves, tune=lambda plan, p, s: (p, s)).plan.widths
    {'down': (2, 1), 'up': (2, 2)}

    Source: the alternation of pruning and fine-tuning of Molchanov et al. 2016, arXiv:1611.06440, section 2.
    """
    if not rounds:
        raise ValueError("prune_in_rounds: rounds is empty; give at least one function that makes a plan.")
    whole: Plan | None = None
    current, small = fn, params
    for choose in rounds:
        step = choose(channel_groups(current)(small, *args), small, current)
        state = step.take_like(state, trained(small))
        small = step.take(small)
        whole = step if whole is None else composed(whole, step)
        current = shrink(fn, whole)
        small, state = tune(whole, small, state)
    assert whole is not None
    return Pruned(current, small, state, whole)


def fraction_per_round(sparsity: float, rounds: int) -> float:
    """``1 - (1 - sparsity)^(1 / rounds)``: the fraction of what is left that each of several equal rounds removes.

    Raises:
      ValueError: a sparsity outside [0, 1), or no round.

    >>> round(fraction_per_round(0.75, 2), 6)
    0.5
    """
    if not 0 <= sparsity < 1 or rounds < 1:
        raise ValueError(
            f"fraction_per_round: wants a sparsity in [0, 1) and at least one round, got {sparsity}, {rounds}."
        )
    return 1 - (1 - sparsity) ** (1 / rounds)


def composed(first: Plan, second: Plan) -> Plan:
    """One plan for two in turn: ``composed(a, b).take(tree) == b.take(a.take(tree))``.

    Args:
      first: over the whole tree.
      second: over what it leaves.

    >>> import numpy as np
    >>> from jaxcomp.structure import channel_groups, plan
    >>> params = {"up": np.float32([[3, 0.1, 2, 0.2]]), "down": np.ones((4, 1), np.float32)}
    >>> groups = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(params, np.ones((2, 1), np.float32))
    >>> first = plan(groups, params, sparsity=0.5)
    >>> small = channel_groups(lambda p, x: x @ p["up"] @ p["down"])(first.take(params), np.ones((2, 1), np.float32))
    >>> composed(first, plan(small, first.take(params), sparsity=0.5)).take(params)["up"].tolist()
    [[3.0]]

    Raises:
      ValueError: ``second`` is not a plan over the tree that ``first`` leaves.
    """
    if dict(second.groups.shapes) != dict(first.widths):
        raise ValueError(
            "composed: the second plan must be over the tree that the first leaves; make it with "
            "channel_groups(shrink(fn, first))(first.take(params), ...)."
        )
    return Plan(first.groups, tuple(_left(group, first, second) for group in first.groups))


def _left(group: Group, first: Plan, second: Plan) -> NDArray[np.int64]:
    """The units of one group that both plans keep, shape (k,), or (layers, k)."""
    s = group.slices[0]
    at, length = (s.path, s.axis), first.groups.shapes[s.path][s.axis]
    one = first.indices.get(at, np.arange(length))
    two = second.indices.get(at, np.arange(one.shape[-1]))
    layers = max(len(np.atleast_2d(one)), len(np.atleast_2d(two)))
    one, two = (np.broadcast_to(k, (layers, k.shape[-1])) for k in (one, two))
    owners = [np.unique(s.unit_of[row]) for row in np.take_along_axis(one, two, -1)]
    kept = np.stack([row[row >= 0] for row in owners])
    return kept if layers > 1 else kept[0]
