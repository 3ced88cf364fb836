"""Batches: what a function takes behind its parameters, many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TypeVar

from jaxcomp.core.progress import progress
from jaxcomp.core.types import Params, PyTree

T = TypeVar("T")

Batch = tuple[PyTree, ...]
"""The arguments behind the parameters."""


def as_batch(batch: PyTree) -> Batch:
    """A batch as the arguments behind the parameters: a tuple is all of them, anything else the only one.

    A named tuple is a container of the user's own, and the only argument.

    >>> as_batch(3), as_batch((3, 4))
    ((3,), (3, 4))
    """
    return batch if type(batch) is tuple else (batch,)


def checked_batches(owner: str, batches: Iterable[PyTree]) -> Iterable[PyTree]:
    """The batches; one array, or a mapping, is none: its rows or keys would be taken for them.

    Raises:
      TypeError: it is one of these, or cannot be gone through at all.

    >>> import jax.numpy as jnp
    >>> checked_batches("calibrate_over", jnp.ones((128, 8)))
    Traceback (most recent call last):
    ...
    TypeError: calibrate_over: wants batches, got one array of shape (128, 8), whose rows would each be a batch; \
write [x] if it is one batch, list(x) if its first axis counts batches.
    """
    if hasattr(batches, "shape"):
        raise TypeError(
            f"{owner}: wants batches, got one array of shape {tuple(batches.shape)}, whose rows would each be a batch;"
            " write [x] if it is one batch, list(x) if its first axis counts batches."
        )
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{owner}: wants batches, got {type(batches).__name__}; write [batch] if it is one batch, and a tuple for"
            " several arguments, as in [(x, mask)]."
        )
    return batches


def all_batches(owner: str, batches: Iterable[PyTree]) -> list[Batch]:
    """The batches, kept, for they are visited many times.

    Raises:
      TypeError: what :func:`checked_batches` raises.
      ValueError: there is none.
    """
    found = list(map(as_batch, checked_batches(owner, batches)))
    if not found:
        raise no_batch(owner)
    return found


def results_of(
    fn: Callable[..., T], params: Params, batches: Iterable[PyTree], *, owner: str, words: str
) -> Iterator[T]:
    """``fn(params, *batch)`` of each batch, one at a time; it shows how far it is, a batch when the next is asked for.

    Args:
      fn: of the parameters and a batch's arguments.
      params, batches: what it is given.
      owner, words: whose call it is, for errors, and what is said beside the bar.

    Raises:
      TypeError: what :func:`checked_batches` raises.

    >>> list(results_of(lambda p, x: p + x, 1, [2, 3], owner="f", words="f: batches"))
    [3, 4]
    """
    batches = checked_batches(owner, batches)
    with progress(words, len(batches) if isinstance(batches, Sized) else None) as advance:
        for batch in batches:
            yield fn(params, *as_batch(batch))
            advance(1)


def no_batch(owner: str) -> ValueError:
    """The error where there is no batch.

    >>> no_batch("f")
    ValueError('f: there is no batch; give an iterable of batches that was not used up.')
    """
    return ValueError(f"{owner}: there is no batch; give an iterable of batches that was not used up.")
