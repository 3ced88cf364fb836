"""What a file may claim: bounds that hold whatever a wrong file says, so that reading takes bounded memory and time."""

from __future__ import annotations

import json

from jaxcomp.core.types import Json, Shape

MAX_HEADER = 100_000_000
"""Bytes of a header, or of a directory; the limit of safetensors too."""
MAX_NODES = 1 << 22
"""Lists and objects in a header, or a directory: each of three bytes would take a hundred of Python."""
MAX_DIMS = 64
"""How many dimensions an array of numpy has at most."""
MAX_SIZE = 1 << 60
"""Elements of an array, counting a dimension of 0 as 1."""
_ALWAYS, _RATIO = 1 << 30, 100


class Budget:
    """The bytes that a tree may take in memory. What every tensor claims is taken off before it is read.

    Args:
      limit: in bytes; None is 1 GiB, or a hundred times the file where that is more.
      size: of the file.

    >>> budget = Budget(100, 50)
    >>> budget.take(60, "a")
    >>> budget.take(60, "b")
    Traceback (most recent call last):
    ValueError: would take 120 bytes of memory with 'b', more than the 100 of limit=; if you trust it, give more
    """

    def __init__(self, limit: int | None, size: int) -> None:
        if limit is not None and (type(limit) is not int or limit < 0):
            raise TypeError(f"load: limit is a number of bytes, got {limit!r}.")
        self._limit = max(_ALWAYS, _RATIO * size) if limit is None else limit
        self._taken = 0

    def take(self, nbytes: int, path: str) -> None:
        """Takes so many bytes for what is at ``path``.

        Raises:
          ValueError: there are no more so many.
        """
        self._taken += nbytes
        if self._taken > self._limit:
            raise ValueError(
                f"would take {self._taken} bytes of memory with {path!r}, more than the {self._limit} of limit=; if you"
                " trust it, give more"
            )


def shape_of(said: Json, path: str) -> Shape:
    """A shape that an array can have, from JSON.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(said, list) or not all(type(n) is int and n >= 0 for n in said):
        raise ValueError(
            f"holds {path!r} of the shape {str(said)[:40]}; it must be a list of numbers that are not negative"
        )
    if len(said) > MAX_DIMS:
        raise ValueError(f"holds {path!r} of {len(said)} dimensions; an array has at most {MAX_DIMS}")
    size = 1
    for n in said:
        size *= max(n, 1)
    if size > MAX_SIZE:
        raise ValueError(f"holds {path!r} of the shape {str(said)[:40]}, which is larger than arrays are")
    return tuple(said)


def parsed(text: bytes | str, otherwise: str) -> Json:
    """JSON, or ValueError with these words."""
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if brackets > MAX_NODES:
        raise ValueError(f"describes more than the {MAX_NODES} parts that there may be")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested deeper than any file that jaxcomp.save writes") from None
    except ValueError:
        raise ValueError(otherwise) from None
