"""Where the axes of one leaf lie for a method: stacked layers in front, rows, columns."""

from __future__ import annotations

from typing import NamedTuple

from jaxcomp.core.roles import BATCH, CONTRACTED, INDEXED, OUTPUT, SINGLE, SPATIAL, STACKED, Roles, settled
from jaxcomp.core.slots import Slot
from jaxcomp.factorization.specs import SVD, Method, RankOne

_SUMMED = "summed"
# Axes of one kind next to each other are one side of a matrix: a window and input features, heads and their features.
_KINDS = {CONTRACTED: _SUMMED, SPATIAL: _SUMMED, OUTPUT: OUTPUT, INDEXED: INDEXED}
_FRONT = (STACKED, BATCH)  # each index has a product of its own

Names = tuple[str, ...]


class Placed(NamedTuple):
    """A method, and where one leaf's axes lie for it.

    Fields:
      method: how.
      stacked: how many axes in front hold layers, each decomposed by itself.
      cols: how many of the last axes are a matrix's columns; of a kernel's output features, 1.
      outputs_first: whether a matrix's rows are what a product keeps, and its columns what it sums over, as in
        Equinox's and torch's (out, in).
    """

    method: Method
    stacked: int
    cols: int = 1
    outputs_first: bool = False


class Selected(NamedTuple):
    """A leaf that is to be decomposed, and how."""

    slot: Slot
    at: Placed


def placed(method: Method, slot: Slot, roles: Roles | None) -> Placed:
    """The method at one leaf: numbers that it does not give are those of the axes' roles.

    Raises:
      ValueError: the roles are not known, or no rows and columns (or no kernel); the message goes after owner and path.
    """
    shape = tuple(slot.array.shape)
    if len(shape) < 2:
        raise ValueError(f"has shape {shape}, which has no rows and columns; leave it out by a rule")
    if isinstance(method, SVD | RankOne):
        return _matrix(method, slot, roles)
    if method.stacked is not None:
        return Placed(method, method.stacked)
    names = _names(slot, roles)
    if names is None:
        raise _unknown(len(shape), f"{type(method).__name__}(stacked=0)")
    front = _in_front(names)
    if len(names) - front >= 3 and not _is_kernel(names[front:]):
        raise ValueError(
            f"has the axes {', '.join(names)}, and {type(method).__name__} wants a kernel (*spatial, I, O); use SVD(),"
            " which takes the axes as they lie, or leave it out by a rule"
        )
    return Placed(method, front)


def _matrix(method: SVD | RankOne, slot: Slot, roles: Roles | None) -> Placed:
    rank, cols, stacked = len(slot.array.shape), method.cols, method.stacked
    if cols is not None and stacked is not None:
        return Placed(method, stacked, cols)
    names = _names(slot, roles)
    if names is None:
        # Numbers that leave one axis for the rows and one for the columns settle the rest.
        if stacked is not None and rank - stacked == 2:
            return Placed(method, stacked)
        if cols is not None and rank - cols == 1:
            return Placed(method, 0, cols)
        raise _unknown(rank, f"{type(method).__name__}(cols=1, stacked=0)")
    front = _in_front(names) if stacked is None else stacked
    own = [_KINDS.get(name, name) for name in names[front:]]
    last = _last_run(own) if cols is None else cols
    rows, columns = ({kind for kind in part if kind != SINGLE} for part in (own[:-last], own[-last:]))
    if cols is None and (len(rows) != 1 or len(columns) != 1 or (rows | columns) & set(_FRONT)):
        raise ValueError(
            f"has the axes {', '.join(names)}, which are not the rows and columns of a matrix; name them, as in"
            f" {type(method).__name__}(cols=1, stacked=0), or leave it out by a rule"
        )
    return Placed(method, front, last, rows == {OUTPUT} and columns == {_SUMMED})


def _names(slot: Slot, roles: Roles | None) -> Names | None:
    """What the axes do, or None where neither roles nor path and rank say it."""
    if roles is None and settled(slot.leaf_path, len(slot.array.shape)) is None:
        return None
    return slot.axes(roles).names


def _unknown(rank: int, example: str) -> ValueError:
    return ValueError(
        f"has {rank} axes, and neither its path nor its rank settles which of them a product sums over; pass"
        f" roles=jaxcomp.roles(fn)(params, *args), or name them, as in method={example}"
    )


def _in_front(names: Names) -> int:
    return next((i for i, name in enumerate(names) if name not in _FRONT), len(names))


def _last_run(kinds: list[str]) -> int:
    """How many of the last axes are of one kind; an axis of one element goes with its neighbours."""
    run: set[str] = set()
    for count, kind in enumerate(reversed(kinds)):
        run |= {kind} - {SINGLE}
        if len(run) > 1:
            return count
    return len(kinds)


def _is_kernel(names: Names) -> bool:
    *spatial, inputs, outputs = names
    wanted = [(SPATIAL, name) for name in spatial] + [(CONTRACTED, inputs), (OUTPUT, outputs)]
    return all(found in (role, SINGLE) for role, found in wanted)
