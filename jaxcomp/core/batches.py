"""Batches: what a function takes behind its parameters, many times."""

from __future__ import annotations

from collections.abc import Iterable

from jaxcomp.core.types import PyTree

Batch = tuple[PyTree, ...]
"""The arguments behind the parameters."""


def as_batch(batch: PyTree) -> Batch:
    """A batch as the arguments behind the parameters: a tuple is all of them, anything else the only one.

    A named tuple is a container of the user's own, and the only argument.

    >>> as_batch(3), as_batch((3, 4))
    ((3,), (3, 4))
    """
    return batch if type(batch) is tuple else (batch,)


def all_batches(owner: str, batches: Iterable[PyTree]) -> list[Batch]:
    """The batches, kept, for they are visited many times.

    Raises:
      ValueError: there is none.
    """
    found = list(map(as_batch, batches))
    if not found:
        raise no_batch(owner)
    return found


def no_batch(owner: str) -> ValueError:
    """The error where there is no batch.

    >>> no_batch("f")
    ValueError('f: there is no batch; give an iterable of batches that was not used up.')
    """
    return ValueError(f"{owner}: there is no batch; give an iterable of batches that was not used up.")
