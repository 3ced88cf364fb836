"""The main job, small: its table, its files, its resumption after kill -9, and the errors of its command line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxcomp as jc
from jaxcomp.activations import LSQ
from jaxcomp.core.paths import leaves_with_paths
from train.__main__ import main
from train.configs import DIGITS, DistillConfig, ModelConfig, OptimConfig
from train.data.sets import load
from train.errors import RunError, TrainingError
from train.experiments.main_job import make_model, run
from train.loop.evaluate import accuracy
from train.loop.step import Teacher, make_predict, taught_loss
from train.networks.compressed import LearnedGrids, OnGrids, ranges_of_dicts
from train.networks.linen import MLP
from train.reports.main_job import write_report

SMALL = dataclasses.replace(
    DIGITS,
    model=ModelConfig("mlp"),
    baseline=OptimConfig(epochs=4, learning_rate=3e-3),
    finetune=OptimConfig(epochs=3, learning_rate=1e-3),
    methods=("sensitivity", "joint", "structured", "w8a8"),
    checkpoint_seconds=0.1,
)
OPTIONS = [
    "digits",
    "--model.name",
    "mlp",
    "--baseline.epochs",
    "4",
    "--baseline.learning-rate",
    "3e-3",
    "--finetune.epochs",
    "3",
    "--finetune.learning-rate",
    "1e-3",
    "--methods",
    "sensitivity",
    "joint",
    "structured",
    "w8a8",
    "--checkpoint-seconds",
    "0.1",
]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """flax's and optax's own code mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list]:
    """A finished run and its rows."""
    out = tmp_path_factory.mktemp("run") / "digits"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config = dataclasses.replace(SMALL, out=out, tensorboard=True)
        console = Console(record=True, width=120, file=io.StringIO())
        rows = run(config, console)
        write_report(rows, config, console)
        (out / "printed.txt").write_text(console.export_text())
    return out, rows


def figures(rows: list) -> list[dict]:
    """Everything of the rows that a clock does not decide."""
    return [{k: v for k, v in dataclasses.asdict(r).items() if k != "seconds"} for r in rows]


def test_the_table_says_what_the_files_hold(finished) -> None:
    out, rows = finished
    assert [r.name for r in rows] == ["baseline", "sensitivity", "joint", "structured", "w8a8"]
    data = load("digits")
    predict = make_predict(make_model(SMALL.model, data), data)
    assert all(row.file_bytes == (out / f"{row.name}.safetensors").stat().st_size for row in rows)
    for row in rows[:3]:
        file = out / f"{row.name}.safetensors"
        saved = jc.load(file)
        params = jc.materialize(saved["params"])
        assert accuracy(predict, params, saved["batch_stats"], data.test) == row.test_accuracy
        leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
        assert row.zeros == sum((x == 0).sum() for x in leaves) / sum(x.size for x in leaves)
    joint = jc.load(out / "joint.safetensors")["params"]["dense_0"]["kernel"]
    assert isinstance(joint.values, jc.quantization.Quantized)
    assert joint.values.grid.bits == 4
    assert rows[2].zeros > 0.78
    assert rows[0].file_bytes > 12 * rows[2].file_bytes
    assert rows[0].test_accuracy > 0.9


def test_the_file_of_fewer_channels_is_a_smaller_network(finished) -> None:
    out, rows = finished
    row, data = rows[3], load("digits")
    saved = jc.load(out / "structured.safetensors")
    assert sorted(saved) == ["batch_stats", "params"]
    network = MLP(widths={path: leaf.shape for path, leaf in leaves_with_paths(saved["params"])[0]})
    predict = make_predict(network, data)
    assert accuracy(predict, saved["params"], saved["batch_stats"], data.test) == row.test_accuracy
    assert saved["params"]["dense_1"]["kernel"].shape == (128, 128)
    assert row.macs == 64 * 128 + 128 * 128 + 128 * 10
    assert row.file_bytes < 0.4 * rows[0].file_bytes
    assert row.untuned_accuracy < row.test_accuracy < 1


def test_the_file_of_eight_bits_runs_on_integers(finished) -> None:
    out, rows = finished
    row, data = rows[4], load("digits")
    saved = jc.load(out / "w8a8.safetensors")
    assert sorted(saved) == ["batch_stats", "params", "ranges"]
    network = OnGrids(MLP(), {".*": jc.Act(8)}, ranges_of_dicts(saved["ranges"]), integer=True)
    predict = make_predict(network, data)
    assert accuracy(predict, saved["params"], saved["batch_stats"], data.test) == row.test_accuracy
    shapes = jax.ShapeDtypeStruct((4, *data.test.images.shape[1:]), np.uint8)
    program = jax.jit(predict).lower(saved["params"], saved["batch_stats"], shapes).as_text()
    dots = [line for line in program.splitlines() if "dot_general" in line]
    assert len(dots) == 3
    assert all(re.search(r"tensor<\S+xi8>, tensor<\S+xi8>\) -> tensor<\S+xi32>", line) for line in dots)
    assert "judged on int8 products with int32 sums" in row.note
    fake = float(row.note.split()[-1].rstrip("%")) / 100
    assert abs(fake - row.test_accuracy) <= 2 / len(data.test)
    assert abs(row.untuned_accuracy - rows[0].test_accuracy) < 0.01
    assert row.file_bytes < 0.3 * rows[0].file_bytes


@pytest.mark.slow
def test_deep_compression_is_a_small_file(finished, tmp_path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    base, row = run(dataclasses.replace(SMALL, out=tmp_path / "run", methods=("deep92",)), Console(quiet=True))
    assert row.zeros == pytest.approx(0.92, abs=0.01)
    assert row.test_accuracy > 0.5  # after three epochs
    saved = jc.load(tmp_path / "run" / "deep92.safetensors")
    kernel = saved["params"]["dense_0"]["kernel"]
    assert len(np.unique(kernel.materialize())) <= 17
    assert row.file_bytes < base.file_bytes / 30


def test_the_loss_of_a_taught_row() -> None:
    """Cross-entropy with the labels, and with what the teacher says, each by its weight."""
    network = SimpleNamespace(apply=lambda variables, x, train: x @ variables["params"])
    teacher = Teacher(network, {}, DistillConfig(weight=0.3, temperature=1.0))
    x, known = jnp.ones((2, 3)), {"params": jnp.float32(np.arange(12.0).reshape(3, 4) / 7), "batch_stats": {}}
    logits = jnp.float32(np.arange(8.0).reshape(2, 4) % 3)
    p, q = (np.asarray(jax.nn.softmax(z), np.float64) for z in (x @ known["params"], logits))
    want = 0.7 * 5.0 + 0.3 * np.mean(np.sum(p * np.log(p / q), -1))
    np.testing.assert_allclose(taught_loss(teacher, known, x, logits=logits, loss=jnp.float32(5.0)), want, rtol=1e-5)


@pytest.mark.slow
def test_a_row_that_learns_from_the_baseline(finished, tmp_path) -> None:
    out, rows = finished
    shutil.copytree(out, tmp_path / "run")  # the baseline is finished
    config = dataclasses.replace(SMALL, out=tmp_path / "run", methods=("sensitivity", "sensitivity+distill"))
    base, plain, taught = run(config, Console(quiet=True))
    assert base == rows[0]
    assert (plain.method, taught.method) == ("sensitivity pruning 20%", "sensitivity pruning 20%, distilled")
    kernels = [jc.load(config.folder / f"{name}.safetensors")["params"]["dense_0"]["kernel"] for name in config.methods]
    assert (kernels[0].materialize() != kernels[1].materialize()).any()
    assert taught.test_accuracy > base.test_accuracy - 0.05
    with pytest.raises(RunError, match=r"holds a run with distill\.weight = None, this one has 0\.9"):
        run(dataclasses.replace(config, distill=DistillConfig(weight=0.9)), Console(quiet=True))


@pytest.mark.slow
def test_the_file_of_learned_grids_runs_on_integers(finished, tmp_path) -> None:
    out, rows = finished
    shutil.copytree(out, tmp_path / "run")  # the baseline is finished
    base, row = run(dataclasses.replace(SMALL, out=tmp_path / "run", methods=("w2a2",)), Console(quiet=True))
    assert base == rows[0]
    saved = jc.load(tmp_path / "run" / "w2a2.safetensors")
    weights = saved["params"]["weights"]
    assert {p: weights[p]["kernel"].grid for p in sorted(weights)} == {
        "dense_0": jc.Int(8),
        "dense_1": jc.Int(2),
        "head": jc.Int(8),
    }
    rules = {
        re.escape(f"params/{name}/kernel"): jc.Act(bits, symmetric=signed, range=LSQ())
        for name, bits, signed in (("dense_0", 8, True), ("dense_1", 2, False), ("head", 8, False))
    }
    network, data = LearnedGrids(MLP(), rules, integer=True), load("digits")
    assert accuracy(make_predict(network, data), saved["params"], saved["batch_stats"], data.test) == row.test_accuracy
    fake = float(row.note.split()[-1].rstrip("%")) / 100
    assert abs(fake - row.test_accuracy) <= 2 / len(data.test)
    assert row.test_accuracy > rows[0].test_accuracy - 0.05
    assert row.file_bytes < 0.2 * rows[0].file_bytes


@pytest.mark.slow
def test_a_network_without_widths_is_shrunk_as_a_program(tmp_path) -> None:
    few = OptimConfig(epochs=1, learning_rate=1e-3)
    vit = ModelConfig("vit")
    config = dataclasses.replace(
        SMALL, model=vit, baseline=few, finetune=few, batch=512, methods=("structured",), out=tmp_path / "run"
    )
    rows = run(config, Console(quiet=True))
    assert "kept" in jc.load(tmp_path / "run" / "structured.safetensors")
    assert rows[1].macs < 0.7 * rows[0].macs
    assert rows[1].file_bytes < 0.7 * rows[0].file_bytes


def test_what_is_written_beside_the_table(finished) -> None:
    out, rows = finished
    report = json.loads((out / "report.json").read_text())
    assert [r["file_bytes"] for r in report["rows"]] == [r.file_bytes for r in rows]
    assert (out / "accuracy_against_bytes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = (out / "printed.txt").read_text()
    assert f"{rows[2].file_bytes:,}" in printed
    assert "prune 80% + 4-bit" in printed
    assert "half the channels removed" in printed
    assert rows[4].note in " ".join(printed.split())
    lines = [json.loads(x) for x in (out / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [0, 1, 2]
    assert all(np.isfinite(x["loss"]) for x in lines)
    assert any(p.stat().st_size > 500 for p in (out / "tensorboard").glob("events*"))


def test_the_same_command_again_makes_nothing_anew(finished) -> None:
    out, rows = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert run(dataclasses.replace(SMALL, out=out), Console(quiet=True)) == rows
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_table(finished, tmp_path) -> None:
    out, rows = finished
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "train", *OPTIONS, "--out", str(killed)]
    # Once in the baseline, once in a method: as soon as some epochs are on record.
    for name, epochs in (("baseline", 2), ("joint", 1)):
        history = killed / name / "metrics.jsonl"
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                while not (history.exists() and len(history.read_text().splitlines()) >= epochs):
                    assert process.poll() is None, "ended before it could be killed"
                    time.sleep(0.02)
            finally:
                process.kill()  # SIGKILL, however this ends: no other test finds it running
        assert not (killed / "report.json").exists()
    again = run(dataclasses.replace(SMALL, out=killed), Console(quiet=True))
    assert figures(again) == figures(rows)
    for row in rows:
        name = f"{row.name}.safetensors"
        assert (killed / name).read_bytes() == (out / name).read_bytes()


def test_settings_of_another_run_are_refused(finished, capsys) -> None:
    out, _ = finished
    with pytest.raises(RunError, match=r"holds a run with batch = 64, this one has 32; choose another folder"):
        run(dataclasses.replace(SMALL, out=out, batch=32), Console(quiet=True))
    assert main([*OPTIONS, "--out", str(out), "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with seed = 0, this one has 5" in " ".join(error.split())
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be used: .*choose another with --out"):
        run(dataclasses.replace(SMALL, out=tmp_path / "file" / "run"), Console(quiet=True))


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path) -> None:
    config = dataclasses.replace(
        SMALL, out=tmp_path / "run", baseline=OptimConfig(epochs=2, learning_rate=1e30, optimizer="sgd")
    )
    with pytest.raises(TrainingError, match=r"baseline: (loss|grad_norm) is (nan|inf) at step \d+ \(epoch 0\)"):
        run(config, Console(quiet=True))


@pytest.mark.parametrize("change", [{"batch": 5000}, {"batch": 0}, {"methods": ("magic",)}])
def test_settings_that_do_not_fit(tmp_path, change) -> None:
    with pytest.raises(
        (TrainingError, RunError), match=r"batch is \d+; it must be a multiple|no method is called 'magic'"
    ):
        run(dataclasses.replace(SMALL, out=tmp_path / "run", **change), Console(quiet=True))


@pytest.mark.slow
def test_a_bf16_resnet_trains_under_the_joint_chain(tmp_path) -> None:
    config = dataclasses.replace(
        SMALL,
        model=ModelConfig("resnet18", width=4, dtype="bfloat16"),
        baseline=OptimConfig(epochs=1, learning_rate=1e-3, optimizer="sgd"),
        finetune=OptimConfig(epochs=1, learning_rate=1e-3),
        methods=("joint",),
        batch=256,
        out=tmp_path / "run",
    )
    rows = run(config, Console(quiet=True))
    assert rows[1].zeros > 0.7


EIGHT = """
import dataclasses, pathlib, sys
from rich.console import Console
from tests.train.experiments.test_main_job import SMALL
from train.experiments.main_job import run
config = dataclasses.replace(SMALL, methods=("joint",), out=pathlib.Path(sys.argv[1]))
rows = run(config, Console(quiet=True))
print(*[r.test_accuracy for r in rows])
"""


@pytest.mark.slow
def test_eight_devices_train_as_one_does(finished, tmp_path) -> None:
    _, rows = finished
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(tmp_path / "run")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    accuracies = [float(x) for x in done.stdout.split()]
    np.testing.assert_allclose(accuracies, [rows[0].test_accuracy, rows[2].test_accuracy], atol=0.02)
