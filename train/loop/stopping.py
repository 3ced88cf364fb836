"""Signals that end a training: kept until a step is done and saved, where there is something to save."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from train.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the command was asked to end.

    A signal ends it at once, by :class:`Stopped`: every file is whole at any time, and the same command goes on. Within
    :meth:`at_steps`, once :meth:`now` was called, it waits for the next call, so that the caller can save before. A
    second ``SIGINT`` does not wait; a second ``SIGTERM`` does, since a job's manager may send it to a whole group of
    processes and to each of them.

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

    def __init__(self) -> None:
        self.asked: int | None = None
        self._waits = False

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
            self._waits = False
        if self.asked is not None:
            raise self.stopped()

    def now(self) -> bool:
        """Whether a signal came; from here on, signals wait for the next call."""
        self._waits = True
        return self.asked is not None

    def stopped(self, what: str = "") -> Stopped:
        """What to raise, after ``what`` was saved."""
        number = signal.SIGINT if self.asked is None else self.asked
        return Stopped(f"stopped by {signal.Signals(number).name}{what}.", number)

    def _received(self, number: int, _: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = number if self.asked is None else self.asked
        if not self._waits or again:
            raise self.stopped()

    def _again(self, *_: object) -> None:
        if not self._waits:
            raise self.stopped()

    def _lost(self, hook: Callable[[sys.UnraisableHookArgs], object], lost: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a callback of its garbage collection, JAX's say: it is raised again later."""
        if isinstance(lost.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(lost)
