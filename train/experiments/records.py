"""A finished row on disk: row.json beside its file, each checked against the other, before a later run takes them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jaxcomp as jc
from jaxcomp.artifact.files import write_atomically
from jaxcomp.core.types import Json
from train.loop.history import FILE, Epoch, lines_of, parsed, write_history


@dataclass(frozen=True)
class Row:
    """One line of the table. Accuracies, on the test split, and zeros are fractions.

    ``untuned_accuracy`` is that before the first step of fine-tuning, ``test_accuracy`` that of the loaded file.
    ``macs`` are the multiply-adds of one image. ``note`` says what the figures do not.
    """

    name: str
    method: str
    untuned_accuracy: float | None
    test_accuracy: float
    macs: int
    zeros: float
    bits: int
    file_bytes: int
    seconds: float
    note: str = ""


class _Record(NamedTuple):
    """What row.json holds; of older versions, the row alone."""

    row: Row
    file_sha256: str | None
    history: list[Epoch] | None


def write_row(folder: Path, row: Row, *, file: Path, history: Sequence[Epoch]) -> None:
    """Makes a row finished: its record is written, and its checkpoints go.

    Raises:
      FileError: it cannot be written.
    """
    made = _sha256(file.read_bytes())
    said: dict[str, Json] = {"row": asdict(row), "file_sha256": made, "metrics": lines_of(history)}
    write_atomically(folder / "row.json", json.dumps({**said, "sha256": _sum_of(said)}).encode())
    _clear(folder)


def finished(folder: Path, file: Path, say: Callable[[str], None]) -> Row | None:
    """The row that an earlier run finished; None if it did not, or, by a line, if what it left is damaged."""
    done = folder / "row.json"
    if not done.exists():
        return None
    try:
        record = _read(done)
        _check(record, file)
    except (OSError, ValueError) as e:
        say(f"{file.stem}: {str(e).rstrip('.')}; the row is made anew.")
        return None
    _mend_history(folder, record.history, say)
    _clear(folder)
    return record.row


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _read(done: Path) -> _Record:
    """Raises:
    OSError, ValueError: it cannot be read; it is damaged, or of another version.
    """
    try:
        said = json.loads(done.read_text())
        if "row" not in said:
            return _Record(Row(**said), None, None)
        if said.pop("sha256") != _sum_of(said):
            raise ValueError("it does not match its checksum")
        return _Record(Row(**said["row"]), said["file_sha256"], parsed(said["metrics"]))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{str(done)!r} is damaged or of another version ({e})") from e


def _check(record: _Record, file: Path) -> None:
    """Raises:
    OSError, ValueError: the row's file is not there, or not the one that was judged.
    """
    if not file.exists():
        raise ValueError(f"{str(file)!r} is missing")
    size = file.stat().st_size
    if size != record.row.file_bytes:
        raise ValueError(f"{str(file)!r} has {size:,} bytes, and its row had a file of {record.row.file_bytes:,}")
    if record.file_sha256 is None:
        jc.load(file)  # which checks what an older version knew
    elif _sha256(file.read_bytes()) != record.file_sha256:
        raise ValueError(f"{str(file)!r} is not the file that was judged: it was damaged or changed")


def _mend_history(folder: Path, history: list[Epoch] | None, say: Callable[[str], None]) -> None:
    """Writes the epochs' file anew, by a line, where it is not what the record says."""
    file = folder / FILE
    try:
        text = file.read_text()
    except (OSError, ValueError):
        text = ""
    if history is not None and text != lines_of(history):
        say(f"{str(file)!r} is missing or damaged; it is written anew from row.json.")
        write_history(folder, history)


def _sum_of(said: dict[str, Json]) -> str:
    return _sha256(json.dumps(said, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
