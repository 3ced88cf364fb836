"""What a pruning leaves alone though it selected it, or may not mean: said once, as a warning, where masks begin."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import jax

from jaxcomp.core.paths import some_paths
from jaxcomp.core.specs import share_of
from jaxcomp.pruning.masks.select import Resolved
from jaxcomp.pruning.specs import NM

_PERCENT = 100


def notice(owner: str, text: str) -> None:
    """Warns; Python shows a text once."""
    warnings.warn(f"{owner}: {text}", stacklevel=2)


def of_amounts(amounts: Sequence[tuple[list[str], Resolved]], units: Mapping[str, jax.Array]) -> None:
    """Warns of counts that look like percentages, and of fractions that are no whole unit.

    Args:
      amounts: see :func:`~jaxcomp.pruning.masks.select.select`.
      units: scores of the units, by name.
    """
    sizes = {names[0]: (names, amount, sum(units[n].size for n in names)) for names, amount in amounts}
    counts = [x for x in sizes.values() if isinstance(x[1], int) and 1 <= x[1] <= _PERCENT < x[2]]
    if counts:
        names, count, size = counts[0]
        of = f"the {size} units of {some_paths(names)}" + (f", and of {len(counts) - 1} more" if counts[1:] else "")
        notice(
            "prune",
            f"sparsity={count} is an int and so a count: {count} of {of} are pruned ({count / size:.2%}); for"
            f" {count} percent write {count / _PERCENT:g}, and if the count is meant all is well.",
        )
    empty = [n for n, x, size in sizes.values() if isinstance(x, float) and x and not share_of(x, size)]
    none = [name for names in empty for name in names]
    if none:
        _, share, size = sizes[none[0]]
        notice(
            "prune",
            f"nothing of {some_paths(none)} is pruned: {share:g} of {size} units rounds to 0; leave it out by a rule,"
            " or take smaller units or a larger sparsity.",
        )


def of_patterns(patterns: Mapping[str, NM], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Warns of axes that a pattern's groups do not divide.

    Args:
      patterns: with an axis each, by path.
      shapes: of the leaves.
    """
    odd = {p: s for p, s in patterns.items() if s.axis is not None and shapes[p][s.axis] % s.m}
    if not odd:
        return
    path, s = next(iter(odd.items()))
    size = shapes[path][s.axis or 0]
    rest = size % s.m
    kept = "all are kept" if rest <= s.n else f"{s.n} are kept"
    notice(
        "prune",
        f"groups of {s.m} do not divide axis {s.axis} of {path!r}, {size} long: of the last {rest} of each row {kept},"
        f" and kernels for {s.n}:{s.m} take no such array"
        + (f"; so it is with {len(odd)} leaves" if odd.keys() - {path} else "")
        + "; leave it out by a rule, name another axis, or make it a multiple.",
    )


def of_moves(counts: Mapping[str, int], fraction: float) -> None:
    """Warns of leaves that have too few active weights for a move.

    Args:
      counts: active weights, by path.
      fraction: the share of them that moves.
    """
    still = [p for p, active in counts.items() if fraction and not share_of(fraction, active)]
    if still:
        notice(
            "regrow",
            f"the mask of {some_paths(still)} never moves: fraction={fraction:g} of {counts[still[0]]} active weights"
            " rounds to 0; take a larger fraction or a smaller sparsity, or leave it out by a rule.",
        )
