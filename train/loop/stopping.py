"""Signals that end a training: kept until a step is done and saved, where there is something to save."""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import SupportsInt

from train.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAG = 2
"""Steps until a vote is counted: as many as may be under way, so that no step waits for it."""


class Stop:
    """Whether the command was asked to end.

    A signal ends it at once, by :class:`Stopped`: every file is whole at any time, and the same command goes on. Within
    :meth:`at_steps`, once :meth:`now` was called, it waits for the next call, so that the caller can save before. A
    second ``SIGINT`` does not wait; a second ``SIGTERM`` does, since a job's manager may send it to a whole group of
    processes and to each of them.

    In a run of several processes a signal to one of them waits until all know it, and all stop at the same step: by
    ``vote``, which is held at every :meth:`now` and counted two later, or by :meth:`hear`. A second ``SIGINT`` ends
    that one.

    >>> import signal
    >>> stop = Stop()
    >>> with stop.signals():
    ...     try:
    ...         with stop.at_steps():
    ...             before = stop.now()
    ...             signal.raise_signal(signal.SIGTERM)
    ...             print(before, stop.now())
    ...     except Stopped as e:
    ...         print(e)
    False True
    stopped by SIGTERM.
    """

    def __init__(self, vote: Callable[[int | None], SupportsInt] | None = None) -> None:
        self.asked: int | None = None
        self._heard: int | None = None
        self._vote, self._votes = vote, deque[SupportsInt]()
        self._waits = vote is not None

    @property
    def agreed(self) -> int | None:
        """The signal that ends this command: of several processes, one that all know of."""
        return self.asked if self._vote is None else self._heard

    def hear(self, signals: Iterable[int | None]) -> None:
        """Takes the signals that came to the processes, which all of them hear of now."""
        self._heard = max((*(x for x in signals if x), self._heard or 0)) or None

    @contextmanager
    def signals(self) -> Iterator[Stop]:
        """Listens, in the main thread, to the signals that are not ignored; what listened before does so afterwards."""
        before, hook = {}, sys.unraisablehook
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                    before[number] = signal.signal(number, self._received)
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
            sys.unraisablehook = partial(self._lost, hook)
        try:
            yield self
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """A block of steps, at whose end a signal that waited is raised."""
        try:
            yield
        finally:
            self._waits = self._vote is not None
        self._count(left=0)
        if self.agreed is not None:
            raise self.stopped()

    def now(self) -> bool:
        """Whether a signal came; from here on, signals wait for the next call."""
        self._waits = True
        if self._vote is not None:
            self._votes.append(self._vote(self.asked))
            self._count(left=LAG)
        return self.agreed is not None

    def _count(self, *, left: int) -> None:
        while len(self._votes) > left:
            self.hear([int(self._votes.popleft())])

    def stopped(self, what: str = "") -> Stopped:
        """What to raise, after ``what`` was saved."""
        number = signal.SIGINT if self.agreed is None else self.agreed
        return Stopped(f"stopped by {signal.Signals(number).name}{what}.", number)

    def _received(self, number: int, _: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = number if self.asked is None else self.asked
        if self._vote is None and (again or not self._waits):
            raise self.stopped()
        if self._vote is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # where this process waits for others, Python would not see the next

    def _again(self, *_: object) -> None:
        if not self._waits:
            raise self.stopped()

    def _lost(self, hook: Callable[[sys.UnraisableHookArgs], object], lost: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a callback of its garbage collection, JAX's say: it is raised again later."""
        if isinstance(lost.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(lost)
