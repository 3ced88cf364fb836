"""Rows of the table as programs of other runtimes: written, run on the test split, compared with JAX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import jax
import pytest
from rich.console import Console

import jaxcomp.export
from jaxcomp.export import running
from train.configs import DIGITS, ModelConfig, OptimConfig
from train.errors import RunError
from train.experiments.main_job import export_all, run
from train.reports.exports import write_exports

SMALL = dataclasses.replace(
    DIGITS,
    model=ModelConfig("mlp"),
    baseline=OptimConfig(epochs=2, learning_rate=3e-3),
    finetune=OptimConfig(epochs=1, learning_rate=1e-3),
    checkpoint_seconds=1e9,
)


@pytest.fixture
def as_the_command_runs() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("as_the_command_runs")
def test_rows_run_elsewhere(tmp_path) -> None:
    targets = tuple(t for t in ("onnx", "stablehlo") if hasattr(jaxcomp.export, f"to_{t}"))
    config = dataclasses.replace(SMALL, out=tmp_path / "run", methods=("int8", "structured"), export=targets)
    rows = {row.name: row for row in run(config, Console(quiet=True))}
    done = export_all(config, Console(quiet=True))
    write_exports(done, config, Console(quiet=True))
    assert [(one.name, one.target) for one in done] == [(name, t) for name in rows for t in targets]
    for one in done:
        assert not one.refused
        assert one.agreement > 0.99
        assert abs(one.accuracy - rows[one.name].test_accuracy) < 0.01
        assert one.bytes < 1.1 * rows[one.name].file_bytes + 20_000
    assert [one["bytes"] for one in json.loads((config.folder / "exports.json").read_text())] == [d.bytes for d in done]


def test_a_runtime_that_is_not_there_is_said_before_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(running.PACKAGES, "litert", ("no_such_package",))
    config = dataclasses.replace(SMALL, out=tmp_path / "run", export=("litert",))
    with pytest.raises(RunError, match=r'--export litert: the package no_such_package is not installed; pip install "'):
        run(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()
