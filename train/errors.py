"""What can end a command, each with a message that says why and what to do; a command prints it and ends."""

from __future__ import annotations


class DataError(RuntimeError):
    """A data set cannot be had; the message says which, why, and what to do."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where it stopped and why."""


class RunError(RuntimeError):
    """A run that cannot start, or be written; the message says why and what to do."""


class ToldError(RunError):
    """A run of several processes cannot go on; each of them knows it and ends."""


class FederationError(RuntimeError):
    """A federation that cannot run or did not stay finite."""


class ProgressError(RuntimeError):
    """Progress cannot be shown as wanted."""


class Stopped(KeyboardInterrupt):
    """A signal ended the command; the message says what is saved. Like a key, it is no error that code may catch."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal
