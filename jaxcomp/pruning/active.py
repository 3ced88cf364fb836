"""How many weights of each leaf are active: one sparsity for all of them, or a table of sparsities by rule."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcomp.core.paths import Where, first_matches
from jaxcomp.core.slots import Slot
from jaxcomp.core.specs import checked_fraction, share_of
from jaxcomp.pruning.masks.thresholds import MAX_COUNT

Sparsity = float | Mapping[Where, float]


def checked_sparsity(sparsity: Sparsity) -> Sparsity:
    """The sparsity, or the table of them, as floats.

    Raises:
      ValueError: one is no number in [0, 1).
    """
    if isinstance(sparsity, Mapping):
        return {rule: _checked(s) for rule, s in sparsity.items()}
    return _checked(sparsity)


def active_counts(found: Mapping[str, Slot], sparsity: Sparsity) -> dict[str, int]:
    """How many weights of each leaf are active; leaves that a table does not name are left out.

    Raises:
      ValueError: a rule that matches nothing, a leaf that is masked already, or one too large to be counted.
    """
    shares = _by_rule(found, sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(found, sparsity)
    return {path: _count(found[path], share) for path, share in shares.items()}


def _checked(sparsity: object) -> float:
    return checked_fraction("regrow", sparsity, "a number in [0, 1), or a table of such by rule")


def _by_rule(found: Mapping[str, Slot], table: Mapping[Where, float]) -> dict[str, float]:
    named, shares = [(path, slot.array) for path, slot in found.items()], list(table.values())
    firsts = first_matches(table, named, owner="regrow")
    return {path: shares[first] for (path, _), first in zip(named, firsts, strict=True) if first is not None}


def _count(slot: Slot, share: float) -> int:
    size = slot.array.size
    if slot.mask is not None:
        raise ValueError(
            f"regrow: {slot.path!r} is masked already; put regrow before prune, or leave the leaf out by a rule."
        )
    if size > MAX_COUNT:
        raise ValueError(f"regrow: {slot.path!r} has {size} weights; at most {MAX_COUNT} are counted.")
    return max(1, size - share_of(share, size))
