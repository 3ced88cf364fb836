"""The best widths of a supernet within budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import jax
import numpy as np

from jaxcomp.core.progress import progress
from jaxcomp.core.specs import check_key, is_integer
from jaxcomp.core.tables import columns
from jaxcomp.core.types import Key, Params
from jaxcomp.search.ask_tell import Choice, Repair, Search, Space
from jaxcomp.search.evolution import evolution
from jaxcomp.search.supernet.fitting import Budgets, CostOf, Counts
from jaxcomp.search.supernet.widths import Supernet
from jaxcomp.structure.plans import Plan

Method = Callable[[Space, Repair], Search]
"""A search over a space, of candidates that it is told how to repair."""


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What ``narrow`` found.

    Attributes:
      plan: ``plan.take(params)`` are the smaller parameters, ``shrink(fn, plan)`` runs them, ``plan.widths`` are what
        to build the model with.
      counts: how many units of each group stay.
      score: of these, as judged.
      costs: what they cost, by budget.
      starts: the counts that the search began from, by name: the widest "uniform" ones within, and "allocated".
      tried: the score of every widths that were judged.
    """

    plan: Plan
    counts: Counts
    score: float
    costs: Mapping[str, float]
    starts: Mapping[str, Counts]
    tried: Mapping[Counts, float]

    def __repr__(self) -> str:
        cells = [("group", "of", *self.starts, "found", "touches")]
        for g, (group, n) in enumerate(zip(self.plan.groups, self.counts, strict=True)):
            paths = ", ".join(group.paths[:2]) + ", …" * (len(group.paths) > 2)
            cells.append((str(g), str(group.units), *(str(c[g]) for c in self.starts.values()), str(n), paths))
        cells.append(("score", "", *(f"{self.tried[c]:.4g}" for c in self.starts.values()), f"{self.score:.4g}", ""))
        costs = ", ".join(f"{x:,g} {name}" for name, x in self.costs.items())
        table = columns(cells, "rr" + "r" * len(self.starts) + "rl")
        return f"{table}\n{costs}; the best of {len(self.tried)} that were judged"


def narrow(
    net: Supernet,
    params: Params,
    judge: Callable[[Params], float],
    budgets: Mapping[str, float],
    *,
    key: Key,
    costs: Mapping[str, CostOf] | None = None,
    method: Method = lambda space, repair: evolution(space, repair=repair),
    generations: int = 10,
    known: MutableMapping[Counts, float] | None = None,
) -> Narrowed:
    """Searches a trained supernet for the widths that score best within budgets.

    It begins with the widest uniform widths within the budgets. Each group is judged at each of its counts, the others
    as they are there; where costs are of products, and few groups meet in each, what would be best if the losses added
    up is solved exactly. Both are told to the search with its first generation, so what is found is never judged worse
    than uniform widths.

    Args:
      net: the widths.
      params: the full-size tree, trained.
      judge: ``judge(masked) -> score``, higher is better, of the tree masked to some widths: on data for this alone,
        not that of the final test, and with batch norm's statistics made anew, see ``recalibrated``. All trees have
        one shape, so a compiled program serves them all.
      budgets: at most so much of "macs" (of the traced call), of "parameters", or of one of ``costs``; several at once.
      key: of the search's randomness.
      costs: more to count, by name, such as ``{"seconds": measured_seconds(fn, params, x)}``. Each is asked some dozens
        of times a candidate.
      method: ``method(space, repair)``, such as ``lambda s, r: cross_entropy(s, repair=r)``.
      generations: how often the method is asked.
      known: scores by counts, of a search that was cut off say; they are not judged again, and new ones are added.

    Raises:
      ValueError: a budget that the narrowest exceeds, or of what nobody counts; nothing to decide; no finite score
        of the uniform widths.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcomp.search import slimmable
    >>> from jaxcomp.structure import channel_groups
    >>> def mlp(p, x):
    ...     return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> params = {n: jax.random.normal(k, s) for n, k, s in zip("abc", keys, [(4, 16), (16, 16), (16, 2)])}
    >>> x = jax.random.normal(keys[3], (64, 4))
    >>> net = slimmable(channel_groups(mlp)(params, x), params)
    >>> gap = jax.jit(lambda p: jnp.mean((mlp(p, x) - mlp(params, x)) ** 2))
    >>> half = net.plan(net.uniform(0.5)).macs
    >>> found = narrow(net, params, lambda p: -float(gap(p)), {"macs": half}, key=jax.random.key(1), generations=3)
    >>> found.plan.macs <= half, found.score >= found.tried[found.starts["uniform"]]
    (True, True)

    Source: evolution over a trained supernet, Guo et al. 2020, arXiv:1904.00420, and Yu et al. 2020 (BigNAS),
    arXiv:2003.11142. Ours begins from an exact allocation, as HAWQ-V3 does for bits.
    """
    check_key("narrow", key)
    if not is_integer(generations) or generations < 0:
        raise ValueError(f"narrow: generations must be an integer, 0 or more, got {generations!r}.")
    within = Budgets(net, budgets, costs or {})
    tried = {} if known is None else known
    judged: dict[Counts, float] = {}
    masked = jax.jit(net.masked)

    def score(counts: Counts) -> float:
        if counts not in tried:
            tried[counts] = float(judge(masked(params, np.array(counts))))
        return judged.setdefault(counts, tried[counts])

    starts = {"uniform": within.uniform()}
    rows = [sorted(set(row)) for row in net.table.tolist()]
    with progress("narrow", sum(map(len, rows)) + generations) as done:
        losses = _losses(starts["uniform"], rows, score, done)
        allocated = within.allocated(losses)
        if allocated is not None:
            starts["allocated"] = within.repaired(allocated)
            score(starts["allocated"])
        _searched(method, rows, within, starts, score, key=key, generations=generations, done=done)
    fitting = {c: x for c, x in judged.items() if within.meets(c) and math.isfinite(x)}
    best = max(fitting, key=lambda c: fitting[c])
    return Narrowed(net.plan(best), best, fitting[best], within.costs(best), starts, judged)


def _losses(
    base: Counts, rows: list[list[int]], score: Callable[[Counts], float], done: Callable[[float], None]
) -> list[dict[int, float]]:
    """What each count of each group loses, the others as in ``base``."""
    level = score(base)
    if not math.isfinite(level):
        raise ValueError(f"narrow: judge gave the uniform widths {base} {level!r}; it must give a finite number.")
    found = []
    for g, row in enumerate(rows):
        losses: dict[int, float] = {}
        for n in row:
            loss = level - score((*base[:g], n, *base[g + 1 :]))
            losses[n] = loss if math.isfinite(loss) else math.inf
            done(1)
        found.append(losses)
    return found


def _searched(
    method: Method,
    rows: list[list[int]],
    within: Budgets,
    starts: Mapping[str, Counts],
    score: Callable[[Counts], float],
    *,
    key: Key,
    generations: int,
    done: Callable[[float], None],
) -> None:
    """Judges what the method asks for, the starts among the first."""
    free = [g for g, row in enumerate(rows) if len(row) > 1]
    if not free:
        raise ValueError("narrow: every group has one width, so nothing is to decide; give the supernet more levels.")
    space: Space = {str(g): Choice(tuple(rows[g])) for g in free}

    def counts_of(candidate: Mapping[str, object]) -> Counts:
        return tuple(int(str(candidate.get(str(g), row[0]))) for g, row in enumerate(rows))

    def candidate_of(counts: Counts) -> dict[str, object]:
        return {str(g): counts[g] for g in free}

    search = method(space, lambda candidate: candidate_of(within.repaired(counts_of(candidate))))
    state = search.init(key)
    for generation in range(generations):
        asked = search.ask(state)
        if generation == 0:
            asked = [*map(candidate_of, starts.values()), *asked]
        state = search.tell(state, asked, [score(counts_of(c)) for c in asked])
        done(1)
