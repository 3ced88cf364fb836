"""Scores that a mask hides: which truth value says that one is of no account."""

from __future__ import annotations

from typing import NamedTuple

from jaxcomp.trace.pointwise import Pointwise
from jaxcomp.trace.rowwise import REDUCTIONS


class Mask(NamedTuple):
    """A value that meets rows of numbers, all of which go through a choice that it makes.

    Attributes:
      which: of those that meet them.
      shows: the truth value that chooses what is made of the number; the other chooses something else.
    """

    which: int
    shows: bool


def mask_of(function: Pointwise) -> Mask | None:
    """The mask of a function of rows; None where it has none.

    >>> from jaxcomp.trace.pointwise import Step
    >>> mask_of((Step("operand", (), 2), Step("constant", (), -1e9), Step("select_n", (1, 2, 0)), Step("exp", (3,))))
    Mask(which=2, shows=True)
    >>> mask_of((Step("operand", (), 2), Step("select_n", (1, 0, 0))))
    """
    made, found = {0}, set()
    for i, step in enumerate(function, 1):
        if made.isdisjoint(step.operands):
            continue
        mask = _chosen(function, step.operands, made) if step.name == "select_n" else None
        if mask is not None:
            found.add(mask)
        elif step.name in REDUCTIONS:
            return None
        else:
            made.add(i)
    return found.pop() if len(found) == 1 and len(function) not in made else None


def _chosen(function: Pointwise, operands: tuple[int, ...], made: set[int]) -> Mask | None:
    """The mask of a choice between a value that was made of the number and another."""
    predicate, *branches = operands
    which = [i for i, branch in enumerate(branches) if branch in made]
    step = function[predicate - 1] if predicate else None
    if len(which) != 1 or step is None or step.name not in ("operand", "not"):
        return None
    if step.name == "operand":
        return Mask(int(step.number), bool(which[0]))
    (inner,) = step.operands
    of = function[inner - 1] if inner else None
    return Mask(int(of.number), not which[0]) if of is not None and of.name == "operand" else None
