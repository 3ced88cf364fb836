"""Several seeds as one table: its figures against numpy, and runs that do not belong together."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from train.experiments.records import Row
from train.seeds import main

ACCURACIES = {"baseline": (0.9, 0.91, 0.92), "float": (0.93, 0.92, 0.925), "w4a4": (0.925, 0.93, 0.91)}


def write(folder: Path, seed: int, names: tuple[str, ...] = tuple(ACCURACIES), width: int = 8) -> Path:
    """A finished run's report."""
    rows = [
        Row(n, f"method {n}", None, ACCURACIES[n][seed], 1, 0.0, 32, 4000 // (1 + (n == "w4a4")), 1.0) for n in names
    ]
    folder.mkdir()
    settings = {"dataset": "digits", "model.width": width, "seed": seed}
    (folder / "report.json").write_text(json.dumps({"settings": settings, "rows": [asdict(r) for r in rows]}))
    return folder


def said(folder: Path, report: str) -> Path:
    """A run whose report is of another version, or cut."""
    folder.mkdir()
    (folder / "report.json").write_text(report)
    return folder


def test_the_table_is_the_mean_over_seeds_and_pairs_them(tmp_path, capsys) -> None:
    folders = tuple(write(tmp_path / str(seed), seed) for seed in (2, 0, 1))
    assert main(folders) == 0
    header, *lines = [x for x in capsys.readouterr().out.splitlines() if x.strip() and "─" not in x]
    assert header.split()[1:8] == ["seed", "0", "seed", "1", "seed", "2", "mean"]
    assert "against float" in header
    assert [x.split()[1] for x in lines] == list(ACCURACIES)
    change = 100 * (np.array(ACCURACIES["w4a4"]) - np.array(ACCURACIES["float"]))
    wanted = f"{change.mean():+.2f} [{change.min():+.2f}, {change.max():+.2f}]"
    assert lines[2].split()[2:6] == ["92.50%", "93.00%", "91.00%", f"{np.mean(ACCURACIES['w4a4']):.2%}"]
    assert wanted in lines[2]
    assert lines[2].split()[-2:] == ["2,000", "2.0x"]
    assert "[" not in lines[1]


def test_it_compares_with_the_row_that_is_named(tmp_path, capsys) -> None:
    folder = write(tmp_path / "0", 0)
    assert main((folder,), against="baseline") == 0
    assert "+3.00 [+3.00, +3.00]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (lambda p: (p / "nothing",), "holds no finished run"),
        (lambda p: (said(p / "b", "{}"),), "holds no finished run"),
        (lambda p: (said(p / "b", '{"settings": {"seed": 1}, "rows": [{"name": "l1"}]}'),), "holds no finished run"),
        (lambda p: (said(p / "b", "[" * 9),), "holds no finished run"),
        (lambda p: (write(p / "b", 0),), "both have seed 0"),
        (lambda p: (write(p / "b", 1, width=16),), "has model.width = 16"),
        (lambda p: (write(p / "b", 1, names=("baseline",)),), "has other rows than"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, capsys, others, message) -> None:
    assert main((write(tmp_path / "a", 0), *others(tmp_path))) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_row_that_is_not_there(tmp_path, capsys) -> None:
    assert main((write(tmp_path / "a", 0),), against="magic") == 2
    assert "no row is called 'magic'; there are baseline, float, w4a4" in " ".join(capsys.readouterr().err.split())


def test_no_run_at_all(capsys) -> None:
    assert main(()) == 2
    assert "name the folders of finished runs" in capsys.readouterr().err
