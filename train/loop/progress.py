"""What a run shows while it works: a bar with rate and time left on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from train.errors import ProgressError
from train.loop.history import Epoch


class Board(Protocol):
    """What TensorBoard's writer is used for."""

    def add_scalar(self, tag: str, value: float, step: int) -> object:
        """One point of a curve."""

    def close(self) -> None:
        """Everything is on the disk."""


class Bar:
    """One training's bar."""

    def __init__(
        self, rich: RichProgress | None, console: Console, board: Board | None, *, name: str, total: int, done: int
    ) -> None:
        self._rich, self._console, self._board = rich, console, board
        self._task = rich.add_task(name, total=total, completed=done, rate="", result="") if rich else None
        self._since, self._examples, self._shown = time.monotonic(), 0, 0.0

    def step(self, *, examples: int) -> None:
        """One step is done."""
        self._examples += examples
        if self._rich is None or self._task is None:
            return
        elapsed = time.monotonic() - self._since
        self._rich.update(self._task, advance=1, rate=f"{self._examples / max(elapsed, 1e-9):,.0f} images/s")

    def epoch(self, line: Epoch) -> None:
        """One epoch is done."""
        text = f"loss {line.loss:.4f}, validation {line.validation_accuracy:.2%}"
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, result=text)
        elif time.monotonic() - self._shown >= 5:
            self._shown = time.monotonic()
            told = f"{line.run}: epoch {line.epoch + 1}, {text}, {line.examples_per_second:,.0f} images/s"
            self._console.print(told, soft_wrap=True)
        if self._board is not None:
            for name in ("loss", "train_accuracy", "validation_accuracy", "grad_norm", "examples_per_second"):
                self._board.add_scalar(f"{line.run}/{name}", getattr(line, name), line.step)


def say(console: Console, text: str) -> None:
    """A line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Bars of trainings, one after the other.

    Args:
      console: where to show them.
      tensorboard: a folder for TensorBoard events, or None.

    Raises:
      ProgressError: TensorBoard events are wanted and the extra is not installed.
    """

    def __init__(self, console: Console, tensorboard: Path | None = None) -> None:
        self._console = console
        self._board: Board | None = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as e:
                raise ProgressError("--tensorboard wants the extra: pip install 'jaxcomp[tensorboard]'.") from e
            self._board = SummaryWriter(str(tensorboard))

    @contextmanager
    def training(self, name: str, *, total: int, done: int) -> Iterator[Bar]:
        """A bar for one training of ``total`` steps, ``done`` of which a resumed run has behind it."""
        if not self._console.is_terminal:
            yield Bar(None, self._console, self._board, name=name, total=total, done=done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[result]}"),
        )
        with RichProgress(*columns, console=self._console) as rich:
            yield Bar(rich, self._console, self._board, name=name, total=total, done=done)

    def say(self, text: str) -> None:
        """A line above the bars."""
        say(self._console, text)

    def resumed(self, name: str, *, step: int, of: int) -> None:
        """Says where a training goes on, if it does not begin."""
        if step:
            self.say(f"{name}: goes on from the checkpoint of step {step} of {of}.")

    def close(self) -> None:
        """Flushes what is written to TensorBoard."""
        if self._board is not None:
            self._board.close()
