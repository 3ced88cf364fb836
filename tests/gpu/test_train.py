"""The main job's row of eight bits on a GPU, at toy size: trained in float, judged on integers, loaded again."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxcomp as jc
from tests.train.experiments.test_main_job import OPTIONS
from train.__main__ import main
from train.data.sets import load
from train.loop.evaluate import accuracy
from train.loop.step import make_predict
from train.networks import MLP, ConvNet, OnGrids
from train.networks.compressed import ranges_of_dicts

pytestmark = pytest.mark.gpu

MLPS = [*OPTIONS[: OPTIONS.index("--methods")], "--methods", "w8a8"]
CONVNETS = ["digits", "--baseline.epochs", "3", "--finetune.epochs", "2", "--methods", "w8a8"]
NETWORKS = {"mlp": (MLP(), MLPS), "convnet": (ConvNet(), CONVNETS)}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_row_of_eight_bits(name, tmp_path) -> None:
    network, options = NETWORKS[name]
    data = load("digits")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*options, "--out", str(tmp_path / "run")]) == 0
        saved = jc.load(tmp_path / "run" / "w8a8.safetensors")
        integers = OnGrids(network, {".*": jc.Act(8)}, ranges_of_dicts(saved["ranges"]), integer=True)
        loaded = accuracy(make_predict(integers, data), saved["params"], saved["batch_stats"], data.test)
    base, row = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert row["test_accuracy"] == loaded
    assert row["test_accuracy"] > base["test_accuracy"] - 0.03
    assert base["test_accuracy"] > 0.8
    fake = float(row["note"].split()[-1].rstrip("%")) / 100
    assert abs(fake - row["test_accuracy"]) <= 2 / len(data.test)
    assert np.isfinite(row["seconds"])
