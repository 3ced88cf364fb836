"""What each epoch gave, as lines of metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxcomp.artifact.files import write_atomically
from train.errors import RunError


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


def read_history(path: Path, epochs: int) -> list[Epoch]:
    """The lines of the epochs that the checkpoint holds; later ones will be made again.

    Raises:
      RunError: the file cannot be read as such lines.
    """
    if not epochs or not path.exists():
        return []
    try:
        lines = [Epoch(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as e:
        raise RunError(f"{str(path)!r} cannot be read ({e}); remove it, and the same command goes on without.") from e
    return [line for line in lines if line.epoch < epochs]


def write_history(path: Path, history: list[Epoch]) -> None:
    """All lines anew, so that the file is whole whenever the run is stopped."""
    write_atomically(path, "".join(json.dumps(asdict(line)) + "\n" for line in history).encode())
