"""Several processes as one run: each holds some of the devices, the first one writes, and all decide alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcomp.core.types import Json, PyTree
from train.errors import RunError, ToldError
from train.loop.stopping import Stop

T = TypeVar("T")
SAID = 4096
"""Bytes that a process says to the others at a time: one shape, and so one compiled program."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, which do the same things in the same order; one alone talks to nobody.

    >>> alone = Processes()
    >>> alone.first(lambda: "written"), alone.total(3), alone.writes
    ('written', 3, True)

    Args:
      count, index: how many there are, and which one this is.
      stop: what signals ask for; one that came to a process is told to the others with whatever is said next.
    """

    count: int = 1
    index: int = 0
    stop: Stop = field(default_factory=Stop)

    @property
    def writes(self) -> bool:
        """Whether this is the first one, which alone writes files and prints."""
        return self.index == 0

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` gives, when all have done it.

        Raises:
          ToldError: it raised in one of them, and all end.
          Stopped: a signal came to one of them.
        """
        if self.count == 1:
            return act()
        try:
            done = act()
        except Exception as e:
            self._gathered(str(e) or type(e).__name__)
            raise ToldError(str(e) or type(e).__name__) from e
        for i, text in enumerate(self._gathered("")):
            if text:
                raise ToldError(f"process {i}: {text}")
        if self.stop.agreed is not None:
            raise self.stop.stopped()
        return done

    def first(self, act: Callable[[], Json]) -> Json:
        """What ``act`` gives in the first process, which alone does it, in all; raises as :meth:`together` does."""
        done = self.together(lambda: act() if self.writes else None)
        return done if self.count == 1 else self._gathered(done)[0]

    def total(self, own: int) -> int:
        """The sum over the processes."""
        return own if self.count == 1 else sum(cast(list[int], self._gathered(own)))

    def alike(self, what: str, own: PyTree) -> None:
        """Checks that ``what``, a tree of arrays, has the same bits in all processes.

        Raises:
          ToldError: it does not.
        """
        sums = [] if self.count == 1 else self._gathered(digest(own))
        if others := [i for i, found in enumerate(sums) if found != sums[0]]:
            raise ToldError(
                f"{what} differ in process {others[0]} from those in process 0; start all processes with the same"
                " options, data and versions, on devices of one kind."
            )

    def _gathered(self, own: Json) -> list[Json]:
        """What each process says, in order."""
        lines = multihost_utils.process_allgather(line_of(own, self.stop.asked))
        said, signals = zip(*map(said_by, lines), strict=True)
        self.stop.hear(signals)
        return list(said)


def line_of(said: Json, signal: int | None) -> np.ndarray:
    """What a process says, and the signal that came to it, as bytes of a fixed number; a long text is cut.

    >>> said_by(line_of({"a": 1.5}, None))
    ({'a': 1.5}, None)

    Raises:
      RunError: it is too long, and no text.
    """
    data = json.dumps([said, signal]).encode()
    if len(data) > SAID and isinstance(said, str):
        data = json.dumps([f"{said[: SAID // 8]}…", signal]).encode()
    if len(data) > SAID:
        raise RunError(f"{len(data)} bytes are to be told to other processes, and there is room for {SAID}.")
    return np.frombuffer(data.ljust(SAID, b"\0"), np.uint8)


def said_by(line: np.ndarray) -> tuple[Json, int | None]:
    """The inverse of :func:`line_of`."""
    said, signal = json.loads(bytes(line).rstrip(b"\0"))
    return said, signal


def digest(tree: PyTree) -> str:
    """A checksum of the arrays of a tree: their order, types, shapes and bits, whatever holds them.

    >>> digest({"a": np.float32([0.0])}) == digest({"a": np.float32([-0.0])})
    False
    """
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf)
        found.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return found.hexdigest()


def share_of(items: Sequence[T], processes: Processes) -> Sequence[T]:
    """The items that fall to this process when they are dealt out.

    >>> [list(share_of(range(5), Processes(3, i))) for i in range(3)]
    [[0, 3], [1, 4], [2]]
    """
    return items[processes.index :: processes.count]
