"""What each epoch gave, as lines of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxcomp.artifact.files import write_atomically


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, as a line of metrics.jsonl. Accuracies are fractions."""

    run: str
    epoch: int
    step: int
    loss: float
    train_accuracy: float
    validation_accuracy: float
    grad_norm: float
    examples_per_second: float


FILE = "metrics.jsonl"
"""Its name in the folder of a row. Checkpoints and finished rows hold its lines: it is written, and read by others."""


def lines_of(history: Sequence[Epoch]) -> str:
    """The text of the file."""
    return "".join(json.dumps(asdict(line)) + "\n" for line in history)


def parsed(text: str) -> list[Epoch]:
    """The epochs of the file's text.

    Raises:
      ValueError: it is cut, edited or of another version.
    """
    try:
        return [Epoch(**json.loads(line)) for line in text.splitlines()]
    except (ValueError, TypeError) as e:
        raise ValueError(f"is damaged or of another version ({e})") from e


def write_history(folder: Path, history: Sequence[Epoch]) -> None:
    """All lines anew, so that the file is whole whenever the run is stopped."""
    write_atomically(folder / FILE, lines_of(history).encode())
