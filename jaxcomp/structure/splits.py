"""Reshapes that take a dimension of channels apart or put several together: along which axis its units lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.structure.atoms import Atoms, Dim, arrays


class Reason(NamedTuple):
    """Why something stays: the equation, after those around it, and the reason in words."""

    eqns: tuple[core.JaxprEqn, ...]
    why: str


@dataclass(frozen=True)
class Split:
    """A dimension that is several: ``flat`` has the atoms of a grid of ``shape``, and ``axes`` those of its axes.

    Index (i, j, …) of the grid can go only with index i of the first axis, or with index j of the second, …: which
    of them holds the units is known once all that is done with the axes is.
    """

    flat: NDArray[np.int64]
    shape: tuple[int, ...]
    axes: tuple[Dim, ...]
    reason: int

    def choices(self, atoms: Atoms) -> list[int]:
        """The axes that could hold the units; one, if it already does."""
        grid, found = atoms.find(self.flat).reshape(self.shape), []
        for k, axis in enumerate(self.axes):
            if not isinstance(axis, np.ndarray):
                continue
            rows = np.moveaxis(grid, k, 0).reshape(self.shape[k], -1)
            if (rows == rows[:, :1]).all():
                return [k]
            if ((atoms.find(axis) != 0) & (rows != 0).all(1)).any():
                found.append(k)
        return found

    def settle(self, atoms: Atoms, unit: int) -> None:
        """Makes the axis ``unit`` the one that holds the units; the others stay."""
        rows = np.moveaxis(self.flat.reshape(self.shape), unit, 0).reshape(self.shape[unit], -1)
        (axis,) = arrays([self.axes[unit]])
        atoms.union(axis[:, None], rows)
        for other in arrays([axis for k, axis in enumerate(self.axes) if k != unit]):
            atoms.freeze(other, self.reason)


def settle(atoms: Atoms, splits: Sequence[Split]) -> None:
    """Chooses an axis for each: the only one that is free to go, or the first where several are.

    What leaves no choice comes first, for it may decide about others: a leading axis that a convolution slides over
    stays, so the channels lie behind it; that of attention's heads is free, so whole heads are the units.
    """
    waiting = list(splits)
    while waiting:
        left = []
        for split in waiting:
            choices = split.choices(atoms)
            if len(choices) > 1:
                left.append(split)
                continue
            first = next(k for k, axis in enumerate(split.axes) if isinstance(axis, np.ndarray))
            split.settle(atoms, choices[0] if choices else first)
        if len(left) == len(waiting):
            split = left.pop(0)
            split.settle(atoms, split.choices(atoms)[0])
        waiting = left
