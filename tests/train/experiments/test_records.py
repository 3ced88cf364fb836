"""Finished rows: what is cut, edited or older beside them is named, and the row or the file made anew."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import jaxcomp as jc
from train.experiments.records import Row, finished, write_row
from train.loop.history import Epoch, lines_of, write_history

LINE = Epoch("l1", 0, 4, 0.1, 0.5, 0.5, 2.0, 100.0)


@pytest.fixture
def run(tmp_path) -> tuple[Path, Path, Row]:
    """A folder with one finished row."""
    folder, file = tmp_path / "l1", tmp_path / "l1.safetensors"
    (folder / "checkpoints").mkdir(parents=True)
    jc.save(file, {"w": np.arange(100.0)})
    row = Row("l1", "pruning", 0.5, 0.9, 10, 0.2, 32, file.stat().st_size, 1.5)
    write_history(folder, [LINE, LINE])
    write_row(folder, row, file=file, history=[LINE, LINE])
    return folder, file, row


def test_what_is_whole_is_taken(run) -> None:
    folder, file, row = run
    assert finished(folder, file, pytest.fail) == row
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "row.json"]  # its checkpoints are gone


def test_what_is_not_there_is_not_finished(tmp_path, run) -> None:
    folder, file, _ = run
    assert finished(tmp_path / "other", file, pytest.fail) is None
    (folder / "row.json").unlink()
    assert finished(folder, file, pytest.fail) is None  # killed before: its last checkpoint is there


def edited(text: str) -> str:
    return text.replace("0.9", "0.8")


def without(text: str) -> str:
    said = json.loads(text)["row"]
    return json.dumps({k: v for k, v in said.items() if k != "macs"})


RECORDS = {
    "empty": (lambda text: "", "is damaged or of another version (Expecting value"),
    "cut": (lambda text: text[: len(text) // 2], "is damaged or of another version ("),
    "zeros": (lambda text: "\0" * len(text), "is damaged or of another version ("),
    "a list": (lambda text: "[]", "is damaged or of another version ("),
    "a number": (lambda text: "3", "is damaged or of another version ("),
    "edited": (edited, "it does not match its checksum"),
    "older": (without, "missing 1 required positional argument: 'macs'"),
    "newer": (lambda text: text.replace('"row": {', '"row": {"watts": 3, ').replace("sha256", "x"), "another version"),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_record_is_named_and_the_row_made_anew(run, damage) -> None:
    folder, file, _ = run
    change, wanted = RECORDS[damage]
    record = folder / "row.json"
    record.write_text(change(record.read_text()))
    said: list[str] = []
    assert finished(folder, file, said.append) is None
    (line,) = said
    assert line.startswith(f"l1: {str(record)!r} is damaged or of another version (")
    assert wanted in line
    assert line.endswith("; the row is made anew.")


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 16]) + data[-4:]


FILES = {
    "cut": (halved, "bytes, and its row had a file of"),
    "flipped": (flipped, "is not the file that was judged: it was damaged or changed"),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_named_and_the_row_made_anew(run, damage) -> None:
    folder, file, _ = run
    change, wanted = FILES[damage]
    file.write_bytes(change(file.read_bytes()))
    said: list[str] = []
    assert finished(folder, file, said.append) is None
    assert wanted in said[0]
    file.unlink()
    assert finished(folder, file, said.append) is None
    assert said[1] == f"l1: {str(file)!r} is missing; the row is made anew."


def test_rows_of_older_versions_are_taken_where_their_files_are_whole(run) -> None:
    folder, file, row = run
    (folder / "row.json").write_text(json.dumps(asdict(row)))
    assert finished(folder, file, pytest.fail) == row
    file.write_bytes(flipped(file.read_bytes()))
    said: list[str] = []
    assert finished(folder, file, said.append) is None
    assert "checksum" in said[0]


@pytest.mark.parametrize("text", ["", lines_of([LINE]) + '{"run": ', None])
def test_the_epochs_are_written_anew(run, text) -> None:
    folder, file, row = run
    metrics, said = folder / "metrics.jsonl", []
    if text is None:
        metrics.unlink()
    else:
        metrics.write_text(text)
    assert finished(folder, file, said.append) == row
    assert said == [f"{str(metrics)!r} is missing or damaged; it is written anew from row.json."]
    assert metrics.read_text() == lines_of([LINE, LINE])
