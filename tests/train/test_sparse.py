"""The comparison of sparse trainings, small: its table, its JSON, and the errors of its command line."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from train.sparse import main

SMALL = ["--dataset", "digits", "--widths", "32", "--seeds", "0", "1", "--batch", "64", "--period", "5"]
SHORT = ["--optim.epochs", "8", "--optim.learning-rate", "1e-2"]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """flax's and optax's own code mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_every_method_trains_at_its_sparsity(tmp_path, capsys) -> None:
    assert main([*SMALL, *SHORT, "--sparsity", "0.8", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "sparse.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "static", "set", "rigl", "gradual"]
    kernels, biases = 64 * 32 + 32 * 10, 32 + 10
    zeros = (round(0.8 * 64 * 32) + round(0.8 * 320)) / (kernels + biases)
    for name, row in rows.items():
        assert len(row["test_accuracy"]) == 2
        assert min(row["test_accuracy"]) > 0.7, row
        assert f"{np.mean(row['test_accuracy']):.2%}" in printed
        if name != "dense":
            assert zeros <= row["zeros"] < zeros + 0.01  # a grown weight may still be zero, and so may a bias
    assert rows["dense"]["zeros"] < 0.02
    assert report["settings"]["sparsity"] == 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sparsity", "1.0"], "regrow: sparsity must be a number in [0, 1)"),
        (["--batch", "5000"], "batch is 5000; the training split has 1078 examples"),
        (["--optim.learning-rate", "1e30"], "static, seed 0: the loss is not finite in epoch"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, change, message) -> None:
    assert main([*SMALL, *SHORT, "--methods", "static", *change, "--out", str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "sparse.json").exists()


def test_a_folder_in_the_way(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*SMALL, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "error:" in capsys.readouterr().err
