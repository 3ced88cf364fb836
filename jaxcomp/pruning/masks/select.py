"""Which units of several named arrays stay: a scope spreads an amount over them. Arrays by name in, masks out."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_index

from jaxcomp.core.bits import order_keys
from jaxcomp.core.errors import count_known
from jaxcomp.core.paths import first_matches, some_paths
from jaxcomp.core.specs import Global, Local, as_percent, checked_fraction
from jaxcomp.core.types import Step
from jaxcomp.pruning.masks.densities import Shapes, erk, heuristic
from jaxcomp.pruning.masks.thresholds import MAX_COUNT, fraction_of, smallest
from jaxcomp.pruning.specs import ERK, Amount, Given, Heuristic, Scope, Tied

Arrays = Mapping[str, jax.Array]
Maybe = Mapping[str, jax.Array | None]
Resolved = int | float | jax.Array
"""How much goes at a step: a count of units, or a fraction of them."""


def select(units: Arrays, alive: Maybe, dead: Maybe, amounts: list[tuple[list[str], Resolved]]) -> dict[str, jax.Array]:
    """Masks that keep all but the lowest units, as many as the amounts say.

    Args:
      units: scores.
      alive: which units an earlier mask left, of the scores' shape, or None for all; an amount is of these.
      dead: which units go before all others, and never come back; None for none.
      amounts: names that share one threshold, with a fraction or a count; each name once.

    Raises:
      ValueError: a count above the number of units.

    >>> select({"a": jnp.array([1.0, 3.0, 2.0])}, {"a": None}, {"a": None}, [(["a"], 1)])["a"].tolist()
    [False, True, True]
    """
    kept: dict[str, jax.Array] = {}
    for names, amount in amounts:
        size = sum(units[name].size for name in names)
        if size > MAX_COUNT:
            mend = "split them by rules, or compress leaf by leaf: jaxcomp.scale.compress_file"
            if len(names) == 1:
                mend = f"keep {names[0]!r} as several leaves, or take units of several weights or patterns"
            raise ValueError(f"prune: one threshold over {size} units; at most {MAX_COUNT} are counted, {mend}.")
        if isinstance(amount, int) and amount > size:
            raise ValueError(
                f"prune: {some_paths(names)}: {size} units, fewer than the {amount} to prune; take a smaller count, or"
                f" a fraction{as_percent(amount)}."
            )
        keys = [_key(units[name], dead[name]) for name in names]
        eligible = [alive[name] for name in names]
        gone = smallest(keys, eligible, _count(keys, eligible, amount))
        for name, mask, e in zip(names, gone, eligible, strict=True):
            stays = ~mask if e is None else e & ~mask
            old = dead[name]
            kept[name] = stays if old is None else stays & ~old
    return kept


def amounts_of(scope: Scope, shapes: Shapes, amount: Amount | None, step: Step) -> list[tuple[list[str], Resolved]]:
    """The amounts that a scope gives to leaves of these shapes; see :func:`select`.

    Raises:
      ValueError: a rule of ``Given`` that matches nothing, or a leaf that none matches.
    """
    if isinstance(scope, Given):
        return [([name], resolved(a, step)) for name, a in _given(scope, shapes).items()]
    assert amount is not None  # prune has refused it
    match scope:
        case Global():
            return [(list(shapes), resolved(amount, step))]
        case Local():
            return [([name], resolved(amount, step)) for name in shapes]
        case ERK():
            fractions = erk(shapes, resolved(amount, step), scope)
        case Heuristic():
            fractions = heuristic(shapes, resolved(amount, step), scope)
    return [([name], fraction) for name, fraction in fractions.items()]


def resolved(amount: Amount, step: Step) -> Resolved:
    """An amount at a step: an int, a float, or what a schedule gives as a scalar array.

    Raises:
      ValueError: a schedule gives a number outside [0, 1).
    """
    if not callable(amount):
        return amount
    value = amount(step)
    if isinstance(value, numbers.Real):
        return checked_fraction("prune: the schedule's", value)
    if count_known(lambda x: ~((x >= 0) & (x < 1)), value):
        raise ValueError(f"prune: the schedule's sparsity must be a number in [0, 1), got {value} at step {step}.")
    return value


def groups_of(structure: Tied, shapes: Shapes) -> dict[str, dict[str, int]]:
    """The names of each group with their axes, counted from the front.

    Raises:
      ValueError: slices of different numbers.
    """
    groups: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        found = structure.find(name)
        if found is not None:
            groups.setdefault(found[0], {})[name] = normalize_axis_index(found[1], len(shape))
    for group, members in groups.items():
        counts = {shapes[name][axis] for name, axis in members.items()}
        if len(counts) > 1:
            named = ", ".join(f"{n!r} has {shapes[n][a]} along axis {a}" for n, a in members.items())
            raise ValueError(f"prune: group {group!r} ties different numbers of slices: {named}.")
    return groups


def tied(
    groups: Mapping[str, Mapping[str, int]], units: Arrays, alive: Maybe, dead: Maybe
) -> tuple[dict[str, jax.Array], dict[str, jax.Array | None], dict[str, jax.Array | None]]:
    """What :func:`select` wants of groups: sums of their members' scores, what any member has left, what is dead."""
    scores: dict[str, jax.Array] = {}
    left: dict[str, jax.Array | None] = {}
    gone: dict[str, jax.Array | None] = {}
    for group, members in groups.items():
        first, *others = (units[name].reshape(-1) for name in members)
        scores[group] = sum(others, first)
        masks = [m.reshape(-1) for name in members if (m := alive[name]) is not None]
        left[group] = jnp.any(jnp.stack(masks), axis=0) if len(masks) == len(members) else None
        old = dead[next(iter(members))]
        gone[group] = None if old is None else old.reshape(-1)
    return scores, left, gone


def _key(scores: jax.Array, dead: jax.Array | None) -> jax.Array:
    """No number has the key 0, so what is dead comes first."""
    keys = order_keys(scores)
    return keys if dead is None else jnp.where(dead, jnp.uint32(0), keys)


def _count(keys: list[jax.Array], eligible: list[jax.Array | None], amount: Resolved) -> jax.Array:
    if isinstance(amount, int):
        return jnp.uint32(amount)
    whole = sum(k.size for k, e in zip(keys, eligible, strict=True) if e is None)
    left = [jnp.sum(e, dtype=jnp.uint32) for e in eligible if e is not None]
    return fraction_of(sum(left, jnp.uint32(whole)) if left else whole, amount)


def _given(scope: Given, shapes: Shapes) -> dict[str, Amount]:
    """The amount of the first rule that matches each name."""
    named = [(name, jax.ShapeDtypeStruct(shape, "float32")) for name, shape in shapes.items()]
    amounts = list(scope.amounts.values())
    found: dict[str, Amount] = {}
    for (name, _), first in zip(named, first_matches(scope.amounts, named, owner="prune: Given"), strict=True):
        if first is None:
            raise ValueError(f"prune: {name!r} matches no rule of Given; add one, such as r'.*': 0.0, or narrow where.")
        found[name] = amounts[first]
    return found
